"""Ending a run early without losing a step."""

import signal
import threading
from types import FrameType

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class TrainingStopped(KeyboardInterrupt):
    """Training ended early because a signal asked for it, and was saved.

    Attributes:
        signal_number: the signal.
    """

    def __init__(self, signal_number: int, step: int):
        super().__init__(
            f"{signal.Signals(signal_number).name} stopped the run after step {step}, which is saved. The same command "
            "with the same output_dir resumes."
        )
        self.signal_number = signal_number


class StopSignals:
    """Notes SIGTERM and SIGINT within a `with` block instead of dying from them; a second SIGINT interrupts at once.

    Attributes:
        received: the first signal that arrived, 0 for none.
    """

    received = 0

    def __enter__(self) -> "StopSignals":
        # Only the main thread may set handlers; elsewhere, e.g. in a notebook server, signals stay as they are.
        handled = _SIGNALS if threading.current_thread() is threading.main_thread() else ()
        self._previous = {number: signal.signal(number, self._receive) for number in handled}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received:
            raise KeyboardInterrupt
        self.received = self.received or number
