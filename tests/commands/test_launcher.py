"""The help of `xlm-hf`, which imports nothing of the library, and its jobs in the terms of the configs."""

import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
from hydra.core.config_store import ConfigStore

import xlm_hf.configs  # noqa: F401  (it stores the recipes)
import xlm_hf_cli
from xlm_hf.commands import __path__ as commands

JOBS = ["compare", "distill", "evaluate", "generate", "prepare_data", "push_to_hub", "train"]
TOOLS = ["convert", "scaffold"]


def shown(capsys, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["xlm-hf", *arguments])
    xlm_hf_cli.main()
    return capsys.readouterr().out


def test_help_names_every_job_and_tool(capsys, monkeypatch):
    assert sorted(JOBS + TOOLS) == sorted(file.stem for file in Path(commands[0]).glob("[!_]*.py"))
    text = shown(capsys, monkeypatch, "--help")
    jobs, tools = text.split("Jobs (train by default):")[1].split("Tools:")
    assert [line.split()[0] for line in jobs.strip().splitlines()] == JOBS
    assert [line.split()[0] for line in tools.split("Examples:")[0].strip().splitlines()] == ["scaffold", "convert"]
    assert shown(capsys, monkeypatch) == text


@pytest.mark.parametrize("job", JOBS)
def test_help_on_a_job_names_what_it_can_be_given(capsys, monkeypatch, job):
    text = shown(capsys, monkeypatch, job, "--help")
    assert text.startswith(f"xlm-hf {job}: ")
    for name in ("family=  ", "star_easy", "--config-name  ", "ilm_star", "output_dir: null  ", "checkpoint: null  "):
        assert name in text
    assert "hydra" not in text
    recipes = next(line for line in text.splitlines() if line.startswith("--config-name paper/"))
    there_are = {name.removesuffix(".yaml") for name in ConfigStore.instance().list("paper")}
    assert set(recipes.split("...  ")[1].split(", ")) == there_are


@pytest.mark.parametrize(("tool", "names"), [("scaffold", ["name", "--from", "--output"]), ("convert", ["--family"])])
def test_help_on_a_tool_names_its_arguments(capsys, monkeypatch, tool, names):
    lines = shown(capsys, monkeypatch, tool, "--help").splitlines()
    for name in names:
        assert any(line.split()[:1] == [name] and len(line.split()) > 2 for line in lines), lines


def test_the_version(capsys, monkeypatch):
    assert shown(capsys, monkeypatch, "--version") == f"xlm-hf {version('xlm-hf')}\n"


@pytest.mark.parametrize("arguments", [["--help"], ["evaluate", "--help"], ["convert", "--help"], ["--version"]])
def test_help_imports_nothing_of_the_library(arguments):
    code = f"import sys; sys.argv[1:] = {arguments}; import xlm_hf_cli; xlm_hf_cli.main()"
    heavy = "print(*{'torch', 'transformers', 'hydra', 'xlm_hf', 'numpy'} & sys.modules.keys(), 'is imported')"
    output = subprocess.run([sys.executable, "-c", f"{code}; {heavy}"], capture_output=True, text=True, check=True)
    assert output.stdout.splitlines()[-1] == "is imported"


def test_a_job_and_its_run_in_the_terms_of_the_configs():
    run = ["evaluate", "runs/a,b", "seed=1"]
    assert xlm_hf_cli.arguments(run) == ["job=evaluate", "checkpoint=runs/a,b", "seed=1"]
    assert xlm_hf_cli.arguments(["train", "--config-name", "x"]) == ["job=train", "--config-name", "x"]
    assert xlm_hf_cli.arguments(["prepare_data", "task=text"]) == ["job=prepare_data", "task=text"]
    for other in (["job=evaluate", "checkpoint=a"], ["--config-name", "x"], ["scaffold", "mine"]):
        assert xlm_hf_cli.arguments(list(other)) == other


@pytest.mark.parametrize(("job", "said"), [("evalute", "did you mean 'evaluate'?"), ("run", "see xlm-hf --help.")])
def test_a_job_that_there_is_not(job, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        xlm_hf_cli.arguments([job, "runs/a"])
    assert (stopped.value.code, capsys.readouterr().err) == (2, f"Error: There is no job {job!r}: {said}\n")


def test_the_console_script_is_this():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    assert project["project"]["scripts"]["xlm-hf"] == "xlm_hf_cli:main"
