"""job=train: prepare, train (or resume), test, and export `model/`."""

import re
from collections.abc import Sized
from pathlib import Path

from accelerate import PartialState
from omegaconf import DictConfig

from xlm_hf.building import build_model, build_task, build_trainer, initialise, plain, positions_of
from xlm_hf.commands._run import card_variables, check_same_run, next_command, record, run_directory, say, say_results
from xlm_hf.hub.export import export_model
from xlm_hf.training.callbacks.budget import saved_seconds
from xlm_hf.training.checkpoints import last_sound_checkpoint
from xlm_hf.training.debugging import FrozenBatch, describe_batch, first_examples


def run(cfg: DictConfig) -> dict[str, float]:
    """Train the run in `output_dir`, from its newest checkpoint if it has one, and return the test metrics.

    Raises:
        ValueError: if `output_dir` holds a different run, or an option does not fit.
    """
    if cfg.checkpoint is not None:
        raise ValueError(
            "job=train takes no checkpoint: output_dir=RUN resumes a run, and init_from=RUN begins a new one with the "
            "weights of another."
        )
    output_dir = run_directory(cfg)
    check_same_run(output_dir, cfg)
    task = build_task(cfg.task)
    if cfg.debug.name == "small_data":
        task.splits = first_examples(task.splits, cfg.debug.num_train, cfg.debug.num_others)
    model = build_model(cfg.model, task.tokenizer, cfg.generation, positions_of(cfg.task, cfg.collator), cfg.seed)
    checkpoint = last_sound_checkpoint(output_dir)
    if cfg.init_from is not None and checkpoint is None:
        _initialise(cfg, model, task.tokenizer)
    trainer = build_trainer(cfg, task, model, output_dir)
    if cfg.debug.name == "print_batch":
        say(describe_batch(next(iter(trainer.get_train_dataloader())), task.tokenizer))
        return {}
    if cfg.debug.name == "overfit":
        trainer.data_collator = FrozenBatch(trainer.data_collator)
    # Only now is the config known to make a run; a mistaken one must not lay claim to the folder.
    record(output_dir, cfg, task, trainer, checkpoint)
    _say_summary(trainer, cfg, output_dir, checkpoint)
    trainer.card_variables = card_variables(plain(cfg), {"steps": 0}, {})
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if cfg.debug.name == "dry_run":
        say(f"A step, an evaluation and a checkpoint work: {output_dir}")
        return {}
    metrics = trainer.evaluate(metric_key_prefix="test")
    state = trainer.state
    metrics |= {"parameters": model.num_parameters(), "steps": state.global_step}
    metrics |= {"tokens": state.num_input_tokens_seen, "seconds": saved_seconds(state)}
    if trainer.is_world_process_zero():
        say_results(output_dir, metrics, trainer.predictions)
        trainer.card_variables = card_variables(plain(cfg), metrics, trainer.predictions)
        if trainer.args.push_to_hub:
            say(f"Pushed to {trainer.push_to_hub().repo_url}")
        else:
            with trainer.averaged_weights():
                export_model(model, trainer.processing_class, output_dir / "model", trainer.card_variables)
        say(f"Model, ready for the Hub: {output_dir}/model")
        say(f"Next: {next_command('job=generate', f'checkpoint={output_dir}')}")
    return metrics


def _initialise(cfg: DictConfig, model, tokenizer) -> None:
    """Begin with the weights of `init_from`, and say which."""
    weights = initialise(model, cfg.init_from, tokenizer, cfg.ema, cfg.trust_remote_code)
    # A module is named once.
    modules = {what: sorted({re.sub(r"\.\d+\..*|\.[^.]*$", "", n) for n in names}) for what, names in weights.items()}
    if PartialState().is_main_process:
        say(f"Initialised from {cfg.init_from}: {len(weights['taken'])} weights taken")
        for what, meaning in (("new", "drawn anew, since it has none that fit"), ("left", "left there")):
            if weights[what]:
                say(f"  {len(weights[what])} {meaning}: {', '.join(modules[what])}")


def _say_summary(trainer, cfg: DictConfig, output_dir: Path, checkpoint: Path | None) -> None:
    if not trainer.is_world_process_zero():
        return
    args = trainer.args
    batch_size = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    budget = [f"{amount:,} {unit}" for unit, amount in cfg.budget.items() if amount is not None]
    length = " or ".join(budget) or (
        f"{args.max_steps:,} steps" if args.max_steps > 0 else f"{args.num_train_epochs:g} epochs"
    )
    source = f"{len(trainer.train_dataset):,}" if isinstance(trainer.train_dataset, Sized) else "a stream"
    say(f"{cfg.experiment}: {cfg.family} on {cfg.task.name}, {trainer.model.num_parameters():,} parameters")
    say(f"{length} of {batch_size} examples, from {source}; seed {cfg.seed}; {args.device}")
    if hasattr(trainer.train_dataset, "__getitems__"):
        examples = trainer.train_dataset.__getitems__([(0, i, i) for i in range(min(8, len(trainer.train_dataset)))])
        tokens = int(trainer.data_collator(examples)["attention_mask"].sum()) * batch_size // len(examples)
        say(f"About {tokens:,} tokens a step, padding left out")
    say(f"Everything goes to {output_dir}" + (f"; resuming from {checkpoint.name}" if checkpoint else ""))
