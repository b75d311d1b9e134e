"""Linear-time language models built on exponential smoothing.

Names are imported when they are first asked for: the command line answers `--help` before torch is there.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mhesa.decoding import Decoder
    from mhesa.folder import load
    from mhesa.generation import generate
    from mhesa.layers import MHESA, GatedMHESA
    from mhesa.model import GatedExponentialSmoothingLM
    from mhesa.ops import conv1d_fft, exponential_smoothing, exponential_smoothing_step
    from mhesa.sampling import Sampling
    from mhesa.session import Reader, Session
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
    "train",
]

HOMES = {
    "MHESA": "mhesa.layers",
    "Decoder": "mhesa.decoding",
    "GatedExponentialSmoothingLM": "mhesa.model",
    "GatedMHESA": "mhesa.layers",
    "Reader": "mhesa.session",
    "Sampling": "mhesa.sampling",
    "Session": "mhesa.session",
    "TrainingSettings": "mhesa.training",
    "conv1d_fft": "mhesa.ops",
    "exponential_smoothing": "mhesa.ops",
    "exponential_smoothing_step": "mhesa.ops",
    "generate": "mhesa.generation",
    "load": "mhesa.folder",
    "train": "mhesa.training",
}


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
