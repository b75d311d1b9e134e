"""Draws for the rows of a batch, natively: each row by itself, in fp64, rows shared among threads."""

from __future__ import annotations

import math

import numpy as np

from mhesa.inference.sampling import (
    BIAS,
    COUNT,
    FREQUENCY,
    MIN_P,
    NOTE_FIELDS,
    NOTED,
    NOTES,
    PRESENCE,
    RANDOM,
    REPETITION,
    SEEN,
    TEMPERATURE,
    TOKEN,
    TOP_K,
    TOP_P,
)
from mhesa.ops.cpu.simd import doubles, fields, integers, jit, offset, pointer, take

# What the kernel is told.
TASK, THREAD, ROWS, TOKENS, LOGITS, LOGITS_STEP, SAMPLERS, WEIGHTS, ORDER, OUT, FIELDS = range(11)
# Below so many numbers in all, a second thread is not worth waking.
PARALLEL = 1 << 12


def draw(data):  # type: ignore[no-untyped-def]
    """Draw tokens for rows until there are none left, in scratch memory of a thread's own."""
    p = fields(data)
    n, thread = p[TOKENS], take(offset(p, THREAD))
    weights, order = offset(doubles(p[WEIGHTS]), thread * n), offset(integers(p[ORDER]), thread * n)
    while True:
        row = take(p)
        if row >= p[ROWS]:
            return
        logits = offset(pointer(p[LOGITS], data), row * p[LOGITS_STEP])
        sampler = integers(p[SAMPLERS])[row]
        for i in range(n):
            weights[i] = logits[i]
        _adjust(weights, doubles(sampler), doubles(integers(sampler)[NOTES]), integers(sampler)[NOTED])
        random = _random(offset(integers(sampler), RANDOM))
        integers(p[OUT])[row] = _choose(weights, order, n, doubles(sampler), integers(sampler)[TOP_K], random)


@jit
def _adjust(weights, settings, notes, noted):  # type: ignore[no-untyped-def]
    """Penalties and biases of tokens that were noted."""
    for i in range(noted):
        note = offset(notes, i * NOTE_FIELDS)
        token = int(note[TOKEN])
        if note[SEEN] != 0:
            weights[token] *= settings[REPETITION] if weights[token] < 0 else 1 / settings[REPETITION]
        weights[token] += note[BIAS] - settings[FREQUENCY] * note[COUNT]
        if note[COUNT] > 0:
            weights[token] -= settings[PRESENCE]


@jit
def _random(state):  # type: ignore[no-untyped-def]
    """A number in [0, 1) from SplitMix64 (https://doi.org/10.1145/2714064.2660195)."""
    z = np.uint64(state[0]) + np.uint64(0x9E3779B97F4A7C15)
    state[0] = np.int64(z)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return float((z ^ (z >> np.uint64(31))) >> np.uint64(11)) * 2.0**-53


@jit
def _choose(weights, order, n, settings, k, random):  # type: ignore[no-untyped-def]
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
    if 0 < k < n or settings[TOP_P] < 1:
        kept = _likeliest(weights, order, n, min(k, n) if k else n, settings[TOP_P], total)
        return _walk(weights, order, n - 1, -1, kept, settings[MIN_P], random)
    for i in range(n):
        order[i] = i
    return _walk(weights, order, 0, 1, n, settings[MIN_P], random)


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
