"""From a composed config to objects: the steps that the jobs share."""

import contextlib
import inspect
import json
import logging
import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import fields
from datetime import datetime
from pathlib import Path
from typing import Any

import datasets
import hydra
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from huggingface_hub.errors import RepositoryNotFoundError
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, set_seed

from xlm_hf.evaluation import RECORD_FIELDS, EvaluationSet
from xlm_hf.families import families
from xlm_hf.files import write_text
from xlm_hf.hub.pretrained_backbones import add_lora, backbone_options, check_sees_both_ways, load_backbone
from xlm_hf.metrics import load_metric
from xlm_hf.modules.messages import check_arguments, check_options, did_you_mean
from xlm_hf.tasks import Task, load_task
from xlm_hf.training.arguments import XLMTrainingArguments
from xlm_hf.training.averages import load_average
from xlm_hf.training.callbacks.budget import Budget
from xlm_hf.training.callbacks.early_stopping import EarlyStopping
from xlm_hf.training.callbacks.predictions import write_predictions
from xlm_hf.training.callbacks.profiler import Profiler
from xlm_hf.training.checkpoints import resolve_checkpoint
from xlm_hf.training.trainer import XLMTrainer

logger = logging.getLogger(__name__)

# Nodes whose keys are those of an object: what the YAML does not list may be given all the same, and is checked when
# the object is built.
_OPEN_NODES = ("trainer", "model", "generation", "task", "loss", "train_collator")

# A budget of tokens or seconds decides when a run ends, but the trainer wants a number of steps all the same.
_MAX_STEPS_OF_A_BUDGET = 10**9


def open_override(argument: str) -> str:
    """Let `trainer.NAME=value` and its like set what the YAML does not list, as Hydra's `++` does."""
    is_opened = is_open(argument) or argument.startswith(("families.", "tasks.", "nfe_sweep."))
    return f"++{argument}" if is_opened else argument


def is_open(override: str) -> bool:
    """Whether an override sets an option of one of the objects of a run."""
    return re.match(rf"({'|'.join(_OPEN_NODES)})\.[\w.]+=", override) is not None


def run_directory(cfg: DictConfig) -> Path:
    """The folder of this run, made if need be: `output_dir`, or a fresh `outputs/<experiment>/<time>`.

    Everything that the main process logs goes to its `train.log` too. All ranks get one folder.
    """
    process = PartialState(cpu=bool(OmegaConf.select(cfg, "trainer.use_cpu")))
    if cfg.output_dir is None:
        cfg.output_dir = broadcast_object_list([_fresh_folder(cfg.experiment) if process.is_main_process else ""])[0]
    folder = Path(cfg.output_dir).expanduser().absolute()
    folder.mkdir(parents=True, exist_ok=True)
    log = logging.getLogger("xlm_hf")
    for earlier in [handler for handler in log.handlers if isinstance(handler, logging.FileHandler)]:
        log.removeHandler(earlier)
        earlier.close()
    if not process.is_main_process:
        log.setLevel(logging.WARNING)
        return folder
    handler = logging.FileHandler(folder / "train.log")
    handler.setFormatter(logging.Formatter("%(asctime)s  %(message)s", datefmt="%Y-%m-%d %H:%M:%S"))
    log.addHandler(handler)
    return folder


def _fresh_folder(experiment: str) -> str:
    """Make `outputs/<experiment>/<time>`, once no other run has begun within the same second."""
    while True:
        folder = Path("outputs") / experiment / datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
        try:
            folder.mkdir(parents=True)
            return str(folder)
        except FileExistsError:
            time.sleep(0.1)


def plain(node: Any) -> Any:
    """A config node as plain dicts and lists, with everything resolved."""
    return OmegaConf.to_container(node, resolve=True)


def options_of(node: DictConfig) -> dict[str, Any]:
    """A config node as plain Python, without its `_target_`."""
    return {name: value for name, value in plain(node).items() if name != "_target_"}


def build_task(cfg: DictConfig) -> Task:
    """Prepare the task, or take it from the cache."""
    return load_task(plain(cfg.task))


