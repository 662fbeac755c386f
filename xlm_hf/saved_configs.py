"""Configs in the terms of an earlier version - saved by a run, or typed from habit - in those of today."""

import re
from pathlib import Path

import yaml
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

# Options by node and old name.
_OPTIONS = {("model", "unrestricted_softmax"): "softmax_over_suppressed"}
# Values by option and old value, and the options of the same node that say the same today.
_VALUES: dict[tuple[str, str], dict[str, dict[str, str]]] = {
    ("model", "backbone"): {"dit": {"backbone": "rotary", "conditioning": "adaln"}},
    ("generation", "sampler"): {"rule": {"sampler": "confidence"}, "remask": {"sampler": "remdm"}},
}
# Options by node and name that another node decides today.
_MOVED = {("collator", "noise_schedule"): "model"}
# Modules that `_target_` names.
_MODULES = {"xlm_hf.sweeps.": "xlm_hf.reports.sweeps."}


def load_config(file: Path) -> DictConfig:
    """The config that a run saved, in today's terms.

    Raises:
        ValueError: if it is none, or holds an interpolation, by which a config from elsewhere could read what is here.
    """
    try:
        # A few aliases make a file without end, and no run saves any.
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(file.read_text(encoding="utf-8"))):
            raise yaml.YAMLError("it holds aliases of YAML, which no run saves")
        config = OmegaConf.load(file)
        text = OmegaConf.to_yaml(config)
    except (yaml.YAMLError, UnicodeDecodeError, OmegaConfBaseException, RecursionError) as error:
        raise ValueError(f"{file} cannot be read ({' '.join(str(error).split())}): restore it.") from None
    if not isinstance(config, DictConfig) or not config or "${" in text:
        raise ValueError(f"{file} is no config that a run saved: it has interpolations, or no options. Restore it.")
    return translate_config(config)


def translate_config(config: DictConfig) -> DictConfig:
    """Put a composed or saved config into today's terms, in place; what is in them already stays."""
    with open_dict(config):
        for (name, old), new in _OPTIONS.items():
            if old in (config.get(name) or {}):
                config[name][new] = config[name].pop(old)
        for (name, option), values in _VALUES.items():
            node = config.get(name) or {}
            added = values.get(str(node.get(option)), {})
            node.update({key: value for key, value in added.items() if key == option or key not in node})
        _rename_targets(config)
        _join_collators(config)
        for (name, option), owner in _MOVED.items():
            if option in (config.get(name) or {}) and option not in config[owner]:
                config[owner][option] = config[name][option]
    return config


def _rename_targets(node: DictConfig) -> None:
    for name, value in node.items_ex(resolve=False):
        if isinstance(value, DictConfig):
            _rename_targets(value)
        elif name == "_target_" and isinstance(value, str):
            for old, new in _MODULES.items():
                node[name] = re.sub(f"^{re.escape(old)}", new, node[name])


def _join_collators(config: DictConfig) -> None:
    """One collator in place of one for each kind of task: that of the kind that the run trained."""
    if "collators" in config:
        kind = config.task.evaluation[0].collator.removesuffix("_prediction")
        config.collator = config.pop("collators")[kind]
        config.collator._target_ = re.sub(r"For\w+$", "", config.collator._target_)


def translate_override(override: str) -> str:
    """An override of the command line with today's name of its option."""
    for (node, old), new in _OPTIONS.items():
        override = re.sub(rf"^(\+*){node}\.{old}=", rf"\g<1>{node}.{new}=", override)
    override = re.sub(r"^(\+*)collators\.\w+\.", r"\g<1>collator.", override)
    for (node, option), owner in _MOVED.items():
        override = re.sub(rf"^(\+*){node}\.{option}=", rf"\g<1>{owner}.{option}=", override)
    return override
