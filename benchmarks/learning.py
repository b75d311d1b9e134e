"""What is learnt from the same text: ours, the original package's recipe, a transformer, an LSTM."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mhesa.data import Source, Windows, open_corpus
from mhesa.model.lm import GatedExponentialSmoothingLM
from mhesa.ops.devices import computes_in_bf16
from mhesa.tokenizers import Bytes
from mhesa.training.muon import Muon
from mhesa.training.schedule import learning_rate

CONTEXTS = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
# A byte that no text of the probes holds otherwise: what comes next is asked for.
QUERY = 255


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
        """Logits."""
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
        muon: that of Muon for the matrices of the model's `layers`; `None` leaves them to AdamW.
    """

    build: Callable[[int], nn.Module]
    adamw: float
    muon: float | None = None


def _smoothing(**options: Any) -> Callable[[int], nn.Module]:
    sizes = {"dim": 128, "depth": 4, "dim_mhesa": 256} | options
    return lambda num_tokens: GatedExponentialSmoothingLM(num_tokens=num_tokens, **sizes)


RECIPES = {
    "original": Recipe(_smoothing(heads=8), 3e-3),
    "original, Muon": Recipe(_smoothing(heads=8), 3e-3, 0.02),
    "adaptive": Recipe(_smoothing(heads=32, adaptive=True, conv_size=4), 3e-3, 0.02),
    "transformer, Muon": Recipe(lambda n: Transformer(n, dim=160, depth=4, heads=5), 3e-3, 0.04),
    "LSTM": Recipe(lambda n: LSTM(n, dim=128, depth=2, width=256), 5e-3),
}


@dataclass(frozen=True)
class Trained:
    """A trained model and what it took."""

    model: nn.Module
    steps: int
    seconds: float


