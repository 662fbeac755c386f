"""GIDD sampled: laws against enumeration, rows against batches, prompts untouched, texts corrected."""

import itertools
import json

import pytest
import torch
from torch.nn.functional import one_hot

from tests.modeling.canvas_checks import PROMPTS, SEEDS, check_blanks, check_rows
from tests.modeling.naive import BOS, EOS, MASK, PAD, batch_of, check_histogram
from tests.modeling.naive_gidd import (
    WORDS,
    TableModel,
    as_dict,
    canvases,
    chain_law,
    correction_law,
    make_model,
    random_joint,
    slow_sampler,
    texts,
)
from xlm_hf.commands import generate
from xlm_hf.modeling.gidd import GIDDForInterpolatingDiffusion, GIDDGenerationConfig
from xlm_hf.modules.canvas import MaskedCanvas
from xlm_hf.modules.counter_random import random_bits
from xlm_hf.modules.edits import EDIT_KINDS, EditLog
from xlm_hf.modules.kernel_samplers import KernelProcess, Resampling
from xlm_hf.testing import FamilyCase


def check_law(model, law, length, num=6000, prompts=None, **options):
    """Whole decodes against an enumerated law (4^L,)."""
    options = {"seed": 11, "do_sample": True, "max_new_tokens": length, "return_history": True, **options}
    prompts = torch.full((num, 1), BOS) if prompts is None else prompts
    output = model.generate(prompts, attention_mask=torch.ones_like(prompts), **options)
    check_histogram(list(map(tuple, output.sequences[:, 1:].tolist())), as_dict(law, length))
    return output


# Three positions that like to have the same word: what a few steps make of them shows how they were made.
EQUAL_WORDS = torch.tensor([0.3 if len(set(z)) == 1 else 0.1 / 24 for z in texts(3).tolist()], dtype=torch.float64)


def grid(num_steps):
    return [1 - i / num_steps for i in range(num_steps)] + [0]


@pytest.mark.parametrize("noise", [{}, {"uniform_share": 0.0}, {"uniform_share": 0.6, "gamma": 2.0}])
@pytest.mark.parametrize(("num_steps", "schedule"), [(1, "linear"), (3, "linear"), (3, "cosine")])
def test_ancestral_samples_follow_the_law_of_their_steps(num_steps, schedule, noise):
    model = TableModel(noise_schedule=schedule, **noise)
    times = grid(num_steps)
    if schedule == "cosine":
        times = [float(torch.sin(torch.tensor(torch.pi / 2 * t, dtype=torch.float64))) for t in times]
    output = check_law(model, chain_law(model, 3, times), 3, num_steps=num_steps)
    assert set(output.nfe.tolist()) == {num_steps}
    # The network is told the time at the pace of the model's own schedule.
    assert [float(t.unique()) for t in model.times] == pytest.approx(times[:-1])


@pytest.mark.parametrize("options", [{"schedule": "cap", "eta": 0.2}, {"schedule": "rescale", "eta": 0.2}])
def test_psi_samples_follow_their_law(options):
    model = TableModel(uniform_share=0.2)

    def share(t, s):
        alpha_t, alpha_s = ((1 - x) / (1 + 0.5 * (x * (1 - x)) ** 0.5) for x in (t, s))
        largest = min(1.0, (1 - alpha_s) / alpha_t) if alpha_t else 1.0
        sigma = min(options["eta"], largest) if options["schedule"] == "cap" else options["eta"] * largest
        return min(1.0, sigma / (1 - alpha_s)) if s > 0 else 0.0

    law = chain_law(model, 3, grid(3), share=share)
    assert (law - chain_law(model, 3, grid(3))).abs().sum() > 0.03
    check_law(model, law, 3, sampler="psi", num_steps=3, **options)


def test_the_corrector_draws_positions_anew():
    model = TableModel()
    law = chain_law(model, 3, grid(3), corrected=2)
    assert (law - chain_law(model, 3, grid(3))).abs().sum() > 0.05
    output = check_law(model, law, 3, num_steps=3, corrector_steps=2)
    assert set(output.nfe.tolist()) == {3 + 2 * 2}


