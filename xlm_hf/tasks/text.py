"""Text corpora for language modelling: local files, data sets of the Hub, or the result of a Python function."""

import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, DatasetDict, Features, List, Value
from transformers import PreTrainedTokenizerFast

from xlm_hf.modules.messages import did_you_mean
from xlm_hf.tasks import Task
from xlm_hf.tasks.cache import Prepared, cached
from xlm_hf.tasks.corpora import Source, content_key, locate, read
from xlm_hf.tasks.detokenizers import DETOKENIZERS
from xlm_hf.tasks.tokenizers import byte_tokenizer, pretrained_tokenizer, word_tokenizer

# Part of the cache key: raise it with every change that makes other examples from the same texts and settings.
PREPARATION_VERSION = 1

# Documents that are tokenised, and made examples of, at a time.
BATCH_SIZE = 1000

_CHOICES = {
    "protocol": ("sentence", "packed"),
    "long_documents": ("split", "truncate"),
    "sample_by": ("line", "paragraph", "document"),
}


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
    num_proc: int | None = None,
    cache_dir: str | os.PathLike | None = None,
) -> Task:
    """A text corpus as a task of language modelling, tokenised once and kept on disk.

    Args:
        name: of the task and of its cache folder.
        path: a .txt, .jsonl or .parquet file, a folder of such, a Hub id, or `module:function` (see
            `xlm_hf.tasks.corpora.locate`).
        tokenizer: "word" (the most frequent words of the training set), "byte" (UTF-8), or a folder or Hub id of any
            fast tokenizer; special tokens that it lacks are added.
        vocab_size: most entries of a word vocabulary.
        text_column: the column that holds the text.
        detokenizer: undoes the tokenisation of a published corpus: a name from `DETOKENIZERS`.
        protocol: "sentence" makes an example of each document, which the collators pad; "packed" concatenates the
            documents of a split and cuts the whole into chunks, the last of which is shorter. Their likelihoods are not
            comparable.
        max_length: most tokens of an example, the special ones of a family aside; the length of a chunk.
        long_documents: "split" makes several examples of a document longer than `max_length` (nothing is lost);
            "truncate" cuts its rest off. Only for "sentence".
        document_masks: "packed" with a column `segment_ids`, so that no token sees another document. Without it, the
            documents are separated by the end-of-sequence token and see each other.
        sample_by: what a document of a .txt file is: a line, a paragraph (up to an empty line) or the whole file.
        splits: which splits of the source become ours, e.g. `{train: "train[:-1000]", validation: "train[-1000:]"}`.
        validation_fraction: of the training documents, drawn if the source has no validation set; 0 for none.
        test_fraction: likewise for the test set.
        seed: of that draw.
        subset: of a Hub data set that has several.
        revision: of a Hub data set; the commit makes the cache exact.
        num_proc: processes that tokenise; None means one.
        cache_dir: see `xlm_hf.tasks.cache.cached`.

    Returns:
        A task whose splits have `example_id`, `input_ids` and, with `document_masks`, `segment_ids`.

    Raises:
        ValueError: for an unknown choice, a source that is not there, or a split that cannot be made.
    """
    chosen = {"protocol": protocol, "long_documents": long_documents, "sample_by": sample_by}
    for option, value in chosen.items():
        if value not in _CHOICES[option]:
            raise ValueError(f"unknown {option} {value!r}: {did_you_mean(str(value), _CHOICES[option])}")
    if detokenizer is not None and detokenizer not in DETOKENIZERS:
        raise ValueError(f"unknown detokenizer {detokenizer!r}: {did_you_mean(detokenizer, DETOKENIZERS)}")
    if max_length < 1:
        raise ValueError(f"max_length={max_length} must be at least 1: raise it.")
    source = locate(path, text_column)
    given = None if tokenizer == "word" else byte_tokenizer() if tokenizer == "byte" else pretrained_tokenizer(tokenizer)
    reading = {
        "splits": splits,
        "fractions": {"validation": validation_fraction, "test": test_fraction},
        "seed": seed,
        "sample_by": sample_by,
        "name": subset,
        "revision": revision,
    }
    writing = {
        "protocol": protocol,
        "max_length": max_length,
        "long_documents": long_documents,
        "document_masks": document_masks,
    }
    key = {
        "version": PREPARATION_VERSION,
        "source": content_key(source),
        "tokenizer": vocab_size if given is None else _tokenizer_key(given),
        "text": [text_column, detokenizer],
        **reading,
        **writing,
    }

    def build(scratch: Path) -> Prepared:
        raw = read(source, scratch, **reading)
        _check_column(raw, text_column)
        texts = _Texts(text_column, None if detokenizer is None else DETOKENIZERS[detokenizer])
        made = given or word_tokenizer(map(texts, raw["train"].iter(BATCH_SIZE)), vocab_size)
        return DatasetDict(
            {
                split: _prepare(raw[split], texts, made, writing, num_proc, scratch / split)
                for split in ("train", "validation", "test")
                if split in raw
            }
        ), made

    prepared, made = cached(name, key, build, cache_dir)
    return Task(name=name, kind="lm", splits=prepared, tokenizer=made)


