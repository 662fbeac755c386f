import numpy as np
import pytest
import torch

from tests.host_reads import as_on_an_accelerator
from tests.modeling import naive
from tests.modeling.naive import BOS, MASK, PAD, batch_of, check_histogram, written
from tests.modeling.naive_levenshtein_transformer import TableModel, exact_law, make_model
from xlm_hf.modules.edits import DELETE, INSERT, UNMASK

PROMPTS = [[8, 9, 10], [11], [12, 13, 14, 15, 16, 17], []]
SOURCES = [[8, 9], [10, 11, 12, 13], [], [14, 15, 16]]


@pytest.mark.parametrize("start", [(), (8, 9, 9)])
@pytest.mark.parametrize("options", [{}, {"temperature": 0.5, "top_p": 0.9}, {"max_rounds": 2}])
def test_samples_follow_the_exact_law(options, start):
    """A table in place of the network; three tokens at most, so that placeholders are left out."""
    num, model = 3000, TableModel(do_sample=True, max_new_tokens=3, **options)
    source = {"source_ids": torch.tensor([start] * num)} if start else {}
    output = model.generate(torch.tensor([[BOS]] * num), seed=11, **source)
    law = exact_law(model, model.generation_config, 3, start)
    texts = written(output, 1)
    check_histogram(texts, law)
    assert len(law) > 3
    assert [len(text) < 3 for text in texts] == [reason == "stop" for reason in output.finish_reason]


class Scripted(TableModel):
    """What is deleted, how many placeholders each gap gets and what they become, for the texts that come up."""

    # Restores 9 8 9.
    known = {
        (): ([], [2], []),
        (MASK, MASK): ([0, 0], [0, 0, 0], [9, 9]),
        (9, 9): ([0, 0], [0, 1, 0], [9, 9]),
        (9, MASK, 9): ([0, 0, 0], [0, 0, 0, 0], [9, 8, 9]),
        (9, 8, 9): ([0, 0, 0], [0, 0, 0, 0], [9, 8, 9]),
        (8, 8, 9): ([1, 0, 0], [0, 0, 0, 0], [9, 8, 9]),
        (8, 9): ([0, 0], [1, 0, 0], [8, 9]),
        (MASK, 8, 9): ([0, 0, 0], [0, 0, 0, 0], [9, 8, 9]),
    }

    def scores(self, text):
        deleted, counts, tokens = map(np.array, self.known[text])
        logits = -np.abs(np.arange(10) - tokens.reshape(-1, 1))
        return deleted - 0.5, -np.abs(np.arange(3) - counts[:, None]), logits


def test_rounds_go_on_until_nothing_changes():
    """Two passes from nothing, three of a whole round, and deletions and placeholders that change nothing."""
    output = Scripted().generate(torch.tensor([[BOS]]), max_new_tokens=5, return_history=True)
    assert written(output, 1) == [(9, 8, 9)]
    assert output.nfe.tolist() == [2 + 3 + 2]
    assert output.finish_reason == ["stop"]
    assert output.history[0, 1:].tolist() == [2, 5, 2]
    edits = [(1, INSERT, 1, MASK), (1, INSERT, 2, MASK), (2, UNMASK, 1, 9), (2, UNMASK, 2, 9)]
    edits += [(4, INSERT, 2, MASK), (5, UNMASK, 2, 8)]
    assert [tuple(edit[1:]) for edit in output.edits.tolist()] == edits


def test_a_text_that_is_given_is_refined():
    prompts, sources = torch.tensor([[BOS]] * 2), torch.tensor([[8, 8, 9], [9, 8, 9]])
    output = Scripted().generate(prompts, source_ids=sources, max_new_tokens=5, return_history=True)
    assert written(output, 1) == [(9, 8, 9)] * 2
    # The right one takes deletions and placeholders to see that nothing is to be done.
    assert output.nfe.tolist() == [5, 2]
    assert output.history[:, 1:].tolist() == [[2, -1, -1], [-1, -1, -1]]
    assert output.edits.tolist() == [[0, 0, DELETE, 1, 8], [0, 1, INSERT, 1, MASK], [0, 2, UNMASK, 1, 9]]


def test_a_full_row_is_still_refined_and_ends_by_its_length():
    output = Scripted().generate(torch.tensor([[BOS]]), source_ids=torch.tensor([[8, 8, 9]]), max_new_tokens=3)
    assert written(output, 1) == [(9, 8, 9)]
    assert output.finish_reason == ["length"]


