import itertools
import math
from collections import Counter

import pytest
import torch
from scipy.stats import chisquare, kstest

from tests.modeling.naive import BOS, CLS, EOS, MASK, PAD, SpecialIds, make_examples
from tests.modeling.naive_mlm import V
from xlm_hf.modeling.mlm import MLMCollator


def restore(batch):
    """The rows with their masked tokens put back."""
    ids = batch["input_ids"].clone()
    assert (ids.flatten()[batch["logits_index"]] == MASK).all()
    ids.view(-1)[batch["logits_index"]] = batch["target_ids"]
    return ids


@pytest.mark.parametrize("canvas_length", [None, 11])
def test_rows_read_prompt_bos_target_eos_and_only_the_canvas_is_masked(canvas_length):
    examples = make_examples(64, V)
    batch = MLMCollator(SpecialIds(V), max_length=24, canvas_length=canvas_length, kind="seq2seq")(examples)
    whole = restore(batch)
    for row, example in enumerate(examples):
        prompt = [*example["prompt_ids"], BOS]
        canvas = [*example["target_ids"], EOS]
        canvas += [PAD] * ((canvas_length or len(canvas)) - len(canvas))
        length = len(prompt) + len(canvas)
        assert whole[row].tolist() == prompt + canvas + [PAD] * (whole.shape[1] - length)
        assert batch["attention_mask"][row].tolist() == [column < length for column in range(whole.shape[1])]
        assert batch["input_ids"][row, : len(prompt)].tolist() == prompt
        assert not (batch["input_ids"][row, length:] == MASK).any()
    assert MASK not in batch["target_ids"]
    assert EOS in batch["target_ids"]
    assert (PAD in batch["target_ids"]) == (canvas_length is not None)
    assert batch["example_id"].tolist() == [example["example_id"] for example in examples]


def test_language_modeling_is_seq2seq_with_an_empty_prompt():
    examples = make_examples(16, V)
    text = MLMCollator(SpecialIds(V), max_length=24, seed=3, kind="lm")(
        [{**example, "input_ids": example["target_ids"]} for example in examples]
    )
    pairs = MLMCollator(SpecialIds(V), max_length=24, seed=3, kind="seq2seq")(
        [{**e, "prompt_ids": []} for e in examples]
    )
    for name in pairs:
        torch.testing.assert_close(text[name], pairs[name])


def test_corruption_depends_on_the_example_alone():
    """The same example meets the same noise in any batch, and other noise in another epoch or with another seed."""
    examples = make_examples(32, V, min_target=6)
    collator = MLMCollator(SpecialIds(V), max_length=24, kind="seq2seq")
    whole = collator(examples)["input_ids"]
    for row in (0, 7, 31):
        alone = collator([examples[row]])["input_ids"]
        assert alone[0].tolist() == whole[row, : alone.shape[1]].tolist()
    other_epoch = collator([{**example, "epoch": 1} for example in examples])["input_ids"]
    other_seed = MLMCollator(SpecialIds(V), max_length=24, seed=1, kind="seq2seq")(examples)["input_ids"]
    assert other_epoch.tolist() != whole.tolist()
    assert other_seed.tolist() != whole.tolist()


def test_every_pattern_of_masks_has_its_probability():
    """t ~ U(0, 1), then independent coins: a pattern of k masks among n has B(k + 1, n - k + 1)."""
    num, n = 20_000, 4
    examples = [
        {"prompt_ids": [9], "target_ids": [10, 11, 12], "example_id": i, "epoch": 2, "position": i} for i in range(num)
    ]
    batch = MLMCollator(SpecialIds(V), max_length=24, seed=5, kind="seq2seq")(examples)
    masked = (batch["input_ids"] == MASK)[:, 2:]
    counts = Counter(map(tuple, masked.int().tolist()))
    patterns = list(itertools.product((0, 1), repeat=n))
    expected = [num / ((n + 1) * math.comb(n, sum(pattern))) for pattern in patterns]
    assert chisquare([counts[pattern] for pattern in patterns], expected).pvalue > 1e-4
    # Low discrepancy: neighbours in an epoch differ in t, so that the share of masks hardly varies between batches.
    shares = masked.float().view(-1, 50 * n).mean(dim=-1)
    assert float(shares.std()) < 0.75 * (1 / 12 / 50 + 1 / 6 / 50 / n) ** 0.5


@pytest.mark.parametrize("mask_beta", [1.0, 3.0])
def test_the_masked_share_follows_its_law(mask_beta):
    examples = [{"input_ids": [9] * 400, "example_id": i, "epoch": 0, "position": i} for i in range(500)]
    batch = MLMCollator(SpecialIds(V), max_length=500, mask_beta=mask_beta, kind="lm")(examples)
    assert kstest((batch["input_ids"] == MASK).float().sum(-1).numpy() / 401, "beta", (mask_beta, 1)).pvalue > 0.5


