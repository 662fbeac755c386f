"""From a config to the objects of a run: task, model, collators, evaluation sets, trainer.

Each builder takes its own node of the config and returns its object; `build_trainer` alone takes the whole config, and
hands each node on once. A notebook does what the command line does:

    cfg = compose("config", ["family=NAME", "task=star_easy", "size=tiny"])
    task = build_task(cfg.task)
    model = build_model(cfg.model, task.tokenizer, cfg.generation, seed=cfg.seed)
    build_trainer(cfg, task, model, Path("run")).train()
"""

import contextlib
import inspect
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import datasets
import hydra
import psutil
import torch
from huggingface_hub.errors import RepositoryNotFoundError
from omegaconf import DictConfig, OmegaConf
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, set_seed

from xlm_hf.evaluation import RECORD_FIELDS, EvaluationEntry, EvaluationSet, default_evaluation
from xlm_hf.families import families
from xlm_hf.hub.pretrained_backbones import add_lora, backbone_options, check_directions, load_backbone
from xlm_hf.metrics import load_metric
from xlm_hf.modules.backbone_config import token_options
from xlm_hf.modules.checked_options import NotNegative, PositiveInt, annotations_of, check_arguments, check_value
from xlm_hf.modules.messages import check_options, did_you_mean, import_target
from xlm_hf.objectives.collators import Collator
from xlm_hf.overrides import compose as compose
from xlm_hf.tasks import Task, load_task, task_options
from xlm_hf.tasks.tokenizers import with_prompt_layout
from xlm_hf.training.arguments import XLMTrainingArguments, check_training_options
from xlm_hf.training.averages import load_average
from xlm_hf.training.callbacks.budget import Budget
from xlm_hf.training.callbacks.early_stopping import EarlyStopping
from xlm_hf.training.callbacks.profiler import Profiler
from xlm_hf.training.checkpoints import check_weights, resolve_checkpoint
from xlm_hf.training.trainer import XLMTrainer

logger = logging.getLogger(__name__)

# A budget of tokens or seconds decides when a run ends, but the trainer wants a number of steps all the same.
_MAX_STEPS_OF_A_BUDGET = 10**9


def plain(node: Any) -> Any:
    """A config node as plain dicts and lists, with everything resolved."""
    return OmegaConf.to_container(node, resolve=True)


def options_of(node: DictConfig) -> dict[str, Any]:
    """A config node as plain Python, without its `_target_`."""
    return {name: value for name, value in plain(node).items() if name != "_target_"}


def build_task(node: DictConfig) -> Task:
    """Prepare the task of a config's `task` node, or take it from the cache."""
    return load_task(plain(node))


def check_config(cfg: DictConfig) -> None:
    """Raise ValueError if a node of a config has what its object does not take, whether a job builds it or not."""
    check_training_options(options_of(cfg.trainer))
    _config_class(cfg.model)
    build_loss(cfg.loss)
    _collator_class(cfg.collator, {**options_of(cfg.collator), **plain(cfg.train_collator)})
    build_callbacks(cfg.budget, cfg.early_stopping)
    if not OmegaConf.missing_keys(cfg.task):
        task_options(plain(cfg.task))


def _class_of(name: str, node: DictConfig, fits: Callable[[Any], bool]) -> Any:
    """The class that a node names; raises ValueError if it is none of its kind."""
    found = import_target(f"{name}._target_", node._target_)
    if not (inspect.isclass(found) and fits(found)):
        raise ValueError(f"{name}._target_ must be the {name} of a family and is {node._target_!r}.")
    return found


def _config_class(node: DictConfig) -> Any:
    """The configuration that a config's `model` names, its options checked."""
    found = _class_of("model", node, lambda it: getattr(it, "model_type", None) in families())
    check_options("model", options_of(node), [f.name for f in fields(found)])
    for name, value in options_of(node).items():
        check_value(name, value, annotations_of(found).get(name, Any))
    return found


def _collator_class(node: DictConfig, options: Mapping[str, Any]) -> Any:
    found = _class_of("collator", node, lambda it: issubclass(it, Collator))
    given = {"max_length": 1, "seed": 0, **options}
    check_arguments("collator", given, found, given=("tokenizer", "kind", "prediction"))
    return found


