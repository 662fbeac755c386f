"""Each argument of transformers' `generate`, and each of its options: it works, or one sentence refuses it."""

import inspect
import re

import numpy
import pytest
import torch
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    SuppressTokensLogitsProcessor,
    TextStreamer,
)

from xlm_hf.families import families
from xlm_hf.tasks.tokenizers import byte_tokenizer, with_prompt_layout
from xlm_hf.testing import FamilyCase

NEW = 6
SHORT = ["model.max_position_embeddings=40", "generation.max_new_tokens=8"]


@pytest.fixture(scope="module", params=list(families()))
def written(request):
    case = FamilyCase(request.param, *SHORT)
    model = case.model()
    if hasattr(model.generation_config, "stopping_threshold"):
        model.generation_config.stopping_threshold = None
    collator = case.collator("seq2seq_prediction", model)
    examples = [{**row, "prompt_ids": row["prompt_ids"][: 7 - 2 * i]} for i, row in enumerate(case.examples(2))]
    return case, model, collator(examples), [row["prompt_ids"] for row in examples]


@pytest.fixture
def prompts(written):
    return {name: written[2][name] for name in ("input_ids", "attention_mask")}


def decode(written, *args, **options):
    options = {"seed": [3, 4], "max_new_tokens": NEW, "return_dict_in_generate": True, **options}
    return written[1].generate(*args, **options)


def rows_of(output, model):
    pad = model.config.pad_token_id
    return [[token for token in row if token != pad] for row in output.sequences.tolist()]


# Values of the arguments and options that do something; whatever is not here is None.
VALUES = {
    "generation_config": GenerationConfig(max_new_tokens=NEW),
    "logits_processor": LogitsProcessorList(),
    "stopping_criteria": StoppingCriteriaList(),
    "prefix_allowed_tokens_fn": lambda row, ids: [8, 9],
    "synced_gpus": False,
    "assistant_model": "itself",
    "streamer": "its own",
    "negative_prompt_ids": torch.tensor([[7, 4]] * 2),
    "negative_prompt_attention_mask": torch.ones(2, 2).long(),
    "custom_generate": lambda model, input_ids, **kwargs: input_ids,
    "max_length": 20,
    "max_new_tokens": NEW,
    "min_length": 8,
    "min_new_tokens": 2,
    "early_stopping": True,
    "max_time": 60.0,
    "stop_strings": ["12"],
    "do_sample": True,
    "num_beams": 2,
    "use_cache": False,
    "cache_implementation": "dynamic",
    "cache_config": {},
    "temperature": 0.5,
    "top_k": 3,
    "top_p": 0.5,
    "min_p": 0.1,
    "top_h": 0.5,
    "typical_p": 0.5,
    "epsilon_cutoff": 0.01,
    "eta_cutoff": 0.01,
    "repetition_penalty": 1.5,
    "encoder_repetition_penalty": 1.5,
    "length_penalty": 0.5,
    "no_repeat_ngram_size": 2,
    "bad_words_ids": [[9]],
    "renormalize_logits": True,
    "forced_bos_token_id": 9,
    "forced_eos_token_id": 3,
    "remove_invalid_values": True,
    "exponential_decay_length_penalty": (2, 1.5),
    "suppress_tokens": [9],
    "begin_suppress_tokens": [9],
    "sequence_bias": {(9,): -5.0},
    "token_healing": False,
    "guidance_scale": 1.5,
    "watermarking_config": {"seeding_scheme": "lefthash"},
    "num_return_sequences": 2,
    "output_attentions": False,
    "output_hidden_states": False,
    "output_scores": True,
    "output_logits": True,
    "return_dict_in_generate": True,
    "pad_token_id": 0,
    "bos_token_id": 4,
    "eos_token_id": 3,
    "encoder_no_repeat_ngram_size": 2,
    "decoder_start_token_id": 4,
    "is_assistant": False,
    "num_assistant_tokens": 3,
    "num_assistant_tokens_schedule": "constant",
    "assistant_confidence_threshold": 0.4,
    "prompt_lookup_num_tokens": 2,
    "max_matching_ngram_size": 2,
    "assistant_early_exit": 1,
    "assistant_lookbehind": 10,
    "target_lookbehind": 10,
    "compile_config": None,
    "disable_compile": True,
    "low_memory": False,
    "penalty_alpha": 0.6,
    "dola_layers": "low",
    "diversity_penalty": 0.5,
    "num_beam_groups": 2,
    "constraints": [],
    "force_words_ids": [[9]],
    "prefill_chunk_size": 2,
    "inputs": "prompts",
}
# Ways of decoding that transformers fetches from the Hub, and one for models that were trained for it.
REFUSED_LEFT_TO_RIGHT = {
    "assistant_early_exit",
    "constraints",
    "dola_layers",
    "force_words_ids",
    "penalty_alpha",
    "num_beam_groups",
}
OF_ONE_ROW = ("assistant_model", "assistant_early_exit", "prompt_lookup_num_tokens", "max_matching_ngram_size")


