"""Draws for the rows of a batch, natively: each row by itself, in fp64, rows shared among threads."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import numpy as np
from torch import Tensor

from mhesa.ops.simd import compiled, doubles, fields, integers, jit, offset, pointer, take
from mhesa.ops.threads import available, parallel

# What the kernel is told.
TASK, ROWS, TOKENS, LOGITS, LOGITS_STEP, SETTINGS, SEEN, SEEN_OFFSETS, WEIGHTS, ORDER, OUT, FIELDS = range(12)
# What a row is told.
TEMPERATURE, TOP_K, TOP_P, MIN_P, PENALTY, RANDOM, SETTINGS_FIELDS = range(7)
# Below so many numbers in all, a second thread is not worth waking.
PARALLEL = 1 << 12


def draw_rows(logits: Tensor, settings: np.ndarray, seen: Sequence[Collection[int]]) -> list[int]:
    """A token for each row.

    Args:
        logits: fp32 or fp64 on CPU, `(rows, tokens)`, contiguous along tokens.
        settings: `(rows, SETTINGS_FIELDS)`.
        seen: tokens whose logits the repetition penalty changes, for each row.
    """
    rows, tokens = logits.shape
    ids = np.array([token for row in seen for token in row], dtype=np.int64)
    offsets = np.zeros(rows + 1, dtype=np.int64)
    np.cumsum([len(row) for row in seen], out=offsets[1:])
    weights, order = np.empty((rows, tokens)), np.empty((rows, tokens), dtype=np.int64)
    out, table = np.empty(rows, dtype=np.int64), np.zeros(FIELDS, dtype=np.int64)
    table[ROWS], table[TOKENS] = rows, tokens
    table[LOGITS], table[LOGITS_STEP] = logits.data_ptr(), logits.stride(0)
    for field, array in (
        (SETTINGS, settings),
        (SEEN, ids),
        (SEEN_OFFSETS, offsets),
        (WEIGHTS, weights),
        (ORDER, order),
        (OUT, out),
    ):
        table[field] = array.ctypes.data
    threads = min(rows, available()) if rows * tokens >= PARALLEL else 1
    parallel(compiled(_draw, logits.dtype), table.ctypes.data, threads)
    return out.tolist()


def _draw(data):  # type: ignore[no-untyped-def]
    p = fields(data)
    n, seen, offsets = p[TOKENS], integers(p[SEEN]), integers(p[SEEN_OFFSETS])
    while True:
        row = take(p)
        if row >= p[ROWS]:
            return
        logits = offset(pointer(p[LOGITS], data), row * p[LOGITS_STEP])
        settings = offset(doubles(p[SETTINGS]), row * SETTINGS_FIELDS)
        weights, order = offset(doubles(p[WEIGHTS]), row * n), offset(integers(p[ORDER]), row * n)
        for i in range(n):
            weights[i] = logits[i]
        for i in range(offsets[row], offsets[row + 1]):
            token = seen[i]
            weights[token] *= settings[PENALTY] if weights[token] < 0 else 1 / settings[PENALTY]
        integers(p[OUT])[row] = _choose(weights, order, n, settings)


@jit
def _choose(weights, order, n, settings):  # type: ignore[no-untyped-def]
    """One token by its logits, of which `weights` is left in disarray."""
    best = 0
    for i in range(1, n):
        if weights[i] > weights[best] or weights[best] != weights[best]:
            best = i
    top = weights[best]
    for i in range(n):
        # Nothing can be drawn from what is no number, nor where everything is impossible.
        if weights[i] != weights[i] or math.isinf(top):
            return -1
    if settings[TEMPERATURE] == 0:
        return best
    total = 0.0
    for i in range(n):
        weights[i] = math.exp((weights[i] - top) / settings[TEMPERATURE])
        total += weights[i]
    k, least = int(settings[TOP_K]), settings[MIN_P]
    if 0 < k < n or settings[TOP_P] < 1:
        kept = _likeliest(weights, order, n, min(k, n) if k else n, settings[TOP_P], total)
        return _walk(weights, order, n - 1, -1, kept, least, settings[RANDOM])
    for i in range(n):
        order[i] = i
    return _walk(weights, order, 0, 1, n, least, settings[RANDOM])


@jit
def _walk(weights, order, first, step, count, least, random):  # type: ignore[no-untyped-def]
    """The token at which the weights' running sum passes `random` of their whole sum."""
    total = 0.0
    for i in range(count):
        weight = weights[order[first + step * i]]
        total += weight if weight >= least else 0.0
    running, token = 0.0, order[first]
    for i in range(count):
        weight = weights[order[first + step * i]]
        if weight >= least and weight > 0:
            token = order[first + step * i]
            running += weight
            if running > random * total:
                break
    return token


@jit
def _likeliest(weights, order, n, k, p, total):  # type: ignore[no-untyped-def]
    """Sort the likeliest to the end of `order`, no further than needed; how many `k` and `p` keep."""
    for i in range(n):
        order[i] = i
    for parent in range(n // 2 - 1, -1, -1):
        _sift(weights, order, parent, n)
    if k < n:
        kept_total = 0.0
        for i in range(k):
            _pop(weights, order, n - i)
            kept_total += weights[order[n - 1 - i]]
        total = kept_total
    running = 0.0
    for i in range(k):
        # A token goes if those before it reach p by themselves; the likeliest always stays.
        if i and running >= p * total and p < 1:
            return i
        if k == n:
            _pop(weights, order, n - i)
        running += weights[order[n - 1 - i]]
    return k


@jit
def _pop(weights, order, size):  # type: ignore[no-untyped-def]
    """Move the likeliest of a heap of `size` behind its end, which is one earlier then."""
    order[0], order[size - 1] = order[size - 1], order[0]
    _sift(weights, order, 0, size - 1)


@jit
def _sift(weights, order, parent, size):  # type: ignore[no-untyped-def]
    """Let a token sink to its place in the heap: above less likely ones and, of equals, higher ids."""
    while True:
        child = 2 * parent + 1
        if child >= size:
            return
        if child + 1 < size and _before(weights, order[child + 1], order[child]):
            child += 1
        if _before(weights, order[parent], order[child]):
            return
        order[parent], order[child] = order[child], order[parent]
        parent = child


@jit
def _before(weights, a, b):  # type: ignore[no-untyped-def]
    return weights[a] > weights[b] or (weights[a] == weights[b] and a < b)
