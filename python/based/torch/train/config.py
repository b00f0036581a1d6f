"""The configuration of a training run: a tree of dataclasses read from YAML, whose every key is checked.

A key's meaning, default and domain stand once, in its field: parsing, messages and the tables in docs/training.md
follow.
"""

import dataclasses
import json
import math
import re
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from based import sizes
from based._core import FormatError, ModelConfig
from based._text import printable

T = TypeVar("T")

_REQUIRED_SHAPE = ("layers", "hidden_size", "num_heads", "inner_size")
_SHAPE = (*_REQUIRED_SHAPE, "window", "feature_dim", "head_dim", "conv_size", "scan_state", "max_length")
_LETTERS = {letter: what for letter, what in sizes.LETTERS.items() if letter != "P"}  # its loss is another one
_MAX_YAML = 1 << 20  # bytes
_MAX_KEYS = 10_000


def _key(
    meaning: str,
    default: Any = MISSING,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    fixed: bool = True,
) -> Any:
    """A key of the configuration. fixed: a run that is resumed must have the value it started with."""
    metadata = {"meaning": meaning, "at_least": at_least, "above": above, "at_most": at_most, "fixed": fixed}
    return field(metadata=metadata) if default is MISSING else field(default=default, metadata=metadata)


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """Which model: `size`, `from`, or a shape of its own, `layers` and what follows it."""

    size: str | None = _key("a named shape: " + ", ".join(sizes.SIZES), None)
    from_: str | None = _key("a model to start from: a directory, or owner/name at the hub", None)
    layers: str | None = _key(
        "a letter per layer: " + ", ".join(f"{letter} {what}" for letter, what in _LETTERS.items()), None
    )
    hidden_size: int | None = _key("width of the residual stream", None, at_least=1)
    num_heads: int | None = _key("heads of all layers that have heads", None, at_least=1)
    inner_size: int | None = _key("width of the MLP; 0 for none", None, at_least=0)
    window: int | None = _key("keys of a W layer, the query's own included", None, at_least=1)
    feature_dim: int | None = _key("size of q and k per head in L layers; 16 by default", None, at_least=1)
    head_dim: int | None = _key("hidden_size / num_heads by default", None, at_least=1)
    conv_size: int | None = _key("channels of a c, S or M layer; 2 · hidden_size by default", None, at_least=1)
    scan_state: int | None = _key("numbers of state of each channel of S and M layers; 16 by default", None, at_least=1)
    max_length: int | None = _key("the most tokens of a sequence in a Y layer", None, at_least=1)
    vocab_size: int | None = _key("with tokenizer `none` only", None, at_least=2)
    special_initializer: bool = _key("σ of the first weights is √(2 / 5 hidden_size) instead of 0.02", False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Documents: exactly one of `text`, `jsonl`, `tokens`, each a list of paths or patterns (`**` for any folders)."""

    text: tuple[str, ...] | None = _key("UTF-8 files, each a document", None, fixed=False)
    jsonl: tuple[str, ...] | None = _key("files with a JSON object per line, each a document", None, fixed=False)
    tokens: tuple[str, ...] | None = _key(
        "arrays of token ids, .npy or raw .bin; documents end with the end token", None, fixed=False
    )
    separator: str | None = _key("of `text`: what stands between the documents of a file", None, fixed=False)
    field: str | None = _key("of `jsonl`: the key that has the text; `text` by default", None, fixed=False)
    dtype: Literal["uint16", "uint32"] | None = _key("of `tokens`, .bin files", None, fixed=False)
    exclude: tuple[str, ...] = _key(
        "patterns of paths to leave out, a folder with all in it; each must leave out a file", (), fixed=False
    )
    weight: float | None = _key(
        "share of the windows, relative to the other sources': for all or for none", None, above=0
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    """What to learn from."""

    tokenizer: str | None = _key(
        "`bytes`, a tokenizer.json or its folder, or `none` (sources of `tokens` only); model.from's own by default",
        None,
        fixed=False,  # what it makes of the documents is compared
    )
    end_token: str = _key("the token that ends a document, by its text", "<|endoftext|>")
    end_token_id: int | None = _key(
        "with tokenizer `none` only: the id that ends a document; model.vocab_size − 1 by default", None, at_least=0
    )
    sequence_length: int = _key("tokens of a window", at_least=2)
    train: tuple[Source, ...] = _key("list of sources")
    validation: tuple[Source, ...] = _key("list of sources", ())
    validation_fraction: float = _key(
        "share of the training documents that is kept for validation, chosen by a hash of their content; at least one, "
        "or the end of the only one",
        0.0,
        at_least=0,
        at_most=0.5,
    )
    skip_bad_documents: bool = _key(
        "leave out files that are no UTF-8 text, and lines that are no JSON objects with a text, instead of stopping",
        False,
        fixed=False,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Optimizer:
    """AdamW; the rate rises linearly, then falls along half a cosine."""

    learning_rate: float = _key("its peak", above=0)
    min_learning_rate: float = _key("its value at the end", 0.0, at_least=0)
    warmup_steps: int = _key("steps until the peak", 0, at_least=0)
    weight_decay: float = _key(
        "of matrices and the embedding; not of norms, biases, convolutions, A and D", 0.1, at_least=0
    )
    beta1: float = _key("decay of the mean of gradients", 0.9, at_least=0, at_most=0.999999)
    beta2: float = _key("decay of the mean of their squares", 0.95, at_least=0, at_most=0.999999)
    eps: float = _key("added to the denominator", 1e-8, above=0)
    clip_norm: float | None = _key("largest norm of the gradient; null for any", 1.0, above=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """How long, how, and where."""

    steps: int = _key("updates of the weights", at_least=1)
    batch_size: int = _key("windows per step, of all processes together", at_least=1)
    micro_batch_size: int | None = _key(
        "windows at a time on a device; the rest is accumulated. By default all of them", None, at_least=1, fixed=False
    )
    seed: int = _key("of the first weights and of the order of the windows", 0, at_least=0, at_most=2**32 - 1)
    skip_steps: tuple[int, ...] = _key(
        "a list of steps, from 1 on, whose windows nothing is learnt from: those of a loss that was not finite",
        (),
        at_least=1,
    )
    precision: Literal["auto", "bfloat16", "float32"] = _key(
        "of products; weights and sums are float32. `auto`: bfloat16 on a GPU, and on a CPU that has instructions for "
        "it; without them it is 5 times slower than float32, which is taken then. A run keeps what it began with",
        "auto",
    )
    activation_checkpointing: bool = _key("less memory, a third more work", False, fixed=False)
    device: str = _key("auto, cpu, cuda or cuda:N", "auto", fixed=False)
    parallel: Literal["ddp", "fsdp"] = _key(
        "with several processes: weights on each device, or in shards over all", "ddp", fixed=False
    )
    deterministic: bool = _key("the same bits in each run on the same device", True, fixed=False)
    compile: bool | None = _key(
        "layers by torch.compile: other roundings, and the first step waits for it; by default on a GPU",
        None,
        fixed=False,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Validation:
    """Measured every so often, and with every checkpoint but that of a run that is stopped."""

    every: int = _key("steps", 1000, at_least=1, fixed=False)
    tokens: int | None = _key("about how many, spread over all; null for all", None, at_least=1, fixed=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """What a run can be resumed from."""

    every: int = _key("steps", 1000, at_least=1, fixed=False)
    keep: int = _key("how many of the last; the best is kept besides", 2, at_least=1, fixed=False)
    dtype: Literal["float32", "bfloat16", "float16"] = _key("of the weights in OUTPUT/model", "bfloat16", fixed=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Logging:
    """Every step is in OUTPUT/train.csv, every validation in OUTPUT/validation.csv."""

    every: int = _key("steps between writing and showing them", 10, at_least=1, fixed=False)
    tensorboard: bool = _key("also OUTPUT/tensorboard", False, fixed=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """A training run."""

    output: str | None = _key("the folder of the run; --output instead of it", None, fixed=False)
    model: Model
    data: Data
    optimizer: Optimizer
    training: Training
    validation: Validation = field(default_factory=Validation)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    logging: Logging = field(default_factory=Logging)
    folder: Path = field(default=Path(), metadata={"hidden": True})
    """What relative paths start from: where the file is."""

    def path(self, name: str) -> Path:
        """A path of the configuration."""
        return self.folder / Path(name).expanduser()

    def output_folder(self) -> Path:
        """Where the run's files go. Raises FormatError when nobody said."""
        if self.output is None:
            raise FormatError("output: missing, expected the folder of the run, here or with --output")
        return self.path(self.output).resolve()

    def fixed(self) -> dict[str, Any]:
        """The keys that a resumed run must not change, by path."""
        return dict(_leaves(self, ""))


# ---- the model -------------------------------------------------------------------------------------------------------


def model_config(
    model: Model, vocab_size: int | None, end_token_id: int | None, start_token_id: int | None = None
) -> ModelConfig:
    """The shape that a `size` or a shape of its own asks for, with a tokenizer's numbers.

    vocab_size: None: there is no tokenizer. end_token_id: None: the last one. start_token_id: what opens a document;
    None: the end token of the one before.
    """
    if vocab_size is None:
        vocab_size = 50257 if model.size is not None and model.vocab_size is None else model.vocab_size
        if vocab_size is None:
            raise FormatError("model.vocab_size: missing, expected the number of tokens: there is no tokenizer")
        if end_token_id is None:
            end_token_id = vocab_size - 1
        elif end_token_id >= vocab_size:
            raise FormatError(f"data.end_token_id: found {end_token_id}, expected an id in [0, {vocab_size})")
    elif model.vocab_size is not None:
        raise FormatError(f"model.vocab_size: found {model.vocab_size}, expected none: the tokenizer says {vocab_size}")
    tokens = {"bos_token_id": end_token_id if start_token_id is None else start_token_id, "eos_token_id": end_token_id}
    if model.size is not None:
        document = sizes.SIZES[model.size]()
        document |= {"vocab_size": vocab_size, "padded_vocab_size": -(-vocab_size // 8) * 8} | tokens
        return ModelConfig.from_json(json.dumps(document), "model")
    shape = {name: getattr(model, name) for name in _SHAPE if getattr(model, name) is not None}
    document = sizes.recipe(**shape, vocab_size=vocab_size, end_token_id=end_token_id) | tokens
    return ModelConfig.from_json(json.dumps(document), "model")


def _check_model(model: Model) -> None:
    given = [name for name in _SHAPE if getattr(model, name) is not None]
    ways = [
        name
        for name, is_given in (("size", model.size), ("from", model.from_), (given and given[0], given))
        if is_given
    ]
    if len(ways) != 1:
        found = " and ".join(map(str, ways)) or "none of them"
        raise FormatError(f"model: found {found}, expected size, from, or a shape: {', '.join(_REQUIRED_SHAPE)}, …")
    if model.size is not None and model.size not in sizes.SIZES:
        raise FormatError(f"model.size: found {model.size!r}, expected one of {', '.join(sizes.SIZES)}")
    if model.from_ is not None:
        for name in ("vocab_size", "special_initializer"):
            if getattr(model, name):
                raise FormatError(f"model.{name}: found beside from, expected none: that model has its own")
    if not given:
        return
    for name in _REQUIRED_SHAPE:
        if getattr(model, name) is None:
            raise FormatError(f"model.{name}: missing")
    assert model.layers is not None and model.hidden_size is not None and model.num_heads is not None
    if not model.layers or not set(model.layers) <= _LETTERS.keys():
        expected = f"letters {', '.join(_LETTERS)}, one per layer"
        raise FormatError(f"model.layers: found {model.layers!r}, expected {expected}")
    for letter, name in (("W", "window"), ("Y", "max_length")):
        if letter in model.layers and getattr(model, name) is None:
            raise FormatError(f"model.{name}: missing, and layers has {letter}")
    if model.head_dim is None and model.hidden_size % model.num_heads != 0:
        found = f"{model.num_heads}, expected a divisor of hidden_size {model.hidden_size}"
        raise FormatError(f"model.num_heads: found {found}, or head_dim beside it")
    head_dim = model.head_dim or model.hidden_size // model.num_heads
    channels = model.conv_size or 2 * model.hidden_size
    if "M" in model.layers and channels % head_dim != 0:
        raise FormatError(f"model.conv_size: found {channels}, expected a multiple of a head's size, {head_dim}, for M")


def _check(config: Config) -> None:
    """What no key says by itself."""
    _check_model(config.model)
    for name in ("train", "validation"):
        sources: tuple[Source, ...] = getattr(config.data, name)
        for index, source in enumerate(sources):
            _check_source(source, f"data.{name}[{index}]", weighted=name == "train")
    if not config.data.train:
        raise FormatError("data.train: found an empty list, expected sources")
    weighted = [source.weight is not None for source in config.data.train]
    if any(weighted) and not all(weighted):
        raise FormatError(f"data.train[{weighted.index(False)}].weight: missing; either all sources have one, or none")
    if config.data.validation and config.data.validation_fraction:
        raise FormatError("data.validation_fraction: found beside data.validation, expected one of them")
    kinds = [source.tokens is None for source in config.data.train + config.data.validation]
    if config.data.tokenizer is None and config.model.from_ is None:
        raise FormatError("data.tokenizer: missing, expected bytes, a tokenizer.json, or none")
    if config.data.end_token_id is not None and config.data.tokenizer != "none":
        raise FormatError("data.end_token_id: found, expected with tokenizer none only: end_token says it by its text")
    if config.data.end_token_id is not None and config.model.from_ is not None:
        raise FormatError("data.end_token_id: found beside model.from, expected none: that model has its own")
    if config.data.tokenizer == "none" and any(kinds):
        raise FormatError("data.tokenizer: found none, expected bytes or a tokenizer.json: there are sources of text")
    optimizer, training = config.optimizer, config.training
    if optimizer.min_learning_rate > optimizer.learning_rate:
        found = f"{optimizer.min_learning_rate:g}, expected at most learning_rate, {optimizer.learning_rate:g}"
        raise FormatError(f"optimizer.min_learning_rate: found {found}")
    if optimizer.warmup_steps > training.steps:
        found = f"{optimizer.warmup_steps}, expected at most training.steps, {training.steps}"
        raise FormatError(f"optimizer.warmup_steps: found {found}")
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", training.device):
        raise FormatError(f"training.device: found {training.device!r}, expected auto, cpu, cuda or cuda:N")


def _check_source(source: Source, where: str, weighted: bool) -> None:
    kinds = [kind for kind in ("text", "jsonl", "tokens") if getattr(source, kind) is not None]
    if len(kinds) != 1:
        raise FormatError(f"{where}: found {' and '.join(kinds) or 'none'}, expected one of text, jsonl, tokens")
    if not getattr(source, kinds[0]):
        raise FormatError(f"{where}.{kinds[0]}: found an empty list, expected paths")
    for key, kind in (("separator", "text"), ("field", "jsonl"), ("dtype", "tokens")):
        if getattr(source, key) is not None and kinds[0] != kind:
            raise FormatError(f"{where}.{key}: found beside {kinds[0]}, expected with {kind} only")
    if source.separator == "":
        raise FormatError(f"{where}.separator: found an empty text")
    if source.weight is not None and not weighted:
        raise FormatError(f"{where}.weight: found, expected in data.train only")


# ---- YAML ------------------------------------------------------------------------------------------------------------


def read_config(path: Path, settings: Sequence[str] = (), output: Path | None = None) -> Config:
    """Reads and checks a configuration.

    Args:
        path: A YAML file. Relative paths in it start from its folder.
        settings: "key.path=value" each, over what the file says; list items have their number as key.
        output: Instead of its `output`.

    Raises:
        OSError: The file cannot be read.
        FormatError: It is no YAML, or a key is unknown, missing, of another type, or outside its domain.
        ImportError: PyYAML is missing.
    """
    tree = _load_yaml(path.read_bytes(), str(path))
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not key:
            raise FormatError(f"--set {setting}: expected KEY.PATH=VALUE")
        _assign(tree, key.split("."), _load_yaml(text.encode(), f"--set {key}"), f"--set {key}")
    if output is not None and isinstance(tree, dict):
        tree["output"] = str(output.absolute())
    try:
        config = dataclasses.replace(_parse(Config, tree, ""), folder=path.absolute().parent)
        if config.data.tokenizer == "none" and "end_token" in tree["data"]:
            raise FormatError("data.end_token: found beside tokenizer none, expected data.end_token_id, a number")
        _check(config)
    except FormatError as error:
        raise FormatError(f"{path}: {error}") from None
    return config


def _load_yaml(data: bytes, where: str) -> Any:
    try:
        import yaml
    except ModuleNotFoundError as error:
        raise ImportError('training needs PyYAML, which is not installed: pip install "based[train]"') from error
    if len(data) > _MAX_YAML:
        raise FormatError(f"{where}: {len(data)} bytes, expected at most {_MAX_YAML}")

    class Loader(yaml.SafeLoader):
        merged = 0

        def fail(self, problem: str, node: Any) -> typing.NoReturn:
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)

        def construct_object(self, node: Any, deep: bool = False) -> Any:
            try:
                return super().construct_object(node, deep)
            except (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError):
                kind = node.tag.removeprefix("tag:yaml.org,2002:")
                self.fail(f"{_show(node.value)} is not of the type {kind!r}", node)

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            if not isinstance(node, yaml.MappingNode):
                self.fail(f"found {_show(node.value)}, expected keys and values", node)
            seen: set[str] = set()
            for key, _ in node.value:
                if not isinstance(key, yaml.ScalarNode):
                    self.fail("a key is a list or a mapping, expected a name", key)
                if key.value in seen:
                    self.fail(f"key {key.value!r} twice", key)
                seen.add(key.value)
            self.flatten_mapping(node)
            result = {}
            for key, value in node.value:
                name = self.construct_object(key, deep=True)
                try:
                    result[name] = self.construct_object(value, deep)
                except yaml.constructor.ConstructorError as error:
                    if error.problem_mark is not None and error.problem_mark.index == value.start_mark.index:
                        self.fail(f"{printable(str(name))}: {error.problem}", value)
                    raise
            return result

        def flatten_mapping(self, node: Any) -> None:
            super().flatten_mapping(node)
            self.merged += len(node.value)
            if self.merged > _MAX_KEYS:  # merges of merges grow as a power of their depth
                self.fail(f"more than {_MAX_KEYS} keys with those that << adds", node)

        def construct_yaml_int(self, node: Any) -> int:
            text = node.value.replace("_", "")
            if ":" in text or re.fullmatch(r"[-+]?0[0-9]+", text):
                value = super().construct_yaml_int(node)
                advice = f"write {value} for that number, {text.lstrip('-+0') or 0} for another, quotes for a text"
                self.fail(f"YAML reads {node.value} as {value}, in base {60 if ':' in text else 8}: {advice}", node)
            return int(super().construct_yaml_int(node))

        def construct_yaml_float(self, node: Any) -> float:
            if ":" in node.value:
                self.fail(f"YAML reads {node.value} in base 60: write a decimal number, or quotes for a text", node)
            return float(super().construct_yaml_float(node))

    Loader.add_constructor("tag:yaml.org,2002:int", Loader.construct_yaml_int)
    Loader.add_constructor("tag:yaml.org,2002:float", Loader.construct_yaml_float)
    # A date is a text here: the name of a folder, it may be.
    date = "tag:yaml.org,2002:timestamp"
    Loader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != date]
        for first, resolvers in Loader.yaml_implicit_resolvers.items()
    }
    # YAML 1.1 takes 1e-4 for a text.
    number = re.compile(r"[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+.0123456789"))
    try:
        return yaml.load(data.decode("utf-8-sig"), Loader)  # a safe one
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f"line {mark.line + 1}: " if mark is not None else ""
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        raise FormatError(f"{where}: {line}not YAML: {printable(problem)}") from None
    except (UnicodeDecodeError, RecursionError) as error:
        raise FormatError(f"{where}: not YAML: {error}") from None


