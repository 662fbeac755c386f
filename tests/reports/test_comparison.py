"""A comparison as a person runs it: killed, resumed, changed, and with a run that fails."""

import csv
import json
import multiprocessing
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from tests.processes import forked, python, settle
from xlm_hf.cli import main
from xlm_hf.commands import compare as compare_command
from xlm_hf.reports import comparison

SCRIPT = str(Path(__file__).parents[2] / "examples" / "run_xlm.py")
CONFIG = """
defaults: [compare, _self_]
budget: {steps: 4}
families:
  ilm: [train_collator.drop_beta=2]
  diffusion: [--config-name=mdlm_star]
tasks: {star: [task=star_easy, task.num_train=40, task.num_validation=4, task.num_test=6]}
seeds: [0, 1]
nfe_sweep: {diffusion: [[generation.confidence_threshold=null, generation.num_steps=2]]}
overrides: [trainer.eval_steps=2]
quality: [loss, exact_match]
parallel: 2
"""
CELLS = ["diffusion_star_0", "diffusion_star_1", "ilm_star_0", "ilm_star_1"]


def compare(folder, *overrides):
    options = ["--config-name=mine", "size=tiny", "output_dir=out", f"launcher=[{python()}]"]
    return [SCRIPT, f"--config-dir={folder}", *options, *overrides]


