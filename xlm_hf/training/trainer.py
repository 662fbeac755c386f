"""The trainer of every family: transformers' Trainer with a loss object, global normalisation, whole checkpoints."""

import time
from collections.abc import Callable, Sequence, Sized
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, TrainingArguments
from transformers.integrations import TensorBoardCallback, WandbCallback
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK
from transformers.trainer_callback import ExportableState, PrinterCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy, TrainOutput
from transformers.utils import is_in_notebook

from xlm_hf.data import as_dataset, keyed
from xlm_hf.data.static_shapes import StaticShapes, collate_without_full_mask
from xlm_hf.evaluation import EvaluationSet, check_evaluation_sets, check_tokenizer, reduce_sums
from xlm_hf.files import INCOMPLETE_SUFFIX, replaced_folder
from xlm_hf.modules.devices import is_synchronous
from xlm_hf.training.arguments import XLMTrainingArguments
from xlm_hf.training.averages import EMA_FILE, ExponentialMovingAverage
from xlm_hf.training.callbacks.progress import MetricsFile, ProgressBar, notebook_table
from xlm_hf.training.callbacks.trackers import TensorBoardTracker, WandbTracker
from xlm_hf.training.checkpoints import check_weights, delete_old_checkpoints, last_sound_checkpoint, saved_state
from xlm_hf.training.evaluates_sets import EvaluatesSets
from xlm_hf.training.finite_guard import FiniteGuard, NotFiniteError, Step, restore_random_states
from xlm_hf.training.optimizers import MuonWithAdamW, layer_matrices
from xlm_hf.training.signals import StopSignals, TrainingStopped

# Arguments of the parent for models that are given labels.
_OF_LABELS = {"compute_loss_func", "preprocess_logits_for_metrics"}
# What a new value of means something to an optimiser whose state is loaded.
_OF_THE_CALL = ("initial_lr", "weight_decay", "betas", "eps", "momentum")


def _peak_memory(device: torch.device) -> int:
    """The most bytes that the device, or on a CPU the process, has held so far."""
    if device.type == "cpu":
        # Here, because Windows has no such module.
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return torch.accelerator.max_memory_allocated(device)


class _AsyncCounts:
    """Small integers on their way from the device to the host, read without waiting for what was queued after them."""

    def start(self, counts: torch.Tensor) -> None:
        self.counts = counts.to("cpu", non_blocking=True)
        self.arrival = None if counts.device.type == "cpu" else torch.accelerator.current_stream().record_event()

    def read(self) -> list[int]:
        if self.arrival is not None:
            self.arrival.synchronize()
        return self.counts.tolist()


class _StepHooks(TrainerCallback):
    """Runs before all other callbacks, so that they see the counts of the step that ends."""

    def __init__(self, trainer: "XLMTrainer"):
        self.trainer = trainer

    def on_step_begin(self, args, state, control, **kwargs):
        self.trainer.guard.start_step(state.global_step + 1)

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer.finish_step()


