"""CPU kernels, compiled by numba: the scan, GELU, and what both are made of."""
