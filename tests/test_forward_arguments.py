"""What `forward` of every family takes, and what it refuses in one sentence."""

import inspect
import re

import pytest
import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM

from xlm_hf.families import families
from xlm_hf.modules.vocabulary_head import is_linear
from xlm_hf.tasks.tokenizers import byte_tokenizer
from xlm_hf.testing import FamilyCase

TIMES = ("alpha", "times", "time_left", "timesteps")


@pytest.fixture(scope="module", params=list(families()))
def model(request):
    return FamilyCase(request.param).model()


@pytest.fixture
def batch(model):
    ids = torch.randint(7, model.config.vocab_size, (2, 9), generator=torch.Generator().manual_seed(1))
    ids[:, 0], ids[:, 3] = getattr(model.config, "cls_token_id", 4), 4
    names = inspect.signature(model.forward).parameters
    return {"input_ids": ids, **{name: torch.tensor([0.3, 0.6]) for name in TIMES if name in names}}


def test_embeddings_go_in_place_of_ids(model, batch):
    expected = model(**batch).logits
    embeddings = model.get_input_embeddings()(batch["input_ids"])
    given = {**batch, "input_ids": None, "inputs_embeds": embeddings}
    if model.config.conditioning == "token" or model.config.model_type == "plaid":
        # Which positions are told the time is seen in the ids, and so are the vectors of Plaid.
        with pytest.raises(ValueError, match=r"pass input_ids beside inputs_embeds"):
            model(**given)
        given["input_ids"] = batch["input_ids"]
    torch.testing.assert_close(model(**given).logits, expected)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_masks_of_pairs_are_those_of_tokens_where_they_say_the_same(model, batch, attention):
    model.set_attn_implementation(attention)
    mask = torch.ones(2, 9).long()
    mask[1, 6:] = 0
    expected = model(**batch, attention_mask=mask).logits
    pairs = mask.bool()[:, None, None].expand(2, 1, 9, 9)
    if model.config.model_type == "arlm":
        pairs = pairs & torch.ones(9, 9).tril().bool()
    added = torch.zeros(2, 1, 9, 9).masked_fill(~pairs, torch.finfo(torch.float32).min)
    for given in (pairs, added):
        logits = model(**batch, attention_mask=given).logits
        torch.testing.assert_close(logits[mask.bool()], expected[mask.bool()])
    model.set_attn_implementation("sdpa")


def test_labels_give_the_loss_of_transformers_or_are_refused(model, batch):
    names, ids = inspect.signature(model.forward).parameters, batch["input_ids"]
    if "labels" not in names:
        with pytest.raises(TypeError, match="forward has no argument 'labels': the loss of this model is an object"):
            model(**batch, labels=ids)
        return
    # [BOS] is never written.
    labels = ids.masked_fill(ids < 7, -100)
    labels[:, 5] = -100
    output = model(**batch, labels=labels)
    logits = output.logits.float()
    is_causal = model.config.model_type == "arlm"
    scored = logits[:, :-1] if is_causal else logits
    wanted = labels[:, 1:] if is_causal else labels
    kept = wanted != -100
    expected = nn.functional.cross_entropy(scored[kept], wanted[kept])
    torch.testing.assert_close(output.loss, expected)
    summed = model(**batch, labels=labels, num_items_in_batch=5).loss
    torch.testing.assert_close(summed * 5, expected * kept.sum())
    assert torch.equal(output[0], output.loss)


def test_a_program_exported_by_torch_takes_any_batch(model, batch):
    if model.config.model_type not in ("ilm", "edit_flow"):
        pytest.skip("takes seconds: for one with a head for a token of each row, and one that is told the time")
    inputs = {**batch, "attention_mask": torch.ones(2, 9).long()}
    sizes = {name: {0: torch.export.Dim("batch", min=1, max=64)} for name in inputs}
    program = torch.export.export(model, (), inputs, dynamic_shapes=sizes, strict=False).module()
    three = {name: torch.cat((tensor, tensor[:1])) for name, tensor in inputs.items()}
    torch.testing.assert_close(program(**three).logits, model(**three).logits)