class XLMTrainer(EvaluatesSets):
    """Trains a model by a family's loss object and evaluates it on named evaluation sets.

    The gradient of an optimiser step is that of loss_sum / num_items over all its micro-batches and all ranks. The
    items are counted before the first backward pass. So 8 x 1, 1 x 8 and 2 ranks x 4 give the same gradient.

    Args:
        model: the model; or give `model_init`, as to `Trainer`.
        args: training arguments, ours or those of transformers.
        loss: the family's loss object, `loss(model, batch) -> LossOutput` and `loss.num_items(batch)`.
        data_collator: makes training batches.
        train_dataset: training examples: map-style, a stream, or a mixture of either (see `xlm_hf.data.as_dataset`).
        evaluation_sets: what `evaluate` measures, by stage.
        processing_class: the tokenizer, saved with every checkpoint.
        eval_dataset: examples whose loss is one more set, `validation`; or several by the name of their set.
        **options: further ones of `Trainer`: `callbacks`, `model_init`, `optimizers`, `optimizer_cls_and_kwargs`, and
            `compute_metrics`, which scores what the sets with `generate` decoded: it gets their token ids and, as
            `label_ids`, those of the references, filled up with -100.

    Raises:
        ValueError: for an argument that is missing, or would have no effect.
    """

    args: Any
    optimizer: Any
    train_dataset: Any

    def __init__(
        self,
        model: PreTrainedModel | None = None,
        args: TrainingArguments | None = None,
        loss: Any = None,
        data_collator: Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]] | None = None,
        train_dataset: Any = None,
        evaluation_sets: Sequence[EvaluationSet] = (),
        processing_class: PreTrainedTokenizerBase | None = None,
        eval_dataset: Any = None,
        **options: Any,
    ):
        if loss is None or data_collator is None or options.keys() & _OF_LABELS:
            raise ValueError(f"XLMTrainer takes loss= and data_collator=, those of the family, and no {_OF_LABELS}.")
        self.loss, self.evaluation_sets = loss, list(evaluation_sets)
        kind = getattr(data_collator, "kind", "seq2seq")
        self.loss_set = EvaluationSet("validation", train_dataset, data_collator, ("validation",), loss, kind=kind)
        if eval_dataset is not None:
            self.evaluation_sets += self._sets_over(eval_dataset, "validation", [self.loss_set])
        check_evaluation_sets(self.evaluation_sets)
        examples: Any = None if train_dataset is None else keyed(as_dataset(train_dataset))
        if isinstance(examples, Sized) and len(examples) == 0:
            raise ValueError("The training set is empty: choose another split or more examples.")
        self.card_variables: dict[str, Any] = {}
        super().__init__(
            model=model,
            args=XLMTrainingArguments.adopt(args),
            data_collator=data_collator,
            train_dataset=examples,
            eval_dataset=self.evaluation_sets[0].dataset if self.evaluation_sets else None,
            processing_class=processing_class,
            **options,
        )
        if isinstance(processing_class, PreTrainedTokenizerBase):
            check_tokenizer(processing_class, self.model.config)
        for callback in (PrinterCallback, DEFAULT_PROGRESS_CALLBACK):
            self.remove_callback(callback)
        trackers = {WandbCallback: WandbTracker, TensorBoardCallback: TensorBoardTracker}
        for parent, tracker in trackers.items():
            if self.pop_callback(parent) is not None:
                self.add_callback(tracker())
        is_shown_as_table = is_in_notebook() and not self.args.disable_tqdm
        self.add_callback(notebook_table() if is_shown_as_table else ProgressBar())
        self.add_callback(MetricsFile())
        self.callback_handler.callbacks.insert(0, _StepHooks(self))
        self.predictions: dict[str, list[dict[str, Any]]] = {}
        # compute_loss divides by the items of the whole optimiser step, so nothing is left to scale.
        self.loss_is_scaled_for_ga = True
        self._metric_sums: dict[str, tuple[torch.Tensor, torch.Tensor | int]] = {}
        self.ema: ExponentialMovingAverage | None = None
        self.guard = FiniteGuard(self.args.device)
        self._step_counts = _AsyncCounts()
        self._signals = StopSignals()
        # Whether the weights are those of `state.global_step`, and no save of them has failed.
        self._can_save = True
        # When and at how many tokens the last log was, the time of evaluations and saves taken out.
        self._last_log = (time.perf_counter(), 0)

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train, from a checkpoint if one is given (True: the newest); one that is at its end is not trained on."""
        if resume_from_checkpoint is True:
            # The parent says that there is none, and does not know that one may be damaged.
            newest = last_sound_checkpoint(Path(str(self.args.output_dir)))
            resume_from_checkpoint = True if newest is None else str(newest)
        if isinstance(resume_from_checkpoint, (str, Path)) and self.is_finished(Path(resume_from_checkpoint)):
            # The parent would train one step more.
            state = saved_state(Path(resume_from_checkpoint))
            best = state.best_model_checkpoint if self.args.load_best_model_at_end else None
            self._load_from_checkpoint(str(best or resume_from_checkpoint))
            self._start_average(Path(best or resume_from_checkpoint))
            self.state = state
            return TrainOutput(state.global_step, 0.0, {})
        try:
            with StopSignals() if self.args.save_on_exception else nullcontext(self._signals) as self._signals:
                output = super().train(resume_from_checkpoint, *args, **kwargs)
                self._check_finite()
        except (Exception, KeyboardInterrupt) as error:
            if self.args.save_on_exception and self.args.world_size == 1 and not isinstance(error, NotFiniteError):
                self._save_before_failing()
            raise
        if self._signals.received:
            raise TrainingStopped(self._signals.received, self.state.global_step)
        return output

    def is_finished(self, checkpoint: Path) -> bool:
        """Whether the run of a checkpoint is at its end; raises ValueError if it is beyond the steps of this call."""
        state = saved_state(checkpoint)
        *_, max_steps = self.set_initial_training_values(self.args, self.get_train_dataloader())
        if state.global_step > max_steps:
            raise ValueError(
                f"{checkpoint} is at step {state.global_step}, and this run ends at step {max_steps}: raise max_steps "
                "or num_train_epochs, or choose another output_dir."
            )
        ends = [callback for callback in self.callback_handler.callbacks if hasattr(callback, "is_finished")]
        return state.global_step == max_steps or any(callback.is_finished(state) for callback in ends)

    def _save_before_failing(self) -> None:
        """Save the last whole step, with the random numbers as they were at its end, unless it is saved already."""
        folder = Path(str(self.args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if not (self.state.global_step and self._can_save and self.guard.steps) or folder.exists():
            return
        begun = self.guard.steps[-1]
        if begun.number > self.state.global_step and begun.random_states:
            restore_random_states(begun.random_states[0])
        self._save_checkpoint(self.model, None)

    def get_train_dataloader(self) -> DataLoader:
        """Batches of the training set in an order, and with a corruption, that (seed, epoch) alone determine."""
        args, length = self.args, self.args.static_length
        seed = args.seed if args.data_seed is None else args.data_seed
        by_length = args.train_sampling_strategy == "group_by_length"
        collate = StaticShapes(self.data_collator, length) if length else self.data_collator
        rows = self._train_batch_size * args.world_size
        if args.dataloader_drop_last and isinstance(self.train_dataset, Sized) and len(self.train_dataset) < rows:
            cause = f"the {len(self.train_dataset)} examples are fewer than the {rows} of one"
            raise ValueError(f"dataloader_drop_last leaves no batch, since {cause}: unset it, or lower the batch size.")
        self._sampler = self.train_dataset.order(seed, rows, by_length)
        loader = DataLoader(
            self.train_dataset,
            batch_size=self._train_batch_size,
            sampler=self._sampler,
            collate_fn=collate if is_synchronous(args.device) else partial(collate_without_full_mask, collate),
            drop_last=args.dataloader_drop_last,
            num_workers=args.dataloader_num_workers,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            multiprocessing_context=args.dataloader_multiprocessing_context,
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
        others = [{"params": parameters, "weight_decay": decay} for decay, parameters in groups.items() if parameters]
        betas = (args.adam_beta1, args.adam_beta2)
        self.optimizer = MuonWithAdamW(
            torch.optim.AdamW(others, lr=args.learning_rate, betas=betas, eps=args.adam_epsilon, fused=True),
            torch.optim.Muon(matrices, lr=args.muon_learning_rate, weight_decay=args.weight_decay),
        )
        return self.optimizer

    def _prepare_for_training(self, max_steps: int, train_dataloader, resume_from_checkpoint: str | None):
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        self._start_average(None if resume_from_checkpoint is None else Path(resume_from_checkpoint))
        self._last_log = (time.perf_counter(), self.state.num_input_tokens_seen)
        self._metric_sums = {}
        return prepared

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load the states; rates and decays are those of this call all the same."""
        another = ValueError(f"{checkpoint} holds the state of another optimiser: train with that, or begin anew.")
        wanted = [dict(group) for group in self.optimizer.param_groups]
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
        except KeyError:
            raise another from None
        for group, new in zip(self.optimizer.param_groups, wanted, strict=True):
            if new.keys() - group.keys():
                raise another
            # A schedule multiplies the initial rate.
            group["lr"] *= new.get("initial_lr", 1.0) / (group.get("initial_lr") or 1.0)
            group.update({name: value for name, value in new.items() if name in _OF_THE_CALL})
        scheduler: Any = self.lr_scheduler
        if hasattr(scheduler, "base_lrs"):
            scheduler.base_lrs = [group["initial_lr"] for group in self.optimizer.param_groups]
            scheduler._last_lr = [group["lr"] for group in self.optimizer.param_groups]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self._source = resume_from_checkpoint
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Refuse what the parent warns about."""
        missing = {*load_result.missing_keys} - {*self.model.all_tied_weights_keys}
        check_weights(self._source, missing, load_result.unexpected_keys)

    def _update_auto_batch_size(self, batch_size: int) -> None:
        """Accumulate more where `auto_find_batch_size` found less memory, so that a step keeps its examples."""
        super()._update_auto_batch_size(batch_size)
        if self.args.global_batch_size is not None:
            share = self.args.global_batch_size // self.args.world_size
            self._train_batch_size = max(size for size in range(1, batch_size + 1) if share % size == 0)
            self.args.gradient_accumulation_steps = share // self._train_batch_size

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # On several ranks the parent does not reach the sampler of a loader that skips what a resumed epoch has seen.
        if self._sampler is not None:
            self._sampler.set_epoch(kwargs["epoch"])
        super()._run_epoch(*args, **kwargs)

    def _start_average(self, checkpoint: Path | None) -> None:
        if self.args.ema_decay is not None:
            self.ema = ExponentialMovingAverage(self.model, self.args.ema_decay)
            if checkpoint is not None and (checkpoint / EMA_FILE).exists():
                self.ema.load(checkpoint)

    def averaged_weights(self) -> AbstractContextManager[None]:
        """Within it the model has the averaged weights, if there are any and `use_ema` asks for them."""
        if self.ema is None or not self.args.use_ema:
            return nullcontext()
        return self.ema.applied()

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor:
        """Items of the coming optimiser step over all ranks, by the one collective call of a step.

        With them go its tokens, whether a loss before it was not finite, and whether a signal asks the run to end.
        """
        counts = (
            sum(self.loss.num_items(batch) for batch in batch_samples),
            sum(batch.get("attention_mask", torch.ones_like(batch["input_ids"])).sum() for batch in batch_samples),
            self.guard.failed,
            self._signals.received > 0,
        )
        # Added to what is on the device: to copy a number of the host there would wait for the device.
        zero = torch.zeros((), dtype=torch.int64, device=device)
        total = self.accelerator.reduce(torch.stack([zero + count for count in counts]), "sum")
        self._step_counts.start(total)
        return total[0].clamp(min=1)

    def _track_num_input_tokens(self, inputs: dict[str, torch.Tensor]) -> None:
        """Count nothing: `finish_step` counts the tokens of every step, over all ranks."""

    def finish_step(self) -> None:
        """Bring counts and averaged weights up to the step that ends, and end the run if something asks for it."""
        _, num_tokens, num_failed, num_stopped = self._step_counts.read()
        if num_failed:
            self._fail(self.guard.steps[0])
        self.state.num_input_tokens_seen += num_tokens
        if self.ema is not None:
            self.ema.update(self.state.global_step)
        self._can_save = True
        if num_stopped or (self.args.world_size == 1 and self._signals.received):
            self.control.should_save = self.control.should_training_stop = True

    def _get_grad_norm(self, model: nn.Module, grad_norm=None):
        grad_norm = super()._get_grad_norm(model, grad_norm)
        if self.accelerator.scaler is None:
            # A scaler takes gradients that are not finite for a sign to scale down.
            self.guard.check_gradient(grad_norm)
        wrapped = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if wrapped or not self.guard.protect(self.optimizer.optimizer):
            self._check_finite()
        self._can_save = False
        return grad_norm

    def _check_finite(self) -> None:
        """Raise NotFiniteError on all ranks if a loss or a gradient so far was not finite; waits for the device."""
        if self.accelerator.reduce(self.guard.failed.int(), "sum").item():
            self._fail(self.guard.steps[-1])

    def _fail(self, step: Step) -> None:
        folder = Path(str(self.args.output_dir)) / f"not-finite-{step.number}"
        folder.mkdir(exist_ok=True)
        examples = self.guard.save_batches(step, folder, self.args.process_index)
        super().save_model(str(folder), _internal_call=True)
        raise NotFiniteError(
            f"The loss or gradient of step {step.number} is not finite, over the examples {str(examples)[1:-1]}: "
            f"{folder} holds the batch and the weights before that step, and docs/debugging.md shows how to repeat it."
        )

    def compute_loss(self, model: nn.Module, inputs, return_outputs: bool = False, num_items_in_batch=None):
        """This micro-batch's share of the loss of the whole optimiser step, loss_sum / num_items_in_batch.

        It is multiplied by the number of ranks because their gradients are averaged, not summed. Without
        `num_items_in_batch`, outside a training, it is the loss of this batch alone. `return_outputs` also returns the
        `LossOutput`: the loss object keeps the logits to itself.
        """
        if num_items_in_batch is None:
            output = self.loss(model, self._prepare_inputs(inputs))
            loss = output.loss_sum / output.num_items
            return (loss, output) if return_outputs else loss
        self.guard.start_batch(inputs)
        output = self.loss(model, inputs)
        self.guard.end_batch(output.loss_sum)
        for name, (total, count) in output.metrics.items():
            old = self._metric_sums.get(name, (0.0, 0))
            self._metric_sums[name] = (old[0] + total, old[1] + count)
        return output.loss_sum / num_items_in_batch * self.accelerator.num_processes

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        control = self.control
        if control.should_save or (control.should_evaluate and self.args.save_strategy == SaveStrategy.BEST):
            # So that no checkpoint has losses pending, which a resume would lose.
            control.should_log = True
        if control.should_log or control.should_evaluate or control.should_save:
            self._check_finite()
        start = time.perf_counter()
        super()._maybe_log_save_evaluate(*args, **kwargs)
        logged, tokens = self._last_log
        self._last_log = (logged + time.perf_counter() - max(start, logged), tokens)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, adding the components of the training loss since the last log, reduced over all ranks."""
        if "loss" in logs:
            tokens, (last_time, last_tokens) = self.state.num_input_tokens_seen, self._last_log
            self._last_log = (time.perf_counter(), tokens)
            logs["num_input_tokens_seen"] = tokens
            logs["tokens_per_second"] = (tokens - last_tokens) / (self._last_log[0] - last_time)
            logs["peak_memory_gib"] = _peak_memory(self.args.device) / 2**30
            logs.update(reduce_sums(self._metric_sums, self.args.device))
            self._metric_sums = {}
        super().log(logs, start_time)

    def _save_checkpoint(self, model: nn.Module, trial) -> None:
        """Write a checkpoint under a temporary name and rename it; only then may an older one be deleted."""
        self._can_save = False
        self.store_flos()
        output_dir = Path(self._get_output_dir(trial))
        folder = output_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        best = output_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
        if best == folder or best.exists():
            self.state.best_model_checkpoint = str(best)
        of_writer = nullcontext(f"{folder}{INCOMPLETE_SUFFIX}")
        with replaced_folder(folder) if self.args.should_save else of_writer as staging:
            self.accelerator.wait_for_everyone()
            self._write_checkpoint(str(staging))
            self.accelerator.wait_for_everyone()
        if self.args.should_save:
            delete_old_checkpoints(
                output_dir, self.args.save_total_limit, self.args.keep_every, self.state.best_model_checkpoint
            )
        self._can_save = True
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(folder))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model as it is evaluated: with the averaged weights, if `use_ema` asks for them."""
        with self.averaged_weights():
            super().save_model(output_dir, _internal_call)

    def _load_best_model(self) -> None:
        self._source = str(self.state.best_model_checkpoint)
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
