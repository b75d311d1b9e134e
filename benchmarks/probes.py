"""Tasks that need a memory: a flag to keep, and keys whose values are asked for.

Both are made of bytes: noise, and in it what has to be kept, then a query. Only the answer is predicted.
While training, distances are drawn evenly by their logarithm; when testing, all are the one asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mhesa.model.loss import IGNORED_LABEL

# The byte that says: now comes the answer.
QUERY = 255
ROWS = 16
# Keys with values to remember, and batches that an accuracy is measured on.
PAIRS, BATCHES = 4, 16


@dataclass(frozen=True)
class Probe:
    """A task.

    Args:
        symbols: makes, for a number of rows, what has to be kept `(rows, length)`, what is asked after the
            query `(rows, length)`, possibly of length 0, and the answers `(rows,)`.
        choices: how many answers there are, for the accuracy of chance.
    """

    symbols: Callable[[int, torch.Generator], tuple[Tensor, Tensor, Tensor]]
    choices: int

    def batch(self, step: int, distance: int, *, vary: bool, rows: int = ROWS) -> tuple[Tensor, Tensor]:
        """Inputs and targets of a step, `(rows, length)` each; targets are `IGNORED_LABEL` but at the end.

        Args:
            step: number of the step, from which the symbols are drawn.
            distance: bytes of noise between what has to be kept and the query; the most of them with `vary`.
        """
        generator = torch.Generator().manual_seed(step)
        kept, asked, answers = self.symbols(rows, generator)
        noise = torch.randint(64, 192, (rows, distance), generator=generator)
        query = torch.full((rows, 1), QUERY)
        ids = torch.cat([kept, noise, query, asked], dim=1)
        if vary:
            length = kept.shape[1]
            shares = torch.rand(rows, generator=generator)
            for row, share in enumerate(shares.tolist()):
                # What has to be kept moves right, and the noise that it stood before now stands before it.
                at = distance - int(distance**share)
                ids[row, : at + length] = torch.cat([noise[row, :at], kept[row]])
        targets = torch.full_like(ids, IGNORED_LABEL)
        targets[:, -1] = answers
        return ids, targets


def _flag(rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    flags = torch.randint(2, (rows,), generator=generator)
    return flags[:, None], torch.empty(rows, 0, dtype=torch.int64), flags


def _pairs(rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    keys = torch.rand(rows, 16, generator=generator).argsort(1)[:, :PAIRS]
    values = torch.randint(32, 48, (rows, PAIRS), generator=generator)
    chosen = torch.randint(PAIRS, (rows, 1), generator=generator)
    kept = torch.stack([keys, values], dim=2).flatten(1)
    return kept, keys.gather(1, chosen), values.gather(1, chosen)[:, 0]


PROBES = {"latch": Probe(_flag, choices=2), "recall": Probe(_pairs, choices=16)}


@torch.inference_mode()
def accuracy(model: nn.Module, probe: Probe, distance: int) -> float:
    """How often the likeliest token is the right one, at one distance."""
    right = []
    for index in range(BATCHES):
        ids, targets = probe.batch((1 << 40) + index, distance, vary=False)
        right.append((model(ids)[:, -1].argmax(-1) == targets[:, -1]).float())
    return torch.cat(right).mean().item()
