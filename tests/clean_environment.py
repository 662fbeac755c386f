"""Python with torch and transformers and nothing of ours, made of links into this environment."""

import importlib.metadata
import os
import subprocess
import sys
import textwrap
from unittest import mock

import packaging.requirements
import pytest

from tests.processes import python
from xlm_hf import testing


def run_python(script, *arguments, env, cwd, flags=()):
    result = subprocess.run(
        [sys.executable, *flags, "-c", textwrap.dedent(script), *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **env},
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def required_distributions(*names):
    found = {}
    pending = list(names)
    while pending:
        try:
            distribution = importlib.metadata.distribution(pending.pop())
        except importlib.metadata.PackageNotFoundError:
            continue
        if distribution.name in found:
            continue
        found[distribution.name] = distribution
        for line in distribution.requires or []:
            requirement = packaging.requirements.Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                pending.append(requirement.name)
    return found.values()


@pytest.fixture(scope="module")
def clean_python(tmp_path_factory):
    packages = tmp_path_factory.mktemp("packages")
    for distribution in required_distributions("torch", "transformers"):
        for top in {file.parts[0] for file in distribution.files if file.parts[0] != ".."}:
            if not (packages / top).is_symlink():
                (packages / top).symlink_to(distribution.locate_file(top))
    prelude = f"""
        import importlib.util, logging, sys, warnings
        sys.path.insert(0, {str(packages)!r})
        for name in ("xlm_hf", "modeling", "hydra", "omegaconf", "datasets", "evaluate", "wandb", "accelerate"):
            assert importlib.util.find_spec(name) is None, name
        import torch, transformers
        heard = []
        handler = logging.Handler(logging.WARNING)
        handler.emit = lambda record: heard.append(record.getMessage())
        transformers.logging.add_handler(handler)
        warnings.simplefilter("error")
    """

    def run(script, *arguments, home, cwd, **env):
        # -I and -S: no PYTHONPATH, no working directory, no site-packages and none of its .pth files.
        return run_python(
            textwrap.dedent(prelude) + textwrap.dedent(script) + "\nassert heard == [], heard\n",
            *arguments,
            env={"HF_HOME": str(home), "HF_MODULES_CACHE": str(home / "modules"), **env},
            flags=("-I", "-S"),
            cwd=cwd,
        )

    return run


@pytest.fixture(scope="module", autouse=True)
def exports_load_in_a_fork():
    """Where the suite of a family loads what it has exported: without this package, and without importing torch."""
    with mock.patch.object(sys, "executable", python()):
        yield
    if testing._elsewhere.cache_info().currsize:
        testing._elsewhere().communicate()
        testing._elsewhere.cache_clear()
