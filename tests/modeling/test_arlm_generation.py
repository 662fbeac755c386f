import itertools
import math
from collections import Counter

import pytest
import torch
from scipy.stats import chisquare
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteriaList

from tests.modeling.naive import BOS, EOS, PAD, batch_of, check_histogram, until_end, written
from tests.modeling.naive_arlm import TableModel, exact_law, make_model, slow_sampler
from xlm_hf.modeling.arlm import ARLMForCausalLM, ARLMGenerationConfig

METHODS = {
    "plain": {},
    "temperature": {"temperature": 0.6},
    "top-k": {"top_k": 2, "temperature": 1.5},
    "top-p": {"top_p": 0.6},
    "all": {"temperature": 1.3, "top_k": 3, "top_p": 0.9},
}
PROMPTS = [[8, 9, 10], [11], [12, 13, 14, 15, 16, 17], []]
ARCHITECTURES = {
    "plain": {},
    "learnt positions": {"learned_positions": True},
    "partial rotary": {"partial_rotary_factor": 0.5, "final_layer_norm": False},
    "convolution": {"conv_kernel_size": 3},
}
DECODINGS = {"greedy": {}, "sampling": {"do_sample": True}, "beam search": {"num_beams": 3}}


@pytest.fixture(scope="module")
def table():
    return TableModel()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("max_new_tokens", [2, 4])
def test_samples_follow_the_exact_law(method, max_new_tokens, table):
    """A table in place of the network: the histogram of whole decodes against every path enumerated."""
    options = {"do_sample": True, "max_new_tokens": max_new_tokens, "use_cache": False, **METHODS[method]}
    output = table.generate(torch.tensor([[BOS]] * 5000), seed=11, **options)
    check_histogram(written(output, 1), exact_law(table, max_new_tokens, **METHODS[method]))
    for sequence, reason, nfe in zip(written(output, 1), output.finish_reason, output.nfe.tolist(), strict=True):
        assert reason == ("stop" if sequence[-1] == EOS else "length")
        assert nfe == len(sequence)


