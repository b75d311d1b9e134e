"""CPU kernels compiled by numba: the scan and GELU, and the tools that they are written with."""
