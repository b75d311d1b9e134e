"""Multi-head exponential smoothing as a layer, and the gated block around it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mhesa.ops import exponential_smoothing, exponential_smoothing_step
from mhesa.ops.backends import check_backend
from mhesa.ops.gelu import gelu
from mhesa.ops.smoothing import accumulation_dtype
from mhesa.settings import check_divisible, check_sizes


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
        self.alphas = nn.Parameter(torch.randn(heads))
        self.dampen_factors = nn.Parameter(torch.randn(heads))
        self.param_D = nn.Parameter(torch.randn(dim))

    def gates(self) -> tuple[Tensor, Tensor]:
        """The smoothing factors and the decays, `(heads,)` each, in fp32 (fp64 for an fp64 layer)."""
        dtype = accumulation_dtype(self.alphas.dtype)
        alpha = self.alphas.to(dtype).sigmoid()
        return alpha, (1 - alpha) * self.dampen_factors.to(dtype).sigmoid()

    def forward(
        self,
        x: Tensor,
        *,
        initial_state: Tensor | None = None,
        return_state: bool = False,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Smooth `x`.

        Args:
            x: `(batch, length, dim)`.
            initial_state: `(batch, dim)`, the state after the preceding steps; zeros if omitted.
            return_state: also return the state after the last step, `(batch, dim)` in fp32.
            cu_seqlens: offsets of packed sequences, see `mhesa.ops.exponential_smoothing`; states are
                then `(sequences, dim)`.
        """
        alpha, decay = self.gates()
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
        )
        return (y.flatten(-2), state.flatten(-2)) if return_state else y.flatten(-2)

    def step(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """One step: `x` and `state` of `(batch, dim)` to the output and the new state."""
        alpha, decay = self.gates()
        y, state = exponential_smoothing_step(
            self._by_head(self.norm(x)), alpha, decay, self._by_head(state), skip=self._by_head(self.param_D)
        )
        return y.flatten(-2), state.flatten(-2)

    def _by_head(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1))


class GatedMHESA(nn.Module):
    """The gated block: smoothing takes the place of attention, a gate that of the feed-forward layer.

    .. code-block:: text

        y = LayerNorm(x)
        u = GELU(W_u y)                                   int(dim * dim_expansion_factor) wide
        v = GELU(W_v y)                                   dim_mhesa wide
        out = W_o((W_g MHESA(v)) * u) + b_o + x

    The block of gated state spaces (https://arxiv.org/abs/2206.13947, pseudocode 3.2) with its state
    space replaced by `MHESA`.

    Args:
        dim: width of the block's input and output.
        heads: smoothing rates; `dim_mhesa` must be divisible by it.
        dim_mhesa: width of the smoothed values, and of the state.
        dim_expansion_factor: width of the gate, as a multiple of `dim`.
        dropout: probability, in training, of dropping an element of the gated product or the output.
        backend: implementation of the operator, `None` for the best one.

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
        dropout: float = 0.0,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        dim_hidden = int(dim_expansion_factor * dim)
        check_sizes(dim=dim, heads=heads, dim_mhesa=dim_mhesa)
        check_sizes(**{"dim_expansion_factor * dim": dim_hidden})
        check_divisible("dim_mhesa", dim_mhesa, heads)
        self.norm = nn.LayerNorm(dim)
        # `nn.Sequential` gives the weights their names in checkpoints.
        self.to_u = nn.Sequential(nn.Linear(dim, dim_hidden, bias=False))
        self.to_v = nn.Sequential(nn.Linear(dim, dim_mhesa, bias=False))
        self.mhesa = MHESA(dim=dim_mhesa, heads=heads, backend=backend)
        self.to_gate = nn.Linear(dim_mhesa, dim_hidden, bias=False)
        self.to_out = nn.Linear(dim_hidden, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        *,
        initial_state: Tensor | None = None,
        return_state: bool = False,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Run the block over `x` of `(batch, length, dim)`; states are `(batch, dim_mhesa)`."""
        y = self.norm(x)
        v = gelu(self.to_v(y), backend=self.mhesa.backend)
        smoothed, state = self.mhesa(v, initial_state=initial_state, return_state=True, cu_seqlens=cu_seqlens)
        gated = self.dropout(gelu(self.to_u(y), self.to_gate(smoothed), backend=self.mhesa.backend))
        out = self.dropout(self.to_out(gated)) + x
        return (out, state) if return_state else out

    def step(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """One step: `x` of `(batch, dim)`, `state` of `(batch, dim_mhesa)` to output and new state."""
        y = self.norm(x)
        smoothed, state = self.mhesa.step(F.gelu(self.to_v(y)), state)
        return self.to_out(self.to_gate(smoothed) * F.gelu(self.to_u(y))) + x, state
