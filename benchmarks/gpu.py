"""On a GPU: compiled training steps in bfloat16, and generation, beside a plain compiled GPT-2 loop in the same run.

    python -m benchmarks.gpu

The backbone has GPT-2 small's size (12 layers, 768 wide, 12 heads, vocabulary 50,257), 16 rows of 1,024 tokens. The
utilisation is that of the operations a step executes, counted before it is compiled, against a matrix product in
bfloat16. Writes `benchmarks/results/speed/gpu.json`; a machine without a GPU is refused.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.cases import (
    FAMILIES,
    SPECIAL_IDS,
    build_collator,
    build_model,
    build_prompts,
    family_class,
    random_examples,
)
from benchmarks.measure import machine
from benchmarks.operations import executed
from benchmarks.run import RESULTS
from xlm_hf.data.static_shapes import collate_without_full_mask

SMALL = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}
OPTIONS = {"ilm": {"stopping_threshold": None}, "mlm": {"num_steps": 32}, "mdlm": {"num_steps": 32}}


def seconds(function: Callable[[], object], device: torch.device, repetitions: int) -> float:
    """Median wall time of a call, everything queued on the device included, after three that warm up."""

    def wait():
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    samples = []
    for number in range(repetitions + 3):
        wait()
        start = time.perf_counter()
        function()
        wait()
        if number >= 3:
            samples.append(time.perf_counter() - start)
    return statistics.median(samples)


def product_rate(device: torch.device, size: int) -> float:
    """Operations a second of a matrix product in bfloat16."""
    a, b = torch.randn(2, size, size, device=device, dtype=torch.bfloat16)
    return 2 * size**3 / seconds(lambda: a @ b, device, 20)


def training_step(model, loss: Callable, device: torch.device, compiled: bool) -> Callable[[], object]:
    """One step of AdamW on `loss(model)` in bfloat16 autocast; the forward and backward passes are compiled."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    called = torch.compile(model) if compiled else model

    def step():
        with torch.autocast(device.type, torch.bfloat16):
            value = loss(called)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def family_loss(family: str, rows: int, length: int, vocab_size: int, device: torch.device) -> Callable:
    """The family's mean loss of one batch, as a function of the model."""
    collator = build_collator(family, "lm", vocab_size, length)
    batch = collate_without_full_mask(collator, random_examples(rows, 0, length - 2, vocab_size))
    batch = {name: value.to(device) for name, value in batch.items()}
    loss = family_class(family, "Loss")()
    num_items = loss.num_items(batch)
    return lambda model: loss(model, batch).loss_sum / num_items


def gpt2(rows: int, length: int, vocab_size: int, device: torch.device, size: dict) -> tuple:
    """The GPT-2 of transformers in the same size, and its own loss on random tokens."""
    heads = {"n_embd": size["hidden_size"], "n_layer": size["num_hidden_layers"], "n_head": size["num_attention_heads"]}
    without = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    ends = {"bos_token_id": None, "eos_token_id": None}
    config = GPT2Config(vocab_size=vocab_size, n_positions=length, **heads, **without, **ends)
    ids = torch.randint(vocab_size, (rows, length), device=device)
    return GPT2LMHeadModel(config).to(device), lambda model: model(ids, labels=ids, use_cache=False).loss


def measure(
    device: torch.device,
    rows: int = 16,
    length: int = 1024,
    vocab_size: int = 50_257,
    size: dict = SMALL,
    product_size: int = 8192,
    repetitions: int = 20,
    compiled: bool = True,
) -> list[dict]:
    """Steps and generation of all families, and the step of GPT-2, one after the other."""
    rate, records = product_rate(device, product_size), []

    def record(what: str, step: Callable, tokens: int, repeated: int) -> None:
        spent = seconds(step, device, repeated)
        records.append({"what": what, "seconds": spent, "tokens_per_second": tokens / spent})

    cases = {"GPT-2": gpt2(rows, length, vocab_size, device, size)}
    for family in FAMILIES:
        model = build_model(family, vocab_size, length, **{**size, "suppress_tokens": [], "eos_token_id": 3}).to(device)
        cases[family] = model, family_loss(family, rows, length, vocab_size, device)
    for name, (model, loss) in cases.items():
        operations = executed(training_step(model.train(), loss, device, compiled=False))
        record(f"training {name}", training_step(model, loss, device, compiled), rows * length, repetitions)
        records[-1]["utilisation"] = operations / records[-1]["seconds"] / rate
    for family in FAMILIES:
        model = cases[family][0].eval().to(torch.bfloat16)
        prompts = build_prompts(family, [[]] * rows, vocab_size).to(device)
        given = {"do_sample": True, "seed": 0, "suppress_tokens": SPECIAL_IDS, **OPTIONS.get(family, {})}
        new = min(128, length - 2)
        record(
            f"generation {family}",
            lambda m=model, p=prompts, g=given, n=new: m.generate(p, max_new_tokens=n, **g),
            rows * new,
            min(3, repetitions),
        )
    return records


def main() -> None:
    """Measure, print and write."""
    if not torch.cuda.is_available():
        sys.exit("There is no GPU on this machine: `python -m benchmarks.run` measures the CPU.")
    records = measure(torch.device("cuda"))
    for record in records:
        print(", ".join(f"{k} {v:.4g}" if isinstance(v, float) else v for k, v in record.items()))
    result = {**machine(), "device": torch.cuda.get_device_name(), "records": records}
    (RESULTS / "gpu.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
