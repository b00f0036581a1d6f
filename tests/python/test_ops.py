"""based.ops against the same equations in float64 PyTorch."""

import types
from typing import Any

import based
import numpy as np
import pytest
from based import ops

torch = pytest.importorskip("torch")

from tests.reference.torch_model import conv_reference, state_reference, taylor_reference, window_reference

gpu = pytest.mark.gpu
LENGTHS = [1, 63, 64, 65, 1000]
DTYPES = ["float32", "bfloat16", "float16"]
TOLERANCE = {"float32": 2e-5, "bfloat16": 1e-2, "float16": 3e-3}  # rel-L2


def random(*shape: int, dtype: str = "float32", seed: int = 0) -> Any:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, generator=generator, device="cuda").to(getattr(torch, dtype))


def assert_close(found: Any, expected: Any, dtype: str) -> None:
    assert found.shape == expected.shape
    error = (found.double() - expected.double()).norm() / expected.double().norm()
    assert error <= TOLERANCE[dtype], float(error)


# ---- against float64 -------------------------------------------------------------------------------------------------


@gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(("f", "d"), [(16, 64), (8, 40), (5, 7)])
def test_taylor_linear_attention(dtype, length, f, d):
    q, k = (random(2, length, 3, f, dtype=dtype, seed=seed) for seed in (0, 1))
    v = random(2, length, 3, d, dtype=dtype, seed=2)
    y, state = ops.taylor_linear_attention(q, k, v, return_state=True)
    assert (y.dtype, y.device, state.dtype) == (v.dtype, v.device, torch.float32)
    assert_close(y, taylor_reference(q, k, v), dtype)
    assert_close(state, state_reference(k, v), dtype)
    assert torch.equal(ops.taylor_linear_attention(q, k, v), y)


@gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(("heads", "kv_heads", "d", "window"), [(4, 4, 64, 129), (6, 2, 80, 64), (2, 1, 24, 5)])
def test_sliding_window_attention(dtype, length, heads, kv_heads, d, window):
    q = random(2, length, heads, d, dtype=dtype, seed=0)
    k, v = (random(2, length, kv_heads, d, dtype=dtype, seed=seed) for seed in (1, 2))
    before = [x.clone() for x in (q, k, v)]
    y = ops.sliding_window_attention(q, k, v, window=window)
    assert_close(y, window_reference(q, k, v, window, d**-0.5), dtype)
    assert_close(
        ops.sliding_window_attention(q, k, v, window=window, scale=0.3), window_reference(q, k, v, window, 0.3), dtype
    )
    assert all(torch.equal(x, y) for x, y in zip((q, k, v), before, strict=True))


@gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(("e", "taps"), [(256, 3), (17, 4), (64, 1)])
def test_gated_short_conv(dtype, length, e, taps):
    u, weight = random(2, length, 2 * e, dtype=dtype), random(e, taps, dtype=dtype, seed=1)
    y, state = ops.gated_short_conv(u, weight, return_state=True)
    expected, expected_state = conv_reference(u, weight)
    assert_close(y, expected, dtype)
    assert torch.equal(state.double(), expected_state)


@gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cut", [1, 64, 200, 299])
def test_states_chain_calls(dtype, cut):
    q, k = (random(2, 300, 2, 16, dtype=dtype, seed=seed) for seed in (0, 1))
    v = random(2, 300, 2, 64, dtype=dtype, seed=2)
    expected = taylor_reference(q, k, v)
    first, state = ops.taylor_linear_attention(q[:, :cut], k[:, :cut], v[:, :cut], return_state=True)
    kept = state.clone()
    q2, k2, v2 = (x[:, cut:] for x in (q, k, v))
    second, end = ops.taylor_linear_attention(q2, k2, v2, initial_state=state, return_state=True)
    assert torch.equal(state, kept)
    assert_close(torch.cat([first, second], 1), expected, dtype)
    assert_close(end, state_reference(k, v), dtype)

    u, weight = random(2, 300, 64, dtype=dtype), random(32, 3, dtype=dtype, seed=1)
    whole = ops.gated_short_conv(u, weight)
    first, state = ops.gated_short_conv(u[:, :cut].contiguous(), weight, return_state=True)
    second = ops.gated_short_conv(u[:, cut:].contiguous(), weight, initial_state=state)
    assert_close(torch.cat([first, second], 1), whole, dtype)


# ---- memory, streams -------------------------------------------------------------------------------------------------


@gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_strides_of_tokens_and_heads(dtype):
    """Slices of one projection, and heads before tokens."""
    qkv = random(2, 100, 4 * (16 + 16 + 64), dtype=dtype)
    q, k, v = (x.view(2, 100, 4, -1) for x in qkv.split([64, 64, 256], dim=-1))
    expected = ops.taylor_linear_attention(q.contiguous(), k.contiguous(), v.contiguous())
    assert torch.equal(ops.taylor_linear_attention(q, k, v), expected)
    swapped = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    assert_close(ops.taylor_linear_attention(*swapped), expected, dtype)
    q, k = (x.view(2, 100, 4, 32) for x in qkv[..., :256].split(128, dim=-1))
    expected = ops.sliding_window_attention(q.contiguous(), k.contiguous(), k.contiguous(), window=33)
    assert torch.equal(ops.sliding_window_attention(q, k, k, window=33), expected)
    swapped = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k)]
    assert_close(ops.sliding_window_attention(swapped[0], swapped[1], swapped[1], window=33), expected, dtype)


@gpu
@pytest.mark.parametrize("explicit", [False, True])
def test_work_is_on_the_stream(explicit):
    """Inputs that are made late, on the stream that the call runs on."""
    stream = torch.cuda.Stream()
    final = [random(1, 500, 2, n, seed=n) for n in (16, 17, 64)]
    final[1] = final[1][..., :16].contiguous()
    inputs = [torch.zeros_like(x) for x in final]
    ops.taylor_linear_attention(*inputs)  # loads kernels
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        for target, source in zip(inputs, final, strict=True):
            target.copy_(source)
        if not explicit:
            y = ops.taylor_linear_attention(*inputs)
        else:
            handle = stream.cuda_stream
    if explicit:
        with torch.cuda.stream(stream):
            y = ops.taylor_linear_attention(*inputs, stream=handle)
    assert not stream.query()  # the call waited for nothing
    torch.cuda.synchronize()
    assert_close(y, taylor_reference(*final), "float32")


@gpu
def test_tensors_of_another_library():
    """What speaks DLPack and is no torch tensor: results are based.Tensors."""

    def foreign(x: Any) -> Any:
        return types.SimpleNamespace(
            shape=tuple(x.shape), dtype="bfloat16", __dlpack__=x.__dlpack__, __dlpack_device__=x.__dlpack_device__
        )

    q, k = (random(1, 70, 2, 16, dtype="bfloat16", seed=seed) for seed in (0, 1))
    v = random(1, 70, 2, 64, dtype="bfloat16", seed=2)
    y, state = ops.taylor_linear_attention(foreign(q), foreign(k), foreign(v), return_state=True)
    assert isinstance(y, based.Tensor)
    assert (y.dtype, y.device, y.shape) == ("bfloat16", "cuda:0", (1, 70, 2, 64))
    expected, expected_state = ops.taylor_linear_attention(q, k, v, return_state=True)
    assert torch.equal(torch.from_dlpack(y), expected)
    np.testing.assert_array_equal(np.asarray(state), expected_state.cpu().numpy())
    again = ops.taylor_linear_attention(q, k, v, initial_state=state)
    assert torch.equal(again, ops.taylor_linear_attention(q, k, v, initial_state=expected_state))


@gpu
def test_many_shapes():
    """More than are remembered."""
    for length in range(1, 150):
        u = random(2, length, 16, seed=length)
        assert_close(
            ops.gated_short_conv(u, torch.ones(8, 2, device="cuda")), conv_reference(u, u.new_ones(8, 2))[0], "float32"
        )


# ---- what is refused -------------------------------------------------------------------------------------------------


@gpu
@pytest.mark.parametrize(
    ("change", "error", "fragment"),
    [
        ({"k": lambda x: x[:, :-1]}, ValueError, "k has shape (2, 9, 3, 8), expected (2, 10, 3, 8)"),
        ({"v": lambda x: x[:, :, :2]}, ValueError, "v has shape (2, 10, 2, 16), expected (2, 10, 3, 16)"),
        ({"k": lambda x: x.half()}, ValueError, "k is float16, expected float32"),
        ({"q": lambda x: x.double()}, TypeError, "q has DLPack dtype (2, 64 bits), expected float32, bfloat16"),
        ({"k": lambda x: x.cpu()}, ValueError, "k is on cpu, expected a CUDA device"),
        ({"v": lambda x: x.mT.contiguous().mT}, ValueError, "expected stride 1 on axis 3"),
        ({"q": lambda x: x[0]}, ValueError, "q has shape (10, 3, 8), expected (B, T, H, f)"),
        ({"q": lambda x: x[:, :0], "k": lambda x: x[:, :0], "v": lambda x: x[:, :0]}, ValueError, "q has shape (2, 0,"),
        ({"initial_state": lambda _: torch.zeros(2, 3, 45, 16)}, ValueError, "expected (2, 3, 45, 17)"),
        (
            {"initial_state": lambda _: torch.zeros(2, 3, 45, 17, device="cuda").half()},
            ValueError,
            "initial_state is float16, expected float32",
        ),
        ({"v": lambda x: x.requires_grad_()}, BufferError, "grad"),
        ({"q": lambda x: torch.zeros(481, device="cuda")[1:].view(2, 10, 3, 8)}, ValueError, "multiple of 16 bytes"),
        ({"eps": lambda _: -1.0}, ValueError, "eps is -1"),
    ],
)
def test_bad_input(change, error, fragment):
    inputs: dict[str, Any] = {"q": random(2, 10, 3, 8), "k": random(2, 10, 3, 8), "v": random(2, 10, 3, 16)}
    inputs |= {name: make(inputs.get(name)) for name, make in change.items()}
    with pytest.raises(error) as caught:
        ops.taylor_linear_attention(**inputs)
    assert fragment in str(caught.value)


