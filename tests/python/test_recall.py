"""`based recall`: the texts, the training, what the runtime measures; sweeps that are stopped, killed, or go wrong."""

import csv
import dataclasses
import itertools
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import based
import numpy as np
import pytest
from based import cli, sizes
from hypothesis import given
from hypothesis import strategies as st
from safetensors import numpy as safetensors_numpy

torch = pytest.importorskip("torch")
torch.set_num_threads(1)  # tensors are small here, and a thread that waits for its turn stops all

from based.torch import BasedForCausalLM
from based.torch.recall import (
    Paused,
    Sweep,
    data,
    figure,
    frontier,
    measure_frontier,
    measuring,
    merge,
    training,
    workers,
)
from based.torch.recall.data import Examples, Setting, make_examples
from based.torch.recall.families import FAMILIES
from based.torch.recall.published import read_published
from based.torch.recall.sweep import Run
from based.torch.recall.training import Corpus, Texts, Trainer, count_right, query_logits

CPU = torch.device("cpu")
THREE = "based,attention,window"
TINY: dict[str, Any] = {
    "settings": "authors",
    "quick": True,
    "epochs": 1,
    "train": ((Setting(16, 2), 64),),
    "test": (Setting(16, 2),),
    "test_examples": 20,
    "validation_examples": 20,
}


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """So have the processes that train."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@st.composite
def settings_and_vocabularies(draw: Any) -> tuple[Setting, int]:
    pairs = draw(st.integers(1, 12))
    length = 2 * draw(st.integers(2 * pairs, 2 * pairs + 30))
    return Setting(length, pairs), 2 * draw(st.integers(pairs + 1, pairs + 40))


# ---- the texts -------------------------------------------------------------------------------------------------------


@given(case=settings_and_vocabularies(), seed=st.integers(0, 1 << 30), power=st.sampled_from([0.01, 0.5, 1.0, 3.0]))
def test_texts_are_what_they_are_said_to_be(case, seed, power):
    setting, vocab_size = case
    n, half = setting.pairs, vocab_size // 2
    examples = make_examples(setting, 7, vocab_size, [seed], power)
    assert examples.tokens.shape == (7, setting.length) and examples.queries.shape == examples.answers.shape == (7, n)
    assert examples.tokens.max() < vocab_size
    for tokens, queries, answers in zip(examples.tokens, examples.queries, examples.answers, strict=True):
        keys, values = tokens[0 : 2 * n : 2].tolist(), tokens[1 : 2 * n : 2].tolist()
        assert len(set(keys)) == len(set(values)) == n
        assert all(1 <= key < half for key in keys) and all(half <= value < vocab_size for value in values)
        assert (np.diff(queries.astype(int)) > 0).all() and (queries >= 2 * n).all() and not (queries % 2).any()
        assert sorted(tokens[queries]) == sorted(keys)  # each key is asked for once
        known = dict(zip(keys, values, strict=True))
        assert [known[key] for key in tokens[queries].tolist()] == answers.tolist()
    again = make_examples(setting, 7, vocab_size, [seed], power)
    assert all((getattr(examples, part) == getattr(again, part)).all() for part in ("tokens", "queries", "answers"))


def test_other_places_hold_any_token():
    examples = make_examples(Setting(64, 4), 4000, 32, [0])
    rest = np.ones(examples.tokens.shape, bool)
    rest[:, :8] = False
    np.put_along_axis(rest, examples.queries.astype(int), False, axis=1)
    counts = np.bincount(examples.tokens[rest], minlength=32)
    expected = 4000 * 52 / 32
    assert (abs(counts - expected) < 6 * expected**0.5).all()


@pytest.mark.parametrize("power", [0.01, 0.5, 1.0])
def test_gaps_follow_the_power_law(power):
    count, length = 40_000, 42
    examples = make_examples(Setting(length, 1), count, 16, [1], power)
    places = (examples.queries[:, 0].astype(int) - 2) // 2
    law = np.arange(1, 21) ** (power - 1.0)
    expected = count * law / law.sum()
    assert (abs(np.bincount(places, minlength=20) - expected) < 5 * expected**0.5).all()


def test_draws_without_replacement_are_those_of_successive_draws():
    """Of three places with weights w, the pair (a, b) comes first with probability w_a · w_b / (1 - w_a)."""
    count = 60_000
    examples = make_examples(Setting(10, 2), count, 64, [2], 0.01)
    first_key = examples.tokens[:, 0]
    asked = np.take_along_axis(examples.tokens, examples.queries.astype(int), axis=1) == first_key[:, None]
    places = (examples.queries.astype(int) - 4) // 2
    a = places[asked]
    b = places[~asked]
    law = np.arange(1, 4) ** -0.99
    law /= law.sum()
    for i, j in itertools.permutations(range(3), 2):
        expected = count * law[i] * law[j] / (1 - law[i])
        assert abs(((a == i) & (b == j)).sum() - expected) < 5 * expected**0.5


def test_rows_of_different_numbers_are_equally_probable():
    rows = data.distinct(np.random.default_rng(0), 60_000, 3, 5, 9)
    codes, counts = np.unique(rows @ np.array([100, 10, 1]), return_counts=True)
    assert len(codes) == 4 * 3 * 2
    assert (abs(counts - 2500) < 5 * 50).all()


def test_training_validation_and_test_texts_differ():
    sweep = Sweep.quick(train=((Setting(16, 2), 640), (Setting(32, 4), 320)))
    parts = [sweep.training_examples()[0], sweep.validation_examples_of()[0], sweep.test_examples_of()[0]]
    rows = [set(map(bytes, part.tokens)) for part in parts]
    assert [len(row) for row in rows] == [640, 50, 100]
    for a, b in itertools.combinations(rows, 2):
        assert not a & b
    other = Sweep.quick(seed=1).test_examples_of()[0]
    assert not rows[2] & set(map(bytes, other.tokens))


# ---- the sweep -------------------------------------------------------------------------------------------------------


def test_the_default_is_the_authors_sweep():
    sweep = Sweep()
    names = [candidate.name for candidate in sweep.candidates()]
    per_family = {family: sum(name.startswith(f"{family}-") for name in names) for family in FAMILIES}
    expected = {"based": 9, "attention": 3, "window": 7, "mamba": 9, "delta_net": 3, "gated_delta_net": 3}
    expected |= {"mamba2": 9, "gla": 3, "rwkv7": 3, "h3": 3, "hyena": 3, "rwkv4": 3}
    assert len(set(names)) == len(names) and expected.items() <= per_family.items()
    assert names[:2] == ["mamba-d256-s8", "mamba-d256-s16"]  # the widest first
    assert {"based-d48-f8", "attention-d48-w1024", "window-d128-w8", "window-d128-w512"} < set(names)
    assert sweep.steps_per_epoch == 390 + 4 * 78
    assert len(list(sweep.runs())) == len(names) * len(sweep.learning_rates)
    for candidate in sweep.candidates():
        config = candidate.config
        assert config.mlp is None and config.vocab_size == 8192
        assert len(config.layers) == 2 and {layer.mixer for layer in config.layers[:1]} <= {
            "gated_conv",
            config.layers[1].mixer,
        }
        assert candidate.state_nbytes == sizes.state_nbytes(config, "float32", 1024)
        assert 0 < candidate.authors_nbytes < candidate.state_nbytes
    by_name = {candidate.name: candidate for candidate in sweep.candidates()}
    # 2 inputs of 128 channels; 1 + 16 + 136 features of 128 values and the denominator; 64 keys and values of 128
    assert by_name["based-d128-f16"].state_nbytes == 4 * (2 * 128 + 153 * 129)
    assert by_name["window-d128-w64"].state_nbytes == 4 * (2 * 128 + 2 * 64 * 128)
    # 1,024 keys and values of 128; two scans of 256 channels, of 16 numbers and 3 inputs each; two heads' sums of
    # 64 × 64 or 64 × 128, and 3 inputs of q, k and v
    assert by_name["attention-d128-w1024"].state_nbytes == 4 * (2 * 128 + 2 * 1024 * 128)
    assert by_name["mamba-d128-s16"].state_nbytes == 4 * 2 * 256 * (16 + 3)
    assert by_name["delta_net-d128-n2"].state_nbytes == 4 * (2 * 128 + 2 * 64 * 64 + 3 * 3 * 128)
    assert by_name["gated_delta_net-d128-n2"].state_nbytes == 4 * (2 * 128 + 2 * 64 * 128 + 3 * 4 * 128)
    # Two scans of 4 heads of 64 × 16, and 3 inputs of x, B and C; two heads' sums of 32 × 64; two of 64 × 64, and the
    # token before; 31 keys of 128 channels before the shift, and 16 complex numbers of the 4 products of each of 64
    # heads; 2 inputs of q, k and v, and 1,024 products of 128 channels; the token before, and 3 numbers of each channel
    assert by_name["mamba2-d128-s16"].state_nbytes == 4 * 2 * (4 * 64 * 16 + 3 * (256 + 2 * 16))
    assert by_name["gla-d128-n2"].state_nbytes == 4 * (2 * 128 + 2 * 32 * 64)
    assert by_name["rwkv7-d128-n2"].state_nbytes == 4 * (2 * 128 + 2 * 64 * 64 + 128)
    assert by_name["h3-d128-s32"].state_nbytes == 4 * 2 * (31 * 128 + 64 * 4 * 2 * 16)
    assert by_name["hyena-d128-w1024"].state_nbytes == 4 * 2 * (2 * 3 * 128 + 1024 * 128)
    assert by_name["rwkv4-d128-s3"].state_nbytes == 4 * 2 * (128 + 3 * 128)
    counted = {
        "based-d128-f16": 153 * 129,
        "window-d128-w64": 2 * 64 * 128,
        "attention-d128-w1024": 2 * 1024 * 128,
        "mamba-d128-s16": 2 * 2 * 128 * 16,
        "delta_net-d128-n2": 128 * 128 / 2,
        "gated_delta_net-d128-n2": 128 * 128,
        "mamba2-d128-s16": 2 * 2 * 128 * 16,
        "gla-d128-n2": 128 * 128 / 4,
        "rwkv7-d128-n2": 2 * 64 * 64,
        "h3-d128-s32": 2 * 128 * 32,
        "hyena-d128-w1024": 2 * 128 * 1024,
        "rwkv4-d128-s3": 2 * 3 * 128,
    }
    assert {name: by_name[name].authors_nbytes for name in counted} == {n: 4 * count for n, count in counted.items()}


def test_published_numbers_are_of_models_of_the_bytes_that_we_count():
    """To the bytes that a figure tells; the later one counts 3 inputs of the first layer's convolution, too."""
    points = read_published()
    assert {p.source for p in points} == {"the paper, 2024", "Zoology, 2025"}
    assert {p.family for p in points} <= FAMILIES.keys()
    known = [p for p in points if p.width is not None]
    assert len(known) > 40
    for p in known:
        convolution = 3 * p.width if p.source.endswith("2025") else 0
        if p.family == "rwkv7":  # they corrected the sum of both, whose first part was (d/64)² times what it should be
            convolution /= (p.width // 64) ** 2
        expected = 4 * (FAMILIES[p.family].counted(p.width, p.size) + convolution)
        assert p.nbytes == pytest.approx(expected, rel=0.035), p


def test_settings_say_what_differs_from_the_authors():
    theirs, ours = Sweep.authors(), Sweep()
    assert (theirs.settings, ours.settings, Sweep.authors(epochs=3).settings) == ("authors", "ours", "other")
    assert (theirs.learning_rates, theirs.epochs, theirs.weight_decay) == ((1e-3, 3.2e-3, 1e-2, 3.2e-2), 32, 0.1)
    candidates = {candidate.family: candidate for candidate in ours.candidates()}
    for candidate in candidates.values():
        common = theirs.differences(candidate)
        assert any("the authors use the test texts" in text for text in common)
        assert ours.differences(candidate)[: len(common)] == common
        assert "weight_decay is 0.01; the authors' is 0.1" in ours.differences(candidate)[len(common) :]
        has_conv = candidate.config.layers[0].mixer == "gated_conv"
        assert has_conv == any("BaseConv" in text for text in common)
    assert "patience is 6; the authors' is none" in ours.differences(candidates["mamba"])
    assert Sweep.of("authors", quick=True).epochs == 2 and Sweep.of("authors", quick=True).weight_decay == 0.1
    assert ours.has_authors_texts and not Sweep.quick().has_authors_texts


def test_points_are_names_or_patterns():
    sweep = Sweep(points=("based-d128-*", "window-d128-w8"))
    names = [candidate.name for candidate in sweep.candidates()]
    assert names == ["based-d128-f8", "based-d128-f16", "based-d128-f24", "window-d128-w8"]
    assert sweep.to_json() == Sweep().to_json() != Sweep(epochs=3).to_json()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"families": ("rnn",)}, "families has 'rnn', expected some of based, attention, window"),
        ({"families": ("window",), "points": ("window-d9-*",)}, "points has 'window-d9-*', expected names"),
        ({"rival_widths": (33,)}, "a width is 33, expected a multiple of 2 for the family delta_net"),
        (
            {"families": ("rwkv7",), "rival_widths": (96,)},
            "a width is 96, expected a multiple of 64 for the family rwkv7",
        ),
        ({"state_sizes": ()}, "state_sizes is"),
        ({"schedule": "never"}, "schedule is 'never', expected step or epoch"),
        ({"first_weights": "ones"}, "first_weights is 'ones', expected published or authors"),
        ({"patience": 0}, "patience is 0, expected ≥ 1"),
        ({"families": ()}, "families is"),
        ({"widths": (8, 8)}, "widths is"),
        ({"feature_dims": (0,)}, "feature_dims has 0, expected integers ≥ 1"),
        ({"windows": (64,)}, "windows has 64, expected less than 64, the length of the longest text"),
        ({"learning_rates": (float("nan"),)}, "learning_rates is"),
        ({"learning_rates": (-1.0,)}, "learning_rates is"),
        ({"epochs": 0}, "epochs is 0, expected ≥ 1"),
        ({"seed": -1}, "seed is -1"),
        ({"vocab_size": 16}, "vocab_size is 16, expected an even number from 18 to 65536: setting 64/8"),
        ({"vocab_size": 65}, "vocab_size is 65"),
        ({"test": (Setting(15, 2),)}, "setting 15/2: expected an even length"),
        ({"test": (Setting(16, 5),)}, "setting 16/5"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"train": ((Setting(16, 2), 31),)}, "31 training texts of 16/2, expected at least batch_size 32"),
    ],
)
def test_sweeps_that_make_no_sense(changes, message):
    with pytest.raises(ValueError, match="expected") as failure:
        Sweep.quick(**changes)
    assert message in str(failure.value)


