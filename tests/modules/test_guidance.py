"""Classifier-free guidance, in every family that has the option."""

import numpy as np
import pytest
import torch

from tests.modeling import naive_bd3lm, naive_gidd, naive_mdlm, naive_sedd, naive_udlm
from tests.modeling.naive import BOS, EOS, MASK, PAD, SpecialIds, batch_of, make_examples
from xlm_hf.modeling.bd3lm import BD3LMCollator
from xlm_hf.modeling.gidd import GIDDCollator
from xlm_hf.modeling.mdlm import MDLMCollator
from xlm_hf.modeling.sedd import SEDDCollator
from xlm_hf.modeling.udlm import UDLMCollator
from xlm_hf.objectives.collation import Documents

PROMPTS, SEEDS = [[8, 9, 10], [11], [12, 13, 14, 15]], [3, 1, 4]
MODELS = {
    "masks": lambda: naive_mdlm.make_model(conv_kernel_size=3, learned_positions=True),
    "masks, told the time": lambda: naive_mdlm.make_model(conditioning="adaln"),
    "noise": lambda: naive_udlm.make_model(lm_head_bias=True),
    "scores of masks": lambda: naive_sedd.make_model(),
    "scores of noise": lambda: naive_sedd.make_model(kernel="uniform"),
}
OTHERS = {
    "blocks": lambda: naive_bd3lm.make_model(block_length=4, conv_kernel_size=3, learned_positions=True),
    "masks and noise": lambda: naive_gidd.make_model(),
}


@pytest.mark.parametrize("name", MODELS)
def test_logits_lead_away_from_what_is_written_without_the_prompt(name):
    """Against two forward passes, the second on `[BOS] canvas` alone."""
    model, seen = MODELS[name]().double(), []

    def record(ids, scores, cur_step):
        seen.append((ids, scores))
        return scores

    options = {"max_new_tokens": 6, "num_steps": 3, "seed": SEEDS, "do_sample": True, "guidance_scale": 2.5}
    output = model.generate(batch_of(PROMPTS), logits_processor=record, **options)
    plain = model.generate(batch_of(PROMPTS), **{**options, "guidance_scale": None})
    assert output.nfe.tolist() == (2 * plain.nfe).tolist()
    width = batch_of(PROMPTS).shape[1]
    assert torch.equal(output.sequences[:, :width], batch_of(PROMPTS))
    # In the first step nothing is clean, and of the second the time is not known here.
    ids, scores = seen[0]
    alpha = torch.zeros(1)
    for row, score in zip(ids, scores, strict=True):
        canvas = row[width:][None]
        prompt = next(p for p in PROMPTS if p == [t for t in row[: width - 1].tolist() if t != PAD])
        logits = [
            model(torch.cat((torch.tensor([[*given, BOS]]), canvas), dim=1), alpha=alpha).logits[0, -6:]
            for given in (prompt, [])
        ]
        expected = 2.5 * logits[0] - 1.5 * logits[1]
        finite = expected.isfinite()
        assert any(
            torch.allclose(score[f], e[f].float(), rtol=1e-4, atol=1e-4) for e, f in zip(expected, finite, strict=True)
        )


