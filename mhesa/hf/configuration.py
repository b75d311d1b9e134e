"""The model's sizes, as transformers keeps them in `config.json`."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import PreTrainedConfig

from mhesa.model.config import JSON_NAMES, ModelConfig
from mhesa.model.loading import MODEL_TYPE
from mhesa.tokenizers.bytes import END_OF_TEXT_ID


class MhesaConfig(PreTrainedConfig):
    """Sizes of a gated exponential smoothing language model.

    Args:
        vocab_size: tokens; 256 bytes and an end-of-text token by default.
        hidden_size: width of the residual stream, the plain model's `dim`.
        num_hidden_layers: blocks, the plain model's `depth`.
        heads: smoothing rates a block; `dim_mhesa` must be divisible by it.
        dim_mhesa: width of the smoothed values, and of a block's state.
        dim_expansion_factor: width of a block's gate over `hidden_size`.
        dropout: how often, in training, an element of a block's gated product and output is 0.
        use_cache: whether a forward outside training returns its state.
        tie_word_embeddings: share the embedding's weights with the head.
        bos_token_id, eos_token_id, pad_token_id: those of `ByteTokenizer`; none in a vocabulary of 256
            or fewer. Give them for any other tokenizer: generation stops at `eos_token_id`.
        backend: the operator's backend, `None` for the best one. It belongs to the machine and not to the
            checkpoint, so it is never saved: `from_pretrained(directory, backend="chunked")`.

    The plain model's names (`num_tokens`, `dim`, `depth`) are aliases.

    Raises:
        ValueError: a size below 1, a `dim_mhesa` that `heads` does not divide, an unknown backend.

    >>> config = MhesaConfig(dim=64, depth=2)
    >>> config.hidden_size, config.num_hidden_layers
    (64, 2)
    >>> MhesaConfig(dim_mhesa=100)
    Traceback (most recent call last):
    ValueError: dim_mhesa must be divisible by heads, but 100 is not by 8
    """

    model_type = MODEL_TYPE
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    attribute_map: ClassVar[dict[str, str]] = JSON_NAMES

    vocab_size: int = ModelConfig.num_tokens
    hidden_size: int = ModelConfig.dim
    num_hidden_layers: int = ModelConfig.depth
    heads: int = ModelConfig.heads
    dim_mhesa: int = ModelConfig.dim_mhesa
    dim_expansion_factor: float = ModelConfig.dim_expansion_factor
    dropout: float = ModelConfig.dropout
    use_cache: bool = True
    tie_word_embeddings: bool = ModelConfig.tie_word_embeddings
    bos_token_id: int | None = END_OF_TEXT_ID
    eos_token_id: int | list[int] | None = END_OF_TEXT_ID
    pad_token_id: int | None = END_OF_TEXT_ID
    backend: str | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]
        self.to_model_config()
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if getattr(self, name) == END_OF_TEXT_ID >= self.vocab_size:
                setattr(self, name, None)

    def to_model_config(self) -> ModelConfig:
        """What decides the shape of the model."""
        return ModelConfig.from_json(vars(self))

    def to_dict(self) -> dict[str, Any]:
        """What is saved: everything but `backend`."""
        values: dict[str, Any] = super().to_dict()
        values.pop("backend", None)
        return values