# ---- training --------------------------------------------------------------------------------------------------------


def trainer(folder: Path, sweep: Sweep, name: str = "based-d32-f8", rate: float = 1e-2) -> Trainer:
    candidate = next(c for c in sweep.candidates() if c.name == name)
    return Trainer(Run(candidate, rate), sweep, Corpus(sweep, CPU), CPU, folder)


def trained(t: Trainer) -> Trainer:
    while not t.finished:
        t.advance()
    return t


def parameters(t: Trainer) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in t._tensors().items()}


def test_logits_at_queries_are_those_of_the_whole_text():
    sweep = Sweep.quick()
    for candidate in sweep.candidates():
        model = BasedForCausalLM(candidate.config)
        texts = Texts.of(sweep.test_examples_of()[1], CPU)[:9]
        with torch.no_grad():
            whole = model(texts.tokens)
            chosen = whole[torch.arange(9)[:, None], texts.queries]
            torch.testing.assert_close(query_logits(model, texts), chosen.flatten(0, 1))
            assert count_right(model, texts) == (chosen.argmax(-1) == texts.answers).sum()


def test_an_epoch_reads_every_text_once(tmp_path, monkeypatch):
    """But for those that fill no batch."""
    sweep = Sweep.quick(train=((Setting(16, 2), 75), (Setting(32, 4), 64)), epochs=2)
    seen: list[bytes] = []
    plain = training.query_logits

    def record(model: Any, texts: Texts) -> Any:
        if torch.is_grad_enabled():
            seen.extend(bytes(row.numpy().astype(np.uint16)) for row in texts.tokens)
        return plain(model, texts)

    monkeypatch.setattr(training, "query_logits", record)
    t = trained(trainer(tmp_path, sweep))
    assert t.step == 8 and len(seen) == 2 * 128
    every = {bytes(row) for part in sweep.training_examples() for row in part.tokens}
    assert len(every) == 75 + 64
    for epoch in (seen[:128], seen[128:]):
        assert len(set(epoch)) == 128 and set(epoch) < every
    assert seen[:128] != seen[128:]


