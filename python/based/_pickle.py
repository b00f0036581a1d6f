"""Reads the tensors of a PyTorch zip file without torch and without running anything that the file asks for.

The pickle inside is interpreted here, opcode by opcode, on values that are only str, int, bool, None, tuple, dict
and the markers below. Nothing in it can import, call or set an attribute of anything. An opcode makes at most one value
of 100 bytes, or a text that the file holds; their number and the size of the pickle are limited (the standard library's
unpickler would allocate whatever a memo index says).
"""

from __future__ import annotations

import math
import os
import pickletools
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from based._core import FormatError, parse_limit
from based._lfs import refuse_lfs_pointer

_BLOCK = 8 << 20  # bytes that are read at once


@dataclass(frozen=True, eq=False)
class Storage:
    """A part of a file. It is read and not mapped: a file that is cut short meanwhile is an error, not a signal."""

    dtype: str  # "float32", "bfloat16", "float16", "int64" and others that no model has
    numpy_dtype: np.dtype[Any]  # bfloat16 as uint16
    size: int  # elements
    read: Callable[[int, int], np.ndarray[Any, Any]]  # (first byte, bytes) → a new uint8 array


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file. Each look at its numbers reads them: OSError, or FormatError when the file is shorter now."""

    storage: Storage
    shape: tuple[int, ...]
    offset: int = 0  # in elements, and so the strides
    strides: tuple[int, ...] | None = None  # None: one element behind another

    @property
    def dtype(self) -> str:
        return self.storage.dtype

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        return self.storage.numpy_dtype

    @property
    def contiguous(self) -> bool:
        """Whether the elements lie one behind another in the file."""
        expected = 1
        for extent, step in zip(self.shape[::-1], (self.strides or ())[::-1], strict=self.strides is not None):
            if extent > 1 and step != expected:
                return False
            expected *= extent
        return True

    @property
    def bits(self) -> np.ndarray[Any, Any]:
        """All of it, in memory."""
        if self.contiguous:
            return self._elements(0, math.prod(self.shape)).reshape(self.shape)
        # The stride of an axis of one element is never used, and may be anything.
        steps = [0 if extent == 1 else step for extent, step in zip(self.shape, self.strides or (), strict=True)]
        span = 1 + sum((extent - 1) * step for extent, step in zip(self.shape, steps, strict=True))
        nbytes = [step * self.numpy_dtype.itemsize for step in steps]
        return np.lib.stride_tricks.as_strided(self._elements(0, span), self.shape, nbytes, writeable=False)

    def read(self, first: int, nbytes: int) -> np.ndarray[Any, Any]:
        """Bytes of a contiguous tensor."""
        return self.storage.read(self.offset * self.numpy_dtype.itemsize + first, nbytes)

    def row_blocks(self, elements: int) -> Iterator[np.ndarray[Any, Any]]:
        """Slices of the first axis, of about so many elements each; one slice of a number.

        Memory holds one slice, and all of a tensor that does not lie in order.
        """
        if not self.shape:
            yield self.bits
            return
        rows, row = self.shape[0], math.prod(self.shape[1:])
        count = max(1, elements // max(1, row))
        whole = None if self.contiguous else self.bits
        for begin in range(0, rows, count):
            end = min(rows, begin + count)
            if whole is not None:
                yield np.ascontiguousarray(whole[begin:end])
            else:
                yield self._elements(begin * row, (end - begin) * row).reshape(end - begin, *self.shape[1:])

    def _elements(self, first: int, count: int) -> np.ndarray[Any, Any]:
        size = self.numpy_dtype.itemsize
        return self.read(first * size, count * size).view(self.numpy_dtype)


class _File:
    """A file that is open as long as something may read it."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path, self.descriptor = path, descriptor
        self.size = os.fstat(descriptor).st_size

    def __del__(self) -> None:
        os.close(self.descriptor)

    def read(self, offset: int, count: int) -> np.ndarray[Any, Any]:
        out = np.empty(count, np.uint8)
        done = 0
        while done < count:
            n = os.preadv(self.descriptor, [out[done : done + (1 << 30)].data], offset + done)
            if n == 0:
                raise FormatError(
                    f"{self.path}: found {offset + done} bytes, expected the {self.size} that it had when it was "
                    "opened: another program shortened it meanwhile"
                )
            done += n
        return out


