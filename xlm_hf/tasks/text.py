"""Text corpora for language modelling: local files, data sets of the Hub, or the result of a Python function.

A corpus is read, tokenised and written once, by `num_proc` processes and in little memory. The result is Arrow files,
which are memory-mapped from then on. Either each document is an example ("sentence"), or the documents follow one
another and are cut into chunks ("packed").
"""

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, DatasetDict, Features, List, Value
from transformers import PreTrainedTokenizerFast

from xlm_hf.data import Mixture
from xlm_hf.modules.messages import check_options, did_you_mean
from xlm_hf.tasks import Task, for_families
from xlm_hf.tasks.cache import Prepared, cached
from xlm_hf.tasks.corpora import check_columns, content_key, files_of, locate, read
from xlm_hf.tasks.detokenizers import DETOKENIZERS
from xlm_hf.tasks.tokenizers import ready_tokenizer, tokenizer_key, train_tokenizer

# Part of the cache key: raise it with every change that makes other examples from the same texts and settings.
PREPARATION_VERSION = 4

# Documents that are tokenised, and made examples of, at a time.
BATCH_SIZE = 1000

# What is not an option of the preparation of one corpus.
_NOT_OF_A_CORPUS = ("name", "mixture", "streaming", "num_proc", "cache_dir")
# Parts of a streamed training set whose order is shuffled.
_NUM_SHARDS = 1024
_CHOICES: dict[str, tuple[Any, ...]] = {
    "detokenizer": (None, *DETOKENIZERS),
    "protocol": ("sentence", "packed"),
    "long_documents": ("split", "truncate"),
    "sample_by": ("line", "paragraph", "document"),
}


@for_families("canvas_length", "canvas_lengths")
def text_corpus(
    name: str,
    path: str,
    tokenizer: str = "word",
    vocab_size: int = 30_000,
    text_column: str = "text",
    detokenizer: str | None = None,
    protocol: str = "sentence",
    max_length: int = 128,
    long_documents: str = "split",
    document_masks: bool = True,
    sample_by: str = "line",
    splits: Mapping[str, str] | None = None,
    validation_fraction: float = 0.05,
    test_fraction: float = 0.05,
    seed: int = 42,
    subset: str | None = None,
    revision: str | None = None,
    mixture: list[dict[str, Any]] | None = None,
    streaming: bool = False,
    num_proc: int | None = None,
    cache_dir: str | os.PathLike | None = None,
) -> Task:
    """A text corpus as a task of language modelling; `docs/tasks.md` describes every option.

    The splits have `example_id`, `input_ids`, `continues` and `num_characters`. `continues` says whether the last
    document goes on in another example, and so has no end in this one. `num_characters` counts those of the original
    text. Chunks with `document_masks` also have `segment_ids`. A chunk without them is a piece of one text that never
    ends.

    With a `mixture` the training set is that of its entries, which are options of this function with a `weight`. The
    path itself gives the tokenizer and the evaluation data. With `streaming` the training set is read in the order of
    its files, shuffled in a buffer.

    Raises:
        ValueError: for an unknown choice, a source that is not there, or a split that cannot be made.
    """
    options = {option: value for option, value in locals().items() if option not in _NOT_OF_A_CORPUS}
    storage: dict[str, Any] = {"num_proc": num_proc, "cache_dir": cache_dir}
    prepared, made = _corpus(name, options, None, **storage)
    splits = dict(prepared)
    for entry in mixture or []:
        check_options("An entry of task.mixture", entry, ["weight", *options])
    parts = [{**options, **entry} for entry in mixture or []]
    weights = [part.pop("weight", 1.0) for part in parts]
    train = [_corpus(name, part, made, **storage)[0]["train"] for part in parts] or [prepared["train"]]
    if streaming:
        train = [data.to_iterable_dataset(num_shards=min(_NUM_SHARDS, len(data))) for data in train]
    splits["train"] = Mixture(train, weights) if mixture else train[0]
    return Task(name, "lm", splits, made, files_of(Path(path).expanduser(), splits=options["splits"]))


def _corpus(
    name: str, options: dict[str, Any], tokenizer: PreTrainedTokenizerFast | None, num_proc: int | None, cache_dir
) -> Prepared:
    """Prepare one corpus, or take it from the cache; without a `tokenizer` by the one that the options name."""
    for option, known in _CHOICES.items():
        if options[option] not in known:
            raise ValueError(
                f"unknown {option} {options[option]!r}: {did_you_mean(str(options[option]), map(str, known))}"
            )
    if options["max_length"] < 1:
        raise ValueError(f"max_length={options['max_length']} must be at least 1: raise it.")
    source = locate(options["path"], options["text_column"])
    tokenizer = tokenizer or ready_tokenizer(options["tokenizer"])
    key = {
        **options,
        "version": PREPARATION_VERSION,
        "path": content_key(source, options["splits"]),
        "tokenizer": options["tokenizer"] if tokenizer is None else tokenizer_key(tokenizer),
    }

    def build(scratch: Path) -> Prepared:
        raw = read(source, scratch, options)
        check_columns(raw, [options["text_column"]])
        texts = partial(_texts, options["text_column"], DETOKENIZERS.get(options["detokenizer"]))
        made = tokenizer or train_tokenizer(
            options["tokenizer"], map(texts, raw["train"].iter(BATCH_SIZE)), options["vocab_size"]
        )
        made_splits = {
            split: _prepare(raw[split], texts, made, options, num_proc, scratch / split)
            for split in ("train", "validation", "test")
            if split in raw
        }
        return DatasetDict(made_splits), made

    return cached(name, key, build, cache_dir)