@pytest.mark.parametrize("cut", [1, 16, 29, 30, 47])
def test_a_saved_run_goes_on_bit_for_bit(tmp_path, monkeypatch, cut):
    sweep = Sweep.quick()
    assert sweep.steps_per_epoch == 30
    whole = trained(trainer(tmp_path / "whole", sweep))
    monkeypatch.setattr(Trainer, "steps_at_a_time", 1)
    first = trainer(tmp_path / "cut", sweep)
    while first.step < cut:
        first.advance()
    first.save()
    second = trained(trainer(tmp_path / "cut", sweep))
    assert second.step == whole.step == 60 and second.history == whole.history
    for name, values in parameters(whole).items():
        np.testing.assert_array_equal(parameters(second)[name], values, err_msg=name)
    second.finish()
    result = training.read_result(tmp_path / "cut")
    assert result is not None and (result.epochs, result.steps, result.finite) == (2, 60, True)
    assert result.history == whole.history and result.accuracy == whole.history[-1]
    assert {path.name for path in (tmp_path / "cut").iterdir()} == {"model", "result.json"}


def test_the_rate_falls_along_half_a_cosine(tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "steps_at_a_time", 1)
    t = trainer(tmp_path, Sweep.quick())
    rates = []
    while not t.finished:
        step = t.step
        t.advance()
        if t.step > step:
            rates.append(t._optimizer.param_groups[0]["lr"])
    np.testing.assert_allclose(rates, 1e-2 * (1 + np.cos(np.pi * np.arange(60) / 60)) / 2)


