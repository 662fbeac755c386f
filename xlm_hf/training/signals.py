"""Ending a run early without losing a step."""

import os
import select
import signal
import threading
from types import FrameType

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
# In the environment of a process that ends when its standard input does, which the one that it belongs to holds open.
ENDS_WITH_INPUT = "XLM_HF_ENDS_WITH_INPUT"


def end_with_parent() -> None:
    """Let a run of a comparison, or a rank, get a SIGTERM once the comparison or the launcher is gone.

    Through a launcher the end of the comparison is seen by the standard input alone.
    """
    parent, inputs = os.getppid(), [0] if ENDS_WITH_INPUT in os.environ else []

    def watch() -> None:
        while os.getppid() == parent and not select.select(inputs, [], [], 0.5)[0]:
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    if inputs or "TORCHELASTIC_RUN_ID" in os.environ:
        threading.Thread(target=watch, daemon=True).start()


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
