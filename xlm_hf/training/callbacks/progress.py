"""Seeing a run: a bar with the current metrics in a terminal, a plain line for each log elsewhere."""

import logging
import sys
from collections.abc import Sequence

from tqdm.auto import tqdm
from transformers import TrainerCallback

logger = logging.getLogger(__name__)

# A bar has space for what changes most.
_NOT_IN_BAR = ("total_flos", "learning_rate", "grad_norm", "epoch")


def format_metrics(metrics: dict[str, float], hidden: Sequence[str] = ("total_flos",)) -> str:
    """`name value` pairs in one line, floats to four significant digits, without those in `hidden`."""
    return "  ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in metrics.items()
        if name not in hidden
    )


class ProgressBar(TrainerCallback):
    """Shows steps, remaining time and the latest metrics on standard error, on the main process."""

    def __init__(self):
        self.bar = None

    def on_train_begin(self, args, state, control, **kwargs):
        """Open the bar where someone can watch it."""
        if state.is_world_process_zero and sys.stderr.isatty() and not args.disable_tqdm:
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, dynamic_ncols=True)

    def on_step_end(self, args, state, control, **kwargs):
        """Advance by one step."""
        if self.bar is not None:
            self.bar.update()

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Show the training metrics beside the bar, and evaluations as lines of their own."""
        if not state.is_world_process_zero:
            return
        line = f"step {state.global_step}/{state.max_steps}  {format_metrics(logs)}"
        if self.bar is None:
            logger.info(line)
        elif "loss" in logs:
            self.bar.set_postfix_str(format_metrics(logs, _NOT_IN_BAR))
        else:
            self.bar.write(line, file=sys.stderr)

    def on_train_end(self, args, state, control, **kwargs):
        """Close the bar."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None
