"""Ending a run whose validation metric no longer improves."""

from transformers import EarlyStoppingCallback
from transformers.trainer_callback import TrainerState


class EarlyStopping(EarlyStoppingCallback):
    """`transformers.EarlyStoppingCallback` for metrics that carry the name of their set, exact over resumes."""

    def is_finished(self, state: TrainerState) -> bool:
        """Whether the run that was saved with `state` ended by this rule."""
        saved: dict = state.stateful_callbacks.get(type(self).__name__, {})  # type: ignore[union-attr]
        self.early_stopping_patience_counter = saved.get("attributes", {}).get("early_stopping_patience_counter", 0)
        return self.early_stopping_patience_counter >= self.early_stopping_patience

    def on_train_begin(self, args, state, control, **kwargs):
        """Take up the count of the checkpoint; raises ValueError for an option that it cannot work with."""
        if args.eval_strategy == "no" or not args.metric_for_best_model:
            raise ValueError("early_stopping needs trainer.eval_strategy=steps and a trainer.metric_for_best_model.")
        self.is_finished(state)

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        """Count an evaluation without improvement, and save the state in which training ends."""
        # Other stages do not report it.
        if f"eval_{args.metric_for_best_model}" in metrics:
            super().on_evaluate(args, state, control, metrics, **kwargs)
            control.should_save |= control.should_training_stop and args.save_strategy != "no"