def positions_of(task: DictConfig, collator: DictConfig) -> int | None:
    """Positions of a task's longest text with the family's special tokens; None for a task that names no longest.

    Args:
        task: the config's `task`, which names a `max_length` or does not.
        collator: the config's `collator`.
    """
    if "max_length" not in task:
        return None
    return task.max_length + _collator_class(collator, {}).num_special_tokens("lm")


def build_model(
    node: DictConfig,
    tokenizer: PreTrainedTokenizerBase,
    generation: DictConfig | None = None,
    num_positions: int | None = None,
    seed: int = 0,
) -> PreTrainedModel:
    """A freshly initialised model.

    Args:
        node: the config's `model`.
        tokenizer: of the task, which decides the vocabulary and the special tokens.
        generation: the config's `generation`, the defaults of `generate`.
        num_positions: of the model, unless `node` says otherwise (see `positions_of`); None leaves it to the default of
            the model's configuration.
        seed: of the initialisation.
    """
    config_class, options = _config_class(node), options_of(node)
    source = options.get("backbone", "rotary")
    adopted = backbone_options(source, getattr(config_class, "own_backbones", ("rotary",)))
    known = {f.name for f in fields(config_class)}
    vocabulary = {name: value for name, value in token_options(tokenizer).items() if name in known}
    if num_positions is not None:
        vocabulary["max_position_embeddings"] = num_positions
    set_seed(seed)
    is_adopted = bool(adopted or options.get("backbone_config"))
    lora = options.pop("lora", None) if is_adopted else None
    config: Any = config_class(**{**vocabulary, **options, **adopted})
    _check_memory(config)
    model = AutoModel.from_config(config)
    known_ids = load_backbone(model, source, tokenizer) if adopted else 0
    if is_adopted:
        check_directions(model)
    if lora:
        add_lora(model, lora, known_ids)
    ids = {name: token_options(tokenizer).get(name) for name in ("bos_token_id", "pad_token_id", "eos_token_id")}
    model.generation_config = model.generation_config_class(**ids)
    return _with_generation_options(model, generation)


def _check_memory(config: Any) -> None:
    """Raise ValueError for a model whose matrices alone, in float32, are more than the memory of the machine."""
    layer = (4 * config.hidden_size + 2 * (config.intermediate_size or 0)) * config.hidden_size
    needed = (config.num_hidden_layers * layer + config.vocab_size * config.hidden_size) * 4 / 2**30
    if needed > (memory := psutil.virtual_memory().total / 2**30):
        sizes = f"at least {needed:,.0f} GiB and the machine has {memory:,.0f}"
        raise ValueError(f"The model takes {sizes}: lower hidden_size, intermediate_size or num_hidden_layers.")


