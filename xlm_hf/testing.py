"""The suite that every family passes, ours and yours.

    import pytest
    from xlm_hf.testing import CHECKS, FamilyCase

    @pytest.mark.parametrize("check", CHECKS)
    def test_my_family(check, tmp_path):
        check(FamilyCase("my_family"), tmp_path)

A case is a tiny model of the family on a few star graphs, built from the family's own config group.
"""

import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from transformers import AutoModel, TrainerCallback

from xlm_hf.building import build_collator, build_model, build_task, build_trainer, compose
from xlm_hf.hub.export import export_model
from xlm_hf.modules import devices
from xlm_hf.modules.rotary_transformer import take
from xlm_hf.objectives import head_operator
from xlm_hf.training.checkpoints import last_sound_checkpoint

_FEW = ["task.num_train=40", "task.num_validation=4", "task.num_test=8", "size=tiny"]
_SHORT = [
    "trainer.max_steps=6",
    "trainer.per_device_train_batch_size=4",
    "trainer.eval_strategy=no",
    "trainer.save_steps=1",
]


class FamilyCase:
    """A tiny model of a family, its loss and collators, and a few examples.

    Args:
        family: name of the config group's entry, e.g. `family/<family>.yaml`.
        overrides: further Hydra overrides.
    """

    def __init__(self, family: str, *overrides: str):
        self.cfg = compose("config", [f"family={family}", "task=star_easy", *_FEW, *_SHORT, *overrides])
        self.task = build_task(self.cfg.task)

    def model(self) -> Any:
        """A model in which everything matters: the initialisation is wide enough to tell inputs apart."""
        model = self._new_model()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        return model.eval()

    def trainer(self, output_dir: Path, callbacks: tuple[TrainerCallback, ...] = ()) -> Any:
        """A trainer of six short steps that saves after each."""
        trainer = build_trainer(self.cfg, self.task, self._new_model(), output_dir)
        for callback in callbacks:
            trainer.add_callback(callback)
        return trainer

    def _new_model(self) -> Any:
        return build_model(self.cfg.model, self.task.tokenizer, self.cfg.generation, seed=self.cfg.seed)

    def examples(self, num: int = 6) -> list[dict[str, Any]]:
        """Training examples with prompts and targets of different lengths."""
        rows = self.task.splits["train"].select(range(num))
        cut = [
            {**row, "prompt_ids": row["prompt_ids"][: 26 - 3 * i], "target_ids": row["target_ids"][: 8 - i]}
            for i, row in enumerate(rows)
        ]
        return [{**row, "input_ids": row["target_ids"], "epoch": 0, "position": i} for i, row in enumerate(cut)]

    def collator(self, kind: str, model: Any, **options: Any) -> Any:
        """The family's collator of a kind."""
        max_length = model.config.max_position_embeddings
        return build_collator(self.cfg.collator, kind, self.task.tokenizer, max_length, self.cfg.seed, **options)


def _written(model: Any, batch: dict[str, torch.Tensor], seeds: list[int], **options) -> list[list[int]]:
    inputs = {name: tensor for name, tensor in batch.items() if name != "example_id"}
    output = model.generate(**inputs, seed=torch.tensor(seeds), max_new_tokens=8, **options)
    pad = model.config.pad_token_id
    return [[t for t in row if t != pad] for row in output.sequences[:, batch["input_ids"].shape[1] :].tolist()]


def check_batch_composition(case: FamilyCase, tmp_path: Path) -> None:
    """The loss of a batch is the sum of its examples' losses, each padded to its own length; so are the counts."""
    model, loss = case.model(), case.trainer(tmp_path).loss
    for kind in ("lm", "seq2seq"):
        collator = case.collator(kind, model)
        whole = loss(model, collator(case.examples()))
        parts = [loss(model, collator([example])) for example in case.examples()]
        torch.testing.assert_close(whole.loss_sum, sum(part.loss_sum for part in parts), rtol=1e-4, atol=1e-4)
        assert int(whole.num_items) == sum(int(part.num_items) for part in parts)
        assert int(whole.num_items) == int(loss.num_items(collator(case.examples())))


def check_generation(case: FamilyCase, tmp_path: Path) -> None:
    """A row decodes alike alone, in a batch and with padding on either side; the prompt stays; so with no prompt."""
    model = case.model()
    for kind in ("lm_prediction", "seq2seq_prediction"):
        collator, seeds = case.collator(kind, model), [5, 1, 4, 2, 3, 9]
        batch = collator(case.examples())
        together = _written(model, batch, seeds)
        prompt, inputs = batch["input_ids"], {name: batch[name] for name in batch if name != "example_id"}
        output = model.generate(**inputs, seed=torch.tensor(seeds), max_new_tokens=8)
        assert torch.equal(output.sequences[:, : prompt.shape[1]], prompt)
        assert output.nfe.shape == (len(prompt),)
        assert set(output.finish_reason) <= {"stop", "length"}
        order = batch["attention_mask"].logical_not().long().argsort(dim=-1, stable=True)
        right = {name: batch[name].gather(-1, order) for name in ("input_ids", "attention_mask")}
        assert _written(model, {**batch, **right}, seeds) == together
        for number, example in enumerate(case.examples()):
            assert _written(model, collator([example]), seeds[number : number + 1]) == together[number : number + 1]


