"""Which checkpoints are written, which stay, and how a user names them."""

import json
import math
import os
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from tests.training.test_averages import SaveWeights
from tests.training.test_trainer import EXACT, assert_same_weights, evaluation_sets, make_trainer, weights
from xlm_hf.modeling.ilm import ILMForInsertionLM
from xlm_hf.testing import FamilyCase
from xlm_hf.training.arguments import XLMTrainingArguments
from xlm_hf.training.checkpoints import (
    delete_old_checkpoints,
    last_sound_checkpoint,
    list_checkpoints,
    resolve_checkpoint,
    saved_state,
)
from xlm_hf.training.signals import TrainingStopped


def losses(trainer):
    return {log["step"]: log["loss"] for log in trainer.state.log_history if "loss" in log}


def steps_of(folder):
    return [int(checkpoint.name.split("-")[1]) for checkpoint in list_checkpoints(folder)]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    trainer = make_trainer(tmp_path_factory.mktemp("run"), ema_decay=0.9)
    trainer.train()
    return trainer


@pytest.mark.parametrize(("limit", "expected"), [(None, [5, 10, 12]), (2, [5, 10, 11, 12])])
def test_every_fifth_checkpoint_stays_for_good(tmp_path, limit, expected):
    make_trainer(tmp_path, save_strategy="steps", save_steps=1, keep_every=5, save_total_limit=limit).train()
    assert steps_of(tmp_path) == expected
    assert not list(tmp_path.glob("*.deleted"))


@pytest.mark.parametrize(
    ("limit", "best", "expected"), [(1, None, [3]), (1, 1, [1, 3]), (1, 3, [3]), (2, 2, [2, 3]), (None, 1, [1, 2, 3])]
)
def test_the_newest_checkpoint_is_never_deleted_and_neither_is_the_best(tmp_path, limit, best, expected):
    for step in (1, 2, 3):
        (tmp_path / f"checkpoint-{step}").mkdir()
    delete_old_checkpoints(tmp_path, limit, None, None if best is None else str(tmp_path / f"checkpoint-{best}"))
    assert steps_of(tmp_path) == expected


def test_a_model_is_found_after_a_kill_between_the_renames_that_replace_it(tmp_path):
    trainer = make_trainer(tmp_path / "elsewhere")
    trainer.model.save_pretrained(tmp_path / "run" / "model.previous")
    for given in (tmp_path / "run", tmp_path / "run" / "model"):
        assert resolve_checkpoint(str(given)) == f"{tmp_path}/run/model.previous"
    trainer.model.save_pretrained(tmp_path / "run" / "model.incomplete")
    for given in (tmp_path / "run", tmp_path / "run" / "model"):
        assert resolve_checkpoint(str(given)) == f"{tmp_path}/run/model.incomplete"


@pytest.mark.parametrize("metric", ["validation/loss", "validation/token_loss"])
def test_the_best_checkpoint_by_any_metric_stays_and_can_be_named(tmp_path, metric):
    sets = evaluation_sets(8)[:1]
    sets[0].name, sets[0].stages = "validation", ["validation"]
    options = {"evaluation_sets": sets, "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps"}
    # Turned round, so that the last checkpoint is not the best.
    trainer = make_trainer(
        tmp_path, save_steps=2, save_total_limit=2, metric_for_best_model=metric, greater_is_better=True, **options
    )
    trainer.train()
    values = {log["step"]: log[metric] for log in trainer.state.log_history if metric in log}
    best = max(values, key=values.get)
    assert best != 12
    assert steps_of(tmp_path) == [best, 12]
    assert resolve_checkpoint(f"{tmp_path}/best") == f"{tmp_path}/checkpoint-{best}"
    assert resolve_checkpoint(f"{tmp_path}/last") == resolve_checkpoint(str(tmp_path)) == f"{tmp_path}/checkpoint-12"
    assert resolve_checkpoint(f"{tmp_path}/checkpoint-{best}") == f"{tmp_path}/checkpoint-{best}"
    with pytest.raises(ValueError, match="There is no checkpoint at"):
        resolve_checkpoint(f"{tmp_path}/beste")
    with pytest.raises(ValueError, match="there is no metric 'validation/los': did you mean 'validation/loss'"):
        make_trainer(tmp_path / "typo", metric_for_best_model="validation/los", **options).train()


