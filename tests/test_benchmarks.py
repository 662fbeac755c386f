"""The benchmarks compare like with like: all implementations compute the same losses and write the same samples."""

import inspect
import itertools
import json

import pytest
import torch

from benchmarks import gpu, operations, tables, training
from benchmarks.cases import (
    FAMILIES,
    TWINS,
    build_collator,
    build_model,
    build_prompts,
    end_at_given_lengths,
    family_class,
    random_examples,
)
from xlm_hf.objectives import head_operator

VOCABULARY, BLOCK = 50, 20
# What these write is random even without `do_sample`.
NOISY = ("edit_flow", "flexmdm", "gidd", "mdlm", "plaid", "udlm")
# Values of what a slow sampler may be told.
OPTIONS = {"num_steps": (None, 4, 30), "stopping_threshold": (None,)}
WIDE = {"initializer_range": 0.3}  # distributions far enough from uniform that a mistake shows


@pytest.mark.parametrize("kind", ["seq2seq", "lm"])
@pytest.mark.parametrize("family", FAMILIES)
def test_dense_plain_and_ours_have_the_same_loss_and_gradients(family, kind):
    model = build_model(family, VOCABULARY, suppress_tokens=[5, 6], **WIDE)
    examples = [
        {
            **e,
            "prompt_ids": e["prompt_ids"][i % 3 :],
            "target_ids": e["target_ids"][i:],
            "input_ids": e["input_ids"][i:],
        }
        for i, e in enumerate(random_examples(7, 4, 9, VOCABULARY))
    ]
    batch = build_collator(family, kind, VOCABULARY)(examples)
    losses = [family_class(family, "Loss")()(model, batch).loss_sum]
    losses += [TWINS[family].slow_loss(model, batch, BLOCK, dense) for dense in (True, False)]
    # What the canvas is seen by; behind adaptive norms, which begin at zero, nothing of a prompt has a gradient.
    embedding = model.vectors if family == "plaid" else model.model.embed_tokens
    gradients = [torch.autograd.grad(loss, embedding.weight)[0] for loss in losses]
    for loss, gradient in zip(losses[1:], gradients[1:], strict=True):
        torch.testing.assert_close(loss, losses[0], rtol=1e-5, atol=1e-5)
        assert (gradient - gradients[0]).norm() < 1e-4 * gradients[0].norm()


def sampler_cases():
    for family, twin in TWINS.items():
        names = [name for name in OPTIONS if name in inspect.signature(twin.slow_sampler).parameters]
        for values in itertools.product(*(OPTIONS[name] for name in names)):
            yield family, dict(zip(names, values, strict=True))


@pytest.mark.parametrize("do_sample", [True, False])
@pytest.mark.parametrize(("family", "options"), sampler_cases())
def test_every_reference_and_ours_write_the_same(family, options, do_sample):
    model = build_model(family, VOCABULARY, **WIDE)
    prompts = build_prompts(family, [[20]] * 5, VOCABULARY)
    shared = {"max_new_tokens": 12, "seed": 3, "do_sample": do_sample, "return_dict_in_generate": False}
    ours = model.generate(prompts, **shared, **options)
    assert do_sample == (len(ours.unique(dim=0)) > 1) or family in NOISY
    twin = TWINS[family]
    for rung in range(len(twin.LADDER) + 1):
        theirs = twin.slow_sampler(model, prompts, 12, do_sample, 3, twin.LADDER[:rung], **options)
        assert torch.equal(theirs, ours), twin.LADDER[:rung]


def test_rows_that_end_early_are_the_same_too():
    model = build_model("ilm", VOCABULARY, **WIDE)
    end_at_given_lengths(model)
    prompts = build_prompts("ilm", [[7 + length] for length in (3, 0, 12, 7)], VOCABULARY)
    output = model.generate(prompts, max_new_tokens=12, seed=3, do_sample=True)
    assert output.nfe.tolist() == [4, 1, 12, 8]
    twin = TWINS["ilm"]
    for rung in range(len(twin.LADDER) + 1):
        theirs = twin.slow_sampler(model, prompts, 12, True, 3, twin.LADDER[:rung])
        assert torch.equal(theirs, output.sequences)


def test_counted_operations_are_those_of_the_formula():
    model = build_model("mlm", VOCABULARY)
    ids, index = torch.full((3, 10), 20), torch.arange(4)
    with torch.no_grad():
        counted = operations.executed(lambda: model(ids, logits_index=index))
    assert counted == operations.of_forward(model.config, num_tokens=30, context=10, head_rows=4)


def test_the_chunked_loss_is_counted_like_one_that_makes_all_logits(monkeypatch):
    (setting,), counted = training.QUICK, []
    for num_rows in (3, 2**30):
        monkeypatch.setattr(head_operator, "rows_per_chunk", lambda *_, num_rows=num_rows: num_rows)
        counted.append(operations.executed(training.steps("mlm", setting, ("ours",))["ours"]))
    assert counted[0] == counted[1] > 1e9


def test_the_benchmark_of_gpus_measures_every_family():
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    records = gpu.measure(torch.device("cpu"), 2, 12, VOCABULARY, size, product_size=32, repetitions=1, compiled=False)
    trained = [r for r in records if r["what"].startswith("training")]
    assert [r["what"] for r in trained] == ["training GPT-2", *(f"training {family}" for family in FAMILIES)]
    assert all(r["utilisation"] > 0 for r in trained)
    assert len(records) == 1 + 2 * len(FAMILIES)


def test_tables_are_made_from_results_and_leave_the_text_alone(tmp_path):
    records = [{"family": "mlm", "setting": "tiny", "examples_per_second": {"ours": 1234.0, "plain": 0.5}}]
    result = {"commit": "abc", "device": "cpu", "matrix_product_gflops": 2.0, "matrix_product_gflops_at_the_end": 1.0}
    (tmp_path / "collation.json").write_text(json.dumps({**result, "records": records}))
    page = "before\n<!-- collation -->\nold\n<!-- end -->\nafter\n<!-- training -->\nkept\n<!-- end -->\n"
    renewed = tables.renew(page, tmp_path)
    assert "| tiny | mlm | 1,234 | 0.5 |  |" in renewed
    assert "1 to 2 Gflop/s" in renewed
    assert "old" not in renewed
    assert renewed.startswith("before\n")
    assert renewed.endswith("after\n<!-- training -->\nkept\n<!-- end -->\n")
    with pytest.raises(ValueError, match="0 marks for the table 'collation'"):
        tables.renew("no place", tmp_path)
