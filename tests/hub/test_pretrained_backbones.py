"""Language models of transformers as backbones: both directions, padding, packing, saving, pretrained weights, LoRA."""

import json
import subprocess
import sys

import pytest
import torch
from omegaconf import OmegaConf
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedTokenizerFast

from xlm_hf.building import build_model, build_task, compose, positions_of
from xlm_hf.commands.train import run as train
from xlm_hf.modeling.arlm import ARLMConfig
from xlm_hf.modeling.bd3lm import BD3LMConfig
from xlm_hf.modeling.ilm import ILMConfig
from xlm_hf.modeling.mdlm import MDLMConfig
from xlm_hf.modeling.mlm import MLMConfig
from xlm_hf.modules.transformer_backbone import TransformerBackbone
from xlm_hf.tasks.tokenizers import number_tokenizer

V = 31
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48, "vocab_size": V}
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
BACKBONES = {
    "llama": {**SIZES, "num_key_value_heads": 1, "initializer_range": 0.3, **IDS},
    "qwen3": {**SIZES, "num_key_value_heads": 1, "head_dim": 16, "initializer_range": 0.3, **IDS},
    "gpt2": {
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 2,
        "n_positions": 64,
        "vocab_size": V,
        "initializer_range": 0.3,
        **IDS,
    },
    "modernbert": {
        **{
            **SIZES,
            "num_hidden_layers": 3,
            "local_attention": 4,
            "initializer_range": 0.3,
            "initializer_cutoff_factor": 9.0,
        },
        **{**IDS, "cls_token_id": 1, "sep_token_id": 2},
    },
    "bert": {**SIZES, "max_position_embeddings": 64, "initializer_range": 0.3, **IDS},
    "roberta": {**SIZES, "max_position_embeddings": 64, "initializer_range": 0.3, **IDS},
}
CONFIGS = {"mdlm": MDLMConfig, "mlm": MLMConfig, "ilm": ILMConfig, "arlm": ARLMConfig}
DECODERS = ("llama", "qwen3", "gpt2")
GRID = [(family, kind) for family in CONFIGS for kind in BACKBONES if family != "arlm" or kind in DECODERS]


def family_model(family, kind, **options):
    torch.manual_seed(0)
    bias = {"lm_head_bias": kind in ("modernbert", "bert", "roberta")}
    config = CONFIGS[family](
        **{"vocab_size": V, "backbone_config": {"model_type": kind, **BACKBONES[kind]}, **bias, **options}
    )
    return AutoModel.from_config(config).eval()


def states(model, ids, **inputs):
    with torch.no_grad():
        return model.model(ids, **inputs).last_hidden_state


def some_ids(rows, length, seed=0):
    return torch.randint(7, V, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", BACKBONES)
def test_every_token_sees_every_other(kind, attention):
    model = family_model("mlm", kind)
    model.set_attn_implementation(attention)
    assert model.model.language_model.config._attn_implementation == attention
    ids = some_ids(1, 5)
    before = states(model, ids)
    for place in range(5):
        changed = ids.clone()
        changed[0, place] = ids[0, place] % (V - 7) + 6
        assert ((states(model, changed) - before).abs().amax(-1) > 1e-6).all(), place


@pytest.mark.parametrize("kind", BACKBONES)
def test_padding_and_documents_change_nothing(kind):
    model = family_model("mlm", kind)
    first, second = some_ids(1, 9, seed=1), some_ids(1, 6, seed=2)
    alone = torch.cat((states(model, first), states(model, second)), dim=1)
    for left, right in ((0, 3), (3, 0), (2, 1)):
        ids = torch.nn.functional.pad(second, (left, right))
        mask = torch.nn.functional.pad(torch.ones_like(second), (left, right))
        padded = states(model, ids, attention_mask=mask)[:, left : left + 6]
        torch.testing.assert_close(padded, alone[:, 9:], rtol=1e-4, atol=1e-4)
    segments = torch.tensor([[0] * 9 + [1] * 6])
    positions = torch.tensor([[*range(9), *range(6)]])
    for attention in ("eager", "sdpa"):
        model.set_attn_implementation(attention)
        packed = states(model, torch.cat((first, second), 1), segment_ids=segments, position_ids=positions)
        torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-4)