def token_options(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What a configuration takes from the tokenizer: the size of the vocabulary and the ids of special tokens."""
    names = ("pad", "bos", "eos", "cls", "sep", "mask")
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in names}
    # Byte-level tokenizers name their end of a text for what is unknown too, which for them is nothing.
    emitted = {tokenizer.unk_token_id} - {tokenizer.eos_token_id}
    return {
        "vocab_size": len(tokenizer),
        **{name: token_id for name, token_id in ids.items() if token_id is not None},
        "suppress_tokens": sorted(set(tokenizer.all_special_ids) - emitted),
    }


def build_model(cfg: DictConfig, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A freshly initialised model of the family, its vocabulary taken from the tokenizer."""
    config_class = hydra.utils.get_class(cfg.model._target_)
    known = [f.name for f in fields(config_class)]
    options = options_of(cfg.model)
    check_options("model", options, known)
    source = options.get("backbone", "rotary")
    adopted = backbone_options(source, getattr(config_class, "own_backbones", ("rotary",)))
    vocabulary = {name: value for name, value in token_options(tokenizer).items() if name in known}
    if "max_length" in cfg.task:
        # A text has at most two special tokens.
        vocabulary["max_position_embeddings"] = cfg.task.max_length + 2
    set_seed(cfg.seed)
    is_adopted = bool(adopted or options.get("backbone_config"))
    lora = options.pop("lora", None) if is_adopted else None
    model = AutoModel.from_config(config_class(**{**vocabulary, **options, **adopted}))
    known_ids = load_backbone(model, source, tokenizer) if adopted else 0
    if is_adopted:
        check_sees_both_ways(model)
    if lora:
        add_lora(model, lora, known_ids)
    ids = {name: token_options(tokenizer).get(name) for name in ("bos_token_id", "pad_token_id", "eos_token_id")}
    model.generation_config = model.generation_config_class(**ids)
    return _with_generation_options(model, cfg)


def load_model(cfg: DictConfig, tokenizer: PreTrainedTokenizerBase | None = None) -> PreTrainedModel:
    """The model of `checkpoint=`, with the generation options of the config over its own.

    Args:
        cfg: the composed config.
        tokenizer: of the task, which must fit the model's vocabulary.

    Raises:
        ValueError: if no checkpoint is named, it cannot be loaded, or the vocabularies differ.
    """
    if cfg.checkpoint is None:
        raise ValueError(f"job={cfg.job} needs a model: add checkpoint=DIR, a run, a checkpoint or a Hub id.")
    source = resolve_checkpoint(cfg.checkpoint)
    # Otherwise transformers asks a service to convert the pickles of a repository that has nothing else.
    os.environ["DISABLE_SAFETENSORS_CONVERSION"] = "true"
    with _loading(source):
        model = AutoModel.from_pretrained(
            source, dtype=torch.float32, trust_remote_code=cfg.trust_remote_code, use_safetensors=True
        )
    if tokenizer is not None and len(tokenizer) != model.config.vocab_size:
        raise ValueError(
            f"{source} has a vocabulary of {model.config.vocab_size} and task {cfg.task.name!r} one of "
            f"{len(tokenizer)}: name the task that it was trained on."
        )
    averaged = cfg.ema and load_average(model, Path(source))
    logger.info("Loaded %s%s.", source, ", averaged weights" if averaged else "")
    return _with_generation_options(model, cfg)


def load_tokenizer(cfg: DictConfig) -> PreTrainedTokenizerBase:
    """The tokenizer that was saved with the model of `checkpoint=`."""
    source = resolve_checkpoint(cfg.checkpoint)
    with _loading(source):
        return AutoTokenizer.from_pretrained(source, trust_remote_code=cfg.trust_remote_code)


@contextlib.contextmanager
def _loading(source: str) -> Iterator[None]:
    """Say in one sentence why nothing can be loaded from a Hub id or a folder."""
    try:
        yield
    except OSError as error:
        if isinstance(error.__cause__, RepositoryNotFoundError):
            raise ValueError(
                f"There is no model {source} on the Hub, or it is private and HF_TOKEN may not read it."
            ) from None
        if "use_safetensors" in str(error):
            raise ValueError(f"{source} holds no weights in safetensors, the one format that is loaded.") from None
        raise
    except ValueError as error:
        if "trust_remote_code=True" in str(error):
            raise ValueError(
                f"{source} brings code of its own: read it, and add trust_remote_code=true to run it."
            ) from None
        raise


def _with_generation_options(model: PreTrainedModel, cfg: DictConfig) -> PreTrainedModel:
    options = options_of(cfg.generation)
    if options["max_new_tokens"] is None:
        # The task has no opinion.
        del options["max_new_tokens"]
    model.generation_config = type(model.generation_config)(**{**model.generation_config.to_dict(), **options})
    return model


def build_collator(
    cfg: DictConfig, kind: str, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, **options: Any
) -> Callable:
    """The family's collator of a kind, e.g. `seq2seq_prediction`, with `options` beside those of the config."""
    if kind not in cfg.collators:
        raise ValueError(f"Family {cfg.family!r} has no collator {kind!r}: {did_you_mean(kind, list(cfg.collators))}")
    check_arguments(f"The collator {kind!r}", options, hydra.utils.get_class(cfg.collators[kind]._target_))
    options = {"max_length": model.config.max_position_embeddings, "seed": cfg.seed, **options}
    return hydra.utils.instantiate(cfg.collators[kind], tokenizer=tokenizer, **options)


def build_evaluation_sets(cfg: DictConfig, task: Task, model: PreTrainedModel, loss: Any) -> list[EvaluationSet]:
    """The task's `evaluation` list as objects."""
    known = [field.name for field in fields(EvaluationSet) if field.name not in ("dataset", "kind")]
    sets = []
    for entry in plain(cfg.task.evaluation):
        check_options("An entry of task.evaluation", entry, [*known, "split", "num_samples"])
        split = entry.get("split")
        if split not in task.splits and not (split is None and "num_samples" in entry):
            raise ValueError(f"Task {task.name!r} has no split {split!r}: {did_you_mean(str(split), task.splits)}")
        for name in entry.get("prediction_fields") or ():
            if name not in RECORD_FIELDS:
                raise ValueError(f"prediction_fields has no {name!r}: {did_you_mean(name, RECORD_FIELDS)}")
        options = {name: value for name, value in entry.items() if name not in ("split", "num_samples")}
        options.update(
            dataset=_unconditional(entry, task) if "num_samples" in entry else task.splits[entry["split"]],
            collator=build_collator(cfg, entry["collator"], task.tokenizer, model),
            kind=entry["collator"].removesuffix("_prediction"),
            loss=loss if entry.get("loss") else None,
            metrics=_build_metrics(entry),
        )
        sets.append(EvaluationSet(**options))
    return sets


def build_callbacks(cfg: DictConfig) -> list[TrainerCallback]:
    """The callbacks that the config asks for: a budget, early stopping where a patience is set, the profiler."""
    callbacks: list[TrainerCallback] = [Budget(**plain(cfg.budget))]
    if cfg.early_stopping.patience is not None:
        callbacks.append(EarlyStopping(cfg.early_stopping.patience, cfg.early_stopping.threshold))
    if cfg.debug.name == "profile":
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


def _build_metrics(entry: dict[str, Any]) -> list[Any]:
    """The metrics of an evaluation set; one whose required option is null is left out."""
    inputs = ["predictions", "prompts", *(["references"] if "split" in entry else [])]
    metrics = []
    for spec in entry.get("metrics", []):
        metric = load_metric(spec)
        where = f"The metric {spec if isinstance(spec, str) else next(iter(spec.values()))!r} of {entry['name']!r}"
        for name in metric.features:
            if name not in inputs:
                raise ValueError(f"{where} needs {name} and gets {', '.join(inputs)}; a split gives references.")
        parameters = inspect.signature(metric._compute).parameters.values()
        required = [p.name for p in parameters if p.default is p.empty and p.name not in metric.features]
        if missing := [name for name in required if isinstance(spec, str) or name not in spec]:
            raise ValueError(f"{where} needs the option {missing[0]}: add it beside its name.")
        if all(spec[name] is not None for name in required):
            getattr(metric, "check", dict)()
            metrics.append(metric)
    return metrics


def build_trainer(cfg: DictConfig, task: Task, model: PreTrainedModel, output_dir: Path) -> XLMTrainer:
    """The trainer of a run, with everything that the config names."""
    options = options_of(cfg.trainer)
    check_arguments("trainer", options, XLMTrainingArguments)
    if any(limit is not None for limit in plain(cfg.budget).values()):
        options["max_steps"] = _MAX_STEPS_OF_A_BUDGET
    of_run = {"output_dir": str(output_dir), "seed": cfg.seed, "report_to": list(cfg.logger), "use_ema": cfg.ema}
    arguments = XLMTrainingArguments(**{**of_run, **options})
    check_arguments("loss", options_of(cfg.loss), hydra.utils.get_class(cfg.loss._target_))
    loss = hydra.utils.instantiate(cfg.loss)
    return XLMTrainer(
        model=model,
        args=arguments,
        loss=loss,
        data_collator=build_collator(cfg, task.kind, task.tokenizer, model, **plain(cfg.train_collator)),
        train_dataset=task.splits["train"],
        evaluation_sets=build_evaluation_sets(cfg, task, model, loss),
        processing_class=task.tokenizer,
        callbacks=build_callbacks(cfg),
    )


def write_results(output_dir: Path, metrics: dict[str, float], predictions: dict[str, list[dict[str, Any]]]) -> None:
    """Write `metrics.json` and `predictions/<set>.jsonl`, overwriting what an earlier call wrote."""
    for name, records in predictions.items():
        write_predictions(output_dir, name, records)
    write_text(output_dir / "metrics.json", json.dumps(metrics, indent=2, sort_keys=True, default=float) + "\n")


def card_variables(
    config: dict[str, Any], metrics: dict[str, float], predictions: dict[str, list[dict[str, Any]]]
) -> dict[str, Any]:
    """What the model card says of a run: its config as plain Python, its metrics, with `steps`, and some decodes."""
    decodes = predictions[min(predictions)][:5] if predictions else []
    # Where the run lies on this machine is nobody's business, and a token even less.
    hidden = ("output_dir", "checkpoint", "prompts")
    public = {name: value for name, value in config.items() if name not in hidden}
    public["trainer"] = {name: value for name, value in config["trainer"].items() if "token" not in name}
    task, generation = config["task"], config["generation"]
    # From the registry and not by its `_target_`, since a config that came from elsewhere imports nothing.
    family, backbone = families().get(config["family"]), config["model"].get("backbone", "rotary")
    own = getattr(family and family.config_class, "own_backbones", ("rotary",))
    options = ", ".join(f"{name}={value}" for name, value in generation.items() if value is not None)
    return {
        "experiment": config["experiment"],
        "base_model": None if backbone in own else backbone,
        "task": task["name"],
        "dataset": f"`{task['_target_']}`, with the options under `task` below",
        "seed": config["seed"],
        "steps": metrics["steps"],
        "config": OmegaConf.to_yaml(OmegaConf.create(public)),
        "metrics": {name: value for name, value in sorted(metrics.items()) if "/" in name},
        "protocol": f"Each example once, with the seed of the run; losses with the corruption of epoch 0, decodes with "
        f"{options or 'the default options'}.",
        "samples": [
            {name: record.get(name, "") for name in ("prompt", "prediction", "reference")} for record in decodes
        ],
    }


def next_command(*overrides: str) -> str:
    """The command line of this process with other `overrides`, to be shown to the user."""
    replaced = ("job", "output_dir", "checkpoint", "num_samples", "prompts")
    arguments = sys.argv[1:]
    if HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
        arguments = ["--config-name", str(HydraConfig.get().job.config_name), *HydraConfig.get().overrides.task]
    kept = [argument.removeprefix("++") for argument in arguments if argument.split("=")[0] not in replaced]
    return shlex.join(["python", sys.argv[0], *kept, *overrides])


def say(text: str) -> None:
    """Print a line for the person at the command line."""
    print(text, file=sys.stdout, flush=True)
