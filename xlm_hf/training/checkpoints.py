"""Checkpoints of a run: found, verified before they are read, and deleted when they are no longer wanted."""

import json
import logging
import math
import re
import shutil
import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers.trainer_callback import TrainerState
from transformers.trainer_pt_utils import safe_globals

from xlm_hf.files import whole_folder
from xlm_hf.modules.checked_options import Count, NotNegative, Positive, PositiveInt, check_value

logger = logging.getLogger(__name__)

_DELETED_SUFFIX = ".deleted"
_FSDP_SHARDS = "pytorch_model_fsdp_*"
_READ = (".safetensors", ".json", ".pt", ".pth")
# What a training goes on from.
_STATE: dict[str, Any] = {
    **{"global_step": Count, "num_input_tokens_seen": Count, "best_global_step": Count | None},
    **{"logging_steps": Positive, "eval_steps": Positive, "save_steps": Positive, "total_flos": NotNegative},
    **{"epoch": NotNegative | None, "train_batch_size": PositiveInt | None},
    **{"log_history": list[dict], "stateful_callbacks": dict},
}
_COUNTS: dict[str, Any] = {"spent_seconds": NotNegative, "early_stopping_patience_counter": Count}


def fault(checkpoint: Path) -> str | None:
    """What is wrong with the files of a checkpoint or model folder, in a few words; None if it is sound."""
    # A pipe would be waited for.
    if others := [file.name for file in checkpoint.glob("*.*") if not file.is_file() and file.suffix in _READ]:
        return f"{min(others)} is no file"
    weights = sorted(checkpoint.glob("*.safetensors"))
    if not weights and not list(checkpoint.glob(_FSDP_SHARDS)):
        return "it holds no weights (*.safetensors)"
    for file in weights:
        try:
            with safe_open(file, framework="pt"):
                pass
        except SafetensorError:
            return f"{file.name} is truncated or damaged"
    for file in [*checkpoint.glob("*.pt"), *checkpoint.glob("*.pth")]:
        try:
            with zipfile.ZipFile(file) as archive, safe_globals():
                if archive.testzip() is not None:
                    return f"{file.name} is truncated or damaged"
                torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except Exception:  # of many kinds; a file that would run code is refused so
            return f"{file.name} is truncated or damaged, or refused"
    faults = (fault_of_json(file) for file in checkpoint.glob("*.json"))
    return next(filter(None, faults), None)


def fault_of_json(file: Path) -> str | None:
    """What is wrong with a JSON file of a checkpoint, in a few words; None if it is sound."""
    try:
        found = {**json.loads(file.read_text())}
        shards = [*map(str, found.get("weight_map", {}).values())] if ".safetensors.index." in file.name else []
    except (ValueError, RecursionError, AttributeError, TypeError):
        return f"{file.name} is truncated or damaged"
    if elsewhere := [shard for shard in shards if Path(shard).name != shard]:
        return f"{file.name} names a file elsewhere, {elsewhere[0]}"
    missing = [shard for shard in shards if not file.with_name(shard).exists()]
    return f"its shard {min(missing)} is missing" if missing else None


def check_weights(source: str | Path, missing: Collection[str], unexpected: Collection[str]) -> None:
    """Raise ValueError for a checkpoint that lacks weights of its config, or has others."""
    for names, what in ((missing, "lacks {} weights of its config"), (unexpected, "has {} weights beyond its config")):
        if names:
            found = f"{source} {what.format(len(names))}, such as {min(names)}"
            raise ValueError(f"{found}: restore the config.json or the weights that it was saved with.")


