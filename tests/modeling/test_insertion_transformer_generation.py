from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.host_reads import as_on_an_accelerator
from tests.modeling.naive import BOS, EOS, PAD, batch_of, check_histogram, written
from tests.modeling.naive_insertion_transformer import HalvingModel, TableModel, exact_law, make_model
from xlm_hf.modeling.insertion_transformer import InsertionTransformerGenerationConfig
from xlm_hf.modules.edits import EditBuffer

PUBLISHED = Path(__file__).parents[1] / "fixtures" / "published" / "insertion_transformer.safetensors"
PROMPTS = [[8, 9, 10], [11], [12, 13, 14, 15, 16, 17], []]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"insertions_per_step": 1},
        {"insertions_per_step": 2, "end_penalty": 1.5},
        {"temperature": 0.7, "top_k": 2, "top_p": 0.9},
    ],
)
def test_samples_follow_the_exact_law(options):
    """A table in place of the network; three tokens at most, so that a full row leaves draws out."""
    model, num = TableModel(), 3000
    config = InsertionTransformerGenerationConfig(do_sample=True, max_new_tokens=3, **options)
    output = model.generate(torch.tensor([[BOS]] * num), generation_config=config, seed=11)
    check_histogram(written(output, 1), exact_law(model, config, 3))
    short = [len(text) < 3 for text in written(output, 1)]
    assert 0 < sum(short) < num
    assert [reason == "stop" for reason in output.finish_reason] == short


@pytest.mark.parametrize(("capacity", "reason"), [(20, "stop"), (15, "length")])
def test_parallel_decoding_takes_log2_rounds_and_serial_decoding_one_a_token(capacity, reason):
    """15 tokens in 4 rounds, and one more to see that nothing is missing, which a full row does not need."""
    model, prompt = HalvingModel(), torch.tensor([[8, BOS]])
    parallel = model.generate(prompt, max_new_tokens=capacity, return_history=True)
    serial = model.generate(prompt, max_new_tokens=capacity, insertions_per_step=1)
    for output, rounds in ((parallel, 4), (serial, 15)):
        assert written(output, 2) == [model.text]
        assert output.nfe.tolist() == [rounds + (reason == "stop")]
        assert output.finish_reason == [reason]
    # A balanced tree, level by level.
    assert parallel.history[0, 2:].tolist() == [3, 2, 3, 1, 3, 2, 3, 0, 3, 2, 3, 1, 3, 2, 3]


def test_a_word_for_every_slot_is_inserted_as_in_the_published_code():
    """Recorded from fairseq, sentence ends cut off; a slot whose word is padding gets none."""
    recorded, rows, pad = load_file(PUBLISHED), torch.arange(6), 1
    texts = [row[row > 2] for row in recorded["kept"]]
    start = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=pad)
    lengths, mask = torch.tensor([*map(len, texts)]), torch.ones(6, 1, dtype=torch.bool)
    state = EditBuffer(torch.full((6, 1), BOS), mask, torch.full((6,), 20), pad, start=start, start_lengths=lengths)
    words, slots = recorded["words"], torch.arange(8).expand(6, 8)
    state.apply(rows, 0, slots, words, (words != pad) & (slots <= lengths[:, None]))
    expected = [row[row > 2].tolist() for row in recorded["with_words"]]
    assert [row[:length].tolist() for row, length in zip(state.tokens, state.lengths, strict=True)] == expected


