"""What the README says is what happens."""

import re
import shlex
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)


def test_python_blocks_run_as_written():
    blocks = [text for language, text in BLOCKS if language == "python"]
    assert blocks
    for text in blocks:
        exec(compile(text, "README.md", "exec"), {})


COMMANDS = [
    line.split("#")[0]
    for language, text in BLOCKS
    if language == "bash"
    for line in text.splitlines()
    if "run_xlm.py" in line
]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_composes(command):
    words = shlex.split(command.split("run_xlm.py")[1].replace("<time>", "TIME"))
    name = "config"
    if words[0] == "--config-name":
        name, words = words[1], words[2:]
    with initialize_config_module("xlm_hf.configs", version_base="1.3"):
        assert compose(name, overrides=words).job


def test_the_files_that_it_names_exist():
    for path in re.findall(r"`((?:configs|xlm_hf|modeling|docs|examples)/[\w/.]+)`", README):
        assert (ROOT / path).exists(), path


def test_ci_runs_the_test_command_of_the_readme():
    section = README.split("## Tests")[1].split("\n## ")[0]
    assert re.search(r"```bash\n(.*?)\n```", section)[1] == 'pip install -e ".[test]" && python -m pytest'
    assert "s/^## Tests" in (ROOT / ".ci" / "run").read_text() or "## Tests" in (ROOT / ".ci" / "run").read_text()
