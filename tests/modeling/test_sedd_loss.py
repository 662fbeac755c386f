"""The bound of score entropy diffusion: against enumeration, autograd, and the bounds of other parameterisations."""

import itertools
import math

import pytest
import torch
from torch.nn.functional import cross_entropy

from tests.modeling.naive import BOS, EOS, FIRST_WORD, MASK, PAD, UNK, SpecialIds, make_examples
from tests.modeling.naive_sedd import (
    WORDS,
    TableModel,
    exact_nelbo,
    log_scores,
    make_model,
    random_joint,
    score_entropies,
)
from xlm_hf.modeling.sedd import SEDDCollator, SEDDLoss
from xlm_hf.modeling.sedd.loss_sedd import MaskScores, NoiseScores, RawMaskScores, RawNoiseScores
from xlm_hf.modeling.udlm.loss_udlm import UniformBound

V, N, S = 13, 11, 40
KINDS = {
    (MaskScores, "absorb", True),
    (RawMaskScores, "absorb", False),
    (NoiseScores, "uniform", True),
    (RawNoiseScores, "uniform", False),
}


class WordsAlone(SpecialIds):
    """Noise and texts are of the three words of the table, and what the collator appends is one of them."""

    pad_token_id, unk_token_id, eos_token_id = WORDS


