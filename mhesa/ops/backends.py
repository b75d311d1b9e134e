"""The implementations of the operator, and which of them can serve a tensor.

A backend is a module of this package with one function,

    scan(x, alpha, decay, skip, initial_state, cu_seqlens, reverse) -> (y, final_state)

over inputs that `exponential_smoothing` has checked: `alpha`, `decay`, `skip` and `initial_state` have
the accumulation type (fp32, or fp64 for fp64 `x`). A module is imported at its first use, so that
`import mhesa` is fast and needs no optional package.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor

Scan = Callable[
    [Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, bool], tuple[Tensor, Tensor]
]


@dataclass(frozen=True)
class Backend:
    """A backend's module, the device types it runs on (empty: any), and the optional package it needs."""

    module: str
    devices: frozenset[str] = frozenset()
    package: str | None = None

    def serves(self, device: torch.device) -> bool:
        """Whether it can scan tensors on `device` on this machine."""
        on_device = not self.devices or device.type in self.devices
        return on_device and (self.package is None or find_spec(self.package) is not None)


# In order of preference: the first that serves is the default.
BACKENDS: dict[str, Backend] = {
    "triton": Backend("mhesa.ops.triton.scan", frozenset({"cuda", "xpu"}), "triton"),
    "numba": Backend("mhesa.ops.cpu.scan", frozenset({"cpu"}), "numba"),
    "chunked": Backend("mhesa.ops.chunked"),
    "fft": Backend("mhesa.ops.fft"),
    "reference": Backend("mhesa.ops.reference"),
}


def check_backend(name: str | None) -> None:
    """Raise `ValueError`, listing the valid names, unless `name` is a backend or `None`."""
    if name is not None and name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}; choose from {', '.join(BACKENDS)}")


def resolve(name: str | None, device: torch.device) -> Scan:
    """The scan function of the named backend, or of the best one for `device` if `name` is `None`."""
    check_backend(name)
    for known in BACKENDS if name is None else (name,):
        if BACKENDS[known].serves(device):
            module = BACKENDS[known].module
            break
    else:
        serving = [known for known, backend in BACKENDS.items() if backend.serves(device)]
        raise ValueError(
            f"backend {name!r} cannot serve a {device.type} tensor here; these can: {', '.join(serving)}"
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
