"""One process per device, each of which trains several models at once.

Within a process every model has a CUDA stream of its own, so that their kernels run beside each other, which those of
separate processes do not: a GPU gives processes turns. A recorded step is one launch; one thread feeds all streams.
"""

import contextlib
import multiprocessing
import os
import queue
import signal
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from based._core import UnsupportedError
from based.torch.recall.sweep import Run, Sweep
from based.torch.recall.training import Corpus, Trainer

_IDLE_SECONDS = 2e-4  # until a stream is looked at again
_PARENT_SECONDS = 0.5  # until the parent is looked at again


def devices(wanted: str) -> list[torch.device]:
    """The devices to train on: "auto" is every GPU, or else the CPU; "cuda" every GPU; or "cpu", "cuda:N"."""
    if wanted == "auto":
        wanted = os.environ.get("BASED_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")
    if wanted == "cpu":
        return [torch.device("cpu")]
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    chosen = [torch.device("cuda", index) for index in range(count)]
    if wanted != "cuda":
        chosen = [device for device in chosen if str(device) == wanted]
    if not chosen:
        raise UnsupportedError(f"device is {wanted}: PyTorch finds {count} GPUs")
    return chosen


class Workers:
    """The processes. Used as a context: what is still running at its end is told to stop, and waited for."""

    def __init__(
        self, sweep: Sweep, runs: list[Run], folder: Path, on: list[torch.device], parallel: int, save_every: float
    ) -> None:
        """Starts them.

        Args:
            sweep: What the models learn.
            runs: What is to be done, in this order.
            folder: Holds a folder for each run.
            on: A process for each.
            parallel: Models at once on a device.
            save_every: Seconds between the states that a run saves.
        """
        context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
        self._stop = context.Event()
        self._messages = context.Queue()
        self._runs = list(sweep.runs())  # processes know them by their places there
        self._taken = context.Value("i", 0)
        indices = [index for index, run in enumerate(self._runs) if run in runs]
        arguments = (sweep, indices, self._taken, folder, parallel, save_every, self._messages, self._stop)
        processes = min(len(on), len(runs))
        self._processes = [
            context.Process(target=_work, args=(str(device), *arguments), daemon=True) for device in on[:processes]
        ]
        for process in self._processes:
            process.start()

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        while self.running:
            with contextlib.suppress(queue.Empty):
                self._messages.get(timeout=0.1)  # a process ends when its messages have been taken
        for process in self._processes:
            process.join()

    @property
    def running(self) -> bool:
        """Whether any process is."""
        return any(process.is_alive() for process in self._processes)

    def stop(self) -> None:
        """Tells all to save and to end."""
        self._stop.set()

    def finished(self, seconds: float) -> Run | None:
        """The next run that has a result, if there is one within this time.

        Raises RuntimeError when a process has failed, MemoryError when it did so for want of memory.
        """
        codes = [process.exitcode for process in self._processes]
        try:
            message = self._messages.get(timeout=seconds)
        except queue.Empty:
            if any(codes):
                raise RuntimeError(f"a training process died; exit statuses are {codes}") from None
            return None
        if isinstance(message, Exception):
            raise message
        return self._runs[message]


def _work(device_name: str, *arguments: Any) -> None:
    """A process: trains until nothing is left to do, `stop` is set, or its parent is gone."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the parent's to answer
    *_, messages, _ = arguments
    try:
        _train(torch.device(device_name), *arguments)
    except torch.OutOfMemoryError as error:
        messages.put(MemoryError(f"{device_name}: out of memory; train fewer models at once: {error}"))
    except Exception as error:
        failure = RuntimeError(f"{device_name}: {type(error).__name__}: {error}")
        failure.add_note(traceback.format_exc())
        messages.put(failure)


def _train(
    device: torch.device,
    sweep: Sweep,
    indices: list[int],
    taken: Any,
    folder: Path,
    parallel: int,
    save_every: float,
    messages: Any,
    stop: Any,
) -> None:
    if device.type == "cuda":
        torch.cuda.set_device(device)
        if sweep.tf32:
            torch.set_float32_matmul_precision("high")  # products of numbers with 10 bits of mantissa, float32 sums
    corpus = Corpus(sweep, device)
    runs = list(sweep.runs())
    parent = multiprocessing.parent_process()
    assert parent is not None
    trainers: dict[int, Trainer] = {}
    left, looked = True, time.perf_counter()
    while trainers or left:
        if time.perf_counter() - looked > _PARENT_SECONDS:
            looked = time.perf_counter()
            if not parent.is_alive():
                stop.set()
        if stop.is_set():
            for trainer in trainers.values():
                trainer.save()
            return
        while left and len(trainers) < parallel:
            with taken:
                place, taken.value = taken.value, taken.value + 1
            if left := place < len(indices):
                run = runs[indices[place]]
                trainers[indices[place]] = Trainer(run, sweep, corpus, device, folder / run.name)
        active = False
        for index, trainer in list(trainers.items()):
            if not trainer.finished:
                active |= trainer.advance()
            if trainer.finished:
                trainer.finish()
                del trainers[index]
                messages.put(index)
            else:
                trainer.save_every(save_every)
        if not active:
            time.sleep(_IDLE_SECONDS)
