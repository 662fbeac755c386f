from functools import partial

import pytest
import torch
from transformers.generation import LogitsProcessorList

from tests.host_reads import as_on_an_accelerator
from tests.modeling import naive
from tests.modeling.naive import BOS, CLS, EOS, MASK, PAD, SEP, check_histogram, until_end
from tests.modeling.naive_mlm import TableModel, exact_law, make_model, open_positions, slow_choices
from xlm_hf.modeling.mlm import MLMForMaskedLM, MLMGenerationConfig

batch_of = partial(naive.batch_of, end=())
PROMPTS = [[8, 9, 10, BOS], [7, BOS], [BOS], [11, 12, 7, 8, 9, BOS]]
METHODS = {
    "random": {"order": "random"},
    "random, filtered": {"order": "random", "temperature": 0.7, "top_k": 3, "top_p": 0.8},
    "random, two steps": {"order": "random", "num_steps": 2},
    "random, one step": {"order": "random", "num_steps": 1},
    "random, more steps than tokens": {"order": "random", "num_steps": 9},
    "random, entropy bound": {"order": "random", "entropy_bound": 0.9},
    "confidence": {},
    "confidence, filtered": {"temperature": 1.5, "top_k": 2},
    "margin, two steps": {"order": "margin", "num_steps": 2},
    "entropy": {"order": "entropy"},
    "confidence threshold": {"confidence_threshold": 0.6},
    "margin, confidence threshold": {"order": "margin", "confidence_threshold": 0.8},
    "entropy bound": {"order": "entropy", "entropy_bound": 0.8},
    "confidence, entropy bound": {"entropy_bound": 0.8},
    "error bound": {"error_bound": 0.4},
    "no error": {"order": "margin", "error_bound": 0.0},
}


@pytest.mark.parametrize("method", METHODS)
def test_samples_follow_the_exact_law(method):
    """A table in place of the network: the histogram of whole decodes against every path enumerated."""
    model = TableModel()
    config = MLMGenerationConfig(do_sample=True, max_new_tokens=model.length, **METHODS[method])
    output = model.generate(torch.full((6000, 1), BOS), generation_config=config, seed=11)
    texts = [until_end(row) for row in output.sequences[:, 1:].tolist()]
    check_histogram(texts, exact_law(model, config))
    assert output.finish_reason == ["stop" if EOS in text else "length" for text in texts]
    assert int(output.nfe.max()) <= min(model.length, config.num_steps or model.length)


@pytest.mark.parametrize("method", [name for name in METHODS if "random" not in name])
def test_greedy_decoding_equals_a_loop(method):
    model = TableModel(length=4)
    config = MLMGenerationConfig(max_new_tokens=4, return_history=True, **METHODS[method])
    output = model.generate(torch.tensor([[5, 6, BOS]]), generation_config=config)
    state, history, step = (MASK,) * 4, [-1] * 4, 0
    while positions := open_positions(state):
        laws = {i: model.distribution(state, i) for i in positions}
        ((chosen, _),) = slow_choices(laws, config, step).items()
        state = tuple(max(laws[i], key=laws[i].get) if i in chosen else token for i, token in enumerate(state))
        history = [step if i in chosen else at for i, at in enumerate(history)]
        step += 1
    text = until_end(list(state))
    assert output.sequences[0].tolist() == [5, 6, BOS, *text]
    assert output.history[0].tolist() == [-1] * 3 + history[: len(text)]
    assert output.nfe.tolist() == [step]
    assert float(output.tokens_per_forward[0]) == pytest.approx(len(text) / step)