def test_a_row_with_little_capacity_left_takes_the_most_probable_tokens():
    model = TableModel()
    whole = model.generate(torch.tensor([[BOS]]), max_new_tokens=1, end_penalty=50.0)
    first = written(whole, 1)[0]
    scores = torch.from_numpy(model.table(first)).float()
    scores[:, EOS] -= 50.0
    best, tokens = scores.log_softmax(dim=-1).max(dim=-1)
    output = model.generate(torch.tensor([[BOS]]), max_new_tokens=2, end_penalty=50.0)
    slot = int(best.argmax())
    expected = list(first)
    expected.insert(slot, int(tokens[slot]))
    assert written(output, 1) == [tuple(expected)]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"do_sample": True},
        {"insertions_per_step": 1},
        {"do_sample": True, "insertions_per_step": 2, "top_p": 0.8},
        # Capacity by the prompt: rows that are full stand beside rows that go on.
        {"do_sample": True, "max_new_tokens": None, "max_length": 12, "end_penalty": 2.0},
    ],
)
def test_a_row_decodes_alike_in_any_batch_and_the_prompt_stays(options):
    model = make_model()
    options = {"max_new_tokens": 7, "return_history": True, **options}
    seeds, width = [3, 1, 4, 1], batch_of(PROMPTS).shape[1]
    together = model.generate(batch_of(PROMPTS), seed=seeds, **options)
    torch.testing.assert_close(together.sequences[:, :width], batch_of(PROMPTS))
    right = model.generate(batch_of(PROMPTS, side="right"), seed=seeds, **options)
    torch.testing.assert_close(together.sequences, right.sequences)
    with as_on_an_accelerator():
        rounded = model.generate(batch_of(PROMPTS), seed=seeds, **options)
    for field in ("sequences", "history", "nfe", "edits"):
        torch.testing.assert_close(rounded[field], together[field])
    most = options["max_new_tokens"]
    for row, prompt in enumerate(PROMPTS):
        alone = model.generate(batch_of([prompt]), seed=[seeds[row]], **options)
        text = written(together, width)[row]
        assert written(alone, len(prompt) + 1)[0] == text
        assert alone.nfe[0] == together.nfe[row]
        assert EOS not in text
        room = most if most is not None else 12 - len(prompt) - 1
        assert len(text) <= room
        assert together.finish_reason[row] == alone.finish_reason[0] == ("length" if len(text) == room else "stop")


def test_the_log_replays_the_decode():
    output = make_model().generate(batch_of(PROMPTS), max_new_tokens=9, end_penalty=9.0, return_history=True, seed=0)
    rows = [[*prompt, BOS] for prompt in PROMPTS]
    for row, _, kind, position, token in output.edits.tolist():
        assert kind == 0
        rows[row].insert(position, token)
    assert rows == [[token for token in row if token != PAD] for row in output.sequences.tolist()]
    assert len(output.edits) > 20


def test_ids_that_are_suppressed_and_a_model_without_an_end():
    model = make_model()
    output = model.generate(batch_of(PROMPTS), max_new_tokens=6, suppress_tokens=[EOS, 7, 8, 9], do_sample=True, seed=1)
    tokens = output.sequences[:, 7:]
    assert tokens.shape == (4, 6)
    assert tokens.min() >= 10
    without = make_model(eos_token_id=None).generate(batch_of(PROMPTS), max_new_tokens=6, end_penalty=3.0)
    assert without.finish_reason == ["length"] * 4
    # 1, 2, 4 and then the best of all.
    assert without.nfe.tolist() == [3] * 4


def test_logits_are_taken_a_block_at_a_time(monkeypatch):
    model, options = make_model(), {"max_new_tokens": 9, "do_sample": True, "seed": 2}
    whole = model.generate(batch_of(PROMPTS), **options).sequences
    module = "xlm_hf.modeling.insertion_transformer.generation_insertion_transformer._BLOCK_SIZE"
    monkeypatch.setattr(module, 45)
    torch.testing.assert_close(model.generate(batch_of(PROMPTS), **options).sequences, whole)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"insertion_per_step": 1}, "no option 'insertion_per_step': did you mean 'insertions_per_step'"),
        ({"insertions_per_step": 0}, "insertions_per_step must be at least 1 and is 0"),
    ],
)
def test_bad_calls_are_refused_in_one_sentence(call, message):
    with pytest.raises(ValueError, match=message):
        make_model().generate(**{"input_ids": batch_of(PROMPTS[:1]), **call})
