"""What tokens see: patterns against loops, one pass over two copies against a pass for each block, and caches."""

import pytest
import torch
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask

from tests.hub.test_pretrained_backbones import BACKBONES
from tests.modules.test_rotary_transformer import padded
from xlm_hf.modules.attention_patterns import attention_pattern, pattern_mask
from xlm_hf.modules.backbone_config import RotaryTransformerConfig
from xlm_hf.modules.transformer_backbone import build_backbone

SIZES = {
    "vocab_size": 30,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "initializer_range": 0.3,
}
KINDS = {
    "rotary": {"learned_positions": True, "max_position_embeddings": 64},
    "convolution": {"conv_kernel_size": 3},
    "wide convolution": {"conv_kernel_size": 5},
    "gpt2": {"backbone_config": {"model_type": "gpt2", **BACKBONES["gpt2"]}},
    "llama": {"backbone_config": {"model_type": "llama", **BACKBONES["llama"]}},
}


def make_backbone(kind, attention="sdpa", is_causal=False):
    torch.manual_seed(0)
    model = build_backbone(RotaryTransformerConfig(**SIZES, **KINDS[kind], pad_token_id=0), is_causal).eval().double()
    (model if kind not in BACKBONES else model.language_model).set_attn_implementation(attention)
    return model


def ids(length, seed):
    return torch.randint(1, 30, (length,), generator=torch.Generator().manual_seed(seed))


