"""Draws tokens for the rows of a batch in native code: each row by itself, in fp64."""

from __future__ import annotations

import math

import numpy as np

from mhesa.ops.cpu.atomics import fetch_add
from mhesa.ops.cpu.compiling import jit, member, offset


def draw(args):  # type: ignore[no-untyped-def]
    """Draw a token for one row after another; `args` is `mhesa.inference.sampling.Arguments`."""
    n, thread = args.num_tokens, fetch_add(member(args, "next_thread"), 1)
    weights, order = offset(args.weights, thread * n), offset(args.order, thread * n)
    while True:
        row = fetch_add(member(args, "next_row"), 1)
        if row >= args.rows:
            return
        logits, sampler = offset(args.logits, row * args.row_stride), args.samplers[row]
        for i in range(n):
            weights[i] = logits[i]
        _adjust(weights, sampler)
        args.out[row] = _choose(weights, order, n, sampler, _random(sampler))


@jit
def _adjust(weights, sampler):  # type: ignore[no-untyped-def]
    """Apply penalties and biases to the logits of noted tokens."""
    for i in range(sampler.note_count):
        note = offset(sampler.notes, i)
        token = note.token
        if note.seen:
            penalty = sampler.repetition_penalty
            weights[token] *= penalty if weights[token] < 0 else 1 / penalty
        weights[token] += note.bias - sampler.frequency_penalty * note.count
        if note.count:
            weights[token] -= sampler.presence_penalty


@jit
def _random(sampler):  # type: ignore[no-untyped-def]
    """A number in [0, 1) from SplitMix64 (https://doi.org/10.1145/2714064.2660195)."""
    z = sampler.random + np.uint64(0x9E3779B97F4A7C15)
    sampler.random = z
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return float((z ^ (z >> np.uint64(31))) >> np.uint64(11)) * 2.0**-53


@jit
def _choose(weights, order, n, sampler, random):  # type: ignore[no-untyped-def]
    """One token by its logits `weights`, which are overwritten."""
    best = 0
    for i in range(1, n):
        if weights[i] > weights[best] or weights[best] != weights[best]:
            best = i
    top = weights[best]
    # An infinite logit, or every token impossible; NaN somewhere.
    if math.isinf(top):
        return -1
    for i in range(n):
        if weights[i] != weights[i]:
            return -1
    if sampler.temperature == 0:
        return best
    total, k = 0.0, sampler.top_k
    for i in range(n):
        weights[i] = math.exp((weights[i] - top) / sampler.temperature)
        total += weights[i]
    if 0 < k < n or sampler.top_p < 1:
        kept_count = _likeliest(weights, order, n, min(k, n) if k else n, sampler.top_p, total)
        return _walk(weights, order, n - 1, -1, kept_count, sampler.min_p, random)
    for i in range(n):
        order[i] = i
    return _walk(weights, order, 0, 1, n, sampler.min_p, random)


@jit
def _walk(weights, order, first, step, count, min_weight, random):  # type: ignore[no-untyped-def]
    """The token at which the weights' running sum passes `random` of their whole sum."""
    total = 0.0
    for i in range(count):
        weight = weights[order[first + step * i]]
        total += weight if weight >= min_weight else 0.0
    running, token = 0.0, order[first]
    for i in range(count):
        weight = weights[order[first + step * i]]
        if weight >= min_weight and weight > 0:
            token = order[first + step * i]
            running += weight
            if running > random * total:
                break
    return token


@jit
def _likeliest(weights, order, n, k, p, total):  # type: ignore[no-untyped-def]
    """Sort the likeliest tokens to the end of `order`, and return how many `k` and `p` keep."""
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
        # A token is dropped if likelier ones reach p already; the likeliest is always kept.
        if i and running >= p * total and p < 1:
            return i
        if k == n:
            _pop(weights, order, n - i)
        running += weights[order[n - 1 - i]]
    return k


@jit
def _pop(weights, order, size):  # type: ignore[no-untyped-def]
    """Move the likeliest token of a heap of `size` to its last place, and leave a heap of `size - 1`."""
    order[0], order[size - 1] = order[size - 1], order[0]
    _sift(weights, order, 0, size - 1)


@jit
def _sift(weights, order, parent, size):  # type: ignore[no-untyped-def]
    """Move a token down to its place in the heap: above less likely ones and, of equals, higher ids."""
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
    """Whether token `a` is likelier than `b`, or as likely with a lower id."""
    return weights[a] > weights[b] or (weights[a] == weights[b] and a < b)
