"""based.torch.ops against the definitions in float64, forward and backward."""

import itertools
import shutil
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
torch.set_num_threads(1)  # tensors are small here, and a thread that waits for its turn stops all

from based.torch import ops
from based.torch.loss import linear_cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from tests.reference.model import rotate
from tests.reference.torch_model import conv_reference, scan_reference, taylor_reference, window_reference

TOLERANCE = {"float64": 1e-13, "float32": 2e-6}  # rel-L2
FACTOR = 2.0  # of the error of a plain 16-bit evaluation
Tensors = tuple[Any, ...]


def random(*shape: int, dtype: str = "float64", seed: int = 0, device: str = "cpu") -> Any:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64).to(device, getattr(torch, dtype))
    return x.requires_grad_()


def error(found: Any, expected: Any) -> float:
    assert found.shape == expected.shape
    return float(((found.double() - expected).norm() / expected.norm()).detach())


def with_gradients(function: Callable[..., Any], inputs: Tensors, dy: Any) -> Tensors:
    """The result and the gradient of each input."""
    y = function(*inputs)
    return (y.detach(), *torch.autograd.grad(y, inputs, dy.to(y.dtype)))


def double(inputs: Tensors) -> Tensors:
    return tuple(x.detach().double().requires_grad_() for x in inputs)


def taylor_inputs(t: int, f: int, d: int, dtype: str = "float64", device: str = "cpu") -> Tensors:
    shapes = [(2, t, 3, f), (2, t, 3, f), (2, t, 3, d)]
    return tuple(random(*shape, dtype=dtype, seed=seed, device=device) for seed, shape in enumerate(shapes))


def window_inputs(t: int, h: int, h_kv: int, d: int, dtype: str = "float64", device: str = "cpu") -> Tensors:
    shapes = [(2, t, h, d), (2, t, h_kv, d), (2, t, h_kv, d)]
    return tuple(random(*shape, dtype=dtype, seed=seed, device=device) for seed, shape in enumerate(shapes))


def conv_inputs(t: int, e: int, taps: int, dtype: str = "float64", device: str = "cpu") -> Tensors:
    return random(2, t, 2 * e, dtype=dtype, device=device), random(e, taps, dtype=dtype, seed=1, device=device)


def scan_inputs(t: int, e: int, n: int, dtype: str = "float64", device: str = "cpu") -> Tensors:
    """x, dt, dt_bias, a, b, c, d."""
    shapes = [(2, t, e), (2, t, e), (e,), (e, n), (2, t, n), (2, t, n), (e,)]
    drawn = [random(*shape, dtype=dtype, seed=seed, device=device) for seed, shape in enumerate(shapes)]
    drawn[3] = (-drawn[3].exp()).detach().requires_grad_()
    return tuple(drawn)


def scan(*inputs: Any, chunk_size: int = 32) -> Any:
    return ops.selective_scan(*inputs, chunk_size=chunk_size)[0]


def plain_scan(x: Any, dt: Any, dt_bias: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
    return scan_reference(x, dt + dt_bias, a, b, c, d, dtype=x.dtype)[0]


def swiglu_reference(h: Any) -> Any:
    value, gate = h.double().chunk(2, -1)
    return value * torch.nn.functional.silu(gate)


def window(size: int, **options: Any) -> Callable[..., Any]:
    return lambda q, k, v: ops.sliding_window_attention(q, k, v, window=size, **options)


# ---- against float64 -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("t", "chunk_size"), [(1, 128), (2, 1), (37, 8), (64, 16), (130, 64), (50, 128), (300, 128)])
@pytest.mark.parametrize(("f", "d", "eps"), [(16, 12, 1e-12), (1, 1, 0.0), (5, 7, 1e-3)])
def test_taylor_linear_attention(dtype, t, chunk_size, f, d, eps):
    inputs, dy = taylor_inputs(t, f, d, dtype), random(2, t, 3, d, seed=3).detach()
    found = with_gradients(lambda q, k, v: ops.taylor_linear_attention(q, k, v, eps, chunk_size), inputs, dy)
    expected = with_gradients(lambda q, k, v: taylor_reference(q, k, v, eps), double(inputs), dy)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == getattr(torch, dtype)
        if t == 1:  # y is v: the gradients of q and k are zero, but for eps
            assert (a - b).abs().max() <= TOLERANCE[dtype] * 10
        else:
            assert error(a, b) <= TOLERANCE[dtype]


def test_the_result_does_not_depend_on_the_chunk_size():
    inputs, dy = taylor_inputs(100, 4, 6), random(2, 100, 3, 6, seed=3).detach()
    results = [
        with_gradients(lambda q, k, v, c=chunk_size: ops.taylor_linear_attention(q, k, v, chunk_size=c), inputs, dy)
        for chunk_size in (1, 7, 50, 99, 100, 1000)
    ]
    for result in results[1:]:
        for a, b in zip(result, results[0], strict=True):
            assert error(a, b) <= TOLERANCE["float64"]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("h", "h_kv"), [(2, 2), (6, 2)])
