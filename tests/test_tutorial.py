"""The tutorial, followed to the letter: a family of one's own, trained, exported and compared.

Only the sizes are smaller, and the package goes into a folder on the path instead of the environment.
"""

import csv
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

from tests.processes import forked, python
from tests.test_docs import FEW_GRAPHS, SMALLEST, TUTORIAL, blocks

ROOT = Path(__file__).parent.parent
SMALLER = [f"{key}={value}" for key, value in {**SMALLEST, **FEW_GRAPHS}.items()]
# Of a comparison the budget gives the steps, and one seed and two families stand for all.
SMALLER_COMPARISON = [word for word in SMALLER if not word.startswith("trainer.max_steps")]
SMALLER_COMPARISON += ["budget.steps=2", "seeds=[0]", "~families.ilm"]


def command_of(line):
    """What is run for a line of the page: the same with the smallest sizes."""
    words = shlex.split(line)
    if words[:2] == ["pip", "install"]:
        # An editable install is a link to the source, which is on the path instead; this brings the entry point.
        options = ["-q", "--no-deps", "--no-build-isolation", "--target", "site"]
        return [sys.executable, "-m", "pip", "install", *options, f"./{words[-1]}"]
    if words[0] == "pytest":
        return forked("-m", "pytest", "-q", *words[1:])
    assert words[0] == "xlm-hf", line
    smaller = [*SMALLER_COMPARISON, f"launcher=[{python()}]"] if "ordering_families" in words else SMALLER
    kept = [word for word in words[1:] if word.split("=")[0] not in [option.split("=")[0] for option in smaller]]
    added = [] if words[1] == "scaffold" else smaller
    return forked(ROOT / "examples" / "run_xlm.py", *kept, *added)


def follow(folder):
    """Write the files of the page and run its commands in their order; what the Python of the page printed."""
    paths = [folder / "my_model", folder / "site", ROOT]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"}

    def run(command, env=environment):
        ended = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
        assert ended.returncode == 0, f"{command}\n{ended.stdout}\n{ended.stderr}"
        return ended.stdout

    printed = []
    for not_run, language, title, text in blocks(TUTORIAL):
        if title is not None:
            (folder / title).parent.mkdir(parents=True, exist_ok=True)
            (folder / title).write_text(text)
        elif not_run is None and language == "bash":
            for line in text.splitlines():
                run(command_of(line))
        elif not_run is None and language == "python":
            # As where nothing of ours is on the path.
            printed.append(run(forked("-c", text), {**environment, "PYTHONPATH": ""}))
    return printed


def first_loss(run):
    """The validation loss after the first evaluation: with one seed, only the formula makes a difference by then."""
    history = json.loads((run / "checkpoint-2" / "trainer_state.json").read_text())["log_history"]
    return next(log["validation/loss"] for log in history if "validation/loss" in log)


def test_it_ends_with_a_compared_model_of_ones_own(tmp_path):
    printed = follow(tmp_path)
    run = tmp_path / "runs" / "first"
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["steps"] == int(SMALLEST["trainer.max_steps"])
    assert metrics["test/samples"] == int(FEW_GRAPHS["task.num_test"])
    assert json.loads((run / "model" / "config.json").read_text())["model_type"] == "my_model"
    assert (run / "model" / "modeling_my_model.py").exists()
    assert "7 3 19 0 4 12 5 11 [BOS]" in printed[0]
    assert len(list((tmp_path / "runs" / "first_decodes" / "predictions").glob("*.jsonl"))) == 1
    comparison = tmp_path / "runs" / "ordering"
    table = (comparison / "results.md").read_text()
    assert "| my_model |" in table
    assert "| cross_entropy |" in table
    assert "| my_model | num_steps=3 |" in table
    rows = {row["family"]: row for row in csv.DictReader((comparison / "results.csv").open())}
    assert {row["steps"] for row in rows.values()} == {"2"}
    assert first_loss(comparison / "my_model_ordering_0") < first_loss(comparison / "cross_entropy_ordering_0")
    assert (comparison / "quality_steps.png").exists()
    assert (comparison / "quality_nfe.png").exists()
