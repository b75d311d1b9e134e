"""The Triton kernels of the scan at fixed rates. With enough channels they read and write each element once.

A program owns `BLOCK` channels and walks over time in tiles. A tile is `SPANS` spans of `ROWS` rows each,
held in registers as `ROWS` tensors `(SPANS, BLOCK)`, so that all spans advance together:

1. Scan every span from zero, which gives its end state.
2. Scan the end states over the spans in `log2(SPANS)` steps (Hillis and Steele, 1986), with the powers
   `decay ** (ROWS * 2**j)`: this is what the tile's earlier spans add to the state at each span's start.
3. Add the state at the tile's start times `decay ** (ROWS * span)`, and scan every span again from there,
   to write the outputs.

If batch x channels fill the device, a program walks through a whole sequence and carries the state from tile
to tile. Otherwise (batch 1 with a long sequence) three kernels run: one for the tiles' end states, in any
order; one that chains them; one for the outputs, in any order. That reads the input twice. Both regimes do
the same arithmetic on the same tiles in the same order, with every fused multiply-add written out, so the
choice between them, which depends on the batch, changes no bit of the outputs.

The backward pass needs no state of the forward pass. It runs against the scan and carries `p`, the gradient
that a state gets from later steps, and `r`, the derivative of `p` with respect to the decay:

    g = dy + p;  dx = alpha * g + skip * dy;  r' = g + decay * r;  p' = decay * g
    dalpha = sum g * x;  ddecay = alpha * sum r * x + initial_state * r[end];  dskip = sum dy * x

Over `n` rows without input, `p` is multiplied by `decay ** n` and `r` also gains
`n * decay ** (n - 1) * p`. Gradients of the parameters are summed in fp32 per program and channel, then in
fp64 in a fixed order: without atomics, every run gives the same bits.

Packed sequences are tiled as one. Each row knows its sequence, and a state passes from row to row only
within a sequence. At a boundary the state is replaced, not multiplied by zero, so that no NaN passes.

Powers of the decay are computed in fp64 by repeated squaring; all exponents are positive.
"""

# Kernels are written in Triton's language: without types that mypy knows, constants in capitals.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# mypy: disable-error-code="assignment"
# ruff: noqa: N803, RUF005

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _powers(decay, ROWS_LOG: tl.constexpr, SPANS_LOG: tl.constexpr):
    """The factors on `(p, r)` over `n` rows: `decay ** n` and its derivative, `n * decay ** (n - 1)`.

    Returns, for the rows of 1, 2, 4, .. spans, the tuples `powers` and `slopes`; for the rows before each
    span, a pair of `(SPANS, lanes)`; for a whole tile, power, slope, and the rounding error of the power.
    """
    power = decay.to(tl.float64)
    slope = power * 0 + 1
    for _ in tl.static_range(ROWS_LOG):
        slope = 2 * power * slope
        power = power * power
    span = tl.arange(0, 1 << SPANS_LOG)[:, None]
    before = (span * 0 + 1).to(tl.float64) + tl.zeros_like(power)
    before_slope = tl.zeros_like(before)
    powers = ()
    slopes = ()
    for j in tl.static_range(SPANS_LOG):
        powers = powers + (power.to(decay.dtype),)
        slopes = slopes + (slope.to(decay.dtype),)
        odd = ((span >> j) & 1) == 1
        before_slope = tl.where(odd, tl.fma(before, slope, before_slope * power), before_slope)
        before = tl.where(odd, before * power, before)
        slope = 2 * power * slope
        power = power * power
    reaching = (before.to(decay.dtype), before_slope.to(decay.dtype))
    whole = power.to(decay.dtype)
    rest = (power - whole.to(tl.float64)).to(decay.dtype)
    return powers, slopes, reaching, (whole, slope.to(decay.dtype), rest)


@triton.jit
def _advance(state, whole, total):
    """The state after a tile, from the state before it and the tile's end state from zero, `total`.

    The power's rounding error is added back: it is the same at every tile and would grow with the length.
    """
    return tl.fma(whole[0], state, tl.fma(whole[2], state, total))