def call(folder, monkeypatch, capsys, *overrides):
    """Run a comparison in this process; what it printed, and the sentence in which it ended or None."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", compare(folder, *overrides))
    sentence = None
    try:
        main()
    except SystemExit as stopped:
        sentence = stopped.code
    out, err = capsys.readouterr()
    return out, err.strip().splitlines()[-1] if sentence == 2 else sentence


def metrics_of(folder):
    return {file.parent.name: json.loads(file.read_text()) for file in folder.glob("out/*/metrics.json")}


def test_a_comparison_is_killed_resumed_changed_and_extended(tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.yaml").write_text(CONFIG)
    process = subprocess.Popen(forked(*compare(tmp_path)), cwd=tmp_path)
    deadline = time.monotonic() + 120
    while not metrics_of(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.kill()
    process.wait()
    settle()
    before = {name: (tmp_path / "out" / name / "metrics.json").stat().st_mtime_ns for name in metrics_of(tmp_path)}
    assert 0 < len(before) < 4
    assert not (tmp_path / "out" / "results.csv").exists()

    printed, sentence = call(tmp_path, monkeypatch, capsys)
    assert sentence is None, printed
    assert f"4 runs, {len(before)} of them done" in printed
    assert "4 of 4 runs done, 0 running, about 0 minutes to go" in printed
    metrics = metrics_of(tmp_path)
    assert sorted(metrics) == CELLS
    for name, written in before.items():
        assert (tmp_path / "out" / name / "metrics.json").stat().st_mtime_ns == written
    _check_tables(tmp_path / "out", metrics)

    _, sentence = call(tmp_path, monkeypatch, capsys, "trainer.learning_rate=0.1")
    assert re.fullmatch(r"Error: \S+ was run with trainer.learning_rate=0.001 and not 0.1: .*", sentence)
    _, sentence = call(tmp_path, monkeypatch, capsys, "budget.steps=5")
    assert "was run with trainer.max_steps=4 and not 5" in sentence
    _, sentence = call(tmp_path, monkeypatch, capsys, "eval_model=./judge")
    assert "was run with eval_model=None and not ./judge" in sentence

    (tmp_path / "out" / "results.csv").unlink()
    printed, sentence = call(
        tmp_path, monkeypatch, capsys, "families.broken=['family=mlm','model.hidden_size=33']", "seeds=[1]"
    )
    assert sentence.startswith("Error: 1 of the runs failed (broken_star_1)")
    assert "broken_star_1: failed with exit status 2" in printed
    assert "Error: hidden_size (33) must be a multiple of num_attention_heads (2)" in printed
    with (tmp_path / "out" / "results.csv").open() as file:
        assert sorted(row["family"] for row in csv.DictReader(file)) == ["diffusion", "ilm"]


def _check_tables(out, metrics):
    with (out / "results.csv").open() as file:
        rows = {f"{row['family']}_{row['task']}_{row['seed']}": row for row in csv.DictReader(file)}
    assert sorted(rows) == CELLS
    for name, row in rows.items():
        assert {key: float(row[key]) for key in metrics[name]} == metrics[name]
        assert metrics[name]["steps"] == 4
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in (out / "results.md").read_text().splitlines()]
    columns = next(line for line in table if "family" in line)
    for family in ("ilm", "diffusion"):
        first, second = (metrics[f"{family}_star_{seed}"]["test/loss"] for seed in (0, 1))
        mean, deviation = (first + second) / 2, abs(first - second) / 2**0.5
        line = next(line for line in table if line[:1] == [family])
        assert line[columns.index("test/loss")] == f"{mean:.4g} ± {deviation:.2g}"
        assert line[columns.index("steps")] == "4"
    with (out / "results_nfe.csv").open() as file:
        points = [(row["family"], row["options"], float(row["test/nfe"])) for row in csv.DictReader(file)]
    assert sorted(points)[:2] == [("diffusion", "num_steps=2", 2.0)] * 2
    for name in ("quality_steps.png", "quality_nfe.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["budget.tokens=7"], "A comparison has one budget of steps, tokens, seconds, and this one has 2."),
        (["seeds=[]"], "There is nothing to compare"),
        (["nfe_sweep.difusion=[]"], "nfe_sweep has no option 'difusion': did you mean 'diffusion'?"),
        (["size=tinyy"], "There is no size 'tinyy': did you mean 'tiny'?"),
        (["families.x=[]"], "There is no family 'x'"),
        (["tasks.star_esy=[]"], "There is no task 'star_esy': did you mean 'star_easy'?"),
        (["overrides=['sed=1']"], "There is no option 'sed': did you mean 'seed'?"),
    ],
)
def test_a_mistake_is_found_before_anything_runs(overrides, sentence, tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.yaml").write_text(CONFIG)
    _, found = call(tmp_path, monkeypatch, capsys, *overrides)
    assert sentence in found
    assert "\n" not in found
    assert sorted(file.name for file in (tmp_path / "out").glob("*")) in ([], [".holder", ".lock", "train.log"])


def test_a_size_of_the_yaml_is_taken_and_a_family_can_be_left_out(tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.yaml").write_text(CONFIG + "size: base\n")
    cells = []
    monkeypatch.setattr("xlm_hf.commands.compare.run_cell", lambda cell, launcher: cells.append(cell) or [])
    monkeypatch.chdir(tmp_path)
    for size, override in (("base", "~families.diffusion"), ("tiny", "size=tiny")):
        cells.clear()
        monkeypatch.setattr(sys, "argv", [SCRIPT, f"--config-dir={tmp_path}", "--config-name=mine", "output_dir=out"])
        sys.argv.append(override)
        main()
        assert {cell.family for cell in cells} == ({"ilm"} if size == "base" else {"ilm", "diffusion"})
        assert all(f"size={size}" in cell.arguments for cell in cells)


def finish(folder):
    # As in a process of its own, of which nobody else holds the other end.
    compare_command._ALIVE, _ = os.pipe()
    program = f"cat > /dev/null; echo $XLM_HF_ENDS_WITH_INPUT > {folder}/ended"
    compare_command._finish(folder / "cell", [], ["sh", "-c", program])


def test_a_cell_sees_the_end_of_a_comparison_by_its_input(tmp_path):
    process = multiprocessing.get_context("fork").Process(target=finish, args=(tmp_path,))
    process.start()
    while not (tmp_path / "cell" / "console.log").exists():
        time.sleep(0.05)
    time.sleep(0.3)
    assert not (tmp_path / "ended").exists()
    process.kill()
    process.join()
    deadline = time.monotonic() + 60
    while not (tmp_path / "ended").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.1)
    assert (tmp_path / "ended").read_text() == "1\n"


def test_the_recipe_for_star_graphs_is_six_families_and_three_seeds(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    # Composes everything, and starts a program that does nothing in place of each training.
    arguments = ["--config-name=compare_star", "output_dir=out", "launcher=['true']", "++task.num_train=9"]
    monkeypatch.setattr(sys, "argv", [SCRIPT, *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code.startswith("Error: 18 of the runs failed (ilm_star_easy_0, ilm_star_easy_1, ilm_star_")
    assert len(list((tmp_path / "out").glob("*/console.log"))) == 18


def test_summaries_meet_a_computation_by_hand():
    runs = pd.DataFrame(
        [
            {"family": "b", "task": "x", "m": 1.0, "n": 5000},
            {"family": "b", "task": "x", "m": 2.0, "n": 5000},
            {"family": "b", "task": "x", "m": 4.5, "n": 5000},
            {"family": "a", "task": "x", "m": 7.0},
            {"family": "a", "task": "y", "m": 8.0, "n": 1},
        ]
    )
    # (1 + 2 + 4.5) / 3 = 2.5; ((1.5² + 0.5² + 2²) / 2)^½ = 3.25^½ = 1.8
    table = comparison.markdown_table(comparison.summarise(runs, ["family"], ["m", "n"]))
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    rows = {line[0]: dict(zip(lines[0], line, strict=True)) for line in lines[2:]}
    assert rows == {
        "b": {"family": "b", "x m": "2.5 ± 1.8", "y m": "-", "x n": "5,000", "y n": "-"},
        "a": {"family": "a", "x m": "7", "y m": "8", "x n": "-", "y n": "1"},
    }
    assert "| 2.5 ± 1.8 |" in comparison.markdown_table(comparison.summarise(runs[:3], ["family"], ["m"]))


def test_a_table_has_ten_columns_at_most():
    table = pd.DataFrame([[str(i) for i in range(14)]], columns=[f"c{i}" for i in range(14)])
    header, rule, row = comparison.markdown_table(table).splitlines()
    assert header == "| " + " | ".join(f"c{i}" for i in range(10)) + " |"
    assert row.count("|") == rule.count("|") == 11


def test_curves_are_told_apart_and_bars_of_a_share_stay_within_it(tmp_path, monkeypatch):
    axes = pytest.importorskip("matplotlib.axes").Axes
    drawn, legends = [], []
    errorbar, legend = axes.errorbar, axes.legend
    monkeypatch.setattr(axes, "errorbar", lambda self, *a, **k: drawn.append((a, k)) or errorbar(self, *a, **k))
    monkeypatch.setattr(axes, "legend", lambda self, **k: legends.append((self, k)) or legend(self, **k))
    runs = [
        {"family": f"f{i}", "task": task, "seed": seed, "step": 5, "test/exact_match": value, "test/loss": 3 * value}
        for task in ("a", "b")
        for i in range(9)
        for seed, value in enumerate((1.0, 0.6, 1.0))
        if (task, i) != ("b", 0)
    ]
    comparison.plot(tmp_path / "p.png", pd.DataFrame(runs), "step", "step", ["test/exact_match", "test/loss"])
    assert (tmp_path / "p.png").exists()
    mean, std = 2.6 / 3, pd.Series([1.0, 0.6, 1.0]).std()
    (_, _, (below, above)), _ = drawn[0]
    assert (below.item(), above.item()) == (pytest.approx(std), pytest.approx(1 - mean))
    assert next(a for a, k in drawn if a[1].iloc[0] > 1)[2][1].item() == pytest.approx(3 * std), "a loss is no share"
    looks = {k["label"]: (k["color"], k["marker"], k["linestyle"]) for _, k in drawn}
    assert len(set(looks.values())) == 9
    for _, k in drawn:
        assert (k["color"], k["marker"], k["linestyle"]) == looks[k["label"]], "the same in every panel"
    assert [axes.get_ylabel() for axes, _ in legends[:2]] == ["exact match (test)", "loss (test)"]
    assert legends[0][0].get_xlabel() == "training step"
    assert {k["title"] for _, k in legends} == {"mean and standard deviation over 3 seeds"}
    assert all(k["bbox_to_anchor"][1] < 0 for _, k in legends), "below the curves, and not over them"


def test_without_matplotlib_the_rest_is_written_and_a_sentence_says_how_to_get_it(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    points = pd.DataFrame([{"family": "a", "task": "x", "step": 1, "m": 2.0}])
    comparison.plot(tmp_path / "a.png", points, "step", "step", ["m"])
    assert not list(tmp_path.iterdir())
    assert 'pip install "xlm-hf[plots]"' in caplog.text