@dataclass(frozen=True)
class _Global:
    name: str


_ORDERED_DICT = "collections.OrderedDict"
_REBUILD_TENSOR = "torch._utils._rebuild_tensor_v2"
_REBUILD_PARAMETER = "torch._utils._rebuild_parameter"  # a tensor that is trained
_STORAGES: dict[str, tuple[str, np.dtype[Any]]] = {
    "torch.FloatStorage": ("float32", np.dtype("<f4")),
    "torch.BFloat16Storage": ("bfloat16", np.dtype("<u2")),
    "torch.HalfStorage": ("float16", np.dtype("<f2")),
    "torch.LongStorage": ("int64", np.dtype("<i8")),
    # Read, so that whoever wants another dtype can name the tensor.
    "torch.DoubleStorage": ("float64", np.dtype("<f8")),
    "torch.IntStorage": ("int32", np.dtype("<i4")),
    "torch.ShortStorage": ("int16", np.dtype("<i2")),
    "torch.CharStorage": ("int8", np.dtype("i1")),
    "torch.ByteStorage": ("uint8", np.dtype("u1")),
    "torch.BoolStorage": ("bool", np.dtype("u1")),
}
_GLOBALS = {name: _Global(name) for name in (_ORDERED_DICT, _REBUILD_TENSOR, _REBUILD_PARAMETER, *_STORAGES)}

_LEGACY_MAGIC = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"  # torch.save before 1.6: a bare pickle
_MAX_PICKLE = 8 << 20  # bytes; 500 tensors take 80,000
_MAX_OPCODES = 1_000_000  # 500 tensors take 13,000
_MAX_DIRECTORY = 16 << 20  # bytes, of 200,000 members


def read_torch_file(path: Path) -> dict[str, StoredTensor]:
    """The tensors that `torch.save` stored, by name.

    The file must hold a dict (or OrderedDict) of dense tensors of numbers, which may be parameters. Raises OSError when
    it cannot be read, FormatError for anything else in it.
    """
    with path.open("rb") as file:
        head = file.read(64)
        refuse_lfs_pointer(head, path)
        if head.startswith(_LEGACY_MAGIC):
            raise FormatError(
                f"{path}: a PyTorch file in the legacy format (before 1.6); expected the zip format. "
                "Load it and save it again with a current torch.save"
            )
        if not head.startswith(b"PK"):
            raise FormatError(f"{path}: not a PyTorch zip file: it begins with {head[:4]!r}, expected b'PK\\x03\\x04'")
        content = _File(path, os.dup(file.fileno()))
    return _Archive(content).tensors()


def _check_directory_size(file: _File) -> None:
    """What zipfile would read and make objects of: it believes the record at the end of the file."""
    length = min(file.size, 22 + 65535 + 76)
    path, tail = file.path, file.read(file.size - length, length).tobytes()
    end = tail.rfind(b"PK\5\6")
    if end < 0 or end + 16 > len(tail):
        return  # zipfile will refuse it
    (size,) = struct.unpack_from("<I", tail, end + 12)
    wide = tail.rfind(b"PK\6\6", 0, end)
    if wide >= 0 and wide + 48 <= len(tail):
        size = max(struct.unpack_from("<Q", tail, wide + 40)[0], 0 if size == 0xFFFFFFFF else size)
    if size > (limit := parse_limit(_MAX_DIRECTORY)):
        raise FormatError(f"{path}: a zip directory of {size} bytes, expected at most {limit}")


def _zip_members(path: Path) -> dict[str, zipfile.ZipInfo]:
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
    except (zipfile.BadZipFile, struct.error, ValueError, NotImplementedError, EOFError, IndexError) as error:
        raise FormatError(f"{path}: not a readable zip file (truncated?): {error}") from error
    members: dict[str, zipfile.ZipInfo] = {}
    for info in infos:
        if info.filename in members:
            raise FormatError(f"{path}: the zip holds {info.filename!r} twice")
        members[info.filename] = info
    return members


