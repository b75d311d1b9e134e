"""The backend `triton`: the GPU's kernels as one operator."""

from __future__ import annotations

from mhesa.ops.registration import FixedKernels, StepKernels, make_scan
from mhesa.ops.triton import rates
from mhesa.ops.triton import scan as fixed

scan = make_scan(
    "triton", FixedKernels(fixed.forward, fixed.backward), StepKernels(rates.forward, rates.backward)
)
