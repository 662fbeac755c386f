"""What every family's loss returns to the trainer."""

from dataclasses import dataclass, field

import torch


@dataclass
class LossOutput:
    """A loss as a sum with its count, so that it is normalised once over a whole optimiser step.

    Attributes:
        loss_sum: scalar, differentiable: the sum over the items of the batch, never their mean.
        num_items: scalar tensor or int: how many items the sum runs over (examples or tokens, as the family defines).
        metrics: name -> (sum, count) of detached scalars, reduced over accumulation steps and ranks in the same way
            and logged under their own names.
        sequence_nats: of a loss that is a negative log-likelihood, or an unbiased estimate of an upper bound of one,
            and of no other: the nats of each sequence of the batch (a document or a row of them), (N,) and detached.
        sequence_tokens: the tokens that they are for, (N,): those of the text and its end, the same count in every
            family. L + 1 for a text of L tokens that ends, L for a piece that goes on in another example, the hidden
            tokens in infilling. The padding of a canvas adds nats, never tokens. The evaluation turns both into nats
            per token, a perplexity, bits per character and standard errors.
        sequence_given: name of a condition -> (N,) bool, the sequences whose nats hold only under it: `{"length": ..}`
            where a text that ends is told its length. It goes into the names of the metrics, `perplexity_given_length`.
    """

    loss_sum: torch.Tensor
    num_items: torch.Tensor | int
    metrics: dict[str, tuple[torch.Tensor, torch.Tensor | int]] = field(default_factory=dict)
    sequence_nats: torch.Tensor | None = None
    sequence_tokens: torch.Tensor | None = None
    sequence_given: dict[str, torch.Tensor] = field(default_factory=dict)


def model_inputs(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What every model takes of a batch: the tokens, the mask and, of packed rows, documents and positions."""
    names = ("input_ids", "attention_mask", "segment_ids", "position_ids")
    return {name: batch[name] for name in names if name in batch}
