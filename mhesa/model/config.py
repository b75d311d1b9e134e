"""A model's sizes, as Python names them and as `config.json` does."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass, fields
from typing import Any, cast

import torch
from torch.overrides import TorchFunctionMode

from mhesa.errors import InputError
from mhesa.model.layers import GatedMHESA, check_divisible, check_sizes
from mhesa.model.lm import GatedExponentialSmoothingLM
from mhesa.ops.backends import check_backend

# Sizes that `config.json` calls by transformers' names.
JSON_NAMES = {"num_tokens": "vocab_size", "dim": "hidden_size", "depth": "num_hidden_layers"}


@dataclass(frozen=True, kw_only=True)
class BlockConfig:
    """The arguments of every `GatedMHESA` block of a model, and how many blocks there are."""

    dim: int = 128
    depth: int = 4
    heads: int = 8
    dim_mhesa: int = 256
    dim_expansion_factor: float = 4.0
    dropout: float = 0.0
    backend: str | None = None


@dataclass(frozen=True, kw_only=True)
class ModelConfig(BlockConfig):
    """Everything that decides a model's shape and arithmetic.

    Raises:
        InputError: a size below 1, a `dim_mhesa` that `heads` does not divide, an unknown backend.

    >>> config = ModelConfig(num_tokens=16, dim=8, depth=2, heads=1, dim_mhesa=4)
    >>> ModelConfig.of(config.build()) == config
    True
    """

    num_tokens: int = 257
    tie_word_embeddings: bool = False
    eos_token_id: int | list[int] | None = None

    def __post_init__(self) -> None:
        names = ("num_tokens", "dim", "depth", "heads", "dim_mhesa")
        sizes = {name: getattr(self, name) for name in names}
        for name, size in sizes.items():
            if not isinstance(size, int):
                raise InputError(f"{name} must be a whole number of at least 1, not {size!r}")
        factor = self.dim_expansion_factor
        if not isinstance(factor, int | float) or not factor < math.inf:
            raise InputError(f"dim_expansion_factor must be a finite number, not {factor!r}")
        if not isinstance(self.dropout, int | float) or not 0 <= self.dropout < 1:
            raise InputError(f"dropout must be at least 0 and below 1, not {self.dropout!r}")
        if not isinstance(self.tie_word_embeddings, bool):
            raise InputError(f"tie_word_embeddings must be true or false, not {self.tie_word_embeddings!r}")
        check_sizes(**sizes, **{"dim_expansion_factor * dim": self.dim_hidden})
        check_divisible("dim_mhesa", self.dim_mhesa, self.heads)
        check_backend(self.backend)

    @property
    def dim_hidden(self) -> int:
        """The width of a block's gate."""
        return int(self.dim_expansion_factor * self.dim)

    @property
    def parameters(self) -> int:
        """How many parameters the model has."""
        dim, inner, hidden = self.dim, self.dim_mhesa, self.dim_hidden
        block = 2 * dim + dim * hidden + dim * inner + 3 * inner + 2 * self.heads
        block += inner * hidden + hidden * dim + dim
        return (1 if self.tie_word_embeddings else 2) * self.num_tokens * dim + self.depth * block

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> ModelConfig:
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
    def of(cls, model: GatedExponentialSmoothingLM) -> ModelConfig:
        """The sizes of a model."""
        block = cast(GatedMHESA, model.layers[0])
        num_tokens, dim = model.token_emb.weight.shape
        return cls(
            num_tokens=num_tokens,
            dim=dim,
            depth=len(model.layers),
            heads=block.mhesa.heads,
            dim_mhesa=model.dim_mhesa,
            dim_expansion_factor=_expansion_factor(block.to_gate.out_features, dim),
            dropout=block.dropout.p,
            tie_word_embeddings=model.to_logits.weight is model.token_emb.weight,
            backend=block.mhesa.backend,
        )

    def build(self) -> GatedExponentialSmoothingLM:
        """A new model of these sizes, with random weights."""
        arguments = {field.name: getattr(self, field.name) for field in fields(BlockConfig)}
        model = GatedExponentialSmoothingLM(num_tokens=self.num_tokens, **arguments)
        if self.tie_word_embeddings:
            model.to_logits.weight = model.token_emb.weight
        return model

    def empty(self) -> GatedExponentialSmoothingLM:
        """A model of these sizes on the meta device, for weights to be assigned to."""
        with torch.device("meta"), _NoInitialValues():
            return self.build()


class _NoInitialValues(TorchFunctionMode):
    """Leaves out random values: to draw them for the meta device, torch would import its compiler."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named = kwargs or {}
        if getattr(function, "__module__", None) == "torch.nn.init":
            return named["tensor"]
        return (torch.empty if function is torch.randn else function)(*args, **named)


def _expansion_factor(dim_hidden: int, dim: int) -> float:
    """A factor with `int(factor * dim) == dim_hidden`, which the quotient itself may round away from."""
    factor = dim_hidden / dim
    return factor if int(factor * dim) == dim_hidden else math.nextafter(factor, math.inf)
