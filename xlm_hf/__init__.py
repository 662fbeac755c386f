"""xlm-hf: small non-autoregressive language models, first-class in the Hugging Face stack.

Importing the package registers the families with the Auto classes of transformers; everything else is imported when it
is first used.
"""

import importlib
import importlib.metadata
import os
import pkgutil
import warnings
from pathlib import Path

from .families import register_family

__version__ = "0.1.0"

# On a CPU oneDNN keeps an object for every shape of a product, by default up to 1,024: hundreds of MiB in a training on
# rows of many lengths. It reads the variable at its first product.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16")

_LAZY = {
    "XLMTrainer": "training.trainer",
    "XLMTrainingArguments": "training.arguments",
    "LossOutput": "objectives.loss_output",
    "EvaluationSet": "evaluation",
    "load_task": "tasks",
    "load_metric": "metrics",
    "export_model": "hub.export",
    "convert_checkpoint": "hub.conversion",
}
__all__ = ["__version__", "register_family", *_LAZY]

_HERE = Path(__file__).resolve().parent
if (_HERE / "modeling").is_file():
    # Windows checkouts and zip archives turn the links to the folders at the top level into text files.
    __path__.append(str(_HERE.parent))


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _import_families() -> None:
    """Import every family, which registers itself: the shipped ones, then those of other packages.

    One that cannot be imported, perhaps because somebody is working on it, does not take the others along.
    """
    shipped = pkgutil.iter_modules(importlib.import_module(f"{__name__}.modeling").__path__)
    external = importlib.metadata.entry_points(group="xlm_hf.families")
    names = [f"{__name__}.modeling.{module.name}" for module in shipped]
    for name in [*names, *(entry_point.module for entry_point in external)]:
        try:
            importlib.import_module(name)
        except Exception as error:
            warnings.warn(
                f"The family {name} is left out because it cannot be imported: {type(error).__name__}: {error}",
                stacklevel=2,
            )


_import_families()
