"""The training of one model: what a device is given to do, and what a folder keeps of it."""

import functools
import gc
import json
import math
import shutil
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from based import _core
from based._core import FormatError
from based.convert import stored_tensors
from based.torch._running import replaced_file
from based.torch.model import BasedForCausalLM
from based.torch.recall.data import Examples
from based.torch.recall.families import FAMILIES
from based.torch.recall.sweep import Run, Sweep

_EVALUATED_QUERIES = 1 << 14  # whose logits memory holds at a time: 0.5 GB of 8,192 columns
_EVALUATED_TOKENS = 1 << 16
_PROGRESS = 0.002  # of the accuracy, less of which is none
_MOMENTS = ("exp_avg", "exp_avg_sq")
_STATE, _RESULT = "state.safetensors", "result.json"


@dataclass(frozen=True, slots=True)
class Texts:
    """Examples on a device."""

    tokens: torch.Tensor
    """(count, T) int32."""
    queries: torch.Tensor
    """(count, N) int64."""
    answers: torch.Tensor
    """(count, N) int64."""

    @classmethod
    def of(cls, examples: Examples, device: torch.device) -> "Texts":
        """Copies of all of them."""
        arrays = (examples.tokens, np.int32), (examples.queries, np.int64), (examples.answers, np.int64)
        return cls(*(torch.from_numpy(array.astype(dtype)).to(device) for array, dtype in arrays))

    def __getitem__(self, rows: Any) -> "Texts":
        return Texts(self.tokens[rows], self.queries[rows], self.answers[rows])


class Corpus:
    """A sweep's texts on a device; all models that train there share them."""

    def __init__(self, sweep: Sweep, device: torch.device) -> None:
        self.training = [Texts.of(examples, device) for examples in sweep.training_examples()]
        self.validation = [Texts.of(examples, device) for examples in sweep.validation_examples_of()]


@dataclass(frozen=True, slots=True)
class Result:
    """How a run ended."""

    epochs: int
    steps: int
    accuracy: float
    """On the validation texts: the mean over the test settings, at the end."""
    history: list[float]
    """The same, after each epoch."""
    finite: bool
    """Whether all losses and weights were. If not, there is no model."""
    seconds: float
    """From the first step to the last, while other models trained beside it; without those before a resumption."""


def query_logits(model: BasedForCausalLM, texts: Texts) -> torch.Tensor:
    """Logits (count · N, vocab_size) at the queries alone: of the other places the head is not asked."""
    return model.logits(model.hidden(texts.tokens, texts.queries).flatten(0, 1))[:, : model.config.vocab_size]


