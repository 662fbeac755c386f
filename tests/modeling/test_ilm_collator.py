import math
from collections import Counter

import pytest
import torch
from scipy.stats import chisquare

from tests.modeling.naive import BOS, CLS, PAD, SpecialIds, make_examples
from xlm_hf.modeling.ilm import ILMCollator

V = 40


def restore(batch, row):
    """Put the dropped tokens of a row back into their slots; the order within a slot is that of the batch."""
    L = batch["input_ids"].shape[1]
    ids = batch["input_ids"][row, batch["attention_mask"][row]].tolist()
    by_slot: dict[int, list[int]] = {}
    for slot, token in zip(
        batch["slot_index"][batch["target_slots"]].tolist(), batch["target_ids"].tolist(), strict=True
    ):
        if slot // L == row:
            by_slot.setdefault(slot % L, []).append(token)
    return [token for position, kept in enumerate(ids) for token in (kept, *by_slot.get(position, []))]


def test_kept_and_dropped_tokens_make_up_the_example():
    examples = make_examples(64, V)
    batch = ILMCollator(SpecialIds(V), max_length=32, kind="seq2seq")(examples)
    for row, example in enumerate(examples):
        assert restore(batch, row) == [CLS, *example["prompt_ids"], BOS, *example["target_ids"]]
        assert set(batch["input_ids"][row, ~batch["attention_mask"][row]].tolist()) <= {PAD}
    assert batch["num_dropped"].sum() == len(batch["target_ids"])
    assert batch["example_id"].tolist() == [example["example_id"] for example in examples]


def test_slots_are_bos_and_all_kept_tokens_of_rows_that_lack_something():
    examples = make_examples(64, V)
    batch = ILMCollator(SpecialIds(V), max_length=32, kind="seq2seq")(examples)
    L = batch["input_ids"].shape[1]
    expected = []
    for row, example in enumerate(examples):
        if batch["num_dropped"][row]:
            first = len(example["prompt_ids"]) + 1
            expected += [row * L + position for position in range(first, int(batch["attention_mask"][row].sum()))]
    assert batch["slot_index"].tolist() == expected


def test_language_modeling_is_seq2seq_with_an_empty_prompt():
    examples = make_examples(16, V)
    as_text = [{**example, "input_ids": example["target_ids"]} for example in examples]
    as_pairs = [{**example, "prompt_ids": []} for example in examples]
    text = ILMCollator(SpecialIds(V), max_length=32, seed=3, kind="lm")(as_text)
    pairs = ILMCollator(SpecialIds(V), max_length=32, seed=3, kind="seq2seq")(as_pairs)
    for name in pairs:
        torch.testing.assert_close(text[name], pairs[name])


def test_corruption_depends_on_the_example_alone():
    """The same example meets the same noise in any batch, and other noise in another epoch or with another seed."""
    examples = make_examples(32, V, min_target=6)
    collator = ILMCollator(SpecialIds(V), max_length=32, kind="seq2seq")
    whole = collator(examples)
    for row in (0, 7, 31):
        alone = collator([examples[row]])
        width = alone["input_ids"].shape[1]
        assert alone["input_ids"][0].tolist() == whole["input_ids"][row, :width].tolist()
    other_epoch = collator([{**example, "epoch": 1} for example in examples])
    other_seed = ILMCollator(SpecialIds(V), max_length=32, seed=1, kind="seq2seq")(examples)
    for other in (other_epoch, other_seed):
        assert other["num_dropped"].tolist() != whole["num_dropped"].tolist()


def test_number_of_dropped_tokens_is_uniform_and_evenly_spread():
    length, num = 8, 9 * 400
    examples = [
        {"prompt_ids": [], "target_ids": [9] * length, "example_id": i, "epoch": 0, "position": i} for i in range(num)
    ]
    counts = Counter(ILMCollator(SpecialIds(V), max_length=32, kind="seq2seq")(examples)["num_dropped"].tolist())
    assert sorted(counts) == list(range(length + 1))
    # Low discrepancy: far closer to 400 than the +-20 of independent draws.
    assert all(abs(count - 400) <= 5 for count in counts.values())


def test_drop_beta_skews_the_number_of_dropped_tokens():
    length, num = 8, 8100
    examples = [
        {"prompt_ids": [], "target_ids": [9] * length, "example_id": i, "epoch": 0, "position": i} for i in range(num)
    ]
    batch = ILMCollator(SpecialIds(V), max_length=32, drop_beta=2.0, kind="seq2seq")(examples)
    counts = torch.bincount(batch["num_dropped"], minlength=length + 1)
    # P(n) = ((n + 1)^2 - n^2) / 9^2 under r ~ Beta(2, 1).
    expected = torch.tensor([(2 * n + 1) / 81 * num for n in range(length + 1)])
    assert (counts - expected).abs().max() <= 6
    with pytest.raises(ValueError, match="drop_beta must be greater than 0 and is 0"):
        ILMCollator(SpecialIds(V), max_length=32, drop_beta=0, kind="seq2seq")


def test_every_subset_of_a_size_is_dropped_alike():
    length, num = 4, 30_000
    examples = [
        {"prompt_ids": [], "target_ids": [10, 11, 12, 13], "example_id": i, "epoch": 2, "position": i}
        for i in range(num)
    ]
    batch = ILMCollator(SpecialIds(V), max_length=32, seed=5, kind="seq2seq")(examples)
    kept = [tuple(t for t in row if t >= 10) for row in batch["input_ids"].tolist()]
    for size in range(1, length):
        counts = Counter(k for k in kept if len(k) == length - size)
        assert len(counts) == math.comb(length, size)
        assert chisquare(list(counts.values())).pvalue > 1e-4


def test_prediction_batches_are_padded_on_the_left():
    examples = make_examples(9, V)
    batch = ILMCollator(SpecialIds(V), max_length=32, kind="seq2seq", prediction=True)(examples)
    for row, example in enumerate(examples):
        ids = [CLS, *example["prompt_ids"], BOS]
        width = batch["input_ids"].shape[1]
        assert batch["input_ids"][row].tolist() == [PAD] * (width - len(ids)) + ids
        assert batch["attention_mask"][row].tolist() == [False] * (width - len(ids)) + [True] * len(ids)
    empty = ILMCollator(SpecialIds(V), max_length=32, kind="lm", prediction=True)([{"example_id": i} for i in range(9)])
    assert empty["input_ids"].tolist() == [[CLS, BOS]] * 9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target_ids": [V]}, f"Token id {V} is outside the vocabulary of {V}"),
        ({"prompt_ids": [-1]}, f"Token id -1 is outside the vocabulary of {V}"),
        ({"prompt_ids": [8] * 40}, "has 42 tokens with .* the model has 32 positions"),
    ],
)
def test_bad_examples_are_refused_in_one_sentence(change, message):
    example = {**make_examples(1, V)[0], "target_ids": [], **change}
    with pytest.raises(ValueError, match=message):
        ILMCollator(SpecialIds(V), max_length=32, kind="seq2seq")([example])
