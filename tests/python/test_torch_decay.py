"""Linear attention with decays in chunks, against the recurrence in float64; the models of it, from training to the
runtime."""

import json
import re

import based
import numpy as np
import pytest
from based import sizes

torch = pytest.importorskip("torch")
torch.set_num_threads(1)

from based.torch import BasedForCausalLM
from based.torch._decay import decayed_linear_attention

from tests.reference.compare import rel_l2
from tests.reference.files import read_safetensors
from tests.reference.model import Model
from tests.reference.torch_model import decayed_reference

FORMS = pytest.mark.parametrize(("by_rows", "reads"), [(False, False), (True, False), (True, True), (False, True)])


def inputs(t, by_rows, reads=False, d_k=5, d_v=7, dtype=torch.float64, strength=1.0, heads=3, sequences=2):
    """q, k, v and log α; with `reads` also p of length 1, and b, which takes a part of it away; and a state."""
    generator = torch.Generator().manual_seed(t)

    def draw(*shape):
        return torch.randn(sequences, *shape, generator=generator, dtype=torch.float64)

    parts = {"q": draw(t, heads, d_k), "k": draw(t, heads, d_k), "v": draw(t, heads, d_v)}
    parts["log_alpha"] = -draw(t, heads, *[d_k] * by_rows).exp() * strength
    parts["initial_state"] = draw(heads, d_k, d_v)
    if reads:
        parts["p"] = torch.nn.functional.normalize(draw(t, heads, d_k), dim=-1)
        parts["b"] = -parts["p"] * draw(t, heads, d_k).sigmoid()
    return {name: x.to(dtype).requires_grad_() for name, x in parts.items()}


def reference(parts):
    return decayed_reference(**{"before" if name == "initial_state" else name: x for name, x in parts.items()})


@FORMS
@pytest.mark.parametrize(("t", "chunk_size"), [(1, None), (2, 1), (37, 8), (64, 16), (130, None)])
def test_it_is_the_recurrence_and_so_are_its_gradients(t, chunk_size, by_rows, reads):
    parts = inputs(t, by_rows, reads)
    results = []
    for y, s in (decayed_linear_attention(**parts, chunk_size=chunk_size), reference(parts)):
        torch.manual_seed(0)
        loss = (y * torch.randn(y.shape, dtype=y.dtype)).sum() + (s * torch.randn(s.shape, dtype=s.dtype)).sum()
        results.append((y, s, *torch.autograd.grad(loss, list(parts.values()))))
    for found, expected in zip(*results, strict=True):
        assert (found - expected).norm() <= 1e-12 * expected.norm()


@FORMS
def test_it_goes_on_from_a_state(by_rows, reads):
    parts = inputs(50, by_rows, reads)
    state = parts.pop("initial_state")
    whole, last = decayed_linear_attention(**parts, initial_state=state)
    first, between = decayed_linear_attention(**{name: x[:, :21] for name, x in parts.items()}, initial_state=state)
    rest, end = decayed_linear_attention(**{name: x[:, 21:] for name, x in parts.items()}, initial_state=between)
    assert (torch.cat([first, rest], 1) - whole).abs().max() <= 1e-12
    assert (end - last).abs().max() <= 1e-12


@FORMS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_its_sums_are_float32_at_least(dtype, by_rows, reads):
    parts = inputs(100, by_rows, reads, dtype=dtype)
    y, s = decayed_linear_attention(**parts)
    assert y.dtype == dtype and s.dtype == torch.float32
    expected, _ = reference(parts)
    assert (y.double() - expected).norm() <= (1e-5 if dtype == torch.float32 else 4e-3) * expected.norm()


@FORMS
@pytest.mark.parametrize("strength", [1e-4, 1e3])
def test_strong_and_weak_decays(strength, by_rows, reads):
    """e^1000 has no float32: a product of γ_t and 1/γ_j would be no number."""
    parts = inputs(300, by_rows, reads, dtype=torch.float32, strength=strength)
    y, s = decayed_linear_attention(**parts)
    for found, expected in zip((y, s), reference(parts), strict=True):
        assert (found - expected).norm() <= 1e-5 * expected.norm()
    gradients = torch.autograd.grad(y.sum() + s.sum(), list(parts.values()))
    assert all(x.isfinite().all() for x in gradients)


