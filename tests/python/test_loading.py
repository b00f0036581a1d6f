"""based.load: paths, the conversion cache, the hub (a server on the loopback), tokenizers, bad input."""

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import based
import numpy as np
import pytest
from based import _loading
from based.convert import convert

from tests.reference.checkpoints import RandomModel

GOLDEN = Path(__file__).parent.parent / "golden"
TINY = GOLDEN / "based-tiny"


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    path = tmp_path / "cache"
    monkeypatch.setenv("BASED_CACHE", str(path))
    return path


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    path = tmp_path_factory.mktemp("converted") / "tiny"
    convert(TINY, path)
    return path


# ---- directories -----------------------------------------------------------------------------------------------------


def test_our_format_is_read_where_it_is(converted, own_cache, model):
    loaded = based.load(converted)
    assert not own_cache.exists()
    assert loaded.fingerprint == model.fingerprint
    assert loaded.tokenizer.get_vocab_size() == 258
    assert _loading.model_directory(converted) == converted.resolve()


def test_published_directories_are_converted_once(tmp_path, own_cache, monkeypatch):
    source = tmp_path / "published"
    shutil.copytree(TINY, source)
    first = based.load(source)
    (directory,) = own_cache.glob("published-*/")
    assert _loading.model_directory(str(source)) == directory

    with monkeypatch.context() as patch:
        patch.setattr("based.convert.convert", lambda *_: pytest.fail("converted again"))
        patch.chdir(tmp_path)
        assert based.load("published").fingerprint == first.fingerprint

    os.utime(source / "pytorch_model.bin", ns=(1, 1))
    based.load(source)
    assert len(list(own_cache.glob("published-*/"))) == 2


def test_what_a_killed_conversion_left_is_removed(own_cache):
    directory = _loading.model_directory(TINY)
    shutil.rmtree(directory)
    leftover = own_cache / f".{directory.name}.0123.new"
    leftover.mkdir()
    (leftover / "model.safetensors").write_bytes(b"half")
    assert _loading.model_directory(TINY) == directory
    assert not leftover.exists()


def test_processes_share_the_cache(own_cache):
    code = "import based, sys; print(based.load(sys.argv[1]).fingerprint)"
    processes = [
        subprocess.Popen([sys.executable, "-c", code, str(TINY)], stdout=subprocess.PIPE, text=True) for _ in range(4)
    ]
    found = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * 4
    assert len(set(found)) == 1
    assert len(list(own_cache.glob("based-tiny-*/"))) == 1
    assert list(own_cache.glob(".*")) == []


def test_cache_directory(monkeypatch):
    monkeypatch.setenv("BASED_CACHE", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    monkeypatch.setenv("HOME", "/c")
    assert _loading._cache_directory() == Path("/a")
    monkeypatch.delenv("BASED_CACHE")
    assert _loading._cache_directory() == Path("/b/based")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert _loading._cache_directory() == Path("/c/.cache/based")


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"dtype": "int8"}, ValueError, "dtype must be 'auto', 'float32', 'bfloat16' or 'float16', not 'int8'"),
        ({"dtype": "float16"}, based.UnsupportedError, "the CPU has kernels for float32 and bfloat16, not for float16"),
        ({"dtype": None}, ValueError, "not None"),
        ({"device": "gpu"}, ValueError, "gpu"),
        ({"device": "cuda:62"}, based.UnsupportedError, "(?i)cuda"),
        ({"device": "cuda:63"}, based.UnsupportedError, "(?i)cuda"),
        ({"num_threads": 0}, ValueError, "num_threads"),
        ({"deterministic": 1}, TypeError, "deterministic"),
        ({"num_threads": 1 << 20}, ValueError, "1048576"),
        ({"num_threads": 1.0}, TypeError, "num_threads must be an integer"),
        ({"revision": "main"}, ValueError, "revision='main' is for models at the hub"),
        ({"tokenizer": "/nowhere"}, FileNotFoundError, "no such tokenizer.*/nowhere"),
    ],
)
def test_bad_arguments(arguments, error, text):
    with pytest.raises(error, match=text):
        based.load(TINY, **arguments)


