"""Ending a run whose validation metric no longer improves."""

from transformers import EarlyStoppingCallback
from transformers.trainer_callback import TrainerState


class EarlyStopping(EarlyStoppingCallback):
    """`transformers.EarlyStoppingCallback` for metrics that carry the name of their set, exact over resumes.

    Args:
        patience: evaluations in a row without an improvement of `metric_for_best_model` after which training ends.
        threshold: by how much it must change to count as improved.

    Raises:
        ValueError: if `patience` is less than 1 or `threshold` is negative.
    """

    def __init__(self, patience: int, threshold: float = 0.0):
        if patience < 1:
            raise ValueError(f"early_stopping.patience must be at least 1 and is {patience}.")
        if threshold < 0:
            raise ValueError(f"early_stopping.threshold must not be negative and is {threshold}.")
        super().__init__(patience, threshold)

    def is_finished(self, state: TrainerState) -> bool:
        """Whether the run that was saved with `state` ended by this rule."""
        saved: dict = state.stateful_callbacks.get(type(self).__name__, {})  # type: ignore[union-attr]
        self.early_stopping_patience_counter = saved.get("attributes", {}).get("early_stopping_patience_counter", 0)
        return self.early_stopping_patience_counter >= self.early_stopping_patience

    def state(self) -> dict:
        """What a checkpoint keeps."""
        return {
            "args": {"patience": self.early_stopping_patience, "threshold": self.early_stopping_threshold},
            "attributes": {"early_stopping_patience_counter": self.early_stopping_patience_counter},
        }

    def on_train_begin(self, args, state, control, **kwargs):
        """Take up the count of the checkpoint; raises ValueError if nothing is evaluated."""
        if args.eval_strategy == "no" or args.metric_for_best_model is None:
            raise ValueError(
                "early_stopping.patience needs evaluations and their metric: set trainer.eval_strategy=steps and "
                "trainer.metric_for_best_model, or early_stopping.patience=null."
            )
        self.is_finished(state)

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        """Count an evaluation without improvement, and save the state in which training ends."""
        # The parent looks its metric up under the prefix eval_; other stages do not report it.
        if args.metric_for_best_model in metrics:
            renamed = {f"eval_{name}": value for name, value in metrics.items()}
            super().on_evaluate(args, state, control, renamed, **kwargs)
            control.should_save |= control.should_training_stop and args.save_strategy != "no"
