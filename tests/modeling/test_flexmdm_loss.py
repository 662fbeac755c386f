"""The loss of flexible masked diffusion against enumerated likelihoods."""

import math
from functools import cache

import pytest
import torch

from tests.modeling.naive_flexmdm import (
    BOS,
    MASK,
    PAD,
    ExactTables,
    Immediate,
    RandomTables,
    SpecialIds,
    TableModel,
    exact_bound,
    gauss,
    linear_shares,
    make_model,
    random_law,
    shares,
    states,
)
from xlm_hf.modeling.flexmdm import FlexMDMCollator, FlexMDMLoss, loss_flexmdm
from xlm_hf.modeling.mdlm import MDLMLoss
from xlm_hf.modules.noise_schedules import make_schedule

QUARTIC = {"name": "polynomial", "power": 4}
MIRRORED = {"name": "polynomial", "power": 2, "mirrored": True}
TARGETS = ("logits_index", "target_ids", "target_documents")
GAPS = ("gap_index", "gap_counts", "gap_documents")


def batch_of_states(text, times, probabilities_at=linear_shares):
    """Every state of a text at every time, one to a row, as the collator would make it, and their probabilities."""
    rows = [(t, *state) for t in times for state in states(text, probabilities_at(t))]
    width = len(text) + 1
    input_ids = torch.full((len(rows), width), PAD)
    batch = {name: [] for name in ("logits_index", "target_ids", "target_documents", "gap_index", "gap_counts")}
    batch["gap_documents"] = []
    for row, (_, there, gaps, hidden, _) in enumerate(rows):
        input_ids[row, : len(there) + 1] = torch.tensor([BOS, *there])
        batch["logits_index"] += [row * width + 1 + i for i, _ in hidden]
        batch["target_ids"] += [word for _, word in hidden]
        batch["target_documents"] += [row] * len(hidden)
        batch["gap_index"] += [row * width + i for i in range(len(gaps))]
        batch["gap_counts"] += gaps
        batch["gap_documents"] += [row] * len(gaps)
    made = {name: torch.tensor(values, dtype=torch.int64) for name, values in batch.items()}
    t = torch.tensor([row[0] for row in rows], dtype=torch.float64)
    made.update(
        input_ids=input_ids,
        attention_mask=input_ids != PAD,
        times=t,
        unmasking_weights=1 / t,
        insertion_weights=1 / t,
        sequence_tokens=torch.full((len(rows),), len(text) + 1),
        open_gaps=torch.zeros(len(rows), dtype=torch.bool),
    )
    return made, torch.tensor([row[-1] for row in rows], dtype=torch.float64)


def bound_by_the_loss(model, text, num=40):
    """The mean of the reported nats over the states of a text, and over t = v^4 by quadrature."""
    nodes, weights = gauss(num)
    batch, probabilities = batch_of_states(text, nodes**4)
    output = FlexMDMLoss()(model, batch)
    per_state = dict(zip(nodes**4, 4 * nodes**3 * weights, strict=True))
    of_times = torch.tensor([per_state[t] for t in batch["times"].tolist()], dtype=torch.float64)
    torch.testing.assert_close(output.loss_sum, output.sequence_nats.sum())
    return float(output.sequence_nats @ (of_times * probabilities))


def test_the_bound_is_the_likelihood_at_the_exact_conditionals():
    """For every text, with the shipped loss on the enumerated states."""
    for longest in (2, 3):
        law = random_law(longest)
        model = TableModel(ExactTables(law))
        for text in law if longest == 2 else [(7, 8, 7), (8, 8, 8), (7,)]:
            assert bound_by_the_loss(model, text) == pytest.approx(-math.log(law[text]), abs=1e-8)


def test_the_bound_is_above_it_for_other_tables():
    """And the loss, on every state, is the bound written as loops."""
    model = TableModel(RandomTables())
    for text in ((), (7,), (8, 7)):
        assert bound_by_the_loss(model, text, 20) == pytest.approx(exact_bound(model.tables, text, num=20), abs=1e-9)
    exact = TableModel(ExactTables(random_law()))

    class Wrong:
        def tables(self, there, t):
            counts, words = exact.tables.tables(there, t)
            return 1.3 * counts, 0.9 * words + 0.1 * words[:, ::-1]

    law = random_law()
    wrong, right = (
        sum(p * bound_by_the_loss(model, text, 24) for text, p in law.items()) for model in (TableModel(Wrong()), exact)
    )
    assert wrong > right + 1e-2


def loose(model, monkeypatch):
    """A known mistake: c log c is added for each gap, which makes the bound loose."""
    tight = loss_flexmdm._poisson_losses
    monkeypatch.setattr(loss_flexmdm, "_poisson_losses", lambda n, c: tight(n, c) + torch.special.xlogy(c, c))


def no_time(model, monkeypatch):
    """A known mistake: a network that is not told the time, and answers as in the middle of it."""
    tables = model.tables.tables
    monkeypatch.setattr(model.tables, "tables", lambda there, t: tables(there, 0.5))


def frozen_rates(model, monkeypatch):
    """A known mistake: as many tokens are missing at every time as in the beginning."""
    tables = model.tables.tables
    monkeypatch.setattr(model.tables, "tables", lambda there, t: (tables(there, t)[0] / t, tables(there, t)[1]))


@pytest.mark.parametrize("mistake", [loose, no_time, frozen_rates])
def test_known_mistakes_are_found(mistake, monkeypatch):
    """The mean over the law is its entropy, and more with a mistake."""
    law = random_law()
    model = TableModel(ExactTables(law))
    mistake(model, monkeypatch)
    nats = sum(p * bound_by_the_loss(model, text, 24) for text, p in law.items())
    assert nats > 0.05 - sum(p * math.log(p) for p in law.values())


