"""PyTorch files are read without torch; nothing that a file asks for ever runs."""

import copyreg
import os
import pickle
import struct
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from based import Error, FormatError
from based._pickle import read_torch_file
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.reference.checkpoints import Pickle, Seeded, random_checkpoint, write_torch, write_zip
from tests.reference.files import to_float64

# ---- torch as the oracle ---------------------------------------------------------------------------------------------


def test_torch_reads_what_the_tests_write(tmp_path):
    torch = pytest.importorskip("torch")
    for seed in range(8):
        checkpoint = random_checkpoint(Seeded(seed))
        tensors = checkpoint.published_tensors()
        write_torch(tmp_path / "x.bin", tensors, ordered=checkpoint.ordered)
        loaded, ours = torch.load(tmp_path / "x.bin", weights_only=True), read_torch_file(tmp_path / "x.bin")
        assert list(loaded) == list(tensors) == list(ours)
        for name, (dtype, bits) in tensors.items():
            assert loaded[name].dtype == getattr(torch, dtype)
            assert ours[name].dtype == dtype
            np.testing.assert_array_equal(loaded[name].double().numpy(), to_float64(bits, dtype))
            np.testing.assert_array_equal(ours[name].bits, bits)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_reads_what_torch_writes(tmp_path, protocol):
    torch = pytest.importorskip("torch")
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    half = torch.linspace(-1, 1, 7).half()
    tensors = {
        "view": base[1:3, ::2],
        "transposed": base.T,
        "bf16": base.bfloat16(),
        "half": half,
        "scalar": torch.tensor(7),
        "grad": torch.ones(2, requires_grad=True),
    }
    torch.save(tensors, tmp_path / "x.bin", pickle_protocol=protocol)
    ours = read_torch_file(tmp_path / "x.bin")
    for name, tensor in tensors.items():
        expected = tensor.detach().double().numpy()
        np.testing.assert_array_equal(to_float64(ours[name].bits, ours[name].dtype), expected)
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2))
    torch.save(module.state_dict(), tmp_path / "module.bin", pickle_protocol=protocol)
    assert set(read_torch_file(tmp_path / "module.bin")) == set(module.state_dict())


@pytest.mark.parametrize(
    ("make", "fragment"),
    [
        (lambda torch: {"x": torch.ones(1).expand(5)}, "does not fit in its storage of 1 elements"),
        (lambda torch: {"weights": {"x": torch.ones(2)}}, "'weights' is a dict of 1"),
        (lambda torch: {"x": torch.ones(2, dtype=torch.complex64)}, "torch.ComplexFloatStorage"),
        (lambda torch: {"state_dict": {"x": torch.ones(2)}, "loops": [1]}, 'torch.load(file)["state_dict"]'),
        (lambda torch: {"model": {"x": torch.ones(2)}, "best": 1.5}, "Save its state_dict (Lightning) or model"),
        (lambda torch: torch.ones(2), "holds a tensor, expected a dict"),
        (lambda torch: {"x": torch.ones(2).to_sparse()}, "torch._utils._rebuild_sparse_tensor"),
        (lambda torch: {"x": np.ones(2)}, "_reconstruct"),
        (lambda torch: torch.nn.Linear(1, 1), "torch.nn.modules.linear.Linear"),
    ],
)
def test_refuses_what_is_not_a_state_dict(tmp_path, make, fragment):
    torch = pytest.importorskip("torch")
    torch.save(make(torch), tmp_path / "x.bin")
    with pytest.raises(FormatError) as caught:
        read_torch_file(tmp_path / "x.bin")
    assert fragment in str(caught.value)


def test_reads_parameters_other_numbers_and_containers(tmp_path):
    """What has a place in no model is for whoever asks for it to refuse, by the tensor's name."""
    torch = pytest.importorskip("torch")
    tensors = {
        "parameter": torch.nn.Parameter(torch.ones(2, 3)),
        "buffer": torch.tensor([True, False]),
        **{
            name: torch.arange(5).to(getattr(torch, name))
            for name in ("float64", "int64", "int32", "int16", "int8", "uint8")
        },
    }
    for content in (tensors, {"state_dict": tensors, "epoch": 3}, {"model": tensors}):
        torch.save(content, tmp_path / "x.bin")
        found = read_torch_file(tmp_path / "x.bin")
        assert list(found) == list(tensors)
        for name, tensor in tensors.items():
            assert found[name].dtype == str(tensor.dtype).removeprefix("torch.")
            np.testing.assert_array_equal(found[name].bits, tensor.detach().numpy())


def test_refuses_legacy_files(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"x": torch.ones(2)}, tmp_path / "x.bin", _use_new_zipfile_serialization=False)
    with pytest.raises(FormatError, match="legacy format"):
        read_torch_file(tmp_path / "x.bin")


