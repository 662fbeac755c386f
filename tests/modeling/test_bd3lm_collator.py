"""Batches of block diffusion: the two copies, the blocks and their masks."""

from collections import Counter

import pytest
import torch
from scipy.stats import chisquare

from tests.modeling.naive_bd3lm import BOS, EOS, MASK, PAD, SpecialIds, make_examples
from xlm_hf.modeling.bd3lm import BD3LMCollator


def collator(kind="seq2seq", max_length=24, **kwargs):
    return BD3LMCollator(SpecialIds(), max_length, kind, **kwargs)


@pytest.mark.parametrize("block_length", [1, 3, 4, 30])
@pytest.mark.parametrize("masking", ["exact", "bernoulli"])
def test_both_copies_of_a_document(block_length, masking):
    examples = make_examples(32)
    batch = collator(block_length=block_length, masking=masking)(examples)
    ids = batch["input_ids"].clone()
    ids.view(-1)[batch["logits_index"]] = batch["target_ids"]
    for row, example in enumerate(examples):
        before, text = [*example["prompt_ids"], BOS], [*example["target_ids"], EOS]
        num_blocks = -(-len(text) // block_length)
        canvas = (text + [PAD] * block_length)[: num_blocks * block_length][: 24 - len(before)]
        kept = len(before) + (num_blocks - 1) * block_length
        whole = before + canvas
        blocks = [0] * len(before) + [i // block_length + 1 for i in range(len(canvas))]
        own = batch["attention_mask"][row]
        assert ids[row, own].tolist() == whole[:kept] + canvas
        assert batch["position_ids"][row, own].tolist() == [*range(kept), *range(len(before), len(whole))]
        assert batch["block_ids"][row, own].tolist() == blocks[:kept] + blocks[len(before) :]
        assert batch["is_noisy"][row, own].tolist() == [False] * kept + [True] * len(canvas)
        assert batch["canvas_lengths"][row] == len(canvas)
        assert batch["sequence_tokens"][row] == len(text)
        assert MASK not in batch["input_ids"][row, :kept]
    assert (batch["input_ids"].view(-1)[batch["logits_index"]] == MASK).all()
    assert (batch["input_ids"] == MASK).sum() == len(batch["target_ids"])
    of_target = batch["block_ids"].view(-1)[batch["logits_index"]]
    first = torch.tensor([batch["block_documents"].tolist().index(d) for d in range(32)])
    assert torch.equal(batch["target_blocks"] - first[batch["block_documents"][batch["target_blocks"]]] + 1, of_target)


def test_a_text_that_goes_on_has_no_end_and_its_last_block_is_cut():
    example = {"input_ids": [7, 8, 9, 10, 11], "continues": True, "example_id": 0, "epoch": 0, "position": 0}
    batch = collator("lm", block_length=4)([example])
    assert batch["canvas_lengths"].tolist() == batch["sequence_tokens"].tolist() == [5]
    ids = batch["input_ids"].clone()
    ids.view(-1)[batch["logits_index"]] = batch["target_ids"]
    assert ids.tolist() == [[BOS, 7, 8, 9, 10, 7, 8, 9, 10, 11]]
    # The one token of the last block is always masked, at weight 1.
    assert batch["weights"][1] == 1
    empty = collator("lm", block_length=4)([{**example, "input_ids": []}, {**example, "example_id": 1}])
    assert empty["canvas_lengths"].tolist() == [0, 5]
    assert empty["block_documents"].tolist() == [1, 1]


def test_each_block_has_a_number_of_masks_of_its_own():
    num, size = 12_000, 4
    examples = [{"input_ids": [7] * 7, "example_id": i, "epoch": 1, "position": i} for i in range(num)]
    batch = collator("lm", block_length=size, seed=3)(examples)
    masked = (batch["input_ids"] == MASK)[:, 5:].reshape(num, 2, size)
    k = masked.sum(-1)
    torch.testing.assert_close(batch["weights"].view(num, 2), size / k)
    # Spread evenly over the documents, far closer than independent draws, and not the same in both blocks.
    for block in (0, 1):
        assert (torch.bincount(k[:, block], minlength=5)[1:] - num / size).abs().max() < 10
    assert (k[:, 0] != k[:, 1]).any()
    for chosen in (1, 2, 3):
        counts = Counter(tuple(row) for row in masked[:, 1][k[:, 1] == chosen].tolist())
        assert chisquare(list(counts.values())).pvalue > 1e-4


@pytest.mark.parametrize(
    ("size", "bounds", "possible"), [(4, (0.45, 0.95), {2, 3}), (16, (0.3, 0.8), set(range(5, 13)))]
)
def test_a_clipped_range_bounds_the_number_of_masks(size, bounds, possible):
    examples = [{"input_ids": [7] * (size - 1), "example_id": i, "epoch": 0, "position": i} for i in range(900)]
    batch = collator("lm", block_length=size, mask_range=bounds)(examples)
    k = (batch["input_ids"] == MASK).sum(-1)
    assert set(k.tolist()) == possible
    torch.testing.assert_close(batch["loss_weights"], size / k)
    assert "weights" not in batch
    batch = collator("lm", block_length=size, mask_range=bounds, masking="bernoulli")(examples)
    times = 1 / batch["loss_weights"]
    assert bounds[0] <= times.min() < times.max() <= bounds[1]
    single = collator("lm", block_length=1, mask_range=bounds)(examples)
    assert (single["loss_weights"] == 1).all()


def test_infilling_is_one_block_whose_blanks_are_masked():
    example = {"input_ids": [7, MASK, MASK, 8, MASK], "target_ids": [7, 9, 10, 8, 11], "example_id": 1, "epoch": 0}
    batches = [collator("infill", block_length=2)([{**example, "position": i}]) for i in range(30)]
    sizes = {int((batch["input_ids"] == MASK).sum()) for batch in batches}
    assert sizes == {1, 2, 3}
    for batch in batches:
        assert not {"is_noisy", "block_ids"} & set(batch)
        assert batch["input_ids"].shape == (1, 5)
        assert batch["weights"].tolist() == pytest.approx([3 / len(batch["target_ids"])])
        assert batch["canvas_lengths"].tolist() == batch["sequence_tokens"].tolist() == [3]


def test_state_of_a_document_is_a_function_of_its_own():
    examples = make_examples(6)
    whole = collator(block_length=3)(examples)
    for number, example in enumerate(examples):
        alone = collator(block_length=3)([example])
        of = whole["block_documents"][whole["target_blocks"]] == number
        assert alone["target_ids"].tolist() == whole["target_ids"][of].tolist()
        assert torch.equal(alone["weights"], whole["weights"][whole["block_documents"] == number])
    packed = collator(block_length=3, packing=True)(examples)
    assert packed["target_ids"].tolist() == whole["target_ids"].tolist()
    assert packed["input_ids"].shape[1] <= 48


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"masking": "exakt"}, "masking must be one of exact, bernoulli and is 'exakt'"),
        ({"block_length": 0}, r"block_length must be at least 1 and is 0"),
        ({"mask_range": (0.8, 0.3)}, r"mask_range must be 0 <= low < high <= 1 and is \(0.8, 0.3\)"),
        ({"mask_range": (0.3, 0.8), "mask_beta": 2.0}, "set one of them to None"),
    ],
)
def test_mistakes_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        collator(**options)


def test_a_document_that_does_not_fit_is_refused():
    example = {"input_ids": [7] * 24, "example_id": 0, "epoch": 0, "position": 0}
    with pytest.raises(ValueError, match="A sequence has 26 tokens"):
        collator("lm")([example])
