"""The Triton backend with rates of every step against the reference."""

import pytest
import torch
from triton_scans import (
    BOTH,
    DEVICE,
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

from mhesa.ops.triton import launching, rates

pytestmark = on_device


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


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_rates_of_every_step_in_other_types(dtype, regime):
    inputs = make_inputs((1, 270, 2, 8), dtype, stepwise=BOTH)
    actual = run(inputs)
    assert actual["y"].dtype == actual["dx"].dtype == dtype
    assert_close(actual, reference(inputs), dtype)


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


def test_many_tiles_with_rates_of_every_step(monkeypatch):
    """More tiles than the chain of tiles fetches at once."""
    set_regime(monkeypatch, "tiles")
    monkeypatch.setattr(rates, "SPANS_LOG", 3)
    monkeypatch.setitem(rates.ROWS_LOG, 4, 0)
    for offsets in (None, [0, 7, 8, 64, 150]):
        inputs = make_inputs((1, 150, 1, 4), offsets=offsets, stepwise=BOTH)
        assert_close(run(inputs), reference(inputs), torch.float32)


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


def test_batch_is_not_felt_with_rates_of_every_step(monkeypatch):
    monkeypatch.setattr(launching, "processors", lambda device: 4)
    inputs = make_inputs((5, 140, 2, 8), stepwise=BOTH)
    together = run(inputs)
    row = 3
    rows = ("x", "dy", "alpha", "decay", "initial_state", "dfinal")
    alone = run({key: value[row : row + 1] if key in rows else value for key, value in inputs.items()})
    for name in ("y", "final", "dx", "dalpha", "ddecay", "dinitial_state"):
        assert torch.equal(alone[name][0], together[name][row]), name


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


def test_layouts_of_rates_equal_contiguous():
    inputs = make_inputs((2, 40, 3, 8), stepwise=BOTH)
    expected = run(inputs)
    for operand in ("x", "dy", "alpha", "decay"):
        value = inputs[operand].transpose(1, 2).contiguous().transpose(1, 2)
        assert_same(run(inputs | {operand: value}), expected)


@on_gpu_only
def test_a_million_steps_with_rates_of_every_step():
    inputs = make_inputs((1, 2**20, 2, 16), stepwise=BOTH)
    expected = run({k: None if v is None else v.double() for k, v in inputs.items()}, "chunked")
    assert_close(run(inputs), {key: value.cpu() for key, value in expected.items()}, torch.float32)


@on_gpu_only
def test_every_run_with_rates_of_every_step_gives_the_same_bits(regime):
    inputs = make_inputs((4, 3000, 32, 16), torch.bfloat16, stepwise=BOTH)
    first = run(inputs)
    for _ in range(5):
        assert_same(run(inputs), first)


@on_gpu_only
def test_launches_with_rates_of_every_step_do_not_wait_for_the_device():
    inputs = make_inputs((1, 3000, 8, 64), offsets=[0, 700, 700, 3000], stepwise=BOTH)
    run(inputs)
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(inputs)
    finally:
        torch.cuda.set_sync_debug_mode(mode)