# ---- hostile pickles -------------------------------------------------------------------------------------------------


class Call:
    """Pickles as the call function(*arguments)."""

    def __init__(self, function, *arguments):
        self.parts = (function, arguments)

    def __reduce__(self):
        return self.parts


HOSTILE = {
    "os.system": (lambda flag: Call(os.system, f"touch {flag}"), "posix.system"),
    "eval": (lambda flag: Call(eval, f"open({str(flag)!r}, 'w')"), "builtin"),
    "exec": (lambda flag: Call(exec, f"open({str(flag)!r}, 'w')"), "builtin"),
    "open": (lambda flag: Call(open, str(flag), "w"), "io.open"),
    "getattr": (lambda flag: Call(getattr, Call(__import__, "os"), "system"), "builtin"),
    "nested": (lambda flag: {"a": ({"b": Call(os.mkdir, str(flag))},)}, "posix.mkdir"),
    "numpy": (lambda flag: {"a": np.ones(3)}, "numpy"),
    "reconstructor": (lambda flag: Call(copyreg._reconstructor, object, object, None), "_reconstructor"),
    "class": (lambda flag: {"a": Path("x")}, "pathlib"),
}


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pickles(tmp_path, name, protocol):
    make, fragment = HOSTILE[name]
    flag = tmp_path / "flag"
    write_zip(tmp_path / "x.bin", {"a/data.pkl": pickle.dumps(make(flag), protocol)})
    with pytest.raises(FormatError) as caught:
        read_torch_file(tmp_path / "x.bin")
    # Protocols 0 and 1 may stop at an opcode of their own, before the call.
    assert fragment in str(caught.value) or (protocol < 2 and "nothing that tensors need" in str(caught.value))
    assert not flag.exists()


def raw(*opcodes: bytes) -> bytes:
    return Pickle.PROTO + b"".join(opcodes) + Pickle.STOP


FLOAT = Pickle.name("torch", "FloatStorage")
STORAGE = Pickle.storage(FLOAT, "0", 4)
TENSOR = Pickle.tensor(STORAGE, 0, [2, 2], [2, 1])


def entry(value: bytes) -> bytes:
    return raw(Pickle.EMPTY_DICT, Pickle.text("x"), value, Pickle.SETITEM)


