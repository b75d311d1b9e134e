"""The model as classes of transformers, for `AutoModelForCausalLM`, `generate` and `Trainer`.

Padding is removed before the model runs: the real tokens of a padded batch are packed end to end, run as
separate sequences and put back in their places. Padding on the left, on the right or in between changes no
output, no gradient and no state.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from mhesa.hf.auto_class import NoSourceCopies
from mhesa.hf.cache import CACHE, MhesaCache, only_cache
from mhesa.hf.configuration import CACHE_NAMES, MhesaConfig
from mhesa.hf.packing import Padding, next_tokens, offsets, real_tokens
from mhesa.model.config import ModelConfig
from mhesa.model.layers import MHESA, CausalConv, GatedMHESA, identity_taps, spread_rates
from mhesa.model.lm import GatedExponentialSmoothingLM, run_blocks
from mhesa.model.loading import KEPT_IN_FP32, saved_name
from mhesa.model.loss import IGNORED_LABEL
from mhesa.tokenizers.bytes import END_OF_TEXT_ID

# Arguments that collators pass with packed sequences. The offsets are found from one of them; the others are
# for attention kernels.
PACKING = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "position_ids", "seq_idx"}
# What `generate` takes for itself and passes on nevertheless, for stop strings.
LEFT_BY_GENERATE = {"tokenizer"}
# Arguments of the loss alone.
LOSS = {"num_items_in_batch", "ignore_index"}


class MhesaBlock(GradientCheckpointingLayer, GatedMHESA):
    """`GatedMHESA` with transformers' gradient checkpointing."""