def _assign(tree: Any, path: list[str], value: Any, where: str) -> None:
    for position, name in enumerate(path):
        last = position == len(path) - 1
        if isinstance(tree, dict):
            key: Any = name
            if not last and tree.get(key) is None:
                tree[key] = {}
        elif isinstance(tree, list) and name.isdigit() and int(name) < len(tree):
            key = int(name)
        else:
            raise FormatError(f"{where}: there is no {name!r} in {'.'.join(path[:position]) or 'the configuration'}")
        if last:
            tree[key] = value
        else:
            tree = tree[key]


def _name(item: "dataclasses.Field[Any]") -> str:
    return item.name.rstrip("_")


def _keys(cls: Any) -> "list[dataclasses.Field[Any]]":
    return [item for item in dataclasses.fields(cls) if not item.metadata.get("hidden")]


def _parse(cls: type[T], tree: Any, where: str) -> T:
    """A dataclass from a mapping."""
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise FormatError(f"{where or 'the file'}: found {_show(tree)}, expected keys and values")
    hints = typing.get_type_hints(cls)
    keys = {_name(item): item for item in _keys(cls)}
    prefix = where + "." if where else ""
    for key in tree:
        if key not in keys:
            shown = printable(key) if isinstance(key, str) else _show(key)
            raise FormatError(f"{prefix}{shown}: unknown key, expected one of {', '.join(keys)}")
    values = {}
    for name, item in keys.items():
        if name in tree:
            values[item.name] = _convert(hints[item.name], tree[name], prefix + name, item.metadata)
        elif item.default is MISSING and item.default_factory is MISSING:
            raise FormatError(
                f"{prefix}{name}: missing" + (f": {meaning}" if (meaning := item.metadata.get("meaning")) else "")
            )
    return cls(**values)