def test_an_unknown_argument_is_refused_and_one_that_is_none_is_not_given(model, batch):
    with pytest.raises(TypeError, match="forward has no argument 'token_type_ids'"):
        model(**batch, token_type_ids=torch.zeros(2, 9).long())
    assert torch.equal(model(**batch, token_type_ids=None).logits, model(**batch).logits)


def test_a_model_is_loaded_from_a_state_dict_alone(model, batch):
    loaded = type(model).from_pretrained(None, config=model.config, state_dict=model.state_dict())
    assert torch.equal(loaded.eval()(**batch).logits, model(**batch).logits)


def test_a_configuration_is_made_from_a_tokenizer(model):
    tokenizer = byte_tokenizer()
    config = type(model.config).from_tokenizer(tokenizer, hidden_size=32, num_attention_heads=2, num_hidden_layers=1)
    assert config.vocab_size == len(tokenizer) == 262
    assert (config.pad_token_id, config.bos_token_id) == (tokenizer.pad_token_id, tokenizer.bos_token_id)
    if hasattr(config, "mask_token_id"):
        assert config.mask_token_id == tokenizer.mask_token_id
    assert config.hidden_size == 32
    assert type(config).from_tokenizer(tokenizer, pad_token_id=7).pad_token_id == 7
    assert type(AutoModel.from_config(config)) is type(model)


def test_a_model_that_torchao_has_quantised_scores_and_writes(model, batch):
    quantization = pytest.importorskip("torchao.quantization")
    quantised = type(model).from_pretrained(None, config=model.config, state_dict=model.state_dict()).eval()
    quantization.quantize_(quantised, quantization.Int8WeightOnlyConfig())
    assert type(quantised.lm_head.weight) is not nn.Parameter
    expected, found = model(**batch).logits, quantised(**batch).logits
    assert torch.equal(found.isfinite(), expected.isfinite())
    assert (found - expected)[expected.isfinite()].abs().max() < 0.1
    options = {"max_new_tokens": 2, "seed": 0, "return_dict_in_generate": True}
    both = [each.generate(input_ids=batch["input_ids"][:, :4], **options).sequences for each in (model, quantised)]
    assert both[0].shape[0] == both[1].shape[0]


@pytest.mark.parametrize("task_type", ["CAUSAL_LM", "FEATURE_EXTRACTION", None])
def test_adapters_of_peft_learn_and_write(model, batch, task_type):
    peft = pytest.importorskip("peft")
    if task_type == "CAUSAL_LM" and type(model.config) not in AutoModelForCausalLM._model_mapping:
        pytest.skip("no causal language model")
    model = type(model).from_pretrained(None, config=model.config, state_dict=model.state_dict())
    options = peft.LoraConfig(task_type=task_type, r=2, target_modules=["qkv_proj", "up_proj"])
    adapted = peft.get_peft_model(model, options)
    adapted(**batch).logits.logsumexp(-1).sum().backward()
    assert any(parameter.grad is not None for name, parameter in adapted.named_parameters() if "lora" in name)
    assert adapted.generate(input_ids=batch["input_ids"][:, :4], max_new_tokens=2) is not None


class Quantised(torch.Tensor):
    pass


def test_a_quantised_head_is_called_and_not_taken_apart():
    head = nn.Linear(4, 8, bias=False)
    assert is_linear(head)
    head.weight = nn.Parameter(head.weight.detach().as_subclass(Quantised))
    assert not is_linear(head)


