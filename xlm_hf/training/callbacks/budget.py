"""Ending a run once the tokens or seconds that it may spend are spent."""

import math
import time

import torch
from accelerate.utils import reduce
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState, TrainerState

from xlm_hf.modules.checked_options import Positive, check_arguments


class Budget(TrainerCallback, ExportableState):
    """Counts the seconds of training, over resumes, and ends training after the step that spends the budget.

    Seconds are those of training steps with their data; evaluating and saving are not counted. The learning-rate
    schedule follows the share s of the budget that is spent, as counted one step before. Its value is that of step
    s * max_steps.

    Args:
        tokens: training tokens without padding, over all ranks; None sets no bound.
        seconds: training seconds, of the mean rank; None sets no bound.

    Raises:
        ValueError: for a budget that is not positive.
    """

    def __init__(self, tokens: Positive | None = None, seconds: Positive | None = None):
        check_arguments("budget", {"tokens": tokens, "seconds": seconds}, Budget)
        self.tokens = tokens
        self.seconds = seconds
        self.spent_seconds = 0.0
        self._mark = 0.0

    def share(self, state: TrainerState) -> float:
        """The share of the budget that is spent, from 0 to 1; the larger one of two budgets."""
        tokens, seconds = self.tokens or math.inf, self.seconds or math.inf
        return min(max(state.num_input_tokens_seen / tokens, self.spent_seconds / seconds), 1.0)

    def is_finished(self, state: TrainerState) -> bool:
        """Whether the run that was saved with `state` has spent its budget."""
        self.spent_seconds = saved_seconds(state)
        return self.share(state) >= 1

    def state(self) -> dict:
        """What a checkpoint keeps."""
        limits = {"tokens": self.tokens, "seconds": self.seconds}
        return {"args": limits, "attributes": {"spent_seconds": self.spent_seconds}}

    def on_train_begin(self, args, state, control, lr_scheduler=None, **kwargs):
        """Take up the count of the checkpoint, and tie the schedule to the budget."""
        self.spent_seconds = saved_seconds(state)
        self._mark = time.perf_counter()
        if (self.tokens or self.seconds) and hasattr(lr_scheduler, "lr_lambdas"):
            lr_scheduler.lr_lambdas = [
                lambda _, rate=rate: rate(self.share(state) * state.max_steps) for rate in lr_scheduler.lr_lambdas
            ]

    def on_step_end(self, args, state, control, **kwargs):
        """Count, and end training with a last evaluation and checkpoint, as the last step does."""
        now = time.perf_counter()
        self.spent_seconds += now - self._mark
        self._mark = now
        if self.seconds is not None:
            # The ranks must stop at the same step.
            spent = torch.tensor(self.spent_seconds, dtype=torch.float32, device=args.device)
            self.spent_seconds = reduce(spent, "mean").item()
        if self.share(state) >= 1:
            control.should_training_stop = True
            control.should_evaluate |= args.eval_strategy != "no"
            control.should_save |= args.save_strategy not in ("no", "best")

    def on_save(self, args, state, control, **kwargs):
        """Leave saving, and evaluating, out of the count."""
        self._mark = time.perf_counter()

    on_evaluate = on_save

    def on_train_end(self, args, state, control, **kwargs):
        """Leave the count in the state, whether or not a checkpoint was written last."""
        state.stateful_callbacks[type(self).__name__] = self.state()


def saved_seconds(state: TrainerState) -> float:
    """Seconds of training, over resumes, of the run that was saved with `state`."""
    saved: dict = state.stateful_callbacks.get(Budget.__name__, {})  # type: ignore[union-attr]
    return saved.get("attributes", {}).get("spent_seconds", 0.0)
