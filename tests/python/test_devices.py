"""Devices: what there is, what "auto" means, and what is said when a GPU cannot be had. Runs everywhere."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import based
import numpy as np
import pytest
from based import _core, _devices, sizes

GOLDEN = Path(__file__).parent.parent / "golden" / "based-tiny"
NO_GPU = _core.cuda_problem()


def run(*command, **environment):
    """A process that sees no GPU."""
    clean = {name: value for name, value in os.environ.items() if name != "BASED_DEVICE"}
    env = clean | {"CUDA_VISIBLE_DEVICES": ""} | environment
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, env=env)


@pytest.fixture
def auto(monkeypatch):
    """device="auto" as a user's process has it at its start."""
    monkeypatch.delenv("BASED_DEVICE")
    _devices._warned.clear()
    yield monkeypatch
    _devices._warned.clear()


def test_devices():
    cpu, *gpus = based.devices()
    assert (cpu.device, cpu.total_nbytes, cpu.free_nbytes, cpu.problem) == ("cpu", 0, 0, None)
    assert cpu.architecture in _core.build_info()["instruction_sets"]
    assert [gpu.device for gpu in gpus] == [f"cuda:{i}" for i in range(len(gpus))]
    for gpu in gpus:
        assert gpu.name
        assert gpu.architecture.startswith("sm_")
        assert 0 <= gpu.free_nbytes <= gpu.total_nbytes
        assert gpu.problem is None or gpu.problem
    assert bool(NO_GPU) == all(gpu.problem for gpu in gpus)


def test_build_info():
    info = based.build_info()
    assert info["cuda"] is None or info["cuda"].split(".")[0].isdigit()
    assert bool(info["cuda_architectures"]) == (info["cuda"] is not None)


def test_auto_without_a_gpu_warns_once(auto):
    auto.setattr(_core, "cuda_problem", lambda: "no CUDA driver is installed")
    auto.setattr(_devices, "_machine_has_gpu", lambda: True)
    with pytest.warns(RuntimeWarning, match="no CUDA driver is installed.*device='cpu'") as caught:
        assert based.load(GOLDEN).device == "cpu"
    assert [warning.filename for warning in caught] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert based.Model.random(sizes.named_config("tiny")).device == "cpu"


