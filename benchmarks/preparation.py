"""What comes before training: importing the library, and preparing a data set."""

import statistics
import tempfile

from benchmarks.measure import run_child

_IMPORTS = {
    "import xlm_hf": "import xlm_hf",
    "from transformers import AutoModel, PreTrainedModel": "from transformers import AutoModel, PreTrainedModel",
}
_TIMED = "import time; start = time.process_time(); {}; print(time.process_time() - start)"
_PREPARE = """
import time
from xlm_hf import load_task
start = time.process_time()
task = load_task("star_easy", cache_dir={!r}, num_train={})
print(sum(map(len, task.splits.values())) / (time.process_time() - start))
"""


def import_times(repetitions: int) -> dict[str, float]:
    """Median CPU seconds of an import in a fresh process, beside that of transformers' base classes."""
    samples: dict[str, list[float]] = {name: [] for name in _IMPORTS}
    for _ in range(repetitions):
        for name, statement in _IMPORTS.items():
            samples[name].append(float(run_child("-c", _TIMED.format(statement)).stdout))
    return {name: statistics.median(values) for name, values in samples.items()}


def preparation_speeds(num_train: int) -> dict[str, float]:
    """Examples of star easy a second, made and written to an empty cache, and then found in it."""
    with tempfile.TemporaryDirectory() as folder:
        program = _PREPARE.format(folder, num_train)
        return {name: float(run_child("-c", program).stdout) for name in ("from nothing", "from the cache")}
