"""Mask-predict: the masked language model with a length head, its bound, and its sampler."""

import itertools
import math
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tests.modeling import naive
from tests.modeling.naive import BOS, EOS, MASK, PAD, UNK, SpecialIds, check_histogram, make_examples
from tests.modeling.naive_mlm import TableModel, V
from tests.modeling.naive_mlm import make_model as make_mlm
from xlm_hf.modeling.mlm import MLMCollator, MLMConfig, MLMGenerationConfig, MLMLoss
from xlm_hf.modules.canvas import MaskedCanvas
from xlm_hf.modules.generation import GenerationCall
from xlm_hf.modules.reverse_process import CanvasProcess
from xlm_hf.modules.vocabulary_head import LanguageModelOutput

batch_of = partial(naive.batch_of, end=())
PROMPTS = [[8, 9, 10, BOS], [7, BOS], [BOS], [11, 12, 7, 8, 9, BOS]]
make_model = partial(make_mlm, max_canvas_length=8)
STREAMER = SimpleNamespace(put=print, end=print)
PUBLISHED = Path(__file__).parents[1] / "fixtures" / "published" / "mask_predict.safetensors"


def make_collator(**options):
    options = {"kind": "seq2seq", "max_length": 24, "max_canvas_length": 8, **options}
    return MLMCollator(SpecialIds(V), **options)


@pytest.mark.parametrize("packing", [False, True])
def test_a_batch_says_lengths_masks_and_weights(packing):
    examples = make_examples(64, V)
    batch = make_collator(packing=packing)(examples)
    ids, positions = batch["input_ids"].flatten(), batch["logits_index"]
    masks = positions[batch["target_documents"].argsort(stable=True)].split(
        batch["target_documents"].bincount(minlength=64).tolist()
    )
    order = np.argsort(batch["example_id"].tolist(), kind="stable")
    documents = sorted(order, key=lambda number: int(batch["length_index"][number]))
    assert sorted(documents) == list(range(64))
    for number, example in enumerate(examples):
        bos, L, k = int(batch["length_index"][number]), len(example["target_ids"]), len(masks[number])
        assert ids[bos] == BOS
        assert batch["length_targets"][number] == L
        assert batch["sequence_tokens"][number] == L + 1
        whole = ids.clone()
        whole[positions] = batch["target_ids"]
        assert whole[bos - len(example["prompt_ids"]) : bos + 1 + L].tolist() == [
            *example["prompt_ids"],
            BOS,
            *example["target_ids"],
        ]
        assert (0 < k <= L) if L else k == 0
        assert batch["weights"][number] == pytest.approx(L / k if L else 0.0)
        assert all(bos < mask <= bos + L for mask in masks[number].tolist())
    assert EOS not in ids
    alone = make_collator()([examples[5]])
    assert alone["target_ids"].tolist() == batch["target_ids"][batch["target_documents"] == 5].tolist()


def test_infilling_has_no_lengths():
    examples = [
        {**e, "input_ids": [MASK if i % 2 else t for i, t in enumerate(e["target_ids"])]} for e in make_examples(40, V)
    ]
    batch = make_collator(kind="infill")(examples)
    blanks = [example["input_ids"].count(MASK) for example in examples]
    masked = batch["target_documents"].bincount(minlength=40).tolist()
    assert batch["sequence_tokens"].tolist() == blanks
    assert batch["weights"].tolist() == pytest.approx(
        [n / k if n else 0.0 for n, k in zip(blanks, masked, strict=True)]
    )
    assert len(batch["length_index"]) == len(batch["length_targets"]) == 0
    loss = MLMLoss()(make_model(), batch)
    assert loss.sequence_nats.shape == (40,)


WORDS = (7, 8)


