"""What the `generate` of every family returns."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers.utils import ModelOutput


@dataclass
class NonAutoregressiveGenerationOutput(ModelOutput):
    """What `generate` returns.

    Attributes:
        sequences: (B, L) int64: the prompt, padded on the left, then what was written, padded on the right.
        tokens_per_forward: (B,) float: tokens written by one forward pass, on average.
        nfe: (B,) int64: number of function evaluations, that is forward passes that the row took part in.
        finish_reason: for each row, why it ended: "stop" (the model or a criterion said so) or "length" (no position
            was left).
        history: (B, L) int64 with `return_history=True`: the step, from 0, that wrote each token of `sequences`; -1
            for the prompt and for padding.
        edits: (N, 5) int64 with `return_history=True`: every edit, as `xlm_hf.modules.edits.EditLog` describes it.
    """

    sequences: torch.Tensor | None = None
    tokens_per_forward: torch.Tensor | None = None
    nfe: torch.Tensor | None = None
    finish_reason: list[str] | None = None
    history: torch.Tensor | None = None
    edits: torch.Tensor | None = None

    @classmethod
    def of_rows(cls, sequences, history, nfe, stopped: torch.Tensor, return_history: bool) -> Any:
        """The output of rows, of which some (B,) have `stopped`; the fields are those of the class."""
        return cls(
            sequences=sequences,
            tokens_per_forward=(history >= 0).sum(dim=-1) / nfe.clamp(min=1),
            nfe=nfe,
            finish_reason=["stop" if row else "length" for row in stopped.tolist()],
            history=history if return_history else None,
        )
