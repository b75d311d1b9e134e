"""Linear-time language models built on exponential smoothing."""

from mhesa.layers import MHESA, GatedMHESA
from mhesa.model import GatedExponentialSmoothingLM
from mhesa.ops import conv1d_fft, exponential_smoothing, exponential_smoothing_step

__version__ = "0.1.0"

__all__ = [
    "MHESA",
    "GatedExponentialSmoothingLM",
    "GatedMHESA",
    "conv1d_fft",
    "exponential_smoothing",
    "exponential_smoothing_step",
]