def list_checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoint folders of a run, oldest first."""
    found = [folder for folder in output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", folder.name)]
    return sorted(found, key=step_of)


def delete_old_checkpoints(output_dir: Path, limit: int | None, keep_every: int | None, best: str | None) -> None:
    """Delete the oldest checkpoints of a run until at most `limit` are left; the newest and the `best` one stay.

    Those at multiples of `keep_every` steps stay too and are not counted; with `keep_every` alone, `limit` is 1.
    """
    for leftover in output_dir.glob(f"checkpoint-*{_DELETED_SUFFIX}"):
        shutil.rmtree(leftover)
    checkpoints = list_checkpoints(output_dir)
    counted = [c for c in checkpoints if keep_every is None or step_of(c) % keep_every]
    limit = limit or (len(counted) if keep_every is None else 1)
    deletable = [c for c in counted if c != checkpoints[-1] and str(c) != best]
    for checkpoint in deletable[: max(len(counted) - limit, 0)]:
        # Renamed first, so that a kill leaves no checkpoint that lacks some of its files.
        shutil.rmtree(checkpoint.rename(checkpoint.with_name(checkpoint.name + _DELETED_SUFFIX)))


def step_of(checkpoint: Path) -> int:
    """The step after which a checkpoint was written, by its name."""
    return int(checkpoint.name.split("-")[1])


def saved_state(checkpoint: Path) -> TrainerState:
    """The state of a checkpoint, with its step; raises ValueError if it has none, or one that no training saved."""
    file = checkpoint / "trainer_state.json"
    if not file.exists():
        raise ValueError(f"{checkpoint} has no trainer_state.json, which says its step: choose another checkpoint.")
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        for name, kind in _STATE.items():
            check_value(name, found[name], kind)
        # It may be infinite.
        if (best := found["best_metric"]) is not None and (type(best) not in (int, float) or math.isnan(best)):
            raise ValueError(f"best_metric is {best!r}")
        for saved in found["stateful_callbacks"].values():
            for one in saved if isinstance(saved, list) else [saved]:
                for name in _COUNTS.keys() & one["attributes"]:
                    check_value(name, one["attributes"][name], _COUNTS[name])
        return TrainerState(**found)
    except (TypeError, ValueError, LookupError, AttributeError) as error:
        raise ValueError(f"{file} is damaged ({error}): choose another checkpoint.") from None


def _fault_of_state(checkpoint: Path) -> str | None:
    """Why a training cannot go on from a checkpoint whose weights are sound; None if nothing is found."""
    # FSDP and DeepSpeed keep the optimiser in files of their own.
    is_sharded = any(re.match(r"optimizer_|optimizer\.bin|global_step", file.name) for file in checkpoint.iterdir())
    needed = ["trainer_state.json", *([] if is_sharded else ["optimizer.pt", "scheduler.pt"])]
    missing = [name for name in needed if not (checkpoint / name).exists()]
    if missing:
        return f"it holds no {missing[0]}"
    try:
        step = saved_state(checkpoint).global_step
    except ValueError as error:
        return str(error).split(": choose")[0]
    return None if step == step_of(checkpoint) else f"its trainer_state.json is that of step {step}"


def last_sound_checkpoint(output_dir: Path) -> Path | None:
    """The newest checkpoint of a run that can be resumed; damaged ones are named in a warning and skipped.

    Raises:
        ValueError: if there are checkpoints and none can be resumed.
    """
    found = list_checkpoints(output_dir)
    for checkpoint in reversed(found):
        reason = fault(checkpoint) or _fault_of_state(checkpoint)
        if reason is None:
            return checkpoint
        logger.warning("%s is skipped: %s.", checkpoint, reason)
    if found:
        raise ValueError(f"none of the checkpoints of {output_dir} can be resumed, the newest since {reason}: mend it.")
    return None


def resolve_checkpoint(checkpoint: str) -> str:
    """Find the model behind what a user names: a run, a checkpoint or model folder, or a Hub id.

    Returns:
        a folder to load from, or the Hub id as it is. For a run it is its `model/`, or else its newest checkpoint.
        `RUN/best` is the checkpoint with the best metric and `RUN/last` the newest one.

    Raises:
        ValueError: if nothing is there, or what is there is damaged.
    """
    folder = whole_folder(Path(checkpoint).expanduser())
    if folder.name in ("best", "last") and not folder.exists() and (known := list_checkpoints(folder.parent)):
        folder = known[-1] if folder.name == "last" else _best_checkpoint(known[-1])
    if not folder.exists():
        # A folder that is there holds runs, and no Hub id begins with a dot.
        if re.fullmatch(r"\w[\w.-]*/[\w.-]+", checkpoint) and not folder.parent.exists():
            return checkpoint
        raise ValueError(
            f"There is no checkpoint at {checkpoint}: name the output_dir of a run, a checkpoint-* or model folder, or "
            "a Hub id such as user/model."
        )
    if not (folder / "config.json").exists():
        candidates = [whole_folder(folder / "model"), *reversed(list_checkpoints(folder))]
        folder = next((candidate for candidate in candidates if candidate.is_dir()), folder)
    if (shards := list(folder.glob(_FSDP_SHARDS))) and not list(folder.glob("*.safetensors")):
        raise ValueError(
            f"{folder} is in the shards of FSDP: join them by `accelerate merge-weights {shards[0]} "
            f"{folder}`, or train with fsdp_state_dict_type: FULL_STATE_DICT."
        )
    reason = "it holds no config.json" if not (folder / "config.json").exists() else fault(folder)
    if reason is not None:
        raise ValueError(f"{folder} cannot be loaded: {reason}. Choose another checkpoint.")
    return str(folder)


def _best_checkpoint(newest: Path) -> Path:
    """The checkpoint that `newest`, of the same run, records as the best."""
    best = newest.with_name(f"checkpoint-{saved_state(newest).best_global_step}")
    if not best.exists():
        known = ", ".join(folder.name for folder in list_checkpoints(newest.parent))
        raise ValueError(f"{newest.parent} no longer has its best checkpoint: name one of {known}.")
    return best
