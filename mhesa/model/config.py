"""What a saved model's `config.json` says of its sizes, checked."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from mhesa.model.layers import check_divisible, check_sizes
from mhesa.model.lm import GatedExponentialSmoothingLM
from mhesa.ops.backends import check_backend

# The plain model's names for sizes that `config.json` calls as others do.
ALIASES = {"num_tokens": "vocab_size", "dim": "hidden_size", "depth": "num_hidden_layers"}


@dataclass(frozen=True)
class Sizes:
    """Everything that decides a model's shape and arithmetic; see `mhesa.hf.MhesaConfig`.

    Raises:
        ValueError: a size below 1, a `dim_mhesa` that `heads` does not divide, an unknown backend.

    >>> model = Sizes(vocab_size=16, hidden_size=8, num_hidden_layers=2, heads=1, dim_mhesa=4).empty()
    >>> model.to_logits.weight.shape
    torch.Size([16, 8])
    """

    vocab_size: int = 257
    hidden_size: int = 128
    num_hidden_layers: int = 4
    heads: int = 8
    dim_mhesa: int = 256
    dim_expansion_factor: float = 4
    dropout: float = 0.0
    tie_word_embeddings: bool = False
    backend: str | None = None

    def __post_init__(self) -> None:
        names = ("vocab_size", "hidden_size", "num_hidden_layers", "heads", "dim_mhesa")
        sizes = {name: getattr(self, name) for name in names}
        for name, size in sizes.items():
            if not isinstance(size, int):
                raise ValueError(f"{name} must be a whole number of at least 1, not {size!r}")
        factor = self.dim_expansion_factor
        if not isinstance(factor, int | float) or not factor < math.inf:
            raise ValueError(f"dim_expansion_factor must be a finite number, not {factor!r}")
        if not isinstance(self.dropout, int | float) or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, not {self.dropout!r}")
        if not isinstance(self.tie_word_embeddings, bool):
            raise ValueError(f"tie_word_embeddings must be true or false, not {self.tie_word_embeddings!r}")
        check_sizes(**sizes, **{"dim_expansion_factor * hidden_size": self.dim_hidden})
        check_divisible("dim_mhesa", self.dim_mhesa, self.heads)
        check_backend(self.backend)

    @property
    def dim_hidden(self) -> int:
        """The width of a block's gate."""
        return int(self.dim_expansion_factor * self.hidden_size)

    @classmethod
    def of(cls, values: dict[str, Any]) -> Sizes:
        """The sizes among the values of a `config.json`."""
        named = {ALIASES.get(name, name): value for name, value in values.items()}
        return cls(**{field.name: named[field.name] for field in fields(cls) if field.name in named})

    def empty(self) -> GatedExponentialSmoothingLM:
        """A model of these sizes on the meta device, for weights to be assigned to."""
        with torch.device("meta"), _NoInitialValues():
            return GatedExponentialSmoothingLM(
                num_tokens=self.vocab_size,
                dim=self.hidden_size,
                depth=self.num_hidden_layers,
                heads=self.heads,
                dim_mhesa=self.dim_mhesa,
                dim_expansion_factor=self.dim_expansion_factor,
                dropout=self.dropout,
                backend=self.backend,
            )


class _NoInitialValues(TorchFunctionMode):
    """Leaves out random values: to draw them for the meta device, torch would import its compiler."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named = kwargs or {}
        if getattr(function, "__module__", None) == "torch.nn.init":
            return named["tensor"]
        return (torch.empty if function is torch.randn else function)(*args, **named)
