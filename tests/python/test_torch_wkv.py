"""The sums of RWKV-4 against the recurrence in float64, forward and backward; the weights that training begins with."""

import json
import math
import re

import pytest

torch = pytest.importorskip("torch")
torch.set_num_threads(1)

import based
import numpy as np
from based import sizes
from based.torch import BasedForCausalLM
from based.torch._wkv import wkv

from tests.reference.torch_model import rwkv4_reference
from tests.reference.trained import check_training_and_runtime


def inputs(t, e=5, dtype=torch.float64, spread=1.0):
    generator = torch.Generator().manual_seed(t)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    parts = [spread * draw(2, t, e), draw(2, t, e), -draw(e).exp(), draw(e)]
    return [x.to(dtype).requires_grad_() for x in parts]


@pytest.mark.parametrize("spread", [1.0, 100.0])  # e^100 and e^−100 in one sum
@pytest.mark.parametrize(("t", "chunk_size"), [(1, 256), (2, 1), (37, 8), (64, 16), (130, 64), (100, 256)])
def test_wkv(t, chunk_size, spread):
    parts = inputs(t, spread=spread)
    dy = torch.randn(2, t, 5, dtype=torch.float64)
    results = []
    for y in (wkv(*parts, chunk_size=chunk_size), rwkv4_reference(*parts)):
        found = torch.autograd.grad(y, parts, dy, allow_unused=True)
        results.append((y, *(torch.zeros(()) if gradient is None else gradient for gradient in found)))
    for found, expected in zip(*results, strict=True):
        assert found.isfinite().all()
        assert (found - expected).norm() <= 1e-11 * expected.norm() + (1e-13 if t < 3 else 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_its_sums_are_float32_at_least(dtype):
    parts = inputs(300, dtype=dtype)
    y = wkv(*parts)
    assert y.dtype == dtype
    expected = rwkv4_reference(*parts)
    assert (y.double() - expected).norm() <= (1e-5 if dtype == torch.float32 else 4e-3) * expected.norm()


def test_a_decay_of_zero_is_the_mean_weighted_by_e_to_the_k():
    k, v, _, first = inputs(50)
    y = wkv(k, v, torch.zeros_like(first), torch.zeros_like(first))
    assert torch.allclose(y, (k.exp() * v).cumsum(1) / k.exp().cumsum(1), rtol=1e-12)


def test_gradcheck():
    parts = [x[:1].detach().requires_grad_() if x.ndim == 3 else x for x in inputs(5, 2)]
    function = lambda *x: wkv(*x, chunk_size=3)  # noqa: E731
    assert torch.autograd.gradcheck(function, parts)
    assert torch.autograd.gradgradcheck(function, parts)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"v": torch.zeros(2, 4, 6)}, "v has shape (2, 4, 6), expected (2, 4, 5)"),
        ({"decay": torch.zeros(4)}, "decay has shape (4,), expected (5,)"),
        ({"first": torch.zeros(1, 5)}, "first has shape (1, 5), expected (5,)"),
        ({"k": torch.zeros(4, 5)}, "v has shape (2, 4, 5), expected (4, 5)"),
        ({"chunk_size": 0}, "chunk_size is 0, expected ≥ 1"),
    ],
)
def test_bad_input(change, message):
    arguments = {"k": torch.zeros(2, 4, 5), "v": torch.zeros(2, 4, 5), "decay": torch.zeros(5), "first": torch.zeros(5)}
    with pytest.raises(ValueError, match=re.escape(message)):
        wkv(**arguments | change)


def config_of(num_layers, d=6, e=8):
    layer = {"mixer": "rwkv4", "hidden_size": d, "inner_size": e}
    shape = sizes.recipe("c", d, 1, 9, vocab_size=20, end_token_id=None) | {"layers": [layer] * num_layers}
    return based.ModelConfig.from_json(json.dumps(shape))


def test_first_weights_are_the_published_ones():
    """Written out for each number, as the authors' code has them."""
    for num_layers in (1, 3):
        model = BasedForCausalLM(config_of(num_layers))
        for i in range(num_layers):
            mixer = model.layers[i].mixer
            late, share = i / max(1, num_layers - 1), 1 - i / num_layers
            decay = [-5 + 8 * (c / 7) ** (0.7 + 1.3 * late) for c in range(8)]
            first = [math.log(0.3) + ((c + 1) % 3 - 1) * 0.5 for c in range(8)]
            mix = [(c / 6) ** share for c in range(6)]
            expected = {
                "time_decay": decay,
                "time_first": first,
                "time_mix_k": mix,
                "time_mix_v": [x + 0.3 * late for x in mix],
                "time_mix_r": [(c / 6) ** (0.5 * share) for c in range(6)],
            }
            for name, values in expected.items():
                np.testing.assert_allclose(getattr(mixer, name).detach().numpy(), values, rtol=1e-5, atol=1e-6)


def test_a_trained_model_runs_in_the_runtime(tmp_path):
    check_training_and_runtime(config_of(2), tmp_path)
