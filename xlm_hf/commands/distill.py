"""job=distill: write the texts of a teacher, on which another model is then trained."""

from pathlib import Path

from accelerate import PartialState
from omegaconf import DictConfig

from xlm_hf.building import build_collator, build_task
from xlm_hf.commands._run import model_of_checkpoint, run_directory, say, write_results
from xlm_hf.evaluation import EvaluationSet, check_tokenizer, run_evaluation_set


def run(cfg: DictConfig) -> Path:
    """Decode every prompt of a task's training set with `checkpoint`, the teacher, once.

    Sequence-level knowledge distillation (Kim & Rush, arXiv 1606.07947): a student is trained on what the teacher
    writes in place of the targets, `task.distilled=FILE`. Beam search is an option of a left-to-right teacher,
    `generation.num_beams=4`.

    Returns:
        the file of a record for each prompt, see `xlm_hf.evaluation.decode_records`.

    Raises:
        ValueError: for a task without prompts, or one that takes no teacher's texts.
    """
    task = build_task(cfg.task)
    if task.kind != "seq2seq":
        raise ValueError(f"job=distill rewrites the targets of prompts, and {task.name} is a task of {task.kind}.")
    if "distilled" not in cfg.task:
        raise ValueError(f"{task.name} takes no teacher's texts, having no option distilled: use a task of pairs.")
    train = task.splits["train"]
    model = model_of_checkpoint(cfg)
    check_tokenizer(task.tokenizer, model.config)
    output_dir = run_directory(cfg)
    model.to(PartialState().device)
    once = {tuple(ids): index for index, ids in enumerate(train["prompt_ids"])}
    prompts = train.select(sorted(once.values()))
    max_length = model.config.max_position_embeddings
    collator = build_collator(cfg.collator, "seq2seq_prediction", task.tokenizer, max_length, cfg.seed)
    wanted = EvaluationSet("distilled", prompts, collator, ("test",), generate=True)
    batch_size = cfg.trainer.per_device_eval_batch_size
    folder = output_dir / "predictions"
    metrics, records = run_evaluation_set(model, wanted, task.tokenizer, batch_size, cfg.seed, folder=folder)
    file = folder / "distilled.jsonl"
    if PartialState().is_main_process:
        write_results(output_dir, metrics, {"distilled": records})
        say(f"The texts of {len(records):,} prompts, of {len(train):,} examples: {file}")
        say(f"Next: train another family on this task with task.distilled={file}")
    return file
