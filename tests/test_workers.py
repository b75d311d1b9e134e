"""Threads of our own for short calls: every call does its work once, whoever takes part."""

import multiprocessing
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from mhesa.ops.cpu.arguments import INT64, struct
from mhesa.ops.cpu.atomics import fetch_add
from mhesa.ops.cpu.compiling import compiled, member
from mhesa.ops.cpu.worker_kernels import IDLE
from mhesa.ops.cpu.workers import Workers, parallel_short

Arguments = struct("Arguments", next_task="int64", tasks="int64", threads="int64", done=INT64)


def _count(args):
    fetch_add(member(args, "threads"), 1)
    while True:
        task = fetch_add(member(args, "next_task"), 1)
        if task >= args.tasks:
            break
        args.done[task] += 1


def count(tasks, threads):
    """How often each task was done in a call, and how many threads took part."""
    done = np.zeros(tasks, dtype=np.int64)
    args = Arguments(tasks=tasks, done=done.ctypes.data)
    parallel_short(compiled(_count, torch.float32, Arguments), args.address, threads)
    return done, args.threads


@pytest.mark.parametrize("tasks", [0, 1, 7, 5000])
def test_every_task_is_done_once(tasks):
    # Fewer threads than before leave workers without a seat.
    for threads in (1, 5, 2):
        for _ in range(200):
            done, took_part = count(tasks, threads)
            assert (done == 1).all()
            assert 1 <= took_part <= threads


def test_workers_that_sleep_come_back():
    deadline = time.monotonic() + 60
    for _ in range(3):
        time.sleep(20 * IDLE / 1e9)
        # One that is late has no part in a call that is short.
        while count(1_000_000, 2)[1] < 2:
            assert time.monotonic() < deadline


def test_calls_of_several_python_threads_do_not_wait_for_one_another():
    failed = []

    def call():
        for _ in range(300):
            if not (count(1000, 3)[0] == 1).all():
                failed.append(threading.get_ident())

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


def test_a_call_does_not_wait_for_a_worker_that_does_not_come():
    crew = Workers()
    # Stands in for a worker that another program keeps from its core.
    crew._threads = 1
    done = np.zeros(100, dtype=np.int64)
    args = Arguments(tasks=100, done=done.ctypes.data)
    assert crew.run(compiled(_count, torch.float32, Arguments), args.address, 1)
    assert (done == 1).all()
    assert args.threads == 1


def _in_child(queue):
    queue.put(bool((count(1000, 2)[0] == 1).all()))


def test_in_a_forked_process():
    count(1000, 2)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=_in_child, args=(queue,))
    process.start()
    assert queue.get(timeout=60)
    process.join(60)
    assert process.exitcode == 0


def test_a_program_ends_while_workers_wait():
    program = "from test_workers import count; print(count(1000, 3)[0].sum())"
    command, folder = [sys.executable, "-c", program], Path(__file__).parent
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "1000\n", "")
