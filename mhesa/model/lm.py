"""The language model, and how its state passes through the blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mhesa.errors import InputError
from mhesa.model.layers import GatedMHESA
from mhesa.model.loss import next_token_loss
from mhesa.ops.checks import count_sequences
from mhesa.ops.context_parallel import ContextParallel
from mhesa.ops.smoothing import accumulation_dtype
from mhesa.settings import check_sizes


class GatedExponentialSmoothingLM(nn.Module):
    """A causal language model of gated exponential smoothing blocks.

    An embedding, `depth` blocks of `GatedMHESA`, and a head without bias, which `ModelConfig.build` ties to
    the embedding on request. Parameters, initial values and results are those of
    `gated-state-spaces-pytorch` 0.1.0, and a checkpoint of either loads in the other.

    All that the model remembers is one tensor, `(depth, batch, state_size)` in fp32: given back and
    passed in, it continues a sequence exactly where it stopped. `state_size` is `dim_mhesa`, and
    `(conv_size - 1) * dim` more with a convolution.

    Args:
        num_tokens: size of the vocabulary.
        dim: width of the embedding and of the residual stream.
        depth: number of blocks.
        heads, dim_mhesa, dim_expansion_factor, adaptive, conv_size, dropout, backend: see `GatedMHESA`.

    >>> model = GatedExponentialSmoothingLM(num_tokens=256, dim=16, depth=2, heads=2, dim_mhesa=8)
    >>> ids = torch.randint(256, (1, 10))
    >>> whole = model(ids)
    >>> first, state = model(ids[:, :6], return_state=True)
    >>> rest = model(ids[:, 6:], state=state)
    >>> torch.allclose(torch.cat([first, rest], dim=1), whole, atol=1e-5)
    True
    """

    def __init__(
        self,
        *,
        num_tokens: int,
        dim: int,
        depth: int,
        heads: int = 8,
        dim_mhesa: int = 512,
        dim_expansion_factor: float = 4,
        adaptive: bool = False,
        conv_size: int = 0,
        dropout: float = 0.0,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        check_sizes(num_tokens=num_tokens, dim=dim, depth=depth)
        self.dim_mhesa = dim_mhesa
        # Activation checkpointing: keep only what enters each block, and compute the rest again for its
        # backward pass.
        self.recompute = False
        self.token_emb = nn.Embedding(num_tokens, dim)
        self.layers = nn.ModuleList(
            GatedMHESA(
                dim=dim,
                heads=heads,
                dim_mhesa=dim_mhesa,
                dim_expansion_factor=dim_expansion_factor,
                adaptive=adaptive,
                conv_size=conv_size,
                dropout=dropout,
                backend=backend,
            )
            for _ in range(depth)
        )
        self.to_logits = nn.Linear(dim, num_tokens, bias=False)
        self.state_size = cast(GatedMHESA, self.layers[0]).state_size

    def forward(
        self,
        x: Tensor,
        labels: Tensor | None = None,
        *,
        state: Tensor | None = None,
        return_state: bool = False,
        cu_seqlens: Tensor | None = None,
        context_parallel: ContextParallel | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Logits, or the loss where `labels` are given.

        Args:
            x: token ids, `(batch, length)`.
            labels: `(batch, length)`, aligned with `x` and not shifted; -100 is ignored.
            state: `(depth, batch, state_size)`, from the stretch before; zeros if omitted.
            return_state: also return the state after the last token.
            cu_seqlens: offsets of sequences packed into a batch of 1, `(sequences + 1,)`; states are then
                `(depth, sequences, state_size)`.
            context_parallel: the processes that each sequence lies over, see
                `mhesa.ops.exponential_smoothing`. Logits, loss and final state are those of this process's
                tokens.

        Returns:
            Logits `(batch, length, num_tokens)`, or the mean cross-entropy in nats; with `return_state`,
            a pair of that and the state.
        """
        if x.ndim != 2:
            raise InputError(f"token ids must be (batch, length), not {tuple(x.shape)}")
        if state is not None:
            self._check_state(state, count_sequences(x, cu_seqlens))
        blocks: Iterable[Callable[..., Any]] = self.layers
        if self.recompute and torch.is_grad_enabled():
            blocks = [partial(checkpoint, block, use_reentrant=False) for block in self.layers]
        hidden, states = run_blocks(
            blocks, self.token_emb(x), state, cu_seqlens, context_parallel=context_parallel
        )
        out = self.to_logits(hidden) if labels is None else next_token_loss(hidden, self.to_logits, labels)
        return (out, torch.stack(states)) if return_state else out

    def step(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """One token a sequence.

        Args:
            x: token ids, `(batch,)`.
            state: `(depth, batch, state_size)`; it is not changed.

        Returns:
            Logits `(batch, num_tokens)` and the new state. There is no dropout, in training either.
        """
        if x.ndim != 1:
            raise InputError(f"token ids must be (batch,), one for each text, not {tuple(x.shape)}")
        self._check_state(state, x.shape[0])
        hidden = self.token_emb(x)
        states = []
        for layer, layer_state in zip(self.layers, state, strict=True):
            hidden, layer_state = cast(GatedMHESA, layer).step(hidden, layer_state)
            states.append(layer_state)
        return self.to_logits(hidden), torch.stack(states)

    def initial_state(self, batch: int) -> Tensor:
        """The state before any token: zeros of `(depth, batch, state_size)`, fp32 (fp64 if the model is)."""
        weight = self.to_logits.weight
        return torch.zeros(
            len(self.layers),
            batch,
            self.state_size,
            dtype=accumulation_dtype(weight.dtype),
            device=weight.device,
        )

    def _check_state(self, state: Tensor, sequences: int) -> None:
        shape = (len(self.layers), sequences, self.state_size)
        if not isinstance(state, Tensor) or state.shape != shape:
            found = tuple(state.shape) if isinstance(state, Tensor) else type(state).__name__
            raise InputError(f"state must be {shape} for these ids, not {found}")


def run_blocks(
    blocks: Iterable[Callable[..., Any]],
    x: Tensor,
    state: Sequence[Tensor] | Tensor | None,
    cu_seqlens: Tensor | None,
    trace: list[Tensor] | None = None,
    context_parallel: ContextParallel | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """Pass `x` of `(batch, length, dim)` through `GatedMHESA` blocks.

    Returns the output and each block's final state, `(batch, state_size)`. What enters a block is appended
    to `trace`.
    """
    states = []
    for index, block in enumerate(blocks):
        if trace is not None:
            trace.append(x)
        x, final = block(
            x,
            initial_state=None if state is None else state[index],
            return_state=True,
            cu_seqlens=cu_seqlens,
            context_parallel=context_parallel,
        )
        states.append(final)
    return x, states
