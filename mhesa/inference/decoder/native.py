"""The model's step on CPU: its weights packed, its stages laid out, and rows run through them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from mhesa.inference.decoder import kernel
from mhesa.inference.decoder.matmul import PADDING, PANEL, pack, padded, quantize, row_limit
from mhesa.model.layers import GatedMHESA
from mhesa.model.lm import GatedExponentialSmoothingLM
from mhesa.ops.cpu.simd import compiled
from mhesa.ops.cpu.threads import available, parallel

# Rows that go through the model together: few enough for what becomes of them to stay in cache.
ROWS = 256
# A call of fewer multiplications is done before a second thread has woken.
PARALLEL = 1 << 16
# One of fewer is not much faster on two, which then have no core left for anything else.
SPARING = 1 << 21


class NativeEngine:
    """A model's weights as the kernel reads them, and the memory it works in.

    Args:
        model: the language model; later changes of its weights go unseen.
        weights: `torch.float32`, `torch.bfloat16` or `torch.int8`.
        max_batch: how many sequences a call may have at most.
        sparing: keep small calls to one core.
    """

    @torch.no_grad()
    def __init__(
        self, model: GatedExponentialSmoothingLM, weights: torch.dtype, max_batch: int, sparing: bool
    ) -> None:
        self.weights, self.rows = weights, max(max_batch, ROWS)
        self.parallel = SPARING if sparing else PARALLEL
        rows = self.rows
        self.num_tokens, self.dim = model.token_emb.weight.shape
        blocks = [cast(GatedMHESA, block) for block in model.layers]
        inner, hidden = blocks[0].to_gate.in_features, blocks[0].to_out.in_features
        self.kept: list[Tensor] = []
        self.size = 0
        u_size = padded(hidden, PANEL)
        self.x = torch.zeros(rows, padded(self.dim, PANEL))
        self.uv = torch.zeros(rows, max(u_size + padded(inner, PANEL), self.dim))
        widest = padded(max(self.dim, inner, hidden), PADDING)
        stored = torch.int16 if weights == torch.int8 else weights
        self.operand = torch.zeros(rows, widest, dtype=stored)
        self.steps = torch.zeros(rows)
        self.logits = torch.zeros(rows, padded(self.num_tokens, PANEL))
        self.v = self.uv[:, u_size:]
        stages = list(self._stages(model, blocks))
        self.counters = np.zeros(len(stages) * 2 * kernel.LINE, dtype=np.int64)
        self.table = np.zeros(kernel.FIELDS + len(stages) * kernel.STAGE_FIELDS, dtype=np.int64)
        for field, value in {
            kernel.STAGES: len(stages),
            kernel.NUM_TOKENS: self.num_tokens,
            kernel.X_STEP: self.x.stride(0),
            kernel.UV_STEP: self.uv.stride(0),
            kernel.V: self.v.data_ptr(),
            kernel.OPERAND_STEP: self.operand.stride(0),
            kernel.X: self.x.data_ptr(),
            kernel.UV: self.uv.data_ptr(),
            kernel.OPERAND: self.operand.data_ptr(),
            kernel.STEPS: self.steps.data_ptr(),
            kernel.COUNTERS: self.counters.ctypes.data,
        }.items():
            self.table[field] = value
        body = self.table[kernel.FIELDS :].reshape(len(stages), kernel.STAGE_FIELDS)
        for row, stage in zip(body, stages, strict=True):
            for field, value in stage.items():
                row[field] = value
        self.function = compiled(kernel.run, weights)

    def run(self, ids: Tensor, offsets: Tensor, state: Tensor, every: bool) -> Tensor:
        """See `mhesa.inference.decoder.decoder.Engine`."""
        ids = ids.contiguous()
        table, sequences = self.table, len(offsets) - 1
        threads = available() if self.size * len(ids) >= self.parallel else 1
        table[kernel.ROWS], table[kernel.SEQUENCES], table[kernel.EVERY] = len(ids), sequences, every
        table[kernel.THREADS] = threads
        table[kernel.IDS], table[kernel.OFFSETS] = ids.data_ptr(), offsets.data_ptr()
        table[kernel.STATE] = state.data_ptr()
        table[kernel.STATE_LAYER], table[kernel.STATE_SEQUENCE] = state.stride(0), state.stride(1)
        self.counters.fill(0)
        parallel(self.function, table.ctypes.data, threads)
        if table[kernel.REFUSED]:
            raise IndexError(f"token ids must be 0 to {self.num_tokens - 1}")
        return self.logits[: len(ids) if every else sequences, : self.num_tokens]

    def _stages(
        self, model: GatedExponentialSmoothingLM, blocks: list[GatedMHESA]
    ) -> Iterator[dict[int, int]]:
        yield {
            kernel.KIND: kernel.EMBED,
            kernel.COLUMNS: self.dim,
            kernel.WEIGHT: self._vector(model.token_emb.weight),
        }
        for index, block in enumerate(blocks):
            yield from self._block_stages(index, block)
        yield self._rows(kernel.PACK_OUTPUTS, self.x, self.dim)
        yield self._product(kernel.KEEP, [model.to_logits.weight], self.operand, self.logits)

    def _block_stages(self, index: int, block: GatedMHESA) -> Iterator[dict[int, int]]:
        mhesa, norm = block.mhesa, block.norm
        inner, hidden = block.to_gate.in_features, block.to_out.in_features
        alpha, decay = (gate.float().repeat_interleave(inner // mhesa.heads) for gate in mhesa.gates())
        yield self._rows(kernel.NORMALISE, self.x, self.dim) | {
            kernel.WEIGHT: self._vector(norm.weight),
            kernel.BIAS: self._vector(norm.bias),
        }
        to_u, to_v = (cast(Any, part)[0].weight for part in (block.to_u, block.to_v))
        yield self._product(kernel.GELU, [to_u, to_v], self.operand, self.uv)
        yield self._rows(kernel.SMOOTH, self.v, inner) | {
            kernel.LAYER: index,
            kernel.WEIGHT: self._vector(mhesa.norm.weight),
            kernel.BIAS: self._vector(mhesa.norm.bias),
            kernel.ALPHA: self._vector(alpha),
            kernel.DECAY: self._vector(decay),
            kernel.SKIP: self._vector(mhesa.param_D),
        }
        yield self._product(kernel.GATE, [block.to_gate.weight], self.operand, self.uv)
        gated = self.uv
        if self.weights != torch.float32:
            yield self._rows(kernel.PACK, self.uv, hidden)
            gated = self.operand
        yield self._product(kernel.ADD, [block.to_out.weight], gated, self.x) | {
            kernel.BIAS: self._vector(block.to_out.bias, padded(self.dim, PANEL)),
        }

    def _rows(self, kind: int, source: Tensor, columns: int) -> dict[int, int]:
        return {
            kernel.KIND: kind,
            kernel.COLUMNS: columns,
            kernel.LIMIT: row_limit(columns),
            kernel.SOURCE: source.data_ptr(),
            kernel.SOURCE_STEP: source.stride(0),
        }

    def _product(self, kind: int, weights: list[Tensor], source: Tensor, out: Tensor) -> dict[int, int]:
        steps = 0
        if self.weights == torch.int8:
            matrices, sizes = zip(*(quantize(weight.detach()) for weight in weights), strict=True)
            padding = [torch.nn.functional.pad(size, (0, -len(size) % PANEL)) for size in sizes]
            steps = self._vector(torch.cat(padding))
        else:
            matrices = tuple(weight.detach().to(self.weights) for weight in weights)
        panels = torch.cat([pack(matrix) for matrix in matrices])
        self.kept.append(panels)
        self.size += panels.numel()
        return {
            kernel.KIND: kind,
            kernel.COLUMNS: padded(weights[0].shape[1], PADDING),
            kernel.PANELS: len(panels),
            kernel.MATRIX: panels.data_ptr(),
            kernel.MATRIX_STEPS: steps,
            kernel.SOURCE: source.data_ptr(),
            kernel.SOURCE_STEP: source.stride(0),
            kernel.OUT: out.data_ptr(),
            kernel.OUT_STEP: out.stride(0),
        }

    def _vector(self, vector: Tensor, size: int = 0) -> int:
        """The address of an fp32 copy."""
        copy = vector.detach().float().contiguous().clone()
        if size:
            copy = torch.nn.functional.pad(copy, (0, size - len(copy)))
        self.kept.append(copy)
        return copy.data_ptr()
