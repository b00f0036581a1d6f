"""Where a directory's tokenizer is, and a tokenizer.json made of the older files of GPT-2: vocab.json and merges.txt.

GPT-2's tokenizer is a byte-level BPE: each byte of a text is a letter, and merges join letters to tokens. vocab.json
says each token's id, merges.txt which two tokens are joined, the first line first. Special tokens are named by
tokenizer_config.json, special_tokens_map.json and added_tokens.json, each of which may be absent.
"""

import errno
import json
import os
from pathlib import Path
from typing import Any, overload

from based._core import FormatError, parse_limit
from based._json import read_json
from based._lfs import refuse_lfs_pointer
from based._tokenizer_json import BYTE_LETTERS, parse_tokenizer, read_bytes

_VOCAB, _MERGES, _CONFIG, _MAP, _ADDED = (
    "vocab.json",
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
TOKENIZER_FILES = ("tokenizer.json", _VOCAB, _MERGES, _CONFIG, _MAP, _ADDED)
"""What a directory's tokenizer may be made of."""

_MAX_ID = (1 << 31) - 1
_MAX_FILE = 32 << 20  # bytes of vocab.json and of merges.txt; GPT-2's have 1 MB and 0.5 MB
_MAX_CONFIG = 16 << 20  # bytes of each file that names special tokens
_CLASSES = ("GPT2Tokenizer", "GPT2TokenizerFast")
_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_END = "<|endoftext|>"  # what bos, eos and unk are in GPT-2 where no file says so
_FLAGS = ("lstrip", "rstrip", "single_word", "normalized")


@overload
def find_tokenizer(source: Path, tokenizer: None) -> Path | None: ...
@overload
def find_tokenizer(source: Path, tokenizer: str | os.PathLike[str]) -> Path: ...
@overload
def find_tokenizer(source: Path, tokenizer: str | os.PathLike[str] | None) -> Path | None: ...
def find_tokenizer(source: Path, tokenizer: str | os.PathLike[str] | None) -> Path | None:
    """The tokenizer that is asked for, by default the one in `source`, if it has one.

    A tokenizer.json, or a directory with vocab.json and merges.txt: read_tokenizer_json() reads both. Raises OSError,
    FormatError.
    """
    path = source if tokenizer is None else Path(tokenizer)
    if not path.is_dir():
        if tokenizer is not None and not path.exists():
            raise FileNotFoundError(errno.ENOENT, "no such tokenizer", str(path))
        return None if tokenizer is None else path
    if (path / "tokenizer.json").exists():
        return path / "tokenizer.json"
    missing = [name for name in (_VOCAB, _MERGES) if not (path / name).exists()]
    if not missing:
        return path
    if len(missing) == 1:
        there = _MERGES if missing == [_VOCAB] else _VOCAB
        raise FormatError(
            f"{path / there}: found no {missing[0]} beside it, expected both (a byte-level BPE of GPT-2's form), or a "
            "tokenizer.json: tokenizer=path, --tokenizer FILE names another"
        )
    if tokenizer is None:
        return None
    names = f"tokenizer.json, or {_VOCAB} and {_MERGES}"
    raise FileNotFoundError(errno.ENOENT, f"no such tokenizer: expected {names}", str(path))


def read_tokenizer_json(path: Path) -> bytes:
    """The tokenizer.json at `path`, or the one that a directory's vocab.json and merges.txt make.

    Raises OSError, FormatError. Only what is made has been checked.
    """
    if path.is_dir():
        return _make(path)
    data = read_bytes(path)
    refuse_lfs_pointer(data, path)
    return data


def _make(directory: Path) -> bytes:
    config = _optional_object(directory / _CONFIG)
    kind = config.get("tokenizer_class")
    if kind is not None and kind not in _CLASSES:
        raise FormatError(
            f"{directory / _CONFIG}: tokenizer_class: found {_show(kind)}, expected {' or '.join(_CLASSES)}: "
            f"{_VOCAB} and {_MERGES} do not say how others split texts. A tokenizer.json does"
        )
    vocab = _read_vocab(directory / _VOCAB)
    merges = _read_merges(directory / _MERGES, vocab)
    special = _Special(directory, config, vocab)
    space = _flag(config, "add_prefix_space", directory / _CONFIG)
    processor: dict[str, Any] = _byte_level(False, False)
    if _flag(config, "add_bos_token", directory / _CONFIG):
        bos = special.start_token()
        processor = {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {bos: {"id": bos, "ids": [special.ids[bos]], "tokens": [bos]}},
        }
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special.entries(),
        "normalizer": None,
        "pre_tokenizer": _byte_level(space, True),
        "post_processor": processor,
        "decoder": _byte_level(True, True),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": merges,
        },
    }
    data = json.dumps(document, ensure_ascii=False).encode()
    made = parse_tokenizer(data, f"{directory} (its tokenizer.json, made of {_VOCAB} and {_MERGES})")
    for token, wanted in special.ids.items():  # the library gives new tokens the next ids, whatever the file says
        found = made.token_to_id(token)
        if found != wanted:
            raise FormatError(
                f"{special.files[token]}: token {_show(token)}: found id {wanted}, expected {found}, the first that "
                f"{_VOCAB} leaves free: ids of added tokens have no gaps"
            )
    return data


