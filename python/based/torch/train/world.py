"""The processes of a run, as torchrun starts them, and the device of this one."""

import os
import pickle
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
    """This process among those of the run; alone unless torchrun's variables say otherwise.

    What one process does while the others wait goes through from_first or in_each, which hand a failure on. A failure
    inside a step, where processes wait for each other in PyTorch, ends the process: its connections are then closed,
    and gloo raises in the others; NCCL waits for its own timeout, unless the launcher ends the other processes.
    """

    def __init__(self, device: str) -> None:
        self.rank, self.size = _rank(), int(os.environ.get("WORLD_SIZE", 1))
        self.device = torch.device("cpu")
        self._wanted_device = device
        self._control: Any = None

    def __enter__(self) -> "World":
        def choose() -> torch.device:
            return _choose_device(self._wanted_device, int(os.environ.get("LOCAL_RANK", 0)), self.size)

        if self.size == 1:
            self.device = choose()
            return self
        problem: UnsupportedError | None = None
        try:
            self.device = choose()
        except UnsupportedError as error:
            problem = error  # the other processes are told when there is a connection
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        dist.init_process_group("gloo" if self.device.type == "cpu" else "cpu:gloo,cuda:nccl")
        try:
            self._control = dist.new_group(backend="gloo", timeout=_PATIENCE)
            self.in_each(lambda: _raise_if(problem))
        except BaseException:
            dist.destroy_process_group()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self.size > 1:
            dist.destroy_process_group()

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    def from_first(self, make: Callable[[], T]) -> T:
        """The result of make() in the first process, in all of them. When it raises, all raise, with its message."""
        if self.size == 1:
            return make()
        outcome: list[Any] = [None, None]  # the result, the failure
        own: BaseException | None = None
        if self.first:
            try:
                outcome[0] = make()
            except BaseException as error:
                own, outcome[1] = error, _portable(error)
        dist.broadcast_object_list(outcome, src=0, group=self._control)
        _raise_if(own or outcome[1])
        result: T = outcome[0]
        return result

    def in_each(self, make: Callable[[], T]) -> T:
        """The result of make() in this process. When it raises in any process, all raise; make() must wait for none."""
        if self.size == 1:
            return make()
        own: BaseException | None = None
        try:
            result = make()
        except BaseException as error:
            own = error
        failures: list[Any] = [None] * self.size
        dist.all_gather_object(failures, own and _portable(own), group=self._control)
        for failure in (own, *failures):
            _raise_if(failure)
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


def _raise_if(error: BaseException | None) -> None:
    if error is not None:
        raise error


def _portable(error: BaseException) -> BaseException:
    """The exception, or one with its type's name and its message where pickle cannot carry it to another process."""
    try:
        copy = pickle.loads(pickle.dumps(error))
        if type(copy) is type(error) and str(copy) == str(error):
            return error
    except Exception:  # whatever its __reduce__ or its __init__ raises
        pass
    return RuntimeError(f"{type(error).__name__}: {error}")


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
                f"training.device 'auto' is the CPU: {_problem()}. Set training.device: cpu to say that this is meant.",
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
