"""The bound of GIDD: against its slow twin, enumeration, its limits and autograd."""

import math

import numpy as np
import pytest
import torch
from torch.nn.functional import one_hot

from tests.modeling.canvas_checks import check_unwritten_ids
from tests.modeling.naive import BOS, EOS, FIRST_WORD, MASK, PAD, UNK, SpecialIds, make_examples
from tests.modeling.naive_gidd import (
    WORDS,
    TableModel,
    chain_law,
    divergences,
    exact_nelbo,
    make_model,
    of_noise,
    random_joint,
    rates,
    shares,
    slow_loss,
    texts,
)
from tests.objectives.test_collation import check_documents_of_a_row
from xlm_hf.modeling.gidd import GIDDCollator, GIDDConfig, GIDDLoss
from xlm_hf.modeling.gidd.collator_gidd import bound_weights
from xlm_hf.modeling.gidd.loss_gidd import Denoising
from xlm_hf.objectives.row_functions import HybridBound
from xlm_hf.testing import FamilyCase

V = 13
NOISES = [{}, {"uniform_share": 0.0}, {"uniform_share": 0.5, "gamma": 2.0}]


class WordsAlone(SpecialIds):
    """Noise and texts are of the three words of the table, and what the collator appends is one of them."""

    pad_token_id, unk_token_id, eos_token_id = WORDS


