"""What a completion answers: OpenAI's objects, whole or as events."""

import json
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from based._outputs import CompletionOutput, Logprob, RequestOutput, StreamChunk
from based._text import IncrementalDecoder
from based.server._errors import ApiError, to_json
from based.server._requests import Completion, Prompt
from based.server._scoring import PromptLogprobs

if TYPE_CHECKING:
    from based import Model

_LEAST_LOGPROB = -9999.0  # JSON has no -inf

DONE = b"data: [DONE]\n\n"


class Usage:
    """Numbers of tokens."""

    def __init__(self) -> None:
        self.prompt_tokens = 0
        self.completion_tokens = 0
        self.cached_tokens = 0

    def to_dict(self) -> dict[str, Any]:
        """As OpenAI has it."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


class Answer:
    """Makes the objects of one request."""

    def __init__(
        self,
        completion: Completion,
        model: "Model",
        model_name: str,
        identity: str,
        echoed: Sequence[PromptLogprobs | None],
    ) -> None:
        """echoed: Of each prompt, the log-probabilities of its tokens, where they are asked for."""
        self._completion = completion
        self._texts = model._tokenizer.detokenizer_or_warn()
        self._echoed = echoed
        self._head: dict[str, Any] = {
            "id": identity,
            "object": "text_completion",
            "created": int(time.time()),
            "model": model_name,
            "system_fingerprint": model.fingerprint,
        }
        self._before = "data: " + json.dumps(self._head, separators=(",", ":"))[:-1] + ',"choices":[{"index":'
        self._offsets: dict[int, _Offsets] = {}
        self._is_plain = completion.logprobs is None and not completion.return_token_ids

    def whole(self, outputs: Sequence[RequestOutput], usage: Usage, state: str | None) -> bytes:
        """The answer as one object. outputs: of each prompt; none where nothing is generated.

        Raises ApiError when every sample failed without a token.
        """
        samples_of = [output.outputs for output in outputs] or [self._nothing()] * len(self._completion.prompts)
        all_samples = [sample for samples in samples_of for sample in samples]
        if all(sample.finish_reason == "error" and not sample.token_ids for sample in all_samples):
            raise ApiError(500, all_samples[0].error or "the request failed", code="generation_failed")
        choices = []
        for number, (prompt, samples) in enumerate(zip(self._completion.prompts, samples_of, strict=True)):
            for index, sample in enumerate(self._likeliest(samples)):
                choices.append(self._choice(number * self._completion.n + index, number, prompt, sample))
        answer = self._head | {"choices": choices, "usage": usage.to_dict()}
        return to_json(answer | ({} if state is None else {"state_id": state}))

    def _nothing(self) -> list[CompletionOutput]:
        """The samples of a prompt behind which nothing is generated."""
        logprobs: list[dict[int, Logprob]] | None = None if self._completion.logprobs is None else []
        return [CompletionOutput(i, "", [], 0.0, logprobs, "length", None) for i in range(self._completion.n)]

    def event(self, number: int, chunk: StreamChunk, usage: Usage | None) -> bytes:
        """The event of a chunk of prompt `number`. usage: where each event has it."""
        choice = number * self._completion.n + chunk.index
        finish = chunk.finish_reason
        if self._is_plain and finish is None and usage is None:
            tail = ',"usage":null}\n\n' if self._completion.include_usage else "}\n\n"
            text = json.dumps(chunk.text)
            return f'{self._before}{choice},"text":{text},"logprobs":null,"finish_reason":null}}]{tail}'.encode()
        entry: dict[str, Any] = {
            "index": choice,
            "text": chunk.text,
            "logprobs": self._logprobs(choice, number, chunk.token_ids, chunk.logprobs),
            "finish_reason": finish,
            "stop_reason": chunk.stop_reason,
        }
        if self._completion.return_token_ids:
            entry["token_ids"] = chunk.token_ids
        if chunk.error is not None:
            entry["error"] = chunk.error
        return self._event([entry], usage)

    def echo_event(self, number: int, index: int) -> bytes:
        """The event that begins a sample with its prompt."""
        choice = number * self._completion.n + index
        prompt = self._completion.prompts[number]
        entry: dict[str, Any] = {
            "index": choice,
            "text": self._prompt_text(prompt),
            "logprobs": self._prompt_logprobs(choice, number),
            "finish_reason": "length" if self._completion.max_tokens == 0 else None,
            "stop_reason": None,
        }
        if self._completion.return_token_ids:
            entry |= {"token_ids": [], "prompt_token_ids": [int(token) for token in prompt.token_ids]}
        return self._event([entry], None)

    def last_event(self, usage: Usage | None, state: str | None) -> bytes:
        """The event without choices: numbers of tokens, and the name of the state behind the answer."""
        return self._event([], usage, {} if state is None else {"state_id": state})

    def _event(self, choices: list[dict[str, Any]], usage: Usage | None, more: dict[str, Any] | None = None) -> bytes:
        event = self._head | {"choices": choices}
        if self._completion.include_usage or usage is not None:
            event["usage"] = None if usage is None else usage.to_dict()
        return b"data: " + to_json(event | (more or {})) + b"\n\n"

    def _likeliest(self, samples: Sequence[CompletionOutput]) -> Sequence[CompletionOutput]:
        if len(samples) <= self._completion.n:
            return samples
        ranked = sorted(samples, key=lambda s: s.cumulative_logprob / max(len(s.token_ids), 1), reverse=True)
        return ranked[: self._completion.n]

    def _choice(self, choice: int, number: int, prompt: Prompt, sample: CompletionOutput) -> dict[str, Any]:
        echo = self._completion.echo
        logprobs = self._prompt_logprobs(choice, number) if echo else None
        new = self._logprobs(choice, number, sample.token_ids, sample.logprobs)
        if logprobs is not None and new is not None:
            new = {key: logprobs[key] + new[key] for key in new}
        entry: dict[str, Any] = {
            "index": choice,
            "text": self._prompt_text(prompt) + sample.text if echo else sample.text,
            "logprobs": new,
            "finish_reason": sample.finish_reason,
            "stop_reason": sample.stop_reason,
        }
        if self._completion.return_token_ids:
            entry["token_ids"] = sample.token_ids
            entry["prompt_token_ids"] = [int(token) for token in prompt.token_ids]
        if sample.error is not None:
            entry["error"] = sample.error
        return entry

    def _prompt_text(self, prompt: Prompt) -> str:
        if prompt.text is not None or self._texts is None:
            return prompt.text or ""
        return self._texts.decode([int(token) for token in prompt.token_ids])

    def _prompt_logprobs(self, choice: int, number: int) -> dict[str, list[Any]] | None:
        entries = self._echoed[number] if self._completion.logprobs is not None else None
        if entries is None:
            return None
        ids = [int(token) for token in self._completion.prompts[number].token_ids]
        return self._logprob_lists(ids, entries, self._offsets_of(choice, number))

    def _logprobs(
        self, choice: int, number: int, ids: list[int], entries: list[dict[int, Logprob]] | None
    ) -> dict[str, list[Any]] | None:
        if self._completion.logprobs is None:
            return None
        return self._logprob_lists(ids, entries or [], self._offsets_of(choice, number))

    def _logprob_lists(
        self, ids: list[int], entries: Sequence[dict[int, Logprob] | None], offsets: "_Offsets"
    ) -> dict[str, list[Any]]:
        lists: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token, entry in zip(ids, entries, strict=True):
            found = None if entry is None else entry[token]
            text = self._texts.token_text(token) if found is None and self._texts is not None else None
            lists["tokens"].append(self._name(token, text if found is None else found.decoded_token))
            lists["token_logprobs"].append(None if found is None else max(found.logprob, _LEAST_LOGPROB))
            top: dict[str, float] | None = None
            if entry is not None:
                top = {}
                for each, logprob in entry.items():  # the likeliest first; parts of characters share a name
                    top.setdefault(self._name(each, logprob.decoded_token), max(logprob.logprob, _LEAST_LOGPROB))
            lists["top_logprobs"].append(top)
            lists["text_offset"].append(offsets.next(token))
        return lists

    def _name(self, token: int, text: str | None) -> str:
        return f"token_id:{token}" if text is None or self._completion.tokens_as_ids else text

    def _offsets_of(self, choice: int, number: int) -> "_Offsets":
        if choice not in self._offsets:
            completion = self._completion
            prompt = completion.prompts[number]
            decoder = None
            if self._texts is not None:
                hides = completion.params.skip_special_tokens
                if completion.echo:  # a token that the tokenizer puts before a text is no part of it
                    hides = prompt.text is not None and not self._texts.holds_special(prompt.text)
                before = [] if completion.echo else prompt.token_ids
                starts = completion.state is None
                decoder = IncrementalDecoder(self._texts, before, skip_special_tokens=hides, at_start=starts)
            self._offsets[choice] = _Offsets(decoder)
        return self._offsets[choice]


class _Offsets:
    """Where each token begins in the text, in letters."""

    def __init__(self, decoder: IncrementalDecoder | None) -> None:
        self._decoder = decoder
        self._length = 0

    def next(self, token: int) -> int:
        begin = self._length
        if self._decoder is not None:
            self._length += len(self._decoder.add(token))
        return begin