def _texts(text_column: str, detokenize: Callable[[str], str] | None, batch: Mapping[str, list]) -> list[str]:
    """The texts of a batch of documents, detokenised."""
    texts = [text or "" for text in batch[text_column]]
    return texts if detokenize is None else list(map(detokenize, texts))


def _prepare(
    documents: Dataset, texts: Callable, tokenizer: PreTrainedTokenizerFast, options: dict, num_proc, file: Path
) -> Dataset:
    """Tokenise the documents of a split and make examples of them, in Arrow files beside `file`."""
    is_packed, masks = options["protocol"] == "packed", options["document_masks"]
    end_of_text = [tokenizer.eos_token_id] if is_packed and not masks else []
    whole = 0 if is_packed else options["max_length"]

    def tokenize(batch: Mapping[str, list]) -> dict[str, list]:
        of_batch = texts(batch)
        # A special token's name in a text is text.
        encoded = tokenizer(
            of_batch, add_special_tokens=False, split_special_tokens=True, return_attention_mask=False, verbose=False
        )
        ids = [[*ids, *end_of_text] for ids in encoded["input_ids"]]
        # Of a document that stays whole only the sum counts, and reading the offsets of its tokens takes time.
        ends = [
            _character_ends(text, encoding.offsets, len(tokens)) if len(tokens) > whole else [len(text)] * len(tokens)
            for text, encoding, tokens in zip(of_batch, encoded.encodings, ids, strict=True)
        ]
        return {"input_ids": ids, "character_ends": ends}

    features = {"input_ids": List(Value("int32")), "character_ends": List(Value("int32"))}
    tokenized = documents.map(
        tokenize,
        batched=True,
        batch_size=BATCH_SIZE,
        num_proc=num_proc,
        remove_columns=documents.column_names,
        features=Features(features),
        cache_file_name=f"{file}-tokens.arrow",
    )
    features = {
        "example_id": Value("int64"),
        "input_ids": features["input_ids"],
        "continues": Value("bool"),
        "num_characters": Value("int64"),
    }
    if is_packed and masks:
        features["segment_ids"] = List(Value("int32"))
    # One process, since examples are numbered and chunks go on from one batch to the next.
    examples = tokenized.with_format("arrow").map(
        _Examples(len(tokenized), options),
        batched=True,
        batch_size=BATCH_SIZE,
        with_indices=True,
        remove_columns=tokenized.column_names,
        features=Features(features),
        cache_file_name=f"{file}-examples.arrow",
        load_from_cache_file=False,
    )
    return examples.with_format(None)


def _character_ends(text: str, offsets: Sequence[tuple[int, int]], num_tokens: int) -> list[int]:
    """Where each token ends in the text, in characters; the last token takes what is left of the text."""
    return [*(end for _, end in offsets[: num_tokens - 1]), len(text)][:num_tokens]


class _Examples:
    """Makes examples of tokenised documents that come in batches, in their order.

    Chunks run on over the ends of the batches: what is left of one begins the next, and the last of the split is
    written as it is, shorter. So nothing is dropped but documents without a token.
    """

    def __init__(self, num_documents: int, options: Mapping[str, Any]):
        self.last = num_documents - 1
        self.is_packed = options["protocol"] == "packed"
        self.has_segments = self.is_packed and options["document_masks"]
        self.max_length = options["max_length"]
        self.truncate = options["long_documents"] == "truncate"
        self.num_examples = 0
        self.ids, self.document, self.characters = np.zeros(0, np.int32), *np.zeros((2, 0), np.int64)

    def __call__(self, table: pa.Table, indices: list[int]) -> pa.Table:
        column = table["input_ids"].combine_chunks()
        lengths = column.value_lengths().to_numpy()
        ids, document = column.flatten().to_numpy(), np.repeat(indices, lengths)
        # The characters of a token are those since the end of the token before it.
        ends = table["character_ends"].combine_chunks().flatten().to_numpy().astype(np.int64)
        is_first = np.diff(document, prepend=-1) > 0
        characters = np.where(is_first, ends, np.diff(ends, prepend=0))
        if self.is_packed:
            ids, document = np.concatenate([self.ids, ids]), np.concatenate([self.document, document])
            characters = np.concatenate([self.characters, characters])
            is_last = indices[-1] == self.last
            end = len(ids) if is_last else len(ids) // self.max_length * self.max_length
            self.ids, self.document, self.characters = ids[end:], document[end:], characters[end:]
            starts = np.arange(0, end, self.max_length)
        else:
            position = np.arange(len(ids)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
            if self.truncate:
                kept = position < self.max_length
                ids, document, characters, position = (values[kept] for values in (ids, document, characters, position))
            starts, end = np.flatnonzero(position % self.max_length == 0), len(ids)
        offsets = np.append(starts, end).astype(np.int32)
        # A batch holds whole documents, so what ends with it is complete.
        continues = document[offsets[1:] - 1] == np.append(document, -1)[offsets[1:]]
        if self.is_packed and not self.has_segments:
            continues[:] = True
        ids, document = ids[:end], document[:end]
        example_id = self.num_examples + np.arange(len(starts))
        self.num_examples += len(starts)
        columns = {
            "example_id": pa.array(example_id),
            "input_ids": pa.ListArray.from_arrays(offsets, pa.array(ids)),
            "continues": pa.array(continues),
            "num_characters": pa.array(np.diff(np.append(0, characters.cumsum())[offsets])),
        }
        if self.has_segments:
            number = np.cumsum(np.diff(document, prepend=document[:1]) > 0).astype(np.int32)
            segments = number - np.repeat(number[starts], np.diff(offsets))
            columns["segment_ids"] = pa.ListArray.from_arrays(offsets, pa.array(segments))
        return pa.table(columns)
