"""`mhesa score` as a whole command: bytes a second and memory, with one session and with one for each key."""

from __future__ import annotations

import json
import os
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

import mhesa
from mhesa.model.config import ModelConfig
from mhesa.model.loading import save
from mhesa.tokenizers import Bytes

# A run reads so much less of the text than the other: what both take is the start.
SMALL = 8
# Lines whose bits are compared with those of the model in fp64, and the largest difference, in bits a byte.
CHECKED, TOLERANCE = 40, {"fp32": 1e-4, "bf16": 5e-2}
KEY = r"user=(\w+)"
VERBS = ("opened", "closed", "moved", "signed", "refused", "renamed", "copied", "checked")
THINGS = ("the first door", "a ledger", "its mailbox", "an order of paper", "the night's backup", "a window")


@dataclass(frozen=True)
class Row:
    """What one way of scoring a text takes.

    Args:
        name: the way.
        precision: of the model.
        megabytes: of the text.
        bytes_per_second: without the start of the command.
        over_one: that over the same with one session.
        start: seconds that no byte is read in.
        peak: the largest resident memory, in MB.
        peak_small: the same of an eighth of the text.
    """

    name: str
    precision: str
    megabytes: float
    bytes_per_second: float
    over_one: float
    start: float
    peak: float
    peak_small: float


@dataclass(frozen=True)
class Run:
    """One run of the command."""

    seconds: float
    peak: float


def bench_score(
    *,
    megabytes: float,
    keys: int,
    key_memory: str,
    precisions: Sequence[str],
    rounds: int,
    on_run: Callable[[], object] = lambda: None,
) -> Iterator[list[Row]]:
    """Time `mhesa score` with the model of `mhesa train`, with random weights, on lines of a log.

    Args:
        megabytes: of the text.
        keys: how many users its lines are of, in random order.
        key_memory: `--key-memory`.
        precisions: of the model.
        rounds: runs of each way on all of the text, and on an eighth of it.
        on_run: called after each.

    Yields:
        The rows of each precision.
    """
    with TemporaryDirectory() as name:
        folder = Path(name)
        model = make_model(folder / "model")
        texts = [folder / "part.log", folder / "whole.log"]
        for text, size in zip(texts, (megabytes / SMALL, megabytes), strict=True):
            write_text(text, int(size * 1e6), keys)
        keyed = f"a session for each of {keys:,} keys"
        ways = {"one session": [], keyed: ["--key", KEY, "--key-memory", key_memory]}
        for precision in precisions:
            for options in ways.values():
                check(model, texts[0], precision, options)
            runs: dict[tuple[str, Path], list[Run]] = {(way, text): [] for way in ways for text in texts}
            for _ in range(rounds):
                for (way, text), found in runs.items():
                    found.append(run(model, text, precision, ways[way]))
                    on_run()
            yield rows(runs, list(ways), texts, precision)


def make_model(folder: Path) -> Path:
    """A folder with the model that `mhesa train` makes by default, untrained."""
    tokenizer = Bytes()
    torch.manual_seed(0)
    config = ModelConfig(
        num_tokens=len(tokenizer),
        eos_token_id=tokenizer.eos_token_id,
        heads=32,
        adaptive=True,
        conv_size=4,
    )
    save(config.build().eval(), tokenizer, folder)
    return folder


def write_text(path: Path, size: int, keys: int) -> None:
    """Write lines of at least `size` bytes in all, each about one of `keys` users."""
    choose = random.Random(0)
    with path.open("w") as file:
        while file.tell() < size:
            second = file.tell() // 1000
            file.write(
                f"2026-01-01 {second // 3600 % 24:02d}:{second // 60 % 60:02d}:{second % 60:02d} INFO "
                f"user=u{choose.randrange(keys):07d} {choose.choice(VERBS)} {choose.choice(THINGS)} "
                f"in {choose.randrange(1000)} ms, {choose.randrange(10**6)} bytes\n"
            )


def command(model: Path, text: Path, precision: str, options: Sequence[str]) -> list[str]:
    """The command line of a run."""
    return [sys.executable, "-m", "mhesa", "score", str(model), str(text), "--precision", precision, *options]


def check(model: Path, text: Path, precision: str, options: Sequence[str]) -> None:
    """Compare the first lines' bits with those of the model in fp64.

    Raises:
        RuntimeError: they differ.
    """
    lines = list(islice(text.open("rb"), CHECKED))
    part = text.with_name("checked.log")
    part.write_bytes(b"".join(lines))
    printed = subprocess.run(
        [*command(model, part, precision, options), "--json"], capture_output=True, text=True, check=True
    )
    found = [json.loads(line)["bits"] for line in printed.stdout.splitlines()]
    plain, tokenizer = mhesa.load(model)
    plain.double()
    sessions: dict[bytes, bytes] = {}
    for line, bits in zip(lines, found, strict=True):
        key = re.findall(KEY.encode(), line)[0] if options else b""
        before = sessions.get(key, b"")
        sessions[key] = before + line
        ids = torch.tensor([[tokenizer.eos_token_id, *sessions[key]]])
        with torch.no_grad():
            logprobs = plain(ids[:, :-1])[0].log_softmax(1)
        taken = logprobs.gather(1, ids[0, 1:, None])[len(before) :, 0]
        expected = -float(taken.sum()) / float(torch.tensor(2.0).double().log())
        if abs(bits - expected) > TOLERANCE[precision] * len(line):
            raise RuntimeError(f"{precision} {options}: {bits} bits, not {expected}, for {line!r}")


def run(model: Path, text: Path, precision: str, options: Sequence[str]) -> Run:
    """Run the command; its output goes nowhere."""
    start = time.perf_counter()
    with open(os.devnull, "w") as nowhere:
        process = subprocess.Popen(command(model, text, precision, options), stdout=nowhere, stderr=nowhere)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"mhesa score ended with {process.returncode}")
    return Run(time.perf_counter() - start, usage.ru_maxrss * 1024 / 1e6)


def rows(
    runs: dict[tuple[str, Path], list[Run]], ways: Sequence[str], texts: Sequence[Path], precision: str
) -> list[Row]:
    """The medians of runs on a part of the text and on the whole."""
    found: list[Row] = []
    sizes = [text.stat().st_size for text in texts]
    for way in ways:
        seconds = [statistics.median(run.seconds for run in runs[way, text]) for text in texts]
        peaks = [statistics.median(run.peak for run in runs[way, text]) for text in texts]
        rate = (sizes[1] - sizes[0]) / (seconds[1] - seconds[0])
        found.append(
            Row(
                name=way,
                precision=precision,
                megabytes=sizes[1] / 1e6,
                bytes_per_second=rate,
                over_one=rate / found[0].bytes_per_second if found else 1.0,
                start=seconds[1] - sizes[1] / rate,
                peak=peaks[1],
                peak_small=peaks[0],
            )
        )
    return found