def load_model(
    checkpoint: str,
    node: DictConfig,
    generation: DictConfig | None = None,
    use_ema: bool = True,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The model of a checkpoint, with the generation options of the config over its own.

    Args:
        checkpoint: a run, a checkpoint, a model folder or a Hub id.
        node: the config's `model`, of whose family the checkpoint must be.
        generation: the config's `generation`.
        use_ema: takes the averaged weights, if there are any.
        trust_remote_code: whether the checkpoint may bring code of its own.

    Raises:
        ValueError: if it cannot be loaded, or is of another family.
    """
    source = resolve_checkpoint(checkpoint)
    model = _read_model(source, trust_remote_code)
    found, wanted = model.config.model_type, _config_class(node).model_type
    # A type that nobody has registered brings its own code, and the config says which family's prompts it takes.
    if found != wanted and (found in families() or not trust_remote_code):
        raise ValueError(f"{source} is of family {found!r} and not {wanted!r}: add family={found}.")
    averaged = use_ema and load_average(model, Path(source))
    logger.info("Loaded %s%s.", source, ", averaged weights" if averaged else "")
    return _with_generation_options(model, generation)


def _read_model(source: str, trust_remote_code: bool) -> PreTrainedModel:
    # Otherwise transformers asks a service to convert the pickles of a repository that has nothing else.
    os.environ["DISABLE_SAFETENSORS_CONVERSION"] = "true"
    options = {"dtype": torch.float32, "trust_remote_code": trust_remote_code, "use_safetensors": True}
    with _loading(source):
        model, found = AutoModel.from_pretrained(source, output_loading_info=True, **options)
    check_weights(source, found["missing_keys"], found["unexpected_keys"])
    return model


def initialise(
    model: PreTrainedModel,
    checkpoint: str,
    tokenizer: PreTrainedTokenizerBase,
    use_ema: bool = True,
    trust_remote_code: bool = False,
) -> dict[str, list[str]]:
    """Give a fresh model those weights of a checkpoint that have the same names and shapes, whatever its family.

    Args:
        model: changed in place.
        checkpoint: a run, a checkpoint, a model folder or a Hub id.
        tokenizer: of the task. Embeddings belong to ids, so the checkpoint's must have the same tokens.
        use_ema: takes the averaged weights, if there are any.
        trust_remote_code: whether the checkpoint may bring code of its own.

    Returns:
        the names of the weights that are "taken"; of those of the model that are "new", since the checkpoint has none
        of that name and shape; and of those of the checkpoint that are "left".

    Raises:
        ValueError: if it cannot be loaded, has another vocabulary, or embeddings of another size.
    """
    source = resolve_checkpoint(checkpoint)
    given = _read_model(source, trust_remote_code)
    theirs, ours = load_tokenizer(checkpoint, trust_remote_code).get_vocab(), tokenizer.get_vocab()
    if theirs != ours:
        token, number = min(ours.items() ^ theirs.items(), key=lambda item: (item[1], item[0]))
        raise ValueError(
            f"init_from={checkpoint} has another vocabulary than the task, {len(theirs)} tokens and not {len(ours)}, "
            f"the first difference being {token!r} (id {number}): train on a task with the same tokenizer."
        )
    if use_ema:
        load_average(given, Path(source))
    # A head that is the embedding takes it along.
    tied = model.all_tied_weights_keys
    own, found = ({n: w for n, w in each.state_dict().items() if n not in tied} for each in (model, given))
    embeddings: list[Any] = [each.get_input_embeddings() for each in (given, model)]
    sizes = [tuple(embedding.weight.shape) for embedding in embeddings]
    if sizes[0] != sizes[1]:
        raise ValueError(f"init_from={checkpoint} has embeddings of shape {sizes[0]} and this model {sizes[1]}.")
    taken = [name for name, weight in found.items() if name in own and own[name].shape == weight.shape]
    model.load_state_dict({name: found[name] for name in taken}, strict=False)
    left, new = ([name for name in names if name not in taken] for names in (found, own))
    return {"taken": taken, "new": new, "left": left}


def load_tokenizer(checkpoint: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer that was saved with the model of a checkpoint."""
    source = resolve_checkpoint(checkpoint)
    with _loading(source):
        return AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)


@contextlib.contextmanager
def _loading(source: str) -> Iterator[None]:
    """Say in one sentence why nothing can be loaded from a Hub id or a folder."""
    try:
        yield
    except (RuntimeError, AttributeError, TypeError, LookupError, AssertionError) as error:
        raise ValueError(f"{source} does not fit its config.json: {' '.join(str(error).split())[:300]}") from error
    except OSError as error:
        if isinstance(error.__cause__, RepositoryNotFoundError):
            raise ValueError(f"There is no model {source} on the Hub that HF_TOKEN may read.") from None
        if "use_safetensors" in str(error):
            raise ValueError(f"{source} holds no weights in safetensors, the one format that is loaded.") from None
        raise
    except ValueError as error:
        if "trust_remote_code=True" in str(error):
            raise ValueError(f"{source} brings code of its own: read it, and add trust_remote_code=true.") from None
        raise


def _with_generation_options(model: PreTrainedModel, node: DictConfig | None) -> PreTrainedModel:
    options = {} if node is None else options_of(node)
    for name, value in {"num_return_sequences": 1, "return_dict_in_generate": True}.items():
        if options.get(name, value) not in (value, None):
            raise ValueError(f"generation.{name} must be {value}, since a job decodes each prompt once: leave it out.")
    if options.get("max_new_tokens", 0) is None:
        # The task has no opinion.
        del options["max_new_tokens"]
    config: Any = model.generation_config
    model.generation_config = config.updated(**options)
    return model


