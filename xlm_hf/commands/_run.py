"""What the jobs share: the folder of a run and what it holds, and the lines for a person at the command line."""

import contextlib
import json
import logging
import os
import re
import shlex
import shutil
import socket
import sys
import time
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import xxhash
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from filelock import FileLock, Timeout
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from transformers import PreTrainedModel

from xlm_hf.building import load_model, plain
from xlm_hf.data import Mixture
from xlm_hf.evaluation import default_evaluation
from xlm_hf.families import families
from xlm_hf.files import JOURNAL_SUFFIX, write_text
from xlm_hf.modules.counter_random import random_bits
from xlm_hf.modules.messages import import_target
from xlm_hf.reports.comparison import NOT_IN_TABLE, number
from xlm_hf.saved_configs import load_config
from xlm_hf.tasks import Task
from xlm_hf.tasks.tokenizers import tokenizer_key
from xlm_hf.training.callbacks.progress import show_predictions, write_predictions
from xlm_hf.training.checkpoints import list_checkpoints, step_of

# What a change of an option means for a folder that has a run; the first pattern decides.
# "harmless": nothing. "measured": taken by a training and recorded; another result in a comparison. "trained": the
# same, but a finished training can no longer take it. "another": it is another run.
_CHANGES = {
    r"output_dir|checkpoint|prompts|exist_ok|job|experiment|num_threads|trust_remote_code|logger\..*": "harmless",
    r"task\.(path|test_path|cache_dir|num_proc)": "harmless",
    r"trainer\.((logging|save|hub)_.*|dataloader_(?!drop_last).*|push_to_hub|report_to|keep_every|disable_tqdm"
    r"|(shown|tracked)_predictions|per_device_eval_batch_size|use_cpu|torch_compile.*)": "harmless",
    r"task\.(num_test|num_samples|metrics|evaluation|max_new_tokens|do_sample)(\..*)?": "measured",
    r"generation\..*|num_samples|eval_model|ema": "measured",
    # Whose state is of no use to the other, and what decides which examples a step has.
    r"trainer\.(optim|optim_args|muon_learning_rate|seed|data_seed)": "another",
    r"(trainer|budget|early_stopping|debug)\..*": "trained",
    r".*": "another",
}
# Options whose values are never written or shown.
_SECRET = re.compile(r"\+*(.*\.)?(\w+_)?((hub|hf|access|auth)_token|api_key|password|secret)")
_SECRET_OPTION = re.compile(rf"{_SECRET.pattern}\s*[:=]")

# Differences of two configs that a message names.
_MOST_SHOWN = 5
# Of a process that is about to end.
_SECONDS_TO_WAIT = 10
_lock: list[FileLock] = []
# The folder of this process's run, if it was empty.
_begun: list[Path] = []


def check_same_run(folder: Path, cfg: DictConfig, whole: bool = False) -> dict[str, tuple[str, Any, Any]]:
    """What differs from the config of the run in `folder`, by the table `_CHANGES`; one without a run is anyone's.

    An option that is not set is as good as one that is not there, and data are compared by their hashes alone.

    Args:
        folder: of the run, with the `config.yaml` that it saved.
        cfg: the config to run.
        whole: whether steps, evaluation and decoding must be the same too, as in a comparison.

    Returns:
        by option "measured" or "trained", the value before and that of `cfg`.

    Raises:
        ValueError: if it is another run.
    """
    file, changes, refused = folder / "config.yaml", {}, []
    if not file.exists():
        if list_checkpoints(folder):
            raise ValueError(f"{folder} holds checkpoints and no config.yaml, which says of what run: restore it.")
        return {}
    found, wanted = (_flat(_with_own_evaluation(plain(config))) for config in (load_config(file), cfg))
    for name in sorted(found.keys() | wanted.keys()):
        before, now = found.get(name), wanted.get(name)
        kind = next(kind for pattern, kind in _CHANGES.items() if re.fullmatch(pattern, name))
        # A hash that is not there is not known.
        if before == now or kind == "harmless" or (name.startswith("data_hash.") and None in (before, now)):
            continue
        if whole or kind == "another":
            refused.append(f"{name}={before} and not {now}")
        changes[name] = (kind, before, now)
    if refused:
        more = f" and {len(refused) - _MOST_SHOWN} more" if len(refused) > _MOST_SHOWN else ""
        raise ValueError(
            f"{folder} was run with {', '.join(refused[:_MOST_SHOWN])}{more}: choose another output_dir, or remove "
            "that folder to run it anew."
        )
    return changes


