"""Linear-time language models built on exponential smoothing."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mhesa.decoding import Decoder
from mhesa.generation import generate
from mhesa.layers import MHESA, GatedMHESA
from mhesa.model import GatedExponentialSmoothingLM
from mhesa.ops import conv1d_fft, exponential_smoothing, exponential_smoothing_step
from mhesa.sampling import Sampling
from mhesa.session import Reader, Session

if TYPE_CHECKING:
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
    "train",
]

# Imported when asked for: they bring transformers with them.
LATER = {"TrainingSettings": "mhesa.training", "train": "mhesa.training"}


def __getattr__(name: str) -> Any:
    if name in LATER:
        return getattr(import_module(LATER[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
