"""Training: transformers' `Trainer`, and what it does not do already."""

from mhesa.training.outcome import Summary
from mhesa.training.run import Stopped, train
from mhesa.training.settings import TrainingSettings

__all__ = ["Stopped", "Summary", "TrainingSettings", "train"]
