"""Callbacks of the trainer."""

from .budget import Budget
from .early_stopping import EarlyStopping
from .progress import ProgressBar

__all__ = ["Budget", "EarlyStopping", "ProgressBar"]