@FORMS
def test_gradcheck(by_rows, reads):
    parts = inputs(5, by_rows, reads, d_k=2, d_v=2, heads=1, sequences=1)
    names = list(parts)
    function = lambda *x: decayed_linear_attention(**dict(zip(names, x, strict=True)), chunk_size=3)  # noqa: E731
    assert torch.autograd.gradcheck(function, tuple(parts.values()))
    assert torch.autograd.gradgradcheck(function, tuple(parts.values()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 4, 3, 6)}, "q has shape (2, 4, 3, 6), expected (2, 4, 3, 5)"),
        ({"v": torch.zeros(2, 3, 3, 7)}, "v has shape (2, 3, 3, 7), expected (2, 4, 3, 7)"),
        ({"log_alpha": torch.zeros(2, 4, 1)}, "log_alpha has shape (2, 4, 1), expected (2, 4, 3)"),
        ({"log_alpha": torch.zeros(2, 4, 3, 7)}, "log_alpha has shape (2, 4, 3, 7), expected (2, 4, 3, 5)"),
        ({"initial_state": torch.zeros(2, 3, 7, 5)}, "initial_state has shape (2, 3, 7, 5), expected (2, 3, 5, 7)"),
        ({"p": torch.zeros(2, 4, 3, 7)}, "p has shape (2, 4, 3, 7), expected (2, 4, 3, 5)"),
        ({"p": torch.zeros(2, 4, 3, 5)}, "b is None, expected p and b, or none of them"),
        ({"b": torch.zeros(2, 4, 3, 5)}, "p is None, expected p and b, or none of them"),
        ({"chunk_size": 0}, "chunk_size is 0, expected ≥ 1"),
    ],
)
def test_bad_input(change, message):
    arguments = {
        "q": torch.zeros(2, 4, 3, 5),
        "k": torch.zeros(2, 4, 3, 5),
        "v": torch.zeros(2, 4, 3, 7),
        "log_alpha": torch.zeros(2, 4, 3),
    }
    with pytest.raises(ValueError, match=re.escape(message)):
        decayed_linear_attention(**arguments | change)


# ---- models ----------------------------------------------------------------------------------------------------------

LAYERS = {
    "mamba2": {
        "mixer": "mamba2",
        "num_heads": 4,
        "head_dim": 8,
        "state_size": 8,
        "num_groups": 2,
        "kernel_size": 4,
        "eps": 1e-5,
        "conv_bias": True,
    },
    "gated_linear_attention": {
        "mixer": "gated_linear_attention",
        "num_heads": 2,
        "key_dim": 8,
        "head_dim": 8,
        "gate_rank": 16,
        "gate_normalizer": 16.0,
        "eps": 1e-5,
    },
    "rwkv7": {
        "mixer": "rwkv7",
        "hidden_size": 16,
        "num_heads": 2,
        "head_dim": 8,
        "decay_rank": 4,
        "rate_rank": 4,
        "gate_rank": 4,
        "eps": 64e-5,
    },
}


