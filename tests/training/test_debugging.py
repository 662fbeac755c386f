"""The debug modes, and what a run tells while it trains."""

import json
import math
import re
import struct
import sys

import pytest
import wandb
from wandb.proto import wandb_internal_pb2

from tests.commands.test_cli import TINY, mistake, records
from xlm_hf.cli import main
from xlm_hf.families import families


@pytest.fixture
def xlm(tmp_path, monkeypatch, capsys):
    """Runs the command line in this process and returns what it printed."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        base = ["task=star_easy", *TINY[2:]] if any(a.startswith("family=") for a in arguments) else TINY
        monkeypatch.setattr(sys, "argv", ["run_xlm.py", *base, *arguments])
        main()
        return capsys.readouterr().out

    return run


def logs(folder):
    state = max(folder.glob("checkpoint-*/trainer_state.json"), key=lambda f: int(f.parent.name.split("-")[1]))
    return json.loads(state.read_text())["log_history"]


def least_loss(printed):
    """The loss of a batch that no model can go below, and the share of the way to it that a model may lack."""
    batch = {name: values.split() for name, values in re.findall(r"^(\w+)  \(.*\n    (.*)", printed, re.MULTILINE)}
    if "target_weights" in batch:
        # With a softmax for each slot it is an entropy of the very tokens, and the batch that is printed has others.
        return 0.0, 0.25
    if "is_reconstruction" in batch:
        # Errors of vectors that have hardly any noise weigh 180 times as much as those of pure noise, and go last.
        return 0.0, 0.25
    # Of n missing tokens any may be inserted first, which no model can foretell.
    counts = [int(n) for n in batch.get("num_dropped", "1")]
    # What noise hides for good costs a little in some families.
    return sum(math.log(max(n, 1)) for n in counts) / len(counts), 0.05


@pytest.mark.parametrize("family", sorted(families()))
def test_overfit_drives_the_loss_of_one_batch_to_its_floor(xlm, tmp_path, family):
    one_batch = (f"family={family}", "trainer.per_device_train_batch_size=4", "model.num_hidden_layers=1")
    printed = xlm(*one_batch, "debug=print_batch", "output_dir=printed")
    steps = ("trainer.max_steps=300", "trainer.save_strategy=steps", "trainer.save_steps=300")
    xlm(*one_batch, *steps, "debug=overfit", "output_dir=run", "trainer.learning_rate=0.003")
    losses = [log["loss"] for log in logs(tmp_path / "run") if "loss" in log]
    floor, share = least_loss(printed)
    assert losses[0] > floor + 1
    assert losses[-1] < floor + share * (losses[0] - floor)


def test_print_batch_shows_tokens_and_trains_nothing(xlm, tmp_path):
    printed = xlm("debug=print_batch", "output_dir=run")
    assert "input_ids  (8, " in printed
    assert "[CLS] " in printed
    assert "attention_mask" in printed
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_dry_run_takes_a_step_an_evaluation_and_a_checkpoint(xlm, tmp_path):
    assert "A step, an evaluation and a checkpoint work" in xlm("debug=dry_run", "output_dir=run")
    history = logs(tmp_path / "run")
    assert [log["step"] for log in history] == [1] * len(history)
    assert any("validation/loss" in log for log in history)
    assert [folder.name for folder in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-1"]
    assert not (tmp_path / "run" / "model").exists()


def test_small_data_goes_through_everything_and_the_command_line_wins(xlm, tmp_path):
    printed = xlm("debug=small_data", "output_dir=run", "trainer.max_steps=5")
    assert "5 steps" in printed
    assert "from 64;" in printed
    assert len(records(tmp_path / "run" / "predictions" / "test.jsonl")) == 16
    assert (tmp_path / "run" / "model").exists()


def test_profile_leaves_a_trace(xlm, tmp_path):
    xlm("debug=profile", "output_dir=run")
    trace = json.loads((tmp_path / "run" / "profile" / "trace-0.json").read_text())
    names = {event.get("name") for event in trace["traceEvents"]}
    assert sum(str(name).startswith("ProfilerStep#") for name in names) == 5
    assert any("aten::" in str(name) for name in names)


def test_an_unknown_mode_is_refused(capsys, monkeypatch, tmp_path):
    assert "did you mean 'overfit'" in mistake(capsys, monkeypatch, tmp_path, *TINY, "debug=overfi")


def wandb_records(folder):
    """All records of an offline run: a log in the format of LevelDB, after a header of 7 bytes."""
    (file,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    data, place, partial = file.read_bytes(), 7, b""
    while place + 7 <= len(data):
        if (left := 32768 - place % 32768) < 7:
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        partial += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last of several
            record = wandb_internal_pb2.Record()
            record.ParseFromString(partial)
            yield record
            partial = b""


def test_wandb_without_login_or_network_gets_metrics_and_tables(xlm, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    xlm("logger=wandb", "output_dir=run", "trainer.tracked_predictions=3")
    # Ends the process that writes the file.
    wandb.teardown()
    rows = [
        {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
        for record in wandb_records(tmp_path / "run")
        if record.WhichOneof("record_type") == "history"
    ]
    names = set().union(*rows)
    expected = {"train/loss", "train/stop_loss", "train/learning_rate", "train/grad_norm", "train/tokens_per_second"}
    assert expected | {"train/peak_memory_gib", "validation/loss", "test/exact_match"} <= names
    assert not [name for name in names if name.startswith(("train/validation", "train/test"))]
    by_step = {row["train/global_step"]: row["train/loss"] for row in rows if "train/loss" in row}
    assert by_step == {log["step"]: log["loss"] for log in logs(tmp_path / "run") if "loss" in log}
    assert {"predictions/validation", "predictions/test"} <= names
    (table,) = (tmp_path / "run" / "wandb").glob("offline-run-*/files/media/table/predictions/test_*.table.json")
    shown = json.loads(table.read_text())
    predictions = records(tmp_path / "run" / "predictions" / "test.jsonl")
    assert [row[shown["columns"].index("prediction")] for row in shown["data"]] == [
        record["prediction"] for record in predictions[:3]
    ]


def test_tensorboard_gets_the_same_names_and_the_predictions(xlm, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    xlm("logger=tensorboard", "output_dir=run")
    scalars, texts = {}, set()
    for file in (tmp_path / "run" / "runs").rglob("events.*"):
        events = EventAccumulator(str(file)).Reload()
        texts |= set(events.Tags()["tensors"])
        for name in events.Tags()["scalars"]:
            scalars.setdefault(name, []).extend((event.step, event.value) for event in events.Scalars(name))
    assert {"train/loss", "train/tokens_per_second", "validation/exact_match", "test/loss"} <= set(scalars)
    assert not [name for name in scalars if name.startswith(("train/validation", "train/test"))]
    assert {"predictions/validation/text_summary", "predictions/test/text_summary"} <= texts
    expected = {log["step"]: log["loss"] for log in logs(tmp_path / "run") if "loss" in log}
    assert dict(scalars["train/loss"]) == pytest.approx(expected, rel=1e-6)
    assert not (tmp_path / "runs").exists()


def test_jobs_read_the_averaged_weights_unless_told_otherwise(xlm, tmp_path):
    xlm("output_dir=run", "trainer.ema_decay=0.99")
    losses = {}
    for name, options in {
        "model": ["checkpoint=run"],
        "last": ["checkpoint=run/last"],
        "raw": ["checkpoint=run/last", "ema=false"],
    }.items():
        xlm("job=evaluate", f"output_dir={name}", *options)
        losses[name] = json.loads((tmp_path / name / "metrics.json").read_text())["test/loss"]
    trained = json.loads((tmp_path / "run" / "metrics.json").read_text())["test/loss"]
    assert losses["model"] == losses["last"] == trained
    assert losses["raw"] != pytest.approx(trained, rel=1e-3)
