"""Two processes for real: the same gradients, each example once, whole checkpoints."""

import json
import os
import subprocess
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.commands.test_cli import TINY
from tests.processes import forked, python
from tests.training.test_trainer import assert_same_weights
from xlm_hf.training.checkpoints import fault, list_checkpoints

ROOT = Path(__file__).parents[2]


def launch(processes, *arguments, cwd=ROOT):
    torchrun = forked("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", *arguments)
    # What torchrun starts its ranks by.
    environment = {**os.environ, "PYTHON_EXEC": python(), "PYTHONPATH": str(ROOT)}
    result = subprocess.run(torchrun, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-4000:]
    return result


def run(output_dir, batch_size, processes):
    output_dir.mkdir()
    launch(processes, "-m", "tests.distributed_run", str(output_dir), str(batch_size))
    return json.loads((output_dir / "results.json").read_text())


def test_weights_in_shards_give_the_same_gradients():
    launch(2, "-m", "tests.fully_sharded_run")


def test_all_ranks_of_the_command_line_share_one_fresh_folder(tmp_path):
    script = [str(ROOT / "examples" / "run_xlm.py"), *TINY, "trainer.global_batch_size=16", "trainer.use_cpu=true"]
    result = launch(2, *script, cwd=tmp_path)
    (run_folder,) = (tmp_path / "outputs" / "ilm_star").iterdir()
    lines = (run_folder / "predictions" / "test.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["example_id"] for line in lines) == list(range(30))
    assert result.stdout.count("Everything goes to") == 1
    assert (run_folder / "train.log").read_text().count("step 20/20  loss") == 1
    assert (run_folder / "model" / "model.safetensors").exists()


def test_two_ranks_of_four_equal_one_of_eight(tmp_path):
    one, two = run(tmp_path / "one", 8, 1), run(tmp_path / "two", 4, 2)
    seen = [json.loads(file.read_text()) for file in sorted((tmp_path / "two").glob("seen_*.json"))]
    whole = json.loads((tmp_path / "one" / "seen_0.json").read_text())
    assert sorted(map(str, seen[0] + seen[1])) == sorted(map(str, whole))
    assert not {str(row) for row in seen[0]} & {str(row) for row in seen[1]}
    assert_same_weights(
        load_file(tmp_path / "two" / "final.safetensors"),
        load_file(tmp_path / "one" / "final.safetensors"),
        rtol=1e-4,
        atol=2e-5,
    )
    for log, expected in zip(two["logs"], one["logs"], strict=True):
        for name in ("loss", "token_loss", "stop_loss", "stop_accuracy", "grad_norm"):
            assert log[name] == pytest.approx(expected[name], rel=2e-3)
    assert [record["example_id"] for record in two["records"]] == list(range(1000, 1011))
    for name in ("test/loss", "test/token_loss", "test/samples"):
        assert two["metrics"][name] == pytest.approx(one["metrics"][name], rel=1e-4)
    assert two["samples"][1] == one["samples"][1]
    assert [record["example_id"] for record in two["samples"][1]] == list(range(7))
    for measured, expected in ((two["likelihood"], one["likelihood"]), (two["samples"][0], one["samples"][0])):
        measured, expected = ({n: v for n, v in m.items() if n != "seconds"} for m in (measured, expected))
        assert measured == pytest.approx(expected, rel=1e-5)
    assert {"perplexity", "nats_per_token_monte_carlo_standard_error", "bits_per_character"} <= one["likelihood"].keys()
    checkpoints = list_checkpoints(tmp_path / "two")
    assert [folder.name for folder in checkpoints] == ["checkpoint-4", "checkpoint-5"]
    for checkpoint in checkpoints:
        assert fault(checkpoint) is None
        assert {"rng_state_0.pth", "rng_state_1.pth"} <= {file.name for file in checkpoint.iterdir()}
