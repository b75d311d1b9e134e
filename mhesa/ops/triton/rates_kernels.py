"""The Triton kernels of the scan at rates of every step.

The tiles, spans and regimes are those of `mhesa.ops.triton.kernels`, which explains them. Here the decay of a
span is a product of its rows' decays, which is combined over spans beside the end states: a span of product
`d` and end state `e` takes the state `h` before it to `d * h + e`. A block has `HEADS` heads of `DIMS`
channels each, or `DIMS` channels of one wider head.

The forward pass stores the state at the start of each tile. The backward pass takes the tiles from last to
first: it runs a tile forward again from there, with the state before each row in registers, and carries `p`,
the gradient that a state gets from later rows, back through the tile, which is a scan of the same kind:

    g = dy + p;  dx = alpha * g + skip * dy;  p' = decay * g
    dalpha = sum over head_dim of g * x;  ddecay = sum over head_dim of g * h[t-1];  dskip = sum dy * x

Both passes count steps in the direction of the scan. Steps beyond the end have a decay of one and inputs of
zero, so that they leave a state as it is.
"""

# Kernels are written in Triton's language: without types that mypy knows, constants in capitals.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# mypy: disable-error-code="assignment"
# ruff: noqa: N803, RUF005

from __future__ import annotations

import triton
import triton.language as tl

from mhesa.ops.triton.kernels import (
    _ends_sequence,
    _gather_span,
    _load_ends,
    _load_sequence,
    _load_tile,
    _program,
    _tile_ends_sequence,
)


@triton.jit
def _lanes(block, heads, head_dim, HEADS: tl.constexpr, DIMS: tl.constexpr):
    """Head, channel and validity of each lane of a block, `(1, HEADS * DIMS)`."""
    parts = tl.cdiv(head_dim, DIMS)
    lane = tl.arange(0, HEADS * DIMS)[None, :]
    head = block // parts * HEADS + lane // DIMS
    within = block % parts * DIMS + lane % DIMS
    return head, head * head_dim + within, (head < heads) & (within < head_dim)


@triton.jit
def _combine(
    end, product, sequence_of, sequence, position, length, SPANS_LOG, ROWS, REVERSE, BACKWARD: tl.constexpr
):
    """End state and product of each span together with all spans before it, or with `BACKWARD` after it.

    `sequence` is that of the span's last step, with `BACKWARD` of its first.
    """
    SPANS: tl.constexpr = 1 << SPANS_LOG
    span = tl.arange(0, SPANS)[:, None]
    for j in tl.static_range(SPANS_LOG):
        if BACKWARD:
            joins = span + (1 << j) < SPANS
            other = tl.minimum(span + (1 << j), SPANS - 1)
            far = position + (1 << j) * ROWS
        else:
            joins = span >= (1 << j)
            other = tl.maximum(span - (1 << j), 0)
            far = position - (1 << j) * ROWS + (ROWS - 1)
        joins &= _load_sequence(sequence_of, far, length, REVERSE) == sequence
        far_end = _gather_span(end, other)
        far_product = _gather_span(product, other)
        end = tl.where(joins, tl.fma(product, far_end, end), end)
        product = tl.where(joins, product * far_product, product)
    return end, product


@triton.jit
def _scan_spans(
    rows,
    a,
    d,
    initial_state,
    sequence_of,
    channel,
    channels,
    valid,
    position,
    length,
    SPANS_LOG,
    ROWS,
    REVERSE,
):
    """Scan every span from zero, and combine the spans.

    Returns the inputs `alpha * x` of each step, and at a packed sequence's first step what its initial state
    adds to that; whether each step is such a first one; end states and products of the spans up to each.
    """
    end = tl.zeros_like(d[0])
    product = end + 1
    inputs = ()
    firsts = ()
    sequence = _load_sequence(sequence_of, position - 1, length, REVERSE)
    for k in tl.static_range(ROWS):
        value = a[k] * rows[k].to(d[k].dtype)
        previous = sequence
        sequence = _load_sequence(sequence_of, position + k, length, REVERSE)
        first = sequence != previous
        if initial_state is not None and sequence_of is not None:
            entering = initial_state + sequence.to(tl.int64) * channels + channel
            mask = first & (sequence >= 0) & valid
            value = tl.fma(d[k], tl.load(entering, mask=mask, other=0.0), value)
        end = tl.where(first, value, tl.fma(d[k], end, value))
        firsts = firsts + (first,)
        product = product * d[k]
        inputs = inputs + (value,)
    end, product = _combine(
        end, product, sequence_of, sequence, position, length, SPANS_LOG, ROWS, REVERSE, False
    )
    return inputs, firsts, end, product


