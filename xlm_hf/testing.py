"""The suite that every family passes, ours and yours.

    import pytest
    from xlm_hf.testing import CHECKS, FamilyCase

    @pytest.fixture(scope="module")
    def case():
        return FamilyCase("my_family")

    @pytest.mark.parametrize("check", CHECKS)
    def test_my_family(case, check, tmp_path):
        check(case, tmp_path)

A case is a tiny model of the family on a few star graphs, built from the family's own config group, for each kind of
task that the family has.
"""

import atexit
import copy
import functools
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from hydra.utils import get_class
from transformers import AutoModel, TrainerCallback

from xlm_hf.building import build_collator, build_model, build_task, build_trainer, compose
from xlm_hf.data.static_shapes import StaticShapes
from xlm_hf.hub.export import export_model
from xlm_hf.modules import devices
from xlm_hf.modules.rotary_transformer import take
from xlm_hf.objectives import head_operator
from xlm_hf.objectives.collators import AXES, Collator
from xlm_hf.tasks import Task
from xlm_hf.tasks.tokenizers import decode_text, with_prompt_layout
from xlm_hf.training.checkpoints import last_sound_checkpoint

_FEW = ["task.num_train=40", "task.num_validation=4", "task.num_test=8", "size=tiny"]
_SHORT = [
    "trainer.max_steps=6",
    "trainer.per_device_train_batch_size=4",
    "trainer.eval_strategy=no",
    "trainer.save_steps=1",
]


# To compose a config takes longer than most checks of a tiny model; whoever changes one takes a copy.
_composed = functools.cache(compose)


class FamilyCase:
    """A tiny model of a family, its loss and collators, and a few examples.

    Args:
        family: name of the config group's entry, e.g. `family/<family>.yaml`.
        overrides: further Hydra overrides.

    Attributes:
        kinds: of task, that the family's collator has.
        kind: the one that is trained on: "seq2seq" if the family has it.
    """

    def __init__(self, family: str, *overrides: str):
        few = [f"family={family}", "task=star_easy", *_FEW, *_SHORT]
        self.cfg = copy.deepcopy(_composed("config", (*few, *overrides)))
        collator_class: Any = get_class(self.cfg.collator._target_)
        self.kinds: tuple[str, ...] = collator_class.kinds
        self.kind = "seq2seq" if "seq2seq" in self.kinds else self.kinds[0]
        self.task = self._graphs = build_task(self.cfg.task)
        if self.kind != "seq2seq":
            # Its evaluation sets are those of another kind.
            self.cfg = copy.deepcopy(_composed("config", (*few, "task.evaluation=[]", *overrides)))
            self.task = self._of_kind(self.task)

    def _of_kind(self, task: Task) -> Task:
        """The graphs as a task of the case's kind."""
        splits = {name: split.map(lambda row: self._columns(row, self.kind)) for name, split in task.splits.items()}
        return Task(task.name, self.kind, splits, task.tokenizer)

    def _columns(self, row: dict[str, Any], kind: str) -> dict[str, Any]:
        """What an example of a kind has beside `example_id`, made of a prompt and a target."""
        prompt, target = list(row["prompt_ids"]), list(row["target_ids"])
        if kind != "infill":
            return {"prompt_ids": prompt, "target_ids": target, "input_ids": target}
        blank = [self.task.tokenizer.mask_token_id if i % 3 else token for i, token in enumerate(target)]
        return {"prompt_ids": prompt, "input_ids": prompt + blank, "target_ids": prompt + target}

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
        model = build_model(self.cfg.model, self.task.tokenizer, self.cfg.generation, seed=self.cfg.seed)
        # The left-to-right ones of transformers return sequences alone by default.
        model.generation_config.return_dict_in_generate = True
        return model

    def examples(self, num: int = 6, kind: str = "seq2seq") -> list[dict[str, Any]]:
        """Training examples of a kind, of different lengths; those of "seq2seq" serve "lm" as well."""
        rows = self._graphs.splits["train"].select(range(num))
        cut = [
            {**row, "prompt_ids": row["prompt_ids"][: 26 - 3 * i], "target_ids": row["target_ids"][: 8 - i]}
            for i, row in enumerate(rows)
        ]
        return [{**row, **self._columns(row, kind), "epoch": 0, "position": i} for i, row in enumerate(cut)]

    def collator(self, kind: str, model: Any, **options: Any) -> Any:
        """The family's collator of a kind."""
        max_length = model.config.max_position_embeddings
        return build_collator(self.cfg.collator, kind, self.task.tokenizer, max_length, self.cfg.seed, **options)


def _written(model: Any, kind: str, batch: dict[str, torch.Tensor], seeds: list[int], **options) -> list[list[int]]:
    """What each row holds after its prompt, without padding; in infilling the whole row."""
    inputs = {name: tensor for name, tensor in batch.items() if name != "example_id"}
    output = model.generate(**inputs, seed=torch.tensor(seeds), max_new_tokens=8, **options)
    start, pad = 0 if kind == "infill" else batch["input_ids"].shape[1], model.config.pad_token_id
    return [[t for t in row if t != pad] for row in output.sequences[:, start:].tolist()]


