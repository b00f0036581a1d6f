"""What a run says of itself: CSV files, TensorBoard, a line on stderr."""

import csv
import io
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from based.torch._running import replaced_file

TRAIN = ("step", "loss", "gradient_norm", "learning_rate", "tokens_per_second")
VALIDATION = ("step", "loss", "perplexity", "bits_per_byte")


class Table:
    """A CSV file whose first column is the step. Numbers are written so that reading gives the same ones."""

    def __init__(self, path: Path, columns: Sequence[str], last_step: int) -> None:
        """Opens a file to append to, without what it says of steps after `last_step`."""
        kept = []
        if path.exists():
            for row in csv.reader(io.StringIO(path.read_text(errors="replace"), newline="")):
                if len(row) == len(columns) and row[0].isdigit() and int(row[0]) <= last_step:
                    kept.append(row)
        with replaced_file(path) as file:
            csv.writer(file, lineterminator="\n").writerows([columns, *kept])
        self._path = path
        self.rows = kept
        """Those that the file had."""

    def add(self, rows: Sequence[Sequence[float | None]]) -> None:
        """Appends rows, and puts them on the disk."""
        with self._path.open("a", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(["" if x is None else x for x in row] for row in rows)
            file.flush()
            os.fsync(file.fileno())


def other_than_log(path: Path, columns: Sequence[str]) -> str | None:
    """What is at a path, in words, where it is not the log of a run; None where it is one, or an empty file."""
    if not path.is_file():
        return "a folder" if path.is_dir() else "something that is not a regular file"
    with path.open("rb") as file:
        first = file.readline(1000)
    text = first.decode(errors="replace").rstrip("\r\n")
    if not first or text == ",".join(columns):
        return None
    return f"a file that begins with {text if len(text) <= 80 else text[:79] + '…'!r}"


class Board:
    """TensorBoard's files."""

    def __init__(self, folder: Path, last_step: int) -> None:
        """Raises ImportError when TensorBoard is missing."""
        self._writer = board_writer()(str(folder), purge_step=last_step + 1)

    def add(self, step: int, values: dict[str, float | None]) -> None:
        """Numbers of a step."""
        for name, value in values.items():
            if value is not None:
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Writes what is left."""
        self._writer.close()


def is_board_file(name: str) -> bool:
    """Whether TensorBoard gives its files such a name."""
    return name.startswith("events.out.tfevents.")


def board_writer() -> Any:
    """TensorBoard's class. Raises ImportError when it is missing."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        message = 'logging.tensorboard needs TensorBoard: pip install "based[tensorboard]"'
        raise ImportError(message) from error
    return SummaryWriter


class Meter:
    """A run's progress on stderr: a bar on a terminal, a line at a time elsewhere; nothing unless it is wanted."""

    def __init__(self, *, wanted: bool) -> None:
        self._wanted = wanted and sys.stderr is not None
        self._bar: Any = None

    def note(self, text: str) -> None:
        """A line for its own."""
        if self._wanted:
            tqdm.write(text, file=sys.stderr)

    def show(self, step: int, steps: int, loss: float, rate: float, seconds_left: float) -> None:
        """How far the run is."""
        if not self._wanted:
            return
        text = f"step {step}/{steps}  loss {loss:.4f}  {rate:,.0f} tokens/s  {duration(seconds_left)} left"
        if not sys.stderr.isatty():
            self.note(text)
            return
        if self._bar is None:  # a run that is resumed does not begin at 0
            self._bar = tqdm(
                desc=text, total=steps, initial=step, bar_format="[{bar:20}] {desc}", ascii=".#", file=sys.stderr
            )
            return
        self._bar.n = step
        self._bar.set_description_str(text)

    def close(self) -> None:
        """Leaves the bar as it is, on a line of its own."""
        if self._bar is not None:
            self._bar.close()


def duration(seconds: float) -> str:
    """H:MM:SS, or M:SS."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class Stopwatch:
    """Seconds of training, without those of validation and checkpoints."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last lap."""
        now = time.perf_counter()
        seconds, self._start = now - self._start, now
        return seconds
