"""Multi-head exponential smoothing as a layer, and the gated block around it."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mhesa.errors import InputError
from mhesa.ops import exponential_smoothing, exponential_smoothing_step
from mhesa.ops.backends import check_backend
from mhesa.ops.context_parallel import ContextParallel
from mhesa.ops.convolution import causal_convolution, causal_convolution_step
from mhesa.ops.dropout import dropout
from mhesa.ops.gelu import gelu
from mhesa.ops.smoothing import accumulation_dtype
from mhesa.settings import AT_LEAST_0, check_divisible, check_sizes, expanded_size

# Where the rates of an adaptive block begin: the longest time constant in steps, and the logit of the damping
# factor (0.9975).
SLOWEST, DAMPING = 300, 6.0


class MHESA(nn.Module):
    """Layer normalisation, then multi-head exponential smoothing plus a learned residual for each channel.

    Args:
        dim: channels, divisible by `heads`.
        heads: number of smoothing rates, each for `dim / heads` channels.
        reverse_seq: smooth from the end of the sequence to its start.
        backend: implementation of the operator, `None` for the best one.

    The smoothing factor is `alpha = sigmoid(alphas)`, the decay `(1 - alpha) * sigmoid(dampen_factors)`.
    Parameters, initial values and results are those of `gated-state-spaces-pytorch` 0.1.0.

    >>> layer = MHESA(dim=8, heads=2)
    >>> layer(torch.randn(1, 5, 8)).shape
    torch.Size([1, 5, 8])
    """

    def __init__(
        self, *, dim: int, heads: int, reverse_seq: bool = False, backend: str | None = None
    ) -> None:
        super().__init__()
        check_sizes(dim=dim, heads=heads)
        check_divisible("dim", dim, heads)
        check_backend(backend)
        self.heads = heads
        self.reverse_seq = reverse_seq
        self.backend = backend
        self.norm = nn.LayerNorm(dim)
        # In 16 bits, a decay near 1 would have a few values only.
        dtype = accumulation_dtype(torch.get_default_dtype())
        self.alphas = nn.Parameter(torch.randn(heads, dtype=dtype))
        self.dampen_factors = nn.Parameter(torch.randn(heads, dtype=dtype))
        self.param_D = nn.Parameter(torch.randn(dim))

    def rates(self, shift: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The smoothing factors and the decays, in fp32 (fp64 for an fp64 layer).

        Args:
            shift: `(..., heads)`, added to the logits of the smoothing factors; none if omitted.

        Returns:
            `alpha` and `decay`, shaped as `shift`; `(heads,)` each without it.
        """
        dtype = accumulation_dtype(self.alphas.dtype)
        logits = self.alphas.to(dtype)
        alpha = (logits if shift is None else logits + shift.to(dtype)).sigmoid()
        return alpha, (1 - alpha) * self.dampen_factors.to(dtype).sigmoid()

    def forward(
        self,
        x: Tensor,
        *,
        initial_state: Tensor | None = None,
        return_state: bool = False,
        cu_seqlens: Tensor | None = None,
        shift: Tensor | None = None,
        context_parallel: ContextParallel | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Smooth `x`.

        Args:
            x: `(batch, length, dim)`.
            initial_state: `(batch, dim)`, the state after the preceding steps; zeros if omitted.
            return_state: also return the state after the last step, `(batch, dim)` in fp32.
            cu_seqlens: offsets of packed sequences, see `mhesa.ops.exponential_smoothing`; states are
                then `(sequences, dim)`.
            shift: `(batch, length, heads)`, see `rates`: rates of every step.
            context_parallel: see `mhesa.ops.exponential_smoothing`.
        """
        alpha, decay = self.rates(shift)
        y, state = exponential_smoothing(
            self._by_head(self.norm(x)),
            alpha,
            decay,
            skip=self._by_head(self.param_D),
            initial_state=None if initial_state is None else self._by_head(initial_state),
            cu_seqlens=cu_seqlens,
            reverse=self.reverse_seq,
            return_final_state=True,
            backend=self.backend,
            context_parallel=context_parallel,
        )
        return (y.flatten(-2), state.flatten(-2)) if return_state else y.flatten(-2)

    def step(self, x: Tensor, state: Tensor, *, shift: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """One step: `x` and `state` `(batch, dim)`, `shift` `(batch, heads)`, to output and new state."""
        alpha, decay = self.rates(shift)
        y, state = exponential_smoothing_step(
            self._by_head(self.norm(x)), alpha, decay, self._by_head(state), skip=self._by_head(self.param_D)
        )
        return y.flatten(-2), state.flatten(-2)

    def _by_head(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1))


def spread_rates(heads: int, slowest: float = SLOWEST) -> tuple[Tensor, Tensor]:
    """Initial values of an adaptive block's `alphas` and `dampen_factors`, `(heads,)` each.

    The time constants of the heads are spread evenly in their logarithm, from 1 step to `slowest`.
    """
    # On the CPU even where the module is not: for the meta device, torch would import its compiler.
    steps = torch.logspace(0, math.log10(slowest), heads, dtype=torch.float64, device="cpu")
    return torch.logit(-torch.expm1(-1 / steps)).float(), torch.full((heads,), DAMPING)


def identity_taps(size: int, dim: int) -> Tensor:
    """The weights, `(size, dim)`, of a convolution that changes nothing."""
    taps = torch.zeros(size, dim)
    taps[:1] = 1
    return taps


class CausalConv(nn.Module):
    """A short causal depthwise convolution that begins as the identity.

    Args:
        dim: channels.
        size: number of values, the current one included, that each output is made of.

    >>> layer = CausalConv(dim=8, size=4)
    >>> layer(torch.randn(1, 5, 8))[0].shape
    torch.Size([1, 5, 8])
    """

    def __init__(self, *, dim: int, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(identity_taps(size, dim))

    def forward(self, x: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        """`x` of `(batch, length, dim)` to output and state; options are those of `causal_convolution`."""
        return causal_convolution(x, self.weight, **options)

    def step(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """One step: `x` of `(batch, dim)` and `state` of `(batch, size - 1, dim)` to output and new state."""
        return causal_convolution_step(x, self.weight, state)


class Dropout(nn.Dropout):
    """`nn.Dropout`, by the kernel of this package where there is one."""

    def __init__(self, p: float, *, backend: str | None) -> None:
        super().__init__(p)
        self.backend = backend

    def forward(self, input: Tensor) -> Tensor:
        """Drop values of a tensor of any shape, in training."""
        return dropout(input, self.p, self.training, backend=self.backend)


class GatedMHESA(nn.Module):
    """The gated block: smoothing takes the place of attention, a gate that of the feed-forward layer.

    ```text
    z = LayerNorm(x)
    z[t] = sum over j of c[j] * z[t - j]              where conv_size > 0
    u = GELU(W_u z)                                   int(dim * dim_expansion_factor) wide
    v = GELU(W_v z)                                   dim_mhesa wide
    alpha = sigmoid(alphas + W_alpha z)               where adaptive; sigmoid(alphas) otherwise
    out = W_o((W_g MHESA(v)) * u) + b_o + x
    ```

    The block of gated state spaces (https://arxiv.org/abs/2206.13947, pseudocode 3.2) with its state
    space replaced by `MHESA`. Adaptive-rate exponential smoothing is Trigg and Leach's
    (https://doi.org/10.1057/jors.1967.5); with `W_alpha = 0` it is the original.

    Args:
        dim: width of the block's input and output.
        heads: smoothing rates; `dim_mhesa` must be divisible by it.
        dim_mhesa: width of the smoothed values and of their state.
        dim_expansion_factor: width of the gate, as a multiple of `dim`.
        adaptive: let the smoothing factors follow the input, one for each head and step.
        conv_size: taps of a short causal convolution of the block's normalised input; 0 for none.
        dropout: probability, in training, of dropping an element of the gated product or the output.
        backend: implementation of the operator, `None` for the best one.

    The block's state is one vector: `dim_mhesa` smoothed values, and `(conv_size - 1) * dim` values of the
    convolution behind them.

    >>> block = GatedMHESA(dim=16, heads=2, dim_mhesa=8)
    >>> block(torch.randn(1, 5, 16)).shape
    torch.Size([1, 5, 16])
    """

    def __init__(
        self,
        *,
        dim: int,
        heads: int = 8,
        dim_mhesa: int = 512,
        dim_expansion_factor: float = 4,
        adaptive: bool = False,
        conv_size: int = 0,
        dropout: float = 0.0,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        check_sizes(dim=dim, heads=heads, dim_mhesa=dim_mhesa)
        dim_hidden = expanded_size(dim, dim_expansion_factor)
        check_divisible("dim_mhesa", dim_mhesa, heads)
        check_sizes(AT_LEAST_0, conv_size=conv_size)
        self.dim_mhesa = dim_mhesa
        self.state_size = dim_mhesa + max(conv_size - 1, 0) * dim
        self.norm = nn.LayerNorm(dim)
        # `nn.Sequential` gives the weights their names in checkpoints.
        self.to_u = nn.Sequential(nn.Linear(dim, dim_hidden, bias=False))
        self.to_v = nn.Sequential(nn.Linear(dim, dim_mhesa, bias=False))
        self.mhesa = MHESA(dim=dim_mhesa, heads=heads, backend=backend)
        self.to_gate = nn.Linear(dim_mhesa, dim_hidden, bias=False)
        self.to_out = nn.Linear(dim_hidden, dim)
        self.dropout = Dropout(dropout, backend=backend)
        self.conv = CausalConv(dim=dim, size=conv_size) if conv_size else None
        self.to_alpha = nn.Linear(dim, heads, bias=False) if adaptive else None
        if adaptive:
            alphas, dampen_factors = spread_rates(heads)
            with torch.no_grad():
                self.mhesa.alphas.copy_(alphas)
                self.mhesa.dampen_factors.copy_(dampen_factors)

    def forward(
        self,
        x: Tensor,
        *,
        initial_state: Tensor | None = None,
        return_state: bool = False,
        cu_seqlens: Tensor | None = None,
        context_parallel: ContextParallel | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Run the block over `x` of `(batch, length, dim)`; states are `(batch, state_size)`."""
        backend = self.mhesa.backend
        sequences = {"cu_seqlens": cu_seqlens, "context_parallel": context_parallel}
        smoothing, tail = self._split(initial_state)
        z = self.norm(x)
        if self.conv is not None:
            z, tail = self.conv(z, initial_state=tail, backend=backend, **sequences)
        v = gelu(self.to_v(z), backend=backend)
        shift = None if self.to_alpha is None else self.to_alpha(z)
        smoothed, smoothing = self.mhesa(
            v, initial_state=smoothing, return_state=True, shift=shift, **sequences
        )
        gated = self.dropout(gelu(self.to_u(z), self.to_gate(smoothed), backend=backend))
        out = self.dropout(self.to_out(gated)) + x
        return (out, self._join(smoothing, tail)) if return_state else out

    def step(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """One step: `x` of `(batch, dim)`, `state` of `(batch, state_size)` to output and new state."""
        smoothing, tail = self._split(state)
        assert smoothing is not None
        z = self.norm(x)
        if self.conv is not None:
            assert tail is not None
            z, tail = self.conv.step(z, tail)
        shift = None if self.to_alpha is None else self.to_alpha(z)
        smoothed, smoothing = self.mhesa.step(F.gelu(self.to_v(z)), smoothing, shift=shift)
        out = self.to_out(self.to_gate(smoothed) * F.gelu(self.to_u(z))) + x
        return out, self._join(smoothing, tail)

    def _split(self, state: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """A state as `(batch, dim_mhesa)` of the smoothing and `(batch, taps, dim)` of the convolution."""
        if state is not None and (state.ndim != 2 or state.shape[1] != self.state_size):
            raise InputError(f"a block's state must be (batch, {self.state_size}), not {tuple(state.shape)}")
        if state is None or self.conv is None:
            return state, None
        size, dim = self.conv.weight.shape
        return state[:, : self.dim_mhesa], state[:, self.dim_mhesa :].unflatten(-1, (size - 1, dim))

    def _join(self, smoothing: Tensor, tail: Tensor | None) -> Tensor:
        return smoothing if tail is None else torch.cat([smoothing, tail.flatten(-2)], dim=-1)
