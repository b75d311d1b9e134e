"""The optimizers: Muon for the matrices of the blocks, AdamW for everything else, or AdamW alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from mhesa.model.lm import GatedExponentialSmoothingLM
from mhesa.ops.devices import computes_in_bf16
from mhesa.training.muon import Muon
from mhesa.training.settings import TrainingSettings

BETAS = (0.9, 0.99)


def make_optimizers(model: GatedExponentialSmoothingLM, settings: TrainingSettings) -> list[Optimizer]:
    """The optimizers of a run. A group keeps its peak learning rate as `peak_lr`."""
    named = list(model.named_parameters())
    matrices = [p for name, p in named if settings.optimizer == "muon" and is_block_matrix(name, p)]
    chosen = {id(parameter) for parameter in matrices}
    rest = [parameter for _, parameter in named if id(parameter) not in chosen]
    groups = decay_groups(rest, settings.weight_decay)
    optimizers: list[Optimizer] = [torch.optim.AdamW(groups, lr=settings.lr, betas=BETAS, fused=True)]
    if matrices:
        native = computes_in_bf16(torch.device(settings.device).type)
        dtype = torch.bfloat16 if settings.precision == "bf16" and native else torch.float32
        optimizers.append(
            Muon(matrices, lr=settings.muon_lr, weight_decay=settings.weight_decay, dtype=dtype)
        )
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def is_block_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Whether Muon serves a parameter: a matrix of a block that is multiplied with activations."""
    return parameter.ndim == 2 and name.startswith("layers.") and not name.endswith("conv.weight")


def decay_groups(parameters: Sequence[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups: matrices decay; biases, norms, gates and residual weights do not.

    >>> [len(group["params"]) for group in decay_groups([*nn.Linear(2, 3).parameters()], 0.1)]
    [1, 1]
    """
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