def train(
    recipe: Recipe,
    batches: Callable[[int], tuple[Tensor, Tensor]],
    *,
    seed: int,
    steps: int | None = None,
    minutes: float | None = None,
    num_tokens: int = 257,
) -> Trained:
    """Train a recipe's model for some steps, or some minutes.

    Args:
        recipe: what to train.
        batches: makes of a step's number its inputs and targets, `(batch, length)` each; targets of -100
            are not predicted.
        seed: of the initial values.
    """
    torch.manual_seed(seed)
    model = recipe.build(num_tokens)
    optimizers = _optimizers(model, recipe)
    rates = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
    begin, step, spent = time.perf_counter(), 0, 0.0
    while spent < 1:
        rate = learning_rate(spent, 0.02)
        groups = (group for optimizer in optimizers for group in optimizer.param_groups)
        for group, peak in zip(groups, rates, strict=True):
            group["lr"] = peak * rate
        inputs, targets = batches(step)
        with torch.autocast("cpu", torch.bfloat16, enabled=computes_in_bf16("cpu")):
            logits = model(inputs)
        F.cross_entropy(logits.float().flatten(0, 1), targets.flatten()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        step += 1
        seconds = time.perf_counter() - begin
        spent = step / steps if steps is not None else seconds / (60 * (minutes or 1.0))
    return Trained(model.eval(), step, seconds)


def _optimizers(model: nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    named = dict(model.named_parameters())
    matrices = {
        name: parameter
        for name, parameter in named.items()
        if recipe.muon is not None
        and parameter.ndim == 2
        and name.startswith("layers.")
        and not name.endswith("conv.weight")
    }
    rest = [parameter for name, parameter in named.items() if name not in matrices]
    groups = [
        {"params": [parameter for parameter in rest if parameter.ndim >= 2], "weight_decay": 0.1},
        {"params": [parameter for parameter in rest if parameter.ndim < 2], "weight_decay": 0.0},
    ]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(groups, lr=recipe.adamw, betas=(0.9, 0.99), fused=True)
    ]
    if recipe.muon is not None:
        dtype = torch.bfloat16 if computes_in_bf16("cpu") else torch.float32
        optimizers.append(Muon(matrices.values(), lr=recipe.muon, weight_decay=0.1, dtype=dtype))
    return optimizers


class Text:
    """A corpus of bytes: windows to train on, and text held out.

    Args:
        sources: see `mhesa.data.Source`; none is the Python standard library's source text.
        held_out_bytes: how many bytes held out are read.
    """

    def __init__(self, sources: tuple[str, ...] = (), held_out_bytes: int = 1 << 19) -> None:
        tokenizer = Bytes()
        self.corpus = open_corpus(Source(sources), tokenizer)
        text = b"".join(document.data for document in self.corpus.held_out)[:held_out_bytes]
        self.held_out = torch.from_numpy(np.frombuffer(text, np.uint8).astype(np.int64))

    def batches(self, *, rows: int = 16, context: int = 256, seed: int = 0) -> Any:
        """What `train` takes."""
        windows = Windows(self.corpus.tokens, context=context, rows=rows, seed=seed)

        def read(step: int) -> tuple[Tensor, Tensor]:
            ids = windows.read(windows.starts(step))
            return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

        return read


@torch.inference_mode()
def losses(model: nn.Module, ids: Tensor) -> Tensor:
    """Nats of each byte but the first: `(rows, length)` ids to `(rows, length - 1)`."""
    found = []
    for piece in ids.split(max(1, (1 << 15) // ids.shape[1])):
        logits = model(piece[:, :-1]).float()
        found.append(F.cross_entropy(logits.transpose(1, 2), piece[:, 1:], reduction="none"))
    return torch.cat(found)


def loss_in_windows(model: nn.Module, text: Tensor, window: int) -> float:
    """Mean nats a byte where the model starts from nothing at every `window` bytes."""
    rows = (len(text) - 1) // window
    ids = torch.stack([text[row * window : (row + 1) * window + 1] for row in range(rows)])
    return losses(model, ids).mean().item()


def loss_by_position(
    model: nn.Module, text: Tensor, *, length: int = 65_536, block: int = 2048, orders: int = 4
) -> dict[str, float]:
    """Mean nats by position in a text of shuffled blocks, so that all positions are equally hard."""
    blocks = text[: len(text) // block * block].view(-1, block)
    generator = torch.Generator().manual_seed(0)
    rows = [blocks[torch.randperm(len(blocks), generator=generator)].flatten() for _ in range(orders)]
    found = torch.stack([losses(model, row[None, : length + 1])[0] for row in rows]).mean(0)
    # Of every block the same bytes: its first few follow text that they do not belong to.
    bounds = [0, *(2**power for power in range(11, int(math.log2(length)) + 1))]
    return {f"{low}-{high}": found[low:high].mean().item() for low, high in pairwise(bounds)}


def loss_by_context(
    model: nn.Module,
    text: Tensor,
    *,
    contexts: tuple[int, ...] = CONTEXTS,
    predicted: int = 32,
    places: int = 400,
) -> dict[int, float]:
    """Mean nats of the same bytes with more and more context before them."""
    starts = np.random.default_rng(0).integers(max(contexts), len(text) - predicted, places)
    return {
        context: losses(model, torch.stack([text[start - context : start + predicted] for start in starts]))[
            :, -predicted:
        ]
        .mean()
        .item()
        for context in contexts
    }


def latch_batches(distance: int, *, rows: int = 16, seed: int = 0, exact: bool = False) -> Any:
    """A flag, noise, a query: what was the flag? Distances up to `distance`, or just that if `exact`."""

    def read(step: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed((seed << 32) + step)
        ids = torch.randint(16, 128, (rows, distance + 3), generator=generator)
        targets = torch.full_like(ids, -100)
        flags = torch.randint(2, (rows,), generator=generator)
        span = torch.rand(rows, generator=generator)
        distances = torch.full((rows,), distance) if exact else (distance**span).long()
        for row in range(rows):
            at = distance - int(distances[row])
            ids[row, at], ids[row, distance + 1] = flags[row], QUERY
            targets[row, distance + 1] = flags[row]
        return ids[:, :-1], targets[:, :-1]

    return read


def recall_batches(
    distance: int, *, pairs: int = 4, rows: int = 16, seed: int = 0, exact: bool = False
) -> Any:
    """Keys and their values, noise, a query and a key: what was its value?"""

    def read(step: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed((seed << 32) + step)
        length = 2 * pairs + distance + 2
        ids = torch.randint(64, 128, (rows, length), generator=generator)
        targets = torch.full_like(ids, -100)
        span = torch.rand(rows, generator=generator)
        distances = torch.full((rows,), distance) if exact else (distance**span).long()
        for row in range(rows):
            keys = torch.randperm(16, generator=generator)[:pairs]
            values = torch.randint(32, 48, (pairs,), generator=generator)
            at = distance - int(distances[row])
            ids[row, at : at + 2 * pairs] = torch.stack([keys, values], dim=1).flatten()
            chosen = int(torch.randint(pairs, (1,), generator=generator))
            ids[row, -2], ids[row, -1] = QUERY, keys[chosen]
            targets[row, -1] = values[chosen]
        return ids, targets

    return read


@torch.inference_mode()
def accuracy(model: nn.Module, batches: Any, steps: int = 8) -> float:
    """How often the likeliest token is the right one."""
    right = asked = 0
    for step in range(steps):
        ids, targets = batches((1 << 20) + step)
        predicted = model(ids).argmax(-1)
        at = targets != -100
        right += int((predicted[at] == targets[at]).sum())
        asked += int(at.sum())
    return right / asked