def names_of_transformers():
    arguments = set(inspect.signature(GenerationMixin.generate).parameters) - {"self", "kwargs"}
    options = {name for name in vars(GenerationConfig()) if name[0] != "_"} - {"transformers_version"}
    return sorted(arguments | options)


def outcome(written, name):
    _, model, batch, _ = written
    value = VALUES.get(name)
    inputs = {key: batch[key][: 1 if name in OF_ONE_ROW else 2] for key in ("input_ids", "attention_mask")}
    options = {"seed": [3, 4][: len(inputs["input_ids"])]}
    if name not in ("max_length", "generation_config"):
        options["max_new_tokens"] = NEW
    if name == "inputs":
        value = inputs.pop("input_ids")
    elif name == "assistant_model":
        value = model
    elif name == "streamer":
        value = None
    elif name == "stop_strings" and model.config.model_type == "arlm":
        # Those of transformers need a tokenizer of pieces.
        options["tokenizer"] = byte_tokenizer()
    elif name == "max_matching_ngram_size":
        options["prompt_lookup_num_tokens"] = 2
    elif name == "num_return_sequences":
        options["do_sample"] = True
    try:
        output = model.generate(**inputs, **{**options, name: value})
    except (ValueError, TypeError) as error:
        return str(error)
    assert (output if torch.is_tensor(output) else output.sequences).ndim == 2
    return None


def test_every_argument_of_transformers_works_or_is_refused_in_one_sentence(written):
    _, model, *_ = written
    own = set(model.generation_config_class.option_names())
    refused = {}
    for name in names_of_transformers():
        message = outcome(written, name)
        if message is not None:
            refused[name] = message
            assert message.count(". ") < 2, message
            assert "\n" not in message, message
            # Some are given beside another.
            assert name in message or "supported" in message or name == "max_matching_ngram_size", message
    if model.config.model_type == "arlm":
        assert refused.keys() <= REFUSED_LEFT_TO_RIGHT, refused
    else:
        works = {"inputs", "generation_config", "logits_processor", "stopping_criteria", "streamer"} | own
        assert not refused.keys() & works, {name: refused[name] for name in refused.keys() & works}
        assert refused.keys() | works >= {name for name in names_of_transformers() if VALUES.get(name) is not None}


def test_prompts_come_as_tensors_as_lists_and_under_either_name(written, prompts):
    _, model, _, bare = written
    expected = rows_of(decode(written, **prompts), model)
    lists = [row[mask.bool()].tolist() for row, mask in zip(*prompts.values(), strict=True)]
    assert rows_of(decode(written, bare), model) == expected
    assert rows_of(decode(written, lists), model) == expected
    if model.config.model_type != "arlm":
        # Each row gets what it lacks.
        assert rows_of(decode(written, [lists[0], bare[1]]), model) == expected
    assert rows_of(decode(written, inputs=lists), model) == expected
    assert rows_of(decode(written, prompts["input_ids"].numpy(), prompts["attention_mask"].bool()), model) == expected
    assert rows_of(decode(written, bare[0], seed=[3]), model) == expected[:1]
    with pytest.raises(ValueError, match="Give one of input_ids, inputs and num_samples"):
        decode(written, bare, inputs=bare)


