import math

import pytest
import torch

from xlm_hf.modules.rotary_transformer import RotaryTransformer, RotaryTransformerConfig, apply_rotary, rotary_cos_sin


def make_model(is_causal=False, **kwargs):
    torch.manual_seed(0)
    config = RotaryTransformerConfig(
        **{
            "vocab_size": 30,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "initializer_range": 0.3,
            "pad_token_id": 0,
            **kwargs,
        }
    )
    return RotaryTransformer(config, is_causal=is_causal).eval().double()


VARIANTS = [
    {},
    {"conv_kernel_size": 3, "learned_positions": True, "initialization": "fan_in"},
    {"partial_rotary_factor": 0.5, "final_layer_norm": False},
]


@pytest.fixture(params=VARIANTS, ids=["plain", "convolution", "partial rotary"])
def variant(request):
    return request.param


def ids(*shape):
    return torch.randint(1, 30, shape, generator=torch.Generator().manual_seed(1))


def padded(rows, side):
    width = max(map(len, rows))
    input_ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for number, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        input_ids[number, place], mask[number, place] = row, 1
    return input_ids, mask


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_padding_changes_nothing(variant, is_causal, side, attention):
    model = make_model(is_causal, **variant)
    model.set_attn_implementation(attention)
    rows = [ids(1, 9)[0], ids(2, 5)[1], ids(3, 1)[2]]
    input_ids, mask = padded(rows, side)
    together = model(input_ids, attention_mask=mask).last_hidden_state
    for number, row in enumerate(rows):
        alone = model(row[None]).last_hidden_state[0]
        torch.testing.assert_close(together[number][mask[number].bool()], alone)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_packed_documents_equal_separate_ones(variant, is_causal, attention):
    model = make_model(is_causal, **variant)
    model.set_attn_implementation(attention)
    documents = [ids(4, 6)[3], ids(5, 3)[4], ids(6, 4)[5]]
    packed = model(
        torch.cat(documents)[None],
        segment_ids=torch.cat([torch.full((len(d),), n) for n, d in enumerate(documents)])[None],
        position_ids=torch.cat([torch.arange(len(d)) for d in documents])[None],
    ).last_hidden_state[0]
    separate = torch.cat([model(d[None]).last_hidden_state[0] for d in documents])
    torch.testing.assert_close(packed, separate)


def test_eager_equals_sdpa_with_gradients(variant):
    model = make_model(**variant)
    input_ids, mask = padded([ids(1, 7)[0], ids(2, 4)[1]], "right")
    results = {}
    for attention in ("eager", "sdpa"):
        model.set_attn_implementation(attention)
        model.zero_grad()
        output = model(input_ids, attention_mask=mask).last_hidden_state[mask.bool()]
        (output**2).sum().backward()
        results[attention] = [output, *(p.grad.clone() for p in model.parameters())]
    for eager, sdpa in zip(results["eager"], results["sdpa"], strict=True):
        torch.testing.assert_close(eager, sdpa)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_states_of_some_tokens_are_those_of_the_whole_with_gradients(variant, attention):
    """In any order and more than once, with padding and packed documents; the hidden states before stay whole."""
    index = torch.tensor([3, 0, 15, 9, 9])
    rows = {"input_ids": ids(2, 8), "attention_mask": torch.ones(2, 8).long()}
    rows["attention_mask"][0, 5:] = 0
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 1, 1]])
    for is_causal, extra in ((False, {}), (True, {}), (False, {"segment_ids": documents})):
        model, results = make_model(is_causal, **variant), []
        model.set_attn_implementation(attention)
        for output_index in (None, index):
            model.zero_grad()
            output = model(**rows, **extra, output_index=output_index).last_hidden_state
            output = output.flatten(0, 1)[index] if output_index is None else output
            (output**3).sum().backward()
            results.append([output, *(p.grad.clone() for p in model.parameters())])
        for whole, some in zip(*results, strict=True):
            torch.testing.assert_close(some, whole)


def test_every_token_sees_every_other_and_only_the_past_when_causal(variant):
    input_ids = ids(1, 8)
    for is_causal in (False, True):
        model = make_model(is_causal, **variant)
        changed = input_ids.clone()
        changed[0, 4] = (changed[0, 4] % 29) + 1
        moved = (model(input_ids).last_hidden_state != model(changed).last_hidden_state).any(-1)[0].tolist()
        assert moved == ([False] * 4 + [True] * 4 if is_causal else [True] * 8)


def test_rotary_scores_are_those_of_complex_rotation():
    """q . k after the rotation is Re(sum_j q_j conj(k_j) e^{i theta_j (m - n)}), by the definition of the paper."""
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 8, generator=generator, dtype=torch.float64)
    frequencies = [10000 ** (-2 * j / 8) for j in range(4)]
    for m, n in ((0, 0), (5, 2), (3, 11)):
        cos, sin = rotary_cos_sin(torch.tensor([[m, n]]), 8, 10000.0, torch.float64)
        rotated = apply_rotary(torch.stack((q, k))[None, None], cos, sin)[0, 0]
        expected = sum(
            (complex(q[j], q[j + 4]) * complex(k[j], k[j + 4]).conjugate() * complex(math.cos(a), math.sin(a))).real
            for j, a in enumerate(f * (m - n) for f in frequencies)
        )
        assert float(rotated[0] @ rotated[1]) == pytest.approx(expected, rel=1e-5)


def test_loading_restores_everything(variant, tmp_path):
    model = make_model(**variant).float()
    model.save_pretrained(tmp_path)
    loaded = RotaryTransformer.from_pretrained(tmp_path)
    assert torch.equal(model(ids(2, 5)).last_hidden_state, loaded(ids(2, 5)).last_hidden_state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_attention_heads": 5}, r"hidden_size \(32\) must be a multiple of num_attention_heads \(5\)"),
        ({"hidden_act": "gelo"}, "hidden_act 'gelo' is not one of"),
        ({"partial_rotary_factor": 0.4}, "rotated part of a head has 3 dimensions"),
        ({"conv_kernel_size": 4}, "conv_kernel_size is 4: a bidirectional model needs an odd number"),
    ],
)
def test_impossible_architectures_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        make_model(**change)


def test_fullgraph_compile_gives_the_same(variant):
    model = make_model(**variant)
    input_ids, mask = padded([ids(1, 7)[0], ids(2, 4)[1]], "right")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(
        compiled(input_ids, attention_mask=mask).last_hidden_state,
        model(input_ids, attention_mask=mask).last_hidden_state,
    )


def test_initialisations_have_their_scales():
    wide = {"hidden_size": 256, "num_hidden_layers": 3, "vocab_size": 500, "learned_positions": True}
    normal, fan_in = (make_model(initialization=name, **wide) for name in ("normal", "fan_in"))
    for model, embedding, inner, output in ((normal, 0.3, 0.3, 0.3), (fan_in, 1.0, 256**-0.5, 256**-0.5 * 6**-0.5)):
        assert model.embed_positions.weight.std().item() == pytest.approx(embedding, rel=0.03)
        assert model.embed_tokens.weight[1:].std().item() == pytest.approx(embedding, rel=0.03)
        assert model.layers[1].self_attn.qkv_proj.weight.std().item() == pytest.approx(inner, rel=0.03)
        assert model.layers[1].self_attn.o_proj.weight.std().item() == pytest.approx(output, rel=0.03)
    assert fan_in.layers[0].mlp.down_proj.weight.std().item() == pytest.approx(1024**-0.5 * 6**-0.5, rel=0.03)
    with pytest.raises(Exception, match="initialization"):
        make_model(initialization="fanin")
