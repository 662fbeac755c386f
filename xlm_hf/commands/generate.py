"""job=generate: decode prompts with a checkpoint, showing the order in which the tokens were written."""

import json
import sys
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from transformers import PreTrainedTokenizerBase
from transformers.utils import is_vision_available

from xlm_hf.checkpoints import write_text
from xlm_hf.commands.common import (
    build_collator,
    build_task,
    load_model,
    load_tokenizer,
    next_command,
    run_directory,
    say,
    write_results,
)
from xlm_hf.decode_history import history_html, save_gif
from xlm_hf.evaluation import content_places
from xlm_hf.streamers import BatchDiffusionStreamer, DraftRecorder


def run(cfg: DictConfig) -> list[dict[str, Any]]:
    """Decode `prompts` (a JSONL file), or the first `num_samples` test examples of the task; print and save them.

    In a terminal the decode is shown while it goes on. `decodes.html` in the run's folder plays it back, and so does
    `decode.gif`, of the first row, where Pillow is installed.

    Returns:
        one record per decode, as written to `predictions/generate.jsonl`: prompt, prediction, the ids of both, nfe,
        finish_reason and `steps`, the step that wrote each token of the prediction.
    """
    model: Any = load_model(cfg)
    tokenizer = load_tokenizer(cfg)
    examples = _examples_from_file(cfg, tokenizer) if cfg.prompts else _examples_from_task(cfg)
    kind = "seq2seq" if any(example["prompt_ids"] for example in examples) else "lm"
    collator = build_collator(cfg, f"{kind}_prediction", tokenizer, model)
    output_dir = run_directory(cfg)
    make_streamer = BatchDiffusionStreamer if sys.stdout.isatty() else DraftRecorder
    records: list[dict[str, Any]] = []
    frames = []
    batch_size = cfg.trainer.per_device_eval_batch_size
    for start in range(0, len(examples), batch_size):
        batch = collator(examples[start : start + batch_size])
        seeds = batch.pop("example_id") + cfg.seed
        streamer = make_streamer(tokenizer)
        output = model.generate(**batch, seed=seeds, return_history=True, streamer=streamer)
        frames += [streamer.frames(row) for row in range(len(seeds))]
        width = batch["input_ids"].shape[1]
        for row, example in enumerate(examples[start : start + batch_size]):
            written, steps = output.sequences[row, width:].tolist(), output.history[row, width:].tolist()
            places = content_places(written, tokenizer)
            ids = [written[place] for place in places]
            records.append(
                {
                    **example,
                    "prediction_ids": ids,
                    "prompt": tokenizer.decode(example["prompt_ids"]),
                    "prediction": tokenizer.decode(ids),
                    "steps": [steps[place] for place in places],
                    "nfe": int(output.nfe[row]),
                    "finish_reason": output.finish_reason[row],
                }
            )
            say(render(records[-1], tokenizer) + "\n")
    write_results(output_dir, {"samples": len(records)}, {"generate": records})
    write_text(output_dir / "decodes.html", history_html(frames, streamer.separator, cfg.experiment))
    if is_vision_available():
        save_gif(frames[0], output_dir / "decode.gif", streamer.separator)
    say(f"Decodes: {output_dir}/predictions/generate.jsonl; step by step: {output_dir}/decodes.html")
    say(f"Next: {next_command('job=evaluate', f'checkpoint={cfg.checkpoint}')}")
    return records


def render(record: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> str:
    """A decode as text: the prompt, then the sequence after every step, the tokens just written in brackets."""
    words = [str(tokenizer.decode([token])) for token in record["prediction_ids"]]
    steps = record["steps"]
    lines = [f"prompt      {record['prompt']}"]
    for step in sorted(set(steps)):
        shown = [f"[{word}]" if at == step else word for word, at in zip(words, steps, strict=True) if at <= step]
        lines.append(f"step {step + 1:<6} {' '.join(shown)}")
    lines.append(f"prediction  {record['prediction']}   ({record['finish_reason']}, {record['nfe']} forward passes)")
    if "reference" in record:
        lines.append(f"reference   {record['reference']}")
    return "\n".join(lines)


def _examples_from_task(cfg: DictConfig) -> list[dict[str, Any]]:
    task = build_task(cfg)
    rows = list(task.splits["test"].select(range(min(cfg.num_samples, len(task.splits["test"])))))
    return [
        {
            "example_id": row["example_id"],
            "prompt_ids": row.get("prompt_ids", []),
            **({"reference": task.tokenizer.decode(row["target_ids"])} if "target_ids" in row else {}),
        }
        for row in rows
    ]


def _examples_from_file(cfg: DictConfig, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    file = Path(cfg.prompts)
    if not file.exists():
        raise ValueError(f"There is no file {file}: prompts names a JSONL file with a `prompt` or `prompt_ids` a line.")
    examples = []
    for number, line in enumerate(file.read_text().splitlines()):
        try:
            row = json.loads(line)
            ids = (
                row["prompt_ids"] if "prompt_ids" in row else tokenizer.encode(row["prompt"], add_special_tokens=False)
            )
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f"Line {number + 1} of {file} is not a JSON object with a `prompt` or `prompt_ids`: {line[:60]}"
            ) from None
        examples.append({"example_id": number, "prompt_ids": ids})
    if not examples:
        raise ValueError(f"{file} is empty: write one JSON object with a `prompt` on each line.")
    return examples
