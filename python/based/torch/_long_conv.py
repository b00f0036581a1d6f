"""Convolutions as long as a sequence, and the filters that H3 and Hyena make for them, by PyTorch's own operations."""

import math

import torch


def long_conv(x: torch.Tensor, taps: torch.Tensor) -> torch.Tensor:
    """Σ_{s≤t} taps[t − s] ⊙ x_s by the fast Fourier transform, in T log T. Arithmetic is float32 at least.

    Args:
        x: (B, T, …).
        taps: (K, …), the present token's first; axes behind the first as x's behind the second, or 1. Those from T on
            reach nothing.

    Returns:
        (B, T, …), float32 (float64 of float64 inputs).
    """
    t = x.shape[1]
    if x.ndim != taps.ndim + 1 or t == 0 or taps.shape[0] == 0:
        raise ValueError(f"taps has shape {tuple(taps.shape)}, expected (K, …) for x {tuple(x.shape)} = (B, T, …)")
    dtype = torch.promote_types(torch.promote_types(x.dtype, taps.dtype), torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        x, taps = x.to(dtype), taps[:t].to(dtype)
        # What a transform wraps around lands behind the T tokens.
        size = 1 << (t + taps.shape[0] - 2).bit_length()
        product = torch.fft.rfft(x, n=size, dim=1) * torch.fft.rfft(taps, n=size, dim=0)
        return torch.fft.irfft(product, n=size, dim=1)[:, :t]


def shift_taps(b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """Σ_n b[:, n] c[:, n + i] of b and c (e, K): (K, e), the tap of the token i before in row i."""
    taps = c.shape[1]
    return torch.stack([(b[:, : taps - i] * c[:, i:]).sum(1) for i in range(taps)])


def s4d_taps(
    log_dt: torch.Tensor, a_log: torch.Tensor, a_imag: torch.Tensor, b: torch.Tensor, c: torch.Tensor, num_taps: int
) -> torch.Tensor:
    """2 Re Σ_m C B Δ / (1 − z) ((1 + z) / (1 − z))^n, z = Δ A / 2, Δ = e^{log_dt}, A = −e^{a_log} + i a_imag: S4D.

    Powers are taken in float64: the angle of the n-th is n times that of the first, and so is its error.

    Args:
        log_dt: (H).
        a_log: (H, M).
        a_imag: (H, M).
        b: (H, M, 2), real and imaginary parts.
        c: (H, M, 2), likewise.
        num_taps: n goes from 0 to num_taps − 1.

    Returns:
        (num_taps, H), of log_dt's dtype.
    """
    with torch.autocast(log_dt.device.type, enabled=False):
        exact = (part.double() for part in (log_dt, a_log, a_imag, b, c))
        log_step, log, imag, b, c = exact
        step = log_step.exp()[:, None]
        z = step / 2 * torch.complex(-log.exp(), imag)
        weight = torch.view_as_complex(b.contiguous()) * torch.view_as_complex(c.contiguous()) * step / (1 - z)
        # Not log((1 + z) / (1 − z)): a mode that decays at once has z = −1.
        decay = (1 + z) / (1 - z)
        squared = decay.real.square() + decay.imag.square()
        log_size = 0.5 * (squared + 1e-300).log()
        angle = torch.atan2(decay.imag, decay.real + torch.where(squared == 0, 1.0, 0.0))
        n = torch.arange(num_taps, dtype=torch.float64, device=log_dt.device)[:, None, None]
        size, turn = (n * log_size).exp(), n * angle
        taps = 2 * (size * (weight.real * turn.cos() - weight.imag * turn.sin())).sum(-1)
        return taps.to(log_dt.dtype)


def hyena_filter(
    w1: torch.Tensor,
    b1: torch.Tensor,
    w2: torch.Tensor,
    b2: torch.Tensor,
    w3: torch.Tensor,
    b3: torch.Tensor,
    w4: torch.Tensor,
    freq: torch.Tensor,
    max_length: int,
    num_taps: int,
) -> torch.Tensor:
    """The first num_taps taps of the filter of HyenaConfig with max_length taps: (num_taps, e), of w1's dtype."""
    with torch.autocast(w1.device.type, enabled=False):
        n = torch.arange(num_taps, dtype=torch.float64, device=w1.device)
        time = n / max(1, max_length - 1)
        angle = n * (2e-4 * math.pi / max_length)
        x = torch.stack([time, angle.cos(), -angle.sin()], -1).to(w1.dtype)
        for w, b in ((w1, b1), (w2, b2), (w3, b3)):
            x = (freq * (x @ w.mT + b)).sin()
        channels, target = w4.shape[0], -math.log(0.01)
        decay = torch.linspace(target / 1.5, target / 0.3, channels, dtype=torch.float64, device=w1.device)
        return (x @ w4.mT) * (-time[:, None] * decay).exp().to(w1.dtype)