@pytest.mark.parametrize(
    ("pickled", "fragment"),
    [
        pytest.param(raw(b"cos\nsystem\n(", Pickle.text("true"), b"tR"), "os.system", id="global"),
        pytest.param(raw(b"(", Pickle.text("true"), b"ios\nsystem\n"), "os.system", id="inst"),
        pytest.param(raw(b"\x8c\x02os\x8c\x06system\x93"), "os.system", id="stack_global"),
        pytest.param(raw(b"ccollections\nOrderedDict.fromkeys\n)R"), "collections.OrderedDict.fromkeys", id="dotted"),
        pytest.param(raw(b"\x8c\x0bcollections\x8c\x14OrderedDict.fromkeys\x93"), "OrderedDict.fromkeys", id="dotted4"),
        pytest.param(raw(b"ctorch._utils\n_rebuild_parameter\n"), "torch._utils._rebuild_parameter", id="parameter"),
        pytest.param(raw(b"cbuiltins\ndict\n)R"), "builtins.dict", id="dict"),
        pytest.param(raw(b"ccollections\nOrderedDict\n)\x81"), "NEWOBJ", id="newobj"),
        pytest.param(raw(b"ccollections\nOrderedDict\n))\x92"), "NEWOBJ_EX", id="newobj_ex"),
        pytest.param(raw(b"\x82\x01"), "EXT1", id="extension"),
        pytest.param(raw(b"(ccollections\nOrderedDict\no"), "opcode OBJ", id="obj"),
        pytest.param(raw(b"P0\n"), "PERSID", id="persid"),
        pytest.param(raw(b"]"), "EMPTY_LIST", id="list"),
        pytest.param(raw(b"\x8f"), "EMPTY_SET", id="set"),
        pytest.param(raw(b"\x97"), "NEXT_BUFFER", id="buffer"),
        pytest.param(
            raw(b"ccollections\nOrderedDict\n(", Pickle.text("ab"), b"tR"),
            "OrderedDict with 1 arguments",
            id="arguments",
        ),
        pytest.param(raw(FLOAT, b")R"), "calls torch.FloatStorage", id="storage call"),
        pytest.param(raw(Pickle.text("x"), b")R"), "calls 'x'", id="text call"),
        pytest.param(raw(b"ctorch._utils\n_rebuild_tensor_v2\n)R"), "0 arguments, expected 6 or 7", id="empty tensor"),
        pytest.param(entry(TENSOR.replace(STORAGE, b"K\x01")), "over 1, expected a storage", id="no storage"),
        pytest.param(entry(FLOAT), "'x' is torch.FloatStorage", id="a type"),
        pytest.param(entry(STORAGE), "'x' is a storage", id="a storage"),
        pytest.param(raw(FLOAT), "holds torch.FloatStorage", id="top type"),
        pytest.param(raw(Pickle.EMPTY_DICT, b"K\x01", TENSOR, b"s"), "a key 1", id="number key"),
        pytest.param(
            raw(Pickle.EMPTY_DICT, Pickle.text("x"), TENSOR, b"s", Pickle.text("x"), TENSOR, b"s"), "twice", id="twice"
        ),
        pytest.param(raw(b"}q\x00", Pickle.text("x"), b"h\x00s"), "'x' is a dict of 1", id="cycle"),
        pytest.param(raw(Pickle.text("x"), Pickle.TUPLE), "mark is missing", id="no mark"),
        pytest.param(raw(b"R"), "value is missing", id="empty stack"),
        pytest.param(raw(b"(R"), "value is missing", id="marked stack"),
        pytest.param(raw(b"K\x01K\x02"), "1 values left", id="left over"),
        pytest.param(raw(b"h\x07"), "nothing is remembered as 7", id="memo"),
        pytest.param(raw(b"q\x07"), "nothing to remember", id="empty memo"),
        pytest.param(raw(b"K\x01K\x02K\x03s"), "sets 2 keys and values in 1", id="set in a number"),
        pytest.param(raw(b"}(K\x01u"), "sets 1 keys and values", id="odd items"),
        pytest.param(raw(TENSOR, b"}b"), "attributes [] on a tensor", id="state of a tensor"),
        pytest.param(raw(b"}}", Pickle.text("__class__"), b"K\x01sb"), "__class__", id="attribute"),
        pytest.param(raw(b"}K\x01b"), "attributes 1 on", id="state of a number"),
        pytest.param(entry(b"K\x01"), "'x' is 1, expected", id="number"),
        pytest.param(raw(b"K\x01Q"), "persistent id 1", id="persistent number"),
        pytest.param(entry(STORAGE.replace(b"storage", b"module!")), "persistent id", id="persistent kind"),
        pytest.param(
            entry(Pickle.tensor(Pickle.storage(b"N", "0", 4), 0, [2], [1])), "a storage of None", id="storage type"
        ),
        pytest.param(
            entry(Pickle.tensor(Pickle.storage(FLOAT, "../0", 4), 0, [2], [1])), "no 'a/data/../0'", id="storage path"
        ),
        pytest.param(
            entry(Pickle.tensor(Pickle.storage(FLOAT, "0", 5), 0, [2], [1])), "has 16 bytes, expected 5", id="numel"
        ),
        pytest.param(
            entry(Pickle.tensor(Pickle.storage(FLOAT, "0", -1), 0, [2], [1])), "texts and a size", id="negative numel"
        ),
        pytest.param(
            raw(TENSOR, Pickle.storage(Pickle.name("torch", "HalfStorage"), "0", 8)),
            "8 float16 values here",
            id="retyped",
        ),
        pytest.param(entry(Pickle.tensor(STORAGE, 0, [5], [1])), "does not fit", id="too long"),
        pytest.param(entry(Pickle.tensor(STORAGE, 3, [2], [1])), "does not fit", id="offset"),
        pytest.param(entry(Pickle.tensor(STORAGE, 5, [0], [1])), "does not fit", id="offset of nothing"),
        pytest.param(entry(Pickle.tensor(STORAGE, 1 << 61, [1], [1])), "does not fit", id="huge offset"),
        pytest.param(entry(Pickle.tensor(STORAGE, 0, [2], [1 << 61])), "does not fit", id="huge stride"),
        pytest.param(entry(Pickle.tensor(STORAGE, 0, [1 << 40], [0])), "does not fit", id="bomb"),
        pytest.param(entry(Pickle.tensor(STORAGE, 0, [2, 2], [1])), "as many strides", id="ranks"),
        pytest.param(entry(Pickle.tensor(STORAGE, 0, [1] * 9, [1] * 9)), "as many strides", id="rank 9"),
        pytest.param(entry(Pickle.tensor(STORAGE, 0, [2], [-1])), "as many strides", id="negative stride"),
        pytest.param(entry(Pickle.tensor(STORAGE, -1, [2], [1])), "offset -1", id="negative offset"),
        pytest.param(entry(Pickle.tensor(STORAGE, 0, [-1], [1])), "as many strides", id="negative size"),
        pytest.param(raw(b"X\xff\xff\xff\x7fabc"), "damaged", id="long text"),
        pytest.param(raw(b"X\x01\x00\x00\x00\xff"), "damaged", id="not UTF-8"),
        pytest.param(b"", "damaged", id="empty"),
        pytest.param(b"\x80\x02", "damaged", id="no stop"),
        pytest.param(b"\xff\xff", "damaged", id="no opcode"),
        # Nested 100 times over: 2^100 items when walked.
        pytest.param(entry(b")" + b"q\x00h\x00\x86" * 100), "'x' is a tuple of 2", id="billion laughs"),
        pytest.param(entry(b")" + b"\x85" * 100_000), "'x' is a tuple of 1", id="deep"),
    ],
)
def test_damaged_and_hostile_opcodes(tmp_path, pickled, fragment):
    write_zip(tmp_path / "x.bin", {"a/data.pkl": pickled, "a/data/0": b"\0" * 16})
    with pytest.raises(FormatError) as caught:
        read_torch_file(tmp_path / "x.bin")
    assert fragment in str(caught.value)
    assert str(tmp_path / "x.bin") in str(caught.value)
    assert isinstance(caught.value, Error)
    assert isinstance(caught.value, ValueError)


