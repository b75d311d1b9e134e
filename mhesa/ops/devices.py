"""The devices of this machine."""

from __future__ import annotations

import torch

from mhesa.errors import InputError
from mhesa.ops.backends import resolve


def best_device() -> str:
    """The accelerator if there is one, else `cpu`."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator.type if accelerator else "cpu"


def resolve_device(name: str) -> str:
    """The best device here for `auto`; any other name as it is, see `check_device`."""
    if name == "auto":
        return best_device()
    check_device(name)
    return name


def check_device(name: str) -> None:
    """Raise `InputError` unless `name` is a torch device of this machine."""
    try:
        kind = torch.device(name).type
    except RuntimeError as error:
        raise InputError(f"unknown device {name!r}; use cpu, cuda, cuda:1, mps or xpu") from error
    here = dict.fromkeys(["cpu", best_device()])
    if kind not in here:
        raise InputError(f"there is no {kind} device on this machine; it has {', '.join(here)}")


def check_serves(backend: str | None, device: str, *, fixed_rates: bool) -> None:
    """Raise `InputError` unless the operator's backend works there, with such rates; `None` always does."""
    resolve(backend, torch.device(device), fixed_rates=fixed_rates)


def computes_in_bf16(kind: str) -> bool:
    """Whether a kind of device multiplies bf16 matrices natively: only then is bf16 faster than fp32."""
    if kind == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return kind == "xpu" or (kind == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False))
