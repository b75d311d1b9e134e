"""The optimizer: AdamW, with weight decay on matrices alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

BETAS = (0.9, 0.99)


def make_optimizer(model: nn.Module, weight_decay: float) -> torch.optim.AdamW:
    """Fused AdamW over all parameters of a model; its learning rate is set before every step."""
    return torch.optim.AdamW(decay_groups(model, weight_decay), betas=BETAS, fused=True)


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups: matrices decay; biases, norms, gates and residual weights do not.

    >>> [len(group["params"]) for group in decay_groups(nn.Linear(2, 3), 0.1)]
    [1, 1]
    """
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