@pytest.mark.parametrize("length_penalty", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("num_return_sequences", [1, 4])
def test_beam_search_over_all_texts_is_exhaustive(length_penalty, num_return_sequences):
    model = TableModel(seed=1)
    law = exact_law(model, 3)
    ranked = sorted(law, key=lambda text: -math.log(law[text]) / len(text) ** length_penalty)
    output = model.generate(
        torch.tensor([[BOS]]),
        num_beams=40,
        num_return_sequences=num_return_sequences,
        length_penalty=length_penalty,
        early_stopping="never",
        max_new_tokens=3,
        use_cache=False,
        output_scores=True,
        return_history=True,
    )
    assert written(output, 1) == ranked[:num_return_sequences]
    expected = [math.log(law[text]) / len(text) ** length_penalty for text in ranked[:num_return_sequences]]
    assert output.sequences_scores.tolist() == pytest.approx(expected, rel=1e-4)
    assert output.nfe.tolist() == [len(text) for text in ranked[:num_return_sequences]]
    assert output.finish_reason == ["stop" if text[-1] == EOS else "length" for text in ranked[:num_return_sequences]]


def slow_greedy(model, prompt, max_new_tokens):
    ids = slow_sampler(model, batch_of([prompt]), max_new_tokens, do_sample=False, seed=0)
    return until_end(ids[0, len(prompt) + 1 :].tolist())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_decoding_of_a_ragged_batch_takes_the_best_token(architecture):
    model = make_model(**ARCHITECTURES[architecture])
    for attention in ("eager", "sdpa"):
        model.set_attn_implementation(attention)
        output = model.generate(batch_of(PROMPTS), max_new_tokens=15)
        sequences = written(output, batch_of(PROMPTS).shape[1])
        assert sequences == [slow_greedy(model, prompt, 15) for prompt in PROMPTS]
        assert output.nfe.tolist() == [len(sequence) for sequence in sequences]
        assert output.finish_reason == ["stop" if sequence[-1] == EOS else "length" for sequence in sequences]
    assert len(set(sequences)) > 2


@pytest.mark.parametrize("decoding", DECODINGS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_cached_equals_recomputed(architecture, decoding):
    model = make_model(**ARCHITECTURES[architecture]).double()
    passes: dict[str, list[int]] = {}
    model.model.register_forward_pre_hook(lambda module, inputs: passes[implementation].append(inputs[0].shape[1]))
    outputs = {}
    for implementation, options in {
        "recomputed": {"use_cache": False},
        "dynamic": {},
        "static": {"cache_implementation": "static"},
    }.items():
        passes[implementation] = []
        outputs[implementation] = model.generate(
            batch_of(PROMPTS), seed=[3, 1, 4, 1], max_new_tokens=9, output_logits=True, **options, **DECODINGS[decoding]
        )
    width = batch_of(PROMPTS).shape[1]
    assert passes["dynamic"] == [width] + [1] * 8
    assert passes["recomputed"] == list(range(width, width + 9))
    for implementation in ("dynamic", "static"):
        assert torch.equal(outputs[implementation].sequences, outputs["recomputed"].sequences)
        if decoding != "beam search":
            for cached, recomputed in zip(outputs[implementation].logits, outputs["recomputed"].logits, strict=True):
                torch.testing.assert_close(cached, recomputed)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("conv_kernel_size", [0, 1, 4])
def test_a_sequence_fed_in_pieces_gives_the_same_logits(attention, padded, conv_kernel_size):
    model = make_model(learned_positions=True, conv_kernel_size=conv_kernel_size).double()
    model.set_attn_implementation(attention)
    input_ids = torch.randint(7, 20, (3, 11), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(input_ids)
    if padded:
        mask[1, :2] = mask[2, :4] = 0
    attention_mask = mask if padded else None
    whole = model(input_ids, attention_mask=attention_mask).logits
    cache = model.new_cache()
    for start, end in itertools.pairwise((0, 5, 6, 10, 11)):
        piece = model(input_ids[:, start:end], attention_mask=mask[:, :end] if padded else None, cache=cache)
        visible = mask[:, start:end].bool()
        torch.testing.assert_close(piece.logits[visible], whole[:, start:end][visible])
    assert cache.get_seq_length() == 11
    assert model(input_ids).cache is None
    assert model(input_ids, use_cache=True).cache.get_seq_length() == 11


@pytest.mark.parametrize("decoding", DECODINGS)
def test_a_row_decodes_alike_in_any_batch_and_the_prompt_stays(decoding):
    model = make_model()
    seeds = [3, 1, 4, 1]
    for options in ({"max_new_tokens": 12}, {"max_length": 16}):
        options = {**options, **DECODINGS[decoding], "return_history": True}
        together = model.generate(batch_of(PROMPTS), seed=seeds, **options)
        width = batch_of(PROMPTS).shape[1]
        assert torch.equal(together.sequences[:, :width], batch_of(PROMPTS))
        right = model.generate(batch_of(PROMPTS, side="right"), seed=torch.tensor(seeds), **options)
        assert torch.equal(together.sequences, right.sequences)
        for row, prompt in enumerate(PROMPTS):
            alone = model.generate(batch_of([prompt]), seed=[seeds[row]], **options)
            new_tokens = alone.sequences.shape[1] - len(prompt) - 1
            assert written(alone, len(prompt) + 1)[0] == written(together, width)[row]
            assert torch.equal(alone.history[0, len(prompt) + 1 :], together.history[row, width : width + new_tokens])
            assert alone.nfe[0] == together.nfe[row] == len(written(together, width)[row])
            assert alone.finish_reason[0] == together.finish_reason[row]
            if "max_length" in options and together.finish_reason[row] == "length":
                assert len(prompt) + 1 + together.nfe[row] == 16


def test_by_default_a_row_fills_the_positions_that_its_own_prompt_leaves():
    model = make_model(suppress_tokens=[*range(7)], eos_token_id=None)
    output = model.generate(batch_of(PROMPTS))
    assert [len(prompt) + 1 for prompt in PROMPTS] == [32 - nfe for nfe in output.nfe.tolist()]
    assert output.finish_reason == ["length"] * 4
    assert output.sequences.shape[1] == 7 + 31
    torch.testing.assert_close(output.tokens_per_forward, torch.ones(4))


def test_what_stands_behind_the_end_is_padding():
    """Also in a beam search, which transformers fills with the end-of-sequence token where the pad id is 0."""
    model = make_model()
    for options in DECODINGS.values():
        output = model.generate(batch_of(PROMPTS), seed=1, max_length=20, return_history=True, **options)
        for row in range(4):
            ids, steps = output.sequences[row, 7:].tolist(), output.history[row].tolist()
            nfe = int(output.nfe[row])
            assert PAD not in ids[:nfe]
            assert EOS not in ids[: nfe - 1]
            assert set(ids[nfe:]) <= {PAD}
            assert steps == [-1] * 7 + list(range(nfe)) + [-1] * (len(ids) - nfe)
            start = len(PROMPTS[row]) + 1
            edits = [[row, step, 0, start + step, token] for step, token in enumerate(ids[:nfe])]
            assert output.edits[output.edits[:, 0] == row].tolist() == edits
    assert model.generate(batch_of(PROMPTS)).history is None


def test_seeds_and_the_global_generator():
    model = make_model()
    options = {"max_new_tokens": 8, "do_sample": True}
    torch.manual_seed(0)
    state = torch.random.get_rng_state()
    first = model.generate(batch_of(PROMPTS), seed=5, **options).sequences
    assert torch.equal(state, torch.random.get_rng_state())
    torch.manual_seed(1)
    assert torch.equal(first, model.generate(batch_of(PROMPTS), seed=5, **options).sequences)
    assert not torch.equal(first, model.generate(batch_of(PROMPTS), seed=6, **options).sequences)
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(model.generate(batch_of(PROMPTS), **options).sequences)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_several_samples_of_a_prompt_differ_and_each_follows_the_law(table):
    options = {"do_sample": True, "use_cache": False, "num_return_sequences": 500, "max_new_tokens": 1}
    output = table.generate(torch.tensor([[PAD, BOS], [5, BOS]]), seed=[4, 4], output_scores=True, **options)
    assert output.sequences[:, 0].tolist() == [PAD] * 500 + [5] * 500
    assert len(output.nfe) == len(output.finish_reason) == 1000
    first, second = output.sequences[:500, 2].tolist(), output.sequences[500:, 2].tolist()
    assert first == second
    law = table.conditional(())
    counts = Counter(first)
    assert chisquare([counts[t] for t in law], [500 * p for p in law.values()]).pvalue > 1e-4
    # The scores are those that the tokens were drawn from.
    torch.testing.assert_close(output.scores[0][7], table(torch.tensor([[BOS]])).logits[0, -1])


def test_suppressed_ids_are_never_written_and_bare_prompts_get_a_bos():
    model = make_model()
    options = {"do_sample": True, "temperature": 5.0, "suppress_tokens": [7, 8, 9], "max_new_tokens": 20}
    output = model.generate(batch_of(PROMPTS), seed=0, **options)
    tokens = {token for sequence in written(output, 7) for token in sequence}
    assert min(tokens - {EOS}) >= 10
    bare = torch.tensor([[8, 9, 10], [PAD, PAD, 11]])
    bare_output = model.generate(bare, max_new_tokens=4)
    assert torch.equal(bare_output.sequences, model.generate(batch_of(PROMPTS[:2]), max_new_tokens=4).sequences)
    assert model.generate(max_new_tokens=3).sequences[0, 0] == BOS
    # What follows [BOS] is continued.
    greedy = written(model.generate(batch_of(PROMPTS[:1]), max_new_tokens=6), 4)[0]
    begun = torch.tensor([[8, 9, 10, BOS, *greedy[:2]]])
    assert written(model.generate(begun, max_new_tokens=4), 6)[0] == greedy[2:]


def test_streamer_processors_and_criteria_are_those_of_transformers():
    class Streamer:
        heard = []

        def put(self, value):
            self.heard.append(value.tolist())

        def end(self):
            self.heard.append("end")

    class OnlyTen(LogitsProcessor):
        def __call__(self, input_ids, scores):
            masked = torch.full_like(scores, -torch.inf)
            masked[:, 10] = scores[:, 10]
            return masked

    model, streamer = make_model(), Streamer()
    ten = LogitsProcessorList([OnlyTen()])
    output = model.generate(batch_of(PROMPTS[:1]), streamer=streamer, logits_processor=ten, max_new_tokens=3)
    assert streamer.heard == [batch_of(PROMPTS[:1]).tolist(), [10], [10], [10], "end"]
    assert output.finish_reason == ["length"]
    output = model.generate(batch_of(PROMPTS[:1]), logits_processor=ten, do_sample=True, max_new_tokens=3)
    assert output.sequences[0, -3:].tolist() == [10, 10, 10]

    def after_two_tens(input_ids, scores):
        return (input_ids[:, -2:] == 10).all(dim=-1)

    criteria = StoppingCriteriaList([after_two_tens])
    output = model.generate(
        batch_of(PROMPTS[:2]), logits_processor=ten, stopping_criteria=criteria, max_new_tokens=6, num_beams=2
    )
    assert written(output, 4) == [(10, 10), (10, 10)]
    assert output.finish_reason == ["stop", "stop"]
    assert written(model.generate(batch_of(PROMPTS), min_new_tokens=25, max_new_tokens=25), 7)[0][:25].count(EOS) == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"temprature": 1.0}, "no option 'temprature': did you mean 'temperature'"),
        ({"inputs_embeds": torch.zeros(1, 2, 32)}, "no option 'inputs_embeds'"),
        ({"temperature": 0.0}, "temperature must be greater than 0 and is 0.0"),
        ({"top_p": 1.5}, r"top_p must be in \(0, 1\] and is 1.5"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1 and is 0"),
        ({"max_new_tokens": 30}, "max_new_tokens is 30, but a prompt of 4 tokens leaves 28 of the model's 32"),
        ({"max_length": 4}, "max_length is 4 and the prompt has 4 tokens"),
        ({"seed": [1, 2]}, "seed has 2 entries for 1 rows"),
        (
            {"num_beams": 2, "do_sample": True},
            "select beam_sample, but only greedy_search, sample, beam_search, assisted_generation are supported",
        ),
        ({"input_ids": torch.tensor([[20, BOS]])}, "Token id 20 is outside the model's vocabulary of 20"),
        ({"input_ids": torch.full((1, 32), 9)}, "33 tokens and the model has 32 positions"),
        ({"input_ids": torch.tensor([[9, BOS], [8, 9]])}, "Some prompts hold a .BOS. .id 4. and others do not"),
    ],
)
def test_bad_calls_are_refused_in_one_sentence(call, message):
    with pytest.raises(ValueError, match=message):
        make_model().generate(**{"input_ids": batch_of(PROMPTS[:1]), **call})


