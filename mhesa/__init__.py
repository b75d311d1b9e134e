"""Linear-time language models built on exponential smoothing.

Names are imported when they are first asked for: the command line answers `--help` before torch is there.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mhesa.inference.decoder import Decoder
    from mhesa.inference.generation import generate
    from mhesa.inference.sampling import Sampling
    from mhesa.inference.session import Reader, Session
    from mhesa.model.layers import MHESA, GatedMHESA
    from mhesa.model.lm import GatedExponentialSmoothingLM
    from mhesa.model.loading import load, save
    from mhesa.ops import conv1d_fft, exponential_smoothing, exponential_smoothing_step
    from mhesa.training import TrainingSettings, train

__version__ = "0.1.0"

__all__ = [
    "MHESA",
    "Decoder",
    "GatedExponentialSmoothingLM",
    "GatedMHESA",
    "Reader",
    "Sampling",
    "Session",
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
    "MHESA": "mhesa.model.layers",
    "Decoder": "mhesa.inference.decoder",
    "GatedExponentialSmoothingLM": "mhesa.model.lm",
    "GatedMHESA": "mhesa.model.layers",
    "Reader": "mhesa.inference.session",
    "Sampling": "mhesa.inference.sampling",
    "Session": "mhesa.inference.session",
    "TrainingSettings": "mhesa.training",
    "conv1d_fft": "mhesa.ops",
    "exponential_smoothing": "mhesa.ops",
    "exponential_smoothing_step": "mhesa.ops",
    "generate": "mhesa.inference.generation",
    "load": "mhesa.model.loading",
    "save": "mhesa.model.loading",
    "train": "mhesa.training",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY_EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_LAZY_EXPORTS[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
