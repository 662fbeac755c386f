"""Runs that end by a budget or by early stopping, and their resumes."""

from types import SimpleNamespace

import pytest

from xlm_hf.building import build_model, build_task, build_trainer, compose
from xlm_hf.training import evaluates_sets
from xlm_hf.training.callbacks import budget
from xlm_hf.training.callbacks.budget import Budget
from xlm_hf.training.callbacks.early_stopping import EarlyStopping
from xlm_hf.training.checkpoints import last_sound_checkpoint
from xlm_hf.training.trainer import XLMTrainer

TINY = [
    "size=tiny",
    "task.num_train=64",
    "task.num_validation=4",
    "task.num_test=4",
    "trainer.logging_steps=1",
    "trainer.eval_steps=1",
    "trainer.save_steps=1",
    "trainer.save_total_limit=null",
]


def trained(folder, *overrides):
    """The trainer of a run in `folder`, from its newest checkpoint if it has one."""
    cfg = compose("ilm_star", [*TINY, *overrides])
    task = build_task(cfg.task)
    trainer = build_trainer(cfg, task, build_model(cfg.model, task.tokenizer, cfg.generation), folder)
    checkpoint = last_sound_checkpoint(folder)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    return trainer


def logged(trainer, name):
    return {log["step"]: log[name] for log in trainer.state.log_history if name in log and "loss" in log}


def test_a_budget_of_tokens_ends_the_run_and_drives_the_schedule(tmp_path):
    trainer = trained(tmp_path, "budget.tokens=1500", "trainer.lr_scheduler_type=linear", "trainer.max_steps=2")
    tokens, rates = logged(trainer, "num_input_tokens_seen"), logged(trainer, "learning_rate")
    last = trainer.state.global_step
    assert tokens[last - 1] < 1500 <= tokens[last]
    assert last > 2, "the budget replaces the number of steps"
    # The scheduler steps before a step's tokens are counted.
    for step in range(3, last + 1):
        assert rates[step] == pytest.approx(1e-3 * (1 - tokens[step - 2] / 1500))
    assert (tmp_path / f"checkpoint-{last}").exists()
    assert trained(tmp_path, "budget.tokens=1500", "trainer.save_steps=100").state.global_step == last


def test_a_budget_of_seconds_counts_training_alone_and_over_resumes(tmp_path, monkeypatch):
    # By this clock a step takes 1 second, an evaluation 100 for each set, and a checkpoint 1000.
    clock = SimpleNamespace(now=0.0, perf_counter=lambda: clock.now)
    monkeypatch.setattr(budget, "time", clock)
    monkeypatch.setattr(XLMTrainer, "compute_loss", takes(1, clock, XLMTrainer.compute_loss))
    monkeypatch.setattr(XLMTrainer, "_write_checkpoint", takes(1000, clock, XLMTrainer._write_checkpoint))
    monkeypatch.setattr(evaluates_sets, "run_evaluation_set", takes(100, clock, evaluates_sets.run_evaluation_set))
    first = trained(tmp_path, "budget.seconds=3", "trainer.eval_steps=1", "trainer.save_steps=2")
    assert first.state.global_step == 3
    assert budget.saved_seconds(first.state) == 3
    assert trained(tmp_path, "budget.seconds=5", "trainer.eval_steps=9").state.global_step == 5
    again = trained(tmp_path, "budget.seconds=5")
    assert again.state.global_step == 5
    assert budget.saved_seconds(again.state) == 5


def takes(seconds, clock, function):
    def timed(*args, **kwargs):
        clock.now += seconds
        return function(*args, **kwargs)

    return timed


def test_a_run_without_a_budget_counts_its_seconds_too(tmp_path):
    trainer = trained(tmp_path, "trainer.max_steps=2", "trainer.save_strategy=no")
    assert 0 < budget.saved_seconds(trainer.state) < 60
    assert trainer.state.global_step == 2


def test_early_stopping_finds_the_metric_of_a_set_and_counts_over_a_resume(tmp_path):
    # No evaluation improves by this much on the first, whose value is the first best one.
    stubborn = ["early_stopping.patience=3", "early_stopping.threshold=1e6"]
    assert trained(tmp_path, *stubborn, "trainer.max_steps=3").state.global_step == 3
    assert trained(tmp_path, *stubborn).state.global_step == 4
    assert (tmp_path / "checkpoint-4").exists()
    assert trained(tmp_path, *stubborn).state.global_step == 4, "a run that ended is not trained on"
    assert trained(tmp_path, "early_stopping.patience=5", *stubborn[1:]).state.global_step == 6


def test_early_stopping_lets_a_run_that_improves_go_on(tmp_path):
    # At this rate the loss falls at each of the first steps.
    trainer = trained(tmp_path, "early_stopping.patience=1", "trainer.max_steps=5", "trainer.learning_rate=3e-3")
    losses = [log["validation/loss"] for log in trainer.state.log_history if "validation/loss" in log]
    assert losses == sorted(losses, reverse=True)
    assert trainer.state.global_step == 5


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["budget.tokens=0"], "budget: tokens must be greater than 0 and is 0."),
        (["budget.seconds=-1"], "budget: seconds must be greater than 0 and is -1."),
        (["early_stopping.patience=0"], "early_stopping.patience must be at least 1 and is 0."),
        (["early_stopping.patience=1", "trainer.eval_strategy=no"], "early_stopping needs trainer.eval_strategy=steps"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(overrides, sentence, tmp_path):
    with pytest.raises(ValueError, match=sentence):
        trained(tmp_path, *overrides)


def test_the_states_of_the_callbacks_can_be_rebuilt_by_transformers():
    for callback in (Budget(tokens=3), EarlyStopping(2, 0.5)):
        assert type(callback).from_state(callback.state()).state() == callback.state()
