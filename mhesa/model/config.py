"""A model's sizes, as Python names them and as `config.json` does; torch is imported to build one."""

import math
import re
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any, cast

from mhesa.errors import InputError
from mhesa.settings import (
    AT_LEAST_0,
    AT_LEAST_1,
    FINITE,
    FRACTION,
    Doc,
    check_divisible,
    check_ranges,
    check_types,
    documented,
    expanded_size,
)

if TYPE_CHECKING:
    from mhesa.model.layers import GatedMHESA
    from mhesa.model.lm import GatedExponentialSmoothingLM

# Sizes that `config.json` calls by transformers' names.
JSON_NAMES = {"num_tokens": "vocab_size", "dim": "hidden_size", "depth": "num_hidden_layers"}
DROPOUT_TEXT = "Probability of dropping an element of a block's gated product or output"


@dataclass(frozen=True, kw_only=True)
class ModelSizes:
    """The part of a model's configuration that is also a setting of training."""

    dim: Annotated[int, Doc("Width of the model.", AT_LEAST_1, "Model")] = 128
    depth: Annotated[int, Doc("Number of blocks.", AT_LEAST_1, "Model")] = 4
    heads: Annotated[int, Doc("Smoothing rates of a block; must divide dim_mhesa.", AT_LEAST_1, "Model")] = 8
    dim_mhesa: Annotated[
        int, Doc("Width of the smoothed values and of their state.", AT_LEAST_1, "Model")
    ] = 256
    dim_expansion_factor: Annotated[
        float, Doc("Width of a block's gate, as a multiple of dim.", FINITE, "Model")
    ] = 4.0
    backend: Annotated[
        str | None, Doc("Implementation of the operator; the best one if omitted.", panel="Machine")
    ] = None

    @property
    def dim_hidden(self) -> int:
        """The width of a block's gate."""
        return expanded_size(self.dim, self.dim_expansion_factor)


@documented
@dataclass(frozen=True, kw_only=True)
class ModelConfig(ModelSizes):
    """Everything that decides a model's shape and arithmetic.

    Raises:
        InputError: a size below 1, a `dim_mhesa` that `heads` does not divide, an unknown backend.

    >>> config = ModelConfig(num_tokens=16, dim=8, depth=2, heads=1, dim_mhesa=4)
    >>> ModelConfig.of(config.build()) == config
    True
    """

    num_tokens: Annotated[
        int, Doc("Size of the vocabulary; by default the 256 bytes and an end of text.", AT_LEAST_1)
    ] = 257
    adaptive: Annotated[bool, Doc("Smoothing factors that follow the input, one for each head and step.")] = (
        False
    )
    conv_size: Annotated[
        int, Doc("Taps of a short causal convolution of each block's input; 0 for none.", AT_LEAST_0)
    ] = 0
    dropout: Annotated[float, Doc(f"{DROPOUT_TEXT}.", FRACTION)] = 0.0
    tie_word_embeddings: Annotated[bool, Doc("Share the embedding's weights with the head.")] = False
    eos_token_id: Annotated[
        int | list[int] | None, Doc("The token that ends a text, for transformers' generate to stop at.")
    ] = None

    def __post_init__(self) -> None:
        check_types(self)
        check_ranges(self)
        expanded_size(self.dim, self.dim_expansion_factor)
        check_divisible("dim_mhesa", self.dim_mhesa, self.heads)
        if self.backend is not None:
            from mhesa.ops.backends import check_backend

            check_backend(self.backend)

    def block_arguments(self) -> dict[str, Any]:
        """The arguments of each `GatedMHESA` block."""
        names = {field.name for field in fields(ModelSizes)} | {"adaptive", "conv_size", "dropout"}
        return {name: getattr(self, name) for name in names - {"depth"}}

    @property
    def parameters(self) -> int:
        """How many parameters the model has."""
        dim, inner, hidden = self.dim, self.dim_mhesa, self.dim_hidden
        block = 2 * dim + dim * hidden + dim * inner + 3 * inner + 2 * self.heads
        block += inner * hidden + hidden * dim + dim + self.conv_size * dim
        block += self.heads * dim if self.adaptive else 0
        return (1 if self.tie_word_embeddings else 2) * self.num_tokens * dim + self.depth * block

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "ModelConfig":
        """The sizes in a `config.json`; its other values are ignored.

        Raises:
            InputError: see `ModelConfig`; sizes are named as in `config.json`.
        """
        names = {field.name: JSON_NAMES.get(field.name, field.name) for field in fields(cls)}
        named = {JSON_NAMES.get(name, name): value for name, value in values.items()}
        try:
            return cls(**{name: named[other] for name, other in names.items() if other in named})
        except ValueError as error:
            message = re.sub(r"\w+", lambda word: JSON_NAMES.get(word[0], word[0]), str(error))
            raise InputError(message) from None

    def to_json(self) -> dict[str, Any]:
        """The sizes and token ids for a `config.json`.

        `backend` is left out: it belongs to the machine and not to the model.

        >>> ModelConfig(dim=64).to_json()["hidden_size"]
        64
        """
        values = {JSON_NAMES.get(name, name): value for name, value in asdict(self).items()}
        del values["backend"]
        return values | {"bos_token_id": self.eos_token_id, "pad_token_id": self.eos_token_id}

    @classmethod
    def of(cls, model: "GatedExponentialSmoothingLM") -> "ModelConfig":
        """The configuration of a model, without `eos_token_id`, which a model does not have."""
        block = cast("GatedMHESA", model.layers[0])
        num_tokens, dim = model.token_emb.weight.shape
        return cls(
            num_tokens=num_tokens,
            dim=dim,
            depth=len(model.layers),
            heads=block.mhesa.heads,
            dim_mhesa=model.dim_mhesa,
            dim_expansion_factor=_expansion_factor(block.to_gate.out_features, dim),
            adaptive=block.to_alpha is not None,
            conv_size=0 if block.conv is None else len(block.conv.weight),
            dropout=block.dropout.p,
            tie_word_embeddings=model.to_logits.weight is model.token_emb.weight,
            backend=block.mhesa.backend,
        )

    def build(self) -> "GatedExponentialSmoothingLM":
        """A new model of these sizes, with random weights."""
        from mhesa.model.lm import GatedExponentialSmoothingLM

        model = GatedExponentialSmoothingLM(
            num_tokens=self.num_tokens, depth=self.depth, **self.block_arguments()
        )
        if self.tie_word_embeddings:
            model.to_logits.weight = model.token_emb.weight
        return model

    def empty(self) -> "GatedExponentialSmoothingLM":
        """A model of these sizes on the meta device, for weights to be assigned to."""
        import torch

        from mhesa.model.meta import NoInitialValues

        with torch.device("meta"), NoInitialValues():
            return self.build()


def _expansion_factor(dim_hidden: int, dim: int) -> float:
    """A factor with `int(factor * dim) == dim_hidden`, which the quotient itself may round away from."""
    factor = dim_hidden / dim
    return factor if int(factor * dim) == dim_hidden else math.nextafter(factor, math.inf)
