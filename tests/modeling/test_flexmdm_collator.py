from collections import Counter

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from tests.modeling.naive_flexmdm import BOS, EOS, MASK, PAD, SpecialIds, shares
from xlm_hf.modeling.flexmdm import FlexMDMCollator

QUARTIC = {"name": "polynomial", "power": 4}
MIRRORED = {"name": "polynomial", "power": 2, "mirrored": True}


def examples_of(*targets, prompt=(), **columns):
    return [
        {"prompt_ids": list(prompt), "target_ids": list(target), "example_id": i, "epoch": 0, "position": i, **columns}
        for i, target in enumerate(targets)
    ]


def restored(batch, row):
    """The tokens of a row with the masks filled and `None` for each missing token."""
    L = batch["input_ids"].shape[1]
    hidden = dict(zip(batch["logits_index"].tolist(), batch["target_ids"].tolist(), strict=True))
    missing = dict(zip(batch["gap_index"].tolist(), batch["gap_counts"].tolist(), strict=True))
    tokens = []
    for i in range(int(batch["attention_mask"][row].sum())):
        index = row * L + i
        token = int(batch["input_ids"][row, i])
        assert (token == MASK) == (index in hidden)
        tokens += [hidden.get(index, token), *[None] * missing.get(index, 0)]
    return tokens


def test_what_is_there_and_what_is_missing_make_up_the_example():
    rng = np.random.default_rng(0)
    targets = [rng.integers(7, 40, size=n).tolist() for n in (9, 0, 1, 6, 9, 9, 4) * 8]
    batch = FlexMDMCollator(SpecialIds(40), max_length=32, kind="seq2seq")(examples_of(*targets, prompt=(8, 9)))
    for row, target in enumerate(targets):
        expected = [8, 9, BOS, *target]
        assert len(restored(batch, row)) == len(expected)
        assert all(found in (None, token) for found, token in zip(restored(batch, row), expected, strict=True))
    # A gap for [BOS] and each token behind it, and none in the prompt.
    L = batch["input_ids"].shape[1]
    present = batch["attention_mask"].sum(dim=-1)
    assert batch["gap_index"].tolist() == [r * L + i for r in range(len(targets)) for i in range(2, int(present[r]))]
    assert batch["sequence_tokens"].tolist() == [len(target) + 1 for target in targets]
    assert (batch["gap_counts"] > 0).any()


def test_in_infilling_a_run_of_masks_is_one_open_gap():
    target, blanks = [10, 11, 12, 13, 14, 15, 16, 17], (0, 3, 4, 7)
    given = [MASK if i in blanks else token for i, token in enumerate(target)]
    examples = examples_of(*[target] * 60, input_ids=given)
    batch = FlexMDMCollator(SpecialIds(40), max_length=32, kind="infill")(examples)
    L, lengths = batch["input_ids"].shape[1], set()
    for row in range(60):
        tokens = restored(batch, row)
        assert len(tokens) == 9
        assert tokens[0] == BOS
        assert all(found == token for found, token in zip(tokens[1:], given, strict=True) if token != MASK)
        there = batch["input_ids"][row, batch["attention_mask"][row]].tolist()
        # Open are the gaps beside what is hidden: before 11, between 12 and 15, and behind 16.
        before = {None: BOS, 12: 12, 16: 16}
        is_open = [row * L + i in batch["gap_index"].tolist() for i in range(len(there))]
        closed = [token for token, opened in zip(there, is_open, strict=True) if not opened]
        assert {11, 15} <= set(closed) <= {10, 11, 13, 14, 15, 17}
        assert all(is_open[there.index(token)] for token in before.values())
        lengths.add(len(there))
    assert lengths == {5, 6, 7, 8, 9}
    assert batch["open_gaps"].all()
    assert batch["sequence_tokens"].tolist() == [4] * 60
    prompts = FlexMDMCollator(SpecialIds(40), max_length=32, kind="infill", prediction=True)(examples)
    assert prompts["input_ids"][0].tolist() == [BOS, *given]


