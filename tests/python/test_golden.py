"""The golden cases: what the authors' code computes, on every instruction set that this machine has.

Tolerances are those of golden/README.md.
"""

import subprocess
import sys
from pathlib import Path

import based
import numpy as np
import pytest

from tests.reference.compare import max_abs, rel_l2

GOLDEN = Path(__file__).parent.parent / "golden"
CASES = ["based-tiny", "based-tiny-bf16", "attn-tiny", "mamba-tiny"]
ISAS = based.build_info()["instruction_sets"]
NUM_NEW = 24  # greedy tokens


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """Directory of a case, by (case, route): as published, or after `based convert`."""
    found = {(case, "published"): GOLDEN / case for case in CASES}
    for case in CASES:
        found[case, "converted"] = tmp_path_factory.mktemp("converted") / case
        command = [sys.executable, "-m", "based.cli", "convert", GOLDEN / case, found[case, "converted"]]
        subprocess.run(command, check=True, capture_output=True)
    return found


@pytest.fixture(
    scope="module", params=[(isa, threads) for isa in ISAS for threads in (1, 2)], ids="{0[0]}-{0[1]}".format
)
def load(request, directories):
    """load(case, route, dtype), on each instruction set with 1 and 2 threads."""
    isa, threads = request.param

    def get(case: str, route: str, dtype: str) -> based.Model:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("BASED_CPU_ISA", isa)  # read when a model is loaded
            try:
                model = based.load(directories[case, route], dtype=dtype, num_threads=threads)
            except based.UnsupportedError as error:
                pytest.skip(str(error))
        assert (model.kernel_isa, model.num_threads, model.dtype) == (isa, threads, dtype)
        return model

    return get


def decode(model: based.Model, prompts, ids) -> np.ndarray:
    """Logits (B, 24, padded_vocab_size) after the prompts (B, n), then after each of ids (B, n + 24) but the last."""
    session = model.session(len(prompts))
    logits = [session.prefill(list(prompts), include_padding=True)]
    logits += [session.step(column, include_padding=True) for column in ids.T[prompts.shape[1] : -1]]
    return np.stack(logits, axis=1)


def assert_float32(found, expected) -> None:
    assert rel_l2(found, expected) <= 2e-5
    assert max_abs(found, expected) <= 5e-4


def assert_bfloat16(found, expected) -> None:
    assert rel_l2(found, expected) <= 4e-2
    assert np.quantile(np.abs(found - expected), 0.999) <= 0.4
    assert (found.argmax(-1) == expected.argmax(-1)).mean() >= 0.9


CHECKS = {"float32": assert_float32, "bfloat16": assert_bfloat16}


@pytest.mark.parametrize("dtype", CHECKS)
@pytest.mark.parametrize("route", ["published", "converted"])
@pytest.mark.parametrize("case", CASES)
def test_logits(load, golden, case, route, dtype):
    model, expected = load(case, route, dtype), golden(case)
    found = np.stack([model.forward(ids, include_padding=True) for ids in expected["input_ids"]])
    CHECKS[dtype](found, expected["logits"])
    CHECKS[dtype](decode(model, expected["input_ids"], expected["greedy_ids"]), expected["decode_logits"])


@pytest.mark.parametrize(
    ("case", "file", "suffix"),
    [(case, "golden", "") for case in CASES] + [("based-tiny", "short", f"_{n}") for n in (1, 2, 3)],
)
def test_greedy_ids(load, golden, case, file, suffix):
    expected = golden(case, file)
    prompts, ids = expected[f"input_ids{suffix}"], expected[f"greedy_ids{suffix}"]
    model = load(case, "published", "float32")
    outputs = model.generate(prompts, based.SamplingParams(max_tokens=NUM_NEW, temperature=0))
    assert [output.prompt_token_ids + output.outputs[0].token_ids for output in outputs] == ids.tolist()
    for dtype, check in CHECKS.items():
        check(decode(load(case, "published", dtype), prompts, ids), expected[f"decode_logits{suffix}"])


def test_layers(load, golden):
    expected = golden("based-tiny", "layers")
    for dtype, tolerance in (("float32", 2e-5), ("bfloat16", 4e-2)):
        trace = load("based-tiny", "converted", dtype).trace(expected["input_ids"], include_padding=True)
        assert set(trace) == {"embed", "mixer_out", "block_out", "final_norm", "logits"}
        for name, values in trace.items():
            by_layer = name in ("mixer_out", "block_out")
            pairs = zip(values, expected[name], strict=True) if by_layer else [(values, expected[name])]
            for layer, (a, b) in enumerate(pairs):
                assert rel_l2(a, b) <= tolerance, (name, layer)
                assert dtype == "bfloat16" or max_abs(a, b) <= 5e-4, (name, layer)


def test_unknown_instruction_set(monkeypatch):
    monkeypatch.setenv("BASED_CPU_ISA", "mmx")
    with pytest.raises(based.UnsupportedError, match='BASED_CPU_ISA is "mmx": this build on this machine has baseline'):
        based.load(GOLDEN / "based-tiny")


def test_instruction_set_is_chosen_when_a_model_is_loaded(golden, monkeypatch):
    """Sessions and states of one model share its kernels, whatever the variable says later."""
    ids = golden("based-tiny")["input_ids"][0]
    model = based.load(GOLDEN / "based-tiny", dtype="bfloat16")
    expected = model.session().prefill(ids)
    for isa in [*ISAS, "mmx"]:
        monkeypatch.setenv("BASED_CPU_ISA", isa)
        np.testing.assert_array_equal(model.session().prefill(ids), expected)


def test_states_move_between_instruction_sets(load, golden, tmp_path):
    """A state saved under one goes on under any other."""
    expected = golden("based-tiny")
    prompt, ids = expected["input_ids"][:1], expected["greedy_ids"][:1]
    path = tmp_path / "state.safetensors"
    session = based.load(GOLDEN / "based-tiny").session()
    session.prefill(list(prompt))
    session.save_state(path)
    other = load("based-tiny", "published", "float32").session()
    other.load_state(path)
    steps = [other.step(column, include_padding=True) for column in ids.T[prompt.shape[1] : -1]]
    assert_float32(np.stack(steps, axis=1), expected["decode_logits"][:1, 1:])
