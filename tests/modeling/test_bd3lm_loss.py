"""The bound of block diffusion against enumeration, masked diffusion, and one pass for each block."""

import itertools
import math

import pytest
import torch

from tests.modeling.naive_bd3lm import (
    BOS,
    EOS,
    FIRST_WORD,
    MASK,
    PAD,
    WORDS,
    EndsInAWord,
    SpecialIds,
    TableModel,
    exact_bound,
    make_examples,
    make_model,
    one_by_one_law,
    random_joint,
)
from xlm_hf.families import families
from xlm_hf.modeling.bd3lm import BD3LMCollator, BD3LMLoss


def texts(length, num_words=3):
    return itertools.product(WORDS[:num_words], repeat=length)


@pytest.mark.parametrize(("length", "block_length"), [(3, 1), (3, 2), (3, 3), (4, 1), (4, 2), (4, 4), (4, 3)])
def test_the_bound_is_the_likelihood_at_the_exact_conditionals(length, block_length):
    joint = random_joint(length, seed=length, num_words=3 if length < 4 else 2)
    model = TableModel(block_length, joint)
    for x, p in joint.items():
        assert exact_bound(model, x, block_length) == pytest.approx(-math.log(p), abs=1e-8)


def test_a_wrong_model_pays_more_than_the_likelihood_of_what_it_writes():
    model = TableModel(2)
    law = one_by_one_law(model, 3, 2, "random")
    assert min(exact_bound(model, x, 2) + math.log(p) for x, p in law.items()) > -1e-9
    assert max(exact_bound(model, x, 2) + math.log(p) for x, p in law.items()) > 0.01


def test_with_blocks_of_one_the_loss_is_the_law_of_the_sampler():
    model = TableModel(1)
    law = one_by_one_law(model, 3, 1, "random")
    examples = [{"input_ids": x[:2], "example_id": i, "epoch": 0, "position": i} for i, x in enumerate(texts(2))]
    batch = BD3LMCollator(EndsInAWord(10), 16, kind="lm", block_length=1)(examples)
    output = BD3LMLoss()(model, batch)
    expected = [-math.log(law[(*e["input_ids"], WORDS[2])]) for e in examples]
    torch.testing.assert_close(output.sequence_nats.double(), torch.tensor(expected).double(), rtol=1e-5, atol=1e-5)
    assert output.sequence_tokens.tolist() == [3] * 9


@pytest.mark.parametrize(
    ("block_length", "options", "num"),
    [
        (2, {}, 100_000),
        (3, {}, 8000),
        (4, {}, 8000),
        (2, {"mask_beta": 2.0}, 8000),
        (2, {"masking": "bernoulli"}, 8000),
        (4, {"masking": "bernoulli", "mask_beta": 2.0}, 8000),
    ],
)
def test_the_loss_is_an_unbiased_estimate_of_the_bound(block_length, options, num):
    """Collator and loss together, against all sets of masks and quadrature over the time."""
    model, first_time = TableModel(block_length), 0.0
    # A text that goes on, so that nothing but words of the table is on the canvas; the last of blocks of 3 has 1 token.
    example = {"input_ids": [7, 9, 8, 9], "continues": True, "epoch": 0}
    examples = [{**example, "example_id": i, "position": i} for i in range(num)]
    batch = BD3LMCollator(SpecialIds(10), 16, kind="lm", block_length=block_length, **options)(examples)
    if "masking" in options:
        # The variance at small times is infinite: leave them out on both sides.
        first_time, beta = 0.2, options.get("mask_beta", 1.0)
        batch["weights"] *= batch["weights"] < 1 / (beta * first_time**beta)
    output = BD3LMLoss()(model, batch)
    nats, expected = output.sequence_nats.double(), exact_bound(model, (7, 9, 8, 9), block_length, first_time)
    error = float(nats.std()) / math.sqrt(num)
    assert abs(float(nats.mean()) - expected) < 4 * error
    assert error < 0.02 * expected
    assert (output.sequence_tokens == 4).all()
    if not options:
        assert float(output.loss_sum) == pytest.approx(float(nats.sum()), rel=1e-5)


def test_exact_masks_have_the_least_variance():
    model = TableModel(4)
    examples = [{"input_ids": [7, 9, 8], "example_id": i, "epoch": 0, "position": i} for i in range(4000)]
    spread = []
    for masking in ("exact", "bernoulli"):
        batch = BD3LMCollator(EndsInAWord(10), 16, kind="lm", masking=masking)(examples)
        spread.append(float(BD3LMLoss()(model, batch).sequence_nats.std()))
    assert spread[0] < spread[1] / 2


def test_a_clipped_range_is_trained_on_and_reports_no_likelihood():
    model, examples = make_model(4), make_examples(4)
    collator = BD3LMCollator(SpecialIds(), 24, kind="seq2seq", mask_range=(0.3, 0.8))
    output = BD3LMLoss()(model, collator(examples))
    output.loss_sum.backward()
    assert output.sequence_nats is None
    assert "sequence_nelbo" not in output.metrics