@triton.jit
def _load_tile(pointer, stride, offset, valid, position, length, OTHER, ROWS, REVERSE, limit=None):
    """A tile: `ROWS` tensors `(SPANS, BLOCK)`, `OTHER` for invalid channels and for steps from `limit` on."""
    rows = ()
    for k in tl.static_range(ROWS):
        at = position + k
        row = length - 1 - at if REVERSE else at
        mask = (at < (length if limit is None else limit)) & valid
        rows = rows + (tl.load(pointer + row * stride + offset, mask=mask, other=OTHER),)
    return rows


@triton.jit
def _load_sequence(sequence_of, at, length, REVERSE: tl.constexpr):
    """The packed sequence of the step `at` of the scan, -1 for steps outside; without packing 0 for all."""
    if sequence_of is None:
        sequence = at * 0
    else:
        row = length - 1 - at if REVERSE else at
        sequence = tl.load(sequence_of + row, mask=(at >= 0) & (at < length), other=-1)
    return sequence


@triton.jit
def _tile_ends_sequence(sequence_of, tile, size, length, REVERSE: tl.constexpr):
    """Whether a sequence ends in this tile."""
    if sequence_of is None:
        closes = (tile + 1) * size >= length
    else:
        following = _load_sequence(sequence_of, (tile + 1) * size, length, REVERSE)
        closes = following != _load_sequence(sequence_of, tile * size, length, REVERSE)
    return closes


@triton.jit
def _ends_sequence(sequence_of, at, batch, length, REVERSE: tl.constexpr):
    """Whether each step `at` ends a sequence, and the index of the sequence."""
    if sequence_of is None:
        ends = at == length - 1
        sequence = at * 0 + batch
    else:
        sequence = _load_sequence(sequence_of, at, length, REVERSE).to(tl.int64)
        ends = (sequence >= 0) & (sequence != _load_sequence(sequence_of, at + 1, length, REVERSE))
    return ends, sequence


