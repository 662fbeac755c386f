"""Named evaluation sets: a dataset, how it is collated, and what is measured on it."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import datasets
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from xlm_hf.data import KeyedExamples
from xlm_hf.modules.counter_random import random_bits


@dataclass
class EvaluationSet:
    """One line of a task's `evaluation` list.

    Attributes:
        name: prefix of its results: `exact_match` of the set `test` is reported as `test/exact_match`. Sets that
            measure different things may share a name.
        dataset: the examples.
        collator: makes batches: a training collator for `loss`, a prediction collator for `generate`.
        stages: when it runs, e.g. `("validation",)`.
        loss: the family's loss, to report its value and components.
        generate: whether to decode every example and score it.
        metrics: `evaluate` modules for the decoded sequences. Each gets those of `predictions`, `references` and
            `prompts` (lists of token ids) that its features name.
    """

    name: str
    dataset: datasets.Dataset
    collator: Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]]
    stages: Sequence[str]
    loss: Any = None
    generate: bool = False
    metrics: Sequence[Any] = field(default_factory=tuple)


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
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Measure one set, each example exactly once, spread over all ranks.

    The corruption is that of epoch 0, with an example's index as its position; a decode is seeded by (seed,
    example_id). So the result depends neither on the batch size nor on the number of ranks.

    Returns:
        metrics without the set's name, and one record per decoded example (main process; empty for a loss).
    """
    was_training = model.training
    model.eval()
    start = time.perf_counter()
    state = PartialState()
    indices = range(state.process_index, len(evaluation_set.dataset), state.num_processes)
    loader = DataLoader(
        KeyedExamples(evaluation_set.dataset),
        batch_size=batch_size,
        sampler=[(0, index, index) for index in indices],
        collate_fn=evaluation_set.collator,
        # Of its own, so that evaluating leaves the training's random numbers alone.
        generator=torch.Generator(),
    )
    batches = ({name: tensor.to(model.device) for name, tensor in batch.items()} for batch in loader)
    if evaluation_set.loss is not None:
        metrics, records = _loss_metrics(model, evaluation_set.loss, batches), []
    else:
        records = _decode(model, batches, evaluation_set.dataset, list(indices), tokenizer, seed)
        metrics = _generation_metrics(records, evaluation_set)
    model.train(was_training)
    return {**metrics, "samples": len(evaluation_set.dataset), "seconds": time.perf_counter() - start}, records


def reduce_sums(sums: dict[str, tuple[Any, Any]], device: torch.device) -> dict[str, float]:
    """Means of (sum, count) pairs over all ranks, by one collective call in a fixed order; a count of 0 is left out.

    Beside `x`, a mean `x_squared` of squares becomes `x_standard_error` = sqrt((mean of squares - mean^2) / (n - 1)).
    """
    if not sums:
        return {}
    names = sorted(sums)
    pairs = torch.stack(
        [torch.stack([torch.as_tensor(x, dtype=torch.float64, device="cpu") for x in sums[name]]) for name in names]
    )
    if PartialState().num_processes > 1:
        pairs = pairs.to(device)
        torch.distributed.all_reduce(pairs)
    counted = {name: pair for name, pair in zip(names, pairs.tolist(), strict=True) if pair[1]}
    means = {name: total / count for name, (total, count) in counted.items()}
    for base in [name.removesuffix("_squared") for name in means if name.endswith("_squared")]:
        variance = max(means.pop(f"{base}_squared") - means[base] ** 2, 0.0)
        means[f"{base}_standard_error"] = (variance / max(counted[base][1] - 1, 1)) ** 0.5
    return means


def _loss_metrics(model, loss, batches) -> dict[str, float]:
    sums: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for batch in batches:
        output = loss(model, batch)
        for name, (total, count) in {**output.metrics, "loss": (output.loss_sum, output.num_items)}.items():
            old = sums.get(name, (0.0, 0))
            sums[name] = (old[0] + total, old[1] + count)
    return reduce_sums(sums, model.device)


def content_places(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Where the content of generated ids stands: before the end-of-sequence token, and not padding."""
    end = ids.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in ids else len(ids)
    return [place for place in range(end) if ids[place] != tokenizer.pad_token_id]


def _decode(model, batches, dataset, indices, tokenizer, seed) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = []
    for batch in batches:
        example_id = batch.pop("example_id")
        output = model.generate(**batch, seed=random_bits(seed, example_id))
        written = output.sequences[:, batch["input_ids"].shape[1] :].tolist()
        for number, ids in enumerate(written):
            example = dataset[indices[len(records)]]
            record = {
                "example_id": example["example_id"],
                "prompt_ids": example.get("prompt_ids", []),
                "prediction_ids": [ids[place] for place in content_places(ids, tokenizer)],
                "reference_ids": example.get("target_ids", example.get("input_ids")),
                "nfe": int(output.nfe[number]),
                "finish_reason": output.finish_reason[number],
            }
            for name in ("prompt", "prediction", "reference"):
                record[name] = tokenizer.decode(record[f"{name}_ids"])
            records.append(record)
    return sorted(gather_object(records), key=lambda record: record["example_id"])


def _generation_metrics(records: list[dict[str, Any]], evaluation_set: EvaluationSet) -> dict[str, float]:
    columns = {
        f"{name}s": [record[f"{name}_ids"] for record in records] for name in ("prediction", "reference", "prompt")
    }
    metrics = {"nfe": sum(record["nfe"] for record in records) / len(records)}
    for metric in evaluation_set.metrics:
        metrics.update(metric.compute(**{name: columns[name] for name in metric.features}))
    return metrics