class _Archive:
    def __init__(self, file: _File) -> None:
        self.path = path = file.path
        self.file = file
        _check_directory_size(file)
        self.members = _zip_members(path)
        # torch.save can be told to leave them out: all are 0 then.
        self.has_checksums = any(info.CRC != 0 for info in self.members.values())
        roots = [name[: -len("data.pkl")] for name in self.members if name.rsplit("/", 1)[-1] == "data.pkl"]
        if len(roots) != 1:
            found = "no data.pkl" if not roots else f"{len(roots)} members named data.pkl"
            raise FormatError(f"{path}: not a PyTorch file: the zip holds {found}, expected one")
        self.root = roots[0]
        self.storages: dict[str, Storage] = {}

    def member(self, name: str, limit: int) -> bytes:
        """The bytes of a member, which has at most `limit`."""
        begin, size = self.place(name)
        if size > limit:
            raise FormatError(f"{self.path}: {name} of {size} bytes, expected at most {limit}")
        return self.file.read(begin, size).tobytes()

    def place(self, name: str) -> tuple[int, int]:
        """First byte and number of bytes of an uncompressed member, whose checksum is checked.

        Local headers may leave sizes out: the central directory tells.
        """
        info = self.members.get(self.root + name)
        if info is None:
            raise FormatError(f"{self.path}: the zip holds no {self.root + name!r}")
        if info.flag_bits & 1:
            raise FormatError(f"{self.path}: {info.filename!r} is encrypted")
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
            raise FormatError(f"{self.path}: {info.filename!r} is compressed, expected a stored (uncompressed) member")
        header = info.header_offset
        local = self.file.read(header, 30).tobytes() if 0 <= header <= self.file.size - 30 else b""
        if not local.startswith(b"PK\x03\x04"):
            raise FormatError(f"{self.path}: {info.filename!r}: no local header at byte {header}")
        name_length, extra_length = struct.unpack_from("<HH", local, 26)
        begin: int = header + 30 + name_length + extra_length
        if begin + info.file_size > self.file.size:
            raise FormatError(
                f"{self.path}: {info.filename!r}: {info.file_size} bytes at byte {begin} do not fit in "
                f"a file of {self.file.size} bytes"
            )
        if self.has_checksums and (found := self._checksum(begin, info.file_size)) != info.CRC:
            raise FormatError(
                f"{self.path}: {info.filename!r} is damaged: its CRC-32 is {found:08x}, expected {info.CRC:08x} as the "
                "zip's directory says. Copy or download the file again"
            )
        return begin, info.file_size

    def _checksum(self, begin: int, size: int) -> int:
        found = 0
        for offset in range(0, size, _BLOCK):
            found = zlib.crc32(self.file.read(begin + offset, min(_BLOCK, size - offset)).data, found)
        return found

    def tensors(self) -> dict[str, StoredTensor]:
        if self.root + "byteorder" in self.members:
            order = self.member("byteorder", 16)
            if order.strip() != b"little":
                raise FormatError(f"{self.path}: byteorder {order!r}, expected b'little'")
        top = _Machine(self, self.member("data.pkl", parse_limit(_MAX_PICKLE))).run()
        if not isinstance(top, dict):
            raise FormatError(f"{self.path}: holds {_describe(top)}, expected a dict of tensors")
        for container in ("state_dict", "model"):  # of a training checkpoint with nothing else in it but numbers
            if isinstance(top.get(container), dict):
                top = top[container]
        for name, value in top.items():
            if not isinstance(name, str) or not isinstance(value, StoredTensor):
                raise FormatError(
                    f"{self.path}: {_describe(name)} is {_describe(value)}, expected a name and its tensor"
                )
        return top

    def storage(self, pid: object) -> Storage:
        """Resolves a persistent id ("storage", type, key, location, number of elements)."""
        if not (isinstance(pid, tuple) and len(pid) == 5 and pid[0] == "storage"):
            raise FormatError(
                f"{self.path}: data.pkl: persistent id {_describe(pid)}, expected ('storage', type, key, location, n)"
            )
        _, kind, key, location, numel = pid
        if not (isinstance(kind, _Global) and kind.name in _STORAGES):
            raise FormatError(
                f"{self.path}: data.pkl: a storage of {_describe(kind)}, expected one of {sorted(_STORAGES)}"
            )
        if not (isinstance(key, str) and isinstance(location, str) and _is_size(numel)):
            raise FormatError(f"{self.path}: data.pkl: found storage {_describe(pid)}, expected texts and a size")
        dtype, numpy_dtype = _STORAGES[kind.name]
        known = self.storages.get(key)
        if known is None:
            begin, nbytes = self.place(f"data/{key}")
            if nbytes != numel * numpy_dtype.itemsize:
                raise FormatError(
                    f"{self.path}: {self.root}data/{key} has {nbytes} bytes, expected {numel} {dtype} values = "
                    f"{numel * numpy_dtype.itemsize} bytes"
                )
            file = self.file
            known = Storage(dtype, numpy_dtype, numel, lambda first, count: file.read(begin + first, count))
            self.storages[key] = known
        elif known.dtype != dtype or known.size != numel:
            raise FormatError(
                f"{self.path}: data.pkl: storage {key!r} is {numel} {dtype} values here, "
                f"{known.size} {known.dtype} values before"
            )
        return known

    def tensor(self, arguments: tuple[object, ...]) -> StoredTensor:
        """_rebuild_tensor_v2(storage, offset, size, stride, requires_grad, hooks[, metadata]); strides in elements."""
        if len(arguments) not in (6, 7):
            raise FormatError(f"{self.path}: data.pkl: a tensor with {len(arguments)} arguments, expected 6 or 7")
        storage, offset, size, stride = arguments[:4]
        if not isinstance(storage, Storage):
            raise FormatError(f"{self.path}: data.pkl: a tensor over {_describe(storage)}, expected a storage")
        if not (
            _is_size(offset)
            and isinstance(size, tuple)
            and isinstance(stride, tuple)
            and len(size) == len(stride) <= 8
            and all(_is_size(number) for number in size + stride)
        ):
            raise FormatError(
                f"{self.path}: data.pkl: tensor with offset {_describe(offset)}, size {_describe(size)}, "
                f"stride {_describe(stride)}; expected sizes and as many strides"
            )
        count, last = 1, offset
        for extent, step in zip(size, stride, strict=True):
            count *= extent
            last += (extent - 1) * step
        available = storage.size
        # Also refuses a tensor of more elements than its storage (stride 0): a few bytes must not become gigabytes.
        if count > available or last >= available or count == 0:
            raise FormatError(
                f"{self.path}: data.pkl: a tensor of shape {size}, stride {stride}, offset {offset} does not fit in "
                f"its storage of {available} elements"
            )
        return StoredTensor(storage, size, offset, stride)


