import pytest
import torch
from torch import nn

from tests.modeling.naive import SpecialIds, make_examples
from tests.modeling.naive_insertion_transformer import make_model, slow_loss
from xlm_hf.data.static_shapes import StaticShapes
from xlm_hf.modeling.insertion_transformer import InsertionTransformerCollator, InsertionTransformerLoss
from xlm_hf.modules.vocabulary_head import LanguageModelOutput

V = 13


@pytest.mark.parametrize("temperature", [None, 1.0])
def test_loss_and_gradients_equal_those_of_the_slow_twin(temperature):
    model = make_model(V, 32).double()
    examples = make_examples(7, V, seed=3)
    # The same word dropped twice from one gap counts twice.
    examples.append({"prompt_ids": [8], "target_ids": [9, 9, 9, 9], "example_id": 1, "epoch": 3, "position": 3})
    examples.append({**examples[0], "example_id": 5, "continues": True})
    batch = InsertionTransformerCollator(SpecialIds(V), 32, "seq2seq", tree_temperature=temperature)(examples)
    output = InsertionTransformerLoss()(model, batch)
    expected = slow_loss(model, batch)
    assert output.num_items == len(examples)
    assert output.sequence_nats is None
    torch.testing.assert_close(output.loss_sum, expected, rtol=1e-9, atol=1e-9)
    gradients, slow = (torch.autograd.grad(x, list(model.parameters())) for x in (output.loss_sum, expected))
    for gradient, other in zip(gradients, slow, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-9, atol=1e-9)
    # In half precision the model is rounded, the loss is not.
    assert InsertionTransformerLoss()(model.bfloat16(), batch).loss_sum.dtype == torch.float32


def test_loss_and_accuracy_of_scores_that_are_known():
    """[BOS] alone lacks 9 9 10; with logits log(2, 1, 1) for (9, 10, the end), uniformly weighted."""
    example = {"prompt_ids": [], "target_ids": [9, 9, 10], "example_id": 0, "epoch": 0}
    collator = InsertionTransformerCollator(SpecialIds(V), 32, "seq2seq")
    batches = [collator([{**example, "position": position}]) for position in range(12)]
    batch = next(batch for batch in batches if batch["num_dropped"] == 3)

    class Fixed(nn.Module):
        def forward(self, input_ids, attention_mask, logits_index, head_function):
            logits = torch.full((len(logits_index), V), -torch.inf)
            logits[:, [9, 10, 3]] = torch.tensor([2.0, 1.0, 1.0]).log()
            return LanguageModelOutput(head_output=head_function(logits, nn.Identity(), None))

    output = InsertionTransformerLoss()(Fixed(), batch)
    torch.testing.assert_close(output.loss_sum, torch.tensor([0.5, 0.5, 0.25]).log().mean().neg())
    assert [int(x) for x in output.metrics["slot_accuracy"]] == [1, 1]
    complete = next(batch for batch in batches if batch["num_dropped"] == 0)
    output = InsertionTransformerLoss()(Fixed(), complete)
    torch.testing.assert_close(output.loss_sum, torch.tensor(0.25).log().neg())
    assert [int(x) for x in output.metrics["slot_accuracy"]] == [0, 4]


def test_what_fills_up_lists_counts_nowhere():
    model, collator = make_model(V, 32), InsertionTransformerCollator(SpecialIds(V), 32, "seq2seq")
    examples = make_examples(5, V, seed=4)
    plain, padded = (
        InsertionTransformerLoss()(model, make(examples)) for make in (collator, StaticShapes(collator, 20))
    )
    torch.testing.assert_close(padded.loss_sum, plain.loss_sum)
    assert torch.equal(torch.stack(padded.metrics["slot_accuracy"]), torch.stack(plain.metrics["slot_accuracy"]))
