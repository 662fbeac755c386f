import pytest
import torch

from tests.modeling.naive import SpecialIds, make_examples
from tests.modeling.naive_ilm import make_model, slow_loss
from xlm_hf.data.static_shapes import StaticShapes
from xlm_hf.modeling.ilm import ILMCollator, ILMLoss

V = 13


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("stop_loss_weight", [1.0, 0.25])
def test_loss_and_gradients_equal_those_of_the_slow_twin(seed, stop_loss_weight):
    model = make_model(V, 32).double()
    examples = make_examples(7, V, seed=seed)
    # The same word dropped twice from one gap counts twice.
    examples.append({"prompt_ids": [8], "target_ids": [9, 9, 9, 9], "example_id": 1, "epoch": seed, "position": 3})
    batch = ILMCollator(SpecialIds(V), max_length=32, seed=seed, kind="seq2seq")(examples)
    output = ILMLoss(stop_loss_weight)(model, batch)
    gradients = torch.autograd.grad(output.loss_sum, list(model.parameters()))

    expected = slow_loss(model, batch, stop_loss_weight=stop_loss_weight)
    expected_gradients = torch.autograd.grad(expected, list(model.parameters()))

    assert output.num_items == len(examples)
    torch.testing.assert_close(output.loss_sum, expected, rtol=1e-9, atol=1e-9)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-9, atol=1e-9)
    # In half precision the model is rounded, the loss is not.
    assert ILMLoss(stop_loss_weight)(model.bfloat16(), batch).loss_sum.dtype == torch.float32


def test_a_batch_that_lacks_nothing_keeps_its_bound_where_it_is_padded_to_one_shape():
    model = make_model(V, 32)
    collator = ILMCollator(SpecialIds(V), max_length=32, kind="seq2seq")
    examples = [{"prompt_ids": [8, 9], "target_ids": [], "example_id": 1, "epoch": 0, "position": 0}]
    plain, padded = (ILMLoss()(model, make(examples)) for make in (collator, StaticShapes(collator, 8)))
    assert padded.sequence_nats.isfinite().all()
    torch.testing.assert_close(padded.sequence_nats, plain.sequence_nats)


def test_loss_is_a_sum_over_sequences():
    model = make_model(V, 32).double()
    examples = make_examples(6, V, seed=1)
    collator, loss = ILMCollator(SpecialIds(V), max_length=32, kind="seq2seq"), ILMLoss()
    whole = loss(model, collator(examples))
    parts = [loss(model, collator([example])) for example in examples]
    torch.testing.assert_close(whole.loss_sum, sum(part.loss_sum for part in parts))
    for name, (total, count) in whole.metrics.items():
        torch.testing.assert_close(torch.as_tensor(total), torch.as_tensor(sum(p.metrics[name][0] for p in parts)))
        assert int(count) == sum(int(part.metrics[name][1]) for part in parts)


def test_perfect_scores_reach_the_entropy_of_the_target():
    """With the exact target distribution as logits, the token loss is the entropy of that distribution."""
    batch = ILMCollator(SpecialIds(V), max_length=32, kind="seq2seq")(make_examples(20, V, min_target=1, seed=2))
    L = batch["input_ids"].shape[1]
    slot_of_target = batch["slot_index"][batch["target_slots"]]

    class Perfect(torch.nn.Module):
        def forward(self, input_ids, attention_mask, slot_index, cls_index, head_function):
            counts = torch.zeros(input_ids.numel(), V)
            counts.index_put_((slot_of_target, batch["target_ids"]), torch.ones(len(slot_of_target)), accumulate=True)
            stop = torch.stack((batch["num_dropped"] == 0, batch["num_dropped"] > 0), -1).float() * 50
            return type(
                "Output",
                (),
                {
                    "head_output": head_function(counts[slot_index].clamp(min=1e-30).log(), torch.nn.Identity(), None),
                    "stop_logits": stop,
                },
            )

    output = ILMLoss()(Perfect(), batch)
    entropy = 0.0
    for b, n in enumerate(batch["num_dropped"].tolist()):
        cells = [
            (int(slot), int(token))
            for slot, token in zip(slot_of_target, batch["target_ids"], strict=True)
            if slot // L == b
        ]
        entropy -= sum(torch.tensor(cells.count(cell) / n).log() / n for cell in cells)
    torch.testing.assert_close(output.loss_sum, torch.as_tensor(entropy), rtol=1e-5, atol=1e-5)
    assert output.metrics["stop_accuracy"][0] == output.metrics["stop_accuracy"][1]


def test_class_weights_scale_the_two_stopping_classes():
    """The first weight is that of complete sequences, the second that of those that lack something."""
    model = make_model(V, 32).double()
    batch = ILMCollator(SpecialIds(V), max_length=32, kind="seq2seq")(make_examples(12, V, seed=3))
    is_missing = batch["num_dropped"] > 0
    assert 0 < is_missing.sum() < 12
    log_p = model(batch["input_ids"], attention_mask=batch["attention_mask"]).stop_logits.log_softmax(-1)
    complete, missing = -log_p[~is_missing, 0].sum(), -log_p[is_missing, 1].sum()
    output = ILMLoss(stop_class_weights=(2.0, 3.0))(model, batch)
    torch.testing.assert_close(output.metrics["stop_loss"][0], (2 * complete + 3 * missing).detach())
    torch.testing.assert_close(output.loss_sum, output.metrics["token_loss"][0] + 2 * complete + 3 * missing)