@pytest.mark.parametrize("kind", ["seq2seq", "infill"])
@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("options", [{}, *({"loss_weighting": w, "noise_beta": 3.0} for w in ("even", "denoising"))])
def test_loss_and_gradients_equal_those_of_the_slow_twin(options, noise, kind):
    model = make_model(V, 32, **noise).double()
    examples = make_examples(9, V, min_target=2)
    if kind == "infill":
        examples = [{**e, "input_ids": [2, *e["target_ids"][1:-1], 2]} for e in examples]
    batch = GIDDCollator(SpecialIds(V), 32, canvas_length=9, kind=kind, **noise, **options)(examples)
    output = GIDDLoss()(model, batch)
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(output.loss_sum, parameters)
    expected = slow_loss(model, batch)
    expected_gradients = torch.autograd.grad(expected, parameters)
    assert output.num_items == GIDDLoss().num_items(batch) == (81 if kind == "seq2seq" else 18)
    torch.testing.assert_close(output.loss_sum, expected, rtol=1e-7, atol=1e-8)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        assert (gradient - expected_gradient).norm() <= 1e-8 + 1e-7 * expected_gradient.norm()
    # Whatever is trained, the bound is reported.
    assert (output.sequence_nats is None) == ("weights" not in batch)
    if "weights" not in batch:
        return
    batch.pop("loss_weights", None)
    torch.testing.assert_close(output.sequence_nats.sum().double(), slow_loss(model, batch), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("noise", NOISES)
def test_the_weights_are_those_of_the_definition(noise):
    """rho(z) / q_t(z | x) in closed form, against derivatives by autograd; and those published."""
    config = GIDDConfig(**noise)
    t = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    predicted = torch.full((99, 3), 0.2, dtype=torch.float64)
    predicted[:, 0] = 0.6
    alpha, _, total = shares(t, config)
    x = torch.zeros(99, dtype=torch.int64)
    for z in (0, 1, 3):
        if z == 1 and config.uniform_share == 0:
            continue
        state = torch.full((99,), z)
        weights = bound_weights(
            t.numpy(), (total / 3 / (alpha + total / 3)).numpy(), config.gamma, np.full(99, z == 3), np.full(99, z == 0)
        )
        expected = rates(predicted, x, state, t, config) / divergences(predicted, x, state, alpha, total / 3)
        torch.testing.assert_close(torch.from_numpy(weights), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("uniform_share", [1e-3, 0.2, 0.9])
def test_gradients_are_those_of_autograd(uniform_share):
    generator = torch.Generator().manual_seed(0)
    N, S = 11, 60
    logits = 3 * torch.randn(S, N + 1, dtype=torch.float64, generator=generator)
    logits[:, N] = -torch.inf
    x, z = torch.randint(N, (S,), generator=generator), torch.randint(N + 1, (S,), generator=generator)
    z[::3], z[1::3] = x[::3], N
    t = torch.rand(S, dtype=torch.float64, generator=generator).clamp(1e-3, 1 - 1e-3)
    alpha, _, total = shares(t, GIDDConfig(uniform_share=uniform_share))
    weights = torch.rand(S, dtype=torch.float64, generator=generator)
    free = logits[:, :N].clone().requires_grad_()
    expected = divergences(free.softmax(dim=-1), x, z, alpha, total / N)
    (gradient,) = torch.autograd.grad((weights * expected).sum(), free)
    losses, _ = HybridBound(x, weights, z, alpha, total / N).losses_and_gradient_(logits, N)
    torch.testing.assert_close(losses, expected.detach(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(logits[:, :N], gradient, rtol=1e-10, atol=1e-10)
    assert (logits[:, N] == 0).all()


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("length", [1, 2])
def test_the_bound_is_the_likelihood_at_the_exact_leave_one_out_conditionals(length, noise):
    joint = random_joint(length, seed=length)
    bounds = exact_nelbo(TableModel(joint, **noise), length)
    torch.testing.assert_close(bounds, -joint.log(), atol=1e-6, rtol=0)


def test_it_is_also_for_three_tokens():
    joint = random_joint(3, seed=3)
    torch.testing.assert_close(exact_nelbo(TableModel(joint), 3, 30), -joint.log(), atol=2e-3, rtol=0)


def test_with_the_posterior_by_all_tokens_it_is_not():
    """What a token says of its clean one would count twice."""
    joint = random_joint(2, seed=2)
    model = TableModel(joint, uniform_share=0.5)
    by_others = model.table

    def by_all(z, t):
        evidence = of_noise(torch.arange(3), z[..., None], t[:, None, None], model.config)
        table = by_others(z, t) * evidence
        return table / table.sum(dim=-1, keepdim=True)

    model.table = by_all
    assert (joint * (exact_nelbo(model, 2) + joint.log())).sum() > 0.1


def test_the_bound_is_at_least_the_likelihood_of_what_the_model_writes():
    """For a table that no joint law has: the law of its own reverse process in many steps against the bound."""
    model = TableModel()
    law = chain_law(model, 2, [1 - i / 400 for i in range(401)])
    written = torch.tensor([law[4 * x[0] + x[1]] for x in texts(2).tolist()])
    assert float(written.sum()) == pytest.approx(1)
    gaps = exact_nelbo(model, 2) + written.log()
    assert gaps.min() > -0.01
    assert gaps.max() > 0.1


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("options", [{}, {"loss_weighting": "dynamic"}])
def test_the_reported_bound_is_unbiased(options, noise):
    """Collator and loss together against all noisy canvases and quadrature over the time; first by 10^5 draws."""
    num, pair = 10_000 if options or noise else 50_000, [(7,), (9,)]
    model = TableModel(**noise)
    examples = [
        {"input_ids": list(pair[i % 2]), "example_id": i, "epoch": 0, "position": i // 2} for i in range(2 * num)
    ]
    batch = GIDDCollator(WordsAlone(10), 16, kind="lm", **noise, **options)(examples)
    output = GIDDLoss()(model, batch)
    bounds = exact_nelbo(model, 2)
    expected = float(bounds[0 * 3 + 2] + bounds[2 * 3 + 2]) / 2
    mean, count = output.metrics["sequence_nelbo"]
    squares = output.sequence_nats.double().square().sum()
    error = math.sqrt((squares / count - (mean / count) ** 2) / (count - 1))
    assert abs(mean / count - expected) < 4 * error
    assert error < (0.08 if options else 0.03) * expected
    assert output.sequence_tokens.unique().tolist() == [2]
    assert output.sequence_given["length"].all()
    if not options:
        assert float(output.loss_sum / output.num_items) == pytest.approx(float(mean / count) / 2, rel=1e-5)


def test_without_uniform_noise_it_is_masked_diffusion():
    """-log p at masks over t, arXiv 2406.07524, equation 10; nothing elsewhere. A trace of noise changes little."""
    losses = []
    for share in (0.0, 1e-8):
        model, noise = make_model(V, 32, uniform_share=share).double(), {"uniform_share": share}
        # The limit takes longer where a prediction is 0 in all but name.
        model.lm_head.weight.data *= 0.01
        batch = GIDDCollator(SpecialIds(V), 32, kind="seq2seq", canvas_length=9, **noise)(make_examples(40, V))
        losses.append(GIDDLoss()(model, batch).sequence_nats)
    masked = (batch["input_ids"].flatten()[batch["logits_index"]] == MASK).nonzero()[:, 0]
    logits = model(batch["input_ids"], batch["attention_mask"], timesteps=batch["timesteps"]).logits.flatten(0, 1)
    log_p = logits[batch["logits_index"][masked]].log_softmax(dim=-1)
    documents = batch["target_documents"][masked]
    nats = -log_p.gather(1, batch["target_ids"][masked, None])[:, 0] / batch["timesteps"][documents]
    # The density of t is that of v^4.
    expected = torch.zeros(40).index_add(0, documents, (nats * 4 * batch["timesteps"][documents] ** 0.75).float())
    torch.testing.assert_close(losses[0], expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(losses[1], expected, rtol=1e-3, atol=1e-3)


def test_without_masks_it_is_uniform_diffusion():
    """As p_u goes to 1: the rate by the time 1 - alpha is that of arXiv 2412.10193, equation 16."""
    N, config = 5, GIDDConfig(uniform_share=1 - 1e-7)
    generator = torch.Generator().manual_seed(1)
    predicted = torch.randn(2, N, dtype=torch.float64, generator=generator).softmax(dim=-1)
    x, z = torch.tensor([1, 1]), torch.tensor([1, 3])
    odds = 2 * config.uniform_share / (1 - config.uniform_share)
    for alpha in (0.1, 0.5, 0.9):
        t = torch.full((2,), ((1 / alpha - 1) / odds) ** 2, dtype=torch.float64, requires_grad=True)
        assert shares(t, config)[0][0].item() == pytest.approx(alpha, rel=1e-5)
        slope = torch.autograd.grad(shares(t, config)[0].sum(), t)[0]
        alphas, _, total = (share.detach() for share in shares(t, config))
        share = (total / N / (alphas + total / N)).numpy()
        weights = bound_weights(t.detach().numpy(), share, 1.0, np.zeros(2, bool), (x == z).numpy())
        ours, logits = torch.from_numpy(weights) / -slope, predicted.log()
        ours = ours * HybridBound(x, torch.ones(2), z, alphas, total / N).losses_and_gradient_(logits, N)[0]
        true, seen = N * alpha * one_hot(x, N) + 1 - alpha, N * alpha * predicted + 1 - alpha
        true_z, seen_z = true.gather(1, z[:, None]), seen.gather(1, z[:, None])
        logs = (true / true_z * torch.log(seen_z * true / (seen * true_z))).sum(dim=-1)
        expected = (N / seen_z[:, 0] - N / true_z[:, 0] + logs) / (N * alpha)
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)


def test_the_best_prediction_is_that_of_the_bound_unless_weights_are_cut_off():
    """The gradient at the exact leave-one-out conditionals, at one time: 0 but for "clip"."""
    config, joint = GIDDConfig(uniform_share=0.5), random_joint(2, seed=3)
    model, t = TableModel(joint, uniform_share=0.5), 0.4
    z = torch.tensor([[a, b] for a in range(4) for b in range(4)])
    predicted = model.table(z, torch.full((16,), t, dtype=torch.float64))
    alpha, _, total = shares(torch.full((16,), t, dtype=torch.float64), config)
    evidence = torch.log1p(alpha / (total / 3)).masked_fill(z[:, 0] == 3, 0.0)
    sizes = {}
    for weighting in ("dynamic", "even", "denoising", "clip"):
        collator = GIDDCollator(WordsAlone(10), 16, kind="lm", uniform_share=0.5, loss_weighting=weighting)
        gradient = torch.zeros(16, 4, dtype=torch.float64)
        for x, p in zip(texts(2), joint, strict=True):
            times, share = np.full(16, t), (total / 3 / (alpha + total / 3)).numpy()
            of_bound = bound_weights(times, share, 1.0, (z[:, 0] == 3).numpy(), (z[:, 0] == x[0]).numpy())
            weights = p * of_noise(x, z, torch.tensor(t, dtype=torch.float64), config).prod(dim=-1)
            logits = torch.cat((predicted[:, 0].log(), torch.full((16, 1), -torch.inf)), dim=1)
            if weighting == "denoising":
                row_function = Denoising(x[0].expand(16), weights, z[:, 0], evidence)
            else:
                weights = weights * torch.from_numpy(collator._training_weights(times, of_bound))
                row_function = HybridBound(x[0].expand(16), weights, z[:, 0], alpha, total / 3)
            row_function.losses_and_gradient_(logits, 3)
            gradient += logits
        sizes[weighting] = float(gradient.abs().max())
    assert max(sizes["dynamic"], sizes["even"], sizes["denoising"]) < 1e-12
    assert sizes["clip"] > 1e-4


def test_training_weights_are_those_of_their_names():
    """A mask counts 2 by "dynamic", any token at most 2 by "clip", 1 / (1 - t) by "even", and 1 by "denoising"."""
    batches = {
        weighting: GIDDCollator(SpecialIds(V), 32, kind="lm", loss_weighting=weighting)(
            [{**e, "input_ids": e["target_ids"]} for e in make_examples(60, V)]
        )
        for weighting in ("clip", "dynamic", "even", "denoising")
    }
    one = batches["clip"]
    masked = one["input_ids"].flatten()[one["logits_index"]] == MASK
    assert one["timesteps"].mean() == pytest.approx(0.5, abs=0.1)
    torch.testing.assert_close(batches["dynamic"]["loss_weights"][masked], torch.full((int(masked.sum()),), 2.0))
    assert (batches["denoising"]["loss_weights"] == 1).all()
    t = one["timesteps"][one["target_documents"]][masked]
    torch.testing.assert_close(batches["even"]["loss_weights"][masked], 1 / (1 - t), rtol=1e-3, atol=0)
    torch.testing.assert_close(one["loss_weights"], one["weights"].clamp(max=2))
    assert (one["loss_weights"][masked] == 2).all()


@pytest.mark.parametrize("options", [{}, {"loss_weighting": "denoising"}])
def test_ids_that_nobody_writes_change_no_loss(options):
    check_unwritten_ids(make_model, GIDDCollator, GIDDLoss(), V, **options)


def test_in_single_precision_and_a_large_vocabulary_the_bound_is_right_to_one_percent():
    generator, N, config = torch.Generator().manual_seed(0), 50_257, GIDDConfig()
    for t in (1e-3, 0.01, 0.5, 0.99, 0.999):
        for peak in (0.0, 12.0, 25.0):
            logits = torch.randn(3, N, dtype=torch.float64, generator=generator)
            logits[:, 5] += peak
            x, z = torch.tensor([5, 5, 5]), torch.tensor([5, 77, N])
            alpha, _, total = shares(torch.full((3,), t, dtype=torch.float64), config)
            expected = divergences(logits.softmax(dim=-1), x, z, alpha, total / N)
            shown = torch.cat((logits.float(), torch.full((3, 1), -torch.inf)), dim=1)
            bound = HybridBound(x, torch.ones(3), z, alpha.float(), (total / N).float())
            losses, _ = bound.losses_and_gradient_(shown, N)
            weights = bound_weights(
                np.full(3, t), (total / N / (alpha + total / N)).numpy(), 1.0, np.array([0, 0, 1]), np.array([1, 0, 0])
            )
            weights = torch.from_numpy(weights)
            torch.testing.assert_close(weights * losses.double(), weights * expected, rtol=0.01, atol=0.01)


def test_the_time_is_asked_for_and_matters_unless_it_is_not_told():
    ids = torch.tensor([[8, BOS, 9, 10]])
    for options, matters in (({}, True), ({"conditioning": "token"}, True), ({"conditioning": "none"}, False)):
        model = make_model(V, 32, **options)
        logits = [model(ids, timesteps=torch.tensor([t])).logits[..., FIRST_WORD:] for t in (0.1, 0.8)]
        assert torch.equal(*logits) != matters
    with pytest.raises(ValueError, match="The model is conditioned on the time: pass timesteps"):
        make_model(V, 32)(ids)
    finite = make_model(V, 32)(ids, timesteps=torch.zeros(1)).logits.isfinite().all(dim=(0, 1))
    assert finite.tolist() == [i in (PAD, EOS, UNK) or i >= FIRST_WORD for i in range(V)]


def test_given_tokens_are_told_that_they_have_no_noise():
    model, ids = make_model(V, 32), torch.tensor([[8, 9, 10, 11]])
    is_given = torch.tensor([[True, False, True, False]])
    logits = [
        model(ids, timesteps=torch.tensor([0.7]), is_given=is_given).logits,
        model(ids, timesteps=torch.tensor([[0.0, 0.7, 0.0, 0.7]])).logits,
        model(ids, timesteps=torch.tensor([0.7])).logits,
    ]
    assert torch.equal(logits[0], logits[1])
    assert not torch.equal(logits[0], logits[2])


def test_packed_documents_have_times_of_their_own(tmp_path):
    case = FamilyCase("gidd")
    check_documents_of_a_row(case, case.trainer(tmp_path).loss)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"uniform_share": 1.0}, r"uniform_share must be in \[0, 1\) and is 1.0"),
        ({"gamma": 2.5}, r"gamma must be in \(0, 2\] and is 2.5"),
        ({"noise_schedule": "geometric"}, "does not run from data"),
    ],
)
def test_noise_that_is_none_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        GIDDConfig(**options)


def test_weightings_are_checked():
    for options, message in (
        ({"loss_weighting": "dynamc"}, "loss_weighting must be one of"),
        ({"noise_beta": 2.0}, "loss_weighting 'bound'"),
        ({"noise_beta": 0.0, "loss_weighting": "clip"}, "greater than 0"),
    ):
        with pytest.raises(ValueError, match=message):
            GIDDCollator(SpecialIds(V), 32, kind="lm", **options)
