"""Floating-point operations: those that a run executes, and those that the mathematics needs.

Only products of matrices are counted, a multiplication and an addition as two; everything else is less than a hundredth
of them in operations, though not in time.
"""

from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

import xlm_hf.objectives.head_operator  # noqa: F401  (registers its operator)


def _chunked_head(hidden_states, weight, query, table, suppressed, function, tensors, dtype, wanted, **_) -> int:
    """The logits, and a product of the same size for each gradient; not those that an accelerator makes once more."""
    if weight is None:
        return 0
    return 2 * hidden_states[0] * hidden_states[1] * weight[0] * (1 + sum(wanted[:2]))


def _attention_on_cpu(query, key, value, *_, **__) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_on_cpu_backward(gradient, query, key, value, *_, **__) -> int:
    """Five products where the forward pass has two: the weights again, and the gradients of them, q, k and v."""
    return sdpa_flop_count(query, key, value) * 5 // 2


_FORMULAS = {
    torch.ops.xlm_hf.chunked_head: _chunked_head,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_on_cpu,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_on_cpu_backward,
}


def executed(function: Callable[[], object]) -> int:
    """Operations that a call of `function` executes."""
    with FlopCounterMode(display=False, custom_mapping=_FORMULAS) as counter:
        function()
    return counter.get_total_flops()


def of_forward(config, num_tokens: int, context: float, head_rows: int) -> int:
    """Operations of a forward pass: 2 per weight and token, 4 x context x width in the attention, and the head.

    Args:
        config: of the model; the rotary backbone.
        num_tokens: tokens that go through the layers.
        context: tokens that each of them looks at.
        head_rows: tokens whose logits are made; of the others the last layer makes keys, values and queries alone.
    """
    H, M = config.hidden_size, config.intermediate_size
    attention, rest = 2 * 3 * H * H + 4 * context * H, 2 * (H * H + 2 * H * M)
    num_tokens_in_layers = (config.num_hidden_layers - 1) * num_tokens
    operations = attention * (num_tokens_in_layers + num_tokens) + rest * (num_tokens_in_layers + head_rows)
    return int(operations + 2 * head_rows * H * config.vocab_size)