def test_the_corrector_by_confidence_leaves_masks_while_there_are_tokens(monkeypatch):
    """A mask has no token that could be wrong, so the least probable position of a row is one of its tokens."""
    move, corrected = KernelProcess.move, []

    def watched(process, predict, kind, *args, **options):
        before = process.canvas.ids.clone()
        moved = move(process, predict, kind, *args, **options)
        if kind is Resampling:
            corrected.append((before, process.canvas.ids.clone()))
        return moved

    monkeypatch.setattr(KernelProcess, "move", watched)
    options = {"corrector_steps": 1, "corrector_positions": 1, "corrector_order": "confidence"}
    TableModel().generate(torch.full((400, 1), BOS), max_new_tokens=3, num_steps=3, do_sample=True, seed=4, **options)
    assert any((before != after).any() for before, after in corrected)
    for before, after in corrected:
        has_token = (before[:, 1:] != MASK).any(dim=-1, keepdim=True)
        assert not ((before != after) & (before == MASK) & has_token).any()


def test_at_the_exact_conditionals_many_steps_write_the_data():
    model = TableModel(random_joint(2, seed=3))
    places = torch.tensor([4 * a + b for a, b in texts(2).tolist()])
    laws = [chain_law(model, 2, grid(n))[places] for n in (2, 8, 32, 128)]
    errors = [float((law - model.joint).abs().sum()) for law in laws]
    assert all(a > 2 * b for a, b in itertools.pairwise(errors))


@pytest.mark.parametrize(("rounds", "patience"), [(1, 9), (4, 9), (4, 1), (5, 2)])
def test_self_correction_follows_its_law(rounds, patience):
    """After the steps of the reverse process, and of texts that are given."""
    model, temperature = TableModel(), 0.7
    options = {"sampler": "self_correction", "num_steps": 3, "correction_rounds": rounds}
    options |= {"correction_patience": patience, "correction_temperature": temperature}
    written = chain_law(model, 2, grid(3))
    law = correction_law(model, written, 2, rounds, patience, temperature)
    assert (law - written).abs().sum() > 0.05
    output = check_law(model, law, 2, **options)
    assert output.nfe.min() >= 4
    assert output.nfe.max() <= 3 + rounds
    given = torch.zeros(16, dtype=torch.float64)
    given[canvases(2).tolist().index([2, 0])] = 1.0
    text = torch.tensor([[BOS, WORDS[2], WORDS[0]]]).expand(6000, -1)
    output = check_law(
        model, correction_law(model, given, 2, rounds, patience, temperature), 2, prompts=text, **options
    )
    assert output.nfe.max() <= rounds
    # What is told is the time of the correction.
    assert float(model.times[-1].unique()) == pytest.approx(0.01)


def test_self_correction_without_draws_takes_the_most_probable_tokens():
    model = TableModel(EQUAL_WORDS)
    rows = torch.tensor([[BOS, 7, 7, 9], [BOS, 8, 8, 8], [BOS, 9, 7, 9]])
    output = model.generate(rows, torch.ones_like(rows), sampler="self_correction", seed=1, max_new_tokens=3)
    assert output.sequences[:, 1:].tolist() == [[7, 7, 7], [8, 8, 8], [9, 9, 9]]
    # One round changes a token, the next finds that all agree.
    assert output.nfe.tolist() == [2, 1, 2]


def test_filters_act_on_the_prediction_by_the_others():
    """With top_k=1 all of it is on one word: what a token is kept by, too."""
    model, sharp, cool = TableModel(), TableModel(), TableModel()
    table = model.table
    sharp.table = lambda z, t: one_hot(table(z, t).argmax(dim=-1), 3).double()
    law = chain_law(sharp, 3, grid(3))
    check_law(model, law, 3, num_steps=3, top_k=1)
    check_law(model, law, 3, num_steps=3, do_sample=False)
    cool.table = lambda z, t: (table(z, t).log() / 0.5).softmax(dim=-1)
    check_law(model, chain_law(cool, 3, grid(3)), 3, num_steps=3, temperature=0.5)


@pytest.mark.parametrize(
    ("num_steps", "options"), [(None, {}), (5, {"uniform_share": 0.5, "noise_schedule": "cosine"})]
)
def test_it_writes_what_its_slow_twin_writes(num_steps, options):
    model, prompts = make_model(**options), torch.tensor([[8, BOS], [9, BOS]])
    ours = model.generate(prompts, max_new_tokens=9, seed=2, do_sample=True, num_steps=num_steps, eos_token_id=None)
    theirs = slow_sampler(model, prompts, 9, True, 2, num_steps=num_steps)
    ends = (theirs == EOS).cumsum(-1) - (theirs == EOS).long() > 0
    assert torch.equal(ours.sequences, theirs.masked_fill(ends, PAD)[:, : ours.sequences.shape[1]])


