import copy

import pytest
import torch

from tests.training.test_trainer import EXACT, Interrupt, assert_same_weights, make_trainer, weights
from xlm_hf.training.checkpoints import last_sound_checkpoint
from xlm_hf.training.optimizers import MuonWithAdamW, layer_matrices


def test_muon_takes_the_matrices_of_the_layers_and_adamw_the_rest(tmp_path):
    trainer = make_trainer(tmp_path, muon_learning_rate=0.02, learning_rate=1e-3, weight_decay=0.1)
    names = {parameter: name for name, parameter in trainer.model.named_parameters()}
    adamw, muon = trainer.create_optimizer().parts
    by_muon = sorted(names[p] for group in muon.param_groups for p in group["params"])
    assert by_muon == sorted(
        f"model.layers.0.{name}.weight"
        for name in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
    )
    by_adamw = {names[p]: group["weight_decay"] for group in adamw.param_groups for p in group["params"]}
    assert set(by_adamw) | set(by_muon) == set(names.values())
    assert by_adamw["lm_head.weight"] == 0.1
    assert by_adamw["model.layers.0.mlp.up_proj.bias"] == by_adamw["model.norm.weight"] == 0.0
    assert layer_matrices(torch.nn.Linear(2, 2)) == []


def test_one_step_equals_the_two_optimisers_apart():
    torch.manual_seed(0)
    matrix, vector = torch.nn.Parameter(torch.randn(4, 3)), torch.nn.Parameter(torch.randn(5))
    apart = copy.deepcopy([matrix, vector])
    parts, optimizers = (
        [torch.optim.AdamW([v], lr=0.01), torch.optim.Muon([m], lr=0.1, weight_decay=0.0)]
        for m, v in ([matrix, vector], apart)
    )
    together = MuonWithAdamW(*parts)
    for _ in range(3):
        for parameters in ([matrix, vector], apart):
            ((parameters[0] ** 3).sum() + (parameters[1] ** 2).sum()).backward()
        together.step()
        together.zero_grad()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert torch.equal(matrix, apart[0])
    assert torch.equal(vector, apart[1])


def test_the_schedule_reaches_both_rates_also_after_loading(tmp_path):
    trainer = make_trainer(tmp_path, muon_learning_rate=0.5, learning_rate=0.1)
    trainer.create_optimizer_and_scheduler(10)
    optimizer = trainer.optimizer
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(5):
        optimizer.step()
        trainer.lr_scheduler.step()
    assert [group["lr"] for part in optimizer.parts for group in part.param_groups] == pytest.approx([0.05, 0.25])


def test_an_interrupted_run_with_muon_ends_where_the_other_does(tmp_path):
    options = {"muon_learning_rate": 0.05, "lr_scheduler_type": "linear"}
    whole = make_trainer(tmp_path / "whole", **options)
    whole.train()
    saving = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2}
    with pytest.raises(KeyboardInterrupt):
        make_trainer(tmp_path / "run", callbacks=[Interrupt(8)], **options, **saving).train()
    resumed = make_trainer(tmp_path / "run", **options, **saving)
    resumed.train(resume_from_checkpoint=str(last_sound_checkpoint(tmp_path / "run")))
    assert_same_weights(weights(resumed), weights(whole), **EXACT)
