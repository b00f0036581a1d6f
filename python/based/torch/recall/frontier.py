"""From a sweep to the frontier: trains what is not yet trained, measures what is not yet measured."""

import csv
import functools
import json
import shutil
import signal
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from based._core import FormatError
from based.torch._running import Signals, only_process, replaced_file
from based.torch.recall.data import Examples
from based.torch.recall.families import FAMILIES, Candidate
from based.torch.recall.measuring import accuracies
from based.torch.recall.sweep import Run, Sweep
from based.torch.recall.training import Result, read_result, write_json
from based.torch.recall.workers import Workers, devices

_PARALLEL = {"cuda": 8, "cpu": 1}
_WAIT_SECONDS = 0.2
_SIZES = list(dict.fromkeys(family.size for family in FAMILIES.values()))
_COLUMNS = (
    "family",
    "width",
    *_SIZES,
    "parameters",
    "state_nbytes",
    "authors_nbytes",
    "settings",
    "learning_rate",
    "epochs",
    "accuracy",
)


class Paused(Exception):  # noqa: N818
    """The time is up, or a signal came; what was done so far is kept."""

    def __init__(self, number: int | None, trained: int, runs: int) -> None:
        why = "the time limit" if number is None else signal.Signals(number).name
        super().__init__(f"stopped by {why} with {trained} of {runs} runs done; the same command goes on")
        self.signal = number


@dataclass(frozen=True, slots=True)
class Outcome:
    """A model, trained at the best of the learning rates, and its recall."""

    model: str
    family: str
    width: int
    size: int
    """What makes the state of a width larger or smaller: a feature size, a window, …"""
    parameters: int
    state_nbytes: int
    """What a decoder keeps of the longest text, in float32."""
    authors_nbytes: int
    """The same as the authors count it in their Figure 2."""
    settings: str
    """How it was trained: as the "authors" train theirs, as "ours", or "other"."""
    differences: list[str]
    """From the authors' experiment."""
    learning_rate: float | None
    """The one with the best accuracy on the validation texts; None where no run's loss stayed finite."""
    epochs: int
    validation: dict[str, float | None]
    """That accuracy, for each learning rate; None where the loss was not finite."""
    accuracies: dict[str, float]
    """By test setting, "length/pairs", as the runtime answered; empty where no run's loss stayed finite."""
    accuracy: float | None
    """Their mean."""
    directory: str | None
    """The model, in the output folder."""


def measure_frontier(
    sweep: Sweep,
    output: Path,
    *,
    device: str = "auto",
    parallel: int | None = None,
    time_limit: float | None = None,
    save_every: float = 60,
    restart: bool = False,
    note: Callable[[str], None] = lambda _: None,
) -> list[Outcome]:
    """Trains a sweep's models and measures their recall, from where an earlier call in this folder was stopped.

    Writes, in `output`: results.csv and results.json, a row per model as soon as it has been measured; runs/, a folder
    per model and learning rate, with a model directory where the row comes from. Rows of models that are none of this
    sweep's stay, if all else of the sweep is the same.

    Args:
        sweep: Which models, and what they learn.
        output: The folder.
        device: "auto": all GPUs, or else the CPU; "cpu"; "cuda": all GPUs; "cuda:N".
        parallel: Models trained at once on a device; None for 8 on a GPU and 1 on a CPU.
        time_limit: Seconds until it stops by itself.
        save_every: Seconds between the saved states of a run in training.
        restart: Remove what an earlier call left, and begin anew.
        note: Told of progress.

    Raises:
        Paused: SIGINT or SIGTERM came, or the time was up.
        FormatError: The folder holds another sweep, or a damaged file; another process works there.
        UnsupportedError, OSError, MemoryError, RuntimeError: No such device; a file; memory; a process died.
    """
    began = time.monotonic()
    on = devices(device)
    parallel = _PARALLEL[on[0].type] if parallel is None else parallel
    with only_process(output), Signals() as signals:
        frontier = _Frontier(sweep, output, restart=restart, note=note)

        def check() -> None:
            late = time_limit is not None and time.monotonic() - began >= time_limit
            if signals.received or late:
                raise Paused(signals.received or None, len(frontier.results), len(frontier.runs))

        frontier.describe(on, parallel)
        todo = frontier.untrained()
        if todo:
            with Workers(sweep, todo, output / "runs", on, parallel, save_every) as workers:
                while workers.running or frontier.untrained():
                    check()
                    if (run := workers.finished(_WAIT_SECONDS)) is not None:
                        frontier.take(run)
                    for candidate in frontier.unmeasured():
                        frontier.measure(candidate, check)
        for candidate in frontier.unmeasured():
            frontier.measure(candidate, check)
        return frontier.write()


