"""The training loop: steps, validation, checkpoints, and taking up a run where it stopped."""

import contextlib
import dataclasses
import json
import math
import os
import re
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from based._core import FormatError, ModelConfig
from based.torch._running import Signals, only_process, remove_files
from based.torch.model import BasedForCausalLM
from based.torch.train import training_checkpoint
from based.torch.train.config import Config, Optimizer, model_config
from based.torch.train.data import Dataset, Windows, pack, validation_windows
from based.torch.train.log import (
    TRAIN,
    VALIDATION,
    Board,
    Meter,
    Stopwatch,
    Table,
    board_writer,
    duration,
    is_board_file,
    other_than_log,
)
from based.torch.train.tokens import Encoder, make_encoder, model_source
from based.torch.train.world import World

_MOMENTS = ("exp_avg", "exp_avg_sq")
_EXPORT = re.compile(r"\.model\.[0-9a-f]{8}\.(new|old)")
_KEPT = ".beside-model"
_MODEL_FILES = {"config.json", "model.safetensors", "tokenizer.json"}
_LOGS = {"train.csv": TRAIN, "validation.csv": VALIDATION}
CHANGEABLE = (
    *(f"optimizer.{item.name}" for item in dataclasses.fields(Optimizer)),
    *(f"training.{name}" for name in ("steps", "batch_size", "seed", "skip_steps", "precision")),
)
"""Keys that a run may change on purpose."""


@dataclass(frozen=True, slots=True)
class Result:
    """What a run came to."""

    model: Path
    """A model directory: the weights with the lowest validation loss, or the last where there is no validation."""
    model_step: int
    step: int
    validation_loss: float | None
    """Of `model`, in nats per token."""
    perplexity: float | None
    bits_per_byte: float | None


class Stopped(Exception):  # noqa: N818
    """A signal ended the run, after a checkpoint."""

    def __init__(self, number: int, step: int) -> None:
        super().__init__(
            f"stopped by {signal.Signals(number).name} after step {step}; the same command goes on from there"
        )
        self.signal = number


def train(
    config: Config,
    *,
    restart: bool = False,
    must_resume: bool = False,
    change: Sequence[str] = (),
    meter: Meter | None = None,
) -> Result:
    """Trains a model, from the last checkpoint in the output folder if there is one.

    Args:
        config: See read_config.
        restart: Remove what an earlier run left in the output folder, if there was one, and begin anew.
        must_resume: Fail when there is no checkpoint.
        change: Keys that the run may have other values of from here on: `CHANGEABLE` ones.
        meter: Shows progress.

    Raises:
        Stopped: SIGINT or SIGTERM came; there is a checkpoint.
        FormatError: Bad data; the checkpoint belongs to another configuration or to other data; or a file that no run
            has written has the name of one that this run would write.
        FloatingPointError: A loss or a gradient is not finite. The last checkpoint is as it was; so with every failure.
        UnsupportedError: This machine lacks the device.
        OSError, MemoryError, ImportError: A file, a full disk; the device's memory; an extra is missing.
    """
    meter = meter or Meter(wanted=False)
    for key in change:
        if key not in CHANGEABLE:
            raise FormatError(f"--change {key}: expected one of {', '.join(CHANGEABLE)}")
    if config.logging.tensorboard:
        board_writer()
    output = config.output_folder()
    with (
        contextlib.closing(meter),
        _deterministic(config.training.deterministic),
        World(config.training.device) as world,
        contextlib.ExitStack() as held,
        _memory_advice(world),
    ):
        world.from_first(lambda: _refuse_files_of_others(output))
        world.from_first(lambda: held.enter_context(only_process(output)))
        run = _Run(config, output, world, meter, restart=restart, must_resume=must_resume, change=change)
        with run.gatherer:
            return run.run()