def test_options_come_from_the_call_then_its_config_then_the_model():
    model = make_model()
    assert model.generation_config.eos_token_id == EOS
    options = {"return_dict_in_generate": True, "eos_token_id": EOS, "pad_token_id": PAD}
    model.generation_config = ARLMGenerationConfig(max_new_tokens=2, **options)
    prompt = batch_of(PROMPTS[:1])
    assert model.generate(prompt).nfe.tolist() == [2]
    plain = GenerationConfig(max_new_tokens=5)
    assert model.generate(prompt, generation_config=plain).nfe.tolist() == [5]
    assert model.generate(prompt, generation_config=plain, max_new_tokens=3).nfe.tolist() == [3]
    assert torch.is_tensor(model.generate(prompt, return_dict_in_generate=False))
    assert model.generation_config.max_new_tokens == 2


def test_a_large_vocabulary_is_sampled_whole():
    """transformers keeps the 50 most probable tokens by default; no other family does."""
    model = make_model(vocab_size=200, initializer_range=1e-4)
    output = model.generate(torch.tensor([[BOS]] * 300), do_sample=True, seed=0, max_new_tokens=1)
    assert len(set(output.sequences[:, 1].tolist())) > 100


def test_everything_survives_saving(tmp_path):
    model = make_model()
    model.generation_config = ARLMGenerationConfig(
        top_p=0.5, temperature=0.7, pad_token_id=PAD, eos_token_id=EOS, return_history=True, max_new_tokens=9
    )
    model.save_pretrained(tmp_path)
    loaded = ARLMForCausalLM.from_pretrained(tmp_path)
    assert type(loaded.generation_config) is ARLMGenerationConfig
    for name in ARLMGenerationConfig.option_names():
        assert getattr(loaded.generation_config, name) == getattr(model.generation_config, name), name
    for options in DECODINGS.values():
        expected = model.generate(batch_of(PROMPTS), seed=3, **options)
        output = loaded.generate(batch_of(PROMPTS), seed=3, **options)
        assert torch.equal(output.sequences, expected.sequences)
        assert torch.equal(output.history, expected.history)
