"""Batches of GIDD: layout, the law of the noise, prompts that are left out."""

import pytest
import torch

from tests.modeling.naive import BOS, EOS, MASK, PAD, UNK, SpecialIds, make_examples
from tests.modeling.naive_gidd import shares
from xlm_hf.modeling.gidd import GIDDCollator, GIDDConfig

V = 40


def collator(kind="seq2seq", **options):
    return GIDDCollator(SpecialIds(V), max_length=32, kind=kind, **options)


@pytest.mark.parametrize("canvas_length", [None, 10])
def test_prompt_bos_and_a_canvas_with_noise(canvas_length):
    examples = make_examples(64, V)
    batch = collator(canvas_length=canvas_length)(examples)
    ids = batch["input_ids"].clone()
    ids.view(-1)[batch["logits_index"]] = batch["target_ids"]
    for row, example in enumerate(examples):
        canvas = [*example["target_ids"], EOS]
        if canvas_length is not None:
            canvas = (canvas + [PAD] * canvas_length)[:canvas_length]
        expected = [*example["prompt_ids"], BOS, *canvas]
        assert ids[row, batch["attention_mask"][row]].tolist() == expected
        assert batch["canvas_lengths"][row] == len(canvas)
        assert batch["sequence_tokens"][row] == len(example["target_ids"]) + 1
        assert (
            batch["input_ids"][row, : len(example["prompt_ids"]) + 1].tolist()
            == expected[: len(expected) - len(canvas)]
        )
    noisy = batch["input_ids"].view(-1)[batch["logits_index"]]
    assert set(noisy.tolist()) <= {PAD, MASK, EOS, UNK, *range(7, V)}


@pytest.mark.parametrize("options", [{}, {"uniform_share": 0.6, "gamma": 2.0}, {"uniform_share": 0.0}])
def test_noise_has_the_shares_of_its_time(options):
    """Counts of masks, and of other tokens, over many documents of many times."""
    num = 4000
    examples = [{"input_ids": [10, 11, 12], "example_id": i, "epoch": 2, "position": i} for i in range(num)]
    batch = collator("lm", loss_weighting="dynamic", noise_beta=1.0, **options)(examples)
    t = batch["timesteps"].double()
    alpha, m, total = shares(t, GIDDConfig(**options))
    torch.testing.assert_close(batch["alpha"].double(), alpha, rtol=1e-5, atol=1e-6)
    num_ids = V - 7 + 3
    torch.testing.assert_close(batch["uniform"].double(), total / num_ids, rtol=1e-4, atol=1e-6)
    assert float(t.mean()) == pytest.approx(0.5, abs=1e-3)
    noisy, clean = batch["input_ids"].view(-1)[batch["logits_index"]].view(num, 4), batch["target_ids"].view(num, 4)
    for is_event, share in ((noisy == MASK, m), ((noisy != MASK) & (noisy != clean), total * (1 - 1 / num_ids))):
        deviation = (4 * share * (1 - share)).sum().sqrt()
        assert abs(is_event.sum() - 4 * share.sum()) <= 4 * deviation