def check_batch_composition(case: FamilyCase, tmp_path: Path) -> None:
    """The loss of a batch is the sum of its examples' losses, each padded to its own length; so are the counts."""
    model, loss = case.model(), case.trainer(tmp_path).loss
    for kind in case.kinds:
        collator, examples = case.collator(kind, model), case.examples(kind=kind)
        whole = loss(model, collator(examples))
        parts = [loss(model, collator([example])) for example in examples]
        torch.testing.assert_close(whole.loss_sum, sum(part.loss_sum for part in parts), rtol=1e-4, atol=1e-4)
        assert int(whole.num_items) == sum(int(part.num_items) for part in parts)
        assert int(whole.num_items) == int(loss.num_items(collator(examples)))


def check_generation(case: FamilyCase, tmp_path: Path) -> None:
    """A row decodes alike alone, in a batch and with padding on either side, wrapped or bare; its prompt stays.

    A row that is full says that it ended by its length.
    """
    model = case.model()
    for kind in case.kinds:
        collator, examples = case.collator(f"{kind}_prediction", model), case.examples(kind=kind)
        batch, seeds = collator(examples), [5, 1, 4, 2, 3, 9]
        together = _written(model, kind, batch, seeds)
        prompt, inputs = batch["input_ids"], {name: batch[name] for name in batch if name != "example_id"}
        output = model.generate(**inputs, seed=torch.tensor(seeds), max_new_tokens=8)
        if kind == "infill":
            for example, row in zip(examples, together, strict=True):
                assert _is_part([t for t in example["input_ids"] if t != model.config.mask_token_id], row)
        else:
            assert torch.equal(output.sequences[:, : prompt.shape[1]], prompt)
        assert output.nfe.shape == (len(prompt),)
        assert set(output.finish_reason) <= {"stop", "length"}
        order = batch["attention_mask"].logical_not().long().argsort(dim=-1, stable=True)
        right = {name: batch[name].gather(-1, order) for name in ("input_ids", "attention_mask")}
        assert _written(model, kind, {**batch, **right}, seeds) == together
        for number, example in enumerate(examples):
            alone = _written(model, kind, collator([example]), seeds[number : number + 1])
            assert alone == together[number : number + 1]
        _check_ends_by_length(model, inputs, kind)
        if kind == "seq2seq":
            _check_bare_prompts(model, examples, output.sequences, seeds)


def _check_ends_by_length(model: Any, inputs: dict[str, torch.Tensor], kind: str) -> None:
    """Rows that are full, and not with an end-of-sequence token, end with "length"."""
    if kind == "infill":
        return
    output = model.generate(**inputs, seed=0, max_new_tokens=1, return_history=True)
    end = getattr(model.config, "eos_token_id", None) or -1
    is_full = (output.history[:, inputs["input_ids"].shape[1] :] >= 0).any(dim=-1)
    is_cut = is_full & (output.sequences[:, -1] != end)
    for cut, reason in zip(is_cut.tolist(), output.finish_reason, strict=True):
        assert not cut or reason == "length", "a full row ends with finish_reason 'length'"


def _check_bare_prompts(model: Any, examples: list[dict[str, Any]], sequences: torch.Tensor, seeds: list[int]) -> None:
    """A prompt without the special tokens of the layout gets them in `generate`, and decodes as with them."""
    pad = model.config.pad_token_id
    for example, seed, expected in zip(examples, seeds, sequences.tolist(), strict=True):
        bare = torch.tensor([example["prompt_ids"]])
        row = model.generate(bare, seed=torch.tensor([seed]), max_new_tokens=8).sequences[0].tolist()
        assert [t for t in row if t != pad] == [t for t in expected if t != pad], "a bare prompt is not completed"


def _is_part(ids: list[int], row: list[int]) -> bool:
    """Whether `ids` stand in `row` in their order."""
    rest = iter(row)
    return all(token in rest for token in ids)


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
    for number, kind in enumerate(case.kinds):
        model, examples = case.model(), case.examples(kind=kind)
        model.set_attn_implementation("sdpa" if number else "eager")
        batches = [case.collator(kind, model, packing=packing)(examples) for packing in (True, False)]
        assert len(batches[0]["input_ids"]) < len(batches[1]["input_ids"])
        assert_close(*(loss_and_gradients(model, loss, batch) for batch in batches))


def check_batch_entries(case: FamilyCase, tmp_path: Path) -> None:
    """Batches hold what the collator declares; padded to one shape they have the same loss, metrics and gradients."""
    model, loss = case.model(), case.trainer(tmp_path).loss
    for kind in case.kinds:
        for packing in (False, True):
            collator, examples = case.collator(kind, model, packing=packing), case.examples(kind=kind)
            batch = collator(examples)
            check_entries(collator, batch, len(examples))
            static = StaticShapes(collator, collator.row_capacity or batch["input_ids"].shape[1] + 16)
            padded = static(examples)
            assert_close(loss_and_gradients(model, loss, padded), loss_and_gradients(model, loss, batch))
            if not packing:
                other = static([{**example, "epoch": 1} for example in examples[1:] + examples[1:2]])
                assert {name: x.shape for name, x in other.items()} == {name: x.shape for name, x in padded.items()}


