"""What is learnt from the same text, and how long it is remembered: ours and other models of the size."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.contestants import CHOICES, CONTEXT, PROBED, RECIPES, Recipe
from benchmarks.probes import PROBES, Probe, accuracy
from mhesa.data.corpus import Source, open_corpus
from mhesa.data.windows import Windows
from mhesa.errors import InputError
from mhesa.model.loss import IGNORED_LABEL
from mhesa.ops.devices import computes_in_bf16
from mhesa.tokenizers import Bytes
from mhesa.training.schedule import learning_rate

# Tokens of a step, whatever the windows.
STEPS, STEP_TOKENS, NUM_TOKENS, WARMUP = 600, 4096, 257, 0.02
# Bytes after which a model starts anew, in the two figures of each run.
SHORT, LONG = 256, 4096
FACTORS = (0.5, 2.0)
CONTEXTS = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
PREDICTED = 32
POSITIONS, BLOCK, ORDERS = 65_536, 2048, 4
# Training steps of each probe.
PROBE_STEPS = {"latch": 300, "recall": 2000}
PROBE_ROWS, TRAINED_DISTANCE = 8, 1000
DISTANCES = (10, 30, 100, 300, 1000, 3000)

# Maps a step's number to its inputs and targets, `(rows, length)` each.
Batches = Callable[[int], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Run:
    """A model that was trained on a text, and its loss held out.

    Args:
        budget: what was the same for all: steps, or seconds of CPU time on one thread.
        rate: the peak learning rate of Muon, or of AdamW where it is alone.
        short, long: nats a byte, where the model starts from nothing every 256 and every 4,096 bytes.
    """

    budget: str
    recipe: str
    parameters: int
    rate: float
    seed: int
    steps: int
    seconds: float
    short: float
    long: float


@dataclass(frozen=True)
class Position:
    """Nats a byte between two positions of a text of shuffled blocks.

    Args:
        over_short: loss over that of the same bytes read from nothing every `SHORT` bytes.
    """

    recipe: str
    first: int
    last: int
    loss: float
    over_short: float


@dataclass(frozen=True)
class Context:
    """Nats of the same bytes, given this many bytes before them."""

    recipe: str
    context: int
    loss: float


@dataclass(frozen=True)
class Recollection:
    """How often a trained model gives the right answer over a distance."""

    probe: str
    recipe: str
    seed: int
    distance: int
    accuracy: float
    chance: float


class Text:
    """A corpus of bytes: windows to train on, and text held out.

    Args:
        sources: see `mhesa.data.corpus.Source`; none is the Python standard library's source text.
        held_out_bytes: largest number of held-out bytes that are read.

    Raises:
        InputError: there is no such text, or too little.
    """

    def __init__(self, sources: Sequence[str] = (), held_out_bytes: int = 1 << 17) -> None:
        self.corpus = open_corpus(Source(tuple(sources)), Bytes())
        text = b"".join(document.data for document in self.corpus.held_out)[:held_out_bytes]
        if len(text) <= POSITIONS:
            raise InputError(
                f"{len(text):,} bytes are held out, and the benchmark reads {POSITIONS + 1:,}; give more text"
            )
        self.held_out = torch.from_numpy(np.frombuffer(text, np.uint8).astype(np.int64))

    def batches(self, seed: int, context: int = CONTEXT) -> Batches:
        """Windows of `context` tokens in an order that the seed decides."""
        windows = Windows(self.corpus.tokens, context=context, rows=STEP_TOKENS // context, seed=seed)

        def read(step: int) -> tuple[Tensor, Tensor]:
            ids = windows.read(windows.starts(step))
            return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

        return read


def train(
    recipe: Recipe, batches: Batches, *, seed: int, steps: int | None = None, seconds: float | None = None
) -> tuple[nn.Module, int, float]:
    """Train a recipe's model for some steps, or some seconds of CPU time.

    Returns:
        The model, the steps and the seconds that it took.
    """
    torch.manual_seed(seed)
    model = recipe.build(NUM_TOKENS)
    optimizers = recipe.optimizers(model)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    peaks = [group["lr"] for group in groups]
    begin, step, taken, spent = time.process_time(), 0, 0.0, 0.0
    while spent < 1:
        for group, peak in zip(groups, peaks, strict=True):
            group["lr"] = peak * learning_rate(spent, WARMUP)
        inputs, targets = batches(step)
        with torch.autocast("cpu", torch.bfloat16, enabled=computes_in_bf16("cpu")):
            logits = model(inputs)
        loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED_LABEL)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        step += 1
        taken = time.process_time() - begin
        spent = taken / seconds if seconds is not None else step / (steps or 1)
    return model.eval(), step, taken


PARTS = ("rates", "choices", "tokens", "minutes", "latch", "recall")


def bench_learning(
    part: str, sources: Sequence[str], *, seeds: int, seconds: float
) -> Iterator[tuple[str, Run | Position | Context | Recollection]]:
    """Run one of the `PARTS`.

    Args:
        sources: texts to learn, see `Text`.
        seeds: number of seeds; `rates` takes one.
        seconds: CPU time of each run of `minutes`.

    Yields:
        Rows with the name of their table.
    """
    if part in PROBES:
        for seed in range(seeds):
            for row in bench_probe(part, seed=seed):
                yield "recollection", row
        return
    text = Text(sources)
    if part == "rates":
        for factor in FACTORS:
            recipes = {name: recipe.at(factor) for name, recipe in RECIPES.items()}
            for run, _ in bench_text(text, recipes, seed=0, steps=STEPS):
                yield "runs", run
        return
    recipes = CHOICES if part == "choices" else RECIPES
    budget = {"seconds": seconds} if part == "minutes" else {"steps": STEPS}
    for seed in range(seeds):
        for run, model in bench_text(text, recipes, seed=seed, **budget):
            yield "runs", run
            if part == "tokens" and seed == 0:
                window = RECIPES[run.recipe].window
                for position in loss_by_position(run.recipe, model, text.held_out, window):
                    yield "positions", position
                for context in loss_by_context(run.recipe, model, text.held_out):
                    yield "contexts", context


def bench_text(
    text: Text,
    recipes: dict[str, Recipe],
    *,
    seed: int,
    steps: int | None = None,
    seconds: float | None = None,
) -> Iterator[tuple[Run, nn.Module]]:
    """Train each recipe on windows of the same text, for some steps or some seconds of CPU time."""
    budget = f"{steps} steps" if seconds is None else f"{seconds:g} s"
    for name, recipe in recipes.items():
        model, taken, spent = train(
            recipe, text.batches(seed, recipe.context), seed=seed, steps=steps, seconds=seconds
        )
        run = Run(
            budget=budget,
            recipe=name,
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            rate=getattr(recipe, recipe.tuned),
            seed=seed,
            steps=taken,
            seconds=spent,
            short=loss_in_windows(model, text.held_out, SHORT),
            long=loss_in_windows(model, text.held_out, LONG),
        )
        yield run, model


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
    return losses(model, text.unfold(0, window + 1, window)).mean().item()


def loss_by_position(name: str, model: nn.Module, text: Tensor, window: int | None) -> list[Position]:
    """Loss by position in a text of shuffled blocks, beside that of the same bytes in short windows.

    Args:
        text: bytes held out, `(length,)`.
        window: positions to read; `None` reads `POSITIONS`.
    """
    length = window or POSITIONS
    blocks = text[: len(text) // BLOCK * BLOCK].view(-1, BLOCK)
    generator = torch.Generator().manual_seed(0)
    found, short = [], []
    for _ in range(ORDERS):
        row = blocks[torch.randperm(len(blocks), generator=generator)].flatten()[: length + 1]
        found.append(losses(model, row[None])[0])
        # One byte more than a window, so that each byte but the first of the text is predicted in one.
        short.append(losses(model, row.unfold(0, SHORT + 1, SHORT)).flatten())
    bounds = [0, *(2**power for power in range(int(math.log2(BLOCK)), int(math.log2(length)) + 1))]
    means = [
        [torch.stack(each)[:, low:high].mean().item() for each in (found, short)]
        for low, high in pairwise(bounds)
    ]
    return [
        Position(name, low, high, loss, loss / within)
        for (low, high), (loss, within) in zip(pairwise(bounds), means, strict=True)
    ]


def loss_by_context(name: str, model: nn.Module, text: Tensor, *, places: int = 400) -> list[Context]:
    """Loss of the same bytes, `PREDICTED` at each of some places, with more and more context before them.

    Args:
        text: bytes held out, `(length,)`.
    """
    starts = np.random.default_rng(0).integers(max(CONTEXTS), len(text) - PREDICTED, places)
    rows = []
    for context in CONTEXTS:
        ids = torch.stack([text[start - context : start + PREDICTED] for start in starts])
        rows.append(Context(name, context, losses(model, ids)[:, -PREDICTED:].mean().item()))
    return rows


def bench_probe(name: str, *, seed: int) -> Iterator[Recollection]:
    """Train the models that could remember on a probe, and test them at every distance."""
    probe: Probe = PROBES[name]

    def batches(step: int) -> tuple[Tensor, Tensor]:
        return probe.batch((seed << 32) + step, TRAINED_DISTANCE, vary=True, rows=PROBE_ROWS)

    for recipe in PROBED:
        model, _, _ = train(PROBED[recipe], batches, seed=seed, steps=PROBE_STEPS[name])
        for distance in DISTANCES:
            yield Recollection(
                name, recipe, seed, distance, accuracy(model, probe, distance), 1 / probe.choices
            )
