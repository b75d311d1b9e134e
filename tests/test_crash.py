"""Runs that die: killed at random moments and at every write of a checkpoint, or out of disk space.

The ordinary tests kill a few; `make torture` kills hundreds and writes `benchmarks/torture.md`.
Processes are forked from one that has imported everything, and killed for real.
"""

import gc
import json
import os
import random
import re
import shutil
import signal
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing.connection import wait
from pathlib import Path

import pytest
import torch
from commands import FORKED, run_on_a_small_disk
from safetensors.torch import load_file

from mhesa.data.corpus import Source, open_corpus
from mhesa.tokenizers import Bytes
from mhesa.training.checkpoint import find_damage, newest, steps
from mhesa.training.settings import TrainingSettings

RANDOM_KILLS = 200
RANDOM_KILLS_IN_ORDINARY_TESTS = 6
CALLS_IN_ORDINARY_TESTS = 4
# All that writes, syncs, renames or removes.
CALLS = "openat,write,fsync,rename,mkdir,unlink,unlinkat,rmdir,sendfile,copy_file_range,ftruncate"


# Starting a process asks all others whether they have ended, and of two threads that ask at once one is told
# that the process ended with 255.
ONE_THREAD = threading.Lock()


def run_in_fork(settings, resume, ready):
    """What a process of its own does: wait until `ready` is there, then train."""
    from mhesa.training.run import train

    while ready is not None and not Path(ready).exists():
        time.sleep(0.002)
    torch.set_num_threads(1)
    # What was imported before the fork need not be searched for garbage.
    gc.freeze()
    train(settings, resume=resume)


def start(settings, resume=False, ready=None):
    process = FORKED.Process(target=run_in_fork, args=(settings, resume, ready), daemon=True)
    with ONE_THREAD:
        process.start()
    return process


def exit_code(process, seconds=None):
    """Wait until a process ends, or so many seconds; its exit code, `None` if it still runs."""
    wait([process.sentinel], seconds)
    with ONE_THREAD:
        return process.exitcode


def finish(settings):
    """Bring a run that died to its end: resumed from its checkpoints, or begun again if there were none."""
    there, passed_over = newest(Path(settings.out) / "checkpoints")
    assert passed_over == [], "a checkpoint was half there"
    complete = Path(settings.out) / "metrics.jsonl"
    if there is None:
        shutil.rmtree(settings.out, ignore_errors=True)
    elif there.name == f"step-{settings.steps}" and '"complete"' in complete.read_text():
        return False
    assert exit_code(start(settings, resume=there is not None)) == 0
    return True


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("crash")
    text = folder / "text.txt"
    text.write_text("".join(f"line {index} of a text, {index * index}\n" for index in range(3000)))
    open_corpus(Source([str(text)]), Bytes())
    return TrainingSettings(
        out=str(folder / "whole"),
        sources=(str(text),),
        steps=20,
        save_every=3,
        dim=16,
        depth=2,
        heads=2,
        dim_mhesa=8,
        context=32,
        batch_size=4,
        precision="fp32",
        dropout=0.1,
        carry_state=True,
    )


@pytest.fixture(scope="module")
def whole(settings):
    """The run that nothing happens to, and how long its process takes."""
    # The first run waits until everything is imported, and compiles the kernels.
    assert exit_code(start(replace(settings, out=f"{settings.out}-first", steps=3))) == 0
    began = time.monotonic()
    assert exit_code(start(settings)) == 0
    return Path(settings.out) / "checkpoints" / "step-20", time.monotonic() - began


def assert_same_end(out, whole):
    """The last checkpoint of both runs holds the same, bit for bit."""
    checkpoint = Path(out) / "checkpoints" / whole.name
    for name in ("model", "optimizer", "states"):
        mine, expected = (load_file(path / f"{name}.safetensors") for path in (checkpoint, whole))
        assert mine.keys() == expected.keys()
        assert all(torch.equal(mine[key], expected[key]) for key in expected)
    mine, expected = (json.loads((path / "progress.json").read_text()) for path in (checkpoint, whole))
    assert mine | {"seconds": 0} == expected | {"seconds": 0}


def kill_one(settings, whole, tmp_path, moment):
    """Kill a run at a moment, a part of a run's time, and see it to its end.

    Returns:
        Whether it still ran, and whether it had a checkpoint.
    """
    path, seconds = whole
    run = replace(settings, out=str(tmp_path / f"run{moment}"))
    process = start(run)
    exit_code(process, moment * seconds)
    with ONE_THREAD:
        process.kill()
    killed = exit_code(process) == -signal.SIGKILL
    saved = newest(Path(run.out) / "checkpoints")[0] is not None
    finish(run)
    assert_same_end(run.out, path)
    shutil.rmtree(run.out)
    return killed, killed and saved


def kill_at_random(settings, whole, tmp_path, count, record):
    moments = random.Random(0)
    killed = resumed = 0
    # Each run keeps one core busy.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        while killed < count:
            # At first kernels are loaded, and nothing is written.
            chosen = [moments.uniform(0.3, 1) for _ in range(count - killed)]
            for ran, saved in pool.map(lambda moment: kill_one(settings, whole, tmp_path, moment), chosen):
                killed, resumed = killed + ran, resumed + saved
    assert resumed
    record(f"killed with SIGKILL at a random moment | {count} | {count} | {count}")


