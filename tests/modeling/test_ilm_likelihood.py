"""The bound that `ILMLoss` reports against enumerated likelihoods of the insertion process."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

from tests.modeling.naive import BOS, CLS, FIRST_WORD, PAD, SpecialIds
from tests.modeling.naive_ilm import make_model
from xlm_hf.modeling.ilm import ILMCollator, ILMLoss, ILMOutput

WORDS = (FIRST_WORD, FIRST_WORD + 1)
V = FIRST_WORD + 2
TEXTS = [text for length in range(4) for text in itertools.product(WORDS, repeat=length)]


def states(text):
    """What can be left of a text: kept tokens, the dropped ones with their slots, and the probability of the state."""
    length = len(text)
    for n in range(length + 1):
        for dropped in itertools.combinations(range(length), n):
            kept, missing = [], []
            for position, token in enumerate(text):
                if position in dropped:
                    missing.append((len(kept), token))
                else:
                    kept.append(token)
            yield tuple(kept), missing, 1 / (length + 1) / math.comb(length, n)


def batch_of_states(text, ends=True):
    """A batch of all states of a text, one to a row, as the collator would make it; and their probabilities."""
    rows = list(states(text))
    width = len(text) + 2
    input_ids = torch.full((len(rows), width), PAD)
    batch = {name: [] for name in ("slot_index", "slot_documents", "target_slots", "target_ids")}
    for row, (kept, missing, _) in enumerate(rows):
        input_ids[row, : len(kept) + 2] = torch.tensor([CLS, BOS, *kept])
        if missing:
            batch["target_slots"] += [len(batch["slot_index"]) + slot for slot, _ in missing]
            batch["target_ids"] += [token for _, token in missing]
            batch["slot_index"] += [row * width + 1 + slot for slot in range(len(kept) + 1)]
            batch["slot_documents"] += [row] * (len(kept) + 1)
    made = {name: torch.tensor(values, dtype=torch.int64) for name, values in batch.items()}
    num_dropped = torch.tensor([len(missing) for _, missing, _ in rows])
    made.update(
        input_ids=input_ids,
        attention_mask=input_ids != PAD,
        cls_index=torch.arange(len(rows)) * width,
        num_dropped=num_dropped,
        ends=torch.full((len(rows),), ends),
        weights=torch.full((len(rows),), len(text) + 1.0, dtype=torch.float64),
        sequence_tokens=torch.full((len(rows),), len(text) + ends),
    )
    return made, torch.tensor([probability for _, _, probability in rows], dtype=torch.float64)


def bound(model, text, ends=True, loss=None):
    """The mean of the reported nats over all states of a text."""
    batch, probabilities = batch_of_states(text, ends)
    with torch.no_grad():
        output = (loss or ILMLoss())(model, batch)
    assert output.sequence_tokens.tolist() == [len(text) + ends] * len(probabilities)
    return float(output.sequence_nats @ probabilities)


class ExactModel(nn.Module):
    """The exact conditionals of a law over texts, in place of the network."""

    def __init__(self, law):
        super().__init__()
        self.joint, self.stop, self.mass = {}, {}, {}
        for text, p in law.items():
            for kept, missing, probability in states(text):
                weight = p * probability * (len(text) + 1)
                self.mass[kept] = self.mass.get(kept, 0.0) + weight
                if not missing:
                    self.stop[kept] = self.stop.get(kept, 0.0) + weight
                for entry in missing:
                    table = self.joint.setdefault(kept, {})
                    table[entry] = table.get(entry, 0.0) + weight / len(missing)

    def forward(self, input_ids, attention_mask, slot_index, cls_index, head_function):
        rows, width = input_ids.shape
        grid = torch.full((rows, width, V), -math.inf, dtype=torch.float64)
        stop = []
        for row in range(rows):
            kept = tuple(input_ids[row, attention_mask[row]].tolist()[2:])
            for (slot, token), weight in self.joint.get(kept, {}).items():
                grid[row, 1 + slot, token] = math.log(weight)
            stop.append(self.stop.get(kept, 0.0) / self.mass[kept])
        probabilities = torch.tensor(stop, dtype=torch.float64)
        head_output = head_function(grid.flatten(0, 1)[slot_index], nn.Identity(), None)
        return ILMOutput(head_output=head_output, stop_logits=torch.stack((probabilities, 1 - probabilities), -1).log())


def test_the_bound_is_the_likelihood_at_the_exact_conditionals():
    law = dict(zip(TEXTS, np.random.default_rng(3).dirichlet(np.ones(len(TEXTS))), strict=True))
    model = ExactModel(law)
    for text, p in law.items():
        assert bound(model, text) == pytest.approx(-math.log(p), abs=1e-8)


@torch.no_grad()
def visited(model, text):
    """Probability that the sampler's path passes through a text, and that it stops there, over all paths."""

    def step(written):
        output = model(torch.tensor([[CLS, BOS, *written]]))
        joint = output.logits[0, 1:, list(WORDS)].flatten().softmax(0).view(-1, 2)
        return float(output.stop_logits[0].softmax(-1)[0]), joint

    law = {(): 1.0}
    for _ in text:
        longer = {}
        for written, p in law.items():
            stop, joint = step(written)
            for slot, word in itertools.product(range(len(written) + 1), range(2)):
                new = (*written[:slot], WORDS[word], *written[slot:])
                longer[new] = longer.get(new, 0.0) + p * (1 - stop) * float(joint[slot, word])
        law = longer
    return law[text], law[text] * step(text)[0]


