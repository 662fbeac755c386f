"""A sweep by Hydra's --multirun: folders, one table, runs that fail; and its launcher for SLURM."""

import csv
import json
import sys

import pytest
from hydra import compose, initialize_config_module

from xlm_hf.cli import main
from xlm_hf.reports.sweeps import run_name

TINY = [
    "size=tiny",
    "task.num_train=24",
    "task.num_validation=4",
    "task.num_test=4",
    "trainer.max_steps=2",
    "output_dir=sweep",
]


def sweep(folder, monkeypatch, capsys, *overrides):
    """Sweep in this process; what was printed, the errors, and the sentence in which it ended or None."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["run_xlm.py", "--multirun", "--config-name=ilm_star", *TINY, *overrides])
    sentence = None
    try:
        main()
    except SystemExit as stopped:
        sentence = stopped.code
    out, err = capsys.readouterr()
    return out, err, err.strip().splitlines()[-1] if sentence == 2 else sentence


def test_runs_go_to_folders_of_their_own_and_into_one_table(tmp_path, monkeypatch, capsys):
    out, err, sentence = sweep(
        tmp_path, monkeypatch, capsys, "model.hidden_size=33,32", "trainer.learning_rate=1e-3,1e-2"
    )
    folder = tmp_path / "sweep"
    good = [f"model.hidden_size-32_trainer.learning_rate-{rate}" for rate in ("0.001", "0.01")]
    bad = [f"model.hidden_size-33_trainer.learning_rate-{rate}" for rate in ("0.001", "0.01")]
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == good + bad
    assert sentence == f"Error: 2 runs of the sweep failed ({', '.join(bad)}): the cause is above."
    for name in bad:
        assert f"Error: {name}: hidden_size (33) must be a multiple of num_attention_heads (2)" in err
    assert "Traceback" not in err
    with (folder / "sweep.csv").open() as file:
        rows = {row.pop("run"): row for row in csv.DictReader(file)}
    assert sorted(rows) == good
    for name in good:
        metrics = json.loads((folder / name / "metrics.json").read_text())
        assert {key: float(value) for key, value in rows[name].items()} == metrics
        assert f"| {name} |" in out
        assert f"| {metrics['test/loss']:.4g} |" in (folder / "sweep.md").read_text()
        log = (folder / name / "train.log").read_text()
        assert log.count("step 2/2  test/loss") == 1, "the log of a run holds that run alone"
    hints = [line for line in out.splitlines() if line.startswith("Next: ")]
    assert "trainer.learning_rate=0.01" in hints[1]
    assert "0.001" not in hints[1]

    out, _, sentence = sweep(tmp_path, monkeypatch, capsys, "model.hidden_size=32", "trainer.learning_rate=1e-3,2e-2")
    assert sentence is None, "the errors of an earlier sweep are no errors of this one"
    assert f"| {good[0]} |" in out, "but its results stay in the table"
    assert "| trainer.learning_rate-0.02 |" in out


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["seed=0,1", "sed=1"], "There is no option 'sed': did you mean 'seed'?"),
        (["task=star_easy,star_esy"], "There is no task 'star_esy': did you mean 'star_easy'?"),
    ],
)
def test_a_mistake_in_a_config_ends_the_sweep_in_one_sentence(overrides, sentence, tmp_path, monkeypatch, capsys):
    _, _, found = sweep(tmp_path, monkeypatch, capsys, *overrides)
    assert sentence in found
    assert "\n" not in found
    assert not list(tmp_path.glob("sweep/*/"))


def test_a_name_holds_nothing_that_a_shell_or_hydra_reads():
    assert run_name("++trainer.learning_rate=0.1,seed=0") == "trainer.learning_rate-0.1_seed-0"
    assert run_name("overrides=['a=1','b']") == "overrides-_a-1_b_"
    assert run_name("") == "run"


def test_the_launcher_for_slurm_composes():
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    with initialize_config_module("xlm_hf.configs", version_base="1.3"):
        cfg = compose("ilm_star", ["hydra/launcher=slurm", "output_dir=sweep"], return_hydra_config=True)
    launcher = cfg.hydra.launcher
    assert launcher._target_ == "hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher"
    assert (launcher.partition, launcher.gpus_per_node, launcher.nodes) == ("gpu", 1, 1)
    assert launcher.setup is None, "what is not set is as the plugin has it"
