import itertools
import math

import pytest
import torch

from tests.modeling.naive import BOS, EOS, FIRST_WORD, MASK, PAD, SpecialIds, make_examples
from tests.modeling.naive_mdlm import (
    WORDS,
    TableModel,
    exact_nelbo,
    make_model,
    mask_probability,
    process_law,
    random_joint,
    random_order_law,
    slow_loss,
)
from tests.objectives.test_collation import check_documents_of_a_row
from xlm_hf.modeling.mdlm import MDLMCollator, MDLMConfig, MDLMLoss
from xlm_hf.modeling.mdlm.modeling_mdlm import total_noise
from xlm_hf.testing import FamilyCase, check_packing

V = 13


@pytest.mark.parametrize("options", [{}, {"masking": "bernoulli"}, {"mask_beta": 3.0}])
@pytest.mark.parametrize("backbone", ["rotary", "dit"])
def test_loss_and_gradients_equal_those_of_the_slow_twin(backbone, options):
    model = make_model(V, 32, backbone=backbone).double()
    examples = make_examples(9, V)
    batch = MDLMCollator(SpecialIds(V), 32, canvas_length=9, kind="seq2seq", **options)(examples)
    output = MDLMLoss()(model, batch)
    gradients = torch.autograd.grad(output.loss_sum, list(model.parameters()))

    if "mask_beta" in options:
        assert batch["loss_weights"].tolist() == [1.0] * 9
    expected = slow_loss(model, batch)
    expected_gradients = torch.autograd.grad(expected, list(model.parameters()))

    assert output.num_items == MDLMLoss().num_items(batch) == 81
    # The collator's weights are float32.
    torch.testing.assert_close(output.loss_sum, expected, rtol=1e-9, atol=1e-9)
    # They reach thousands; what was rounded otherwise in the head grows on its way to the first layer.
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-7, atol=1e-8)


def test_padding_on_the_canvas_is_content_and_padding_of_rows_is_not():
    model = make_model(V, 32).double()
    examples = make_examples(4, V, min_target=1)
    batch = MDLMCollator(SpecialIds(V), 32, canvas_length=9, kind="seq2seq")(examples)
    loss = MDLMLoss()(model, batch).loss_sum
    loss.backward()
    assert model.model.embed_tokens.weight.grad[PAD].abs().max() > 0
    wider = {**batch, "input_ids": torch.nn.functional.pad(batch["input_ids"], (0, 3), value=PAD)}
    wider["attention_mask"] = torch.nn.functional.pad(batch["attention_mask"], (0, 3))
    L = batch["input_ids"].shape[1]
    wider["logits_index"] = batch["logits_index"] // L * (L + 3) + batch["logits_index"] % L
    torch.testing.assert_close(
        MDLMLoss()(model, wider).loss_sum, loss.detach(), rtol=1e-5, atol=1e-5, check_dtype=False
    )


@pytest.mark.parametrize("backbone", ["rotary", "dit"])
def test_masks_and_special_ids_have_no_probability_but_the_end_and_padding_do(backbone):
    model = make_model(V, 32, backbone=backbone)
    logits = model(torch.tensor([[8, BOS, MASK, MASK]]), alpha=torch.zeros(1)).logits
    finite = logits.isfinite().all(dim=(0, 1))
    assert finite.tolist() == [i in (PAD, EOS) or i >= FIRST_WORD for i in range(V)]


@pytest.mark.parametrize("schedule", ["log_linear", "cosine"])
@pytest.mark.parametrize("length", [1, 2, 3])
def test_the_bound_is_the_likelihood_at_the_exact_conditionals(length, schedule):
    joint = random_joint(length, seed=length)
    model = TableModel(joint)
    for x, p in joint.items():
        assert exact_nelbo(model, x, schedule) == pytest.approx(-math.log(p), abs=1e-6)


