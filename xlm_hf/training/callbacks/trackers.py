"""Where metrics and predictions are shown: Weights & Biases and TensorBoard, under the names that the trainer gives."""

import logging
import os
from pathlib import Path
from typing import Any

from requests.utils import get_netrc_auth
from transformers.integrations import TensorBoardCallback, WandbCallback

logger = logging.getLogger(__name__)


def tracked_names(logs: dict[str, Any]) -> dict[str, Any]:
    """Metrics of an evaluation set keep their name, `validation/loss`; those of training get the prefix `train/`."""
    return {name if "/" in name else f"train/{name}": value for name, value in logs.items()}


def prediction_table(records: list[dict[str, Any]], num_rows: int) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows of the first records; lists, as of token ids or steps, become text."""
    columns = list(dict.fromkeys(name for record in records[:num_rows] for name in record))
    rows = [[record.get(name) for name in columns] for record in records[:num_rows]]
    return columns, [[" ".join(map(str, cell)) if isinstance(cell, list) else cell for cell in row] for row in rows]


def _is_logged_in_to_wandb() -> bool:
    server = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    return "WANDB_API_KEY" in os.environ or get_netrc_auth(server) is not None


class WandbTracker(WandbCallback):
    """Weights & Biases; offline, without a question, unless WANDB_API_KEY or ~/.netrc say who is there."""

    # The run that this class has started in this process; one that somebody else has started is theirs to end.
    _own_run: Any = None

    def setup(self, args, state, model, **kwargs):
        """Start a run, kept in the folder of ours."""
        if state.is_world_process_zero and self._wandb.run is WandbTracker._own_run:
            if self._wandb.run is not None:
                self._wandb.finish()
            WandbTracker._own_run = self._start(args)
        super().setup(args, state, model, **kwargs)

    def _start(self, args) -> Any:
        folder = str(args.output_dir)
        options = {"project": os.environ.get("WANDB_PROJECT", "xlm-hf"), "dir": folder}
        options["name"] = args.run_name or Path(folder).name
        asked = "WANDB_MODE" in os.environ or _is_logged_in_to_wandb()
        try:
            return self._wandb.init(mode=None if asked else "offline", settings=self._settings(), **options)
        except self._wandb.Error as error:
            logger.warning("Weights & Biases goes on offline (%s): `wandb sync` sends the run later.", error)
            return self._wandb.init(mode="offline", settings=self._settings(), **options)

    def _settings(self) -> Any:
        return self._wandb.Settings(silent=True, init_timeout=30)

    def on_log(self, args, state, control, model=None, logs=None, **kwargs):
        """Send the metrics."""
        self._send(args, state, model, tracked_names(logs))

    def log_predictions(self, args, state, model, name, records):
        """Send the predictions of an evaluation set as a table, in place of the earlier one."""
        columns, rows = prediction_table(records, args.tracked_predictions)
        self._send(args, state, model, {f"predictions/{name}": self._wandb.Table(columns=columns, data=rows)})

    def _send(self, args, state, model, values: dict[str, Any]) -> None:
        if not self._initialized:
            self.setup(args, state, model)
        if state.is_world_process_zero:
            self._wandb.log({**values, "train/global_step": state.global_step})


class TensorBoardTracker(TensorBoardCallback):
    """TensorBoard, in `runs/` of the run's folder."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Write the metrics."""
        if state.is_world_process_zero:
            for name, value in tracked_names(logs).items():
                self._writer(args).add_scalar(name, value, state.global_step)
            self._writer(args).flush()

    def log_predictions(self, args, state, model, name, records):
        """Write the predictions of an evaluation set as a table."""
        columns, rows = prediction_table(records, args.tracked_predictions)
        lines = [columns, ["---"] * len(columns), *rows]
        text = "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)
        self._writer(args).add_text(f"predictions/{name}", text, state.global_step)
        self._writer(args).flush()

    def _writer(self, args) -> Any:
        if self.tb_writer is None:
            # Also after training, and without any, where the parent would choose a folder of its own.
            self.logging_dir = self.logging_dir or f"{args.output_dir}/runs"
            self._init_summary_writer(args)
        return self.tb_writer
