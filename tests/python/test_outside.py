"""Bytes from outside that were made to hurt: each is an error with a name, soon, and in little memory."""

import json
import os
import resource
import shutil
import struct
import subprocess
import sys
import time
import zipfile
from contextlib import contextmanager
from pathlib import Path

import based
import numpy as np
import pytest
from based import FormatError, _core, _loading
from based import convert as conversion
from based._pickle import read_torch_file
from based._tokenizer import read_tokenizer
from based._tokenizer_json import tokenizer_errors
from based.cli import main
from based.convert import atomic_directory, convert

from tests.reference.checkpoints import Pickle, write_zip

ROOT = Path(__file__).parents[2]
TINY = ROOT / "tests" / "golden" / "based-tiny"
SECONDS = 20  # far above what any of these takes, far below what they took


@pytest.fixture
def soon():
    begin = time.monotonic()
    yield
    assert time.monotonic() - begin < SECONDS


@pytest.fixture
def published(tmp_path):
    shutil.copytree(TINY, tmp_path / "published")
    return tmp_path / "published"


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    path = tmp_path_factory.mktemp("ours") / "tiny"
    convert(TINY, path)
    return path


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


# ---- tokenizer.json --------------------------------------------------------------------------------------------------

SPLIT = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
PADDING = {"direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0, "pad_token": "<bos>"}
DOUBLE = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
REPEATS = {**SPLIT, "pattern": {"Regex": "((a{1000}){1000})"}}


@pytest.mark.parametrize(
    ("values", "fragment"),
    [
        ({"padding": {"strategy": {"Fixed": 10**9}, **PADDING}}, "padding.strategy.Fixed: found 1000000000, expected"),
        (
            {"padding": {"strategy": "BatchLongest", **PADDING, "pad_to_multiple_of": 1 << 40}},
            "padding.pad_to_multiple_of: found 1099511627776",
        ),
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}, "a table of 0 bytes in 3"),
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "/////wAA"}}, "table of 4294967295 bytes in 6"),
        ({"normalizer": {"type": "Sequence", "normalizers": [DOUBLE] * 40}}, "may make a text 2048 times as long"),
        ({"normalizer": {"type": "Prepend", "prepend": "x" * 5000}}, "prepend: found 5000 characters"),
        ({"pre_tokenizer": REPEATS}, "a pattern of 1000000 repeats"),
        ({"model": {"type": "none"}}, "not a tokenizer that tokenizers can read"),
    ],
)
def test_tokenizers_that_are_refused(ours, tmp_path, soon, values, fragment):
    shutil.copyfile(ours / "tokenizer.json", tmp_path / "tokenizer.json")
    change(tmp_path / "tokenizer.json", **values)
    with pytest.raises(FormatError) as caught:
        read_tokenizer(tmp_path / "tokenizer.json")
    assert fragment in str(caught.value)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("data", [b"[" * 100_000, b"\xff", b"[]", b'{"a": 1', b""])
def test_tokenizers_that_are_no_json_objects(tmp_path, data):
    (tmp_path / "tokenizer.json").write_bytes(data)
    with pytest.raises(FormatError, match=r"tokenizer.json: not a tokenizer.json"):
        read_tokenizer(tmp_path / "tokenizer.json")


