"""job=generate: decode prompts with a checkpoint, showing the order in which the tokens were written."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from datasets.fingerprint import Hasher
from omegaconf import DictConfig
from transformers import PreTrainedTokenizerBase
from transformers.utils import is_matplotlib_available, is_vision_available

from xlm_hf.building import build_collator, build_task, load_tokenizer
from xlm_hf.commands._run import model_of_checkpoint, next_command, run_directory, say, write_results
from xlm_hf.evaluation import check_blanks, check_tokenizer, decode_records
from xlm_hf.files import JOURNAL_SUFFIX, Journal, write_text
from xlm_hf.modules.checked_options import Interval, check_value
from xlm_hf.modules.counter_random import random_bits
from xlm_hf.reports.decode_page import history_html, save_gif
from xlm_hf.reports.streamers import MARKS, MASK, BatchDiffusionStreamer, Decode, DraftRecorder, Token
from xlm_hf.tasks.readers import encoded, json_rows


def run(cfg: DictConfig) -> list[dict[str, Any]]:
    """Decode `prompts` (a JSONL file), or `num_samples` of the task; print and save them.

    A file whose prompts have mask tokens is filled in; a model of plain text goes on from its prompts. `source_ids`
    beside a prompt, a text to be corrected, go to the collator. Of a task with prompts or blanks the first test
    examples are decoded; of one without, samples are written from nothing.

    What is decoded is kept at once: the same command with the same output_dir goes on where it was interrupted.

    In a terminal the decode is shown while it goes on. `decodes.html` in the run's folder plays it back, and so does
    `decode.gif`, of the first row, where Pillow and matplotlib are installed.

    Returns:
        one record per decode, as written to `predictions/generate.jsonl`: see `xlm_hf.evaluation.decode_records`.
    """
    model: Any = model_of_checkpoint(cfg)
    tokenizer = load_tokenizer(cfg.checkpoint, cfg.trust_remote_code)
    check_tokenizer(tokenizer, model.config)
    examples, kind = _examples_from_file(cfg, tokenizer) if cfg.prompts else _examples_from_task(cfg)
    max_length = model.config.max_position_embeddings
    collator = build_collator(cfg.collator, f"{kind}_prediction", tokenizer, max_length, cfg.seed)
    output_dir = run_directory(cfg)
    make_streamer = BatchDiffusionStreamer if sys.stdout.isatty() else DraftRecorder
    streamer = make_streamer(tokenizer)
    batch_size = cfg.trainer.per_device_eval_batch_size
    key = Hasher.hash((model.state_dict(), model.generation_config.to_dict(), examples, kind, cfg.seed))
    journal = Journal(output_dir / "predictions" / f"generate{JOURNAL_SUFFIX}", key)
    for start in range(len(journal), len(examples), batch_size):
        batch = collator(examples[start : start + batch_size])
        seeds = random_bits(cfg.seed, batch.pop("example_id"))
        streamer = make_streamer(tokenizer)
        output = model.generate(**batch, seed=seeds, return_history=True, streamer=streamer)
        made = decode_records(output, batch, examples[start : start + batch_size], kind, tokenizer)
        journal.extend([record, asdict(decode)] for record, decode in zip(made, streamer.decodes, strict=True))
        for record, decode in zip(made, streamer.decodes, strict=True):
            say(render(record, decode, tokenizer.pad_token) + "\n")
    records = [record for record, _ in journal]
    decodes = [Decode.from_dict(decode) for _, decode in journal]
    write_results(output_dir, {}, {"generate": records})
    write_text(output_dir / "decodes.html", history_html(decodes, streamer.separator, cfg.experiment))
    if is_vision_available() and is_matplotlib_available():
        save_gif(decodes[0], output_dir / "decode.gif", streamer.separator)
    say(f"Decodes: {output_dir}/predictions/generate.jsonl; step by step: {output_dir}/decodes.html")
    say(f"Next: {next_command('job=evaluate', f'checkpoint={cfg.checkpoint}')}")
    return records


def render(record: dict[str, Any], decode: Decode, pad_token: str) -> str:
    """A decode as text: prompt, source of a correction, what every step wrote, with what it did in brackets.

    [word] was a mask, [+word] was inserted, [-word] deleted, [~word] put in place of another, and [_] masked again.
    """
    lines = [f"{name:<11} {record[name]}" for name in ("prompt", "source") if name in record]
    for step, frame in enumerate(decode.frames()):
        shown = [token for token in frame if token.text != pad_token]
        if any(token.event in MARKS for token in shown):
            words = [_word(token, is_infill=-1 in record["steps"]) for token in shown]
            lines.append(f"step {step:<6} {' '.join(filter(None, words))}")
    lines.append(f"prediction  {record['prediction']}   ({record['finish_reason']}, {record['nfe']} forward passes)")
    if record["reference"]:
        lines.append(f"reference   {record['reference']}")
    return "\n".join(lines)


def _word(token: Token, is_infill: bool) -> str:
    text = "_" if token.text == MASK else token.text
    if token.event in MARKS:
        return f"[{MARKS[token.event]}{text}]"
    # Where something was given, it shows, and so does what is not written yet, as a gap.
    return text if is_infill or not (token.event or text == "_") else ""


def _examples_from_task(cfg: DictConfig) -> tuple[list[dict[str, Any]], str]:
    task = build_task(cfg.task)
    if task.kind == "lm":
        return [{"example_id": number} for number in range(cfg.num_samples)], task.kind
    test = task.splits["test"]
    return list(test.select(range(min(cfg.num_samples, len(test))))), task.kind


def _examples_from_file(cfg: DictConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[list[dict[str, Any]], str]:
    file = Path(cfg.prompts)
    if not file.is_file():
        raise ValueError(f"There is no file {file}: prompts names a JSONL file with a `prompt` or `prompt_ids` a line.")
    rows, sources = [], []
    for number, row in json_rows(file):
        where, ids = f"{file}, line {number}", Annotated[list[int], Interval(f"[0, {len(tokenizer)})")]
        known = [name for name in ("prompt_ids", "input_ids", "prompt") if name in row]
        if not known:
            raise ValueError(f"{where} has no `prompt`, `prompt_ids` or `input_ids`: add one of them.")
        for name in (*known, *({"source_ids"} & row.keys())):
            check_value(f"{where}: {name}", row[name], str if name == "prompt" else ids)
        try:
            encoded(row.get("prompt", ""))
        except ValueError as error:
            raise ValueError(f"{where}: prompt {error}.") from None
        given = row[known[0]]
        rows.append(tokenizer.encode(given, add_special_tokens=False) if known[0] == "prompt" else given)
        sources.append({name: row[name] for name in ("source_ids",) if name in row})
    if not rows:
        raise ValueError(f"{file} is empty: write one JSON object with a `prompt` on each line.")
    is_infill = any(tokenizer.mask_token_id in ids for ids in rows)
    name = "input_ids" if is_infill else "prompt_ids"
    examples = [
        {"example_id": i, name: ids, **source} for i, (ids, source) in enumerate(zip(rows, sources, strict=True))
    ]
    if is_infill:
        check_blanks(examples, tokenizer)
    is_prompt = any(rows) and not _goes_on(tokenizer)
    return examples, "infill" if is_infill else "seq2seq" if is_prompt else "lm"


def _goes_on(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a model goes on from the beginning of a text: its tokenizer puts special tokens only before a prompt."""
    bare, whole = (tokenizer.encode("a", add_special_tokens=added) for added in (False, True))
    return whole != bare and whole[-len(bare) :] == bare