def test_the_authors_rate_falls_after_each_epoch(tmp_path):
    t = trainer(tmp_path, Sweep.quick(schedule="epoch", epochs=4))
    expected = 1e-2 * (1 + np.cos(np.pi * np.arange(4) / 4)) / 2
    np.testing.assert_allclose([t._rate_of(step) for step in range(120)], np.repeat(expected, 30))


def test_the_authors_first_weights(tmp_path):
    """0.02; 0.02 / √(2 · 2 layers) where the output projection has the name that their rule knows."""
    sweep = Sweep.quick(first_weights="authors", widths=(128,), rival_widths=(128,))
    both = [("h3-d128-s32", 0.02), ("hyena-d128-w64", 0.01), ("rwkv4-d128-s3", 0.02)]  # layers
    last = [("based-d128-f8", 0.02), ("window-d128-w4", 0.01), ("delta_net-d128-n2", 0.02), ("gla-d128-n2", 0.02)]
    for name, expected in both + last:
        model = trainer(tmp_path / name, sweep, name).model
        assert float(model.embedding.weight.detach().std()) == pytest.approx(0.02, rel=0.05)
        for layer in (0, 1) if (name, expected) in both else (1,):
            weight = model.get_parameter(f"layers.{layer}.mixer.out_proj.weight")
            assert float(weight.detach().std()) == pytest.approx(expected, rel=0.05)
    ours = trainer(tmp_path / "ours", Sweep.quick(widths=(128,)), "based-d128-f8").model
    assert float(ours.embedding.weight.detach().std()) == pytest.approx((2 / (5 * 128)) ** 0.5, rel=0.05)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_learns(tmp_path, family):
    """Which value follows a key, the same in all texts."""
    sweep = Sweep.quick(families=(family,), train=((Setting(16, 2), 640),), dropout=0.0, epochs=1)
    (candidate,) = sweep.candidates()
    t = Trainer(Run(candidate, 1e-2), sweep, Corpus(sweep, CPU), CPU, tmp_path)
    losses = []
    for _ in range(12):
        t._cursors[0].zero_()  # the first batch again and again
        t._update(0)
        losses.append(float(t._loss))
    assert losses[-1] < losses[0] - 0.5, losses


def test_dropout_is_of_training_alone(tmp_path, monkeypatch):
    """A step drops other numbers than the one before, and the same ones when it is taken again."""
    seen: dict[bool, list[Any]] = {True: [], False: []}
    monkeypatch.setattr(Trainer, "steps_at_a_time", 1)
    for folder in ("a", "b"):
        t = trainer(tmp_path / folder, Sweep.quick(dropout=0.25))
        t.model.layers[0].register_forward_pre_hook(lambda layer, r: seen[layer.training].append(r[0].detach()))
        while not t.history:
            t.advance()
    kept = [r != 0 for r in seen[True]]
    assert len(kept) == 2 * 30 and all(abs(float(k.float().mean()) - 0.75) < 0.02 for k in kept)
    assert not torch.equal(kept[0][:, :16], kept[1][:, :16])
    assert all(torch.equal(a, b) for a, b in zip(seen[True][:30], seen[True][30:], strict=True))
    first = trainer(tmp_path / "c", Sweep.quick(dropout=0.25)).model.embedding.weight
    scaled = torch.unique(first / 0.75)
    assert torch.isin(seen[True][0][kept[0]], scaled).all()
    assert seen[False] and all((r != 0).all() for r in seen[False])


def test_attention_learns_to_recall_and_a_window_of_one_does_not(tmp_path):
    sweep = Sweep.quick(
        train=((Setting(16, 2), 1600),), test=(Setting(16, 2),), windows=(1,), vocab_size=32, epochs=30, stop_at=0.97
    )
    attention = trained(trainer(tmp_path / "a", sweep, "attention-d32-w16"))
    assert attention.history[-1] >= 0.97 and attention.step < attention.steps  # and it stops early
    based_ = trained(trainer(tmp_path / "b", sweep))
    assert based_.history[-1] >= 0.9
    window = trained(trainer(tmp_path / "w", dataclasses.replace(sweep, epochs=8), "window-d32-w1"))
    assert window.history[-1] < 0.4


def test_patience(tmp_path):
    sweep = Sweep.quick(patience=2)
    t = trainer(tmp_path, sweep)
    for history, ends in [
        ([], False),
        ([0.5, 0.5], False),  # no epoch before the last two
        ([0.5, 0.5, 0.5019], True),
        ([0.5, 0.5, 0.5021], False),
        ([0.5, 0.6, 0.5], False),
        ([0.5, 0.6, 0.6, 0.5], True),
        ([0.5, 0.9991], True),  # stop_at
    ]:
        t.history = history
        assert t.finished == ends, history

    t.sweep = dataclasses.replace(sweep, patience=None)
    for history, ends in [([], False), ([0.6, 0.5, 0.5, 0.5], False), ([0.5, 0.9991], True)]:
        t.history = history
        assert t.finished == ends, history


def test_hidden_states_at_some_positions():
    model = BasedForCausalLM(Sweep.quick().candidates()[0].config)
    tokens, positions = torch.randint(0, 64, (3, 20)), torch.randint(0, 20, (3, 5))
    expected = model.hidden(tokens)[torch.arange(3)[:, None], positions]
    torch.testing.assert_close(model.hidden(tokens, positions), expected)


