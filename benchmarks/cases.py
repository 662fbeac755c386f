"""What is measured: one small model of each family, and random text of a given length.

Each family is measured against its slow twin, `tests/modeling/naive_<family>.py`, in two ways: *dense* and *plain*
(see `tests/modeling/naive.py`). A test holds that all three have the same losses and write the same samples.
"""

import importlib
import random
from importlib.util import find_spec
from types import ModuleType

import torch

from xlm_hf.families import families
from xlm_hf.tasks.tokenizers import number_tokenizer

NUM_SPECIAL = 7
SPECIAL_IDS = list(range(NUM_SPECIAL))
BACKBONE = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 2}


def _twins() -> dict[str, ModuleType]:
    names = {family: f"tests.modeling.naive_{family}" for family in families()}
    modules = {family: importlib.import_module(name) for family, name in names.items() if find_spec(name)}
    return {family: module for family, module in modules.items() if hasattr(module, "slow_sampler")}


TWINS = _twins()
FAMILIES = tuple(TWINS)


def family_class(family: str, name: str):
    """A class of a family, by the name that follows the family's own, e.g. `Loss`."""
    prefix = families()[family].config_class.__name__.removesuffix("Config")
    return getattr(importlib.import_module(f"xlm_hf.modeling.{family}"), prefix + name)


def build_model(family: str, vocab_size: int, max_positions: int = 256, **config):
    """A model of the family with seeded random weights, in evaluation mode, that writes no special ids."""
    torch.manual_seed(0)
    writes = {"suppress_tokens": SPECIAL_IDS, "eos_token_id": None}
    options = {**BACKBONE, "max_position_embeddings": max_positions, **writes, **config}
    registered = families()[family]
    return registered.model_class(registered.config_class(vocab_size=vocab_size, **options)).eval()


def build_collator(family: str, kind: str, vocab_size: int, max_positions: int = 256, **options):
    """The family's collator of a kind of task, e.g. "seq2seq"."""
    return family_class(family, "Collator")(number_tokenizer(vocab_size - NUM_SPECIAL), max_positions, kind, **options)


def build_prompts(family: str, prompts: list[list[int]], vocab_size: int) -> torch.Tensor:
    """What the family's `generate` is given for prompts of one length."""
    examples = [{"prompt_ids": ids, "example_id": n} for n, ids in enumerate(prompts)]
    return build_collator(family, "seq2seq", vocab_size, prediction=True)(examples)["input_ids"]


def random_examples(num: int, prompt: int, target: int, vocab_size: int) -> list[dict]:
    """Examples with `prompt` and `target` random ids; `input_ids`, for plain text, are those of the target."""
    draw = random.Random(0)

    def ids(length: int) -> list[int]:
        return [draw.randrange(NUM_SPECIAL, vocab_size) for _ in range(length)]

    return [
        {"prompt_ids": ids(prompt), "target_ids": (row := ids(target)), "input_ids": row}
        | {"example_id": n, "epoch": 0, "position": n}
        for n in range(num)
    ]


def end_at_given_lengths(model) -> None:
    """Make an insertion model stop a row when it has written as many tokens as its prompt `[CLS] id [BOS]` says.

    An untrained stopping head ends all rows alike; this one ends them at lengths of their own, id - NUM_SPECIAL, and so
    shows what finished rows cost.
    """

    def hook(module, args, kwargs, outputs):
        ids, mask = args[0], kwargs["attention_mask"].long()
        first = mask.argmax(dim=-1, keepdim=True)
        complete = mask.sum(dim=-1) - 3 >= ids.gather(-1, first + 1).squeeze(-1) - NUM_SPECIAL
        outputs.stop_logits = torch.where(complete[:, None], torch.tensor([1.0, -1.0]), torch.tensor([-1.0, 1.0]))
        return outputs

    model.register_forward_hook(hook, with_kwargs=True)
