"""The command line in processes of its own, forked from one that has imported it.

A fork takes milliseconds where a new interpreter takes seconds to import torch. Tests of signals, of
streams that close and of importing itself start new interpreters.
"""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

FORKED = multiprocessing.get_context("forkserver")
# No import may start a thread or call a kernel: threads do not survive a fork.
FORKED.set_forkserver_preload(
    ["mhesa.cli.train", "mhesa.training", "mhesa.inference.decoder", "mhesa.ops.cpu.scan"]
)
SECONDS = 200


def set_variable(name, value):
    """Set an environment variable, as a process's first act."""
    os.environ[name] = value


def run_command(*arguments, data=b"", text=False):
    """Run `mhesa` with these arguments and standard input: its exit code, and its output as bytes or text."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "0").write_bytes(data)
        settings = list(map(str, arguments)), dict(os.environ), os.getcwd()
        process = FORKED.Process(target=_main, args=(folder, *settings))
        process.start()
        process.join(SECONDS)
        if process.is_alive():
            process.kill()
            process.join()
        outputs = [(folder / stream).read_bytes() for stream in "12"]
    if text:
        outputs = [output.decode() for output in outputs]
    return subprocess.CompletedProcess(arguments, process.exitcode, *outputs)


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