# Prompts and masks of the right meaning, whatever they are made of.
SAME = {
    "int32": lambda ids, mask: (ids.int(), mask),
    "uint8": lambda ids, mask: (ids.to(torch.uint8), mask),
    "a sparse tensor": lambda ids, mask: (ids.to_sparse(), mask),
    "an array of int32": lambda ids, mask: (ids.int().numpy(), mask.numpy()),
    "lists of padded rows": lambda ids, mask: (ids.tolist(), mask.tolist()),
    "a mask of truth values": lambda ids, mask: (ids, mask.bool()),
    "a mask of numbers": lambda ids, mask: (ids, mask.float()),
    "a list of truth values": lambda ids, mask: (ids, mask.bool().tolist()),
    "tensors in a tuple": lambda ids, mask: (tuple(ids), tuple(mask)),
}


@pytest.mark.parametrize("name", SAME)
def test_prompts_and_masks_of_the_right_meaning_are_taken(written, prompts, name):
    ids, mask = SAME[name](prompts["input_ids"], prompts["attention_mask"].long())
    assert torch.equal(decode(written, ids, mask).sequences, decode(written, **prompts).sequences)


IDS, MASK, SEED = "input_ids must be integers", "attention_mask must be zeros and ones", "seed must be an integer"
OUTSIDE, FUNCTION = "is outside the model's vocabulary", "must be a function, or a list of functions"
MISTAKES = [
    *(
        ("input_ids", value, IDS)
        for value in (
            *(
                torch.tensor([[8.0, 9.0]]),
                torch.tensor([[8.5]]).half(),
                torch.tensor([[True]]),
                torch.ones(1, 2).cfloat(),
            ),
            *(
                [[8.5, 9.0]],
                [8.0, 9.0],
                [["a"]],
                ["a", "b"],
                [[8, [9]], [10]],
                [8, [9]],
                [[8, None]],
                [None],
                [[2**70]],
            ),
            *("hello", b"ab", [b"ab"], 5, 2.5, {"input_ids": [[8]]}, {8, 9}, object(), iter([8])),
            *(torch.tensor(8), torch.ones(1, 1, 2).long(), torch.ones(1, 2, 1, 1).long()),
            *(numpy.ones((1, 2)), numpy.array([[8, "a"]], dtype=object)),
        )
    ),
    *(("input_ids", value, OUTSIDE) for value in ([[10**6]], [-1, 8], torch.tensor([[2**40]]))),
    *(("input_ids", torch.zeros(0, width), "input_ids has 0 rows") for width in (0, 3)),
    *(
        ("attention_mask", value, MASK)
        for value in ("x", 1, {}, object(), [["a"]], torch.full((2, 3), 0.5), 2 * torch.ones(2, 3), -torch.ones(2, 3))
    ),
    *(("attention_mask", value, MASK) for value in (torch.full((2, 3), torch.nan), torch.ones(1, 2, 3), [[[1]]])),
    *(("attention_mask", value, "make them alike") for value in ([[1], [1, 1]], [], torch.ones(9, 1), torch.ones(2))),
    *(("num_samples", value, "num_samples must be at least 1") for value in (0, -1)),
    *(("num_samples", value, "num_samples must be an integer") for value in (2.5, "x", True, [2], torch.nan)),
    *(("logits_processor", value, FUNCTION) for value in (5, "x", [5], {}, [None], LogitsProcessorList)),
    *(("stopping_criteria", value, FUNCTION) for value in (5, "x", [5], {}, [None], StoppingCriteriaList)),
    *(("streamer", value, "streamer.put must be a function") for value in (5, "x", [], object(), print)),
    *(
        ("generation_config", value, "generation_config must be a")
        for value in (5, "x", {}, [], GenerationConfig, object)
    ),
    *(
        ("seed", value, SEED)
        for value in (2.5, "x", [1.5, 2], [None, 1], {}, [2**70, 1], [[1, 2]], torch.nan, object())
    ),
    *(("seed", torch.tensor(value), SEED) for value in ([1.5, 2.0], [True, False])),
    *((name, 10**6, OUTSIDE) for name in ("bos_token_id", "pad_token_id", "eos_token_id")),
    *(("eos_token_id", value, OUTSIDE) for value in ([3, 10**6], [-1], 2**70)),
    *(("suppress_tokens", value, OUTSIDE) for value in ([10**6], [-1], [2**70])),
]