def passes_per_block(model, batch, documents):
    """The cross-entropy of every mask by a forward pass for each block, in the order of the batch."""
    losses, targets = [], iter(batch["target_ids"].tolist())
    rows = batch["segment_ids"] if "segment_ids" in batch else torch.zeros_like(batch["input_ids"])
    for row, segment in documents:
        own = (rows[row] == segment) & batch["attention_mask"][row].bool()
        ids, blocks, noisy = (batch[name][row][own] for name in ("input_ids", "block_ids", "is_noisy"))
        for block in range(1, int(blocks.max()) + 1):
            now = noisy & (blocks == block)
            seen = torch.cat((ids[~noisy & (blocks < block)], ids[now]))
            of_seen = torch.cat((blocks[~noisy & (blocks < block)], blocks[now]))
            logits = model(seen[None], block_ids=of_seen[None]).logits[0, -int(now.sum()) :]
            for position in range(int(now.sum())):
                if ids[now][position] == MASK:
                    losses.append(-logits[position].log_softmax(-1)[next(targets)])
    return torch.stack(losses)


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("kernel", [0, 3])
@pytest.mark.parametrize("block_length", [1, 3, 30])
def test_one_pass_over_two_copies_is_a_pass_for_each_block(block_length, kernel, packing):
    model = make_model(block_length, conv_kernel_size=kernel).double()
    collator = BD3LMCollator(SpecialIds(), 24, kind="seq2seq", block_length=block_length, packing=packing)
    batch = collator(make_examples(5))
    assert (len(batch["input_ids"]) < 5) == packing
    segments = batch.get("segment_ids", torch.zeros_like(batch["input_ids"]))
    # Documents in the order of their targets, as pairs of row and segment.
    index, L = batch["logits_index"], batch["input_ids"].shape[1]
    order = list(dict.fromkeys((int(i // L), int(segments.flatten()[i])) for i in index))
    losses = passes_per_block(model, batch, order)
    weights = batch["weights"][batch["target_blocks"]].double()
    output = BD3LMLoss()(model, batch)
    torch.testing.assert_close(output.loss_sum, (weights * losses).sum(), rtol=1e-9, atol=1e-9)
    expected = torch.zeros(5).double().index_add(0, batch["block_documents"][batch["target_blocks"]], weights * losses)
    torch.testing.assert_close(output.sequence_nats.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif("mdlm" not in families(), reason="compares with the family mdlm")
@pytest.mark.parametrize("kernel", [0, 3])
def test_one_block_is_masked_diffusion_whose_prompt_does_not_see_the_canvas(kernel):
    from xlm_hf.modeling.mdlm import MDLMCollator, MDLMConfig, MDLMForMaskedDiffusion, MDLMLoss

    class Blind(MDLMForMaskedDiffusion):
        """The prompt and `[BOS]` see each other alone."""

        def forward(self, input_ids, attention_mask, **kwargs):
            of_prompt = (input_ids == BOS).long().flip(-1).cumsum(-1).flip(-1).bool()
            pairs = attention_mask[:, None, None, :] & (of_prompt[:, None, None, :] | ~of_prompt[:, None, :, None])
            positions = torch.arange(input_ids.shape[1])[None].expand_as(input_ids)
            return super().forward(input_ids, attention_mask=pairs, position_ids=positions, **kwargs)

    model = make_model(10, conv_kernel_size=kernel).double()
    shared = {
        name: value for name, value in model.config.to_dict().items() if name not in ("model_type", "block_length")
    }
    other = Blind(MDLMConfig(**shared)).double().eval()
    other.load_state_dict(model.state_dict())
    examples = make_examples(6)
    batches = (
        BD3LMCollator(SpecialIds(), 24, kind="seq2seq", block_length=10)(examples),
        MDLMCollator(SpecialIds(), 24, kind="seq2seq", canvas_length=10)(examples),
    )
    assert batches[0]["target_ids"].tolist() == batches[1]["target_ids"].tolist()
    outputs = [
        loss(m, batch) for loss, m, batch in zip((BD3LMLoss(), MDLMLoss()), (model, other), batches, strict=True)
    ]
    torch.testing.assert_close(outputs[0].loss_sum, outputs[1].loss_sum, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(outputs[0].sequence_nats, outputs[1].sequence_nats)
    assert outputs[0].num_items == outputs[1].num_items


def test_masks_and_special_ids_have_no_probability_but_the_end_and_padding_do():
    logits = make_model()(torch.tensor([[8, BOS, MASK, MASK]])).logits
    assert logits.isfinite().all(dim=(0, 1)).tolist() == [i in (PAD, EOS) or i >= FIRST_WORD for i in range(20)]