def _convert(kind: Any, value: Any, where: str, domain: Any) -> Any:
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        if value is None:
            return None
        kind = next(k for k in typing.get_args(kind) if k is not types.NoneType)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return _parse(kind, value, where)
    origin = typing.get_origin(kind)
    if origin is tuple:
        item = typing.get_args(kind)[0]
        if item is str and isinstance(value, str):
            value = [value]  # one path
        if not isinstance(value, list):
            raise FormatError(f"{where}: found {_show(value)}, expected a list")
        return tuple(_convert(item, v, f"{where}[{i}]", domain) for i, v in enumerate(value))
    if origin is Literal:
        choices = typing.get_args(kind)
        if value not in choices:
            raise FormatError(f"{where}: found {_show(value)}, expected {' or '.join(choices)}")
        return value
    expected = {int: "an integer", float: "a number", bool: "true or false", str: "a text"}[kind]
    if kind is float and type(value) is int:
        try:
            value = float(value)
        except OverflowError:
            raise FormatError(f"{where}: found {_show(value)}, expected {expected} below 1e308") from None
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
        raise FormatError(f"{where}: found {_show(value)}, expected {expected}")
    for bound, sign, holds in (
        (domain.get("at_least"), "≥", lambda b: value >= b),
        (domain.get("above"), ">", lambda b: value > b),
        (domain.get("at_most"), "≤", lambda b: value <= b),
    ):
        if bound is not None and not holds(bound):
            raise FormatError(f"{where}: found {_show(value)}, expected {expected} {sign} {bound}")
    return value