def test_a_damaged_state_is_named(tmp_path):
    sweep = Sweep.quick()
    trainer(tmp_path, sweep).save()
    path = tmp_path / "state.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-3])
    with pytest.raises(based.FormatError, match=r"state\.safetensors"):
        trainer(tmp_path, sweep)
    path.write_bytes(whole.replace(b"progress", b"PROGRESS"))
    with pytest.raises(based.FormatError, match=r"state\.safetensors: KeyError"):
        trainer(tmp_path, sweep)
    path.write_bytes(whole)
    with pytest.raises(based.FormatError, match=r"its tensors are not those of window-d32-w4"):
        trainer(tmp_path, sweep, "window-d32-w4")


# ---- what the runtime measures ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Sweep, Path]:
    """A sweep that has run to its end, by the command line."""
    output = tmp_path_factory.mktemp("recall") / "sweep"
    plot = output.parent / "recall.svg"
    pytest.importorskip("matplotlib")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        rates = "0.01,0.001"
        arguments = ["recall", "--quick", "-o", output, "--learning-rates", rates, "--plot", plot, "--device", "cpu"]
        assert cli.main([*map(str, arguments), "--families", THREE, "--debug"]) == 0
    return Sweep.quick(learning_rates=(0.01, 0.001), families=tuple(THREE.split(","))), output


