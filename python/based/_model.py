"""A model: immutable weights, shared by any number of sessions and threads."""

import functools
from collections.abc import AsyncIterator, Generator, Sequence, Sized
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from based import _core
from based._devices import choose_device
from based._generate import QUICK, Run, asynchronously, encode, make_requests
from based._outputs import RequestOutput, StreamChunk
from based._prompts import Prompt, Prompts, as_array, as_list
from based._session import Logits, Session, vocabulary
from based._tokenizer import LazyTokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MAX_BATCH_SIZE = 32
Params: TypeAlias = _core.SamplingParams | None


def core_options(device: str, dtype: str, num_threads: int | None, deterministic: bool = False) -> dict[str, Any]:
    """Arguments of _core.Model.load and .random. Raises ValueError."""
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise ValueError(f"dtype must be 'auto', 'float32', 'bfloat16' or 'float16', not {dtype!r}")
    return {
        "device": choose_device(device),
        "dtype": None if dtype == "auto" else dtype,
        "num_threads": num_threads,
        "deterministic": deterministic,
    }


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """Bytes of the device's memory that a model and its sessions hold."""

    weights: int
    states: int
    """Of sessions, forks and checkpoints."""
    workspace: int
    """Activations, logits, sampling."""


class Model:
    """Weights on one device. Made by `based.load`; any number of threads may use it at once.

    A prompt is a str, a sequence of ints, or a 1-D integer array. Wrong types raise TypeError; empty prompts and token
    ids outside [0, vocab_size) raise ValueError; so does text when the model has no tokenizer.
    """

    def __init__(self, core: _core.Model, tokenizer: LazyTokenizer) -> None:
        self._core = core
        self._tokenizer = tokenizer

    @classmethod
    def random(
        cls,
        config: _core.ModelConfig,
        seed: int = 0,
        *,
        device: str = "auto",
        dtype: str = "auto",
        num_threads: int | None = None,
        deterministic: bool = False,
    ) -> "Model":
        """A model of this shape with seeded random weights and no tokenizer, for benchmarks."""
        core = _core.Model.random(config, seed, **core_options(device, dtype, num_threads, deterministic))
        return cls(core, LazyTokenizer(None))

    # ---- what it is ------------------------------------------------------------------------------------------------

    @property
    def config(self) -> _core.ModelConfig:
        """The shape of the model."""
        return self._core.config

    @property
    def device(self) -> str:
        """Such as "cpu" or "cuda:0"."""
        return self._core.device

    @property
    def dtype(self) -> str:
        """Of the weights: "float32", "bfloat16" or "float16"."""
        return self._core.dtype

    @property
    def num_threads(self) -> int:
        """CPU threads that a computation uses."""
        return self._core.num_threads

    @property
    def num_parameters(self) -> int:
        """A tied head counted once."""
        return self._core.num_parameters

    @property
    def weight_nbytes(self) -> int:
        """Memory of the weights."""
        return self._core.weight_nbytes

    @property
    def state_nbytes(self) -> int:
        """Memory of one sequence's state, of whatever length."""
        return self._core.state_nbytes

    @property
    def memory(self) -> MemoryUse:
        """What this model and its sessions hold of the device's memory now."""
        return MemoryUse(*self._core.memory)

    @property
    def kernel_isa(self) -> str:
        """The instruction set or GPU architecture whose kernels run, such as "avx512bf16" or "sm_90"."""
        return self._core.kernel_isa

    @property
    def fingerprint(self) -> str:
        """16 hex digits over config and weights; a saved state carries it."""
        return self._core.fingerprint

    @property
    def tokenizer(self) -> "Tokenizer | None":
        """A tokenizers.Tokenizer, or None; loaded at first use. Raises OSError or FormatError when that fails."""
        return self._tokenizer.get()

    def __repr__(self) -> str:
        millions = self.num_parameters / 1e6
        return f"<based.Model: {millions:,.1f} M parameters, {self.dtype} on {self.device}>"

    # ---- logits ----------------------------------------------------------------------------------------------------

    def forward(self, token_ids: Prompt, *, include_padding: bool = False) -> Logits:
        """Logits (T, vocab_size) float32 at every position of one sequence: a NumPy array, on a GPU a `based.Tensor`.

        Args:
            token_ids: The sequence, T tokens (or a text).
            include_padding: Also return the columns of the embedding's padding rows: (T, padded_vocab_size).
        """
        logits = self._core.forward(self._encode(token_ids))
        return vocabulary(logits, self.config.vocab_size, include_padding)

    def score(self, token_ids: Prompt) -> npt.NDArray[np.float32]:
        """Natural-log probability of each token given its past, (T - 1,) float32: the first token has none."""
        return self._core.score(self._encode(token_ids))

    def trace(self, token_ids: Prompt, *, include_padding: bool = False) -> dict[str, npt.NDArray[np.float32]]:
        """Every layer's activations on one sequence, to compare with another implementation.

        Returns:
            float32 arrays: `embed` (T, d); `mixer_out` (L, T, d), a mixer's output before the residual add; `block_out`
            (L, T, d), the residual stream after each layer; `final_norm` (T, d); `logits` as forward gives them.
        """
        trace = self._core.trace(self._encode(token_ids))
        trace["logits"] = vocabulary(trace["logits"], self.config.vocab_size, include_padding)
        return {
            name: np.stack([np.asarray(t) for t in value]) if isinstance(value, list) else np.asarray(value)
            for name, value in trace.items()
        }

    # ---- text ------------------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Prompts,
        params: Params | Sequence[_core.SamplingParams] = None,
        *,
        max_batch_size: int = MAX_BATCH_SIZE,
        progress: bool = False,
    ) -> list[RequestOutput]:
        """Continues each prompt; what a prompt gets does not depend on the others.

        Args:
            prompts: One prompt or a list of them.
            params: For all prompts, or one each; None for the defaults.
            max_batch_size: Sequences that run at once; each holds `state_nbytes`.
            progress: Show progress on stderr, if that is a terminal.

        Returns:
            One output per prompt, in order. Text is empty when the model has no tokenizer.
        """
        return self._run(as_list(prompts), params, max_batch_size).collect(progress=progress)

    def stream(self, prompt: Prompt, params: Params = None) -> Generator[StreamChunk, None, None]:
        """Yields a chunk per new token as it comes; closing the iterator cancels the rest.

        With n > 1 the samples' chunks alternate. A sample's texts and token_ids, joined, are what `generate` returns.
        """
        run = self._run([as_array(prompt)], params)
        return (chunk for _, chunk in run.chunks())

    def astream(self, prompt: Prompt, params: Params = None) -> AsyncIterator[StreamChunk]:
        """As stream, for `async for`: the work is done in threads; cancelling the task or closing stops it.

        Loading the tokenizer and reading a long prompt are part of that work: their errors come with the first chunk.
        """
        prompt = as_array(prompt)
        prepare = functools.partial(self._run, [prompt], params)
        is_quick = self._tokenizer.is_loaded and isinstance(prompt, Sized) and len(prompt) <= QUICK
        return asynchronously(prepare() if is_quick else prepare)

    def session(self, batch_size: int | None = None, *, states: Sequence[_core.State] | None = None) -> Session:
        """A session of `batch_size` sequences (by default 1) that have seen nothing, or one that starts from states.

        Args:
            batch_size: Number of sequences.
            states: Sequence i starts from states[i] (`Session.state`, `State.load`). One state may stand many times.

        Raises:
            StateError: A state is of another model.
            ValueError: batch_size is not the number of states.
            MemoryError: The device has less memory than the states need.
        """
        if states is None:
            core = _core.Session(self._core, 1 if batch_size is None else batch_size)
            return Session(core, self._core, self._tokenizer)
        states = list(states)
        for state in states:
            if not isinstance(state, _core.State):
                raise TypeError(f"states must hold based.State, not {type(state).__name__}")
        if batch_size not in (None, len(states)):
            raise ValueError(f"batch_size is {batch_size}, expected {len(states)}, the number of states")
        return Session(_core.Session(self._core, states), self._core, self._tokenizer)

    def _run(
        self, prompts: list[Any], params: Params | Sequence[_core.SamplingParams], max_batch_size: int = MAX_BATCH_SIZE
    ) -> Run:
        requests = make_requests(prompts, params, self._tokenizer, [True] * len(prompts))
        return Run(self._core, self.config.eos_token_id, requests, self._tokenizer, max_batch_size)

    def _encode(self, prompt: Any) -> Any:
        return encode(as_array(prompt), self._tokenizer, add_special_tokens=True)
