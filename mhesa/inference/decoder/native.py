"""The model's step on CPU: packs the weights, lays out the stages, and runs rows through them."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from mhesa.inference.decoder import kernel, tiles
from mhesa.inference.decoder.matmul import (
    ADD,
    GATE,
    GELU,
    LARGEST_PADDING,
    LARGEST_TILE,
    PANEL,
    WRITE,
    check_int8_columns,
    pack,
    packed_shape,
    padded,
    padded_columns,
    quantize,
)
from mhesa.inference.decoder.statistics_kernel import measure
from mhesa.model.layers import GatedMHESA
from mhesa.model.lm import GatedExponentialSmoothingLM
from mhesa.ops.cpu.arguments import Struct
from mhesa.ops.cpu.atomics import LINE
from mhesa.ops.cpu.compiling import STORED_TYPES, compiled
from mhesa.ops.cpu.memory import empty_hugepages
from mhesa.ops.cpu.threads import available
from mhesa.ops.cpu.workers import parallel_short

# Rows that go through the model together: few enough for their activations to stay in cache.
ROWS = 256
# The fewest rows for which a thread reads all weights by itself.
MIN_SHARE = 64
# Where not all logits are wanted: rows per share if threads are equally fast, and the most rows that a fast
# thread takes at once, which is the size of its buffer. Multiples of a tile.
SHARE, LARGEST_SHARE = 128, 256
# Logits that a thread computes before it reduces them to surprisal, in whole tiles of rows.
LOGITS = 1 << 20
# A call has at most so many rows and about so many multiplications: it ends in a fraction of a second, for
# Ctrl-C and other Python threads to get through.
LONG_ROWS, LONG_CALL = 1 << 14, 1 << 36
# Bytes of a cache line: vectors that lie in two of them take longer.
ALIGNMENT = 64
# Below this many multiplications, use one thread: waking a second takes longer than the call.
MIN_PARALLEL = 1 << 16
# The threshold with `single_thread_small_calls`: two threads gain little on fewer multiplications.
MIN_PARALLEL_SPARING_CORES = 1 << 21


class NativeEngine:
    """A model's weights as the kernel reads them, and the memory it works in.

    Arguments are those of `Decoder`; weights are stored as `torch.float32`, `torch.bfloat16` or `torch.int8`.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: GatedExponentialSmoothingLM,
        weights: torch.dtype,
        max_batch: int,
        single_thread_small_calls: bool,
    ) -> None:
        self.weights, self.rows = weights, max(max_batch, ROWS)
        self.min_parallel = MIN_PARALLEL_SPARING_CORES if single_thread_small_calls else MIN_PARALLEL
        # Threads that have rows of memory to themselves when not all logits are wanted.
        self.threads = max(available(), os.cpu_count() or 1)
        rows = max(self.rows, self.threads * LARGEST_SHARE)
        self.num_tokens, self.dim = model.token_emb.weight.shape
        blocks = [cast(GatedMHESA, block) for block in model.layers]
        inner, hidden = blocks[0].to_gate.in_features, blocks[0].to_out.in_features
        self.kept_alive: list[Tensor] = []
        self.multiplications_per_row = 0
        u_size, v_size = padded(hidden, PANEL), padded(inner, PANEL)
        self.x = _memory(rows, padded(self.dim, PANEL))
        self.last = _memory(max_batch, self.x.stride(0))
        heads = blocks[0].mhesa.heads if blocks[0].to_alpha is not None else 0
        self.uv = _memory(rows, max(u_size + v_size + padded(2 * heads, PANEL), 2 * self.dim))
        self.v, self.rate_logits = self.uv[:, u_size:], self.uv[:, u_size + v_size :]
        widest = padded(max(self.dim, inner, hidden), LARGEST_PADDING)
        stored = torch.uint8 if weights == torch.int8 else weights
        # `multiply` reads 16 rows even where fewer are in use.
        self.operand = _memory(padded(rows, LARGEST_TILE), widest, stored)
        self.scales = _memory(1, rows)
        logits_size = padded(self.num_tokens, PANEL)
        tiles_of_logits = min(max(LOGITS // logits_size // LARGEST_TILE, 1), LARGEST_SHARE // LARGEST_TILE)
        self.logits_rows = tiles_of_logits * LARGEST_TILE
        logits = _memory(max(self.rows, self.threads * self.logits_rows), logits_size)
        self.logits = logits[:, : self.num_tokens]
        # One block of memory for all matrices: in blocks of their own, their ends would lie in small pages.
        matrices = [layer.weight for layer in model.modules() if isinstance(layer, nn.Linear)]
        sizes = [packed_shape(len(matrix), matrix.shape[1], weights).numel() for matrix in matrices]
        self.matrices = self.free = empty_hugepages(torch.Size([sum(sizes)]), weights)
        stages = list(self._stages(model, blocks))
        assert not len(self.free), "every matrix is packed once"
        del self.free
        self.stages = (kernel.Stage * len(stages))(*stages)
        self.long_rows = max(self.rows, min(LONG_ROWS, LONG_CALL // self.multiplications_per_row))
        self.counters = np.zeros((len(stages) + 1, 3, LINE), dtype=np.int64)
        self.args = kernel.Arguments(
            num_tokens=self.num_tokens,
            stages=ctypes.addressof(self.stages),
            stage_count=len(stages),
            counters=self.counters.ctypes.data,
            logits_rows=self.logits_rows,
            last=self.last.data_ptr(),
            uv=self.uv.data_ptr(),
            uv_stride=self.uv.stride(0),
            operand=self.operand.data_ptr(),
            operand_stride=self.operand.stride(0),
            scales=self.scales.data_ptr(),
        )
        self.first_output = sum(not stage.outputs_only for stage in stages)
        variant = "tiles_" if tiles.used_for(STORED_TYPES[weights]) else ""
        self.function = compiled(kernel.run, weights, kernel.Arguments, variant)

    def run(self, ids: Tensor, offsets: Tensor, state: Tensor, all_logits: bool) -> Tensor:
        """See `mhesa.inference.decoder.decoder.Engine`."""
        rows, sequences = ids.shape[0], offsets.shape[0] - 1
        assert rows <= self.rows or not all_logits, "there is memory for no more logits"
        threads = self._threads_for(rows)
        share_rows = own_rows = 0
        enough = rows >= threads * MIN_SHARE
        if rows > self.x.shape[0] or (rows > self.rows and enough):
            threads, share_rows, own_rows = min(threads, self.threads), SHARE, LARGEST_SHARE
        elif threads > 1 and enough:
            share_rows = padded(-(-rows // threads), LARGEST_TILE)
        self.args.share_rows, self.args.own_rows = share_rows, own_rows
        self.args.share_stages = self.first_output if share_rows else 0
        self.args.all_logits, self.args.bits = all_logits, 0
        self._call(ids, offsets, state, threads)
        return self.logits[: rows if all_logits else sequences]

    def surprisal(self, ids: Tensor, offsets: Tensor, state: Tensor, targets: Tensor) -> np.ndarray:
        """See `mhesa.inference.decoder.decoder.Engine`."""
        rows = len(ids)
        if rows <= self.rows:
            return measure(self.run(ids, offsets, state, True), targets, bits_only=True)[0]
        found = np.empty(rows)
        threads = min(self._threads_for(rows), self.threads, rows // MIN_SHARE)
        self.args.share_rows = min(SHARE, padded(-(-rows // threads), LARGEST_TILE))
        self.args.own_rows = LARGEST_SHARE
        self.args.share_stages = len(self.stages)
        self.args.all_logits, self.args.bits = True, found.ctypes.data
        self.args.targets = targets.data_ptr()
        self._call(ids, offsets, state, threads)
        return found

    def _threads_for(self, rows: int) -> int:
        return available() if self.multiplications_per_row * rows >= self.min_parallel else 1

    def _call(self, ids: Tensor, offsets: Tensor, state: Tensor, threads: int) -> None:
        args, ids, row_times = self.args, ids.contiguous(), (ctypes.c_double * threads)()
        args.rows, args.sequences = ids.shape[0], offsets.shape[0] - 1
        args.threads, args.refused, args.row_times = threads, 0, ctypes.addressof(row_times)
        args.ids, args.offsets, args.state = ids.data_ptr(), offsets.data_ptr(), state.data_ptr()
        args.layer_stride, args.sequence_stride = state.stride(0), state.stride(1)
        self.counters.fill(0)
        parallel_short(self.function, args.address, threads)
        if args.refused:
            raise IndexError(f"token ids must be 0 to {self.num_tokens - 1}")

    def _stages(self, model: GatedExponentialSmoothingLM, blocks: list[GatedMHESA]) -> Iterator[Struct]:
        yield kernel.Stage(
            kind=kernel.EMBED,
            columns=self.dim,
            weight=self._vector(model.token_emb.weight),
            out=self.x.data_ptr(),
            out_stride=self.x.stride(0),
        )
        for index, block in enumerate(blocks):
            yield from self._block_stages(index, block)
        yield self._rows(kernel.PACK, self.x, self.dim, outputs_only=True)
        yield self._product(WRITE, [model.to_logits.weight], self.operand, self.logits, outputs_only=True)

    def _block_stages(self, index: int, block: GatedMHESA) -> Iterator[Struct]:
        mhesa, norm = block.mhesa, block.norm
        inner, hidden = block.to_gate.in_features, block.to_out.in_features
        norm_weights = {"weight": self._vector(norm.weight), "bias": self._vector(norm.bias)}
        if block.conv is None:
            yield self._rows(kernel.NORMALISE, self.x, self.dim, **norm_weights)
        else:
            conv, taps = self._vector(block.conv.weight), len(block.conv.weight)
            yield self._rows(
                kernel.CONVOLVE,
                self.x,
                self.dim,
                **norm_weights,
                layer=index,
                conv=conv,
                taps=taps,
                tail=inner,
            )
        matrices = [cast(Any, part)[0].weight for part in (block.to_u, block.to_v)]
        gelu_panels = sum(padded(len(matrix), PANEL) // PANEL for matrix in matrices)
        if block.to_alpha is not None:
            matrices.append(block.to_alpha.weight)
        yield self._product(GELU, matrices, self.operand, self.uv, gelu_panels=gelu_panels)
        if block.to_alpha is None:
            (alpha, decay), rate_logits = mhesa.rates(), 0
        else:
            alpha, decay = mhesa.alphas, mhesa.dampen_factors.float().sigmoid()
            rate_logits = self.rate_logits.data_ptr()
        yield self._rows(
            kernel.SMOOTH,
            self.v,
            inner,
            layer=index,
            weight=self._vector(mhesa.norm.weight),
            bias=self._vector(mhesa.norm.bias),
            skip=self._vector(mhesa.param_D),
            heads=mhesa.heads,
            alpha=self._vector(alpha),
            decay=self._vector(decay),
            rate_logits=rate_logits,
        )
        yield self._product(GATE, [block.to_gate.weight], self.operand, self.uv)
        gated = self.uv
        if self.weights != torch.float32:
            yield self._rows(kernel.PACK, self.uv, hidden)
            gated = self.operand
        bias = self._vector(block.to_out.bias, padded(self.dim, PANEL))
        yield self._product(ADD, [block.to_out.weight], gated, self.x, bias=bias)

    def _rows(self, kind: int, rows: Tensor, columns: int, **fields: int) -> Struct:
        """A stage that reads rows of fp32."""
        return kernel.Stage(
            kind=kind,
            columns=columns,
            rows=rows.data_ptr(),
            row_stride=rows.stride(0),
            **fields,
        )

    def _product(
        self, epilogue: int, weights: list[Tensor], operand: Tensor, out: Tensor, **fields: int
    ) -> Struct:
        """A stage that multiplies packed rows by matrices, whose outputs follow one another."""
        scales = 0
        if self.weights == torch.int8:
            check_int8_columns(weights[0].shape[1])
            matrices, sizes = zip(*(quantize(weight.detach()) for weight in weights), strict=True)
            padding = [torch.nn.functional.pad(size, (0, -len(size) % PANEL)) for size in sizes]
            scales = self._vector(torch.cat(padding))
        else:
            matrices = tuple(weight.detach().to(self.weights) for weight in weights)
        panels = self._pack(matrices)
        self.multiplications_per_row += panels.numel()
        return kernel.Stage(
            kind=kernel.MULTIPLY,
            epilogue=epilogue,
            columns=padded_columns(weights[0].shape[1], self.weights),
            operand=operand.data_ptr(),
            operand_stride=operand.stride(0),
            matrix=panels.data_ptr(),
            matrix_scales=scales,
            panels=len(panels),
            panel_size=panels.stride(0),
            out=out.data_ptr(),
            out_stride=out.stride(0),
            **fields,
        )

    def _pack(self, matrices: Sequence[Tensor]) -> Tensor:
        """The panels of some matrices with as many columns each, one matrix after the other."""
        ends = np.cumsum([padded(len(matrix), PANEL) // PANEL for matrix in matrices])
        shape = packed_shape(int(ends[-1]) * PANEL, matrices[0].shape[1], self.weights)
        panels = self.free[: shape.numel()].view(shape)
        self.free = self.free[shape.numel() :]
        for matrix, part in zip(matrices, torch.tensor_split(panels, ends[:-1].tolist()), strict=True):
            pack(matrix, part)
        return panels

    def _vector(self, vector: Tensor, size: int = 0) -> int:
        """The address of an fp32 copy, padded with zeros to `size`."""
        copy = torch.zeros(vector.shape, dtype=torch.float32, device="cpu").copy_(vector.detach())
        if size:
            copy = torch.nn.functional.pad(copy, (0, size - len(copy)))
        self.kept_alive.append(copy)
        return copy.data_ptr()


def _memory(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Zeros of `(rows, columns)` that take no memory until they are written, as those of torch do."""
    size = rows * columns * dtype.itemsize
    block = np.zeros(size + ALIGNMENT, dtype=np.uint8)
    start = -block.ctypes.data % ALIGNMENT
    return torch.from_numpy(block[start : start + size]).view(dtype).view(rows, columns)
