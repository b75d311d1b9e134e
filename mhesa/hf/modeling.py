"""The model as classes of transformers, for `AutoModelForCausalLM`, `generate` and `Trainer`.

Padding is removed before the model runs: the real tokens of a padded batch are packed end to end, run as
separate sequences and put back in their places. Padding on the left, on the right or in between changes no
output, no gradient and no state.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from mhesa.hf.cache import MhesaCache, MhesaCacheLayer, check_cache
from mhesa.hf.configuration import MhesaConfig
from mhesa.hf.packing import offsets, real_tokens, unpack, without_first_tokens
from mhesa.model.config import ModelConfig
from mhesa.model.layers import MHESA, CausalConv, GatedMHESA, identity_taps, spread_rates
from mhesa.model.lm import GatedExponentialSmoothingLM, run_blocks
from mhesa.model.loading import KEPT_IN_FP32, saved_name
from mhesa.model.loss import LARGE_VOCABULARY, next_token_loss
from mhesa.tokenizers.bytes import END_OF_TEXT_ID

__all__ = ["MhesaCache", "MhesaCacheLayer", "MhesaForCausalLM", "MhesaModel", "MhesaPreTrainedModel"]


class MhesaBlock(GradientCheckpointingLayer, GatedMHESA):
    """`GatedMHESA` with transformers' gradient checkpointing."""