def build_loss(node: DictConfig) -> Any:
    """The loss object of a config's `loss` node."""
    check_arguments("loss", options_of(node), _class_of("loss", node, lambda it: hasattr(it, "num_items")))
    return hydra.utils.instantiate(node)


def build_collator(
    node: DictConfig, kind: str, tokenizer: PreTrainedTokenizerBase, max_length: int, seed: int = 0, **options: Any
) -> Collator:
    """The family's collator.

    Args:
        node: the config's `collator`.
        kind: of the task, e.g. `seq2seq`, for training batches; with `_prediction` behind it, for prompts.
        tokenizer: of the task.
        max_length: tokens of the longest sequence, the positions of the model.
        seed: of the corruption.
        options: replace those of the node.

    Raises:
        ValueError: if the family does not have the kind, or the collator not the option.
    """
    options = {"max_length": max_length, "seed": seed, **options_of(node), **options}
    name = kind.removesuffix("_prediction")
    return _collator_class(node, options)(tokenizer, **options, kind=name, prediction=name != kind)


def evaluation_entries(node: DictConfig, kind: str) -> list[dict[str, Any]]:
    """The entries of a config's `task`: its list `evaluation`, or the default of the kind with its own metrics.

    Args:
        node: the config's `task`; without a list, `metrics` and `num_samples` are what it says of its own.
        kind: of the task.
    """
    # Not the whole node, in which something of no concern here may be missing.
    own = {name: value for name in ("metrics", "num_samples") if (value := node.get(name)) is not None}
    if node.get("evaluation") is not None:
        check_value("task.evaluation", node.evaluation, list[dict])
        return plain(node.evaluation)
    return default_evaluation(
        kind, **{n: plain(value) if OmegaConf.is_config(value) else value for n, value in own.items()}
    )


def build_evaluation_sets(
    entries: Iterable[dict[str, Any]], task: Task, collator: Callable[[str], Collator], loss: Any
) -> list[EvaluationSet]:
    """The evaluation sets of a task.

    Args:
        entries: see `evaluation_entries`.
        task: holds the splits.
        collator: makes the collator of a kind, e.g. of `seq2seq_prediction`.
        loss: of the sets with `loss: true`.

    Raises:
        ValueError: for an unknown option, split or field.
    """
    sets = []
    for entry in entries:
        check_arguments("An entry of task.evaluation", entry, EvaluationEntry)
        split = entry.get("split")
        if split not in task.splits and not (split is None and "num_samples" in entry):
            raise ValueError(f"Task {task.name!r} has no split {split!r}: {did_you_mean(str(split), task.splits)}")
        for name in entry.get("prediction_fields") or ():
            if name not in RECORD_FIELDS:
                raise ValueError(f"prediction_fields has no {name!r}: {did_you_mean(name, RECORD_FIELDS)}")
        options = {name: value for name, value in entry.items() if name not in ("split", "num_samples")}
        made = collator(entry["collator"])
        dataset = _unconditional(entry, task) if "num_samples" in entry else task.splits[entry["split"]]
        options.update(
            dataset=dataset,
            collator=made,
            kind=made.kind,
            training_set=task.splits.get("train"),
            loss=loss if entry.get("loss") else None,
            metrics=_build_metrics(entry, dataset),
        )
        sets.append(EvaluationSet(**options))
    return sets


def build_callbacks(budget: DictConfig, early_stopping: DictConfig, profile: bool = False) -> list[TrainerCallback]:
    """The callbacks of the nodes `budget` and `early_stopping`, where a patience is set, and the profiler."""
    callbacks: list[TrainerCallback] = [Budget(**plain(budget))]
    for name, kind in {"patience": PositiveInt | None, "threshold": NotNegative}.items():
        check_value(f"early_stopping.{name}", early_stopping[name], kind)
    if early_stopping.patience is not None:
        callbacks.append(EarlyStopping(early_stopping.patience, early_stopping.threshold))
    if profile:
        callbacks.append(Profiler())
    return callbacks