# Blocks of 64 tokens for windows up to 65, of window − 1 for larger ones.
@pytest.mark.parametrize(
    ("t", "size"), [(1, 1), (9, 1), (9, 30), (64, 9), (65, 9), (64, 64), (64, 63), (128, 65), (300, 65), (301, 101)]
)
def test_sliding_window_attention(dtype, h, h_kv, t, size):
    inputs, dy = window_inputs(t, h, h_kv, 5, dtype), random(2, t, h, 5, seed=3).detach()
    for scale in (None, 0.3):
        found = with_gradients(window(size, scale=scale), inputs, dy)
        expected = with_gradients(
            lambda q, k, v, s=scale: window_reference(q, k, v, size, s or 5**-0.5), double(inputs), dy
        )
        for a, b in zip(found, expected, strict=True):
            assert a.dtype == getattr(torch, dtype)
            if size == 1 or t == 1:  # softmax of one key: no gradient of q and k
                assert (a - b).abs().max() <= TOLERANCE[dtype] * 10
            else:
                assert error(a, b) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("t", "e", "taps"), [(1, 3, 1), (10, 8, 3), (40, 5, 4), (3, 2, 7)])
def test_gated_short_conv(dtype, t, e, taps):
    inputs, dy = conv_inputs(t, e, taps, dtype), random(2, t, e, seed=3).detach()
    found = with_gradients(ops.gated_short_conv, inputs, dy)
    expected = with_gradients(lambda u, w: conv_reference(u, w)[0], double(inputs), dy)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == getattr(torch, dtype)
        assert error(a, b) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_swiglu(dtype):
    inputs, dy = (random(2, 5, 14, dtype=dtype),), random(2, 5, 7, seed=3).detach()
    found, expected = with_gradients(ops.swiglu, inputs, dy), with_gradients(swiglu_reference, double(inputs), dy)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == getattr(torch, dtype)
        assert error(a, b) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("t", "chunk_size"), [(1, 32), (2, 1), (7, 3), (32, 32), (33, 32), (100, 16), (100, 1000)])
@pytest.mark.parametrize(("e", "n"), [(5, 4), (1, 1), (3, 17)])
def test_selective_scan(dtype, t, chunk_size, e, n):
    """With a state before it, and gradients of the state after it."""
    kind = getattr(torch, dtype)
    inputs = (*scan_inputs(t, e, n, dtype), random(2, e, n, dtype=dtype, seed=7))
    dy, dh = random(2, t, e, seed=8).detach(), random(2, e, n, seed=9).detach()
    y, h = ops.selective_scan(*inputs, chunk_size=chunk_size)
    found = (y, h, *torch.autograd.grad([y, h], inputs, [dy.to(kind), dh.to(kind)]))
    x, dt, dt_bias, a, b, c, d, before = exact = double(inputs)
    y, h = scan_reference(x, dt + dt_bias, a, b, c, d, before)
    expected = (y, h, *torch.autograd.grad([y, h], exact, [dy, dh]))
    for i, j in zip(found, expected, strict=True):
        assert i.dtype == kind
        assert error(i, j) <= TOLERANCE[dtype] * 5  # gradients of one number are sums over tokens that cancel


def test_a_scan_goes_on_from_its_state():
    inputs = [part.detach() for part in scan_inputs(50, 4, 3)]
    y, h = ops.selective_scan(*inputs)
    rows, state = [], None
    for begin, end in ((0, 1), (1, 40), (40, 50)):
        parts = [part[:, begin:end] if part.ndim == 3 else part for part in inputs]
        some, state = ops.selective_scan(*parts, state)
        rows.append(some)
    assert error(torch.cat(rows, 1), y) <= TOLERANCE["float64"] and error(state, h) <= TOLERANCE["float64"]


def test_a_scan_of_large_steps_is_finite():
    """e^−100 a token over 32 of them: no product of decays may be divided by another."""
    x, dt, dt_bias, a, b, c, d = scan_inputs(100, 3, 16, "float32")
    inputs = (x, dt, dt_bias + 25, a * 5, b, c, d)
    leaves = tuple(part.detach().requires_grad_() for part in inputs)
    dy = random(2, 100, 3, seed=8, dtype="float32").detach()
    found = with_gradients(scan, leaves, dy)
    expected = with_gradients(
        lambda x, dt, dt_bias, *rest: scan_reference(x, dt + dt_bias, *rest)[0], double(leaves), dy
    )
    for i, j in zip(found, expected, strict=True):
        assert i.isfinite().all() and (i - j).norm() <= 1e-5 * j.norm() + 1e-30


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("t", "e", "taps"), [(1, 3, 1), (10, 8, 3), (3, 2, 7)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_silu_short_conv(dtype, t, e, taps, has_bias):
    inputs = random(2, t, e, dtype=dtype), random(e, taps, dtype=dtype, seed=1), random(e, dtype=dtype, seed=2)
    inputs = inputs if has_bias else inputs[:2]

    def definition(x: Any, weight: Any, bias: Any = None) -> Any:
        padded = torch.nn.functional.pad(x.mT, (taps - 1, 0))
        return torch.nn.functional.silu(torch.nn.functional.conv1d(padded, weight[:, None], bias, groups=e)).mT

    dy = random(2, t, e, seed=3).detach()
    found = with_gradients(ops.silu_short_conv, inputs, dy)
    expected = with_gradients(definition, double(inputs), dy)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == getattr(torch, dtype)
        assert error(a, b) <= TOLERANCE[dtype]


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("rotary_dim", "base"), [(8, 10000.0), (0, 10000.0), (3, 100.0), (6, 1e6), (7, 500.0)])
def test_rotary_embedding(rotary_dim, base, interleaved):
    options = {"rotary_dim": rotary_dim, "rotary_base": base, "rotary_interleaved": interleaved}
    x = random(1, 500, 2, 8)
    expected = torch.from_numpy(rotate(x.detach().numpy()[0], np.arange(500), options))[None]
    for dtype, tolerance in (("float64", 1e-14), ("float32", 1e-7), ("bfloat16", 3e-3)):
        found = ops.rotary_embedding(
            x.to(getattr(torch, dtype)), rotary_dim=rotary_dim, base=base, interleaved=interleaved
        )
        assert found.dtype == getattr(torch, dtype)
        assert error(found, expected) <= tolerance