def test_local_attention_stays_local():
    model = family_model("mlm", "modernbert")
    config = model.model.language_model.config
    config.layer_types = ["sliding_attention"] * 3
    for layer in model.model.language_model.model.layers:
        layer.attention_type = "sliding_attention"
    ids = some_ids(1, 30)
    changed = ids.clone()
    changed[0, 0] = ids[0, 0] % (V - 7) + 6
    differs = (states(model, ids) - states(model, changed)).abs().amax(-1)[0] > 1e-6
    assert differs[1]
    assert not differs[-1]


@pytest.mark.parametrize(("family", "kind"), GRID)
def test_a_saved_model_is_the_same_and_generates(family, kind, tmp_path):
    model = family_model(family, kind)
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    ids = some_ids(2, 7)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert loaded.config.backbone_config == model.config.backbone_config
    options = {"max_new_tokens": 5, "return_dict_in_generate": False}
    assert torch.equal(*(m.generate(seed=3, **options) for m in (model, loaded)))


@pytest.mark.parametrize("family", ["mdlm", "mlm"])
def test_shifted_logits_stand_one_place_later(family):
    model, shifted = (family_model(family, "llama", shift_logits=shift) for shift in (False, True))
    shifted.load_state_dict(model.state_dict())
    ids = some_ids(2, 7)
    assert torch.equal(shifted(ids).logits[:, 1:], model(ids).logits[:, :-1])
    # The first token has its own state: padding or another document before it changes nothing.
    ids, left = ids[:1], torch.cat((torch.zeros_like(ids[:1, :3]), ids[:1]), dim=1)
    alone, mask = shifted(ids).logits[0], torch.arange(10)[None] >= 3
    torch.testing.assert_close(shifted(left, attention_mask=mask).logits[0, 3:], alone, rtol=1e-4, atol=1e-5)
    packed = {"segment_ids": torch.tensor([[0] * 3 + [1] * 7]), "position_ids": torch.tensor([[*range(3), *range(7)]])}
    torch.testing.assert_close(shifted(left + 9 * ~mask, **packed).logits[0, 3:], alone, rtol=1e-4, atol=1e-5)


def test_block_diffusion_refuses_what_two_copies_of_a_text_make_wrong():
    for options in ({"shift_logits": True}, {}):
        kind = {"model_type": "llama"} if options else {"model_type": "qwen2", "use_sliding_window": True}
        with pytest.raises(ValueError, match="A row of block diffusion holds two copies"):
            BD3LMConfig(backbone_config=kind, **options)


def left_to_right(kind):
    """An ARLM and the language model of transformers whose weights it has."""
    torch.manual_seed(1)
    original = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **BACKBONES[kind])).eval()
    return adopt(original, "arlm", kind), original


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", DECODERS)
def test_a_left_to_right_model_is_the_language_model(kind, attention):
    """Logits with padding, and greedy decoding with the cache; packed documents are seen apart."""
    model, original = left_to_right(kind)
    model.set_attn_implementation(attention)
    ids, mask = some_ids(2, 7), torch.tensor([[1] * 7, [0] * 2 + [1] * 5])
    position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
    expected = original(ids, attention_mask=mask, position_ids=position_ids).logits
    logits = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(logits[mask.bool()], expected[mask.bool()], rtol=1e-4, atol=1e-4)
    ids[:, 3] = model.config.bos_token_id
    options = {"max_new_tokens": 6, "do_sample": False}
    written = model.generate(ids, attention_mask=mask, **options)
    reference = original.generate(ids, attention_mask=mask, **options, pad_token_id=0, eos_token_id=3)
    assert written.tolist() == reference.tolist()
    without = model.generate(ids, attention_mask=mask, **options, use_cache=False)
    assert torch.equal(without, written)
    documents = [some_ids(1, 4, seed=5), some_ids(1, 3, seed=6)]
    packed = model(
        torch.cat(documents, 1),
        segment_ids=torch.tensor([[0] * 4 + [1] * 3]),
        position_ids=torch.tensor([[*range(4), *range(3)]]),
    ).logits
    alone = torch.cat([original(document).logits for document in documents], dim=1)
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["bert", "roberta", "modernbert"])
def test_the_output_is_that_of_the_language_model(kind):
    torch.manual_seed(1)
    original = AutoModelForMaskedLM.from_config(AutoConfig.for_model(kind, **BACKBONES[kind])).eval()
    ids, mask = some_ids(2, 7), torch.tensor([[1] * 7, [1] * 5 + [0] * 2])
    model = adopt(original, "mlm", kind)
    # RoBERTa tells padding by its id.
    ids = ids.masked_fill(mask == 0, 0)
    expected = original(ids, attention_mask=mask).logits
    logits = model(ids, attention_mask=mask).logits
    # All but the mask, which is never written.
    written = [i for i in range(V) if i != model.config.mask_token_id]
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(logits[mask.bool()][:, written], expected[mask.bool()][:, written], **close)


