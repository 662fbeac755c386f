"""Batches of Gaussian diffusion: the canvas, the noise by its law, times and shares, and what they depend on."""

import pytest
import torch
from scipy.stats import kstest

from tests.modeling.naive import BOS, EOS, MASK, PAD, SpecialIds, make_examples
from xlm_hf.modeling.plaid import PlaidCollator

V = 40


def collator(kind="seq2seq", **options):
    return PlaidCollator(SpecialIds(V), max_length=32, kind=kind, **{"embedding_size": 4, **options})


@pytest.mark.parametrize("canvas_length", [None, 10, 8])
def test_prompt_bos_and_a_canvas_with_noise(canvas_length):
    examples = make_examples(64, V)
    batch = collator(canvas_length=canvas_length)(examples)
    for row, example in enumerate(examples):
        canvas = [*example["target_ids"], EOS]
        if canvas_length is not None:
            canvas = (canvas + [PAD] * canvas_length)[:canvas_length]
        expected = [*example["prompt_ids"], BOS, *canvas]
        assert batch["input_ids"][row, batch["attention_mask"][row]].tolist() == expected
        start = len(expected) - len(canvas)
        assert batch["is_canvas"][row].nonzero()[:, 0].tolist() == list(range(start, len(expected)))
        assert batch["canvas_lengths"][row] == len(canvas)
        assert batch["sequence_tokens"][row] == len(example["target_ids"]) + 1
    ids = batch["input_ids"].flatten()[batch["logits_index"]]
    assert torch.equal(ids, batch["target_ids"])
    assert torch.equal(batch["is_canvas"].flatten().nonzero()[:, 0], batch["logits_index"])
    assert (batch["noise"].abs().sum(dim=-1) > 0).equal(batch["is_canvas"])
    assert torch.equal(batch["target_documents"].bincount(), batch["canvas_lengths"])
    assert batch["given_length"].tolist() == [canvas_length is None] * 64


def test_blanks_are_the_canvas_of_infilling():
    examples = [
        {"input_ids": [8, MASK, 9, MASK], "target_ids": [8, 10, 9, 11], "example_id": 5, "epoch": 0, "position": 0}
    ]
    batch = collator("infill")(examples)
    assert batch["is_canvas"].tolist() == [[False, True, False, True]]
    assert batch["target_ids"].tolist() == [10, 11]
    assert batch["sequence_tokens"].tolist() == batch["canvas_lengths"].tolist() == [2]
    assert not batch["given_length"].any()


def test_noise_is_normal_and_independent_between_dimensions_tokens_and_epochs():
    num = 4000
    examples = [{"input_ids": [9] * 3, "example_id": i, "epoch": i % 3, "position": i} for i in range(num)]
    noise = collator("lm")(examples)["noise"][:, 1:5].double()
    assert noise.shape == (num, 4, 4)
    assert kstest(noise.flatten().numpy()[::3], "norm").pvalue > 1e-4
    flat = noise.reshape(num, 16)
    correlations = torch.corrcoef(flat.T) - torch.eye(16)
    assert correlations.abs().max() < 4.5 / num**0.5
    neighbours = (flat[1:] * flat[:-1]).mean(dim=0)
    assert neighbours.abs().max() < 4.5 / num**0.5
    # And from the draws of time and self-conditioning.
    batch = collator("lm", self_conditioning=0.25)(examples)
    for name in ("times", "self_conditioned"):
        pair = torch.stack((batch[name].double(), flat[:, 0]))
        assert torch.corrcoef(pair)[0, 1].abs() < 4.5 / num**0.5


@pytest.mark.parametrize("share", [0.125, 0.6])
def test_a_share_of_the_documents_is_reconstructed_and_the_others_have_even_times(share):
    num = 4000
    examples = [{"input_ids": [9], "example_id": i, "epoch": 1, "position": i} for i in range(num)]
    batch = collator("lm", reconstruction_share=share, self_conditioning=0.25)(examples)
    chosen = batch["is_reconstruction"]
    assert abs(int(chosen.sum()) - share * num) <= 3
    assert not batch["times"][chosen].any()
    times = batch["times"][~chosen].double()
    counts = torch.histc(times, bins=10, min=0, max=1)
    assert (counts - len(times) / 10).abs().max() <= 4
    torch.testing.assert_close(batch["weights"][chosen], torch.full((int(chosen.sum()),), 1 / share))
    torch.testing.assert_close(batch["weights"][~chosen], torch.full((len(times),), 1 / (1 - share)))
    assert abs(batch["self_conditioned"].double().mean() - 0.25) < 4.5 * (0.1875 / num) ** 0.5
    assert collator("lm")(examples)["self_conditioned"].all()


def test_denoising_draws_times_from_a_beta_law_and_has_no_bound():
    examples = [{"input_ids": [9], "example_id": i, "epoch": 1, "position": i} for i in range(2000)]
    batch = collator("lm", noise_beta=3.0)(examples)
    assert kstest(batch["times"].numpy(), "beta", (3, 1)).pvalue > 0.5
    assert "weights" not in batch
    assert batch["is_reconstruction"].all()
    assert batch["loss_weights"].unique().tolist() == [1.0]


@pytest.mark.parametrize("options", [{}, {"noise_beta": 3.0}, {"self_conditioning": 0.5}])
def test_noise_depends_on_the_example_alone(options):
    examples = make_examples(32, V, min_target=6)
    whole = collator(**options)(examples)
    names = ("times", "is_reconstruction", "self_conditioned")
    for row in (0, 7, 31):
        alone = collator(**options)([examples[row]])
        width = alone["input_ids"].shape[1]
        assert torch.equal(alone["noise"][0], whole["noise"][row, :width])
        assert all(alone[name][0] == whole[name][row] for name in names)
    packed = collator(**options, packing=True)(examples)
    assert len(packed["input_ids"]) < 32
    assert torch.equal(
        packed["noise"][packed["is_canvas"]].sort(dim=0).values, whole["noise"][whole["is_canvas"]].sort(dim=0).values
    )
    index = packed["time_index"].flatten()[packed["logits_index"]]
    assert torch.equal(index, packed["target_documents"])
    for other in (collator(**options)([{**e, "epoch": 1} for e in examples]), collator(**options, seed=1)(examples)):
        assert other["times"].tolist() != whole["times"].tolist()
        assert other["noise"].tolist() != whole["noise"].tolist()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reconstruction_share": 0.0}, "reconstruction_share"),
        ({"reconstruction_share": 1.0}, "reconstruction_share"),
        ({"self_conditioning": 1.5}, "self_conditioning"),
        ({"noise_beta": 0.0}, "noise_beta"),
    ],
)
def test_options_out_of_their_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        collator(**options)