OPTIONS = {
    "ancestral": {"num_steps": 5},
    "one step a position": {},
    "corrected": {"num_steps": 4, "corrector_steps": 2, "corrector_positions": 2},
    "corrected by confidence": {"num_steps": 4, "corrector_steps": 1, "corrector_order": "confidence"},
    "psi": {"sampler": "psi", "num_steps": 5, "eta": 0.3},
    "self_correction": {"sampler": "self_correction", "num_steps": 4, "correction_rounds": 6, "correction_patience": 2},
    "confidence": {"sampler": "confidence", "confidence_threshold": 0.1, "block_length": 4},
    "filters": {"num_steps": 4, "temperature": 0.7, "top_k": 5, "top_p": 0.9},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_a_row_decodes_alike_alone_and_in_any_batch(name):
    check_rows(make_model(conv_kernel_size=3), **{**OPTIONS[name], "max_length": 14})


@pytest.mark.parametrize("name", OPTIONS)
def test_blanks_are_filled_in_and_the_rest_stays(name):
    check_blanks(make_model(), **OPTIONS[name])


TEXTS = [[8, 9, BOS, 10, 11, 12, EOS], [BOS, 13, 14], [11, BOS], [15, BOS, 16, MASK, 17], [12, 13]]


def test_texts_are_corrected_beside_prompts_and_blanks():
    """A text is corrected, a prompt gets one first, blanks are filled in; alone as in a batch. Prompts stay."""
    model = make_model()
    options = {**OPTIONS["self_correction"], "do_sample": True, "max_new_tokens": 8, "return_history": True}
    seeds = [3, 1, 4, 9, 7]
    together = model.generate(batch_of(TEXTS, end=()), seed=seeds, **options)
    assert torch.equal(model.generate(batch_of(TEXTS, "right", end=()), seed=seeds, **options).edits, together.edits)
    for row, text in enumerate(TEXTS):
        alone = model.generate(torch.tensor([text]), seed=seeds[row : row + 1], **options)
        for field in ("sequences", "history"):
            # Ragged rows are padded with what stands for nothing.
            nothing = PAD if field == "sequences" else -1
            ours, own = (list(getattr(x, field)[i].tolist()) for x, i in ((together, row), (alone, 0)))
            assert [x for x in ours if x != nothing] == [x for x in own if x != nothing], field
        start = text.index(BOS) + 1 if BOS in text else len(text)
        own = alone.sequences[0].tolist()
        assert own[:start] == text[:start]
        if MASK in text:
            assert own[:3] + own[4:5] == text[:3] + text[4:]
            assert len(own) == len(text)
        elif text[start:]:
            # What does not change is no edit; no more than one token changes in a round.
            assert 0 < len(alone.edits) <= 6
            assert {EDIT_KINDS[kind] for kind in alone.edits[:, 2].tolist()} == {"substitute"}
            assert alone.edits[:, 1].unique(return_counts=True)[1].max() == 1
            canvas = text[start:] + [PAD] * (8 - len(text[start:]) if EOS in text else 0)
            for _, _, _, position, token in alone.edits.tolist():
                canvas[position - start] = token
            assert canvas[: len(own) - start] == own[start:]


def test_texts_apart_from_their_prompts_are_corrected_alike(tmp_path, monkeypatch):
    """As rows, as `source_ids`, and from a file by the command line."""
    case = FamilyCase("gidd", "+collator.corrects=true", "generation.sampler=self_correction", "seed=3")
    model, tokenizer = case.model(), case.task.tokenizer
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    prompts, sources = [[10, 11, 12], [13]], [[14, 15], [11] * 14]
    collator = case.collator("seq2seq_prediction", model)
    lines = [{"prompt_ids": p, "source_ids": s} for p, s in zip(prompts, sources, strict=True)]
    batch = collator([{**line, "example_id": i} for i, line in enumerate(lines)])
    assert batch["source_ids"][0, :4].tolist() == [14, 15, eos, tokenizer.pad_token_id]
    assert batch["source_ids"][1].tolist() == [11] * 14
    output = model.generate(**{k: v for k, v in batch.items() if k != "example_id"}, seed=[5, 6], return_history=True)
    assert torch.equal(output.sequences[:, :4], batch["input_ids"])
    assert {EDIT_KINDS[kind] for kind in output.edits[:, 2].tolist()} == {"substitute"}
    ended = [[14, 15, eos], sources[1]]
    for row, (prompt, source) in enumerate(zip(prompts, ended, strict=True)):
        alone = model.generate(torch.tensor([[*prompt, bos, *source]]), seed=5 + row)
        own = alone.sequences[0, len(prompt) + 1 :].tolist()
        assert own == output.sequences[row, 4:][: len(own)].tolist()
    # A bare prompt gets its [BOS] before the text.
    bare, whole = (
        model.generate(torch.tensor([ids]), source_ids=batch["source_ids"][1:], seed=[6]).sequences.tolist()
        for ids in (prompts[1], [*prompts[1], bos])
    )
    assert bare == whole
    with pytest.raises(ValueError, match="source_ids are texts to be corrected after prompts: choose sampler='self_c"):
        model.generate(batch["input_ids"], source_ids=batch["source_ids"], sampler="ancestral")

    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setattr(generate, "model_of_checkpoint", lambda cfg: model)
    monkeypatch.setattr(generate, "load_tokenizer", lambda *arguments: tokenizer)
    case.cfg.update(prompts=str(file), output_dir=str(tmp_path), experiment="e", checkpoint=str(tmp_path))
    records = generate.run(case.cfg)
    assert [record["source_ids"] for record in records] == sources
    seeds = random_bits(case.cfg.seed, torch.arange(2))
    expected = model.generate(**{k: v for k, v in batch.items() if k != "example_id"}, seed=seeds).sequences[:, 4:]
    for record, row in zip(records, expected.tolist(), strict=True):
        end = row.index(eos) if eos in row else len(row)
        assert record["prediction_ids"] == [t for t in row[:end] if t != tokenizer.pad_token_id]


def test_a_canvas_holds_texts_with_padding_behind_them():
    """A text that ends is followed by padding up to the end of its canvas, and a row without a text by masks."""
    prompts = torch.tensor([[8, BOS], [9, BOS], [PAD, BOS]])
    lengths = torch.tensor([5, 3, 4])
    canvas = MaskedCanvas(prompts, prompts != PAD, lengths, MASK, PAD, EOS, EditLog())
    canvas.hold(torch.tensor([10, 11, EOS, 12, 13, 14]), torch.tensor([3, 3, 0]))
    assert canvas.ids[:, 2:].tolist() == [[10, 11, EOS, PAD, PAD], [12, 13, 14, PAD, PAD], [*[MASK] * 4, PAD]]
    assert torch.equal(canvas.ids[:, :2], prompts)
    # What it holds is no edit.
    canvas.note(torch.zeros(3, dtype=torch.int64))
    assert len(canvas.log.events()) == 0


def test_the_masks_that_are_filled_by_confidence_tell_the_time():
    """The share that is masked; and in infilling none at what is given."""
    model, told = make_model(), []
    forward = model.model.forward
    model.model.forward = lambda *args, **kwargs: told.append(kwargs["timesteps"]) or forward(*args, **kwargs)
    model.generate(torch.tensor([[8, BOS]]), sampler="confidence", max_new_tokens=4)
    assert [float(t) for t in told] == pytest.approx([1.0, 0.75, 0.5, 0.25])
    told.clear()
    model.generate(torch.tensor([[8, MASK, 10, MASK]]), sampler="confidence")
    assert [t[0].tolist() for t in told] == [[0.0, 1.0, 0.0, 1.0], [0.0, 0.5, 0.0, 0.5]]


def test_a_text_longer_than_its_canvas_is_refused():
    with pytest.raises(ValueError, match="A text is longer than its canvas, by 1: raise max_new_tokens"):
        make_model().generate(torch.tensor([[8, BOS, 9, 10, 11, 12]]), sampler="self_correction", max_new_tokens=3)
    with pytest.raises(ValueError, match=r"\[BOS\] .* in its middle"):
        make_model().generate(torch.tensor([[8, BOS, 9, 10, 11, 12]]), max_new_tokens=3)


@pytest.mark.parametrize("name", ["ancestral", "corrected", "psi", "self_correction"])
def test_the_log_of_edits_replays_the_decode(name):
    model = make_model()
    output = model.generate(
        batch_of(PROMPTS), seed=SEEDS, do_sample=True, return_history=True, max_new_tokens=8, **OPTIONS[name]
    )
    for row, prompt in enumerate(PROMPTS):
        ids, steps = [*prompt, BOS, *[MASK] * 8], [-1] * (len(prompt) + 9)
        for _, step, kind, position, token in output.edits[output.edits[:, 0] == row].tolist():
            before = "remask" if token == MASK else "unmask" if ids[position] == MASK else "substitute"
            assert EDIT_KINDS[kind] == before
            ids[position], steps[position] = token, step
        end = ids.index(EOS) + 1 if EOS in ids else len(ids)
        result = output.sequences[row, batch_of(PROMPTS).shape[1] - len(prompt) - 1 :].tolist()
        assert ids[:end] == result[:end]
        history = output.history[row, batch_of(PROMPTS).shape[1] - len(prompt) - 1 :].tolist()
        assert steps[:end] == history[:end]


def test_options_are_those_of_the_sampler_and_survive_saving(tmp_path):
    model = make_model()
    model.generation_config = GIDDGenerationConfig(sampler="self_correction", correction_rounds=7, num_steps=6)
    model.save_pretrained(tmp_path)
    loaded = GIDDForInterpolatingDiffusion.from_pretrained(tmp_path)
    assert loaded.generation_config.make_sampler() == model.generation_config.make_sampler()
    assert json.loads((tmp_path / "generation_config.json").read_text())["correction_patience"] == 32
    with pytest.raises(ValueError, match="The sampler 'ancestral' has no option 'correction_time', which self_corr"):
        GIDDGenerationConfig(correction_time=0.5)
    for options, message in (
        ({"correction_rounds": 0}, "correction_rounds"),
        ({"correction_temperature": -1.0}, "correction_temperature"),
        ({"correction_time": 1.5}, "correction_time"),
    ):
        with pytest.raises(ValueError, match=message):
            GIDDGenerationConfig(sampler="self_correction", **options)


def test_prompts_guide_by_the_product_of_two_laws():
    """One step of most probable tokens, from the logits with and without the prompt; texts are corrected likewise."""
    model, prompts = make_model(), [[8, 9, 10], [11], []]
    rows, canvas = batch_of(prompts), torch.full((1, 8), MASK)
    for scale in (0.0, 2.5):
        output = model.generate(rows, guidance_scale=scale, num_steps=1, max_new_tokens=8, seed=1)
        assert output.nfe.tolist() == [2] * 3
        for row, prompt in enumerate(prompts):
            logits = [
                model(torch.cat((torch.tensor([[*given, BOS]]), canvas), dim=1), timesteps=torch.ones(1)).logits[0, -8:]
                for given in (prompt, [])
            ]
            expected = (scale * logits[0] + (1 - scale) * logits[1]).nan_to_num(nan=-torch.inf).argmax(dim=-1).tolist()
            end = expected.index(EOS) + 1 if EOS in expected else 8
            assert output.sequences[row, rows.shape[1] :][:end].tolist() == expected[:end]
    options = {**OPTIONS["self_correction"], "do_sample": True, "max_new_tokens": 8}
    text = torch.tensor([TEXTS[0]])
    plain, guided = (model.generate(text, guidance_scale=w, seed=3, **options) for w in (1.0, 4.0))
    assert guided.sequences[0, :3].tolist() == TEXTS[0][:3]
    assert not torch.equal(plain.sequences, guided.sequences)


def test_given_tokens_are_told_that_they_have_no_noise():
    """Beside a row that is written after its prompt, which is told one time."""
    model, told = make_model(), []
    forward = model.model.forward
    model.model.forward = lambda *args, **kwargs: told.append(kwargs["timesteps"]) or forward(*args, **kwargs)
    ids = torch.tensor([[8, MASK, 10, MASK], [PAD, 9, 11, BOS]])
    model.generate(ids, num_steps=2, max_new_tokens=2, seed=[1, 2])
    expected = [[0.0, 1.0, 0.0, 1.0, 0.0, 0.0], [1.0] * 6]
    assert told[0].tolist() == expected
    assert told[1].tolist() == [[t / 2 for t in row] for row in expected]
