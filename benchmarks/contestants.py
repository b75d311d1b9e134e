"""The models that `python -m benchmarks learning` compares, and how each is trained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mhesa.model.layers import MHESA, spread_rates
from mhesa.model.lm import GatedExponentialSmoothingLM
from mhesa.ops.devices import computes_in_bf16
from mhesa.training.muon import Muon
from mhesa.training.optimizers import BETAS, decay_groups, is_block_matrix

WEIGHT_DECAY = 0.1
# Tokens of a window, unless a recipe says otherwise.
CONTEXT = 256


class Block(nn.Module):
    """A transformer's block: attention with rotary positions, then a feed-forward layer, both pre-norm."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2))
        self.to_qkv, self.to_out = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.up, self.down = nn.Linear(dim, 4 * dim, bias=False), nn.Linear(4 * dim, dim, bias=False)

    def forward(self, x: Tensor, rotation: Tensor) -> Tensor:
        """`x` of `(batch, length, dim)`, `rotation` of `(2, length, dim / heads / 2)`: cosines and sines."""
        q, k, v = self.to_qkv(self.norms[0](x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = (_rotate(part, rotation).to(v.dtype) for part in (q, k))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.to_out(attended.transpose(1, 2).flatten(-2))
        return x + self.down(F.gelu(self.up(self.norms[1](x))))


def _rotate(x: Tensor, rotation: Tensor) -> Tensor:
    cos, sin = rotation
    even, odd = x[..., ::2], x[..., 1::2]
    return torch.cat([even * cos - odd * sin, even * sin + odd * cos], dim=-1)


class Transformer(nn.Module):
    """A language model of `Block`s; `(batch, length)` ids to `(batch, length, num_tokens)` logits."""

    def __init__(self, num_tokens: int, dim: int, depth: int, heads: int) -> None:
        super().__init__()
        self.token_emb = nn.Embedding(num_tokens, dim)
        self.layers = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.norm, self.to_logits = nn.LayerNorm(dim), nn.Linear(dim, num_tokens, bias=False)
        self.width = dim // heads
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                into_residual = name.endswith(("to_out.weight", "down.weight"))
                nn.init.normal_(parameter, std=0.02 / (2 * depth) ** 0.5 if into_residual else 0.02)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits."""
        rates = 1e4 ** (-torch.arange(0, self.width, 2) / self.width)
        angles = torch.arange(ids.shape[1])[:, None] * rates
        x, rotation = self.token_emb(ids), torch.stack([angles.cos(), angles.sin()])
        for layer in self.layers:
            x = layer(x, rotation)
        logits: Tensor = self.to_logits(self.norm(x))
        return logits


class LSTM(nn.Module):
    """A language model of LSTM layers; `(batch, length)` ids to `(batch, length, num_tokens)` logits."""

    def __init__(self, num_tokens: int, dim: int, depth: int, width: int) -> None:
        super().__init__()
        self.token_emb = nn.Embedding(num_tokens, dim)
        self.layers = nn.LSTM(dim, width, depth, batch_first=True)
        self.to_logits = nn.Linear(width, num_tokens, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits. The recurrence is computed in fp32: torch has no fast one in bf16 on a CPU."""
        with torch.autocast(ids.device.type, enabled=False):
            hidden, _ = self.layers(self.token_emb(ids))
        logits: Tensor = self.to_logits(hidden)
        return logits


@dataclass(frozen=True)
class Recipe:
    """A model and how it is trained.

    Args:
        build: makes the model for a number of tokens.
        adamw: peak learning rate of AdamW.
        muon: peak learning rate of Muon for the matrices of the model's `layers`; `None` leaves them to
            AdamW.
        window: tokens beyond which the model is not read: it falls apart there, in quadratic time.
        context: tokens of a window that it is trained on.
    """

    build: Callable[[int], nn.Module]
    adamw: float
    muon: float | None = None
    window: int | None = None
    context: int = CONTEXT

    @property
    def tuned(self) -> str:
        """The learning rate that is tuned: Muon's if there is one."""
        return "adamw" if self.muon is None else "muon"

    def at(self, factor: float) -> Recipe:
        """The same with the tuned learning rate multiplied."""
        return replace(self, **{self.tuned: getattr(self, self.tuned) * factor})

    def optimizers(self, model: nn.Module) -> list[torch.optim.Optimizer]:
        """AdamW, and Muon where the recipe has it."""
        matrices = {
            name: parameter
            for name, parameter in model.named_parameters()
            if self.muon is not None and is_block_matrix(name, parameter)
        }
        rest = [parameter for name, parameter in model.named_parameters() if name not in matrices]
        found: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(decay_groups(rest, WEIGHT_DECAY), lr=self.adamw, betas=BETAS, fused=True)
        ]
        if self.muon is not None:
            dtype = torch.bfloat16 if computes_in_bf16("cpu") else torch.float32
            found.append(Muon(list(matrices.values()), lr=self.muon, weight_decay=WEIGHT_DECAY, dtype=dtype))
        return found


def _smoothing(**options: Any) -> Callable[[int], nn.Module]:
    sizes = {"dim": 128, "depth": 4, "dim_mhesa": 256} | options
    return lambda num_tokens: GatedExponentialSmoothingLM(num_tokens=num_tokens, **sizes)


def _ours(
    *, context: int = CONTEXT, rates: Callable[[int], tuple[Tensor, Tensor]] = spread_rates, **options: Any
) -> Recipe:
    """What `mhesa train` does by default, but for one choice.

    Args:
        context: tokens of a window that it is trained on.
        rates: makes the initial `alphas` and `dampen_factors` for a number of heads.
        options: options of the model.
    """
    build = _smoothing(**{"heads": 32, "adaptive": True, "conv_size": 4} | options)

    def with_rates(num_tokens: int) -> nn.Module:
        model = build(num_tokens)
        for module in model.modules():
            if isinstance(module, MHESA):
                alphas, dampen_factors = rates(module.heads)
                with torch.no_grad():
                    module.alphas.copy_(alphas)
                    module.dampen_factors.copy_(dampen_factors)
        return model

    return Recipe(with_rates, 3e-3, 0.02, context=context)


# Models of 1.0 to 1.3 million parameters. The learning rates are the best of those in docs/learning.md.
RECIPES = {
    "original": Recipe(_smoothing(heads=8), 6e-3),
    "original, Muon": Recipe(_smoothing(heads=8), 3e-3, 0.02),
    "adaptive": _ours(),
    "transformer, Muon": Recipe(lambda n: Transformer(n, dim=160, depth=4, heads=5), 3e-3, 0.04, window=4096),
    "LSTM": Recipe(lambda n: LSTM(n, dim=128, depth=2, width=256), 2e-2),
}

# Variants of "adaptive", each with one choice changed.
CHOICES = {
    "16 heads": _ours(heads=16),
    "64 heads": _ours(heads=64),
    "windows of 128": _ours(context=128),
    "windows of 512": _ours(context=512),
    "half of Muon's learning rate": _ours().at(0.5),
    "twice Muon's learning rate": _ours().at(2.0),
    "initial rates of the original": _ours(rates=lambda heads: (torch.randn(heads), torch.randn(heads))),
    "time constants up to 30": _ours(rates=partial(spread_rates, slowest=30)),
}

# Smaller ones, of 0.1 to 0.2 million parameters, for the probes.
PROBED = {
    "original, Muon": Recipe(_smoothing(dim=64, depth=2, dim_mhesa=128, heads=8), 3e-3, 0.02),
    "adaptive": Recipe(
        _smoothing(dim=64, depth=2, dim_mhesa=128, heads=16, adaptive=True, conv_size=4), 3e-3, 0.02
    ),
    "transformer, Muon": Recipe(lambda n: Transformer(n, dim=80, depth=2, heads=5), 3e-3, 0.02),
}
