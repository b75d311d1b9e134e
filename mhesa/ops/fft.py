"""The operator as one long convolution by FFT, in O(L log L), as the original package computes it."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from mhesa.errors import InputError
from mhesa.ops.plain import as_scan, powers_of


def conv1d_fft(x: Tensor, weights: Tensor, dim: int = -2, weight_dim: int = -1) -> Tensor:
    """Convolve `x` with a kernel as long as the sequence, by FFT.

    The last weight multiplies the current step. For `x` of length `L` along `dim`,

        out[t] = sum over i of weights[i] * x[t - (L - 1) + i]

    With `L` weights this is causal. With `L` weights or more, `x` counts as zero outside `0 .. L-1`; with
    fewer, the convolution wraps around, as in the original package: pad the kernel with leading zeros to
    avoid it.

    Args:
        x: tensor of any shape.
        weights: tensor of any shape that broadcasts against `x` once `weight_dim - dim` dimensions of size 1
            are appended.
        dim: the dimension of `x` that is time.
        weight_dim: the dimension of `weights` that is time, counted as `dim` is; not before it.

    Returns:
        A tensor of the broadcast shape, `L` long along `dim`, in the type of `x`.

    Raises:
        InputError: `weight_dim < dim`.

    >>> x = torch.tensor([1.0, 0.0, 0.0, 2.0])
    >>> conv1d_fft(x[:, None], torch.tensor([0.0, 0.25, 0.5, 1.0])).flatten().round(decimals=4).tolist()
    [1.0, 0.5, 0.25, 2.0]
    """
    if weight_dim < dim:
        raise InputError(f"weight_dim must not come before dim, but {weight_dim} < {dim}")
    length, taps = x.shape[dim], weights.shape[weight_dim]
    if length == 0:
        return x.clone()
    dtype = torch.promote_types(torch.promote_types(x.dtype, weights.dtype), torch.float32)
    period = _fast_length(length + taps - 1)
    spectrum = torch.fft.rfft(weights.to(dtype), period, weight_dim).conj()
    spectrum = spectrum.reshape(spectrum.shape + (1,) * (weight_dim - dim))
    correlation = torch.fft.irfft(torch.fft.rfft(x.to(dtype), period, dim) * spectrum, period, dim)
    # The inverse transform starts at lag 0; move lag -(L-1) to the front.
    return correlation.roll(length - 1, dim).narrow(dim, 0, length).to(x.dtype)


def _fast_length(n: int) -> int:
    """The smallest number >= `n` whose only prime factors are 2, 3 and 5."""
    best = 1 << (n - 1).bit_length()
    fives = 1
    while fives < best:
        odd = fives
        while odd < best:
            best = min(best, odd << (-(-n // odd) - 1).bit_length())
            odd *= 3
        fives *= 5
    return best


@partial(as_scan, fixed_rates=True)
def scan(x: Tensor, alpha: Tensor, decay: Tensor, initial_state: Tensor | None) -> Tensor:
    """See `mhesa.ops.exponential_smoothing`."""
    powers = powers_of(decay, x.shape[1]).T
    h = conv1d_fft(x, (alpha * powers[:-1]).flip(0), dim=-3, weight_dim=-2)
    return h if initial_state is None else h + powers[1:, :, None] * initial_state[:, None]
