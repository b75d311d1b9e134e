"""The model's state as a transformers cache."""

from __future__ import annotations

import copy
from dataclasses import fields
from typing import Any, cast

from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from mhesa.hf.configuration import CACHE_NAMES, MhesaConfig

# Name of the cache in this version of transformers, as an argument and in outputs.
CACHE = next(field.name for field in fields(CausalLMOutputWithPast) if field.name in CACHE_NAMES)


class MhesaCacheLayer(CacheLayerMixin):
    """One block's state, `(batch, state_size)` in fp32, and the number of tokens seen.

    `state_size` is `dim_mhesa`, and `(conv_size - 1) * hidden_size` more with a convolution.

    A state tensor is never modified in place, so copies of a cache, deep ones too, share it.
    """

    is_sliding = False
    supports_early_init = False

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.state: Tensor | None = None
        self.seen = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> MhesaCacheLayer:
        return copy.copy(self)

    @property
    def batch_size(self) -> int:
        """Number of sequences; -1 while there is no state."""
        return -1 if self.state is None else self.state.shape[0]

    def advance(self, state: Tensor, length: int) -> None:
        """Set the state after `length` more tokens."""
        self.state = state
        self.seen += length
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Raise `TypeError`: there are no keys and values."""
        raise TypeError("a MhesaCache holds states, not keys and values; it serves mhesa models only")

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Raise `TypeError`: there are no keys and values."""
        self.lazy_initialization(key_states, value_states)

    def get_seq_length(self) -> int:
        """Tokens seen, padding included."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of a mask over the tokens seen and `query_length` more."""
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        """-1: any length fits."""
        return -1

    # Its name in transformers 5.6.
    get_max_cache_shape = get_max_length

    def reset(self) -> None:
        """Remove the state."""
        self.state = None
        self.seen = 0
        self.is_initialized = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Make row `i` continue the sequence of row `beam_idx[i]`."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times, copies next to each other."""
        if self.state is not None:
            self.state = self.state.repeat_interleave(repeats, dim=0)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows at `indices`."""
        if self.state is not None:
            self.state = self.state[indices.to(self.state.device)]

    def crop(self, *args: Any, **kwargs: Any) -> None:
        """Raise `ValueError`: tokens cannot be removed from a state."""
        raise ValueError("a state cannot forget its last tokens; copy.deepcopy the cache before it gets them")


class MhesaCache(Cache):
    """The state of a batch of sequences, a few kilobytes at any length.

    Models take it as `cache`, its name since transformers 5.24, or as `past_key_values`, its name before.

    Args:
        config: the configuration of the model.

    >>> import torch
    >>> from mhesa.hf import MhesaForCausalLM
    >>> config = MhesaConfig(hidden_size=16, num_hidden_layers=2, heads=2, dim_mhesa=8)
    >>> model, cache = MhesaForCausalLM(config).eval(), MhesaCache(config)
    >>> ids = torch.randint(256, (1, 10))
    >>> _ = model(ids[:, :6], cache=cache)
    >>> rest = model(ids[:, 6:], cache=cache).logits
    >>> torch.allclose(rest, model(ids).logits[:, 6:], atol=1e-5)
    True
    >>> cache.get_seq_length()
    10
    """

    def __init__(self, config: MhesaConfig) -> None:
        super().__init__(layers=[MhesaCacheLayer() for _ in range(config.num_hidden_layers)])

    def states(self, sequences: int) -> list[Tensor] | None:
        """Each block's state, `(sequences, state_size)`; `None` before the first token.

        Raises:
            ValueError: the cache holds another number of sequences.
        """
        layers = cast(list[MhesaCacheLayer], self.layers)
        states = [layer.state for layer in layers if layer.state is not None]
        if not states:
            return None
        if states[0].shape[0] != sequences:
            raise ValueError(
                f"the cache holds {states[0].shape[0]} sequences and this batch has {sequences}: "
                "pass the cache of these sequences, or none to start new ones"
            )
        return states

    def advance(self, states: list[Tensor], length: int) -> None:
        """Set the blocks' states after `length` more tokens."""
        for layer, state in zip(self.layers, states, strict=True):
            cast(MhesaCacheLayer, layer).advance(state, length)


def only_cache(cache: Cache | None, past_key_values: Cache | None) -> MhesaCache | None:
    """The cache, by whichever of its two names it was passed; `None` if by neither.

    Raises:
        TypeError: passed by both names, or a cache of another class.
    """
    if cache is not None and past_key_values is not None:
        raise TypeError("cache and past_key_values are two names of one argument: pass one of them")
    given = past_key_values if cache is None else cache
    if given is not None and not isinstance(given, MhesaCache):
        raise TypeError(
            f"the cache must be a MhesaCache, not a {type(given).__name__}: "
            "make it with MhesaCache(model.config), or pass none"
        )
    return given