@pytest.mark.parametrize(("insertion", "unmasking"), [("linear", MIRRORED), (QUARTIC, "cosine")])
def test_the_bound_does_not_depend_on_the_schedules(insertion, unmasking):
    """Equality again, in loops alone, with the hazards that the collator weighs by."""
    law, schedules = random_law(), [make_schedule(schedule) for schedule in (unmasking, insertion)]
    tables = ExactTables(law, cache(lambda t: shares(t, insertion, unmasking)))

    def hazards(t):
        return [float(schedule.hazard(torch.tensor(t, dtype=torch.float64))) for schedule in schedules]

    for text in ((), (8,), (7, 8)):
        assert exact_bound(tables, text, tables.shares_at, hazards, num=24) == pytest.approx(
            -math.log(law[text]), abs=1e-5
        )


def examples_of(text, num):
    return [{"input_ids": list(text), "example_id": i, "epoch": 0, "position": i} for i in range(num)]


@pytest.mark.parametrize(("noise_beta", "num"), [(None, 100_000), (0.7, 20_000)])
def test_what_the_collator_draws_is_an_unbiased_estimate_of_the_bound(noise_beta, num):
    """100,000 draws of the shipped collator and loss against quadrature over every state, whatever is trained."""
    text, model = (8, 7, 7), make_model(vocab_size=9, hidden_size=16, num_hidden_layers=1, max_position_embeddings=8)
    collator = FlexMDMCollator(SpecialIds(), max_length=8, kind="lm", seed=3, noise_beta=noise_beta)
    with torch.no_grad():
        output = FlexMDMLoss()(model, collator(examples_of(text, num)))
        expected = bound_by_the_loss(model.double(), text)
    nats = output.sequence_nats.double()
    assert output.sequence_tokens.tolist() == [4] * num
    error = float(nats.std() / num**0.5)
    assert abs(float(nats.mean()) - expected) < 4 * error
    assert error < 0.015 * expected


def test_without_insertion_it_is_masked_diffusion():
    """The same states, logits and weights: the same loss, the same nats."""
    model = make_model()
    collator = FlexMDMCollator(SpecialIds(20), max_length=24, kind="lm", seed=5)
    collator.insertion = Immediate()
    batch = collator(examples_of((8, 9, 10, 11, 12), 200))
    assert batch["input_ids"].shape == (200, 6)
    masked = (batch["input_ids"] == MASK).sum(dim=-1).double()
    # A token is masked with probability t.
    assert abs(float((masked - 5 * batch["times"]).mean())) < 4 * float((masked - 5 * batch["times"]).std()) / 200**0.5
    torch.testing.assert_close(batch["unmasking_weights"] * batch["times"], 2 * batch["times"].sqrt())
    assert batch["gap_counts"].sum() == 0 == batch["insertion_weights"].sum()

    def as_masked_diffusion(alpha, **inputs):
        return model(times=1 - alpha, gap_index=inputs["logits_index"], **inputs)

    own = FlexMDMLoss()(model, batch)
    names = ("input_ids", "attention_mask", "logits_index", "target_ids", "target_documents", "sequence_tokens")
    others = {"canvas_lengths": batch["sequence_tokens"], "given_length": batch["open_gaps"]}
    translated = {name: batch[name] for name in names} | others
    translated |= {"weights": batch["unmasking_weights"], "alpha": 1 - batch["times"]}
    theirs = MDLMLoss()(as_masked_diffusion, translated)
    torch.testing.assert_close(own.loss_sum, theirs.loss_sum, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(own.sequence_nats, theirs.sequence_nats, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gap_head", ["rate", "count", "distribution"])
def test_the_loss_is_the_one_written_as_loops(gap_head):
    """With equal weights and with those of the bound; the head for counts is trained by a cross-entropy."""
    model, texts = make_model(gap_head=gap_head, max_count=4).double(), [(8, 9, 10, 11, 12), (9,), ()]
    examples = [{**example, "input_ids": list(text)} for text in texts for example in examples_of(text, 4)]
    for number, example in enumerate(examples):
        example.update(example_id=number, position=number)
    for noise_beta in (None, 3.0):
        batch = FlexMDMCollator(SpecialIds(20), max_length=24, kind="lm", seed=1, noise_beta=noise_beta)(examples)
        dense = model(batch["input_ids"], batch["attention_mask"], times=batch["times"])
        trained, nats, L = 0.0, [0.0] * len(examples), batch["input_ids"].shape[1]
        for index, token, document in zip(*(batch[k].tolist() for k in TARGETS), strict=True):
            assert batch["input_ids"].flatten()[index] == MASK
            loss = -dense.logits[index // L, index % L].log_softmax(-1)[token]
            weight = float(batch["unmasking_weights"][document])
            trained = trained + loss * (weight if noise_beta is None else 1.0)
            nats[document] += weight * float(loss.detach())
        for index, count, document in zip(*(batch[k].tolist() for k in GAPS), strict=True):
            expected = dense.expected_counts[index // L, index % L]
            loss = tight = expected - count - (count * expected.log() if count else 0.0)
            if gap_head == "distribution":
                loss = -dense.count_logits[index // L, index % L].log_softmax(-1)[min(count, 4)]
            weight = float(batch["insertion_weights"][document])
            trained = trained + loss * (weight if noise_beta is None else 1.0)
            nats[document] += weight * float(tight.detach())
        output = FlexMDMLoss()(model, batch)
        torch.testing.assert_close(output.loss_sum, trained, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(output.sequence_nats.double(), torch.tensor(nats).double(), rtol=1e-4, atol=1e-4)
        assert int(output.num_items) == sum(len(example["input_ids"]) + 1 for example in examples)
