"""The devices of this machine, and which one "auto" means."""

import importlib.util
import os
import threading
import warnings
from dataclasses import dataclass
from pathlib import Path

from based import _core


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """The CPU, or a GPU."""

    device: str
    """As load() takes it: "cpu", "cuda:0"."""
    name: str
    architecture: str
    """Instruction set or GPU architecture, such as "avx512bf16" or "sm_90"."""
    total_nbytes: int
    """Memory; 0 for the CPU, as free_nbytes."""
    free_nbytes: int
    problem: str | None
    """Why it cannot be used; None when it can."""


def devices() -> list[DeviceInfo]:
    """The CPU, then every GPU of this machine."""
    return [
        DeviceInfo(d.device, d.name, d.architecture, d.total_nbytes, d.free_nbytes, d.problem or None)
        for d in _core.devices()
    ]


def default_batch_size(device: str, state_nbytes: int) -> int:
    """Sequences that run at once unless a caller says how many: what the device gains from, as far as memory allows.

    On a GPU 1,024, and at most half of its free memory for states; on the CPU 32, and a quarter of what is available.
    """
    if device == "cpu":
        most, memory = 32, available_memory() // 4
    else:
        most, memory = 1024, next(d.free_nbytes for d in devices() if d.device == device) // 2
    return max(1, min(most, memory // max(state_nbytes, 1)))


def default_cache_bytes(device: str) -> int:
    """Device memory for the states that an engine keeps for later prompts: what is free, and no more than is spare."""
    if device == "cpu":
        return available_memory() // 8
    return next(d.free_nbytes for d in devices() if d.device == device) // 4


def available_memory() -> int:
    """Bytes that this process may still take, by the system and its control groups."""
    return _core.available_memory()


def choose_device(device: str) -> str:
    """What "auto" means: $BASED_DEVICE if it is set, the first GPU that can be used, or the CPU.

    The CPU with a warning, where the machine has a GPU that might have been meant.
    """
    if device == "auto":
        device = os.environ.get("BASED_DEVICE") or "auto"
    if device != "auto":
        return device
    problem = _core.cuda_problem()
    if not problem:
        return next(d.device for d in devices() if d.device != "cpu" and d.problem is None)
    if _machine_has_gpu() and _first_fallback():
        warnings.warn(
            f"device='auto' runs on the CPU: {problem}. Give device='cpu' to say that this is meant.",
            RuntimeWarning,
            stacklevel=4,  # whoever called load() or Model.random()
        )
    return "cpu"


def _machine_has_gpu() -> bool:
    """Whether there is an NVIDIA GPU, with a driver or without, that $CUDA_VISIBLE_DEVICES does not hide."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return False
    if Path("/dev/nvidiactl").exists() or any(d.device != "cpu" for d in devices()):
        return True
    return any(_is_gpu(device) for device in Path("/sys/bus/pci/devices").glob("*"))


def _is_gpu(pci_device: Path) -> bool:
    try:
        vendor, kind = ((pci_device / name).read_text().strip() for name in ("vendor", "class"))
    except OSError:
        return False
    return vendor == "0x10de" and kind.startswith("0x03")  # NVIDIA; a display controller


_warned = threading.Event()


def _first_fallback() -> bool:
    first = not _warned.is_set()
    _warned.set()
    return first


def _add_cublas_paths() -> None:
    """Tells the core where pip puts cuBLASLt (nvidia-cublas). Imports nothing: nvidia is a namespace package."""
    spec = importlib.util.find_spec("nvidia")
    for location in (spec.submodule_search_locations or ()) if spec is not None else ():
        for folder in ("cu13", "cublas"):
            path = Path(location, folder, "lib")
            if path.is_dir():
                _core.add_cublas_path(str(path))


_add_cublas_paths()
