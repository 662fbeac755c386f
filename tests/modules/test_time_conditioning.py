import math

import pytest
import torch

from tests.hub.test_pretrained_backbones import BACKBONES
from tests.modules.test_rotary_transformer import ids, padded
from xlm_hf.modeling.mlm import MLMConfig, MLMForMaskedLM
from xlm_hf.modules.rotary_transformer import RotaryTransformer, RotaryTransformerConfig, apply_rotary, rotary_cos_sin
from xlm_hf.modules.time_conditioning import TimestepEmbedding

VARIANTS = {"plain": {}, "convolution": {"conv_kernel_size": 3}, "legacy": {"legacy_modulated_residual": True}}


def make_model(**kwargs):
    torch.manual_seed(0)
    options = {"vocab_size": 30, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0}
    config = RotaryTransformerConfig(
        **{**options, "conditioning": "adaln", "conditioning_size": 8, "initializer_range": 0.3, **kwargs}
    )
    model = RotaryTransformer(config).eval().double()
    # The modulations start at zero, which would hide what the time does.
    for name, parameter in model.named_parameters():
        if "modulation" in name:
            parameter.data.normal_(std=0.3)
    return model


TIMES = torch.tensor([0.2, 1.5, 0.7])


@pytest.fixture(params=VARIANTS)
def model(request):
    return make_model(**VARIANTS[request.param])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_padding_changes_nothing_and_every_row_has_its_own_time(model, side, attention):
    model.set_attn_implementation(attention)
    rows = [ids(1, 9)[0], ids(2, 5)[1], ids(3, 1)[2]]
    input_ids, mask = padded(rows, side)
    together = model(input_ids, timesteps=TIMES, attention_mask=mask).last_hidden_state
    for number, row in enumerate(rows):
        alone = model(row[None], timesteps=TIMES[number : number + 1]).last_hidden_state[0]
        torch.testing.assert_close(together[number][mask[number].bool()], alone)
    assert not torch.allclose(together, model(input_ids, timesteps=TIMES + 0.1, attention_mask=mask).last_hidden_state)


def test_packed_documents_equal_separate_ones(model):
    documents = [ids(4, 6)[3], ids(5, 3)[4]]
    packed = model(
        torch.cat(documents)[None],
        timesteps=TIMES[:1],
        segment_ids=torch.cat([torch.full((len(d),), n) for n, d in enumerate(documents)])[None],
        position_ids=torch.cat([torch.arange(len(d)) for d in documents])[None],
    ).last_hidden_state[0]
    separate = torch.cat([model(d[None], timesteps=TIMES[:1]).last_hidden_state[0] for d in documents])
    torch.testing.assert_close(packed, separate)


@pytest.mark.parametrize("times", [TIMES[:2], torch.linspace(0.1, 2.0, 16).view(2, 8)], ids=["rows", "tokens"])
def test_states_of_some_tokens_are_those_of_the_whole_with_gradients(model, times):
    index, results = torch.tensor([3, 0, 15, 9, 9]), []
    mask = torch.tensor([[1] * 5 + [0] * 3, [1] * 8])
    for output_index in (None, index):
        model.zero_grad()
        output = model(ids(2, 8), timesteps=times, attention_mask=mask, output_index=output_index).last_hidden_state
        output = output.flatten(0, 1)[index] if output_index is None else output
        (output**3).sum().backward()
        results.append([output, *(p.grad.clone() for p in model.parameters())])
    for whole, some in zip(*results, strict=True):
        torch.testing.assert_close(some, whole)


