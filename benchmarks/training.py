"""One optimiser step - loss, backward, AdamW - of every family on one thread, and its peak memory.

    python -m benchmarks.training FAMILY SETTING METHOD

prints the memory of a process before the first step and its peak after two, in bytes.
"""

import sys

import torch

from benchmarks.cases import TWINS, build_collator, build_model, family_class, random_examples
from benchmarks.measure import compare, memory, run_child

# name: rows, prompt, target, vocabulary
SETTINGS = {
    "16 x 128, vocabulary 30,522": (16, 0, 126, 30_522),
    "star easy, 64 x 42": (64, 26, 14, 27),
    "4 x 512, vocabulary 30,522": (4, 0, 510, 30_522),
    "1 x 2,048, vocabulary 30,522": (1, 0, 2046, 30_522),
}
QUICK = {"16 x 64, vocabulary 8,000": (16, 0, 62, 8_000)}
METHODS = ("ours", "dense", "plain")


def steps(family: str, setting: str, methods: tuple[str, ...] = METHODS) -> dict:
    """A function for each method that makes one step on the same batch; "unpadded" is plain without the padding."""
    rows, prompt, target, vocab_size = {**SETTINGS, **QUICK}[setting]
    block = prompt + target + 2
    kind = "seq2seq" if prompt else "lm"
    collator = build_collator(family, kind, vocab_size, block)
    batch = collator(random_examples(rows, prompt, target, vocab_size))
    loss = family_class(family, "Loss")()

    def step(method: str, model, optimizer) -> None:
        if method == "ours":
            loss_sum = loss(model, batch).loss_sum
        else:
            columns = batch["input_ids"].shape[1] if method == "unpadded" else block
            loss_sum = TWINS[family].slow_loss(model, batch, columns, dense=method == "dense")
        (loss_sum / loss.num_items(batch)).backward()
        optimizer.step()
        optimizer.zero_grad()

    functions = {}
    for method in methods:
        model = build_model(family, vocab_size, block, suppress_tokens=[]).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        functions[method] = lambda method=method, model=model, optimizer=optimizer: step(method, model, optimizer)
    return functions


def measure(family: str, setting: str, repetitions: int, with_memory: bool = True) -> dict:
    """CPU seconds of a step, operations, peak memory, and what of it came with the steps, in bytes."""
    functions = steps(family, setting)
    for function in functions.values():
        function()
    record = {"family": family, "setting": setting, **compare(functions, repetitions)}
    if with_memory:
        printed = {m: run_child("-m", "benchmarks.training", family, setting, m).stdout.split() for m in METHODS}
        record["peak_bytes"] = {method: int(peak) for method, (_, peak) in printed.items()}
        record["step_bytes"] = {method: int(peak) - int(before) for method, (before, peak) in printed.items()}
    return record


if __name__ == "__main__":
    family, setting, method = sys.argv[1:]
    torch.set_num_threads(1)
    step = steps(family, setting, (method,))[method]
    before = memory("VmRSS")
    step()
    step()
    print(before, memory())
