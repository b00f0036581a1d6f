"""A session: the states of some sequences that are advanced together."""

import contextlib
import os
from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Any, TypeAlias

import numpy as np

from based import _core
from based._generate import Params, PromptReader, Run, make_requests, names_sampling_fields
from based._outputs import RequestOutput, StreamChunk
from based._paths import check_path
from based._prompts import Prompt, Prompts, TokenIds, as_array, as_list
from based._tokenizer import LazyTokenizer

Logits: TypeAlias = Any
"""float32: a NumPy array of a model on the CPU, a `based.Tensor` of one on a GPU. Both speak DLPack."""


def vocabulary(logits: _core.Tensor, vocab_size: int, include_padding: bool) -> Logits:
    """Logits without the columns of the embedding's padding rows, unless those are asked for."""
    columns = logits if include_padding else logits.columns(vocab_size)
    return np.asarray(columns) if columns.device == "cpu" else columns


class Session:
    """The states of `batch_size` sequences. Made by `Model.session`; keeps its model alive.

    One thread at a time: a call that finds another one under way, or an open stream, raises SessionBusyError. A call
    that raises, KeyboardInterrupt too, leaves every state as it was; only when the states that a call changes take
    more than 64 MiB (those of a prompt excepted), it is finished before an interrupt is raised.
    """

    def __init__(self, core: _core.Session, model: _core.Model, tokenizer: LazyTokenizer) -> None:
        self._core = core
        self._model = model
        self._tokenizer = tokenizer
        self._turns = _core.Turns()

    @property
    def batch_size(self) -> int:
        """Number of sequences, B."""
        return self._core.batch_size

    @property
    def num_tokens(self) -> list[int]:
        """Tokens that each sequence has seen."""
        return self._core.num_tokens

    @property
    def state_nbytes(self) -> int:
        """Memory of all states."""
        return self._core.state_nbytes

    def __repr__(self) -> str:
        return f"<based.Session: {self.batch_size} sequences, {self.state_nbytes:,} bytes of state>"

    # ---- logits ----------------------------------------------------------------------------------------------------

    def prefill(
        self,
        prompts: Prompts,
        sequences: Iterable[int] | None = None,
        *,
        include_padding: bool = False,
        split_special_tokens: bool = False,
    ) -> Logits:
        """Feeds a prompt to each sequence, after whatever it has seen; memory does not grow with the prompts' length.

        Args:
            prompts: One per listed sequence (a single one need not be in a list).
            sequences: Which sequences, at least one; None for all, in order.
            include_padding: Also return the columns of the embedding's padding rows.
            split_special_tokens: Take a special token's text in a prompt as letters like any other.

        Text that does not begin its sequence goes on in the middle of a word, if need be: "hel" and "lo" are "hello".

        Returns:
            Logits at each prompt's last token, (len(prompts), vocab_size) float32: a NumPy array, or, on a GPU, a
            `based.Tensor`, which torch.from_dlpack takes without a copy and np.asarray with one.
        """
        sequences = _listed(sequences)
        reader = self._reader(split_special_tokens)
        with self._turn():
            ids = [
                reader.read(prompt, at_start=self._is_fresh(i, sequences)) for i, prompt in enumerate(as_list(prompts))
            ]
            return self._logits(lambda: self._core.prefill(ids, sequences), include_padding)

    def step(
        self, tokens: TokenIds, sequences: Iterable[int] | None = None, *, include_padding: bool = False
    ) -> Logits:
        """Feeds one token to each listed sequence (None: all, in order). Logits as prefill."""
        sequences = _listed(sequences)
        with self._turn():
            return self._logits(lambda: self._core.step(as_array(tokens), sequences), include_padding)

    # ---- text ------------------------------------------------------------------------------------------------------

    @names_sampling_fields
    def generate(
        self,
        prompts: Prompts,
        params: Params = None,
        *,
        split_special_tokens: bool = False,
    ) -> list[RequestOutput]:
        """Continues each sequence with its prompt, one per sequence; every n must be 1.

        An empty prompt goes on from where its sequence is. Penalties count what the sequence saw in earlier calls too:
        prompts and tokens that were fed as prompts, generated tokens as outputs. Afterwards the session has seen every
        prompt and every token returned. A sequence that cannot go on ends with finish_reason "error", after the tokens
        that it has; the others are not concerned. When it raises (KeyboardInterrupt too), the session is as it was
        before.
        """
        with self._turn():
            before = self._core.checkpoint()
            try:
                return self._run(as_list(prompts), params, split_special_tokens).collect()
            except BaseException:
                self._core.rollback(before)
                raise

    @names_sampling_fields
    def stream(
        self, prompt: Prompt, params: _core.SamplingParams | None = None, *, split_special_tokens: bool = False
    ) -> Generator[StreamChunk, None, None]:
        """As generate, for a session of one sequence: yields a chunk per new token as it comes.

        From this call until it is read to its end or closed, other calls raise SessionBusyError. Closing it, or an
        exception in it (KeyboardInterrupt too), ends the generation; the session has then seen the prompt and the
        tokens that were yielded. On a GPU, where steps run ahead, an exception may leave it one token further.
        """
        turn = self._turns.take("a stream of this session is open: read it to its end or close it")
        try:
            return self._stream(self._run([prompt], params, split_special_tokens), turn)
        except BaseException:
            turn.leave()
            raise

    def _stream(self, run: Run, turn: _core.Turn) -> Generator[StreamChunk, None, None]:
        # A stream that is dropped before it begins drops its turn.
        with turn, contextlib.closing(run.chunks()) as chunks:
            for _, chunk in chunks:
                yield chunk

    def _reader(self, split_special_tokens: bool) -> PromptReader:
        return PromptReader(self._tokenizer, self._model.config, split_special_tokens)

    def _run(self, prompts: list[Any], params: Params, split_special_tokens: bool) -> Run:
        at_start = [self._is_fresh(i) for i in range(len(prompts))]
        requests = make_requests(prompts, params, self._reader(split_special_tokens), at_start)
        return Run(self._core, self._model.config.eos_token_id, requests, self._tokenizer)

    # ---- state -----------------------------------------------------------------------------------------------------

    def fork(self) -> "Session":
        """A new session with equal states."""
        with self._turn():
            return Session(self._core.fork(), self._model, self._tokenizer)

    def state(self, sequence: int = 0) -> _core.State:
        """What one sequence has seen, as a value: it does not change, and may outlive the session.

        `Model.session(states=[…])` starts any number of sequences from it, `restore` puts it into any sequence of any
        session of the same model, `State.save` writes it to a file.
        """
        with self._turn():
            return self._core.snapshot(sequence)

    def restore(self, sequence: int, state: _core.State) -> None:
        """Makes a sequence what the state says, bit for bit. Raises StateError for a state of another model."""
        if state is None:
            raise TypeError("state must be a State, not None")
        with self._turn():
            self._core.restore(sequence, state)

    def checkpoint(self) -> _core.Checkpoint:
        """The states of all sequences, for rollback. It does not change and may outlive the session.

        It shares the memory of states that did not change since they were last taken.
        """
        with self._turn():
            return self._core.checkpoint()

    def rollback(self, checkpoint: _core.Checkpoint) -> None:
        """Back to the checkpoint, bit for bit. Raises StateError for one of another model or batch size."""
        with self._turn():
            self._core.rollback(checkpoint)

    def reset(self, sequence: int | None = None) -> None:
        """Forgets what one sequence, or every one, has seen."""
        with self._turn():
            self._core.reset(sequence)

    def copy(self, source: int, target: int) -> None:
        """Makes sequence `target` equal to `source`."""
        with self._turn():
            self._core.copy(source, target)

    def save_state(self, path: str | os.PathLike[str]) -> None:
        """Saves all states as one safetensors file: written aside, then renamed. Raises OSError, ValueError."""
        file = _file_path(path)  # Python code of a path runs here, where an interrupt in it is one
        with self._turn():
            self._core.save_state(file)

    def load_state(self, path: str | os.PathLike[str], sequence: int | None = None) -> None:
        """Replaces the states by a saved file's.

        Args:
            path: A state file: of as many sequences as the session has, or of one.
            sequence: The sequence that takes the state of a file of one; None for all sequences.

        Raises StateError on another model, number of sequences or format version, FormatError on a damaged file, and
        OSError, ValueError; then nothing has changed.
        """
        file = _file_path(path)
        with self._turn():
            if sequence is None:
                self._core.load_state(file)
            else:
                self._core.restore(sequence, _core.State.load(file, self._model))

    def _logits(self, advance: Callable[[], _core.Tensor], include_padding: bool) -> Logits:
        before = self._core.num_tokens
        try:
            return vocabulary(advance(), self._model.config.vocab_size, include_padding)
        except BaseException:
            if self._core.num_tokens != before:  # an interrupt that came when the core was through
                self._core.undo_last()
            raise

    def _turn(self) -> _core.Turn:
        """Keeps other callers out while it is entered, so that the core's calls of one method belong together."""
        return self._turns.take("this session is in another call: one thread at a time may use a session")

    def _is_fresh(self, position: int, sequences: Sequence[int] | None = None) -> bool:
        """Whether prompt `position` begins its sequence: a tokenizer may put a start token and a space before it."""
        seen = dict(enumerate(self._core.num_tokens))
        sequence = position if sequences is None else dict(enumerate(sequences)).get(position, -1)
        return not seen.get(sequence)


def _file_path(path: str | os.PathLike[str]) -> str:
    return check_path(os.fsdecode(path) if isinstance(path, bytes) else path, "path")


def _listed(sequences: Iterable[int] | None) -> list[int] | None:
    """The sequences in a list, for an iterator can be read once only. What is no iterable is left to the core."""
    if sequences is None:
        return None
    return list(sequences) if isinstance(sequences, Iterable) and not isinstance(sequences, str) else sequences
