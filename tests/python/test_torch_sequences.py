"""Operations that go on from an initial state, and on documents that lie one behind the other in one tensor."""

import itertools
import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")
torch.set_num_threads(1)

import based
from based import sizes
from based.torch import BasedForCausalLM, ops

from tests.reference.torch_model import state_reference

H, H_KV, F, D, E, TAPS, WINDOW = 4, 2, 3, 5, 6, 4, 7


def tensors(b, t, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    return {
        "taylor": (draw(b, t, H, F), draw(b, t, H, F), draw(b, t, H, D)),
        "window": (draw(b, t, H, D), draw(b, t, H_KV, D), draw(b, t, H_KV, D)),
        "conv": (draw(b, t, 2 * E), draw(E, TAPS)),
        "rotary": (draw(b, t, H, D),),
    }


OPERATIONS = {
    "taylor": lambda q, k, v, **options: ops.taylor_linear_attention(q, k, v, chunk_size=8, **options),
    "window": lambda q, k, v, **options: ops.sliding_window_attention(q, k, v, window=WINDOW, **options),
    "conv": ops.gated_short_conv,
    "rotary": lambda x, **options: ops.rotary_embedding(x, rotary_dim=3, **options),
}
# What a call that begins at token `start` is given, of the inputs before.
STATES = {
    "taylor": lambda start, q, k, v: {"initial_state": ops.taylor_state(k[:, :start], v[:, :start])},
    "window": lambda start, q, k, v: {"initial_state": (k[:, :start], v[:, :start])},
    "conv": lambda start, u, weight: {"initial_state": u[:, :start, :E]},
    "rotary": lambda start, x: {"start": start},
}


def of_tokens(inputs, part):
    """The inputs at those tokens; weights are whole."""
    return tuple(x[:, part] if x.ndim > 2 else x for x in inputs)


def assert_close(found, expected, tolerance=1e-12):
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        assert (a - b).abs().max() <= tolerance * max(1, b.abs().max())


def lengths_of(t, seed):
    rng = np.random.default_rng(seed)
    cuts = sorted(rng.choice(np.arange(1, t), 6, replace=False).tolist())
    return [0, *cuts, t]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("name", OPERATIONS)
def test_documents_are_sequences_of_their_own(name, dtype):
    operation = OPERATIONS[name]
    for seed, bounds in enumerate(([0, 41], [0, 1, 2, 41], lengths_of(41, 0), lengths_of(41, 1), [0, 20, 40, 41])):
        inputs = tensors(1, 41, seed=seed)[name]
        found = operation(*inputs, cu_seqlens=torch.tensor(bounds, dtype=dtype))
        parts = itertools.pairwise(bounds)
        expected = torch.cat([operation(*of_tokens(inputs, slice(*part))) for part in parts], 1)
        dy = torch.randn_like(expected)
        gradients = [torch.autograd.grad(y, inputs, dy) for y in (found, expected)]
        assert_close((found, *gradients[0]), (expected, *gradients[1]))


@pytest.mark.parametrize("start", [1, 2, 6, 7, 8, 30])
@pytest.mark.parametrize("name", OPERATIONS)
def test_a_sequence_goes_on(name, start):
    inputs = tensors(2, 41)[name]
    operation = OPERATIONS[name]
    whole = operation(*inputs)
    first = operation(*of_tokens(inputs, slice(0, start)))
    rest = operation(*of_tokens(inputs, slice(start, None)), **STATES[name](start, *inputs))
    dy = torch.randn_like(whole)
    gradients = [torch.autograd.grad(y, inputs, dy) for y in (torch.cat([first, rest], 1), whole)]
    assert_close((torch.cat([first, rest], 1), *gradients[0]), (whole, *gradients[1]))


@pytest.mark.parametrize("name", ["taylor", "window", "conv"])
def test_documents_go_on(name):
    """Documents of a batch, each with the state of what came before it."""
    start, lengths = 5, (9, 1, 17)
    documents = [tensors(1, start + length, seed=i)[name] for i, length in enumerate(lengths)]
    if name == "conv":  # one weight
        documents = [(u, documents[0][1]) for u, _ in documents]
    wholes = [OPERATIONS[name](*inputs)[:, start:] for inputs in documents]
    states = [STATES[name](start, *inputs)["initial_state"] for inputs in documents]
    state = tuple(map(torch.cat, zip(*states, strict=True))) if name == "window" else torch.cat(states)
    packed = [torch.cat(x, 1) if x[0].ndim > 2 else x[0] for x in zip(*documents, strict=True)]
    places = torch.cat([torch.arange(n) + start * (i + 1) + sum(lengths[:i]) for i, n in enumerate(lengths)])
    found = OPERATIONS[name](
        *(x[:, places] if x.ndim > 2 else x for x in packed),
        initial_state=state,
        cu_seqlens=torch.tensor([0, 9, 10, 27]),
    )
    assert_close([found], [torch.cat(wholes, 1)])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_state_of_taylor_linear_attention(dtype):
    _, k, v = tensors(2, 30, dtype)["taylor"]
    found = ops.taylor_state(k, v)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected = state_reference(k.detach(), v.detach())
    assert (found.double() - expected).abs().max() <= (1e-13 if dtype == torch.float64 else 1e-5) * expected.abs().max()
    in_two = ops.taylor_state(k[:, 11:], v[:, 11:], ops.taylor_state(k[:, :11], v[:, :11]))
    assert_close([in_two], [found], 1e-13 if dtype == torch.float64 else 1e-5)


def test_second_derivatives_through_a_state():
    q, k, v = tensors(1, 6)["taylor"]
    state = ops.taylor_state(*tensors(1, 4, seed=1)["taylor"][1:]).detach().requires_grad_()

    def attend(q, k, v, state):
        return ops.taylor_linear_attention(q, k, v, chunk_size=4, initial_state=state)

    assert torch.autograd.gradcheck(attend, (q, k, v, state))
    assert torch.autograd.gradgradcheck(attend, (q, k, v, state))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", OPERATIONS)
def test_other_dtypes(name, dtype):
    """A sequence in two parts is as exact as in one."""
    wide = tensors(2, 41)[name]
    inputs = tensors(2, 41, dtype)[name]
    expected = OPERATIONS[name](*(x.detach().to(dtype).double() for x in wide))
    rest = OPERATIONS[name](*of_tokens(inputs, slice(13, None)), **STATES[name](13, *inputs))
    assert rest.dtype == dtype
    whole = OPERATIONS[name](*inputs)[:, 13:].double() - expected[:, 13:]
    error = (rest.double() - expected[:, 13:]).norm()
    assert error <= 2 * whole.norm() + 1e-6


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_model_on_documents(checkpointing):
    recipe = sizes.recipe(
        "cLW", hidden_size=16, num_heads=2, inner_size=24, feature_dim=4, window=5, vocab_size=50, end_token_id=49
    )
    config = based.ModelConfig.from_json(json.dumps(recipe))
    torch.manual_seed(0)
    model = BasedForCausalLM(config, activation_checkpointing=checkpointing, dtype=torch.float64)
    tokens = torch.randint(0, 50, (1, 30))
    bounds = [0, 1, 12, 30]
    starts = torch.tensor(bounds)
    parts = [tokens[:, a:b] for a, b in itertools.pairwise(bounds)]
    expected = torch.cat([model(part) for part in parts], 1)
    assert_close([model(tokens, cu_seqlens=starts)], [expected], 1e-10)

    sums = [model(part, part, reduction="sum") for part in parts[1:]]  # a document of one token has no label
    gradients = [
        torch.autograd.grad(loss, list(model.parameters()))
        for loss in (model(tokens, tokens, reduction="sum", cu_seqlens=starts), sums[0] + sums[1])
    ]
    assert_close(*gradients, 1e-10)
    mean = model(tokens, tokens, cu_seqlens=starts)
    assert_close([mean], [(sums[0] + sums[1]) / (10 + 17)], 1e-10)


X = torch.zeros(1, 6, 2, 4)
STARTS = torch.tensor([0, 2, 6])


@pytest.mark.parametrize(
    ("call", "exception", "message"),
    [
        (lambda: OPERATIONS["taylor"](X, X, X, cu_seqlens=[0, 6]), TypeError, "cu_seqlens is list, expected a tensor"),
        (lambda: OPERATIONS["taylor"](X, X, X, cu_seqlens=STARTS.float()), TypeError, "cu_seqlens is torch.float32"),
        (
            lambda: OPERATIONS["window"](X, X, X, cu_seqlens=STARTS[None]),
            ValueError,
            "cu_seqlens has shape (1, 3), expected (N + 1)",
        ),
        (
            lambda: OPERATIONS["window"](X, X, X, cu_seqlens=STARTS[:1]),
            ValueError,
            "cu_seqlens has shape (1,), expected (N + 1)",
        ),
        (
            lambda: OPERATIONS["rotary"](X, cu_seqlens=STARTS[1:]),
            ValueError,
            "cu_seqlens goes from 2 to 6, expected 0 to the number of tokens, 6",
        ),
        (
            lambda: OPERATIONS["rotary"](X, cu_seqlens=torch.tensor([0, 3, 3, 6])),
            ValueError,
            "cu_seqlens does not ascend everywhere",
        ),
        (
            lambda: OPERATIONS["rotary"](X.expand(2, -1, -1, -1), cu_seqlens=STARTS),
            ValueError,
            "cu_seqlens with 2 sequences, expected one",
        ),
        (
            lambda: OPERATIONS["taylor"](X, X, X, initial_state=torch.zeros(1, 2, 15, 4)),
            ValueError,
            "initial_state has shape (1, 2, 15, 4), expected (1, 2, 15, 5)",
        ),
        (
            lambda: OPERATIONS["taylor"](X, X, X, initial_state=torch.zeros(1, 2, 15, 5).half()),
            TypeError,
            "initial_state is float16, expected a tensor of float32",
        ),
        (
            lambda: OPERATIONS["taylor"](X, X, X, initial_state=torch.zeros(3, 2, 15, 5), cu_seqlens=STARTS),
            ValueError,
            "initial_state has 3 sequences, expected 2",
        ),
        (lambda: OPERATIONS["window"](X, X, X, initial_state=X), TypeError, "initial_state is Tensor, expected keys"),
        (
            lambda: OPERATIONS["window"](X, X, X, initial_state=(X, X[:, :1])),
            ValueError,
            "initial_state[1] has shape (1, 1, 2, 4), expected (1, 6, 2, 4)",
        ),
        (
            lambda: ops.gated_short_conv(X[:, :, 0], X[0, :2, 0], initial_state=X[:, :, 0]),
            ValueError,
            "initial_state has shape (1, 6, 4), expected extent 2",
        ),
        (lambda: OPERATIONS["rotary"](X, start=-1), ValueError, "start is -1, expected a position ≥ 0"),
    ],
)
def test_bad_input(call, exception, message):
    with pytest.raises(exception) as caught:
        call()
    assert message in str(caught.value)
