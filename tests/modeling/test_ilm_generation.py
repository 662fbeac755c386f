import itertools
from collections import Counter
from functools import partial

import numpy as np
import pytest
import torch

from tests.host_reads import as_on_an_accelerator
from tests.modeling import naive
from tests.modeling.naive import BOS, CLS, PAD, check_histogram, written
from tests.modeling.naive_ilm import TableModel, exact_law, make_model
from xlm_hf.modeling.ilm import ILMForInsertionLM, ILMGenerationConfig

STOP_AT = [(5,), (6, 7), (7, 6), (5, 5, 6)]
METHODS = {
    "joint": {},
    "joint, filtered": {"temperature": 0.7, "top_k": 5, "top_p": 0.8},
    "two-stage": {"sampling_method": "two_stage"},
    "two-stage, filtered": {
        "sampling_method": "two_stage",
        "temperature": 1.3,
        "top_p": 0.7,
        "slot_top_k": 2,
        "slot_temperature": 0.5,
    },
    "two at a time": {"insertions_per_step": 2},
    "two-stage, three at a time": {"sampling_method": "two_stage", "insertions_per_step": 3, "top_k": 2},
}


def check_law(model, config, num=6000):
    """The histogram of whole decodes against every path enumerated."""
    output = model.generate(torch.tensor([[CLS, BOS]] * num), generation_config=config, seed=11)
    check_histogram(written(output, 2), exact_law(model, config, config.max_new_tokens))
    return output


@pytest.mark.parametrize("method", METHODS)
def test_samples_follow_the_exact_law(method):
    """A table in place of the network."""
    model, max_new_tokens = TableModel(STOP_AT), 4
    config = ILMGenerationConfig(do_sample=True, max_new_tokens=max_new_tokens, **METHODS[method])
    output = check_law(model, config)
    for sequence, reason in zip(written(output, 2), output.finish_reason, strict=True):
        assert reason == ("stop" if sequence in model.stop_at and len(sequence) < max_new_tokens else "length")


@pytest.mark.parametrize("method", ["joint", "two at a time"])
def test_the_end_is_drawn_with_its_probability(method):
    """Random stopping probabilities for every sequence: the law that the likelihood bound is about."""

    def stop_probability(written):
        return float(np.random.default_rng([len(written), 5, *written]).uniform(0.1, 0.7))

    model = TableModel(stop_probability=stop_probability)
    config = ILMGenerationConfig(do_sample=True, max_new_tokens=3, stopping="sample", **METHODS[method])
    output = check_law(model, config)
    short = [len(sequence) < 3 for sequence in written(output, 2)]
    assert 1000 < sum(short) < 5900
    # A row that stays below its capacity was ended by its head; of those at the capacity none was.
    assert [reason == "stop" for reason in output.finish_reason] == short


def test_the_log_replays_the_decode_and_a_criterion_ends_rows():
    model, edits = make_model(), []

    class Streamer:
        takes_edits = True
        put = end = staticmethod(lambda *value: None)
        put_draft = staticmethod(lambda value, edits_of_step=edits, edits=None: edits_of_step.append(edits))

    options = {"do_sample": True, "insertions_per_step": 2, "stopping_threshold": None, "max_new_tokens": 9}
    output = model.generate(batch_of(PROMPTS), seed=0, return_history=True, streamer=Streamer(), **options)
    assert edits.pop(0) is None  # with the draft before the first step
    rows = [[CLS, *prompt, BOS] for prompt in PROMPTS]
    for row, step, kind, position, token in output.edits.tolist():
        assert kind == 0
        rows[row].insert(position, token)
        assert step <= output.history.max()
    assert rows == [[token for token in row if token != PAD] for row in output.sequences.tolist()]
    assert sorted(torch.cat(edits).tolist()) == sorted(output.edits.tolist())
    assert [set(of_step[:, 1].tolist()) for of_step in edits] == [{step} for step in range(len(edits))]

    def longer_than(ids, scores):
        return (ids != PAD).sum(dim=-1) >= 7

    output = model.generate(batch_of(PROMPTS), seed=0, stopping_criteria=[longer_than], **options)
    lengths = (output.sequences != PAD).sum(dim=-1).tolist()
    assert all(7 <= length <= 10 for length in lengths)
    assert output.finish_reason == ["stop"] * 4
    assert (output.nfe < 9).all()