def test_a_text_that_fills_the_canvas_has_no_end():
    examples = [{"input_ids": [9] * n, "example_id": n, "epoch": 0, "position": n} for n in (5, 4)]
    batch = MLMCollator(SpecialIds(V), max_length=24, canvas_length=5, kind="lm")(examples)
    assert restore(batch).tolist() == [[BOS, *[9] * 5], [BOS, *[9] * 4, EOS]]


def test_infilling_masks_only_what_the_input_leaves_open():
    examples = [
        {**e, "input_ids": [MASK if i % 2 else t for i, t in enumerate(e["target_ids"])]} for e in make_examples(40, V)
    ]
    batch = MLMCollator(SpecialIds(V), max_length=24, kind="infill")(examples)
    whole = restore(batch)
    for row, example in enumerate(examples):
        length = len(example["target_ids"])
        assert whole[row].tolist() == example["target_ids"] + [PAD] * (whole.shape[1] - length)
        masks = (batch["input_ids"][row] == MASK).nonzero().flatten().tolist()
        assert all(example["input_ids"][i] == MASK for i in masks)
        assert int(batch["attention_mask"][row].sum()) == length
    assert 0 < len(batch["target_ids"]) < sum(e["input_ids"].count(MASK) for e in examples)


@pytest.mark.parametrize("canvas_length", [None, 11])
def test_prediction_batches_are_padded_on_the_left(canvas_length):
    examples = make_examples(9, V)
    collator = MLMCollator(SpecialIds(V), max_length=24, canvas_length=canvas_length, kind="seq2seq", prediction=True)
    batch = collator(examples)
    width = batch["input_ids"].shape[1]
    for row, example in enumerate(examples):
        ids = [*example["prompt_ids"], BOS]
        assert batch["input_ids"][row].tolist() == [PAD] * (width - len(ids)) + ids
        assert batch["attention_mask"][row].tolist() == [False] * (width - len(ids)) + [True] * len(ids)
    if canvas_length is None:
        assert batch["canvas_lengths"].tolist() == [len(example["target_ids"]) + 1 for example in examples]
    else:
        assert "canvas_lengths" not in batch
    assert "canvas_lengths" not in collator([{"prompt_ids": [8], "example_id": 0}])
    text = [{"example_id": example["example_id"], "input_ids": example["target_ids"]} for example in examples]
    empty = MLMCollator(SpecialIds(V), max_length=24, kind="lm", prediction=True)(text)
    assert empty["input_ids"].tolist() == [[BOS]] * 9
    assert empty["canvas_lengths"].tolist() == [len(example["input_ids"]) + 1 for example in text]


def test_infilling_prediction_keeps_the_input():
    examples = [{"input_ids": [8, MASK, 9], "example_id": 4}, {"input_ids": [MASK], "example_id": 5}]
    batch = MLMCollator(SpecialIds(V), max_length=24, kind="infill", prediction=True)(examples)
    assert batch["input_ids"].tolist() == [[8, MASK, 9], [PAD, PAD, MASK]]
    assert batch["attention_mask"].tolist() == [[True] * 3, [False, False, True]]
    assert batch["canvas_lengths"].tolist() == [0, 0]
    assert batch["example_id"].tolist() == [4, 5]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target_ids": [V]}, f"Token id {V} is outside the vocabulary of {V}"),
        ({"prompt_ids": [-1]}, f"Token id -1 is outside the vocabulary of {V}"),
        ({"prompt_ids": [8] * 40}, "has 42 tokens with .* the model has 24 positions"),
        ({"prompt_ids": [MASK]}, rf"holds the mask token \(id {MASK}\)"),
        ({"target_ids": [8, CLS]}, f"holds the special token {CLS}"),
        ({"target_ids": [8] * 13}, "A target has 13 tokens and the canvas 12 positions"),
    ],
)
def test_bad_examples_are_refused_in_one_sentence(change, message):
    example = {**make_examples(1, V)[0], "target_ids": [], **change}
    canvas_length = 12 if len(example["target_ids"]) > 1 else None
    with pytest.raises(ValueError, match=message):
        MLMCollator(SpecialIds(V), max_length=24, canvas_length=canvas_length, kind="seq2seq")([example])


def test_a_skew_that_is_none_is_refused():
    with pytest.raises(ValueError, match=r"mask_beta must be greater than 0 and is 0\.0"):
        MLMCollator(SpecialIds(V), max_length=24, mask_beta=0.0, kind="seq2seq")


def test_an_input_to_fill_in_is_as_long_as_its_solution():
    example = {"input_ids": [MASK, 8], "target_ids": [9], "example_id": 7, "epoch": 0, "position": 0}
    with pytest.raises(ValueError, match="Example 7 has 2 input_ids and 1 target_ids"):
        MLMCollator(SpecialIds(V), max_length=24, kind="infill")([example])