@pytest.mark.parametrize("schedule", ["log_linear", "cosine"])
def test_the_bound_is_at_least_the_likelihood_of_what_the_model_writes(schedule):
    """For a table that no joint law has: the law of its own reverse process against the bound, text by text."""
    model = TableModel()
    law = random_order_law(model, 3)
    gaps = [exact_nelbo(model, x, schedule) + math.log(p) for x, p in law.items()]
    assert min(gaps) > 0
    # The bound is the same whatever the schedule, if the network ignores the time.
    x = (7, 9, 8)
    assert exact_nelbo(model, x, schedule) == pytest.approx(exact_nelbo(model, x), abs=1e-8)
    timed = TableModel(uses_time=True)
    fine = process_law(timed, 2, 300, schedule)
    assert all(exact_nelbo(timed, x, schedule) > -math.log(p) - 0.01 for x, p in fine.items())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"masking": "bernoulli"},
        {"masking": "bernoulli", "noise_schedule": "cosine"},
        {"mask_beta": 2.0},
        {"masking": "bernoulli", "mask_beta": 2.0},
    ],
)
@pytest.mark.parametrize("uses_time", [False, True])
def test_the_loss_is_an_unbiased_estimate_of_the_bound(options, uses_time):
    """Collator and loss together, against all sets of masks and quadrature over the time."""

    class TextOnly(SpecialIds):
        eos_token_id = WORDS[2]  # what the collator appends is then a word of the table

    num, model = 8000, TableModel(uses_time=uses_time)
    texts = [(7, 8), (9, 9)]
    examples = [
        {"input_ids": list(texts[i % 2]), "example_id": i, "epoch": 0, "position": i // 2} for i in range(2 * num)
    ]
    batch = MDLMCollator(TextOnly(10), 16, kind="lm", **options)(examples)
    first_time = 0.0
    if "masking" in options:
        # The variance at small times is infinite: leave them out on both sides.
        first_time = 0.2
        r = mask_probability(options.get("noise_schedule", "log_linear"), first_time)
        for name in {"weights", "loss_weights"} & batch.keys():
            batch[name] *= 1 - batch["alpha"] > r
    output = MDLMLoss()(model, batch)
    schedule = options.get("noise_schedule", "log_linear")
    expected = sum(exact_nelbo(model, (*text, WORDS[2]), schedule, first_time) for text in texts) / 2
    mean, count = output.metrics["sequence_nelbo"]
    squares = output.sequence_nats.double().square().sum()
    error = math.sqrt((squares / count - (mean / count) ** 2) / (count - 1))
    assert abs(mean / count - expected) < 4 * error
    assert error < 0.015 * expected
    if "mask_beta" not in options:
        assert float(output.loss_sum / output.num_items) == pytest.approx(float(mean / count) / 3, rel=1e-5)


def test_the_exact_masking_has_the_smaller_error():
    model = TableModel()
    examples = [{"input_ids": [7, 8], "example_id": i, "epoch": 0, "position": i} for i in range(4000)]
    squares = []
    for masking in ("exact", "bernoulli"):
        batch = MDLMCollator(SpecialIds(10), 16, canvas_length=2, masking=masking, kind="lm")(examples)
        squares.append(float(MDLMLoss()(model, batch).sequence_nats.square().sum()))
    assert squares[0] < squares[1] / 2


def test_loss_is_a_sum_over_sequences_and_metrics_are_pairs():
    model = make_model(V, 32)
    examples = make_examples(6, V, seed=1)
    collator, loss = MDLMCollator(SpecialIds(V), max_length=32, kind="seq2seq"), MDLMLoss()
    whole = loss(model, collator(examples))
    parts = [loss(model, collator([example])) for example in examples]
    torch.testing.assert_close(whole.loss_sum, sum(part.loss_sum for part in parts))
    assert whole.num_items == sum(part.num_items for part in parts)
    for name, (total, count) in whole.metrics.items():
        torch.testing.assert_close(torch.as_tensor(total), torch.as_tensor(sum(p.metrics[name][0] for p in parts)))
        assert int(count) == sum(int(part.metrics[name][1]) for part in parts)


def test_a_batch_without_masks_has_a_loss_of_zero_with_a_gradient():
    model = make_model(V, 32)
    batch = MDLMCollator(SpecialIds(V), 32, kind="seq2seq")(make_examples(2, V))
    batch |= {name: batch[name][:0] for name in ("logits_index", "target_ids", "target_documents")}
    output = MDLMLoss()(model, batch)
    output.loss_sum.backward()
    assert output.loss_sum.item() == 0.0


def test_the_time_matters_to_one_backbone_alone_and_is_asked_for():
    ids = torch.tensor([[8, BOS, MASK, 9]])
    for backbone, matters in (("rotary", False), ("dit", True)):
        model = make_model(V, 32, backbone=backbone)
        logits = [model(ids, alpha=torch.tensor([alpha])).logits[..., FIRST_WORD:] for alpha in (0.1, 0.8)]
        assert torch.equal(*logits) != matters
    with pytest.raises(ValueError, match="The model is conditioned on the time: pass alpha"):
        model(ids)
    with pytest.raises(ValueError, match="backbone must be one of rotary, dit and is 'dti'"):
        MDLMConfig(backbone="dti")


@pytest.mark.parametrize("backbone", ["rotary", "dit"])
def test_packed_segments_equal_separate_sequences(backbone):
    model = make_model(V, 32, backbone=backbone).double()
    documents = [torch.tensor([8, BOS, MASK, 9]), torch.tensor([BOS, MASK, MASK])]
    alpha = torch.tensor([0.4])
    packed = model(
        torch.cat(documents)[None],
        alpha=alpha,
        segment_ids=torch.tensor([list(itertools.chain([0] * 4, [1] * 3))]),
        position_ids=torch.tensor([[0, 1, 2, 3, 0, 1, 2]]),
    ).logits[0]
    separate = torch.cat([model(d[None], alpha=alpha).logits[0] for d in documents])
    torch.testing.assert_close(packed, separate)


def test_packed_documents_have_times_of_their_own(tmp_path):
    case = FamilyCase("mdlm", "model.backbone=dit")
    check_documents_of_a_row(case, case.trainer(tmp_path).loss)
    check_packing(case, tmp_path)


def test_a_network_of_adaptive_norms_without_the_time_is_told_no_noise_in_every_row():
    model = make_model(conditioning="adaln", time_conditioning=False)
    ids, index = torch.full((3, 5), MASK), torch.tensor([0, 7, 14])
    with torch.no_grad():
        logits = model(ids, logits_index=index).logits
        model.config.time_conditioning = True
        expected = model(ids, sigma=torch.zeros(3), logits_index=index).logits
    assert torch.equal(logits, expected)


def test_total_noise_is_the_published_one_and_finite():
    eps, t = 1e-3, torch.linspace(0, 1, 11, dtype=torch.float64)
    torch.testing.assert_close(total_noise(1 - t, eps), -torch.log1p(-(1 - eps) * t))
    assert float(total_noise(torch.zeros(1), eps)) == pytest.approx(-math.log(eps))