def test_a_run_killed_at_any_moment_goes_on(settings, whole, tmp_path):
    kill_at_random(settings, whole, tmp_path, RANDOM_KILLS_IN_ORDINARY_TESTS, lambda line: None)


@pytest.mark.torture
@pytest.mark.timeout(3000)
def test_many_runs_killed_at_any_moment_go_on(settings, whole, tmp_path, torture_report):
    kill_at_random(settings, whole, tmp_path, RANDOM_KILLS, torture_report)


# At every write, sync and rename


def trace(settings, tmp_path, inject):
    """A run under strace, which sees its checkpoints alone and may kill it; the calls that it saw."""
    folder = Path(settings.out) / "checkpoints"
    names = ("model", "optimizer", "states")
    files = [*(f"{name}.safetensors" for name in names), "progress.json", "manifest.json"]
    partials = [folder / f".step-{step}.partial" for step in (3, 6)]
    watched = [folder, *partials, *(partial / name for partial in partials for name in files)]
    ready, log = tmp_path / f"{folder.parent.name}.ready", tmp_path / f"{folder.parent.name}.log"
    process = start(settings, ready=str(ready))
    options = ["-f", "-p", str(process.pid), "-o", str(log), "-e", f"trace={CALLS}", *inject]
    for path in watched:
        options += ["-P", str(path)]
    strace = subprocess.Popen(["strace", *options], stderr=subprocess.PIPE, text=True)
    while "attached" not in strace.stderr.readline():
        assert strace.poll() is None
    ready.touch()
    code = exit_code(process, 200)
    strace.communicate(timeout=30)
    return code, [line for line in log.read_text().splitlines() if "resumed>" not in line]


@dataclass(frozen=True)
class Fault:
    """What strace does to a run at one of its calls, and how the run then ends."""

    inject: str
    exitcode: int
    calls: tuple[str, ...]
    told: str


KILL = Fault("signal=SIGKILL", -signal.SIGKILL, tuple(CALLS.split(",")), "killed")
FULL = Fault("error=ENOSPC", 1, ("openat", "write", "fsync", "mkdir"), "told that the disk is full")


def fail_at_calls(fault, settings, whole, tmp_path, choose, record):
    counted = replace(settings, out=str(tmp_path / "counted"))
    exitcode, calls = trace(counted, tmp_path, [])
    assert exitcode == 0
    kinds = [found[1] for call in calls if (found := re.match(r"\d+ +(\w+)\(", call))]
    assert {"openat", "write", "fsync", "rename", "mkdir"} <= set(kinds)
    kinds = [kind for kind in kinds if kind in fault.calls]
    by_kind = [(kind, nth + 1) for kind in sorted(set(kinds)) for nth in range(kinds.count(kind))]
    chosen = choose(by_kind)

    def fail(call):
        kind, nth = call
        run = replace(settings, out=str(tmp_path / f"{kind}{nth}"))
        exitcode, _ = trace(run, tmp_path, ["-e", f"inject={kind}:{fault.inject}:when={nth}"])
        finish(run)
        assert_same_end(run.out, whole[0])
        shutil.rmtree(run.out)
        return exitcode

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        assert list(pool.map(fail, chosen)) == [fault.exitcode] * len(chosen)
    counts = f" | {len(chosen)}" * 3
    record(f"{fault.told} at each {', '.join(sorted(set(kinds)))} of two checkpoints{counts}")


needs_strace = pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
FAULT = pytest.mark.parametrize("fault", [KILL, FULL], ids=["killed", "full"])


@needs_strace
@FAULT
def test_a_run_that_cannot_write_a_checkpoint_goes_on(fault, settings, whole, tmp_path):
    def some(calls):
        return random.Random(1).sample(calls, CALLS_IN_ORDINARY_TESTS)

    fail_at_calls(fault, settings, whole, tmp_path, some, lambda line: None)


@needs_strace
@FAULT
@pytest.mark.torture
@pytest.mark.timeout(3000)
def test_runs_that_fail_at_every_call_go_on(fault, settings, whole, tmp_path, torture_report):
    fail_at_calls(fault, settings, whole, tmp_path, lambda calls: calls, torture_report)


# No space left


def test_a_full_disk_leaves_the_checkpoints_that_there_are(settings, whole, tmp_path):
    from mhesa.training.config import dump_config

    out, copy, config = (tmp_path / name for name in ("full", "copy", "run.yaml"))
    config.write_text(dump_config(replace(settings, out=str(out))))
    done = run_on_a_small_disk(out, copy, 480, "train", "--config", config, "--overwrite")
    assert done.returncode == 1
    [line] = [line for line in done.stderr.splitlines() if "Error" in line]
    assert "cannot write a checkpoint to" in line
    assert "No space left on device" in line
    assert "Traceback" not in done.stderr
    there = copy / "checkpoints"
    assert steps(there) == [6, 3]
    assert [find_damage(there / f"step-{step}") for step in (6, 3)] == [None, None]
    run = replace(settings, out=str(copy))
    finish(run)
    assert_same_end(copy, whole[0])
