"""Named evaluation sets: a dataset, how it is collated, and what is measured on it."""

import inspect
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets.fingerprint import Hasher
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from xlm_hf.data import KeyedExamples, Mixture
from xlm_hf.files import JOURNAL_SUFFIX, Journal, check_file_name
from xlm_hf.likelihoods import likelihood_metrics, text_counts
from xlm_hf.modules.backbone_config import token_options
from xlm_hf.modules.checked_options import Count, PositiveInt, checked
from xlm_hf.modules.counter_random import random_bits
from xlm_hf.tasks.tokenizers import decode_text

RECORD_FIELDS = (
    *("example_id", "prompt_ids", "prediction_ids", "reference_ids", "prompt", "prediction", "reference"),
    *("references", "steps", "nfe", "tokens_per_forward", "finish_reason"),
)
_TEXT = datasets.Value("string")
_READ_AT_ONCE = 1000


@dataclass
class EvaluationSet:
    """One line of a task's `evaluation` list.

    Attributes:
        name: prefix of its results: `exact_match` of the set `test` is reported as `test/exact_match`. Sets that
            measure different things may share a name.
        dataset: the examples.
        collator: makes batches: a training collator for `loss`, a prediction collator for `generate`.
        stages: when it runs, e.g. `("validation",)`.
        loss: the family's loss, to report its value per item of training and its components. A likelihood or a bound of
            one also gives the `likelihood_metrics`, and `unknown_rate`, the share of `[UNK]` in the texts.
        generate: whether to decode every example and score it.
        metrics: `evaluate` modules for the decoded sequences. Each gets those of `predictions`, `references` and
            `prompts` that its features name: as text where the feature is a string, as token ids where it is a list of
            integers. A list of strings gets every reference of an example, as its column `references` has them: texts
            as they were before they were tokenised.
        kind: "lm", "seq2seq" or "infill". In infilling the whole sequence is the prediction, and the input with its
            blanks is the prompt. A metric whose `_compute` takes `blanks` is told where they were.
        num_draws: of a loss, how often each example is corrupted; draw d is the corruption of epoch d.
        prediction_fields: the fields of a record to keep, from `RECORD_FIELDS`; None keeps all. `example_id` and the
            metrics of the example are always kept.
        training_set: of the task, for a metric whose `_compute` takes `training_texts`: the whole texts in it.

    Raises:
        ValueError: for a name that no file can have.
    """

    name: str
    dataset: datasets.Dataset
    collator: Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]]
    stages: Sequence[str]
    loss: Any = None
    generate: bool = False
    metrics: Sequence[Any] = field(default_factory=tuple)
    kind: str = "seq2seq"
    num_draws: int = 1
    prediction_fields: Sequence[str] | None = None
    training_set: Any = None

    def __post_init__(self):
        check_file_name("The name of an evaluation set", self.name)


@dataclass(kw_only=True)
class EvaluationEntry:
    """An evaluation set as a task's `evaluation` list writes it; what is not said here is said of `EvaluationSet`.

    Attributes:
        collator: the kind that it makes batches of, for prompts with `_prediction` behind it.
        split: of the task, that holds the examples or, with `num_samples`, the references.
        num_samples: how many examples without a prompt there are.
    """

    name: str
    collator: str
    stages: Sequence[Literal["validation", "test"]]
    split: str | None = None
    num_samples: PositiveInt | None = None
    loss: bool = False
    generate: bool = False
    metrics: Sequence[str | Mapping[str, Any]] = ()
    num_draws: PositiveInt = 1
    prediction_fields: Sequence[str] | None = None


@checked
def default_evaluation(
    kind: str, metrics: Sequence[str | Mapping[str, Any]] = (), num_samples: Count = 0
) -> list[dict[str, Any]]:
    """The evaluation sets of a task that lists none: entries as in a task's `evaluation` list.

    Every kind has its loss on `validation` while training and on `test` after it. Of prompts and blanks both are also
    decoded and scored by the `metrics`. Of plain text `num_samples` samples are written at the end, and scored.

    Args:
        kind: of the task.
        metrics: of what is decoded.
        num_samples: of plain text; 0 for none.
    """
    entries: list[dict[str, Any]] = []
    decode = {"collator": f"{kind}_prediction", "generate": True, "metrics": list(metrics)}
    for stage in ("validation", "test"):
        of_stage = {"name": stage, "split": stage, "stages": [stage]}
        entries.append({**of_stage, "collator": kind, "loss": True})
        if kind != "lm":
            entries.append({**of_stage, **decode})
    if kind == "lm" and num_samples:
        entries.append({"name": "samples", "num_samples": num_samples, **decode, "stages": ["test"]})
    return entries


