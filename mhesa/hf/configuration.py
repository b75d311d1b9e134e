"""The model's configuration as transformers keeps it in `config.json`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from transformers import PreTrainedConfig

from mhesa import remote_code
from mhesa.hf.auto_class import NoSourceCopies
from mhesa.model.config import JSON_NAMES, ModelConfig
from mhesa.model.loading import MODEL_TYPE
from mhesa.settings import settings_of
from mhesa.tokenizers.bytes import END_OF_TEXT_ID

# The cache's name in transformers 5.24 and newer, and before.
CACHE_NAMES = ("cache", "past_key_values")
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# The fields that come from `ModelConfig`, by the names of `config.json`.
SIZES = {
    JSON_NAMES.get(setting.name, setting.name): setting
    for setting in settings_of(ModelConfig)
    if setting.name != "eos_token_id"
}


class MhesaConfig(NoSourceCopies, PreTrainedConfig):
    """Configuration of a gated exponential smoothing language model.

    `num_tokens`, `dim` and `depth`, the plain model's names, are aliases, and so is `num_attention_heads` of
    `heads`. `backend` belongs to the machine and is never saved: give it with
    `from_pretrained(directory, backend="chunked")`.

    Raises:
        ValueError: a size below 1, a `dim_mhesa` that `heads` does not divide, an unknown backend.

    >>> config = MhesaConfig(dim=64, depth=2)
    >>> config.hidden_size, config.num_hidden_layers
    (64, 2)
    >>> MhesaConfig(dim_mhesa=100)
    Traceback (most recent call last):
    mhesa.errors.InputError: dim_mhesa must be divisible by heads, but 100 is not by 8

    Args:
        use_cache: whether a forward outside training returns its state.
        bos_token_id, eos_token_id, pad_token_id: token ids; by default those of `ByteTokenizer`, or none if
            the vocabulary has no more than 256 tokens. Give them for any other tokenizer: generation stops at
            `eos_token_id`.
    """

    model_type = MODEL_TYPE
    keys_to_ignore_at_inference: ClassVar[list[str]] = list(CACHE_NAMES)
    attribute_map: ClassVar[dict[str, str]] = {**JSON_NAMES, "num_attention_heads": "heads"}
    auto_map: ClassVar[dict[str, str]] = remote_code.MODELS

    use_cache: bool = True
    bos_token_id: int | None = END_OF_TEXT_ID
    eos_token_id: int | list[int] | None = END_OF_TEXT_ID
    pad_token_id: int | None = END_OF_TEXT_ID
    # A field for each size: transformers makes a dataclass of this class when the class statement ends.
    __annotations__ |= {name: setting.hint for name, setting in SIZES.items()}
    vars().update({name: setting.default for name, setting in SIZES.items()})

    if TYPE_CHECKING:

        def __init__(self, **values: Any) -> None: ...

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]
        self.to_model_config()
        for name in TOKEN_IDS:
            if getattr(self, name) == END_OF_TEXT_ID >= self.vocab_size:
                setattr(self, name, None)

    @property
    def layer_types(self) -> list[str]:
        """What the blocks are among transformers' kinds of layers: a state of fixed size, no attention."""
        return ["linear_attention"] * self.num_hidden_layers

    def to_model_config(self) -> ModelConfig:
        """The configuration of the plain model."""
        return ModelConfig.from_json(vars(self))

    def to_dict(self) -> dict[str, Any]:
        """The values to save: all but `backend`."""
        values: dict[str, Any] = super().to_dict() | {"auto_map": remote_code.MODELS}
        values.pop("backend", None)
        return values

    def save_pretrained(
        self, save_directory: str | os.PathLike[Any], push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """Write `config.json` and the file that its `auto_map` names; see transformers for the others."""
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        remote_code.write_module(Path(save_directory))
        super().save_pretrained(save_directory, push_to_hub, **kwargs)


MhesaConfig.__doc__ = f"{MhesaConfig.__doc__}".rstrip() + "".join(
    f"\n        {name}: {setting.doc.text}" for name, setting in SIZES.items()
)
