"""What each optimisation brings: the dense reference, and one saving more from rung to rung, up to the library."""

from collections.abc import Callable, Iterator
from unittest import mock

from benchmarks import generation, training
from benchmarks.cases import FAMILIES, TWINS
from benchmarks.generation import Setting
from benchmarks.measure import compare
from xlm_hf.objectives import head_operator

TRAINING = "16 x 128, vocabulary 30,522"
GENERATION = [
    Setting("64 rows that end at 2 to 64", "ilm", rows=64, length=64, ragged=True),
    Setting("128 tokens", "arlm"),
    Setting("32 steps, vocabulary 30,522", "mlm", length=64, vocab_size=30_522, options={"num_steps": 32}),
    Setting("1,024 steps", "mdlm", length=64, options={"num_steps": 1024}),
]


def _training_rungs(family: str) -> dict[str, Callable]:
    steps = training.steps(family, TRAINING, ("ours", "dense", "plain", "unpadded"))

    def at_once():
        with mock.patch.object(head_operator, "rows_per_chunk", return_value=2**62):
            steps["ours"]()

    return {
        "dense": steps["dense"],
        "+ gather": steps["plain"],
        "+ no padding to the block": steps["unpadded"],
        "+ head where there is a loss": at_once,
        "ours": steps["ours"],
    }


def measure(repetitions: int) -> Iterator[dict]:
    """CPU seconds of every rung, for each family's step and sampler."""
    for family in FAMILIES:
        rungs = _training_rungs(family)
        for function in rungs.values():
            function()
        yield {"what": "training", "family": family, "setting": TRAINING, **compare(rungs, repetitions)}
    for setting in GENERATION:
        ladder = TWINS[setting.family].LADDER
        savings = {f"+ {ladder[n - 1]}" if n else "dense": ladder[:n] for n in range(len(ladder) + 1)}
        result = compare(generation.functions(setting, savings), min(repetitions, 3))
        yield {"what": "generation", "family": setting.family, "setting": setting.name, **result}