OPERATIONS: dict[str, tuple[Callable[..., Any], Callable[[int, str], Tensors]]] = {
    "taylor": (
        lambda q, k, v: ops.taylor_linear_attention(q, k, v, chunk_size=64),
        lambda t, x: taylor_inputs(t, 16, 8, x),
    ),
    "window": (window(17), lambda t, x: window_inputs(t, 4, 2, 8, x)),
    "conv": (ops.gated_short_conv, lambda t, x: conv_inputs(t, 8, 3, x)),
    "rotary": (lambda x: ops.rotary_embedding(x, rotary_dim=4), lambda t, x: (random(2, t, 2, 6, dtype=x),)),
    "swiglu": (ops.swiglu, lambda t, x: (random(2, t, 12, dtype=x),)),
    "scan": (scan, lambda t, x: scan_inputs(t, 6, 4, x)),
    "silu conv": (
        ops.silu_short_conv,
        lambda t, x: (random(2, t, 6, dtype=x), random(6, 4, dtype=x, seed=1), random(6, dtype=x, seed=2)),
    ),
}


@pytest.mark.parametrize(
    ("function", "inputs"),
    [
        (lambda q, k, v: ops.taylor_linear_attention(q, k, v, 1e-12, 3), [(1, 8, 2, 3), (1, 8, 2, 3), (1, 8, 2, 2)]),
        (lambda q, k, v: ops.taylor_linear_attention(q, k, v, 0.5, 8), [(2, 5, 1, 2), (2, 5, 1, 2), (2, 5, 1, 1)]),
        (window(3), [(1, 66, 2, 1), (1, 66, 1, 1), (1, 66, 1, 1)]),
        (ops.gated_short_conv, [(2, 6, 4), (2, 3)]),
        (lambda x: ops.rotary_embedding(x, rotary_dim=3, interleaved=True), [(1, 4, 2, 5)]),
        (ops.swiglu, [(2, 3, 8)]),
        (
            lambda x, dt, bias, a, b, c, d, h: ops.selective_scan(x, dt, bias, -a.exp(), b, c, d, h, chunk_size=3),
            [(1, 7, 2), (1, 7, 2), (2,), (2, 3), (1, 7, 3), (1, 7, 3), (2,), (1, 2, 3)],
        ),
        (ops.silu_short_conv, [(2, 5, 3), (3, 2), (3,)]),
    ],
)
def test_gradcheck(function, inputs):
    assert torch.autograd.gradcheck(function, [random(*shape, seed=i) for i, shape in enumerate(inputs)])


# ---- 16 bits ---------------------------------------------------------------------------------------------------------


def plain_taylor(q: Any, k: Any, v: Any) -> Any:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    s = q @ k.mT * q.shape[-1] ** -0.5
    p = (1 + s + s * s / 2).tril()
    return (p @ v / (p.sum(-1, keepdim=True) + 1e-12)).transpose(1, 2)


