"""Prompts of a data set of Ray's, and their completions beside them."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import ray

from based import RequestOutput, SamplingParams, load


class Completer:
    """For `Dataset.map_batches`: adds to each row the completion of its prompt.

    The columns `completion` (text), `token_ids`, `finish_reason` and `error` are added. A row that is wrong has an
    error, and "error" as its reason; the others are answered. With `n` > 1 the first three are lists of n.
    A batch should have several times as many rows as run at once, so that few of them run at its end.
    """

    def __init__(
        self,
        model: str | None = None,
        params: Mapping[str, Any] | None = None,
        *,
        prompt: str = "prompt",
        row_params: str | None = None,
        max_batch_size: int | None = None,
        **options: Any,
    ) -> None:
        """Loads the model, once for each of Ray's workers, on the GPU or the CPUs that Ray gives to it.

        Args:
            model: As of `based.load`. None: the model in the package.
            params: Arguments of `based.SamplingParams`, for all rows.
            prompt: The column of texts or of lists of token ids.
            row_params: A column of arguments that go before those of all rows: of dicts, in which None stands for one
                that is not given. `n` is of all rows: it decides what the columns hold.
            max_batch_size: As of `Model.generate`.
            options: As of `based.load`.
        """
        self._params = dict(params or {})
        self._n = SamplingParams(**self._params).n  # found out now whether they are right
        self._prompt, self._row_params, self._max_batch_size = prompt, row_params, max_batch_size
        options = _with_threads(options)
        self._model = load(**options) if model is None else load(model, **options)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch (columns as NumPy arrays) with four more columns."""
        for argument, needed in (("prompt", self._prompt), ("row_params", self._row_params)):
            if needed is not None and needed not in batch:
                raise ValueError(
                    f"there is no column {needed!r} among {sorted(batch)}: name the right one, {argument}="
                )
        size = len(batch[self._prompt])
        errors: list[str | None] = [None] * size
        params: list[SamplingParams] = []
        for row in range(size):
            try:
                params.append(self._params_of(batch, row))
            except (TypeError, ValueError, OverflowError) as error:
                errors[row] = str(error)
                params.append(SamplingParams(max_tokens=1))
        rows = [row for row in range(size) if errors[row] is None]
        prompts = [_plain(batch[self._prompt][row]) for row in rows]
        outputs: list[RequestOutput] = list(
            self._model.generate_iter(prompts, [params[row] for row in rows], max_batch_size=self._max_batch_size)
        )
        found: dict[str, list[Any]] = {"completion": [], "token_ids": [], "finish_reason": [], "error": errors}
        by_row = dict(zip(rows, outputs, strict=True))
        for row in range(size):
            samples = by_row[row].outputs if row in by_row else []
            values: list[tuple[Any, ...]] = [(s.text, list(s.token_ids), s.finish_reason) for s in samples]
            errors[row] = errors[row] or next((s.error for s in samples if s.error), None)
            values = values or [("", [], "error")] * self._n
            for name, column in zip(
                ("completion", "token_ids", "finish_reason"), zip(*values, strict=True), strict=True
            ):
                found[name].append(column[0] if self._n == 1 else list(column))
        return batch | {name: _column(values) for name, values in found.items()}

    def _params_of(self, batch: dict[str, Any], row: int) -> SamplingParams:
        own = None if self._row_params is None else _plain(batch[self._row_params][row])
        if own is None:
            return SamplingParams(**self._params)
        if not isinstance(own, Mapping):
            raise TypeError(f"{self._row_params} is {type(own).__name__}, expected a dict of SamplingParams' arguments")
        given = {name: found for name, value in own.items() if (found := _plain(value)) is not None}
        if "n" in given:
            raise ValueError(f"{self._row_params}: n is of all rows: give it in params")
        return SamplingParams(**(self._params | given))


def _with_threads(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of `based.load`, with as many threads as Ray gives CPUs to this worker."""
    found = dict(options)
    if found.get("num_threads") is None:
        given = ray.get_runtime_context().get_assigned_resources().get("CPU", 1)
        found["num_threads"] = max(1, int(given))
    return found


def _plain(value: Any) -> Any:
    """A value as it was before Ray put it into a column, where None is NaN, and 3 beside it is 3.0."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, float):
        return None if math.isnan(value) else int(value) if value.is_integer() else value
    return value


def _column(values: list[Any]) -> Any:
    column = np.empty(len(values), dtype=object)  # lists of any lengths
    column[:] = values
    return column