def block_numbers(prompt, canvas, size):
    return torch.cat((torch.zeros(prompt).long(), torch.arange(canvas) // size + 1))


def two_copies(prompt, clean, noisy, size):
    """Rows for one pass over a document: the noisy canvas, then prompt and canvas clean, without the last block."""
    P, blocks = len(prompt), block_numbers(len(prompt), len(clean), size)
    kept = int((blocks < blocks.max()).sum())
    positions = torch.arange(P + len(clean))
    return {
        "input_ids": torch.cat((noisy, torch.cat((prompt, clean))[:kept])),
        "position_ids": torch.cat((positions[P:], positions[:kept])),
        "block_ids": torch.cat((blocks[P:], blocks[:kept])),
        "is_noisy": torch.arange(len(noisy) + kept) < len(noisy),
    }


def pass_per_block(model, prompt, clean, noisy, size):
    """States of the noisy canvas: each block by itself behind the clean ones, by a cache and with no pattern at all."""
    cache, states = model.new_cache(), []
    model(prompt[None], cache=cache)
    for noisy_block, clean_block in zip(noisy.split(size), clean.split(size), strict=True):
        states.append(model(noisy_block[None], cache=cache).last_hidden_state[0])
        cache.crop(-len(noisy_block))
        model(clean_block[None], cache=cache)
    return torch.cat(states)


DOCUMENTS = [(3, 12), (1, 7)]
TEXTS = [tuple(ids(n, seed) for seed, n in ((p, p), (c, c), (50 + c, c))) for p, c in DOCUMENTS]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 3, 4, 12])
def test_one_pass_over_two_copies_is_a_pass_for_each_block(size, kind, attention):
    """In rows of their own, padded on either side, and packed into one row."""
    model = make_backbone(kind, attention)
    rows = [two_copies(*text, size) for text in TEXTS]
    expected = [pass_per_block(model, *text, size) for text in TEXTS]
    for side in ("left", "right"):
        batch = {name: padded([row[name].long() for row in rows], side)[0] for name in rows[0]}
        mask = padded([row["input_ids"] for row in rows], side)[1]
        states = model(**{**batch, "is_noisy": batch["is_noisy"].bool()}, attention_mask=mask).last_hidden_state
        for number, (row, states_per_block) in enumerate(zip(rows, expected, strict=True)):
            of_noisy = states[number][mask[number].bool()][row["is_noisy"]]
            torch.testing.assert_close(of_noisy, states_per_block, rtol=1e-6, atol=1e-6)
    packed = {name: torch.cat([row[name] for row in rows])[None] for name in rows[0]}
    segments = torch.cat([torch.full((len(row["input_ids"]),), n) for n, row in enumerate(rows)])[None]
    states = model(**packed, segment_ids=segments).last_hidden_state[packed["is_noisy"]]
    torch.testing.assert_close(states, torch.cat(expected), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_cropped_after_every_draft_gives_the_states_of_one_pass(kind, attention):
    """Ragged prompts, padded on the left; a block's keys are appended, cropped, and written once it is finished.

    The finished block and the draft of the next one go together too, and only the draft is cropped.
    """
    model, size = make_backbone(kind, attention), 3
    prompts, prompt_mask = padded([ids(5, 1), ids(1, 2), ids(3, 3)], "left")
    canvas, drafts = (torch.stack([ids(9, seed + i) for i in range(3)]) for seed in (10, 20))
    mask = torch.cat((prompt_mask, torch.ones_like(canvas)), dim=1)
    blocks = block_numbers(5, 9, size).expand(3, -1)
    cache, together = model.new_cache(), model.new_cache()
    for one in (cache, together):
        model(prompts, attention_mask=prompt_mask, cache=one)
    for start in range(5, 14, size):
        end = start + size
        row = torch.cat((prompts, canvas), dim=1)[:, :end]
        draft = torch.cat((row[:, :start], drafts[:, start - 5 : end - 5]), dim=1)
        seen = {"attention_mask": mask[:, :end], "cache": cache}
        for whole, keep in ((draft, False), (draft, False), (row, True)):
            uncached = model(whole, attention_mask=mask[:, :end], block_ids=blocks[:, :end]).last_hidden_state
            cached = model(whole[:, start:], **seen).last_hidden_state
            torch.testing.assert_close(cached, uncached[:, start:], rtol=1e-6, atol=1e-6)
            if not keep:
                cache.crop(-size)
        previous = max(start - size, 5) if start > 5 else start
        both = model(
            draft[:, previous:], attention_mask=mask[:, :end], block_ids=blocks[:, :end], cache=together
        ).last_hidden_state
        together.crop(-size)
        uncached = model(draft, attention_mask=mask[:, :end], block_ids=blocks[:, :end]).last_hidden_state
        torch.testing.assert_close(both, uncached[:, previous:], rtol=1e-6, atol=1e-6)
    assert cache.get_seq_length() == 14
    rows = torch.tensor([2, 0])
    cache.batch_select_indices(rows)
    more = ids(2, 4).expand(2, -1)
    cached = model(more, attention_mask=torch.cat((mask[rows], torch.ones_like(more)), 1), cache=cache)
    whole = torch.cat((prompts[rows], canvas[rows], more), dim=1)
    blocks = torch.cat((blocks[rows], torch.full_like(more, 4)), dim=1)
    uncached = model(whole, attention_mask=torch.cat((mask[rows], torch.ones_like(more)), 1), block_ids=blocks)
    torch.testing.assert_close(cached.last_hidden_state, uncached.last_hidden_state[:, 14:], rtol=1e-6, atol=1e-6)


def test_a_convolution_cannot_be_cropped_by_more_than_the_last_call():
    model = make_backbone("convolution")
    cache = model.new_cache()
    model(ids(6, 1)[None], cache=cache)
    model(ids(2, 1)[None], cache=cache)
    with pytest.raises(ValueError, match="cropped by the 2 tokens of the last call at most, not by 3"):
        cache.crop(-3)


def test_patterns_against_their_rules():
    blocks = torch.tensor([[1, 1, 2, 3, 0, 1, 1, 2, 0, 0, 1]])
    is_noisy = torch.tensor([[1, 1, 1, 1, 0, 0, 0, 0, 1, 0, 0]]).bool()
    segments = torch.tensor([[0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1]])
    L = blocks.shape[1]
    query, key = torch.arange(L)[:, None], torch.arange(L)
    copies = attention_pattern(segments, blocks, is_noisy)(torch.zeros(1).long(), 0, query, key)
    alone = attention_pattern(None, blocks)(torch.zeros(1).long(), 0, query, key)
    for q in range(L):
        for k in range(L):
            a, b = int(blocks[0, q]), int(blocks[0, k])
            seen = {(1, 1): a == b, (1, 0): b < a, (0, 0): b <= a, (0, 1): False}[
                int(is_noisy[0, q]), int(is_noisy[0, k])
            ]
            assert copies[q, k] == (seen and segments[0, q] == segments[0, k]), (q, k)
            assert alone[q, k] == (b <= a), (q, k)
    assert attention_pattern() is None
    with pytest.raises(ValueError, match="is_noisy tells two copies apart and needs block_ids"):
        attention_pattern(is_noisy=is_noisy)


@pytest.mark.parametrize("past", [0, 3])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("is_padded", [False, True])
def test_the_mask_of_a_pattern_is_that_of_transformers(is_causal, is_padded, past):
    model = make_backbone("rotary", is_causal=is_causal)
    blocks = torch.tensor([[0, 0, 1, 1, 1, 2, 2, 3], [0, 1, 1, 2, 2, 2, 3, 3]])
    exists = torch.tensor([[1, 1, 1, 1, 1, 1, 1, 0], [0, 0, 1, 1, 1, 1, 1, 1]]) if is_padded else None
    pattern, cache, tokens = attention_pattern(block_ids=blocks), model.new_cache(), torch.ones(2, 8).long()
    if past:
        model(tokens[:, :past], cache=cache)
    vectors = model.embed_tokens(tokens[:, past:])
    make = create_causal_mask if is_causal else create_bidirectional_mask
    expected = make(model.config, vectors, exists, cache=cache, and_mask_function=pattern)
    assert torch.equal(pattern_mask(pattern, exists, vectors, past, is_causal), expected)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["rotary", "convolution"])
def test_a_mask_of_pairs_says_the_same_as_blocks(kind, attention):
    model = make_backbone(kind, attention)
    blocks, tokens = block_numbers(2, 6, 3)[None], ids(8, 1)[None]
    pairs = blocks[:, None, None, :] <= blocks[:, None, :, None]
    expected = model(tokens, block_ids=blocks).last_hidden_state
    states = model(tokens, attention_mask=pairs, position_ids=torch.arange(8)[None]).last_hidden_state
    torch.testing.assert_close(states, expected)
    cache = model.new_cache()
    model(tokens[:, :5], cache=cache, block_ids=blocks[:, :5])
    rest = model(tokens[:, 5:], pairs[:, :, 5:], torch.arange(5, 8)[None], cache=cache).last_hidden_state
    torch.testing.assert_close(rest, expected[:, 5:])
    assert torch.equal(model(tokens, attention_mask=pairs).last_hidden_state, states)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_vectors_take_the_place_of_ids(kind, is_causal):
    model = make_backbone(kind, is_causal=is_causal)
    tokens = ids(7, 1)[None]
    vectors = model.get_input_embeddings()(tokens)
    states = model(inputs_embeds=vectors, attention_mask=torch.ones_like(tokens)).last_hidden_state
    assert torch.equal(states, model(tokens).last_hidden_state)
