"""Training: transformers' `Trainer`, and what it does not do already."""

from mhesa.training.run import Stopped, Summary, train
from mhesa.training.settings import TrainingSettings

__all__ = ["Stopped", "Summary", "TrainingSettings", "train"]
