"""The trainer as a user of transformers calls it, without a config."""

import json
import logging
import re
import sys
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
import transformers
from transformers import EarlyStoppingCallback, TrainerCallback, TrainingArguments
from transformers.trainer_callback import ProgressCallback, TrainerControl, TrainerState

from tests.modeling.naive import make_examples
from tests.training.test_trainer import Tokenizer, V, make_trainer, weights
from xlm_hf.data import as_dataset
from xlm_hf.evaluation import EvaluationSet
from xlm_hf.modeling.ilm import ILMCollator, ILMConfig, ILMForInsertionLM, ILMLoss
from xlm_hf.training.callbacks.progress import ProgressBar
from xlm_hf.training.trainer import XLMTrainer

EVALUATED = {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "loss", "greater_is_better": False}


def examples(num, seed=0):
    """A list of dicts without an `example_id`."""
    return [
        {name: example[name] for name in ("prompt_ids", "target_ids")}
        for example in make_examples(num, V, min_target=1, seed=seed)
    ]


class TorchDataset(torch.utils.data.Dataset):
    def __len__(self):
        return 6

    def __getitem__(self, index):
        return {name: torch.tensor(ids) for name, ids in examples(6)[index].items()}


def model():
    torch.manual_seed(0)
    return ILMForInsertionLM(
        ILMConfig(
            vocab_size=V,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=32,
            suppress_tokens=list(range(7)),
        )
    )


def decoding(num=3, **options):
    collator = ILMCollator(Tokenizer(V), 32, kind="seq2seq", prediction=True)
    return EvaluationSet("test", as_dataset(examples(num, 1)), collator, ["test"], generate=True, **options)


def plain_trainer(folder, arguments=(), **options):
    args = TrainingArguments(
        str(folder),
        **{
            "max_steps": 4,
            "logging_steps": 1,
            "learning_rate": 1e-2,
            "per_device_train_batch_size": 2,
            "save_strategy": "no",
            "use_cpu": True,
            **dict(arguments),
        },
    )
    return XLMTrainer(
        **{
            "model": None if "model_init" in options else model(),
            "args": args,
            "loss": ILMLoss(),
            "data_collator": ILMCollator(Tokenizer(V), 32, kind="seq2seq"),
            "train_dataset": examples(8),
            "processing_class": Tokenizer(V),
            **options,
        }
    )


def test_examples_get_ids_and_keep_those_that_they_have():
    listed, torch_like = as_dataset(examples(6)), as_dataset(TorchDataset())
    assert listed["example_id"][:] == torch_like["example_id"][:] == list(range(6))
    assert listed["target_ids"][:] == torch_like["target_ids"][:] == [one["target_ids"] for one in examples(6)]
    own = datasets.Dataset.from_list([{"input_ids": [1], "example_id": 7}])
    assert as_dataset(own) is own
    stream = as_dataset(listed.remove_columns("example_id").to_iterable_dataset())
    assert [one["example_id"] for one in stream] == list(range(6))


def test_early_stopping_of_transformers_stops_and_the_run_is_on_file_and_printed(tmp_path, capsys, caplog):
    # As where nobody has set up the log.
    caplog.set_level(logging.WARNING, "xlm_hf")
    trainer = plain_trainer(
        tmp_path,
        {**EVALUATED, "learning_rate": 0.0},
        eval_dataset=examples(4, 1),
        callbacks=[EarlyStoppingCallback(early_stopping_patience=1)],
    )
    trainer.train()
    # The first evaluation is the best one, and the second no better.
    assert trainer.state.global_step == 2
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == trainer.state.log_history
    printed = capsys.readouterr().out
    assert "step 2/4  loss " in printed
    assert "validation/loss" in printed


def test_the_file_of_a_resumed_run_begins_with_its_past(tmp_path):
    saved = {"save_strategy": "steps", "save_steps": 2}
    plain_trainer(tmp_path, {**saved, "max_steps": 3}).train()
    trainer = plain_trainer(tmp_path, saved)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    logs = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert logs == trainer.state.log_history
    assert [log["step"] for log in logs if "loss" in log] == [1, 2, 3, 4]
    again = plain_trainer(tmp_path, saved)
    assert again.train(resume_from_checkpoint=True).global_step == 4
    assert {name: value.tolist() for name, value in weights(again).items()} == {
        name: value.tolist() for name, value in weights(trainer).items()
    }
    with pytest.raises(ValueError, match="No valid checkpoint found"):
        plain_trainer(tmp_path / "none").train(resume_from_checkpoint=True)


def test_a_loss_beside_decodes(tmp_path):
    trainer = plain_trainer(tmp_path, eval_dataset=examples(4, 1), evaluation_sets=[decoding()])
    assert "validation/loss" in trainer.evaluate()
    assert "test/nfe" in trainer.evaluate(metric_key_prefix="test")


