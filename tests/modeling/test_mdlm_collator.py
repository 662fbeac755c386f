from collections import Counter

import pytest
import torch
from scipy.stats import beta, chisquare, kstest

from tests.modeling.naive import BOS, EOS, MASK, PAD, SpecialIds, make_examples
from xlm_hf.modeling.mdlm import MDLMCollator

V = 40


def collator(kind="seq2seq", **kwargs):
    return MDLMCollator(SpecialIds(V), max_length=32, kind=kind, **kwargs)


def restored(batch):
    ids = batch["input_ids"].clone()
    ids.view(-1)[batch["logits_index"]] = batch["target_ids"]
    return ids


@pytest.mark.parametrize("masking", ["exact", "bernoulli"])
@pytest.mark.parametrize("canvas_length", [None, 10, 8])
def test_prompt_bos_and_a_canvas_of_which_a_part_is_masked(masking, canvas_length):
    examples = make_examples(64, V)
    batch = collator(masking=masking, canvas_length=canvas_length)(examples)
    ids = restored(batch)
    for row, example in enumerate(examples):
        canvas = [*example["target_ids"], EOS]
        if canvas_length is not None:
            canvas = (canvas + [PAD] * canvas_length)[:canvas_length]
        expected = [*example["prompt_ids"], BOS, *canvas]
        assert ids[row, batch["attention_mask"][row]].tolist() == expected
        assert batch["attention_mask"][row].tolist() == [i < len(expected) for i in range(ids.shape[1])]
        assert batch["canvas_lengths"][row] == len(canvas)
        assert MASK not in batch["input_ids"][row, : len(example["prompt_ids"]) + 1]
    assert (batch["input_ids"].view(-1)[batch["logits_index"]] == MASK).all()
    assert (batch["input_ids"] == MASK).sum() == len(batch["target_ids"])
    assert batch["example_id"].tolist() == [example["example_id"] for example in examples]


def test_exact_masks_have_a_uniform_number_and_weight_length_over_it():
    length, num = 4, 20_000
    examples = [
        {"input_ids": [10, 11, 12], "example_id": i, "epoch": 2, "position": i} for i in range(num)
    ]  # fmt: skip
    batch = collator("lm", seed=5)(examples)
    masked = batch["input_ids"][:, 1:] == MASK
    k = masked.sum(-1)
    torch.testing.assert_close(batch["weights"], length / k)
    # Low discrepancy: far closer to even than the +-60 of independent draws.
    assert all(abs(count - num / length) <= 8 for count in torch.bincount(k, minlength=5)[1:].tolist())
    for size in (1, 2, 3):
        counts = Counter(tuple(row) for row in masked[k == size].tolist())
        assert chisquare(list(counts.values())).pvalue > 1e-4
    for size in (1, 2, 3, 4):
        # The time that goes with k masks: Beta(k, L - k + 1), whichever tokens they hide.
        chosen = k == size
        assert kstest(1 - batch["alpha"][chosen].numpy(), beta(size, length - size + 1).cdf).pvalue > 1e-4
        with_first = chosen & masked[:, 0]
        assert kstest(1 - batch["alpha"][with_first].numpy(), beta(size, length - size + 1).cdf).pvalue > 1e-4


@pytest.mark.parametrize("schedule", ["log_linear", "cosine"])
def test_bernoulli_masks_every_token_at_the_rate_of_its_row(schedule):
    num = 20_000
    examples = [{"input_ids": [9] * 3, "example_id": i, "epoch": 1, "position": i} for i in range(num)]
    batch = collator("lm", masking="bernoulli", noise_schedule=schedule)(examples)
    masked = (batch["input_ids"][:, 1:] == MASK).double()
    r = 1 - batch["alpha"].double()
    t = r if schedule == "log_linear" else torch.asin(r.clamp(max=1)) * 2 / torch.pi
    counts = torch.histc(t, bins=10, min=0, max=1)
    assert (counts - num / 10).abs().max() <= 12
    slope = 1.0 if schedule == "log_linear" else torch.pi / 2 * torch.cos(torch.pi / 2 * t)
    middle = (t > 0.01) & (t < 0.99)
    torch.testing.assert_close(batch["weights"].double()[middle], (slope / r)[middle], rtol=1e-3, atol=1e-3)
    for low in (0.0, 0.25, 0.5, 0.75):
        bin_ = (r >= low) & (r < low + 0.25)
        expected, n = r[bin_].sum() * 4, bin_.sum() * 4
        assert (masked[bin_].sum() - expected).abs() < 4.5 * (n * 0.25) ** 0.5
        # Two tokens of a row are independent given its time.
        pair = (masked[bin_, 0] * masked[bin_, 2]).sum()
        assert (pair - r[bin_].square().sum()).abs() < 4.5 * (bin_.sum() * 0.25) ** 0.5


@pytest.mark.parametrize("masking", ["exact", "bernoulli"])
def test_corruption_depends_on_the_example_alone(masking):
    examples = make_examples(32, V, min_target=6)
    whole = collator(masking=masking)(examples)
    for row in (0, 7, 31):
        alone = collator(masking=masking)([examples[row]])
        width = alone["input_ids"].shape[1]
        assert alone["input_ids"][0].tolist() == whole["input_ids"][row, :width].tolist()
        assert alone["alpha"][0] == whole["alpha"][row]
        assert alone["weights"][0] == whole["weights"][row]
    other_epoch = collator(masking=masking)([{**example, "epoch": 1} for example in examples])
    other_seed = collator(masking=masking, seed=1)(examples)
    for other in (other_epoch, other_seed):
        assert other["alpha"].tolist() != whole["alpha"].tolist()
        assert other["input_ids"].tolist() != whole["input_ids"].tolist()


