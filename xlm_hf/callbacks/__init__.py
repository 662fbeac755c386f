"""Callbacks of the trainer."""

from .budget import Budget
from .early_stopping import EarlyStopping
from .predictions import show_predictions, write_predictions
from .profiler import Profiler
from .progress import ProgressBar
from .trackers import TensorBoardTracker, WandbTracker

__all__ = [
    "Budget",
    "EarlyStopping",
    "Profiler",
    "ProgressBar",
    "TensorBoardTracker",
    "WandbTracker",
    "show_predictions",
    "write_predictions",
]
