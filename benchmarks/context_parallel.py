"""One sequence over several processes: speed, memory, bytes sent, and a model of larger groups on paper."""

from __future__ import annotations

import datetime
import math
import multiprocessing
import os
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from mhesa.model.config import ModelConfig
from mhesa.ops.context_parallel import ContextParallel, stretch
from mhesa.ops.cpu.memory import return_large_blocks

MODEL = ModelConfig(dim=128, depth=4, heads=32, dim_mhesa=256, adaptive=True, conv_size=4)
# The longest that processes wait for one another.
PATIENCE = datetime.timedelta(hours=1)


@dataclass(frozen=True)
class Row:
    """A training step on one sequence by some processes, each on one core.

    Args:
        length: tokens of the sequence.
        over_one: tokens a second, over those of one process.
        gibibytes: peak memory of the largest process.
        memory_over_one: peak memory of the largest process, over that of one process alone.
        private_over_one: the same ratio of private memory, without the pages of libraries that processes
            share.
        sent: bytes that a process gives to the exchanges of a layer and step.
        sent_over_state: `sent` over the bytes of a layer's state, the convolution's last values included.
        loss: loss of the first step, in nats per token; the same for any number of processes.
    """

    length: int
    processes: int
    tokens_per_second: float
    over_one: float | None
    gibibytes: float
    memory_over_one: float | None
    private_over_one: float | None
    sent: float
    sent_over_state: float
    loss: float


@dataclass(frozen=True)
class Case:
    """What is timed: one sequence of `length` tokens, by steps of AdamW.

    Args:
        recompute: keep only what enters each block.
        precision: `"fp32"`, or `"bf16"` by autocast.
        rounds: steps that are timed, after one that is not.
    """

    length: int
    recompute: bool
    precision: str
    rounds: int


def bench_context_parallel(
    lengths: Sequence[int],
    processes: Sequence[int],
    *,
    recompute: bool = False,
    precision: str = "fp32",
    rounds: int = 3,
    on_case: Callable[[], object] = lambda: None,
) -> Iterator[Row]:
    """Time training steps on one sequence.

    Args:
        lengths: lengths of the sequences, in tokens.
        processes: numbers of processes that share a sequence; ratios are over the first of these if it is 1.
        recompute, precision, rounds: see `Case`.
        on_case: called after each row, for a progress bar.
    """
    for length in lengths:
        one: list[dict[str, float]] | None = None
        for count in processes:
            found = _run(Case(length, recompute, precision, rounds), count)
            one = found if count == 1 else one
            row = _row(length, found, one)
            on_case()
            yield row


def _row(length: int, found: list[dict[str, float]], one: list[dict[str, float]] | None) -> Row:
    def over_one(figure: str) -> float | None:
        return None if one is None else max(part[figure] for part in found) / one[0][figure]

    slowdown = over_one("seconds")
    sent = max(part["sent"] for part in found) / MODEL.depth
    return Row(
        length=length,
        processes=len(found),
        tokens_per_second=length / max(part["seconds"] for part in found),
        over_one=None if slowdown is None else 1 / slowdown,
        gibibytes=max(part["bytes"] for part in found) / 2**30,
        memory_over_one=over_one("bytes"),
        private_over_one=over_one("private_bytes"),
        sent=sent,
        sent_over_state=sent / (4 * MODEL.empty().state_size),
        loss=sum(part["loss"] for part in found) / length,
    )


def _run(case: Case, count: int) -> list[dict[str, float]]:
    """What each of `count` new processes finds."""
    context = multiprocessing.get_context("forkserver")
    results: Any = context.SimpleQueue()
    with TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        started = [
            context.Process(target=_measure, args=(case, rank, count, store, results))
            for rank in range(count)
        ]
        for process in started:
            process.start()
        for process in started:
            process.join()
    if any(process.exitcode for process in started):
        raise RuntimeError(f"one of {count} processes failed")
    return [results.get() for _ in started]