def check_evaluation_sets(sets: Sequence[EvaluationSet]) -> None:
    """Raise ValueError if a set measures nothing, is empty, or two sets would report under one key."""
    seen: set[tuple[str, str]] = set()
    for evaluation_set in sets:
        name = evaluation_set.name
        kinds = [kind for kind in ("loss", "generate") if getattr(evaluation_set, kind)]
        if len(kinds) != 1:
            raise ValueError(f"Evaluation set {name!r} must have either a loss or generate: true, and has {kinds}.")
        if (name, kinds[0]) in seen:
            raise ValueError(f"Two evaluation sets named {name!r} report a {kinds[0]}: give one of them another name.")
        if len(evaluation_set.dataset) == 0:
            raise ValueError(f"Evaluation set {name!r} is empty: choose another split or more examples.")
        seen.add((name, kinds[0]))


@torch.no_grad()
def run_evaluation_set(
    model: PreTrainedModel,
    evaluation_set: EvaluationSet,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    seed: int,
    after_batch: Callable[[DataLoader], None] = lambda loader: None,
    folder: Path | None = None,
    **loader_options: Any,
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Measure one set, each example exactly once, spread over all ranks.

    The corruption is that of epoch 0, with an example's index as its position; a decode is seeded by (seed,
    example_id). So the result depends neither on the batch size nor on the number of ranks.

    Args:
        model: the model.
        evaluation_set: the set.
        tokenizer: turns ids into text.
        batch_size: of this rank.
        seed: of a decode.
        after_batch: is called with the data loader after every batch.
        folder: of a `Journal` for the decodes of each rank, behind which the same call goes on; None keeps none.
        **loader_options: of the data loader.

    Returns:
        metrics without the set's name, and one record per decoded example (main process; empty for a loss).
    """
    was_training = model.training
    model.eval()
    start = time.perf_counter()
    options = {"batch_size": batch_size, **loader_options}
    batches = partial(_batches, model, evaluation_set, options, after_batch)
    if evaluation_set.loss is not None:
        metrics, records = _loss_metrics(model, evaluation_set, tokenizer, batches), []
    else:
        records = _decode(model, evaluation_set, tokenizer, batches, seed, folder)
        metrics = _generation_metrics(records, evaluation_set, tokenizer)
        dropped = set(RECORD_FIELDS) - {"example_id", *(evaluation_set.prediction_fields or RECORD_FIELDS)}
        records = [{name: value for name, value in record.items() if name not in dropped} for record in records]
    model.train(was_training)
    return {**metrics, "samples": len(evaluation_set.dataset), "seconds": time.perf_counter() - start}, records


def _own_indices(evaluation_set: EvaluationSet) -> range:
    """The examples of this rank."""
    state = PartialState()
    return range(state.process_index, len(evaluation_set.dataset), state.num_processes)


def _batches(
    model, evaluation_set: EvaluationSet, options: dict[str, Any], after_batch: Callable, epoch: int = 0, start: int = 0
) -> Iterator[dict[str, torch.Tensor]]:
    """This rank's batches from its example `start` on, corrupted as in `epoch`, an example's index its position."""
    loader = DataLoader(
        KeyedExamples(evaluation_set.dataset),
        sampler=[(epoch, index, index) for index in _own_indices(evaluation_set)[start:]],
        collate_fn=evaluation_set.collator,
        # Of its own, so that evaluating leaves the training's random numbers alone.
        generator=torch.Generator(),
        **options,
    )
    for batch in loader:
        yield {name: tensor.to(model.device) for name, tensor in batch.items()}
        after_batch(loader)


def reduce_sums(sums: dict[str, tuple[Any, Any]], device: torch.device) -> dict[str, float]:
    """Means of (sum, count) pairs over all ranks, by one collective call in a fixed order; a count of 0 is left out."""
    if not sums:
        return {}
    names = sorted(sums)
    pairs = torch.tensor([[float(x) for x in sums[name]] for name in names], dtype=torch.float64)
    if PartialState().num_processes > 1:
        pairs = pairs.to(device)
        torch.distributed.all_reduce(pairs)
    return {name: total / count for name, (total, count) in zip(names, pairs.tolist(), strict=True) if count}


def _loss_metrics(model, evaluation_set: EvaluationSet, tokenizer, batches: Callable[..., Any]) -> dict[str, float]:
    sums: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    draws: list[list[tuple[float, int]]] = []
    conditions: set[str] = set()
    for draw in range(evaluation_set.num_draws):
        draws.append([])
        for batch in batches(epoch=draw):
            output = evaluation_set.loss(model, batch)
            for name, (total, count) in {**output.metrics, "loss": (output.loss_sum, output.num_items)}.items():
                old = sums.get(name, (0.0, 0))
                sums[name] = (old[0] + total, old[1] + count)
            if output.sequence_nats is not None:
                draws[-1] += zip(output.sequence_nats.tolist(), output.sequence_tokens.tolist(), strict=True)
                conditions.update(name for name, is_given in output.sequence_given.items() if is_given.any())
    metrics = reduce_sums(sums, model.device)
    sequences = gather_object(list(zip(*draws, strict=True)))
    if sequences:
        rows = evaluation_set.dataset.select(_own_indices(evaluation_set))
        counts = gather_object([text_counts(rows, tokenizer, evaluation_set.kind)])
        num_characters, num_unknown, num_tokens = (
            None if None in column else sum(column) for column in zip(*counts, strict=True)
        )
        nats, tokens = np.moveaxis(np.array(sequences), -1, 0)
        given = set(gather_object(sorted(conditions)))
        metrics.update(likelihood_metrics(nats, tokens[:, 0], num_characters, given))
        if num_unknown:
            metrics["unknown_rate"] = num_unknown / num_tokens
    return metrics


def content_positions(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Positions of the content of generated ids: before the end-of-sequence token, and not padding."""
    end = ids.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in ids else len(ids)
    return [position for position in range(end) if ids[position] != tokenizer.pad_token_id]


