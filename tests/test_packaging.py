"""What is installed: the versions that were tested by the README's commands, and newer ones by who asks for them."""

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REQUIREMENTS = [
    *PROJECT["dependencies"],
    *(one for extra in PROJECT["optional-dependencies"].values() for one in extra),
]


def test_torch_has_no_upper_bound():
    (torch,) = (Requirement(one) for one in PROJECT["dependencies"] if Requirement(one).name == "torch")
    assert [bound.operator for bound in torch.specifier] == [">="]


@pytest.mark.parametrize("requirement", sorted(set(REQUIREMENTS)))
def test_every_requirement_has_a_tested_version_within_its_bounds(requirement):
    lines = (line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    tested = {canonicalize_name(name): version for name, version in lines}
    wanted = Requirement(requirement)
    assert wanted.specifier.contains(tested[canonicalize_name(wanted.name)])


@pytest.mark.parametrize("file", ["README.md", ".ci/run", "docs/index.md", "docs/quickstart.md"])
def test_what_installs_takes_the_tested_versions(file):
    installs = [line for line in (ROOT / file).read_text().splitlines() if "pip install" in line and " -e " in line]
    ours = [line for line in installs if "my_model" not in line]
    assert ours
    assert all("-c constraints.txt" in line for line in ours)
