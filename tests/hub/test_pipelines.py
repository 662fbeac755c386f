"""The text-generation pipelines of transformers give the text that `generate` writes."""

import pytest
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer, pipeline

from xlm_hf.families import families
from xlm_hf.hub.text_generation_pipeline import XLMTextGenerationPipeline
from xlm_hf.tasks.tokenizers import byte_tokenizer, decode_text, with_prompt_layout
from xlm_hf.testing import FamilyCase, written_text


@pytest.fixture(scope="module", params=list(families()))
def written(request):
    """A case and its model, which writes something."""
    case = FamilyCase(request.param)
    model = case.model()
    if hasattr(model.generation_config, "stopping_threshold"):
        model.generation_config.stopping_threshold = 1.0
    return case, model


def layout_of(case, model, kind):
    collator = case.collator(f"{kind}_prediction", model)
    return with_prompt_layout(case.task.tokenizer, collator.head, collator.tail)


@pytest.mark.parametrize("kind", ["lm", "seq2seq"])
def test_a_pipeline_writes_what_generate_writes(written, kind):
    case, model = written
    if kind not in case.kinds:
        pytest.skip(f"the family has no kind {kind}")
    tokenizer = layout_of(case, model, kind)
    prompts = [decode_text(tokenizer, example["prompt_ids"]) for example in case.examples(2)]
    new = [written_text(model, tokenizer, prompt) for prompt in prompts]
    assert any(new)
    pipe = XLMTextGenerationPipeline(model=model, tokenizer=tokenizer, task="text-generation", device="cpu")
    for prompt, text in zip(prompts, new, strict=True):
        options = {"seed": [3], "max_new_tokens": 8}
        assert pipe(prompt, **options) == [{"generated_text": prompt + text}]
        assert pipe(prompt, **options, return_full_text=False) == [{"generated_text": text}]
        # In two calls, one token a word: the words never run together.
        assert pipe(prompt, **options)[0]["generated_text"].split() == [*prompt.split(), *text.split()]
    together = pipe(prompts, batch_size=2, seed=[3, 3], max_new_tokens=8)
    assert [row["generated_text"] for (row,) in together] == [p + t for p, t in zip(prompts, new, strict=True)]
    # That of transformers, which a model in memory gets.
    stock = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    sampling = {"do_sample": model.generation_config.do_sample, "seed": [3], "max_new_tokens": 8}
    assert stock(prompts[0], **sampling)[0]["generated_text"] == prompts[0] + new[0]


@pytest.mark.parametrize("prompt", [None, 5, 2.5, b"1", True, ["1", None], [5], [["1"]], {"a": 1}, ("1",), [[]], {"1"}])
def test_what_is_no_text_is_refused_and_no_text_is_nothing(written, prompt):
    case, model = written
    pipe = XLMTextGenerationPipeline(model=model, tokenizer=layout_of(case, model, "seq2seq"), device="cpu")
    assert pipe([], max_new_tokens=1) == []
    with pytest.raises(ValueError, match="A prompt must be a text, or a list of turns of a chat, and is "):
        pipe(prompt, max_new_tokens=1)
    assert "XLMTextGenerationPipeline" in repr(pipe)


def test_a_bare_prompt_of_an_old_tokenizer_is_completed_and_written_as_well(written):
    case, model = written
    tokenizer, old = layout_of(case, model, "seq2seq"), case.task.tokenizer
    prompt = decode_text(old, case.examples(1)[0]["prompt_ids"])
    pipe = XLMTextGenerationPipeline(model=model, tokenizer=old, device="cpu")
    expected = prompt + written_text(model, tokenizer, prompt)
    assert pipe(prompt, seed=[3], max_new_tokens=8) == [{"generated_text": expected}]


def test_blanks_are_filled_in(written):
    case, model = written
    if "infill" not in case.kinds:
        pytest.skip("the family does not fill in")
    tokenizer = layout_of(case, model, "seq2seq")
    words = decode_text(tokenizer, case.examples(1)[0]["prompt_ids"][:6]).split()
    words[2] = words[4] = "[MASK]"
    pipe = XLMTextGenerationPipeline(model=model, tokenizer=tokenizer, device="cpu")
    (row,) = pipe(" ".join(words), seed=[3])
    filled = row["generated_text"].split()
    ids = tokenizer(" ".join(words), add_special_tokens=False, return_tensors="pt").input_ids
    sequence = model.generate(ids, seed=[3], return_dict_in_generate=True).sequences[0]
    assert filled == tokenizer.decode(sequence, skip_special_tokens=True).split()
    assert "[MASK]" not in filled
    assert [filled[i] for i in (0, 1)] == words[:2]


def test_layouts_stand_where_the_kind_says_and_are_no_part_of_a_text(tmp_path):
    tokenizer = byte_tokenizer()
    bos, cls = tokenizer.bos_token_id, tokenizer.cls_token_id
    text = tokenizer("ab").input_ids
    for head, tail in (([cls], [bos]), ([cls, bos], []), ([], [bos]), ([], [])):
        made = with_prompt_layout(tokenizer, head, tail)
        made.save_pretrained(tmp_path)
        for layout in (made, AutoTokenizer.from_pretrained(tmp_path)):
            assert layout("ab").input_ids == [*head, *text, *tail]
            assert layout("").input_ids == [*head, *tail]
            assert layout("ab", add_special_tokens=False).input_ids == text
            assert layout.decode(layout("ab").input_ids, skip_special_tokens=True) == "ab"
    # The tokenizer of the task stays as it was.
    assert tokenizer("ab").input_ids == text


def test_only_a_left_to_right_model_is_a_causal_language_model():
    names = {name for name, family in families().items() if "AutoModelForCausalLM" in family.auto_classes}
    assert names == {"arlm"}
    for name, family in families().items():
        assert "AutoModel" in family.auto_classes
        registered = family.config_class in AutoModelForCausalLM._model_mapping
        assert registered == (name == "arlm")
        assert (family.config_class in AutoModelForMaskedLM._model_mapping) == (
            "AutoModelForMaskedLM" in family.auto_classes
        )
