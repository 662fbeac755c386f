"""Correction: a wrong version of each target, made by random edits, from which the target is to be restored."""

import inspect
from functools import partial
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict

from xlm_hf.modules.checked_options import Count, Share, checked
from xlm_hf.modules.counter_random import random_bits, stream_seed, unit_interval
from xlm_hf.objectives.alignment import aligned
from xlm_hf.objectives.collation import ragged, segment_numbers, segment_ranges, segment_starts
from xlm_hf.tasks import Task, for_families
from xlm_hf.tasks.text import text_corpus

_KIND, _SUBSTITUTE, _INSERTS, _INSERTED = range(4)  # last counter of a random number: what it decides


@checked
def with_sources(task: Task, edit_rate: Share, seed: int) -> Task:
    """The correction task of a seq2seq task, or of texts: `source_ids` are the target after random edits.

    Each token is deleted with probability edit_rate / 3, and with as much substituted by another id, drawn evenly from
    those that are not special. As often an id is inserted before it, and at the end. All draws are functions of (seed,
    example_id, position). A column `alignment` has the fewest edits from the source to the target (see
    `xlm_hf.objectives.alignment`). Texts get an empty prompt.

    Raises:
        ValueError: for a rate outside of (0, 1], and for texts that are not examples of their own.
    """
    special = task.tokenizer.all_special_ids
    writable = np.setdiff1d(np.arange(len(task.tokenizer)), special)
    add = partial(_with_sources, edit_rate=edit_rate, writable=writable, seed=seed)
    splits = {}
    for split, dataset in task.splits.items():
        if not isinstance(dataset, Dataset) or "segment_ids" in dataset.column_names:
            raise ValueError(
                "A text is corrected as an example of its own: choose protocol=sentence, and no streaming or mixture."
            )
        if "prompt_ids" not in dataset.column_names:
            dataset = dataset.rename_column("input_ids", "target_ids")
            dataset = dataset.add_column("prompt_ids", [[] for _ in range(len(dataset))])
        splits[split] = dataset.map(add, batched=True)
    return Task(task.name, "seq2seq", DatasetDict(splits), task.tokenizer, task.files)


@for_families("canvas_length", "canvas_lengths")
def text_correction(*, edit_rate: Share, seed: Count = 42, **options: Any) -> Task:
    """The documents of a corpus after random edits, which are to be undone: see `with_sources`.

    Args:
        edit_rate: how often a token has an edit.
        seed: of the edits, and of the splits.
        options: those of `xlm_hf.tasks.text.text_corpus`.
    """
    return with_sources(text_corpus(seed=seed, **options), edit_rate, seed)


_OWN = inspect.signature(text_correction)
_OF_TEXTS = [
    p.replace(kind=p.KEYWORD_ONLY) for n, p in inspect.signature(text_corpus).parameters.items() if n != "seed"
]
text_correction.__signature__ = _OWN.replace(  # type: ignore[attr-defined]
    parameters=[*(p for n, p in _OWN.parameters.items() if n != "options"), *_OF_TEXTS]
)


def _with_sources(rows: dict[str, list], edit_rate: float, writable: np.ndarray, seed: int) -> dict[str, Any]:
    targets, lengths = ragged(rows["target_ids"])
    example_id = np.array(rows["example_id"]).view(np.uint64)
    sources, source_lengths = corrupted(targets, lengths, example_id, edit_rate, writable, seed)
    moves, num_columns = aligned(sources, source_lengths, targets, lengths)
    return {
        "source_ids": np.split(sources, source_lengths.cumsum()[:-1]),
        "alignment": np.split(moves, num_columns.cumsum()[:-1]),
    }


def corrupted(
    targets: np.ndarray, lengths: np.ndarray, example_id: np.ndarray, edit_rate: float, writable: np.ndarray, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Texts after random edits, as `with_sources` describes them.

    Args:
        targets: tokens of the texts, one after the other.
        lengths: (D,) how many each has.
        example_id: (D,) uint64.
        edit_rate: how often.
        writable: ids that may be written, ascending.
        seed: of the draws.

    Returns:
        their tokens and lengths.
    """
    # One position for each token, and one for the end.
    positions, texts = lengths + 1, segment_numbers(lengths + 1)
    bits = random_bits(stream_seed(seed, "correction"), example_id)[texts]
    bits = random_bits(segment_ranges(0, positions).astype(np.uint64), state=bits)
    draws = [unit_interval(random_bits(what, state=bits)) for what in range(4)]
    pieces = np.full((len(texts), 2), -1)
    inserts = draws[_INSERTS] < edit_rate / 3
    pieces[inserts, 0] = writable[(draws[_INSERTED][inserts] * len(writable)).astype(np.int64)]
    is_token = np.ones(len(texts), dtype=bool)
    is_token[segment_starts(positions) + lengths] = False
    kinds, others = draws[_KIND][is_token], draws[_SUBSTITUTE][is_token]
    own = np.searchsorted(writable, targets)
    steps = 1 + (others * (len(writable) - 1)).astype(np.int64)
    tokens = np.where(kinds < 2 * edit_rate / 3, writable[(own + steps) % len(writable)], targets)
    pieces[is_token, 1] = np.where(kinds < edit_rate / 3, -1, tokens)
    is_there = pieces >= 0
    return pieces[is_there], np.bincount(texts, is_there.sum(axis=1), len(lengths)).astype(np.int64)
