import pytest
import torch

from tests.modeling.naive import BOS, EOS, PAD, SpecialIds, make_examples
from xlm_hf.modeling.arlm import ARLMCollator

V = 40


def test_rows_are_prompt_bos_target_and_predict_target_eos():
    examples = make_examples(64, V)
    batch = ARLMCollator(SpecialIds(V), max_length=32, kind="seq2seq")(examples)
    L = batch["input_ids"].shape[1]
    index, targets = [], []
    for row, example in enumerate(examples):
        ids = [*example["prompt_ids"], BOS, *example["target_ids"]]
        assert batch["input_ids"][row].tolist() == ids + [PAD] * (L - len(ids))
        assert batch["attention_mask"][row].tolist() == [True] * len(ids) + [False] * (L - len(ids))
        index += [row * L + position for position in range(len(example["prompt_ids"]), len(ids))]
        targets += [*example["target_ids"], EOS]
    assert batch["logits_index"].tolist() == index
    assert batch["target_ids"].tolist() == targets
    assert batch["example_id"].tolist() == [example["example_id"] for example in examples]


def test_language_modeling_is_seq2seq_with_an_empty_prompt():
    examples = make_examples(16, V)
    as_text = [{**example, "input_ids": example["target_ids"]} for example in examples]
    as_pairs = [{**example, "prompt_ids": []} for example in examples]
    text = ARLMCollator(SpecialIds(V), max_length=32, kind="lm")(as_text)
    pairs = ARLMCollator(SpecialIds(V), max_length=32, kind="seq2seq")(as_pairs)
    for name in pairs:
        torch.testing.assert_close(text[name], pairs[name])


def test_nothing_is_corrupted():
    examples = make_examples(16, V)
    first = ARLMCollator(SpecialIds(V), max_length=32, seed=0, kind="seq2seq")(examples)
    later = [{**example, "epoch": 3, "position": 15 - i} for i, example in enumerate(examples)]
    second = ARLMCollator(SpecialIds(V), max_length=32, seed=1, kind="seq2seq")(later)
    for name in first:
        torch.testing.assert_close(first[name], second[name])


def test_prediction_batches_are_padded_on_the_left():
    examples = make_examples(9, V)
    batch = ARLMCollator(SpecialIds(V), max_length=32, kind="seq2seq", prediction=True)(examples)
    width = batch["input_ids"].shape[1]
    for row, example in enumerate(examples):
        ids = [*example["prompt_ids"], BOS]
        assert batch["input_ids"][row].tolist() == [PAD] * (width - len(ids)) + ids
        assert batch["attention_mask"][row].tolist() == [False] * (width - len(ids)) + [True] * len(ids)
    empty = ARLMCollator(SpecialIds(V), max_length=32, kind="lm", prediction=True)(
        [{"example_id": example["example_id"]} for example in examples]
    )
    assert empty["input_ids"].tolist() == [[BOS]] * 9
    assert empty["attention_mask"].all()
    assert empty["example_id"].tolist() == batch["example_id"].tolist()


def test_a_sequence_may_fill_the_model_and_no_more():
    example = {"prompt_ids": [8] * 10, "target_ids": [9] * 20, "example_id": 0}
    assert ARLMCollator(SpecialIds(V), max_length=32, kind="seq2seq")([example])["input_ids"].shape == (1, 31)
    with pytest.raises(ValueError, match=r"has 32 tokens with \[BOS\] and \[EOS\], and the model has 31 positions"):
        ARLMCollator(SpecialIds(V), max_length=31, kind="seq2seq")([example])
    with pytest.raises(ValueError, match=r"A prompt has 11 tokens with \[BOS\], and the model has 10 positions"):
        ARLMCollator(SpecialIds(V), max_length=10, kind="seq2seq", prediction=True)([example])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target_ids": [V]}, f"Token id {V} is outside the vocabulary of {V}"),
        ({"prompt_ids": [-1]}, f"Token id -1 is outside the vocabulary of {V}"),
    ],
)
def test_ids_outside_the_vocabulary_are_refused(change, message):
    example = {**make_examples(1, V)[0], **change}
    with pytest.raises(ValueError, match=message):
        ARLMCollator(SpecialIds(V), max_length=32, kind="seq2seq")([example])
