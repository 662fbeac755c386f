"""Seeing a run: a bar in a terminal, a table in a notebook, a plain line for each log elsewhere; all of it on file.

And what a model wrote, on file and on the console.
"""

import json
import logging
import sys
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback

from xlm_hf.files import append_lines, write_text

logger = logging.getLogger(__name__)


def format_metrics(metrics: dict[str, float]) -> str:
    """`name value` pairs in one line, floats to four significant digits."""
    return "  ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in metrics.items()
        if name != "total_flos"
    )


def write_predictions(output_dir: Path, name: str, records: list[dict[str, Any]]) -> None:
    """Write `predictions/<name>.jsonl`, a record a line, in place of the earlier one."""
    folder = output_dir / "predictions"
    folder.mkdir(exist_ok=True)
    write_text(folder / f"{name}.jsonl", "".join(json.dumps(record) + "\n" for record in records))


def show_predictions(name: str, records: list[dict[str, Any]], width: int = 100) -> None:
    """Log records as lines of prompt, prediction and reference, each cut to `width` characters."""
    for record in records:
        for field in ("prompt", "prediction", "reference"):
            if text := str(record.get(field) or ""):
                shown = text if len(text) <= width else text[: width - 3] + "..."
                logger.info("%s %s  %-10s  %s", name, record["example_id"], field, shown)


class MetricsFile(TrainerCallback):
    """Writes `metrics.jsonl` into the run's folder as the run goes: a line for each log, also of the resumed past."""

    def on_train_begin(self, args, state, control, **kwargs):
        """Begin with what was logged up to the checkpoint."""
        self._write(args, state, state.log_history, is_first=True)

    def on_log(self, args, state, control, **kwargs):
        """Add what was logged last."""
        self._write(args, state, state.log_history[-1:])

    def _write(self, args, state, logs, is_first=False):
        if state.is_world_process_zero:
            file = Path(str(args.output_dir)) / "metrics.jsonl"
            if is_first:
                write_text(file, "")
            append_lines(file, (json.dumps(log, default=float) for log in logs))


class ProgressBar(TrainerCallback):
    """Shows the steps, the loss and the remaining time in a terminal, and everything as lines in the log.

    Where nobody has set up the log of the package, as the command line does, the lines are printed.
    """

    def __init__(self):
        self.bar = None
        self.is_training = False

    def on_train_begin(self, args, state, control, **kwargs):
        """Open the bar where someone can watch it."""
        self.is_training = True
        if state.is_world_process_zero and sys.stderr.isatty() and not args.disable_tqdm:
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, dynamic_ncols=True, unit="step")

    def on_step_end(self, args, state, control, **kwargs):
        """Advance by one step."""
        if self.bar is not None:
            self.bar.update()

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Show the loss beside the bar, and evaluations above it; log everything."""
        if not state.is_world_process_zero:
            return
        line = f"step {state.global_step}/{state.max_steps}  {format_metrics(logs)}"
        if self.bar is None and not logger.isEnabledFor(logging.INFO):
            print(line, flush=True)
        elif self.bar is not None and "loss" in logs:
            self.bar.set_postfix_str(f"loss {logs['loss']:.4g}")
        elif self.bar is not None:
            self.bar.write(line, file=sys.stderr)
        # What the console shows already, or as the table at the end, goes to the file alone.
        package = logging.getLogger("xlm_hf")
        package.propagate = self.bar is None and self.is_training
        logger.info(line)
        package.propagate = True

    def on_train_end(self, args, state, control, **kwargs):
        """Close the bar."""
        self.is_training = False
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def notebook_table() -> TrainerCallback:
    """The table of transformers for a notebook, which calls the metrics of `validation` by their own names."""
    # It needs IPython, which only a notebook is sure to have.
    from transformers.utils.notebook import NotebookProgressCallback

    class Table(NotebookProgressCallback):
        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            names = {name: name.replace("eval_validation/", "eval_") for name in metrics}
            super().on_evaluate(args, state, control, {names[name]: x for name, x in metrics.items()}, **kwargs)

    return Table()
