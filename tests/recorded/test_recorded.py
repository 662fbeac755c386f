"""Each family trains and decodes as it did when it was recorded: a change of numbers is seen, wanted or not.

`<family>.json` holds 30 steps of a tiny model on star graphs by the real command: loss and gradient norm of every step,
sampled decodes of the test set, greedy decodes of the same prompts. The run goes through what can change a number in
the trainer, the collators and the backbone: accumulation, clipping, ragged rows, learnt positions, the convolution.

Rounding alone moves these numbers by less than 1e-6 in 30 steps (one thread or two, with and without vector
instructions). The tolerance is 1e-5. Muon is left out: it multiplies in bfloat16, which turns rounding into differences
of 1e-2 within these steps.

After a change that is meant to move numbers, record anew, look at the difference, and say in the commit why it moved:

    python tests/recorded/test_recorded.py [FAMILY ...]

A family that cannot do seq2seq names other `overrides` in its file before it is recorded.
"""

import json
import os
import sys
import tempfile
from pathlib import Path
from unittest import mock

import pytest
import torch

from xlm_hf.cli import main
from xlm_hf.families import families

HERE = Path(__file__).parent
# Shipped families alone: those that other packages bring are tested there.
FAMILIES = [name for name in families() if (HERE.parents[1] / "modeling" / name).is_dir()]
OVERRIDES = ["task=star_medium", "model.learned_positions=true", "model.conv_kernel_size=3"]
NUM_STEPS, NUM_DECODES, TOLERANCE = 30, 4, 1e-5


def command(family, overrides, output_dir):
    """The command line of the training, without its job."""
    return [
        *(f"family={family}", "size=tiny", *overrides, f"output_dir={output_dir}"),
        *("task.num_train=200", "task.num_validation=2", f"task.num_test={NUM_DECODES}"),
        *(f"trainer.max_steps={NUM_STEPS}", f"trainer.save_steps={NUM_STEPS}", "trainer.eval_strategy=no"),
        *("trainer.logging_steps=1", "trainer.gradient_accumulation_steps=2"),
    ]


def run(*arguments):
    """Run the command line in this process, which has imported everything already."""
    threads = torch.get_num_threads()
    with mock.patch.object(sys, "argv", ["run_xlm.py", *arguments]):
        main()
    torch.set_num_threads(threads)


def decodes(output_dir, name):
    records = map(json.loads, (output_dir / "predictions" / f"{name}.jsonl").read_text().splitlines())
    return [{key: record[key] for key in ("prediction_ids", "steps")} for record in records]


def compute(family, overrides, folder):
    """What a file holds, computed now."""
    train = command(family, overrides, folder / "run")
    run(*train, "generation.do_sample=true")
    log = json.loads((folder / "run" / f"checkpoint-{NUM_STEPS}" / "trainer_state.json").read_text())["log_history"]
    greedy = command(family, overrides, folder / "greedy")
    run(*greedy, "job=generate", f"checkpoint={folder / 'run'}", f"num_samples={NUM_DECODES}")
    return {
        "overrides": overrides,
        "loss": [entry["loss"] for entry in log if "loss" in entry],
        "grad_norm": [entry["grad_norm"] for entry in log if "grad_norm" in entry],
        "sampled": decodes(folder / "run", "test"),
        "greedy": decodes(folder / "greedy", "generate"),
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_numbers_are_those_that_were_recorded(family, tmp_path, capsys):
    file = HERE / f"{family}.json"
    assert file.exists(), f"{family} is not recorded: python tests/recorded/test_recorded.py {family}"
    recorded = json.loads(file.read_text())
    now = compute(family, recorded["overrides"], tmp_path)
    for name in ("loss", "grad_norm"):
        assert now[name] == pytest.approx(recorded[name], rel=TOLERANCE), name
    for name in ("sampled", "greedy"):
        assert now[name] == recorded[name], name


def record(family):
    """Write the file of a family."""
    file = HERE / f"{family}.json"
    overrides = json.loads(file.read_text())["overrides"] if file.exists() else OVERRIDES
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, {"XLM_HF_CACHE": f"{folder}/cache"}):
        values = compute(family, overrides, Path(folder))
    lines = ",\n".join(f'"{name}": {json.dumps(value)}' for name, value in values.items())
    file.write_text(f"{{\n{lines}\n}}\n")


if __name__ == "__main__":
    for name in sys.argv[1:] or FAMILIES:
        record(name)