def adopt(original, family, kind):
    """A family's model with the weights of a language model, by the embedding and head of which it has a copy."""
    model = family_model(family, kind)
    inner = model.model.language_model
    inner.load_state_dict({k: v for k, v in original.state_dict().items() if k in inner.state_dict()})
    model.model.embed_tokens.load_state_dict(original.get_input_embeddings().state_dict())
    model.lm_head.load_state_dict(original.get_output_embeddings().state_dict())
    return model


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A folder with a tiny "pretrained" Llama and its tokenizer, which knows no mask and no padding."""
    folder = tmp_path_factory.mktemp("pretrained")
    words = ["<unk>", "<s>", "</s>", *(chr(97 + i) for i in range(26)), "zz", "qq"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(folder)
    torch.manual_seed(2)
    AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **BACKBONES["llama"])).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    file = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    lines = [" ".join(chr(97 + (i * j) % 26) for j in range(1, 9)) for i in range(1, 121)]
    file.write_text("\n".join(lines) + "\n")
    return file


def composed(family, pretrained, *overrides):
    short = ["size=tiny", "trainer.max_steps=2", "trainer.eval_strategy=no", "trainer.per_device_eval_batch_size=4"]
    cfg = compose("config", [f"family={family}", f"model.backbone={pretrained}", *short, *overrides])
    cfg.experiment = "backbone"
    return cfg


def text(corpus, pretrained):
    return ["task=text", f"task.path={corpus}", f"task.tokenizer={pretrained}", "task.max_length=16"]


@pytest.mark.parametrize("family", CONFIGS)
def test_pretrained_weights_are_taken_over_and_new_ids_start_at_the_mean(family, pretrained, corpus):
    cfg = composed(family, pretrained, *text(corpus, pretrained))
    tokenizer = build_task(cfg.task).tokenizer
    model = build_model(cfg.model, tokenizer, cfg.generation, positions_of(cfg.task, cfg.collator))
    original = AutoModelForCausalLM.from_pretrained(pretrained)
    assert len(tokenizer) == model.config.vocab_size > V
    embedding = original.get_input_embeddings().weight
    assert torch.equal(model.model.embed_tokens.weight[:V], embedding)
    for row in model.model.embed_tokens.weight[V:]:
        torch.testing.assert_close(row, embedding.mean(0))
    assert torch.equal(model.lm_head.weight[:V], original.lm_head.weight)
    # Made causal again, it is the language model that it was.
    ids = some_ids(1, 6)
    causal = torch.ones(1, 1, 6, 6).tril().bool()
    if family == "arlm":
        written = [i for i in range(V) if i not in model.config.suppressed_ids]
        torch.testing.assert_close(model(ids).logits[..., written], original(ids).logits[..., written])
    states = model.model.language_model(inputs_embeds=model.model.embed_tokens(ids), attention_mask=causal).logits
    torch.testing.assert_close(model.lm_head(states)[..., :V], original(ids).logits, rtol=1e-4, atol=1e-4)


def test_another_vocabulary_is_new(pretrained):
    model = build_model(composed("mlm", pretrained, "task=star_easy").model, number_tokenizer(20))
    original = AutoModelForCausalLM.from_pretrained(pretrained)
    assert model.model.embed_tokens.weight.shape == (27, 32)
    assert not torch.equal(model.model.embed_tokens.weight, original.get_input_embeddings().weight[:27])
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(model.model.language_model.state_dict()[name], original.state_dict()[name])


@pytest.mark.parametrize(
    ("family", "lora"), [("mdlm", False), ("mdlm", True), ("mlm", True), ("ilm", True), ("arlm", True)]
)
def test_training_and_the_exported_folder(family, lora, pretrained, corpus, tmp_path):
    options = ["model.lora={r: 4, target_modules: [q_proj, up_proj]}"] if lora else []
    cfg = composed(family, pretrained, *text(corpus, pretrained), *options, f"output_dir={tmp_path}/run")
    task = build_task(cfg.task)
    before = build_model(cfg.model, task.tokenizer, cfg.generation, positions_of(cfg.task, cfg.collator)).state_dict()
    train(cfg)
    exported = AutoModel.from_pretrained(tmp_path / "run" / "model")
    config = (tmp_path / "run" / "model" / "config.json").read_text()
    assert str(pretrained) not in config
    assert json.loads(config).get("lora") is None
    assert f"come from `{pretrained.name}`" in (tmp_path / "run" / "model" / "README.md").read_text()
    names = [name for name in exported.state_dict() if "q_proj" in name]
    assert len(names) == 2
    checkpoint = AutoModel.from_pretrained(tmp_path / "run" / "checkpoint-2")
    ids = some_ids(2, 7)
    torch.testing.assert_close(checkpoint(ids).logits, exported(ids).logits, rtol=1e-4, atol=1e-4)
    frozen = "model.language_model.model.layers.0.self_attn.k_proj.weight"
    assert torch.equal(before[frozen], exported.state_dict()[frozen]) == lora
    embedding = "model.embed_tokens.weight"
    assert not torch.equal(before[embedding], exported.state_dict()[embedding])
    for name in names:
        base = name.replace(".weight", ".base_layer.weight") if lora else name
        assert not torch.equal(before[base], exported.state_dict()[name])


_REMOTE = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "xlm_hf":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocked())
import torch
from transformers import AutoModel
model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
assert "peft" not in sys.modules
print(model.generate(seed=1, max_new_tokens=6).sequences.tolist())
"""