@pytest.mark.parametrize(
    "options",
    [
        {"order": "random", "do_sample": True},
        {"do_sample": True, "top_p": 0.9, "num_steps": 4},
        {"error_bound": 0.8},
        {"order": "entropy", "entropy_bound": 1.5, "do_sample": True},
    ],
)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_row_decodes_alike_in_any_batch(options, side):
    """Ragged prompts, capacities that differ with the prompt, and inputs to be filled in, all in one batch."""
    model, seeds = make_model(), [5, 6, 7, 8, 9]
    rows = [*PROMPTS, [8, MASK, MASK, 9, MASK]]
    call = {"max_length": 12, "return_history": True, **options}
    output = model.generate(batch_of(rows, side), seed=seeds, **call)
    with as_on_an_accelerator():
        rounded = model.generate(batch_of(rows, side), seed=seeds, **call)
    for field in ("sequences", "history", "nfe"):
        torch.testing.assert_close(rounded[field], output[field])
    width = max(map(len, rows))
    for row, prompt in enumerate(rows):
        alone = model.generate(torch.tensor([prompt]), seed=[seeds[row]], **call)
        for name in ("sequences", "history"):
            got = getattr(output, name)[row, width - len(prompt) :].tolist()
            expected = getattr(alone, name)[0].tolist()
            filler = PAD if name == "sequences" else -1
            assert got == expected + [filler] * (len(got) - len(expected))
        assert output.nfe[row] == alone.nfe[0]
        assert output.finish_reason[row] == alone.finish_reason[0]


def test_prompts_stay_and_only_tokens_that_may_be_written_are():
    model = make_model()
    prompts = batch_of([PROMPTS[i % 4] for i in range(200)])
    output = model.generate(
        prompts, seed=1, do_sample=True, temperature=5.0, order="random", max_new_tokens=8, suppress_tokens=[7, EOS]
    )
    assert output.sequences[:, : prompts.shape[1]].tolist() == prompts.tolist()
    written = set(output.sequences[:, prompts.shape[1] :].flatten().tolist())
    assert not written & {CLS, MASK, BOS, SEP, 7, EOS}
    assert {PAD, 8, 9, 10, 11, 12} <= written
    assert set(output.finish_reason) == {"length"}
    assert output.nfe.tolist() == [8] * 200


def test_bare_prompts_get_their_bos():
    model = make_model()
    bare = model.generate(torch.tensor([[8, 9], [PAD, 7]]), seed=[1, 2], max_new_tokens=5)
    wrapped = model.generate(torch.tensor([[8, 9, BOS], [PAD, 7, BOS]]), seed=[1, 2], max_new_tokens=5)
    assert bare.sequences.tolist() == wrapped.sequences.tolist()
    empty = model.generate(seed=[3], max_new_tokens=5)
    assert (
        empty.sequences.tolist() == model.generate(torch.tensor([[BOS]]), seed=[3], max_new_tokens=5).sequences.tolist()
    )


def test_mask_tokens_of_the_input_are_filled_in_and_nothing_else_changes():
    model = make_model()
    rows = [[8, MASK, 9, MASK], [MASK] * 6, [7, 8]]
    output = model.generate(batch_of(rows), seed=0, do_sample=True, canvas_lengths=torch.zeros(3, dtype=torch.int64))
    assert output.sequences.shape == (3, 6)
    assert not (output.sequences == MASK).any()
    assert output.sequences[0, [0, 1, 2, 4]].tolist() == [PAD, PAD, 8, 9]
    assert output.sequences[2].tolist() == [PAD] * 4 + [7, 8]
    assert output.nfe.tolist() == [2, 6, 0]
    assert output.tokens_per_forward.tolist() == [1, 1, 0]


def test_given_lengths_are_met():
    model, lengths = make_model(), torch.tensor([3, 1, 5, 9])
    output = model.generate(
        batch_of(PROMPTS), canvas_lengths=lengths, max_new_tokens=6, suppress_tokens=[EOS], return_history=True
    )
    assert (output.history >= 0).sum(-1).tolist() == [3, 1, 5, 6]
    assert output.sequences.shape == (4, 6 + 6)


def test_num_steps_bounds_the_passes():
    model = make_model()
    for num_steps, nfe in ((1, 1), (3, 3), (4, 4), (8, 8), (50, 8)):
        output = model.generate(batch_of(PROMPTS), max_new_tokens=8, num_steps=num_steps, suppress_tokens=[EOS])
        assert output.nfe.tolist() == [nfe] * 4
        assert not (output.sequences == MASK).any()