@pytest.mark.parametrize(
    ("values", "prompt"),
    [
        ({"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "?"}}, "b"),
        ({"model": {"type": "Unigram", "unk_id": None, "vocab": [["a", -1.0]], "byte_fallback": False}}, "b"),
        ({"pre_tokenizer": {"type": "FixedLength", "length": 0}}, "abc"),
    ],
)
def test_texts_that_a_tokenizer_fails_on(ours, tmp_path, values, prompt):
    """The library raises a bare Exception, or PanicException, which is a BaseException."""
    shutil.copytree(ours, tmp_path / "m")
    change(tmp_path / "m" / "tokenizer.json", normalizer=None, post_processor=None, added_tokens=[], **values)
    model = based.load(tmp_path / "m", device="cpu")
    session = model.session()
    for call in (model.generate, session.generate, lambda text: session.prefill([text])):
        with pytest.raises(FormatError, match="tokenizer failed on a text"):
            call(prompt)
    assert session.num_tokens == [0]


def test_half_of_a_surrogate_pair_is_no_text(model):
    with pytest.raises(ValueError, match="half of a surrogate pair"):
        model.generate("a\ud800")
    with pytest.raises(ValueError, match=r"^stop holds half of a surrogate pair, expected"):
        based.SamplingParams(stop="\udc80")
    with pytest.raises(ValueError, match=r"^stop\[1\] holds half of a surrogate pair, expected"):
        based.SamplingParams(stop=["a", "\udc80"])
    with pytest.raises(ValueError, match=r"^the name of a field holds half of a surrogate pair, expected"):
        based.SamplingParams(**{"\udc80": 1})


def test_what_is_no_failure_of_the_tokenizer_passes():
    for kind in (KeyboardInterrupt, SystemExit, MemoryError):
        with pytest.raises(kind), tokenizer_errors("x"):
            raise kind


# ---- counts that no file holds ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_layers", [999_999_999, 4097])
def test_layers_that_no_weights_are_for(tmp_path, soon, num_layers):
    config = {"vocab_size": 1, "n_embd": 2, "n_head": 1, "rms_norm": True, "mlp_fc1_bias": False, "mlp_fc2_bias": False}
    config |= {"activation_function": "swiglu", "n_inner": 2, "n_layer": num_layers}
    feature_map = {"_target_": "x.TaylorExp", "input_dim": 1}
    config["mixer"] = {"_target_": "x.LinearAttention", "num_heads": 1, "feature_dim": 1, "feature_map": feature_map}
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = {"transformer.embeddings.word_embeddings.weight": (1, 2), "transformer.ln_f.weight": (2,)}
    for names, held in ((tensors, 0), (tensors | {f"transformer.layers.{num_layers - 1}.x": (1,)}, num_layers)):
        arrays = [(name, np.ones(shape, np.float32), "float32") for name, shape in names.items()]
        _core.write_safetensors(tmp_path / "model.safetensors", arrays, {})
        with pytest.raises(FormatError, match=rf"n_layer: found {num_layers}, (but .* holds {held} l|expected at)"):
            convert(tmp_path, tmp_path / "out")


def test_a_window_costs_what_is_in_it(tmp_path, soon):
    window = {
        "mixer": "sliding_window",
        "num_heads": 1,
        "num_kv_heads": 1,
        "head_dim": 64,
        "window": 1 << 24,
        "scale": 1.0,
    }
    window |= {"qkv_bias": False, "out_bias": False, "rotary_dim": 0, "rotary_base": 1.0, "rotary_interleaved": False}
    config = {"format": "based", "format_version": 1, "vocab_size": 2, "padded_vocab_size": 2, "hidden_size": 1}
    config |= {"norm": {"type": "rms_norm", "eps": 1e-5}, "mlp": None, "tie_embeddings": True, "layers": [window]}
    (tmp_path / "config.json").write_text(json.dumps(config | {"bos_token_id": None, "eos_token_id": None}))
    shapes = {"embedding.weight": (2, 1), "final_norm.weight": (1,), "layers.0.norm1.weight": (1,)}
    shapes |= {"layers.0.mixer.qkv_proj.weight": (192, 1), "layers.0.mixer.out_proj.weight": (1, 64)}
    arrays = [(name, np.ones(shape, np.float32), "float32") for name, shape in shapes.items()]
    _core.write_safetensors(tmp_path / "model.safetensors", arrays, {"format": "based"})
    code = """if True:
        import based, sys
        model = based.load(sys.argv[1], device="cpu", num_threads=1)
        session = model.session()
        session.prefill([[1, 0, 1]])
        session.fork().step([1])
        model.forward([1, 0, 1])
        # Of this program alone: ru_maxrss begins with that of the process that started it.
        (peak,) = [line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM:")]
        print(model.state_nbytes, peak)
    """
    run = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
    nbytes, peak = map(int, run.stdout.split())
    assert nbytes == 1 << 33
    assert peak < 500_000  # kB


# ---- limits on what is parsed ----------------------------------------------------------------------------------------


def peak_nbytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def test_a_header_of_zeros(tmp_path, soon):
    (tmp_path / "x").write_bytes(struct.pack("<Q", 94_000_000) + b'{"a":[0,0')
    with pytest.raises(FormatError, match=r"header length of .* expected at most 16777216"):
        _core.SafetensorsFile(tmp_path / "x")
    header = b'{"a":[' + b"0," * (7 << 20) + b"0]}"
    (tmp_path / "x").write_bytes(struct.pack("<Q", len(header)) + header)
    before = peak_nbytes()
    with pytest.raises(FormatError, match="more than 2000000 values"):
        _core.SafetensorsFile(tmp_path / "x")
    assert peak_nbytes() - before < 300 << 20


@pytest.mark.parametrize("size", [3 << 20, 64 << 20])
def test_a_config_of_lists(tmp_path, soon, size):
    (tmp_path / "config.json").write_bytes(b'{"a": [' + b"[]," * (size // 3) + b"[]]}")
    before = peak_nbytes()
    with pytest.raises((FormatError, FileNotFoundError)):  # read, it has no weights
        convert(tmp_path, tmp_path / "out")
    assert peak_nbytes() - before < 500 << 20


def test_a_pickle_of_dicts(tmp_path, soon):
    write_zip(tmp_path / "x.bin", {"a/data.pkl": Pickle.PROTO + b"}" * (4 << 20) + Pickle.STOP})
    with pytest.raises(FormatError, match="more than 1000000 opcodes"):
        read_torch_file(tmp_path / "x.bin")
    write_zip(tmp_path / "x.bin", {"a/data.pkl": Pickle.PROTO + b"}" * (9 << 20) + Pickle.STOP})
    with pytest.raises(FormatError, match=r"data\.pkl of \d+ bytes, expected at most 8388608"):
        read_torch_file(tmp_path / "x.bin")


def test_what_is_refused_is_not_quoted_whole(tmp_path):
    key = Pickle.text("k" * (1 << 20))
    twice = Pickle.PROTO + b"}" + key + b"K\x01s" + key + b"K\x01s" + Pickle.STOP
    number = Pickle.PROTO + b"}" + Pickle.text("x") + b"\x8a\xff" + b"\x7f" * 255 + b"s" + Pickle.STOP
    name = Pickle.PROTO + b"c" + b"m" * (1 << 20) + b"\nx\n" + Pickle.STOP
    for pickled in (twice, number, name):
        write_zip(tmp_path / "x.bin", {"a/data.pkl": pickled})
        with pytest.raises(FormatError) as caught:
            read_torch_file(tmp_path / "x.bin")
        assert len(str(caught.value)) < 1000


def test_a_zip_that_announces_a_large_directory(tmp_path, soon):
    write_zip(tmp_path / "x.bin", {"a/data.pkl": Pickle.PROTO + b"}" + Pickle.STOP})
    data = bytearray((tmp_path / "x.bin").read_bytes())
    end = data.rfind(b"PK\5\6")
    data[end + 12 : end + 16] = struct.pack("<I", 1 << 30)
    (tmp_path / "x.bin").write_bytes(data)
    with pytest.raises(FormatError, match="a zip directory of 1073741824 bytes, expected at most"):
        read_torch_file(tmp_path / "x.bin")


def test_limits_can_be_raised(tmp_path, monkeypatch):
    write_zip(tmp_path / "x.bin", {"a/data.pkl": Pickle.PROTO + b"}" + b"q\0" * 1_200_000 + Pickle.STOP})
    with pytest.raises(FormatError, match="opcodes"):
        read_torch_file(tmp_path / "x.bin")
    monkeypatch.setenv("BASED_PARSE_LIMIT", "2")
    assert read_torch_file(tmp_path / "x.bin") == {}
    for value in ("0", "-1", "1001", "2x", ""):
        monkeypatch.setenv("BASED_PARSE_LIMIT", value)
        with pytest.raises(ValueError, match=r"BASED_PARSE_LIMIT: found .*, expected an integer from 1 to 1000"):
            read_torch_file(tmp_path / "x.bin")


# ---- damage that is noticed ------------------------------------------------------------------------------------------


def test_a_flipped_bit_of_a_pytorch_file(published, tmp_path):
    path = published / "pytorch_model.bin"
    with zipfile.ZipFile(path) as archive:
        info = max(archive.infolist(), key=lambda item: item.file_size)
    data = bytearray(path.read_bytes())
    data[info.header_offset + 200] ^= 4
    path.write_bytes(data)
    with pytest.raises(FormatError, match=f"{info.filename}' is damaged: its CRC-32 is .*, expected {info.CRC:08x}"):
        convert(published, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_pytorch_files_without_checksums(tmp_path):
    torch = pytest.importorskip("torch")
    if not hasattr(torch.serialization, "set_crc32_options"):
        pytest.skip("this PyTorch always writes them")
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"x": torch.arange(4.0)}, tmp_path / "x.bin")
    finally:
        torch.serialization.set_crc32_options(True)
    assert read_torch_file(tmp_path / "x.bin")["x"].bits.tolist() == [0, 1, 2, 3]


def changed_model(ours, path):
    """The model with some weights changed, none of them where 64 evenly spread blocks of 64 bytes are."""
    shutil.copytree(ours, path)
    name = "layers.0.mixer.in_proj.weight"
    file = _core.SafetensorsFile(path / "model.safetensors")
    dtypes, tensors = file.dtypes(), {key: np.array(bits) for key, bits in file.tensors().items()}
    flat = tensors[name].reshape(-1).view(np.uint8)
    seen = {(flat.size - 64) // 63 * i + b for i in range(64) for b in range(64)}
    free = [b for b in range(0, flat.size - 4, 4) if not seen & set(range(b, b + 4))]
    tensors[name].reshape(-1)[np.array(free[:200]) // 4] += 1
    arrays = [(key, bits, dtypes[key]) for key, bits in tensors.items()]
    _core.write_safetensors(path / "model.safetensors", arrays, {"format": "based"})
    return based.load(path, device="cpu")


def sampled_fingerprint(directory):
    """What versions before this one gave a model: see docs/state-format.md."""

    def add(state, data):
        for byte in data:
            state = (state ^ byte) * 0x100000001B3 % (1 << 64)
        return state

    text = (directory / "config.json").read_text()
    state = add(0xCBF29CE484222325, _core.check_config(text, "x").encode())
    file = _core.SafetensorsFile(directory / "model.safetensors")
    dtypes = file.dtypes()
    for name, bits in sorted(file.tensors().items()):
        shape = "(" + ", ".join(map(str, bits.shape)) + ")"
        state, data = add(state, f"{name}{dtypes[name]}{shape}".encode()), bits.tobytes()
        if len(data) > 4096:
            data = b"".join(data[(at := (len(data) - 64) // 63 * i) : at + 64] for i in range(64))
        state = add(state, data)
    return f"{state:016x}"


def test_a_model_that_differs_in_any_weight_is_another_model(ours, tmp_path):
    model, other = based.load(ours, device="cpu"), changed_model(ours, tmp_path / "changed")
    session = model.session()
    session.prefill([[1, 2, 3]])
    session.save_state(tmp_path / "state")
    with pytest.raises(based.StateError, match=f"{model.fingerprint}.*{other.fingerprint}"):
        other.session().load_state(tmp_path / "state")

    # As an older version saved it: it is read, and held against what that version knew of a model.
    old = sampled_fingerprint(ours)
    assert old == sampled_fingerprint(tmp_path / "changed") != model.fingerprint
    data = (tmp_path / "state").read_bytes().replace(model.fingerprint.encode(), old.encode())
    (tmp_path / "old").write_bytes(data)
    loaded = model.session()
    loaded.load_state(tmp_path / "old")
    np.testing.assert_array_equal(loaded.step([5]), session.step([5]))


@contextmanager
def cut_again_and_again(path, folder):
    """While the block runs, another process shortens the file in place and makes it whole, over and over."""
    code = """if True:
        import os, sys
        whole = open(sys.argv[2], "rb").read()
        while True:
            os.truncate(sys.argv[1], 1000)
            with open(sys.argv[1], "r+b") as file:
                file.write(whole)
    """
    shutil.copyfile(path, folder / "whole")
    writer = subprocess.Popen([sys.executable, "-c", code, path, folder / "whole"])
    try:
        yield
    finally:
        writer.kill()
        writer.wait()
        shutil.copyfile(folder / "whole", path)


def test_files_that_are_cut_while_they_are_read(ours, tmp_path):
    """Read, not mapped: no moment at which the process dies, and the message names the file."""
    shutil.copytree(ours, tmp_path / "m")
    model = based.load(tmp_path / "m", device="cpu")
    session = model.session(batch_size=8)
    session.prefill([[1, 2, 3]] * 8)
    state, weights = tmp_path / "state", tmp_path / "m" / "model.safetensors"
    session.save_state(state)
    for path, read in ((state, session.load_state), (weights, lambda _: _core.Model.load(tmp_path / "m"))):
        refused = 0
        with cut_again_and_again(path, tmp_path):
            for _ in range(100):
                try:
                    read(path)
                except FormatError as error:
                    refused += str(path) in str(error)
        assert refused > 0
        read(path)


# ---- what conversion leaves ------------------------------------------------------------------------------------------


def dead_pid():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_overwriting_never_leaves_the_target_without_a_model(tmp_path, monkeypatch):
    target = tmp_path / "m"
    target.mkdir()
    (target / "config.json").write_text("old")
    rename = Path.rename

    def watched(self, to):
        assert (target / "config.json").exists()
        result = rename(self, to)
        assert (target / "config.json").exists()
        return result

    monkeypatch.setattr(Path, "rename", watched)
    with atomic_directory(None, target, overwrite=True) as new:
        if not _core.exchange_paths(new, new):
            pytest.skip("this filesystem cannot exchange two directories")
        (new / "config.json").write_text("new")
    assert (target / "config.json").read_text() == "new"
    assert os.listdir(tmp_path) == ["m"]


def test_overwriting_where_directories_cannot_be_exchanged(tmp_path, monkeypatch):
    monkeypatch.setattr(_core, "exchange_paths", lambda *_: False)
    target = tmp_path / "m"
    target.mkdir()
    (target / "config.json").write_text("old")
    rename = Path.rename

    def killed(self, to):
        if self.suffix == ".new":
            raise KeyboardInterrupt
        return rename(self, to)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt), atomic_directory(None, target, overwrite=True):
            pass
    assert (target / "config.json").read_text() == "old"
    with atomic_directory(None, target, overwrite=True) as new:
        (new / "config.json").write_text("new")
    assert (target / "config.json").read_text() == "new"
    assert os.listdir(tmp_path) == ["m"]


def test_what_killed_conversions_leave_is_removed_or_put_back(tmp_path):
    target, dead = tmp_path / "m", dead_pid()
    for pid, kind in ((dead, "new"), (dead, "old"), (os.getppid(), "new")):
        leftover = conversion._beside(target, f"{pid}-0123abcd.{kind}")
        leftover.mkdir()
        (leftover / "config.json").write_text(f"{pid} {kind}")
    other = conversion._beside(tmp_path / "other", f"{dead}-0123abcd.new")
    other.mkdir()
    with pytest.raises(FileExistsError), atomic_directory(None, target, overwrite=False):
        pass  # the old model is there again
    assert (target / "config.json").read_text() == f"{dead} old"
    alive = conversion._beside(target, f"{os.getppid()}-0123abcd.new")
    assert {path.name for path in tmp_path.iterdir()} == {"m", other.name, alive.name}


@pytest.mark.parametrize("damage", ["config.json", "model.safetensors", "cut"])
def test_a_cache_entry_that_lacks_a_file_is_made_again(published, tmp_path, monkeypatch, damage):
    monkeypatch.setenv("BASED_CACHE", str(tmp_path / "cache"))
    fingerprint = based.load(published, device="cpu").fingerprint
    entry = _loading.model_directory(published)
    if damage == "cut":
        os.truncate(entry / "model.safetensors", 5000)
    else:
        (entry / damage).unlink()
    assert based.load(published, device="cpu").fingerprint == fingerprint


# ---- names -----------------------------------------------------------------------------------------------------------

ESCAPE = "\x1b[31mX\x07\u202e\x9b"


def is_harmless(text):
    return all(c.isprintable() or c == "\n" for c in text)


def test_no_control_character_of_a_file_reaches_the_terminal(published, ours, tmp_path, capsys):
    shutil.copytree(ours, tmp_path / "extra")
    file = _core.SafetensorsFile(tmp_path / "extra" / "model.safetensors")
    arrays = [(name, np.array(bits), file.dtypes()[name]) for name, bits in file.tensors().items()]
    arrays.append((ESCAPE, np.ones(1, np.float32), "float32"))
    _core.write_safetensors(tmp_path / "extra" / "model.safetensors", arrays, {})
    change(published / "config.json", **{ESCAPE: 1})
    write_zip(tmp_path / "x.bin", {"a/data.pkl": Pickle.PROTO + b"cos\n\x1b[31m\x07\nR."})
    folder = tmp_path / ESCAPE
    folder.mkdir()
    for call in (
        lambda: based.load(tmp_path / "extra"),
        lambda: convert(published, tmp_path / "out"),
        lambda: read_torch_file(tmp_path / "x.bin"),
        lambda: based.load(folder),
        lambda: based.load(str(folder / "none")),
        lambda: _core.SafetensorsFile(folder / "none"),
        lambda: _core.Model.load(ours, device=ESCAPE),
        lambda: based.SamplingParams(stop=[""], seed=-1),
    ):
        with pytest.raises((OSError, ValueError)) as caught:
            call()
        assert is_harmless(str(caught.value)), str(caught.value)
    for arguments in (["inspect", str(folder)], ["inspect", ESCAPE], ["convert", str(published), str(tmp_path / "o")]):
        assert main(arguments) == 1
        captured = capsys.readouterr()
        assert captured.out == ""
        assert is_harmless(captured.err), captured.err


@pytest.mark.parametrize("name", [b"caf\xe9", b"a**b", b"[x]", b"n" * 250, "ü中".encode()])
def test_names_that_paths_may_have(tmp_path, monkeypatch, name):
    monkeypatch.setenv("BASED_CACHE", str(tmp_path / "cache"))
    source = Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name))
    shutil.copytree(TINY, source)
    (source / "tokenizer.json").unlink(missing_ok=True)
    first = based.load(source, device="cpu").fingerprint
    leftover = _loading.model_directory(source)
    (leftover / "config.json").unlink()
    assert based.load(source, device="cpu").fingerprint == first
    target = source.with_name("out")
    convert(source, target)
    moved = target.rename(source.with_name("m" + source.name[1:]))
    model = based.load(moved, device="cpu")
    assert model.fingerprint == first
    session = model.session()
    session.prefill([[1]])
    session.save_state(moved / "state")
    session.load_state(moved / "state")
    (moved / "config.json").write_text("{")
    with pytest.raises(FormatError, match=r"expected JSON|not valid JSON"):
        based.load(moved)


def test_paths_that_lead_nowhere(ours, tmp_path):
    with pytest.raises(FileNotFoundError, match="an empty text"):
        based.load("")
    with pytest.raises(ValueError, match="NUL"):
        based.load("a\0b")
    shutil.copytree(ours, tmp_path / "m")
    (tmp_path / "m" / "x.json").symlink_to("none")
    based.load(tmp_path / "m", device="cpu")


# ---- arguments that claim more than there is -------------------------------------------------------------------------

HUGE = np.broadcast_to(np.int64(1), (2**42,))


@pytest.mark.parametrize("ids", [HUGE, HUGE[: 2**29], range(2**42)])
def test_arrays_that_claim_a_size(model, soon, ids):
    session = model.session()
    for call in (
        model.forward,
        model.score,
        model.generate,
        session.generate,
        lambda value: session.prefill([value]),
        session.step,
    ):
        with pytest.raises(ValueError, match=r"has \d+ (token ids|prompts), expected at most 268435456"):
            call(ids)
    assert session.num_tokens == [0]


def test_prompts_and_parameters_that_claim_a_size(model, soon):
    for shape in ((2**40, 4), (2**20, 2**20), (4, 2**40)):
        with pytest.raises(ValueError, match="expected at most 268435456"):
            model.generate(np.broadcast_to(np.int64(1), shape))
    for value in (HUGE, range(2**42)):
        with pytest.raises(ValueError, match=r"stop_token_ids has .* items, expected at most 1048576"):
            based.SamplingParams(stop_token_ids=value)


def test_what_an_argument_raises_is_not_hidden(model):
    class Evil:
        def __init__(self, kind):
            self.kind = kind

        def __index__(self):
            raise self.kind

        __float__ = __index__

    for kind in (KeyboardInterrupt, MemoryError, ZeroDivisionError):
        with pytest.raises(kind):
            model.forward([1, Evil(kind)])
        with pytest.raises(kind):
            based.SamplingParams(temperature=Evil(kind))
    with pytest.raises(TypeError, match="must be an integer"):
        model.forward([1, Evil(TypeError)])
    with pytest.raises(TypeError, match="masked"):
        model.forward(np.ma.masked_array([1, 2], mask=[0, 1]))


# ---- files of training -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("sha256.json", b"[" * 100_000),
        ("sha256.json", b"{}"),
        ("sha256.json", b"3"),
        ("sha256.json", b"\xff"),
        ("training.json", b"[" * 100_000),
        ("training.json", b'{"version": 1, "step": 1, "config": [], "data": ""}'),
        ("training.json", b'{"version": 1, "step": "1", "config": {}, "data": ""}'),
        ("training.json", b'{"version": 1}'),
        ("training.json", b"[]"),
        ("training.json", b"\xff"),
    ],
)
def test_damaged_training_checkpoints_are_named(tmp_path, name, data):
    pytest.importorskip("torch")
    from based.torch.train import training_checkpoint

    path = tmp_path / "step-000000001"
    path.mkdir()
    (path / name).write_bytes(data)
    read = training_checkpoint._verify if name == "sha256.json" else training_checkpoint._read_progress
    with pytest.raises(FormatError) as caught:
        read(path)
    assert str(path / name) in str(caught.value)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"PK",
        b"PK\3\4" + bytes(40),
        b"\x93NUMPY\1\0\x60\0{'descr': '<u2', 'fortran_order': False, 'shape': (-5,)}".ljust(118) + b"\n",
        b"\x93NUMPY\1\0\x60\0{'descr': '<u2', 'fortran_order': False, 'shape': (1099511627776,)}".ljust(118) + b"\n",
        b"\x93NUMPY\1\0",
    ],
)
def test_damaged_arrays_of_tokens_are_named(tmp_path, data):
    pytest.importorskip("torch")
    from based.torch.train.config import Source
    from based.torch.train.data import _read_array

    (tmp_path / "x.npy").write_bytes(data)
    with pytest.raises(FormatError, match=r"x\.npy: not an array that NumPy can map"):
        _read_array(tmp_path / "x.npy", Source(tokens=["x.npy"]), 10)


# ---- the fuzz targets ------------------------------------------------------------------------------------------------


def test_the_corpora_of_the_python_targets():
    targets = ["pickle", "torch_file", "published", "tokenizer"]
    command = [sys.executable, ROOT / "tests" / "fuzz" / "run.py", *targets, "--seconds", "0.2"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr[-3000:]
    assert run.stdout.count("mutations") == len(targets)