@pytest.mark.parametrize("number", range(len(MISTAKES)))
def test_mistaken_arguments_end_in_one_sentence(written, prompts, number):
    name, value, words = MISTAKES[number]
    given = {} if name in ("input_ids", "num_samples") else dict(prompts)
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        decode(written, **{"seed": 1, **given, name: value})
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


def test_a_config_of_another_family_is_refused(written, prompts):
    others = [family.model_class.generation_config_class for family in families().values()]
    own = written[1].generation_config_class
    for other in others:
        if not issubclass(other, own):
            with pytest.raises(ValueError, match=f"must be a {own.__name__} or GenerationConfig and is"):
                decode(written, **prompts, generation_config=other())


def test_rows_without_a_token_are_empty_prompts(written):
    ids = torch.full((2, 3), 9)
    expected = rows_of(decode(written, num_samples=2, seed=[3, 4]), written[1])
    assert rows_of(decode(written, ids, torch.zeros(2, 3)), written[1]) == expected


def test_a_function_stands_for_a_list_of_one(written, prompts):
    for name, function in (("logits_processor", lambda ids, scores, **_: scores), ("stopping_criteria", Never())):
        one, several = (decode(written, **prompts, **{name: given}) for given in (function, [function]))
        if name == "logits_processor":
            assert torch.equal(one.sequences, several.sequences)
        function.calls = 0


def test_nothing_to_go_on_from_is_written_as_often_as_wanted(written):
    model = written[1]
    expected = rows_of(decode(written, seed=[3]), model) + rows_of(decode(written, seed=[4]), model)
    assert rows_of(decode(written, num_samples=2), model) == expected
    assert rows_of(decode(written, torch.zeros(2, 0)), model) == expected
    assert rows_of(decode(written, torch.zeros(2, 0).long(), torch.zeros(2, 0)), model) == expected
    assert rows_of(decode(written, [[], []]), model) == expected
    with pytest.raises(ValueError, match="num_return_sequences writes several texts for each"):
        decode(written, [[7]], num_samples=2)


def test_several_texts_for_each_prompt_do_not_depend_on_other_rows(written, prompts):
    model = written[1]
    options = {"do_sample": True, "num_return_sequences": 3}
    together = rows_of(decode(written, **prompts, **options), model)
    assert len(together) == 6
    second = {name: tensor[1:] for name, tensor in prompts.items()}
    assert rows_of(decode(written, **second, **{**options, "seed": [4]}), model) == together[3:]
    assert len({tuple(row) for row in together[3:]}) > 1


def test_a_config_of_transformers_counts_by_what_it_sets(written, prompts):
    model = written[1]
    short = rows_of(decode(written, **prompts, max_new_tokens=2, do_sample=True), model)
    plain = GenerationConfig(max_new_tokens=2, do_sample=True)
    given = model.generate(**prompts, generation_config=plain, seed=[3, 4], return_dict_in_generate=True)
    assert rows_of(given, model) == short
    if model.config.model_type != "arlm":
        with pytest.raises(ValueError, match="has no option 'num_beams'"):
            model.generate(**prompts, generation_config=GenerationConfig(num_beams=3))


def test_a_config_of_transformers_may_be_the_models_own(written, prompts):
    model = written[1]
    own = model.generation_config
    try:
        model.generation_config = GenerationConfig(max_new_tokens=2, do_sample=True)
        given = model.generate(**prompts, seed=[3, 4], return_dict_in_generate=True)
        assert given.sequences.shape[1] <= prompts["input_ids"].shape[1] + 2
        if model.config.model_type != "arlm":
            model.generation_config = GenerationConfig(num_beams=3)
            with pytest.raises(ValueError, match="has no option 'num_beams'"):
                model.generate(**prompts)
    finally:
        model.generation_config = own


