"""The short convolution on CPU: one pass over memory forward, one backward.

Rows of all sequences are cut into pieces, the tasks. With `x[-1], x[-2], ...` from the initial state,

    y[t] = sum over j of weight[j] * x[t - j]
    dx[t] = sum over j of weight[j] * dy[t + j];  dweight[j] = sum over t of dy[t] * x[t - j]
"""

# Numba finds the types of kernels when it compiles them.
# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mhesa.ops.cpu.arguments import ACCUMULATION, Pointer, struct
from mhesa.ops.cpu.atomics import fence, fetch_add
from mhesa.ops.cpu.compiling import compiled, jit, member, offset
from mhesa.ops.cpu.memory import empty_hugepages
from mhesa.ops.cpu.scan_tiles import fill
from mhesa.ops.cpu.sequences import MIN_PARALLEL, Chunk, Structs, cut_rows, find_sequences
from mhesa.ops.cpu.threads import available, parallel

# Rows of a piece: few enough for sums in fp32, many enough that starting one costs nothing.
PIECE = 256

Arguments = struct(
    "ConvolutionArguments",
    next_piece="int64",
    count="int64",
    length="int64",
    dim="int64",
    taps="int64",
    pieces=Pointer(Chunk),
    x=ACCUMULATION,
    weight=ACCUMULATION,
    state=ACCUMULATION,
    dy=ACCUMULATION,
    out=ACCUMULATION,
    dweights=ACCUMULATION,
)


def forward(x: Tensor, weight: Tensor, state: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """`y` of `x` `(batch, length, dim)`; tensors are of one type, fp32 or fp64.

    For the shapes of the others see `mhesa.ops.convolution.causal_convolution`.
    """
    y = empty_hugepages(x.shape, x.dtype)
    _run(_forward, cu_seqlens, x=x, weight=weight, state=state, out=y)
    return y


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, state: Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`(dx, dweight)`, shaped as `x` and `weight` `(taps, dim)`."""
    dx = empty_hugepages(x.shape, x.dtype)
    dweights = x.new_empty(len(_pieces(x, cu_seqlens)), *weight.shape)
    _run(_backward, cu_seqlens, x=x, weight=weight, state=state, dy=dy, out=dx, dweights=dweights)
    return dx, dweights.sum(0, dtype=torch.float64).to(weight.dtype)


def _run(kernel: Any, cu_seqlens: Tensor | None, **given: Tensor) -> None:
    tensors = {name: tensor.contiguous() for name, tensor in given.items()}
    x, (taps, dim) = tensors["x"], tensors["weight"].shape
    pieces = _pieces(x, cu_seqlens)
    addresses = {name: tensor.data_ptr() for name, tensor in tensors.items()}
    sizes = {"count": len(pieces), "length": x.shape[1], "dim": dim, "taps": taps}
    arguments = Arguments(pieces=pieces.ctypes.data, **sizes, **addresses)
    threads = 1 if x.numel() < MIN_PARALLEL else available()
    parallel(compiled(kernel, x.dtype, Arguments), arguments.address, threads)


def _pieces(x: Tensor, cu_seqlens: Tensor | None) -> Structs:
    pieces: Structs = find_sequences(x.shape[0], x.shape[1], cu_seqlens).cut(cut_rows, PIECE, False)
    return pieces


@jit
def _row(args, values, piece, row):
    """Where a row of the piece's batch is in `values`, which are shaped as `x`."""
    return offset(values, (piece.batch * args.length + row) * args.dim)


@jit
def _row_before(args, piece, row, tap):
    """The row `tap` steps before `row`, from the initial state where the sequence has none."""
    source = row - tap
    if source >= piece.first:
        return _row(args, args.x, piece, source)
    tail = args.taps - 1
    return offset(args.state, ((piece.sequence + 1) * tail + source - piece.first) * args.dim)


@jit
def _add_products(out, a, b, count):
    for i in range(count):
        out[i] += a[i] * b[i]


def _forward(args):
    dim = args.dim
    while True:
        index = fetch_add(member(args, "next_piece"), 1)
        if index >= args.count:
            break
        piece = offset(args.pieces, index)
        for row in range(piece.begin, piece.end):
            out = _row(args, args.out, piece, row)
            fill(out, 0, dim)
            for tap in range(args.taps):
                _add_products(out, offset(args.weight, tap * dim), _row_before(args, piece, row, tap), dim)
    fence()


def _backward(args):
    dim = args.dim
    while True:
        index = fetch_add(member(args, "next_piece"), 1)
        if index >= args.count:
            break
        piece = offset(args.pieces, index)
        dweight = offset(args.dweights, index * args.taps * dim)
        fill(dweight, 0, args.taps * dim)
        for row in range(piece.begin, piece.end):
            out, dy = _row(args, args.out, piece, row), _row(args, args.dy, piece, row)
            fill(out, 0, dim)
            for tap in range(args.taps):
                _add_products(offset(dweight, tap * dim), dy, _row_before(args, piece, row, tap), dim)
                if row + tap < piece.last:
                    weight = offset(args.weight, tap * dim)
                    _add_products(out, weight, _row(args, args.dy, piece, row + tap), dim)
    fence()
