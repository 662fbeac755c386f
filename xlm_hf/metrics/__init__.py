"""Metrics: `evaluate` modules, one folder each, that also work on their own with `evaluate.load(folder)`."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xlm_hf.modules.messages import check_options, did_you_mean, import_target

if TYPE_CHECKING:
    from evaluate import EvaluationModule


def load_metric(metric: str | Mapping[str, Any], /, **options: Any) -> EvaluationModule:
    """Load a metric; `metric.features` says which inputs its `compute` takes.

    A metric that is a mean over examples may have a method `per_example`, with the arguments of `compute`. It returns
    the value of each example. The values are written beside the predictions, and give a standard error. A method
    `check` gets the options before a run begins. It raises ValueError if `compute` would fail.

    Args:
        metric: the name of a shipped metric (a folder of `xlm_hf/metrics`), or the path of a metric's folder or .py
            file. Or a mapping with either of these as `name`, or the dotted name of an `EvaluationModule` class as
            `_target_`; its other keys are options.
        options: defaults for the keyword arguments of `compute`; they replace those of a mapping.

    Raises:
        ValueError: for an unknown name, a mapping that names no metric or an option that the metric does not take.
    """
    spec: dict[str, Any] = {"name": metric} if isinstance(metric, str) else dict(metric)
    if "_target_" in spec:
        label = spec.pop("_target_")
        module = import_target("metric target", label)(keep_in_memory=True)
    elif "name" in spec:
        label = spec.pop("name")
        module = _load_by_name(label)
    else:
        raise ValueError(f"a metric given as a mapping needs `name` or `_target_`; this one has the keys {list(spec)}.")
    options = {**spec, **options}
    parameters = inspect.signature(module._compute).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        known = [name for name in parameters if name not in module.features]
        check_options(f"Metric {label!r}", options, known)
    for method in ("compute", "per_example", "check"):
        if hasattr(module, method):
            setattr(module, method, functools.partial(getattr(module, method), **options))
    return module


def shipped_metrics() -> list[str]:
    """The names of the shipped metrics."""
    return [folder.name for folder in Path(__file__).parent.iterdir() if (folder / f"{folder.name}.py").is_file()]


def _load_by_name(name: str) -> EvaluationModule:
    import evaluate  # slow to import

    if name in (shipped := shipped_metrics()):
        values = vars(importlib.import_module(f"{__name__}.{name}.{name}")).values()
        metric_class: Any = next(v for v in values if inspect.isclass(v) and issubclass(v, evaluate.EvaluationModule))
        return metric_class(keep_in_memory=True)
    path = Path(name)
    if (path.suffix == ".py" and path.is_file()) or (path / f"{path.resolve().name}.py").is_file():
        return evaluate.load(str(path.resolve()), keep_in_memory=True)
    kinds = "which is neither a shipped one nor the path of a metric's folder or .py file"
    raise ValueError(f"unknown metric {name!r}, {kinds}: {did_you_mean(name, shipped)}")
