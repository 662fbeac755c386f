"""Every field of `TrainingArguments` works, or is refused in one sentence."""

import inspect
from dataclasses import fields

import pytest
import transformers
from transformers import TrainingArguments

from tests.training.test_trainer import Tokenizer, dataset, make_trainer
from xlm_hf.building import build_arguments, compose
from xlm_hf.evaluation import EvaluationSet
from xlm_hf.modeling.ilm import ILMCollator, ILMLoss
from xlm_hf.training.arguments import WITHOUT_EFFECT, XLMTrainingArguments

SHORT = {"max_steps": 2, "logging_steps": 1}
EVALUATED = {"eval_strategy": "steps", "eval_steps": 1}
SAVED = {"save_strategy": "steps", "save_steps": 1}

REFUSED = {
    "average_tokens_across_devices": False,
    "batch_eval_metrics": True,
    "bf16_full_eval": True,
    "dataloader_in_order": False,
    "debug": "underflow_overflow",
    "enable_jit_checkpoint": True,
    "eval_accumulation_steps": 2,
    "eval_do_concat_batches": False,
    "eval_use_gather_object": True,
    "fp16_full_eval": True,
    "include_for_metrics": ["inputs"],
    "include_num_input_tokens_seen": True,
    "label_names": ["labels"],
    "label_smoothing_factor": 0.1,
    "length_column_name": "size",
    "liger_kernel_config": {"rope": True},
    "logging_nan_inf_filter": True,
    "parallelism_config": object(),
    "prediction_loss_only": True,
    "remove_unused_columns": True,
    "use_liger_kernel": True,
}


def weights(trainer):
    return sum(float(p.detach().double().abs().sum()) for p in trainer.model.parameters())


def logs(trainer):
    return [(log["step"], sorted(log)) for log in trainer.state.log_history]


def evaluations(trainer):
    return [log["step"] for log in trainer.state.log_history if "validation/loss" in log]


def files(trainer):
    return sorted(str(file.relative_to(trainer.args.output_dir)) for file in trainer.output_dir.rglob("*"))


def loader(trainer):
    found = trainer.get_train_dataloader()
    names = ("num_workers", "persistent_workers", "prefetch_factor", "drop_last", "multiprocessing_context")
    return [str(getattr(found, name)) for name in names]


