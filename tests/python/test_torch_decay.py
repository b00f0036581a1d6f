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

BY_ROWS = pytest.mark.parametrize("by_rows", [False, True])


def inputs(t, by_rows, d_k=5, d_v=7, dtype=torch.float64, strength=1.0):
    generator = torch.Generator().manual_seed(t)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    q, k, v, state = draw(2, t, 3, d_k), draw(2, t, 3, d_k), draw(2, t, 3, d_v), draw(2, 3, d_k, d_v)
    log_alpha = -draw(2, t, 3, *[d_k] * by_rows).exp() * strength
    return [x.to(dtype).requires_grad_() for x in (q, k, v, log_alpha, state)]


def run(parts, **options):
    *operands, state = parts
    return decayed_linear_attention(*operands, initial_state=state, **options)


@BY_ROWS
@pytest.mark.parametrize(("t", "chunk_size"), [(1, None), (2, 1), (37, 8), (64, 16), (130, None)])
def test_it_is_the_recurrence_and_so_are_its_gradients(t, chunk_size, by_rows):
    parts = inputs(t, by_rows)
    results = []
    for y, s in (run(parts, chunk_size=chunk_size), decayed_reference(*parts)):
        torch.manual_seed(0)
        loss = (y * torch.randn(y.shape, dtype=y.dtype)).sum() + (s * torch.randn(s.shape, dtype=s.dtype)).sum()
        results.append((y, s, *torch.autograd.grad(loss, parts)))
    for found, expected in zip(*results, strict=True):
        assert (found - expected).norm() <= 1e-12 * expected.norm()


@BY_ROWS
def test_it_goes_on_from_a_state(by_rows):
    *operands, state = inputs(50, by_rows)
    whole, last = run([*operands, state])
    first, between = run([*(x[:, :21] for x in operands), state])
    rest, end = run([*(x[:, 21:] for x in operands), between])
    assert (torch.cat([first, rest], 1) - whole).abs().max() <= 1e-12
    assert (end - last).abs().max() <= 1e-12


@BY_ROWS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_its_sums_are_float32_at_least(dtype, by_rows):
    parts = inputs(100, by_rows, dtype=dtype)
    y, s = run(parts)
    assert y.dtype == dtype and s.dtype == torch.float32
    expected, _ = decayed_reference(*parts)
    assert (y.double() - expected).norm() <= (1e-5 if dtype == torch.float32 else 4e-3) * expected.norm()


@BY_ROWS
@pytest.mark.parametrize("strength", [1e-4, 1e3])
def test_strong_and_weak_decays(strength, by_rows):
    """e^1000 has no float32: a product of γ_t and 1/γ_j would be no number."""
    parts = inputs(300, by_rows, dtype=torch.float32, strength=strength)
    y, s = run(parts)
    for found, expected in zip((y, s), decayed_reference(*parts), strict=True):
        assert (found - expected).norm() <= 1e-5 * expected.norm()
    assert all(x.isfinite().all() for x in torch.autograd.grad(y.sum() + s.sum(), parts))


@BY_ROWS
def test_gradcheck(by_rows):
    one = [x[:1, :, :1, :2].detach().requires_grad_() for x in inputs(5, by_rows)[: 4 if by_rows else 3]]
    if not by_rows:
        one.append(inputs(5, by_rows)[3][:1, :, :1].detach().requires_grad_())
    start = inputs(5, by_rows)[4][:1, :1, :2, :2].detach().requires_grad_()
    function = lambda *parts: run(parts, chunk_size=3)  # noqa: E731
    assert torch.autograd.gradcheck(function, (*one, start))
    assert torch.autograd.gradgradcheck(function, (*one, start))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 4, 3, 6)}, "q has shape (2, 4, 3, 6), expected (2, 4, 3, 5)"),
        ({"v": torch.zeros(2, 3, 3, 7)}, "v has shape (2, 3, 3, 7), expected (2, 4, 3, 7)"),
        ({"log_alpha": torch.zeros(2, 4, 1)}, "log_alpha has shape (2, 4, 1), expected (2, 4, 3)"),
        ({"log_alpha": torch.zeros(2, 4, 3, 7)}, "log_alpha has shape (2, 4, 3, 7), expected (2, 4, 3, 5)"),
        ({"initial_state": torch.zeros(2, 3, 7, 5)}, "initial_state has shape (2, 3, 7, 5), expected (2, 3, 5, 7)"),
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