def test_other_data_by_another_name(tmp_path):
    trainer = plain_trainer(tmp_path, eval_dataset={"easy": examples(4, 1), "hard": examples(3, 2)})
    results = trainer.evaluate()
    assert (results["easy/samples"], results["hard/samples"]) == (4, 3)
    other = trainer.evaluate(examples(3, 2), metric_key_prefix="other")
    assert {name.split("/")[0] for name in other} == {"other"}
    assert other["other/loss"] == results["hard/loss"]
    several = trainer.evaluate({"a": examples(4, 1), "b": examples(3, 2)})
    assert (several["a/loss"], several["b/loss"]) == (results["easy/loss"], results["hard/loss"])
    assert plain_trainer(tmp_path).evaluate(examples(3, 2))["validation/loss"] == results["hard/loss"]
    with pytest.raises(ValueError, match="metric_key_prefix names a stage, and there is none 'tset': did you mean"):
        trainer.evaluate(metric_key_prefix="tset")


def test_workers_and_the_callback_of_every_evaluation_batch(tmp_path):
    class Counter(TrainerCallback):
        steps = total = 0

        def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
            Counter.steps, Counter.total = Counter.steps + 1, len(eval_dataloader)

    results = []
    for num_workers in (0, 1):
        arguments = {"per_device_eval_batch_size": 2, "dataloader_num_workers": num_workers}
        trainer = plain_trainer(tmp_path, arguments, eval_dataset=examples(5, 1), callbacks=[Counter()])
        results.append(trainer.evaluate()["validation/loss"])
    assert results[0] == results[1]
    assert (Counter.steps, Counter.total) == (6, 3)


def test_predict_and_compute_metrics_score_what_is_decoded(tmp_path):
    seen = []

    def compute_metrics(prediction):
        seen.append(prediction)
        return {"longest": float((prediction.label_ids != -100).sum(1).max())}

    trainer = plain_trainer(tmp_path, evaluation_sets=[decoding()], compute_metrics=compute_metrics)
    output = trainer.predict(examples(4, 2), metric_key_prefix="unseen")
    targets = [one["target_ids"] for one in examples(4, 2)]
    assert [record["reference_ids"] for record in output.predictions] == targets
    assert output.metrics["unseen/longest"] == max(map(len, targets))
    padded = [[*ids, *[-100] * (max(map(len, targets)) - len(ids))] for ids in targets]
    assert np.array_equal(seen[0].label_ids, padded)
    written = [[token for token in row if token != -100] for row in seen[0].predictions.tolist()]
    assert written == [record["prediction_ids"] for record in output.predictions]


def test_the_loss_of_a_batch_outside_of_a_training(tmp_path):
    trainer = plain_trainer(tmp_path)
    batch = next(iter(trainer.get_train_dataloader()))
    loss, output = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    assert loss == trainer.compute_loss(trainer.model, batch) == output.loss_sum / output.num_items
    assert loss.requires_grad


def test_a_plateau_lowers_the_rate(tmp_path):
    plateau = {"lr_scheduler_type": "reduce_lr_on_plateau", "lr_scheduler_kwargs": {"patience": 0, "threshold": 1e9}}
    trainer = plain_trainer(tmp_path, {**EVALUATED, **plateau}, eval_dataset=examples(4, 1))
    trainer.train()
    rates = [log["learning_rate"] for log in trainer.state.log_history if "loss" in log]
    assert rates == pytest.approx([1e-2, 1e-3, 1e-4, 1e-5])


def test_an_optimiser_of_ones_own(tmp_path):
    own = model()
    optimizer = torch.optim.SGD(own.parameters(), lr=0.5)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    trainer = plain_trainer(tmp_path, model=own, optimizers=(optimizer, schedule))
    trainer.train()
    assert trainer.optimizer.optimizer is optimizer
    assert {log["learning_rate"] for log in trainer.state.log_history if "loss" in log} == {0.5}


