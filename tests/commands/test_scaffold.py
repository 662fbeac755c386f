"""A scaffolded family, installed as a package of its own, is a family like the shipped ones."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import forked
from xlm_hf.families import families

ROOT = Path(__file__).parents[2]


def xlm_hf(*arguments, site=None, cwd):
    paths = [str(path) for path in (site, ROOT) if path]
    return subprocess.run(
        forked("-c", "from xlm_hf.cli import main; main()", *arguments),
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        cwd=cwd,
        capture_output=True,
        text=True,
    )


def scaffolded(folder, *arguments):
    """Write the package `my_model` and install it into a folder of its own, which is returned."""
    made = xlm_hf("scaffold", "my_model", *arguments, cwd=folder)
    assert made.returncode == 0, made.stderr
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--target"]
    subprocess.run([*pip, folder / "site", folder / "my_model"], check=True)
    return folder / "site"


def test_it_trains_exports_and_passes_the_suite_as_generated(tmp_path):
    site = scaffolded(tmp_path)
    few = ["task.num_train=40", "task.num_validation=4", "task.num_test=8", "size=tiny", "trainer.max_steps=2"]
    command = ["--config-name", "my_model_star", *few]
    trained = xlm_hf(*command, "output_dir=run", site=site, cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["steps"] == 2
    assert json.loads((tmp_path / "run" / "model" / "config.json").read_text())["model_type"] == "my_model"
    assert "MyModelForMaskedLM" in (tmp_path / "run" / "model" / "README.md").read_text()
    evaluated = xlm_hf(*command, "job=evaluate", "checkpoint=run", "output_dir=again", site=site, cwd=tmp_path)
    assert evaluated.returncode == 0, evaluated.stderr
    suite = subprocess.run(
        forked("-m", "pytest", "-q", tmp_path / "my_model"),
        env={**os.environ, "PYTHONPATH": f"{site}{os.pathsep}{ROOT}"},
        cwd=tmp_path / "my_model",
        capture_output=True,
        text=True,
    )
    assert suite.returncode == 0, suite.stdout
    assert " passed" in suite.stdout


@pytest.mark.slow
@pytest.mark.parametrize("family", families())
def test_every_family_can_be_the_start(tmp_path, family):
    site = scaffolded(tmp_path, "--from", family)
    few = ["task.num_train=40", "task.num_validation=4", "task.num_test=8", "size=tiny", "trainer.max_steps=1"]
    trained = xlm_hf("family=my_model", "task=star_easy", *few, "output_dir=run", site=site, cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    package = tmp_path / "my_model"
    words = [file.read_text() for file in package.rglob("*.*") if file.is_file() and file.name != "README.md"]
    assert not any(f"{family.upper()}Config" in text or f"_{family}" in text for text in words)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["My-Model"], "The name of a family is a Python name in lower case, like my_model, and not 'My-Model'."),
        (["json"], "There is a family or a package 'json' already: choose another name."),
        (["my_model", "--from", "mlmm"], "There is no family 'mlmm' to start from: did you mean 'mlm'?"),
        (["my_model", "--output", "."], ". exists already: name another folder with --output."),
    ],
)
def test_a_mistake_ends_in_one_sentence(tmp_path, arguments, sentence):
    result = xlm_hf("scaffold", *arguments, cwd=tmp_path)
    assert result.returncode == 2
    assert sentence in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())
