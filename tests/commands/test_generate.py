"""job=generate: which random numbers a row is decoded with."""

import json

import pytest
import torch
from omegaconf import OmegaConf

from xlm_hf.commands import generate
from xlm_hf.modules.counter_random import random_bits
from xlm_hf.tasks.tokenizers import byte_tokenizer, with_prompt_layout
from xlm_hf.testing import FamilyCase


@pytest.fixture
def seeds_of(tmp_path, monkeypatch):
    """The seeds of the rows that `job=generate` decodes under a seed."""
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"{i} 1"}) + "\n" for i in range(5)))
    case = FamilyCase("ilm", "generation.max_new_tokens=1", "trainer.per_device_eval_batch_size=2")
    model = case.model()
    monkeypatch.setattr(generate, "model_of_checkpoint", lambda cfg: model)
    monkeypatch.setattr(generate, "load_tokenizer", lambda *arguments: case.task.tokenizer)

    def seeds(seed):
        case.cfg.update(seed=seed, prompts=f"{tmp_path}/prompts.jsonl", output_dir=f"{tmp_path}/out", experiment="e")
        found, decode = [], type(model).generate
        with monkeypatch.context() as patch:
            patch.setattr(
                model, "generate", lambda *a, seed, **k: found.append(seed) or decode(model, *a, seed=seed, **k)
            )
            generate.run(case.cfg)
        return torch.cat(found).tolist()

    return seeds


def test_another_seed_gives_every_row_other_numbers(seeds_of):
    rows = {seed: seeds_of(seed) for seed in (0, 1)}
    assert not set(rows[0]) & set(rows[1])
    # As in an evaluation, whatever the batches.
    for seed, found in rows.items():
        assert found == random_bits(seed, torch.arange(5)).tolist()


def test_a_model_of_plain_text_goes_on_from_its_prompts(tmp_path):
    file, tokenizer = tmp_path / "prompts.jsonl", byte_tokenizer()
    file.write_text('{"prompt": "ab"}\n{"prompt_ids": [9]}\n')
    cfg, bos = OmegaConf.create({"prompts": str(file)}), tokenizer.bos_token_id
    for layout, kind in (((), "seq2seq"), (((), (bos,)), "seq2seq"), (((bos,), ()), "lm")):
        made = with_prompt_layout(tokenizer, *layout) if layout else tokenizer
        examples, found = generate._examples_from_file(cfg, made)
        assert found == kind
        assert examples[0]["prompt_ids"] == tokenizer.encode("ab", add_special_tokens=False)
    case = FamilyCase("mlm")
    prompts = case.collator("lm_prediction", case.model())([{"example_id": 0, "prompt_ids": [9, 8]}, {"example_id": 1}])
    assert prompts["input_ids"].tolist() == [[4, 9, 8], [0, 0, 4]]