class MhesaPreTrainedModel(NoSourceCopies, PreTrainedModel):
    """Base class of both models: initial weights, and how weights are named and loaded."""

    config: MhesaConfig
    config_class = MhesaConfig
    base_model_prefix = "model"
    _input_embed_layer = "token_emb"
    supports_gradient_checkpointing = True
    _is_stateful = True
    _no_split_modules = ["MhesaBlock"]  # noqa: RUF012 not a ClassVar there
    _keep_in_fp32_modules_strict = set(KEPT_IN_FP32)  # noqa: RUF012

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding | nn.LayerNorm):
            module.reset_parameters()
        elif isinstance(module, MHESA):
            # Here and not for the block: transformers skips modules that have no parameters of their own.
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
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states of a batch.

        Args:
            input_ids: `(batch, length)`.
            attention_mask: `(batch, length)`, or with the tokens of the cache before these; 0 is padding,
                anywhere. Outputs there are 0.
            cache, past_key_values: the `MhesaCache` of the tokens before, by either name; this call updates
                it.
            inputs_embeds: `(batch, length, hidden_size)` in place of `input_ids`.
            use_cache: return the state; by default as the configuration says, except in training and in an
                exported graph.
            cu_seqlens: offsets of sequences packed into a batch of 1, `(sequences + 1,)`; the cache then
                holds as many sequences. Taken from `cu_seq_lens_q`, or from `position_ids` that start
                again at 0, as `DataCollatorWithFlattening` sends them, where not given.
            output_hidden_states: also return the input of each block, and the output.
            kwargs: `cu_seq_lens_q` and `position_ids`; those that come with them for attention kernels are
                ignored, and so is what is `None` or `False`.

        Raises:
            TypeError: an unknown argument, a cache of another class, or under both its names.
            ValueError: not exactly one of ids and embeddings, a mask of another shape, padding within
                packed sequences, a cache for other sequences or for another depth.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass either input_ids or inputs_embeds")
        for name in kwargs.keys() - PACKING - LEFT_BY_GENERATE:
            if kwargs[name] is not None and kwargs[name] is not False:
                raise TypeError(f"{type(self).__name__} got an unexpected argument {name!r}")
        x: Tensor = self.token_emb(input_ids) if inputs_embeds is None else inputs_embeds
        updated = self._cache(only_cache(cache, past_key_values), use_cache)
        real = real_tokens(attention_mask, x)
        cu_seqlens = offsets(cu_seqlens, attention_mask, kwargs)
        if real is not None and cu_seqlens is not None:
            raise ValueError("sequences are either padded or packed: leave out attention_mask or cu_seqlens")
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        trace: list[Tensor] | None = [] if output_hidden_states else None

        length, sequences = x.shape[1], len(x)
        if cu_seqlens is not None:
            length, sequences = max(cu_seqlens.diff().tolist(), default=0), len(cu_seqlens) - 1
        states = None if updated is None else updated.states(sequences)
        if real is None:
            x, states = run_blocks(self.layers, x, states, cu_seqlens, trace)
        else:
            padding = Padding(real)
            x, states = run_blocks(
                self.layers, padding.pack(x), padding.pack_states(states), padding.cu_seqlens, trace
            )
            x, states = padding.unpack(x), padding.unpack_states(states)
            trace = None if trace is None else [padding.unpack(h) for h in trace]
        if updated is not None:
            updated.advance(states, length)
        return BaseModelOutputWithPast(
            last_hidden_state=x,
            hidden_states=None if trace is None else (*trace, x),
            **{CACHE: updated},  # type: ignore[arg-type]
        )

    def _cache(self, given: MhesaCache | None, use_cache: bool | None) -> MhesaCache | None:
        if given is None:
            wanted = use_cache
            if use_cache is None:
                wanted = self.config.use_cache and not self.training and not torch.compiler.is_exporting()
            return MhesaCache(self.config) if wanted else None
        if use_cache is False:
            raise ValueError("the cache would be ignored with use_cache=False; leave one of them out")
        if len(given.layers) != len(self.layers):
            raise ValueError(
                f"the cache is for {len(given.layers)} blocks and this model has {len(self.layers)}: "
                "make it with MhesaCache(model.config)"
            )
        return given


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

    def resize_token_embeddings(
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ) -> nn.Embedding:
        """Resize embedding and head, see transformers.

        Tokens that only round the size up, which no tokenizer has, go to `generation_config.suppress_tokens`:
        `generate` never draws them.
        """
        suppressed = set(self.generation_config.suppress_tokens or ())
        tokens = self.config.vocab_size
        while tokens - 1 in suppressed:
            tokens -= 1
        embedding = super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        if new_num_tokens is None and pad_to_multiple_of is None:
            return embedding
        kept = {token for token in suppressed if token < tokens}
        tokens = tokens if new_num_tokens is None else new_num_tokens
        kept |= set(range(tokens, self.config.vocab_size))
        self.generation_config.suppress_tokens = sorted(kept) or None
        return embedding

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
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits `(batch, length, vocab_size)` of the next token, and the loss where `labels` are given.

        Args:
            input_ids, attention_mask, past_key_values, inputs_embeds, use_cache, cu_seqlens, cache: see
                `MhesaModel.forward`.
            labels: `(batch, length)`, as `input_ids` are: they are shifted here. -100 is ignored, and so
                are padding and a token that nothing predicts: the first of a packed sequence, or one after
                padding.
            logits_to_keep: how many logits from the end, all if 0, or which positions.
            kwargs: `shift_labels`, `(batch, length)`, the tokens to predict at each place, instead of
                `labels`; `num_items_in_batch` (labels that are not ignored, less the first of each row) and
                `ignore_index`, for the loss; and those of `MhesaModel.forward`.

        Returns:
            Logits, the mean cross-entropy in nats, and the cache.
        """
        cu_seqlens = offsets(cu_seqlens, attention_mask, kwargs)
        # Not a parameter of this function: the Trainer would expect it in every batch.
        shift_labels = kwargs.pop("shift_labels", None)
        for_loss = {name: kwargs.pop(name) for name in LOSS & kwargs.keys()}
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            cu_seqlens=cu_seqlens,
            return_dict=True,
            **{CACHE: only_cache(cache, past_key_values)},
            **kwargs,
        )
        ignored = for_loss.get("ignore_index", IGNORED_LABEL)
        given = labels if shift_labels is None else shift_labels
        real = None if given is None else real_tokens(attention_mask, given)
        if shift_labels is None and labels is not None:
            wanted = labels if real is None else labels.where(real, ignored)
            shift_labels = next_tokens(wanted, cu_seqlens, ignored)
        if shift_labels is not None and real is not None:
            # Padding predicts nothing.
            shift_labels = shift_labels.where(real, ignored)
        items = for_loss.get("num_items_in_batch")
        if items is not None and labels is not None and given is labels:
            # The Trainer has also counted tokens that nothing predicts: those after padding, and before
            # https://github.com/huggingface/transformers/pull/46204 the first of each row.
            whole, shifted, predicted = (
                (one != ignored).sum() for one in (labels, labels[:, 1:], shift_labels)
            )
            counted = torch.where(items == whole, whole, shifted)
            for_loss["num_items_in_batch"] = torch.where(predicted > 0, items * predicted / counted, items)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits, tokens = self.to_logits(outputs.last_hidden_state[:, kept]), self.config.vocab_size
        loss = None
        if shift_labels is not None:
            loss = self.loss_function(
                logits=logits, labels=None, shift_labels=shift_labels, vocab_size=tokens, **for_loss
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            **{CACHE: outputs.get(CACHE)},
        )

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise ValueError(
                "there is one kind of cache, a state of fixed size: "
                f"leave out cache_implementation={generation_config.cache_implementation!r}"
            )
        # A generation step takes the cache by the name that this version of transformers gives it.
        given = only_cache(*(model_kwargs.pop(name, None) for name in CACHE_NAMES))
        mask = model_kwargs.get("attention_mask")
        if mask is not None and not mask[:, -1].all():
            raise ValueError(
                "prompts end in padding: set tokenizer.padding_side = 'left', or give their attention_mask"
            )
        if given is not None:
            model_kwargs[CACHE] = given
        elif generation_config.use_cache is not False:
            model_kwargs[CACHE] = MhesaCache(self.config)
            return None
        return super()._prepare_cache_for_generation(  # type: ignore[misc]
            generation_config, model_kwargs, *args, **kwargs
        )
