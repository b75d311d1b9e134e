"""What a run would take at least, against what the machine has: better said at once than found out."""

from __future__ import annotations

import os

import torch

from mhesa.errors import InputError
from mhesa.training.distributed import processes
from mhesa.training.settings import TrainingSettings

# Weights, gradients and two moments of AdamW, in fp32.
BYTES_A_PARAMETER = 16


def check_memory(settings: TrainingSettings, vocab_size: int) -> None:
    """Raise `InputError` for a model or a batch that cannot fit, by what they take at the very least."""
    there = _memory(settings.device)
    if there is None:
        return
    parameters = settings.model_config(vocab_size).parameters
    model = BYTES_A_PARAMETER * parameters // (processes() if settings.fsdp else 1)
    if model > there:
        raise InputError(
            f"a model of {parameters:,} parameters takes {_gigabytes(model)} to train and {settings.device} "
            f"has {_gigabytes(there)}; make dim, depth or dim_mhesa smaller"
        )
    batch = _activations(settings)
    if model + batch > there:
        raise InputError(
            f"{settings.windows_a_step:,} windows of {settings.context:,} tokens take "
            f"{_gigabytes(batch)} and {settings.device} has {_gigabytes(there)}; make batch_size or context "
            "smaller, or accumulate larger"
        )


def _activations(settings: TrainingSettings) -> int:
    """Bytes that a micro-batch leaves for the backward pass, in 2 bytes an element at the least."""
    hidden = int(settings.dim_expansion_factor * settings.dim)
    width = settings.dim if settings.recompute else settings.dim + 2 * hidden + 2 * settings.dim_mhesa
    tokens = settings.windows_a_step * settings.context // (settings.accumulate * processes())
    return 2 * tokens * settings.depth * width


def _memory(device: str) -> int | None:
    """Bytes of memory that a device has in all, `None` if it does not say."""
    kind = torch.device(device).type
    if kind == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    if kind == "cpu" and hasattr(os, "sysconf"):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None


def _gigabytes(size: int) -> str:
    return f"{size / 2**30:,.1f} GB"