def decode_records(
    output: Any,
    batch: dict[str, torch.Tensor],
    examples: Sequence[dict[str, Any]],
    kind: str,
    tokenizer: PreTrainedTokenizerBase,
) -> list[dict[str, Any]]:
    """One record for each row of a decode, with the `RECORD_FIELDS`; of a correction also `source_ids` and `source`.

    Args:
        output: what `generate(return_history=True)` returned.
        batch: what it was given.
        examples: what the batch was made of: `prompt_ids` if any, `input_ids` with blanks for "infill", and the
            reference as `reference_ids`, `target_ids` or, for "lm", `input_ids`. The columns `references` and
            `source_ids` go on.
        kind: of `EvaluationSet`.
        tokenizer: turns ids into text.
    """
    records, width = [], batch["input_ids"].shape[1]
    for row, example in enumerate(examples):
        sequence = output.sequences[row].tolist()
        positions = [width + position for position in content_positions(sequence[width:], tokenizer)]
        prompt_ids, reference = example.get("prompt_ids", []), "input_ids"
        if kind == "infill":
            positions = batch["attention_mask"][row].nonzero().squeeze(-1).tolist()
            if num_specials := len(positions) - len(example["input_ids"]):
                # A family with special tokens before what it fills in, whose rows may grow.
                kept = [i for i, token in enumerate(sequence) if token != tokenizer.pad_token_id]
                positions = kept[num_specials:]
            prompt_ids, reference = example["input_ids"], "target_ids"
        steps = output.history[row].tolist()
        record = {
            "example_id": example["example_id"],
            "prompt_ids": prompt_ids,
            "prediction_ids": [sequence[position] for position in positions],
            "reference_ids": example.get("reference_ids", example.get("target_ids", example.get(reference, []))),
            "steps": [steps[position] for position in positions],
            "nfe": int(output.nfe[row]),
            "tokens_per_forward": float(output.tokens_per_forward[row]),
            "finish_reason": output.finish_reason[row],
        }
        record.update({name: example[name] for name in ("references", "source_ids") if name in example})
        for name in ("prompt", "prediction", "reference", "source"):
            if f"{name}_ids" in record:
                record[name] = decode_text(tokenizer, record[f"{name}_ids"])
        records.append(record)
    return records


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, config: Any) -> None:
    """Raise ValueError if a model has another vocabulary, or other special tokens, than a tokenizer."""
    for name, value in token_options(tokenizer).items():
        if name != "suppress_tokens" and (found := getattr(config, name, None)) not in (None, value):
            wanted = "name the task that the model was trained on, or make its config by from_tokenizer"
            raise ValueError(f"The model's {name} is {found} and the tokenizer's {value}: {wanted}.")