# name: (options of both runs, its value in the second run, what differs between the runs)
TRAINED = {
    "per_device_train_batch_size": ({}, 4, weights),
    "num_train_epochs": ({"max_steps": -1, "num_train_epochs": 0.4}, 0.2, weights),
    "max_steps": ({}, 1, weights),
    "learning_rate": ({}, 1e-3, weights),
    "lr_scheduler_type": ({}, "constant", weights),
    "lr_scheduler_kwargs": ({"lr_scheduler_type": "polynomial"}, {"power": 3.0}, weights),
    "warmup_steps": ({}, 2, weights),
    "optim": ({}, "sgd", weights),
    "optim_args": ({"optim": "rmsprop"}, "momentum=0.5", weights),
    "weight_decay": ({}, 0.5, weights),
    "adam_beta1": ({}, 0.1, weights),
    "adam_beta2": ({}, 0.5, weights),
    "adam_epsilon": ({}, 1.0, weights),
    "gradient_accumulation_steps": ({}, 2, weights),
    "max_grad_norm": ({"optim": "sgd"}, 1e-3, weights),
    "bf16": ({}, True, weights),
    "neftune_noise_alpha": ({}, 5.0, weights),
    "seed": ({}, 1, weights),
    "data_seed": ({}, 1, weights),
    "train_sampling_strategy": ({}, "group_by_length", weights),
    "logging_strategy": ({}, "no", logs),
    "logging_steps": ({}, 2, logs),
    "logging_first_step": ({"logging_steps": 2}, True, logs),
    "skip_memory_metrics": ({}, False, logs),
    "eval_strategy": ({}, "steps", evaluations),
    "eval_steps": (EVALUATED, 2, evaluations),
    "eval_delay": (EVALUATED, 2, evaluations),
    "eval_on_start": (EVALUATED, True, evaluations),
    "save_strategy": ({}, "epoch", files),
    "save_steps": (SAVED, 2, files),
    "save_total_limit": (SAVED, 1, files),
    "save_only_model": (SAVED, True, files),
    "metric_for_best_model": (EVALUATED, "loss", lambda trainer: trainer.state.best_metric),
    "greater_is_better": (
        {**EVALUATED, **SAVED, "metric_for_best_model": "loss"},
        True,
        lambda trainer: trainer.state.best_global_step,
    ),
    "load_best_model_at_end": (
        {**EVALUATED, **SAVED, "metric_for_best_model": "loss", "greater_is_better": True},
        True,
        weights,
    ),
}
# What needs no training to be seen: its value, and what differs.
BUILT = {
    "output_dir": ("elsewhere", lambda trainer: trainer.output_dir.name),
    "per_device_eval_batch_size": (1, lambda trainer: trainer.num_evaluation_batches()),
    "dataloader_num_workers": (1, loader),
    "dataloader_drop_last": (True, lambda trainer: len(trainer.get_train_dataloader())),
    "dataloader_multiprocessing_context": ("spawn", loader),
    "dataloader_persistent_workers": (True, loader),
    "dataloader_prefetch_factor": (3, loader),
    "disable_tqdm": (False, lambda trainer: trainer.args.disable_tqdm),
    "use_cache": (True, lambda trainer: trainer.model.config.use_cache),
}
# What transformers, accelerate and torch do with it, outside of what this trainer replaces.
PASSED_ON = {
    "devices and processes": (
        "use_cpu fp16 tf32 local_rank ddp_backend ddp_timeout ddp_find_unused_parameters ddp_bucket_cap_mb "
        "ddp_broadcast_buffers ddp_static_graph fsdp fsdp_config deepspeed accelerator_config save_on_each_node "
        "log_on_each_node dataloader_pin_memory torch_empty_cache_steps full_determinism"
    ),
    "the optimiser": "optim_target_modules",
    "the model": (
        "activation_checkpointing activation_checkpointing_kwargs gradient_checkpointing gradient_checkpointing_kwargs "
        "torch_compile torch_compile_backend torch_compile_mode"
    ),
    "the batch size, see test_plain_python": "auto_find_batch_size",
    "transformers' own log": "log_level log_level_replica",
    "trackers": "report_to run_name project trackio_space_id trackio_bucket_id trackio_static_space_id",
    "the Hub, see tests/hub": (
        "push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision"
    ),
    "resumes": "ignore_data_skip restore_callback_states_from_checkpoint",
    "scripts of one's own, and refused by the command line": "do_train do_eval do_predict resume_from_checkpoint",
}


SOURCES = "".join(
    map(
        inspect.getsource,
        (
            transformers.trainer,
            transformers.trainer_optimizer,
            transformers.trainer_utils,
            transformers.training_args,
            transformers.integrations.integration_utils,
        ),
    )
)


def test_the_table_is_complete():
    passed_on = " ".join(PASSED_ON.values()).split()
    tables = [*REFUSED, *TRAINED, *BUILT, *passed_on]
    assert len(tables) == len(set(tables))
    assert set(tables) == {f.name for f in fields(TrainingArguments)}
    assert set(REFUSED) == set(WITHOUT_EFFECT)


@pytest.mark.parametrize("name", REFUSED)
def test_a_field_without_effect_is_refused_in_one_sentence(name):
    with pytest.raises(ValueError, match=rf"^{name}=.* has no effect here: leave it out"):
        XLMTrainingArguments("run", **{name: REFUSED[name]})


def test_what_asks_for_nothing_is_taken():
    XLMTrainingArguments("run", use_cpu=True, include_num_input_tokens_seen="non_padding", label_smoothing_factor=0)


