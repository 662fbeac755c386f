"""job=evaluate: measure a checkpoint on the test sets of a task."""

from omegaconf import DictConfig

from xlm_hf.building import build_task, build_trainer
from xlm_hf.commands._run import model_of_checkpoint, next_command, run_directory, say, say_results


def run(cfg: DictConfig) -> dict[str, float]:
    """Evaluate `checkpoint` on every test set, write `metrics.json` and `predictions/`, and return the metrics."""
    task = build_task(cfg.task)
    model = model_of_checkpoint(cfg)
    output_dir = run_directory(cfg)
    trainer = build_trainer(cfg, task, model, output_dir)
    trainer.journals = output_dir / "predictions"
    metrics = {**trainer.evaluate(metric_key_prefix="test"), "parameters": model.num_parameters()}
    if trainer.is_world_process_zero():
        say_results(output_dir, metrics, trainer.predictions)
        say(f"Next: {next_command('job=generate', f'checkpoint={cfg.checkpoint}')}")
    return metrics