class ExactModel(nn.Module):
    """The exact conditionals of a joint law of texts over `WORDS`, and the exact law of their length."""

    def __init__(self, law):
        super().__init__()
        self.law = law

    def forward(self, input_ids, attention_mask, logits_index, length_index, head_function):
        logits = torch.full((*input_ids.shape, 9), -torch.inf, dtype=torch.float64)
        for row, ids in enumerate(input_ids.tolist()):
            state = [i for i, seen in zip(ids, attention_mask[row].tolist(), strict=True) if seen][1:]
            agreeing = {
                x: p
                for x, p in self.law.items()
                if len(x) == len(state) and all(s in (MASK, v) for s, v in zip(state, x, strict=True))
            }
            for i, v in itertools.product(range(len(state)), WORDS):
                share = sum(p for x, p in agreeing.items() if x[i] == v) / sum(agreeing.values())
                logits[row, i + 1, v] = math.log(share) if share else -math.inf
        of_length = [sum(p for x, p in self.law.items() if len(x) == n) for n in range(4)]
        output = head_function(logits.flatten(0, 1)[logits_index].float(), nn.Identity(), None)
        lengths = torch.tensor(of_length, dtype=torch.float64).log().float().expand(len(length_index), -1)
        return SimpleNamespace(head_output=output, length_logits=lengths)


def all_texts():
    return [x for n in range(4) for x in itertools.product(WORDS, repeat=n)]


@pytest.mark.parametrize("mask_beta", [1.0, 3.0])
def test_the_bound_is_the_likelihood_at_the_exact_conditionals(mask_beta):
    """Every number of masks and every subset of the text, as often as the collator shows them."""
    texts = all_texts()
    law = dict(zip(texts, np.random.default_rng(0).dirichlet(np.ones(len(texts))), strict=True))
    num = 6000
    for text in (texts[0], texts[2], texts[5], texts[9]):
        examples = [{"input_ids": list(text), "example_id": i, "epoch": 0, "position": i} for i in range(num)]
        batch = MLMCollator(SpecialIds(9), 8, kind="lm", max_canvas_length=3, mask_beta=mask_beta)(examples)
        if not text:
            # A network is asked for at least one position.
            batch["logits_index"], batch["target_ids"] = torch.zeros(1, dtype=torch.int64), torch.tensor([-100])
            batch["target_documents"] = torch.zeros(1, dtype=torch.int64)
        loss = MLMLoss()(ExactModel(law), batch)
        nats, nll = loss.sequence_nats.double(), -math.log(law[text])
        error = float(nats.std()) / num**0.5
        assert abs(float(nats.mean()) - nll) < 4 * error + 2e-3 * (len(text) > 0) + 1e-5
        assert loss.sequence_tokens.tolist() == [len(text) + 1] * num


