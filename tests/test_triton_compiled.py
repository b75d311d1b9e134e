"""What Triton's compiler makes of the kernels: without a device, in a process that is not interpreted."""

import multiprocessing
import os
import re
import subprocess
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import triton
from triton_scans import BOTH, make_inputs

from mhesa.ops.backends import Inputs
from mhesa.ops.triton import kernels, launching, rates, rates_kernels
from mhesa.ops.triton import scan as backend


class Recorder:
    """Stands for a kernel, and keeps what it is launched with."""

    def __init__(self, kernel):
        self.kernel, self.launches = kernel, []

    def __getitem__(self, grid):
        return lambda *args, **constants: self.launches.append((args, constants))

    def binaries(self):
        """Each launch compiled for compute capability 9.0, specialised as Triton does."""
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        names = self.kernel.arg_names
        for args, constants in self.launches:
            signature, attributes, known = dict.fromkeys(names, "constexpr"), {}, {}
            options = {k: constants[k] for k in ("num_warps", "enable_fp_fusion")}
            known = {(names.index(k),): v for k, v in constants.items() if k in names}
            for i, arg in enumerate(args):
                if isinstance(arg, torch.Tensor):
                    kind = str(arg.dtype).replace("torch.", "")
                    short = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "float64": "fp64"}
                    signature[names[i]] = "*" + short.get(kind, kind.replace("int", "i"))
                elif arg is None or arg == 1:
                    known[i,] = arg
                    continue
                else:
                    signature[names[i]] = "i32"
                if isinstance(arg, torch.Tensor) or arg % 16 == 0:
                    attributes[i,] = [["tt.divisibility", 16]]
            source = ASTSource(self.kernel, signature, known, attributes)
            yield triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["cubin"]


def compile_scan(processors, shape, dtype, disassembled=False, **options):
    """The names of kernels, their resources and, if asked for, instructions, for a scan and its gradient."""
    inputs = make_inputs(shape, dtype, device="cpu", **options)
    stepwise = inputs["alpha"].ndim == 3
    module, of = (rates, rates_kernels) if stepwise else (backend, kernels)
    operands = {key: value for key, value in inputs.items() if key not in ("dy", "dfinal")}
    recorders = [Recorder(getattr(of, name)) for name in ("forward", "backward", "chain")]
    states = (None,) if stepwise else ()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launching, "processors", lambda device: processors)
        for recorder in recorders:
            patch.setattr(of, recorder.kernel.__name__, recorder)
        arguments = Inputs(*operands.values(), False)
        module.forward(arguments)
        module.backward(inputs["dy"], inputs["dfinal"], arguments, *states)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    found = []
    for recorder in recorders:
        for binary in recorder.binaries():
            with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
                Path(file.name).write_bytes(binary)
                command = [tool, "-res-usage", *["-sass"] * disassembled, file.name]
                text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            usage = "".join(line for line in text.splitlines() if "STACK:" in line)
            found.append((recorder.kernel.__name__, usage, re.findall(r"\b(?:LDG|STG|LDL|STL)[.\w]*", text)))
    return found


@pytest.fixture(scope="module")
def compiler():
    """A process in which Triton compiles, whatever it does in this one."""
    # A fork would have Triton as torch imported it, interpreted. A new process starts with its first task.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", "0")
            pool.submit(os.getpid).result()
        yield pool


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("regime", ["whole", "tiles"])
def test_hot_kernels_use_whole_vectors(dtype, regime, compiler):
    # Several tiles a program, were there three multiprocessors.
    processors = 1 if regime == "whole" else 3
    found = compiler.submit(compile_scan, processors, (1, 2**15, 1, 64), dtype, True, initial=False).result()
    assert len(found) == (2 if regime == "whole" else 6)
    for name, usage, instructions in found:
        assert "STACK:0 " in usage, (name, usage)
        assert not [i for i in instructions if i.startswith(("LDL", "STL"))], name
        if name == "chain":
            continue
        # The tile before the loop and the one in it.
        rows_log = (backend.FORWARD_ROWS_LOG if name == "forward" else backend.BACKWARD_ROWS_LOG)[
            dtype.itemsize
        ]
        wide = [i for i in instructions if i.startswith("LDG") and ".128" in i]
        assert len(wide) >= 2 << rows_log, name
        # Parameters and sums alone move in single words.
        narrow = [i for i in instructions if i.startswith(("LDG", "STG")) and ".128" not in i]
        assert set(narrow) <= {"LDG.E", "LDG.E.CONSTANT", "STG.E"}, (name, narrow)
        assert narrow.count("STG.E") <= 3, name


@pytest.mark.parametrize(
    ("shape", "dtype", "offsets"),
    [
        pytest.param((1, 4096, 8, 64), torch.bfloat16, [0, 9, 4096], id="packed"),
        pytest.param((1, 4096, 100, 8), torch.float32, [0, 9, 4096], id="packed-heads-across-blocks"),
        pytest.param((1, 1, 1, 1), torch.float32, None, id="ones"),
    ],
)
def test_other_kernels_do_not_spill(shape, dtype, offsets, compiler):
    for name, usage, _ in compiler.submit(compile_scan, 10**6, shape, dtype, offsets=offsets).result():
        assert "STACK:0 " in usage, (name, usage)


@pytest.mark.parametrize("regime", ["whole", "tiles"])
@pytest.mark.parametrize(
    ("shape", "dtype", "offsets"),
    [
        pytest.param((1, 4096, 32, 16), torch.float32, None, id="fp32"),
        pytest.param((1, 4096, 32, 8), torch.bfloat16, None, id="bf16"),
        pytest.param((1, 4096, 5, 40), torch.float32, [0, 9, 4096], id="packed-wide-heads"),
        pytest.param((1, 4096, 32, 16), torch.bfloat16, [0, 9, 4096], id="packed-bf16"),
    ],
)
def test_kernels_of_rates_do_not_spill(shape, dtype, offsets, regime, compiler):
    processors = 1 if regime == "whole" else 10**6
    found = compiler.submit(compile_scan, processors, shape, dtype, offsets=offsets, stepwise=BOTH).result()
    for name, usage, _ in found:
        # What is spilt lies on the stack, in local memory.
        assert "STACK:0 " in usage, (name, usage)
        assert "LOCAL:0 " in usage, (name, usage)
