"""A training step leaves the host nothing to wait for: taken on a CPU the way that it goes on an accelerator."""

import pytest
import torch
from transformers import TrainerCallback

from tests.host_reads import HostReads
from tests.hub.test_pretrained_backbones import BACKBONES, family_model, some_ids
from xlm_hf.families import families
from xlm_hf.modules import devices
from xlm_hf.objectives import head_operator
from xlm_hf.testing import FamilyCase
from xlm_hf.training.arguments import XLMTrainingArguments

DIGITS = torch.arange(4)
OPTIONS = {"padded": [], "packed": ["+train_collator.packing=true"], "static": ["trainer.static_length=48"]}


@pytest.fixture
def accelerator(monkeypatch):
    """The CPU for a device that is not the host, on which logits are made in chunks."""
    operator = head_operator._chunked_head

    def seen(*args):
        # No mode sees what happens within the operator, so its function is called beside it.
        with torch.no_grad():
            operator._init_fn(*args)
        return operator(*args)

    monkeypatch.setattr(devices, "_HOST", ())
    monkeypatch.setattr(head_operator, "rows_per_chunk", lambda *_: 3)
    monkeypatch.setattr(head_operator, "_chunked_head", seen)


class StepReads(TrainerCallback):
    """What the host would have waited for from the forward pass to the optimiser's step, by step."""

    def __init__(self):
        self.steps = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.steps.append(HostReads().__enter__())

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.steps[-1].__exit__(None, None, None)


@pytest.mark.usefixtures("accelerator")
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("family", families())
def test_a_step_of_the_trainer_reads_nothing(family, options, tmp_path):
    reads = StepReads()
    case = FamilyCase(family, "trainer.max_steps=2", "trainer.save_strategy=no", *options)
    trainer = case.trainer(tmp_path, (reads,))
    trainer.train()
    assert trainer.optimizer.optimizer.defaults["fused"]
    assert [step.found for step in reads.steps] == [[], []]
    batches = [*trainer.get_train_dataloader()][:2]
    with HostReads() as counting:
        trainer._get_num_items_in_batch(batches, trainer.args.device)
    assert counting.found == []


def test_the_same_step_reads_where_that_is_free(tmp_path, accelerator, monkeypatch):
    monkeypatch.setattr(devices, "_HOST", ("cpu",))
    reads = StepReads()
    FamilyCase(min(families()), "trainer.max_steps=1", "trainer.save_strategy=no").trainer(tmp_path, (reads,)).train()
    assert reads.steps[0].found


@pytest.mark.usefixtures("accelerator")
@pytest.mark.parametrize("kind", BACKBONES)
def test_a_backbone_of_transformers_reads_nothing(kind):
    model, ids = family_model("mlm", kind), some_ids(2, 9)
    mask = torch.arange(9) < torch.tensor([[9], [7]])
    with HostReads() as reads:
        for inputs in ({}, {"attention_mask": mask}, {"segment_ids": torch.arange(9).expand(2, 9) // 5}):
            model.model(ids, **inputs).last_hidden_state.sum().backward()
    assert reads.found == []


@pytest.mark.parametrize("family", families())
@pytest.mark.parametrize("static_length", ["null", "48"])
def test_only_full_rows_go_without_their_mask_and_all_their_tokens_count(family, static_length, tmp_path, monkeypatch):
    results = []
    for host in (("cpu",), ()):
        monkeypatch.setattr(devices, "_HOST", host)
        options = ["trainer.per_device_train_batch_size=1", f"trainer.static_length={static_length}"]
        trainer = FamilyCase(family, "trainer.max_steps=3", "trainer.save_strategy=no", *options).trainer(tmp_path)
        trainer.train()
        results.append((trainer.state.num_input_tokens_seen, trainer.state.log_history[-1]["train_loss"]))
        masked = {"attention_mask" in batch for batch in trainer.get_train_dataloader()}
        assert masked == {host == ("cpu",) or static_length == "48"}
    assert results[0][0] == results[1][0] > 0
    assert results[0][1] == pytest.approx(results[1][1], rel=1e-4)


def test_batches_are_sent_to_an_accelerator_without_waiting(tmp_path, monkeypatch):
    assert not XLMTrainingArguments(tmp_path, use_cpu=True).accelerator_config.non_blocking
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    arguments = XLMTrainingArguments(tmp_path)
    assert arguments.accelerator_config.non_blocking
    assert arguments.dataloader_pin_memory


@pytest.mark.parametrize(
    "waits",
    [
        lambda x: int(x.sum()),
        lambda x: bool((x > 2).any()),
        lambda x: x[x > 2],
        lambda x: torch.where(x > 2),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x.to("cpu"),
        lambda x: x.repeat_interleave(x),
        lambda x: x.unique_consecutive(),
        lambda x: torch.tensor([1, 2], device=x.device),
        lambda x: torch.as_tensor(1, device=x.device),
    ],
)
def test_what_the_host_waits_for_is_found(waits):
    with HostReads() as reads:
        waits(DIGITS)
    assert len(reads.found) == 1


def test_what_the_host_does_not_wait_for_is_not_found():
    with HostReads() as reads:
        x = DIGITS.clone().to(DIGITS.device)
        x[x > 2] = 0
        x.index_add(0, x, x).where(x > 1, 0).repeat_interleave(2)
        x.to("cpu", non_blocking=True)
    assert reads.found == []
