"""What every export refuses."""

from __future__ import annotations

from mhesa.errors import InputError
from mhesa.model.lm import GatedExponentialSmoothingLM


def check_finite(model: GatedExponentialSmoothingLM) -> None:
    """Raise `InputError` if a weight is not a finite number."""
    for name, weight in model.named_parameters():
        if not weight.isfinite().all():
            raise InputError(f"the model's weights are not finite: {name}; train it again")