def _tokenizer_key(tokenizer: PreTrainedTokenizerFast) -> str:
    content = tokenizer.backend_tokenizer.to_str() + str(sorted(tokenizer.special_tokens_map.items()))
    return hashlib.sha256(content.encode()).hexdigest()


def _check_column(raw: DatasetDict, text_column: str) -> None:
    for split, data in raw.items():
        if text_column not in data.column_names:
            raise ValueError(
                f"split {split!r} has no column {text_column!r}: {did_you_mean(text_column, data.column_names)} "
                "Set text_column."
            )


class _Texts:
    """The texts of a batch of documents, detokenised."""

    def __init__(self, text_column: str, detokenize: Callable[[str], str] | None):
        self.text_column = text_column
        self.detokenize = detokenize

    def __call__(self, batch: Mapping[str, list]) -> list[str]:
        texts = [text or "" for text in batch[self.text_column]]
        return texts if self.detokenize is None else list(map(self.detokenize, texts))


def _prepare(
    documents: Dataset, texts: _Texts, tokenizer: PreTrainedTokenizerFast, writing: dict, num_proc, file: Path
) -> Dataset:
    """Tokenise the documents of a split and make examples of them, in Arrow files beside `file`."""
    ends = writing["protocol"] == "packed" and not writing["document_masks"]

    def tokenize(batch: Mapping[str, list]) -> dict[str, list]:
        # A special token's name in a text is text.
        encoded = tokenizer(
            texts(batch), add_special_tokens=False, split_special_tokens=True, return_attention_mask=False, verbose=False
        )["input_ids"]
        return {"input_ids": [[*ids, tokenizer.eos_token_id] for ids in encoded] if ends else encoded}

    features = {"input_ids": List(Value("int32"))}
    tokenized = documents.map(
        tokenize,
        batched=True,
        batch_size=BATCH_SIZE,
        num_proc=num_proc,
        remove_columns=documents.column_names,
        features=Features(features),
        cache_file_name=f"{file}-tokens.arrow",
    )
    features = {"example_id": Value("int64"), **features}
    if writing["protocol"] == "packed" and writing["document_masks"]:
        features["segment_ids"] = List(Value("int32"))
    # One process, since examples are numbered and chunks go on from one batch to the next.
    return tokenized.with_format("arrow").map(
        _Examples(len(tokenized), features, **writing),
        batched=True,
        batch_size=BATCH_SIZE,
        with_indices=True,
        remove_columns=["input_ids"],
        features=Features(features),
        cache_file_name=f"{file}-examples.arrow",
        load_from_cache_file=False,
    ).with_format(None)


class _Examples:
    """Makes examples of tokenised documents that come in batches, in their order.

    Chunks run on over the ends of the batches: what is left of one begins the next, and the last of the split is
    written as it is, shorter. So nothing is dropped but documents without a token.
    """

    def __init__(
        self,
        num_documents: int,
        features: Mapping[str, Any],
        protocol: str,
        max_length: int,
        long_documents: str,
        document_masks: bool,
    ):
        self.last = num_documents - 1
        self.features = features
        self.packed = protocol == "packed"
        self.max_length = max_length
        self.truncate = long_documents == "truncate"
        self.num_examples = 0
        self.ids, self.document = np.zeros(0, np.int32), np.zeros(0, np.int64)

    def __call__(self, table: pa.Table, indices: list[int]) -> pa.Table:
        column = table["input_ids"].combine_chunks()
        lengths = column.value_lengths().to_numpy()
        ids, document = column.flatten().to_numpy(), np.repeat(indices, lengths)
        if self.packed:
            ids, document = np.concatenate([self.ids, ids]), np.concatenate([self.document, document])
            is_last = indices[-1] == self.last
            end = len(ids) if is_last else len(ids) // self.max_length * self.max_length
            self.ids, self.document = ids[end:], document[end:]
            ids, document, starts = ids[:end], document[:end], np.arange(0, end, self.max_length)
        else:
            place = np.arange(len(ids)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
            if self.truncate:
                ids, place = ids[place < self.max_length], place[place < self.max_length]
            starts = np.flatnonzero(place % self.max_length == 0)
        offsets = np.append(starts, len(ids)).astype(np.int32)
        example_id = self.num_examples + np.arange(len(starts))
        self.num_examples += len(starts)
        columns = {"example_id": pa.array(example_id), "input_ids": pa.ListArray.from_arrays(offsets, pa.array(ids))}
        if "segment_ids" in self.features:
            number = np.cumsum(np.diff(document, prepend=document[:1]) > 0).astype(np.int32)
            segments = number - np.repeat(number[starts], np.diff(offsets))
            columns["segment_ids"] = pa.ListArray.from_arrays(offsets, pa.array(segments))
        return pa.table(columns)
