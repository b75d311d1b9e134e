"""The model's step on CPU: packs the weights, lays out the stages, and runs rows through them."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from mhesa.inference.decoder import kernel, tiles
from mhesa.inference.decoder.matmul import (
    ADD,
    GATE,
    GELU,
    LARGEST_PADDING,
    LARGEST_TILE,
    PANEL,
    WRITE,
    operand_max,
    pack,
    padded,
    padded_columns,
    quantize,
)
from mhesa.inference.surprisal_kernel import surprisal
from mhesa.model.layers import GatedMHESA
from mhesa.model.lm import GatedExponentialSmoothingLM
from mhesa.ops.cpu.arguments import Struct
from mhesa.ops.cpu.atomics import LINE
from mhesa.ops.cpu.compiling import STORED_TYPES, compiled
from mhesa.ops.cpu.threads import available, parallel

# Rows that go through the model together: few enough for their activations to stay in cache.
ROWS = 256
# The fewest rows for which a thread reads all weights by itself.
MIN_SHARE = 64
# Rows of a share where not all logits are wanted, and of a thread's memory: a fast one takes more.
SHARE, LARGEST_SHARE = 128, 256
# Multiplications of a call of many rows: it takes less than a second, so Ctrl-C gets through.
LONG_CALL = 1 << 36
# Below this many multiplications, use one thread: waking a second takes longer than the call.
MIN_PARALLEL = 1 << 16
# The same if small calls are to leave cores free: two threads gain little on fewer multiplications.
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
        self.threads = available()
        rows = max(self.rows, self.threads * LARGEST_SHARE)
        # Explicit, for PyTorch's defaults may be others.
        fp32: Any = {"dtype": torch.float32, "device": "cpu"}
        self.num_tokens, self.dim = model.token_emb.weight.shape
        blocks = [cast(GatedMHESA, block) for block in model.layers]
        inner, hidden = blocks[0].to_gate.in_features, blocks[0].to_out.in_features
        self.kept_alive: list[Tensor] = []
        self.multiplications_per_row = 0
        u_size, v_size = padded(hidden, PANEL), padded(inner, PANEL)
        self.x = torch.zeros(rows, padded(self.dim, PANEL), **fp32)
        self.last = torch.zeros(max_batch, self.x.stride(0), **fp32)
        heads = blocks[0].mhesa.heads if blocks[0].to_alpha is not None else 0
        self.uv = torch.zeros(rows, max(u_size + v_size + padded(2 * heads, PANEL), 2 * self.dim), **fp32)
        self.v, self.rate_logits = self.uv[:, u_size:], self.uv[:, u_size + v_size :]
        widest = padded(max(self.dim, inner, hidden), LARGEST_PADDING)
        stored = torch.int16 if weights == torch.int8 else weights
        # `multiply` reads 16 rows even where fewer are in use.
        self.operand = torch.zeros(padded(rows, LARGEST_TILE), widest, dtype=stored, device="cpu")
        self.scales = torch.zeros(rows, **fp32)
        self.logits = torch.zeros(rows, padded(self.num_tokens, PANEL), **fp32)
        stages = list(self._stages(model, blocks))
        self.stages = (kernel.Stage * len(stages))(*stages)
        self.long_rows = max(ROWS, LONG_CALL // self.multiplications_per_row)
        self.counters = np.zeros((len(stages) + 1, 3, LINE), dtype=np.int64)
        self.row_times = np.zeros(available())
        self.args = kernel.Arguments(
            num_tokens=self.num_tokens,
            stages=ctypes.addressof(self.stages),
            stage_count=len(stages),
            counters=self.counters.ctypes.data,
            x=self.x.data_ptr(),
            x_stride=self.x.stride(0),
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
        args, sequences = self.args, len(offsets) - 1
        threads = self._threads_for(len(ids))
        args.all_logits, args.bits = all_logits, 0
        args.share_rows = args.share_stages = args.own_rows = 0
        if len(ids) > self.rows:
            threads = self._share(len(ids), self.first_output)
        elif threads > 1 and len(ids) >= threads * MIN_SHARE:
            args.share_rows = padded(-(-len(ids) // threads), LARGEST_TILE)
            args.share_stages = self.first_output
        self._call(ids, offsets, state, threads)
        return self.logits[: len(ids) if all_logits else sequences, : self.num_tokens]

    def surprisal(self, ids: Tensor, offsets: Tensor, state: Tensor, targets: Tensor) -> np.ndarray:
        """See `mhesa.inference.decoder.decoder.Engine`."""
        if len(ids) <= self.rows:
            return surprisal(self.run(ids, offsets, state, True), targets)
        found = np.empty(len(ids))
        self.args.all_logits = True
        self.args.targets, self.args.bits = targets.data_ptr(), found.ctypes.data
        self._call(ids, offsets, state, self._share(len(ids), len(self.stages)))
        return found

    def _share(self, rows: int, stages: int) -> int:
        """Have threads take shares through some stages, in memory of their own; return how many threads."""
        threads = min(self._threads_for(rows), self.threads, rows // MIN_SHARE)
        self.args.share_rows = min(SHARE, padded(-(-rows // threads), LARGEST_TILE))
        self.args.own_rows, self.args.share_stages = LARGEST_SHARE, stages
        return threads

    def _threads_for(self, rows: int) -> int:
        return available() if self.multiplications_per_row * rows >= self.min_parallel else 1

    def _call(self, ids: Tensor, offsets: Tensor, state: Tensor, threads: int) -> None:
        args, ids = self.args, ids.contiguous()
        args.rows, args.sequences = len(ids), len(offsets) - 1
        args.threads, args.refused = threads, 0
        args.ids, args.offsets, args.state = ids.data_ptr(), offsets.data_ptr(), state.data_ptr()
        args.layer_stride, args.sequence_stride = state.stride(0), state.stride(1)
        self.counters.fill(0)
        if threads > len(self.row_times):
            self.row_times = np.zeros(threads)
        self.row_times.fill(0)
        args.row_times = self.row_times.ctypes.data
        parallel(self.function, args.address, threads)
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
        yield self._rows(
            kernel.SMOOTH,
            self.v,
            inner,
            layer=index,
            weight=self._vector(mhesa.norm.weight),
            bias=self._vector(mhesa.norm.bias),
            skip=self._vector(mhesa.param_D),
            **self._rates(block),
        )
        yield self._product(GATE, [block.to_gate.weight], self.operand, self.uv)
        gated = self.uv
        if self.weights != torch.float32:
            yield self._rows(kernel.PACK, self.uv, hidden)
            gated = self.operand
        bias = self._vector(block.to_out.bias, padded(self.dim, PANEL))
        yield self._product(ADD, [block.to_out.weight], gated, self.x, bias=bias)

    def _rates(self, block: GatedMHESA) -> dict[str, int]:
        """What the smoothing stage needs to know of a block's rates."""
        mhesa = block.mhesa
        if block.to_alpha is None:
            alpha, decay = mhesa.rates()
            return {"heads": mhesa.heads, "alpha": self._vector(alpha), "decay": self._vector(decay)}
        return {
            "heads": mhesa.heads,
            "alpha": self._vector(mhesa.alphas),
            "decay": self._vector(mhesa.dampen_factors.float().sigmoid()),
            "rate_logits": self.rate_logits.data_ptr(),
        }

    def _rows(self, kind: int, rows: Tensor, columns: int, **fields: int) -> Struct:
        """A stage that reads rows of fp32."""
        return kernel.Stage(
            kind=kind,
            columns=columns,
            operand_max=operand_max(columns),
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
            matrices, sizes = zip(*(quantize(weight.detach()) for weight in weights), strict=True)
            padding = [torch.nn.functional.pad(size, (0, -len(size) % PANEL)) for size in sizes]
            scales = self._vector(torch.cat(padding))
        else:
            matrices = tuple(weight.detach().to(self.weights) for weight in weights)
        panels = torch.cat([pack(matrix) for matrix in matrices])
        self.kept_alive.append(panels)
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
            out=out.data_ptr(),
            out_stride=out.stride(0),
            **fields,
        )

    def _vector(self, vector: Tensor, size: int = 0) -> int:
        """The address of an fp32 copy, padded with zeros to `size`."""
        copy = torch.zeros(vector.shape, dtype=torch.float32, device="cpu").copy_(vector.detach())
        if size:
            copy = torch.nn.functional.pad(copy, (0, size - len(copy)))
        self.kept_alive.append(copy)
        return copy.data_ptr()