@pytest.fixture(scope="module")
def every(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of each family, in two pieces that then are one folder."""
    folder = tmp_path_factory.mktemp("recall")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        recurrent = tuple(name for name in FAMILIES if name not in THREE)
        measure_frontier(Sweep.of(**TINY, families=recurrent), folder / "a", device="cpu")
        (row,) = measure_frontier(Sweep.of(**TINY, points=("window-*",)), folder / "b", device="cpu")
        assert row.family == "window"
        sweep = Sweep.of(**TINY)
        assert len(merge(sweep, folder / "all", [folder / "a", folder / "b"])) == len(recurrent) + 1
        measure_frontier(sweep, folder / "all", device="cpu")
    return folder


def test_results(done):
    sweep, output = done
    rows = json.loads((output / "results.json").read_text())
    assert [row["model"] for row in rows] == ["based-d32-f8", "attention-d32-w64", "window-d32-w4"]
    with (output / "results.csv").open() as file:
        table = list(csv.DictReader(file))
    candidates = {candidate.name: candidate for candidate in sweep.candidates()}
    for row, line in zip(rows, table, strict=True):
        candidate = candidates[row["model"]]
        assert set(row["accuracies"]) == {"16/2", "32/4", "64/8"} and set(row["validation"]) == {"0.01", "0.001"}
        assert row["learning_rate"] == float(max(row["validation"], key=row["validation"].get))
        assert row["accuracy"] == pytest.approx(sum(row["accuracies"].values()) / 3)
        assert row["state_nbytes"] == candidate.state_nbytes == int(line["state_nbytes"])
        assert row["authors_nbytes"] == candidate.authors_nbytes == int(line["authors_nbytes"])
        assert row["settings"] == line["settings"] == "other" and row["differences"] == sweep.differences(candidate)
        assert float(line["accuracy"]) == pytest.approx(row["accuracy"], abs=1e-6)
        assert [line["feature_dim"], line["window"]] == (
            [str(row["size"]), ""] if row["family"] == "based" else ["", str(row["size"])]
        )
    # The weights of the best learning rate are kept.
    kept = {path.parent.name for path in (output / "runs").glob("*/model")}
    assert kept == {f"{row['model']}-lr{row['learning_rate']:g}" for row in rows}
    assert len(list((output / "runs").glob("*/result.json"))) == 6


def test_the_runtime_answers_as_torch_does(done):
    sweep, output = done
    for row in json.loads((output / "results.json").read_text()):
        directory = output / row["directory"]
        assert based.load(directory, device="cpu").config.mlp is None
        model = BasedForCausalLM.load(directory)
        for examples, accuracy in zip(sweep.test_examples_of(), row["accuracies"].values(), strict=True):
            right = int(count_right(model, Texts.of(examples, CPU)))
            assert abs(accuracy * examples.answers.size - right) <= 1  # two logits may be equal up to rounding
        validated = [
            count_right(model, Texts.of(part, CPU)) / part.answers.size for part in sweep.validation_examples_of()
        ]
        assert row["validation"][f"{row['learning_rate']:g}"] == pytest.approx(float(sum(validated)) / 3)


def test_every_family_in_pieces_that_are_merged(every):
    rows = {row["family"]: row for row in json.loads((every / "all" / "results.json").read_text())}
    assert list(rows) == list(FAMILIES)
    for piece in ("a", "b"):
        for row in json.loads((every / piece / "results.json").read_text()):
            assert rows[row["family"]] == row
    with (every / "all" / "results.csv").open() as file:
        assert [line["family"] for line in csv.DictReader(file)] == list(FAMILIES)
    assert not list((every / "all" / "runs").glob(".*"))


def test_the_bytes_are_those_that_the_runtime_keeps(every, tmp_path):
    for row in json.loads((every / "all" / "results.json").read_text()):
        model = based.load(every / "all" / row["directory"], device="cpu", dtype="float32")
        assert row["state_nbytes"] == sizes.state_nbytes(model.config, "float32", 16)
        session = model.session(1)
        session.prefill([list(range(16))])
        session.save_state(tmp_path / "state")
        tensors = safetensors_numpy.load_file(tmp_path / "state")
        kept = sum(array.nbytes for name, array in tensors.items() if ".layers." in name)
        assert row["state_nbytes"] == kept, row["model"]


def test_folders_that_do_not_fit_are_not_merged(every, tmp_path):
    with pytest.raises(based.FormatError, match="holds another sweep: seed was 0, is 1"):
        merge(Sweep.of(**TINY, seed=1), tmp_path / "out", [every / "b"])
    with pytest.raises(based.FormatError, match=r"nothing has no sweep\.json, expected the folder of a sweep"):
        merge(Sweep.of(**TINY), tmp_path / "out", [tmp_path / "nothing"])
    shutil.copytree(every / "b", tmp_path / "b")
    rows = json.loads((tmp_path / "b" / "results.json").read_text())
    rows[0]["accuracy"] = 0.5
    (tmp_path / "b" / "results.json").write_text(json.dumps(rows))
    with pytest.raises(based.FormatError, match=r"window-d32-w4 has other numbers in two folders: accuracy 0\.\d+ in "):
        merge(Sweep.of(**TINY), tmp_path / "both", [every / "b", tmp_path / "b"])
    (tmp_path / "b" / "results.json").unlink()
    path = next((tmp_path / "b" / "runs").glob("*/result.json"))
    path.write_text(json.dumps(json.loads(path.read_text()) | {"accuracy": 0.5}))
    with pytest.raises(based.FormatError, match="are one run with two results"):
        merge(Sweep.of(**TINY), tmp_path / "both", [tmp_path / "b"])


def test_a_merge_that_was_killed_goes_on(every, tmp_path, monkeypatch):
    sweep, calls = Sweep.of(**TINY), itertools.count()

    def copy(source: Path, destination: Path) -> None:
        if next(calls) == 4:
            raise OSError("killed")
        Path(destination).write_bytes(Path(source).read_bytes())

    monkeypatch.setattr(frontier.shutil, "copyfile", copy)
    with pytest.raises(OSError, match="killed"):
        merge(sweep, tmp_path, [every / "all"])
    assert merge(sweep, tmp_path, [every / "all"]) == merge(sweep, every / "all", [])
    for name in ("results.csv", "results.json"):
        assert (tmp_path / name).read_bytes() == (every / "all" / name).read_bytes()
    for row in json.loads((tmp_path / "results.json").read_text()):
        assert BasedForCausalLM.load(tmp_path / row["directory"])


def test_merging_by_the_command_line(done, tmp_path, capsys):
    _, output = done
    arguments = ["recall", "--quick", "--learning-rates", "0.01,0.001", "-o", str(tmp_path / "x")]
    assert cli.main([*arguments, "--merge", str(output), "--plot", str(tmp_path / "x.svg")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'x' / 'results.csv'}\n"
    assert (tmp_path / "x" / "results.csv").read_bytes() == (output / "results.csv").read_bytes()
    assert (tmp_path / "x.svg").exists()
    assert cli.main([*arguments, "--merge", str(output), "--restart"]) == 2


def test_what_is_measured_is_the_answer_at_each_query(tmp_path):
    """A model whose answers are known: it repeats the token that it reads."""
    sweep = Sweep.quick()
    candidate = next(c for c in sweep.candidates() if c.name == "window-d32-w4")
    model = BasedForCausalLM(candidate.config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "out_proj" in name:
                parameter.zero_()
        model.embedding.weight.copy_(torch.nn.functional.normalize(torch.randn(64, 32), dim=-1))
    model.save(tmp_path / "model")
    plain = make_examples(Setting(16, 2), 300, 64, [0])
    asked = np.take_along_axis(plain.tokens, plain.queries.astype(int), axis=1)
    answers = np.where(np.arange(600).reshape(300, 2) % 3 == 0, asked, (asked + 1) % 64).astype(np.uint16)
    examples = Examples(plain.tokens, plain.queries, answers)
    repeats = BasedForCausalLM.load(tmp_path / "model")
    share = int(count_right(repeats, Texts.of(examples, CPU))) / 600
    assert measuring.accuracies(tmp_path / "model", [plain, examples], "cpu") == [
        pytest.approx(int(count_right(repeats, Texts.of(plain, CPU))) / 600),
        pytest.approx(share),
    ]
    assert share == pytest.approx(1 / 3, abs=0.03)


def test_a_finished_sweep_is_not_run_again(done, monkeypatch, capsys):
    _, output = done
    before = {path: path.stat().st_mtime_ns for path in (output / "runs").rglob("*") if path.is_file()}
    monkeypatch.setattr(frontier, "Workers", None)
    monkeypatch.setattr(frontier, "accuracies", None)
    arguments = ["recall", "--quick", "-o", str(output), "--learning-rates", "0.01,0.001", "--device", "cpu"]
    arguments += ["--families", THREE]
    assert cli.main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((output / "results.json").read_text())
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out == f"{output / 'results.csv'}\n"
    assert {path: path.stat().st_mtime_ns for path in (output / "runs").rglob("*") if path.is_file()} == before


def test_the_figure(done):
    _, output = done
    text = (output.parent / "recall.svg").read_text()
    assert text.startswith("<?xml") and "</svg>" in text
    for name, family in FAMILIES.items():
        assert (f"<!-- {family.label} -->" in text) == (name in THREE)
    assert "the paper, 2024" not in text  # these are other texts


def outcomes_of(sweep: Sweep) -> list[frontier.Outcome]:
    """As many as a sweep has; accuracies grow with the state."""
    facts: Any = {"parameters": 1, "learning_rate": 0.1, "epochs": 1, "validation": {}, "accuracies": {"64/4": 0.5}}
    return [
        frontier.Outcome(
            model=c.name,
            family=c.family,
            width=c.width,
            size=c.size,
            state_nbytes=c.state_nbytes,
            authors_nbytes=c.authors_nbytes,
            settings="ours",
            differences=[],
            accuracy=1 - 2000 / (2000 + c.state_nbytes),
            directory="",
            **facts,
        )
        for c in sweep.candidates()
    ]


@pytest.mark.parametrize(("count", "published"), [("authors", True), ("decoder", False)])
def test_the_figure_is_readable_on_a_telephone_and_in_black_and_white(count, published):
    """380 pixels wide: no letter is smaller than 9 pixels, no text covers another, no family needs its colour."""
    pytest.importorskip("matplotlib")
    drawn = figure.make_figure(outcomes_of(Sweep()), count, published=published)
    drawn.draw_without_rendering()
    pixels = 380 / drawn.get_window_extent().width * drawn.dpi / 72
    boxes, outside = [], set()  # the labels of ticks beyond an axis, which are not drawn
    for axis in itertools.chain.from_iterable((axes.xaxis, axes.yaxis) for axes in drawn.axes):
        low, high = sorted(axis.get_view_interval())
        outside |= {tick.label1 for tick in axis.get_major_ticks() if not low <= tick.get_loc() <= high}
    for text in drawn.findobj(lambda artist: hasattr(artist, "get_fontsize")):
        if text.get_visible() and text.get_text() and text not in outside:
            box = text.get_window_extent()
            if box.width and box.height:
                assert text.get_fontsize() * pixels >= 9, text
                assert drawn.bbox.x0 <= box.x0 and box.x1 <= drawn.bbox.x1, text
                boxes.append((text.get_text(), box))
    assert len(boxes) > 40
    for (one, a), (other, b) in itertools.combinations(boxes, 2):
        assert not a.overlaps(b), (one, other)
    titles = {axes.get_title(loc="left") for axes in drawn.axes}
    assert len(titles) == len(drawn.axes) and titles == {family.label for family in FAMILIES.values()}
    assert len({family.marker for family in FAMILIES.values()}) == len(FAMILIES)


def test_published_numbers_have_the_authors_bytes():
    pytest.importorskip("matplotlib")
    with pytest.raises(ValueError, match="expected count='authors'"):
        figure.make_figure(outcomes_of(Sweep()), "decoder", published=True)


def test_the_figure_draws_steps_and_sizes(tmp_path: Path) -> None:
    """No line says anything between two models: it goes right, and up where a model lies."""
    path = tmp_path / "figure.svg"
    models = [(8, 10_000, 0.3), (16, 20_000, 0.2), (24, 40_000, 0.9)]
    (plain, *_) = outcomes_of(Sweep.quick(families=("based",)))
    figure.draw(
        path,
        [
            dataclasses.replace(plain, model=f"m{f}", width=48, size=f, authors_nbytes=nbytes, accuracy=accuracy)
            for f, nbytes, accuracy in models
        ],
    )
    text = path.read_text()
    for f, _, _ in models:
        assert f"<!-- {f} -->" in text
    (line,) = re.findall(r'<path d="([^"]*)"[^>]*stroke-opacity: 0.4', text)
    points = [tuple(map(float, point)) for point in re.findall(r"[ML] ([\d.]+) ([\d.]+)", line)]
    assert len({x for x, _ in points}) == 3 and len({y for _, y in points}) == 2
    assert all(x == x2 or y == y2 for (x, y), (x2, y2) in itertools.pairwise(points))


# ---- stopped, killed, wrong ------------------------------------------------------------------------------------------

LONG = ["--quick", "--families", "attention", "--epochs", "20", "--device", "cpu", "--save-every", "0.01", "--stats"]
LONG_RUN = "attention-d32-w64-lr0.01"


@pytest.fixture(scope="module")
def long_sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an undisturbed sweep comes to."""
    output = tmp_path_factory.mktemp("recall") / "long"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        assert cli.main(["recall", *LONG, "-o", str(output)]) == 0
    return output


def start(output: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "based.cli", "recall", *LONG, "-o", str(output), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def group_is_gone(process: subprocess.Popen[str]) -> bool:
    try:
        os.killpg(process.pid, 0)
    except ProcessLookupError:
        return True
    return False


def assert_same(output: Path, expected: Path) -> None:
    for name in (f"runs/{LONG_RUN}/model/model.safetensors", "results.csv", "results.json"):
        assert (output / name).read_bytes() == (expected / name).read_bytes(), name
    found, whole = (training.read_result(folder / "runs" / LONG_RUN) for folder in (output, expected))
    assert found is not None and whole is not None
    assert dataclasses.replace(found, seconds=0) == dataclasses.replace(whole, seconds=0)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_sweep_that_was_ended_goes_on(tmp_path, long_sweep, number):
    process = start(tmp_path)
    state = tmp_path / "runs" / LONG_RUN / "state.safetensors"
    wait_until(state.exists)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    if number == signal.SIGKILL:
        assert process.returncode == -number
        wait_until(lambda: group_is_gone(process))  # who trained for it goes too
    else:
        assert process.returncode == 128 + number, err
        assert (
            err.splitlines()[-1] == f"based: stopped by {number.name} with 0 of 1 runs done; the same command goes on"
        )
    assert state.exists()
    process = start(tmp_path)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert out == f"{tmp_path / 'results.csv'}\n"
    assert_same(tmp_path, long_sweep)


def test_a_time_limit(tmp_path, long_sweep):
    parts = 0
    while True:
        process = start(tmp_path, "--time-limit", str(0.5 + 3 * parts))  # the first is too short for any machine
        _, err = process.communicate(timeout=120)
        parts += 1
        if process.returncode == 0:
            break
        assert process.returncode == 75, err
        assert "stopped by the time limit with" in err
        assert parts < 20
    assert parts > 1
    assert_same(tmp_path, long_sweep)


def test_another_sweep_in_the_folder(done, capsys):
    _, output = done
    arguments = ["recall", "--quick", "-o", str(output), "--device", "cpu"]
    assert cli.main([*arguments, "--learning-rates", "0.01,0.001", "--epochs", "3", "--seed", "4"]) == 1
    err = capsys.readouterr().err
    assert "holds another sweep: epochs was 2, is 3; seed was 0, is 4. Use another folder, or --restart" in err


def test_restart_begins_anew(tmp_path):
    Path(tmp_path / "keep").write_text("mine")
    arguments = ["recall", "--quick", "--families", "based", "-o", str(tmp_path), "--device", "cpu"]
    assert cli.main([*arguments, "--epochs", "1"]) == 0
    before = (tmp_path / "results.json").read_text()
    assert cli.main([*arguments, "--restart"]) == 0
    assert (tmp_path / "results.json").read_text() != before
    assert (tmp_path / "keep").read_text() == "mine"


@pytest.mark.parametrize("restart", [[], ["--restart"]])
@pytest.mark.parametrize("name", ["runs/mine.txt", "results.csv", "results.json"])
def test_files_of_others_stay(tmp_path, capsys, name, restart):
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_text("mine")
    arguments = ["recall", "--quick", "--families", "based", "-o", str(tmp_path), "--device", "cpu", "--epochs", "1"]
    assert cli.main([*arguments, *restart]) == 1
    found = f"{tmp_path / name.split('/')[0]}: found in a folder without a sweep.json, expected no such file or folder"
    assert found in capsys.readouterr().err
    assert file.read_text() == "mine" and not (tmp_path / "sweep.json").exists()


def test_one_process_a_folder(tmp_path, long_sweep):
    process = start(tmp_path)
    wait_until((tmp_path / "sweep.json").exists)
    with pytest.raises(based.FormatError, match="another process is training there"):
        measure_frontier(Sweep.quick(), tmp_path, device="cpu")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)


def test_a_learning_rate_that_diverges_is_not_chosen(tmp_path):
    sweep = Sweep.quick(families=("based",), learning_rates=(1e30, 1e-2), epochs=1)
    (row,) = measure_frontier(sweep, tmp_path, device="cpu")
    assert row.learning_rate == 1e-2 and row.validation["1e+30"] is None
    assert not (tmp_path / "runs" / "based-d32-f8-lr1e+30" / "model").exists()
    nothing = dataclasses.replace(sweep, learning_rates=(1e30,))
    with pytest.warns(RuntimeWarning, match="based-d32-f8: the loss of no run stayed finite: its row has no accuracy"):
        (row,) = measure_frontier(nothing, tmp_path / "nothing", device="cpu")
    assert row.accuracy is None and row.learning_rate is None and row.validation == {"1e+30": None}


def test_a_model_whose_runs_all_diverge_has_a_row_without_an_accuracy(tmp_path, capsys):
    arguments = ["--quick", "--families", "window", "--learning-rates", "1e30,1e31", "--epochs", "1", "--device", "cpu"]
    command = ["recall", "-o", str(tmp_path / "x"), *arguments, "--json"]
    for _ in range(2):  # also when there is nothing left to do
        assert cli.main(command) == 1
        captured = capsys.readouterr()
        assert captured.out == "" and "the loss of no run stayed finite: " in captured.err.splitlines()[-1]
    with (tmp_path / "x" / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert rows and all(row["accuracy"] == row["learning_rate"] == "" and row["epochs"] for row in rows)


def test_a_file_in_the_place_of_a_folder(tmp_path):
    sweep = Sweep.quick(families=("based",))
    (tmp_path / "sweep.json").write_text(json.dumps(sweep.to_json()))
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "based-d32-f8-lr0.01").write_text("no folder")
    with pytest.raises(OSError, match=r"based-d32-f8-lr0\.01") as failure:
        measure_frontier(sweep, tmp_path, device="cpu")
    assert "No" in str(failure.value) or "Not" in str(failure.value)


def test_a_process_that_fails_says_why(tmp_path):
    sweep = Sweep.quick(families=("based",))
    (tmp_path / "sweep.json").write_text(json.dumps(sweep.to_json()))
    folder = tmp_path / "runs" / "based-d32-f8-lr0.01"
    folder.mkdir(parents=True)
    (folder / "state.safetensors").write_text("nothing")
    with pytest.raises(RuntimeError, match=r"cpu: FormatError: .*state\.safetensors") as failure:
        measure_frontier(sweep, tmp_path, device="cpu")
    assert "Traceback" in failure.value.__notes__[0]


@pytest.mark.gpu
def test_on_a_gpu_a_sweep_learns_and_goes_on(tmp_path):
    """Steps are recorded, and several models train at once."""
    sweep = Sweep.quick(epochs=30, learning_rates=(3e-3, 1e-2))
    parts = 0
    while True:
        try:
            rows = measure_frontier(sweep, tmp_path, device="cuda:0", parallel=4, time_limit=15, save_every=1)
            break
        except Paused:
            parts += 1
            assert parts < 20
    attention = next(row for row in rows if row.family == "attention")
    assert attention.accuracy > 0.5


def test_a_process_that_dies_is_noticed(tmp_path, monkeypatch):
    class Dying(workers.Workers):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            multiprocessing.active_children()[0].kill()

    monkeypatch.setattr(frontier, "Workers", Dying)
    with pytest.raises(RuntimeError, match=r"a training process died; exit statuses are \[-9\]"):
        measure_frontier(Sweep.quick(families=("based",)), tmp_path, device="cpu")


@pytest.mark.parametrize("name", ["sweep.json", "results.json"])
def test_damaged_files_are_named(tmp_path, name):
    (tmp_path / name).write_text("{")
    with pytest.raises(based.FormatError, match=name.replace(".", r"\.")):
        measure_frontier(Sweep.quick(), tmp_path, device="cpu")


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--widths", "x"], 2, "'x' is no list of int values"),
        (["--windows", "64"], 2, "windows has 64, expected less than 64"),
        (["--families", "based,rnn"], 2, "families has 'rnn'"),
        (["--epochs", "0"], 2, "0 is not ≥ 1"),
        (["--time-limit", "0"], 2, "0 is not a number > 0"),
        (["--device", "cuda:77"], 1, "device is cuda:77: PyTorch finds"),
        (["--device", "tpu"], 1, "device is tpu: PyTorch finds"),
        (["--plot", "x.txt"], 2, "x.txt is none of"),
        (["--plot-bytes", "decoder"], 2, "--plot-bytes is of the figure that --plot draws"),
        (["--settings", "theirs"], 2, "'theirs'"),
        (["--points", "based-d9-f8"], 2, "points has 'based-d9-f8', expected names"),
    ],
)
def test_wrong_arguments(tmp_path, capsys, arguments: Sequence[str], status, message):
    assert cli.main(["recall", "--quick", "-o", str(tmp_path / "new"), *arguments]) == status
    captured = capsys.readouterr()
    assert message in captured.err and captured.out == ""
    assert not (tmp_path / "new").exists()


def test_paused_is_no_success():
    assert not issubclass(Paused, (OSError, ValueError, RuntimeError))