WHOLE = "must be int64 or int32"
TOKENS = "must hold rows of tokens"
MISTAKES = [
    *(("input_ids", kind, WHOLE) for kind in (torch.float32, torch.float16, torch.bool, torch.uint8, torch.complex64)),
    *(("input_ids", value, "input_ids must be a tensor") for value in ([[8, 9]], "x", 5, {}, object())),
    *(("input_ids", torch.zeros(shape).long(), TOKENS) for shape in ((), (3,), (0,), (0, 3), (2, 0))),
    *(("input_ids", torch.full((2, 9), value), "input_ids must be in [0,") for value in (-8, 10**6, 2**40)),
    *(
        ("attention_mask", torch.ones(shape), "attention_mask must fit 2 rows of 9 tokens")
        for shape in ((9,), (2, 8), (2, 10), (3, 9), (2, 9, 9))
    ),
    *(("attention_mask", value, "attention_mask must be a tensor") for value in ([[1] * 9] * 2, "x", 5)),
    *(
        ("position_ids", torch.zeros(shape).long(), "position_ids must fit 2 rows of 9 tokens")
        for shape in ((9,), (2, 8), (3, 9))
    ),
    ("position_ids", torch.zeros(2, 9), WHOLE),
    ("position_ids", torch.full((2, 9), -1), "position_ids must be in [0, inf) and holds -1"),
    ("position_ids", 5, "position_ids must be a tensor"),
    *((name, torch.zeros(2, 9), WHOLE) for name in ("segment_ids", "block_ids", "labels")),
    *((name, torch.zeros(3, 9).long(), f"{name} must fit") for name in ("segment_ids", "block_ids", "labels")),
    *(("labels", torch.full((2, 9), value), "labels must be in [0,") for value in (-5, 10**6)),
    *((name, torch.zeros(2, 9), f"{name} must be bool") for name in ("is_noisy", "is_given", "is_canvas")),
    *((name, torch.zeros(2, 8).bool(), f"{name} must fit") for name in ("is_noisy", "is_given", "is_canvas")),
    *(
        (f"{name}_index", torch.tensor(value), words)
        for name in ("logits", "slot", "gap", "token", "cls", "length")
        for value, words in (
            ([18], "must be in [0, 18)"),
            ([-1], "must be in [0, 18)"),
            ([0.0], WHOLE),
            ([[0, 1]], "must fit"),
        )
    ),
    *((f"{name}_index", [0, 1], "must be a tensor") for name in ("logits", "slot", "gap", "token", "cls", "length")),
    *((name, 0.5, f"{name} must be a tensor") for name in TIMES),
    *((name, torch.full(shape, 0.5), f"{name} must fit") for name in TIMES for shape in ((2, 8), (2, 9, 1))),
    *((name, 5, f"{name} must be a tensor") for name in ("noise", "latents", "expected", "self_conditioned")),
]


@pytest.mark.parametrize("number", range(len(MISTAKES)))
def test_mistaken_tensors_end_in_one_sentence(model, batch, number):
    name, value, words = MISTAKES[number]
    handed_on = ("segment_ids", "block_ids", "is_noisy", "position_ids")
    if name not in inspect.signature(model.forward).parameters and name not in handed_on:
        pytest.skip("the family has no such argument")
    value = batch["input_ids"].to(value) if isinstance(value, torch.dtype) else value
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        model(**{**batch, name: value})
    assert "\n" not in str(error.value)


def test_what_is_meant_is_taken_as_it_is(model, batch):
    expected = model(**batch).logits
    mask = torch.ones(2, 9)
    for given in (mask, mask.bool(), mask.int(), mask.long()):
        assert torch.equal(model(**batch, attention_mask=given).logits, expected)
    assert torch.equal(model(**{**batch, "input_ids": batch["input_ids"].int()}).logits, expected)
    assert torch.equal(model(**batch, position_ids=torch.arange(9)[None]).logits, expected)
    with pytest.raises(ValueError, match="inputs_embeds must hold rows of tokens"):
        model(**{**batch, "input_ids": None})


def test_a_row_beyond_the_learnt_positions_is_refused():
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "max_position_embeddings": 8}
    family = families()["mdlm"]
    model = family.model_class(family.config_class(vocab_size=12, learned_positions=True, **sizes))
    ids, mask = torch.full((1, 9), 9), torch.ones(1, 9)
    with pytest.raises(ValueError, match="A row has more tokens than the 8 learnt positions of the model"):
        model(ids)
    with pytest.raises(ValueError, match=r"position_ids must be in \[0, 8\) and holds 8"):
        model(ids, position_ids=torch.arange(9)[None])
    mask[0, 0] = 0
    assert model(ids, mask).logits.shape == (1, 9, 12)