def test_the_exported_folder_needs_torch_and_transformers_alone(tmp_path):
    model = family_model("mdlm", "modernbert")
    model.save_pretrained(tmp_path)
    expected = model.generate(seed=1, max_new_tokens=6).sequences.tolist()
    command = [sys.executable, "-I", "-c", _REMOTE, str(tmp_path)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path).stdout
    assert printed.strip().splitlines()[-1] == str(expected)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.backbone=rotray"], "must be one of rotary, dit, or a folder or Hub id of a language model"),
        (["model.backbone=rotary", "model.lora={r: 4}"], "for a backbone of transformers"),
        (["model.lora={rank: 4}"], "model.lora does not fit: .*rank"),
        (["model.lora={target_modules: [nothing]}"], "model.lora does not fit"),
    ],
)
def test_mistakes_are_refused(overrides, message, pretrained):
    cfg = composed("mlm", pretrained, "task=star_easy", *overrides)
    with pytest.raises(ValueError, match=message):
        build_model(cfg.model, number_tokenizer(20))


def test_what_cannot_see_both_ways_is_refused(monkeypatch):
    cfg = composed("mlm", "rotary", "task=star_easy")
    OmegaConf.update(cfg, "model.backbone_config", {"model_type": "llama", **BACKBONES["llama"]}, force_add=True)
    build_model(cfg.model, number_tokenizer(20))
    causal = torch.ones(1, 1, 4, 4).tril().bool()
    monkeypatch.setattr(TransformerBackbone, "_masks", lambda *arguments: causal)
    with pytest.raises(ValueError, match="A 'llama' cannot be made to see in both directions"):
        build_model(cfg.model, number_tokenizer(20))
    cfg = composed("arlm", "rotary", "task=star_easy")
    OmegaConf.update(cfg, "model.backbone_config", {"model_type": "llama", **BACKBONES["llama"]}, force_add=True)
    monkeypatch.setattr(TransformerBackbone, "_masks", lambda *arguments: torch.ones(1, 1, 4, 4).bool())
    with pytest.raises(ValueError, match="A 'llama' cannot be made to see from left to right"):
        build_model(cfg.model, number_tokenizer(20))
    with pytest.raises(ValueError, match="needs a decoder and 'bert' is an encoder: choose gpt2"):
        left_to_right("bert")
    with pytest.raises(ValueError, match="layers of a 'bert' take no cache"):
        family_model("mlm", "bert").new_cache()
    with pytest.raises(ValueError, match="always predicts the next token: unset shift_logits"):
        ARLMConfig(backbone_config={"model_type": "llama"}, shift_logits=True)