class MhesaPreTrainedModel(PreTrainedModel):
    """Base class of both models: initial weights, and how weights are named and loaded."""

    config: MhesaConfig
    config_class = MhesaConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _is_stateful = True
    _no_split_modules = ["MhesaBlock"]  # noqa: RUF012 not a ClassVar there
    _keep_in_fp32_modules_strict = set(KEPT_IN_FP32)  # noqa: RUF012

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        return cast(MhesaModel, self.base_model).token_emb

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embedding."""
        self.base_model.token_emb = value

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding | nn.LayerNorm):
            module.reset_parameters()
        elif isinstance(module, MHESA):
            # Not at the block: transformers passes over modules that have no parameters of their own.
            if self.config.adaptive:
                alphas, dampen_factors = spread_rates(module.heads)
                init.copy_(module.alphas, alphas)
                init.copy_(module.dampen_factors, dampen_factors)
            else:
                init.normal_(module.alphas)
                init.normal_(module.dampen_factors)
            init.normal_(module.param_D)
        elif isinstance(module, CausalConv):
            init.copy_(module.weight, identity_taps(*module.weight.shape))


class MhesaModel(MhesaPreTrainedModel):
    """Embedding and blocks, without a head; parameters are named as in `GatedExponentialSmoothingLM`.

    >>> config = MhesaConfig(hidden_size=16, num_hidden_layers=2, heads=2, dim_mhesa=8)
    >>> MhesaModel(config)(torch.randint(256, (1, 5))).last_hidden_state.shape
    torch.Size([1, 5, 16])
    """

    def __init__(self, config: MhesaConfig) -> None:
        super().__init__(config)
        sizes = config.to_model_config()
        self.token_emb = nn.Embedding(sizes.num_tokens, sizes.dim)
        self.layers = nn.ModuleList(MhesaBlock(**sizes.block_arguments()) for _ in range(sizes.depth))
        self.post_init()  # type: ignore[no-untyped-call]

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cu_seqlens: Tensor | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states of a batch.

        Args:
            input_ids: `(batch, length)`.
            attention_mask: `(batch, length)`, or with the tokens of `past_key_values` before these; 0 is
                padding, anywhere. Outputs there are 0.
            past_key_values: the `MhesaCache` of the tokens before; this call updates it.
            inputs_embeds: `(batch, length, hidden_size)` in place of `input_ids`.
            use_cache: return the state; by default as the configuration says, except in training.
            cu_seqlens: offsets of sequences packed into a batch of 1, `(sequences + 1,)`; the cache then
                holds as many sequences. Taken from `cu_seq_lens_q`, or from `position_ids` that start
                again at 0, as `DataCollatorWithFlattening` sends them, where not given.
            output_hidden_states: also return the input of each block, and the output.
            kwargs: ignored, except `cu_seq_lens_q` and `position_ids`.

        Raises:
            TypeError: a cache of another class.
            ValueError: not exactly one of ids and embeddings, a mask of another shape, padding within
                packed sequences, a cache for other sequences or for another depth.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass either input_ids or inputs_embeds")
        x: Tensor = self.token_emb(input_ids) if inputs_embeds is None else inputs_embeds
        cache = self._cache(past_key_values, use_cache)
        real = real_tokens(attention_mask, x)
        cu_seqlens = offsets(cu_seqlens, attention_mask, kwargs)
        if real is not None and cu_seqlens is not None:
            raise ValueError("sequences are either padded or packed: leave out attention_mask or cu_seqlens")
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        trace: list[Tensor] | None = [] if output_hidden_states else None

        length = (
            x.shape[1] if cu_seqlens is None or cache is None else max(cu_seqlens.diff().tolist(), default=0)
        )
        if real is not None:
            x, cu_seqlens = x[real][None], F.pad(real.sum(dim=1).cumsum(dim=0), (1, 0))
        sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
        states = None if cache is None else cache.states(sequences)
        x, states = run_blocks(self.layers, x, states, cu_seqlens, trace)
        if cache is not None:
            cache.advance(states, length)
        return BaseModelOutputWithPast(
            last_hidden_state=unpack(x, real),
            past_key_values=cache,
            hidden_states=None if trace is None else tuple(unpack(h, real) for h in (*trace, x)),
        )

    def _cache(self, given: Cache | None, use_cache: bool | None) -> MhesaCache | None:
        if given is None:
            wanted = self.config.use_cache and not self.training if use_cache is None else use_cache
            return MhesaCache(self.config) if wanted else None
        check_cache(given)
        if use_cache is False:
            raise ValueError("past_key_values would be ignored with use_cache=False; leave one of them out")
        if len(given.layers) != len(self.layers):
            raise ValueError(
                f"past_key_values is for {len(given.layers)} blocks and this model has {len(self.layers)}: "
                "make it with MhesaCache(model.config)"
            )
        return cast(MhesaCache, given)


class MhesaForCausalLM(MhesaPreTrainedModel, GenerationMixin):
    """The language model: `MhesaModel` and a head without bias.

    Initial weights are drawn as for `GatedExponentialSmoothingLM`; `from_plain` and `to_plain` convert.

    >>> config = MhesaConfig(hidden_size=16, num_hidden_layers=2, heads=2, dim_mhesa=8)
    >>> model = MhesaForCausalLM(config).eval()
    >>> model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4, eos_token_id=None).shape
    torch.Size([1, 7])
    """

    _tied_weights_keys = {"to_logits.weight": "model.token_emb.weight"}  # noqa: RUF012

    def __init__(self, config: MhesaConfig) -> None:
        super().__init__(config)
        self.model = MhesaModel(config)
        self.to_logits = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()  # type: ignore[no-untyped-call]

    @classmethod
    def from_plain(cls, lm: GatedExponentialSmoothingLM, **config: Any) -> MhesaForCausalLM:
        """A copy of a plain model, on its device and in its type.

        Args:
            lm: the model; it is not changed.
            config: further fields of `MhesaConfig`. Token ids are those of `ByteTokenizer` for a
                vocabulary of 257, and none for any other.

        >>> lm = GatedExponentialSmoothingLM(num_tokens=257, dim=16, depth=2, heads=2, dim_mhesa=8)
        >>> model, ids = MhesaForCausalLM.from_plain(lm), torch.randint(256, (1, 5))
        >>> torch.equal(model(ids).logits, lm(ids))
        True
        """
        sizes = ModelConfig.of(lm)
        eos_token_id = END_OF_TEXT_ID if sizes.num_tokens == END_OF_TEXT_ID + 1 else None
        fields = replace(sizes, eos_token_id=eos_token_id).to_json() | {"backend": sizes.backend} | config
        with torch.device("meta"):
            model = cls(MhesaConfig(**fields))
        weights = {saved_name(name): value.clone() for name, value in lm.state_dict().items()}
        model.load_state_dict(weights, strict=True, assign=True)
        model.tie_weights()
        return model.train(lm.training)

    def to_plain(self) -> GatedExponentialSmoothingLM:
        """A plain model, with an explicit state, of the same layers: training one trains the other."""
        lm = self.config.to_model_config().empty()
        lm.token_emb, lm.layers, lm.to_logits = self.model.token_emb, self.model.layers, self.to_logits
        lm.training = self.training
        return lm

    def get_output_embeddings(self) -> nn.Module:
        """The head."""
        return self.to_logits

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the head."""
        self.to_logits = cast(nn.Linear, new_embeddings)

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        cu_seqlens: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        loss_only: bool = False,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits `(batch, length, vocab_size)` of the next token, and the loss where `labels` are given.

        Args:
            input_ids, attention_mask, past_key_values, inputs_embeds, use_cache, cu_seqlens: see
                `MhesaModel.forward`.
            labels: `(batch, length)`, as `input_ids` are: they are shifted here. -100 is ignored, and so
                is the first token of each packed sequence, which nothing predicts.
            logits_to_keep: how many logits from the end, all if 0, or which positions.
            loss_only: return no logits. The loss of `shift_labels` over a large vocabulary is then found
                chunk by chunk, and all logits are never in memory at once.
            kwargs: `shift_labels`, `(batch, length)`, the tokens to predict at each place, instead of
                `labels`; for the loss, such as `num_items_in_batch`, and for `MhesaModel.forward`.

        Returns:
            Logits, the mean cross-entropy in nats, and the cache.
        """
        cu_seqlens = offsets(cu_seqlens, attention_mask, kwargs)
        # Not a parameter of this function: the Trainer would expect it in every batch.
        shift_labels = kwargs.pop("shift_labels", None)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            cu_seqlens=cu_seqlens,
            return_dict=True,
            **kwargs,
        )
        if loss_only and shift_labels is not None and self.config.vocab_size >= LARGE_VOCABULARY:
            return CausalLMOutputWithPast(
                loss=next_token_loss(outputs.last_hidden_state, self.to_logits, shift_labels),
                past_key_values=outputs.past_key_values,
                hidden_states=outputs.hidden_states,
            )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.to_logits(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None or shift_labels is not None:
            loss = self.loss_function(
                logits=logits,
                labels=None if labels is None else without_first_tokens(labels, cu_seqlens),
                shift_labels=shift_labels,
                vocab_size=self.config.vocab_size,
                **kwargs,
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=None if loss_only else logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        if generation_config.cache_implementation is not None:
            raise ValueError(
                "there is one kind of cache, a state of fixed size: "
                f"leave out cache_implementation={generation_config.cache_implementation!r}"
            )
        given = model_kwargs.get("past_key_values")
        if given is not None:
            check_cache(given)
        elif generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = MhesaCache(self.config)
            return None
        return super()._prepare_cache_for_generation(  # type: ignore[misc]
            generation_config, model_kwargs, *args, **kwargs
        )