def parts(modulation, number, conditioning):
    return (modulation.weight @ conditioning + modulation.bias).view(number, 32)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_layer_is_what_the_formula_says(legacy):
    """Attention over one head after the other, modulation written out, against the module."""
    model = make_model(num_hidden_layers=1, legacy_modulated_residual=legacy)
    input_ids, layer = ids(1, 5), model.layers[0]
    c = model.time_embedding(TIMES[:1])[0, 0]
    shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = (layer.modulation.weight @ c + layer.modulation.bias).view(
        6, 32
    )

    def norm(x, weight):
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt() * weight

    x = model.embed_tokens.weight[input_ids[0]]
    modulated = norm(x, layer.input_layernorm.weight) * (1 + scale_1) + shift_1
    cos, sin = rotary_cos_sin(torch.arange(5)[None], 8, 10000.0, torch.float64)
    heads = []
    for h in range(4):
        q, k, v = (modulated @ layer.self_attn.qkv_proj.weight[32 * i + 8 * h :][:8].T for i in range(3))
        q, k = (apply_rotary(y[None, None], cos, sin)[0, 0] for y in (q, k))
        heads.append((q @ k.T / math.sqrt(8)).softmax(-1) @ v)
    x = (modulated if legacy else x) + gate_1 * (torch.cat(heads, -1) @ layer.self_attn.o_proj.weight.T)
    x = x + gate_2 * layer.mlp(norm(x, layer.post_attention_layernorm.weight) * (1 + scale_2) + shift_2)
    shift, scale = parts(model.final_norm.modulation, 2, c)
    expected = norm(x, model.final_norm.norm.weight) * (1 + scale) + shift
    torch.testing.assert_close(model(input_ids, timesteps=TIMES[:1]).last_hidden_state[0], expected)


def test_time_embedding_is_sines_and_cosines_of_the_published_frequencies():
    torch.manual_seed(0)
    embedding = TimestepEmbedding(RotaryTransformerConfig(conditioning_size=6, timestep_frequencies=4))
    angles = [0.7 * 10000 ** (-i / 4) for i in range(4)]
    features = torch.tensor([*map(math.cos, angles), *map(math.sin, angles)])
    hidden = torch.nn.functional.silu(embedding.up_proj(features))
    expected = torch.nn.functional.silu(embedding.down_proj(hidden))
    torch.testing.assert_close(embedding(torch.tensor([0.7]))[0, 0], expected)


def test_layers_start_as_the_identity():
    torch.manual_seed(0)
    config = RotaryTransformerConfig(vocab_size=9, hidden_size=8, num_attention_heads=2, conditioning="adaln")
    model = RotaryTransformer(config)
    output = model(torch.arange(5)[None], timesteps=torch.ones(1)).last_hidden_state
    torch.testing.assert_close(output, model.final_norm.norm(model.embed_tokens(torch.arange(5)))[None])


def test_checkpointing_and_compilation_change_no_gradient():
    model = make_model(conv_kernel_size=3)
    input_ids, mask = padded([ids(1, 7)[0], ids(2, 4)[1], ids(3, 2)[2]], "right")
    gradients = []
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for run in ("plain", "compiled", "checkpointed"):
        if run == "checkpointed":
            model.activation_checkpointing_enable()
            model.train()
        model.zero_grad()
        output = (compiled if run == "compiled" else model)(
            input_ids, timesteps=TIMES, attention_mask=mask
        ).last_hidden_state
        (output[mask.bool()] ** 2).sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for other in gradients[1:]:
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(other[name], gradient, msg=lambda text, name=name: f"{name}: {text}")


def test_loading_restores_everything_and_states_are_recorded(model, tmp_path):
    model.float().save_pretrained(tmp_path)
    loaded = RotaryTransformer.from_pretrained(tmp_path)
    output = model(ids(2, 5), timesteps=TIMES[:2], output_hidden_states=True)
    assert torch.equal(output.last_hidden_state, loaded(ids(2, 5), timesteps=TIMES[:2]).last_hidden_state)
    assert [tuple(state.shape) for state in output.hidden_states] == [(2, 5, 32)] * 3


TOKEN_KINDS = {
    "convolution": {"conv_kernel_size": 3},
    "gpt2": {"backbone_config": {"model_type": "gpt2", **BACKBONES["gpt2"]}},
    "llama": {"backbone_config": {"model_type": "llama", **BACKBONES["llama"]}},
    "modernbert": {"backbone_config": {"model_type": "modernbert", **BACKBONES["modernbert"]}},
}
BOS = 4


def told_by_a_token(kind):
    torch.manual_seed(0)
    options = {
        "vocab_size": 31,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "bos_token_id": BOS,
    }
    config = MLMConfig(**{**options, "conditioning": "token", **TOKEN_KINDS[kind]}, initializer_range=0.3)
    return MLMForMaskedLM(config).model.eval().double()


