"""H3 and Hyena: long convolutions, filters against their definitions, first weights, training, and its limit."""

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
from based.torch._long_conv import hyena_filter, long_conv, s4d_taps, shift_taps

from tests.reference.trained import check_training_and_runtime

H3 = {"mixer": "h3", "num_heads": 4, "head_dim": 2, "kernel_size": 5, "num_modes": 3}
HYENA = {"mixer": "hyena", "inner_size": 8, "kernel_size": 3, "max_length": 48, "filter_size": 6}
KINDS = pytest.mark.parametrize("layer", [H3, HYENA], ids=lambda layer: layer["mixer"])


def draw(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def config_of(layer, num_layers=2, d=6):
    shape = sizes.recipe("c", d, 1, 9, vocab_size=20, end_token_id=None) | {"layers": [layer] * num_layers}
    return based.ModelConfig.from_json(json.dumps(shape))


def error(found, expected):
    return float(((found.double() - expected).norm() / expected.norm()).detach())


# ---- operations ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("t", "taps"), [(1, 1), (2, 5), (37, 4), (64, 64), (65, 65), (100, 1)])
def test_long_conv(t, taps, dtype):
    x, h = draw(2, t, 3, dtype=dtype), draw(taps, 3, seed=1, dtype=dtype)
    y = long_conv(x, h)
    assert y.dtype == torch.promote_types(dtype, torch.float32)
    wide, k = x.detach().double(), h.detach().double()
    expected = torch.stack(
        [sum(k[i] * wide[:, n - i] for i in range(min(taps, n + 1))) for n in range(t)],  # type: ignore[misc]
        1,
    )
    assert error(y, expected) <= (1e-14 if dtype == torch.float64 else 1e-6)


def test_long_conv_shares_taps():
    x, h = draw(2, 20, 3, 2, 2), draw(20, 3, seed=1)
    y = long_conv(x, h[..., None, None])
    for i in range(2):
        assert error(y[..., i, 1], long_conv(x[..., i, 1], h).detach()) <= 1e-14


def test_a_convolution_that_is_none():
    for x, taps in ((torch.zeros(2, 3), torch.zeros(2, 3)), (torch.zeros(2, 0, 3), torch.zeros(1, 3))):
        with pytest.raises(ValueError, match=re.escape(f"taps has shape {tuple(taps.shape)}, expected (K, …)")):
            long_conv(x, taps)


def test_shift_taps():
    b, c = draw(3, 4), draw(3, 4, seed=1)
    taps = shift_taps(b, c)
    for i in range(4):
        for e in range(3):
            assert torch.isclose(taps[i, e], sum(b[e, n] * c[e, n + i] for n in range(4 - i)), rtol=1e-13)
    first = torch.zeros(3, 4)
    first[:, 0] = 1
    assert torch.equal(shift_taps(first, c.float()), c.float().T)


def modes(h, m, dtype=torch.float64):
    return [draw(*shape, seed=i, dtype=dtype) for i, shape in enumerate(((h,), (h, m), (h, m), (h, m, 2), (h, m, 2)))]


def test_s4d_taps_are_those_of_the_recurrence():
    log_dt, a_log, a_imag, b, c = parts = modes(2, 3)
    step = log_dt.exp()[:, None]
    a = torch.complex(-a_log.exp(), a_imag)
    decay, weight = (1 + step * a / 2) / (1 - step * a / 2), step / (1 - step * a / 2)
    x, expected = weight * torch.view_as_complex(b), []
    for _ in range(50):
        expected.append(2 * (torch.view_as_complex(c) * x).real.sum(-1))
        x = decay * x
    assert error(s4d_taps(*parts, 50), torch.stack(expected).detach()) <= 1e-13


def test_s4d_keeps_its_digits_over_many_taps():
    """Slow modes that turn fast: in float32 the angle of the 4,000th tap would be wrong in its fourth digit."""
    parts = [part.detach().clone() for part in modes(2, 16)]
    parts[0].fill_(math.log(0.01))
    parts[1].fill_(math.log(0.001))
    parts[2] *= 300
    narrow = [part.float() for part in parts]
    expected = s4d_taps(*(part.double() for part in narrow), 4000)
    assert error(s4d_taps(*narrow, 4000), expected) <= 1e-6


def test_a_mode_that_decays_at_once():
    """z = −1."""
    zero, one = torch.zeros(1, dtype=torch.float64), torch.tensor([[[1.0, 0.0]]], dtype=torch.float64)
    a_log = torch.full((1, 1), math.log(2), dtype=torch.float64, requires_grad=True)
    taps = s4d_taps(zero, a_log, zero[:, None], one, one, 4)
    assert torch.allclose(taps[:, 0], torch.tensor([1.0, 0, 0, 0], dtype=torch.float64), atol=1e-12)
    assert torch.autograd.grad(taps.sum(), a_log)[0].isfinite().all()


def filter_parts(f=4, e=3):
    shapes = [(f, 3), (f,), (f, f), (f,), (f, f), (f,), (e, f), (f,)]
    return [draw(*shape, seed=i) for i, shape in enumerate(shapes)]


def test_hyena_filter():
    w1, b1, w2, b2, w3, b3, w4, freq = parts = [part.detach() for part in filter_parts()]
    found = hyena_filter(*parts, 10, 7)
    for n in range(7):
        time, angle = n / 9, 1e-4 * 2 * math.pi * n / 10
        x = torch.tensor([time, math.cos(angle), -math.sin(angle)], dtype=torch.float64)
        for w, b in ((w1, b1), (w2, b2), (w3, b3)):
            x = torch.sin(freq * (w @ x + b))
        slow, fast = -math.log(0.01) / 1.5, -math.log(0.01) / 0.3
        decay = torch.tensor([math.exp(-time * d) for d in (slow, (slow + fast) / 2, fast)], dtype=torch.float64)
        assert torch.allclose(found[n], (w4 @ x) * decay, rtol=1e-12)
    assert hyena_filter(*parts, 1, 1).isfinite().all()


@pytest.mark.parametrize(
    ("function", "inputs"),
    [
        (long_conv, [draw(2, 6, 2), draw(4, 2, seed=1)]),
        (shift_taps, [draw(2, 4), draw(2, 4, seed=1)]),
        (lambda *parts: s4d_taps(*parts, 6), modes(2, 2)),
        (lambda *parts: hyena_filter(*parts, 8, 6), filter_parts(3, 2)),
    ],
    ids=["long_conv", "shift_taps", "s4d_taps", "hyena_filter"],
)
def test_gradcheck(function, inputs):
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


# ---- models ----------------------------------------------------------------------------------------------------------


def test_first_weights_of_h3():
    torch.manual_seed(0)
    layer = H3 | {"num_heads": 500, "kernel_size": 16, "num_modes": 8}
    mixer = BasedForCausalLM(config_of(layer, 1)).layers[0].mixer.requires_grad_(False)
    assert torch.equal(mixer.shift_B, torch.eye(16)[0].expand(1000, 16))
    assert mixer.shift_C.abs().max() <= 0.25 and abs(float(mixer.shift_C.std()) - 0.25 / math.sqrt(3)) < 0.003
    for part in (mixer.shift_D, mixer.D):
        assert abs(float(part.std()) - 1) < 0.1
    assert math.log(0.001) <= mixer.log_dt.min() < -6.5 and -2.7 < mixer.log_dt.max() <= math.log(0.1)
    assert torch.allclose(mixer.A_log.exp(), torch.tensor(0.5))
    assert torch.allclose(mixer.A_imag, math.pi * torch.arange(8.0).expand(500, 8))
    assert torch.equal(mixer.B, torch.tensor([1.0, 0.0]).expand(500, 8, 2))
    assert abs(float(mixer.C.square().sum(-1).mean()) - 1) < 0.05


def test_first_weights_of_hyena():
    torch.manual_seed(0)
    mixer = (
        BasedForCausalLM(config_of(HYENA | {"inner_size": 500, "filter_size": 64}, 1))
        .layers[0]
        .mixer.requires_grad_(False)
    )
    bound = 3**-0.5
    for part in (mixer.conv.weight, mixer.conv.bias):
        assert part.abs().max() <= bound and abs(float(part.std()) - bound / math.sqrt(3)) < 0.02
    for part in (mixer.filter.w2, mixer.filter.w3, mixer.filter.w4):
        assert abs(float(part.std()) - 0.02) < 0.001
    assert torch.equal(mixer.filter.freq, torch.ones(64)) and not mixer.filter.b1.any()
    assert abs(float(mixer.filter.D.std()) - 1) < 0.1


@KINDS
def test_a_trained_model_runs_in_the_runtime(layer, tmp_path):
    check_training_and_runtime(config_of(layer), tmp_path)


@KINDS
def test_what_comes_later_changes_nothing(layer):
    torch.manual_seed(0)
    model = BasedForCausalLM(config_of(layer), dtype=torch.float64)
    tokens = torch.randint(0, 20, (1, 40))
    others = torch.cat([tokens[:, :25], torch.randint(0, 20, (1, 15))], 1)
    assert torch.allclose(model(tokens)[:, :25], model(others)[:, :25], atol=1e-12)
    assert torch.allclose(model(tokens[:, :25]), model(tokens)[:, :25], atol=1e-12)


# ---- no more tokens than the filter has taps -------------------------------------------------------------------------


def test_training_refuses_longer_sequences():
    model = BasedForCausalLM(config_of(HYENA))
    assert model(torch.zeros(1, 48, dtype=torch.int64)).shape[1] == 48
    with pytest.raises(ValueError, match="a sequence of 49 tokens, and this model's hyena layers have filters of 48"):
        model(torch.zeros(1, 49, dtype=torch.int64))


def test_the_runtime_refuses_longer_sequences_before_anything_changes(tmp_path):
    config = config_of(HYENA)
    assert config.max_tokens == 48 and config_of(H3).max_tokens is None
    model = based.Model.random(config, device="cpu")
    assert model.max_context == 48
    message = "are more than the model's max_context, 48 tokens: a layer's max_length allows no more"
    with pytest.raises(ValueError, match=message):
        model.forward([1] * 49)
    session = model.session(2)
    session.prefill([[1] * 48, [2] * 47])
    session.save_state(tmp_path / "before")
    with pytest.raises(ValueError, match=f"sequence 0: 1 tokens behind 48 {message}"):
        session.step([3, 4])
    with pytest.raises(ValueError, match=f"2 tokens behind 47 {message}"):
        session.prefill([[3, 3]], sequences=[1])
    session.save_state(tmp_path / "after")
    assert (tmp_path / "before").read_bytes() == (tmp_path / "after").read_bytes()
    session.step([4], sequences=[1])
    assert list(session.num_tokens) == [48, 48]


def test_the_limit_of_a_model_is_its_shortest_layers():
    shape = json.loads(config_of(HYENA).to_json())
    shape["layers"] = [HYENA, H3, HYENA | {"max_length": 30}]
    config = based.ModelConfig.from_json(json.dumps(shape))
    assert config.max_tokens == based.Model.random(config, device="cpu").max_context == 30
    assert based.Model.random(config, device="cpu", max_context=20).max_context == 20
    with pytest.raises(ValueError, match="max_context is 31, expected 1 to 30"):
        based.Model.random(config, device="cpu", max_context=31)
    shape["layers"].append(sizes.recipe("A", 6, 1, 9, vocab_size=20, end_token_id=None)["layers"][0])
    assert based.Model.random(based.ModelConfig.from_json(json.dumps(shape)), device="cpu").max_context == 30


def test_a_run_trains_all_three_and_refuses_longer_windows(tmp_path):
    from based.torch.train import read_config, train

    shape = sizes.recipe("c", 16, 1, 20, vocab_size=257, end_token_id=256)
    shape["layers"] = [{"mixer": "rwkv4", "hidden_size": 16, "inner_size": 12}, H3, HYENA]
    BasedForCausalLM(based.ModelConfig.from_json(json.dumps(shape))).save(tmp_path / "start")
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(f"some words and {name} few more " * 40)
    values = {
        "output": "run",
        "model": {"from": "start"},
        "data": {"tokenizer": "bytes", "sequence_length": 48, "train": [{"text": "a.txt"}]},
        "training": {"steps": 3, "batch_size": 2, "precision": "float32", "device": "cpu"},
        "optimizer": {"learning_rate": 1e-3, "warmup_steps": 1, "weight_decay": 0.1},
    }
    values["data"]["validation"] = [{"text": "b.txt"}]
    (tmp_path / "config.yaml").write_text(json.dumps(values))
    result = train(read_config(tmp_path / "config.yaml"))
    assert np.isfinite(result.validation_loss)
    tokens = [256, *(tmp_path / "b.txt").read_bytes()][:48]
    model = BasedForCausalLM.load(tmp_path / "run" / "model")
    runtime = based.load(tmp_path / "run" / "model", dtype="float32")  # "auto" is bfloat16 where the CPU has that
    with torch.no_grad():
        expected = model(torch.tensor([tokens]))[0, :, :257].numpy()
    assert np.linalg.norm(runtime.forward(tokens) - expected) <= 2e-5 * np.linalg.norm(expected)
    with pytest.raises(based.FormatError, match=r"data\.sequence_length: found 49, expected at most the 48 tokens"):
        train(read_config(tmp_path / "config.yaml", ["data.sequence_length=49"], tmp_path / "other"))


def test_only_matrices_are_shrunk():
    """Weight decay leaves taps, modes and the filter alone."""
    from based.torch.train import loop

    shape = sizes.recipe("c", 6, 1, 9, vocab_size=20, end_token_id=None)
    shape["layers"] = [{"mixer": "rwkv4", "hidden_size": 6, "inner_size": 8}, H3, HYENA]
    model = BasedForCausalLM(based.ModelConfig.from_json(json.dumps(shape)))
    config = loop.Optimizer(learning_rate=1e-3, weight_decay=0.1)
    groups = loop._make_optimizer(model, config, torch.device("cpu")).param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    decayed = {names[id(p)] for group in groups if group["weight_decay"] for p in group["params"]}
    assert {name for name in decayed if "mixer" in name} == {
        name for name in names.values() if "mixer" in name and name.endswith("_proj.weight")
    }
    assert sum(len(group["params"]) for group in groups) == len(names)
