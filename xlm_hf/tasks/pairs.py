"""Pairs of texts: translation, questions and answers, data to text, from any file or data set."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from datasets import Dataset, DatasetDict, Features, List, Value
from transformers import PreTrainedTokenizerFast

from xlm_hf.modules.checked_options import Count, PartialShare, PositiveInt, Share, check_value, checked
from xlm_hf.tasks import Task
from xlm_hf.tasks.blanks import with_blanks
from xlm_hf.tasks.cache import Prepared, cached
from xlm_hf.tasks.corpora import check_columns, content_key, local_files, locate, read
from xlm_hf.tasks.readers import json_rows
from xlm_hf.tasks.tokenizers import decode_text, ready_tokenizer, tokenizer_key, train_tokenizer

# Part of the cache key: raise it with every change that makes other examples from the same texts and settings.
PREPARATION_VERSION = 3

_BATCH_SIZE = 1000
# What a record of a teacher has.
_WRITTEN = {"prompt_ids": list[int], "prediction_ids": list[int], "prediction": str, "finish_reason": str}
_NOT_OF_THE_TEXTS = ("name", "blank_rate", "distilled", "cache_dir")
_IDS = List(Value("int32"))
_FEATURES = {
    **{"example_id": Value("int64"), "prompt_ids": _IDS, "target_ids": _IDS},
    **{"continues": Value("bool"), "num_characters": Value("int64")},
}


@checked
def text_pairs(
    name: str,
    path: str,
    source_column: str = "source",
    target_column: str = "target",
    tokenizer: str = "bpe",
    vocab_size: PositiveInt = 8_000,
    max_length: PositiveInt = 256,
    max_target_length: PositiveInt = 128,
    blank_rate: Share | None = None,
    distilled: str | None = None,
    sample_by: Literal["line", "paragraph", "document"] = "line",
    splits: Mapping[str, str] | None = None,
    validation_fraction: PartialShare = 0.05,
    test_fraction: PartialShare = 0.05,
    seed: Count = 42,
    subset: str | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike | None = None,
) -> Task:
    """Pairs of texts as a seq2seq task; `docs/tasks.md` describes every option.

    In the training set every pair is an example. In the others all pairs of one source are one example: the first
    target is its `target_ids`, and all of them, as they were written, are its `references`. A target may itself be a
    list of texts; a source without one is left out.

    Args:
        name: of the task and of its cache folder.
        path: see `xlm_hf.tasks.corpora.locate`.
        source_column: the column of the prompts; "outer.inner" names a column of a column.
        target_column: that of the targets. Both are called `source` and `target` in a copy that lacks these columns.
        tokenizer: of both, see `xlm_hf.tasks.tokenizers`.
        vocab_size: of a tokenizer that is made from the training set.
        max_length: most tokens of an example; a longer source is cut off.
        max_target_length: most tokens of a target; a longer one is cut off, and has no end.
        distilled: file of `job=distill`: what the teacher wrote takes the place of the targets of the training set.
        blank_rate: makes it an infill task, see `with_blanks`; None leaves the whole target to be written.

    The other options are those of `xlm_hf.tasks.text.text_corpus`; `seed` is of the drawn splits and of the blanks.

    Raises:
        ValueError: for lengths that leave no token to the source, or a source, column or teacher's text that lacks.
    """
    options = {option: value for option, value in locals().items() if option not in _NOT_OF_THE_TEXTS}
    if not 0 < max_target_length < max_length:
        raise ValueError(
            f"max_target_length={max_target_length} must be at least 1 and below max_length={max_length}, which counts "
            "the source too: change one of them."
        )
    source = locate(path, source_column, splits)
    ready = ready_tokenizer(tokenizer)
    key = {**options, "version": PREPARATION_VERSION, "path": content_key(source)}
    key["tokenizer"] = tokenizer if ready is None else tokenizer_key(ready)
    prepared, made = cached(name, key, lambda scratch: _prepare(source, scratch, options, ready), cache_dir)
    train = prepared["train"] if distilled is None else _distilled(prepared["train"], made, Path(distilled))
    task = Task(name, "seq2seq", {**prepared, "train": train}, made, local_files(source))
    return task if blank_rate is None else with_blanks(task, blank_rate, seed)


def _distilled(train: Dataset, tokenizer: PreTrainedTokenizerFast, file: Path) -> Dataset:
    """A training set whose targets are those of a file of `job=distill`."""
    if not file.is_file():
        raise ValueError(f"There is no file {file}: task.distilled names what job=distill wrote, distilled.jsonl.")
    written: dict[tuple[int, ...], Any] = {}
    for number, row in json_rows(file):
        for name, kind in _WRITTEN.items():
            check_value(f"{file}, line {number}: {name}", row.get(name), kind)
        written[tuple(row["prompt_ids"])] = row
    prompts = [tuple(ids) for ids in train["prompt_ids"]]
    if num := sum(ids not in written for ids in prompts):
        raise ValueError(
            f"{file} has no text for {num:,} of the {len(prompts):,} prompts of the training set: run "
            "job=distill on this task, with this tokenizer."
        )
    # Two vocabularies may have the ids of all prompts in common, and not those of the texts.
    if num := sum(decode_text(tokenizer, row["prediction_ids"]) != row["prediction"] for row in written.values()):
        raise ValueError(
            f"{num:,} of the {len(written):,} texts in {file} are other texts by this tokenizer: use that of the "
            "teacher, or run job=distill on this task, with this tokenizer."
        )
    found = [written[ids] for ids in prompts]
    columns: dict[str, Any] = {name: train[name] for name in ("example_id", "prompt_ids")}
    columns["target_ids"] = [row["prediction_ids"] for row in found]
    columns["continues"] = [row["finish_reason"] != "stop" for row in found]
    columns["num_characters"] = [len(row["prediction"]) for row in found]
    return Dataset.from_dict(columns, Features(_FEATURES))


def _prepare(source: Any, scratch: Path, options: dict[str, Any], ready: PreTrainedTokenizerFast | None) -> Prepared:
    columns = {"source": False, "target": True, options["source_column"]: False, options["target_column"]: True}
    raw = read(source, columns, scratch, options)
    prompts, targets = (_column(raw, options[f"{side}_column"], side) for side in ("source", "target"))
    check_columns(raw, [prompts, targets])
    pairs = {split: _pairs(data, prompts, targets, is_grouped=split != "train") for split, data in raw.items()}

    def texts() -> Iterator[list[str]]:
        for start in range(0, len(pairs["train"]), _BATCH_SIZE):
            yield [
                text for prompt, targets in pairs["train"][start : start + _BATCH_SIZE] for text in (prompt, *targets)
            ]

    made = ready or train_tokenizer(options["tokenizer"], texts(), options["vocab_size"])
    names = [name for name in ("train", "validation", "test") if name in pairs]
    return DatasetDict({name: _encoded(pairs[name], made, options, is_grouped=name != "train") for name in names}), made


def _column(data: DatasetDict, column: str, side: str) -> str:
    """The column of that name, or the one that is called like the side of the pair."""
    names = next(iter(data.values())).column_names
    return side if column not in names and side in names else column


def _pairs(data: Dataset, source: str, target: str, is_grouped: bool) -> list[tuple[str, list[str]]]:
    """Sources with their targets; grouped, every source once."""
    pairs: list[tuple[str, list[str]]] = []
    known: dict[str, list[str]] = {}
    for prompt, written in zip(data[source], data[target], strict=True):
        targets = [text for text in (written if isinstance(written, list) else [written]) if text]
        if not prompt or not targets:
            continue
        if is_grouped and prompt in known:
            known[prompt] += [text for text in targets if text not in known[prompt]]
        elif is_grouped:
            known[prompt] = targets
            pairs.append((prompt, targets))
        else:
            pairs += [(prompt, [text]) for text in targets]
    return pairs


def _encoded(
    pairs: list[tuple[str, list[str]]], tokenizer: PreTrainedTokenizerFast, options: dict[str, Any], is_grouped: bool
) -> Dataset:
    longest = options["max_target_length"]
    columns: dict[str, list] = {name: [] for name in _FEATURES}
    for start in range(0, len(pairs), _BATCH_SIZE):
        batch = pairs[start : start + _BATCH_SIZE]
        prompts, targets = (
            # A special token's name in a text is text.
            tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True, verbose=False)
            for texts in ([prompt for prompt, _ in batch], [targets[0] for _, targets in batch])
        )
        columns["prompt_ids"] += [ids[: options["max_length"] - longest] for ids in prompts["input_ids"]]
        columns["target_ids"] += [ids[:longest] for ids in targets["input_ids"]]
        is_cut = [len(ids) > longest for ids in targets["input_ids"]]
        columns["continues"] += is_cut
        columns["num_characters"] += [
            encoding.offsets[longest - 1][1] if cut else len(texts[0])
            for (_, texts), encoding, cut in zip(batch, targets.encodings, is_cut, strict=True)
        ]
    columns["example_id"] = list(range(len(pairs)))
    features = dict(_FEATURES)
    if is_grouped:
        columns["references"] = [targets for _, targets in pairs]
        features["references"] = List(Value("string"))
    return Dataset.from_dict(columns, Features(features))
