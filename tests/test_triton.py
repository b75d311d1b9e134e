"""The Triton backend against the reference: on a GPU, or anywhere under Triton's interpreter.

The interpreter must be chosen before triton is imported; `conftest.py` does where there is no GPU. What the
compiler makes of the kernels is tested without a device, in a process that is not interpreted.
"""

import itertools
import mmap
import multiprocessing
import os
import re
import subprocess
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch
from combinations import covering

from mhesa.ops import BACKENDS, exponential_smoothing
from mhesa.ops.backends import Backend
from mhesa.ops.registration import Inputs

triton = pytest.importorskip("triton")

from triton.runtime import interpreter  # noqa: E402

from mhesa.ops.triton import kernels, launching, rates, rates_kernels  # noqa: E402
from mhesa.ops.triton import scan as backend  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"

on_device = pytest.mark.gpu
on_gpu_only = pytest.mark.skipif(
    INTERPRETED, reason="no CUDA device: too much for the interpreter, or about CUDA itself"
)

# Root-mean-square error over root-mean-square value.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 5e-3}
PACKING = [0, 0, 3, 3, 70, 140, 141, 170, 170]


@pytest.fixture(autouse=True)
def _device(request, monkeypatch):
    """Skip what needs a device where there is none; poison memory that a kernel should fill."""
    if "gpu" not in request.keywords:
        yield
        return
    if INTERPRETED:
        monkeypatch.setitem(BACKENDS, "triton", Backend("mhesa.ops.triton.backend"))
    elif not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(deterministic)


@pytest.fixture(autouse=True)
def _replaced_once(monkeypatch):
    """Have the interpreter replace the language's functions once a launch for each module.

    It does so again in every call of a function, where nothing is left to replace: a fifth of its time.
    """
    replace, launch = interpreter._patch_lang, {}

    def replace_once(function):
        module = id(function.__globals__)
        if module not in launch:
            scope = launch[module] = replace(function)
            restore = scope.restore
            scope.restore = lambda: (launch.clear(), restore())
        return launch[module]

    monkeypatch.setattr(interpreter, "_patch_lang", replace_once)


@pytest.fixture(params=["whole", "tiles"])
def regime(request, monkeypatch):
    """A program a sequence, or a program a few tiles."""
    set_regime(monkeypatch, request.param)
    return request.param


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


# Shapes and options of `make_inputs`.
CASES = {
    "one step": ((2, 1, 3, 5), {}),
    "plain": ((2, 65, 1, 32), {"skip": False, "initial": False}),
    "heads of a block": ((1, 129, 2, 32), {}),
    "heads across blocks": ((1, 150, 3, 13), {}),
    "packed": ((1, 170, 2, 20), {"offsets": PACKING}),
    "packed and plain": ((1, 170, 1, 32), {"offsets": PACKING, "initial": False, "skip": False}),
}


@on_device
@pytest.mark.parametrize(
    ("case", "reverse", "regime"),
    covering(itertools.product(CASES, [False, True], ["whole", "tiles"])),
    indirect=["regime"],
)
def test_agrees_with_the_reference(case, reverse, regime):
    shape, options = CASES[case]
    inputs = make_inputs(shape, **options)
    assert_close(run(inputs, reverse=reverse), reference(inputs, reverse), torch.float32)


@on_device
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_types(dtype, regime):
    inputs = make_inputs((1, 270, 2, 8), dtype)
    actual = run(inputs)
    assert actual["y"].dtype == actual["dx"].dtype == dtype
    assert_close(actual, reference(inputs), dtype)


@on_device
@pytest.mark.parametrize("decay", [0.0, 1e-20, 1 - 1e-7, 1.0])
def test_extreme_decays(decay, regime):
    inputs = make_inputs((1, 200, 1, 4), decay=decay)
    actual = run(inputs)
    assert_close(actual, reference(inputs), torch.float32)
    if decay == 0:
        exact = inputs["alpha"][:, None] * inputs["x"][:, -1]
        assert torch.equal(actual["final"], exact)


@on_device
def test_many_tiles(monkeypatch):
    """More tiles than the chain of tiles fetches at once."""
    set_regime(monkeypatch, "tiles")
    monkeypatch.setattr(backend, "SPANS_LOG", 3)
    for rows_logs in (backend.FORWARD_ROWS_LOG, backend.BACKWARD_ROWS_LOG):
        monkeypatch.setitem(rows_logs, 4, 0)
    for offsets in (None, [0, 7, 8, 64, 150]):
        inputs = make_inputs((1, 150, 1, 4), offsets=offsets)
        assert_close(run(inputs), reference(inputs), torch.float32)


