"""Generation of whole batches on one thread: every family, its samplers, vocabularies and lengths."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from benchmarks.cases import NUM_SPECIAL, TWINS, build_model, build_prompts, end_at_given_lengths
from benchmarks.measure import compare


@dataclass
class Setting:
    """What is written: `rows` sequences of `length` tokens, with the options of the family's `generate`.

    `ragged` rows end at lengths spread evenly up to `length`; `references` says whether the references, which take
    minutes at some settings, are measured too; all are measured `repetitions` times.
    """

    name: str
    family: str
    rows: int = 16
    length: int = 128
    vocab_size: int = 1_000
    options: dict = field(default_factory=dict)
    ragged: bool = False
    references: bool = True
    repetitions: int = 3


BIG = "vocabulary 30,522"
UNTIL_FULL = {"stopping_threshold": None}
SETTINGS = [
    Setting("1,024 steps", "mdlm", length=64, options={"num_steps": 1024}, repetitions=1),
    Setting("128 steps", "mdlm", options={"num_steps": 128}),
    Setting("32 steps", "mdlm", options={"num_steps": 32}),
    Setting("one insertion a step, rows that end at 2 to 128", "ilm", rows=64, ragged=True, repetitions=1),
    Setting("one insertion a step", "ilm", options=UNTIL_FULL),
    Setting("128 steps", "flexmdm", options={"num_steps": 128}),
    Setting("128 steps", "edit_flow", options={"num_steps": 128}),
    Setting("latency of one row, 128 steps", "edit_flow", rows=1, options={"num_steps": 128}),
    Setting("one token a step, 256 tokens", "arlm", rows=4, length=256),
    Setting("one token a step", "arlm"),
    Setting("128 steps", "mlm", options={"num_steps": 128}),
    Setting("32 steps", "mlm", options={"num_steps": 32}),
    Setting(f"{BIG}, one insertion a step", "ilm", 16, 32, 30_522, UNTIL_FULL, repetitions=1),
    Setting(f"{BIG}, one token a step", "arlm", length=32, vocab_size=30_522, repetitions=1),
    Setting(f"{BIG}, 32 steps", "mlm", length=64, vocab_size=30_522, options={"num_steps": 32}, repetitions=1),
    Setting(f"{BIG}, 32 steps", "mdlm", length=64, vocab_size=30_522, options={"num_steps": 32}, repetitions=1),
    Setting("latency of one row", "ilm", rows=1, options=UNTIL_FULL),
    Setting("latency of one row", "arlm", rows=1),
    Setting("latency of one row, 32 steps", "mlm", rows=1, options={"num_steps": 32}),
    Setting("latency of one row, 32 steps", "mdlm", rows=1, options={"num_steps": 32}),
    Setting(f"{BIG}, one token a step", "arlm", vocab_size=30_522, references=False, repetitions=1),
    Setting(f"{BIG}, 32 steps", "mlm", vocab_size=30_522, options={"num_steps": 32}, references=False, repetitions=1),
    Setting(f"{BIG}, one insertion a step", "ilm", 16, 128, 30_522, UNTIL_FULL, references=False, repetitions=1),
    Setting("64 steps", "mlm", 1, 2_048, options={"num_steps": 64}, references=False),
    Setting("64 steps", "mdlm", 1, 2_048, options={"num_steps": 64}, references=False),
    Setting("one token a step", "arlm", 1, 2_048, references=False),
    Setting("one insertion a step", "ilm", 1, 512, options=UNTIL_FULL, references=False),
]
QUICK = [
    Setting("8 rows of 32, ragged", "ilm", rows=8, length=32, ragged=True),
    Setting("8 rows of 64", "arlm", rows=8, length=64),
    Setting("8 rows of 32, 8 steps, vocabulary 8,000", "mlm", 8, 32, 8_000, {"num_steps": 8}),
    Setting("8 rows of 32, 32 steps", "flexmdm", rows=8, length=32, options={"num_steps": 32}),
    Setting("8 rows of 32, 32 steps", "edit_flow", rows=8, length=32, options={"num_steps": 32}),
    Setting("8 rows of 32, 256 steps", "mdlm", rows=8, length=32, options={"num_steps": 256}),
]


REFERENCES: dict[str, tuple[str, ...]] = {"dense": (), "plain": ("gather",)}


def functions(setting: Setting, references: dict[str, tuple[str, ...]]) -> dict[str, Callable]:
    """Functions that all write the same sequences: "ours", and the references by name with their savings."""
    model = build_model(setting.family, setting.vocab_size, setting.length + 3)
    prompts: list[list[int]] = [[]] * setting.rows
    if setting.ragged:
        end_at_given_lengths(model)
        prompts = [[int(end) + NUM_SPECIAL] for end in torch.linspace(2, setting.length, setting.rows)]
    ids = build_prompts(setting.family, prompts, setting.vocab_size)

    def ours():
        options = {"do_sample": True, "return_dict_in_generate": True, **setting.options}
        return model.generate(ids, max_new_tokens=setting.length, seed=0, **options)

    def reference(savings):
        sampler = TWINS[setting.family].slow_sampler
        return sampler(model, ids, setting.length, True, 0, savings, **setting.options)

    return {"ours": ours} | {name: lambda s=savings: reference(s) for name, savings in references.items()}


def measure(setting: Setting) -> dict:
    """CPU seconds and operations by method, and of ours the forward passes and the tokens a second."""
    methods = functions(setting, REFERENCES if setting.references else {})
    output = methods["ours"]()
    result = compare(methods, setting.repetitions)
    seconds, written = result["cpu_seconds"]["ours"], int((output.tokens_per_forward * output.nfe).sum().round())
    return {
        "family": setting.family,
        "setting": setting.name,
        "rows": setting.rows,
        "length": setting.length,
        "vocab_size": setting.vocab_size,
        **result,
        "nfe": output.nfe.double().mean().item(),
        "sequences_per_second": setting.rows / seconds,
        "tokens_per_second": written / seconds,
    }
