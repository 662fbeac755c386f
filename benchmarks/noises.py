"""The diffusion families beside one another: a training step of each in turns, its peak memory, and a cache of blocks.

A step is `benchmarks.training`'s: loss, backward and AdamW on the same texts with one backbone. So its ratio to a step
of masked diffusion is what the noise of a family costs.
"""

from benchmarks import training
from benchmarks.cases import build_model, build_prompts
from benchmarks.measure import cpu_seconds, run_child
from xlm_hf.families import families

REFERENCE = "mdlm"
STEPS = "16 x 128, vocabulary 30,522"
VOCABULARY, ROWS, LENGTH, BLOCK = 30_522, 16, 256, 16


def noises() -> tuple[str, ...]:
    """The families whose texts are canvases under noise, the reference first."""
    return (REFERENCE, *(name for name in ("bd3lm", "udlm", "sedd", "gidd") if name in families()))


def training_steps(setting: str, repetitions: int, with_memory: bool) -> dict:
    """CPU seconds of a step of each family, and the largest resident set of a process that makes two, in bytes."""
    names = noises()
    functions = {name: training.steps(name, setting, ("ours",))["ours"] for name in names}
    for function in functions.values():
        function()
    samples = cpu_seconds(functions, repetitions)
    record: dict = {"setting": f"training step, {setting}", **_beside(samples, REFERENCE)}
    if with_memory:
        printed = {name: run_child("-m", "benchmarks.training", name, setting, "ours").stdout.split() for name in names}
        record["peak_bytes"] = {name: int(peak) for name, (_, peak) in printed.items()}
        peaks = record["peak_bytes"]
        record["ratios"] |= {f"peak {name}/{REFERENCE}": peaks[name] / peaks[REFERENCE] for name in names[1:]}
    return record


def cached_blocks(rows: int, length: int, block_length: int, vocab_size: int, repetitions: int) -> dict:
    """CPU seconds of block diffusion that writes `rows` x `length` tokens in blocks, with its cache and without."""
    model = build_model("bd3lm", vocab_size, length + 8, block_length=block_length)
    prompts = build_prompts("bd3lm", [[20, 21]] * rows, vocab_size)
    options = {"max_new_tokens": length, "sampler": "first_hitting", "do_sample": True, "seed": 0}
    functions = {
        name: lambda use_cache=use_cache: model.generate(prompts, use_cache=use_cache, **options)
        for name, use_cache in (("cached", True), ("uncached", False))
    }
    setting = f"generation, {rows} x {length} tokens in blocks of {block_length}, vocabulary {vocab_size:,}"
    return {"family": "bd3lm", "setting": setting, **_beside(cpu_seconds(functions, repetitions), "cached")}


def _beside(samples: dict[str, list[float]], reference: str) -> dict:
    """The least CPU seconds of each, which other programs disturb least, and how many times those of the reference."""
    seconds = {name: min(values) for name, values in samples.items()}
    ratios = {f"{name}/{reference}": seconds[name] / seconds[reference] for name in seconds if name != reference}
    return {"cpu_seconds": seconds, "ratios": ratios, "samples": samples}