@pytest.mark.parametrize("name", ["missing", "./missing/model", "/nowhere/model", "a/b/c", "", "owner/../x"])
def test_names_that_are_neither_path_nor_id(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((FileNotFoundError, based.FormatError), match=r"neither an existing directory nor|config\.json"):
        based.load(name)


def test_hub_names_without_network():
    with pytest.raises(
        FileNotFoundError, match=r"no such directory.*hub cannot be reached: HF_HUB_OFF.*owner/model"
    ) as info:
        based.load("owner/model")
    assert info.value.errno == errno.ENOENT


def test_files_are_no_models(converted):
    with pytest.raises(NotADirectoryError, match=r"a model is a directory.*model\.safetensors"):
        based.load(converted / "model.safetensors")


def damaged(source: Path, target: Path, **changes: bytes | None) -> Path:
    shutil.copytree(source, target)
    for name, content in changes.items():
        path = target / name.replace("__", ".")
        path.unlink()
        if content is not None:
            path.write_bytes(content)
    return target


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"config__json": None}, FileNotFoundError, r"config\.json"),
        ({"config__json": b""}, based.FormatError, r"config\.json"),
        ({"config__json": b"{"}, based.FormatError, r"config\.json"),
        ({"config__json": b"[]"}, based.FormatError, r"config\.json"),
        ({"config__json": b"\xff"}, based.FormatError, r"config\.json"),
        ({"config__json": b'{"format": "based"}'}, based.FormatError, r"config\.json: format_version"),
        ({"model__safetensors": None}, FileNotFoundError, r"model\.safetensors"),
        ({"model__safetensors": b""}, based.FormatError, r"model\.safetensors"),
        ({"model__safetensors": b"\xff" * 100}, based.FormatError, r"model\.safetensors"),
    ],
)
def test_damaged_directories(converted, tmp_path, changes, error, text, model):
    with pytest.raises(error, match=text):
        based.load(damaged(converted, tmp_path / "model", **changes))
    assert model.forward([1]).shape == (1, 258)