def data_hash(task: Task) -> dict[str, str]:
    """Hashes of what a training learns from and is validated on; of a stream the first examples count."""
    hashes = {"tokenizer": tokenizer_key(task.tokenizer)}
    for name in {"train", "validation"} & task.splits.keys():
        split, digest = task.splits[name], xxhash.xxh3_128()
        for data in split.sets if isinstance(split, Mixture) else [split]:
            tables = data.with_format("arrow").iter(1000)
            for table in tables if isinstance(data, Dataset) else islice(tables, 1):
                digest.update(table.combine_chunks().to_batches()[0].serialize())
        hashes[name] = digest.hexdigest()
    return hashes


def record(folder: Path, cfg: DictConfig, task: Task, trainer: Any, checkpoint: Path | None) -> None:
    """Write the config of a run with the hashes of its data, and log what changes at a checkpoint.

    Raises:
        ValueError: for another run, or for a change that a finished training can no longer take.
    """
    OmegaConf.update(cfg, "data_hash", data_hash(task), force_add=True)
    changes = check_same_run(folder, cfg)
    trained = [f"{name}={before}" for name, (kind, before, _) in changes.items() if kind == "trained"]
    if checkpoint is not None and trainer.is_finished(checkpoint) and trained:
        raise ValueError(
            f"{folder} is finished and was trained with {', '.join(trained)}, which can no longer change: raise "
            "trainer.max_steps or the budget to go on, or choose another output_dir."
        )
    if trainer.is_world_process_zero():
        write_text(folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(without_secrets(plain(cfg)))))
    if checkpoint is not None and changes:
        said = ", ".join(f"{name}={now} ({before} before)" for name, (_, before, now) in changes.items())
        logging.getLogger(__name__).info("From step %d on with %s.", step_of(checkpoint), said)


def without_secrets(config: Any) -> Any:
    """A config as plain Python, whose secrets are None."""
    if not isinstance(config, dict):
        return config
    return {name: None if _SECRET.fullmatch(str(name)) else without_secrets(value) for name, value in config.items()}


def _hold(folder: Path) -> None:
    """Lock a folder until this process ends, however it does, or takes another; raises ValueError if one has it."""
    while _lock:
        _lock.pop().release()
    holder = folder / ".holder"
    _lock.append(FileLock(folder / ".lock", timeout=_SECONDS_TO_WAIT))
    try:
        _lock[0].acquire()
    except Timeout:
        by = holder.read_text() if holder.exists() else "another process"
        raise ValueError(f"{folder} is in use by {by}: wait for its end, or choose another output_dir.") from None
    write_text(holder, f"process {os.getpid()} on {socket.gethostname()}")


def _with_own_evaluation(config: dict[str, Any]) -> dict[str, Any]:
    """A config whose evaluation list, where it is the default of its kind, is replaced by what is its task's own."""
    task = config["task"]
    if not (entries := task.get("evaluation")):
        return config
    own = {}
    for entry in entries:
        own.update({name: entry[name] for name in ("metrics", "num_samples") if name in entry})
    if entries != default_evaluation(entries[0].get("collator"), **own):
        return config
    return {**config, "task": {**{name: value for name, value in task.items() if name != "evaluation"}, **own}}


