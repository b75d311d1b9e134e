"""Engines of a decoder that run the model's own layers: for devices and types without native code."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mhesa.inference.statistics import BITS, token_statistics
from mhesa.model.lm import GatedExponentialSmoothingLM, run_blocks


class LayersEngine:
    """Runs the model as it is; its weights are not copied."""

    # Enough to keep a GPU busy.
    rows = long_rows = 4096

    def __init__(self, model: GatedExponentialSmoothingLM) -> None:
        self.model = model

    @torch.inference_mode()
    def run(self, ids: Tensor, offsets: Tensor, state: Tensor, all_logits: bool) -> Tensor:
        """See `mhesa.inference.decoder.decoder.Engine`."""
        size = self.model.token_emb.num_embeddings
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < size:
            raise IndexError(f"token ids must be 0 to {size - 1}")
        device = self.model.to_logits.weight.device
        if len(ids) == len(offsets) - 1:
            return self._step(ids.to(device), state).to(state.dtype)
        hidden, states = run_blocks(
            self.model.layers, self.model.token_emb(ids[None].to(device)), state, offsets.to(device)
        )
        state.copy_(torch.stack(states))
        rows = hidden[0] if all_logits else hidden[0, offsets[1:].to(device) - 1]
        return self.model.to_logits(rows).to(state.dtype)

    def surprisal(self, ids: Tensor, offsets: Tensor, state: Tensor, targets: Tensor) -> np.ndarray:
        """See `mhesa.inference.decoder.decoder.Engine`."""
        return token_statistics(self.run(ids, offsets, state, True), targets, BITS)["bits"]

    def _step(self, ids: Tensor, state: Tensor) -> Tensor:
        logits, after = self.model.step(ids, state)
        state.copy_(after)
        return logits


class GraphEngine(LayersEngine):
    """Captures the step as a CUDA graph for each batch size: one launch for all layers."""

    def __init__(self, model: GatedExponentialSmoothingLM) -> None:
        super().__init__(model)
        self.graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor, Tensor, Tensor]] = {}

    def _step(self, ids: Tensor, state: Tensor) -> Tensor:
        graph, static_ids, static_state, logits = self.graphs.get(len(ids)) or self._capture(ids, state)
        static_ids.copy_(ids)
        static_state.copy_(state)
        graph.replay()
        state.copy_(static_state)
        return logits

    def _capture(self, ids: Tensor, state: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor, Tensor]:
        static_ids, static_state = ids.clone(), state.contiguous().clone()
        # The first calls initialise libraries, which cannot be captured.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                super()._step(static_ids, static_state)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = super()._step(static_ids, static_state)
        self.graphs[len(ids)] = graph, static_ids, static_state, logits
        return self.graphs[len(ids)]
