"""job=prepare_data: build a task's data set and tokenizer, or find them in the cache."""

from collections.abc import Sized

from omegaconf import DictConfig

from xlm_hf.building import build_task
from xlm_hf.commands._run import next_command, say
from xlm_hf.data import Mixture
from xlm_hf.tasks.corpora import UNUSED
from xlm_hf.tasks.tokenizers import decode_text


def run(cfg: DictConfig) -> dict[str, int]:
    """Prepare the task, show what it holds, and return the number of examples of each split; -1 for a stream's."""
    task = build_task(cfg.task)
    say(f"{task.name} ({task.kind}), vocabulary of {len(task.tokenizer)}")
    sizes = {}
    for name, split in task.splits.items():
        sets = split.sets if isinstance(split, Mixture) else [split]
        weights = split.weights if isinstance(split, Mixture) else [None]
        sizes[name] = sum(len(data) for data in sets) if isinstance(sets[0], Sized) else -1
        for data, weight in zip(sets, weights, strict=True):
            files = getattr(data, "cache_files", None)
            amount = f"{len(data):,} examples" if isinstance(data, Sized) else "a stream of examples"
            share = "" if weight is None else f", weight {weight:g},"
            say(f"  {name}: {amount}{share} in {files[0]['filename'] if files else 'memory'}")
            if note := getattr(getattr(data, "info", None), "description", ""):
                say(f"    {note}")
        for file in task.files.get(name, ()):
            say(f"    from {file}, {file.stat().st_size:,} bytes")
    for file in task.files.get(UNUSED, ()):
        say(f"  in no split: {file}, {file.stat().st_size:,} bytes")
    first = next(iter(task.splits.values()))
    example = next(iter(first.sets[0] if isinstance(first, Mixture) else first))
    for column in ("prompt_ids", "input_ids", "target_ids"):
        if column in example:
            say(f"  {column.removesuffix('_ids')}: {decode_text(task.tokenizer, example[column])}")
    say(f"Next: {next_command()}")
    return sizes
