"""The short convolution at the start of a layer, and its cache."""

from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicLayer


class ConvolutionCacheLayer(DynamicLayer):
    """Keys and values of a layer, and the inputs of its short convolution; what the last call added can be cropped."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs: torch.Tensor | None = None
        self.width = 0

    def extend(self, inputs: torch.Tensor, width: int) -> torch.Tensor:
        """Add `inputs` (B, L, H) and return them with the `width` before them, zeros where there are none."""
        if self.inputs is None:
            extended = nn.functional.pad(inputs, (0, 0, width, 0))
        else:
            extended = torch.cat((self.inputs[:, self.inputs.shape[1] - width :], inputs), dim=1)
        self.inputs, self.width = extended, width
        return extended

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` tokens.

        Raises:
            ValueError: if they are more than the last call added.
        """
        super().crop(tokens_to_remove)
        if self.inputs is not None:
            added = self.inputs.shape[1] - self.width
            if added + tokens_to_remove < 0:
                most = f"by the {added} tokens of the last call at most, not by {-tokens_to_remove}"
                raise ValueError(f"The cache of a short convolution can be cropped {most}: crop after every call.")
            self.inputs = self.inputs[:, : self.inputs.shape[1] + tokens_to_remove]

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.inputs = None

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Take the rows `beam_idx`, as a beam search does."""
        super().reorder_cache(beam_idx)
        self.inputs = None if self.inputs is None else self.inputs[beam_idx]

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows `indices` alone."""
        super().batch_select_indices(indices)
        self.inputs = None if self.inputs is None else self.inputs[indices]


class ShortConvolution(nn.Module):
    """Depthwise convolution along the sequence, added to its input: y_t = x_t + sum_o w_o * x_{t+o}, per channel.

    It shows every token its neighbours before the attention. The look-up "which token is next to a copy of this one"
    then takes one layer instead of two. Language models learn such look-ups much earlier with it (So et al., "Primer",
    arXiv 2109.08668; Allen-Zhu, "Physics of language models 4.1: Canon layers", 2025). The offsets o run over
    -(k-1)/2 .. (k-1)/2, or over -(k-1) .. 0 in a causal model. Padding, positions beyond the ends, and tokens that the
    attention pattern hides contribute nothing.
    """

    def __init__(self, hidden_size: int, kernel_size: int, is_causal: bool, layer_idx: int = 0):
        super().__init__()
        if not is_causal and kernel_size % 2 == 0:
            raise ValueError(f"conv_kernel_size is {kernel_size}: a bidirectional model needs an odd number.")
        self.offsets = convolution_offsets(kernel_size, is_causal)
        self.layer_idx = layer_idx
        self.weight = nn.Parameter(torch.empty(kernel_size, hidden_size))

    def forward(self, hidden_states, allowed=None, source=None, cache: Cache | None = None) -> torch.Tensor:
        """Map (B, L, hidden_size) to the same shape.

        Args:
            hidden_states (torch.Tensor): the residual stream.
            allowed (torch.Tensor | None): (k, B, L, 1), for each of the k offsets 1 if a token may see its neighbour
                and 0 otherwise; None if all may.
            source (torch.Tensor | None): (k, B, L) index of that neighbour in the flattened (B x L) tokens; None means
                at the offset in its row.
            cache: holds the inputs before these, to which these are added.
        """
        L, left, right = hidden_states.shape[1], -self.offsets[0], self.offsets[-1]
        if cache is not None:
            layer: Any = cache.layers[self.layer_idx]
            extended = layer.extend(hidden_states, left)
            extended = nn.functional.pad(extended[:, -(left + L) :], (0, 0, 0, right))
        elif source is None:
            extended = nn.functional.pad(hidden_states, (0, 0, left, right))
        output = hidden_states
        for number, (offset, weight) in enumerate(zip(self.offsets, self.weight, strict=True)):
            if offset == 0:
                taken = hidden_states
            elif source is None:
                taken = extended[:, left + offset : left + offset + L]
            else:
                taken = hidden_states.flatten(0, 1)[source[number]]
            taken = taken * weight
            if allowed is not None and offset:
                taken = taken * allowed[number]
            output = output + taken
        return output


def convolution_offsets(kernel_size: int, is_causal: bool) -> range:
    """Distances to the tokens that a convolution with `kernel_size` taps takes from."""
    first = -(kernel_size - 1) if is_causal else -(kernel_size // 2)
    return range(first, first + kernel_size)
