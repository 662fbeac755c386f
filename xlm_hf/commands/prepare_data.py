"""job=prepare_data: build a task's data set and tokenizer, or find them in the cache."""

from omegaconf import DictConfig

from xlm_hf.commands.common import build_task, next_command, say


def run(cfg: DictConfig) -> dict[str, int]:
    """Prepare the task, show what it holds, and return the number of examples of each split."""
    task = build_task(cfg)
    sizes = {name: len(split) for name, split in task.splits.items()}
    say(f"{task.name} ({task.kind}), vocabulary of {len(task.tokenizer)}")
    for name, split in task.splits.items():
        place = split.cache_files[0]["filename"] if split.cache_files else "memory"
        say(f"  {name}: {len(split):,} examples in {place}")
    example = next(iter(task.splits.values()))[0]
    for column in ("prompt_ids", "target_ids", "input_ids"):
        if column in example:
            say(f"  {column.removesuffix('_ids')}: {task.tokenizer.decode(example[column])}")
    say(f"Next: {next_command()}")
    return sizes