def _measure(case: Case, rank: int, count: int, store: str, results: Any) -> None:
    """Run the steps of one process, alone on a core."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    torch.set_num_threads(1)
    return_large_blocks()
    if count == 1:
        results.put(_run_steps(case, 0, 1, None))
        return
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=count, timeout=PATIENCE
    )
    assert dist.group.WORLD is not None
    # DistributedDataParallel must be gone before the group. If it goes last, it frees the group and holds the
    # GIL meanwhile, for which a thread of the group may wait: PyTorch 2.13 then hangs.
    results.put(_run_steps(case, rank, count, CountingContextParallel(dist.group.WORLD)))
    dist.destroy_process_group()


def _run_steps(
    case: Case, rank: int, count: int, parallel: CountingContextParallel | None
) -> dict[str, float]:
    """What the steps of one process take."""
    torch.manual_seed(0)
    model = MODEL.build()
    model.recompute = case.recompute
    trained = model if parallel is None else DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    ids = torch.randint(MODEL.num_tokens, (1, case.length + 1))
    mine = stretch(case.length, count, rank)
    inputs, labels = ids[:, :-1][:, mine].contiguous(), ids[:, 1:][:, mine].contiguous()
    weight = labels.numel() * count / case.length

    def step() -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=case.precision == "bf16"):
            loss: Tensor = trained(inputs, labels, context_parallel=parallel)
        (loss * weight).backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item() * labels.numel()

    SENT.clear()
    loss = step()
    sent = sum(SENT)
    seconds = []
    for _ in range(case.rounds):
        if parallel is not None:
            dist.barrier()
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "seconds": statistics.median(seconds),
        "bytes": peak,
        "private_bytes": peak - _shared_bytes(),
        "sent": sent,
        "loss": loss,
    }


def _shared_bytes() -> int:
    """Resident pages of files, nearly all of them libraries', proc_pid_statm(5)."""
    return int(Path("/proc/self/statm").read_text().split()[2]) * resource.getpagesize()


# Bytes of each message that this process sent.
SENT: list[int] = []


class CountingContextParallel(ContextParallel):
    """Counts what it sends."""

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """As `ContextParallel.gather`."""
        SENT.append(tensor.nbytes)
        return super().gather(tensor)


# On paper

# A model of 2.0 billion parameters, and a GPU that trains it at this rate (bf16; 40 % of an H100's peak).
LARGE = ModelConfig(
    num_tokens=32768, dim=2048, depth=24, heads=256, dim_mhesa=4096, adaptive=True, conv_size=4
)
FLOPS = 4e14
GPUS = (8, 64, 1024)


@dataclass(frozen=True)
class Link:
    """What connects two GPUs: seconds before the first byte of a message, and bytes a second."""

    name: str
    latency: float
    bandwidth: float


LINKS = (Link("NVLink", 3e-6, 450e9), Link("100 Gb/s Ethernet", 20e-6, 12.5e9))


@dataclass(frozen=True)
class Paper:
    """What a group of GPUs would spend on exchanges.

    Args:
        ring: milliseconds of all exchanges of a step by rings, none of them hidden behind computation.
        doubling: the same milliseconds by recursive doubling, whose latencies are the logarithm of the number
            of GPUs.
        tokens_ring, tokens_doubling: tokens of a GPU's stretch from which on exchanges take less than a
            twentieth of the time of a step.
        ring_attention: tokens of a GPU from which on ring attention hides its exchanges (see `on_paper`).
    """

    gpus: int
    link: str
    ring: float
    doubling: float
    tokens_ring: int
    tokens_doubling: int
    ring_attention: int


def on_paper() -> list[Paper]:
    """Exchanges of larger groups, by the sizes of messages and assumed rates.

    A layer makes four exchanges in a step: the convolution's last values and the state, forward and backward.
    In each, every process receives the messages of all others. Computation is six operations for each weight
    and token.

    Ring attention hides its exchanges if a block has at least as many tokens as the GPU's operations a second
    over the link's bytes a second, and needs six blocks (https://arxiv.org/abs/2310.01889).
    """
    messages = 4 * (LARGE.dim_mhesa + LARGE.heads), 4 * ((LARGE.conv_size - 1) * LARGE.dim + 1)
    weights = LARGE.parameters - LARGE.num_tokens * LARGE.dim
    seconds_per_token = 6 * weights / FLOPS
    rows = []
    for gpus in GPUS:
        for link in LINKS:
            transfers = (gpus - 1) * sum(messages) / link.bandwidth
            ring, doubling = (
                2 * LARGE.depth * (len(messages) * rounds * link.latency + transfers)
                for rounds in (gpus - 1, math.ceil(math.log2(gpus)))
            )
            rows.append(
                Paper(
                    gpus=gpus,
                    link=link.name,
                    ring=1e3 * ring,
                    doubling=1e3 * doubling,
                    tokens_ring=round(19 * ring / seconds_per_token),
                    tokens_doubling=round(19 * doubling / seconds_per_token),
                    ring_attention=round(6 * FLOPS / link.bandwidth),
                )
            )
    return rows
