"""The command line in processes of its own, forked from one that has imported it.

A fork takes milliseconds where a new interpreter takes seconds to import torch. Tests of importing, and of
streams that are closed when the interpreter ends, start new interpreters.
"""

import multiprocessing
import os
import runpy
import shlex
import socket
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
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
        "mhesa.ops.cpu.dropout_kernels",
        "mhesa.ops.cpu.gelu_kernels",
        "mhesa.serve.http.server",
        # What torch's optimizers and numba import when they are first used.
        "torch._dynamo",
        "scipy.linalg",
        # What the modules import in which the processes find their functions.
        "httpx",
        "pytest",
        # Found from the repository's root, where tests are started.
        "tests.loaded_kernels",
    ]
)
SECONDS = 500


def run_command(*arguments, data=b"", stdin=None, stdout=None, text=False):
    """Run `mhesa` with these arguments: its exit code, and its output as bytes or text.

    Its standard input is `data`, or a file; a file that standard output goes to is appended to.
    """
    [done] = _run([dict(os.environ)], arguments, data, stdin=stdin, stdout=stdout)
    if text:
        done.stdout, done.stderr = done.stdout.decode(), done.stderr.decode()
    return done


def run_code(code, environment=None):
    """Run a program in a forked process, to its end: its standard output and standard error."""
    with tempfile.TemporaryDirectory() as folder:
        streams = [Path(folder) / stream for stream in "012"]
        streams[0].write_bytes(b"")
        given = streams, [], dict(os.environ) if environment is None else environment, os.getcwd()
        process = FORKED.Process(target=_main, args=given, kwargs={"code": code})
        process.start()
        process.join(SECONDS)
        process.kill()
        process.join()
        assert process.exitcode == 0, streams[2].read_text()
        return streams[1].read_text(), streams[2].read_text()


class StartedCommand:
    """`mhesa`, or a program, in a forked process and the ends of its pipes.

    It has some methods of `subprocess.Popen`.
    """

    def __init__(self, *arguments, code=None):
        with tempfile.TemporaryDirectory() as name:
            streams = [Path(name) / stream for stream in "012"]
            for stream in streams:
                os.mkfifo(stream)
            given = streams, list(map(str, arguments)), dict(os.environ), os.getcwd()
            self.process = FORKED.Process(target=_main, args=given, kwargs={"code": code}, daemon=True)
            self.process.start()
            # Each waits for the process to open its end, in the same order.
            self.stdin, self.stdout, self.stderr = map(open, streams, ("wb", "rb", "rb"))

    @property
    def returncode(self):
        return self.process.exitcode

    def send_signal(self, number):
        # It may have ended by itself.
        with suppress(ProcessLookupError):
            if self.returncode is None:
                os.kill(self.process.pid, number)

    def wait(self, timeout=SECONDS):
        self.process.join(timeout)
        assert self.returncode is not None, "the command has not ended"
        return self.returncode

    def communicate(self, timeout=SECONDS):
        """All that is still to be read of both outputs, when the process has ended."""
        with suppress(BrokenPipeError):
            self.stdin.close()
        with ThreadPoolExecutor(2) as pool:
            outputs = list(pool.map(lambda stream: stream.read(), (self.stdout, self.stderr)))
        self.wait(timeout)
        return outputs


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


def _run(environments, arguments, data, meanwhile=lambda processes: None, stdin=None, stdout=None):
    arguments = list(map(str, arguments))
    with tempfile.TemporaryDirectory() as name:
        processes = []
        for index, environment in enumerate(environments):
            folder = Path(name) / str(index)
            folder.mkdir()
            (folder / "0").write_bytes(data)
            streams = [stdin or folder / "0", stdout or folder / "1", folder / "2"]
            process = FORKED.Process(target=_main, args=(streams, arguments, environment, os.getcwd()))
            process.start()
            processes.append((process, streams))
        meanwhile([process for process, _ in processes])
        done = []
        for process, streams in processes:
            process.join(SECONDS)
            process.kill()
            process.join()
            outputs = [stream.read_bytes() for stream in streams[1:]]
            done.append(subprocess.CompletedProcess(arguments, process.exitcode, *outputs))
    return done


def _main(streams, arguments, environment, directory, code=None):
    output = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    for descriptor, flags in enumerate((os.O_RDONLY, output, output)):
        opened = os.open(streams[descriptor], flags)
        os.dup2(opened, descriptor)
        os.close(opened)
    # The objects that were there were made for other kinds of files.
    sys.stdin, sys.stdout = open(0), open(1, "w")  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace")  # noqa: SIM115
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(directory)
    sys.argv[1:] = arguments
    if code is None:
        runpy.run_module("mhesa", run_name="__main__", alter_sys=True)
    else:
        exec(code, {"__name__": "__main__"})


@contextmanager
def ordinary_user():
    """Not the superuser, who may read anything."""
    superuser = os.geteuid() == 0
    if superuser:
        os.seteuid(65534)
    try:
        yield
    finally:
        if superuser:
            os.seteuid(0)
