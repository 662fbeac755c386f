import pytest
import torch

from tests.modeling.naive import CLS, EOS, MASK, PAD, SpecialIds, make_examples
from tests.modeling.naive_mlm import V, make_model, slow_loss
from xlm_hf.modeling.mlm import MLMCollator, MLMConfig, MLMLoss


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("canvas_length", [None, 10])
def test_loss_and_gradients_equal_those_of_the_slow_twin(seed, canvas_length):
    model = make_model().double()
    examples = make_examples(7, V, seed=seed)
    batch = MLMCollator(SpecialIds(V), max_length=24, seed=seed, canvas_length=canvas_length, kind="seq2seq")(examples)
    output = MLMLoss()(model, batch)
    gradients = torch.autograd.grad(output.loss_sum, list(model.parameters()))
    expected = slow_loss(model, batch)
    expected_gradients = torch.autograd.grad(expected, list(model.parameters()))

    assert output.num_items == MLMLoss().num_items(batch) == int((batch["input_ids"] == MASK).sum())
    torch.testing.assert_close(output.loss_sum, expected, rtol=1e-9, atol=1e-9)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-9, atol=1e-9)


def test_loss_is_a_sum_over_sequences():
    """Whatever a batch looks like, it is the sum of its sequences, each at the width of its own."""
    model, loss = make_model(), MLMLoss()
    collator, examples = MLMCollator(SpecialIds(V), max_length=24, kind="seq2seq"), make_examples(6, V, seed=1)
    whole = loss(model, collator(examples))
    parts = [loss(model, collator([example])) for example in examples]
    torch.testing.assert_close(whole.loss_sum, sum(part.loss_sum for part in parts))
    assert whole.num_items == sum(part.num_items for part in parts)
    assert int(whole.metrics["masked_accuracy"][0]) == sum(int(part.metrics["masked_accuracy"][0]) for part in parts)


def test_loss_is_computed_in_float32_under_autocast():
    batch = MLMCollator(SpecialIds(V), max_length=24, kind="seq2seq")(make_examples(6, V))
    with torch.autocast("cpu", torch.bfloat16):
        output = MLMLoss()(make_model(), batch)
    assert output.loss_sum.dtype == torch.float32
    assert output.loss_sum.isfinite()


def test_a_batch_in_which_nothing_is_masked_has_no_loss():
    example = {"input_ids": [8, 9], "target_ids": [8, 9], "example_id": 0, "epoch": 0, "position": 0}
    batch = MLMCollator(SpecialIds(V), max_length=24, kind="infill")([example])
    output = MLMLoss()(make_model(), batch)
    assert (float(output.loss_sum.detach()), output.num_items) == (0.0, 0)
    output.loss_sum.backward()


def test_a_perfect_model_has_no_loss_and_sees_no_more_positions_than_it_must():
    batch = MLMCollator(SpecialIds(V), max_length=24, kind="seq2seq")(make_examples(20, V, seed=2))

    class Perfect(torch.nn.Module):
        def forward(self, input_ids, attention_mask, logits_index, head_function):
            assert (input_ids.flatten()[logits_index] == MASK).all()
            assert len(logits_index) == (input_ids == MASK).sum()
            logits = torch.nn.functional.one_hot(batch["target_ids"], V) * 50.0
            return type("Output", (), {"head_output": head_function(logits, torch.nn.Identity(), None)})

    output = MLMLoss()(Perfect(), batch)
    assert float(output.loss_sum) == pytest.approx(0.0, abs=1e-6)
    assert output.metrics["masked_accuracy"] == (output.num_items, output.num_items)


def test_what_is_never_written_has_no_probability():
    model = make_model()
    logits = model(torch.tensor([[8, MASK, 9]])).logits
    assert model.config.suppressed_ids == [1, 2, 4, 5]
    assert MLMConfig().suppressed_ids == [MASK]
    assert logits[..., [CLS, MASK]].isneginf().all()
    assert logits[..., [PAD, EOS, 7]].isfinite().all()
    indexed = model(torch.tensor([[8, MASK, 9], [7, 7, MASK]]), logits_index=torch.tensor([5, 1])).logits
    whole = model(torch.tensor([[8, MASK, 9], [7, 7, MASK]])).logits
    torch.testing.assert_close(indexed, torch.stack((whole[1, 2], whole[0, 1])))
