"""The bound of uniform diffusion: against its slow twin, enumeration, and autograd."""

import itertools
import math

import pytest
import torch
from torch.nn.functional import one_hot

from tests.modeling.canvas_checks import check_unwritten_ids
from tests.modeling.naive import BOS, EOS, FIRST_WORD, PAD, UNK, SpecialIds, make_examples
from tests.modeling.naive_udlm import (
    WORDS,
    TableModel,
    canvases,
    chain_law,
    exact_nelbo,
    make_model,
    random_joint,
    rates,
    slow_loss,
)
from tests.objectives.test_collation import check_documents_of_a_row
from xlm_hf.modeling.udlm import UDLMCollator, UDLMConfig, UDLMLoss
from xlm_hf.modeling.udlm.loss_udlm import DenoiserBound, LeaveOneOutCrossEntropy
from xlm_hf.testing import FamilyCase

V = 13


class WordsAlone(SpecialIds):
    """Noise and texts are of the three words of the table, and what the collator appends is one of them."""

    pad_token_id, unk_token_id, eos_token_id = WORDS


@pytest.mark.parametrize("kind", ["seq2seq", "infill"])
@pytest.mark.parametrize("prediction_type", ["leave_one_out", "denoiser"])
@pytest.mark.parametrize("options", [{}, {"noise_beta": 3.0}, {"noise_schedule": "cosine", "noising": "bernoulli"}])
def test_loss_and_gradients_equal_those_of_the_slow_twin(prediction_type, options, kind):
    model = make_model(V, 32, prediction_type=prediction_type).double()
    examples = make_examples(9, V, min_target=2)
    if kind == "infill":
        examples = [{**e, "input_ids": [2, *e["target_ids"][1:-1], 2]} for e in examples]
    batch = UDLMCollator(SpecialIds(V), 32, canvas_length=9, kind=kind, **options)(examples)
    # At either end the twin's plain sums lose digits.
    middle = (batch["noise"] > 1e-3) & (batch["noise"] < 0.999)
    for name in {"weights", "loss_weights"} & batch.keys():
        batch[name] *= middle
    output = UDLMLoss()(model, batch)
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(output.loss_sum, parameters)
    expected = slow_loss(model, batch)
    expected_gradients = torch.autograd.grad(expected, parameters)
    assert output.num_items == UDLMLoss().num_items(batch) == (81 if kind == "seq2seq" else 18)
    torch.testing.assert_close(output.loss_sum, expected, rtol=1e-9, atol=1e-9)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-7, atol=1e-8)
    assert (output.sequence_nats is None) == ("noise_beta" in options)


