"""Where the time of a training step goes."""

from pathlib import Path

from torch.profiler import profile, schedule
from transformers import TrainerCallback

WARM_UP_STEPS, RECORDED_STEPS = 3, 5


class Profiler(TrainerCallback):
    """Records training steps 4 to 8 with `torch.profiler` into `profile/trace-<rank>.json`, for chrome://tracing."""

    def on_train_begin(self, args, state, control, **kwargs):
        """Start."""
        folder = Path(str(args.output_dir)) / "profile"
        folder.mkdir(exist_ok=True)
        self.profile = profile(
            schedule=schedule(wait=0, warmup=WARM_UP_STEPS, active=RECORDED_STEPS, repeat=1),
            on_trace_ready=lambda p: p.export_chrome_trace(str(folder / f"trace-{args.process_index}.json")),
        )
        self.profile.start()

    def on_step_end(self, args, state, control, **kwargs):
        """Go on to the next step."""
        self.profile.step()

    def on_train_end(self, args, state, control, **kwargs):
        """Stop."""
        self.profile.stop()