def test_loss_equals_a_loop_and_its_gradient_reaches_the_length_head():
    model, examples = make_model(), make_examples(12, V)
    batch = make_collator()(examples)
    loss = MLMLoss(length_loss_weight=0.5)(model, batch)
    output = model(batch["input_ids"], batch["attention_mask"])
    losses = -output.logits.log_softmax(dim=-1).flatten(0, 1)[batch["logits_index"], batch["target_ids"]]
    expected, lengths = [], []
    for number, example in enumerate(examples):
        prompt = torch.tensor([[*example["prompt_ids"], BOS]])
        index = torch.tensor([prompt.shape[1] - 1])
        alone = model(prompt, torch.ones_like(prompt), logits_index=index[:0], length_index=index)
        lengths.append(-alone.length_logits.log_softmax(dim=-1)[0, len(example["target_ids"])])
        own = losses[batch["target_documents"] == number]
        expected.append(lengths[-1] + batch["weights"][number] * own.sum())
    torch.testing.assert_close(loss.loss_sum, losses.sum() + 0.5 * sum(lengths), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(loss.sequence_nats, torch.stack(expected).detach(), rtol=1e-4, atol=1e-4)
    assert loss.num_items == len(batch["target_ids"])
    loss.loss_sum.backward()
    assert model.length_head.weight.grad.abs().sum() > 0


def test_no_token_of_a_prompt_sees_the_canvas():
    model, index = make_model(), torch.tensor([3])
    logits = [
        model(torch.tensor([[8, 9, 10, BOS, *canvas]]), logits_index=index[:0], length_index=index).length_logits
        for canvas in ([MASK] * 2, [MASK] * 6, [7, MASK, 9])
    ]
    for other in logits[1:]:
        torch.testing.assert_close(other, logits[0], rtol=1e-5, atol=1e-6)


class NoEnd(TableModel):
    """A table without an end of the text."""

    allowed = (5, 6)


def rounds(model, T, choose):
    """Every path of mask-predict: states and scores of a canvas, with probabilities; `choose` gives tokens of a law."""
    n = model.length
    states = {((MASK,) * n, (0.0,) * n): 1.0}
    for i in range(T):
        after = {}
        for (state, scores), p in states.items():
            masks = [j for j in range(n) if state[j] == MASK]
            laws = [model.distribution(state, j) for j in masks]
            for tokens in itertools.product(*map(choose, laws)):
                new, kept, q = list(state), list(scores), p
                for j, law, (token, r) in zip(masks, laws, tokens, strict=True):
                    new[j], kept[j], q = token, law[token], q * r
                lowest = sorted(range(n), key=lambda j: (kept[j], j))[: n * (T - i - 1) // T]
                new = [MASK if j in lowest else token for j, token in enumerate(new)]
                key = (tuple(new), tuple(kept))
                after[key] = after.get(key, 0.0) + q
        states = after
    law: dict = {}
    for (state, _), p in states.items():
        law[state] = law.get(state, 0.0) + p
    return law


@pytest.mark.parametrize("num_steps", [1, 2, 3])
def test_samples_follow_the_enumerated_law(num_steps):
    model = NoEnd()
    options = {"sampler": "mask_predict", "num_steps": num_steps}
    config = MLMGenerationConfig(do_sample=True, max_new_tokens=model.length, **options)
    output = model.generate(torch.full((6000, 1), BOS), generation_config=config, seed=3)
    check_histogram([tuple(row) for row in output.sequences[:, 1:].tolist()], rounds(model, num_steps, dict.items))
    assert output.nfe.tolist() == [num_steps] * 6000


@pytest.mark.parametrize("num_steps", [1, 2, 3, 10])
def test_greedy_decoding_equals_a_loop(num_steps):
    model = NoEnd(length=4)
    config = MLMGenerationConfig(max_new_tokens=4, sampler="mask_predict", num_steps=num_steps, return_history=True)
    output = model.generate(torch.tensor([[BOS]]), generation_config=config)
    ((expected, _),) = rounds(model, num_steps, lambda law: [(max(law, key=law.get), 1.0)]).items()
    assert tuple(output.sequences[0, 1:].tolist()) == expected
    # Nothing is masked again once n (T - i - 1) / T is less than 1.
    assert output.nfe.tolist() == [next(i + 1 for i in range(num_steps) if 4 * (num_steps - i - 1) < num_steps)]
    assert (output.history[0, 1:] >= 0).all()


def test_what_is_masked_again_is_that_of_the_published_code():
    """Recorded from fairseq: what 10 steps mask again, of texts whose tokens have the same scores in all of them."""
    recorded = load_file(PUBLISHED)
    scores, lengths = recorded["scores"], recorded["lengths"]
    config = MLMGenerationConfig(sampler="mask_predict", num_steps=10)
    for step, expected in enumerate(recorded["masked_again"]):
        canvas = MaskedCanvas(torch.full((6, 1), BOS), torch.ones(6, 1, dtype=torch.bool), lengths, MASK, PAD, None)
        process = CanvasProcess(canvas, config.make_sampler(), GenerationCall(config, torch.arange(6)))
        process.step += step

        def predict(function, rows, wanted, num, alpha):
            return torch.full((num,), 8), scores[:, : wanted.shape[1]][wanted]

        assert process.take_step(predict, step)
        assert torch.equal(canvas.masked, expected[:, : canvas.masked.shape[1]])
    assert expected.any()


def slow_lengths(model, prompt, capacity, num):
    ids = torch.tensor([prompt])
    index = torch.tensor([len(prompt) - 1])
    logits = model(ids, torch.ones_like(ids), logits_index=index[:0], length_index=index).length_logits[0]
    return logits[: capacity + 1].topk(num).indices.tolist()


@pytest.mark.parametrize("num_lengths", [1, 3])
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_best_of_several_lengths_is_kept_and_a_row_decodes_alike_in_any_batch(num_lengths, side):
    model, seeds = make_model(), [5, 6, 7, 8]
    options = {"sampler": "mask_predict", "num_steps": 3, "do_sample": True, "max_new_tokens": 6}
    call = {**options, "num_lengths": num_lengths, "return_history": True}
    output = model.generate(batch_of(PROMPTS, side), seed=seeds, **call)
    width = max(map(len, PROMPTS))
    for row, prompt in enumerate(PROMPTS):
        alone = model.generate(torch.tensor([prompt]), seed=[seeds[row]], **call)
        text = [t for t in output.sequences[row, width:].tolist() if t != PAD]
        assert alone.sequences[0, len(prompt) :].tolist() == text
        assert output.nfe[row] == alone.nfe[0]
        candidates, passes = [], 1
        for length in slow_lengths(model, prompt, 6, num_lengths):
            given = torch.tensor([length])
            one = model.generate(torch.tensor([prompt]), seed=[seeds[row]], canvas_lengths=given, **options)
            candidates.append(one.sequences[0, len(prompt) :].tolist())
            passes += int(one.nfe)
        assert text in candidates
        assert output.nfe[row] == passes
        edits = output.edits[output.edits[:, 0] == row]
        assert {4 + width - 4 - (width - len(prompt)) + i for i in range(len(text))} == set(edits[:, 3].tolist())
    assert output.finish_reason == ["stop"] * 4


def test_the_text_of_the_largest_mean_log_score_is_kept():
    model = make_model()
    call = {"sampler": "mask_predict", "num_steps": 1, "max_new_tokens": 6}
    kept = model.generate(torch.tensor([PROMPTS[0]]), num_lengths=4, **call).sequences[0, 4:].tolist()
    scores = {}
    for length in slow_lengths(model, PROMPTS[0], 6, 4):
        ids = torch.tensor([[*PROMPTS[0], *[MASK] * length]])
        if not length:
            # An empty text is kept where its length is the most probable one, and has no score.
            continue
        law = model(ids, torch.ones_like(ids)).logits[0, 4:].softmax(dim=-1)
        scores[tuple(law.argmax(dim=-1).tolist())] = float(law.amax(dim=-1).log().mean().detach())
    assert tuple(kept) == max(scores, key=scores.get)
    assert len(scores) >= 3


def with_length_biases(biases):
    model = make_model()
    with torch.no_grad():
        model.length_head.weight.zero_()
        model.length_head.bias.fill_(-9.0)
        for length, bias in biases.items():
            model.length_head.bias[length] = bias
    return model


def test_an_empty_text_is_kept_only_as_the_most_probable_one():
    call = {"sampler": "mask_predict", "num_steps": 2, "max_new_tokens": 6, "num_lengths": 3}
    rare = with_length_biases({4: 0.0, 5: 0.0, 0: -8.0}).generate(torch.tensor([PROMPTS[0]]), **call)
    assert rare.sequences.shape[1] >= 4 + 4
    likely = with_length_biases({4: 0.0, 5: 0.0, 0: 1.0}).generate(torch.tensor([PROMPTS[0]]), **call)
    assert likely.sequences.tolist() == [PROMPTS[0]]


def test_a_text_that_has_begun_counts_towards_its_length():
    model = with_length_biases({5: 0.0})
    output = model.generate(torch.tensor([[BOS, 10, 11], [PAD, BOS, 10]]), max_new_tokens=8)
    assert [len([t for t in row if t != PAD]) for row in output.sequences.tolist()] == [6, 6]
    assert output.finish_reason == ["stop"] * 2


def test_rows_that_are_filled_in_predict_no_length():
    rows = torch.tensor([[8, MASK, 9, MASK], [PAD, PAD, 7, BOS]])
    for biases in ({8: 0.0}, {1: 0.0}):
        output = with_length_biases(biases).generate(rows, max_new_tokens=4)
        assert output.nfe[0] == 2
        assert output.finish_reason[0] == "length"


def test_rows_are_as_wide_as_what_is_kept_of_them():
    """Neither the masks of a prompt nor a longer text that is not kept add columns."""
    rows = torch.tensor([[8, MASK, 9, MASK], [PAD, PAD, 7, BOS]])
    options = {"max_new_tokens": 4, "sampler": "mask_predict", "num_lengths": 2, "return_history": True}
    output = with_length_biases({0: 1.0, 4: 0.0}).generate(rows, **options)
    assert output.sequences.shape == output.history.shape == rows.shape
    assert output.sequences[1].tolist() == rows[1].tolist()


def test_a_length_beyond_what_may_be_written_ends_for_want_of_capacity():
    model = make_model()
    with torch.no_grad():
        model.length_head.weight.zero_()
        model.length_head.bias.copy_(torch.arange(9.0))
    output = model.generate(batch_of(PROMPTS), max_new_tokens=5)
    assert output.finish_reason == ["length"] * 4
    assert output.sequences.shape[1] == max(map(len, PROMPTS)) + 5
    longer = model.generate(batch_of(PROMPTS), max_new_tokens=8)
    assert longer.finish_reason == ["stop"] * 4


def test_results_under_a_given_length_say_so():
    assert make_collator(prediction=True).given == ()
    assert MLMCollator(SpecialIds(V), 24, kind="seq2seq", prediction=True).given == ("length",)
    assert MLMCollator(SpecialIds(V), 24, kind="seq2seq", prediction=True, canvas_length=9).given == ()
    assert MLMCollator(SpecialIds(V), 24, kind="infill", prediction=True).given == ()


@pytest.mark.parametrize(
    ("attempt", "message"),
    [
        (lambda: make_collator(canvas_length=9), "either predicted .max_canvas_length, here 8. or fixed"),
        (lambda: make_collator(max_canvas_length=2)(make_examples(20, V)), "max_canvas_length is 2: raise it"),
        (lambda: MLMConfig(max_canvas_length=-1), "max_canvas_length must be at least 0 and is -1"),
        (lambda: MLMConfig(max_canvas_length=3, bos_token_id=3), "needs an id of its own, and bos_token_id is 3"),
        (lambda: MLMLoss(length_loss_weight=-1.0), "length_loss_weight must be at least 0"),
        (
            lambda: make_model()(inputs_embeds=torch.zeros(1, 3, 32)),
            "no token of the prompt sees the canvas: pass block",
        ),
        (
            lambda: MLMConfig(max_canvas_length=3, shift_logits=True, backbone_config={"model_type": "llama"}),
            "With shift_logits the first token is read at .BOS.",
        ),
        (
            lambda: make_collator()([{**make_examples(1, V)[0], "target_ids": [8, EOS]}]),
            f"holds the special token {EOS}",
        ),
        (lambda: make_mlm().generate(sampler="mask_predict", num_lengths=2), "this call predicts no length"),
        (
            lambda: make_model().generate(
                sampler="mask_predict", num_lengths=2, streamer=SimpleNamespace(put=print, end=print)
            ),
            "num_lengths is 2: nothing can follow",
        ),
        (lambda: make_model().generate(num_lengths=2), "has no option 'num_lengths', which mask_predict has"),
        (lambda: MLMGenerationConfig(sampler="mask_predict", num_steps=0), "num_steps must be"),
    ],
)
def test_mistakes_are_refused_in_one_sentence(attempt, message):
    with pytest.raises(ValueError, match=message):
        attempt()


def test_suppressed_ids_leave_no_end_to_a_text_whose_length_is_known():
    assert {PAD, EOS, MASK, BOS} <= set(make_model().config.suppressed_ids)
    assert {PAD, EOS} & set(MLMConfig(suppress_tokens=[PAD, EOS, UNK]).suppressed_ids) == set()
    assert isinstance(make_model()(torch.tensor([[BOS, MASK]])), LanguageModelOutput)
