"""Reading without all logits: their bits, and the last of them, are those that `predict` gives.

They do not depend on how rows are cut and shared out among threads.
"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mhesa import GatedExponentialSmoothingLM
from mhesa.errors import InputError
from mhesa.inference.decoder import Decoder, kernel, native
from mhesa.inference.statistics import BITS, token_statistics
from mhesa.ops.cpu.compiling import compiled
from mhesa.ops.cpu.threads import parallel

# Weights that are read in native code, their quantisation, and a type that the model's own layers read.
FORMS = [(torch.float32, None), (torch.bfloat16, None), (torch.float32, "int8"), (torch.float64, None)]


def model_of(dtype, *, adaptive=True, conv_size=4):
    torch.manual_seed(0)
    model = GatedExponentialSmoothingLM(
        num_tokens=70, dim=24, depth=2, heads=2, dim_mhesa=32, adaptive=adaptive, conv_size=conv_size
    )
    return model.to(dtype).eval()


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def check(decoder, ids, targets):
    """Compare with the way through all logits: natively bit for bit."""
    after, state = decoder.initial_state(len(ids)), decoder.initial_state(len(ids))
    logits = decoder.predict(ids, after)
    bits = decoder.surprisal(ids, targets, state)
    np.testing.assert_array_equal(bits, token_statistics(logits, targets, BITS)["bits"])
    assert torch.equal(state, after)
    state.zero_()
    ends = torch.tensor([len(text) for text in ids]).cumsum(0) - 1
    # Elsewhere torch's products depend on how many rows they have.
    tolerance = 1e-12 if logits.dtype == torch.float64 else 0
    torch.testing.assert_close(decoder.prefill(ids, state), logits[ends], rtol=0, atol=tolerance)
    assert torch.equal(state, after)


@pytest.mark.parametrize(("dtype", "quantize"), FORMS)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_surprisals_equal_those_from_all_logits(threads, dtype, quantize, count):
    threads(count)
    lengths = [1, 700, 3, 256, 17, 1, 1200]
    decoder = Decoder(model_of(dtype), max_batch=len(lengths), quantize=quantize)
    ids = [torch.randint(70, (length,)) for length in lengths]
    targets = torch.randint(70, (sum(lengths),))
    check(decoder, ids, targets)


def test_threads_take_shares_in_memory_of_their_own(threads):
    """Without this, the comparisons of this file could pass in memory that threads share."""
    threads(2)
    decoder = Decoder(model_of(torch.float32))
    ids, args = torch.randint(70, (2000,)), decoder._engine.args
    decoder.predict(ids, decoder.initial_state(1))
    assert args.own_rows == 0
    decoder.prefill([ids], decoder.initial_state(1))
    assert (args.own_rows, args.threads) == (native.LARGEST_SHARE, 2)
    decoder.predict(ids, decoder.initial_state(1))
    decoder.surprisal(ids, ids, decoder.initial_state(1))
    assert (args.own_rows, args.threads) == (native.LARGEST_SHARE, 2)


def ask(args):
    for thread in range(args.threads):
        args.counters[thread] = kernel.rows_for(args, thread)


@pytest.mark.parametrize(
    ("row_times", "rows"),
    [
        ([5.0, 5.0], [128, 128]),
        ([1.0, 3.0], [192, 64]),
        ([0.0, 3.0], [128, 128]),
        ([1.0, 1e9], [256, 16]),
        ([1.0, 9.0, 9.0, 9.0], [256, 48, 48, 48]),
    ],
)
def test_a_thread_gets_the_rows_that_it_has_time_for(row_times, rows):
    times, found = np.array(row_times), np.zeros(len(rows), dtype=np.int64)
    args = kernel.Arguments(
        threads=len(rows),
        share_rows=128,
        own_rows=256,
        row_times=times.ctypes.data,
        counters=found.ctypes.data,
    )
    parallel(compiled(ask, torch.float32, kernel.Arguments), args.address, 1)
    assert found.tolist() == rows


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 600), min_size=1, max_size=6),
    count=st.integers(1, 4),
    share=st.sampled_from([16, 48, 128]),
    call=st.sampled_from([1, 1 << 24, 1 << 36]),
    logits=st.sampled_from([1, 5000, 1 << 20]),
    adaptive=st.booleans(),
    conv_size=st.sampled_from([0, 1, 4]),
)
def test_results_do_not_depend_on_how_rows_are_cut(lengths, count, share, call, logits, adaptive, conv_size):
    before = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "SHARE", share)
        patch.setattr(native, "LARGEST_SHARE", 2 * share)
        patch.setattr(native, "LONG_CALL", call)
        patch.setattr(native, "LOGITS", logits)
        try:
            torch.set_num_threads(count)
            model = model_of(torch.float32, adaptive=adaptive, conv_size=conv_size)
            decoder = Decoder(model, max_batch=len(lengths))
            ids = [torch.randint(70, (length,)) for length in lengths]
            targets = torch.randint(70, (sum(lengths),))
            check(decoder, ids, targets)
        finally:
            torch.set_num_threads(before)


def test_more_threads_than_there_were_when_it_was_made(threads):
    threads(1)
    decoder = Decoder(model_of(torch.float32))
    ids, targets = torch.randint(70, (1000,)), torch.randint(70, (1000,))
    threads(3)
    check(decoder, [ids], targets)


@pytest.mark.parametrize("length", [20, 2000])
@pytest.mark.parametrize(("dtype", "quantize"), FORMS)
def test_tokens_outside_the_vocabulary_are_refused(dtype, quantize, length):
    decoder = Decoder(model_of(dtype), quantize=quantize)
    state = decoder.initial_state(1)
    right, wrong = torch.randint(70, (length,)), torch.randint(70, (length,))
    wrong[-1] = 70
    with pytest.raises(IndexError, match="must be 0 to 69"):
        decoder.surprisal(wrong, right, state)
    with pytest.raises(IndexError, match="must be 0 to 69"):
        decoder.surprisal(right, wrong, state)
    with pytest.raises(InputError, match=f"{length - 1} targets for {length} tokens"):
        decoder.surprisal(right, right[1:], state)
    assert not state.any()


@pytest.mark.parametrize(
    "targets", [torch.zeros(3), torch.zeros(3) > 1, torch.zeros(3, 1, dtype=torch.int64)]
)
def test_targets_are_integers_of_one_dimension(targets):
    decoder = Decoder(model_of(torch.float32))
    with pytest.raises(InputError, match=r"targets must be integers of \(tokens,\), not torch"):
        decoder.surprisal(torch.tensor([1, 2, 3]), targets, decoder.initial_state(1))


@pytest.mark.parametrize("length", [20, 2000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_that_are_not_finite_give_no_number(length, dtype):
    model = model_of(dtype)
    with torch.no_grad():
        model.to_logits.weight[5] = torch.nan
    ids = torch.randint(70, (length,))
    decoder = Decoder(model)
    with pytest.raises(FloatingPointError):
        decoder.surprisal(ids, ids, decoder.initial_state(1))
