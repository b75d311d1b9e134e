"""The command line in processes of its own, forked from one that has imported it.

A fork takes milliseconds where a new interpreter takes seconds to import torch. Tests of signals, of
streams that close and of importing itself start new interpreters.
"""

import multiprocessing
import os
import runpy
import shlex
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

FORKED = multiprocessing.get_context("forkserver")
# No import may start a thread or call a kernel: threads do not survive a fork.
FORKED.set_forkserver_preload(
    [
        "mhesa.cli.train",
        "mhesa.training.run",
        "mhesa.inference.decoder.native",
        "mhesa.inference.sampling",
        "mhesa.inference.scoring",
        "mhesa.ops.cpu.backend",
        "mhesa.ops.cpu.convolution_kernels",
        "mhesa.ops.cpu.gelu_kernels",
        "mhesa.serve.http.server",
        # What torch's optimizers and numba import when they are first used.
        "torch._dynamo",
        "scipy.linalg",
    ]
)
SECONDS = 500


def run_command(*arguments, data=b"", text=False):
    """Run `mhesa` with these arguments and standard input: its exit code, and its output as bytes or text."""
    [done] = _run([dict(os.environ)], arguments, data)
    if text:
        done.stdout, done.stderr = done.stdout.decode(), done.stderr.decode()
    return done


def run_processes(count, *arguments, meanwhile=lambda processes: None):
    """Run `mhesa` in processes that find each other as those of `torchrun` do: the first one's outcome.

    `meanwhile` is called with the processes while they run.
    """
    done = _run(group_variables(count), arguments, b"", meanwhile)[0]
    done.stdout, done.stderr = done.stdout.decode(), done.stderr.decode()
    return done


def call_in_processes(count, function, *arguments):
    """Call a function in processes that find each other likewise; none may fail."""
    processes = [
        FORKED.Process(target=_call, args=(variables, function, arguments))
        for variables in group_variables(count)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(SECONDS)
        process.kill()
        process.join()
    assert [process.exitcode for process in processes] == [0] * count


def _call(variables, function, arguments):
    os.environ.update(variables)
    function(*arguments)


def group_variables(count):
    """The environment of each of `count` processes, as `torchrun` sets it."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    group = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    ranks = [{"RANK": rank, "LOCAL_RANK": rank} | group for rank in range(count)]
    return [os.environ | {name: str(value) for name, value in rank.items()} for rank in ranks]


ON_A_SMALL_DISK = """
mount -t tmpfs -o size={kilobytes}k none {folder} || exit 99
OMP_NUM_THREADS=1 timeout 100 {command}
code=$?
cp -r {folder}/. {copy}
exit $code
"""


def run_on_a_small_disk(folder, copy, kilobytes, *arguments):
    """Run `mhesa` while a folder is a disk of this size: the outcome. What is then on it is copied."""
    folder.mkdir()
    copy.mkdir()
    command = shlex.join([sys.executable, "-m", "mhesa", *map(str, arguments)])
    script = ON_A_SMALL_DISK.format(kilobytes=kilobytes, folder=folder, copy=copy, command=command)
    unshare = ["unshare", "--mount", "--map-root-user", "sh", "-c", script]
    done = subprocess.run(unshare, capture_output=True, encoding="utf-8", timeout=120)
    if done.returncode == 99:
        pytest.skip(f"a file system cannot be mounted here: {done.stderr}")
    return done


def _run(environments, arguments, data, meanwhile=lambda processes: None):
    arguments = list(map(str, arguments))
    with tempfile.TemporaryDirectory() as name:
        processes = []
        for index, environment in enumerate(environments):
            folder = Path(name) / str(index)
            folder.mkdir()
            (folder / "0").write_bytes(data)
            process = FORKED.Process(target=_main, args=(folder, arguments, environment, os.getcwd()))
            process.start()
            processes.append((process, folder))
        meanwhile([process for process, _ in processes])
        done = []
        for process, folder in processes:
            process.join(SECONDS)
            process.kill()
            process.join()
            outputs = [(folder / stream).read_bytes() for stream in "12"]
            done.append(subprocess.CompletedProcess(arguments, process.exitcode, *outputs))
    return done


def _main(folder, arguments, environment, directory):
    for descriptor, mode in enumerate(("rb", "wb", "wb")):
        with open(folder / str(descriptor), mode) as file:
            os.dup2(file.fileno(), descriptor)
    sys.stdin = open(0)  # noqa: SIM115
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(directory)
    sys.argv[1:] = arguments
    runpy.run_module("mhesa", run_name="__main__", alter_sys=True)
