"""Callbacks of the trainer."""

from .progress import ProgressBar

__all__ = ["ProgressBar"]
