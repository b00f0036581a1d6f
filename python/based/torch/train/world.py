"""The processes of a run, as torchrun starts them, and the device of this one."""

import os
import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from based._core import UnsupportedError

T = TypeVar("T")

_PATIENCE = timedelta(days=7)  # for process 0, which packs documents and writes checkpoints


class World:
    """This process among those of the run; alone unless torchrun's variables say otherwise."""

    def __init__(self, device: str) -> None:
        self.rank, self.size = _rank(), int(os.environ.get("WORLD_SIZE", 1))
        self.device = _choose_device(device, int(os.environ.get("LOCAL_RANK", 0)), self.size)
        self._control: Any = None

    def __enter__(self) -> "World":
        if self.size > 1:
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)
            dist.init_process_group("gloo" if self.device.type == "cpu" else "cpu:gloo,cuda:nccl")
            self._control = dist.new_group(backend="gloo", timeout=_PATIENCE)
        return self

    def __exit__(self, *_: object) -> None:
        if self.size > 1:
            dist.destroy_process_group()

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    def from_first(self, make: Callable[[], T]) -> T:
        """What make() gives in the first process, in all of them."""
        value: list[Any] = [make() if self.first else None]
        if self.size > 1:
            dist.broadcast_object_list(value, src=0, group=self._control)
        result: T = value[0]
        return result

    def largest(self, value: int) -> int:
        """The largest of all processes' numbers."""
        if self.size == 1:
            return value
        tensor = torch.tensor(value)
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self._control)
        return int(tensor)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of all processes' tensors."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor


def _rank() -> int:
    return int(os.environ.get("RANK", 0))


def is_first_process() -> bool:
    """Whether this process is the one that speaks for the run."""
    return _rank() == 0


def _choose_device(device: str, local_rank: int, size: int) -> torch.device:
    if device == "auto":
        device = os.environ.get("BASED_DEVICE") or "auto"
    if device == "auto":
        if torch.cuda.is_available():
            device = "cuda"
        else:
            warnings.warn(
                f"training.device 'auto' is the CPU: {_problem()}. With 'cpu' there is no such warning.",
                RuntimeWarning,
                stacklevel=2,
            )
            device = "cpu"
    if device == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UnsupportedError(f"training.device is {device}: {_problem()}")
    chosen = torch.device(device)
    if size > 1 and chosen.index is not None:
        raise UnsupportedError(f"training.device is {device}, expected cuda: each of {size} processes has its own GPU")
    index = local_rank if chosen.index is None else chosen.index
    if index >= torch.cuda.device_count():
        found = f"PyTorch finds {torch.cuda.device_count()} GPUs"
        raise UnsupportedError(f"training.device is cuda:{index}: {found}")
    return torch.device("cuda", index)


def _problem() -> str:
    if torch.version.cuda is None:
        return f"PyTorch {torch.__version__} is built without CUDA"
    return "PyTorch finds no GPU"