def built(folder, **arguments):
    sets = [
        EvaluationSet(
            "validation", dataset(8, 1), ILMCollator(Tokenizer(20), 32, kind="seq2seq"), ["validation"], ILMLoss()
        )
    ]
    folder = folder / arguments.pop("output_dir", "run")
    batch_size = arguments.pop("per_device_train_batch_size", 8)
    trainer = make_trainer(folder, batch_size, evaluation_sets=sets, **SHORT | arguments)
    trainer.output_dir = folder

    def num_evaluation_batches():
        seen = []
        trainer._after_evaluation_batch = seen.append
        trainer.evaluate()
        return len(seen)

    trainer.num_evaluation_batches = num_evaluation_batches
    return trainer


@pytest.fixture(scope="module")
def observed(tmp_path_factory):
    """What a run with some options comes to; each is run once."""
    known = {}

    def observe(look, options):
        key = str(sorted(options.items()))
        if key not in known:
            known[key] = built(tmp_path_factory.mktemp("run"), **options)
            known[key].train()
        return look(known[key])

    return observe


@pytest.mark.parametrize("name", TRAINED)
def test_a_field_that_the_training_follows(observed, name):
    options, value, look = TRAINED[name]
    assert observed(look, {**options, name: value}) != observed(look, options)


@pytest.mark.parametrize("name", BUILT)
def test_a_field_that_a_trainer_follows(tmp_path, name):
    value, look = BUILT[name]
    shared = {"dataloader_num_workers": 1} if name.startswith(("dataloader_p", "dataloader_m")) else {}
    assert look(built(tmp_path / "a", **shared, **{name: value})) != look(built(tmp_path / "b", **shared))


@pytest.mark.parametrize("name", " ".join(PASSED_ON.values()).split())
def test_a_field_that_is_passed_on_reaches_the_trainer_and_is_read(name):
    # The two that are deprecated name others.
    if name not in ("local_rank", "gradient_checkpointing_kwargs"):
        assert f"self.{name}" in SOURCES or f"args.{name}" in SOURCES
    assert name in {f.name for f in fields(XLMTrainingArguments)}


@pytest.mark.parametrize("name", ["do_train", "do_eval", "do_predict", "resume_from_checkpoint", "output_dir"])
def test_the_command_line_refuses_what_no_job_reads(name):
    cfg = compose("ilm_star", [f"trainer.{name}={'true' if name.startswith('do_') else 'x'}"])
    with pytest.raises(ValueError, match=f"trainer.{name} has no effect: choose job= and output_dir="):
        build_arguments(cfg.trainer, output_dir="run")


def test_tokens_are_counted_once(tmp_path):
    trainer = built(tmp_path, include_num_input_tokens_seen="non_padding")
    trainer.train()
    seen = sum(len(ids) for _, ids in trainer.loss.seen)
    assert trainer.state.num_input_tokens_seen == seen


@pytest.mark.parametrize(
    ("metric", "named", "greater"),
    [
        ("loss", "validation/loss", False),
        ("eval_loss", "validation/loss", False),
        ("exact_match", "validation/exact_match", True),
        ("eval_test/perplexity", "test/perplexity", False),
        (None, "validation/loss", False),
    ],
)
@pytest.mark.parametrize("cls", [TrainingArguments, XLMTrainingArguments])
def test_metrics_by_the_names_of_transformers(metric, named, greater, cls):
    given = cls("run", use_cpu=True, **EVALUATED, **SAVED, load_best_model_at_end=True, metric_for_best_model=metric)
    arguments = XLMTrainingArguments.adopt(given)
    assert (arguments.metric_for_best_model, arguments.greater_is_better) == (named, greater)


def test_adopted_arguments_keep_every_field():
    given = TrainingArguments("run", use_cpu=True, learning_rate=0.25, lr_scheduler_type="cosine", fsdp_config=None)
    adopted = XLMTrainingArguments.adopt(given)
    ours = {"remove_unused_columns", "logging_nan_inf_filter", "accelerator_config"}
    for f in fields(TrainingArguments):
        assert f.name in ours or getattr(adopted, f.name) == getattr(given, f.name), f.name
    assert not adopted.remove_unused_columns
    assert XLMTrainingArguments.adopt(adopted) is adopted
    with pytest.raises(ValueError, match="label_smoothing_factor"):
        XLMTrainingArguments.adopt(TrainingArguments("run", use_cpu=True, label_smoothing_factor=0.1))