@on_device
@pytest.mark.parametrize("offsets", [None, PACKING], ids=["dense", "packed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_regimes_agree_bit_for_bit(offsets, dtype, monkeypatch):
    """The batch decides between them, and must not be seen in the results."""
    inputs = make_inputs((1, 170 if offsets else 300, 1, 32), dtype, offsets=offsets)
    results = []
    for regime in ("whole", "tiles"):
        set_regime(monkeypatch, regime)
        actual = run(inputs)
        results.append({key: actual[key] for key in ("y", "final", "dx", "dinitial_state")})
    assert_same(*results)


@on_device
@pytest.mark.parametrize("shape", [(0, 3, 2, 4), (2, 0, 2, 4), (2, 3, 2, 0), (2, 3, 0, 4)], ids=str)
def test_empty_dimensions(shape):
    inputs = make_inputs(shape)
    actual = run(inputs)
    assert actual.pop("y").shape == shape
    assert torch.equal(actual.pop("final"), inputs["initial_state"])
    assert torch.equal(actual.pop("dinitial_state"), inputs["dfinal"])
    for name, value in actual.items():
        assert value.shape == inputs[name.removeprefix("d")].shape
        assert not value.any()


@on_device
def test_unknown_type():
    inputs = make_inputs((1, 3, 2, 4))
    x = inputs["x"].to(torch.float8_e5m2)
    with pytest.raises(ValueError, match="float16, bfloat16, float32, float64, not float8_e5m2"):
        exponential_smoothing(x, inputs["alpha"], inputs["decay"], backend="triton")


@on_device
def test_packed_without_a_sequence():
    inputs = make_inputs((1, 0, 2, 4), offsets=[0])
    assert run(inputs)["final"].shape == (0, 2, 4)


@on_device
@pytest.mark.parametrize("operand", ["x", "dy"])
@pytest.mark.parametrize("layout", ["time-first", "slice", "channels-apart", "expanded"])
def test_layouts_equal_contiguous(operand, layout):
    inputs = make_inputs((2, 40, 2, 16))
    value = inputs[operand]
    if layout == "expanded":
        value = value[:, :1].expand_as(value)
    dense = inputs | {operand: value.contiguous()}
    if layout == "time-first":
        value = value.transpose(0, 1).contiguous().transpose(0, 1)
    elif layout == "slice":
        value = torch.cat([value, value.new_full((2, 40, 1, 16), torch.nan)], dim=2)[:, :, :2]
    elif layout == "channels-apart":
        value = value.transpose(2, 3).contiguous().transpose(2, 3)
    assert layout == "expanded" or not value.is_contiguous()
    assert_same(run(inputs | {operand: value}), run(dense))


@on_device
def test_offsets_beyond_two_to_the_31(regime):
    """By strides over memory that is, on the processor, never touched."""
    shape, stride = (2, 150, 1, 32), (2**31 + 64, 2**24, 32, 1)
    count = sum((size - 1) * step for size, step in zip(shape, stride, strict=True)) + 1
    if INTERPRETED:
        # Fresh pages: `np.zeros` may take memory that was used before and clear, so touch, all of it.
        memory = torch.frombuffer(mmap.mmap(-1, 2 * count), dtype=torch.float16)
    else:
        memory = torch.zeros(count, dtype=torch.float16, device=DEVICE)
    inputs = make_inputs(shape, torch.float16)
    far = memory.as_strided(shape, stride)
    far.copy_(inputs["x"])
    assert_same(run(inputs | {"x": far}), run(inputs))


@on_device
@pytest.mark.parametrize("operand", ["x", "dy"])
@pytest.mark.parametrize("reverse", [False, True], ids=["ahead", "reverse"])
def test_nan_stays_where_it_belongs(operand, reverse, regime):
    """Not to another sequence, another channel, or back in time, not even within a tile."""
    step = 150
    clean = make_inputs((2, 160, 2, 4))
    dirty = clean | {operand: clean[operand].clone()}
    dirty[operand][1, step, 1, 2] = torch.nan
    expected, actual = run_once(clean, regime, reverse), run(dirty, reverse=reverse)
    # The gradient runs against the scan.
    forwards = (operand == "x") != reverse
    tainted = torch.zeros(2, 160, 2, 4, dtype=torch.bool)
    tainted[1, slice(step, None) if forwards else slice(step + 1), 1, 2] = True
    rows, state = ("y", "final") if operand == "x" else ("dx", "dinitial_state")
    for name, mask in ((rows, tainted), (state, tainted.any(1))):
        assert actual[name].isnan().cpu().equal(mask), name
        keep = ~mask.to(DEVICE)
        assert torch.equal(actual[name][keep], expected[name][keep]), name
    for name in ("dalpha", "ddecay"):
        assert actual[name].isnan().tolist() == [False, True], name
        assert actual[name][0] == expected[name][0], name


@on_device
@pytest.mark.parametrize("neighbour", [torch.nan, torch.inf, 1e30])
def test_packed_neighbours_are_not_felt(neighbour, regime):
    start, stop = 70, 140
    clean = make_inputs((1, 170, 1, 32), offsets=PACKING)
    dirty = {key: None if value is None else value.clone() for key, value in clean.items()}
    for name in ("x", "dy"):
        dirty[name][:, :start] = dirty[name][:, stop:] = neighbour
    sequence = PACKING.index(start)
    for name in ("initial_state", "dfinal"):
        dirty[name][:sequence] = dirty[name][sequence + 1 :] = neighbour
    expected, actual = run_once(clean, regime), run(dirty)
    for name in ("y", "dx"):
        assert torch.equal(actual[name][:, start:stop], expected[name][:, start:stop]), name
    for name in ("final", "dinitial_state"):
        assert torch.equal(actual[name][sequence], expected[name][sequence]), name


@on_device
def test_batch_is_not_felt(monkeypatch):
    monkeypatch.setattr(launching, "processors", lambda device: 4)
    inputs = make_inputs((5, 140, 1, 4))
    together = run(inputs)
    row = 3
    alone = {
        key: value[row : row + 1] if key in ("x", "dy", "initial_state", "dfinal") else value
        for key, value in inputs.items()
    }
    alone = run(alone)
    for name in ("y", "final", "dx", "dinitial_state"):
        assert torch.equal(alone[name][0], together[name][row]), name


@on_device
@on_gpu_only
@pytest.mark.parametrize("decay", [0.0, 0.999, 1 - 1e-7, 1.0])
@pytest.mark.parametrize("batch", [1, 300])
def test_a_million_steps(batch, decay):
    """Both regimes, by their size."""
    length = 2**20 if batch == 1 else 2**15
    inputs = make_inputs((batch, length, 1, 32), decay=decay)
    expected = run({k: None if v is None else v.double() for k, v in inputs.items()}, "chunked")
    actual = run(inputs)
    assert all(value.isfinite().all() for value in actual.values())
    expected = {key: value.cpu() for key, value in expected.items()}
    # A sum of terms of either sign, each up to a million times `x`; fp32 keeps three digits of it.
    slope, slope_expected = actual.pop("ddecay"), expected.pop("ddecay")
    assert_close(actual, expected, torch.float32)
    torch.testing.assert_close(slope.cpu().double(), slope_expected, rtol=1e-3, atol=0)


@on_device
@on_gpu_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_run_gives_the_same_bits(dtype, regime):
    inputs = make_inputs((4, 3000, 8, 64), dtype)
    first = run(inputs)
    for _ in range(5):
        assert_same(run(inputs), first)


@on_device
@on_gpu_only
def test_more_elements_than_32_bits_count():
    inputs = make_inputs((2, 3, 1, 32), torch.bfloat16)
    length = 2**26 + 100
    x = torch.zeros(1, length, 1, 32, dtype=torch.bfloat16, device=DEVICE)
    x[:, -3:] = inputs["x"][:1]
    y = exponential_smoothing(x, inputs["alpha"], inputs["decay"], backend="triton")
    small = exponential_smoothing(inputs["x"][:1], inputs["alpha"], inputs["decay"], backend="reference")
    assert not y[:, :-3].any()
    torch.testing.assert_close(y[:, -3:], small)


@on_device
@on_gpu_only
@pytest.mark.parametrize("offsets", [None, [0, 700, 700, 3000]], ids=["dense", "packed"])
def test_cuda_graph(offsets, regime):
    inputs = make_inputs((1, 3000, 8, 64), offsets=offsets)
    expected = run(inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(inputs)
    for value in captured.values():
        value.zero_()
    graph.replay()
    assert_same(captured, expected)


@on_device
@on_gpu_only
def test_nothing_waits_for_the_device():
    inputs = make_inputs((1, 3000, 8, 64), offsets=[0, 700, 700, 3000])
    run(inputs)
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(inputs)
    finally:
        torch.cuda.set_sync_debug_mode(mode)


BOTH = ("alpha", "decay")


@on_device
@pytest.mark.parametrize(
    ("shape", "reverse", "options"),
    [
        pytest.param((2, 1, 3, 5), False, {"stepwise": BOTH}, id="one-step"),
        pytest.param((2, 65, 1, 32), True, {"skip": False, "initial": False, "stepwise": BOTH}, id="plain"),
        pytest.param((1, 150, 5, 16), False, {"stepwise": BOTH}, id="narrow-heads"),
        pytest.param((1, 150, 3, 13), True, {"stepwise": BOTH}, id="heads-not-of-a-power-of-two"),
        pytest.param((1, 140, 2, 40), False, {"stepwise": BOTH}, id="heads-across-blocks"),
        pytest.param((1, 140, 2, 8), True, {"stepwise": ("alpha",)}, id="fixed-decay"),
        pytest.param((2, 70, 2, 8), False, {"stepwise": ("decay",)}, id="fixed-alpha"),
        pytest.param((1, 170, 2, 8), False, {"offsets": PACKING, "stepwise": BOTH}, id="packed"),
        pytest.param((1, 170, 2, 20), True, {"offsets": PACKING, "stepwise": BOTH}, id="packed-reverse"),
        pytest.param(
            (1, 170, 1, 32),
            False,
            {"offsets": PACKING, "initial": False, "skip": False, "stepwise": BOTH},
            id="packed-plain",
        ),
    ],
)
def test_rates_of_every_step(shape, reverse, options, regime):
    inputs = make_inputs(shape, **options)
    assert_close(run(inputs, reverse=reverse), reference(inputs, reverse), torch.float32)


@on_device
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_rates_of_every_step_in_other_types(dtype, regime):
    inputs = make_inputs((1, 270, 2, 8), dtype, stepwise=BOTH)
    actual = run(inputs)
    assert actual["y"].dtype == actual["dx"].dtype == dtype
    assert_close(actual, reference(inputs), dtype)


@on_device
@pytest.mark.parametrize("offsets", [None, PACKING], ids=["dense", "packed"])
def test_regimes_agree_bit_for_bit_with_rates_of_every_step(offsets, monkeypatch):
    inputs = make_inputs((1, 170 if offsets else 300, 2, 16), offsets=offsets, stepwise=BOTH)
    results = []
    for regime in ("whole", "tiles"):
        set_regime(monkeypatch, regime)
        actual = run(inputs)
        actual.pop("dskip")
        results.append(actual)
    assert_same(*results)


@on_device
def test_many_tiles_with_rates_of_every_step(monkeypatch):
    """More tiles than the chain of tiles fetches at once."""
    set_regime(monkeypatch, "tiles")
    monkeypatch.setattr(rates, "SPANS_LOG", 3)
    monkeypatch.setitem(rates.ROWS_LOG, 4, 0)
    for offsets in (None, [0, 7, 8, 64, 150]):
        inputs = make_inputs((1, 150, 1, 4), offsets=offsets, stepwise=BOTH)
        assert_close(run(inputs), reference(inputs), torch.float32)


@on_device
@pytest.mark.parametrize("neighbour", [torch.nan, torch.inf])
def test_packed_neighbours_with_rates_of_every_step_are_not_felt(neighbour, regime):
    start, stop = 70, 140
    clean = make_inputs((1, 170, 2, 16), offsets=PACKING, stepwise=BOTH)
    dirty = {key: None if value is None else value.clone() for key, value in clean.items()}
    for name in ("x", "dy", "alpha", "decay"):
        dirty[name][:, :start] = dirty[name][:, stop:] = neighbour
    sequence = PACKING.index(start)
    for name in ("initial_state", "dfinal"):
        dirty[name][:sequence] = dirty[name][sequence + 1 :] = neighbour
    expected, actual = run_once(clean, regime), run(dirty)
    for name in ("y", "dx", "dalpha", "ddecay"):
        assert torch.equal(actual[name][:, start:stop], expected[name][:, start:stop]), name
    for name in ("final", "dinitial_state"):
        assert torch.equal(actual[name][sequence], expected[name][sequence]), name


@on_device
@pytest.mark.parametrize("operand", ["x", "dy", "alpha", "decay"])
def test_a_nan_with_rates_of_every_step_stays_where_it_belongs(operand, regime):
    """Not to another sequence, another head, or back in time, not even within a tile."""
    step = 150
    clean = make_inputs((2, 160, 2, 16), stepwise=BOTH)
    dirty = clean | {operand: clean[operand].clone()}
    dirty[operand][1, step, 1] = torch.nan
    expected, actual = run_once(clean, regime), run(dirty)
    later, earlier = torch.zeros(2, 2, 160, 2, dtype=torch.bool)
    later[1, step:, 1] = operand != "dy"
    # The step of a rate takes the gradient of its own input, not of its state.
    earlier[1, : step + (operand in ("dy", "alpha")), 1] = operand in ("dy", "decay")
    earlier[1, step, 1] |= operand == "alpha"
    for name, mask in (("y", later), ("dx", earlier)):
        assert actual[name].isnan().any(-1).cpu().equal(mask), name
        keep = ~mask.to(DEVICE)
        assert torch.equal(actual[name][keep], expected[name][keep]), name
    for name in ("dalpha", "ddecay"):
        others = torch.ones(2, 160, 2, dtype=torch.bool)
        others[1, :, 1] = False
        assert torch.equal(actual[name].cpu()[others], expected[name].cpu()[others]), name


@on_device
def test_batch_is_not_felt_with_rates_of_every_step(monkeypatch):
    monkeypatch.setattr(launching, "processors", lambda device: 4)
    inputs = make_inputs((5, 140, 2, 8), stepwise=BOTH)
    together = run(inputs)
    row = 3
    rows = ("x", "dy", "alpha", "decay", "initial_state", "dfinal")
    alone = run({key: value[row : row + 1] if key in rows else value for key, value in inputs.items()})
    for name in ("y", "final", "dx", "dalpha", "ddecay", "dinitial_state"):
        assert torch.equal(alone[name][0], together[name][row]), name


@on_device
@pytest.mark.parametrize("shape", [(0, 3, 2, 4), (2, 0, 2, 4), (2, 3, 2, 0), (2, 3, 0, 4)], ids=str)
def test_empty_dimensions_with_rates_of_every_step(shape):
    inputs = make_inputs(shape, stepwise=BOTH)
    actual = run(inputs)
    assert torch.equal(actual.pop("final"), inputs["initial_state"])
    assert torch.equal(actual.pop("dinitial_state"), inputs["dfinal"])
    assert actual.pop("y").shape == shape
    for name, value in actual.items():
        assert value.shape == inputs[name.removeprefix("d")].shape
        assert not value.any()


@on_device
def test_layouts_of_rates_equal_contiguous():
    inputs = make_inputs((2, 40, 3, 8), stepwise=BOTH)
    expected = run(inputs)
    for operand in ("x", "dy", "alpha", "decay"):
        value = inputs[operand].transpose(1, 2).contiguous().transpose(1, 2)
        assert_same(run(inputs | {operand: value}), expected)


@on_device
@on_gpu_only
def test_a_million_steps_with_rates_of_every_step():
    inputs = make_inputs((1, 2**20, 2, 16), stepwise=BOTH)
    expected = run({k: None if v is None else v.double() for k, v in inputs.items()}, "chunked")
    assert_close(run(inputs), {key: value.cpu() for key, value in expected.items()}, torch.float32)


@on_device
@on_gpu_only
def test_every_run_with_rates_of_every_step_gives_the_same_bits(regime):
    inputs = make_inputs((4, 3000, 32, 16), torch.bfloat16, stepwise=BOTH)
    first = run(inputs)
    for _ in range(5):
        assert_same(run(inputs), first)


@on_device
@on_gpu_only
def test_nothing_waits_for_the_device_with_rates_of_every_step():
    inputs = make_inputs((1, 3000, 8, 64), offsets=[0, 700, 700, 3000], stepwise=BOTH)
    run(inputs)
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(inputs)
    finally:
        torch.cuda.set_sync_debug_mode(mode)


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