def _unconditional(entry: dict[str, Any], task: Task) -> datasets.Dataset:
    """Examples without a prompt; with a `split`, its first ones are the references."""
    num_samples = entry["num_samples"]
    columns: dict[str, Any] = {"example_id": list(range(num_samples))}
    if "split" in entry:
        split = task.splits[entry["split"]]
        if len(split) < num_samples:
            raise ValueError(
                f"Evaluation set {entry['name']!r} wants {num_samples} samples with as many references, and the split "
                f"{entry['split']!r} has {len(split)} examples: lower num_samples or leave split out."
            )
        columns["reference_ids"] = split.select(range(num_samples))["input_ids"][:]
    return datasets.Dataset.from_dict(columns)


def _build_metrics(entry: dict[str, Any], dataset: datasets.Dataset) -> list[Any]:
    """The metrics of an evaluation set; one whose required option is null is left out."""
    inputs = ["predictions", "prompts", *(["references"] if "split" in entry else [])]
    inputs += ["sources"] if "source_ids" in dataset.column_names else []
    remedies = {"sources": "choose a task of correction, such as star_correction"}
    metrics = []
    for spec in entry.get("metrics", []):
        metric = load_metric(spec)
        where = f"The metric {spec if isinstance(spec, str) else next(iter(spec.values()))!r} of {entry['name']!r}"
        for name in metric.features:
            if name not in inputs:
                remedy = remedies.get(name, "add a split for references")
                raise ValueError(f"{where} needs {name} and gets {', '.join(inputs)}: {remedy}.")
        parameters = inspect.signature(metric._compute).parameters.values()
        required = [p.name for p in parameters if p.default is p.empty and p.name not in metric.features]
        if missing := [name for name in required if isinstance(spec, str) or name not in spec]:
            raise ValueError(f"{where} needs the option {missing[0]}: add it beside its name.")
        if all(spec[name] is not None for name in required):
            getattr(metric, "check", dict)()
            metrics.append(metric)
    return metrics


def build_arguments(node: DictConfig, has_budget: bool = False, **of_run: Any) -> XLMTrainingArguments:
    """The training arguments of a config's `trainer` node.

    Args:
        node: the config's `trainer`.
        has_budget: whether a budget of tokens or seconds ends the run, whatever the number of steps.
        of_run: arguments that the node may replace: `output_dir`, `seed` and the like.
    """
    options = options_of(node)
    check_training_options(options)
    if unread := options.keys() & {"do_train", "do_eval", "do_predict", "resume_from_checkpoint", "output_dir"}:
        raise ValueError(f"trainer.{min(unread)} has no effect: choose job= and output_dir=, whose run is resumed.")
    if has_budget:
        options["max_steps"] = _MAX_STEPS_OF_A_BUDGET
    return XLMTrainingArguments(**{**of_run, **options})


def build_trainer(cfg: DictConfig, task: Task, model: PreTrainedModel, output_dir: str | Path) -> XLMTrainer:
    """The trainer of a run, with all that the config names: each of its nodes goes to its builder."""
    arguments = build_arguments(
        cfg.trainer,
        has_budget=any(limit is not None for limit in cfg.budget.values()),
        output_dir=str(output_dir),
        seed=cfg.seed,
        report_to=list(cfg.logger),
        use_ema=cfg.ema,
    )

    def collator(kind: str, **options: Any) -> Collator:
        max_length = model.config.max_position_embeddings
        return build_collator(cfg.collator, kind, task.tokenizer, max_length, cfg.seed, **options)

    loss, data_collator = build_loss(cfg.loss), collator(task.kind, **plain(cfg.train_collator))
    if getattr(model.config, "conditioning", "none") == "token" and "[BOS]" not in data_collator.layouts[task.kind]:
        raise ValueError(f"conditioning=token adds the time to [BOS], and sequences of kind {task.kind!r} have none.")
    return XLMTrainer(
        model=model,
        args=arguments,
        loss=loss,
        data_collator=data_collator,
        train_dataset=task.splits["train"],
        evaluation_sets=build_evaluation_sets(evaluation_entries(cfg.task, task.kind), task, collator, loss),
        processing_class=with_prompt_layout(task.tokenizer, data_collator.head, data_collator.tail),
        callbacks=build_callbacks(cfg.budget, cfg.early_stopping, profile=cfg.debug.name == "profile"),
    )
