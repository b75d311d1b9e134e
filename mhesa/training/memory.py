"""An estimate of the memory that a run needs, to refuse at once what cannot fit."""

from __future__ import annotations

import os

import torch

from mhesa.errors import InputError
from mhesa.processes import processes
from mhesa.training.settings import TrainingSettings

# Weights, gradients and two moments of AdamW, in fp32.
BYTES_PER_PARAMETER = 16


def check_memory(settings: TrainingSettings, vocab_size: int) -> None:
    """Raise `InputError` if the least memory that the model and a batch can need is more than there is."""
    available = _memory(settings.device)
    if available is None:
        return
    parameters = settings.model_config(vocab_size).parameters
    model = BYTES_PER_PARAMETER * parameters // (processes() if settings.fsdp else 1)
    if model > available:
        raise InputError(
            f"a model of {parameters:,} parameters takes {_gigabytes(model)} to train and {settings.device} "
            f"has {_gigabytes(available)}; make dim, depth or dim_mhesa smaller"
        )
    batch = _activations(settings)
    if model + batch > available:
        raise InputError(
            f"{settings.windows_per_step:,} windows of {settings.context:,} tokens take "
            f"{_gigabytes(batch)} and {settings.device} has {_gigabytes(available)}; make batch_size or "
            "context smaller, or accumulate larger"
        )


def _activations(settings: TrainingSettings) -> int:
    """The least bytes that a micro-batch keeps for the backward pass, at 2 bytes an element."""
    hidden = settings.dim_hidden
    width = settings.dim if settings.recompute else settings.dim + 2 * hidden + 2 * settings.dim_mhesa
    tokens = settings.windows_per_step * settings.context // (settings.accumulate * processes())
    return 2 * tokens * settings.depth * width


def _memory(device: str) -> int | None:
    """The memory of a device in bytes, `None` if it is not known."""
    kind = torch.device(device).type
    if kind == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    if kind == "cpu" and hasattr(os, "sysconf"):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None


def _gigabytes(size: int) -> str:
    return f"{size / 2**30:,.1f} GB"