def test_streamer_and_logits_processor_are_called_as_transformers_does():
    class Streamer:
        def __init__(self):
            self.drafts, self.final = [], []

        def put(self, value):
            self.final.append(value.tolist())

        def put_draft(self, value):
            self.drafts.append(value.tolist())

        def end(self):
            self.final.append("end")

    class LeftToRight:
        """Makes the first mask token certain, so that it comes first."""

        steps = []

        def __call__(self, input_ids, scores, cur_step):
            assert len(input_ids) == len(scores)
            self.steps.append(cur_step)
            first = torch.full_like(scores[0], -torch.inf)
            first[10] = 0.0
            return torch.cat((first[None], torch.zeros_like(scores[1:])))

    streamer, processor = Streamer(), LeftToRight()
    output = make_model().generate(
        batch_of(PROMPTS[:1]), streamer=streamer, logits_processor=LogitsProcessorList([processor]), max_new_tokens=3
    )
    assert streamer.drafts == [[[10, MASK, MASK]], [[10, 10, MASK]], [[10, 10, 10]]]
    assert streamer.final == [batch_of(PROMPTS[:1]).tolist(), [[10, 10, 10]], "end"]
    assert processor.steps == [0, 1, 2]
    assert output.sequences[0, -3:].tolist() == [10, 10, 10]
    assert isinstance(make_model().generate(return_dict_in_generate=False, max_new_tokens=2), torch.Tensor)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"ordr": "random"}, "no option 'ordr': did you mean 'order'"),
        ({"order": "left"}, "order must be one of random, confidence, margin, entropy and is 'left'"),
        ({"num_steps": 0}, "num_steps must be at least 1 and is 0"),
        ({"entropy_bound": -1.0}, "entropy_bound must be at least 0 and is -1.0"),
        ({"error_bound": -0.1}, "error_bound must be at least 0 and is -0.1"),
        ({"confidence_threshold": 1.5}, r"confidence_threshold must be in \(0, 1\] and is 1.5"),
        ({"num_steps": 3, "error_bound": 0.1}, "num_steps and error_bound each set how much a step commits"),
        ({"max_new_tokens": 30}, "max_new_tokens is 30, but a prompt of 4 tokens leaves 20 of the model's 24"),
        ({"seed": [1, 2]}, "seed has 2 entries for 1 rows"),
        *(
            ({"canvas_lengths": value}, "canvas_lengths must be 1 numbers")
            for value in ([-1], [1, 2], torch.ones(1, 1).int())
        ),
        *(
            ({"canvas_lengths": value}, "canvas_lengths must be integers")
            for value in ("x", 5, [1.5], torch.tensor([True]))
        ),
        ({"input_ids": torch.tensor([[13, BOS]])}, "Token id 13 is outside the model's vocabulary of 13"),
        ({"input_ids": torch.full((1, 24), 9)}, "25 tokens and the model has 24 positions"),
        ({"input_ids": torch.full((1, 25), MASK)}, "25 tokens and the model has 24 positions"),
    ],
)
def test_bad_calls_are_refused_in_one_sentence(call, message):
    with pytest.raises(ValueError, match=message):
        make_model().generate(**{"input_ids": batch_of(PROMPTS[:1]), **call})


def test_model_and_generation_config_survive_saving(tmp_path):
    model = make_model()
    model.generation_config = MLMGenerationConfig(order="margin", num_steps=5, max_new_tokens=9, pad_token_id=0)
    model.save_pretrained(tmp_path)
    loaded = MLMForMaskedLM.from_pretrained(tmp_path)
    assert loaded.config.suppressed_ids == model.config.suppressed_ids == [CLS, MASK, BOS, SEP]
    assert loaded.generation_config.to_dict() == model.generation_config.to_dict()
    torch.testing.assert_close(loaded.generate(seed=3).sequences, model.generate(seed=3).sequences)