def test_defaults_are_cut_to_what_a_prompt_leaves_and_wishes_are_not(written, prompts):
    model, positions = written[1], written[1].config.max_position_embeddings
    longest = int(prompts["attention_mask"].sum(dim=-1).max())
    saved = model.generation_config.max_new_tokens
    try:
        model.generation_config.max_new_tokens = positions
        whole = model.generate(**prompts, seed=[3, 4], return_dict_in_generate=True)
        assert whole.sequences.shape[1] <= positions + prompts["input_ids"].shape[1]
        bounded = model.generate(**prompts, seed=[3, 4], max_length=longest + 2, return_dict_in_generate=True)
        assert max(map(len, rows_of(bounded, model))) <= longest + 2
        with pytest.raises(ValueError, match=f"max_new_tokens is {positions}, but a prompt of {longest} tokens leaves"):
            model.generate(**prompts, max_new_tokens=positions)
        with pytest.raises(ValueError, match=f"max_new_tokens is {positions + 1}, but a prompt of"):
            model.generate(**prompts, generation_config=GenerationConfig(max_new_tokens=positions + 1))
    finally:
        model.generation_config.max_new_tokens = saved


class Never(StoppingCriteria):
    """Like that of an evaluation harness, which answers for the whole batch."""

    calls = 0

    def __call__(self, input_ids, scores, **kwargs):
        self.calls += 1
        return self.calls == 2


def test_criteria_are_asked_at_every_step_and_may_answer_for_the_batch(written, prompts):
    criterion = Never()
    output = decode(written, **prompts, stopping_criteria=[criterion])
    assert criterion.calls == 2
    # A Levenshtein Transformer has filled its rows by then.
    reason = "length" if written[0].cfg.family == "levenshtein_transformer" else "stop"
    assert output.finish_reason == [reason, reason]


def test_a_text_streamer_prints_the_text_that_is_returned(written, capsys):
    case, model, _, bare = written
    collator = case.collator("seq2seq_prediction", model)
    tokenizer = with_prompt_layout(case.task.tokenizer, collator.head, collator.tail)
    ids = torch.tensor([tokenizer(case.task.tokenizer.decode(bare[0])).input_ids])
    for skip_prompt in (False, True):
        streamer = TextStreamer(tokenizer, skip_prompt=skip_prompt, skip_special_tokens=True)
        output = decode(written, ids, seed=[3], streamer=streamer)
        sequence = output.sequences[0, ids.shape[1] if skip_prompt else 0 :]
        printed = re.sub(r"\s+", " ", capsys.readouterr().out).strip()
        assert printed == tokenizer.decode(sequence, skip_special_tokens=True).strip()


def test_a_processor_of_transformers_forbids_a_token_and_a_suppressed_one_too(written, prompts):
    model = written[1]
    allowed = {9, getattr(model.config, "eos_token_id", None)}
    others = [token for token in range(model.config.vocab_size) if token not in allowed]
    processor = SuppressTokensLogitsProcessor(others)
    for options in ({"logits_processor": [processor]}, {"suppress_tokens": others}):
        output = decode(written, **prompts, return_history=True, **options)
        new = output.sequences[output.history >= 0].tolist()
        assert set(new) <= allowed


def test_a_left_to_right_model_is_decoded_in_all_ways_of_transformers():
    case = FamilyCase("arlm", *SHORT)
    model = case.model()
    model.generation_config.return_dict_in_generate = None
    prompt = case.collator("seq2seq_prediction", model)(case.examples(1))["input_ids"]
    greedy = model.generate(prompt, max_new_tokens=8)
    assert torch.is_tensor(greedy)
    sampled = model.generate(prompt, max_new_tokens=8, do_sample=True, seed=3)
    for do_sample, expected in ((False, greedy), (True, sampled)):
        for options in ({"assistant_model": model}, {"prompt_lookup_num_tokens": 3}):
            output = model.generate(
                prompt, max_new_tokens=8, do_sample=do_sample, seed=3, **options, return_history=True
            )
            assert torch.equal(output.sequences, expected), options
            assert 1 <= int(output.nfe) <= 9
    cache = model.new_cache()
    model(prompt[:, :-1], cache=cache)
    assert torch.equal(model.generate(prompt, max_new_tokens=8, cache=cache), greedy)
    only = model.generate(prompt, max_new_tokens=4, prefix_allowed_tokens_fn=lambda row, ids: [8, 9])
    assert set(only[0, prompt.shape[1] :].tolist()) <= {8, 9}
    whole = model(prompt).logits
    torch.testing.assert_close(model(prompt, logits_to_keep=2).logits, whole[:, -2:])
    torch.testing.assert_close(model(prompt, logits_to_keep=torch.tensor([0, 3])).logits, whole[:, [0, 3]])
