"""The operator: one signature, one module per backend, and a slow reference that defines it."""

from mhesa.ops.backends import BACKENDS
from mhesa.ops.fft import conv1d_fft
from mhesa.ops.smoothing import exponential_smoothing, exponential_smoothing_step

__all__ = ["BACKENDS", "conv1d_fft", "exponential_smoothing", "exponential_smoothing_step"]