@torch.no_grad()
def count_right(model: BasedForCausalLM, texts: Texts) -> torch.Tensor:
    """How many answers are right, a scalar on the device; nothing waits for it."""
    count, length = texts.tokens.shape
    rows = max(1, min(_EVALUATED_QUERIES // texts.queries.shape[1], _EVALUATED_TOKENS // length))
    right = torch.zeros((), dtype=torch.int64, device=texts.tokens.device)
    for start in range(0, count, rows):
        part = texts[start : start + rows]
        right += (query_logits(model, part).argmax(-1) == part.answers.flatten()).sum()
    return right


def read_result(folder: Path) -> Result | None:
    """That of the run whose folder it is, once it has one."""
    path = folder / _RESULT
    try:
        return Result(**json.loads(path.read_bytes()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, RecursionError) as error:
        raise FormatError(f"{path}: {error}") from None


def write_json(path: Path, document: Any) -> None:
    """The file appears whole or not at all."""
    with replaced_file(path) as file:
        file.write(json.dumps(document, indent=1, ensure_ascii=False) + "\n")


def _first_weights(run: Run, sweep: Sweep) -> BasedForCausalLM:
    """A model with random weights, as large as the sweep has them.

    The authors' are 0.02, and 0.02/√(2L) for output projections, which they know by a name that not all of them have.
    """
    candidate = run.candidate
    model = BasedForCausalLM(candidate.config, special_initializer=sweep.first_weights == "published", device="cpu")
    if sweep.first_weights == "authors" and not FAMILIES[candidate.family].scaled_output:
        for i, mixer in enumerate(candidate.config.layers):
            if mixer.mixer != "gated_conv":
                torch.nn.init.normal_(model.get_parameter(f"layers.{i}.mixer.out_proj.weight"), std=0.02)
    return model


class Trainer:
    """One run on one device, taken up where its folder left it.

    On a GPU every setting's step is recorded as a CUDA graph, and nothing here waits for the device: `advance` is to be
    called again and again, and other trainers' between. What a step learns from follows from the seed and the step's
    number, so that a run which goes on does what it would have done.
    """

    steps_at_a_time = 16
    """Steps that one advance() gives a device. Two such calls wait at most, so that a stop is soon seen."""

    def __init__(self, run: Run, sweep: Sweep, corpus: Corpus, device: torch.device, folder: Path) -> None:
        self.run, self.sweep, self.corpus, self.device, self.folder = run, sweep, corpus, device, folder
        self.step, self.finite = 0, True
        self.history: list[float] = []
        self.seconds = 0.0
        self._clock = time.perf_counter()
        for leftover in folder.glob(".*"):  # of a process that was killed
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(sweep.seed)
            # On the CPU: the same weights whatever the device.
            self.model = _first_weights(run, sweep)
        self.model.to(device)
        self._random = torch.Generator(device)
        if sweep.dropout > 0:
            self.model.embedding.register_forward_hook(self._drop)
        on_gpu = device.type == "cuda"
        self._rate = torch.tensor(run.learning_rate, device=device) if on_gpu else run.learning_rate
        self._optimizer = torch.optim.AdamW(
            self.model.parameters(), self._rate, weight_decay=sweep.weight_decay, fused=on_gpu, capturable=on_gpu
        )
        self._right: list[torch.Tensor] = []
        self._loss = torch.zeros((), device=device)
        batch = sweep.batch_size
        self._order: list[int] = []
        self._permutations = [
            torch.zeros(len(texts.tokens), dtype=torch.int64, device=device) for texts in corpus.training
        ]
        self._cursors = [torch.zeros((), dtype=torch.int64, device=device) for _ in corpus.training]
        self._rows = torch.arange(batch, device=device)
        tensors = self._read()
        self._stream = torch.cuda.Stream(device) if on_gpu else None
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(device))
        self._events: deque[Any] = deque()
        self._steps: list[Callable[[], None]] = [
            functools.partial(self._update, setting) for setting in range(len(corpus.training))
        ]
        with self._on_stream():
            self._load(tensors)
            if self._stream is not None:
                tensors = self._tensors()
                self._record()
                self._load(tensors)
            self._begin_epoch()
        self._saved = time.perf_counter()

    # ---- steps -------------------------------------------------------------------------------------------------------

    @property
    def steps(self) -> int:
        """Of the whole run."""
        return self.sweep.epochs * self.sweep.steps_per_epoch

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to train."""
        if self._right:
            return False
        reached = bool(self.history) and self.history[-1] >= self.sweep.stop_at
        patience = len(self.history) if self.sweep.patience is None else self.sweep.patience
        before, lately = self.history[:-patience], self.history[-patience:]
        stuck = bool(before) and max(lately) < max(before) + _PROGRESS
        return reached or stuck or not self.finite or self.step == self.steps

    def advance(self) -> bool:
        """Gives the device a few more steps, unless it still has enough. Returns whether it did anything."""
        while self._events and self._events[0].query():
            self._events.popleft()
        if len(self._events) > (0 if self._right else 1):
            return False
        with self._on_stream():
            if self._right:
                self._end_epoch()
                if not self.finished:
                    self._begin_epoch()
                return True
            per_epoch = self.sweep.steps_per_epoch
            stop = min(self.step + self.steps_at_a_time, (self.step // per_epoch + 1) * per_epoch)
            for step in range(self.step, stop):
                rate = self._rate_of(step)
                if isinstance(self._rate, torch.Tensor):
                    self._rate.fill_(rate)
                else:
                    self._optimizer.param_groups[0]["lr"] = rate
                seed = np.random.SeedSequence([self.sweep.seed, step]).generate_state(1, np.uint64)
                self._random.manual_seed(int(seed[0] >> 1))
                self._steps[self._order[step % per_epoch]]()
            self.step = stop
            if stop % per_epoch == 0:
                self.model.eval()
                self._right = [count_right(self.model, texts) for texts in self.corpus.validation]
                self.model.train()
            if self._stream is not None:
                self._events.append(self._stream.record_event())
        return True

    def _rate_of(self, step: int) -> float:
        """Along half a cosine, with each step or after each epoch."""
        if self.sweep.schedule == "epoch":
            step -= step % self.sweep.steps_per_epoch
        return self.run.learning_rate * (1 + math.cos(math.pi * step / self.steps)) / 2

    def _begin_epoch(self) -> None:
        """Draws the order of the texts of each setting, and of the batches."""
        epoch, done = divmod(self.step, self.sweep.steps_per_epoch)
        rng = np.random.default_rng([self.sweep.seed, epoch])
        counts = [len(permutation) for permutation in self._permutations]
        for permutation, count in zip(self._permutations, counts, strict=True):
            permutation.copy_(torch.from_numpy(rng.permutation(count)))
        batches = np.repeat(np.arange(len(counts)), [count // self.sweep.batch_size for count in counts])
        self._order = rng.permutation(batches).tolist()
        for setting, cursor in enumerate(self._cursors):
            cursor.fill_(self._order[:done].count(setting) * self.sweep.batch_size)

    def _drop(self, embedding: torch.nn.Module, _: Any, r: torch.Tensor) -> torch.Tensor:
        """Dropout, in training. What is drawn follows from the seed and the step."""
        if not embedding.training:
            return r
        kept = torch.rand(r.shape, generator=self._random, device=r.device) >= self.sweep.dropout
        return r * kept / (1 - self.sweep.dropout)

    def _update(self, setting: int) -> None:
        """A step on the next batch of a setting."""
        rows = self._permutations[setting][self._cursors[setting] + self._rows]
        texts = self.corpus.training[setting][rows]
        loss = functional.cross_entropy(query_logits(self.model, texts), texts.answers.flatten())
        parameters = list(self.model.parameters())
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            parameter.grad = gradient
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._cursors[setting] += self.sweep.batch_size
        self._loss.copy_(loss.detach())

    def _end_epoch(self) -> None:
        """Reads what the device has found out."""
        counts = [texts.answers.numel() for texts in self.corpus.validation]
        shares = [int(right) / count for right, count in zip(self._right, counts, strict=True)]
        self.history.append(sum(shares) / len(shares))
        self.finite = bool(torch.isfinite(self._loss)) and all(
            bool(parameter.isfinite().all()) for parameter in self.model.parameters()
        )
        self._right = []

    def _record(self) -> None:
        """Makes a CUDA graph of each setting's step. The weights are others afterwards."""
        assert self._stream is not None
        pool = torch.cuda.graph_pool_handle()
        gc.collect()
        gc.disable()  # what it frees might call CUDA, which a stream that records forbids
        # The largest one first: the others find room in what it took.
        sizes = [texts.tokens[0].numel() * (1 + texts.answers.shape[1]) for texts in self.corpus.training]
        for setting in sorted(range(len(sizes)), key=lambda setting: -sizes[setting]):
            update = self._steps[setting]
            for _ in range(2):  # allocates the moments, loads the kernels, chooses the matrix products
                self._cursors[setting].zero_()
                update()
            graph = torch.cuda.CUDAGraph()
            graph.register_generator_state(self._random)
            # Without torch.cuda.graph's synchronisation: other trainers' steps go on meanwhile.
            graph.capture_begin(pool, capture_error_mode="thread_local")
            try:
                update()
            finally:
                graph.capture_end()
            self._steps[setting] = graph.replay
        gc.enable()
        torch.cuda.empty_cache()  # of what the unrecorded steps took, which other streams cannot use

    def _on_stream(self) -> Any:
        return torch.cuda.stream(self._stream)

    # ---- what the folder keeps ---------------------------------------------------------------------------------------

    def save_every(self, seconds: float) -> None:
        """Saves when the last time is that long ago."""
        if time.perf_counter() - self._saved >= seconds:
            self.save()

    def save(self) -> None:
        """Writes where the run stands, when the device has done what it was given; the file is replaced as a whole."""
        with self._on_stream():
            if self._right:
                self._end_epoch()
                if not self.finished:
                    self._begin_epoch()
            arrays = [(name, tensor.cpu().numpy(), "float32") for name, tensor in self._tensors().items()]
        seconds = self.seconds + time.perf_counter() - self._clock
        progress = {"step": self.step, "history": self.history, "finite": self.finite, "seconds": seconds}
        self.folder.mkdir(parents=True, exist_ok=True)
        _core.write_safetensors(self.folder / _STATE, arrays, {"progress": json.dumps(progress)})
        self._saved = time.perf_counter()

    def finish(self) -> None:
        """Writes the model and the result; the state is no longer needed."""
        seconds = self.seconds + time.perf_counter() - self._clock
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._on_stream():
            if self.finite:
                self.model.save(self.folder / "model", overwrite=True)
        epochs = self.step // self.sweep.steps_per_epoch
        result = Result(epochs, self.step, self.history[-1], self.history, self.finite, seconds)
        write_json(self.folder / _RESULT, asdict(result))
        (self.folder / _STATE).unlink(missing_ok=True)

    def _tensors(self) -> dict[str, torch.Tensor]:
        """Copies of weights and moments."""
        tensors = {}
        for name, parameter in self.model.named_parameters():
            state = self._optimizer.state.get(parameter, {})
            tensors[f"weight.{name}"] = parameter.detach().clone()
            for moment in _MOMENTS:
                tensors[f"{moment}.{name}"] = state[moment].clone() if state else torch.zeros_like(parameter)
        return tensors

    @torch.no_grad()
    def _load(self, tensors: dict[str, torch.Tensor]) -> None:
        """Puts weights and moments where they are: a recorded step knows their places."""
        if not tensors:
            return
        for name, parameter in self.model.named_parameters():
            parameter.copy_(tensors[f"weight.{name}"])
            state = self._optimizer.state[parameter]
            if not state:
                on_gpu = self.device.type == "cuda"
                state["step"] = torch.zeros((), device=self.device if on_gpu else "cpu")
                state |= {moment: torch.zeros_like(parameter) for moment in _MOMENTS}
            state["step"].fill_(self.step)
            for moment in _MOMENTS:
                state[moment].copy_(tensors[f"{moment}.{name}"])

    def _read(self) -> dict[str, torch.Tensor]:
        """What save() wrote, if it did: its tensors; sets how far the run is."""
        path = self.folder / _STATE
        if not path.exists():
            return {}
        file = _core.SafetensorsFile(path)
        try:
            progress = json.loads(file.metadata()["progress"])
            self.step, self.history = int(progress["step"]), [float(x) for x in progress["history"]]
            self.finite, self.seconds = bool(progress["finite"]), float(progress["seconds"])
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise FormatError(f"{path}: {error!r}") from None
        tensors = {name: torch.from_numpy(tensor.bits) for name, tensor in stored_tensors(file).items()}
        expected = {name: tensor.shape for name, tensor in self._tensors().items()}
        if {name: tensor.shape for name, tensor in tensors.items()} != expected:
            raise FormatError(f"{path}: its tensors are not those of {self.run.name}")
        return tensors
