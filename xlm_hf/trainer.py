"""The trainer of every family: transformers' Trainer with a loss object, global normalisation, whole checkpoints."""

import contextlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState, PrinterCallback, ProgressCallback, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput, rotate_checkpoints

from xlm_hf.arguments import XLMTrainingArguments
from xlm_hf.callbacks import ProgressBar
from xlm_hf.checkpoints import INCOMPLETE_SUFFIX, replaced_folder
from xlm_hf.data import EpochSampler, KeyedExamples
from xlm_hf.ema import EMA_FILE, ExponentialMovingAverage
from xlm_hf.evaluation import EvaluationSet, check_evaluation_sets, reduce_sums, run_evaluation_set
from xlm_hf.optimizers import MuonWithAdamW, layer_matrices


class _AsyncCounts:
    """Small integers on their way from the device to the host, read without waiting for what was queued after them."""

    def start(self, counts: torch.Tensor) -> None:
        self.counts = counts.to("cpu", non_blocking=True)
        self.arrival = None if counts.device.type == "cpu" else torch.Event(counts.device)
        if self.arrival is not None:
            self.arrival.record()

    def read(self) -> list[int]:
        if self.arrival is not None:
            self.arrival.synchronize()
        return self.counts.tolist()


class _StepEnd(TrainerCallback):
    """Runs before all other callbacks, so that they see the counts of the step that ends."""

    def __init__(self, trainer: "XLMTrainer"):
        self.trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer.finish_step()


