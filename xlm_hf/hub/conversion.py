"""Checkpoints of other projects, by the converters that the families register: read, translated, loaded.

A checkpoint is data from outside. Only tensors and plain values are read from it; nothing that it names is imported or
called.
"""

import json
import pickle
import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from xlm_hf.families import families
from xlm_hf.modules.messages import did_you_mean
from xlm_hf.training.checkpoints import fault, fault_of_json

_PREFIXES = re.compile(r"^(model|backbone)\.(_orig_mod\.)?")


class _Ignored:
    """Stands where a checkpoint holds an object of another class; it keeps nothing and does nothing."""

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        pass


def convert_checkpoint(
    *,
    family: str,
    state_dict: Mapping[str, torch.Tensor],
    config: Mapping[str, Any],
    source: str = "xlm-core",
    token_ids: Mapping[str, Any] | None = None,
) -> PreTrainedModel:
    """A model of `family` with the weights of a checkpoint of another project.

    Args:
        family: its `model_type`.
        state_dict: the tensors under their published names, with or without the prefix `model.` or `backbone.`.
        config: the arguments of the published model's constructor.
        source: the project, one of the family's converters.
        token_ids: options of the configuration that the tokenizer decides, such as `eos_token_id`.

    Returns:
        the model, in evaluation mode and in the type of the weights. Ids that its configuration suppresses are left out
        by `generate`.

    Raises:
        ValueError: for an unknown family or source, and for tensors or arguments that no such model has or that do not
            fit together.
    """
    options, weights = translate_checkpoint(family, state_dict, config, source)
    names = {option.name for option in fields(families()[family].config_class)}
    options |= {name: value for name, value in (token_ids or {}).items() if name in names}
    return load_translated(family, options, weights)


def translate_checkpoint(
    family: str, state_dict: Mapping[str, torch.Tensor], config: Mapping[str, Any], source: str
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Options of the configuration of `family` and the tensors under their names here; see `convert_checkpoint`."""
    known = families()
    if family not in known:
        raise ValueError(f"There is no family {family!r}: {did_you_mean(family, known)}")
    converters = known[family].converters
    if source not in converters:
        raise ValueError(f"Family {family!r} converts no {source!r}: {did_you_mean(source, converters)}")
    options, weights = converters[source](_without_prefix(state_dict), config)
    empty = _empty_model(family, options, weights)
    shapes = {name: tuple(tensor.shape) for name, tensor in empty.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    for name in [*shapes, *found]:
        if shapes.get(name) != found.get(name):
            is_found, should = found.get(name, "missing"), shapes.get(name, "absent")
            raise ValueError(f"The checkpoint does not fit its config: {name} is {is_found} and should be {should}.")
    return options, weights


@torch.no_grad()
def load_translated(family: str, options: Mapping[str, Any], weights: dict[str, torch.Tensor]) -> PreTrainedModel:
    """The model of what `translate_checkpoint` returned, whose tensors are taken out one by one, to save memory."""
    model = _empty_model(family, options, weights)
    for name, tensor in model.state_dict().items():
        tensor.copy_(weights.pop(name))
    ids = {name: getattr(model.config, name) for name in ("bos_token_id", "pad_token_id", "eos_token_id")}
    model.generation_config = model.generation_config_class(suppress_tokens=model.config.suppressed_ids, **ids)
    return model.eval()


def _empty_model(family: str, options: Mapping[str, Any], weights: Mapping[str, torch.Tensor]) -> Any:
    """A model in the type of `weights`, whose own nobody has written: they take no memory yet."""
    classes = families()[family]
    dtype = next((tensor.dtype for tensor in weights.values()), torch.float32)
    with no_init_weights():
        model = classes.model_class._from_config(classes.config_class(**options), dtype=dtype)
    model.tie_weights()
    return model


def _without_prefix(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of the model itself: a training module holds others, and duplicates of these, beside it."""
    own = {_PREFIXES.sub("", name): tensor for name, tensor in weights.items() if _PREFIXES.match(name)}
    # The head of a model of transformers stands beside what has the prefix.
    own |= {name: tensor for name, tensor in weights.items() if own and name.startswith("lm_head.")}
    return own or dict(weights)


def read_checkpoint(source: str, ema: bool = True) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and constructor arguments of a published checkpoint.

    Args:
        source: a Lightning `.ckpt` file; or a folder, or the Hub id of one, of `model.safetensors`, whole or in shards,
            and `config.json`.
        ema: take the averaged weights of a `.ckpt` that holds some.

    Returns:
        the tensors, without prefixes, and the `config.json` beside them, {} if there is none.

    Raises:
        ValueError: if there is nothing to read, or what is there cannot be read safely.
    """
    path = Path(source).expanduser()
    if not path.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        path = Path(snapshot_download(source, allow_patterns=["model*.safetensors*", "config.json"]))
    folder, files = (path.parent, [path]) if path.is_file() else (path, sorted(path.glob("model*.safetensors")))
    if not files or not files[0].is_file():
        raise ValueError(
            f"There is no checkpoint at {source}: name a Lightning .ckpt file, or a folder or Hub id with a "
            "model.safetensors. Consolidate the shards of a distributed run first."
        )
    is_lightning = files[0].suffix != ".safetensors"
    if not is_lightning and (reason := fault(folder)):
        raise ValueError(f"{folder} cannot be loaded: {reason}. Choose another checkpoint.")
    config = read_arguments(folder / "config.json") if (folder / "config.json").exists() else {}
    return _read_lightning(files[0], ema) if is_lightning else _read_lazily(files), config


def _read_lazily(files: list[Path]) -> dict[str, torch.Tensor]:
    """The tensors of files of safetensors: each maps its file by itself, and is read from it when it is used."""
    weights = {}
    for file in files:
        with safe_open(file, framework="pt") as opened:
            names = list(opened.keys())
        for name in names:
            with safe_open(file, framework="pt") as opened:
                weights[name] = opened.get_tensor(name)
    return weights


def read_arguments(file: Path) -> dict[str, Any]:
    """The constructor arguments in a JSON file; raises ValueError if it holds none."""
    if reason := fault_of_json(file):
        raise ValueError(f"{reason}: {file} must hold a JSON object of constructor arguments.")
    return json.loads(file.read_text())


def _read_lightning(file: Path, ema: bool) -> dict[str, torch.Tensor]:
    try:
        others = torch.serialization.get_unsafe_globals_in_checkpoint(file)
        # Objects of other classes, hyperparameters say, become empty ones of ours: nothing of theirs is imported.
        with torch.serialization.safe_globals([(_Ignored, name) for name in others]):
            content = torch.load(file, map_location="cpu", weights_only=True)
        weights = {n: torch.as_tensor(w) for n, w in _without_prefix(content["state_dict"]).items()}
        averages = [*content["ema"]["shadow_params"]] if ema and content.get("ema") else None
    except (pickle.UnpicklingError, ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{file} is not a Lightning checkpoint, or cannot be read without running what it holds: save its "
            "state_dict as safetensors where you trust it."
        ) from error
    if averages is None:
        return weights
    # The averages are a list in the order of the parameters, which is that of the state dict without its buffers.
    names = [name for name in weights if not name.endswith(("inv_freq", "freqs"))]
    if [weights[name].shape for name in names] != [average.shape for average in averages]:
        raise ValueError(f"The averaged weights of {file} do not fit its parameters: take the raw ones, with --raw.")
    return {**weights, **dict(zip(names, averages, strict=True))}
