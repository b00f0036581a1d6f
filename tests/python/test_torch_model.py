"""based.torch.BasedForCausalLM: the runtime's model, whatever the architecture, with gradients."""

import contextlib
import copy
import io
import json
import math
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import based
import numpy as np
import pytest
from based import sizes
from based._core import Activation
from hypothesis import assume, given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
torch.set_num_threads(1)  # tensors are small here, and a thread that waits for its turn stops all

from based.torch import BasedForCausalLM, ForTrainer, loss
from torch.nn.utils import prune
from torch.utils._python_dispatch import TorchDispatchMode

from tests.reference.checkpoints import RandomModel, Seeded, model_shapes, random_model
from tests.reference.checkpoints import models as random_models
from tests.reference.compare import max_abs, rel_l2
from tests.reference.files import bfloat16, read_safetensors, round_to, write_safetensors
from tests.reference.model import Model

GOLDEN = Path(__file__).parent.parent / "golden"
FLOAT32 = 2e-5  # rel-L2 of logits (golden/README.md)
FLOAT64 = 1e-13
FACTOR = 2.0  # of the error of a plain bfloat16 evaluation
LENGTHS = st.integers(1, 40) | st.integers(120, 300)  # of one chunk and one block of the mixers, and of several


@contextlib.contextmanager
def directory_of(model: RandomModel) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        model.write(Path(folder) / "model")
        yield Path(folder) / "model"


def draw_tokens(config: Any, *shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, config["vocab_size"], shape)


def tiny(num_layers: int, **changes: Any) -> based.ModelConfig:
    """The first layers of the size "tiny": convolution, Taylor attention, window, convolutions."""
    config = json.loads(sizes.named_config("tiny").to_json())
    return based.ModelConfig.from_json(json.dumps(config | changes | {"layers": config["layers"][:num_layers]}))


def shape(layers: str, **changes: Any) -> based.ModelConfig:
    """Small layers of these kinds."""
    recipe = {"hidden_size": 16, "num_heads": 2, "inner_size": 24, "feature_dim": 4, "vocab_size": 32}
    return based.ModelConfig.from_json(json.dumps(sizes.recipe(layers, **recipe | changes, end_token_id=31)))


def logits_of(model: BasedForCausalLM, tokens: np.ndarray) -> np.ndarray:
    """(B, T, padded_vocab_size)."""
    with torch.no_grad():
        return model(torch.from_numpy(tokens)).double().numpy()


def runtime_logits(directory: Path, tokens: np.ndarray, dtype: str = "float32") -> np.ndarray:
    model = based.load(directory, dtype=dtype)
    return np.stack([model.forward(row, include_padding=True) for row in tokens])


# ---- the same model as the runtime's ---------------------------------------------------------------------------------


@settings(max_examples=80)
@given(random=random_models(), length=LENGTHS, seed=st.integers(0, 1 << 16))
def test_any_architecture_gives_the_runtimes_logits(random, length, seed):
    tokens = draw_tokens(random.config, 2, length, seed=seed)
    with directory_of(random) as directory:
        logits = logits_of(BasedForCausalLM.load(directory), tokens)
        assert rel_l2(logits, runtime_logits(directory, tokens)) <= FLOAT32
        exact = np.stack([Model(random.config, random.tensors()).forward(row).logits for row in tokens])
        assert rel_l2(logits, exact) <= FLOAT32
        assert rel_l2(logits_of(BasedForCausalLM.load(directory, dtype=torch.float64), tokens), exact) <= FLOAT64


@pytest.mark.parametrize("case", ["based-tiny", "based-tiny-bf16", "attn-tiny", "mamba-tiny"])
def test_golden_logits(golden, case):
    expected = golden(case)
    for dtype in (torch.float32, torch.bfloat16):
        found = logits_of(BasedForCausalLM.load(GOLDEN / case, dtype=dtype), expected["input_ids"])
        if dtype == torch.float32:
            assert rel_l2(found, expected["logits"]) <= FLOAT32
            assert max_abs(found, expected["logits"]) <= 5e-4
        else:
            assert rel_l2(found, expected["logits"]) <= 4e-2
            assert np.quantile(np.abs(found - expected["logits"]), 0.999) <= 0.4
            assert (found.argmax(-1) == expected["logits"].argmax(-1)).mean() >= 0.9


@settings(max_examples=40)
@given(
    random=random_models(dtypes=("float32", "bfloat16")).filter(
        lambda model: model.config["hidden_size"] >= 8 and model.config["padded_vocab_size"] >= 8
    ),
    length=st.integers(32, 150),
    seed=st.integers(0, 1 << 16),
)
def test_bfloat16_is_as_good_as_a_plain_evaluation(random, length, seed):
    """With bfloat16 parameters, and with float32 ones under autocast."""
    tokens = draw_tokens(random.config, 1, length, seed=seed)
    tensors = random.tensors()
    exact = Model(random.config, tensors).forward(tokens[0]).logits
    allowed = FACTOR * rel_l2(Model(random.config, tensors, bfloat16).prefill(tokens[0])[0], exact)
    with directory_of(random) as directory:
        assert rel_l2(logits_of(BasedForCausalLM.load(directory, dtype=torch.bfloat16), tokens)[0], exact) <= allowed
        with torch.autocast("cpu", torch.bfloat16):
            assert rel_l2(logits_of(BasedForCausalLM.load(directory), tokens)[0], exact) <= allowed


