"""job=push_to_hub: upload a run, a checkpoint or a model folder as a self-contained repository."""

import json
import tempfile
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from xlm_hf.building import load_tokenizer, plain
from xlm_hf.commands._run import card_variables, model_of_checkpoint, say
from xlm_hf.hub.export import export_model
from xlm_hf.hub.upload import push_folder
from xlm_hf.saved_configs import load_config
from xlm_hf.training.checkpoints import resolve_checkpoint, saved_state


def run(cfg: DictConfig) -> str:
    """Upload `checkpoint` to `trainer.hub_model_id`, with a card that tells of its run; return the address.

    Raises:
        ValueError: if no repository or checkpoint is named.
        OSError: one sentence, if the Hub refuses or cannot be reached; nothing is lost here.
    """
    repo_id = cfg.trainer.get("hub_model_id")
    if repo_id is None:
        raise ValueError("job=push_to_hub needs the name of a repository: add trainer.hub_model_id=USER/NAME.")
    model, tokenizer = model_of_checkpoint(cfg), load_tokenizer(cfg.checkpoint, cfg.trust_remote_code)
    variables = {**_run_variables(Path(resolve_checkpoint(cfg.checkpoint))), "model_id": repo_id}
    with tempfile.TemporaryDirectory() as folder:
        export = export_model(model, tokenizer, Path(folder) / "model", variables)
        private, token = cfg.trainer.get("hub_private_repo"), cfg.trainer.get("hub_token")
        url = push_folder(export, repo_id, private, token, exist_ok=cfg.exist_ok)
    say(f"{url}\nLoad it: AutoModel.from_pretrained({repo_id!r}, trust_remote_code=True)")
    return url


def _run_variables(source: Path) -> dict[str, Any]:
    """What the card says of the run that a model or checkpoint folder lies in; nothing if it lies in none."""
    folder = source.parent
    if not (folder / "config.yaml").exists():
        return {}
    config = plain(load_config(folder / "config.yaml"))
    if (source / "trainer_state.json").exists():
        state = saved_state(source)
        metrics = {name: value for log in state.log_history for name, value in log.items() if "/" in name}
        return card_variables(config, {**metrics, "steps": state.global_step}, {})
    metrics = json.loads((folder / "metrics.json").read_text())
    files = sorted((folder / "predictions").glob("*.jsonl"))
    predictions = {file.stem: [json.loads(line) for line in file.read_text().splitlines()] for file in files}
    return card_variables(config, metrics, predictions)