def rows_of_logits():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(S, N, dtype=torch.float64, generator=generator)
    x, z = (torch.randint(N, (S,), generator=generator) for _ in range(2))
    z[::2] = x[::2]
    noise = torch.rand(S, dtype=torch.float64, generator=generator).clamp(min=1e-2, max=0.99)
    return logits, x, z, noise, torch.rand(S, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize(("kind", "kernel", "is_scaled"), sorted(KINDS, key=str))
def test_losses_and_gradients_are_those_of_the_definition_and_autograd(kind, kernel, is_scaled):
    """With an id that is suppressed among the others."""
    logits, x, z, noise, weights = rows_of_logits()
    logits.requires_grad_()
    alpha = (1 - noise)[:, None]
    entropies = score_entropies(log_scores(logits, z, alpha, kernel, is_scaled), x, z, alpha, kernel)
    # Over alpha, the rate in 1 - alpha; at a mask its weights are times 1 - alpha.
    expected = entropies / alpha[:, 0] * (noise if kernel == "absorb" else 1)
    (gradient,) = torch.autograd.grad((weights * expected).sum(), logits)
    filled = torch.cat((logits.detach(), torch.full((S, 1), -torch.inf, dtype=torch.float64)), dim=1)
    of_noise = (z,) if kernel == "uniform" else ()
    losses, _ = kind(x, weights, *of_noise, noise).losses_and_gradient_(filled, N)
    torch.testing.assert_close(losses, expected.detach(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(filled[:, :N], gradient, rtol=1e-10, atol=1e-10)
    assert (filled[:, N] == 0).all()


def test_normalised_scores_of_masks_have_the_cross_entropy():
    """With s = p alpha / (1 - alpha) score entropy is the bound of masked diffusion; without a sum of 1 it is more."""
    logits, x, _, noise, _ = rows_of_logits()
    p = torch.cat((logits.log_softmax(dim=-1), torch.full((S, 1), -torch.inf, dtype=torch.float64)), dim=1)
    ones = torch.ones(S, dtype=torch.float64)
    losses, _ = MaskScores(x, ones, noise).losses_and_gradient_(p + math.log(N), N)
    torch.testing.assert_close(losses, cross_entropy(p, x, reduction="none"))
    more, _ = MaskScores(x, ones, noise).losses_and_gradient_(p + math.log(N) + 0.3, N)
    assert (more > losses).all()


def test_scores_from_a_prediction_have_the_bound_of_uniform_diffusion():
    logits, x, z, noise, _ = rows_of_logits()
    ones, alpha = torch.ones(S, dtype=torch.float64), (1 - noise)[:, None]
    noisy = N * alpha * logits.softmax(dim=-1) + 1 - alpha
    log_s = (noisy / noisy.gather(1, z[:, None])).log()
    losses, _ = RawNoiseScores(x, ones, z, noise).losses_and_gradient_(log_s, N)
    expected, _ = UniformBound(x, ones, z, noise).losses_and_gradient_(logits.clone(), N)
    torch.testing.assert_close(losses, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("is_scaled", [True, False])
@pytest.mark.parametrize("kernel", ["absorb", "uniform"])
@pytest.mark.parametrize("length", [1, 2])
def test_the_bound_is_the_likelihood_at_the_exact_scores(length, kernel, is_scaled):
    joint = random_joint(length, seed=length)
    bounds = exact_nelbo(TableModel(kernel, joint, is_scaled), length)
    torch.testing.assert_close(bounds, -joint.log(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kernel", ["absorb", "uniform"])
@pytest.mark.parametrize("options", [{}, {"noise_beta": 2.0}])
def test_the_loss_is_an_unbiased_estimate_of_the_bound(options, kernel):
    """Collator and loss together, against all noisy canvases and quadrature over the time; first by 10^5 draws."""
    num, texts = 10_000 if options else 50_000, [(7, 8), (9, 9)]
    examples = [
        {"input_ids": list(texts[i % 2]), "example_id": i, "epoch": 0, "position": i // 2} for i in range(2 * num)
    ]
    model = TableModel(kernel)
    batch = SEDDCollator(WordsAlone(10), 16, kind="lm", kernel=kernel, **options)(examples)
    output = SEDDLoss()(model, batch)
    bounds = exact_nelbo(model, 3)
    expected = float(bounds[0 * 9 + 1 * 3 + 2] + bounds[2 * 9 + 2 * 3 + 2]) / 2
    mean, count = output.metrics["sequence_nelbo"]
    squares = output.sequence_nats.double().square().sum()
    error = math.sqrt((squares / count - (mean / count) ** 2) / (count - 1))
    assert abs(mean / count - expected) < 4 * error
    assert error < (0.05 if options else 0.03) * expected
    assert output.sequence_tokens.unique().tolist() == [3]
    if not options:
        assert float(output.loss_sum / output.num_items) == pytest.approx(float(mean / count) / 3, rel=1e-5)
    else:
        assert output.loss_sum.isfinite()


def test_raw_scores_of_uniform_noise_report_no_likelihood():
    batch = SEDDCollator(SpecialIds(V), 32, kind="seq2seq", kernel="uniform")(make_examples(4, V))
    output = SEDDLoss()(make_model(V, 32, kernel="uniform", scaled_scores=False), batch)
    assert output.sequence_nats is None
    assert SEDDLoss()(make_model(V, 32, kernel="uniform"), batch).sequence_nats is not None


def test_masks_and_special_ids_have_no_score_but_the_end_and_padding_do():
    model, ids = make_model(V, 32), torch.tensor([[8, BOS, MASK, 10]])
    finite = model(ids, alpha=torch.zeros(1)).logits.isfinite().all(dim=(0, 1))
    assert finite.tolist() == [i in (PAD, EOS, UNK) or i >= FIRST_WORD for i in range(V)]
    with pytest.raises(ValueError, match="The model is conditioned on the time: pass alpha"):
        model(ids)


@pytest.mark.parametrize("kernel", ["absorb", "uniform"])
def test_a_whole_loss_equals_that_of_all_logits(kernel):
    model = make_model(V, 32, kernel=kernel).double()
    batch = SEDDCollator(SpecialIds(V), 32, canvas_length=9, kind="seq2seq", kernel=kernel)(make_examples(9, V))
    batch["weights"] *= (batch["noise"] > 1e-2) & (batch["noise"] < 0.99)
    writable = [i for i in range(V) if i not in model.config.suppressed_ids]
    number = torch.full((V,), -1)
    number[writable] = torch.arange(len(writable))
    logits = model(batch["input_ids"], batch["attention_mask"], alpha=batch["alpha"]).logits.flatten(0, 1)
    logits, documents = logits[batch["logits_index"]][:, writable], batch["target_documents"]
    x, z = number[batch["target_ids"]], number[batch["input_ids"].flatten()[batch["logits_index"]]]
    noise = batch["noise"][documents].double()
    alpha = (1 - noise)[:, None].clamp(1e-6, 1 - 1e-7)
    rates = score_entropies(log_scores(logits, z.clamp(min=0), alpha, kernel, True), x, z.clamp(min=0), alpha, kernel)
    rates = rates / alpha[:, 0] * (noise if kernel == "absorb" else 1)
    output = SEDDLoss()(model, batch)
    torch.testing.assert_close(output.loss_sum, (batch["weights"][documents] * rates).sum(), rtol=1e-6, atol=1e-6)
    assert output.num_items == 81


@pytest.mark.parametrize("kernel", ["absorb", "uniform"])
@pytest.mark.parametrize("options", [{}, {"noise_beta": 2.0}])
def test_ids_that_nobody_writes_change_no_loss(options, kernel):
    """More special tokens: neither the noise, nor N, nor the bound."""

    class MoreIds(SpecialIds):
        all_special_ids = [*range(FIRST_WORD), V, V + 1, V + 2]

    small = make_model(V, 32, kernel=kernel)
    large = make_model(V + 3, 32, kernel=kernel, suppress_tokens=[*range(6), V, V + 1, V + 2])
    weights = small.state_dict()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = torch.cat((weights[name], torch.ones(3, 32)))
    large.load_state_dict(weights)
    batches = [
        SEDDCollator(ids, 32, kind="seq2seq", canvas_length=9, kernel=kernel, **options)(make_examples(6, V))
        for ids in (SpecialIds(V), MoreIds(V + 3))
    ]
    assert torch.equal(batches[0]["input_ids"], batches[1]["input_ids"])
    outputs = [SEDDLoss()(*pair) for pair in zip((small, large), batches, strict=True)]
    torch.testing.assert_close(outputs[0].loss_sum, outputs[1].loss_sum)
    torch.testing.assert_close(outputs[0].sequence_nats, outputs[1].sequence_nats)


def test_in_single_precision_and_a_large_vocabulary_the_bound_is_right_to_one_percent():
    """Value and gradient of a row, of scores as an initial network has them and of sharp ones."""
    generator, size = torch.Generator().manual_seed(0), 50_257
    noise = torch.tensor([1e-3, 0.01, 0.5, 0.99, 0.999] * 2, dtype=torch.float64)
    x = torch.full_like(noise, 5, dtype=torch.int64)
    z = x.clone()
    z[5:] = 77
    for (kind, kernel, is_scaled), spread in itertools.product(sorted(KINDS, key=str), (0.1, 1.0)):
        logits = spread * torch.randn(len(noise), size, dtype=torch.float64, generator=generator)
        if kernel == "uniform" and not is_scaled:
            # Ratios of noise, not of masks.
            logits -= spread**2 / 2
        results = []
        for dtype in (torch.float64, torch.float32):
            filled, of_noise = logits.to(dtype, copy=True), (z,) if kernel == "uniform" else ()
            row_function = kind(x, torch.ones(len(x), dtype=dtype), *of_noise, noise.to(dtype))
            losses, _ = row_function.losses_and_gradient_(filled, size)
            results.append((losses.double(), filled.double().norm(dim=-1)))
        (exact, exact_norms), (losses, norms) = results
        assert ((losses - exact).abs() <= 0.01 * exact.abs()).all(), (kind, spread)
        assert ((norms - exact_norms).abs() <= 0.01 * exact_norms).all(), (kind, spread)