def _is_size(value: object) -> TypeGuard[int]:
    return type(value) is int and 0 <= value < 1 << 62


def _describe(value: object) -> str:
    if isinstance(value, StoredTensor):
        return "a tensor"
    if isinstance(value, Storage):
        return "a storage"
    if isinstance(value, _Global):
        return value.name
    if isinstance(value, dict) or (
        isinstance(value, tuple) and not all(isinstance(item, (str, int)) for item in value)
    ):
        return f"a {type(value).__name__} of {len(value)}"
    if isinstance(value, str):
        return repr(_short(value))
    if isinstance(value, int) and value.bit_length() > 256:
        return f"an integer of {value.bit_length()} bits"
    return _short(repr(value))


def _short(text: str) -> str:
    return text if len(text) <= 80 else text[:77] + "..."


_MARK = object()

_OPCODES = {ord(opcode.code): opcode.name for opcode in pickletools.opcodes}


def _line(data: bytes, position: int) -> tuple[str, int]:
    end = data.index(b"\n", position)
    return data[position:end].decode("ascii"), end + 1


def _two_lines(data: bytes, position: int) -> tuple[str, int]:
    module, position = _line(data, position)
    name, position = _line(data, position)
    return f"{module} {name}", position


def _number(form: str) -> Callable[[bytes, int], tuple[int, int]]:
    reader = struct.Struct(form)

    def read(data: bytes, position: int) -> tuple[int, int]:
        (number,) = reader.unpack_from(data, position)
        return number, position + reader.size

    return read