def test_a_row_that_never_settles_ends_after_the_last_round():
    class Restless(Scripted):
        known = {
            (8, 9): ([1, 0], [0, 0, 0], [8, 9]),
            (9,): ([0], [0, 1], [9]),
            (9, MASK): ([0, 0], [0, 0, 0], [9, 8]),
            (9, 8): ([1, 0], [0, 0, 0], [9, 8]),
            (8,): ([0], [0, 1], [8]),
            (8, MASK): ([0, 0], [0, 0, 0], [8, 9]),
        }

    call = {"source_ids": torch.tensor([[8, 9]]), "max_new_tokens": 4}
    for max_rounds, text in ((3, (9, 8)), (4, (8, 9))):
        output = Restless().generate(torch.tensor([[BOS]]), max_rounds=max_rounds, **call)
        assert output.nfe.tolist() == [3 * max_rounds]
        assert output.finish_reason == ["stop"]
        assert written(output, 1) == [text]


def inputs_of(rows, side="left", sources=True):
    inputs = {"input_ids": batch_of([PROMPTS[i] for i in rows], side)}
    return inputs | ({"source_ids": naive.stack([SOURCES[i] for i in rows], PAD, side)} if sources else {})


@pytest.mark.parametrize("sources", [True, False])
@pytest.mark.parametrize("options", [{}, {"do_sample": True}, {"max_new_tokens": None, "max_length": 14}])
def test_a_row_decodes_alike_in_any_batch_and_the_prompt_stays(options, sources):
    model = make_model()
    options = {"max_new_tokens": 7, "return_history": True, "max_rounds": 4, **options}
    seeds, width = [3, 1, 4, 1], batch_of(PROMPTS).shape[1]
    together = model.generate(**inputs_of(range(4), sources=sources), seed=seeds, **options)
    assert torch.equal(together.sequences[:, :width], batch_of(PROMPTS))
    right = model.generate(**inputs_of(range(4), "right", sources), seed=seeds, **options)
    assert torch.equal(together.sequences, right.sequences)
    with as_on_an_accelerator():
        rounded = model.generate(**inputs_of(range(4), sources=sources), seed=seeds, **options)
    for field in ("sequences", "history", "nfe", "edits"):
        assert torch.equal(rounded[field], together[field])
    for row, prompt in enumerate(PROMPTS):
        alone = model.generate(**inputs_of([row], sources=sources), seed=[seeds[row]], **options)
        text = written(together, width)[row]
        assert written(alone, len(prompt) + 1)[0] == text
        assert alone.nfe[0] == together.nfe[row]
        capacity = options["max_new_tokens"] or 14 - len(prompt) - 1
        assert len(text) <= capacity
        assert together.finish_reason[row] == alone.finish_reason[0] == ("length" if len(text) == capacity else "stop")
    assert MASK not in together.sequences


def test_the_log_replays_the_decode():
    output = make_model().generate(**inputs_of(range(4)), max_new_tokens=9, max_rounds=4, return_history=True, seed=0)
    rows, kinds = [[*prompt, BOS, *source] for prompt, source in zip(PROMPTS, SOURCES, strict=True)], set()
    for row, _, kind, position, token in output.edits.tolist():
        kinds.add(kind)
        if kind == INSERT:
            assert token == MASK
            rows[row].insert(position, token)
        elif kind == DELETE:
            assert rows[row].pop(position) == token
        else:
            assert rows[row][position] == MASK
            rows[row][position] = token
    assert rows == [[token for token in row if token != PAD] for row in output.sequences.tolist()]
    assert kinds == {INSERT, DELETE, UNMASK}


def test_ids_that_are_suppressed():
    output = make_model().generate(
        batch_of(PROMPTS), max_new_tokens=6, suppress_tokens=[7, 8, 9], do_sample=True, seed=1
    )
    tokens = output.sequences[:, 7:]
    assert tokens[tokens != PAD].min() >= 10


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"max_round": 1}, "no option 'max_round': did you mean 'max_rounds'"),
        ({"max_rounds": 0}, "max_rounds must be at least 1 and is 0"),
        ({"source_ids": torch.tensor([[MASK]])}, f"A source text holds the special token {MASK}, but no text does"),
        ({"source_ids": torch.tensor([8])}, r"pass source_ids \(1, N\), a text for each prompt"),
        (
            {"source_ids": torch.tensor([[8, 9]]), "max_new_tokens": 1},
            "begins with 2 tokens and has 1 positions for them",
        ),
    ],
)
def test_bad_calls_are_refused_in_one_sentence(call, message):
    with pytest.raises(ValueError, match=message):
        make_model().generate(**{"input_ids": batch_of(PROMPTS[:1]), **call})
