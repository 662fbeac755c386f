"""The registry of families: what the core knows of each is what it registers here."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import transformers
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel


@dataclass(frozen=True)
class Family:
    """A registered family.

    Attributes:
        config_class: its configuration, which names the `model_type`.
        model_class: the model with its head.
        auto_classes: names of the Auto classes of transformers that give `model_class`.
        converters: what reads checkpoints of other projects, by the project's name (see `xlm_hf.convert_checkpoint`).
    """

    config_class: type[PreTrainedConfig]
    model_class: type[PreTrainedModel]
    auto_classes: tuple[str, ...]
    converters: Mapping[str, Callable[..., tuple[dict[str, Any], dict[str, Any]]]] = field(default_factory=dict)


_FAMILIES: dict[str, Family] = {}


def families() -> dict[str, Family]:
    """All registered families by `model_type`, in the order of their registration."""
    return dict(_FAMILIES)


def register_family(
    config_class: type[PreTrainedConfig],
    model_class: type[PreTrainedModel],
    auto_classes: Sequence[str] = ("AutoModel",),
    converters: Mapping[str, Callable[..., tuple[dict[str, Any], dict[str, Any]]]] | None = None,
) -> None:
    """Make a family known to the Auto classes, and let everything that saves it export its code.

    Args:
        config_class: configuration with a `model_type` of its own.
        model_class: the model, in a file that imports only `.<file beside it>`, `xlm_hf.modules.<file>`, torch,
            transformers and the standard library.
        auto_classes: names of the Auto classes that shall give `model_class`.
        converters: for each project whose checkpoints can be imported, a function (weights, config) -> (options of
            `config_class`, weights of `model_class`).

    Raises:
        ValueError: if a class is defined in `__main__`, from where its code cannot be exported.
    """
    for cls in (config_class, model_class):
        if cls.__module__ == "__main__":
            raise ValueError(f"{cls.__name__} is defined in __main__: move it to a file of its own to export its code.")
    transformers.AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    for name in auto_classes:
        getattr(transformers, name).register(config_class, model_class, exist_ok=True)
    # Here, because the export looks families up in this file.
    from xlm_hf.hub.export import save_code_with

    save_code_with(config_class, model_class)
    _FAMILIES[config_class.model_type] = Family(config_class, model_class, tuple(auto_classes), converters or {})
