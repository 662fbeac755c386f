"""What the trainer measures: evaluation sets in place of the loop of transformers, and what its callbacks expect."""

from collections.abc import Iterable
from dataclasses import replace
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from transformers.trainer_utils import EvalPrediction, PredictionOutput

from xlm_hf.data import as_dataset
from xlm_hf.evaluation import EvaluationSet, run_evaluation_set
from xlm_hf.hub.upload import PushesRepositories
from xlm_hf.modules.messages import did_you_mean
from xlm_hf.training.callbacks.progress import show_predictions, write_predictions
from xlm_hf.training.callbacks.trackers import TensorBoardTracker, WandbTracker


class _Metrics(dict[str, float]):
    """Metrics that transformers finds by its prefix too: `eval_validation/loss` is `validation/loss`."""

    def __missing__(self, name: str) -> float:
        return dict(self)[name.removeprefix("eval_")]


def _ids(records: list[dict[str, Any]], name: str) -> Any:
    """The token ids of all records, filled up with -100."""
    return pad_sequence([torch.tensor(record[f"{name}_ids"]) for record in records], True, -100).long().numpy()


class EvaluatesSets(PushesRepositories):
    """`Trainer` with named evaluation sets.

    Attributes:
        evaluation_sets: what `evaluate` measures, by stage.
        loss_set: the loss of training, for data of any name.
        predictions: by set, the records of what was decoded last.
        journals: a folder where decodes are written as they come; None keeps none (see `run_evaluation_set`).
    """

    model: Any
    processing_class: Any
    loss_set: EvaluationSet
    evaluation_sets: list[EvaluationSet]
    predictions: dict[str, list[dict[str, Any]]]
    journals: Path | None = None
    averaged_weights: Any

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "validation"
    ) -> dict[str, float]:
        """Run the evaluation sets of the stage `metric_key_prefix`.

        Args:
            eval_dataset: other examples to measure as those of the stage are; their results are reported under
                `metric_key_prefix`, which may then be any name, or under the keys of a dict of datasets.
            ignore_keys: unused, since no outputs of the model are gathered.
            metric_key_prefix: "validation", "test" or another stage.

        Returns:
            flat metrics, `<set>/<metric>`; the decoded examples are kept in `self.predictions[<set>]`.

        Raises:
            ValueError: if nothing runs in the stage, or two sets report under one name.
        """
        metrics, args, after = _Metrics(), self.args, self._after_evaluation_batch
        sets = [one for one in self.evaluation_sets if metric_key_prefix in one.stages]
        stages = {"validation", "test", *(stage for one in self.evaluation_sets for stage in one.stages)}
        if eval_dataset is not None:
            measured = {one.generate: one for one in reversed(sets or self.evaluation_sets or [self.loss_set])}
            sets = self._sets_over(eval_dataset, metric_key_prefix, measured.values())
        elif metric_key_prefix not in stages:
            remedy = did_you_mean(metric_key_prefix, sorted(stages))
            raise ValueError(f"metric_key_prefix names a stage, and there is none {metric_key_prefix!r}: {remedy}")
        options = {"num_workers": args.dataloader_num_workers, "folder": self.journals}
        for evaluation_set in sets:
            with self.averaged_weights():
                results, records = run_evaluation_set(
                    self.model, evaluation_set, self.processing_class, args.eval_batch_size, args.seed, after, **options
                )
            if records and self.compute_metrics is not None:
                results |= self.compute_metrics(EvalPrediction(_ids(records, "prediction"), _ids(records, "reference")))
            seconds = f"{evaluation_set.name}/seconds"
            results["seconds"] += metrics.get(seconds, 0.0)
            named = {f"{evaluation_set.name}/{name}": value for name, value in results.items()}
            if clash := (named.keys() & metrics.keys()) - {seconds, f"{evaluation_set.name}/samples"}:
                raise ValueError(f"Two evaluation sets report {min(clash)!r}: give one of them another name.")
            metrics.update(named)
            if records:
                self.predictions[evaluation_set.name] = records
                self._show_predictions(evaluation_set.name, records)
        self.log(dict(metrics))
        # Callbacks of transformers, the table of a notebook among them, know metrics by this prefix.
        shown = {f"eval_{name}": x for name, x in metrics.items() if not name.endswith(("/samples", "/seconds"))}
        self.control = self.callback_handler.on_evaluate(args, self.state, self.control, shown)
        return metrics

    def _sets_over(self, data: Any, name: str, measured: Iterable[EvaluationSet]) -> list[EvaluationSet]:
        """The sets `measured` over `data` instead, called `name`; or over each dataset of a dict, called as its key."""
        named = data if isinstance(data, dict) else {name: data}
        return [replace(one, name=str(key), dataset=as_dataset(x)) for key, x in named.items() for one in measured]

    def _after_evaluation_batch(self, loader: DataLoader) -> None:
        self.callback_handler.eval_dataloader = loader
        self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)

    def predict(self, test_dataset, ignore_keys=None, metric_key_prefix: str = "test") -> PredictionOutput:
        """Measure a dataset as `evaluate` does; the predictions are the decoded examples, None without a decode."""
        metrics = self.evaluate(test_dataset, ignore_keys, metric_key_prefix)
        predictions: Any = self.predictions.get(metric_key_prefix)
        return PredictionOutput(predictions, None, metrics)

    def hyperparameter_search(self, hp_space=None, compute_objective=None, *args: Any, **kwargs: Any) -> Any:
        """That of `Trainer`; the objective is `metric_for_best_model`, or by default the loss of `validation`."""
        objective = compute_objective or itemgetter(self.args.metric_for_best_model or "validation/loss")
        return super().hyperparameter_search(hp_space, objective, *args, **kwargs)

    def _show_predictions(self, name: str, records: list[dict[str, Any]]) -> None:
        if self.is_world_process_zero():
            write_predictions(Path(str(self.args.output_dir)), name, records)
            show_predictions(name, records[: self.args.shown_predictions])
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, (TensorBoardTracker, WandbTracker)):
                    callback.log_predictions(self.args, self.state, self.model, name, records)

    def _determine_best_metric(self, metrics: dict[str, float], trial) -> bool:
        name = self.args.metric_for_best_model
        if name is not None and name not in metrics:
            raise ValueError(f"metric_for_best_model: there is no metric {name!r}: {did_you_mean(name, list(metrics))}")
        return super()._determine_best_metric(metrics, trial)