@triton.jit
def _program(blocks, tiles, tiles_per_program):
    """A program's block, its group of tiles, the batch of that, its first tile and the one after its last.

    Neighbouring programs take blocks of the same rows, which share cache lines.
    """
    groups = tl.cdiv(tiles, tiles_per_program)
    group = tl.program_id(0) // blocks
    batch = (group // groups).to(tl.int64)
    first = (group % groups).to(tl.int64) * tiles_per_program
    return tl.program_id(0) % blocks, group, batch, first, tl.minimum(first + tiles_per_program, tiles)


@triton.jit
def _gather_span(values, span):
    """Rows `span` of `values`, `(SPANS, BLOCK)`: a gather over the spans."""
    return tl.gather(values, tl.broadcast_to(span, values.shape), 0)


@triton.jit
def forward(
    x,
    y,
    final_state,
    carries,
    alpha,
    decay,
    skip,
    initial_state,
    sequence_of,
    stride_batch,
    stride_time,
    length,
    channels,
    head_dim,
    tiles,
    tiles_per_program,
    LANES: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS_LOG: tl.constexpr,
    SPANS_LOG: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """The scan of `tiles_per_program` tiles.

    Without `carries`, the whole scan. With `carries (batch, tiles, channels)`, which holds the state at each
    tile's start, the outputs. Without `y`, the tiles' end states from zero, written to `carries`.
    """
    ROWS: tl.constexpr = 1 << ROWS_LOG
    SPANS: tl.constexpr = 1 << SPANS_LOG
    blocks = tl.cdiv(channels, BLOCK)
    block, _, batch, first, last = _program(blocks, tiles, tiles_per_program)
    start = block * BLOCK
    limit = tl.minimum(last * (ROWS * SPANS), length)

    channel = start + tl.arange(0, BLOCK)[None, :]
    valid = channel < channels
    # One lane if all channels of the block belong to one head.
    head = tl.minimum(start + tl.arange(0, LANES)[None, :], channels - 1) // head_dim
    a = tl.load(alpha + head)
    d = tl.load(decay + head)
    powers, _, reaching, whole = _powers(d, ROWS_LOG, SPANS_LOG)
    span = tl.arange(0, SPANS)[:, None]
    zero = tl.zeros([SPANS, BLOCK], d.dtype)
    state = zero
    if skip is not None:
        weight = tl.load(skip + channel, mask=valid, other=0.0)
    if initial_state is not None and sequence_of is None and carries is None:
        state += tl.load(initial_state + batch * channels + channel, mask=valid, other=0.0)

    x += batch * stride_batch
    position = first * (ROWS * SPANS) + span * ROWS
    following = _load_tile(x, stride_time, channel, valid, position, length, 0.0, ROWS, REVERSE, limit)
    for tile in range(first, last):
        rows = following
        position = tile * (ROWS * SPANS) + span * ROWS
        end = zero
        inputs = ()
        starts = ()
        sequence = _load_sequence(sequence_of, position - 1, length, REVERSE)
        sequence_before = sequence
        for k in tl.static_range(ROWS):
            value = a * rows[k].to(d.dtype)
            previous = sequence
            sequence = _load_sequence(sequence_of, position + k, length, REVERSE)
            begins = sequence != previous
            if initial_state is not None and sequence_of is not None:
                entering = initial_state + sequence.to(tl.int64) * channels + channel
                mask = begins & (sequence >= 0) & valid
                value = tl.fma(d, tl.load(entering, mask=mask, other=0.0), value)
            end = tl.where(begins, value, tl.fma(d, end, value))
            starts = starts + (begins,)
            inputs = inputs + (value,)

        # Gathers want a channel's spans in one warp, loads want a span's channels in one thread. This gather
        # changes to the first layout once; after the last gather, the loads below change back.
        end = _gather_span(end, span)
        for j in tl.static_range(SPANS_LOG):
            joins = span >= (1 << j)
            far = position - (1 << j) * ROWS + (ROWS - 1)
            joins &= _load_sequence(sequence_of, far, length, REVERSE) == sequence
            earlier = _gather_span(end, tl.maximum(span - (1 << j), 0))
            end = tl.where(joins, tl.fma(powers[j], earlier, end), end)
        total = _gather_span(end, span * 0 + (SPANS - 1))
        earlier = _gather_span(end, tl.maximum(span - 1, 0))

        # Load the next tile while the outputs of this one are computed.
        following = _load_tile(
            x, stride_time, channel, valid, position + ROWS * SPANS, length, 0.0, ROWS, REVERSE, limit
        )

        carry = (batch * tiles + tile) * channels + channel
        if y is None:
            tl.store(carries + carry + span * 0, total, mask=valid & (span == 0))
        else:
            if carries is not None:
                state = tl.load(carries + carry + span * 0, mask=valid, other=0.0)
            reached = tl.fma(reaching[0], state, earlier)
            outside = _load_sequence(sequence_of, position - span * ROWS - 1, length, REVERSE)
            reached = tl.where(sequence_before == outside, reached, earlier)
            h = tl.where(span == 0, state, reached)
            closes = _tile_ends_sequence(sequence_of, tile, ROWS * SPANS, length, REVERSE)
            for k in tl.static_range(ROWS):
                at = position + k
                row = length - 1 - at if REVERSE else at
                advanced = tl.fma(d, h, inputs[k])
                h = tl.where(starts[k], inputs[k], advanced)
                result = h
                if skip is not None:
                    result = tl.fma(weight, rows[k].to(d.dtype), h)
                target = y + (batch * length + row) * channels + channel
                tl.store(target, result.to(y.dtype.element_ty), mask=(at < length) & valid)
                if closes:
                    ends, out = _ends_sequence(sequence_of, at, batch, length, REVERSE)
                    tl.store(final_state + out * channels + channel, h, mask=ends & valid)
            if carries is None:
                passed = _advance(state, whole, total)
                last_step = position - span * ROWS + (ROWS * SPANS - 1)
                joins = _load_sequence(sequence_of, last_step, length, REVERSE) == outside
                state = tl.where(joins, passed, total)


@triton.jit
def backward(
    dy,
    x,
    dx,
    dinitial,
    partials,
    carries,
    dfinal,
    alpha,
    decay,
    skip,
    initial_state,
    sequence_of,
    stride_batch_dy,
    stride_time_dy,
    stride_batch,
    stride_time,
    length,
    channels,
    head_dim,
    tiles,
    tiles_per_program,
    LANES: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS_LOG: tl.constexpr,
    SPANS_LOG: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """The gradients, by the regimes of `forward`; `REVERSE` is the direction of this pass, against the scan.

    `carries (2, batch, tiles, channels)` holds `p`, then `r`. `partials (2 or 3, programs, channels)` takes
    the sums for alpha, decay and skip, if any.
    """
    ROWS: tl.constexpr = 1 << ROWS_LOG
    SPANS: tl.constexpr = 1 << SPANS_LOG
    blocks = tl.cdiv(channels, BLOCK)
    block, group, batch, first, last = _program(blocks, tiles, tiles_per_program)
    start = block * BLOCK
    limit = tl.minimum(last * (ROWS * SPANS), length)

    channel = start + tl.arange(0, BLOCK)[None, :]
    valid = channel < channels
    head = tl.minimum(start + tl.arange(0, LANES)[None, :], channels - 1) // head_dim
    a = tl.load(alpha + head)
    d = tl.load(decay + head)
    powers, slopes, reaching, whole = _powers(d, ROWS_LOG, SPANS_LOG)
    span = tl.arange(0, SPANS)[:, None]
    zero = tl.zeros([SPANS, BLOCK], d.dtype)
    p_state = zero
    r_state = zero
    sum_alpha = zero
    sum_decay = zero
    sum_initial = zero
    sum_skip = zero
    if skip is not None:
        weight = tl.load(skip + channel, mask=valid, other=0.0)
    if sequence_of is None and carries is None:
        p_state += tl.load(dfinal + batch * channels + channel, mask=valid, other=0.0)

    dy += batch * stride_batch_dy
    if dx is not None:
        x += batch * stride_batch
    programs = tl.num_programs(0) // blocks
    plane = (programs // tl.cdiv(tiles, tiles_per_program)).to(tl.int64) * tiles * channels
    position = first * (ROWS * SPANS) + span * ROWS
    next_dy = _load_tile(dy, stride_time_dy, channel, valid, position, length, 0.0, ROWS, REVERSE, limit)
    if dx is not None:
        next_x = _load_tile(x, stride_time, channel, valid, position, length, 0.0, ROWS, REVERSE, limit)
    for tile in range(first, last):
        position = tile * (ROWS * SPANS) + span * ROWS
        rows_dy = next_dy
        if dx is not None:
            rows_x = next_x

        g = zero
        r_end = zero
        inputs = ()
        starts = ()
        sequence = _load_sequence(sequence_of, position - 1, length, REVERSE)
        sequence_before = sequence
        for k in tl.static_range(ROWS):
            value = rows_dy[k].to(d.dtype)
            previous = sequence
            sequence = _load_sequence(sequence_of, position + k, length, REVERSE)
            begins = sequence != previous
            if sequence_of is not None:
                entering = dfinal + sequence.to(tl.int64) * channels + channel
                mask = begins & (sequence >= 0) & valid
                value += tl.load(entering, mask=mask, other=0.0)
            g = tl.where(begins, value, tl.fma(d, g, value))
            r_end = tl.where(begins, g, tl.fma(d, r_end, g))
            starts = starts + (begins,)
            inputs = inputs + (value,)
        p_end = d * g

        # Change the layout, as in `forward`.
        p_end = _gather_span(p_end, span)
        r_end = _gather_span(r_end, span)
        for j in tl.static_range(SPANS_LOG):
            joins = span >= (1 << j)
            far = position - (1 << j) * ROWS + (ROWS - 1)
            joins &= _load_sequence(sequence_of, far, length, REVERSE) == sequence
            earlier = tl.maximum(span - (1 << j), 0)
            p_far = _gather_span(p_end, earlier)
            r_far = _gather_span(r_end, earlier)
            r_end = tl.where(joins, tl.fma(powers[j], r_far, tl.fma(slopes[j], p_far, r_end)), r_end)
            p_end = tl.where(joins, tl.fma(powers[j], p_far, p_end), p_end)
        p_total = _gather_span(p_end, span * 0 + (SPANS - 1))
        r_total = _gather_span(r_end, span * 0 + (SPANS - 1))
        p_earlier = _gather_span(p_end, tl.maximum(span - 1, 0))
        r_earlier = _gather_span(r_end, tl.maximum(span - 1, 0))

        ahead = position + ROWS * SPANS
        next_dy = _load_tile(dy, stride_time_dy, channel, valid, ahead, length, 0.0, ROWS, REVERSE, limit)
        if dx is not None:
            next_x = _load_tile(x, stride_time, channel, valid, ahead, length, 0.0, ROWS, REVERSE, limit)

        carry = (batch * tiles + tile) * channels + channel + span * 0
        if dx is None:
            tl.store(carries + carry, p_total, mask=valid & (span == 0))
            tl.store(carries + plane + carry, r_total, mask=valid & (span == 0))
        else:
            if carries is not None:
                p_state = tl.load(carries + carry, mask=valid, other=0.0)
                r_state = tl.load(carries + plane + carry, mask=valid, other=0.0)
            p = tl.fma(reaching[0], p_state, p_earlier)
            r = tl.fma(reaching[0], r_state, tl.fma(reaching[1], p_state, r_earlier))
            outside = _load_sequence(sequence_of, position - span * ROWS - 1, length, REVERSE)
            p = tl.where(sequence_before == outside, p, p_earlier)
            r = tl.where(sequence_before == outside, r, r_earlier)
            p = tl.where(span == 0, p_state, p)
            r = tl.where(span == 0, r_state, r)
            closes = _tile_ends_sequence(sequence_of, tile, ROWS * SPANS, length, REVERSE)
            for k in tl.static_range(ROWS):
                at = position + k
                row = length - 1 - at if REVERSE else at
                g = inputs[k] + p if k == 0 else tl.fma(d, g, inputs[k])
                g = tl.where(starts[k], inputs[k], g)
                r = tl.where(starts[k], zero, r)
                value = rows_x[k].to(d.dtype)
                sum_alpha = tl.fma(g, value, sum_alpha)
                sum_decay = tl.fma(r, value, sum_decay)
                result = a * g
                if skip is not None:
                    output = rows_dy[k].to(d.dtype)
                    sum_skip = tl.fma(output, value, sum_skip)
                    result = tl.fma(weight, output, result)
                target = dx + (batch * length + row) * channels + channel
                tl.store(target, result.to(dx.dtype.element_ty), mask=(at < length) & valid)
                r = tl.fma(d, r, g)
                if closes:
                    ends, out = _ends_sequence(sequence_of, at, batch, length, REVERSE)
                    state = out * channels + channel
                    tl.store(dinitial + state, d * g, mask=ends & valid)
                    if initial_state is not None:
                        initial = tl.load(initial_state + state, mask=ends & valid, other=0.0)
                        sum_initial = tl.where(ends, tl.fma(initial, r, sum_initial), sum_initial)
            if carries is None:
                p_passed = _advance(p_state, whole, p_total)
                r_passed = _advance(r_state, whole, tl.fma(whole[1], p_state, r_total))
                last_step = position - span * ROWS + (ROWS * SPANS - 1)
                joins = _load_sequence(sequence_of, last_step, length, REVERSE) == outside
                p_state = tl.where(joins, p_passed, p_total)
                r_state = tl.where(joins, r_passed, r_total)

    if dx is not None:
        partial = partials + group.to(tl.int64) * channels + channel
        rows_of_partials = programs.to(tl.int64) * channels
        tl.store(partial, tl.sum(sum_alpha, axis=0, keep_dims=True), mask=valid)
        sum_decay = tl.fma(a, sum_decay, sum_initial)
        tl.store(partial + rows_of_partials, tl.sum(sum_decay, axis=0, keep_dims=True), mask=valid)
        if skip is not None:
            tl.store(partial + 2 * rows_of_partials, tl.sum(sum_skip, axis=0, keep_dims=True), mask=valid)


@triton.jit
def chain(
    carries,
    initial,
    decay,
    sequence_of,
    length,
    channels,
    head_dim,
    tiles,
    LANES: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS_LOG: tl.constexpr,
    SPANS_LOG: tl.constexpr,
    AHEAD: tl.constexpr,
    REVERSE: tl.constexpr,
    PAIR: tl.constexpr,
):
    """Replace each tile's end state by the state at its start, in place.

    `carries` is `(batch, tiles, channels)`, or with `PAIR` two of these. `initial (batch, channels)` is the
    state at the first tile's start, unless sequences are packed.
    """
    TILE: tl.constexpr = 1 << (ROWS_LOG + SPANS_LOG)
    blocks = tl.cdiv(channels, BLOCK)
    start = tl.program_id(0) % blocks * BLOCK
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    channel = start + tl.arange(0, BLOCK)[None, :]
    valid = channel < channels
    d = tl.load(decay + tl.minimum(start + tl.arange(0, LANES)[None, :], channels - 1) // head_dim)
    _, _, _, whole = _powers(d, ROWS_LOG, SPANS_LOG)
    plane = (tl.num_programs(0) // blocks).to(tl.int64) * tiles * channels
    carries += batch * tiles * channels + channel

    state = tl.zeros([1, BLOCK], d.dtype)
    second = state
    if initial is not None and sequence_of is None:
        state += tl.load(initial + batch * channels + channel, mask=valid, other=0.0)
    following = _load_ends(carries, channels, channel, channels, tiles, AHEAD)
    if PAIR:
        second_following = _load_ends(carries + plane, channels, channel, channels, tiles, AHEAD)
    for tile in range(0, tiles, AHEAD):
        left = tiles - tile
        ahead = carries + AHEAD * channels
        ends = following
        following = _load_ends(ahead, channels, channel, channels, left - AHEAD, AHEAD)
        if PAIR:
            second_ends = second_following
            second_following = _load_ends(ahead + plane, channels, channel, channels, left - AHEAD, AHEAD)
        for k in tl.static_range(AHEAD):
            entering = carries + k * channels
            mask = channel < tl.where(left > k, channels, 0)
            tl.store(entering, state, mask=mask)
            passed = _advance(state, whole, ends[k])
            if PAIR:
                tl.store(entering + plane, second, mask=mask)
                second_passed = _advance(second, whole, tl.fma(whole[1], state, second_ends[k]))
            at = (tile + k) * TILE
            outside = _load_sequence(sequence_of, at - 1, length, REVERSE)
            joins = outside == _load_sequence(sequence_of, at + TILE - 1, length, REVERSE)
            state = tl.where(joins, passed, ends[k])
            if PAIR:
                second = tl.where(joins, second_passed, second_ends[k])
        carries = ahead


@triton.jit
def _load_ends(carries, step, channel, channels, left, AHEAD: tl.constexpr):
    """The next `AHEAD` end states, `step` apart: tensors `(1, BLOCK)`, zero beyond the `left` last."""
    ends = ()
    for k in tl.static_range(AHEAD):
        mask = channel < tl.where(left > k, channels, 0)
        ends = ends + (tl.load(carries + k * step, mask=mask, other=0.0),)
    return ends