def merge(sweep: Sweep, output: Path, sources: Sequence[Path]) -> list[Outcome]:
    """Takes into a folder what other folders of the same sweep hold: pieces that other machines trained.

    Runs that have ended and the rows of models, none of which may be there with other numbers. Trains nothing;
    measure_frontier goes on from there. A merge that was killed goes on when it is called again.

    Args:
        sweep: As measure_frontier; which models are trained does not matter.
        output: The folder.
        sources: The others, which stay as they are.

    Returns:
        All rows.

    Raises:
        FormatError: A folder holds another sweep, none, or a damaged file; a model has other numbers in two of them.
        OSError: A file.
    """
    for source in sources:
        if not (source / "sweep.json").exists():
            raise FormatError(f"{source} has no sweep.json, expected the folder of a sweep")
    others = [_Frontier(sweep, source, restart=False, note=lambda _: None) for source in sources]
    with only_process(output):
        frontier = _Frontier(sweep, output, restart=False, note=lambda _: None)
        for other in others:
            frontier.take_in(other)
        return frontier.write()


class _Frontier:
    def __init__(self, sweep: Sweep, output: Path, *, restart: bool, note: Callable[[str], None]) -> None:
        self.sweep, self.output, self.note = sweep, output, note
        if not (output / "sweep.json").exists():
            for name in ("runs", "results.json", "results.csv"):
                if (output / name).exists():
                    raise FormatError(
                        f"{output / name}: found in a folder without a sweep.json, expected no such file or folder: a "
                        f"sweep writes its own there. Move it, or use another folder than {output}"
                    )
        elif restart:
            for name in ("runs", "results.json", "results.csv", "sweep.json"):  # the last one says that a sweep is here
                path = output / name
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        self._check_same()
        self.candidates, self.runs = sweep.candidates(), list(sweep.runs())
        self.results: dict[str, Result] = {}
        for run in self.runs:
            if (result := read_result(output / "runs" / run.name)) is not None:
                self.results[run.name] = result
        self.outcomes = self._read_outcomes()

    @functools.cached_property
    def tests(self) -> list[Examples]:
        """The texts that models are asked."""
        return self.sweep.test_examples_of()

    def _check_same(self) -> None:
        path, now = self.output / "sweep.json", self.sweep.to_json()
        if not path.exists():
            write_json(path, now)
            return
        try:
            before = dict(json.loads(path.read_bytes()))
        except (ValueError, TypeError, RecursionError) as error:
            raise FormatError(f"{path}: {error}") from None
        differing = [key for key in {**before, **now} if before.get(key) != now.get(key)]
        if differing:
            shown = "; ".join(f"{key} was {before.get(key)}, is {now.get(key)}" for key in differing)
            raise FormatError(f"{self.output} holds another sweep: {shown}. Use another folder, or --restart")

    def _read_outcomes(self) -> dict[str, Outcome]:
        path = self.output / "results.json"
        try:
            rows = [Outcome(**row) for row in json.loads(path.read_bytes())]
            if unknown := {row.family for row in rows} - FAMILIES.keys():
                raise ValueError(f"families {unknown}, expected some of {', '.join(FAMILIES)}")
            return {row.model: row for row in rows}
        except FileNotFoundError:
            return {}
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise FormatError(f"{path}: {error!r}") from None

    def take_in(self, other: "_Frontier") -> None:
        """Copies the ended runs of another folder, then their rows."""
        for name, row in other.outcomes.items():
            if (mine := self.outcomes.get(name)) is not None and mine != row:
                found = f"accuracy {mine.accuracy} in {self.output}, {row.accuracy} in {other.output}"
                raise FormatError(f"{name} has other numbers in two folders: {found}. Remove one of them")
        staging = self.output / "runs" / ".merging"
        for folder in sorted((other.output / "runs").glob("[!.]*")):
            destination = self.output / "runs" / folder.name
            there, here = read_result(folder), read_result(destination)
            if there is None:
                continue
            if here is not None:
                if replace(here, seconds=0.0) != replace(there, seconds=0.0):
                    raise FormatError(f"{destination} and {folder} are one run with two results. Remove one of them")
                continue
            shutil.rmtree(staging, ignore_errors=True)
            for file in folder.rglob("*"):
                if file.is_file():
                    copy = staging / file.relative_to(folder)
                    copy.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(file, copy)  # without its mode: what is copied may be read-only
            shutil.rmtree(destination, ignore_errors=True)  # a run that has not ended here
            staging.rename(destination)
        self.outcomes |= other.outcomes
        self.write()

    def describe(self, on: list[Any], parallel: int) -> None:
        """Tells what is to be done."""
        runs, models = len(self.runs), len(self.candidates)
        done = f", {len(self.results)} of them done" if self.results else ""
        where = f"{len(on)} × {on[0].type}, {parallel} at once on each"
        self.note(f"{models} models, {runs} runs of up to {self.sweep.epochs} epochs{done}; {where}")

    def untrained(self) -> list[Run]:
        """Runs without a result."""
        return [run for run in self.runs if run.name not in self.results]

    def take(self, run: Run) -> None:
        """Reads the result of a run that has one now."""
        result = read_result(self.output / "runs" / run.name)
        assert result is not None
        self.results[run.name] = result
        accuracy = f"accuracy {result.accuracy:.4f}" if result.finite else "not finite"
        count = f"{len(self.results)}/{len(self.runs)}"
        self.note(f"{count}  {run.name}: {accuracy} after {result.epochs} epochs, {result.seconds:.0f} s")

    def unmeasured(self) -> list[Candidate]:
        """Models of which every run has a result, and whose recall is not known."""
        return [
            candidate
            for candidate in self.candidates
            if candidate.name not in self.outcomes and all(run.name in self.results for run in self._runs(candidate))
        ]

    def _runs(self, candidate: Candidate) -> list[Run]:
        return [Run(candidate, rate) for rate in self.sweep.learning_rates]

    def measure(self, candidate: Candidate, check: Callable[[], None]) -> None:
        """Asks the runtime, on the CPU while GPUs train, and forgets the weights of the other learning rates."""
        runs = self._runs(candidate)
        finite = [run for run in runs if self.results[run.name].finite]
        best = max(finite, key=lambda run: self.results[run.name].accuracy, default=None)
        directory = None if best is None else Path("runs") / best.name / "model"
        shares = [] if directory is None else accuracies(self.output / directory, self.tests, "cpu", check)
        results = {run.learning_rate: self.results[run.name] for run in runs}
        self.outcomes[candidate.name] = Outcome(
            model=candidate.name,
            family=candidate.family,
            width=candidate.width,
            size=candidate.size,
            parameters=candidate.config.num_parameters,
            state_nbytes=candidate.state_nbytes,
            authors_nbytes=candidate.authors_nbytes,
            settings=self.sweep.settings,
            differences=self.sweep.differences(candidate),
            learning_rate=None if best is None else best.learning_rate,
            epochs=max(result.epochs for result in results.values())
            if best is None
            else self.results[best.name].epochs,
            validation={f"{rate:g}": r.accuracy if r.finite else None for rate, r in results.items()},
            accuracies={str(setting): share for setting, share in zip(self.sweep.test, shares, strict=bool(shares))},
            accuracy=sum(shares) / len(shares) if shares else None,
            directory=None if directory is None else str(directory),
        )
        self.write()
        for run in runs:
            if run != best:
                shutil.rmtree(self.output / "runs" / run.name / "model", ignore_errors=True)
        recall = self.outcomes[candidate.name].accuracy
        if recall is None:
            warnings.warn(
                f"{candidate.name}: the loss of no run stayed finite: its row has no accuracy. Lower learning rates, "
                "and another folder or --restart, may give one",
                RuntimeWarning,
                stacklevel=2,
            )
            return
        self.note(f"{candidate.name}: recall {recall:.4f} with {candidate.state_nbytes:,} bytes of state")

    def write(self) -> list[Outcome]:
        """Writes both tables; the rows, by family and state."""
        order = list(FAMILIES)
        rows = sorted(self.outcomes.values(), key=lambda row: (order.index(row.family), row.state_nbytes))
        write_json(self.output / "results.json", [asdict(row) for row in rows])
        with replaced_file(self.output / "results.csv") as file:
            writer = csv.DictWriter(file, [*_COLUMNS, *map(str, self.sweep.test)], lineterminator="\n")
            writer.writeheader()
            for row in rows:
                facts = asdict(row) | {FAMILIES[row.family].size: row.size} | row.accuracies
                writer.writerow({key: _rounded(facts[key]) for key in writer.fieldnames if key in facts})
        return rows


def _rounded(value: Any) -> Any:
    return round(value, 6) if isinstance(value, float) else value
