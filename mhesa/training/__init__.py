"""Training a model on text; `mhesa.training.loop` is the loop itself.

Names are imported when first used: settings need no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mhesa.training.outcome import Summary
    from mhesa.training.run import Stopped, train
    from mhesa.training.settings import TrainingSettings

__all__ = ["Stopped", "Summary", "TrainingSettings", "train"]

_LAZY_EXPORTS = {
    "Stopped": "mhesa.training.run",
    "Summary": "mhesa.training.outcome",
    "TrainingSettings": "mhesa.training.settings",
    "train": "mhesa.training.run",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY_EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_LAZY_EXPORTS[name]), name)
    return value
