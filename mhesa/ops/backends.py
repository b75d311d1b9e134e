"""The implementations of the operator, and which of them can serve a tensor.

A backend is a module of this package with one function,

    scan(x, alpha, decay, skip, initial_state, cu_seqlens, reverse) -> (y, final_state)

over inputs that `exponential_smoothing` has checked: `alpha` and `decay` are `(heads,)` or
`(batch, length, heads)`, each by itself; they, `skip` and `initial_state` have the accumulation type (fp32,
or fp64 for fp64 `x`). A module is imported at its first use, so that
`import mhesa` is fast and does not need Triton.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from mhesa.errors import InputError

Scan = Callable[
    [Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, bool], tuple[Tensor, Tensor]
]


class Inputs(NamedTuple):
    """The arguments of a scan, in the order of every backend.

    `x` is `(batch, length, heads, head_dim)`; for the others see `mhesa.ops.exponential_smoothing`.
    """

    x: Tensor
    alpha: Tensor
    decay: Tensor
    skip: Tensor | None
    initial_state: Tensor | None
    cu_seqlens: Tensor | None
    reverse: bool


@dataclass(frozen=True)
class Backend:
    """A backend's module, and what it needs.

    Args:
        module: module that has the backend's `scan`.
        devices: device types that it runs on; empty: any.
        package: package that it needs.
        fixed_rates: whether it can only scan at fixed rates, `(heads,)`.
    """

    module: str
    devices: frozenset[str] = frozenset()
    package: str | None = None
    fixed_rates: bool = False

    def serves(self, device: torch.device, *, fixed_rates: bool = True) -> bool:
        """Whether it can scan tensors on `device` on this machine, at fixed rates or those of every step."""
        if self.devices and device.type not in self.devices:
            return False
        # The package is looked for last, because that may search the disk.
        return (fixed_rates or not self.fixed_rates) and (not self.package or bool(find_spec(self.package)))


# In order of preference: the first that serves is the default.
BACKENDS: dict[str, Backend] = {
    "triton": Backend("mhesa.ops.triton.backend", frozenset({"cuda", "xpu"}), "triton"),
    "numba": Backend("mhesa.ops.cpu.backend", frozenset({"cpu"}), "numba"),
    "chunked": Backend("mhesa.ops.chunked"),
    "fft": Backend("mhesa.ops.fft", fixed_rates=True),
    "reference": Backend("mhesa.ops.reference"),
}


# Types that the CPU kernels for single values read and write; the kernels belong to the backend "numba".
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def cpu_kernels_serve(tensors: list[Tensor], backend: str | None) -> bool:
    """Whether CPU kernels for single values serve tensors of any shape, for a layer whose backend this is."""
    x = tensors[0]
    return (
        backend in (None, "numba")
        and x.dtype in KERNEL_DTYPES
        and all(tensor.shape == x.shape and tensor.dtype == x.dtype for tensor in tensors)
        and all(BACKENDS["numba"].serves(tensor.device) for tensor in tensors)
    )


def check_backend(name: str | None) -> None:
    """Raise `InputError`, listing the valid names, unless `name` is a backend or `None`."""
    if name is not None and name not in BACKENDS:
        raise InputError(f"unknown backend {name!r}; choose from {', '.join(BACKENDS)}")


def resolve(name: str | None, device: torch.device, *, fixed_rates: bool = True) -> Scan:
    """The scan function of the named backend, or of the best one if `name` is `None`.

    In an exported graph the best one is `chunked`: the graph then runs where this package is not installed.
    So it is for forward-mode derivatives (`torch.func.jvp`), which fused kernels do not have.
    `fixed_rates` says whether both rates are `(heads,)`.

    Raises:
        InputError: the named backend is unknown or cannot serve; the message names those that can.
    """
    check_backend(name)
    compiling = torch.compiler.is_compiling()
    needs_chunked = torch.compiler.is_exporting() if compiling else forward_ad._current_level >= 0
    best = ("chunked",) if needs_chunked else BACKENDS
    for known in best if name is None else (name,):
        if BACKENDS[known].serves(device, fixed_rates=fixed_rates):
            module = BACKENDS[known].module
            break
    else:
        serving = [
            known for known, backend in BACKENDS.items() if backend.serves(device, fixed_rates=fixed_rates)
        ]
        rates = "" if fixed_rates else " with rates of every step"
        raise InputError(
            f"backend {name!r} cannot serve a {device.type} tensor{rates} here; "
            f"these can: {', '.join(serving)}"
        )
    _load(module)
    return _SCANS[module]


_SCANS: dict[str, Scan] = {}


def _load(module: str) -> bool:
    """Import a backend. `torch.compile` cannot trace the import, so it runs this function."""
    if module not in _SCANS:
        _SCANS[module] = import_module(module).scan
    return True


# The attribute that `torch.compiler.assume_constant_result` sets; calling it would import the compiler.
_load._dynamo_marked_constant = True  # type: ignore[attr-defined]
