import datasets
import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from tests.modeling.naive import SpecialIds, make_examples
from xlm_hf.evaluation import EvaluationSet
from xlm_hf.modeling.ilm import ILMCollator, ILMConfig, ILMForInsertionLM, ILMLoss
from xlm_hf.training.arguments import XLMTrainingArguments
from xlm_hf.training.checkpoints import last_sound_checkpoint, list_checkpoints
from xlm_hf.training.trainer import XLMTrainer

V, NUM_EXAMPLES = 20, 44


class Tokenizer(SpecialIds):
    def decode(self, ids):
        return " ".join(map(str, ids))

    def save_pretrained(self, folder):
        pass


class RecordingLoss(ILMLoss):
    """Remembers what every example looked like when it was trained on."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __call__(self, model, batch):
        if model.training:
            for row, example_id in enumerate(batch["example_id"].tolist()):
                ids = batch["input_ids"][row, batch["attention_mask"][row]]
                self.seen.append((example_id, tuple(ids.tolist())))
        return super().__call__(model, batch)


def dataset(num=NUM_EXAMPLES, seed=0):
    examples = make_examples(num, V, min_target=1, seed=seed)
    return datasets.Dataset.from_list(
        [{name: e[name] for name in ("prompt_ids", "target_ids", "example_id")} for e in examples]
    )


def make_trainer(output_dir, batch_size=8, callbacks=None, evaluation_sets=(), **arguments):
    torch.manual_seed(0)
    config = ILMConfig(
        vocab_size=V,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
        suppress_tokens=list(range(7)),
        hidden_dropout_prob=0.1,
        attention_dropout=0.1,
    )
    arguments = {
        "num_train_epochs": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        **arguments,
    }
    return XLMTrainer(
        model=ILMForInsertionLM(config),
        args=XLMTrainingArguments(str(output_dir), per_device_train_batch_size=batch_size, **arguments),
        loss=RecordingLoss(),
        data_collator=ILMCollator(Tokenizer(V), max_length=32, seed=7, kind="seq2seq"),
        train_dataset=dataset(),
        evaluation_sets=evaluation_sets,
        processing_class=Tokenizer(V),
        callbacks=callbacks,
    )


def weights(trainer):
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def assert_same_weights(first, second, **tolerance):
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], msg=lambda m, n=name: f"{n}: {m}", **tolerance)


EXACT = {"rtol": 0.0, "atol": 0.0}


class Interrupt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    trainer = make_trainer(tmp_path_factory.mktemp("run"))
    trainer.train()
    return trainer


def test_every_epoch_shows_each_example_once_with_fresh_noise(uninterrupted):
    seen = uninterrupted.loss.seen
    epochs = seen[:NUM_EXAMPLES], seen[NUM_EXAMPLES:]
    for epoch in epochs:
        assert sorted(example for example, _ in epoch) == list(range(1000, 1000 + NUM_EXAMPLES))
    assert [e for e, _ in epochs[0]] != [e for e, _ in epochs[1]]
    first, second = dict(epochs[0]), dict(epochs[1])
    assert sum(first[example] != second[example] for example in first) > NUM_EXAMPLES / 2


def test_workers_change_nothing(uninterrupted, tmp_path):
    trainer = make_trainer(tmp_path, dataloader_num_workers=2, dataloader_persistent_workers=True)
    trainer.train()
    assert trainer.loss.seen == uninterrupted.loss.seen
    assert_same_weights(weights(trainer), weights(uninterrupted), **EXACT)


# 6 steps an epoch: within the first epoch, at its end, and within the second.
@pytest.mark.parametrize("step", [2, 6, 9])
def test_an_interrupted_run_ends_where_the_other_does(uninterrupted, tmp_path, step):
    saving = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2}
    interrupted = make_trainer(tmp_path, callbacks=[Interrupt(step + 1)], **saving)
    with pytest.raises(KeyboardInterrupt):
        interrupted.train()
    assert last_sound_checkpoint(tmp_path).name == f"checkpoint-{step}"
    resumed = make_trainer(tmp_path, **saving)
    resumed.train(resume_from_checkpoint=str(last_sound_checkpoint(tmp_path)))
    assert_same_weights(weights(resumed), weights(uninterrupted), **EXACT)
    examples_before = {0: 0, 2: 16, 6: NUM_EXAMPLES, 9: NUM_EXAMPLES + 24}[step]
    assert resumed.loss.seen == uninterrupted.loss.seen[examples_before:]

    def losses(trainer):
        return {log["step"]: log["loss"] for log in trainer.state.log_history if "loss" in log}

    assert losses(resumed) == losses(uninterrupted)


def test_a_finished_run_is_not_trained_on(uninterrupted, tmp_path):
    finished = make_trainer(tmp_path, save_strategy="steps", save_steps=6)
    finished.train()
    again = make_trainer(tmp_path, save_strategy="steps", save_steps=6)
    assert again.train(resume_from_checkpoint=str(last_sound_checkpoint(tmp_path))).global_step == 12
    assert again.loss.seen == []
    assert_same_weights(weights(again), weights(uninterrupted), **EXACT)
    longer = make_trainer(tmp_path, save_strategy="no", num_train_epochs=3)
    longer.train(resume_from_checkpoint=str(last_sound_checkpoint(tmp_path)))
    assert longer.state.global_step == 18


def test_accumulation_changes_nothing_but_rounding(tmp_path):
    runs = {}
    for batch_size, accumulation in ((8, 1), (4, 2), (2, 4)):
        trainer = make_trainer(tmp_path / str(batch_size), batch_size, gradient_accumulation_steps=accumulation)
        for module in trainer.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        trainer.model.config.attention_dropout = 0.0
        trainer.train()
        runs[batch_size] = trainer
    for batch_size in (4, 2):
        assert runs[batch_size].loss.seen == runs[8].loss.seen
        assert_same_weights(weights(runs[batch_size]), weights(runs[8]), rtol=1e-4, atol=2e-5)
        for log, expected in zip(runs[batch_size].state.log_history, runs[8].state.log_history, strict=True):
            for name in ("loss", "token_loss", "stop_loss", "stop_accuracy", "grad_norm"):
                if name in expected:
                    assert log[name] == pytest.approx(expected[name], rel=2e-3), (name, log, expected)


def test_logged_loss_is_that_of_the_whole_step(tmp_path):
    """The components add up, and each is a mean over the examples of the step however they were batched."""
    trainer = make_trainer(tmp_path, 4, gradient_accumulation_steps=2, learning_rate=0.0)
    trainer.model.eval()
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logs) == 12
    for log in logs:
        assert log["loss"] > 0
        assert 0 <= log["stop_accuracy"] <= 1


@pytest.mark.parametrize("greater_is_better", [True, False])
def test_best_and_last_checkpoints_stay(greater_is_better, tmp_path):
    sets = [
        EvaluationSet(
            "validation", dataset(8, 1), ILMCollator(Tokenizer(V), 32, kind="seq2seq"), ["validation"], ILMLoss()
        )
    ]
    trainer = make_trainer(
        tmp_path,
        evaluation_sets=sets,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        save_total_limit=2,
        metric_for_best_model="validation/loss",
        greater_is_better=greater_is_better,
    )
    trainer.train()
    values = {log["step"]: log["validation/loss"] for log in trainer.state.log_history if "validation/loss" in log}
    best = (max if greater_is_better else min)(values, key=values.get)
    assert trainer.state.best_metric == values[best]
    # The loss falls from the first evaluation to the last.
    assert best == (2 if greater_is_better else 12)
    kept = [2, 12] if greater_is_better else [10, 12]
    assert [folder.name for folder in list_checkpoints(tmp_path)] == [f"checkpoint-{step}" for step in kept]
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")
    assert not list(tmp_path.glob("*.incomplete"))
    assert not list(tmp_path.glob("checkpoint-*/training_args.bin"))


def test_a_damaged_checkpoint_is_named_and_skipped(tmp_path, caplog):
    trainer = make_trainer(tmp_path, save_strategy="steps", save_steps=4)
    trainer.train()
    assert [folder.name for folder in list_checkpoints(tmp_path)] == [f"checkpoint-{n}" for n in (4, 8, 12)]
    for name in ("model.safetensors", "optimizer.pt"):
        file = list_checkpoints(tmp_path)[-1] / name
        file.write_bytes(file.read_bytes()[:-100])
        with caplog.at_level("WARNING", logger="xlm_hf"):
            found = last_sound_checkpoint(tmp_path)
        assert f"{file.parent} is skipped: {name} is truncated or damaged" in caplog.text
        assert found.name == ("checkpoint-8" if name == "model.safetensors" else "checkpoint-4")
        if name == "model.safetensors":
            file.parent.rename(tmp_path / "gone")


def test_a_failed_save_leaves_the_earlier_checkpoint(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, save_strategy="steps", save_steps=4)
    save = torch.save

    def full_disk(state, file, *args, **kwargs):
        if trainer.state.global_step > 4 and "optimizer" in str(file):
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")
        return save(state, file, *args, **kwargs)

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match=r"checkpoint-8 could not be written .* free disk space"):
        trainer.train()
    assert [folder.name for folder in tmp_path.glob("*") if folder.name.startswith("checkpoint")] == ["checkpoint-4"]
    assert last_sound_checkpoint(tmp_path).name == "checkpoint-4"


def evaluation_sets(num, batch_loss=None):
    tokenizer = Tokenizer(V)
    exact = type("Exact", (), {})()
    exact.features = {"predictions": None, "references": None}
    exact.compute = lambda predictions, references: {
        "exact": sum(p == r for p, r in zip(predictions, references, strict=True)) / len(references)
    }
    return [
        EvaluationSet("test", dataset(num, 5), ILMCollator(tokenizer, 32, kind="seq2seq"), ["test"], loss=ILMLoss()),
        EvaluationSet(
            "test",
            dataset(num, 5),
            ILMCollator(tokenizer, 32, kind="seq2seq", prediction=True),
            ["test"],
            generate=True,
            metrics=[exact],
        ),
    ]


def test_evaluation_scores_every_example_whatever_the_batch_size(tmp_path):
    results, predictions = [], []
    for batch_size in (1, 4, 32):
        trainer = make_trainer(tmp_path, evaluation_sets=evaluation_sets(11), per_device_eval_batch_size=batch_size)
        results.append(trainer.evaluate(metric_key_prefix="test"))
        predictions.append(trainer.predictions["test"])
        assert results[-1]["test/samples"] == 11
        assert sorted(r["example_id"] for r in predictions[-1]) == list(range(1000, 1011))
    for result, prediction in zip(results[1:], predictions[1:], strict=True):
        assert prediction == predictions[0]
        for name in ("test/loss", "test/token_loss", "test/stop_loss", "test/exact", "test/nfe"):
            assert result[name] == pytest.approx(results[0][name], rel=1e-5)


def test_evaluation_leaves_the_training_alone(uninterrupted, tmp_path):
    trainer = make_trainer(tmp_path, eval_strategy="steps", eval_steps=3, evaluation_sets=evaluation_sets(5))
    for evaluation_set in trainer.evaluation_sets:
        evaluation_set.stages = ["validation"]
    trainer.train()
    assert_same_weights(weights(trainer), weights(uninterrupted), **EXACT)


def test_mistakes_are_refused_before_any_work(tmp_path):
    twice = [evaluation_sets(3)[0]] * 2
    with pytest.raises(ValueError, match="Two evaluation sets named 'test' report a loss"):
        make_trainer(tmp_path, evaluation_sets=twice)
    with pytest.raises(ValueError, match="Evaluation set 'test' is empty"):
        make_trainer(
            tmp_path, evaluation_sets=[EvaluationSet("test", dataset(1).select([]), None, ["test"], loss=ILMLoss())]
        )
    with pytest.raises(ValueError, match="must have either a loss or generate"):
        make_trainer(tmp_path, evaluation_sets=[EvaluationSet("test", dataset(1), None, ["test"])])


def test_saved_weights_are_those_in_memory(uninterrupted, tmp_path):
    uninterrupted.save_model(str(tmp_path))
    assert_same_weights(load_file(tmp_path / "model.safetensors"), weights(uninterrupted), **EXACT)


def test_two_results_of_one_name_are_refused(tmp_path):
    sets = evaluation_sets(3)
    sets[1].metrics[0].compute = lambda predictions, references: {"stop_loss": 1.0}
    trainer = make_trainer(tmp_path, evaluation_sets=sets)
    with pytest.raises(ValueError, match="Two evaluation sets report 'test/stop_loss'"):
        trainer.evaluate(metric_key_prefix="test")