def test_greedy_decoding_takes_the_best_pair():
    model = TableModel()
    output = model.generate(torch.tensor([[CLS, BOS]]), max_new_tokens=3, return_history=True)
    sequence: list[int] = []
    for _ in range(3):
        table = model.table(tuple(sequence))
        slot, token = divmod(int(table.argmax()), table.shape[1])
        sequence.insert(slot, token)
    assert written(output, 2) == [tuple(sequence)]
    assert output.nfe.tolist() == [3]
    # Replaying the history in the order of its steps ends in the same sequence.
    steps = output.history[0, 2:].tolist()
    assert sorted(steps) == [0, 1, 2]
    first = output.sequences[0, 2 + steps.index(0)]
    assert int(first) == int(model.table(()).argmax()) % 8


PROMPTS = [[8, 9, 10], [11], [12, 13, 14, 15, 16, 17], []]
batch_of = partial(naive.batch_of, start=(CLS,))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"do_sample": True},
        {"do_sample": True, "insertions_per_step": 3},
        {"do_sample": True, "top_p": 0.8},
        # Capacity by the prompt: rows that are full stand beside rows that go on.
        {"do_sample": True, "max_new_tokens": None, "max_length": 12, "stopping_threshold": None},
    ],
)
def test_a_row_decodes_alike_in_any_batch_and_the_prompt_stays(options):
    model = make_model()
    options = {"max_new_tokens": 7, "return_history": True, **options}
    seeds = [3, 1, 4, 1]
    together = model.generate(batch_of(PROMPTS), seed=seeds, **options)
    width = batch_of(PROMPTS).shape[1]
    torch.testing.assert_close(together.sequences[:, :width], batch_of(PROMPTS))
    right = model.generate(batch_of(PROMPTS, side="right"), seed=seeds, **options)
    torch.testing.assert_close(together.sequences, right.sequences)
    with as_on_an_accelerator():
        rounded = model.generate(batch_of(PROMPTS), seed=seeds, **options)
    for field in ("sequences", "history", "nfe"):
        torch.testing.assert_close(rounded[field], together[field])
    assert rounded.finish_reason == together.finish_reason
    for row, prompt in enumerate(PROMPTS):
        alone = model.generate(batch_of([prompt]), seed=[seeds[row]], **options)
        assert written(alone, len(prompt) + 2)[0] == written(together, width)[row]
        assert alone.nfe[0] == together.nfe[row]
        assert alone.finish_reason[0] == together.finish_reason[row]
    assert len({len(w) for w in written(together, width)}) > 2


def test_same_seed_same_tokens_and_bare_prompts_are_wrapped():
    model = make_model()
    options = {"max_new_tokens": 6, "do_sample": True, "stopping_threshold": None}
    first = model.generate(batch_of(PROMPTS[:2]), seed=5, **options).sequences
    torch.testing.assert_close(first, model.generate(batch_of(PROMPTS[:2]), seed=5, **options).sequences)
    assert not torch.equal(first, model.generate(batch_of(PROMPTS[:2]), seed=6, **options).sequences)
    bare = model.generate(torch.tensor([[8, 9, 10], [PAD, PAD, 11]]), seed=5, **options).sequences
    torch.testing.assert_close(bare, first)
    assert model.generate(seed=1, **options).sequences[0, :2].tolist() == [CLS, BOS]


def test_never_suppressed_ids_and_no_more_than_max_length():
    model = make_model()
    options = {"do_sample": True, "suppress_tokens": [7, 8, 9], "stopping_threshold": None}
    output = model.generate(batch_of(PROMPTS), seed=0, max_length=12, **options)
    width = batch_of(PROMPTS).shape[1]
    tokens = output.sequences[:, width:]
    assert tokens[tokens != PAD].min() >= 10
    for prompt, sequence in zip(PROMPTS, written(output, width), strict=True):
        assert len(prompt) + 2 + len(sequence) == 12
    assert set(output.finish_reason) == {"length"}
    torch.testing.assert_close(output.tokens_per_forward, torch.ones(4))


