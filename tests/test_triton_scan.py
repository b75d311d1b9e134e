"""The Triton backend against the reference: on a GPU, or anywhere under Triton's interpreter.

Rates are fixed, or those of every step, which other kernels scan.
"""

import itertools
import mmap

import pytest
import torch
from combinations import covering
from triton_scans import (
    BOTH,
    DEVICE,
    INTERPRETED,
    PACKING,
    assert_close,
    assert_same,
    make_inputs,
    on_device,
    on_gpu_only,
    reference,
    run,
    run_once,
    set_regime,
)

from mhesa.ops import exponential_smoothing
from mhesa.ops.triton import launching, rates, scan

pytestmark = on_device
FIXED = ()
STEPWISE = pytest.mark.parametrize("stepwise", [FIXED, BOTH], ids=["fixed", "varying"])

# Shapes and options of `make_inputs`.
CASES = {
    "one step": ((2, 1, 3, 5), {}),
    "plain": ((2, 65, 1, 32), {"skip": False, "initial": False}),
    "heads of a block": ((1, 129, 2, 32), {}),
    "heads across blocks": ((1, 150, 3, 13), {}),
    "packed": ((1, 170, 2, 20), {"offsets": PACKING}),
    "packed and plain": ((1, 170, 1, 32), {"offsets": PACKING, "initial": False, "skip": False}),
}


def unsummed(stepwise):
    """The results that are sums over neither sequences nor steps."""
    return "y", "final", "dx", "dinitial_state", *("d" + name for name in stepwise)


@pytest.mark.parametrize(
    ("case", "reverse", "regime"),
    covering(itertools.product(CASES, [False, True], ["whole", "tiles"])),
    indirect=["regime"],
)
def test_agrees_with_the_reference(case, reverse, regime):
    shape, options = CASES[case]
    inputs = make_inputs(shape, **options)
    assert_close(run(inputs, reverse=reverse), reference(inputs, reverse), torch.float32)


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
def test_varying_rates_agree_with_the_reference(shape, reverse, options, regime):
    inputs = make_inputs(shape, **options)
    assert_close(run(inputs, reverse=reverse), reference(inputs, reverse), torch.float32)


@STEPWISE
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_types(dtype, stepwise, regime):
    inputs = make_inputs((1, 270, 2, 8), dtype, stepwise=stepwise)
    actual = run(inputs)
    assert actual["y"].dtype == actual["dx"].dtype == dtype
    assert_close(actual, reference(inputs), dtype)


@pytest.mark.parametrize("decay", [0.0, 1e-20, 1 - 1e-7, 1.0])
def test_extreme_decays(decay, regime):
    inputs = make_inputs((1, 200, 1, 4), decay=decay)
    actual = run(inputs)
    assert_close(actual, reference(inputs), torch.float32)
    if decay == 0:
        exact = inputs["alpha"][:, None] * inputs["x"][:, -1]
        assert torch.equal(actual["final"], exact)


@STEPWISE
def test_many_tiles(stepwise, monkeypatch):
    """More tiles than the chain of tiles fetches at once."""
    set_regime(monkeypatch, "tiles")
    monkeypatch.setattr(rates if stepwise else scan, "SPANS_LOG", 3)
    for rows_logs in (scan.FORWARD_ROWS_LOG, scan.BACKWARD_ROWS_LOG, rates.ROWS_LOG):
        monkeypatch.setitem(rows_logs, 4, 0)
    for offsets in (None, [0, 7, 8, 64, 150]):
        inputs = make_inputs((1, 150, 1, 4), offsets=offsets, stepwise=stepwise)
        assert_close(run(inputs), reference(inputs), torch.float32)


@pytest.mark.parametrize("offsets", [None, PACKING], ids=["dense", "packed"])
@pytest.mark.parametrize(
    ("heads", "dtype", "stepwise"),
    [
        pytest.param((1, 32), torch.float32, FIXED, id="fp32"),
        pytest.param((1, 32), torch.bfloat16, FIXED, id="bf16"),
        pytest.param((2, 16), torch.float32, BOTH, id="varying"),
    ],
)
def test_regimes_agree_bit_for_bit(offsets, heads, dtype, stepwise, monkeypatch):
    """The batch decides between them, and must not be seen in the results."""
    inputs = make_inputs((1, 170 if offsets else 300, *heads), dtype, offsets=offsets, stepwise=stepwise)
    results = []
    for regime in ("whole", "tiles"):
        set_regime(monkeypatch, regime)
        actual = run(inputs)
        results.append({key: actual[key] for key in unsummed(stepwise)})
    assert_same(*results)


