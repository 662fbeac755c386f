"""What a model wrote, on file and on the console."""

import json
import logging
from pathlib import Path
from typing import Any

from xlm_hf.files import write_text

logger = logging.getLogger(__name__)


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