def check_entries(collator: Collator, batch: dict[str, torch.Tensor], num_examples: int) -> None:
    """Assert that a batch of examples of one document each has the shapes and indices that its collator declares."""
    (B, L), several = batch["input_ids"].shape, "segment_ids" in batch
    sizes: dict[str, Any] = {"position": (B, L), "row": (B, L) if several else (B,)}
    sizes |= {"document": (num_examples,), "example": (num_examples,)}
    for name, tensor in batch.items():
        of = collator.entries[name].of
        if of not in AXES:
            sizes.setdefault(of, tensor.shape[:1])
        assert tensor.shape[: len(sizes[of])] == sizes[of], f"{name} is of every {of} and has shape {tensor.shape}"
    for name, tensor in batch.items():
        if (target := collator.entries[name].index_of) is not None:
            end = torch.Size(sizes[target]).numel()
            assert ((tensor >= 0) & (tensor < end)).all(), f"{name} has an index that is no {target}"


def check_full_rows(case: FamilyCase, tmp_path: Path) -> None:
    """Rows without padding, packed or not, need no mask: the same loss, metrics and gradients as with one of ones."""
    model, loss = case.model(), case.trainer(tmp_path).loss
    for examples, packing in ((case.examples(1, case.kind) * 3, False), (case.examples(3, case.kind), True)):
        batch = case.collator(case.kind, model, packing=packing)(examples)
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
    batch = case.collator(case.kind, model)(case.examples(kind=case.kind))
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
    batch = case.collator(f"{case.kind}_prediction", model)(case.examples(3, case.kind))
    assert _written(loaded, case.kind, batch, [1, 2, 3]) == _written(model, case.kind, batch, [1, 2, 3])


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
import json, sys, torch, traceback
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "xlm_hf":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocked())
from transformers import AutoModel, pipeline
for line in sys.stdin:
    folder, file, prompt = json.loads(line)
    try:
        model, info = AutoModel.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
        assert not any(info.values()), info
        batch = torch.load(file, weights_only=True)
        output = model.generate(**batch, seed=torch.tensor([1, 2, 3]), max_new_tokens=8)
        writer = pipeline("text-generation", model=folder, trust_remote_code=True)
        answer = [output.sequences.tolist(), writer(prompt, seed=torch.tensor([3]), max_new_tokens=8)]
    except Exception:
        answer = traceback.format_exc()
    print("answer " + json.dumps(answer), flush=True)
"""


@functools.cache
def _elsewhere() -> subprocess.Popen[str]:
    """A process in which this package cannot be imported; one for all families, since to import torch takes seconds."""
    command = [sys.executable, "-I", "-c", _REMOTE]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=tempfile.gettempdir())
    atexit.register(process.communicate)
    return process


def check_remote_code(case: FamilyCase, tmp_path: Path) -> None:
    """The exported folder decodes the same where this package cannot be imported, and its pipeline writes that too."""
    model, examples = case.model(), case.examples(3, case.kind)
    collator = case.collator(f"{case.kind}_prediction", model)
    tokenizer = with_prompt_layout(case.task.tokenizer, collator.head, collator.tail)
    export_model(model, tokenizer, tmp_path / "model")
    batch = collator(examples)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    torch.save(inputs, tmp_path / "batch.pt")
    sequences = model.generate(**inputs, seed=torch.tensor([1, 2, 3]), max_new_tokens=8).sequences.tolist()
    prompt = decode_text(tokenizer, [] if case.kind == "lm" else examples[0]["prompt_ids"])
    expected = [sequences, [{"generated_text": prompt + written_text(model, tokenizer, prompt)}]]
    process: Any = _elsewhere()
    process.stdin.write(json.dumps([str(tmp_path / "model"), str(tmp_path / "batch.pt"), prompt]) + "\n")
    process.stdin.flush()
    answer = next(line for line in process.stdout if line.startswith("answer "))
    assert json.loads(answer.removeprefix("answer ")) == expected, answer


def written_text(model: Any, tokenizer: Any, prompt: str) -> str:
    """What `generate` writes after a prompt in the tokenizer's layout, with the seed 3, as text."""
    ids = torch.tensor([tokenizer(prompt).input_ids])
    output = model.generate(ids, seed=torch.tensor([3]), max_new_tokens=8, return_dict_in_generate=True)
    assert torch.equal(output.sequences[:, : ids.shape[1]], ids), "the tokenizer's layout is not complete"
    return tokenizer.decode(output.sequences[0, ids.shape[1] :], skip_special_tokens=True)


CHECKS = [
    check_batch_composition,
    check_batch_entries,
    check_generation,
    check_packing,
    check_full_rows,
    check_ways_to_compute,
    check_saving_and_loading,
    check_training_and_resume,
    check_remote_code,
]
