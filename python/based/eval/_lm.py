"""The harness' class of models, for what `based.load` takes."""

import contextlib
import hashlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from tqdm import tqdm

import based
from based._loading import BUNDLED
from based._score import score_continuations
from based.eval._sharing import Tokens, prefilled

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

MAX_GEN_TOKS = 256
"""New tokens where a task does not say how many, as in the harness' other models."""

_PASSED_ON = ("top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
KNOWN = ("until", *_LENGTHS, "do_sample", "temperature", "seed", *_PASSED_ON)
"""What a task may say of a generation."""


@register_model("based")
class BasedLM(TemplateLM):
    """A model of this package in the harness.

    Requests whose contexts begin alike share a state: what they have in common is read once, across all requests of a
    call. Results do not depend on the order of the requests or on batch_size, but for rounding.
    """

    def __init__(
        self,
        pretrained: "str | based.Model | None" = None,
        *,
        device: str | None = None,
        dtype: str = "auto",
        batch_size: int | str | None = None,
        max_length: int | None = None,
        max_gen_toks: int = MAX_GEN_TOKS,
        num_threads: int | None = None,
        revision: str | None = None,
        tokenizer: str | None = None,
        seed: int = 1234,
        progress: bool | None = None,
        share: bool = True,
        max_batch_size: int | None = None,
    ) -> None:
        """A model by what `based.load` takes, or one that is loaded.

        Args:
            pretrained: Path, name at the hub, or a Model; None for the one in the package.
            device: As in `based.load`.
            dtype: As in `based.load`.
            batch_size: Sequences that run at once; None or "auto" as `Model.generate`.
            max_length: Tokens of a context and its continuation, as of models with a limit: what is more is cut from
                the left. None: nothing is cut.
            max_gen_toks: New tokens where a task does not say how many.
            num_threads: As in `based.load`.
            revision: As in `based.load`.
            tokenizer: As in `based.load`.
            seed: Of generations that sample, unless a task gives one.
            progress: A bar on stderr; None: if that is a terminal.
            share: False reads every context by itself, for comparison.
            max_batch_size: The harness' name for a bound of "auto".

        Raises:
            ValueError: An argument is outside its domain, or the model has no tokenizer.
        """
        super().__init__()
        if isinstance(pretrained, based.Model):
            model = pretrained
        else:
            model = based.load(
                BUNDLED if pretrained is None else pretrained,
                device="auto" if device is None else device,
                dtype=dtype,
                num_threads=num_threads,
                revision=revision,
                tokenizer=tokenizer,
            )
        if model.tokenizer is None:
            raise ValueError("the model has no tokenizer: expected one, or tokenizer=FILE")
        if max_length is not None and max_length < 2:
            raise ValueError(f"max_length is {max_length}, expected at least 2")
        asked = max_batch_size if batch_size in (None, "auto") else _integer(batch_size, "batch_size")
        self.model = model
        self.batch_size = model._batch_size(asked)
        self.max_length = max_length
        self.max_gen_toks = _integer(max_gen_toks, "max_gen_toks")
        self._seed = seed
        self._progress = progress
        self._share = share
        self._device = model.device
        self.num_prompt_tokens = 0
        """Of the contexts of all requests so far."""
        self.num_fed_tokens = 0
        """Of those, how many were read: fewer, where contexts begin alike."""

    @property
    def shows_progress(self) -> bool:
        """Whether there are bars on stderr."""
        return sys.stderr is not None and sys.stderr.isatty() if self._progress is None else self._progress

    # ---- tokens ----------------------------------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self._special(self.model.config.eos_token_id, self.model.config.bos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has no context: the model's bos token, or else its eos token."""
        return self._special(self.model.config.bos_token_id, self.model.config.eos_token_id)

    def _special(self, *wanted: int | None) -> int:
        for token in wanted:
            if token is not None and token < self.model.config.vocab_size:
                return token
        raise ValueError("the model has neither a bos nor an eos token, which a text without a context begins with")

    @property
    def tokenizer_name(self) -> str:
        """What the harness' cache of requests knows the tokenizer by."""
        tokenizer = self.model.tokenizer
        assert tokenizer is not None
        return hashlib.sha256(tokenizer.to_str().encode()).hexdigest()[:16]

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids, with what the tokenizer puts before a text unless add_special_tokens is False."""
        if not string:
            return []
        if add_special_tokens is False:
            tokenizer = self.model.tokenizer
            assert tokenizer is not None
            return list(tokenizer.encode(string, add_special_tokens=False).ids)
        ids = self.model.encode(string)
        bos = self.model.config.bos_token_id
        return ids[1:] if bos is not None and ids[:2] == [bos, bos] else ids

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Ids of both, split as the harness' other models split them: behind as many as the context alone has."""
        if context:
            ids, rest = self._encode_pair(context, continuation)
            if ids and rest:
                return ids, rest
            if not ids:  # nothing but spaces, which went over to the continuation
                return [self.prefix_token_id], rest
            raise ValueError("the continuation has no tokens of its own behind its context")
        rest = self.tok_encode(continuation, add_special_tokens=False)
        if rest[:1] == [self.prefix_token_id]:
            return rest[:1], rest[1:]
        return [self.prefix_token_id], rest

    # ---- requests --------------------------------------------------------------------------------------------------

    def loglikelihood(self, requests: "list[Instance]", disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-probability, is_greedy) of each request's continuation."""
        pairs = [
            _named(i, request, lambda r: self._checked(*self._pair(*r.args))) for i, request in enumerate(requests)
        ]
        return self._score(pairs, requests, disable_tqdm)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        return self._score([self._checked(ids, rest) for _, ids, rest in requests], None, disable_tqdm)

    def _checked(self, context: list[int], continuation: list[int]) -> tuple[list[int], list[int]]:
        """Both, the context cut to max_length."""
        if not continuation:
            raise ValueError("the continuation has no tokens")
        if self.max_length is None:
            return context, continuation
        if len(continuation) > self.max_length:
            raise ValueError(f"the continuation has {len(continuation)} tokens, expected at most {self.max_length}")
        # The last token is predicted, never read.
        return context[-(self.max_length + 1 - len(continuation)) :], continuation

    def _score(
        self, pairs: list[tuple[list[int], list[int]]], requests: "list[Instance] | None", disable_tqdm: bool
    ) -> list[tuple[float, bool]]:
        found: list[tuple[float, bool]] = [(0.0, False)] * len(pairs)
        with self._bar(len(pairs), "loglikelihood", disable_tqdm) as done:
            for batch in self._prefilled([ids for ids, _ in pairs]):
                logits = np.stack([row for row in batch.logits if row is not None])
                tokens = [pairs[i][1] for i in batch.members]
                scores = score_continuations(batch.session, logits, tokens, self.model.config.vocab_size)
                for i, score in zip(batch.members, scores, strict=True):
                    found[i] = score.logprob, score.is_greedy
                    if requests is not None:
                        self.cache_hook.add_partial("loglikelihood", requests[i].args, found[i])
                done(len(batch.members))
        return found

    def loglikelihood_rolling(self, requests: "list[Instance]", disable_tqdm: bool = False) -> list[float]:
        """The log-probability of each request's text, behind the prefix token, whole or in windows of max_length."""
        found = []
        with self._bar(len(requests), "loglikelihood_rolling", disable_tqdm) as done:
            for i, request in enumerate(requests):
                found.append(_named(i, request, lambda r: self._rolling(r.args[0])))
                self.cache_hook.add_partial("loglikelihood_rolling", request.args, found[-1])
                done(1)
        return found

    def _rolling(self, text: str) -> float:
        ids = self.tok_encode(text)
        if self.max_length is None:
            windows = [([self.prefix_token_id], ids)] if ids else []
        else:
            rolling = utils.get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1)
            windows = [utils.make_disjoint_window(window) for window in rolling]
        total = 0.0
        for context, continuation in windows:
            logprobs = self.model.score([*context, *continuation])
            total += float(logprobs[len(context) - 1 :].sum(dtype="float64"))
        return total

    def generate_until(self, requests: "list[Instance]", disable_tqdm: bool = False) -> list[str]:
        """What follows each request's context, up to one of its stop strings."""
        seen: Counter[bytes] = Counter()
        read = [
            _named(i, request, lambda r: self._generation(r.args[0], r.args[1], seen))
            for i, request in enumerate(requests)
        ]
        texts = [""] * len(requests)
        with self._bar(len(requests), "generate_until", disable_tqdm) as done:
            # The last token of a context is what a generation begins with.
            for batch in self._prefilled([ids[:-1] for ids, _ in read]):
                rest = [read[i][0][-1:] for i in batch.members]
                self.num_fed_tokens += len(rest)
                self.num_prompt_tokens += len(rest)
                outputs = batch.session.generate(rest, [read[i][1] for i in batch.members])
                for i, output in zip(batch.members, outputs, strict=True):
                    completion = output.outputs[0]
                    if completion.finish_reason == "error":
                        raise RuntimeError(f"{_name(i, requests[i])}: {completion.error}")
                    texts[i] = completion.text
                    self.cache_hook.add_partial("generate_until", requests[i].args, texts[i])
                done(len(batch.members))
        return texts

    def _generation(
        self, context: str, options: dict[str, Any], seen: Counter[bytes]
    ) -> tuple[list[int], based.SamplingParams]:
        """Token ids of a context, and how to go on."""
        ids = self.tok_encode(context) or [self.prefix_token_id]
        params = self._params(options, ids, seen)
        if self.max_length is not None:
            room = self.max_length - (params.max_tokens or 0)
            if room < 1:
                raise ValueError(
                    f"max_gen_toks is {params.max_tokens}, expected less than max_length {self.max_length}"
                )
            ids = ids[-room:]
        return ids, params

    def _params(self, options: dict[str, Any], ids: list[int], seen: Counter[bytes]) -> based.SamplingParams:
        unknown = sorted(set(options) - set(KNOWN))
        if unknown:
            raise ValueError(
                f"generation argument {', '.join(unknown)} is not known: expected some of {', '.join(KNOWN)}"
            )
        given = {key: value for key, value in options.items() if value is not None}
        known = normalize_gen_kwargs(given, self.max_gen_toks)
        stops = known["until"]
        if not all(isinstance(stop, str) for stop in stops):
            raise ValueError(f"until is {stops!r}, expected strings")
        temperature = float(given.get("temperature", 1.0)) if known["do_sample"] else 0.0
        seed = None
        if temperature > 0:
            # Another one for each request, and for each time that the same one is asked again.
            key = repr((given.get("seed", self._seed), ids)).encode()
            seed = int.from_bytes(hashlib.sha256(key + b"%d" % seen[key]).digest()[:4], "big")
            seen[key] += 1
        return based.SamplingParams(
            max_tokens=known["max_gen_toks"],
            temperature=temperature,
            stop=[stop for stop in stops if stop],
            seed=seed,
            **{key: given[key] for key in _PASSED_ON if key in given},
        )

    def _prefilled(self, prompts: Sequence[Sequence[int]]) -> Iterator[Any]:
        arrays: list[Tokens] = [np.asarray(ids, dtype=np.int64) for ids in prompts]
        self.num_prompt_tokens += sum(map(len, arrays))
        for batch in prefilled(self.model, arrays, self.batch_size, share=self._share):
            self.num_fed_tokens += batch.num_fed
            yield batch

    @contextlib.contextmanager
    def _bar(self, total: int, what: str, disabled: bool) -> Iterator[Callable[[int], Any]]:
        with tqdm(total=total, desc=what, disable=disabled or not self.shows_progress) as bar:
            yield bar.update


def _integer(value: Any, name: str) -> int:
    try:
        number = int(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name} is {value!r}, expected an integer") from None
    if number < 1:
        raise ValueError(f"{name} is {number}, expected at least 1")
    return number


def _name(index: int, request: "Instance") -> str:
    task = f" of task {request.task_name}, document {request.doc_id}" if request.task_name else ""
    return f"request {index}{task}"


def _named(index: int, request: "Instance", read: Callable[["Instance"], Any]) -> Any:
    """What `read` makes of a request. An error in it names the request."""
    try:
        return read(request)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{_name(index, request)}: {error}") from error
