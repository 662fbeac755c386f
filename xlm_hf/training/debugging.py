"""The debug modes: looking at a run before paying for it."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from datasets import Dataset
from omegaconf import DictConfig, OmegaConf, open_dict
from transformers import PreTrainedTokenizerBase


def apply_debug_options(cfg: DictConfig, given: Iterable[str]) -> None:
    """Let the mode's training options stand over those of the experiment, but not over what the user has `given`."""
    mine = {override.split("=")[0].lstrip("+") for override in given}
    with open_dict(cfg):
        for name, value in cfg.debug.trainer.items():
            if f"trainer.{name}" not in mine:
                OmegaConf.update(cfg, f"trainer.{name}", value)


class FrozenBatch:
    """A collator that gives its first batch again and again, the corruption included."""

    def __init__(self, collator: Any):
        self.collator, self.entries, self.row_capacity = collator, collator.entries, collator.row_capacity
        self.batch: dict[str, torch.Tensor] | None = None

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """The first batch, whatever the examples."""
        self.batch = self.batch or self.collator(examples)
        return dict(self.batch)


def first_examples(splits: Mapping[str, Any], num_train: int, num_others: int) -> dict[str, Any]:
    """The first examples of every split; a stream stays as it is."""
    return {
        name: split.select(range(min(len(split), num_train if name == "train" else num_others)))
        if isinstance(split, Dataset)
        else split
        for name, split in splits.items()
    }


def describe_batch(batch: dict[str, torch.Tensor], tokenizer: PreTrainedTokenizerBase, num_rows: int = 4) -> str:
    """A batch for reading: token ids as tokens, everything else as numbers, `num_rows` rows of each tensor."""
    lines = []
    for name, tensor in batch.items():
        lines.append(f"{name}  {tuple(tensor.shape)}  {str(tensor.dtype).removeprefix('torch.')}")
        is_tokens = name.endswith(("input_ids", "target_ids", "labels"))
        for row in tensor[:num_rows] if tensor.dim() > 1 else [tensor]:
            values = row.flatten().tolist()
            if is_tokens:
                values = [tokenizer.convert_ids_to_tokens(i) if i >= 0 else "_" for i in values]
            elif tensor.dtype == torch.bool:
                values = [int(value) for value in values]
            lines.append("    " + " ".join(f"{v:.3g}" if isinstance(v, float) else str(v) for v in values))
    return "\n".join(lines)
