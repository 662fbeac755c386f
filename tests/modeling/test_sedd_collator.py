from collections import Counter

import pytest
import torch
from scipy.stats import chisquare, kstest

from tests.modeling.naive import BOS, EOS, MASK, PAD, UNK, SpecialIds, make_examples
from xlm_hf.modeling.sedd import SEDDCollator

V = 40
WRITABLE = [PAD, EOS, UNK, *range(7, V)]


def collator(kind="seq2seq", **kwargs):
    return SEDDCollator(SpecialIds(V), max_length=32, kind=kind, **kwargs)


def restored(batch):
    ids = batch["input_ids"].clone()
    ids.view(-1)[batch["logits_index"]] = batch["target_ids"]
    return ids


@pytest.mark.parametrize("kernel", ["absorb", "uniform"])
@pytest.mark.parametrize("canvas_length", [None, 10])
def test_prompt_bos_and_a_canvas_with_masks_or_noise(canvas_length, kernel):
    examples = make_examples(64, V)
    batch = collator(canvas_length=canvas_length, kernel=kernel)(examples)
    for row, example in enumerate(examples):
        canvas = [*example["target_ids"], EOS]
        if canvas_length is not None:
            canvas = (canvas + [PAD] * canvas_length)[:canvas_length]
        expected = [*example["prompt_ids"], BOS, *canvas]
        assert restored(batch)[row, batch["attention_mask"][row]].tolist() == expected
        prompt = batch["input_ids"][row, : len(expected) - len(canvas)].tolist()
        assert prompt == [*example["prompt_ids"], BOS]
        assert batch["sequence_tokens"][row] == len(example["target_ids"]) + 1
    corrupted = batch["input_ids"].view(-1)[batch["logits_index"]]
    if kernel == "absorb":
        assert (corrupted == MASK).all()
        assert (batch["input_ids"] == MASK).sum() == len(batch["target_ids"])
    else:
        assert set(corrupted.tolist()) <= set(WRITABLE)
        assert len(batch["target_ids"]) == batch["canvas_lengths"].sum()
    torch.testing.assert_close(1 - batch["alpha"], batch["noise"], rtol=0, atol=1e-7)


@pytest.mark.parametrize("kernel", ["absorb", "uniform"])
def test_noise_beta_draws_the_time_and_evens_the_weights(kernel):
    examples = [{"input_ids": [9] * 20, "example_id": i, "epoch": 0, "position": i} for i in range(2000)]
    batch = collator("lm", kernel=kernel, noise_beta=3.0)(examples)
    noise = batch["noise"]
    assert kstest(noise.numpy(), "beta", (3, 1)).pvalue > 0.5
    num_ids = len(WRITABLE)
    kappa = num_ids * (1 - noise) / noise
    expected = torch.ones(2000) if kernel == "absorb" else num_ids * (1 - noise) / (1 + kappa)
    torch.testing.assert_close(batch["loss_weights"], expected, rtol=1e-4, atol=1e-4)
    # The bound integrates over uniform times: the density is 3 t^2, and at masks the rate is divided by 1 - alpha.
    density = 3 * noise**2 * (noise if kernel == "absorb" else 1)
    torch.testing.assert_close(batch["weights"], 1 / density, rtol=1e-4, atol=1e-4)
    changed = batch["input_ids"][:, 1:21] != 9
    share = noise.mean() * (1 if kernel == "absorb" else 1 - 1 / num_ids)
    assert abs(changed.float().mean() - share) < 0.01


def test_the_schedule_of_uniform_noise_changes_no_batch():
    """The published geometric one ends close to pure noise; the bound is integrated over all of alpha."""
    examples = make_examples(8, V)
    batches = [collator(kernel="uniform", noise_schedule=name)(examples) for name in ("log_linear", "geometric")]
    assert all(torch.equal(batches[0][name], batches[1][name]) for name in batches[0])


@pytest.mark.parametrize("kernel", ["absorb", "uniform"])
def test_it_depends_on_the_example_alone(kernel):
    examples = make_examples(32, V, min_target=6)
    whole = collator(kernel=kernel)(examples)
    for row in (0, 7, 31):
        alone = collator(kernel=kernel)([examples[row]])
        width = alone["input_ids"].shape[1]
        assert alone["input_ids"][0].tolist() == whole["input_ids"][row, :width].tolist()
        assert all(alone[name][0] == whole[name][row] for name in ("noise", "alpha", "weights"))


def test_noise_is_uniform_over_what_may_be_written():
    examples = [{"input_ids": [9] * 9, "example_id": i, "epoch": 0, "position": i} for i in range(4000)]
    batch = collator("lm", kernel="uniform")(examples)
    others = Counter(batch["input_ids"][:, 1:10].flatten().tolist())
    del others[9]
    assert set(others) == set(WRITABLE) - {9}
    assert chisquare(list(others.values())).pvalue > 1e-4


@pytest.mark.parametrize("kernel", ["absorb", "uniform"])
def test_in_infilling_blanks_alone_are_corrupted(kernel):
    example = {"input_ids": [9, MASK, 11, MASK], "target_ids": [9, 10, 11, 12], "example_id": 3, "epoch": 0}
    batch = collator("infill", kernel=kernel)([{**example, "position": 0}])
    assert restored(batch).tolist() == [[9, 10, 11, 12]]
    assert set(batch["logits_index"].tolist()) <= {1, 3}
    assert batch["is_given"].tolist() == [[True, False, True, False]]


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"target_ids": [8, MASK]}, {}, "holds the special token 2, which this model never writes"),
        ({}, {"kernel": "absorbing"}, "kernel must be one of absorb, uniform and is 'absorbing'"),
        ({}, {"noise_beta": 0.0}, r"noise_beta must be greater than 0 and is 0\.0"),
        ({}, {"noise_schedule": "geometric"}, "does not run from data .* to pure noise"),
    ],
)
def test_bad_examples_and_options_are_refused_in_one_sentence(change, options, message):
    example = {**make_examples(1, V)[0], "target_ids": [], **change}
    with pytest.raises(ValueError, match=message):
        collator(**options)([example])