def test_auto_is_silent_where_there_is_no_gpu(auto, tmp_path):
    """Nothing is wrong then. A GPU without a driver is one: its display class and vendor are in sysfs."""
    auto.setattr(_core, "cuda_problem", lambda: "no CUDA driver is installed")
    auto.setattr(_devices, "_machine_has_gpu", lambda: False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert based.load(GOLDEN).device == "cpu"
    for vendor, kind, expected in (
        ("0x10de", "0x030200", True),
        ("0x10de", "0x040300", False),
        ("0x1002", "0x030000", False),
    ):
        (tmp_path / "vendor").write_text(vendor + "\n")
        (tmp_path / "class").write_text(kind + "\n")
        assert _devices._is_gpu(tmp_path) is expected
    assert not _devices._is_gpu(tmp_path / "absent")


def test_a_hidden_gpu_is_no_gpu(monkeypatch):
    for hidden in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert not _devices._machine_has_gpu()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    if not NO_GPU:
        assert _devices._machine_has_gpu()


def test_auto_takes_the_first_gpu_that_works(auto):
    gpus = [
        _devices.DeviceInfo("cpu", "CPU", "avx2", 0, 0, None),
        _devices.DeviceInfo("cuda:0", "old", "sm_70", 1, 1, "too old"),
        _devices.DeviceInfo("cuda:1", "new", "sm_90", 1, 1, None),
    ]
    auto.setattr(_core, "cuda_problem", lambda: "")
    auto.setattr(_devices, "devices", lambda: gpus)
    assert _devices.choose_device("auto") == "cuda:1"


def test_auto_is_what_the_environment_says(auto):
    auto.setenv("BASED_DEVICE", "cpu")
    assert based.load(GOLDEN).device == "cpu"
    auto.setenv("BASED_DEVICE", "tpu")
    with pytest.raises(ValueError, match="tpu"):
        based.load(GOLDEN)
    assert based.load(GOLDEN, device="cpu").device == "cpu"


def test_a_gpu_asked_for_by_name_is_not_replaced():
    code = (
        "import based, sys\ntry: based.load(sys.argv[1], device='cuda:0')\nexcept based.UnsupportedError as e: print(e)"
    )
    result = run("-c", code, GOLDEN)
    assert result.returncode == 0, result.stderr
    reasons = ("no CUDA (", "device cuda:0 is not available: ")
    assert any(reason in result.stdout for reason in reasons), result.stdout


def test_a_gpu_that_is_not_there():
    with pytest.raises(based.UnsupportedError, match=r"CUDA|this machine has"):
        based.load(GOLDEN, device="cuda:63")


@pytest.mark.parametrize("device", ["", "gpu", "cuda:", "cuda:x", "cuda:-1", "cpu:1", "CPU"])
def test_names_that_are_no_device(device):
    with pytest.raises((ValueError, based.UnsupportedError)):
        based.load(GOLDEN, device=device)


def test_float16_needs_a_gpu():
    with pytest.raises(based.UnsupportedError, match="float16"):
        based.load(GOLDEN, device="cpu", dtype="float16")
    with pytest.raises(ValueError, match="dtype must be 'auto', 'float32', 'bfloat16' or 'float16', not 'int8'"):
        based.load(GOLDEN, dtype="int8")


def test_the_command_line_warns_in_plain_words():
    arguments = ["generate", "-m", str(GOLDEN), "The bee", "--max-tokens", "2", "--no-stats"]
    code = f"""
import sys
from based import _core, _devices, cli
_core.cuda_problem = lambda: "no CUDA driver is installed"
_devices._machine_has_gpu = lambda: {{}}
sys.exit(cli.main({arguments}))
"""
    result = run("-c", code.format(True))
    assert result.returncode == 0, result.stderr
    assert result.stderr.startswith("based: warning: --device auto runs on the CPU: no CUDA driver is installed. Give")
    assert "Give --device cpu to say that this is meant." in result.stderr and "device=" not in result.stderr
    assert result.stderr.count("\n") == 1
    silent = run("-c", code.format(False))
    assert (silent.returncode, silent.stderr) == (0, "")
    quiet = run("-m", "based.cli", "generate", "-m", GOLDEN, "--device", "cpu", "The bee", "--max-tokens", "2")
    assert (quiet.returncode, quiet.stderr) == (0, "")
    refused = run("-m", "based.cli", "generate", "-m", GOLDEN, "--device", "cuda", "The bee")
    assert refused.returncode == 1
    assert refused.stderr.startswith("based: error: ")
    assert "CUDA" in refused.stderr


def test_importing_based_imports_no_gpu_library():
    code = "import based, sys; print([m for m in sys.modules if m.split('.')[0] in ('torch', 'nvidia', 'cupy')])"
    assert run("-c", code).stdout.strip() == "[]"


def test_memory_on_the_cpu(model):
    before = model.memory
    assert before.weights >= model.weight_nbytes
    session = model.session(3)
    assert model.memory.states - before.states >= 3 * model.state_nbytes
    del session
    assert model.memory == before


def test_tensors_of_the_cpu():
    tensor = based.Model.random(sizes.named_config("tiny"))._core.forward([1, 2, 3])
    part = tensor.columns(5)
    assert (part.shape, part.device, part.dtype, part.nbytes, len(part)) == ((3, 5), "cpu", "float32", 60, 3)
    np.testing.assert_array_equal(np.asarray(part), np.asarray(tensor)[:, :5])
    np.testing.assert_array_equal(np.from_dlpack(part), np.asarray(tensor)[:, :5])
    assert np.shares_memory(np.asarray(part), np.asarray(tensor))
    for count in (-1, tensor.shape[1] + 1):
        with pytest.raises(ValueError, match="columns of shape"):
            tensor.columns(count)