@pytest.mark.parametrize("use_cache", [True, False])
def test_blocks_are_led_away_from_what_is_written_without_the_prompt(use_cache):
    """Each step against two forward passes over all that stands up to its block, the second without the prompt."""
    model, seen = OTHERS["blocks"]().double(), []

    def record(ids, scores, cur_step):
        seen.append((ids[0], scores))
        return scores

    prompt, options = [8, 9, 10], {"max_new_tokens": 8, "sampler": "confidence", "seed": 3, "do_sample": True}
    rows = torch.tensor([[*prompt, BOS]])
    output = model.generate(rows, logits_processor=record, guidance_scale=2.5, use_cache=use_cache, **options)
    assert output.nfe.tolist() == [2 * len(seen)]
    for step, (ids, scores) in enumerate(seen):
        block = step // 4
        end = 4 * (block + 1)
        canvas = ids[4:][:end]
        masks = (canvas == MASK) & (torch.arange(end) >= end - 4)
        logits = []
        for given in (prompt, []):
            blocks = torch.tensor([[0] * (len(given) + 1) + [1 + i // 4 for i in range(end)]])
            whole = torch.cat((torch.tensor([*given, BOS]), canvas))[None]
            logits.append(model(whole, block_ids=blocks).logits[0, -end:][masks])
        expected = (2.5 * logits[0] - 1.5 * logits[1]).nan_to_num(nan=-torch.inf)
        torch.testing.assert_close(scores.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [*MODELS, *OTHERS])
def test_a_scale_of_one_is_no_guidance_and_rows_decode_alike_in_any_batch(name):
    model, options = {**MODELS, **OTHERS}[name](), {"max_new_tokens": 6, "num_steps": 3, "do_sample": True}
    plain = model.generate(batch_of(PROMPTS), seed=SEEDS, **options)
    same = model.generate(batch_of(PROMPTS), seed=SEEDS, guidance_scale=1.0, **options)
    assert torch.equal(plain.sequences, same.sequences)
    guided = model.generate(batch_of(PROMPTS), seed=SEEDS, guidance_scale=3.0, **options)
    assert not torch.equal(plain.sequences, guided.sequences)
    width = batch_of(PROMPTS).shape[1]
    for row, prompt in enumerate(PROMPTS):
        alone = model.generate(batch_of([prompt]), seed=SEEDS[row : row + 1], guidance_scale=3.0, **options)
        own = alone.sequences[0, len(prompt) + 1 :].tolist()
        assert own == guided.sequences[row, width:][: len(own)].tolist()


def test_without_its_prompt_a_text_that_has_begun_begins_with_bos_alone():
    """At a scale of 0 the beginning of a text does not matter, and [BOS] is still seen."""
    model = naive_mdlm.make_model()
    call = {"sampler": "confidence", "guidance_scale": 0.0, "max_new_tokens": 6, "suppress_tokens": [EOS, PAD]}
    begun = model.generate(torch.tensor([[BOS, 10, 11]]), **call).sequences[0, 3:]
    alone = model.generate(torch.tensor([[BOS]]), **call).sequences[0, 1:]
    assert begun.tolist() == alone.tolist()


def test_blanks_have_no_prompt_to_be_guided_by():
    with pytest.raises(ValueError, match="guidance_scale is about prompts, and a prompt with mask tokens is filled in"):
        naive_udlm.make_model().generate(torch.tensor([[8, MASK]]), guidance_scale=2.0)


@pytest.mark.parametrize("collator_class", [MDLMCollator, UDLMCollator, SEDDCollator])
def test_a_share_of_the_prompts_is_left_out(collator_class):
    examples = [{**e, "prompt_ids": e["prompt_ids"] or [8]} for e in make_examples(2000, 40)]
    batch = collator_class(SpecialIds(40), 32, kind="seq2seq", condition_dropout=0.2)(examples)
    plain = collator_class(SpecialIds(40), 32, kind="seq2seq")(examples)
    dropped = (batch["input_ids"][:, 0] == BOS).numpy()
    assert abs(dropped.mean() - 0.2) < 4 * 0.4 / 2000**0.5
    # Nothing else changes: documents keep their texts, and those with a prompt their times and their rows.
    kept = torch.from_numpy(~dropped)
    assert torch.equal(batch["sequence_tokens"], plain["sequence_tokens"])
    assert torch.equal(batch["alpha"][kept], plain["alpha"][kept])
    assert torch.equal(batch["input_ids"][kept], plain["input_ids"][kept][:, : batch["input_ids"].shape[1]])
    batch["input_ids"].view(-1)[batch["logits_index"]] = batch["target_ids"]
    for row in np.flatnonzero(dropped):
        text = [t for t in batch["input_ids"][row].tolist() if t != PAD]
        assert text == [BOS, *examples[row]["target_ids"], EOS]
    # A function of the example alone.
    alone = collator_class(SpecialIds(40), 32, kind="seq2seq", condition_dropout=0.2)(examples[5:6])
    assert (alone["input_ids"][0, 0] == BOS) == dropped[5]


def test_prompts_are_dropped_from_documents():
    examples = [{"example_id": i, "epoch": 0, "position": i} for i in range(3)]
    documents = Documents(examples, [[1, 2], [3], [4, 5]], [[6], [7], [8]])
    documents.drop_prompts(np.array([False, True, False]))
    assert documents.prompt_ids.tolist() == [1, 2, 4, 5]
    assert documents.prompt_lengths.tolist() == [2, 0, 2]


def test_a_share_out_of_range_is_refused():
    with pytest.raises(ValueError, match=r"condition_dropout must be in \[0, 1\) and is 1"):
        UDLMCollator(SpecialIds(40), 32, kind="seq2seq", condition_dropout=1)


@pytest.mark.parametrize(("collator_class", "options"), [(BD3LMCollator, {"block_length": 4}), (GIDDCollator, {})])
def test_documents_without_their_prompts_keep_their_texts(collator_class, options):
    examples = [{**e, "prompt_ids": e["prompt_ids"] or [8]} for e in make_examples(500, 40)]
    batch = collator_class(SpecialIds(40), 32, kind="seq2seq", condition_dropout=0.2, **options)(examples)
    dropped = batch["input_ids"][:, 0] == BOS
    assert abs(dropped.float().mean() - 0.2) < 4 * 0.4 / 500**0.5
    # Nothing but the canvas, or the noisy copy of it, has targets.
    batch["input_ids"].view(-1)[batch["logits_index"]] = batch["target_ids"]
    for row in dropped.nonzero()[:, 0].tolist():
        of_canvas = batch["is_noisy"][row] if "is_noisy" in batch else batch["attention_mask"][row]
        text = [t for t in batch["input_ids"][row][of_canvas.bool()].tolist() if t not in (PAD, BOS)]
        assert text == [*examples[row]["target_ids"], EOS]
