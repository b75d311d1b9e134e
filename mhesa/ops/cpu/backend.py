"""The backend `numba`: the CPU's kernels as one operator."""

from __future__ import annotations

from mhesa.ops.cpu import rates
from mhesa.ops.cpu import scan as fixed
from mhesa.ops.registration import FixedKernels, StepKernels, make_scan

scan = make_scan(
    "numba", FixedKernels(fixed.forward, fixed.backward), StepKernels(rates.forward, rates.backward)
)
