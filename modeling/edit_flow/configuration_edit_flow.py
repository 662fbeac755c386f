"""Configuration of the edit flow language model."""

from typing import Any, Literal

from transformers.configuration_utils import strict

from xlm_hf.modules.backbone_config import RotaryTransformerConfig
from xlm_hf.modules.checked_options import Count, PositiveInt
from xlm_hf.modules.noise_schedules import make_whole_schedule


@strict
class EditFlowConfig(RotaryTransformerConfig):
    """Architecture of an edit flow: a backbone told the time, rates of edits, and what is inserted or substituted.

    A sequence reads `[CLS] prompt [BOS] tokens`, as that of an insertion language model. The gap to the right of
    `[BOS]`, and of every token after it, is a slot into which tokens can be inserted. Tokens after `[BOS]` can be
    deleted and substituted, unless the flow begins with nothing.

    Attributes:
        cls_token_id: first token of a sequence.
        bos_token_id: stands between the prompt and what is edited.
        conditioning: how the backbone is told the time: "adaln", or "token", which works with every backbone. Without
            a time no rate is right, so "none" is refused.
        coupling: what the flow begins with. "empty": nothing, so that there are insertions alone. "uniform":
            `noise_length` random tokens. "source": a text that is given, which is to be corrected.
        noise_length: of "uniform"; the number of random tokens.
        insertion_head: "independent", a rate and a distribution over tokens for each slot; "joint", one rate for the
            whole sequence times a softmax over all pairs of a slot and a token, as in an insertion language model,
            whose weights then fit.
        noise_schedule: the time grid of the samplers, as `make_schedule` takes it. Training does not depend on it.
        suppress_tokens: ids that no sequence gets; their logits are -inf in training and in generation.

    Raises:
        ValueError: without a conditioning, or for a schedule that is unknown or does not run from 0 to 1.
    """

    model_type = "edit_flow"

    cls_token_id: Count = 1
    eos_token_id: Count | None = None
    conditioning: Literal["none", "adaln", "token"] = "token"
    coupling: Literal["empty", "uniform", "source"] = "empty"
    noise_length: PositiveInt = 100
    insertion_head: Literal["independent", "joint"] = "independent"
    noise_schedule: str | dict[str, Any] = "linear"

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.conditioning == "none":
            raise ValueError("This model must be told the time: choose conditioning='adaln' or 'token'.")
        make_whole_schedule(self.noise_schedule)

    @property
    def num_edit_kinds(self) -> int:
        """1 if there are insertions alone, else 3: insertions, deletions and substitutions."""
        return 1 if self.coupling == "empty" else 3
