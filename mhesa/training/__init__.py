"""Training a model on text; `mhesa.training.loop` is the loop itself.

All but the settings needs torch, and is imported when first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mhesa.training.settings import TrainingSettings

if TYPE_CHECKING:
    from mhesa.training.outcome import Summary
    from mhesa.training.run import Stopped, train

__all__ = ["Stopped", "Summary", "TrainingSettings", "train"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("mhesa.training.run"), name)