def _refuse_files_of_others(output: Path) -> None:
    """Raises FormatError where the run would write over files that are no run's, before anything is written."""
    advice = f"Move it, or use another output than {output}"
    for name, columns in _LOGS.items():
        path = output / name
        if path.exists() and (found := other_than_log(path, columns)) is not None:
            expected = f"no such file, or the log of a run, which begins with {','.join(columns)!r}"
            raise FormatError(f"{path}: found {found}, expected {expected}: a run writes its log there. {advice}")
    if not _holds_run(output):
        for name in sorted(_MODEL_FILES):
            if (path := output / "model" / name).exists():
                expected = f"no such file: {output} holds no run, and a run writes its model there"
                raise FormatError(f"{path}: found a file of another model, expected {expected}. {advice}")


def _holds_run(output: Path) -> bool:
    """Whether an earlier run has left a checkpoint or a log there."""
    return bool(training_checkpoint.paths(output / "checkpoints")) or any((output / name).exists() for name in _LOGS)


@contextlib.contextmanager
def _memory_advice(world: World) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        advice = "lower training.micro_batch_size or set training.activation_checkpointing"
        raise MemoryError(f"{world.device}: out of memory; {advice}: {error}") from error


@contextlib.contextmanager
def _deterministic(wanted: bool) -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    filled = memory.fill_uninitialized_memory
    if wanted:
        memory.fill_uninitialized_memory = False  # nothing here reads such memory
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when the first product runs on a GPU
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        memory.fill_uninitialized_memory = filled


def _compile_options(deterministic: bool) -> dict[str, Any]:
    """Keeps torch.compile from choosing kernels by timing: each process might choose others, which round otherwise.

    PyTorch's deterministic algorithms alone leave two such choices to Inductor: whether to pad the matrices of a
    product, and how large the blocks of a sum are. Its own option `deterministic` forbids them.
    """
    return {"options": {"deterministic": True}} if deterministic else {}


