"""The training objective of the left-to-right language model: the negative log-likelihood."""

from functools import partial

import torch
from torch import nn

from xlm_hf.objectives.head_operator import linear_cross_entropy
from xlm_hf.objectives.loss_output import LossOutput, model_inputs


class ARLMLoss:
    """Cross-entropy of every target token given all tokens before it.

    For a sequence `prompt [BOS] x_1 .. x_n` with x_n = `[EOS]`,

        loss = - sum_{i=1}^{n} log softmax(logits_{i-1})[x_i] = - log p(x_1 .. x_n | prompt),

    in nats, where logits_0 stand at `[BOS]` and logits_i at x_i. It is the exact negative log-likelihood of the target;
    the tokens of the prompt carry no loss.
    """

    def num_items(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Number of predicted tokens in the batch, `[EOS]` included."""
        return (batch["target_ids"] >= 0).sum()

    def __call__(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> LossOutput:
        """Sum the loss over the batch of an `ARLMCollator...` (see there for its tensors).

        Returns:
            `LossOutput` whose items are predicted tokens, so that loss_sum / num_items is nats per token. Its metrics:
                next_token_accuracy: the share of tokens that none is more probable than.
                sequence_nll: nats per document.
        """
        cross_entropy = partial(linear_cross_entropy, target_ids=batch["target_ids"])
        outputs = model(**model_inputs(batch), logits_index=batch["logits_index"], head_function=cross_entropy)
        num_items = self.num_items(batch)
        loss_sum, losses, correct = outputs.head_output
        tokens = batch["target_lengths"]
        nll = losses.new_zeros(len(tokens)).index_add(0, batch["target_documents"], losses)
        return LossOutput(
            loss_sum=loss_sum,
            num_items=num_items,
            metrics={"next_token_accuracy": (correct.sum(), num_items), "sequence_nll": (nll.sum(), len(nll))},
            sequence_nats=nll,
            sequence_tokens=tokens,
        )
