"""From prompts and targets to sequences with blanks."""

import torch
from datasets import Dataset, DatasetDict

from xlm_hf.modules.checked_options import Share, checked
from xlm_hf.modules.counter_random import uniform
from xlm_hf.tasks import Task


@checked
def with_blanks(task: Task, blank_rate: Share, seed: int) -> Task:
    """The infill task of a seq2seq task: `input_ids` are prompt and target with blanks, `target_ids` both in full.

    Each token of a target is blank with probability `blank_rate`, and at least one is; which ones is a function of
    (seed, example_id).

    Raises:
        ValueError: for a rate that is not in (0, 1].
    """
    splits = {}
    for split, dataset in task.splits.items():
        columns = dataset[:]
        positions = torch.arange(max(map(len, columns["target_ids"])))
        keys = uniform(seed, torch.tensor(columns["example_id"])[:, None], positions).tolist()
        inputs, targets = [], []
        for prompt, target, row in zip(columns["prompt_ids"], columns["target_ids"], keys, strict=True):
            threshold = max(blank_rate, min(row[: len(target)]))
            hidden = [
                task.tokenizer.mask_token_id if key <= threshold else t for t, key in zip(target, row, strict=False)
            ]
            inputs.append(prompt + hidden)
            targets.append(prompt + target)
        columns = {"example_id": columns["example_id"], "input_ids": inputs, "target_ids": targets}
        splits[split] = Dataset.from_dict(columns)
    return Task(task.name, "infill", DatasetDict(splits), task.tokenizer, task.files)