@pytest.mark.parametrize(("end_token", "end"), [("eos", EOS), ("pad", PAD)])
@pytest.mark.parametrize("packing", [False, True])
def test_with_an_end_token_the_gaps_are_those_left_of_a_token(end_token, end, packing):
    """As the published layout has it: the same corruption, the end behind each row, every gap one further right."""
    examples = examples_of([10, 11, 12, 13], [], [14], [15, 16, 17], prompt=(8, 9))
    options = {"max_length": 32, "kind": "seq2seq", "packing": packing}
    plain = FlexMDMCollator(SpecialIds(40), **options)(examples)
    batch = FlexMDMCollator(SpecialIds(40), **options, end_token=end_token)(examples)
    for name in ("gap_counts", "target_ids", "insertion_weights", "sequence_tokens"):
        torch.testing.assert_close(batch[name], plain[name])
    documents, of_plain = batch["gap_documents"], plain["gap_documents"]
    for number in range(4):
        gaps = batch["gap_index"][documents == number].tolist()
        tokens = batch["input_ids"].flatten()[gaps].tolist()
        others = plain["input_ids"].flatten()[plain["gap_index"][of_plain == number]].tolist()
        assert tokens == [*others[1:], end]
        assert others[0] == BOS == batch["input_ids"].flatten()[gaps[0] - 1]
    assert int(batch["attention_mask"].sum()) == int(plain["attention_mask"].sum()) + 4


@pytest.mark.parametrize(("insertion", "unmasking"), [("linear", "linear"), (QUARTIC, MIRRORED)])
def test_a_token_is_absent_a_mask_or_clean_as_the_schedules_say(insertion, unmasking):
    num, length = 4000, 3
    collator = FlexMDMCollator(
        SpecialIds(40), 16, "lm", insertion_schedule=insertion, unmasking_schedule=unmasking, noise_beta=1.0
    )
    examples = [{**e, "input_ids": e["target_ids"]} for e in examples_of(*[(10, 11, 12)] * num)]
    batch = collator(examples)
    masks, there = (batch["input_ids"] == MASK).sum(dim=-1), batch["attention_mask"].sum(dim=-1) - 1
    for low in (0.1, 0.4, 0.7):
        of_bin = (batch["times"] > low) & (batch["times"] < low + 0.1)
        found = [int((length - there)[of_bin].sum()), int(masks[of_bin].sum()), int((there - masks)[of_bin].sum())]
        expected = np.mean([shares(t, insertion, unmasking) for t in np.linspace(low, low + 0.1, 11)], axis=0)
        assert chisquare(found, expected * sum(found), sum_check=False).pvalue > 1e-4


def test_the_weights_are_hazards_over_the_density_of_the_times():
    examples = [{**e, "input_ids": e["target_ids"]} for e in examples_of(*[(10, 11)] * 50)]
    for beta in (None, 3.0):
        batch = FlexMDMCollator(SpecialIds(40), 16, "lm", insertion_schedule=QUARTIC, noise_beta=beta)(examples)
        t = batch["times"].double()
        density = 0.5 * t**-0.5 if beta is None else 3 * t**2
        torch.testing.assert_close(batch["unmasking_weights"].double(), 1 / t / density, rtol=1e-5, atol=0)
        torch.testing.assert_close(batch["insertion_weights"].double(), 4 / t / density, rtol=1e-5, atol=0)
        assert ("loss_weights" in batch) == (beta is not None)
        share = float((t < 0.5).double().mean())
        assert share == pytest.approx(0.5**0.5 if beta is None else 0.125, abs=0.05)


def test_corruption_depends_on_the_example_alone():
    targets = [[10 + i % 9] * 6 for i in range(20)]
    collator = FlexMDMCollator(SpecialIds(40), max_length=32, kind="seq2seq")
    examples = examples_of(*targets)
    whole, other = collator(examples), FlexMDMCollator(SpecialIds(40), 32, "seq2seq", seed=1)(examples)
    for row in (0, 7, 19):
        assert restored(collator([examples[row]]), 0) == restored(whole, row)
    assert Counter(other["input_ids"].flatten().tolist()) != Counter(whole["input_ids"].flatten().tolist())


def test_bad_examples_and_options_are_refused_in_one_sentence():
    collator = FlexMDMCollator(SpecialIds(40), max_length=8, kind="seq2seq")
    with pytest.raises(ValueError, match="A text holds the special token 2, which this model never writes"):
        collator(examples_of([9, MASK]))
    with pytest.raises(ValueError, match=r"has 11 tokens with \[BOS\], and the model has 8 positions"):
        collator(examples_of([9] * 10))
    with pytest.raises(ValueError, match="noise_beta must be greater than 0 and is 0"):
        FlexMDMCollator(SpecialIds(40), 8, "lm", noise_beta=0)