def _byte_level(space: bool, trim: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": space, "trim_offsets": trim, "use_regex": True}


# ---- the files -------------------------------------------------------------------------------------------------------


def _show(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _optional_object(path: Path) -> dict[str, Any]:
    """A file's JSON object; an empty one for a file that is not there."""
    return _object(path, _MAX_CONFIG) if path.exists() else {}


def _object(path: Path, limit: int) -> dict[str, Any]:
    value = read_json(path, limit)
    if not isinstance(value, dict):
        raise FormatError(f"{path}: found {type(value).__name__}, expected an object")
    return value


def _check_token(token: object, where: str) -> str:
    if not isinstance(token, str) or not token:
        raise FormatError(f"{where}: found {_show(token)}, expected a text of one character or more")
    try:
        token.encode()
    except UnicodeEncodeError as error:
        raise FormatError(f"{where}: found {_show(token)}, which holds half of a surrogate pair") from error
    return token


def _check_id(value: object, where: str) -> int:
    if type(value) is not int or not 0 <= value <= _MAX_ID:
        raise FormatError(f"{where}: found id {_show(value)}, expected an integer from 0 to {_MAX_ID}")
    return value


def _flag(values: dict[str, Any], key: str, path: Path) -> bool:
    value = values.get(key)
    if value is not None and type(value) is not bool:
        raise FormatError(f"{path}: {key}: found {_show(value)}, expected true or false")
    return bool(value)


def _read_vocab(path: Path) -> dict[str, int]:
    vocab: dict[str, int] = {}
    owners: dict[int, str] = {}
    for token, value in _object(path, _MAX_FILE).items():
        id = _check_id(value, f"{path}: token {_show(token)}")
        if id in owners:
            raise FormatError(f"{path}: tokens {_show(owners[id])} and {_show(token)}: found id {id} for both")
        vocab[_check_token(token, f"{path}: a token")] = id
        owners[id] = token
    missing = [byte for byte, letter in enumerate(BYTE_LETTERS) if letter not in vocab]
    if missing:
        raise FormatError(
            f"{path}: found no token {_show(BYTE_LETTERS[missing[0]])}, the letter of byte {missing[0]}"
            + (f", nor those of {len(missing) - 1} other bytes" if len(missing) > 1 else "")
            + ", expected all 256: texts that hold it could not be read (is this a byte-level BPE?)"
        )
    return vocab


def _read_merges(path: Path, vocab: dict[str, int]) -> list[list[str]]:
    data = read_bytes(path)
    refuse_lfs_pointer(data, path)
    limit = parse_limit(_MAX_FILE)
    if len(data) > limit:
        raise FormatError(f"{path}: {len(data)} bytes or more, expected at most {limit}")
    try:
        lines = data.decode().split("\n")
    except UnicodeDecodeError as error:
        raise FormatError(f"{path}: found bytes that are not UTF-8 at {error.start}, expected text") from error
    merges: list[list[str]] = []
    seen: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        line = line.removesuffix("\r")
        if (number == 1 and line.startswith("#version")) or (number == len(lines) and not line):
            continue
        where = f"{path}: line {number}"
        pair = line.split(" ")
        if len(pair) != 2 or not all(pair):
            raise FormatError(f"{where}: found {_show(line)}, expected two tokens with one space between them")
        for token in (*pair, "".join(pair)):
            if token not in vocab:
                raise FormatError(f"{where}: found token {_show(token)}, expected one that {_VOCAB} has")
        if line in seen:
            raise FormatError(f"{where}: found {_show(line)}, which line {seen[line]} has already")
        seen[line] = number
        merges.append(pair)
    return merges


class _Special:
    """Tokens that a text is split at before merges are looked for."""

    def __init__(self, directory: Path, config: dict[str, Any], vocab: dict[str, int]) -> None:
        self.vocab = vocab
        self.owners = {id: token for token, id in vocab.items()}
        self.next_id = len(vocab)
        self.ids: dict[str, int] = {}
        self.files: dict[str, Path] = {}  # that named each
        self.attributes: dict[str, dict[str, bool]] = {}
        config_path, map_path, added_path = directory / _CONFIG, directory / _MAP, directory / _ADDED
        self.config_path = config_path

        decoder = config.get("added_tokens_decoder") or {}
        if not isinstance(decoder, dict):
            raise FormatError(f"{config_path}: added_tokens_decoder: found {_show(decoder)}, expected an object")
        with_ids = []
        for key, entry in decoder.items():
            where = f"{config_path}: added_tokens_decoder: {_show(key)}"
            if not (key.isascii() and key.isdigit() and len(key) <= 10):
                raise FormatError(f"{where}: expected a token's id")
            with_ids.append((_check_id(int(key), where), entry, config_path, where))
        for content, id in _optional_object(added_path).items():
            where = f"{added_path}: token {_show(content)}"
            with_ids.append((_check_id(id, where), content, added_path, where))
        for wanted, entry, path, where in sorted(with_ids, key=lambda found: found[0]):
            self._add(entry, path, where, wanted=wanted)

        self.roles: dict[str, str] = {}
        named = _optional_object(map_path)
        for role in _ROLES:
            for path, values in ((config_path, config), (map_path, named)):
                if role not in values:
                    continue
                token = None
                if values[role] is not None:
                    token = self._add(values[role], path, f"{path}: {role}", special=True)
                if token is not None:
                    self.roles.setdefault(role, token)
            absent = role not in config and role not in named
            if absent and role in ("bos_token", "eos_token", "unk_token") and _END in vocab:
                self.roles[role] = self._add(_END, directory / _VOCAB, f"{directory / _VOCAB}: {role}", special=True)
        for path, values in ((config_path, config), (map_path, named)):
            listed = values.get("additional_special_tokens") or []
            if not isinstance(listed, list):
                raise FormatError(f"{path}: additional_special_tokens: found {_show(listed)}, expected a list")
            for i, entry in enumerate(listed):
                self._add(entry, path, f"{path}: additional_special_tokens: entry {i}", special=True)

    def _add(self, entry: Any, path: Path, where: str, *, wanted: int | None = None, special: bool = False) -> str:
        """A token as its text, or as an object with its text and how it is looked for in a text."""
        values = entry if isinstance(entry, dict) else {"content": entry}
        token = _check_token(values.get("content"), where)
        flags = {key: _flag(values, key, path) for key in (*_FLAGS, "special")}
        flags["special"] |= special
        known = self.ids.get(token, self.vocab.get(token))
        if wanted is not None and known not in (None, wanted):
            raise FormatError(f"{where}: found id {wanted} for {_show(token)}, which has id {known} already")
        if token not in self.ids:
            id = known if known is not None else self.next_id if wanted is None else wanted
            if known is None:
                if id in self.owners:
                    raise FormatError(
                        f"{where}: found id {id} for {_show(token)}, which is that of {_show(self.owners[id])}"
                    )
                self.next_id = max(self.next_id, id + 1)
                self.owners[id] = token
            self.ids[token], self.files[token], self.attributes[token] = id, path, flags
        self.attributes[token]["special"] |= flags["special"]
        return token

    def start_token(self) -> str:
        if "bos_token" not in self.roles:
            raise FormatError(f"{self.config_path}: add_bos_token: found true, expected a bos_token with it")
        return self.roles["bos_token"]

    def entries(self) -> list[dict[str, Any]]:
        """As tokenizer.json lists them, by id."""
        tokens = sorted(self.ids, key=self.ids.__getitem__)
        return [{"id": self.ids[token], "content": token, **self.attributes[token]} for token in tokens]