@pytest.mark.parametrize("kind", [DenoiserBound, LeaveOneOutCrossEntropy])
def test_gradients_of_the_row_functions_are_those_of_autograd(kind):
    generator = torch.Generator().manual_seed(0)
    N, S = 11, 40
    logits = 3 * torch.randn(S, N, dtype=torch.float64, generator=generator)
    x, z = (torch.randint(N, (S,), generator=generator) for _ in range(2))
    z[::2] = x[::2]
    noise = torch.rand(S, dtype=torch.float64, generator=generator).clamp(min=1e-3)
    weights = torch.rand(S, dtype=torch.float64, generator=generator)
    logits.requires_grad_()
    evidence = torch.log1p(N * (1 - noise) / noise)[:, None] * one_hot(z, N)
    if kind is DenoiserBound:
        expected = rates((logits - evidence).softmax(dim=-1), x, z, (1 - noise)[:, None])
    else:
        expected = -(logits + evidence).log_softmax(dim=-1).gather(1, x[:, None])[:, 0]
    (gradient,) = torch.autograd.grad((weights * expected).sum(), logits)
    filled = logits.detach().clone()
    losses, _ = kind(x, weights, z, noise).losses_and_gradient_(filled, N)
    torch.testing.assert_close(losses, expected.detach(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(filled, gradient, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("length", [1, 2, 3])
def test_the_bound_is_the_likelihood_at_the_exact_leave_one_out_conditionals(length):
    joint = random_joint(length, seed=length)
    torch.testing.assert_close(exact_nelbo(TableModel(joint), length), -joint.log(), atol=1e-6, rtol=0)


def test_with_the_posterior_by_all_tokens_it_is_not():
    """What a token says of its clean one would count twice."""
    joint = random_joint(2, seed=2)
    model = TableModel(joint)
    by_others = model.table

    def by_all(z, alpha):
        table = by_others(z, alpha) * (1 + (3 * alpha / (1 - alpha))[:, None, None] * one_hot(z, 3))
        return table / table.sum(dim=-1, keepdim=True)

    model.table = by_all
    assert (joint * (exact_nelbo(model, 2) + joint.log())).sum() > 0.3


def test_the_bound_is_at_least_the_likelihood_of_what_the_model_writes():
    """For a table that no joint law has: the law of its own reverse process in many steps against the bound."""
    model = TableModel()
    law = chain_law(model, 2, [1 - i / 400 for i in range(401)])
    gaps = exact_nelbo(model, 2) + law.log()
    assert gaps.min() > -0.01
    assert gaps.max() > 0.1


@pytest.mark.parametrize("prediction_type", ["leave_one_out", "denoiser"])
@pytest.mark.parametrize(
    "options", [{}, {"noising": "bernoulli"}, {"noising": "bernoulli", "noise_schedule": "cosine"}]
)
def test_the_loss_is_an_unbiased_estimate_of_the_bound(options, prediction_type):
    """Collator and loss together against all noisy canvases and quadrature over the time; first by 10^5 draws."""
    num, texts = 10_000 if options else 50_000, [(7, 8), (9, 9)]
    model = TableModel(prediction_type=prediction_type)
    examples = [
        {"input_ids": list(texts[i % 2]), "example_id": i, "epoch": 0, "position": i // 2} for i in range(2 * num)
    ]
    batch = UDLMCollator(WordsAlone(10), 16, kind="lm", **options)(examples)
    output = UDLMLoss()(model, batch)
    bounds = exact_nelbo(model, 3)
    expected = float(bounds[0 * 9 + 1 * 3 + 2] + bounds[2 * 9 + 2 * 3 + 2]) / 2
    mean, count = output.metrics["sequence_nelbo"]
    squares = output.sequence_nats.double().square().sum()
    error = math.sqrt((squares / count - (mean / count) ** 2) / (count - 1))
    assert abs(mean / count - expected) < 4 * error
    assert error < 0.02 * expected
    assert output.sequence_tokens.unique().tolist() == [3]
    assert output.sequence_given["length"].all()
    assert float(output.loss_sum / output.num_items) == pytest.approx(float(mean / count) / 3, rel=1e-5)


def test_denoising_has_the_same_minimiser_as_the_bound():
    """The gradient of the cross-entropy is 0 at the exact leave-one-out conditionals, at every noise alike."""
    joint = random_joint(2, seed=3)
    z, alpha = canvases(2), torch.full((9,), 0.4, dtype=torch.float64)
    predicted = TableModel(joint).table(z, alpha)
    total = torch.zeros(9, 3, dtype=torch.float64)
    for x, p in zip(canvases(2), joint, strict=True):
        weights = p * (0.4 * (z == x).double() + 0.2).prod(dim=-1)
        logits = predicted[:, 0].log()
        kind = LeaveOneOutCrossEntropy(x[0].expand(9), weights, z[:, 0], torch.full((9,), 0.6, dtype=torch.float64))
        kind.losses_and_gradient_(logits, 3)
        total += logits
    torch.testing.assert_close(total, torch.zeros_like(total), atol=1e-12, rtol=0)


@pytest.mark.parametrize("options", [{}, {"noise_beta": 2.0}])
def test_ids_that_nobody_writes_change_no_loss(options):
    check_unwritten_ids(make_model, UDLMCollator, UDLMLoss(), V, **options)


def test_in_single_precision_and_a_large_vocabulary_the_bound_is_right_to_one_percent():
    generator, N = torch.Generator().manual_seed(0), 50_257
    for noise, peak in itertools.product((1e-3, 0.01, 0.5, 0.99, 0.999), (0.0, 12.0, 25.0)):
        logits = torch.randn(2, N, dtype=torch.float64, generator=generator)
        logits[:, 5] += peak
        x, z = torch.tensor([5, 5]), torch.tensor([5, 77])
        expected = rates(logits.softmax(dim=-1), x, z, torch.full((2, 1), 1 - noise, dtype=torch.float64))
        shown = logits + torch.log1p(torch.tensor(N * (1 - noise) / noise)) * one_hot(z, N)
        losses, _ = DenoiserBound(x, torch.ones(2), z, torch.full((2,), noise)).losses_and_gradient_(shown.float(), N)
        torch.testing.assert_close(losses.double(), expected, rtol=0.01, atol=0.01)


def test_the_time_is_asked_for_and_matters_unless_it_is_not_told():
    ids = torch.tensor([[8, BOS, 9, 10]])
    for options, matters in (({}, True), ({"conditioning": "token"}, True), ({"time_conditioning": False}, False)):
        model = make_model(V, 32, **options)
        logits = [model(ids, alpha=torch.tensor([alpha])).logits[..., FIRST_WORD:] for alpha in (0.1, 0.8)]
        assert torch.equal(*logits) != matters
    with pytest.raises(ValueError, match="The model is conditioned on the time: pass alpha"):
        make_model(V, 32)(ids)
    assert not UDLMConfig(conditioning="none").time_conditioning
    finite = make_model(V, 32)(ids, alpha=torch.zeros(1)).logits.isfinite().all(dim=(0, 1))
    assert finite.tolist() == [i in (PAD, EOS, UNK) or i >= FIRST_WORD for i in range(V)]


def test_given_tokens_are_told_that_they_have_no_noise():
    model, ids = make_model(V, 32), torch.tensor([[8, 9, 10, 11]])
    is_given = torch.tensor([[True, False, True, False]])
    of_tokens = torch.tensor([[1.0, 0.3, 1.0, 0.3]])
    logits = [
        model(ids, alpha=torch.tensor([0.3]), is_given=is_given).logits,
        model(ids, alpha=of_tokens).logits,
        model(ids, alpha=torch.tensor([0.3])).logits,
    ]
    assert torch.equal(logits[0], logits[1])
    assert not torch.equal(logits[0], logits[2])


def test_a_batch_without_targets_has_a_loss_of_zero_with_a_gradient():
    model = make_model(V, 32)
    batch = UDLMCollator(SpecialIds(V), 32, kind="seq2seq")(make_examples(2, V))
    batch |= {name: batch[name][:0] for name in ("logits_index", "target_ids", "target_documents")}
    output = UDLMLoss()(model, batch)
    output.loss_sum.backward()
    assert output.loss_sum.item() == 0.0


def test_packed_documents_have_times_of_their_own(tmp_path):
    case = FamilyCase("udlm")
    check_documents_of_a_row(case, case.trainer(tmp_path).loss)
