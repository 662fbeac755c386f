"""From hidden states to logits over the vocabulary, without those of suppressed ids."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import nn
from transformers.utils import ModelOutput

# Logits of one block: what stays in a core's cache while it is summed, and elsewhere 512 MiB of float32.
_BLOCK_SIZES = {"cpu": 2**18}
_BLOCK_SIZE = 2**27
_BLOCK_ROWS = 256  # of a block of a part of the vocabulary; with fewer, the product waits for the weights

HeadFunction = Callable[[torch.Tensor, nn.Module, Sequence[int] | None], Any]


@dataclass
class LanguageModelOutput(ModelOutput):
    """What the `forward` of a language model returns; families with more heads add their fields.

    Attributes:
        loss: mean over the labels, where `forward` takes `labels`.
        logits: (B, L, V), or (S, V) where the call names S positions; None with a head function.
        head_output: what the head function of the call returned; None without one.
        hidden_states: per layer (B, L, hidden_size), with `output_hidden_states=True`.
        attentions: per layer (B, heads, L, L), with `output_attentions=True` and eager attention.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    head_output: Any = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


def suppress_(logits: torch.Tensor, token_ids: Sequence[int] | None) -> torch.Tensor:
    """Set the logits (..., V) of `token_ids` to -inf, in place, and return them.

    Runs of neighbouring ids are filled as slices: an index made of a list would be copied to the device every time.
    """
    start = stop = 0
    for token_id in [*sorted(token_ids or ()), logits.shape[-1] + 1]:
        if token_id != stop:
            if stop > start:
                logits[..., start:stop] = -torch.inf
            start = token_id
        stop = token_id + 1
    return logits


def head_fields(
    hidden_states: torch.Tensor,
    head: nn.Module,
    suppressed_ids: Sequence[int] | None,
    head_function: HeadFunction | None,
) -> dict[str, Any]:
    """The field of a model's output that its vocabulary head fills: `logits`, or `head_output` with a head function.

    A head function gets the hidden states (S, H) asked for, the head and the ids whose logits are -inf. A loss brings
    one that needs no logits, a sampler one that decides. The head is used within the model's own forward pass, so
    whoever wraps it (data parallelism, automatic mixed precision) sees every parameter at work.
    """
    if head_function is None:
        return {"logits": suppress_(head(hidden_states), suppressed_ids)}
    return {"head_output": head_function(hidden_states, head, suppressed_ids)}