def _show(value: Any) -> str:
    """The beginning of a value, as JSON: aliases of YAML can make it endless."""
    if value is None:
        return "nothing"
    text = ""
    try:
        for part in json.JSONEncoder(ensure_ascii=False, default=str).iterencode(value):
            text += part
            if len(text) > 60:
                break
    except (ValueError, RecursionError):  # a list is its own item; an integer of more than 4,300 digits
        text += "…"
    return printable(text if len(text) <= 60 else text[:57] + "…")


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    for item in _keys(value):
        part, where = getattr(value, item.name), f"{path}.{_name(item)}" if path else _name(item)
        if dataclasses.is_dataclass(part):
            yield from _leaves(part, where)
        elif isinstance(part, tuple) and part and dataclasses.is_dataclass(part[0]):
            for index, element in enumerate(part):
                yield from _leaves(element, f"{where}[{index}]")
        elif item.metadata["fixed"] and part != ():
            yield where, list(part) if isinstance(part, tuple) else part  # as JSON has it


# ---- documentation ---------------------------------------------------------------------------------------------------


def tables() -> str:
    """The keys, as docs/training.md shows them."""
    parts = []
    sections: list[tuple[str, Any]] = [("", Config), ("model", Model), ("data", Data), ("data.train[…]", Source)]
    sections += [(name, typing.get_type_hints(Config)[name]) for name in ("optimizer", "training", "validation")]
    sections += [("checkpoint", Checkpoint), ("logging", Logging)]
    for section, cls in sections:
        lines = [f"**`{section}`**: {cls.__doc__}", ""] if section else []
        lines += ["| key | default | |", "|---|---|---|"]
        for item in _keys(cls):
            if item.metadata.get("meaning"):
                star = "" if item.metadata["fixed"] else "*"
                lines.append(f"| `{_name(item)}`{star} | {_default(item)} | {item.metadata['meaning']} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _default(item: "dataclasses.Field[Any]") -> str:
    if item.default is MISSING:
        return "required"
    if item.default is None or item.default == ():
        return ""
    text = str(item.default).lower() if isinstance(item.default, bool) else str(item.default)
    return "`" + text.replace("|", "\\|") + "`"
