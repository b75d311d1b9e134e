"""CPU kernels compiled by numba: the scan, the convolution, GELU, and the tools they are written with."""
