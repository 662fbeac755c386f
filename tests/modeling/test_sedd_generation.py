"""Score entropy diffusion sampled: laws against enumeration by matrices, rows against batches, prompts untouched."""

import itertools

import pytest
import torch

from tests.modeling.naive import BOS, EOS, FIRST_WORD, MASK, PAD, UNK, batch_of, check_histogram
from tests.modeling.naive_sedd import WORDS, TableModel, chain_law, make_model, random_joint
from xlm_hf.modeling.sedd import SEDDGenerationConfig

PROMPTS, SEEDS = [[8, 9, 10], [11], [12, 13, 14, 15, 16, 17], []], [3, 1, 4, 9]


@pytest.mark.parametrize("is_scaled", [True, False])
@pytest.mark.parametrize("sampler", ["analytic", "euler"])
@pytest.mark.parametrize("kernel", ["absorb", "uniform"])
def test_samples_follow_the_law_of_their_steps(kernel, sampler, is_scaled):
    model = TableModel(kernel, is_scaled=is_scaled)
    law = chain_law(model, 3, 3, is_exact=sampler == "analytic")
    options = {"seed": 11, "do_sample": True, "max_new_tokens": 3, "num_steps": 3, "sampler": sampler}
    output = model.generate(torch.full((8000, 1), BOS), **options)
    check_histogram(list(map(tuple, output.sequences[:, 1:].tolist())), law)
    # Raw scores of an untrained table unmask everything at once.
    assert output.nfe.max() == (1 if kernel == "absorb" and not is_scaled else 3)


@pytest.mark.parametrize("sampler", ["analytic", "euler"])
@pytest.mark.parametrize("kernel", ["absorb", "uniform"])
def test_at_the_exact_scores_many_steps_write_the_data(kernel, sampler):
    joint = random_joint(2, seed=3)
    model = TableModel(kernel, joint)
    errors = []
    for num_steps in (8, 128):
        law = chain_law(model, 2, num_steps, is_exact=sampler == "analytic")
        errors.append(sum(abs(p - q) for p, q in zip(law.values(), joint.tolist(), strict=True)))
    assert errors[1] < errors[0] / 3


@pytest.mark.parametrize("sampler", ["analytic", "euler"])
@pytest.mark.parametrize("kernel", ["absorb", "uniform"])
def test_a_row_decodes_alike_alone_and_in_any_batch_and_prompts_stay(kernel, sampler):
    model = make_model(kernel=kernel, conv_kernel_size=3)
    options = {"do_sample": True, "num_steps": 5, "sampler": sampler, "max_new_tokens": 8, "return_history": True}
    together = model.generate(batch_of(PROMPTS), seed=SEEDS, **options)
    right = model.generate(batch_of(PROMPTS, "right"), seed=SEEDS, **options)
    assert torch.equal(together.sequences, right.sequences)
    width = batch_of(PROMPTS).shape[1]
    assert torch.equal(together.sequences[:, :width], batch_of(PROMPTS))
    written = together.sequences[:, width:]
    assert set(written.unique().tolist()) <= {PAD, EOS, UNK, *range(FIRST_WORD, 20)}
    for row, prompt in enumerate(PROMPTS):
        alone = model.generate(batch_of([prompt]), seed=SEEDS[row : row + 1], **options)
        own = alone.sequences[0, len(prompt) + 1 :].tolist()
        assert own == written[row, : len(own)].tolist()
        assert alone.nfe[0] == together.nfe[row]


@pytest.mark.parametrize("kernel", ["absorb", "uniform"])
def test_blanks_are_filled_in(kernel):
    model = make_model(kernel=kernel)
    ids = torch.tensor([[8, MASK, 10, MASK, MASK, MASK], [PAD, PAD, PAD, MASK, MASK, 11]])
    output = model.generate(ids, seed=[1, 2], do_sample=True, num_steps=4, return_history=True)
    assert torch.equal(output.sequences[ids != MASK], ids[ids != MASK])
    assert MASK not in output.sequences
    assert torch.equal(output.history >= 0, ids == MASK)
    own = model.generate(ids[1:, 3:], seed=[2], do_sample=True, num_steps=4)
    assert own.sequences[0].tolist() == output.sequences[1, 3:].tolist()


def test_masks_may_be_filled_by_confidence():
    model = TableModel("absorb")
    law = {}
    for first, second in itertools.product(range(3), repeat=2):
        # The more certain position first.
        start = model.logits(torch.tensor([[3, 3]]), torch.zeros(1).double()).softmax(dim=-1)[0]
        position = int(start.amax(dim=-1).argmax())
        canvas = (first, 3) if position == 0 else (3, first)
        then = model.logits(torch.tensor([canvas]), torch.full((1,), 0.5).double()).softmax(dim=-1)[0, 1 - position]
        whole = (first, second) if position == 0 else (second, first)
        law[tuple(WORDS[i] for i in whole)] = float(start[position, first] * then[second])
    options = {"seed": 5, "do_sample": True, "max_new_tokens": 2, "sampler": "confidence"}
    output = model.generate(torch.full((6000, 1), BOS), **options)
    check_histogram(list(map(tuple, output.sequences[:, 1:].tolist())), law)
    with pytest.raises(ValueError, match="'confidence' writes into masks, and the model has uniform noise"):
        make_model(kernel="uniform").generate(sampler="confidence")


def test_options_are_checked():
    with pytest.raises(ValueError, match="num_steps"):
        SEDDGenerationConfig(num_steps=0)
    with pytest.raises(ValueError, match="sampler must be one of analytic, euler, confidence"):
        SEDDGenerationConfig(sampler="ancestral")
