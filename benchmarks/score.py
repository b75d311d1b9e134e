"""`mhesa score` as a whole command: bytes a second and memory, with one session and with one for each key."""

from __future__ import annotations

import json
import math
import random
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

import mhesa
from mhesa.errors import InputError
from mhesa.model.loading import save
from mhesa.tokenizers import Bytes
from mhesa.training.settings import TrainingSettings

# The shorter run reads one part of so many. What both runs take is the start.
PARTS = 8
# Bytes of lines, about so many users, whose bits are compared with those of the model in fp64, and the
# largest difference in bits a byte.
CHECKED_BYTES, CHECKED_KEYS = 4000, 5
TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2, "int8": 5e-2}
# Runs the command in its arguments, and prints the seconds that it took and the largest memory that it held.
# It is a process of its own, for Linux counts the memory of whoever starts a command as the command's.
LAUNCHER = """
import json, resource, subprocess, sys, time
start = time.perf_counter()
done = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
if done.returncode:
    sys.exit(done.stderr)
seconds, peak = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
print(json.dumps([seconds, peak * (1 if sys.platform == "darwin" else 1024) / 1e6]))
"""
KEY = r"user=(\w+)"
VERBS = ("opened", "closed", "moved", "signed", "refused", "renamed", "copied", "checked")
THINGS = ("the first door", "a ledger", "its mailbox", "an order of paper", "the night's backup", "a window")


@dataclass(frozen=True)
class Row:
    """The speed and memory of one way of scoring a text.

    Args:
        name: name of the way.
        precision: precision of the model.
        megabytes: size of the text.
        bytes_per_second: speed without the start of the command.
        over_one: that speed over the same with one session.
        start: seconds before the first byte is read.
        peak: the largest resident memory, in MB.
        peak_of_part: the same memory on an eighth of the text.
    """

    name: str
    precision: str
    megabytes: float
    bytes_per_second: float
    over_one: float
    start: float
    peak: float
    peak_of_part: float


@dataclass(frozen=True)
class Run:
    """The seconds that one run of the command took, and its largest resident memory in MB."""

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
        megabytes: size of the text.
        keys: number of users that its lines are of, in random order.
        key_memory: value of `--key-memory`.
        precisions: precisions of the model.
        rounds: runs of each way on all of the text, and on an eighth of it.
        on_run: called after each.

    Yields:
        The rows of each precision.
    """
    with TemporaryDirectory() as name:
        folder = Path(name)
        model = make_model(folder / "model")
        texts = [folder / "part.log", folder / "whole.log"]
        checked = folder / "checked.log"
        write_text(checked, CHECKED_BYTES, CHECKED_KEYS)
        for text, size in zip(texts, (megabytes / PARTS, megabytes), strict=True):
            write_text(text, int(size * 1e6), keys)
        keyed = f"a session for each of {keys:,} keys"
        ways = {"one session": [], keyed: ["--key", KEY, "--key-memory", key_memory]}
        for precision in precisions:
            for options in ways.values():
                check(model, checked, precision, options)
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
    config = TrainingSettings(out=str(folder)).model_config(len(tokenizer), tokenizer.eos_token_id)
    save(config.build().eval(), tokenizer, folder)
    return folder


def write_text(path: Path, size: int, keys: int) -> None:
    """Write lines of at least `size` bytes in all, each about one of `keys` users."""
    choose, written = random.Random(0), 0
    with path.open("w") as file:
        while written < size:
            second = written // 1000
            written += file.write(
                f"2026-01-01 {second // 3600 % 24:02d}:{second // 60 % 60:02d}:{second % 60:02d} INFO "
                f"user=u{choose.randrange(keys):07d} {choose.choice(VERBS)} {choose.choice(THINGS)} "
                f"in {choose.randrange(1000)} ms, {choose.randrange(10**6)} bytes\n"
            )


def command(model: Path, text: Path, precision: str, options: Sequence[str]) -> list[str]:
    """The command line of a run."""
    weights = ["--quantize", "int8"] if precision == "int8" else ["--precision", precision]
    return [sys.executable, "-m", "mhesa", "score", str(model), str(text), *weights, *options]


def check(model: Path, text: Path, precision: str, options: Sequence[str]) -> None:
    """Compare the bits of all lines with those of the model in fp64.

    Raises:
        RuntimeError: they differ.
        InputError: the command fails.
    """
    lines = text.read_bytes().splitlines(keepends=True)
    printed = _output([*command(model, text, precision, options), "--json"])
    found = [json.loads(line)["bits"] for line in printed.splitlines()]
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
        expected = -float(taken.sum()) / math.log(2)
        if abs(bits - expected) > TOLERANCE[precision] * len(line):
            raise RuntimeError(f"{precision} {options}: {bits} bits, not {expected}, for {line!r}")


def run(model: Path, text: Path, precision: str, options: Sequence[str]) -> Run:
    """Run the command; its output goes nowhere."""
    launched = [sys.executable, "-c", LAUNCHER, *command(model, text, precision, options)]
    return Run(*json.loads(_output(launched)))


def _output(words: Sequence[str]) -> str:
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise InputError(f"mhesa score failed: {done.stderr.strip()}")
    return done.stdout


def rows(
    runs: dict[tuple[str, Path], list[Run]], ways: Sequence[str], texts: Sequence[Path], precision: str
) -> list[Row]:
    """The medians of runs on a part of the text and on the whole.

    Raises:
        InputError: the part took as long as the whole.
    """
    found: list[Row] = []
    sizes = [text.stat().st_size for text in texts]
    for way in ways:
        seconds = [statistics.median(run.seconds for run in runs[way, text]) for text in texts]
        peaks = [statistics.median(run.peak for run in runs[way, text]) for text in texts]
        if seconds[1] <= seconds[0]:
            raise InputError("the text is too short to be timed on this machine; give more --megabytes")
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
                peak_of_part=peaks[0],
            )
        )
    return found