def test_a_metric_says_by_its_name_which_direction_is_better(tmp_path):
    names = ("loss", "perplexity", "perplexity_given_length", "nats_per_token", "bits_per_character", "nfe")
    for metric, greater in (*((f"a/{name}", False) for name in names), ("a/exact_match", True)):
        arguments = XLMTrainingArguments(str(tmp_path), use_cpu=True, metric_for_best_model=metric)
        assert arguments.greater_is_better is greater


def test_shards_are_loaded_and_a_missing_one_is_named(tmp_path):
    trainer = make_trainer(tmp_path / "run")
    trainer.model.save_pretrained(tmp_path / "sharded", max_shard_size="5KB")
    shards = sorted((tmp_path / "sharded").glob("model-*.safetensors"))
    assert len(shards) > 2
    loaded = ILMForInsertionLM.from_pretrained(resolve_checkpoint(str(tmp_path / "sharded")))
    assert_same_weights(loaded.state_dict(), weights(trainer), **EXACT)
    shards[1].unlink()
    with pytest.raises(ValueError, match=f"its shard {shards[1].name} is missing"):
        resolve_checkpoint(str(tmp_path / "sharded"))
    for file in (tmp_path / "sharded").glob("*.safetensors"):
        file.unlink()
    (tmp_path / "sharded" / "model.safetensors.index.json").unlink()
    (tmp_path / "sharded" / "pytorch_model_fsdp_0").mkdir()
    with pytest.raises(ValueError, match="in the shards of FSDP: join them by `accelerate merge-weights"):
        resolve_checkpoint(str(tmp_path / "sharded"))


class At(TrainerCallback):
    """Does something at one event of one step."""

    def __init__(self, event, step, action):
        def act(args, state, control, **kwargs):
            if state.global_step == step:
                action()

        setattr(self, event, act)


def fail(error):
    def action():
        raise error

    return action


def resume_and_compare(tmp_path, uninterrupted, step):
    assert last_sound_checkpoint(tmp_path).name == f"checkpoint-{step}"
    resumed = make_trainer(tmp_path, ema_decay=0.9)
    resumed.train(resume_from_checkpoint=str(last_sound_checkpoint(tmp_path)))
    assert_same_weights(weights(resumed), weights(uninterrupted), **EXACT)
    assert_same_weights(resumed.ema.shadow, uninterrupted.ema.shadow, **EXACT)
    assert losses(resumed).items() <= losses(uninterrupted).items()
    assert resumed.state.num_input_tokens_seen == uninterrupted.state.num_input_tokens_seen


def break_loss_at(trainer, number):
    """The forward pass of the `number`-th micro-batch fails after dropout has drawn random numbers."""
    loss, calls = trainer.loss, []

    def broken(model, batch):
        calls.append(None)
        output = loss(model, batch)
        if len(calls) == number:
            raise RuntimeError("out of memory")
        return output

    broken.num_items = loss.num_items
    trainer.loss = broken


def test_an_error_in_the_forward_pass_loses_no_step(uninterrupted, tmp_path):
    trainer = make_trainer(tmp_path, ema_decay=0.9, save_on_exception=True)
    break_loss_at(trainer, 8)
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.train()
    resume_and_compare(tmp_path, uninterrupted, 7)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("a data set went away")])
def test_an_error_between_steps_loses_no_step(uninterrupted, tmp_path, error):
    callback = At("on_log", 5, fail(error))
    with pytest.raises(type(error)):
        make_trainer(tmp_path, callbacks=[callback], ema_decay=0.9, save_on_exception=True).train()
    resume_and_compare(tmp_path, uninterrupted, 5)


