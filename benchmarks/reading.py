"""How fast texts are prepared and read, and in how much memory: `python benchmarks/reading.py`.

Written to `benchmarks/results/reading.json`: tokens prepared in a second by one process, the peak of the memory for two
sizes of the corpus, and the examples of 128 tokens that one process reads in a second, map-style and as a stream.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from xlm_hf.data import keyed
from xlm_hf.tasks import load_task

WORDS = ["the", "of", "and", "to", "in", "a", "is", "that", "for", "it", "as", "was", "with", "be", "by", "on"]
NUM_READ = 100_000


def prepare(folder: Path, num_documents: int) -> dict[str, float]:
    """Write a corpus of `num_documents` lines of 100 words, prepare it in chunks, and measure."""
    draws = torch.Generator().manual_seed(0)
    with (folder / "corpus.txt").open("w") as file:
        for _ in range(num_documents):
            words = torch.randint(len(WORDS), (100,), generator=draws).tolist()
            file.write(" ".join(WORDS[word] for word in words) + "\n")
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    task = load_task("text", path=str(folder / "corpus.txt"), cache_dir=folder / "cache", protocol="packed")
    seconds = time.perf_counter() - start
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    train = task.splits["train"]
    speeds = {"tokens_per_second": 100 * num_documents / seconds, "peak_memory_growth_mib": grown / 1024}
    if num_documents > 100_000:
        for name, data in (("map_style", train), ("stream", train.to_iterable_dataset(num_shards=64))):
            examples = keyed(data)
            sampler = examples.order(0, 64)
            loader = iter(DataLoader(examples, batch_size=64, sampler=sampler, collate_fn=len))
            next(loader)
            start = time.perf_counter()
            read = sum(next(loader) for _ in range(NUM_READ // 64))
            speeds[f"{name}_examples_per_second"] = read / (time.perf_counter() - start)
    return speeds


def main() -> None:
    """Measure each size in a process of its own, since a peak of memory is never forgotten."""
    if len(sys.argv) == 2:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(prepare(Path(folder), int(sys.argv[1]))))
        return
    results = {}
    for num_documents in (50_000, 200_000):
        command = [sys.executable, __file__, str(num_documents)]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        results[f"{num_documents} documents"] = json.loads(output.strip().splitlines()[-1])
    Path(__file__).with_name("results").joinpath("reading.json").write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
