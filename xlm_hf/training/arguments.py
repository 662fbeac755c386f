"""The arguments of the trainer."""

import os
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import torch
from transformers import TrainingArguments
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION
from transformers.training_args import trainer_log_levels

from xlm_hf.modules.checked_options import (
    CheckedOptions,
    Count,
    NotNegative,
    PartialShare,
    Positive,
    PositiveInt,
    check_arguments,
    check_value,
)

# Metrics whose names end so, up to a condition as in `perplexity_given_length`, are better when lower.
_LOWER_IS_BETTER = (
    *("loss", "perplexity", "nats_per_token", "bits_per_character", "unknown_rate", "nelbo", "nll"),
    *("entropy", "nfe", "seconds"),
)
# Ranges of what transformers takes as it comes.
_RANGES: dict[str, Any] = {
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size"), PositiveInt),
    **dict.fromkeys(("gradient_accumulation_steps", "save_total_limit", "torch_empty_cache_steps"), PositiveInt | None),
    **dict.fromkeys(("learning_rate", "weight_decay", "max_grad_norm", "warmup_steps", "eval_delay"), NotNegative),
    **dict.fromkeys(("num_train_epochs", "adam_epsilon", "logging_steps", "save_steps"), Positive),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "label_smoothing_factor"), PartialShare),
    **dict.fromkeys(("neftune_noise_alpha", "eval_steps"), Positive | None),
    **dict.fromkeys(("seed", "dataloader_num_workers"), Count),
    **dict.fromkeys(("log_level", "log_level_replica"), Literal[*trainer_log_levels]),
    **dict.fromkeys(("lr_scheduler_kwargs", "gradient_checkpointing_kwargs"), dict | None),
    "torch_compile_mode": Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] | None,
    "train_sampling_strategy": Literal["random", "group_by_length"],
    "max_steps": PositiveInt | Literal[-1],
}
# Fields of the parent that would have no effect; docs/plain_python.md says why, and what has.
WITHOUT_EFFECT = (
    *("average_tokens_across_devices", "batch_eval_metrics", "bf16_full_eval", "dataloader_in_order", "debug"),
    *("enable_jit_checkpoint", "eval_accumulation_steps", "eval_do_concat_batches", "eval_use_gather_object"),
    *("fp16_full_eval", "include_for_metrics", "include_num_input_tokens_seen", "label_names"),
    *("label_smoothing_factor", "length_column_name", "liger_kernel_config", "logging_nan_inf_filter"),
    *("parallelism_config", "prediction_loss_only", "remove_unused_columns", "use_liger_kernel"),
)
# What a schedule gets from the trainer.
_OF_SCHEDULES = ("optimizer", "num_warmup_steps", "num_training_steps", "last_epoch")


def check_training_options(options: dict[str, Any]) -> None:
    """Raise ValueError for an option that is no training argument, or whose value is of no kind or range of it."""
    check_arguments("trainer", options, XLMTrainingArguments)
    for name in _RANGES.keys() & options:
        check_value(name, options[name], _RANGES[name])