def test_weights_between_two_steps_are_not_saved(tmp_path):
    callback = At("on_optimizer_step", 5, fail(RuntimeError("half a step")))
    with pytest.raises(RuntimeError, match="half a step"):
        make_trainer(tmp_path, callbacks=[callback], save_on_exception=True).train()
    assert steps_of(tmp_path) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("event", ["on_step_begin", "on_step_end"])
def test_a_signal_ends_the_run_after_a_whole_step(uninterrupted, tmp_path, number, event):
    before = signal.getsignal(number)
    callback = At(event, 6, lambda: os.kill(os.getpid(), number))
    with pytest.raises(TrainingStopped, match=f"{number.name} stopped the run after step 7, which is saved"):
        make_trainer(tmp_path, callbacks=[callback], ema_decay=0.9, save_on_exception=True).train()
    assert signal.getsignal(number) == before
    assert json.loads((tmp_path / "checkpoint-7" / "trainer_state.json").read_text())["log_history"][-1]["step"] == 7
    resume_and_compare(tmp_path, uninterrupted, 7)


def test_a_second_interrupt_is_obeyed_at_once(tmp_path):
    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt) as caught:
        make_trainer(tmp_path, callbacks=[At("on_step_begin", 6, twice)], save_on_exception=True).train()
    assert not isinstance(caught.value, TrainingStopped)
    assert steps_of(tmp_path) == [6]


def test_accumulation_follows_from_the_global_batch_size(tmp_path, monkeypatch):
    assert make_trainer(tmp_path, 2, global_batch_size=8).args.gradient_accumulation_steps == 4
    with pytest.raises(ValueError, match=r"global_batch_size \(9\) must be a multiple of .*\(2\) x 1 devices = 2"):
        make_trainer(tmp_path, 2, global_batch_size=9)
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match=r"global_batch_size \(8\) must be a multiple of .*\(2\) x 3 devices = 6"):
        make_trainer(tmp_path, 2, global_batch_size=8)


class FailingLoss:
    """The family's loss, but not finite where an example is in the batch and the model is being trained."""

    def __init__(self, loss, example_id, value):
        self.loss, self.example_id, self.value = loss, example_id, value

    def num_items(self, batch):
        return self.loss.num_items(batch)

    def __call__(self, model, batch):
        output = self.loss(model, batch)
        if self.example_id in batch["example_id"].tolist():
            output.loss_sum = output.loss_sum * self.value
        return output


@pytest.mark.parametrize(
    ("value", "logging_steps", "optimizer"),
    [(float("nan"), 1, {}), (float("inf"), 50, {}), (float("nan"), 50, {"optim": "adamw_torch"})],
)
def test_a_loss_that_is_not_finite_stops_the_run_and_can_be_repeated(tmp_path, value, logging_steps, optimizer):
    recorder = SaveWeights()
    reference = make_trainer(tmp_path / "reference", callbacks=[recorder], **optimizer)
    reference.train()
    order = [example for example, _ in reference.loss.seen]
    example_id, bad = order[19], 3

    trainer = make_trainer(tmp_path / "run", logging_steps=logging_steps, save_on_exception=True, **optimizer)
    trainer.loss = FailingLoss(trainer.loss, example_id, value)
    with pytest.raises(ValueError, match=rf"loss or gradient of step {bad} is not finite, .* {example_id}") as caught:
        trainer.train()
    folder = tmp_path / "run" / f"not-finite-{bad}"
    assert str(folder) in str(caught.value)
    assert steps_of(tmp_path / "run") == []

    model = ILMForInsertionLM.from_pretrained(folder).train()
    before = {name: parameter.double() for name, parameter in model.named_parameters()}
    assert_same_weights(before, recorder.history[bad - 1], **EXACT)
    batch = load_file(folder / "batch-0-0.safetensors")
    assert batch["example_id"].tolist() == order[(bad - 1) * 8 : bad * 8]
    torch.set_rng_state(batch.pop("random_state_cpu"))
    assert not trainer.loss(model, batch).loss_sum.isfinite()
    torch.set_rng_state(load_file(folder / "batch-0-0.safetensors")["random_state_cpu"])
    repeated = trainer.loss.loss(model, batch).loss_sum / 8
    assert repeated.item() == pytest.approx(losses(reference)[bad], rel=1e-6)