def test_a_search_of_hyperparameters_minimises_the_loss(tmp_path, monkeypatch):
    class Backend:
        default_hp_space = None

        def ensure_available(self):
            pass

        def run(self, trainer, n_trials, direction):
            objectives = []
            for number in range(n_trials):
                trainer.train(trial=SimpleNamespace(number=number, params={}))
                objectives.append((trainer.objective, trainer.state.log_history[-2]["validation/loss"]))
            return objectives

    def references(state, trainer, max_steps, num_train_epochs, trial):
        state.max_steps, state.num_train_epochs = max_steps, num_train_epochs
        state.is_local_process_zero = state.is_world_process_zero = True

    def report(trainer, trial, step, metrics):
        trainer.objective = trainer.compute_objective(metrics.copy())

    monkeypatch.setattr(XLMTrainer, "_report_to_hp_search", report)
    backends = dict.fromkeys(transformers.trainer.ALL_HYPERPARAMETER_SEARCH_BACKENDS, Backend)
    monkeypatch.setattr(transformers.trainer, "ALL_HYPERPARAMETER_SEARCH_BACKENDS", backends)
    # Neither optuna nor another library of searches is needed to see what the trainer gives it.
    monkeypatch.setattr(TrainerState, "init_training_references", references)
    trainer = plain_trainer(
        tmp_path,
        {"eval_strategy": "steps", "eval_steps": 2, "max_steps": 2, "save_strategy": "steps", "save_steps": 2},
        model_init=model,
        eval_dataset=examples(4, 1),
    )
    found = trainer.hyperparameter_search(
        lambda trial: {"learning_rate": [1e-6, 1e-1][trial.number]}, n_trials=2, backend="optuna"
    )
    assert [objective for objective, _ in found] == [loss for _, loss in found]
    assert found[0] != found[1]
    assert sorted(str(file.parent.name) for file in tmp_path.glob("*/checkpoint-2")) == ["run-0", "run-1"]


def test_a_smaller_batch_that_fits_keeps_the_size_of_a_step(tmp_path):
    class Memory(ILMLoss):
        largest = 0

        def __call__(self, model, batch):
            if len(batch["input_ids"]) > 5:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            Memory.largest = max(Memory.largest, len(batch["input_ids"]))
            return super().__call__(model, batch)

    def trained(**arguments):
        trainer = make_trainer(tmp_path, arguments.pop("batch_size"), max_steps=3, **arguments)
        trainer.loss = Memory()
        trainer.model.config.attention_dropout = 0.0
        for module in trainer.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        trainer.train()
        return trainer

    found = trained(batch_size=8, global_batch_size=8, auto_find_batch_size=True)
    assert (Memory.largest, found.args.gradient_accumulation_steps) == (4, 2)
    expected = trained(batch_size=4, gradient_accumulation_steps=2)
    for name, tensor in weights(expected).items():
        torch.testing.assert_close(weights(found)[name], tensor, rtol=1e-5, atol=1e-6)


def test_what_would_have_no_effect_is_refused(tmp_path):
    with pytest.raises(ValueError, match="XLMTrainer takes loss= and data_collator="):
        plain_trainer(tmp_path, loss=None)
    with pytest.raises(ValueError, match="XLMTrainer takes loss= and data_collator="):
        plain_trainer(tmp_path, compute_loss_func=lambda outputs, labels: 0)


def test_a_bar_has_the_loss_and_the_file_has_all(tmp_path, monkeypatch, capsys, caplog):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    bar, state, control = ProgressBar(), TrainerState(max_steps=30), TrainerControl()
    args = SimpleNamespace(disable_tqdm=False)
    bar.on_train_begin(args, state, control)
    state.global_step = 3
    bar.on_step_end(args, state, control)
    package = logging.getLogger("xlm_hf")
    package.setLevel(logging.INFO)
    monkeypatch.setattr(package, "handlers", [handler := logging.FileHandler(tmp_path / "train.log")])
    bar.on_log(args, state, control, logs={"loss": 1.25, "grad_norm": 0.5})
    assert bar.bar.postfix == "loss 1.25"
    bar.on_log(args, state, control, logs={"validation/loss": 2.5})
    bar.on_train_end(args, state, control)
    handler.close()
    package.setLevel(logging.NOTSET)
    assert "step 3/30  loss 1.25  grad_norm 0.5\n" in (tmp_path / "train.log").read_text()
    assert "validation/loss 2.5" in (tmp_path / "train.log").read_text()
    assert "grad_norm" not in capsys.readouterr().err + caplog.text


def test_the_table_of_a_notebook_has_the_loss_of_the_validation(tmp_path, monkeypatch):
    # IPython is there in notebooks only.
    shown = []
    display = SimpleNamespace(display=lambda page, **_: shown.append(page) or SimpleNamespace(update=shown.append))
    display.HTML = str
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(display=display))
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    monkeypatch.delitem(sys.modules, "transformers.utils.notebook", raising=False)
    monkeypatch.setattr("xlm_hf.training.trainer.is_in_notebook", lambda: True)
    arguments = {**EVALUATED, "logging_steps": 1, "disable_tqdm": False}
    trainer = plain_trainer(tmp_path, arguments, eval_dataset=examples(4, 1))
    assert not [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, ProgressCallback)]
    trainer.train()
    heads = re.findall(r"<th.*?>(.*?)</th>", shown[-1])
    assert heads[:3] == ["Step", "Training Loss", "Validation Loss"]
    assert "Perplexity" in heads
    rows = [re.findall(r"<td>(.*?)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", shown[-1], re.DOTALL)]
    losses = [log["validation/loss"] for log in trainer.state.log_history if "validation/loss" in log]
    assert [row[2] for row in rows if row] == [f"{loss:.6f}" for loss in losses]
    assert "No log" not in shown[-1]