class _Run:
    def __init__(
        self,
        config: Config,
        output: Path,
        world: World,
        meter: Meter,
        *,
        restart: bool,
        must_resume: bool,
        change: Sequence[str],
    ) -> None:
        self.config, self.output, self.world, self.meter = config, output, world, meter
        self.checkpoints = output / "checkpoints"
        training = config.training
        self.rows = training.batch_size // world.size
        self.micro = training.micro_batch_size or max(1, self.rows)
        if training.batch_size % (world.size * self.micro) != 0:
            expected = f"a multiple of {world.size} processes · micro_batch_size {self.micro}"
            raise FormatError(f"training.batch_size: found {training.batch_size}, expected {expected}")

        encoder, model, shape = world.in_each(self._read_model)
        self.tokenizer = encoder.json if encoder is not None else None
        self.shape = shape
        if config.data.sequence_length <= shape.prefix_tokens:
            raise FormatError(
                f"data.sequence_length: found {config.data.sequence_length}, expected more than the "
                f"{shape.prefix_tokens} tokens that this model reads as a whole: only what follows them can be learnt"
            )
        if shape.max_tokens is not None and config.data.sequence_length > shape.max_tokens:
            raise FormatError(
                f"data.sequence_length: found {config.data.sequence_length}, expected at most the {shape.max_tokens} "
                "tokens that a layer's max_length allows"
            )
        assert shape.eos_token_id is not None
        end = shape.eos_token_id
        self.dataset: Dataset = world.from_first(
            lambda: pack(config, output / "data", encoder, shape.vocab_size, end, meter.note)
        )
        self.windows = world.in_each(self._open_windows)
        self.saved = saved = world.from_first(lambda: self._find_checkpoint(restart))
        if saved is None and must_resume:
            raise FormatError(f"{self.checkpoints}: no checkpoint to resume from")
        self.step = saved.progress.step if saved is not None else 0
        self.precision = self._precision(saved.progress if saved is not None else None)
        self.changes = self._check_same(saved.progress, change) if saved is not None else ()
        self.measured, self.measured_from, self.is_other_validation = self._measured_tokens(), 0, False
        if saved is not None:
            self.is_other_validation = saved.progress.validation not in (self.measured, None)
            self.measured_from = self.step if self.is_other_validation else saved.progress.validation_from
        self.model = world.in_each(lambda: self._place(model))
        self.module: Any = self._distribute()
        self.optimizer = _make_optimizer(self.model, config.optimizer, world.device)
        if saved is not None:
            self._load_moments(world.in_each(lambda: saved.tensors("optimizer.safetensors")))
        self.pending: list[tuple[int, torch.Tensor, torch.Tensor]] = []
        self.stopwatch = Stopwatch()
        self.rate = 0.0  # tokens per second
        self.gatherer = ThreadPoolExecutor(1, "based-train-windows")
        self.gathered: Future[torch.Tensor] | None = None

    # ---- how it begins -----------------------------------------------------------------------------------------------

    def _read_model(self) -> tuple[Encoder | None, BasedForCausalLM | None, ModelConfig]:
        """The tokenizer and the model of model.from, if there is one, and the shape."""
        encoder = make_encoder(self.config)
        return encoder, *self._shape(encoder)

    def _open_windows(self) -> Windows:
        streams = [self.dataset.open(stream) for stream in self.dataset.train]
        weights = [source.weight for source in self.config.data.train if source.weight is not None]
        return Windows(streams, weights or None, self.config.data.sequence_length, self.config.training.seed)

    def _find_checkpoint(self, restart: bool) -> training_checkpoint.TrainingCheckpoint | None:
        if restart:
            self._clear()
        return training_checkpoint.newest(self.checkpoints)

    def _place(self, model: BasedForCausalLM | None) -> BasedForCausalLM:
        """The checkpoint's model, that of model.from, or a new one, on this process's device."""
        training = self.config.training
        if self.saved is not None:
            model = BasedForCausalLM(self.shape, device="meta")
            model.load_state_dict(self.saved.tensors("model.safetensors"), assign=True)
        elif model is None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(training.seed)
                model = BasedForCausalLM(
                    self.shape, special_initializer=self.config.model.special_initializer, device="cpu"
                )  # the same weights whatever the device
        model.activation_checkpointing = training.activation_checkpointing
        with _memory_advice(self.world):
            model = model.to(self.world.device)
        if self._compiles():
            for layer in model.layers:  # layers of one kind share what is made for the first
                layer.compile(fullgraph=True, dynamic=False, **_compile_options(training.deterministic))
        return model

    def _compiles(self) -> bool:
        wanted = self.config.training.compile
        return self.world.device.type == "cuda" if wanted is None else wanted

    def _shape(self, encoder: Encoder | None) -> tuple[BasedForCausalLM | None, ModelConfig]:
        """The model of model.from, if there is one, and the shape."""
        if self.config.model.from_ is None:
            if encoder is None:
                return None, model_config(self.config.model, None, self.config.data.end_token_id)
            start = encoder.start_token_ids[0] if len(encoder.start_token_ids) == 1 else None
            return None, model_config(self.config.model, encoder.vocab_size, encoder.end_token_id, start)
        source = model_source(self.config)
        model = BasedForCausalLM.load(source, device="cpu")
        shape = model.config
        if encoder is None:
            if shape.eos_token_id is None:
                raise FormatError(f"{source}: its eos_token_id is null, expected the token that ends a document")
        elif encoder.vocab_size > shape.vocab_size:
            found = f"{encoder.vocab_size} tokens, expected at most {shape.vocab_size}, which {source} has"
            raise FormatError(f"data.tokenizer: found {found}")
        elif encoder.end_token_id != shape.eos_token_id:
            document = json.loads(shape.to_json()) | {"eos_token_id": encoder.end_token_id}
            shape = ModelConfig.from_json(json.dumps(document), str(source))
        return model, shape

    def _clear(self) -> None:
        """Removes what an earlier run left, by the names that a run gives, but for the packed documents."""
        if not _holds_run(self.output):
            return
        for saved in training_checkpoint.paths(self.checkpoints):
            training_checkpoint.remove(saved)
        training_checkpoint.clean(self.checkpoints)
        for folder, is_own in (
            ("model", _MODEL_FILES.__contains__),
            ("tensorboard", is_board_file),
            ("checkpoints", lambda _: False),
        ):
            if (self.output / folder).is_dir():
                remove_files(self.output / folder, is_own)
        for name in _LOGS:
            (self.output / name).unlink(missing_ok=True)

    def _precision(self, saved: training_checkpoint.Progress | None) -> str:
        """That of the configuration; `auto`: what the run began with, or what this device is faster in."""
        precision = self.config.training.precision
        if precision == "auto" and saved is not None:
            return str(saved.config.get("training.precision", "bfloat16"))
        if precision == "auto":
            device = self.world.device
            return self.world.from_first(lambda: "bfloat16" if multiplies_bfloat16(device) else "float32")
        return precision

    def _fixed(self) -> dict[str, Any]:
        return self.config.fixed() | {"training.precision": self.precision}

    def _measured_tokens(self) -> str | None:
        """Names the tokens that validations measure."""
        stream = self.dataset.validation
        return None if stream is None else f"{stream.sha256}:{self.config.validation.tokens}"

    def _check_same(self, state: training_checkpoint.Progress, change: Sequence[str]) -> tuple[dict[str, Any], ...]:
        """That the run is the same but for what may change; what has been changed on purpose."""
        now = self._fixed()
        differing = [key for key in {**state.config, **now} if state.config.get(key) != now.get(key)]
        refused = [key for key in differing if key not in change]
        if refused:
            shown = "; ".join(f"{k} was {state.config.get(k)}, is {now.get(k)}" for k in refused[:3])
            more = f"; and {len(refused) - 3} more" if len(refused) > 3 else ""
            advice = "Use another output, or --restart, which removes that run"
            if all(key in CHANGEABLE for key in refused):
                flags = " ".join(f"--change {key}" for key in refused)
                advice = f"{flags} goes on with it all the same. Or use another output, or --restart, which removes it"
            raise FormatError(f"{self.output} holds a run of another configuration: {shown}{more}. {advice}")
        if state.data != self.dataset.content:
            advice = "Restore the documents, use another output, or --restart, which removes that run"
            raise FormatError(f"{self.output} holds a run on other data: data.train has changed since. {advice}")
        if self.config.training.steps < state.step:
            found = f"{self.config.training.steps}, expected at least {state.step}, which the run has made"
            raise FormatError(f"training.steps: found {found}")
        skipped, key = frozenset(self.config.training.skip_steps), "training.skip_steps"
        if past := [step for step in skipped.symmetric_difference(state.config.get(key, ())) if step <= state.step]:
            raise FormatError(
                f"{key}: found a change of step {min(past)}, expected later ones than {state.step}, which the run "
                "has made"
            )
        changes = [{"step": state.step, "key": k, "was": state.config.get(k), "is": now.get(k)} for k in differing]
        for made in changes if self.world.first else ():
            self.meter.note(f"from step {state.step} on, {made['key']} is {made['is']}; it was {made['was']}")
        return (*state.changes, *changes)

    def _distribute(self) -> Any:
        if self.world.size == 1:
            return self.model
        if self.config.training.parallel == "fsdp":
            mesh = init_device_mesh(self.world.device.type, (self.world.size,))
            for layer in self.model.layers:
                fully_shard(layer, mesh=mesh)
            return fully_shard(self.model, mesh=mesh)
        device_ids = [self.world.device] if self.world.device.type == "cuda" else None
        return DistributedDataParallel(self.model, device_ids=device_ids, gradient_as_bucket_view=True)

    def _load_moments(self, tensors: training_checkpoint.Tensors) -> None:
        fused = self.optimizer.defaults["fused"]
        updates = self.step - sum(step <= self.step for step in set(self.config.training.skip_steps))
        step = torch.tensor(float(updates), device=self.world.device if fused else "cpu")
        for name, parameter in self.model.named_parameters():
            moments = {moment: _like(parameter, tensors[f"{moment}.{name}"]) for moment in _MOMENTS}
            self.optimizer.state[parameter] = {"step": step.clone(), **moments}

    # ---- the loop ----------------------------------------------------------------------------------------------------

    def run(self) -> Result:
        """Trains to the end."""
        self.world.from_first(self._prepare_output)
        steps, log_every = self.config.training.steps, self.config.logging.every
        if self.step and self._is_measured() and self.world.from_first(lambda: self.step not in self.losses):
            self._validate()  # there was no time for it
        self.world.from_first(self._export_chosen)  # nor for this, it may be
        self.stopwatch.lap()
        timed = self.step + (2 if self._compiles() else 1)  # the first step of a compiled run waits for the compiler
        with Signals() as signals:
            while self.step < steps:
                self._update()
                if self.step == timed - 1:
                    self._flush()
                elif self.step == timed < steps:
                    self._flush()
                    self._say_how_long()
                stop = self.world.largest(signals.received) if self.step < steps else 0
                scheduled, measured = self._is_scheduled(), self._is_measured()
                if scheduled or measured or stop or self.step % log_every == 0:
                    self._flush()
                if measured and not stop:
                    self._validate()
                if scheduled or stop:
                    self._save()
                if stop:
                    raise Stopped(stop, self.step)
                if scheduled or measured:
                    self.stopwatch.lap()
        return self.world.from_first(self._finish)

    def _say_how_long(self) -> None:
        if not self.world.first or not self.rate:  # nothing but skipped steps so far
            return
        training = self.config.training
        left, tokens = training.steps - self.step, training.batch_size * self.config.data.sequence_length
        where = f"{self.world.size} × {self.world.device.type} in {self.precision}"
        self.meter.note(
            f"about {duration(left * tokens / self.rate)} for {left:,} more steps, at {self.rate:,.0f} tokens/s "
            f"on {where}; validations and checkpoints come to that"
        )

    def _is_scheduled(self) -> bool:
        """Whether this step has a checkpoint."""
        return self.step % self.config.checkpoint.every == 0 or self.step == self.config.training.steps

    def _is_measured(self) -> bool:
        """Whether this step has a validation."""
        due = self._is_scheduled() or self.step % self.config.validation.every == 0
        return due and self.dataset.validation is not None

    def _describe(self) -> None:
        train, validation = self.dataset.train, self.dataset.validation
        tokens, documents = sum(s.tokens for s in train), sum(s.documents for s in train)
        parts = [f"{self.shape.num_parameters:,} parameters"]
        parts.append(f"{tokens:,} tokens in {documents:,} documents")
        if validation is not None:
            parts.append(f"{validation.tokens:,} in {validation.documents:,} for validation")
        parts.append(f"{self.world.size} × {self.world.device.type} in {self.precision}")
        if self.step:
            parts.append(f"from step {self.step} on")
        self.meter.note("; ".join(parts))

    def _prepare_output(self) -> None:
        """The logs up to the checkpoint; what lies behind it is gone."""
        self._describe()
        training_checkpoint.clean(self.checkpoints)
        for path in training_checkpoint.paths(self.checkpoints):  # damaged ones, which newest() passed over
            if path.name > f"step-{self.step:09d}":
                training_checkpoint.remove(path)
        for leftover in self.output.glob(".model.*"):
            if _EXPORT.fullmatch(leftover.name) and leftover.is_dir():
                remove_files(leftover, _MODEL_FILES.__contains__)
        self._put_back()
        self.train_table = Table(self.output / "train.csv", TRAIN, self.step)
        # Losses up to the step at which the documents of validation changed are of others; this step is measured again.
        is_other = self.is_other_validation
        self.validation_table = Table(self.output / "validation.csv", VALIDATION, self.step - is_other)
        rows = self.validation_table.rows
        if is_other and rows:
            self.meter.note(f"the documents of validation have changed: losses before step {self.step} are of others")
        rows = [row for row in rows if int(row[0]) >= self.measured_from and self.measured is not None]
        self.losses = {int(row[0]): float(row[1]) for row in rows}
        self.board = Board(self.output / "tensorboard", self.step) if self.config.logging.tensorboard else None

    def _update(self) -> None:
        """One step: gradients of this process's windows, some at a time, and AdamW."""
        training, optimizer = self.config.training, self.config.optimizer
        if self.step + 1 in training.skip_steps:
            self._next_windows()
            self.step += 1
            return
        rate = learning_rate(optimizer, self.step, training.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        parts = self._next_windows().split(self.micro)
        total = torch.zeros((), device=self.world.device)
        for index, tokens in enumerate(parts):
            with self._synchronised(index == len(parts) - 1):
                with self._autocast():
                    loss = self.module(tokens, labels=tokens) / len(parts)
                loss.backward()
            total += loss.detach()
        limit = math.inf if optimizer.clip_norm is None else optimizer.clip_norm
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.pending.append((self.step, total, _full(norm)))

    def _synchronised(self, last: bool) -> Any:
        """Gradients are averaged over the processes once a step."""
        if isinstance(self.module, DistributedDataParallel):
            return contextlib.nullcontext() if last else self.module.no_sync()
        if self.world.size > 1:
            self.module.set_requires_gradient_sync(last)
        return contextlib.nullcontext()

    def _autocast(self) -> torch.autocast:
        enabled = self.precision == "bfloat16"
        return torch.autocast(self.world.device.type, torch.bfloat16, enabled=enabled)

    def _next_windows(self) -> torch.Tensor:
        """This process's windows of the step under way; those of the next one are gathered while it runs."""
        windows = self.gathered.result() if self.gathered is not None else self._gather_windows(self.step)
        after = self.step + 1
        is_last = after == self.config.training.steps
        self.gathered = None if is_last else self.gatherer.submit(self._gather_windows, after)
        return windows.to(self.world.device, non_blocking=True)

    def _gather_windows(self, step: int) -> torch.Tensor:
        first = step * self.config.training.batch_size + self.world.rank * self.rows
        return self._pinned(self.windows.batch(first, self.rows))

    def _to_device(self, windows: Any) -> torch.Tensor:
        return self._pinned(windows).to(self.world.device, non_blocking=True)

    def _pinned(self, windows: Any) -> torch.Tensor:
        """In memory from which a GPU copies by itself."""
        tokens = torch.from_numpy(windows)
        if self.world.device.type != "cuda":
            return tokens
        with torch.cuda.device(self.world.device):  # threads have a device of their own
            return tokens.pin_memory()

    def _flush(self) -> None:
        """Waits for the steps since the last time, writes them down, and sees that they are finite."""
        if not self.pending:
            return
        stacked = torch.stack([loss for _, loss, _ in self.pending])
        losses: list[float] = (self.world.sum(stacked) / self.world.size).tolist()
        norms: list[float] = torch.stack([norm for _, _, norm in self.pending]).tolist()
        training = self.config.training
        count = len(self.pending)
        self.rate = rate = count * training.batch_size * self.config.data.sequence_length / self.stopwatch.lap()
        rows = []
        for (step, _, _), loss, norm in zip(self.pending, losses, norms, strict=True):
            rows.append(
                (step, loss, norm, learning_rate(self.config.optimizer, step - 1, training.steps), round(rate, 1))
            )
        self.pending.clear()
        self.world.from_first(lambda: self._log_steps(rows, rate))
        for step, loss, norm, *_ in rows:
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise self._not_finite(step, f"step {step}: the loss is {loss}, the norm of its gradient {norm}")

    def _not_finite(self, step: int, found: str) -> FloatingPointError:
        kept = "no checkpoint yet"
        skipped = dict.fromkeys((*self.config.training.skip_steps, step))
        if self.saved is not None:
            kept = (
                f"the checkpoint of step {self.saved.progress.step} is intact. The same steps end here again; a lower "
                "rate or another order of windows may not: --change optimizer.learning_rate, or training.seed, with "
                "its new value. Or leave this step's windows out: --change training.skip_steps --set "
                f"'training.skip_steps=[{', '.join(map(str, skipped))}]'"
            )
        return FloatingPointError(f"{found}; {kept}")

    def _log_steps(self, rows: list[tuple[int, float, float, float, float]], rate: float) -> None:
        training = self.config.training
        self.train_table.add(rows)
        if self.board is not None:
            for row in rows:
                self.board.add(row[0], {f"train/{name}": x for name, x in zip(TRAIN[1:], row[1:], strict=True)})
        left = (training.steps - self.step) * training.batch_size * self.config.data.sequence_length / rate
        self.meter.show(self.step, training.steps, rows[-1][1], rate, left)

    @torch.no_grad()
    def _validate(self) -> None:
        stream = self.dataset.validation
        assert stream is not None
        tokens = self.world.in_each(lambda: self.dataset.open(stream))
        length = self.config.data.sequence_length
        windows = validation_windows(tokens, length, self.config.validation.tokens)
        unscored = max(1, self.shape.prefix_tokens)  # tokens of each window
        windows = [w for w in windows if w.stop - w.start > unscored]
        if not windows:
            raise FormatError(f"validation: found no window of more than {unscored} tokens, the model's prefix")
        whole = [w for w in windows if w.stop - w.start == length]
        batches = [whole[i : i + self.micro] for i in range(0, len(whole), self.micro)]
        batches += [[w] for w in windows[len(whole) :]]
        mine = batches[self.world.rank :: self.world.size]
        idle = -(-len(batches) // self.world.size) - len(mine)  # shards want all processes at each forward pass
        sums = torch.zeros(2, dtype=torch.float64)
        for index, batch in enumerate(mine + batches[:1] * idle):
            rows = self._to_device(_gather(tokens, batch))
            # Other shapes, and no gradients: compiling for each takes longer than it saves.
            with self._autocast(), torch.compiler.set_stance("force_eager"):
                loss = self.model(rows, labels=rows)
            if index < len(mine):
                count = rows.shape[0] * (rows.shape[1] - unscored)
                sums += torch.tensor([float(loss) * count, count], dtype=torch.float64)
        if isinstance(self.model, FSDPModule):
            self.model.reshard()  # what only a backward pass does by itself
        total, count = self.world.sum(sums.to(self.world.device)).tolist()
        loss = total / count
        perplexity, bits = self._measures(loss)
        if not math.isfinite(loss):
            raise self._not_finite(self.step, f"step {self.step}: the validation loss is {loss}")
        self.world.from_first(lambda: self._log_validation(loss, perplexity, bits))

    def _log_validation(self, loss: float, perplexity: float, bits: float | None) -> None:
        self.validation_table.add([(self.step, loss, perplexity, bits)])
        self.losses[self.step] = loss
        if self.board is not None:
            values = dict(zip(VALIDATION[1:], (loss, perplexity, bits), strict=True))
            self.board.add(self.step, {f"validation/{name}": value for name, value in values.items()})
        per_byte = f", {bits:.4f} bits per byte" if bits is not None else ""
        self.meter.note(f"step {self.step}: validation loss {loss:.4f}, perplexity {perplexity:.3f}{per_byte}")

    def _measures(self, loss: float) -> tuple[float, float | None]:
        """Perplexity per token, bits per byte of text."""
        stream = self.dataset.validation
        perplexity = math.exp(loss) if loss < 700 else math.inf
        if stream is None or not stream.nbytes:
            return perplexity, None
        return perplexity, loss / math.log(2) * stream.tokens / stream.nbytes

    # ---- checkpoints -------------------------------------------------------------------------------------------------

    def _save(self) -> None:
        weights, moments = self._tensors()
        progress = training_checkpoint.Progress(
            self.step, self._fixed(), self.dataset.content, self.measured, self.measured_from, self.changes
        )

        def write() -> training_checkpoint.TrainingCheckpoint:
            saved = training_checkpoint.save(self.checkpoints, progress, weights, moments, self.shape, self.tokenizer)
            chosen = self._chosen()
            if chosen is not None and chosen.progress.step == self.step:
                self._export(weights)
            training_checkpoint.prune(
                self.checkpoints, self.config.checkpoint.keep, chosen.path if chosen is not None else None
            )
            return saved

        self.saved = self.world.from_first(write)

    def _chosen(self) -> training_checkpoint.TrainingCheckpoint | None:
        """The checkpoint whose weights OUTPUT/model has: the best that was measured, otherwise the last."""
        saved = training_checkpoint.all_saved(self.checkpoints)
        measured = [s for s in saved if s.progress.step in self.losses]
        if measured:
            return min(measured, key=lambda s: self.losses[s.progress.step])
        return saved[-1] if saved else None

    def _tensors(self) -> tuple[training_checkpoint.Tensors, training_checkpoint.Tensors]:
        """Weights and moments, whole, in the first process's memory."""
        weights: training_checkpoint.Tensors = {}
        moments: training_checkpoint.Tensors = {}
        for name, parameter in self.model.named_parameters():
            state, zero = self.optimizer.state[parameter], torch.zeros_like(parameter)  # before the first update
            for key, tensor in ((None, parameter), *((moment, state.get(moment, zero)) for moment in _MOMENTS)):
                whole = _full(tensor.detach())
                if self.world.first:
                    target, full_name = (weights, name) if key is None else (moments, f"{key}.{name}")
                    target[full_name] = whole.to("cpu", torch.float32)
        return weights, moments

    def _export(self, weights: training_checkpoint.Tensors) -> None:
        model = BasedForCausalLM(self.shape, device="meta")
        model.load_state_dict(weights, assign=True)
        model.tokenizer_json = self.tokenizer
        target, kept = self.output / "model", self.output / _KEPT
        foreign = [path for path in target.iterdir() if path.name not in _MODEL_FILES] if target.is_dir() else []
        if foreign:  # a model card, it may be: save() replaces a folder of model files only
            kept.mkdir(exist_ok=True)
            for path in foreign:
                path.rename(kept / path.name)
        try:
            model.save(target, dtype=self.config.checkpoint.dtype, overwrite=True)
        finally:
            self._put_back()

    def _put_back(self) -> None:
        """What others have put into OUTPUT/model, which an export has set aside."""
        kept, target = self.output / _KEPT, self.output / "model"
        if kept.is_dir():
            target.mkdir(exist_ok=True)
            for path in kept.iterdir():
                path.rename(target / path.name)
            kept.rmdir()

    def _export_chosen(self) -> None:
        if (chosen := self._chosen()) is not None:
            self._export(chosen.tensors("model.safetensors"))

    def _finish(self) -> Result:
        if self.board is not None:
            self.board.close()
        chosen = self._chosen()
        assert chosen is not None
        loss = self.losses.get(chosen.progress.step)
        perplexity, bits = (None, None) if loss is None else self._measures(loss)
        return Result(self.output / "model", chosen.progress.step, self.step, loss, perplexity, bits)


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether products of bfloat16 numbers are faster there than those of float32."""
    if device.type != "cpu":
        return True
    words = Path("/proc/cpuinfo").read_text().split() if Path("/proc/cpuinfo").exists() else []
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(words)  # of x86-64, of x86-64, of AArch64


def learning_rate(optimizer: Optimizer, step: int, steps: int) -> float:
    """Of the update that follows `step` others: a line up to the peak, then half a cosine down to the minimum."""
    peak, low, warmup = optimizer.learning_rate, optimizer.min_learning_rate, optimizer.warmup_steps
    if step < warmup:
        return peak * (step + 1) / warmup
    return low + (peak - low) * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))) / 2


def _make_optimizer(model: BasedForCausalLM, config: Optimizer, device: torch.device) -> torch.optim.AdamW:
    """AdamW, which shrinks matrices and the embedding only: the taps of a convolution are no matrix."""
    named = list(model.named_parameters())
    no_matrices = ("conv.weight", "A_log", "A_imag", "shift_B", "shift_C")
    decays = [p for name, p in named if p.ndim == 2 and not name.endswith(no_matrices) and ".filter." not in name]
    chosen = {id(p) for p in decays}
    others = [p for _, p in named if id(p) not in chosen]
    groups = [{"params": decays, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    betas = (config.beta1, config.beta2)
    return torch.optim.AdamW(groups, config.learning_rate, betas, config.eps, fused=device.type == "cuda")


def _gather(tokens: Any, windows: list[slice]) -> Any:
    return np.stack([tokens[window] for window in windows]).astype(np.int64)


def _full(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor that may be in shards: every process must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _like(parameter: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """A tensor where and as the parameter is."""
    whole = whole.to(parameter.device)
    return (
        distribute_tensor(whole, parameter.device_mesh, parameter.placements)
        if isinstance(parameter, DTensor)
        else whole
    )