def test_a_published_directory_that_is_damaged_leaves_no_trace(tmp_path, own_cache):
    with pytest.raises(based.FormatError, match=r"pytorch_model\.bin"):
        based.load(damaged(TINY, tmp_path / "model", pytorch_model__bin=b"PK"))
    assert list(own_cache.glob("model-*/")) == list(own_cache.glob(".*")) == []


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("BASED_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(NotADirectoryError, match="cache"):
        based.load(TINY)


# ---- tokenizers ------------------------------------------------------------------------------------------------------


def test_tokenizer_by_path(tmp_path):
    for path in (TINY, TINY / "tokenizer.json", str(TINY)):
        model = based.load(GOLDEN / "based-tiny-bf16", tokenizer=path)
        assert len(model.generate("Hello")[0].outputs[0].text) > 0
    (tmp_path / "bad.json").write_text("{}")
    model = based.load(TINY, tokenizer=tmp_path / "bad.json")
    with pytest.raises(based.FormatError, match=r"bad\.json: not a tokenizer"):
        model.generate("Hello")
    with pytest.warns(RuntimeWarning, match=r"generated text will be empty: .*bad\.json"):
        assert model.generate([1])[0].outputs[0].text == ""
    model.generate([1])  # warns once


@pytest.fixture(scope="module")
def gpt2_like(tmp_path_factory, converted):
    """A model with GPT-2's vocabulary, and no tokenizer in its directory."""
    directory = tmp_path_factory.mktemp("gpt2") / "model"
    config = json.loads((converted / "config.json").read_text())
    config |= {"vocab_size": 50257, "padded_vocab_size": 50264, "hidden_size": 8, "eos_token_id": 50256}
    config["layers"] = config["layers"][:1]
    directory.mkdir()
    RandomModel(config, 0, "float32").write(directory)
    return directory


def test_gpt2_tokenizer_is_fetched_only_for_text(gpt2_like):
    model = based.load(gpt2_like)
    assert model.forward([1]).shape == (1, 50257)
    model.session().prefill([1])
    with pytest.raises(
        OSError,
        match=r"no tokenizer\.json, and GPT-2's could not be fetched.*Give prompts as token ids.*--tokenizer FILE",
    ):
        model.generate("Hello")
    with pytest.raises(OSError, match="GPT-2"):
        model.generate([1], based.SamplingParams(stop="x"))
    with pytest.raises(OSError, match="GPT-2"):
        _ = model.tokenizer
    with pytest.warns(RuntimeWarning, match="text will be empty"):
        (output,) = model.generate([1, 2])
    assert len(output.outputs[0].token_ids) == 16


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_lfs_pointers_are_named(name, converted, tmp_path):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 724957218\n"
    directory = damaged(converted, tmp_path / "model", **{name.replace(".", "__"): pointer})
    with pytest.raises(based.FormatError, match=rf"{name}: found a Git LFS pointer.*`git lfs pull`"):
        based.load(directory).generate("a")


# ---- the hub ---------------------------------------------------------------------------------------------------------

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """As much of the hub's protocol as downloads need."""

    def __init__(self, repositories: Mapping[str, Mapping[str, bytes]]) -> None:
        self.requests: list[tuple[str, str, str | None]] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                path = self.path.split("?")[0]
                hub.requests.append((self.command, path, self.headers.get("Authorization")))
                parts = path.strip("/").split("/")
                is_api = parts[:2] == ["api", "models"]
                if is_api:
                    parts = parts[2:]
                name, (what, revision, *rest) = "/".join(parts[:2]), [*parts[2:], "", ""][: max(len(parts) - 2, 2)]
                files = repositories.get(name)
                if files is None:
                    return self.answer(404, error="RepoNotFound")
                if revision not in ("main", "v1", COMMIT):
                    return self.answer(404, error="RevisionNotFound")
                if is_api and what == "tree":
                    tree = [
                        {"type": "file", "path": f, "size": len(b), "oid": hashlib.sha1(b).hexdigest()}
                        for f, b in files.items()
                    ]
                    return self.answer(200, json.dumps(tree).encode())
                if is_api:
                    siblings = [{"rfilename": f, "size": len(b)} for f, b in files.items()]
                    info = {"id": name, "modelId": name, "sha": COMMIT, "private": False, "siblings": siblings}
                    return self.answer(200, json.dumps(info).encode())
                content = files.get("/".join(rest))
                if content is None:
                    return self.answer(404, error="EntryNotFound")
                return self.answer(200, content)

            do_HEAD = do_GET  # noqa: N815

            def answer(self, status: int, body: bytes = b"", error: str | None = None) -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
                self.send_header("X-Repo-Commit", COMMIT)
                if error is not None:
                    self.send_header("X-Error-Code", error)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def downloaded(self) -> set[str]:
        """Names of the files that were asked for."""
        return {path.split("/resolve/")[1].split("/", 1)[1] for _, path, _ in self.requests if "/resolve/" in path}

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.suffix != ".npz"}


@pytest.fixture
def hub(converted):
    server = Hub(
        {
            "owner/published": content(TINY) | {"README.md": b"text", "flax_model.msgpack": b"others"},
            "owner/ours": content(converted) | {"pytorch_model.bin": b"not needed"},
            "owner/empty": {"README.md": b"text"},
            "openai-community/gpt2": {"tokenizer.json": (TINY / "tokenizer.json").read_bytes()},
        }
    )
    yield server
    server.close()


