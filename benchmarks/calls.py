"""What is measured in turns (see `benchmarks.paired`): a batch or an optimiser step, by us or by transformers.

    python -m benchmarks.calls generation arlm rows=16 length=128 vocab_size=1000 do_sample=true top_p=0.5
    python -m benchmarks.calls generation gpt2 rows=16 length=128 vocab_size=1000 do_sample=true top_p=0.5
    python -m benchmarks.calls training mdlm rows=64 length=42 vocab_size=27 dropout=0.1 bf16=true

A name that is no family is a `model_type` of transformers. All models have 4 layers of width 128 with 2 heads.
"""

import argparse
import json
from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

from benchmarks.cases import (
    BACKBONE,
    NUM_SPECIAL,
    build_collator,
    build_model,
    build_prompts,
    family_class,
    random_examples,
)
from benchmarks.paired import take_turns
from xlm_hf.families import families

# What a gated block needs to have the weights of a plain one, rounded up to whole vectors.
GATED_SIZE = 344
SETTINGS: dict[str, Any] = {"rows": 16, "length": 128, "vocab_size": 1_000}
TRAINING: dict[str, Any] = {"prompt": 0, "dropout": 0.0, "bf16": False}


def generation(name: str, rows: int, length: int, vocab_size: int, **options: Any) -> Callable[[], object]:
    """Write `rows` sequences of `length` tokens from nothing, with options of `generate`."""
    torch.set_grad_enabled(False)
    if name in families():
        model = build_model(name, vocab_size, length + 3, **options.pop("model", {}))
        prompts = build_prompts(name, [[]] * rows, vocab_size)
        return lambda: model.generate(prompts, max_new_tokens=length, **{"seed": 0, **options})
    model = transformers_model(name, vocab_size, length + 3).eval()
    prompts = torch.full((rows, 1), NUM_SPECIAL)
    options = {"do_sample": False, "top_k": 0, "pad_token_id": 0, **options}
    return lambda: model.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=length, **options)


def transformers_model(name: str, vocab_size: int, max_positions: int, dropout: float = 0.0) -> Any:
    """A model of transformers in the size of ours, with seeded random weights, that ends no text."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, vocab_size=vocab_size, bos_token_id=None, eos_token_id=None)
    config.update({"max_position_embeddings": max_positions, **BACKBONE})
    for key, value in vars(config).items():
        if key.endswith(("_pdrop", "dropout_prob", "_dropout")) and value is not None:
            setattr(config, key, dropout)
    if hasattr(config, "num_key_value_heads"):
        config.num_key_value_heads = config.num_attention_heads
    if hasattr(config, "intermediate_size"):
        config.intermediate_size = GATED_SIZE if getattr(config, "hidden_act", "") == "silu" else 4 * config.hidden_size
    is_masked = type(config) in AutoModelForMaskedLM._model_mapping
    return (AutoModelForMaskedLM if is_masked else AutoModelForCausalLM).from_config(config)


def training(
    name: str, rows: int, length: int, vocab_size: int, prompt: int, dropout: float, bf16: bool, **options: Any
) -> Callable[[], object]:
    """One step of AdamW on random tokens: rows of `length`, of which `prompt` carry no loss; bf16 by autocast."""
    if name in families():
        examples = random_examples(rows, prompt, length - prompt - 2, vocab_size)
        batch = build_collator(name, "seq2seq" if prompt else "lm", vocab_size, length)(examples)
        dropouts = {"hidden_dropout_prob": dropout, "attention_dropout": dropout}
        model = build_model(name, vocab_size, length, suppress_tokens=[], **{**dropouts, **options}).train()
        loss = family_class(name, "Loss")()

        def mean() -> Any:
            return loss(model, batch).loss_sum / loss.num_items(batch)
    else:
        model = transformers_model(name, vocab_size, length, dropout).train()
        ids = torch.randint(NUM_SPECIAL, vocab_size, (rows, length))
        labels = ids.clone()
        labels[:, :prompt] = -100

        def mean() -> Any:
            return model(ids, labels=labels).loss

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            value = mean()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def main() -> None:
    """Take turns with what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("generation", "training"))
    parser.add_argument("name")
    parser.add_argument("options", nargs="*", metavar="OPTION=VALUE")
    given = parser.parse_args()
    pairs = (option.split("=", 1) for option in given.options)
    options = {key: json.loads(value) for key, value in pairs}
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    if given.what == "generation":
        take_turns(generation(given.name, **{**SETTINGS, **options}))
    else:
        take_turns(training(given.name, **{**SETTINGS, **TRAINING, **options}), warm_up=3)


if __name__ == "__main__":
    main()
