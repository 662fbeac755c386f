"""Examples per CPU second that the training collators make of lists of ids, one thread.

    OMP_NUM_THREADS=1 python benchmarks/collation.py

Batches of 64: star easy (26 + 8 ids, 27 words) and text (128 ids, 30,000 words). The median of five rounds goes to
`benchmarks/results/collation.json`.
"""

import json
import platform
import random
import statistics
import subprocess
import time
from pathlib import Path

import torch
from hydra.utils import get_class

from xlm_hf.tasks.star import number_tokenizer

BATCH, BATCHES, ROUNDS = 64, 30, 5
COLLATORS = {
    "ilm": ("xlm_hf.modeling.ilm.ILMCollatorForSeq2Seq", "xlm_hf.modeling.ilm.ILMCollatorForLanguageModeling"),
    "mlm": ("xlm_hf.modeling.mlm.MLMCollatorForSeq2Seq", "xlm_hf.modeling.mlm.MLMCollatorForLanguageModeling"),
    "arlm": ("xlm_hf.modeling.arlm.ARLMCollatorForSeq2Seq", "xlm_hf.modeling.arlm.ARLMCollatorForLanguageModeling"),
}


def batches(prompt: int, target: int, words: int) -> list[list[dict]]:
    """Random examples with `prompt` and `target` ids each."""
    draw = random.Random(0)

    def ids(length):
        return [draw.randrange(7, 7 + words) for _ in range(length)]

    return [
        [
            {"prompt_ids": ids(prompt), "target_ids": (row := ids(target)), "input_ids": row}
            | {"example_id": n, "epoch": 0, "position": n}
            for n in range(start, start + BATCH)
        ]
        for start in range(0, BATCH * BATCHES, BATCH)
    ]


def examples_per_second(collator, data: list[list[dict]]) -> float:
    """Median over the rounds."""
    speeds = []
    for _ in range(ROUNDS):
        start = time.process_time()
        for examples in data:
            collator(examples)
        speeds.append(BATCH * len(data) / (time.process_time() - start))
    return statistics.median(speeds)


def main() -> None:
    """Measure, print and write."""
    torch.set_num_threads(1)
    star, text = batches(26, 8, 20), batches(0, 128, 30_000)
    results: dict = {}
    for family, (seq2seq, language_modeling) in COLLATORS.items():
        results[family] = {
            "star_easy": examples_per_second(get_class(seq2seq)(number_tokenizer(20), 64), star),
            "text_128": examples_per_second(get_class(language_modeling)(number_tokenizer(30_000), 160), text),
        }
        print(family, {name: f"{speed:,.0f}" for name, speed in results[family].items()})
    results["commit"] = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], text=True).strip()
    results["device"] = f"{platform.machine()} CPU, 1 thread, torch {torch.__version__}"
    results["command"] = "OMP_NUM_THREADS=1 python benchmarks/collation.py"
    (Path(__file__).parent / "results" / "collation.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
