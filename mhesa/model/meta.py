"""Modules on the meta device: shapes without memory, for weights to be assigned to."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class NoInitialValues(TorchFunctionMode):
    """Skips random initial values: to draw them for the meta device, torch would import its compiler."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named = kwargs or {}
        if getattr(function, "__module__", None) == "torch.nn.init":
            return named["tensor"]
        return (torch.empty if function is torch.randn else function)(*args, **named)
