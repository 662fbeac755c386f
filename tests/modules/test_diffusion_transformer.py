import math

import pytest
import torch

from tests.modules.test_rotary_transformer import ids, padded
from xlm_hf.modules.diffusion_transformer import DiffusionTransformer, DiffusionTransformerConfig, TimestepEmbedding
from xlm_hf.modules.rotary_transformer import apply_rotary, rotary_cos_sin

VARIANTS = {"plain": {}, "convolution": {"conv_kernel_size": 3}, "legacy": {"legacy_modulated_residual": True}}


def make_model(**kwargs):
    torch.manual_seed(0)
    options = {"vocab_size": 30, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0}
    config = DiffusionTransformerConfig(**{**options, "conditioning_size": 8, "initializer_range": 0.3, **kwargs})
    model = DiffusionTransformer(config).eval().double()
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
    together = model(input_ids, TIMES, attention_mask=mask).last_hidden_state
    for number, row in enumerate(rows):
        alone = model(row[None], TIMES[number : number + 1]).last_hidden_state[0]
        torch.testing.assert_close(together[number][mask[number].bool()], alone)
    assert not torch.allclose(together, model(input_ids, TIMES + 0.1, attention_mask=mask).last_hidden_state)


def test_packed_documents_equal_separate_ones(model):
    documents = [ids(4, 6)[3], ids(5, 3)[4]]
    packed = model(
        torch.cat(documents)[None],
        TIMES[:1],
        segment_ids=torch.cat([torch.full((len(d),), n) for n, d in enumerate(documents)])[None],
        position_ids=torch.cat([torch.arange(len(d)) for d in documents])[None],
    ).last_hidden_state[0]
    separate = torch.cat([model(d[None], TIMES[:1]).last_hidden_state[0] for d in documents])
    torch.testing.assert_close(packed, separate)


@pytest.mark.parametrize("times", [TIMES[:2], torch.linspace(0.1, 2.0, 16).view(2, 8)], ids=["rows", "tokens"])
def test_states_of_some_tokens_are_those_of_the_whole_with_gradients(model, times):
    index, results = torch.tensor([3, 0, 15, 9, 9]), []
    mask = torch.tensor([[1] * 5 + [0] * 3, [1] * 8])
    for output_index in (None, index):
        model.zero_grad()
        output = model(ids(2, 8), times, attention_mask=mask, output_index=output_index).last_hidden_state
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
    c = model.time_embedding(TIMES[:1])[0]
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
    torch.testing.assert_close(model(input_ids, TIMES[:1]).last_hidden_state[0], expected)


def test_time_embedding_is_sines_and_cosines_of_the_published_frequencies():
    torch.manual_seed(0)
    embedding = TimestepEmbedding(DiffusionTransformerConfig(conditioning_size=6, timestep_frequencies=4))
    angles = [0.7 * 10000 ** (-i / 4) for i in range(4)]
    features = torch.tensor([*map(math.cos, angles), *map(math.sin, angles)])
    hidden = torch.nn.functional.silu(embedding.up_proj(features))
    expected = torch.nn.functional.silu(embedding.down_proj(hidden))
    torch.testing.assert_close(embedding(torch.tensor([0.7]))[0], expected)


def test_layers_start_as_the_identity():
    torch.manual_seed(0)
    config = DiffusionTransformerConfig(vocab_size=9, hidden_size=8, num_attention_heads=2, pad_token_id=0)
    model = DiffusionTransformer(config)
    output = model(torch.arange(5)[None], torch.ones(1)).last_hidden_state
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
        output = (compiled if run == "compiled" else model)(input_ids, TIMES, attention_mask=mask).last_hidden_state
        (output[mask.bool()] ** 2).sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for other in gradients[1:]:
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(other[name], gradient, msg=lambda text, name=name: f"{name}: {text}")


def test_loading_restores_everything_and_states_are_recorded(model, tmp_path):
    model.float().save_pretrained(tmp_path)
    loaded = DiffusionTransformer.from_pretrained(tmp_path)
    output = model(ids(2, 5), TIMES[:2], output_hidden_states=True)
    assert torch.equal(output.last_hidden_state, loaded(ids(2, 5), TIMES[:2]).last_hidden_state)
    assert [tuple(state.shape) for state in output.hidden_states] == [(2, 5, 32)] * 3