@pytest.mark.parametrize(
    ("spoilt", "reason"),
    [
        (lambda folder: (folder / "optimizer.pt").unlink(), "it holds no optimizer.pt"),
        (lambda folder: (folder / "scheduler.pt").unlink(), "it holds no scheduler.pt"),
        (
            lambda folder: (folder / "trainer_state.json").write_text("{}"),
            "trainer_state.json is damaged ('global_step')",
        ),
        (lambda folder: folder.rename(folder.with_name("checkpoint-9")), "its trainer_state.json is that of step 2"),
    ],
)
def test_a_training_goes_on_from_whole_states_alone(spoilt, reason, tmp_path, caplog):
    FamilyCase("ilm", "trainer.max_steps=2", "trainer.save_steps=1").trainer(tmp_path).train()
    assert last_sound_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    spoilt(tmp_path / "checkpoint-2")
    assert last_sound_checkpoint(tmp_path) == tmp_path / "checkpoint-1"
    assert reason in caplog.text


# What nobody has saved, by field; None leaves it out.
STATES = [
    *(("global_step", value) for value in ("4", 1.5, -4, True, [], math.nan, None)),
    *(("num_input_tokens_seen", value) for value in ("a", -5, math.nan, 1.5, None)),
    *(("log_history", value) for value in (5, [5], {"a": 1}, "x", None)),
    *(("stateful_callbacks", value) for value in (5, [], {"Budget": 5}, {"Budget": {}}, {"Budget": [5]}, None)),
    *(("stateful_callbacks", {"Budget": {"attributes": {"spent_seconds": it}}}) for it in ("x", -1, math.nan)),
    ("stateful_callbacks", {"EarlyStopping": {"attributes": {"early_stopping_patience_counter": -1}}}),
    *((name, value) for name in ("logging_steps", "save_steps", "eval_steps") for value in ("x", 0, -1)),
    *(("train_batch_size", value) for value in ("x", 0, -4)),
    *(("total_flos", value) for value in ("x", -1, math.inf)),
    *(("epoch", value) for value in ("x", -1, math.nan)),
    *(("best_metric", value) for value in ("x", math.nan, [])),
    *(("best_global_step", value) for value in ("x", -3, 0.5)),
    ("unknown_field", 5),
]


@pytest.fixture(scope="module")
def run_of_two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    FamilyCase("ilm", "trainer.max_steps=2", "trainer.save_steps=1").trainer(folder).train()
    return folder


def with_state(folder, name, value):
    """The checkpoint of step 2, with another value in its state."""
    file = folder / "checkpoint-2" / "trainer_state.json"
    state = {**json.loads(file.read_text()), name: value}
    file.write_text(json.dumps({n: v for n, v in state.items() if v is not None or n != name}))
    return file.parent


@pytest.mark.parametrize(("name", "value"), STATES)
def test_states_that_nobody_has_saved(name, value, run_of_two, tmp_path, caplog):
    shutil.copytree(run_of_two, tmp_path / "run")
    newest = with_state(tmp_path / "run", name, value)
    assert last_sound_checkpoint(tmp_path / "run") == tmp_path / "run" / "checkpoint-1"
    assert f"{newest} is skipped: {newest}/trainer_state.json is damaged (" in caplog.text
    assert name in caplog.text or name in ("stateful_callbacks",)
    with pytest.raises(ValueError, match=r"trainer_state\.json is damaged"):
        saved_state(newest)


@pytest.mark.parametrize(("name", "value"), [("best_metric", math.inf), ("best_metric", 0.5), ("epoch", 1.5)])
def test_states_that_somebody_may_have_saved(name, value, run_of_two, tmp_path):
    shutil.copytree(run_of_two, tmp_path / "run")
    assert last_sound_checkpoint(tmp_path / "run") == with_state(tmp_path / "run", name, value)
