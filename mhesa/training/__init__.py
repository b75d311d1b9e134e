"""Training a model on text; `mhesa.training.loop` is the loop itself."""

from mhesa.training.outcome import Summary
from mhesa.training.run import Stopped, train
from mhesa.training.settings import TrainingSettings

__all__ = ["Stopped", "Summary", "TrainingSettings", "train"]