@triton.jit
def _span_starts(end, product, state, sequence_of, position, span, length, ROWS, REVERSE):
    """The state at the start of each span, from that at the start of the tile."""
    earlier = tl.maximum(span - 1, 0)
    far_end = _gather_span(end, earlier)
    reached = tl.fma(_gather_span(product, earlier), state, far_end)
    outside = _load_sequence(sequence_of, position - span * ROWS - 1, length, REVERSE)
    before = _load_sequence(sequence_of, position - 1, length, REVERSE)
    reached = tl.where(before == outside, reached, far_end)
    return tl.where(span == 0, state, reached)


@triton.jit
def _head_sums(values, HEADS: tl.constexpr, DIMS: tl.constexpr):
    """The sums over each head's channels in the block, `(SPANS, HEADS)`."""
    return tl.sum(tl.reshape(values, (values.shape[0], HEADS, DIMS)), axis=2)


@triton.jit
def forward(
    x,
    y,
    final_state,
    states,
    ends,
    alpha,
    decay,
    skip,
    initial_state,
    sequence_of,
    stride_batch,
    stride_time,
    alpha_batch,
    alpha_time,
    alpha_head,
    decay_batch,
    decay_time,
    decay_head,
    length,
    heads,
    head_dim,
    tiles,
    tiles_per_program,
    WHOLE: tl.constexpr,
    HEADS: tl.constexpr,
    DIMS: tl.constexpr,
    ROWS_LOG: tl.constexpr,
    SPANS_LOG: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """The scan of `tiles_per_program` tiles.

    With `WHOLE` the whole scan, which writes the state at the start of each tile to
    `states (batch, tiles, channels)`, and outputs if there is a `y`. Otherwise, with
    `ends (2, batch, tiles, channels)`, the tiles' end states from zero and products, written there; without
    it the outputs, from `states`.
    """
    ROWS: tl.constexpr = 1 << ROWS_LOG
    SPANS: tl.constexpr = 1 << SPANS_LOG
    channels = heads * head_dim
    blocks = tl.cdiv(heads, HEADS) * tl.cdiv(head_dim, DIMS)
    block, _, batch, first_tile, last_tile = _program(blocks, tiles, tiles_per_program)
    head, channel, valid = _lanes(block, heads, head_dim, HEADS, DIMS)
    batches = (tl.num_programs(0) // blocks // tl.cdiv(tiles, tiles_per_program)).to(tl.int64)
    plane = batches * tiles * channels

    span = tl.arange(0, SPANS)[:, None]
    x += batch * stride_batch
    alpha += batch * alpha_batch
    decay += batch * decay_batch
    state = tl.zeros([SPANS, HEADS * DIMS], alpha.dtype.element_ty)
    if skip is not None:
        weight = tl.load(skip + channel, mask=valid, other=0.0)
    if WHOLE and initial_state is not None and sequence_of is None:
        state += tl.load(initial_state + batch * channels + channel, mask=valid, other=0.0)

    for tile in range(first_tile, last_tile):
        position = tile * (ROWS * SPANS) + span * ROWS
        rows = _load_tile(x, stride_time, channel, valid, position, length, 0.0, ROWS, REVERSE)
        a = _load_tile(alpha, alpha_time, head * alpha_head, valid, position, length, 0.0, ROWS, REVERSE)
        d = _load_tile(decay, decay_time, head * decay_head, valid, position, length, 1.0, ROWS, REVERSE)
        inputs, firsts, end, product = _scan_spans(
            rows, a, d, initial_state, sequence_of, channel, channels, valid, position, length,
            SPANS_LOG, ROWS, REVERSE,
        )  # fmt: skip
        total = _gather_span(end, span * 0 + (SPANS - 1))
        whole = _gather_span(product, span * 0 + (SPANS - 1))
        carry = (batch * tiles + tile) * channels + channel + span * 0
        if ends is not None:
            tl.store(ends + carry, total, mask=valid & (span == 0))
            tl.store(ends + plane + carry, whole, mask=valid & (span == 0))
        else:
            if WHOLE:
                tl.store(states + carry, state, mask=valid & (span == 0))
            else:
                state = tl.load(states + carry, mask=valid, other=0.0)
            h = _span_starts(end, product, state, sequence_of, position, span, length, ROWS, REVERSE)
            closes = _tile_ends_sequence(sequence_of, tile, ROWS * SPANS, length, REVERSE)
            for k in tl.static_range(ROWS):
                at = position + k
                row = length - 1 - at if REVERSE else at
                advanced = tl.fma(d[k], h, inputs[k])
                h = tl.where(firsts[k], inputs[k], advanced)
                if y is not None:
                    result = h
                    if skip is not None:
                        result = tl.fma(weight, rows[k].to(h.dtype), h)
                    target = y + (batch * length + row) * channels + channel
                    tl.store(target, result.to(y.dtype.element_ty), mask=(at < length) & valid)
                if closes:
                    last, sequence = _ends_sequence(sequence_of, at, batch, length, REVERSE)
                    tl.store(final_state + sequence * channels + channel, h, mask=last & valid)
            if WHOLE:
                passed = tl.fma(whole, state, total)
                start = position - span * ROWS
                outside = _load_sequence(sequence_of, start - 1, length, REVERSE)
                inside = _load_sequence(sequence_of, start + (ROWS * SPANS - 1), length, REVERSE)
                state = tl.where(inside == outside, passed, total)


@triton.jit
def backward(
    dy,
    x,
    dx,
    dalpha,
    ddecay,
    dskip,
    dinitial,
    states,
    ends,
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
    alpha_batch,
    alpha_time,
    alpha_head,
    decay_batch,
    decay_time,
    decay_head,
    length,
    heads,
    head_dim,
    tiles,
    tiles_per_program,
    HEADS: tl.constexpr,
    DIMS: tl.constexpr,
    ROWS_LOG: tl.constexpr,
    SPANS_LOG: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """The gradients, from the last tile to the first; `REVERSE` is the direction of the scan.

    With `ends (2, batch, tiles, channels)`, `p` from zero before each tile and the products, written there.
    Otherwise all gradients: from `carries (batch, tiles, channels)`, the `p` after each tile, or without them
    carrying `p` through the whole sequence. `dalpha` and `ddecay` are `(parts, batch, length, heads)`, sums
    over the `DIMS` channels of each part of a head; `dskip (programs, channels)` are sums over a program's
    steps.
    """
    ROWS: tl.constexpr = 1 << ROWS_LOG
    SPANS: tl.constexpr = 1 << SPANS_LOG
    channels = heads * head_dim
    parts = tl.cdiv(head_dim, DIMS)
    blocks = tl.cdiv(heads, HEADS) * parts
    block, group, batch, first_tile, last_tile = _program(blocks, tiles, tiles_per_program)
    head, channel, valid = _lanes(block, heads, head_dim, HEADS, DIMS)
    batches = (tl.num_programs(0) // blocks // tl.cdiv(tiles, tiles_per_program)).to(tl.int64)
    plane = batches * tiles * channels

    span = tl.arange(0, SPANS)[:, None]
    dy += batch * stride_batch_dy
    alpha += batch * alpha_batch
    decay += batch * decay_batch
    zero = tl.zeros([SPANS, HEADS * DIMS], alpha.dtype.element_ty)
    p_state = zero
    sum_skip = zero
    if skip is not None:
        weight = tl.load(skip + channel, mask=valid, other=0.0)
    if ends is None:
        x += batch * stride_batch
        rate_head = block // parts * HEADS + tl.arange(0, HEADS)[None, :]
        rate = (block % parts * batches + batch) * length * heads + rate_head
        if carries is None and sequence_of is None:
            p_state += tl.load(dfinal + batch * channels + channel, mask=valid, other=0.0)

    for countdown in range(last_tile - first_tile):
        tile = last_tile - 1 - countdown
        position = tile * (ROWS * SPANS) + span * ROWS
        rows_dy = _load_tile(dy, stride_time_dy, channel, valid, position, length, 0.0, ROWS, REVERSE)
        d = _load_tile(decay, decay_time, head * decay_head, valid, position, length, 1.0, ROWS, REVERSE)

        # From last to first: the gradients that outputs and final states add to `p`.
        sequence = _load_sequence(sequence_of, position + ROWS, length, REVERSE)
        g = zero
        product = zero + 1
        inputs = ()
        lasts = ()
        for k in tl.static_range(ROWS - 1, -1, -1):
            value = rows_dy[k].to(zero.dtype)
            g = value if k == ROWS - 1 else tl.fma(d[k + 1], g, value)
            following = sequence
            sequence = _load_sequence(sequence_of, position + k, length, REVERSE)
            last = sequence != following
            if sequence_of is not None:
                entering = dfinal + sequence.to(tl.int64) * channels + channel
                value += tl.load(entering, mask=last & (sequence >= 0) & valid, other=0.0)
            g = tl.where(last, value, g)
            lasts = (last,) + lasts
            product = product * d[k]
            inputs = (value,) + inputs
        end, product = _combine(
            d[0] * g, product, sequence_of, sequence, position, length, SPANS_LOG, ROWS, REVERSE, True
        )
        total = _gather_span(end, span * 0)
        whole = _gather_span(product, span * 0)

        carry = (batch * tiles + tile) * channels + channel + span * 0
        if ends is not None:
            tl.store(ends + carry, total, mask=valid & (span == 0))
            tl.store(ends + plane + carry, whole, mask=valid & (span == 0))
        else:
            if carries is not None:
                p_state = tl.load(carries + carry, mask=valid, other=0.0)
            later = tl.minimum(span + 1, SPANS - 1)
            far_end = _gather_span(end, later)
            p = tl.fma(_gather_span(product, later), p_state, far_end)
            after = _load_sequence(sequence_of, position - span * ROWS + ROWS * SPANS, length, REVERSE)
            joins = _load_sequence(sequence_of, position + ROWS, length, REVERSE) == after
            p = tl.where(joins, p, far_end)
            p = tl.where(span == SPANS - 1, p_state, p)

            # From first to last: the state before each step.
            rows = _load_tile(x, stride_time, channel, valid, position, length, 0.0, ROWS, REVERSE)
            a = _load_tile(alpha, alpha_time, head * alpha_head, valid, position, length, 0.0, ROWS, REVERSE)
            values, firsts, h_end, h_product = _scan_spans(
                rows, a, d, initial_state, sequence_of, channel, channels, valid, position, length,
                SPANS_LOG, ROWS, REVERSE,
            )  # fmt: skip
            state = tl.load(states + carry, mask=valid, other=0.0)
            h = _span_starts(h_end, h_product, state, sequence_of, position, span, length, ROWS, REVERSE)
            states_before = ()
            for k in tl.static_range(ROWS):
                initial = zero
                if initial_state is not None and sequence_of is not None:
                    index = _load_sequence(sequence_of, position + k, length, REVERSE)
                    entering = initial_state + index.to(tl.int64) * channels + channel
                    initial += tl.load(entering, mask=firsts[k] & (index >= 0) & valid, other=0.0)
                states_before = states_before + (tl.where(firsts[k], initial, h),)
                h = tl.where(firsts[k], values[k], tl.fma(d[k], h, values[k]))

            for k in tl.static_range(ROWS - 1, -1, -1):
                at = position + k
                row = length - 1 - at if REVERSE else at
                inside = at < length
                g = inputs[k] + p if k == ROWS - 1 else tl.fma(d[k + 1], g, inputs[k])
                g = tl.where(lasts[k], inputs[k], g)
                value = rows[k].to(zero.dtype)
                result = a[k] * g
                if skip is not None:
                    output = rows_dy[k].to(zero.dtype)
                    sum_skip = tl.fma(output, value, sum_skip)
                    result = tl.fma(weight, output, result)
                target = dx + (batch * length + row) * channels + channel
                tl.store(target, result.to(dx.dtype.element_ty), mask=inside & valid)
                at_rate = rate + row * heads
                mask = inside & (rate_head < heads)
                tl.store(dalpha + at_rate, _head_sums(g * value, HEADS, DIMS), mask=mask)
                tl.store(ddecay + at_rate, _head_sums(g * states_before[k], HEADS, DIMS), mask=mask)
                if sequence_of is None:
                    starts = at == 0
                    index = at * 0 + batch
                else:
                    starts = firsts[k] & inside
                    index = _load_sequence(sequence_of, at, length, REVERSE).to(tl.int64)
                tl.store(dinitial + index * channels + channel, d[k] * g, mask=starts & valid)
            if carries is None:
                passed = tl.fma(whole, p_state, total)
                start = position - span * ROWS
                first = _load_sequence(sequence_of, start, length, REVERSE)
                after = _load_sequence(sequence_of, start + ROWS * SPANS, length, REVERSE)
                p_state = tl.where(first == after, passed, total)

    if ends is None and skip is not None:
        partial = dskip + group.to(tl.int64) * channels + channel
        tl.store(partial, tl.sum(sum_skip, axis=0, keep_dims=True), mask=valid)


@triton.jit
def chain(
    ends,
    entering,
    initial,
    sequence_of,
    length,
    channels,
    tiles,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    AHEAD: tl.constexpr,
    BACKWARD: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """The state at each tile's start, or with `BACKWARD` the `p` at its end, `(batch, tiles, channels)`.

    `ends (2, batch, tiles, channels)` holds end states and products. `initial (batch, channels)` enters the
    first tile, unless sequences are packed.
    """
    blocks = tl.cdiv(channels, BLOCK)
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    channel = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)[None, :]
    valid = channel < channels
    plane = (tl.num_programs(0) // blocks).to(tl.int64) * tiles * channels
    step = -channels if BACKWARD else channels
    begin = (batch * tiles + (tiles - 1 if BACKWARD else 0)) * channels + channel
    ends += begin
    entering += begin

    state = tl.zeros([1, BLOCK], ends.dtype.element_ty)
    if initial is not None and sequence_of is None:
        state += tl.load(initial + batch * channels + channel, mask=valid, other=0.0)
    following = _load_ends(ends, step, channel, channels, tiles, AHEAD)
    following_products = _load_ends(ends + plane, step, channel, channels, tiles, AHEAD)
    for tile in range(0, tiles, AHEAD):
        left = tiles - tile
        totals = following
        products = following_products
        ends += AHEAD * step
        following = _load_ends(ends, step, channel, channels, left - AHEAD, AHEAD)
        following_products = _load_ends(ends + plane, step, channel, channels, left - AHEAD, AHEAD)
        for k in tl.static_range(AHEAD):
            tl.store(entering + k * step, state, mask=channel < tl.where(left > k, channels, 0))
            passed = tl.fma(products[k], state, totals[k])
            start = (tiles - 1 - tile - k if BACKWARD else tile + k) * TILE
            if BACKWARD:
                outside = _load_sequence(sequence_of, start + TILE, length, REVERSE)
                inside = _load_sequence(sequence_of, start, length, REVERSE)
            else:
                outside = _load_sequence(sequence_of, start - 1, length, REVERSE)
                inside = _load_sequence(sequence_of, start + TILE - 1, length, REVERSE)
            state = tl.where(inside == outside, passed, totals[k])
        entering += AHEAD * step
