"""Packing and windows."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mhesa.data.windows import Windows, pack
from mhesa.errors import InputError


@given(rows=st.lists(st.lists(st.integers(0, 3), min_size=6, max_size=6), min_size=1, max_size=5))
def test_packing_parts_windows_and_documents(rows):
    ids = torch.tensor(rows)
    packed, offsets = pack(ids.clone(), eos_token_id=3)
    assert torch.equal(packed[0], ids.flatten())
    begins = {i for i, token in enumerate(ids.flatten().tolist()) if token == 3 or i % 6 == 0}
    assert set(offsets.tolist()) == begins | {ids.numel()}


def windows_of(length, context=10, rows=4, seed=0, streams=False):
    return Windows(np.arange(length), context=context, rows=rows, seed=seed, streams=streams)


@given(length=st.integers(20, 300), context=st.integers(1, 8), rows=st.integers(1, 5), seed=st.integers(0, 3))
def test_a_pass_visits_no_token_twice(length, context, rows, seed):
    windows = windows_of(length, context, rows, seed)
    starts = np.concatenate([windows.starts(step) for step in range(3 * windows.per_pass)])
    for nth in range(3):
        part = starts[nth * windows.per_pass : (nth + 1) * windows.per_pass]
        ids = windows.read(part)
        seen = ids[:, :-1].flatten().tolist()
        assert len(set(seen)) == len(seen) == windows.per_pass * context
        assert length - 1 - len(seen) < 2 * context
        assert (ids.diff(dim=1) == 1).all()


@given(length=st.integers(50, 400), context=st.integers(1, 8), rows=st.integers(1, 5), seed=st.integers(0, 3))
def test_streams_go_on_where_they_stopped(length, context, rows, seed):
    windows = windows_of(length, context, rows, seed, streams=True)
    seen = []
    before = torch.zeros(rows, 1)
    for step in range(2 * windows.per_pass):
        ids = windows.read(windows.starts(step))
        assert windows.is_stream_start(step) == (step % windows.per_pass == 0)
        if not windows.is_stream_start(step):
            assert torch.equal(ids[:, 0], before[:, -1])
        before = ids
        seen += ids[:, :-1].flatten().tolist() if step < windows.per_pass else []
    assert len(set(seen)) == len(seen)
    assert length - len(seen) <= 2 * rows * context + 1


def test_step_and_seed_decide_the_windows():
    one, other, third = (windows_of(1000, seed=seed) for seed in (1, 1, 2))
    backwards = [other.starts(step).tolist() for step in reversed(range(300))][::-1]
    assert [one.starts(step).tolist() for step in range(300)] == backwards
    assert [third.starts(step).tolist() for step in range(300)] != backwards


def test_passes_differ_in_offset_and_order():
    windows = windows_of(1000, rows=1)
    first, second = (
        [int(windows.starts(nth * windows.per_pass + index)[0]) for index in range(windows.per_pass)]
        for nth in range(2)
    )
    assert first[0] % 10 != second[0] % 10
    assert np.argsort(first).tolist() != np.argsort(second).tolist()


def test_a_corpus_shorter_than_a_window_is_refused():
    with pytest.raises(InputError, match="has 8 tokens, fewer than one window of 8 and the token after it"):
        windows_of(8, context=8)
    with pytest.raises(InputError, match="fewer than 4 streams of a window of 8"):
        windows_of(32, context=8, streams=True)
