"""The wheel is as right as the editable install: built, installed alone, and run from another folder."""

import json
import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_wheel_runs_from_another_folder(tmp_path):
    build = [sys.executable, "-m", "pip", "wheel", str(ROOT), "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "-w", str(tmp_path)], check=True, cwd=tmp_path)
    wheel = next(tmp_path.glob("xlm_hf-*.whl"))
    names = zipfile.ZipFile(wheel).namelist()
    for name in ("xlm_hf/modeling/ilm/loss_ilm.py", "xlm_hf/configs/task/star_easy.yaml", "xlm_hf/hub_cards/ilm.md"):
        assert names.count(name) == 1
    assert {name.split("/")[0] for name in names} == {
        "xlm_hf",
        "xlm_hf_cli.py",
        wheel.name.split("-py3")[0] + ".dist-info",
    }

    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    python = environment / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-deps", str(wheel)]
    subprocess.run(install, check=True)
    # The dependencies come from this environment, behind the wheel on the path; its editable install does not.
    packages = Path(
        subprocess.check_output(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
        ).strip()
    )
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    tiny = ["size=tiny", "task.num_train=50", "task.num_validation=4", "task.num_test=6"]
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        [environment / "bin" / "xlm-hf", "--config-name", "ilm_star", *tiny, "output_dir=run"],
        cwd=elsewhere,
        env=clean,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert json.loads((elsewhere / "run" / "metrics.json").read_text())["test/samples"] == 6
    card = (elsewhere / "run" / "model" / "README.md").read_text()
    assert "2505.05755" in card
    find = "import importlib.util; print(importlib.util.find_spec('xlm_hf').origin)"
    where = subprocess.check_output([python, "-c", find], cwd=elsewhere, env=clean, text=True)
    assert str(environment) in where