def loss_and_gradients(model: Any, loss: Any, batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """The loss, its number of items, its metrics by name, its sequences and the gradients of all parameters."""
    model.zero_grad()
    output = loss(model, batch)
    output.loss_sum.backward()
    metrics = [torch.as_tensor(x).float() for name in sorted(output.metrics) for x in output.metrics[name]]
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    nats = [] if output.sequence_nats is None else [output.sequence_nats, output.sequence_tokens]
    return [output.loss_sum.detach(), torch.as_tensor(output.num_items), *metrics, *nats, *gradients]


def assert_close(values: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    """Assert that two results of `loss_and_gradients` are the same in single precision."""
    for value, reference in zip(values, expected, strict=True):
        torch.testing.assert_close(value, reference, rtol=1e-3, atol=1e-4)


def check_packing(case: FamilyCase, tmp_path: Path) -> None:
    """Examples that share a row have the loss, the metrics and the gradients that they have in rows of their own."""
    loss = case.trainer(tmp_path).loss
    for attention, kind in (("eager", "lm"), ("sdpa", "seq2seq")):
        model = case.model()
        model.set_attn_implementation(attention)
        batches = [case.collator(kind, model, packing=packing)(case.examples()) for packing in (True, False)]
        assert len(batches[0]["input_ids"]) < len(batches[1]["input_ids"])
        assert_close(*(loss_and_gradients(model, loss, batch) for batch in batches))


def check_full_rows(case: FamilyCase, tmp_path: Path) -> None:
    """Rows without padding, packed or not, need no mask: the same loss, metrics and gradients as with one of ones."""
    model, loss = case.model(), case.trainer(tmp_path).loss
    for examples, packing in ((case.examples(1) * 3, False), (case.examples(3), True)):
        batch = case.collator("seq2seq", model, packing=packing)(examples)
        assert batch["attention_mask"].all()
        # As on an accelerator, where a mask is used as it is.
        with mock.patch.object(devices, "_HOST", ()):
            expected = loss_and_gradients(model, loss, batch)
            del batch["attention_mask"]
            assert_close(loss_and_gradients(model, loss, batch), expected)


def check_ways_to_compute(case: FamilyCase, tmp_path: Path) -> None:
    """The same loss, metrics and gradients in every way to compute them.

    By eager attention as by sdpa, with the last layer at every position, with the vocabulary head in chunks, as one
    compiled graph, and with activations that are computed anew in the backward pass.
    """
    model, loss = case.model(), case.trainer(tmp_path).loss
    batch = case.collator("seq2seq", model)(case.examples())
    expected = loss_and_gradients(model, loss, batch)
    model.set_attn_implementation("eager")
    assert_close(loss_and_gradients(model, loss, batch), expected)
    model.set_attn_implementation("sdpa")
    trimmed = model.base_model.forward

    def everywhere(*args, output_index=None, **kwargs):
        outputs = trimmed(*args, **kwargs)
        outputs.last_hidden_state = take(outputs.last_hidden_state, output_index)
        return outputs

    with mock.patch.object(model.base_model, "forward", everywhere):
        assert_close(loss_and_gradients(model, loss, batch), expected)
    with mock.patch.object(head_operator, "rows_per_chunk", return_value=4):
        assert_close(loss_and_gradients(model, loss, batch), expected)
    compiled = torch.compile(loss.__call__, fullgraph=True, backend="aot_eager")
    assert_close(loss_and_gradients(model, compiled, batch), expected)
    model.train().activation_checkpointing_enable()
    assert model.is_activation_checkpointing
    assert_close(loss_and_gradients(model, loss, batch), expected)


def check_saving_and_loading(case: FamilyCase, tmp_path: Path) -> None:
    """A saved model loads with the same weights, options and decodes."""
    model = case.model()
    model.save_pretrained(tmp_path / "saved")
    loaded = AutoModel.from_pretrained(tmp_path / "saved")
    assert type(loaded) is type(model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    batch = case.collator("seq2seq_prediction", model)(case.examples(3))
    assert _written(loaded, batch, [1, 2, 3]) == _written(model, batch, [1, 2, 3])


class _Interrupt(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 4:
            raise KeyboardInterrupt


def check_training_and_resume(case: FamilyCase, tmp_path: Path) -> None:
    """Training moves the weights, and an interrupted run ends in the bits of the one that was not."""
    whole = case.trainer(tmp_path / "whole")
    start = {name: tensor.clone() for name, tensor in whole.model.state_dict().items()}
    whole.train()
    try:
        case.trainer(tmp_path / "run", (_Interrupt(),)).train()
    except KeyboardInterrupt:
        checkpoint = last_sound_checkpoint(tmp_path / "run")
    resumed = case.trainer(tmp_path / "run")
    resumed.train(resume_from_checkpoint=str(checkpoint))
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name
    assert any(not torch.equal(start[name], tensor) for name, tensor in whole.model.state_dict().items())


_REMOTE = """
import sys, torch
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "xlm_hf":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocked())
from transformers import AutoModel
model, info = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True, output_loading_info=True)
assert not any(info.values()), info
batch = torch.load(sys.argv[2], weights_only=True)
print(model.generate(**batch, seed=torch.tensor([1, 2, 3]), max_new_tokens=8).sequences.tolist())
"""


def check_remote_code(case: FamilyCase, tmp_path: Path) -> None:
    """The exported folder decodes the same where this package cannot be imported."""
    model = case.model()
    export_model(model, case.task.tokenizer, tmp_path / "model")
    batch = case.collator("seq2seq_prediction", model)(case.examples(3))
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    torch.save(inputs, tmp_path / "batch.pt")
    expected = model.generate(**inputs, seed=torch.tensor([1, 2, 3]), max_new_tokens=8).sequences.tolist()
    command = [sys.executable, "-I", "-c", _REMOTE, str(tmp_path / "model"), str(tmp_path / "batch.pt")]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path).stdout
    assert printed.strip().splitlines()[-1] == str(expected)


CHECKS = [
    check_batch_composition,
    check_generation,
    check_packing,
    check_full_rows,
    check_ways_to_compute,
    check_saving_and_loading,
    check_training_and_resume,
    check_remote_code,
]