def test_language_modeling_is_seq2seq_with_an_empty_prompt():
    examples = make_examples(16, V)
    text = collator("lm")([{**e, "input_ids": e["target_ids"]} for e in examples])
    pairs = collator()([{**e, "prompt_ids": []} for e in examples])
    for name in pairs:
        torch.testing.assert_close(text[name], pairs[name])


@pytest.mark.parametrize("masking", ["exact", "bernoulli"])
def test_mask_beta_skews_the_masked_share(masking):
    length, num = 401, 500
    examples = [{"input_ids": [9] * (length - 1), "example_id": i, "epoch": 0, "position": i} for i in range(num)]
    skewed = MDLMCollator(SpecialIds(V), max_length=500, masking=masking, mask_beta=3.0, kind="lm")(examples)
    shares = (skewed["input_ids"] == MASK).sum(-1).numpy() / length
    assert kstest(shares, "beta", (3, 1)).pvalue > 0.5
    assert skewed["loss_weights"].tolist() == [1.0] * num


@pytest.mark.parametrize("masking", ["exact", "bernoulli"])
def test_with_mask_beta_the_weights_of_the_bound_undo_the_skew(masking):
    examples = [{"input_ids": [9] * 3, "example_id": i, "epoch": 0, "position": i} for i in range(20_000)]
    batch = collator("lm", masking=masking, mask_beta=2.0)(examples)
    k = (batch["input_ids"] == MASK).sum(-1)
    r = (k / 4 if masking == "exact" else 1 - batch["alpha"]).double()
    # The bound is the integral over r, all r alike, of the loss at r by r: here a loss that is r in (a, b] and else 0.
    for a, b in ((0.1, 0.25), (0.25, 0.5), (0.5, 0.75), (0.75, 1.0)):
        expected = 0.25 if masking == "exact" else b - a
        assert float((batch["weights"] * r * (r > a) * (r <= b)).mean()) == pytest.approx(expected, rel=0.01)


INFILL = [
    {"input_ids": [9, MASK, 11, MASK, MASK], "target_ids": [9, 10, 11, 12, 13]},
    {"input_ids": [MASK, 15], "target_ids": [14, 15]},
    {"input_ids": [16, 17, 18], "target_ids": [16, 17, 18]},
]


def test_infilling_masks_blanks_alone():
    seen = Counter()
    for epoch in range(200):
        examples = [{**e, "example_id": i, "epoch": epoch, "position": i} for i, e in enumerate(INFILL)]
        batch = collator("infill")(examples)
        assert batch["canvas_lengths"].tolist() == [3, 1, 0]
        assert [row[m].tolist() for row, m in zip(restored(batch), batch["attention_mask"], strict=True)] == [
            e["target_ids"] for e in INFILL
        ]
        seen.update(batch["logits_index"].tolist())
        assert torch.isfinite(batch["weights"]).all()
    assert sorted(seen) == [1, 3, 4, 5]
    assert seen[5] == 200


def test_prediction_batches_are_padded_on_the_left():
    examples = make_examples(9, V)
    infill = [{**e, "example_id": i} for i, e in enumerate(INFILL)]
    cases = [
        ("seq2seq", examples, [[*e["prompt_ids"], BOS] for e in examples]),
        ("lm", [{"example_id": i} for i in range(9)], [[BOS]] * 9),
        ("lm", examples, [[BOS, *e["prompt_ids"]] for e in examples]),
        ("infill", infill, [e["input_ids"] for e in INFILL]),
    ]
    for kind, rows, expected in cases:
        batch = collator(kind, prediction=True)(rows)
        width = batch["input_ids"].shape[1]
        assert batch["input_ids"].tolist() == [[PAD] * (width - len(ids)) + ids for ids in expected]
        assert batch["attention_mask"].sum(-1).tolist() == [len(ids) for ids in expected]


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"target_ids": [V]}, {}, f"Token id {V} is outside the vocabulary of {V}"),
        ({"prompt_ids": [-1]}, {}, f"Token id -1 is outside the vocabulary of {V}"),
        ({"prompt_ids": [8] * 40}, {}, "has 42 tokens with .* the model has 32 positions"),
        ({"target_ids": [8] * 5}, {"canvas_length": 4}, "A target has 5 tokens and the canvas 4 positions"),
        ({"target_ids": [8, MASK]}, {}, "holds the special token 2, which this model never writes"),
        ({}, {"masking": "exakt"}, "masking must be one of exact, bernoulli and is 'exakt'"),
        ({}, {"mask_beta": 0.0}, r"mask_beta must be greater than 0 and is 0\.0"),
        ({}, {"noise_schedule": "cosin"}, "noise_schedule 'cosin' does not exist: did you mean 'cosine'"),
        ({}, {"noise_schedule": {"name": "log_linear", "eps": 1e-3}}, "does not run from data .* to pure noise"),
    ],
)
def test_bad_examples_and_options_are_refused_in_one_sentence(change, options, message):
    example = {**make_examples(1, V)[0], "target_ids": [], **change}
    with pytest.raises(ValueError, match=message):
        collator(**options)([example])


def test_a_solution_of_another_length_is_refused():
    with pytest.raises(ValueError, match="Example 7 has 2 input_ids and 1 target_ids"):
        collator("infill")([{"input_ids": [MASK, 9], "target_ids": [9], "example_id": 7}])