@gpu
def test_bad_input_of_the_others():
    q, k = random(1, 5, 4, 8), random(1, 5, 3, 8)
    with pytest.raises(ValueError, match="k has 3 heads, expected a divisor of the 4 heads of q"):
        ops.sliding_window_attention(q, k, k, window=2)
    with pytest.raises(ValueError, match="window is 0, expected ≥ 1"):
        ops.sliding_window_attention(q, q, q, window=0)
    with pytest.raises(ValueError, match=r"u has shape \(1, 5, 6\), expected \(1, 5, 8\)"):
        ops.gated_short_conv(random(1, 5, 6), random(4, 3))
    with pytest.raises(ValueError, match="make it contiguous"):
        ops.gated_short_conv(random(1, 8, 5).mT, random(4, 3))


def test_what_is_not_on_a_gpu():
    x = torch.zeros(1, 2, 1, 4)
    for call in (
        lambda: ops.taylor_linear_attention(x, x, x),
        lambda: ops.sliding_window_attention(x.numpy(), x.numpy(), x.numpy(), window=1),
        lambda: ops.gated_short_conv(torch.zeros(1, 2, 8), torch.zeros(4, 3)),
    ):
        with pytest.raises(ValueError, match="is not on a GPU"):
            call()
    with pytest.raises(TypeError, match="q must be a tensor that exports DLPack, not list"):
        ops.taylor_linear_attention([1.0], x, x)
    with pytest.raises(ValueError, match=r"q has shape \(1, 2, 1, 4, 1\), expected \(B, T, H, f\)"):
        ops.taylor_linear_attention(x[..., None], x, x)


# The checks of shapes and dtypes come before that of the device: they are tested without one.
@pytest.mark.parametrize(
    ("change", "fragment"),
    [
        ({}, "q is on cpu, expected a CUDA device"),
        ({"k": np.zeros((2, 9, 3, 8), np.float32)}, "k has shape (2, 9, 3, 8), expected (2, 10, 3, 8)"),
        ({"k": np.zeros((2, 10, 3, 8), np.float16)}, "k is float16, expected float32"),
        ({"v": np.zeros((2, 10, 3, 32), np.float32)[..., ::2]}, "expected stride 1 on axis 3"),
        ({"q": np.zeros((2, 10, 3, 0), np.float32)}, "expected extents of 1 to"),
        ({"initial_state": np.zeros((2, 3, 45, 16), np.float32)}, "expected (2, 3, 45, 17)"),
        ({"eps": float("nan")}, "eps is nan"),
    ],
)
def test_checks_of_the_core(change, fragment):
    qk, v = np.zeros((2, 10, 3, 8), np.float32), np.zeros((2, 10, 3, 16), np.float32)
    arguments: dict[str, Any] = {"q": qk, "k": qk, "v": v, "initial_state": None, "out": v.copy(), "final_state": None}
    arguments |= {"eps": 1e-12, "stream": 0, "producer_stream": 1} | change
    with pytest.raises(ValueError, match=r".") as caught:
        based._core.op_taylor_linear_attention(**arguments)
    assert fragment in str(caught.value)


@gpu
def test_a_captured_graph_outlives_calls_of_other_shapes():
    """What a graph of the caller's reads stays, however many shapes come after it."""
    static_q, static_k, static_v = (random(2, 70, 3, 16, dtype="bfloat16", seed=seed) for seed in range(3))
    inputs = (static_q, static_k, static_v)
    expected = ops.taylor_linear_attention(*inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # of a shape that is new inside it, too
        y = ops.taylor_linear_attention(*inputs)
        short = ops.taylor_linear_attention(*(x[:, :33] for x in inputs))
    for length in range(2, 202):
        ops.sliding_window_attention(*(random(1, length, 1, 8) for _ in range(3)), window=3)
    for _ in range(2):
        y.zero_()
        short.zero_()
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(y, expected)
        assert torch.equal(short, ops.taylor_linear_attention(*(x[:, :33].contiguous() for x in inputs)))


@gpu
def test_long_and_short_sequences_are_independent_of_the_batch():
    for length in (3, 900, 5000):
        q, k, v = (random(12, length, 2, 16, dtype="bfloat16", seed=seed) for seed in range(3))
        together = ops.taylor_linear_attention(q, k, v)
        alone = ops.taylor_linear_attention(q[4:5], k[4:5], v[4:5])
        assert torch.equal(together[4:5], alone)