def _counted(form: str) -> Callable[[bytes, int], tuple[bytes, int]]:
    length_of = _number(form)

    def read(data: bytes, position: int) -> tuple[bytes, int]:
        length, begin = length_of(data, position)
        if length > len(data) - begin:
            raise ValueError(f"{length} bytes are announced, {len(data) - begin} are left")
        return data[begin : begin + length], begin + length

    return read


def _text(form: str) -> Callable[[bytes, int], tuple[str, int]]:
    counted = _counted(form)

    def read(data: bytes, position: int) -> tuple[str, int]:
        encoded, position = counted(data, position)
        return encoded.decode("utf-8", "surrogatepass"), position

    return read


def _long1(data: bytes, position: int) -> tuple[int, int]:
    encoded, position = _counted("<B")(data, position)
    return int.from_bytes(encoded, "little", signed=True), position


# How the argument of an opcode is read: (data, its first byte) → (argument, the byte behind it).
_ARGUMENTS: dict[str, Callable[[bytes, int], tuple[Any, int]]] = {
    "PROTO": _number("<B"),
    "FRAME": _number("<Q"),
    "BINPUT": _number("<B"),
    "LONG_BINPUT": _number("<I"),
    "BINGET": _number("<B"),
    "LONG_BINGET": _number("<I"),
    "GLOBAL": _two_lines,
    "INST": _two_lines,
    "BININT": _number("<i"),
    "BININT1": _number("<B"),
    "BININT2": _number("<H"),
    "LONG1": _long1,
    "BINUNICODE": _text("<I"),
    "SHORT_BINUNICODE": _text("<B"),
}


