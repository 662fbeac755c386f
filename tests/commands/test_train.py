"""Runs that begin with the weights of another."""

import shutil
import sys

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from tests.modeling.naive import small_model
from xlm_hf.building import initialise
from xlm_hf.cli import main
from xlm_hf.modeling.edit_flow import EditFlowForEditLM
from xlm_hf.modeling.ilm import ILMForInsertionLM
from xlm_hf.tasks.tokenizers import number_tokenizer

TINY = ["task=star_easy", "size=tiny", "task.num_train=40", "task.num_validation=4", "task.num_test=4"]
TINY += ["model.hidden_size=16", "model.num_hidden_layers=1", "trainer.per_device_train_batch_size=4"]
V = 20


@pytest.fixture
def saved(tmp_path):
    """An insertion language model and its tokenizer, in a folder."""
    model = small_model(ILMForInsertionLM, num_missing_classes=2)
    model.save_pretrained(tmp_path / "ilm")
    number_tokenizer(V - 7).save_pretrained(tmp_path / "ilm")
    return model, str(tmp_path / "ilm")


def edit_flow(**options):
    model = small_model(EditFlowForEditLM, insertion_head="joint", **options)
    for parameter in model.parameters():
        parameter.data += 1
    return model


def test_the_joint_head_scores_insertions_as_the_other_family_does(saved):
    ilm, folder = saved
    model = edit_flow()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    weights = initialise(model, folder, number_tokenizer(V - 7))
    # A time that is zero at first, as that of a fresh model.
    model.model.time_token.projection.weight.data.zero_()
    model.model.time_token.projection.bias.data.zero_()
    ids = torch.tensor([[1, 9, 4, 8, 12], [1, 10, 11, 4, 15]])
    mask = torch.ones_like(ids)
    with torch.no_grad():
        ours = model(ids, attention_mask=mask, time_left=torch.tensor([0.3, 0.8])).logits
        torch.testing.assert_close(ours, ilm(ids, attention_mask=mask).logits)
    after = model.state_dict()
    assert sorted(weights["taken"] + weights["new"]) == sorted(set(after) - set(model.all_tied_weights_keys))
    assert all(name.startswith(("rate_head.", "model.time_token.")) for name in weights["new"])
    assert all(name.startswith("stop_head.") for name in weights["left"])
    assert weights["new"]
    assert weights["left"]
    assert all(torch.equal(after[name], ilm.state_dict()[name]) for name in weights["taken"])
    assert all(torch.equal(after[n], before[n]) for n in weights["new"] if "time_token.projection" not in n)


def test_averaged_weights_are_taken_unless_told_otherwise(saved, tmp_path):
    ilm, folder = saved
    average = {name: parameter + 0.5 for name, parameter in ilm.named_parameters()}
    save_file(average, tmp_path / "ilm" / "ema.safetensors")
    for use_ema in (True, False):
        model = edit_flow()
        initialise(model, folder, number_tokenizer(V - 7), use_ema=use_ema)
        expected = ilm.model.embed_tokens.weight + 0.5 * use_ema
        torch.testing.assert_close(model.model.embed_tokens.weight, expected)


@pytest.mark.parametrize(
    ("options", "numbers", "sentence"),
    [
        ({"vocab_size": V + 1}, V - 6, f"another vocabulary than the task, {V} tokens and not {V + 1}"),
        ({"hidden_size": 16}, V - 7, rf"has embeddings of shape \({V}, 32\) and this model \({V}, 16\)"),
    ],
)
def test_what_does_not_fit_is_refused(saved, options, numbers, sentence):
    with pytest.raises(ValueError, match=sentence):
        initialise(edit_flow(**options), saved[1], number_tokenizer(numbers))


def test_a_run_begins_with_another_and_resumes_without_it(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["run_xlm.py", *TINY, *arguments])
        main()
        return capsys.readouterr().out

    run("family=ilm", "output_dir=first", "trainer.max_steps=1")
    # A rate of nothing: the run ends with what it began with.
    second = ["family=edit_flow", "model.insertion_head=joint", "output_dir=second", "init_from=first"]
    second += ["trainer.learning_rate=1e-30", "trainer.weight_decay=0", "trainer.save_strategy=steps"]
    printed = run(*second, "trainer.max_steps=1", "trainer.save_steps=1")
    assert "Initialised from first: " in printed
    assert "rate_head" in printed
    assert "left there: " in printed
    first, begun = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("first", "second"))
    assert torch.equal(begun["model.embed_tokens.weight"], first["model.embed_tokens.weight"])
    assert OmegaConf.load(tmp_path / "second" / "config.yaml").init_from == "first"
    with pytest.raises(SystemExit):
        run(*[argument for argument in second if "init_from" not in argument])
    assert "was run with init_from=first and not None" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "first")
    printed = run(*second, "trainer.max_steps=2", "trainer.save_steps=1")
    assert "Initialised" not in printed
    assert "resuming from checkpoint-1" in printed
