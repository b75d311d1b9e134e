"""Linear-time language models built on exponential smoothing."""

from mhesa.decoding import Decoder
from mhesa.generation import generate
from mhesa.layers import MHESA, GatedMHESA
from mhesa.model import GatedExponentialSmoothingLM
from mhesa.ops import conv1d_fft, exponential_smoothing, exponential_smoothing_step
from mhesa.sampling import Sampling
from mhesa.session import Reader, Session

__version__ = "0.1.0"

__all__ = [
    "MHESA",
    "Decoder",
    "GatedExponentialSmoothingLM",
    "GatedMHESA",
    "Reader",
    "Sampling",
    "Session",
    "conv1d_fft",
    "exponential_smoothing",
    "exponential_smoothing_step",
    "generate",
]
