"""The gated delta rule in chunks against the recurrence in float64, forward and backward."""

import re

import pytest

torch = pytest.importorskip("torch")
torch.set_num_threads(1)

from based.torch._delta import gated_delta_rule

from tests.reference.torch_model import delta_reference


def inputs(t, d_k=5, d_v=7, dtype=torch.float64, decay=True):
    generator = torch.Generator().manual_seed(t)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    q, k, v = draw(2, t, 3, d_k), draw(2, t, 3, d_k), draw(2, t, 3, d_v)
    beta, state = draw(2, t, 3).sigmoid(), draw(2, 3, d_k, d_v)
    log_alpha = -draw(2, t, 3).exp() if decay else None
    parts = [q, k / k.norm(dim=-1, keepdim=True), v, beta, log_alpha, state]
    return [None if x is None else x.to(dtype).requires_grad_() for x in parts]


def run(function, parts, **options):
    *operands, state = parts
    return (
        function(*operands, state, **options)
        if function is delta_reference
        else function(*operands, initial_state=state, **options)
    )


@pytest.mark.parametrize("decay", [True, False])
@pytest.mark.parametrize(("t", "chunk_size"), [(1, 64), (2, 1), (37, 8), (64, 16), (130, 64)])
def test_gated_delta_rule(t, chunk_size, decay):
    parts = inputs(t, decay=decay)
    given = [x for x in parts if x is not None]
    results = []
    for y, s in (run(gated_delta_rule, parts, chunk_size=chunk_size), run(delta_reference, parts)):
        torch.manual_seed(0)
        loss = (y * torch.randn(y.shape, dtype=y.dtype)).sum() + (s * torch.randn(s.shape, dtype=s.dtype)).sum()
        results.append((y, s, *torch.autograd.grad(loss, given)))
    for found, expected in zip(*results, strict=True):
        assert (found - expected).norm() <= 1e-11 * expected.norm()


def test_it_goes_on_from_a_state():
    q, k, v, beta, log_alpha, state = inputs(50)
    whole, last = gated_delta_rule(q, k, v, beta, log_alpha, initial_state=state, chunk_size=16)
    first, between = gated_delta_rule(
        *(x[:, :21] for x in (q, k, v, beta, log_alpha)), initial_state=state, chunk_size=16
    )
    rest, end = gated_delta_rule(*(x[:, 21:] for x in (q, k, v, beta, log_alpha)), initial_state=between, chunk_size=16)
    assert (torch.cat([first, rest], 1) - whole).abs().max() <= 1e-12
    assert (end - last).abs().max() <= 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_its_sums_are_float32_at_least(dtype):
    parts = inputs(100, dtype=dtype)
    y, s = run(gated_delta_rule, parts)
    assert y.dtype == dtype and s.dtype == torch.float32
    expected, _ = run(delta_reference, parts)
    assert (y.double() - expected).norm() <= (1e-5 if dtype == torch.float32 else 4e-3) * expected.norm()


def test_gradcheck():
    q, k, v, beta, log_alpha, state = inputs(5, 2, 2)
    one = [x[:1, :, :1].detach().requires_grad_() for x in (q, k, v, beta, log_alpha)]
    start = state[:1, :1].detach().requires_grad_()
    function = lambda *x: gated_delta_rule(*x[:5], initial_state=x[5], chunk_size=3)  # noqa: E731
    assert torch.autograd.gradcheck(function, (*one, start))
    assert torch.autograd.gradgradcheck(function, (*one, start))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 4, 3, 6)}, "q has shape (2, 4, 3, 6), expected (2, 4, 3, 5)"),
        ({"v": torch.zeros(2, 3, 3, 7)}, "v has shape (2, 3, 3, 7), expected (2, 4, 3, 7)"),
        ({"beta": torch.zeros(2, 4)}, "beta has shape (2, 4), expected (2, 4, 3)"),
        ({"log_alpha": torch.zeros(2, 4, 1)}, "log_alpha has shape (2, 4, 1), expected (2, 4, 3)"),
        ({"initial_state": torch.zeros(2, 3, 7, 5)}, "initial_state has shape (2, 3, 7, 5), expected (2, 3, 5, 7)"),
        ({"chunk_size": 0}, "chunk_size is 0, expected ≥ 1"),
    ],
)
def test_bad_input(change, message):
    arguments = {
        "q": torch.zeros(2, 4, 3, 5),
        "k": torch.zeros(2, 4, 3, 5),
        "v": torch.zeros(2, 4, 3, 7),
        "beta": torch.zeros(2, 4, 3),
    }
    with pytest.raises(ValueError, match=re.escape(message)):
        gated_delta_rule(**arguments | change)
