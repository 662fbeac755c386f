"""The model card of an export."""

import inspect
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import EvalResult, ModelCardData

from xlm_hf.families import Family
from xlm_hf.modules.messages import did_you_mean

_CARD_VARIABLES = {
    *("model_id", "parameters", "experiment", "task", "dataset", "steps"),
    *("seed", "config", "metrics", "protocol", "samples", "base_model", "explanation"),
}
# Of the results, what other models are not compared by: costs, and parts of a family's own loss.
_NOT_COMPARED = re.compile(r"seconds|nfe|tokens_per_forward|loss|.*_(loss|nelbo|nll|cross_entropy)")


def render_card(family: Family, variables: dict[str, Any]) -> str:
    """Fill the model card of a family: `hub_card.md` beside its configuration, or else its own in `hub_cards/`.

    Args:
        family: a registered family.
        variables: what is missing leaves its section out.
            model_id (str): repository or folder that the example loads.
            parameters (int): size of the model.
            experiment, task, dataset (str), steps (int), seed (int or list), config (str): the recipe, `config` being
                the composed config as YAML.
            metrics (dict): the flat object of metrics.json: `<set>/<metric>`, its `<set>/<metric>_standard_error` where
                there is one, and `<set>/samples`.
            protocol (str): how the metrics were measured.
            base_model (str): folder or Hub id of what the weights were taken from, whose licence then holds.
            explanation (str): the task in a sentence, without its full stop.
            samples (list of dict): decodes, each a `prediction`, and a `prompt` and `reference` where it has them. The
                example of the card gives the first one again if it has the `seed` of its row, an integer; `is_filled`
                says that it fills its prompt in.

    Returns:
        Markdown with a YAML header.

    Raises:
        ValueError: for a variable that does not exist.
    """
    if unknown := sorted(variables.keys() - _CARD_VARIABLES):
        raise ValueError(f"A model card has no variable {unknown[0]!r}: {did_you_mean(unknown[0], _CARD_VARIABLES)}")
    model_type = family.config_class.model_type
    results = list(_eval_results(variables.get("task", model_type), variables.get("metrics", {})))
    compared = [r for r in results if not _NOT_COMPARED.fullmatch(r.metric_type) and not _is_part_of_loss(r)]
    origin = variables.get("base_model")
    if is_folder := origin is not None and Path(origin).exists():
        variables = {**variables, "base_model": Path(origin).name}
    card_data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        license=None if origin else "apache-2.0",
        base_model=None if is_folder else origin,
        tags=["xlm-hf", *(family.model_class.model_tags or ["non-autoregressive"]), model_type],
        model_name=_title(model_type, variables) if compared else None,
        eval_results=compared or None,
    )
    folder = Path(inspect.getfile(family.config_class)).parent
    environment = jinja2.Environment(
        loader=jinja2.ChoiceLoader([jinja2.PackageLoader("xlm_hf.hub_cards", "."), jinja2.FileSystemLoader(folder)]),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.select_template(["hub_card.md", f"{model_type}.md", "_base.md"]).render(
        card_data=card_data.to_yaml(),
        model_type=model_type,
        title=_title(model_type, variables),
        model_class=family.model_class.__name__,
        results=results,
        sample=next(iter(variables.get("samples", [])), {}),
        **variables,
    )


def _is_part_of_loss(result: EvalResult) -> bool:
    """Whether an accuracy is that of a loss, at states that its collator made: one of texts has a standard error."""
    return result.metric_type.endswith("_accuracy") and "standard_error" not in (result.metric_args or {})


def _title(model_type: str, variables: dict[str, Any]) -> str:
    """The name of a repository, or of the experiment or else the folder that a model lies in."""
    owner, _, name = variables.get("model_id", model_type).rpartition("/")
    return name if owner else variables.get("experiment") or name


def _eval_results(task: str, metrics: dict[str, float]) -> Iterator[EvalResult]:
    for name, value in metrics.items():
        set_name, _, metric = name.rpartition("/")
        # The Hub keeps metadata as JSON, which has no number that is not finite.
        is_detail = metric in ("samples", "seconds") or metric.endswith("_standard_error")
        if not set_name or is_detail or not math.isfinite(value):
            continue
        details = {"samples": f"{set_name}/samples", "standard_error": f"{name}_standard_error"}
        yield EvalResult(
            task_type="text-generation",
            dataset_type=task,
            dataset_name=task,
            metric_type=metric,
            metric_name=name,
            metric_value=float(value),
            metric_args={detail: metrics[key] for detail, key in details.items() if key in metrics},
        )
