"""Trains and evaluates under torchrun; run by test_distributed.py."""

import json
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from datasets import Dataset
from safetensors.torch import save_file

from tests.training.test_trainer import evaluation_sets, make_trainer, weights
from xlm_hf.evaluation import EvaluationSet, run_evaluation_set
from xlm_hf.metrics import load_metric
from xlm_hf.modeling.mdlm import MDLMLoss
from xlm_hf.objectives import head_operator
from xlm_hf.testing import FamilyCase


def main(output_dir: Path, batch_size: int) -> None:
    trainer = make_trainer(
        output_dir,
        batch_size,
        evaluation_sets=evaluation_sets(11),
        save_strategy="steps",
        save_steps=4,
        ddp_backend="gloo",
        num_train_epochs=1,
        dataloader_drop_last=True,
    )
    for module in trainer.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    trainer.model.config.attention_dropout = 0.0
    # Two ranks compute the vocabulary head in chunks within the wrapped model, one rank all logits at once.
    if PartialState().num_processes > 1:
        head_operator.rows_per_chunk = lambda *_: 4
    trainer.train()
    metrics = trainer.evaluate(metric_key_prefix="test")
    likelihood, samples = likelihood_and_samples()
    state = PartialState()
    (output_dir / f"seen_{state.process_index}.json").write_text(json.dumps(trainer.loss.seen))
    if state.is_main_process:
        save_file(weights(trainer), output_dir / "final.safetensors")
        logs = [log for log in trainer.state.log_history if "loss" in log]
        results = {"metrics": metrics, "logs": logs, "records": trainer.predictions["test"]}
        results.update(likelihood=likelihood, samples=samples)
        (output_dir / "results.json").write_text(json.dumps(results))


def likelihood_and_samples():
    """Two draws of a bound for five texts, and seven samples from nothing: neither count is that of the ranks."""
    case = FamilyCase("mdlm", "generation.max_new_tokens=8", "++generation.do_sample=true")
    model, tokenizer = case.model(), case.task.tokenizer
    rows = [{"example_id": e["example_id"], "input_ids": e["input_ids"], "num_characters": 9} for e in case.examples(5)]
    texts, nothing = Dataset.from_list(rows), Dataset.from_dict({"example_id": range(7)})
    bound = EvaluationSet("a", texts, case.collator("lm", model), [], loss=MDLMLoss(), kind="lm", num_draws=2)
    collator, metrics = case.collator("lm_prediction", model), [load_metric("sample_entropy")]
    samples = EvaluationSet("b", nothing, collator, [], generate=True, kind="lm", metrics=metrics)
    return run_evaluation_set(model, bound, tokenizer, 2, 0)[0], run_evaluation_set(model, samples, tokenizer, 2, 0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
    PartialState().destroy_process_group()