def test_memo_indices_cost_nothing(tmp_path):
    """The standard library's unpickler allocates an array of this many entries."""
    pickled = raw(b"}r" + struct.pack("<I", (1 << 32) - 1), Pickle.text("x"), TENSOR, b"s")
    write_zip(tmp_path / "x.bin", {"a/data.pkl": pickled, "a/data/0": b"\0" * 16})
    tracemalloc.start()
    assert read_torch_file(tmp_path / "x.bin")["x"].bits.shape == (2, 2)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_metadata_is_dropped(tmp_path):
    """Whatever the attribute holds: it is built of harmless values and forgotten."""
    state = Pickle.EMPTY_DICT + Pickle.text("_metadata") + TENSOR + Pickle.SETITEM
    write_zip(
        tmp_path / "x.bin", {"a/data.pkl": raw(Pickle.ordered_dict(), state, Pickle.BUILD), "a/data/0": b"\0" * 16}
    )
    assert read_torch_file(tmp_path / "x.bin") == {}


@pytest.mark.parametrize(
    ("members", "fragment"),
    [
        ({"a/other": b"x"}, "no data.pkl"),
        ({"a/data.pkl": raw(b"}"), "b/data.pkl": raw(b"}")}, "2 members named data.pkl"),
        ({"a/data.pkl": raw(b"}"), "a/byteorder": b"big"}, "byteorder b'big'"),
        ({"a/data.pkl": entry(TENSOR)}, "holds no 'a/data/0'"),
        ({"a/data.pkl": entry(TENSOR), "b/data/0": b"\0" * 16}, "holds no 'a/data/0'"),
    ],
)
def test_bad_archives(tmp_path, members, fragment):
    write_zip(tmp_path / "x.bin", members)
    with pytest.raises(FormatError) as caught:
        read_torch_file(tmp_path / "x.bin")
    assert fragment in str(caught.value)


def test_data_pkl_without_a_folder(tmp_path):
    write_zip(tmp_path / "x.bin", {"data.pkl": entry(TENSOR), "data/0": b"\0" * 16})
    assert set(read_torch_file(tmp_path / "x.bin")) == {"x"}


def test_compressed_members(tmp_path):
    write_zip(tmp_path / "x.bin", {"a/data.pkl": entry(TENSOR), "a/data/0": b"\0" * 16}, zipfile.ZIP_DEFLATED)
    with pytest.raises(FormatError, match="is compressed, expected a stored"):
        read_torch_file(tmp_path / "x.bin")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_member_twice(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.bin", "w") as archive:
        archive.writestr("a/data.pkl", raw(b"}"))
        archive.writestr("a/data.pkl", raw(b"}"))
    with pytest.raises(FormatError, match="twice"):
        read_torch_file(tmp_path / "x.bin")


@pytest.mark.parametrize(
    ("data", "fragment"),
    [
        (b"", "begins with b''"),
        (b"\x80\x02}.", "not a PyTorch zip file"),
        (b"PK\x03\x04" + b"\0" * 100, "not a readable zip file"),
        (b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.", "legacy format"),
    ],
)
def test_not_a_zip(tmp_path, data, fragment):
    (tmp_path / "x.bin").write_bytes(data)
    with pytest.raises(FormatError) as caught:
        read_torch_file(tmp_path / "x.bin")
    assert fragment in str(caught.value)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_a_changed_byte_is_an_error_or_a_number(tmp_path_factory, data):
    """Never a crash, a hang or another exception, wherever a file is damaged."""
    path = tmp_path_factory.mktemp("damaged") / "x.bin"
    write_torch(path, {"a": ("float32", np.ones((2, 3), np.float32)), "b": ("bfloat16", np.ones(4, np.uint16))})
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        tensors = read_torch_file(path)
    except FormatError:
        return
    assert all(isinstance(tensor.bits.sum(), np.generic) for tensor in tensors.values())