@STEPWISE
@pytest.mark.parametrize("shape", [(0, 3, 2, 4), (2, 0, 2, 4), (2, 3, 2, 0), (2, 3, 0, 4)], ids=str)
def test_empty_dimensions(shape, stepwise):
    inputs = make_inputs(shape, stepwise=stepwise)
    actual = run(inputs)
    assert actual.pop("y").shape == shape
    assert torch.equal(actual.pop("final"), inputs["initial_state"])
    assert torch.equal(actual.pop("dinitial_state"), inputs["dfinal"])
    for name, value in actual.items():
        assert value.shape == inputs[name.removeprefix("d")].shape
        assert not value.any()


def test_unknown_type():
    inputs = make_inputs((1, 3, 2, 4))
    x = inputs["x"].to(torch.float8_e5m2)
    with pytest.raises(
        ValueError, match="'triton' takes float32, float64, bfloat16, float16, not float8_e5m2"
    ):
        exponential_smoothing(x, inputs["alpha"], inputs["decay"], backend="triton")


def test_packed_without_a_sequence():
    inputs = make_inputs((1, 0, 2, 4), offsets=[0])
    assert run(inputs)["final"].shape == (0, 2, 4)


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


def test_layouts_of_rates_equal_contiguous():
    inputs = make_inputs((2, 40, 3, 8), stepwise=BOTH)
    expected = run(inputs)
    for operand in ("x", "dy", "alpha", "decay"):
        value = inputs[operand].transpose(1, 2).contiguous().transpose(1, 2)
        assert_same(run(inputs | {operand: value}), expected)


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


@pytest.mark.parametrize("operand", ["x", "dy", "alpha", "decay"])
def test_nan_stays_where_it_belongs_at_varying_rates(operand, regime):
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


@pytest.mark.parametrize(
    ("neighbour", "heads", "stepwise"),
    [
        *((value, (1, 32), FIXED) for value in (torch.nan, torch.inf, 1e30)),
        *((value, (2, 16), BOTH) for value in (torch.nan, torch.inf)),
    ],
    ids=["nan", "inf", "large", "nan-varying", "inf-varying"],
)
def test_packed_neighbours_are_not_felt(neighbour, heads, stepwise, regime):
    start, stop = 70, 140
    clean = make_inputs((1, 170, *heads), offsets=PACKING, stepwise=stepwise)
    dirty = {key: None if value is None else value.clone() for key, value in clean.items()}
    for name in ("x", "dy", *stepwise):
        dirty[name][:, :start] = dirty[name][:, stop:] = neighbour
    sequence = PACKING.index(start)
    for name in ("initial_state", "dfinal"):
        dirty[name][:sequence] = dirty[name][sequence + 1 :] = neighbour
    expected, actual = run_once(clean, regime), run(dirty)
    for name in unsummed(stepwise):
        here = sequence if name in ("final", "dinitial_state") else (slice(None), slice(start, stop))
        assert torch.equal(actual[name][here], expected[name][here]), name


@pytest.mark.parametrize(("heads", "stepwise"), [((1, 4), FIXED), ((2, 8), BOTH)], ids=["fixed", "varying"])
def test_batch_is_not_felt(heads, stepwise, monkeypatch):
    monkeypatch.setattr(launching, "processors", lambda device: 4)
    inputs = make_inputs((5, 140, *heads), stepwise=stepwise)
    together = run(inputs)
    row = 3
    rows = ("x", "dy", *stepwise, "initial_state", "dfinal")
    alone = run({key: value[row : row + 1] if key in rows else value for key, value in inputs.items()})
    for name in unsummed(stepwise):
        assert torch.equal(alone[name][0], together[name][row]), name


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


@on_gpu_only
def test_a_million_steps_of_varying_rates():
    inputs = make_inputs((1, 2**20, 2, 16), stepwise=BOTH)
    expected = run({k: None if v is None else v.double() for k, v in inputs.items()}, "chunked")
    assert_close(run(inputs), {key: value.cpu() for key, value in expected.items()}, torch.float32)


@on_gpu_only
@pytest.mark.parametrize(
    ("heads", "dtype", "stepwise"),
    [
        pytest.param((8, 64), torch.float32, FIXED, id="fp32"),
        pytest.param((8, 64), torch.bfloat16, FIXED, id="bf16"),
        pytest.param((32, 16), torch.bfloat16, BOTH, id="varying"),
    ],
)
def test_every_run_gives_the_same_bits(heads, dtype, stepwise, regime):
    inputs = make_inputs((4, 3000, *heads), dtype, stepwise=stepwise)
    first = run(inputs)
    for _ in range(5):
        assert_same(run(inputs), first)


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


@on_gpu_only
@STEPWISE
def test_launches_do_not_wait_for_the_device(stepwise):
    inputs = make_inputs((1, 3000, 8, 64), offsets=[0, 700, 700, 3000], stepwise=stepwise)
    run(inputs)
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(inputs)
    finally:
        torch.cuda.set_sync_debug_mode(mode)