def _flat(node: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(node, list):
        node = dict(enumerate(node))
    if not isinstance(node, dict):
        return {prefix: node}
    leaves = [_flat(value, f"{prefix}.{name}" if prefix else str(name)).items() for name, value in node.items()]
    return {name: value for items in leaves for name, value in items}


def run_directory(cfg: DictConfig) -> Path:
    """The folder of this run, made if need be: `output_dir`, or a fresh `outputs/<experiment>/<time>`.

    Everything that the main process logs goes to its `train.log` too. All ranks get one folder. It is this process's
    alone until it ends; raises ValueError if another one has it.
    """
    process = PartialState(cpu=bool(OmegaConf.select(cfg, "trainer.use_cpu")))
    if cfg.output_dir is None:
        cfg.output_dir = broadcast_object_list([_fresh_folder(cfg.experiment) if process.is_main_process else ""])[0]
    folder = Path(cfg.output_dir).expanduser().absolute()
    folder.mkdir(parents=True, exist_ok=True)
    _begun[:] = [] if {*folder.iterdir()} else [folder]
    log = logging.getLogger("xlm_hf")
    for earlier in [handler for handler in log.handlers if isinstance(handler, logging.FileHandler)]:
        log.removeHandler(earlier)
        earlier.close()
    if not process.is_main_process:
        log.setLevel(logging.WARNING)
        return folder
    _hold(folder)
    handler = logging.FileHandler(folder / "train.log")
    handler.setFormatter(logging.Formatter("%(asctime)s  %(message)s", datefmt="%Y-%m-%d %H:%M:%S"))
    log.addHandler(handler)
    return folder


def remove_if_empty(output_dir: str) -> None:
    """Remove the folder of a run that has left nothing but logs and its config, and the folders that were made for it.

    One that another process holds stays: it may be preparing its data.
    """
    folder, left = Path(output_dir).expanduser(), {"train.log", ".lock", ".holder"}
    left |= {"config.yaml", "metrics.jsonl"} if folder.absolute() in _begun else set()
    is_ours = any(lock.is_locked and Path(lock.lock_file).parent == folder.absolute() for lock in _lock)
    if is_ours and folder.is_dir() and {file.name for file in folder.iterdir()} <= left:
        shutil.rmtree(folder)
        if not folder.is_absolute():
            with contextlib.suppress(OSError):
                os.removedirs(folder.parent)


def _fresh_folder(experiment: str) -> str:
    """Make `outputs/<experiment>/<time>`, once no other run has begun within the same second."""
    while True:
        folder = Path("outputs") / experiment / datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
        try:
            folder.mkdir(parents=True)
            return str(folder)
        except FileExistsError:
            time.sleep(0.1)


def model_of_checkpoint(cfg: DictConfig) -> PreTrainedModel:
    """The model of `checkpoint=`, which must be of the config's family.

    Raises:
        ValueError: if no checkpoint is named, it cannot be loaded, or it does not fit.
    """
    if cfg.checkpoint is None:
        raise ValueError(f"job={cfg.job} needs a model: add checkpoint=DIR, a run, a checkpoint or a Hub id.")
    return load_model(cfg.checkpoint, cfg.model, cfg.generation, cfg.ema, cfg.trust_remote_code)


def write_results(output_dir: Path, metrics: dict[str, float], predictions: dict[str, list[dict[str, Any]]]) -> None:
    """Write `metrics.json`, if there are any, and `predictions/<set>.jsonl`, in place of journals and earlier files."""
    for name, records in predictions.items():
        write_predictions(output_dir, name, records)
    for journal in (output_dir / "predictions").glob(f"*{JOURNAL_SUFFIX}"):
        journal.unlink()
    if metrics:
        write_text(output_dir / "metrics.json", json.dumps(metrics, indent=2, sort_keys=True, default=float) + "\n")


def say_results(output_dir: Path, metrics: dict[str, float], predictions: dict[str, list[dict[str, Any]]]) -> None:
    """Write the results, and show the metrics as a table and the first decodes of each set."""
    write_results(output_dir, metrics, predictions)
    for name in predictions:
        show_predictions(name, predictions[name][: 3 * (f"{name}/nfe" in metrics)])
    shown = {name: number(value) for name, value in metrics.items() if not name.endswith(NOT_IN_TABLE)}
    for name, value in shown.items():
        error = metrics.get(f"{name}_standard_error")
        say(f"{name:<{max(map(len, shown))}}  {value}{'' if error is None else f' ± {error:.2g}'}")
    say(f"Metrics and predictions: {output_dir}/metrics.json, {output_dir}/predictions/")


def card_variables(
    config: dict[str, Any], metrics: dict[str, float], predictions: dict[str, list[dict[str, Any]]]
) -> dict[str, Any]:
    """What the model card says of a run: its config as plain Python, its metrics, with `steps`, and some decodes."""
    decodes = predictions[min(predictions)][:5] if predictions else []
    # Where the run lies on this machine is nobody's business, and a token even less.
    hidden = ("output_dir", "checkpoint", "init_from", "prompts")
    public = {name: value for name, value in without_secrets(config).items() if name not in hidden}
    task, generation = config["task"], config["generation"]
    # From the registry and not by its `_target_`, since a config that came from elsewhere imports nothing.
    family, backbone = families().get(config["family"]), config["model"].get("backbone", "rotary")
    own = getattr(family and family.config_class, "own_backbones", ("rotary",))
    options = ", ".join(f"{name}={value}" for name, value in generation.items() if value is not None)
    return {
        "experiment": config["experiment"],
        "base_model": None if backbone in own else backbone,
        "task": task["name"],
        "explanation": _explanation(task["_target_"]),
        "dataset": f"`{task['_target_']}`, with the options under `task` below",
        "seed": config["seed"],
        "steps": metrics["steps"],
        "config": OmegaConf.to_yaml(OmegaConf.create(public)),
        "metrics": {name: value for name, value in sorted(metrics.items()) if "/" in name},
        "protocol": f"Each example once, with the seed of the run; losses with the corruption of epoch 0, decodes with "
        f"{options or 'the default options'}.",
        "samples": [_sample(record, config["seed"]) for record in decodes],
    }


def _sample(record: dict[str, Any], seed: int) -> dict[str, Any]:
    """What the card says of a decode, with the seed that gives it again."""
    sample = {name: record.get(name, "") for name in ("prompt", "prediction", "reference")}
    is_filled = any(step >= 0 for step in record.get("steps", [])) and -1 in record["steps"]
    return {**sample, "seed": int(random_bits(seed, torch.tensor(record["example_id"]))), "is_filled": is_filled}


def _explanation(target: str) -> str | None:
    """What a task is, in a sentence; None for one of another package, which is not imported for a card."""
    if not target.startswith("xlm_hf.tasks."):
        return None
    documentation = " ".join((import_target("task", target).__doc__ or "").split("\n\n")[0].split())
    return documentation.split(". ")[0].split("; `docs")[0].rstrip(".") or None


def next_command(*overrides: str) -> str:
    """The command line of this process with other `overrides`, to be shown to the user."""
    replaced = ("job", "output_dir", "checkpoint", "init_from", "num_samples", "prompts")
    arguments = sys.argv[1:]
    if HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
        arguments = ["--config-name", str(HydraConfig.get().job.config_name), *HydraConfig.get().overrides.task]
    named = [(argument.split("=")[0], argument.removeprefix("++")) for argument in arguments]
    kept = [argument for name, argument in named if name not in replaced and not _SECRET_OPTION.search(argument)]
    program = ["python", sys.argv[0]] if sys.argv[0].endswith(".py") else [Path(sys.argv[0]).name]
    return shlex.join([*program, *kept, *overrides])


def say(text: str) -> None:
    """Print a line for the person at the command line."""
    print(text, file=sys.stdout, flush=True)
