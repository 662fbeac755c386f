"""What we override and call of the private methods of transformers' Trainer is still there and still called.

No release promises them. An upgrade that renames one would leave our override unused, in silence.
"""

import inspect

import pytest
from transformers import Trainer

from xlm_hf.hub.upload import PushesRepositories
from xlm_hf.training.evaluates_sets import EvaluatesSets
from xlm_hf.training.trainer import XLMTrainer

# name: its arguments, the methods of Trainer that call it
OVERRIDDEN = {
    "_load_optimizer_and_scheduler": ("checkpoint", ["_prepare_for_training"]),
    "_load_from_checkpoint": ("resume_from_checkpoint model", ["train", "_prepare_for_training"]),
    "_issue_warnings_after_load": ("load_result", ["_load_from_checkpoint", "_load_best_model"]),
    "_prepare_for_training": ("max_steps train_dataloader resume_from_checkpoint", ["_inner_training_loop"]),
    "_run_epoch": (
        "model epoch train_dataloader steps_in_epoch num_update_steps_per_epoch trial ignore_keys_for_eval start_time "
        "resume_from_checkpoint epochs_trained steps_trained_in_current_epoch",
        ["_inner_training_loop"],
    ),
    "_get_num_items_in_batch": ("batch_samples device", ["get_batch_samples", "prediction_step"]),
    "_update_auto_batch_size": ("batch_size", ["_inner_training_loop"]),
    "_track_num_input_tokens": ("inputs", ["_run_epoch"]),
    "_get_grad_norm": ("model grad_norm", ["_run_epoch"]),
    "_maybe_log_save_evaluate": (
        "tr_loss grad_norm model trial epoch ignore_keys_for_eval start_time learning_rate",
        ["_run_epoch"],
    ),
    "_determine_best_metric": ("metrics trial", ["_maybe_log_save_evaluate"]),
    "_save_checkpoint": ("model trial", ["_maybe_log_save_evaluate"]),
    "_load_best_model": ("", ["_finalize_training"]),
    "_save": ("output_dir state_dict", ["save_model"]),
    "_push_from_checkpoint": ("checkpoint_folder", ["_save_checkpoint"]),
}
CALLED = {
    "_save_optimizer_and_scheduler": "output_dir",
    "_save_scaler": "output_dir",
    "_save_rng_state": "output_dir",
    "_finish_current_push": "",
    "_get_output_dir": "trial",
    "_prepare_inputs": "inputs",
}


def arguments(name):
    return list(inspect.signature(getattr(Trainer, name)).parameters)[1:]


def test_the_table_is_complete():
    ours = {name for cls in (XLMTrainer, EvaluatesSets, PushesRepositories) for name in vars(cls)}
    private = {name for name in ours if name.startswith("_") and not name.startswith("__")}
    assert {name for name in private if hasattr(Trainer, name)} == set(OVERRIDDEN)


@pytest.mark.parametrize("name", OVERRIDDEN)
def test_an_overridden_method_is_called_by_the_same_methods_with_the_same_arguments(name):
    names, callers = OVERRIDDEN[name]
    assert arguments(name) == names.split()
    methods = {caller: value for caller, value in vars(Trainer).items() if inspect.isfunction(value)}
    assert [caller for caller, f in methods.items() if f"self.{name}(" in inspect.getsource(f)] == callers
    ours = next(cls for cls in XLMTrainer.__mro__ if name in vars(cls))
    assert ours is not Trainer


@pytest.mark.parametrize("name", CALLED)
def test_a_method_that_we_call_takes_the_same_arguments(name):
    assert arguments(name) == CALLED[name].split()


def test_an_epoch_is_run_with_its_number_by_name():
    """`_run_epoch` reads it from the keywords."""
    source = inspect.getsource(Trainer._inner_training_loop)
    assert "epoch=epoch" in source[source.index("self._run_epoch(") :]


def test_the_arguments_that_set_up_a_loader_are_those_of_transformers():
    assert inspect.signature(Trainer.set_initial_training_values).parameters.keys() == {"self", "args", "dataloader"}