def plain_window(q: Any, k: Any, v: Any) -> Any:
    q, k, v = (x.transpose(1, 2).repeat_interleave(4 // x.shape[2], dim=1) for x in (q, k, v))
    age = torch.arange(q.shape[2])[:, None] - torch.arange(q.shape[2])
    scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill((age < 0) | (age >= 17), -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2)


def plain_conv(u: Any, weight: Any) -> Any:
    u1, u2 = u.chunk(2, -1)
    padded = torch.nn.functional.pad(u1.mT, (weight.shape[1] - 1, 0))
    conv = torch.nn.functional.conv1d(padded, weight[:, None], groups=len(weight)).mT
    return torch.nn.functional.silu(conv) * u2


def plain_swiglu(h: Any) -> Any:
    value, gate = h.chunk(2, -1)
    return value * torch.nn.functional.silu(gate)


PLAIN = {"taylor": plain_taylor, "window": plain_window, "conv": plain_conv, "swiglu": plain_swiglu, "scan": plain_scan}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", PLAIN)
def test_error_of_16_bits(name, dtype):
    """At most twice that of the plain evaluation in the same dtype, of the result and of every gradient."""
    function, make = OPERATIONS[name]
    inputs = make(400, dtype)
    plain = with_gradients(PLAIN[name], inputs, dy := random(*function(*inputs).shape, dtype=dtype, seed=3).detach())
    found = with_gradients(function, inputs, dy)
    exact = with_gradients(function, double(inputs), dy)
    for a, b, c in zip(found, plain, exact, strict=True):
        assert a.dtype == getattr(torch, dtype)
        assert 0 < error(a, c) <= FACTOR * error(b, c)


def test_sums_of_bfloat16_are_float32():
    """Sums of 16,384 tokens, 16 at a time: in bfloat16 4,096 + 16 is 4,096."""
    t = 16384
    q = torch.zeros(1, t, 1, 1, dtype=torch.bfloat16, requires_grad=True)
    v = (torch.arange(t) < t // 2).to(torch.bfloat16).view(1, t, 1, 1).requires_grad_()
    y = ops.taylor_linear_attention(q, q, v, chunk_size=16)
    mean = v.detach().double().cumsum(1) / torch.arange(1, t + 1).view(1, t, 1, 1)
    assert error(y, mean) <= 3e-3
    (dv,) = torch.autograd.grad(y, v, torch.ones_like(y))
    after = (1 / torch.arange(1, t + 1, dtype=torch.float64)).flip(0).cumsum(0).flip(0)  # Σ_{s ≥ t} 1/s
    assert error(dv, after.view(1, t, 1, 1)) <= 3e-3


def test_states_beyond_the_range_of_float16():
    """Σ v over 3,000 tokens of 100 each is 300,000."""
    q = torch.zeros(1, 3000, 1, 2, dtype=torch.float16, requires_grad=True)
    v = torch.full((1, 3000, 1, 1), 100, dtype=torch.float16, requires_grad=True)
    y = ops.taylor_linear_attention(q, q, v)
    assert torch.equal(y, torch.full_like(y, 100))
    (dv,) = torch.autograd.grad(y.sum(), v)
    assert dv.isfinite().all()


DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


@pytest.mark.parametrize(
    ("device", "dtype", "norm"),
    [
        pytest.param(device, dtype, norm, marks=[pytest.mark.gpu] if device == "cuda" else [])
        for device, dtype, norm in itertools.product(["cpu", "cuda"], ["float32", "bfloat16", "float16"], [4, 16, 32])
        if (device, dtype) != ("cuda", "bfloat16") or norm == 4  # the range that docs/training.md states
    ],
)
def test_queries_at_right_angles_to_long_keys(device, dtype, norm):
    """Where φ(q)·S cancels most: the result stays a mean of the values."""
    t, f = 600, 16
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(f, f, dtype=torch.float64, generator=generator)).Q
    halves = [torch.randn(1, t, 2, f // 2, dtype=torch.float64, generator=generator) for _ in range(2)]
    q, k = (
        norm * torch.nn.functional.normalize(half, dim=-1) @ part
        for half, part in zip(halves, basis.split(f // 2), strict=True)
    )
    v = torch.randn(1, t, 2, 8, dtype=torch.float64, generator=generator)
    inputs = tuple(x.to(device, getattr(torch, dtype)).requires_grad_() for x in (q, k, v))
    dy = random(1, t, 2, 8, seed=3, device=device).detach()
    found = with_gradients(ops.taylor_linear_attention, inputs, dy)
    expected = with_gradients(taylor_reference, double(inputs), dy)
    assert found[0].abs().max() <= inputs[2].abs().max() * (1 + 1e-2)
    for a, b in zip(found, expected, strict=True):
        assert error(a, b) <= {"float32": 1e-3, "bfloat16": 6e-3, "float16": 2e-3}[dtype]


# ---- memory ----------------------------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation makes."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.untyped_storage().nbytes() // x.element_size())
        return result


def memory(name: str, t: int) -> tuple[int, int]:
    """Bytes that are saved for the backward pass, each storage once; elements of the largest tensor of both passes."""
    function, make = OPERATIONS[name]
    inputs = make(t, "float32")
    saved: dict[int, int] = {}

    def pack(x: Any) -> Any:
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with Largest() as largest:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            y = function(*inputs)
        y.sum().backward()
    return sum(saved.values()), largest.numel


@pytest.mark.parametrize("name", OPERATIONS)
def test_memory_is_linear_in_the_number_of_tokens(name):
    (saved, largest), (saved_of_twice, largest_of_twice) = memory(name, 2048), memory(name, 4096)
    assert 0 < saved <= saved_of_twice <= 2.1 * saved
    assert 0 < largest <= largest_of_twice <= 2.1 * largest
    batch_and_heads = {"taylor": 6, "window": 8, "conv": 2, "rotary": 4, "swiglu": 2, "scan": 2, "silu conv": 2}[name]
    assert largest_of_twice < batch_and_heads * 4096 * 4096 / 8


def test_what_is_saved_is_inputs_and_result():
    inputs_and_result = {
        "taylor": 2 * 3 * (16 + 16 + 8 + 8) * 2048,
        "conv": 2 * 2048 * 16 + 8 * 3,
        "swiglu": 2 * 2048 * 12,
        # And the states before each chunk of 32, where one of each token would take 2 · 2048 · 6 · 4.
        "scan": 2 * 2048 * (6 + 6 + 4 + 4) + 6 + 6 * 4 + 6 + 2 * 6 * 4 * (1 + 2048 // 32),
    }
    for name, numel in inputs_and_result.items():
        assert memory(name, 2048)[0] == 4 * numel


# ---- autocast, torch.compile -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPERATIONS)
def test_autocast(name):
    """As the same call on inputs in autocast's dtype; whether backward() runs under it does not matter."""
    function, make = OPERATIONS[name]
    inputs, halves = make(100, "float32"), make(100, "bfloat16")
    with torch.autocast("cpu", torch.bfloat16):
        y = function(*inputs)
    expected = function(*halves)
    if name in ("taylor", "window"):
        assert torch.equal(y, expected)
    dy = random(*y.shape, dtype="float32", seed=9).detach().to(y.dtype)
    outside = torch.autograd.grad(y, inputs, dy, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        inside = torch.autograd.grad(y, inputs, dy)
    for a, b in zip(outside, inside, strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b)


def test_autocast_takes_mixed_inputs():
    q, k, v = taylor_inputs(20, 4, 4, "float32")
    with pytest.raises(TypeError, match="v is bfloat16, expected float32, which q is"):
        ops.taylor_linear_attention(q, k, v.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.taylor_linear_attention(q, k, v.bfloat16()).dtype == torch.bfloat16
        u, weight = conv_inputs(5, 4, 3, "float32")
        assert ops.gated_short_conv(u.bfloat16(), weight).dtype == torch.bfloat16


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_compiles_in_one_graph(name, backend):
    function, make = OPERATIONS[name]
    inputs = make(100, "float32")
    dy = random(*function(*inputs).shape, dtype="float32", seed=9).detach()
    torch._dynamo.reset()
    compiled = torch.compile(function, backend=backend, fullgraph=True)
    for a, b in zip(with_gradients(compiled, inputs, dy), with_gradients(function, inputs, dy), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("t", [128, 256, 300])
def test_taylor_linear_attention_of_one_head_compiles(t):
    """Then the result is a view of what it is made of, and nothing is to be copied."""
    inputs = [x[:1, :, :1].detach().requires_grad_() for x in taylor_inputs(t, 8, 8, "float32")]
    dy = random(1, t, 1, 8, dtype="float32", seed=9).detach()
    torch._dynamo.reset()
    compiled = torch.compile(ops.taylor_linear_attention, backend="eager", fullgraph=True)
    found, expected = (with_gradients(f, inputs, dy) for f in (compiled, ops.taylor_linear_attention))
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", OPERATIONS)
def test_compiles_in_one_graph_for_all_lengths(name):
    function, make = OPERATIONS[name]
    torch._dynamo.reset()
    compiled = torch.compile(function, backend="eager", fullgraph=True, dynamic=True)
    for t in (150, 190):
        inputs = make(t, "float32")
        dy = random(*function(*inputs).shape, dtype="float32", seed=9).detach()
        for a, b in zip(with_gradients(compiled, inputs, dy), with_gradients(function, inputs, dy), strict=True):
            assert error(a, b.double()) <= TOLERANCE["float32"]


@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor compiles C++")
@pytest.mark.parametrize(("dynamic", "lengths"), [(None, (8, 16, 300, 400)), (True, (64, 300, 100))])
def test_inductor_takes_any_length(dynamic, lengths):
    """By PyTorch's own compiler, which the other tests leave out: it has no shapes for chunks of any number."""
    torch._dynamo.reset()
    compiled = torch.compile(ops.taylor_linear_attention, fullgraph=True, dynamic=dynamic)
    for t in lengths:
        inputs, dy = taylor_inputs(t, 16, 8, "float32"), random(2, t, 3, 8, dtype="float32", seed=9).detach()
        found, expected = (with_gradients(f, inputs, dy) for f in (compiled, ops.taylor_linear_attention))
        for a, b in zip(found, expected, strict=True):
            assert error(a, b.double()) <= TOLERANCE["float32"]


# ---- derivatives of other kinds --------------------------------------------------------------------------------------


def taylor_case(t: int, chunk_size: int) -> tuple[Callable[..., Any], Callable[..., Any], Tensors]:
    return (
        lambda q, k, v: ops.taylor_linear_attention(q, k, v, chunk_size=chunk_size),
        taylor_reference,
        tuple(random(1, t, 2, n, seed=seed).detach() for seed, n in enumerate((3, 3, 2))),
    )


def window_case(t: int, size: int) -> tuple[Callable[..., Any], Callable[..., Any], Tensors]:
    inputs = tuple(random(1, t, heads, 3, seed=seed).detach() for seed, heads in enumerate((2, 1, 1)))
    return window(size), lambda q, k, v: window_reference(q, k, v, size, 3**-0.5), inputs


# The operation, its definition, and inputs: of one chunk or block and of several.
DERIVED: dict[str, tuple[Callable[..., Any], Callable[..., Any], Tensors]] = {
    "taylor of one chunk": taylor_case(6, 128),
    "taylor of three": taylor_case(10, 4),
    "window of one block": window_case(6, 3),
    "window of all": window_case(6, 9),
    "window of two blocks": window_case(70, 3),
    "conv": (
        ops.gated_short_conv,
        lambda u, w: conv_reference(u, w)[0],
        tuple(x.detach() for x in conv_inputs(5, 3, 2)),
    ),
    "swiglu": (ops.swiglu, swiglu_reference, (random(1, 3, 6).detach(),)),
    "scan": (
        lambda *x: scan(*x, chunk_size=3),
        lambda x, dt, dt_bias, *rest: scan_reference(x, dt + dt_bias, *rest)[0],
        tuple(x.detach() for x in scan_inputs(7, 2, 3)),
    ),
    "loss": (
        lambda h, w: linear_cross_entropy(h, w, torch.tensor([1, 2, -100, 0, 5]), 6),
        lambda h, w: torch.nn.functional.cross_entropy(h @ w[:6].T, torch.tensor([1, 2, -100, 0, 5])),
        (random(5, 4).detach(), random(7, 4, seed=1).detach()),
    ),
}
BATCHED = [name for name in DERIVED if name != "loss"]


def energy(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *inputs: function(*inputs).square().sum()


def assert_equal(found: Any, expected: Any) -> None:
    for a, b in zip(found, expected, strict=True):
        assert error(a, b) <= TOLERANCE["float64"]


@pytest.mark.parametrize("name", DERIVED)
def test_second_derivatives(name):
    """Products with the Hessian, where every input has a part, and where the inputs are results of something else."""
    function, reference, inputs = DERIVED[name]
    vectors = tuple(random(*x.shape, seed=9).detach() for x in inputs)
    for inner in (lambda x: x, torch.sin):
        found, expected = (
            torch.autograd.functional.hvp(lambda *x, f=f, inner=inner: energy(f)(*map(inner, x)), inputs, vectors)[1]
            for f in (function, reference)
        )
        assert_equal(found, expected)


@pytest.mark.parametrize("name", DERIVED)
def test_a_gradient_penalty(name):
    """By a backward pass for some of the inputs, which leaves other nodes of the graph out."""
    function, reference, inputs = DERIVED[name]
    results = []
    for f in (function, reference):
        x = [x.clone().requires_grad_() for x in inputs]
        penalties = torch.autograd.grad(energy(f)(*x), x, create_graph=True)
        penalty = sum(g.square().sum() for g in penalties)
        results.append(torch.autograd.grad(penalty, x, retain_graph=True))
        (penalty + x[0].square().sum()).backward(inputs=[x[0]])
        results[-1] += (x[0].grad,)
    assert_equal(*results)


@pytest.mark.parametrize("name", ["taylor of three", "conv", "swiglu", "scan"])
def test_third_derivatives(name):
    function, _, inputs = DERIVED[name]
    assert torch.autograd.gradgradcheck(function, [x.clone().requires_grad_() for x in inputs])


@pytest.mark.parametrize("operation", ["taylor", "window"])
def test_one_tensor_as_two_inputs(operation):
    name = f"{operation} of {'three' if operation == 'taylor' else 'two blocks'}"
    function, reference, (_, x, v) = DERIVED[name]
    results = (
        torch.autograd.functional.hvp(lambda x, v, f=f: energy(f)(x, x, v), (x, v), (x.cos(), v.cos()))[1]
        for f in (function, lambda q, k, v: reference(q, k, v))
    )
    assert_equal(*results)


@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")  # of torch.func.jvp itself
@pytest.mark.parametrize("name", BATCHED)
def test_functional_transforms(name):
    """grad, jvp, and vmap of both, over each input by itself."""
    function, reference, inputs = DERIVED[name]
    vectors = tuple(random(*x.shape, seed=9).detach() for x in inputs)
    numbers = tuple(range(len(inputs)))
    transforms = (
        lambda f: torch.func.grad(energy(f), numbers)(*inputs),
        lambda f: torch.func.jvp(f, inputs, vectors),
        lambda f: torch.func.jvp(torch.func.grad(energy(f), numbers), inputs, vectors)[1],
        lambda f: torch.func.jacrev(torch.func.grad(energy(f)))(*(x[:, :4] if x.ndim > 2 else x for x in inputs)),
    )
    for transform in transforms:
        for a, b in zip(flat(transform(function)), flat(transform(reference)), strict=True):
            assert error(a, b) <= TOLERANCE["float64"]
    for number in numbers:
        dims = tuple(0 if i == number else None for i in numbers)
        batch = tuple(torch.stack([x, x.cos()]) if i == number else x for i, x in enumerate(inputs))
        for f, g in ((function, reference), *((torch.func.grad(energy(h)) for h in (function, reference)),)):
            found = torch.func.vmap(f, dims)(*batch)
            for row in range(2):
                expected = g(*(x[row] if i == number else x for i, x in enumerate(batch)))
                assert error(found[row], expected) <= TOLERANCE["float64"]


def flat(x: Any) -> list[Any]:
    return [x] if isinstance(x, torch.Tensor) else [leaf for part in x for leaf in flat(part)]


@pytest.mark.parametrize("name", BATCHED)
def test_jacobians_by_batched_gradients(name):
    function, reference, inputs = DERIVED[name]
    found, expected = (
        torch.autograd.functional.jacobian(f, inputs, vectorize=vectorize)
        for f, vectorize in ((function, not name.startswith("window")), (reference, False))
    )
    assert_equal(found, expected)


@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")  # of torch.func.jvp itself
def test_forward_mode():
    function, reference, inputs = DERIVED["taylor of three"]
    found, expected = (
        torch.autograd.functional.jacobian(f, inputs, vectorize=True, strategy="forward-mode")
        for f in (function, reference)
    )
    assert_equal(found, expected)


@DEVICES
@pytest.mark.parametrize("name", ["taylor", "window", "conv", "swiglu", "scan"])
def test_second_derivatives_in_bfloat16_and_under_autocast(device, name):
    """A penalty on the gradient, whose own gradient is as near to float64 as rounded first gradients let it be."""
    function, make = OPERATIONS[name]

    def penalty_gradients(inputs: Tensors) -> Tensors:
        first = torch.autograd.grad(energy(function)(*inputs), inputs, create_graph=True)
        return torch.autograd.grad(sum(g.float().square().sum() for g in first), inputs)

    inputs = tuple(x.detach().to(device).requires_grad_() for x in make(40, "bfloat16"))
    expected = penalty_gradients(double(inputs))
    for a, b in zip(penalty_gradients(inputs), expected, strict=True):
        assert a.dtype == torch.bfloat16 and error(a, b) <= 2e-2
    wide = tuple(x.detach().float().requires_grad_() for x in inputs)
    with torch.autocast(device, torch.bfloat16):
        under_autocast = penalty_gradients(wide)
    for a, b in zip(under_autocast, expected, strict=True):
        assert error(a, b) <= 2e-2


class AttendBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dy: Any, q: Any, k: Any, v: Any, window: int, scale: float) -> Tensors:
        with torch.enable_grad():
            inputs = [x.detach().requires_grad_() for x in (q, k, v)]
            return torch.autograd.grad(window_reference(*inputs, window, scale), inputs, dy)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise RuntimeError("no formula")


class Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Any, k: Any, v: Any, window: int, scale: float) -> Any:
        ctx.save_for_backward(q, k, v)
        ctx.rest = window, scale
        return window_reference(q, k, v, window, scale)

    @staticmethod
    def backward(ctx: Any, dy: Any) -> Any:
        return (*AttendBackward.apply(dy, *ctx.saved_tensors, *ctx.rest), None, None)


def test_second_derivatives_beside_an_operator_that_has_none(monkeypatch):
    """As PyTorch's FlashAttention on a GPU: it is asked for gradients of zeros, which cannot be differentiated."""
    function, reference, inputs = DERIVED["window of two blocks"]
    monkeypatch.setattr(ops, "_takes_flash", lambda q: True)
    monkeypatch.setattr(ops, "_attend_window", Attend.apply)
    vectors = tuple(x.detach().cos() for x in inputs)
    found, expected = (torch.autograd.functional.hvp(energy(f), inputs, vectors)[1] for f in (function, reference))
    assert_equal(found, expected)
    inputs = tuple(x.clone().requires_grad_() for x in inputs)
    assert_equal(*(torch.autograd.grad(energy(f)(*inputs), inputs) for f in (function, reference)))


# ---- what is refused -------------------------------------------------------------------------------------------------

X = torch.zeros(2, 10, 3, 8)
Y = torch.zeros(2, 5, 3)


def scan_with(**changes: Any) -> Any:
    vector = Y[0, 0]
    inputs = {"x": Y, "dt": Y, "dt_bias": vector, "a": Y[0, :3], "b": Y, "c": Y, "d": vector}
    return ops.selective_scan(**inputs | changes)


@pytest.mark.parametrize(
    ("call", "exception", "message"),
    [
        (
            lambda: ops.taylor_linear_attention(X, X[:, :-1], X),
            ValueError,
            "k has shape (2, 9, 3, 8), expected (2, 10, 3, 8)",
        ),
        (
            lambda: ops.taylor_linear_attention(X, X, X[:, :, :2]),
            ValueError,
            "v has shape (2, 10, 2, 8), expected (2, 10, 3, D)",
        ),
        (lambda: ops.taylor_linear_attention(X[0], X, X), ValueError, "q has shape (10, 3, 8), expected (B, T, H, f)"),
        (
            lambda: ops.taylor_linear_attention(X[:, :0], X[:, :0], X[:, :0]),
            ValueError,
            "q has shape (2, 0, 3, 8), expected extents ≥ 1",
        ),
        (lambda: ops.taylor_linear_attention(X, X.half(), X), TypeError, "k is float16, expected float32, which q is"),
        (
            lambda: ops.taylor_linear_attention(X.long(), X, X),
            TypeError,
            "q is int64, expected float64, float32, bfloat16 or float16",
        ),
        (lambda: ops.taylor_linear_attention(X.numpy(), X, X), TypeError, "q is a ndarray, expected a torch.Tensor"),
        (lambda: ops.taylor_linear_attention(X, X.to("meta"), X), ValueError, "k is on meta, expected cpu, where q is"),
        (
            lambda: ops.taylor_linear_attention(X, X, X, eps=-1.0),
            ValueError,
            "eps is -1.0, expected a finite number ≥ 0",
        ),
        (lambda: ops.taylor_linear_attention(X, X, X, eps=float("nan")), ValueError, "eps is nan"),
        (lambda: ops.taylor_linear_attention(X, X, X, chunk_size=0), ValueError, "chunk_size is 0, expected ≥ 1"),
        (
            lambda: ops.sliding_window_attention(X, X[:, :, :2], X[:, :, :2], window=1),
            ValueError,
            "k has 2 heads, expected a divisor of the 3 heads of q",
        ),
        (
            lambda: ops.sliding_window_attention(X, X[..., :4], X, window=1),
            ValueError,
            "k has shape (2, 10, 3, 4), expected (2, 10, H_kv, 8)",
        ),
        (lambda: ops.sliding_window_attention(X, X, X, window=0), ValueError, "window is 0, expected ≥ 1"),
        (
            lambda: ops.sliding_window_attention(X, X, X, window=1, scale=0.0),
            ValueError,
            "scale is 0.0, expected a finite number > 0",
        ),
        (lambda: ops.rotary_embedding(X[..., :7], rotary_dim=7), ValueError, "rotary_dim is 7, expected 0 to 6"),
        (lambda: ops.rotary_embedding(X, rotary_dim=-1), ValueError, "rotary_dim is -1, expected 0 to 8"),
        (
            lambda: ops.rotary_embedding(X, rotary_dim=2, base=0.0),
            ValueError,
            "base is 0.0, expected a finite number > 0",
        ),
        (lambda: ops.gated_short_conv(X, X[0, 0]), ValueError, "u has shape (2, 10, 3, 8), expected (B, T, 2e)"),
        (
            lambda: ops.gated_short_conv(X[0, :, :, :7], X[0, 0]),
            ValueError,
            "u has shape (10, 3, 7), expected (B, T, 2e)",
        ),
        (lambda: ops.gated_short_conv(X[0], X[0, 0]), ValueError, "weight has shape (3, 8), expected (4, K)"),
        (lambda: ops.swiglu(X[0, :, :, :7]), ValueError, "h has shape (10, 3, 7), expected (B, T, 2m)"),
        (lambda: scan_with(dt=Y[:, :-1]), ValueError, "dt has shape (2, 4, 3), expected (2, 5, 3)"),
        (lambda: scan_with(c=Y[..., :2]), ValueError, "c has shape (2, 5, 2), expected (2, 5, 3)"),
        (lambda: scan_with(a=Y[0]), ValueError, "a has shape (5, 3), expected (3, 3)"),
        (lambda: scan_with(d=Y[0, 0].half()), TypeError, "d is float16, expected float32"),
        (lambda: scan_with(dt_bias=None), TypeError, "dt_bias is a NoneType, expected a torch.Tensor"),
        (lambda: scan_with(initial_state=Y), ValueError, "initial_state has shape (2, 5, 3), expected (2, 3, 3)"),
        (lambda: scan_with(chunk_size=0), ValueError, "chunk_size is 0, expected ≥ 1"),
        (lambda: ops.silu_short_conv(Y, Y[0]), ValueError, "weight has shape (5, 3), expected (3, 3)"),
        (lambda: ops.silu_short_conv(Y, Y[0, :3], Y[0]), ValueError, "bias has shape (5, 3), expected (3,)"),
        (lambda: ops.gated_short_conv(X[0], X[0, :4, 0].half()), TypeError, "weight is float16, expected float32"),
    ],
)
def test_bad_input(call, exception, message):
    with pytest.raises(exception) as caught:
        call()
    assert message in str(caught.value)


# ---- GPUs ------------------------------------------------------------------------------------------------------------


GPU_TOLERANCE = {"float32": 2e-5, "bfloat16": 6e-3, "float16": 1e-3}  # of one rounding: 1.7e-3 and 2e-4


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
# Chunks of the kernels have 256 tokens, tiles 64; f = 5 and D = 7 have none.
@pytest.mark.parametrize(
    ("t", "f", "d"),
    [(1, 16, 64), (100, 16, 64), (256, 16, 64), (257, 32, 128), (1000, 8, 40), (600, 24, 112), (700, 5, 7)],
)
def test_taylor_linear_attention_on_a_gpu(dtype, t, f, d):
    inputs = taylor_inputs(t, f, d, dtype, "cuda")
    dy = random(2, t, 3, d, seed=3, dtype=dtype, device="cuda").detach()
    found = with_gradients(ops.taylor_linear_attention, inputs, dy)
    expected = with_gradients(taylor_reference, double(inputs), dy)
    for a, b in zip(found, expected, strict=True):
        if t == 1:
            assert (a - b).abs().max() <= 1e-2
        else:
            assert error(a, b) <= GPU_TOLERANCE[dtype]
    again = with_gradients(ops.taylor_linear_attention, inputs, dy)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


@pytest.mark.gpu
def test_taylor_linear_attention_on_a_gpu_of_parts_of_one_tensor():
    """q, k, v and dy with strides of their own."""
    t, f, d = 300, 16, 64
    qkv = random(2, t, 3, 2 * f + d, dtype="bfloat16", device="cuda")
    whole = random(2, 3, t, d, seed=3, dtype="bfloat16", device="cuda").detach()

    def attend(x: Any) -> Any:
        return ops.taylor_linear_attention(*x.split([f, f, d], -1)).transpose(1, 2)

    def reference(x: Any) -> Any:
        return taylor_reference(*x.split([f, f, d], -1)).transpose(1, 2)

    found = with_gradients(attend, (qkv,), whole)
    expected = with_gradients(reference, double((qkv,)), whole)
    for a, b in zip(found, expected, strict=True):
        assert error(a, b) <= GPU_TOLERANCE["bfloat16"]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(("t", "e", "taps"), [(1, 8, 3), (130, 200, 3), (200, 64, 1), (65, 24, 8), (20, 8, 9)])
def test_gated_short_conv_on_a_gpu(dtype, t, e, taps):
    inputs = conv_inputs(t, e, taps, dtype, "cuda")
    dy = random(2, t, e, seed=3, dtype=dtype, device="cuda").detach()
    found = with_gradients(ops.gated_short_conv, inputs, dy)
    expected = with_gradients(lambda u, w: conv_reference(u, w)[0], double(inputs), dy)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == getattr(torch, dtype)
        assert error(a, b) <= GPU_TOLERANCE[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("m", [7, 1024, 1500])
def test_swiglu_on_a_gpu(dtype, m):
    inputs = (random(2, 5, 2 * m, dtype=dtype, device="cuda"),)
    dy = random(2, 5, m, seed=3, dtype=dtype, device="cuda").detach()
    found, expected = with_gradients(ops.swiglu, inputs, dy), with_gradients(swiglu_reference, double(inputs), dy)
    for a, b in zip(found, expected, strict=True):
        assert error(a, b) <= GPU_TOLERANCE[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("f", [16, 5])
def test_compiles_on_a_gpu(f):
    torch._dynamo.reset()
    inputs = taylor_inputs(300, f, 32, "bfloat16", "cuda")
    dy = random(2, 300, 3, 32, seed=3, dtype="bfloat16", device="cuda").detach()
    compiled = torch.compile(ops.taylor_linear_attention, backend="aot_eager", fullgraph=True)
    found, expected = (with_gradients(x, inputs, dy) for x in (compiled, ops.taylor_linear_attention))
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("t", [50, 128, 129, 1000])
def test_sliding_window_attention_on_a_gpu(dtype, t):
    inputs = window_inputs(t, 4, 2, 64, dtype, "cuda")
    dy = random(2, t, 4, 64, seed=3, dtype=dtype, device="cuda").detach()
    found = with_gradients(window(129), inputs, dy)
    expected = with_gradients(lambda q, k, v: window_reference(q, k, v, 129, 1 / 8), double(inputs), dy)
    for a, b in zip(found, expected, strict=True):
        assert error(a, b) <= GPU_TOLERANCE[dtype]