def check_blanks(examples: Sequence[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ValueError for an example of infilling in which nothing is blank."""
    for example in examples:
        if tokenizer.mask_token_id not in example["input_ids"]:
            number, mask = example["example_id"], tokenizer.mask_token
            raise ValueError(f"Example {number} has no blank to fill in: put {mask} for each token to be written.")


def _decode(
    model, evaluation_set: EvaluationSet, tokenizer, batches: Callable, seed: int, folder: Path | None
) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = []
    indices = _own_indices(evaluation_set)
    if folder is not None:
        work = (model.state_dict(), model.generation_config.to_dict(), evaluation_set.dataset._fingerprint)
        key = Hasher.hash((*work, indices, seed))
        records = Journal(folder / f"{evaluation_set.name}.{indices.start}{JOURNAL_SUFFIX}", key)
    for batch in batches(start=len(records)):
        example_id = batch.pop("example_id")
        examples = [evaluation_set.dataset[i] for i in indices[len(records) : len(records) + len(example_id)]]
        if evaluation_set.kind == "infill":
            check_blanks(examples, tokenizer)
        output = model.generate(**batch, seed=random_bits(seed, example_id), return_history=True)
        records.extend(decode_records(output, batch, examples, evaluation_set.kind, tokenizer))
    return sorted(gather_object(list(records)), key=lambda record: record["example_id"])


def training_texts(data: Any, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """The texts that a training set teaches to write, one after the other, but for pieces that go on elsewhere."""
    for dataset in data.sets if isinstance(data, Mixture) else [data]:
        for batch in dataset.iter(_READ_AT_ONCE):
            texts = batch["target_ids" if "target_ids" in batch else "input_ids"]
            continues = batch.get("continues", [False] * len(texts))
            for ids, is_piece in zip(texts, continues, strict=True):
                if not is_piece:
                    yield decode_text(tokenizer, ids)


def _generation_metrics(records: list[dict[str, Any]], evaluation_set: EvaluationSet, tokenizer) -> dict[str, float]:
    nfe = sum(record["nfe"] for record in records)
    written = sum(record["nfe"] * record["tokens_per_forward"] for record in records)
    metrics = {"nfe": nfe / len(records), "tokens_per_forward": written / max(nfe, 1)}
    # What is decoded under a condition has another name, as likelihoods have.
    given = "".join(f"_given_{condition}" for condition in getattr(evaluation_set.collator, "given", ()))
    for metric in evaluation_set.metrics:
        inputs = {}
        for name, feature in metric.features.items():
            if feature == datasets.List(_TEXT):
                inputs[name] = [record.get(name, [record[name[:-1]]]) for record in records]
            else:
                inputs[name] = [record[name[:-1] if feature == _TEXT else f"{name[:-1]}_ids"] for record in records]
        parameters = inspect.signature(getattr(metric, "_compute", metric.compute)).parameters
        if evaluation_set.kind == "infill" and "blanks" in parameters:
            mask = tokenizer.mask_token_id
            inputs["blanks"] = [[token == mask for token in record["prompt_ids"]] for record in records]
        known = {}
        if "training_texts" in parameters:
            known["training_texts"] = training_texts(evaluation_set.training_set, tokenizer)
        results = {f"{name}{given}": value for name, value in metric.compute(**inputs, **known).items()}
        per_example = metric.per_example(**inputs) if hasattr(metric, "per_example") else {}
        for name, values in per_example.items():
            for record, value in zip(records, values, strict=True):
                record[name] = value
            if len(values) > 1:
                results[f"{name}{given}_standard_error"] = statistics.stdev(values) / math.sqrt(len(values))
        if clash := results.keys() & metrics.keys():
            raise ValueError(f"Two metrics of the set {evaluation_set.name!r} report {min(clash)!r}: drop one.")
        metrics.update(results)
    return metrics