@pytest.mark.parametrize("kind", TOKEN_KINDS)
def test_a_token_tells_each_document_its_time(kind):
    """By rows, padded, and packed with a time for each token; the time is that of the token [BOS] alone."""
    model = told_by_a_token(kind)
    documents = [torch.tensor([9, 7, BOS, 8, 6]), torch.tensor([BOS, 9, 5])]
    input_ids, mask = padded(documents, "left")
    before = model(input_ids, attention_mask=mask, timesteps=TIMES[:2]).last_hidden_state
    other = model(input_ids, attention_mask=mask, timesteps=TIMES[1:]).last_hidden_state
    assert torch.equal(before, other), "the map is zero at first"
    model.time_token.projection.weight.data.normal_(std=0.3)
    after = model(input_ids, attention_mask=mask, timesteps=TIMES[:2]).last_hidden_state
    assert ((after - before).abs().amax(-1)[mask.bool()] > 1e-3).all()
    alone = [model(d[None], timesteps=TIMES[n : n + 1]).last_hidden_state[0] for n, d in enumerate(documents)]
    torch.testing.assert_close(after[mask.bool()], torch.cat(alone), rtol=1e-6, atol=1e-6)
    times = torch.tensor([[9.0, 9.0, TIMES[0], 9.0, 9.0, TIMES[1], 9.0, 9.0]])
    packed = {
        "segment_ids": torch.tensor([[0] * 5 + [1] * 3]),
        "position_ids": torch.tensor([[*range(5), *range(3)]]),
        "timesteps": times,
    }
    row = torch.cat(documents)[None]
    torch.testing.assert_close(model(row, **packed).last_hidden_state[0], torch.cat(alone), rtol=1e-6, atol=1e-6)
    # The definition: W e(s) is added to the embedding of [BOS].
    token = model.time_token
    feature = token.projection.weight @ token.embedding(TIMES[:1])[0, 0] + token.projection.bias
    vectors = model.get_input_embeddings()(documents[0][None]).clone()
    vectors[0, 2] += feature
    model.time_token = None
    torch.testing.assert_close(model(inputs_embeds=vectors).last_hidden_state[0], alone[0], rtol=1e-6, atol=1e-6)


def test_what_is_told_no_time_or_cannot_be_told_one_says_so():
    for model in (make_model(), told_by_a_token("llama")):
        with pytest.raises(ValueError, match="conditioned on a time: pass timesteps, a number for each row or token"):
            model(ids(1, 3))
    with pytest.raises(ValueError, match=r"adds the time to \[BOS\]: pass input_ids beside inputs_embeds"):
        told_by_a_token("convolution")(inputs_embeds=torch.zeros(1, 3, 32).double(), timesteps=TIMES[:1])
    with pytest.raises(ValueError, match="'adaln' needs the rotary backbone: choose 'token' with backbone_config"):
        RotaryTransformerConfig(conditioning="adaln", **TOKEN_KINDS["llama"])
    with pytest.raises(ValueError, match=r"adds the time to \[BOS\] and bos_token_id is None"):
        RotaryTransformerConfig(conditioning="token", bos_token_id=None)


def test_an_older_configuration_says_dit():
    config = RotaryTransformerConfig(backbone="dit")
    assert (config.backbone, config.conditioning) == ("rotary", "adaln")


@pytest.mark.parametrize("is_causal", [False, True])
def test_adaptive_layers_keep_to_a_cache(is_causal):
    torch.manual_seed(0)
    config = make_model(conv_kernel_size=3).config
    model = RotaryTransformer(config, is_causal).eval().double()
    for parameter in model.parameters():
        parameter.data.normal_(std=0.3)
    blocks = torch.tensor([[0, 0, 0, 1, 1]]).expand(2, -1)
    whole = model(ids(2, 5), timesteps=TIMES[:2], block_ids=blocks).last_hidden_state
    cache = model.new_cache()
    pieces = [
        model(ids(2, 5)[:, piece], timesteps=TIMES[:2], cache=cache).last_hidden_state
        for piece in (slice(0, 3), slice(3, 5))
    ]
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-6, atol=1e-6)