@dataclass
class XLMTrainingArguments(CheckedOptions, TrainingArguments):
    """`transformers.TrainingArguments` with the defaults that counter-based collators and honest logs need.

    Attributes:
        metric_for_best_model: one that `evaluate` returns; without the name of its set it is one of `validation`.
        muon_learning_rate: trains the weight matrices of the layers by Muon at this rate, and the rest by AdamW at
            `learning_rate`; None trains everything by `optim`. Both rates follow the schedule.
        ema_decay: in [0, 1), of the exponential moving average of the weights (see `ExponentialMovingAverage`), which
            is then evaluated, exported and pushed; None keeps none.
        use_ema: whether evaluation and export take the averaged weights; the average is kept in any case.
        train_sampling_strategy: "random", or "group_by_length": batches of examples of like length.
        global_batch_size: examples of an optimiser step over all devices, from which `gradient_accumulation_steps`
            follows; None leaves that as it is.
        static_length: pads every training batch to rows of this many tokens and to one shape in all. One graph of the
            step, compiled or captured on the device, then serves every batch (see `StaticShapes`). None pads to the
            longest row of a batch.
        keep_every: checkpoints whose step is a multiple of it stay for good. `save_total_limit` counts the others; by
            default the last and the best stay. None keeps no checkpoint for good.
        save_on_exception: save a checkpoint when training ends early. On SIGTERM or SIGINT all ranks save after the
            step. When an error is raised, a single process saves.
        tracked_predictions: how many predictions of an evaluation set Weights & Biases and TensorBoard get as a table.
        shown_predictions: how many of them the console shows.

    Raises:
        ValueError: for a value out of its range, a field of the parent that would have no effect, or a
            `global_batch_size` that the devices cannot make.
    """

    remove_unused_columns: bool = field(default=False, metadata={"help": "Keep the columns that the collators read."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Show a loss that is not a number."})
    muon_learning_rate: Positive | None = field(default=None, metadata={"help": "Muon's rate for the matrices."})
    ema_decay: PartialShare | None = field(default=None, metadata={"help": "Decay of the average of the weights."})
    use_ema: bool = field(default=True, metadata={"help": "Evaluate and export the averaged weights."})
    global_batch_size: PositiveInt | None = field(default=None, metadata={"help": "Examples of a step, all devices."})
    static_length: PositiveInt | None = field(
        default=None, metadata={"help": "Tokens of each row of a training batch."}
    )
    keep_every: PositiveInt | None = field(default=None, metadata={"help": "Keep the checkpoints at multiples of it."})
    save_on_exception: bool = field(default=False, metadata={"help": "Save when training ends early."})
    tracked_predictions: Count = field(default=50, metadata={"help": "Rows of the tables of predictions."})
    shown_predictions: Count = field(default=0, metadata={"help": "Predictions that the console shows."})

    @classmethod
    def adopt(cls, args: TrainingArguments | None) -> "XLMTrainingArguments":
        """Arguments of transformers as those of this trainer; what they only preset is ours to preset."""
        if args is None or isinstance(args, cls):
            return args or cls()
        given = {f.name: getattr(args, f.name) for f in fields(args) if f.init}
        given |= {"remove_unused_columns": False, "logging_nan_inf_filter": False}
        if args.greater_is_better == (not str(args.metric_for_best_model).endswith("loss")):
            given["greater_is_better"] = None
        return cls(**given)

    def __post_init__(self):
        self.check()
        for name, kind in _RANGES.items():
            check_value(name, getattr(self, name), kind)
        if self.metric_for_best_model is not None and self.greater_is_better is None:
            self.greater_is_better = not self.metric_for_best_model.split("_given_")[0].endswith(_LOWER_IS_BETTER)
        if self.global_batch_size is not None:
            # Before the parent hands the accumulation on to accelerate and DeepSpeed.
            self._accumulate_to(self.global_batch_size, int(os.environ.get("WORLD_SIZE", 1)))
        # Before the parent has reasons of its own, such as that this device has no such type.
        self._refuse_what_has_no_effect()
        try:
            super().__post_init__()
        except (TypeError, LookupError, ImportError) as error:
            raise ValueError(f"the arguments of the trainer do not fit: {' '.join(str(error).split())}.") from error
        options: Any = self.lr_scheduler_kwargs or {}
        schedule: Any = TYPE_TO_SCHEDULER_FUNCTION[self.lr_scheduler_type]  # type: ignore[index]
        check_arguments("lr_scheduler_kwargs", options, schedule, given=_OF_SCHEDULES)
        if self.fp16 and self.device.type == "cpu":
            raise ValueError("fp16 needs an accelerator, and there is none: choose bf16, or leave both out.")
        if self.metric_for_best_model is not None:
            name = self.metric_for_best_model.removeprefix("eval_")
            self.metric_for_best_model = name if "/" in name else f"validation/{name}"
        # Each rank reads its own share of a stream; by default the first would read and send for all.
        self.accelerator_config.dispatch_batches = False  # type: ignore[union-attr]
        # Pinned memory speeds up copies to an accelerator; without one torch warns about it at every epoch.
        self.dataloader_pin_memory = self.dataloader_pin_memory and torch.accelerator.is_available()
        # From there a batch is copied without the host waiting for the device.
        self.accelerator_config.non_blocking = self.dataloader_pin_memory  # type: ignore[union-attr]

    def _refuse_what_has_no_effect(self) -> None:
        for name in WITHOUT_EFFECT:
            if (value := getattr(self, name)) not in (getattr(type(self), name, []), "non_padding", []):
                raise ValueError(f"{name}={value!r} has no effect here: leave it out (see docs/plain_python.md).")

    def _accumulate_to(self, batch_size: int, num_devices: int) -> None:
        at_once = self.per_device_train_batch_size * num_devices
        if batch_size % at_once:
            raise ValueError(
                f"global_batch_size ({batch_size}) must be a multiple of per_device_train_batch_size "
                f"({self.per_device_train_batch_size}) x {num_devices} devices = {at_once}: change one of the three."
            )
        self.gradient_accumulation_steps = batch_size // at_once
