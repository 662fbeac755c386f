"""The bound of Gaussian diffusion: against its slow twin, quadrature, autograd and recorded results."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers.modeling_outputs import BaseModelOutput

from tests.modeling.naive import BOS, PAD, SpecialIds, make_examples
from tests.modeling.naive_plaid import WORDS, exact_model, exact_nelbo, make_model, slow_loss
from tests.objectives.test_collation import check_documents_of_a_row
from xlm_hf.modeling.plaid import PlaidCollator, PlaidConfig, PlaidForGaussianDiffusion, PlaidLoss
from xlm_hf.modeling.plaid.loss_plaid import VectorError
from xlm_hf.modeling.plaid.modeling_plaid import expected_vectors
from xlm_hf.modeling.plaid.noise_plaid import NoiseSchedule
from xlm_hf.modules.rotary_transformer import take
from xlm_hf.objectives import head_operator
from xlm_hf.objectives.head_operator import IGNORED_ID, head_losses
from xlm_hf.testing import FamilyCase

V = 13
RECORDED = Path(__file__).parents[1] / "fixtures" / "published" / "plaid.safetensors"
TRIANGLE = [[math.cos(a), math.sin(a)] for a in (0.0, 2.1, 4.0)]
TWO_WORDS = torch.tensor([0.42, 0.18, 0.04, 0.36], dtype=torch.float64)
THREE_WORDS = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)


class WordsAlone(SpecialIds):
    """Texts are of the words of the table, and what the collator appends is one of them."""

    pad_token_id, unk_token_id, eos_token_id = WORDS


@pytest.mark.parametrize(
    ("kind", "options", "config"),
    [
        ("seq2seq", {"self_conditioning": 0.5}, {"noise_schedule": "learnt"}),
        ("infill", {"reconstruction_share": 0.5}, {"noise_schedule": "linear"}),
        ("seq2seq", {"noise_beta": 3.0}, {"noise_schedule": "linear", "self_conditioning": False}),
    ],
)
def test_loss_and_gradients_equal_those_of_the_slow_twin(kind, options, config):
    model = make_model(V, 32, **config).double()
    examples = make_examples(9, V, min_target=2)
    if kind == "infill":
        examples = [{**e, "input_ids": [2, *e["target_ids"][1:-1], 2]} for e in examples]
    batch = PlaidCollator(SpecialIds(V), 32, canvas_length=9, kind=kind, embedding_size=4, **options)(examples)
    output = PlaidLoss()(model, batch)
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(output.loss_sum, parameters, allow_unused="noise_beta" in options)
    expected = slow_loss(model, batch)
    expected_gradients = torch.autograd.grad(expected, parameters, allow_unused="noise_beta" in options)
    assert output.num_items == PlaidLoss().num_items(batch) == (81 if kind == "seq2seq" else 18)
    torch.testing.assert_close(output.loss_sum, expected, rtol=1e-6, atol=1e-6)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-6, atol=1e-7)
    assert (output.sequence_nats is None) == ("noise_beta" in options)


@pytest.mark.parametrize("is_plain", [True, False])
def test_the_head_operator_gives_the_gradients_of_autograd_in_chunks(is_plain, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    S, H, D, N, suppressed = 23, 5, 3, 11, [2, 3, 7]

    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    hidden, query, table = normal(S, H).requires_grad_(), normal(S, D).requires_grad_(), normal(N, D).requires_grad_()
    head = nn.Linear(H, N, bias=not is_plain).double()
    targets = torch.tensor([i for i in range(N) if i not in suppressed])[torch.randint(8, (S,), generator=generator)]
    weights, is_cross_entropy = normal(S).abs(), (torch.arange(S) % 3 == 0).double()
    p = (head(hidden) + query @ table.T).index_fill(1, torch.tensor(suppressed), -torch.inf).softmax(dim=-1)
    errors = (p @ table - table[targets]).square().sum(dim=-1) / 2
    expected = torch.where(is_cross_entropy > 0, -p.gather(1, targets[:, None])[:, 0].log(), errors)
    expected[4] = 0.0
    parameters = [hidden, query, table, *head.parameters()]
    expected_gradients = torch.autograd.grad((weights * expected).sum(), parameters)
    ignoring = targets.clone()
    ignoring[4] = IGNORED_ID
    monkeypatch.setattr(head_operator, "rows_per_chunk", lambda *_: 7)
    row_function = VectorError(ignoring, weights, is_cross_entropy)
    row_function.of_table = (query, table)
    output = head_losses(hidden, head, suppressed, row_function)
    torch.testing.assert_close(output.losses, expected.detach(), rtol=1e-10, atol=1e-10)
    for gradient, other in zip(torch.autograd.grad(output.loss_sum, parameters), expected_gradients, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-10, atol=1e-10)


def test_the_bound_meets_the_likelihood_as_the_schedule_widens():
    """Of one word of three, with vectors in a plane, and of two coupled words with the vectors -1 and 1."""
    gaps = []
    for ends in ((-1.0, 2.0), (-3.0, 6.0), (-5.0, 10.0)):
        ends = dict(zip(("gamma_min", "gamma_max"), ends, strict=True))
        gap = 0.0
        for law, vectors, all_texts in (
            (THREE_WORDS, TRIANGLE, [[7], [8], [9]]),
            (TWO_WORDS, [[-1.0], [1.0]], [[7, 7], [7, 8], [8, 7], [8, 8]]),
        ):
            model = exact_model(law, vectors, **ends)
            bounds = [sum(exact_nelbo(model, text).values()) for text in all_texts]
            of_law = sum(p * (bound + math.log(p)) for p, bound in zip(law.tolist(), bounds, strict=True))
            assert of_law > -1e-6
            gap = max(gap, of_law)
        gaps.append(gap)
    assert gaps[0] > 5e-3
    assert gaps[1] < 1e-3
    assert gaps[2] < 1e-4


def test_another_prediction_than_the_exact_one_has_a_larger_bound():
    model = exact_model(TWO_WORDS, [[-1.0], [1.0]])
    model.model.joint = torch.full((4,), 0.25, dtype=torch.float64)
    total = 0.0
    for p, text in zip(TWO_WORDS.tolist(), ([7, 7], [7, 8], [8, 7], [8, 8]), strict=True):
        total += p * (sum(exact_nelbo(model, text).values()) + math.log(p))
    # The Kullback-Leibler divergence to the uniform law.
    assert total == pytest.approx(sum(p * math.log(4 * p) for p in TWO_WORDS.tolist()), abs=1e-3)


@pytest.mark.parametrize("options", [{}, {"reconstruction_share": 0.6}])
def test_the_loss_is_an_unbiased_estimate_of_the_bound(options):
    """Collator and loss together against quadrature; the parts by themselves too."""
    num, text = 8_000, [7, 8]
    model = exact_model(TWO_WORDS, [[-1.0], [1.0]], noise_schedule="learnt")
    # Ends and shape of a schedule that has learnt.
    model.schedule.ends.data += torch.tensor([1.5, -1.0])
    model.schedule.heights.data *= 2
    examples = [{"input_ids": text[:1], "example_id": i, "epoch": 0, "position": i} for i in range(num)]
    tokens = WordsAlone(10)
    tokens.eos_token_id = 8
    collator = PlaidCollator(tokens, 16, kind="lm", embedding_size=1, **options)
    batch = collator(examples)
    output = PlaidLoss()(model, batch)
    exact = exact_nelbo(model, text)
    nats = output.sequence_nats.double()
    error = float(nats.std()) / math.sqrt(num)
    assert abs(float(nats.mean()) - sum(exact.values())) < 4 * error
    assert error < 0.06 * sum(exact.values())
    assert float(output.metrics["prior"][0]) / num == pytest.approx(exact["prior"], rel=1e-6)
    chosen = batch["is_reconstruction"]
    for name, others in (("diffusion", chosen), ("reconstruction", ~chosen)):
        part = (nats - exact["prior"]).masked_fill(others, 0.0)
        assert abs(float(part.mean()) - exact[name]) < 4 * float(part.std()) / math.sqrt(num)
        assert float(output.metrics[name][0]) == pytest.approx(float(part.sum()), rel=1e-5)
    assert output.sequence_tokens.unique().tolist() == [2]
    assert float(output.loss_sum.detach() / output.num_items) == pytest.approx(float(nats.mean()) / 2, rel=1e-5)


def test_the_gradient_of_the_shape_is_that_of_the_second_moment():
    """By times on a fine grid, for losses that are a function of gamma: the gradient through it is the same."""
    torch.manual_seed(0)
    schedule = NoiseSchedule(PlaidConfig(vocab_size=5, gamma_min=-2.0, gamma_max=3.0)).double()
    times = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000

    def rate(gamma):
        return torch.exp(-((gamma - 1) ** 2) / 2) + 0.1 * gamma + 0.5

    share, slope, _ = schedule._shape(times)
    moment = (5 * slope * rate(-2 + 5 * share)).square().mean()
    shape = [schedule.steepness, schedule.heights, schedule.offsets]
    expected = torch.autograd.grad(moment, shape)
    level = schedule(times)
    losses = (level.slope * rate(level.gamma)).detach()
    estimate = (losses.square() * level.score).mean()
    assert float(estimate.detach()) == 0
    # Where the rate is not 0 at the ends, the integrals differ by nothing: both ends are fixed.
    for gradient, other in zip(torch.autograd.grad(estimate, shape), expected, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-3, atol=1e-6 * float(other.abs().max()) + 1e-9)
    assert torch.autograd.grad(level.gamma.sum() + level.slope.sum(), shape, allow_unused=True) == (None, None, None)


def test_documents_that_share_a_row_have_their_own_times_and_noise(tmp_path):
    case = FamilyCase("plaid", "++collator.self_conditioning=0.5")
    check_documents_of_a_row(case, case.trainer(tmp_path).loss)


def test_unused_ids_change_no_likelihood():
    batches = []
    for size in (V, V + 5):
        model = make_model(V + 5, 32, suppress_tokens=[*range(7), *range(V, V + 5)])
        batches.append(PlaidCollator(SpecialIds(size), 32, kind="seq2seq", embedding_size=4)(make_examples(5, V)))
        nats = PlaidLoss()(model, batches[-1]).sequence_nats
        batches[-1] = nats
    torch.testing.assert_close(*batches)


class Recorded(nn.Module):
    """In place of the layers: recorded logits without what the noisy vectors add to them."""

    def __init__(self, states):
        super().__init__()
        self.embed_tokens, self.states = nn.Embedding(27, 28), states

    def forward(self, ids, inputs_embeds, output_index=None, **_):
        return BaseModelOutput(last_hidden_state=take(self.states, output_index))


@pytest.mark.parametrize("name", ["plaid", "plaid_selfcond"])
def test_recorded_bounds_of_the_authors_code_are_met(name):
    r = {key.split("/")[1]: x for key, x in load_file(RECORDED).items() if key.split("/")[0] == name}
    config = PlaidConfig(
        **{"vocab_size": 27, "hidden_size": 28, "num_hidden_layers": 1, "num_attention_heads": 2},
        **{"self_conditioning": False, "mask_token_id": 99, "suppress_tokens": None},
    )
    model = PlaidForGaussianDiffusion(config).double()
    with torch.no_grad():
        model.vectors.weight.copy_(r["matrix"])
        for parameter, key in (("steepness", "W1"), ("heights", "W2"), ("offsets", "b1"), ("ends", "ends")):
            getattr(model.schedule, parameter).copy_(r[key].flatten())
        model.lm_head.weight.copy_(torch.eye(27, 28))
    torch.testing.assert_close(model.schedule(r["schedule_t"]).gamma, -3 + 9 * r["schedule_gamma_tilde"])
    level = model.schedule(r["t"])
    torch.testing.assert_close(level.gamma, r["gamma"], rtol=1e-6, atol=1e-6)
    # At time 0 the recorded derivative is set to 0: there is no diffusion term.
    torch.testing.assert_close(level.slope[1:], r["gamma_prime"][1:], rtol=1e-6, atol=1e-6)
    gamma = r["gamma"][:, None, None]
    prior = torch.sigmoid(-gamma).sqrt() / torch.sigmoid(gamma) * r["z"].double() @ model.table().T
    model.model = Recorded(nn.functional.pad(r["logits"] - prior, (0, 1)))
    batch = {
        "input_ids": r["x"],
        "times": r["t"],
        "time_index": torch.arange(8),
        "is_canvas": torch.ones(8, 12, dtype=torch.bool),
        "noise": r["eps"].double(),
        "self_conditioned": torch.zeros(8, dtype=torch.bool),
        "logits_index": torch.arange(96),
        "target_ids": r["x"].flatten(),
        "target_documents": torch.arange(8).repeat_interleave(12),
        "is_reconstruction": torch.arange(8) == 0,
        "weights": torch.tensor([1.0] + [1 / 7] * 7, dtype=torch.float64),
        "canvas_lengths": torch.full((8,), 12),
        "sequence_tokens": torch.full((8,), 12),
        "given_length": torch.zeros(8, dtype=torch.bool),
    }
    output = PlaidLoss()(model, batch)
    per_token = (output.sequence_nats / 12 - r["prior_loss"]).double()
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(per_token[:1], r["reconst_loss"].double(), **close)
    torch.testing.assert_close(7 * per_token[1:], r["diffusion_loss"][1:], **close)
    torch.testing.assert_close(output.metrics["prior"][0] / 96, r["prior_loss"], **close)
    names = ("input_ids", "times", "is_canvas", "noise", "logits_index")
    found = model(**{name: batch[name] for name in names}, head_function=expected_vectors).head_output
    torch.testing.assert_close(found.float().view(8, 12, 16), r["x_reconst"], **close)


def test_the_layers_see_noisy_vectors_of_unit_size_clean_given_ones_and_what_was_expected():
    model = make_model(noise_schedule="linear")
    model.model.embed_tokens.weight.data[0] = 1.0
    ids, is_canvas = torch.tensor([[8, 9, BOS, 10, 11]]), torch.tensor([[False] * 3 + [True] * 2])
    latents, expected = (torch.randn(1, 5, model.config.embedding_size) for _ in range(2))
    seen: dict[str, torch.Tensor] = {}
    for name, module in (("shown", model.vector_proj), ("expected", model.expected_proj)):
        module.register_forward_pre_hook(lambda _, inputs, name=name: seen.update({name: inputs[0]}))
    model.model.register_forward_pre_hook(
        lambda _, inputs, options: seen.update({"inputs": options["inputs_embeds"], "ids": inputs[0]}), with_kwargs=True
    )
    times = torch.tensor([0.3])
    model(ids, times=times, is_canvas=is_canvas, latents=latents, expected=expected)
    gamma, size = model.schedule(times).gamma, model.config.embedding_size
    variance = torch.sigmoid(-gamma) / size + torch.sigmoid(gamma)
    shown = size**0.5 * model.table()[ids]
    shown[is_canvas] = (latents / variance.sqrt())[is_canvas]
    torch.testing.assert_close(seen["shown"], shown)
    torch.testing.assert_close(seen["expected"], size**0.5 * expected)
    # Beside them the given tokens have the embedding of the backbone; of the canvas nothing shows the clean ids.
    given = model.model.embed_tokens(ids).masked_fill(is_canvas[..., None], 0.0)
    of_vectors = model.vector_proj(shown) + model.expected_proj(size**0.5 * expected)
    torch.testing.assert_close(seen["inputs"], given + of_vectors)
    assert (seen["ids"][is_canvas] == 0).all()


def test_padding_of_lists_and_rows_changes_nothing_and_prompts_are_shown_without_noise():
    model = make_model(V, 32)
    collator = PlaidCollator(SpecialIds(V), 32, kind="seq2seq", embedding_size=4)
    batch = collator(make_examples(4, V))
    assert not batch["noise"][~batch["is_canvas"]].any()
    assert (batch["input_ids"][~batch["is_canvas"] & batch["attention_mask"]] != PAD).all()
    row = int((batch["canvas_lengths"] > 1).nonzero()[0])
    start = int(batch["is_canvas"][row].int().argmax())
    assert batch["input_ids"][row, start - 1] == BOS
    other = {**batch, "input_ids": batch["input_ids"].clone()}
    other["input_ids"][row, start:] = 12
    names = ("attention_mask", "times", "time_index", "is_canvas")
    latents = torch.randn(*batch["noise"].shape)
    # Clean ids of the canvas are never seen where the vectors are given.
    one, two = (model(b["input_ids"], latents=latents, **{n: b[n] for n in names}).logits for b in (batch, other))
    assert torch.equal(one, two)
