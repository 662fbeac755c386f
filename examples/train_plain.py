"""A model trained in plain Python, without a config: lists of token ids, and the arguments of transformers.

`python examples/train_plain.py` learns in a minute on a CPU to write a short sequence of letters backwards.
"""

import random
import sys

import numpy as np
from transformers import TrainingArguments

from xlm_hf import EvaluationSet, XLMTrainer
from xlm_hf.building import token_options
from xlm_hf.data import as_dataset
from xlm_hf.modeling.mdlm import MDLMCollator, MDLMConfig, MDLMForMaskedDiffusion, MDLMLoss
from xlm_hf.tasks.tokenizers import symbol_tokenizer

LETTERS = "abcdefgh"


def examples(tokenizer, num: int, seed: int) -> list[dict[str, list[int]]]:
    """Sequences of letters, and the same backwards."""
    rng = random.Random(seed)
    prompts = [rng.choices(LETTERS, k=rng.randint(3, 6)) for _ in range(num)]
    return [
        {
            "prompt_ids": tokenizer.convert_tokens_to_ids(letters),
            "target_ids": tokenizer.convert_tokens_to_ids(letters[::-1]),
        }
        for letters in prompts
    ]


def exact_match(prediction) -> dict[str, float]:
    """The share of targets that were written without a mistake: `compute_metrics` of transformers."""
    pair = (prediction.predictions, prediction.label_ids)
    width = max(ids.shape[1] for ids in pair)
    written, wanted = (np.pad(ids, ((0, 0), (0, width - ids.shape[1])), constant_values=-100) for ids in pair)
    return {"exact_match": float((written == wanted).all(1).mean())}


def main(folder: str = "plain", steps: int = 1500) -> None:
    """Train in `folder`, measure, and write a prompt backwards."""
    tokenizer = symbol_tokenizer(LETTERS)
    config = MDLMConfig(
        **token_options(tokenizer),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
        learned_positions=True,
        initialization="fan_in",
    )
    model = MDLMForMaskedDiffusion(config)
    # Every text has 8 positions: by its end and the padding behind it the model says how long it is.
    options = {"max_length": 32, "kind": "seq2seq", "canvas_length": 8}
    decodes = EvaluationSet(
        "test",
        as_dataset(examples(tokenizer, 100, seed=2)),
        MDLMCollator(tokenizer, **options, prediction=True),
        stages=["test"],
        generate=True,
    )
    model.generation_config = model.generation_config.updated(max_new_tokens=8)
    trainer = XLMTrainer(
        model=model,
        args=TrainingArguments(
            folder, max_steps=steps, learning_rate=2e-3, per_device_train_batch_size=64, logging_steps=100
        ),
        loss=MDLMLoss(),
        data_collator=MDLMCollator(tokenizer, **options, mask_beta=3.0),
        train_dataset=examples(tokenizer, 5000, seed=0),
        eval_dataset=examples(tokenizer, 100, seed=1),
        evaluation_sets=[decodes],
        processing_class=tokenizer,
        compute_metrics=exact_match,
    )
    trainer.train()
    print(trainer.evaluate())
    print(trainer.evaluate(metric_key_prefix="test"))
    for record in trainer.predictions["test"][:3]:
        print(f"{record['prompt']}  ->  {record['prediction']}")


if __name__ == "__main__":
    main(*sys.argv[1:2], *map(int, sys.argv[2:3]))