def test_norms_in_float32_beside_16_bit_matrices():
    torch.manual_seed(0)
    narrow = BasedForCausalLM(tiny(3), dtype=torch.bfloat16)
    mixed = copy.deepcopy(narrow)
    for name, module in mixed.named_modules():
        if "norm" in name:
            module.float()
    tokens = torch.randint(0, mixed.config.vocab_size, (2, 20))
    assert torch.equal(mixed(tokens), narrow(tokens))  # norms of ones
    loss = mixed(tokens, tokens)
    loss.backward()
    assert mixed.final_norm.weight.grad.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.isfinite(mixed.float()(tokens)).all()


def test_results_have_single_precision_at_least(tmp_path):
    random_model(Seeded(0)).write(tmp_path)
    tokens = torch.zeros(1, 3, dtype=torch.int64)
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        model = BasedForCausalLM.load(tmp_path, dtype=dtype)
        wide = (".A_log", ".D", ".dt_proj.bias", ".dt_bias", ".time_decay", ".time_first")
        wide += (".time_mix_k", ".time_mix_v", ".time_mix_r")
        wide += (".shift_B", ".shift_C", ".shift_D", ".log_dt", ".A_imag", ".B", ".C")
        wide += tuple(f".filter.{name}" for name in ("w1", "b1", "w2", "b2", "w3", "b3", "w4", "freq"))
        assert {p.dtype for name, p in model.named_parameters() if not name.endswith(wide)} == {dtype}
        assert all(p.dtype.itemsize >= 4 for name, p in model.named_parameters() if name.endswith(wide))
        expected = torch.promote_types(dtype, torch.float32)
        assert model(tokens).dtype == model(tokens, labels=tokens).dtype == expected
        seen = []
        model.final_norm.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0].dtype))
        model(tokens)
        assert seen == [expected]  # the residual stream


# ---- gradients -------------------------------------------------------------------------------------------------------


def nearest_kink(model: BasedForCausalLM, tokens: Any) -> float:
    """The least |x| of which a relu is taken: at 0 it has no derivative, and differences of losses see both sides."""
    least = [math.inf]
    if model.config.mlp is None or model.config.mlp.activation != Activation.relu:
        return least[0]

    def look(_: Any, __: Any, h: Any) -> None:
        least.append(float((h.chunk(2, -1)[1] if model.config.mlp.gated else h).detach().abs().min()))

    hooks = [layer.mlp.fc1.register_forward_hook(look) for layer in model.layers]
    with torch.no_grad():
        model(tokens)
    for hook in hooks:
        hook.remove()
    return min(least)


@settings(max_examples=25)
@given(random=random_models(max_layers=3), length=st.integers(2, 20) | st.just(140), seed=st.integers(0, 1 << 16))
def test_gradients_are_those_of_the_loss(random, length, seed):
    """Along a random direction of each parameter, by central differences of fourth order: norms bend."""
    with directory_of(random) as directory:
        model = BasedForCausalLM.load(directory, dtype=torch.float64)
    tokens = torch.from_numpy(draw_tokens(random.config, 2, length, seed=seed))
    assume(nearest_kink(model, tokens) > 4e-5)  # what the steps below move it by at most
    model(tokens, labels=tokens).backward()
    generator, step, found, expected = torch.Generator().manual_seed(seed), 1e-6, [], []
    for parameter in model.parameters():
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        direction /= direction.norm()
        found.append(float((parameter.grad * direction).sum()))
        losses = {}
        with torch.no_grad():
            start = parameter.clone()
            for steps in (-2, -1, 1, 2):
                parameter.copy_(start + steps * step * direction)
                losses[steps] = float(model(tokens, labels=tokens))
            parameter.copy_(start)
        expected.append((8 * (losses[1] - losses[-1]) - (losses[2] - losses[-2])) / (12 * step))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)