@pytest.fixture
def python(hub, tmp_path):
    """python(code, **environment): standard output of a process that takes `hub` for the hub."""

    def run(code: str, **environment: str) -> str:
        # huggingface_hub reads its environment when it is imported: a process of its own.
        env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
        env |= {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "hf"), "BASED_CACHE": str(tmp_path / "based")}
        env |= {"HF_TOKEN": "hf_secret", "no_proxy": "127.0.0.1"} | environment
        result = subprocess.run(
            [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120, cwd=tmp_path
        )
        assert result.returncode == 0, result.stderr
        return result.stdout.strip()

    return run


FINGERPRINT = "import based; print(based.load('owner/{}').fingerprint)"


def test_published_model_at_the_hub(hub, python, model, tmp_path):
    generate = """
import based
model = based.load("owner/published", revision="v1")
print(model.fingerprint, repr(model.generate("Hello", based.SamplingParams(temperature=0))[0].outputs[0].text))
"""
    expected = repr(model.generate("Hello", based.SamplingParams(temperature=0))[0].outputs[0].text)
    assert python(generate) == f"{model.fingerprint} {expected}"
    assert hub.downloaded() == {"config.json", "tokenizer.json", "pytorch_model.bin"}
    assert {token for _, path, token in hub.requests if "published" in path} == {"Bearer hf_secret"}
    assert len(list((tmp_path / "based").glob("owner--published-*/"))) == 1

    hub.close()  # from the caches alone
    assert python(generate, HF_HUB_OFFLINE="1") == f"{model.fingerprint} {expected}"


def test_model_in_our_format_at_the_hub(hub, python, model, tmp_path):
    assert python(FINGERPRINT.format("ours")) == model.fingerprint
    assert hub.downloaded() == {"config.json", "tokenizer.json", "model.safetensors"}
    assert not (tmp_path / "based").exists()


def test_local_directories_win(hub, python, converted, tmp_path, model):
    shutil.copytree(converted, tmp_path / "owner" / "published")
    assert python(FINGERPRINT.format("published")) == model.fingerprint
    assert hub.requests == []


def test_gpt2_tokenizer_comes_from_the_hub(hub, python, gpt2_like):
    code = f"""
import based
model = based.load({str(gpt2_like)!r})
model.forward([1])
print(model.generate("Hi")[0].prompt_token_ids)
"""
    assert python(code) == "[72, 105]"
    assert hub.downloaded() == {"tokenizer.json"}


def test_ids_ask_no_hub(hub, python, gpt2_like):
    """Their text is read with a tokenizer that is at hand, or stays empty."""
    ids = f"""
import warnings, based
warnings.simplefilter("ignore")
model = based.load({str(gpt2_like)!r})
params = based.SamplingParams(temperature=0, max_tokens=4, logit_bias={{97: 100}})
print(repr(model.generate([72, 105], params)[0].outputs[0].text))
"""
    assert python(ids) == "''"
    assert hub.requests == []
    text = python(f"import based; print(based.load({str(gpt2_like)!r}).generate('Hi')[0].prompt_token_ids)")
    assert text == "[72, 105]"
    hub.requests.clear()
    assert python(ids) == "'aaaa'"  # it is in the hub's cache now
    python(f"import based; based.load({str(gpt2_like)!r}).generate('Hi')")
    assert hub.requests == []


def test_a_hub_out_of_reach_costs_one_request(hub, python, gpt2_like):
    hub.close()
    code = f"""
import time, based
model = based.load({str(gpt2_like)!r})
begin = time.monotonic()
try:
    model.generate("Hi")
except OSError as error:
    print(time.monotonic() - begin < 8, "could not be fetched" in str(error))
"""
    assert python(code) == "True True"


def test_token_ids_need_no_tokenizer(gpt2_like):
    command = [sys.executable, "-m", "based.cli", "generate", "-m", str(gpt2_like), "--token-ids", "1 2"]
    for flags in ([], ["--json"]):
        done = subprocess.run([*command, *flags], capture_output=True, text=True, stdin=subprocess.DEVNULL)
        assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        ("load('owner/none')", "FileNotFoundError", "no such directory, and the hub does not give"),
        ("load('owner/published', revision='v2')", "FileNotFoundError", "has no revision 'v2'"),
        ("load('owner/empty')", "FileNotFoundError", "config.json"),
    ],
)
def test_hub_errors(python, call, error, text):
    code = f"""
import based
try:
    based.{call}
except Exception as error:
    print(type(error).__name__, error)
"""
    found = python(code)
    assert found.startswith(error)
    assert text in found


def test_hub_out_of_reach(hub, python):
    hub.close()
    found = python("import based\ntry: based.load('owner/x')\nexcept OSError as error: print(error)")
    assert "hub cannot be reached" in found and "does not give" not in found
    assert "owner/x" in found and len(found.splitlines()) == 1


def test_what_is_loaded_is_what_was_published(python, model, golden):
    code = "import based, sys; print(based.load('owner/published').score(list(range(40))).tolist())"
    np.testing.assert_array_equal(np.array(json.loads(python(code)), np.float32), model.score(list(range(40))))
