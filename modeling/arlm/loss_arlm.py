"""The training objective of the left-to-right language model: the negative log-likelihood."""

import torch
from torch import nn

from xlm_hf.modules.loss_output import LossOutput, model_inputs


class ARLMLoss:
    """Cross-entropy of every target token given all tokens before it.

    For a sequence `prompt [BOS] x_1 .. x_n` with x_n = `[EOS]`,

        loss = - sum_{i=1}^{n} log softmax(logits_{i-1})[x_i] = - log p(x_1 .. x_n | prompt),

    in nats, where logits_0 stand at `[BOS]` and logits_i at x_i. It is the exact negative log-likelihood of the target;
    the tokens of the prompt carry no loss.
    """

    def num_items(self, batch: dict[str, torch.Tensor]) -> int:
        """Number of predicted tokens in the batch, `[EOS]` included."""
        return len(batch["target_ids"])

    def __call__(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> LossOutput:
        """Sum the loss over the batch of an `ARLMCollator...` (see there for its tensors).

        Returns:
            `LossOutput` whose items are predicted tokens, so that loss_sum / num_items is nats per token. Its metrics:
                next_token_accuracy: the share of tokens that are the most probable one.
                sequence_nll: nats per row.
        """
        outputs = model(**model_inputs(batch), logits_index=batch["logits_index"])
        logits, targets = outputs.logits.float(), batch["target_ids"]
        num_items = self.num_items(batch)
        losses = nn.functional.cross_entropy(logits, targets, reduction="none")
        rows = batch["logits_index"] // batch["input_ids"].shape[1]
        nll = losses.new_zeros(len(batch["input_ids"])).index_add(0, rows, losses.detach())
        return LossOutput(
            loss_sum=losses.sum(),
            num_items=num_items,
            metrics={
                "next_token_accuracy": ((logits.detach().argmax(dim=-1) == targets).sum(), num_items),
                "sequence_nll": (nll.sum(), len(nll)),
            },
            sequence_nats=nll,
            sequence_tokens=torch.bincount(rows, minlength=len(nll)),
        )