def saved_nbytes(model: BasedForCausalLM, tokens: Any) -> tuple[int, Any, dict[str, Any]]:
    """Bytes saved for the backward pass besides the parameters, the loss, and the gradients."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, int] = {}

    def pack(x: Any) -> Any:
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    model.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = model(tokens, labels=tokens)
    loss.backward()
    nbytes = sum(size for pointer, size in saved.items() if pointer not in parameters)
    return nbytes, loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


def test_activation_checkpointing():
    model = BasedForCausalLM(sizes.named_config("tiny"))
    tokens = torch.from_numpy(draw_tokens({"vocab_size": 258}, 2, 100))
    kept, loss, gradients = saved_nbytes(model, tokens)
    model.activation_checkpointing = True
    kept_less, same_loss, same_gradients = saved_nbytes(model, tokens)
    assert torch.equal(loss, same_loss)
    assert gradients.keys() == same_gradients.keys()
    assert all(torch.equal(gradients[name], same_gradients[name]) for name in gradients)
    assert kept_less < kept / 4
    without = BasedForCausalLM.load(GOLDEN / "based-tiny", activation_checkpointing=True)
    assert without.activation_checkpointing


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_compiles_in_one_graph(autocast, device):
    model = BasedForCausalLM(tiny(3), device=device)
    tokens = torch.from_numpy(draw_tokens({"vocab_size": 258}, 1, 150)).to(device)

    def loss(ids: Any) -> Any:
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            return model(ids, labels=ids)

    torch._dynamo.reset()
    results = []
    for function in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True)):
        model.zero_grad()
        value = function(tokens)
        value.backward()
        results.append([value.detach(), *(p.grad.clone() for p in model.parameters())])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("layers", "num_graphs"), [("L", 4), ("W", 10)])
def test_graphs_for_all_shapes(layers, num_graphs):
    """As many as docs/training.md says."""
    model = BasedForCausalLM(shape(layers, window=9), device="cpu")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(recompile_limit=16), torch.no_grad():
        for num_tokens in (1, 5, 9, 50, 64, 65, 128, 129, 200):
            for batch in (1, 2, 3):
                tokens = torch.zeros(batch, num_tokens, dtype=torch.int64)
                torch.testing.assert_close(compiled(tokens), model(tokens))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == num_graphs
    torch._dynamo.reset()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_loss_on_a_gpu(dtype, monkeypatch):
    """Of 1,000 tokens in blocks, some of which do not count, over 2,999 of 3,000 classes."""
    monkeypatch.setattr(loss, "_BLOCK", 300 * 3000)
    generator = torch.Generator().manual_seed(0)
    make = {"generator": generator, "dtype": torch.float64}
    shapes = [(1000, 32), (3000, 32)]
    inputs = [torch.randn(shape, **make).to("cuda", getattr(torch, dtype)).requires_grad_() for shape in shapes]
    targets = torch.randint(2999, (1000,), generator=generator)
    targets[::7] = -100
    targets = targets.to("cuda")
    found = loss.linear_cross_entropy(*inputs, targets, 2999)
    with torch.no_grad():
        assert torch.equal(loss.linear_cross_entropy(*inputs, targets, 2999), found)
    assert loss.linear_cross_entropy(*inputs, torch.full_like(targets, -100), 2999).isnan()
    doubles = [x.detach().double().requires_grad_() for x in inputs]
    expected = torch.nn.functional.cross_entropy((doubles[0] @ doubles[1].t())[:, :2999], targets)
    tolerance = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 2e-3}[dtype]
    assert abs(float(found.detach()) - float(expected.detach())) <= tolerance * float(expected.detach())
    gradients = torch.autograd.grad(found, inputs), torch.autograd.grad(expected, doubles)
    for a, b in zip(*gradients, strict=True):
        assert a.dtype == getattr(torch, dtype)
        assert (a.double() - b).norm() <= tolerance * b.norm()


@pytest.mark.gpu
def test_on_a_gpu_the_logits_are_those_of_the_cpu():
    """Under autocast at most FACTOR times as far from float64 as on a CPU."""
    model = BasedForCausalLM(tiny(4))
    tokens = torch.from_numpy(draw_tokens({"vocab_size": 258}, 2, 300))
    exact = BasedForCausalLM(model.config, dtype=torch.float64)
    exact.load_state_dict(model.state_dict())
    errors = []
    with torch.no_grad():
        expected = exact(tokens)
        for device in ("cpu", "cuda"):
            with torch.autocast(device, torch.bfloat16):
                found = model.to(device)(tokens.to(device)).cpu().double()
            errors.append(float((found - expected).norm() / expected.norm()))
        found = model(tokens.cuda()).cpu().double()
    assert errors[1] <= FACTOR * errors[0]
    assert (found - expected).norm() <= FLOAT32 * expected.norm()


def test_it_learns():
    torch.manual_seed(0)
    model = BasedForCausalLM(tiny(3))
    tokens = torch.from_numpy(draw_tokens({"vocab_size": 258}, 2, 40))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        loss = model(tokens, labels=tokens)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert abs(losses[0] - math.log(258)) < 0.3
    assert losses[-1] < 0.5


# ---- the loss --------------------------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(random=random_models(), length=st.integers(2, 60), seed=st.integers(0, 1 << 16))
def test_the_loss_is_the_runtimes_score(random, length, seed):
    tokens = draw_tokens(random.config, 2, length, seed=seed)
    with directory_of(random) as directory:
        runtime, model = based.load(directory, dtype="float32"), BasedForCausalLM.load(directory)
    scores = np.stack([runtime.score(row) for row in tokens])
    ids = torch.from_numpy(tokens)
    loss = float(model(ids, labels=ids).detach())
    scale = np.abs(logits_of(model, tokens)).max()
    assert loss == pytest.approx(-scores.mean(), abs=2 * FLOAT32 * scale + 1e-6)

    labels = ids.clone()
    labels[:, 0] = -100  # has no logits: counts in no case
    assert float(model(ids, labels=labels).detach()) == loss
    labels[0, 1:] = -100
    found = float(model(ids, labels=labels).detach())
    assert found == pytest.approx(-scores[1].mean(), abs=2 * FLOAT32 * scale + 1e-6)


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation makes."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [
            x for x in (result if isinstance(result, (tuple, list)) else [result]) if isinstance(x, torch.Tensor)
        ]
        self.numel = max([self.numel, *(x.numel() for x in tensors)])
        return result


def test_the_loss_of_many_tokens_never_holds_all_logits(monkeypatch):
    monkeypatch.setattr(loss, "_BLOCK", 2048 * 2000)
    model = BasedForCausalLM(tiny(1, vocab_size=2000, padded_vocab_size=2000), dtype=torch.float64)
    tokens = torch.from_numpy(draw_tokens({"vocab_size": 2000}, 2, 2501))
    with Largest() as largest:
        found = model(tokens, labels=tokens)
        found.backward()
    assert largest.numel <= 2048 * 2000 < tokens.numel() * 2000 / 2
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    expected = torch.nn.functional.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    expected.backward()
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    for a, b in zip(gradients, model.parameters(), strict=True):
        assert (a - b.grad).norm() <= 1e-12 * b.grad.norm()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_products_with_the_hessian_of_a_model(checkpointing):
    """Against differences of gradients; all kinds of layers, and a window that ends within the tokens."""
    torch.manual_seed(0)
    model = BasedForCausalLM(shape("cLW", window=3), activation_checkpointing=checkpointing, dtype=torch.float64)
    tokens = torch.from_numpy(draw_tokens({"vocab_size": 32}, 2, 9))
    parameters = list(model.parameters())
    with torch.no_grad():
        for parameter in parameters:
            parameter.mul_(10 if parameter.ndim == 2 else 1)  # far enough from a linear model
    directions = [torch.randn_like(p) for p in parameters]

    def gradients(create_graph: bool = False) -> Any:
        return torch.autograd.grad(model(tokens, labels=tokens), parameters, create_graph=create_graph)

    product = sum((g * d).sum() for g, d in zip(gradients(create_graph=True), directions, strict=True))
    found = torch.autograd.grad(product, parameters)
    step, sides = 1e-6, []
    for shift in (step, -2 * step):
        with torch.no_grad():
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter.add_(direction, alpha=shift)
        sides.append(gradients())
    for a, left, right in zip(found, *sides, strict=True):
        expected = (left - right) / (2 * step)
        assert (a - expected).norm() <= 1e-6 * expected.norm() + 1e-8


def test_gradients_of_each_sample():
    """torch.func: grad and vmap over the tokens, and over the weights of an ensemble."""
    torch.manual_seed(0)
    model = BasedForCausalLM(shape("cLW", window=3), dtype=torch.float64)
    tokens = torch.from_numpy(draw_tokens({"vocab_size": 32}, 3, 9))
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def loss_of(weights: Any, tokens: Any) -> Any:
        return torch.func.functional_call(model, weights, (tokens[None],), {"labels": tokens[None]})

    each = torch.func.vmap(torch.func.grad(loss_of), (None, 0))(weights, tokens)
    for row in range(3):
        expected = torch.autograd.grad(model(tokens[row : row + 1], labels=tokens[row : row + 1]), model.parameters())
        for name, gradient in zip(weights, expected, strict=True):
            assert rel_l2(each[name][row].numpy(), gradient.numpy()) <= FLOAT64
    ensemble = {name: torch.stack([w, 2 * w]) for name, w in weights.items()}
    losses = torch.func.vmap(loss_of, (0, None))(ensemble, tokens[0])
    for index in range(2):
        assert losses[index] == pytest.approx(float(loss_of({n: w[index] for n, w in ensemble.items()}, tokens[0])))


# ---- copies ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [sizes.named_config("tiny"), sizes.named_config("360m")])
def test_copies_of_a_config(config):
    for part in (config, config.mlp, *config.layers):
        for other in (copy.copy(part), copy.deepcopy(part), pickle.loads(pickle.dumps(part))):
            assert other == part and hash(other) == hash(part) and type(other) is type(part)
    assert len({config, copy.copy(config), sizes.named_config("60m")}) == 2
    assert len({copy.copy(mixer) for mixer in config.layers}) == len({mixer.mixer for mixer in config.layers})


@pytest.mark.parametrize("activation", [a.name for a in based._core.Activation])
@pytest.mark.parametrize("gated", [False, True])
def test_copies_of_a_model(activation, gated):
    config = json.loads(shape("cLW", window=3).to_json())
    config["mlp"] |= {"activation": activation, "gated": gated}
    model = BasedForCausalLM(based.ModelConfig.from_json(json.dumps(config)))
    model.tokenizer_json = b"{}"
    tokens = torch.from_numpy(draw_tokens({"vocab_size": 32}, 2, 9))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    for other in (copy.deepcopy(model), averaged.module, torch.load(file, weights_only=False)):
        assert torch.equal(other(tokens), model(tokens))
        assert other.config == model.config and other.tokenizer_json == b"{}"
        with torch.no_grad():
            other.embedding.weight.zero_()
        assert model.embedding.weight.any()


# ---- model directories -----------------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(random=random_models())
def test_save_and_load(random):
    tokens = draw_tokens(random.config, 1, 20)
    with directory_of(random) as directory:
        model = BasedForCausalLM.load(directory)
        model.save(directory.parent / "saved")
        again = BasedForCausalLM.load(directory.parent / "saved")
        found = runtime_logits(directory.parent / "saved", tokens)
        np.testing.assert_array_equal(found, runtime_logits(directory, tokens))
        stored = read_safetensors(directory.parent / "saved" / "model.safetensors")
    assert again.config == model.config
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert shapes == model_shapes(random.config) == {name: bits.shape for name, (_, bits) in stored.items()}
    assert {dtype for dtype, _ in stored.values()} == {"float32"}
    assert model.state_dict().keys() == again.state_dict().keys()
    for name, values in model.state_dict().items():
        assert torch.equal(values, again.state_dict()[name])
    for name, values in random.tensors().items():
        np.testing.assert_array_equal(model.state_dict()[name].double().numpy(), values)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype_of_the_file(tmp_path, dtype):
    model = BasedForCausalLM(sizes.named_config("tiny"))
    model.save(tmp_path / "asked", dtype=dtype)
    model.to(getattr(torch, dtype)).save(tmp_path / "own")
    assert (tmp_path / "asked/model.safetensors").read_bytes() == (tmp_path / "own/model.safetensors").read_bytes()
    stored = read_safetensors(tmp_path / "own/model.safetensors")
    assert {stored_dtype for stored_dtype, _ in stored.values()} == {dtype}
    if dtype != "float16":
        assert based.load(tmp_path / "own", dtype="auto").dtype == dtype
    again = BasedForCausalLM.load(tmp_path / "own", dtype=getattr(torch, dtype))
    for name, values in model.state_dict().items():
        assert torch.equal(values, again.state_dict()[name])


def test_the_tokenizer_comes_along(tmp_path):
    original = (GOLDEN / "based-tiny" / "tokenizer.json").read_bytes()
    model = BasedForCausalLM.load(GOLDEN / "based-tiny")
    model.save(tmp_path / "a")
    assert (tmp_path / "a/tokenizer.json").read_bytes() == original
    assert based.load(tmp_path / "a").generate("The bee", based.SamplingParams(max_tokens=2))[0].prompt_token_ids
    fresh = BasedForCausalLM(model.config)
    fresh.save(tmp_path / "b")
    assert {path.name for path in (tmp_path / "b").iterdir()} == {"config.json", "model.safetensors"}
    for number, tokenizer in enumerate((tmp_path / "a", tmp_path / "a/tokenizer.json")):
        fresh.save(tmp_path / f"c{number}", tokenizer=tokenizer)
        assert (tmp_path / f"c{number}/tokenizer.json").read_bytes() == original


def test_save_replaces_only_what_it_may(tmp_path):
    model = BasedForCausalLM.load(GOLDEN / "based-tiny")
    model.save(tmp_path / "model")
    with pytest.raises(FileExistsError, match="found a full one"):
        model.save(tmp_path / "model")
    again = BasedForCausalLM.load(tmp_path / "model")
    with torch.no_grad():
        again.embedding.weight.zero_()
    again.save(tmp_path / "model", overwrite=True)  # the directory that it comes from
    assert not BasedForCausalLM.load(tmp_path / "model").embedding.weight.any()
    (tmp_path / "model" / "thesis.tex").touch()
    with pytest.raises(FileExistsError, match="thesis"):
        model.save(tmp_path / "model", overwrite=True)


def test_what_cannot_be_saved(tmp_path):
    model = BasedForCausalLM(sizes.named_config("tiny"))
    with pytest.raises(ValueError, match="dtype is 'int8', expected one of float32, bfloat16, float16"):
        model.save(tmp_path / "a", dtype="int8")
    with pytest.raises(ValueError, match="dtype is 'float64'"):
        model.double().save(tmp_path / "a")
    with pytest.raises(FileNotFoundError, match="no such tokenizer"):
        model.float().save(tmp_path / "a", tokenizer=tmp_path)
    with torch.no_grad():
        model.layers[1].mlp.fc2.weight[0, 0] = 1e6
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.fc2\.weight holds values beyond the range of float16"):
        model.save(tmp_path / "a", dtype="float16")
    assert not list(tmp_path.iterdir())


class Lora(torch.nn.Module):
    def __init__(self, base: Any) -> None:
        super().__init__()
        self.base = base
        self.down, self.up = torch.nn.Linear(base.in_features, 2), torch.nn.Linear(2, base.out_features)

    def forward(self, x: Any) -> Any:
        return self.base(x) + self.up(self.down(x))


def with_adapter(model: BasedForCausalLM) -> None:
    model.layers[1].mixer.proj_v = Lora(model.layers[1].mixer.proj_v)


def with_an_adapter_beside(model: BasedForCausalLM) -> None:
    model.layers[1].mixer.proj_v.lora = torch.nn.Linear(2, 2)


def with_weight_norm(model: BasedForCausalLM) -> None:
    torch.nn.utils.parametrizations.weight_norm(model.layers[0].mlp.fc1)


def with_a_mask(model: BasedForCausalLM) -> None:
    prune.l1_unstructured(model.layers[0].mlp.fc1, "weight", 0.5)


def with_a_larger_embedding(model: BasedForCausalLM) -> None:
    model.embedding = torch.nn.Embedding(40, 16)


def with_a_head_of_its_own(model: BasedForCausalLM) -> None:
    model.lm_head = torch.nn.Linear(16, 32, bias=False)


def without_a_layer(model: BasedForCausalLM) -> None:
    del model.layers[2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_adapter, r"layers\.1\.mixer\.proj_v\.weight is missing, the config makes it \(16, 16\)"),
        (with_an_adapter_beside, r"layers\.1\.mixer\.proj_v\.lora\.bias: the config has no place for it"),
        (with_weight_norm, r"layers\.0\.mlp\.fc1\.weight is missing, the config makes it \(48, 16\)"),
        (with_a_mask, r"layers\.0\.mlp\.fc1\.weight is missing"),
        (with_a_larger_embedding, r"embedding\.weight has shape \(40, 16\), the config makes it \(32, 16\)"),
        (with_a_head_of_its_own, r"lm_head\.weight: the config has no place for it"),
        (without_a_layer, r"layers\.2\..* is missing"),
    ],
)
def test_a_changed_model_is_not_saved(tmp_path, change, message):
    """Nothing would read it; and a model that is there stays."""
    model = BasedForCausalLM(shape("cLW", window=3))
    model.save(tmp_path / "model")
    before = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    change(model)
    for path in (tmp_path / "model", tmp_path / "other"):
        with pytest.raises(ValueError, match=f"{message}.*: nothing was written. Merge adapters"):
            model.save(path, overwrite=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_is_merged_again_is_saved(tmp_path):
    model = BasedForCausalLM(shape("cLW", window=3))
    with_weight_norm(model)
    torch.nn.utils.parametrize.remove_parametrizations(model.layers[0].mlp.fc1, "weight")
    model.save(tmp_path / "model")
    tokens = torch.from_numpy(draw_tokens({"vocab_size": 32}, 1, 9))
    assert torch.equal(BasedForCausalLM.load(tmp_path / "model")(tokens), model(tokens))


def test_arguments_of_other_trainers():
    """A mask of ones, or zeros behind a sequence; sums over micro-batches, and the labels of all of them."""
    torch.manual_seed(0)
    model = BasedForCausalLM(shape("cLW", window=3), dtype=torch.float64)
    tokens = torch.from_numpy(draw_tokens({"vocab_size": 32}, 3, 9))
    labels = tokens.clone()
    labels[1, 5:] = labels[2, 2:] = -100
    count = int((labels[:, 1:] != -100).sum())
    whole = model(tokens, labels=labels)
    assert torch.equal(model(tokens, attention_mask=torch.ones_like(tokens)), model(tokens))
    mask = (torch.arange(9) < torch.tensor([9, 5, 2])[:, None]).long()
    assert torch.equal(model(tokens, labels=labels, attention_mask=mask), whole)
    parts = [(tokens[i : i + 1], labels[i : i + 1]) for i in range(3)]
    sums = sum(model(t, labels=y, reduction="sum") for t, y in parts)
    torch.testing.assert_close(sums / count, whole, rtol=1e-12, atol=0)
    shares = sum(model(t, labels=y, num_items_in_batch=torch.tensor(count)) for t, y in parts)
    torch.testing.assert_close(shares, whole, rtol=1e-12, atol=0)
    for wrong, message in (
        (mask.flip(1), "a zero before a one, expected padding behind a sequence only"),
        (mask[:, :5], r"attention_mask is \(3, 5\), expected a tensor of shape \(3, 9\)"),
    ):
        with pytest.raises(ValueError, match=message):
            model(tokens, attention_mask=wrong)
    with pytest.raises(ValueError, match="reduction is 'none', expected mean or sum"):
        model(tokens, labels=labels, reduction="none")
    trained = ForTrainer(model)
    found = trained(tokens, labels=labels, attention_mask=mask, num_items_in_batch=torch.tensor(count))
    assert set(found) == {"loss"}
    torch.testing.assert_close(found["loss"], whole, rtol=1e-12, atol=0)
    trained.eval()
    found = trained(tokens, labels=labels)
    assert torch.equal(found["loss"], whole) and torch.equal(found["logits"], model(tokens))
    assert set(trained(tokens)) == {"logits"} and not hasattr(trained, "config")


def spoil(tensors: dict[str, Any], config: dict[str, Any], what: str) -> None:
    if what == "missing":
        del tensors["final_norm.weight"]
    elif what == "extra":
        tensors["layers.9.what"] = ("float32", np.zeros(3, np.float32))
    elif what == "shape":
        tensors["final_norm.weight"] = ("float32", np.zeros(3, np.float32))
    elif what == "dtype":
        tensors["final_norm.weight"] = ("int64", np.zeros(config["hidden_size"], np.int64))
    else:
        config["surprise"] = 1


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("missing", r"model\.safetensors: tensor final_norm\.weight \(\d+,\) is missing"),
        ("extra", r"model\.safetensors: tensors that the config has no place for: layers\.9\.what"),
        ("shape", r"tensor final_norm\.weight has shape \(3,\), the config makes it"),
        ("dtype", r"tensor final_norm\.weight has dtype int64, expected float32, bfloat16, float16"),
        ("key", "surprise"),
    ],
)
def test_bad_directories(tmp_path, what, message):
    random = random_model(Seeded(3))
    random.write(tmp_path)
    tensors = {name: ("float32", round_to(values, "float32")) for name, values in random.tensors().items()}
    config = dict(random.config)
    spoil(tensors, config, what)
    write_safetensors(tmp_path / "model.safetensors", tensors)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(based.FormatError, match=message):
        BasedForCausalLM.load(tmp_path)
    with pytest.raises(based.FormatError):
        based.load(tmp_path)


def test_no_such_directory(tmp_path):
    with pytest.raises(FileNotFoundError):
        BasedForCausalLM.load(tmp_path / "nothing")


# ---- initialisation --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("special", [False, True])
def test_initialisation(special):
    config = sizes.named_config("60m")
    torch.manual_seed(0)
    model = BasedForCausalLM(config, special_initializer=special)
    std = math.sqrt(2 / (5 * config.hidden_size)) if special else 0.02
    assert std != 0.02 or not special
    kinds = set()
    for name, parameter in model.named_parameters():
        values = parameter.detach()
        if "norm" in name:
            kinds.add("norm")
            assert (values == 1).all()
        elif name.endswith("bias"):
            kinds.add("bias")
            assert not values.any()
        elif name.endswith("conv.weight"):  # uniform on ±1/√3
            kinds.add("conv")
            assert 0.99 * 3**-0.5 < values.abs().max() <= 3**-0.5
            assert float(values.std()) == pytest.approx(1 / 3, rel=0.05)
        else:
            onto_residual = name.endswith(("out_proj.weight", "fc2.weight"))
            kinds.add("residual" if onto_residual else "matrix")
            expected = std / math.sqrt(2 * 12) if onto_residual else std
            assert float(values.std()) == pytest.approx(expected, rel=0.03)
            assert abs(float(values.mean())) < 0.03 * expected
            assert (values.abs() > 2.5 * expected).double().mean() == pytest.approx(0.0124, rel=0.2)  # normal
    assert kinds == {"norm", "bias", "conv", "residual", "matrix"}


def test_initialisation_follows_the_seed():
    config = sizes.named_config("tiny")
    models = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        models.append(BasedForCausalLM(config))
    weights = [model.layers[2].mixer.qkv_proj.weight for model in models]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    with torch.device("meta"):
        assert BasedForCausalLM(config).embedding.weight.is_meta


def test_initialisation_of_a_scan():
    """As mamba_ssm: steps of 0.001 … 0.1, A = −1 … −N, D = 1; W_out over √L, where no MLP follows."""
    torch.manual_seed(0)
    model = BasedForCausalLM(shape("SSS", hidden_size=64, inner_size=0))
    assert model.config.mlp is None
    mixer = model.layers[1].mixer
    steps = torch.nn.functional.softplus(mixer.dt_proj.bias).log10()
    assert steps.min() >= -3.001 and steps.max() <= -0.999 and abs(steps.mean() + 2) < 0.2
    assert torch.allclose(-mixer.A_log.exp(), -torch.arange(1.0, 17).expand(128, 16), rtol=1e-6)
    assert torch.equal(mixer.D, torch.ones(128))
    for weight, bound in (
        (mixer.in_proj.weight, 64**-0.5),
        (mixer.x_proj.weight, 128**-0.5),
        (mixer.dt_proj.weight, 4**-0.5),
        (mixer.conv.weight, 4**-0.5),
        (mixer.conv.bias, 4**-0.5),
        (mixer.out_proj.weight, (128 * 3) ** -0.5),
    ):
        assert 0.95 * bound < weight.abs().max() <= bound
    assert abs(float(model.embedding.weight.detach().std()) - 0.02) < 0.002


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_mamba_is_trained_and_goes_to_the_runtime(tmp_path, dtype):
    torch.manual_seed(0)
    model = BasedForCausalLM(shape("SS", inner_size=0))
    tokens = torch.arange(40).remainder(7).expand(4, 40).contiguous()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = model(tokens, labels=tokens)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.3 * losses[0]
    model.save(tmp_path / "model", dtype=dtype)
    runtime = based.load(tmp_path / "model", dtype="float32")
    logits = np.stack([runtime.forward(row, include_padding=True) for row in tokens[:1].numpy()])
    assert rel_l2(logits, logits_of(model, tokens[:1].numpy())) <= {"float32": FLOAT32, "bfloat16": 2e-2}[dtype]
    (output,) = runtime.generate([tokens[0, :9].tolist()], based.SamplingParams(max_tokens=20, temperature=0))
    assert output.outputs[0].token_ids == [t % 7 for t in range(9, 29)]
    stored = read_safetensors(tmp_path / "model" / "model.safetensors")
    assert stored["layers.0.mixer.A_log"][0] == stored["layers.1.mixer.dt_proj.bias"][0] == "float32"
    assert stored["layers.0.mixer.in_proj.weight"][0] == dtype


def test_layer_norm_and_untied_head():
    for seed in range(40):
        config = random_model(Seeded(seed)).config
        model = BasedForCausalLM(based.ModelConfig.from_json(json.dumps(config)))
        biases = {name: p for name, p in model.named_parameters() if "norm" in name and name.endswith("bias")}
        # The heads' own norm in RWKV-7 has a bias in any model.
        of_stream = [name for name in biases if ".mixer." not in name]
        assert bool(of_stream) == (config["norm"]["type"] == "layer_norm")
        assert not any(bias.any() for bias in biases.values())
        assert ("lm_head.weight" in model.state_dict()) == (not config["tie_embeddings"])
        assert sum(p.numel() for p in model.parameters()) == model.config.num_parameters


# ---- arguments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ids", "labels", "exception", "message"),
    [
        ([[1, 2]], None, TypeError, "input_ids is list, expected a tensor of torch.int64 or torch.int32"),
        (torch.zeros(1, 2), None, TypeError, "input_ids is torch.float32, expected"),
        (torch.tensor([1, 2]), None, ValueError, "input_ids has shape (2,), expected (B, T), both ≥ 1"),
        (torch.zeros(2, 0, dtype=torch.int64), None, ValueError, "input_ids has shape (2, 0), expected"),
        (torch.tensor([[1, 258]]), None, ValueError, "input_ids holds 258, expected tokens in [0, 258)"),
        (torch.tensor([[-100, 1]]), None, ValueError, "input_ids holds -100, expected tokens in [0, 258)"),
        (torch.zeros(1, 2, dtype=torch.int64, device="meta"), None, ValueError, "input_ids is on meta, expected cpu"),
        (
            torch.tensor([[1, 2]]),
            torch.tensor([[1]]),
            ValueError,
            "labels has shape (1, 1), expected that of input_ids",
        ),
        (torch.tensor([[1]]), torch.tensor([[1]]), ValueError, "with T ≥ 2"),
        (torch.tensor([[1, 2]]), torch.tensor([[1, 260]]), ValueError, "labels holds 260, expected tokens in [0, 258)"),
        (torch.tensor([[1, 2]]), torch.tensor([[1.0, 2.0]]), TypeError, "labels is torch.float32, expected"),
    ],
)
def test_bad_input(ids, labels, exception, message):
    model = BasedForCausalLM.load(GOLDEN / "based-tiny")
    with pytest.raises(exception) as caught:
        model(ids, labels=labels)
    assert message in str(caught.value)


def test_bad_construction():
    with pytest.raises(TypeError, match=r"config is a dict, expected a based\.ModelConfig"):
        BasedForCausalLM({"hidden_size": 8})
    with pytest.raises(TypeError, match=r"dtype is torch\.int8, expected"):
        BasedForCausalLM(sizes.named_config("tiny"), dtype=torch.int8)


def test_without_torch():
    """`import based` needs none; based.torch says which command installs it."""
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import based\n"
        "try: import based.torch\n"
        "except ImportError as error: print(error)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ)
    assert result.returncode == 0, result.stderr
    assert 'pip install "based[train]"' in result.stdout
