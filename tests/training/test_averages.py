"""The averaged weights: against a slow loop, across resumes, and where they are used."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from tests.training.test_trainer import EXACT, Interrupt, assert_same_weights, evaluation_sets, make_trainer, weights
from xlm_hf.modeling.ilm import ILMForInsertionLM
from xlm_hf.training.averages import load_average
from xlm_hf.training.checkpoints import last_sound_checkpoint


class SaveWeights(TrainerCallback):
    """Keeps the weights after every optimiser step, and the starting ones."""

    def __init__(self):
        self.history = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.on_step_end(args, state, control, model=model)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.history.append({name: p.detach().double().clone() for name, p in model.named_parameters()})


def slow_average(history, decay):
    average = history[0]
    for step, current in enumerate(history[1:], 1):
        d = min(decay, (1 + step) / (10 + step))
        average = {name: d * average[name] + (1 - d) * current[name] for name in average}
    return average


@pytest.mark.parametrize(("decay", "accumulation"), [(0.5, 1), (0.999, 2)])
def test_average_is_that_of_a_slow_loop(tmp_path, decay, accumulation):
    recorder = SaveWeights()
    trainer = make_trainer(
        tmp_path, 4, callbacks=[recorder], ema_decay=decay, gradient_accumulation_steps=accumulation, num_train_epochs=1
    )
    trainer.train()
    assert len(recorder.history) == trainer.state.global_step + 1 == (7 if accumulation == 2 else 12)
    expected = slow_average(recorder.history, decay)
    for name, shadow in trainer.ema.shadow.items():
        assert shadow.dtype == torch.float32
        torch.testing.assert_close(shadow, expected[name].float(), rtol=1e-5, atol=1e-6)
        assert decay < 0.9 or not torch.allclose(shadow, recorder.history[-1][name].float(), atol=1e-5)


def test_average_survives_a_resume_to_the_bit(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2, "ema_decay": 0.99}
    whole = make_trainer(tmp_path / "whole", **saving)
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        make_trainer(tmp_path / "run", callbacks=[Interrupt(8)], **saving).train()
    resumed = make_trainer(tmp_path / "run", **saving)
    resumed.train(resume_from_checkpoint=str(last_sound_checkpoint(tmp_path / "run")))
    assert_same_weights(resumed.ema.shadow, whole.ema.shadow, **EXACT)
    assert_same_weights(weights(resumed), weights(whole), **EXACT)
    again = make_trainer(tmp_path / "run", **saving)
    again.train(resume_from_checkpoint=str(last_sound_checkpoint(tmp_path / "run")))
    assert_same_weights(again.ema.shadow, whole.ema.shadow, **EXACT)


def test_average_is_evaluated_and_exported_and_the_training_goes_on_raw(tmp_path):
    plain = make_trainer(tmp_path / "plain")
    plain.train()
    trainer = make_trainer(
        tmp_path / "run",
        ema_decay=0.99,
        evaluation_sets=evaluation_sets(5),
        save_strategy="steps",
        save_steps=3,
        eval_strategy="steps",
        eval_steps=3,
    )
    for evaluation_set in trainer.evaluation_sets:
        evaluation_set.stages = ["validation", "test"]
    trainer.train()
    raw = weights(trainer)
    assert_same_weights(raw, weights(plain), **EXACT)
    averaged_loss = trainer.evaluate(metric_key_prefix="test")["test/loss"]
    trainer.args.use_ema = False
    raw_loss = trainer.evaluate(metric_key_prefix="test")["test/loss"]
    trainer.args.use_ema = True
    assert averaged_loss != pytest.approx(raw_loss, rel=1e-4)
    with trainer.averaged_weights():
        assert_same_weights(dict(trainer.model.named_parameters()), trainer.ema.shadow, **EXACT)
    assert_same_weights(weights(trainer), raw, **EXACT)

    trainer.save_model(str(tmp_path / "exported"))
    exported = load_file(tmp_path / "exported" / "model.safetensors")
    assert_same_weights({name: exported[name] for name in trainer.ema.shadow}, trainer.ema.shadow, **EXACT)

    checkpoint = last_sound_checkpoint(tmp_path / "run")
    loaded = ILMForInsertionLM.from_pretrained(checkpoint)
    assert_same_weights(loaded.state_dict(), raw, **EXACT)
    assert load_average(loaded, checkpoint)
    assert_same_weights(dict(loaded.named_parameters()), trainer.ema.shadow, **EXACT)
    with pytest.raises(ValueError, match="is the average of another model"):
        load_average(torch.nn.Linear(2, 2), checkpoint)


def test_a_decay_out_of_range_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"ema_decay must be in \[0, 1\) and is 1.5"):
        make_trainer(tmp_path, ema_decay=1.5)


class Counts(TrainerCallback):
    def __init__(self):
        self.seen = []

    def on_step_end(self, args, state, control, **kwargs):
        self.seen.append(state.num_input_tokens_seen)


@pytest.mark.parametrize(("batch_size", "accumulation", "workers"), [(8, 1, 0), (2, 4, 2)])
def test_tokens_without_padding_are_counted_at_every_step(tmp_path, batch_size, accumulation, workers):
    counts = Counts()
    options = {"gradient_accumulation_steps": accumulation, "dataloader_num_workers": workers}
    saving = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2, **options}
    trainer = make_trainer(tmp_path, batch_size, callbacks=[counts], **saving)
    trainer.train()
    lengths = [len(ids) for _, ids in trainer.loss.seen]
    per_epoch, expected = 44, []
    for epoch in range(2):
        for start in range(0, per_epoch, 8):
            expected.append(sum(lengths[: epoch * per_epoch + min(start + 8, per_epoch)]))
    assert counts.seen == expected
    logged = [log["num_input_tokens_seen"] for log in trainer.state.log_history if "loss" in log]
    assert logged == expected
    with pytest.raises(KeyboardInterrupt):
        make_trainer(tmp_path / "run", batch_size, callbacks=[Interrupt(9)], **saving).train()
    resumed = make_trainer(tmp_path / "run", batch_size, **saving)
    resumed.train(resume_from_checkpoint=str(last_sound_checkpoint(tmp_path / "run")))
    assert resumed.state.num_input_tokens_seen == expected[-1]
