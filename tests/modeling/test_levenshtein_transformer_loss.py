import math

import pytest
import torch
from torch import nn

from tests.modeling.naive import BOS, MASK, SpecialIds, make_examples
from tests.modeling.naive_levenshtein_transformer import make_model, oracle, slow_loss
from tests.modeling.test_levenshtein_transformer_collator import with_sources
from xlm_hf.data.static_shapes import StaticShapes
from xlm_hf.modeling.levenshtein_transformer import LevenshteinTransformerCollator, LevenshteinTransformerLoss
from xlm_hf.modeling.levenshtein_transformer.loss_levenshtein_transformer import wrong_tokens
from xlm_hf.modeling.levenshtein_transformer.modeling_levenshtein_transformer import LevenshteinTransformerOutput

V = 13


def examples_of(num=8, seed=3):
    """Of few words, so that many align in several ways."""
    examples = with_sources(make_examples(num, V, seed=seed))
    examples = [{**e, "source_ids": [min(t, V - 1) for t in e["source_ids"]]} for e in examples]
    return [*examples, {**examples[0], "example_id": 5, "continues": True}]


@pytest.mark.parametrize("initial_text", ["empty", "source"])
def test_loss_and_gradients_equal_those_of_the_slow_twin(initial_text):
    """A gap may lack more than the five placeholders that the model knows."""
    model = make_model(V, 40).double()
    batch = LevenshteinTransformerCollator(SpecialIds(V), 40, "seq2seq", initial_text=initial_text)(examples_of())
    assert batch["gap_counts"].max() > 5
    output, expected = LevenshteinTransformerLoss()(model, batch), slow_loss(model, batch)
    assert output.num_items == sum(len(e["target_ids"]) + 1 - e.get("continues", False) for e in examples_of())
    assert output.sequence_nats is None
    torch.testing.assert_close(output.loss_sum, expected, rtol=1e-9, atol=1e-9)
    gradients, slow = (torch.autograd.grad(x, list(model.parameters())) for x in (output.loss_sum, expected))
    for gradient, other in zip(gradients, slow, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-9, atol=1e-9)
    total = sum(float(output.metrics[f"{name}_cross_entropy"][0]) for name in ("placeholder", "fill", "deletion"))
    assert total == pytest.approx(float(expected.detach()))
    # In half precision the model is rounded, the loss is not.
    assert LevenshteinTransformerLoss()(model.bfloat16(), batch).loss_sum.dtype == torch.float32


class Fixed(nn.Module):
    """Fills every placeholder with 9, deletes with probability 1/4 and inserts 0, 1 or 2 with 1/2, 1/4 and 1/4."""

    config = type("", (), {"mask_token_id": MASK})

    def forward(
        self, input_ids, attention_mask, token_index=None, gap_index=None, logits_index=None, head_function=None
    ):
        if token_index is not None:
            self.edited = input_ids
            return LevenshteinTransformerOutput(deletion_logits=torch.full(token_index.shape, -math.log(3)))
        logits = torch.full((len(logits_index), V), -torch.inf)
        logits[:, [9, 10]] = torch.tensor([2.0, 1.0]).log()
        counts = torch.tensor([2.0, 1.0, 1.0]).log().expand(len(gap_index), 3)
        output = head_function(logits, nn.Identity(), None)
        return LevenshteinTransformerOutput(head_output=output, placeholder_logits=counts)


def test_losses_and_accuracies_of_scores_that_are_known():
    """Of the text 9 9 10 nothing is left, and the model makes 9 9 9 of it: the last is to be deleted."""
    example = {"prompt_ids": [], "target_ids": [9, 9, 10], "example_id": 0, "epoch": 0}
    collator, model = LevenshteinTransformerCollator(SpecialIds(V), 40, "seq2seq"), Fixed()
    batches = [collator([{**example, "position": position}]) for position in range(12)]
    batch = next(batch for batch in batches if len(batch["target_ids"]) == 3)
    output = LevenshteinTransformerLoss()(model, batch)
    assert model.edited.tolist() == [[BOS, 9, 9, 9]]
    nats = {"placeholder": [4], "fill": [1.5, 1.5, 3], "deletion": [4 / 3, 4 / 3, 4]}
    for name, values in nats.items():
        loss, num = output.metrics[f"{name}_cross_entropy"]
        assert float(loss) == pytest.approx(sum(map(math.log, values)), abs=1e-5)
        assert int(num) == len(values)
    assert float(output.loss_sum.detach()) == pytest.approx(
        sum(math.log(x) for values in nats.values() for x in values)
    )
    # A gap of three missing tokens counts as one of two, the most that the model knows.
    right = {"placeholder": 0, "fill": 2, "deletion": 2}
    assert {name: int(output.metrics[f"{name}_accuracy"][0]) for name in right} == right


def test_what_is_wrong_in_a_filled_text():
    """Aligned by the fewest edits, not position by position."""
    ids, documents = torch.tensor([9, 8, 9, 10, 8, 8]), torch.tensor([0, 0, 0, 0, 2, 2])
    texts, of_texts = torch.tensor([8, 9, 10, 11, 7, 8]), torch.tensor([0, 0, 0, 0, 1, 2])
    wrong = wrong_tokens(ids, documents, texts, of_texts, 3)
    expected = [not stays for stays in (*oracle([9, 8, 9, 10], [8, 9, 10, 11])[0], *oracle([8, 8], [8])[0])]
    assert wrong.tolist() == expected == [True, False, False, False, False, True]


@pytest.mark.parametrize("initial_text", ["empty", "source"])
def test_what_fills_up_lists_counts_nowhere(initial_text):
    model = make_model(V, 40)
    collator = LevenshteinTransformerCollator(SpecialIds(V), 40, "seq2seq", initial_text=initial_text)
    empty = {"prompt_ids": [8, 9], "target_ids": [], "source_ids": [], "example_id": 0, "epoch": 0, "position": 0}
    for examples in (examples_of(5, seed=4), [empty]):
        batches = (make(examples) for make in (collator, StaticShapes(collator, 24)))
        plain, padded = (LevenshteinTransformerLoss()(model, batch) for batch in batches)
        torch.testing.assert_close(padded.loss_sum, plain.loss_sum)
        for name, values in plain.metrics.items():
            torch.testing.assert_close(torch.stack(padded.metrics[name]), torch.stack(values))


def test_the_choice_of_the_fills_has_no_gradient_and_the_loss_is_a_function():
    model = make_model(V, 40)
    batch = LevenshteinTransformerCollator(SpecialIds(V), 40, "seq2seq")(examples_of())
    first, second = (LevenshteinTransformerLoss()(model, batch).loss_sum for _ in range(2))
    assert torch.equal(first, second)
    calls = []
    model.register_forward_hook(lambda module, args, kwargs, output: calls.append((kwargs, output)), with_kwargs=True)
    LevenshteinTransformerLoss()(model, batch)
    (_, insertions), (deletion, _) = calls
    fills = insertions.head_output[1]
    assert not fills.requires_grad
    assert deletion["input_ids"].flatten()[batch["logits_index"]].tolist() == fills.tolist()
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    assert fills.tolist() == logits.flatten(0, 1)[batch["logits_index"]].argmax(dim=-1).tolist()