@pytest.mark.parametrize("num_missing_classes", [2, 4])
def test_the_bound_is_above_the_likelihood_of_any_network(num_missing_classes):
    """Whatever is trained; for a piece that goes on, of the probability that a path passes through it."""
    model = make_model(V, num_missing_classes=num_missing_classes).double()
    losses = [ILMLoss(), ILMLoss(stop_loss_weight=1e-3, stop_class_weights=(0.9, 0.1))]
    for text in ((), (7,), (7, 7), (8, 7, 7), (7, 8, 8, 7)):
        for ends, p in zip((False, True), visited(model, text), strict=True):
            values = [bound(model, text, ends, loss) for loss in losses]
            assert values[0] == values[1]
            if len(text) < 2:
                # A single order.
                assert values[0] == pytest.approx(-math.log(p), abs=1e-9)
            else:
                assert values[0] > -math.log(p) + 1e-3


@pytest.mark.parametrize("drop_beta", [1.0, 2.0])
@pytest.mark.parametrize("continues", [False, True])
def test_what_the_collator_draws_is_an_unbiased_estimate_of_the_bound(drop_beta, continues):
    model, num = make_model(V).double(), 6000
    collator = ILMCollator(SpecialIds(V), max_length=16, kind="lm", seed=3, drop_beta=drop_beta)
    for text in ((7, 7), (7, 8, 8, 7)):
        examples = [
            {"input_ids": list(text), "example_id": i, "epoch": 0, "position": i, "continues": continues}
            for i in range(num)
        ]
        with torch.no_grad():
            output = ILMLoss()(model, collator(examples))
        nats, expected = output.sequence_nats, bound(model, text, not continues)
        assert output.sequence_tokens.tolist() == [len(text) + (not continues)] * num
        assert abs(nats.mean() - expected) < 4 * nats.std() / num**0.5
        assert nats.std() / num**0.5 < 0.05 * expected
        assert output.metrics["sequence_nelbo"] == (nats.sum(), num)


def test_a_whole_piece_of_a_text_that_goes_on_says_nothing_about_the_stop():
    """With nothing dropped there is no loss at all; where something is, there is a stopping loss as for any text."""
    model, loss = make_model(V).double(), ILMLoss()
    whole, broken = (loss(model, {**batch_of_states((7, 8), ends)[0]}) for ends in (True, False))
    complete = -model(torch.tensor([[CLS, BOS, 7, 8]])).stop_logits[0].log_softmax(-1)[0]
    torch.testing.assert_close(whole.loss_sum - broken.loss_sum, complete)
    assert int(whole.metrics["stop_loss"][1]) == int(whole.metrics["stop_accuracy"][1]) == 4
    assert int(broken.metrics["stop_loss"][1]) == int(broken.metrics["stop_accuracy"][1]) == 3
    assert whole.num_items == broken.num_items == 4
    exact = ExactModel({(7, 8): 1.0})
    counted = [loss(exact, batch_of_states((7, 8), ends)[0]).metrics["stop_accuracy"] for ends in (True, False)]
    assert [tuple(map(int, pair)) for pair in counted] == [(4, 4), (3, 3)]
