"""Examples per CPU second that the training collators make of lists of ids, on one thread.

The references follow the same laws with draws of their own: per row, in Python. Dense targets are for what a batch of
text with a vocabulary of 30,522 costs when targets have the size of the logits.
"""

import statistics

from benchmarks.cases import TWINS, build_collator, random_examples
from benchmarks.measure import cpu_seconds

BATCH = 64
# name: prompt, target, vocabulary, batches in a repetition
SETTINGS = {"star easy": (26, 8, 27, 10), "128 tokens, vocabulary 30,522": (0, 128, 30_522, 10)}
DENSE_SETTING = "128 tokens, vocabulary 30,522"
QUICK = {"32 tokens, vocabulary 1,000": (0, 32, 1_000, 10)}


def measure(family: str, setting: str, repetitions: int) -> dict:
    """Examples a second by method; dense only where it matters, and then one batch a repetition."""
    prompt, target, vocab_size, num_batches = {**SETTINGS, **QUICK}[setting]
    collator = build_collator(family, "seq2seq" if prompt else "lm", vocab_size)
    examples = random_examples(BATCH * num_batches, prompt, target, vocab_size)
    for example in examples:
        example["prompt_ids"] = example["prompt_ids"] if prompt else []
    batches = [examples[start : start + BATCH] for start in range(0, len(examples), BATCH)]
    reference = TWINS[family].slow_collation
    functions = {
        "ours": lambda: [collator(batch) for batch in batches],
        "plain": lambda: [reference(batch, vocab_size, dense=False) for batch in batches],
    }
    num = dict.fromkeys(functions, len(examples))
    if setting == DENSE_SETTING:
        functions["dense"], num["dense"] = lambda: reference(batches[0], vocab_size, dense=True), BATCH
    for function in functions.values():
        function()
    samples = cpu_seconds(functions, repetitions)
    speeds = {name: num[name] / statistics.median(values) for name, values in samples.items()}
    return {
        "family": family,
        "setting": setting,
        "examples_per_second": speeds,
        "ratios": {f"{name}/ours": speeds["ours"] / speed for name, speed in speeds.items() if name != "ours"},
    }
