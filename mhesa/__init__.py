"""Linear-time language models built on exponential smoothing.

Names are imported when they are first asked for: the command line answers `--help` before torch is there.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mhesa.inference.decoder import Decoder
    from mhesa.inference.generation import generate
    from mhesa.inference.keyed_sessions import KeyedSessions
    from mhesa.inference.sampling import Sampling
    from mhesa.inference.session import Reader, Session
    from mhesa.model.layers import MHESA, GatedMHESA
    from mhesa.model.lm import GatedExponentialSmoothingLM
    from mhesa.model.loading import load, save
    from mhesa.ops import conv1d_fft, exponential_smoothing, exponential_smoothing_step
    from mhesa.training.run import Stopped, train
    from mhesa.training.settings import TrainingSettings

__version__ = "0.1.0"

__all__ = [
    "MHESA",
    "Decoder",
    "GatedExponentialSmoothingLM",
    "GatedMHESA",
    "KeyedSessions",
    "Reader",
    "Sampling",
    "Session",
    "Stopped",
    "TrainingSettings",
    "conv1d_fft",
    "exponential_smoothing",
    "exponential_smoothing_step",
    "generate",
    "load",
    "save",
    "train",
]

_LAZY_EXPORTS = {
    "mhesa.inference.decoder": ("Decoder",),
    "mhesa.inference.generation": ("generate",),
    "mhesa.inference.keyed_sessions": ("KeyedSessions",),
    "mhesa.inference.sampling": ("Sampling",),
    "mhesa.inference.session": ("Reader", "Session"),
    "mhesa.model.layers": ("MHESA", "GatedMHESA"),
    "mhesa.model.lm": ("GatedExponentialSmoothingLM",),
    "mhesa.model.loading": ("load", "save"),
    "mhesa.ops": ("conv1d_fft", "exponential_smoothing", "exponential_smoothing_step"),
    "mhesa.training.run": ("Stopped", "train"),
    "mhesa.training.settings": ("TrainingSettings",),
}


def __getattr__(name: str) -> Any:
    for module, names in _LAZY_EXPORTS.items():
        if name in names:
            value = globals()[name] = getattr(import_module(module), name)
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