class _Machine:
    """The pickle machine, reduced to what state dicts are made of (protocols 2 to 5)."""

    def __init__(self, archive: _Archive, data: bytes) -> None:
        self.archive = archive
        self.data = data
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        # Operations without a result: they take their operands from the stack.
        self.actions: dict[str, Callable[[Any], None]] = {
            "MARK": lambda _: self.stack.append(_MARK),
            "BINPUT": self._put,
            "LONG_BINPUT": self._put,
            "MEMOIZE": lambda _: self._put(len(self.memo)),
            "SETITEM": lambda _: self._set_items([self._pop(), self._pop()][::-1]),
            "SETITEMS": lambda _: self._set_items(self._pop_mark()),
            "BUILD": lambda _: self._build(),
        }
        # Operations that push their result.
        self.values: dict[str, Callable[[Any], Any]] = {
            "NONE": lambda _: None,
            "NEWTRUE": lambda _: True,
            "NEWFALSE": lambda _: False,
            "EMPTY_DICT": lambda _: {},
            "EMPTY_TUPLE": lambda _: (),
            "TUPLE": lambda _: tuple(self._pop_mark()),
            "TUPLE1": lambda _: (self._pop(),),
            "TUPLE2": lambda _: tuple([self._pop(), self._pop()][::-1]),
            "TUPLE3": lambda _: tuple([self._pop(), self._pop(), self._pop()][::-1]),
            "BINGET": self._get,
            "LONG_BINGET": self._get,
            "GLOBAL": lambda argument: self._global(argument.replace(" ", ".", 1)),
            "STACK_GLOBAL": lambda _: self._stack_global(),
            "BINPERSID": lambda _: self.archive.storage(self._pop()),
            "REDUCE": lambda _: self._reduce(),
        }
        for literal in ("BININT", "BININT1", "BININT2", "LONG1", "BINUNICODE", "SHORT_BINUNICODE"):
            self.values[literal] = lambda argument: argument

    def run(self) -> object:
        data, position = self.data, 0
        try:
            for _ in range(parse_limit(_MAX_OPCODES)):
                if position >= len(data):
                    raise self._error("damaged: ends without STOP")
                start, code = position, data[position]
                name = _OPCODES.get(code)
                if name is None:
                    raise self._error(f"damaged: no opcode at byte {start}, found {code:#04x}")
                position += 1
                argument: Any = None
                if read := _ARGUMENTS.get(name):
                    argument, position = read(data, position)
                if name in self.actions:
                    self.actions[name](argument)
                elif name in self.values:
                    self.stack.append(self.values[name](argument))
                elif name == "STOP":
                    result = self._pop()
                    if self.stack:
                        raise self._error(f"{len(self.stack)} values left at the end")
                    return result
                elif name == "INST":
                    self._global(argument.replace(" ", ".", 1))
                elif name not in ("PROTO", "FRAME"):
                    raise self._error(
                        f"opcode {name} at byte {start}: nothing that tensors need. Is it a training checkpoint, "
                        "with more than the weights? Save its state_dict (Lightning) or model (nanoGPT) alone: "
                        'torch.save(torch.load(file)["state_dict"], "pytorch_model.bin")'
                    )
        except FormatError:
            raise
        except (ValueError, struct.error) as error:  # of an argument
            raise self._error(f"damaged: {error}") from error
        raise self._error(f"more than {parse_limit(_MAX_OPCODES)} opcodes, far beyond any state dict")

    def _error(self, message: str) -> FormatError:
        return FormatError(f"{self.archive.path}: data.pkl: {message}")

    def _pop(self) -> Any:
        if not self.stack or self.stack[-1] is _MARK:
            raise self._error("damaged: a value is missing on its stack")
        return self.stack.pop()

    def _pop_mark(self) -> list[Any]:
        """Everything above the topmost mark, which goes too."""
        for index in range(len(self.stack) - 1, -1, -1):
            if self.stack[index] is _MARK:
                items = self.stack[index + 1 :]
                del self.stack[index:]
                return items
        raise self._error("damaged: a mark is missing on its stack")

    def _put(self, index: int) -> None:
        if not self.stack or self.stack[-1] is _MARK:
            raise self._error("damaged: nothing to remember")
        self.memo[index] = self.stack[-1]

    def _get(self, index: int) -> Any:
        if index not in self.memo:
            raise self._error(f"damaged: nothing is remembered as {index}")
        return self.memo[index]

    def _global(self, name: str) -> _Global:
        if name not in _GLOBALS:
            raise self._error(f"asks for {_short(name)}, which tensors do not need. Refused: loading it could run code")
        return _GLOBALS[name]

    def _stack_global(self) -> _Global:
        name, module = self._pop(), self._pop()
        if not (isinstance(name, str) and isinstance(module, str)):
            raise self._error(f"damaged: a global named {_describe(module)}, {_describe(name)}")
        return self._global(f"{module}.{name}")

    def _reduce(self) -> object:
        arguments, function = self._pop(), self._pop()
        if not (isinstance(function, _Global) and isinstance(arguments, tuple)):
            raise self._error(f"calls {_describe(function)} with {_describe(arguments)}")
        if function.name == _ORDERED_DICT:
            if arguments:
                raise self._error(f"{_ORDERED_DICT} with {len(arguments)} arguments, expected none")
            return {}
        if function.name == _REBUILD_TENSOR:
            return self.archive.tensor(arguments)
        if function.name == _REBUILD_PARAMETER:  # of a tensor, whether it is trained, and hooks
            if len(arguments) != 3 or not isinstance(arguments[0], StoredTensor):
                raise self._error(f"a parameter of {_describe(arguments)}, expected a tensor and two arguments")
            return arguments[0]
        raise self._error(f"calls {function.name}, which is a storage type")

    def _set_items(self, items: list[Any]) -> None:
        target = self._pop()
        if not isinstance(target, dict) or len(items) % 2:
            raise self._error(f"damaged: sets {len(items)} keys and values in {_describe(target)}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, str):
                raise self._error(f"a key {_describe(key)}, expected a name")
            if key in target:
                raise self._error(f"{_describe(key)} twice in one dict")
            target[key] = value
        self.stack.append(target)

    def _build(self) -> None:
        """State of an OrderedDict: torch attaches `_metadata` (module versions), which is dropped."""
        state, target = self._pop(), self._pop()
        if not (isinstance(target, dict) and isinstance(state, dict) and set(state) <= {"_metadata"}):
            names = [_short(name) for name in sorted(state)[:8]] if isinstance(state, dict) else _describe(state)
            raise self._error(f"attributes {names} on {_describe(target)}; expected only _metadata, on an OrderedDict")
        self.stack.append(target)