def model_of(*layers, hidden_size=16, inner_size=0):
    config = sizes.recipe("c", hidden_size, 1, inner_size, vocab_size=32, end_token_id=None) | {"layers": layers}
    return BasedForCausalLM(based.ModelConfig.from_json(json.dumps(config)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_model_is_trained_and_goes_to_the_runtime(kind, dtype, tmp_path):
    """Each token is the one that stood seven before it: of the models, only the state knows that one."""
    torch.manual_seed(0)
    model = model_of(LAYERS[kind], LAYERS[kind], inner_size=24)
    tokens = torch.arange(40).remainder(7).expand(4, 40).contiguous()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = model(tokens, labels=tokens)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.3 * losses[0]
    model.save(tmp_path / "model", dtype=dtype)

    runtime, trained = based.load(tmp_path / "model", dtype="float32"), BasedForCausalLM.load(tmp_path / "model")
    row = tokens[0].numpy()
    with torch.no_grad():
        expected = trained(tokens[:1])[0].double().numpy()
    assert rel_l2(runtime.forward(row, include_padding=True), expected) <= 2e-5
    session = runtime.session()
    steps = [np.asarray(session.prefill([row[:9].tolist()]))[0]]
    steps += [np.asarray(session.step([token]))[0] for token in row[9:].tolist()]
    assert rel_l2(np.stack(steps), expected[8:, :32]) <= 2e-5
    assert rel_l2(Model.load(tmp_path / "model").forward(row).logits, expected) <= 2e-5
    (output,) = runtime.generate([row[:9].tolist()], based.SamplingParams(max_tokens=20, temperature=0))
    assert output.outputs[0].token_ids == [t % 7 for t in range(9, 29)]

    stored = read_safetensors(tmp_path / "model" / "model.safetensors")
    wide = ("A_log", "D", "dt_bias")
    assert {name: bits for name, (bits, _) in stored.items()} == {
        name: "float32" if name.endswith(wide) else dtype for name in stored
    }


def test_initialisation_of_mamba2():
    """As mamba_ssm: steps of 0.001 … 0.1, −A uniform in 1 … 16, D = 1; W_out over √L, where no MLP follows."""
    torch.manual_seed(0)
    layer = LAYERS["mamba2"] | {"num_heads": 200, "head_dim": 2}
    mixer = model_of(layer, layer, layer, hidden_size=64).layers[1].mixer
    steps = torch.nn.functional.softplus(mixer.dt_bias).log10()
    assert steps.min() >= -3.001 and steps.max() <= -0.999 and abs(steps.mean() + 2) < 0.2
    rates = mixer.A_log.exp()
    assert 1 <= rates.min() < 1.5 and 15.5 < rates.max() <= 16.001 and abs(rates.mean() - 8.5) < 1
    assert torch.equal(mixer.D, torch.ones(200)) and torch.equal(mixer.norm.weight, torch.ones(400))
    for weight, bound in (
        (mixer.xbc_proj.weight, 64**-0.5),
        (mixer.z_proj.weight, 64**-0.5),
        (mixer.dt_proj.weight, 64**-0.5),
        (mixer.conv.weight, 4**-0.5),
        (mixer.conv.bias, 4**-0.5),
        (mixer.out_proj.weight, (400 * 3) ** -0.5),
    ):
        assert 0.95 * bound < weight.abs().max() <= bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_initialisation_of_rwkv7(dtype):
    """As the authors' first layer: decays from near 1 to e^−0.6, low ranks that bring nothing yet, a result of 0."""
    torch.manual_seed(0)
    layer = LAYERS["rwkv7"] | {"hidden_size": 64, "head_dim": 32, "gate_rank": 80}
    config = model_of(layer, hidden_size=64).config
    mixer = BasedForCausalLM(config, dtype=dtype).layers[0].mixer
    decays = (-np.exp(-0.5) * torch.sigmoid(mixer.w_up_proj.bias.float())).exp()
    assert decays[0] > 0.999 and decays[-1] < 0.57 and (decays > 0.99).sum() > 10
    for part in "wag":
        assert not getattr(mixer, f"{part}_down_proj").weight.any()
    for up, gain in ((mixer.w_up_proj, 0.1), (mixer.g_up_proj, 0.1 * (80 / 64) ** 0.5)):
        singular = torch.linalg.svdvals(up.weight.detach().float())
        assert torch.allclose(singular, torch.full_like(singular, gain), rtol=2e-2)
    assert mixer.mix_r[0] == 1 and mixer.mix_w[-1] < 0.02 and not mixer.out_proj.weight.any()
    assert torch.equal(mixer.norm.weight.float(), torch.ones(64)) and not mixer.norm.bias.any()
    assert 0.9 * 0.05 / 8 < mixer.k_proj.weight.abs().max() <= 0.051 / 8
