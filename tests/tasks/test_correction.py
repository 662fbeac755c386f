import numpy as np
import pytest
from datasets import Dataset
from scipy.stats import chisquare

from xlm_hf.metrics.edit_distance.edit_distance import distance
from xlm_hf.modeling.edit_flow.collator_edit_flow import columns_of
from xlm_hf.modules.counter_random import random_bits, stream_seed
from xlm_hf.objectives.alignment import BLANK
from xlm_hf.tasks import Task, load_task
from xlm_hf.tasks.correction import corrupted, with_sources
from xlm_hf.tasks.tokenizers import number_tokenizer


def slowly(target, example_id, edit_rate, writable, seed):
    """One text, by a loop over its positions."""
    state, source = random_bits(stream_seed(seed, "correction"), example_id), []
    for position in range(len(target) + 1):
        kind, substitute, inserts, inserted = (uniform_of(state, position, what) for what in range(4))
        if inserts < edit_rate / 3:
            source.append(writable[int(inserted * len(writable))])
        if position < len(target) and kind >= edit_rate / 3:
            token = target[position]
            others = [*writable[writable.index(token) + 1 :], *writable[: writable.index(token)]]
            source.append(others[int(substitute * len(others))] if kind < 2 * edit_rate / 3 else token)
    return source


def uniform_of(state, *counters):
    return (int(random_bits(*counters, state=state)) % 2**64 >> 11) / 2**53


@pytest.mark.parametrize("edit_rate", [0.2, 1.0])
def test_random_edits_equal_those_of_a_loop(edit_rate):
    rng, writable = np.random.default_rng(0), list(range(7, 12))
    texts = [rng.choice(writable, size=rng.integers(0, 9)).tolist() for _ in range(30)]
    flat, lengths = np.array([t for text in texts for t in text]), np.array(list(map(len, texts)))
    numbers = np.arange(100, 130, dtype=np.uint64)
    sources, of_sources = corrupted(flat, lengths, numbers, edit_rate, np.array(writable), seed=5)
    expected = [slowly(text, int(n), edit_rate, writable, 5) for text, n in zip(texts, numbers, strict=True)]
    assert [part.tolist() for part in np.split(sources, of_sources.cumsum()[:-1])] == expected


def test_edits_are_as_frequent_as_they_shall_be():
    """Each kind a third of the rate; what is written is drawn evenly, and a substitute is another token."""
    num, writable = 60_000, np.arange(7, 12)
    one = np.ones(num, dtype=np.int64)
    sources, lengths = corrupted(7 * one, one, np.arange(num, dtype=np.uint64), 0.6, writable, seed=0)
    inserted, kept = (lengths - 1).sum(), (sources == 7).sum()
    # Two gaps and a token in each text.
    assert inserted / num == pytest.approx(2 * 0.2 - 0.2, abs=0.01)
    assert kept / num == pytest.approx(0.6 + 2 * 0.2 / 5, abs=0.01)
    assert chisquare([(sources == token).sum() for token in writable[1:]]).pvalue > 1e-4


@pytest.mark.parametrize("kind", ["seq2seq", "lm"])
def test_a_task_with_sources(kind):
    tokenizer = number_tokenizer(9)
    texts = [[7, 8, 9, 10], [], [11] * 6]
    columns = {"input_ids": texts} if kind == "lm" else {"prompt_ids": [[7]] * 3, "target_ids": texts}
    data = Dataset.from_dict({"example_id": [3, 1, 2], **columns})
    task = with_sources(Task("numbers", kind, {"train": data}, tokenizer), 0.9, seed=1)
    assert task.kind == "seq2seq"
    for row, text in zip(task.splits["train"], texts, strict=True):
        assert row["target_ids"] == text
        assert row["prompt_ids"] == ([] if kind == "lm" else [7])
        before, after = columns_of(
            *(np.array(row[name], np.int64) for name in ("alignment", "source_ids", "target_ids"))
        )
        assert before[before != BLANK].tolist() == row["source_ids"]
        assert (before != after).sum() == distance(row["source_ids"], text)
    assert task.splits["train"][0]["source_ids"] != texts[0]
    with pytest.raises(ValueError, match=r"edit_rate must be in \(0, 1\] and is 0"):
        with_sources(task, 0.0, seed=1)


def test_star_correction_is_star_easy_with_wrong_paths(tmp_path):
    few = {"num_train": 20, "num_validation": 2, "num_test": 2, "cache_dir": tmp_path}
    task, plain = load_task("star_correction", **few), load_task("star_easy", **few)
    for row, of_plain in zip(task.splits["train"], plain.splits["train"], strict=True):
        assert {name: row[name] for name in of_plain} == of_plain
    assert any(row["source_ids"] != row["target_ids"] for row in task.splits["train"])


def test_text_correction_is_text_with_random_edits(tmp_path):
    (tmp_path / "corpus.txt").write_text("".join(f"line {number} of a text\n" for number in range(60)))
    options = {"path": str(tmp_path / "corpus.txt"), "tokenizer": "byte", "cache_dir": tmp_path}
    task, plain = load_task("text_correction", **options), load_task("text", **options)
    assert task.kind == "seq2seq"
    assert task.files == plain.files
    for split, rows in task.splits.items():
        assert rows["target_ids"][:] == plain.splits[split]["input_ids"][:]
    distances = [distance(row["source_ids"], row["target_ids"]) for row in task.splits["train"]]
    # About 0.15 edits a token, some of which undo each other.
    assert 0.1 < sum(distances) / sum(map(len, task.splits["train"]["target_ids"])) < 0.16
    with pytest.raises(ValueError, match="as an example of its own: choose protocol=sentence"):
        load_task("text_correction", **options, protocol="packed")