def test_history_tells_the_step_of_each_token():
    model = make_model()
    options = {"do_sample": True, "insertions_per_step": 2, "stopping_threshold": None, "max_new_tokens": 9}
    output = model.generate(batch_of(PROMPTS), seed=0, return_history=True, **options)
    width = batch_of(PROMPTS).shape[1]
    assert (output.history[:, :width] == -1).all()
    for row in range(len(PROMPTS)):
        steps = output.history[row, width:].tolist()
        # One slot is there at first, then two that are neighbours, and from then on two that are not.
        assert Counter(steps) == {0: 1, 1: 1, 2: 2, 3: 2, 4: 2, 5: 1}
        # Tokens of one step never end up side by side.
        assert all(a != b for a, b in itertools.pairwise(steps))
        # Every prefix of the history is what a shorter run writes.
        shorter = model.generate(batch_of(PROMPTS), seed=0, **{**options, "max_new_tokens": 4})
        sequence = output.sequences[row, width:].tolist()
        assert [t for t, s in zip(sequence, steps, strict=True) if s <= 2] == list(written(shorter, width)[row])


def test_streamer_and_logits_processor_see_every_step():
    class Streamer:
        drafts, final = [], []

        def put(self, value):
            self.final.append(value.tolist())

        def put_draft(self, value):
            self.drafts.append(value.tolist())

        def end(self):
            self.final.append("end")

    from transformers import LogitsProcessor, LogitsProcessorList

    class OnlyTen(LogitsProcessor):
        steps = []

        def __call__(self, input_ids, scores, cur_step):
            assert len(input_ids) == len(scores)
            self.steps.append(cur_step)
            masked = torch.full_like(scores, -torch.inf)
            masked[:, 10] = scores[:, 10]
            return masked

    model, streamer, processor = make_model(), Streamer(), OnlyTen()
    output = model.generate(
        batch_of(PROMPTS[:1]),
        streamer=streamer,
        logits_processor=LogitsProcessorList([processor]),
        max_new_tokens=3,
        stopping_threshold=None,
    )
    assert streamer.drafts == [[[10]], [[10, 10]], [[10, 10, 10]]]
    assert streamer.final == [batch_of(PROMPTS[:1]).tolist(), [[10, 10, 10]], "end"]
    assert processor.steps == [0, 1, 2]
    assert output.sequences[0, -3:].tolist() == [10, 10, 10]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"temprature": 1.0}, "no option 'temprature': did you mean 'temperature'"),
        ({"temperature": 0.0}, "temperature must be greater than 0 and is 0.0"),
        ({"top_p": 1.5}, r"top_p must be in \(0, 1\] and is 1.5"),
        ({"sampling_method": "both"}, "sampling_method must be one of joint, two_stage and is 'both'"),
        ({"stopping": "draw"}, "stopping must be one of threshold, sample and is 'draw'"),
        # The prompt of a family without [CLS].
        ({"input_ids": torch.tensor([[8, 9, BOS]])}, "or only some of its special tokens"),
        ({"insertions_per_step": 0}, "insertions_per_step must be at least 1 and is 0"),
        ({"max_new_tokens": 30}, "max_new_tokens is 30, but a prompt of 5 tokens leaves 19 of the model's 24"),
        ({"max_length": 5}, "max_length is 5 and the prompt has 5 tokens"),
        ({"seed": [1, 2]}, "seed has 2 entries for 1 rows"),
        ({"input_ids": torch.tensor([[CLS, 20, BOS]])}, "Token id 20 is outside the model's vocabulary of 20"),
        ({"input_ids": torch.full((1, 24), 9)}, "26 tokens and the model has 24 positions"),
    ],
)
def test_bad_calls_are_refused_in_one_sentence(call, message):
    with pytest.raises(ValueError, match=message):
        make_model().generate(**{"input_ids": batch_of(PROMPTS[:1]), **call})


def test_generation_config_survives_saving(tmp_path):
    model = make_model()
    model.generation_config = ILMGenerationConfig(top_p=0.5, slot_top_k=1, sampling_method="two_stage", pad_token_id=0)
    model.save_pretrained(tmp_path)
    loaded = ILMForInsertionLM.from_pretrained(tmp_path)
    assert loaded.generation_config.to_dict() == model.generation_config.to_dict()
    torch.testing.assert_close(loaded.generate(seed=3).sequences, model.generate(seed=3).sequences)