class XLMTrainer(Trainer):
    """Trains a model by a family's loss object and evaluates it on named evaluation sets.

    The gradient of an optimiser step is that of loss_sum / num_items over all its micro-batches and all ranks: the
    items are counted before the first backward pass, so 8 x 1, 1 x 8 and 2 ranks x 4 give the same gradient.

    Args:
        model: the model.
        args: training arguments.
        loss: the family's loss object, `loss(model, batch) -> LossOutput` and `loss.num_items(batch)`.
        data_collator: makes training batches.
        train_dataset: training examples, with an `example_id`.
        evaluation_sets: what `evaluate` measures, by stage.
        processing_class: the tokenizer, saved with every checkpoint.
        callbacks: further callbacks.
    """

    args: Any
    model: Any
    processing_class: Any
    train_dataset: Any

    def __init__(
        self,
        model: PreTrainedModel,
        args: XLMTrainingArguments,
        loss: Any,
        data_collator: Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]] | None = None,
        train_dataset: datasets.Dataset | None = None,
        evaluation_sets: Sequence[EvaluationSet] = (),
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ):
        if train_dataset is not None and len(train_dataset) == 0:
            raise ValueError("The training set is empty: choose another split or more examples.")
        check_evaluation_sets(evaluation_sets)
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=None if train_dataset is None else KeyedExamples(train_dataset),
            eval_dataset=evaluation_sets[0].dataset if evaluation_sets else None,
            processing_class=processing_class,
            callbacks=callbacks,
        )
        for callback in (ProgressCallback, PrinterCallback):
            self.remove_callback(callback)
        self.add_callback(ProgressBar())
        self.callback_handler.callbacks.insert(0, _StepEnd(self))
        self.loss = loss
        self.evaluation_sets = evaluation_sets
        self.predictions: dict[str, list[dict[str, Any]]] = {}
        # compute_loss divides by the items of the whole optimiser step, so nothing is left to scale.
        self.loss_is_scaled_for_ga = True
        self._metric_sums: dict[str, tuple[torch.Tensor, torch.Tensor | int]] = {}
        self.ema: ExponentialMovingAverage | None = None
        self._step_counts = _AsyncCounts()

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train, from a checkpoint if one is given; one that is at its end is not trained on."""
        if isinstance(resume_from_checkpoint, (str, Path)):
            state = TrainerState.load_from_json(str(Path(resume_from_checkpoint) / "trainer_state.json"))
            *_, max_steps = self.set_initial_training_values(self.args, self.get_train_dataloader())
            ends = [callback for callback in self.callback_handler.callbacks if hasattr(callback, "is_finished")]
            if state.global_step >= max_steps or any(callback.is_finished(state) for callback in ends):
                # The parent would train one step more.
                best = state.best_model_checkpoint if self.args.load_best_model_at_end else None
                self._load_from_checkpoint(str(best or resume_from_checkpoint))
                self._start_average(Path(best or resume_from_checkpoint))
                self.state = state
                return TrainOutput(state.global_step, 0.0, {})
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def get_train_dataloader(self) -> DataLoader:
        """Batches of the training set in an order, and with a corruption, that (seed, epoch) alone determine."""
        args = self.args
        seed = args.seed if args.data_seed is None else args.data_seed
        loader = DataLoader(
            self.train_dataset,
            batch_size=self._train_batch_size,
            sampler=EpochSampler(len(self.train_dataset), seed),
            collate_fn=self.data_collator,
            drop_last=args.dataloader_drop_last,
            num_workers=args.dataloader_num_workers,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            pin_memory=args.dataloader_pin_memory,
            # Loaders draw seeds for their workers; from the global generator that would shift every later dropout mask.
            generator=torch.Generator(),
        )
        return self.accelerator.prepare(loader)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimiser that the arguments name: Muon with AdamW, or one of transformers' own."""
        args = self.args
        if args.muon_learning_rate is None or self.optimizer is not None:
            return super().create_optimizer(model)
        model = model or self.model
        matrices = layer_matrices(model)
        taken, decayed = {id(matrix) for matrix in matrices}, set(self.get_decay_parameter_names(model))
        groups: dict[float, list[nn.Parameter]] = {args.weight_decay: [], 0.0: []}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and id(parameter) not in taken:
                groups[args.weight_decay if name in decayed else 0.0].append(parameter)
        self.optimizer = MuonWithAdamW(
            matrices,
            [{"params": parameters, "weight_decay": decay} for decay, parameters in groups.items() if parameters],
            muon_options={"lr": args.muon_learning_rate, "weight_decay": args.weight_decay},
            adamw_options={
                "lr": args.learning_rate,
                "betas": (args.adam_beta1, args.adam_beta2),
                "eps": args.adam_epsilon,
                "fused": True,
            },
        )
        return self.optimizer

    def _prepare_for_training(self, max_steps: int, train_dataloader, resume_from_checkpoint: str | None):
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        self._start_average(None if resume_from_checkpoint is None else Path(resume_from_checkpoint))
        return prepared

    def _start_average(self, checkpoint: Path | None) -> None:
        if self.args.ema_decay is not None:
            self.ema = ExponentialMovingAverage(self.model, self.args.ema_decay)
            if checkpoint is not None and (checkpoint / EMA_FILE).exists():
                self.ema.load(checkpoint)

    def averaged_weights(self) -> AbstractContextManager[None]:
        """Within it the model has the averaged weights, if there are any and `use_ema` asks for them."""
        if self.ema is None or not self.args.use_ema:
            return contextlib.nullcontext()
        return self.ema.applied()

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor:
        """Items of the coming optimiser step over all ranks, by the one collective call of a step."""
        counts = [
            sum(self.loss.num_items(batch) for batch in batch_samples),
            sum(batch["attention_mask"].sum() for batch in batch_samples),
        ]
        total = self.accelerator.reduce(torch.stack([torch.as_tensor(count, device=device) for count in counts]), "sum")
        self._step_counts.start(total)
        return total[0].clamp(min=1)

    def finish_step(self) -> None:
        """Bring the counts and the averaged weights up to the step that ends."""
        _, num_tokens = self._step_counts.read()
        self.state.num_input_tokens_seen += num_tokens
        if self.ema is not None:
            self.ema.update(self.state.global_step)

    def compute_loss(self, model: nn.Module, inputs, return_outputs: bool = False, num_items_in_batch=None):
        """This micro-batch's share of the loss of the whole optimiser step, loss_sum / num_items_in_batch.

        It is multiplied by the number of ranks because their gradients are averaged, not summed. `return_outputs` must
        be False: the loss object keeps the outputs to itself.
        """
        output = self.loss(model, inputs)
        for name, (total, count) in output.metrics.items():
            old = self._metric_sums.get(name, (0.0, 0))
            self._metric_sums[name] = (old[0] + total, old[1] + count)
        return output.loss_sum / num_items_in_batch * self.accelerator.num_processes

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, adding the components of the training loss since the last log, reduced over all ranks."""
        if "loss" in logs:
            logs["num_input_tokens_seen"] = self.state.num_input_tokens_seen
            logs.update(reduce_sums(self._metric_sums, self.args.device))
            self._metric_sums = {}
        super().log(logs, start_time)

    def evaluate(
        self, eval_dataset=None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "validation"
    ) -> dict[str, float]:
        """Run the evaluation sets of the stage `metric_key_prefix`; the other arguments of `Trainer` are unused.

        Returns:
            flat metrics, `<set>/<metric>`; the decoded examples are kept in `self.predictions[<set>]`.
        """
        metrics: dict[str, float] = {}
        for evaluation_set in self.evaluation_sets:
            if metric_key_prefix not in evaluation_set.stages:
                continue
            with self.averaged_weights():
                results, records = run_evaluation_set(
                    self.model, evaluation_set, self.processing_class, self.args.eval_batch_size, self.args.seed
                )
            seconds = f"{evaluation_set.name}/seconds"
            results["seconds"] += metrics.get(seconds, 0.0)
            named = {f"{evaluation_set.name}/{name}": value for name, value in results.items()}
            if clash := (named.keys() & metrics.keys()) - {seconds, f"{evaluation_set.name}/samples"}:
                raise ValueError(f"Two evaluation sets report {min(clash)!r}: give one of them another name.")
            metrics.update(named)
            if records:
                self.predictions[evaluation_set.name] = records
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _determine_best_metric(self, metrics: dict[str, float], trial) -> bool:
        # The parent looks its metric up under the prefix eval_; ours carry the name of their set.
        return super()._determine_best_metric({f"eval_{name}": value for name, value in metrics.items()}, trial)

    def _save_checkpoint(self, model: nn.Module, trial) -> None:
        """Write a checkpoint beside its place and rename it; only then may an older one go."""
        self.store_flos()
        output_dir = Path(str(self.args.output_dir))
        folder = output_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        best = output_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
        if best == folder or best.exists():
            self.state.best_model_checkpoint = str(best)
        if self.args.should_save:
            with replaced_folder(folder) as staging:
                self.accelerator.wait_for_everyone()
                self._write_checkpoint(str(staging))
                self.accelerator.wait_for_everyone()
            rotate_checkpoints(
                output_dir=str(output_dir),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=False,
            )
        else:
            self.accelerator.wait_for_everyone()
            self._write_checkpoint(str(folder) + INCOMPLETE_SUFFIX)
            self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(folder))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model as it is evaluated: with the averaged weights, if `use_ema` asks for them."""
        with self.averaged_weights():
            super().save_model(output_dir, _internal_call)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._start_average(Path(str(self.state.best_model_checkpoint)))

    def _write_checkpoint(self, folder: str) -> None:
        # What is trained on, not what is evaluated.
        super().save_model(folder, _internal_call=True)
        if self.ema is not None:
            self.ema.save(Path(folder), self.args.should_save)
        if not self.args.save_only_model:
            self._save_optimizer_and_scheduler(folder)
            self._save_scaler(folder)
            self._save_rng_state(folder)
        if self.args.should_save:
            for stateful in [*self.callback_handler.callbacks, self.control]:
                if isinstance(stateful, ExportableState):
                    self.state.stateful_callbacks[type(stateful).__name__] = stateful.state()  # type: ignore[index, call-overload]
            self.state.save_to_json(str(Path(folder) / "trainer_state.json"))

    def _save(self, output_dir: str | None = None, state_dict=None) -> None:
        super()._save(output_dir, state_dict)
        # A pickle of the arguments, which nothing reads: config.yaml of the run says the same in the open.
        (Path(str(output_dir or self.args.output_dir)) / "training_args.bin").unlink(missing_ok=True)
