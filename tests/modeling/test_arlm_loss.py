import math

import pytest
import torch

from tests.modeling.naive import BOS, EOS, SpecialIds, make_examples
from tests.modeling.naive_arlm import TableModel, make_model
from xlm_hf.modeling.arlm import ARLMCollator, ARLMLoss
from xlm_hf.objectives import head_operator

V = 13


def collate(examples):
    return ARLMCollator(SpecialIds(V), max_length=32, kind="seq2seq")(examples)


@pytest.mark.parametrize("seed", range(3))
def test_loss_and_gradients_equal_a_double_loop(seed):
    model = make_model(V).double()
    examples = make_examples(7, V, seed=seed)
    output = ARLMLoss()(model, collate(examples))
    gradients = torch.autograd.grad(output.loss_sum, list(model.parameters()))

    expected, right, nats = 0.0, 0, []
    for example in examples:
        before = expected
        row = [*example["prompt_ids"], BOS, *example["target_ids"], EOS]
        for position in range(len(example["prompt_ids"]), len(row) - 1):
            # Only what stands before it: nothing later, no padding, no other row.
            scores = model(torch.tensor([row[: position + 1]])).logits[0, -1]
            expected = expected - scores.log_softmax(dim=-1)[row[position + 1]]
            right += int(scores.argmax()) == row[position + 1]
        nats.append(float((expected - before).detach()))
    expected_gradients = torch.autograd.grad(expected, list(model.parameters()))

    assert (
        output.num_items == ARLMLoss().num_items(collate(examples)) == sum(len(e["target_ids"]) + 1 for e in examples)
    )
    assert output.metrics["next_token_accuracy"] == (right, output.num_items)
    assert output.sequence_tokens.tolist() == [len(e["target_ids"]) + 1 for e in examples]
    assert output.sequence_nats.tolist() == pytest.approx(nats, rel=1e-5)
    assert output.metrics["sequence_nll"] == (output.sequence_nats.sum(), 7)
    torch.testing.assert_close(output.loss_sum, expected, rtol=1e-9, atol=1e-9)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-9, atol=1e-9)


def test_loss_is_a_sum_over_sequences():
    model = make_model(V)
    examples = make_examples(6, V, seed=1)
    whole = ARLMLoss()(model, collate(examples))
    parts = [ARLMLoss()(model, collate([example])) for example in examples]
    torch.testing.assert_close(whole.loss_sum, sum(part.loss_sum for part in parts))
    for name, (total, count) in whole.metrics.items():
        assert float(total) == pytest.approx(sum(float(part.metrics[name][0]) for part in parts), rel=1e-5)
        assert int(count) == sum(int(part.metrics[name][1]) for part in parts)


def test_loss_is_the_exact_negative_log_likelihood():
    """With the exact conditionals of a law, each text's loss is its information, and exp(-loss) sums to one."""
    model = TableModel()
    texts = [list(text[:-1]) for text in model.law]
    collator = ARLMCollator(SpecialIds(8), max_length=32, kind="lm")
    total = 0.0
    for text, p in zip(texts, model.law.values(), strict=True):
        output = ARLMLoss()(model, collator([{"input_ids": text, "example_id": 0}]))
        assert float(output.loss_sum) == pytest.approx(-math.log(p), rel=1e-5)
        total += math.exp(-float(output.loss_sum))
    assert total == pytest.approx(1.0, rel=1e-5)
    together = ARLMLoss()(model, collator([{"input_ids": text, "example_id": 0} for text in texts]))
    assert float(together.loss_sum) == pytest.approx(-sum(map(math.log, model.law.values())), rel=1e-5)


def test_only_positions_with_a_loss_reach_the_vocabulary_head(monkeypatch):
    model, batch = make_model(V), collate(make_examples(5, V))
    seen, plain = [], head_operator.suppress_
    monkeypatch.setattr(head_operator, "suppress_", lambda x, ids: (seen.append(x.shape), plain(x, ids))[1])
    ARLMLoss()(model, batch)
    assert seen == [(len(batch["target_ids"]), V)]
    full = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    some = model(batch["input_ids"], attention_mask=batch["attention_mask"], logits_index=batch["logits_index"]).logits
    torch.testing.assert_close(some, full.flatten(0, 1)[batch["logits_index"]])
    last = model(batch["input_ids"], attention_mask=batch["attention_mask"], logits_to_keep=2).logits
    torch.testing.assert_close(last, full[:, -2:])


def test_end_of_sequence_is_learnt_even_where_all_special_ids_are_suppressed():
    model = make_model(V, suppress_tokens=[0, 1, 2, EOS, BOS, 5])
    assert model.config.suppressed_ids == [0, 1, 2, BOS, 5]
    logits = model(torch.tensor([[8, BOS, 9]])).logits
    assert logits.isneginf().any(dim=0).any(dim=0).nonzero().squeeze(-1).tolist() == [0, 1, 2, BOS, 5]


def test_loss_is_float32_in_half_precision():
    batch = collate(make_examples(3, V))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ARLMLoss()(make_model(V), batch).loss_sum.dtype == torch.float32
    assert ARLMLoss()(make_model(V).bfloat16(), batch).loss_sum.dtype == torch.float32