def is_linear(head: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether the head is no more than a linear map, whose weight may be used without calling it."""
    # DeepSpeed gathers a weight that it keeps in shards where its module is called, and nowhere else; a quantised
    # weight is a tensor of another class.
    is_plain = type(head) is nn.Linear and type(head.weight) in (nn.Parameter, torch.Tensor)
    return is_plain and not hasattr(head.weight, "ds_id")


class LogitsOnDemand:
    """Logits (S, V), float32, made from hidden states where they are asked for, and never all at once.

    A step of a sampler needs a statistic of every row, and then the logits of the few rows that it draws from. As one
    tensor, the logits of a large vocabulary go through main memory several times, which takes longer than their
    product. Here one block at a time stays in the cache. Use it within the model's forward pass, in a head function
    (see `head_fields`).

    Args:
        hidden_states: (S, H).
        head: from (S, H) to (S, V).
        suppressed_ids: ids whose logits are -inf.

    Attributes:
        unprocessed: the logits before `processed`, where that has changed any; else None.
    """

    unprocessed: "LogitsOnDemand | None" = None

    def __init__(self, hidden_states: torch.Tensor, head: nn.Module, suppressed_ids: Sequence[int] | None = None):
        self.hidden_states, self.head, self.suppressed_ids = hidden_states, head, [*(suppressed_ids or ())]

    @classmethod
    def of(cls, logits: torch.Tensor, suppressed_ids: Sequence[int] | None = None) -> "LogitsOnDemand":
        """Logits (S, V) that have been made already."""
        return cls(logits, nn.Identity(), suppressed_ids)

    def __getitem__(self, rows: Any) -> torch.Tensor:
        """The logits (N, V) of the rows of a slice, an index or a mask."""
        return suppress_(self.head(self.hidden_states[rows]).float(), self.suppressed_ids)

    def processed(
        self, suppress_tokens: Sequence[int] | None, processor: Any, ids: torch.Tensor, index: torch.Tensor, step: int
    ) -> "LogitsOnDemand":
        """What `processor` makes of them, those of `suppress_tokens` then set to -inf.

        The processor is called as transformers does, with (S, L) ids, all (S, V) logits and `cur_step`; the rows are
        those of `index` (S,) in the flattened `ids` (B, L).
        """
        if processor is not None:
            logits = self.of(processor(ids[index // ids.shape[1]], self[:], cur_step=step), suppress_tokens)
        elif set(suppress_tokens or ()) <= set(self.suppressed_ids):
            return self
        else:
            logits = LogitsOnDemand(self.hidden_states, self.head, [*self.suppressed_ids, *(suppress_tokens or ())])
        logits.unprocessed = self
        return logits

    def statistic(self, name: str) -> torch.Tensor:
        """A statistic (S,) of softmax(logits), float32, in which entries at -inf count as impossible.

        It is that of the logits as they are, before temperature, top-k and top-p, which shape the draw and not the
        model's certainty.

        Args:
            name: "maximum", the largest logit; "log_mass", log sum exp; "confidence", p1, the largest probability;
                "margin", p1 - p2, the largest less the second largest; "entropy", -sum p log p, in nats.
        """
        size = _BLOCK_SIZES.get(self.hidden_states.device.type, _BLOCK_SIZE)
        head, x = self.head, self.hidden_states
        num_rows = max(size // len(head.weight), _BLOCK_ROWS) if is_linear(head) else max(1, size // self[:1].shape[-1])
        # Even parts: a product with the few rows that are left over would cost a reading of all weights.
        return torch.cat([_statistic(name, self._blocks(part, size)) for part in x.chunk(max(1, len(x) // num_rows))])

    def _blocks(self, x: torch.Tensor, size: int) -> Iterator[torch.Tensor]:
        """The logits of hidden states x for one part of the vocabulary after the other, each where the last was."""
        head = self.head
        if not is_linear(head) or torch.is_autocast_enabled(x.device.type):
            yield suppress_(head(x).float().clone(), self.suppressed_ids)
            return
        weights = head.weight.chunk(max(1, len(x) * len(head.weight) // size))
        start, memory = 0, x.new_empty(len(x) * len(weights[0]))
        for weight in weights:
            width = len(weight)
            block = torch.mm(x, weight.T, out=memory[: len(x) * width].view(len(x), width))
            if head.bias is not None:
                block += head.bias[start : start + width]
            yield suppress_(block.float(), [i - start for i in self.suppressed_ids if 0 <= i - start < width])
            start += width


def _statistic(name: str, blocks: Iterator[torch.Tensor]) -> torch.Tensor:
    """`LogitsOnDemand.statistic` of rows whose logits stand side by side in `blocks`, which are overwritten."""
    tops, centres, masses, moments = [], [], [], []
    for block in blocks:
        num_tops = min(2, block.shape[1])
        tops.append(block.topk(num_tops).values if name == "margin" else block.amax(dim=-1, keepdim=True))
        if name == "maximum":
            continue
        # c, the largest z of the block, or finite where all are -inf; sum exp(z - c) and sum (z - c) exp(z - c).
        centres.append(tops[-1][:, :1].clamp(min=-1e30))
        shifted = block.sub_(centres[-1])
        if name == "entropy":
            moments.append(shifted.exp().mul_(shifted.clamp(min=-1e30)).sum(dim=-1, keepdim=True))
        masses.append(shifted.exp_().sum(dim=-1, keepdim=True))
    top = torch.cat(tops, dim=1)
    if name == "maximum":
        return top.amax(dim=-1)
    centre, of_blocks = torch.cat(centres, dim=1).amax(dim=-1), torch.cat(masses, dim=1)
    change = torch.cat(centres, dim=1) - centre[:, None]
    mass = (of_blocks * change.exp()).sum(dim=-1)
    if name == "log_mass":
        return centre + mass.log()
    if name == "confidence":
        return 1 / mass
    if name == "margin":
        return (1 - (top.topk(2).values[:, 1] - centre).exp()) / mass
    return mass.log() - ((torch.cat(moments, dim=1) + change * of_blocks) * change.exp()).sum(dim=-1) / mass
