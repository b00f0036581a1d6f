"""A model: immutable weights, shared by any number of sessions and threads."""

import contextlib
import copy
import os
import sys
from collections.abc import AsyncIterator, Callable, Generator, Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TextIO, overload

import numpy as np
import numpy.typing as npt

from based import _core
from based._devices import choose_device, default_batch_size, default_cache_bytes
from based._engine import Engine, EngineRequest, astream_request, making, run_requests, stream_request
from based._generate import (
    Params,
    ProgressBar,
    PromptReader,
    Request,
    Run,
    in_order,
    names_sampling_fields,
    pair_params,
    run_all,
)
from based._outputs import RequestOutput, StreamChunk
from based._prompts import Prompt, Prompts, as_array, as_list
from based._score import ContinuationScore, read_pairs, score_pairs
from based._session import Logits, Session, vocabulary
from based._tokenizer import QUICK, LazyTokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer


_USUAL_CONTEXT = 2048
"""Tokens of a sequence that grows, where memory is shared out before its length is known."""


def _is_terminal(stream: TextIO | None) -> bool:
    """stream: None where a program has none."""
    return stream is not None and stream.isatty()


def core_options(
    device: str, dtype: str, num_threads: int | None, deterministic: bool = False, max_context: int | None = None
) -> dict[str, Any]:
    """Arguments of _core.Model.load and .random. Raises ValueError."""
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise ValueError(f"dtype must be 'auto', 'float32', 'bfloat16' or 'float16', not {dtype!r}")
    return {
        "device": choose_device(device),
        "dtype": None if dtype == "auto" else dtype,
        "num_threads": num_threads,
        "deterministic": deterministic,
        "max_context": max_context,
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

    A prompt is a str, a sequence of ints, or a 1-D integer array. Wrong types raise TypeError; token ids outside
    [0, vocab_size) raise ValueError; so does text when the model has no tokenizer. An empty prompt is the model's bos
    token (`config.bos_token_id`); when it has none, ValueError.
    """

    def __init__(self, core: _core.Model, tokenizer: LazyTokenizer) -> None:
        self._core = core
        self._tokenizer = tokenizer
        self._shared: Engine | None = None

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
        max_context: int | None = None,
    ) -> "Model":
        """A model of this shape with seeded random weights and no tokenizer, for benchmarks."""
        core = _core.Model.random(config, seed, **core_options(device, dtype, num_threads, deterministic, max_context))
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
        """Memory of one sequence's state, of whatever length; with full attention, of `max_context` tokens."""
        return self._core.state_nbytes

    def state_nbytes_at(self, num_tokens: int) -> int:
        """Memory of the state of a sequence that has seen num_tokens tokens."""
        return self._core.state_nbytes_at(num_tokens)

    @property
    def max_context(self) -> int | None:
        """The most tokens that a sequence may have; None for any number, as of every model without full attention."""
        return self._core.max_context

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

        The sequence is one prompt: a model with a prefix (`config.prefix_tokens`) sees all of it at each of its tokens.

        Args:
            token_ids: The sequence, T tokens (or a text).
            include_padding: Also return the columns of the embedding's padding rows: (T, padded_vocab_size).
        """
        logits = self._core.forward(self._encode(token_ids))
        return vocabulary(logits, self.config.vocab_size, include_padding)

    @overload
    def score(self, context: Prompt) -> npt.NDArray[np.float32]: ...
    @overload
    def score(self, context: Prompts, continuation: str, *, max_batch_size: int | None = None) -> ContinuationScore: ...
    @overload
    def score(
        self, context: Prompts, continuation: Prompts, *, max_batch_size: int | None = None
    ) -> ContinuationScore | list[ContinuationScore]: ...
    def score(
        self, context: Prompts, continuation: Prompts | None = None, *, max_batch_size: int | None = None
    ) -> npt.NDArray[np.float32] | ContinuationScore | list[ContinuationScore]:
        """Natural-log probability of each token given its past, or of continuations given their contexts.

        Of a model with a prefix, a context without continuation is read as its first token and what follows it.

        Args:
            context: A prompt. With continuations: one for all of them, or one each. An empty one is the bos token.
            continuation: None: the context itself is scored. Or one prompt, or several. Of two texts the tokens of the
                text that they make together are taken, and those scored that the context alone does not have.
            max_batch_size: Continuations that run at once, as in generate. Those of a batch that have the same context
                share its prefill.

        Returns:
            Without continuation (T - 1,) float32: the first of T tokens has no probability. Otherwise a
            ContinuationScore, or a list of them for several continuations.
        """
        if continuation is None:
            return self._core.score(self._encode(context))
        reader = PromptReader(self._tokenizer, self.config, max_context=self.max_context)
        pairs, is_one = read_pairs(context, continuation, reader)
        size = self._batch_size(max_batch_size)
        scores = list(score_pairs(self._core, pairs, size, self.config.vocab_size))
        return scores[0] if is_one else scores

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

    def encode(self, text: str, *, at_start: bool = True, split_special_tokens: bool = False) -> list[int]:
        """Token ids of a text, as the other calls read prompts.

        Args:
            text: If it is empty and begins a sequence: the model's bos token.
            at_start: It begins its sequence, so that the tokenizer puts its start token and prefix space before it.
            split_special_tokens: A special token's text is letters like any other.
        """
        reader = PromptReader(self._tokenizer, self.config, split_special_tokens)
        ids: list[int] = reader.read(text, at_start=at_start)
        return ids

    @names_sampling_fields
    def generate(
        self,
        prompts: Prompts,
        params: Params = None,
        *,
        max_batch_size: int | None = None,
        progress: bool = False,
        split_special_tokens: bool = False,
    ) -> list[RequestOutput]:
        """Continues each prompt; what a prompt gets does not depend on the others.

        Args:
            prompts: One prompt or several: a list, an array, or whatever can be iterated over.
            params: For all prompts, or one each; None for the defaults.
            max_batch_size: Sequences of this call that run at once, in a batch of their own; each holds
                `state_nbytes`. None: they join those of all other calls of this model, from any thread, in one batch of
                up to 1,024 on a GPU and 32 on the CPU, or fewer where half of the GPU's free memory, or a quarter of
                the CPU's, holds fewer states (with full attention, of 2,048 tokens).
            progress: Show progress on stderr, if that is a terminal.
            split_special_tokens: Take a special token's text in a prompt as letters like any other.

        Returns:
            One output per prompt, in order. Text is empty when the model has no tokenizer. A prompt among several that
            cannot be read (an empty one, None, an id outside the vocabulary) loses no other: its outputs have
            finish_reason "error", and `error` says what is wrong. A single one raises.
        """
        listed = as_list(prompts)
        pairs = list(pair_params(listed, params))
        bar = ProgressBar(sum(each.n for _, each in pairs)) if progress and _is_terminal(sys.stderr) else None
        with contextlib.nullcontext() if bar is None else bar:
            outputs = self._run_all(
                iter(pairs), max_batch_size, split_special_tokens, len(listed) > 1, None if bar is None else bar.add
            )
            return list(in_order(outputs))

    @names_sampling_fields
    def generate_iter(
        self,
        prompts: Iterable[Prompt | None],
        params: Params = None,
        *,
        max_batch_size: int | None = None,
        ordered: bool = True,
        split_special_tokens: bool = False,
    ) -> Generator[RequestOutput, None, None]:
        """As generate, lazily: takes prompts as sequences become free, and yields each output when it is there.

        Any number of prompts takes constant memory: at most two batches are taken ahead. A prompt that cannot be read
        is always an output with finish_reason "error"; what `prompts` itself raises ends the run. Closing the iterator
        cancels the rest.

        Args:
            prompts: Several prompts, of whatever can be iterated over.
            params: For all prompts, or an iterable of one each.
            max_batch_size: As generate.
            ordered: Yield outputs in the order of the prompts. False: each as soon as it has ended; `output.index` is
                the position of its prompt.
            split_special_tokens: As generate.
        """
        if isinstance(prompts, str):
            raise TypeError("prompts must be several prompts, not a str: generate_iter([prompt])")
        pairs = pair_params(prompts, params)
        outputs = self._run_all(pairs, max_batch_size, split_special_tokens, True)
        return (output for output in (in_order(outputs) if ordered else outputs))

    @names_sampling_fields
    def stream(
        self, prompt: Prompt, params: _core.SamplingParams | None = None, *, split_special_tokens: bool = False
    ) -> Generator[StreamChunk, None, None]:
        """Yields a chunk per new token as it comes; closing the iterator cancels the rest.

        With n > 1 the samples' chunks alternate. A sample's texts and token_ids, joined, are what `generate` returns.
        """
        return stream_request(self._prepare(prompt, params, split_special_tokens))

    @names_sampling_fields
    def astream(
        self, prompt: Prompt, params: _core.SamplingParams | None = None, *, split_special_tokens: bool = False
    ) -> AsyncIterator[StreamChunk]:
        """As stream, for `async for`: the work is done in threads; cancelling the task or closing stops it.

        Loading the tokenizer and reading a long prompt are part of that work: their errors come with the first chunk.
        """
        prompt = as_array(prompt)
        has_length = isinstance(prompt, Sized) and getattr(prompt, "ndim", 1) > 0  # len() of a 0-D array raises
        is_quick = self._tokenizer.is_loaded and has_length and len(prompt) <= QUICK
        if is_quick:
            return astream_request(self._prepare(prompt, params, split_special_tokens), in_thread=False)
        return astream_request(lambda: self._prepare(prompt, params, split_special_tokens)(), in_thread=True)

    def engine(
        self,
        max_batch_size: int | None = None,
        *,
        max_waiting_requests: int | None = 1024,
        max_waiting_tokens: int | None = None,
        max_step_tokens: int | None = None,
        cache_bytes: int | None = None,
        host_cache_bytes: int = 0,
        cache_dir: str | os.PathLike[str] | None = None,
        cache_dir_bytes: int = 16 << 30,
    ) -> Engine:
        """An engine of this model, which runs the requests of any number of threads and event loops in one batch.

        generate, stream and astream have one of their own; this one has limits, priorities, deadlines and states.

        Args:
            max_batch_size: Samples that run at once; memory for their states is taken now. None: as generate.
            max_waiting_requests: Requests that may wait for room; more are refused with EngineBusyError. None: any
                number.
            max_waiting_tokens: The same of their prompts' tokens. A single request may always wait.
            max_step_tokens: Tokens of prompts in one step. None: as many as keep a step short, by measured times.
            cache_bytes: Device memory for the states of prompts and answers, from which later prompts that begin alike
                go on. None: a quarter of the GPU's free memory, an eighth of the CPU's; it is taken as it is used. 0:
                no cache.
            host_cache_bytes: Memory of the host for more of them, when the device is a GPU.
            cache_dir: A folder for state files, which survive this process and are shared with others.
            cache_dir_bytes: The most that its files may take.
        """
        return Engine(
            self._core,
            self._tokenizer,
            self._batch_size(max_batch_size),
            max_waiting_requests=max_waiting_requests,
            max_waiting_tokens=max_waiting_tokens,
            max_step_tokens=max_step_tokens,
            cache_bytes=default_cache_bytes(self.device) if cache_bytes is None else cache_bytes,
            host_cache_bytes=host_cache_bytes,
            cache_dir=cache_dir,
            cache_dir_bytes=cache_dir_bytes if cache_dir is not None else 0,
        )

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

    def _shared_engine(self) -> Engine:
        """That of generate, stream and astream."""
        if self._shared is None or self._shared.is_parents:
            with making():
                if self._shared is None or self._shared.is_parents:
                    self._shared = Engine(self._core, self._tokenizer, self._batch_size(None), elastic=True)
        return self._shared

    def _prepare(self, prompt: Any, params: Params, split_special_tokens: bool) -> Callable[[], EngineRequest]:
        """Checks a request; what is returned starts it."""
        ((prompt, each),) = pair_params([prompt], params)
        each = copy.copy(each)  # the caller may change its own
        reader = PromptReader(self._tokenizer, self.config, split_special_tokens, self.max_context)
        request = reader.new_sequence(0, prompt, each, may_fail=False)
        if each.stop:
            self._tokenizer.require("a stop string")
        _core.check_params(each, self.config.vocab_size)
        return lambda: self._shared_engine()._submit(request, collects=False)

    def _start(self, requests: list[Request], max_batch_size: int) -> Run:
        return Run(self._core, self.config.eos_token_id, requests, self._tokenizer, max_batch_size)

    def _run_all(
        self,
        pairs: Iterator[tuple[Any, _core.SamplingParams]],
        max_batch_size: int | None,
        split_special_tokens: bool,
        may_fail: bool,
        on_chunk: Callable[[StreamChunk], None] | None = None,
    ) -> Iterator[RequestOutput]:
        reader = PromptReader(self._tokenizer, self.config, split_special_tokens, self.max_context)
        requests = (
            reader.new_sequence(index, prompt, each, may_fail=may_fail) for index, (prompt, each) in enumerate(pairs)
        )
        if max_batch_size is None:
            engine = self._shared_engine()
            return run_requests(engine, requests, 2 * engine.max_batch_size, on_chunk)
        size = self._batch_size(max_batch_size)
        return run_all(lambda first: self._start(first, size), requests, size, on_chunk)

    def _batch_size(self, max_batch_size: int | None) -> int:
        if max_batch_size is None:
            state = self.state_nbytes
            if self.max_context is not None:
                state = self.state_nbytes_at(min(self.max_context, _USUAL_CONTEXT))
            return default_batch_size(self.device, state)
        return _core.check_batch_size(max_batch_size)

    def _encode(self, prompt: Any) -> Any:
        return PromptReader(self._tokenizer, self.config).read(prompt)
