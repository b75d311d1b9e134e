"""Scans by the Triton backend and by definition: inputs, results and how they are compared.

Without a GPU Triton's interpreter runs the kernels. `conftest.py` chooses it, before triton is imported.
"""

import os

import pytest
import torch

from mhesa.ops import BACKENDS, exponential_smoothing
from mhesa.ops.backends import Backend

pytest.importorskip("triton")

from triton.runtime import interpreter

from mhesa.ops.triton import launching

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"

# For a whole file: its tests run on a device, or in the interpreter.
on_device = [pytest.mark.gpu, pytest.mark.usefixtures("triton_device")]
on_gpu_only = pytest.mark.skipif(
    INTERPRETED, reason="no CUDA device: too much for the interpreter, or about CUDA itself"
)

# Root-mean-square error over root-mean-square value.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 5e-3}
PACKING = [0, 0, 3, 3, 70, 140, 141, 170, 170]
# The rates of a scan, both of which may differ by step.
BOTH = ("alpha", "decay")


def use_device(monkeypatch):
    """Skip what needs a device where there is none; the interpreter takes tensors on the processor."""
    if INTERPRETED:
        monkeypatch.setitem(BACKENDS, "triton", Backend("mhesa.ops.triton.backend"))
        replace_once(monkeypatch)
    elif not torch.cuda.is_available():
        pytest.skip("no CUDA device")


def replace_once(monkeypatch):
    """Have the interpreter replace the language's functions once a launch for each module.

    It does so again in every call of a function, where nothing is left to replace: a fifth of its time.
    """
    function, executor = interpreter.InterpretedFunction, interpreter.GridExecutor
    call, launch, replaced = function.__call__, executor.__call__, set()

    def call_once_replaced(self, *args, **kwargs):
        module = id(self.fn.__globals__)
        if module in replaced:
            return self.rewrite()(*args, **kwargs)
        replaced.add(module)
        return call(self, *args, **kwargs)

    def launch_anew(self, *args, **kwargs):
        replaced.clear()
        replaced.add(id(self.fn.__globals__))
        launch(self, *args, **kwargs)

    monkeypatch.setattr(function, "__call__", call_once_replaced)
    monkeypatch.setattr(executor, "__call__", launch_anew)


def set_regime(monkeypatch, regime):
    monkeypatch.setattr(launching, "processors", lambda device: 1 if regime == "whole" else 10**6)


def make_inputs(
    shape,
    dtype=torch.float32,
    skip=True,
    initial=True,
    offsets=None,
    decay=None,
    device=DEVICE,
    seed=0,
    stepwise=(),
):
    """Operands by name, the cotangents `dy` and `dfinal` among them; rates in `stepwise` vary by step."""
    torch.manual_seed(seed)
    batch, _, heads, head_dim = shape
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    sequences = batch if offsets is None else len(offsets) - 1
    inputs = {
        "x": torch.randn(shape).to(dtype),
        "alpha": torch.rand(shape[:3] if "alpha" in stepwise else heads, dtype=wide),
        "decay": 0.9 + 0.1 * torch.rand(shape[:3] if "decay" in stepwise else heads, dtype=wide),
        "skip": torch.randn(heads, head_dim, dtype=wide) if skip else None,
        "initial_state": torch.randn(sequences, heads, head_dim, dtype=wide) if initial else None,
        "cu_seqlens": None if offsets is None else torch.tensor(offsets),
        "dy": torch.randn(shape).to(dtype),
        "dfinal": torch.randn(sequences, heads, head_dim, dtype=wide),
    }
    if decay is not None:
        inputs["decay"].fill_(decay)
    return {name: None if value is None else value.to(device) for name, value in inputs.items()}


def run(inputs, name="triton", reverse=False):
    """Outputs and gradients by name."""
    operands = {key: value for key, value in inputs.items() if key not in ("dy", "dfinal")}
    leaves = {}
    for key, value in operands.items():
        if value is not None and key != "cu_seqlens":
            operands[key] = leaves[key] = value.detach().requires_grad_()
    y, final = exponential_smoothing(**operands, reverse=reverse, return_final_state=True, backend=name)
    grads = torch.autograd.grad((y, final), list(leaves.values()), (inputs["dy"], inputs["dfinal"]))
    return {"y": y.detach(), "final": final.detach()} | {
        "d" + key: grad for key, grad in zip(leaves, grads, strict=True)
    }


# Inputs and results by regime, direction and shapes.
RESULTS = {}


def run_once(inputs, regime, reverse=False):
    """As `run`, once for all tests whose inputs are made from the same shape, and so are equal."""
    given = {name: value for name, value in inputs.items() if value is not None}
    key = regime, reverse, *((name, *value.shape) for name, value in given.items())
    if key not in RESULTS:
        RESULTS[key] = given, run(inputs, reverse=reverse)
    known, found = RESULTS[key]
    assert_same(given, known)
    return found


def reference(inputs, reverse=False):
    """The same in fp64 by definition."""
    wide = {
        key: value.cpu().double() if value is not None and value.is_floating_point() else value
        for key, value in inputs.items()
    }
    if wide["cu_seqlens"] is not None:
        wide["cu_seqlens"] = wide["cu_seqlens"].cpu()
    return run(wide, "reference", reverse)


def assert_close(actual, expected, dtype):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        limit = TOLERANCE[dtype if name in ("y", "dx") else max(torch.float32, dtype, key=bits)]
        error = (actual[name].cpu().double() - value).norm()
        assert error <= limit * value.norm(), f"{name}: {error / value.norm():.1e} over {limit}"


def bits(dtype):
    return torch.finfo(dtype).bits


def assert_same(actual, expected):
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name
