"""Show a model's shape, its size, and what a sequence costs: bytes of state, beside a transformer's KV cache.

Weights are not loaded: everything follows from the config and from the headers of the weight files.
"""

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from based.cli import UsageError, _common

if TYPE_CHECKING:
    from based import ModelConfig

_CONTEXTS = (1024, 8192, 131072)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    from based.sizes import SIZES

    parser.add_argument("model", nargs="?", type=_common.text, metavar="PATH|ID", help=_common.MODEL_HELP)
    parser.add_argument("--revision", type=_common.text, metavar="REV", help=_common.REVISION_HELP)
    parser.add_argument("--size", choices=SIZES, help="a named shape instead of a model, in bfloat16")
    parser.add_argument("--json", action="store_true", help="one JSON object")


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    from based._loading import model_directory
    from based.sizes import named_config

    if (args.model is None) == (args.size is None):
        raise UsageError("give a model or --size")
    if args.size is not None:
        config = named_config(args.size)
        facts = {"model": args.size} | _describe(config, "bfloat16")
    else:
        directory = model_directory(args.model, args.revision)
        config, dtype, files = read_directory(directory)
        facts = {"model": args.model, "directory": str(directory)} | _describe(config, dtype)
        facts["files"] = files
    print(_common.to_json(facts) if args.json else _format(facts, config))


def read_directory(directory: Path) -> tuple["ModelConfig", str, dict[str, int]]:
    """Config, dtype of the embedding, and bytes of each weight file, from the config and the files' headers."""
    from based import FormatError, ModelConfig
    from based._core import SafetensorsFile
    from based.convert import read_weight_map

    path = directory / "config.json"
    config = ModelConfig.from_json(path.read_text(encoding="utf-8"), str(path))
    index = directory / "model.safetensors.index.json"
    names = {"model.safetensors"}
    if index.exists():
        names = set(read_weight_map(index).values())
    dtypes: dict[str, str] = {}
    for name in sorted(names):
        dtypes |= SafetensorsFile(directory / name).dtypes()
    if "embedding.weight" not in dtypes:
        raise FormatError(f"{directory}: tensor embedding.weight is missing")
    return config, dtypes["embedding.weight"], {name: (directory / name).stat().st_size for name in sorted(names)}


def _describe(config: "ModelConfig", dtype: str) -> dict[str, Any]:
    from based import sizes
    from based._core import MAX_CONTEXT
    from based._devices import available_memory

    # The runtime computes float16 models in float32, and so keeps keys and values.
    ring_dtype = "bfloat16" if dtype == "bfloat16" else "float32"
    by_kind: Counter[str] = Counter()
    for mixer in config.layers:
        by_kind[mixer.mixer] += sizes.mixer_nbytes(mixer, ring_dtype)
    state = sizes.state_nbytes(config, ring_dtype)
    token = sizes.token_nbytes(config, ring_dtype)
    longest = config.max_tokens
    if token > 0:
        longest = max(1, min(available_memory() // token, MAX_CONTEXT if longest is None else longest))
    document = json.loads(config.to_json())
    return {
        "num_parameters": config.num_parameters,
        "dtype": dtype,
        "pattern": "".join(mixer.letter for mixer in config.layers),
        "config": document,
        "state_nbytes": {"total": state, **by_kind},
        "token_nbytes": token,
        "max_context": longest,
        "transformer_kv_cache_nbytes": {str(t): sizes.kv_cache_nbytes(config, ring_dtype, t) for t in _CONTEXTS},
    }


def _format(facts: dict[str, Any], model: "ModelConfig") -> str:
    from based._core import MIXERS

    config = facts["config"]
    weights = f"{facts['num_parameters']:,} parameters, {facts['dtype']}"
    if "files" in facts:
        sizes = facts["files"].values()
        weights += f", {_common.nbytes(sum(sizes))} in {len(sizes)} file{'s' if len(sizes) > 1 else ''}"
    lines = [
        facts["model"],
        f"  weights     {weights}",
        f"  vocabulary  {config['vocab_size']:,} tokens, {config['padded_vocab_size']:,} rows, "
        + ("tied to the head" if config["tie_embeddings"] else "with a head of its own"),
        f"  width       {config['hidden_size']}, {config['norm']['type']} (eps {config['norm']['eps']:g})",
        f"  mlp         {_mlp(config['mlp'])}",
        f"  layers      {len(model.layers)}: {facts['pattern']}",
    ]
    for kind in MIXERS:
        shapes = Counter(layer.summary for layer in model.layers if layer.mixer == kind.mixer)
        lines += [f"    {kind.letter} {kind.mixer:16}  {count:3} x {shape}" for shape, count in shapes.items()]

    state = facts["state_nbytes"]
    token = facts["token_nbytes"]
    what = "state of a sequence" + (" without tokens" if token else " of any length")
    lines += ["", f"{what:41}{_common.nbytes(state['total']):>10}"]
    for kind in MIXERS:
        if kind.mixer in state:
            lines.append(f"    {kind.letter} {kind.mixer:35}{_common.nbytes(state[kind.mixer]):>10}")
    if token:
        lines.append(f"    and for each token{'':19}{_common.nbytes(token):>10}")
        lines.append(f"    longest sequence that fits in memory now{facts['max_context']:>14,} tokens")
    elif facts["max_context"] is not None:
        lines.append(f"    longest sequence{facts['max_context']:>38,} tokens")
    lines.append("KV cache of a transformer of the same width and depth")
    for tokens, nbytes in facts["transformer_kv_cache_nbytes"].items():
        ratio = nbytes / (state["total"] + int(tokens) * token)
        lines.append(f"    at {int(tokens):>7,} tokens{'':20}{_common.nbytes(nbytes):>10}   {ratio:,.1f} x")
    return "\n".join(lines)


def _mlp(mlp: dict[str, Any] | None) -> str:
    if mlp is None:
        return "none"
    biases = [f", {name} bias" for name in ("fc1", "fc2") if mlp[f"{name}_bias"]]
    return f"{'gated ' if mlp['gated'] else ''}{mlp['activation']} of {mlp['inner_size']}{''.join(biases)}"
