"""Configuration of the flexible masked diffusion language model (FlexMDM)."""

from typing import Any, Literal

from transformers.configuration_utils import strict

from xlm_hf.modules.backbone_config import RotaryTransformerConfig
from xlm_hf.modules.checked_options import Count, PositiveInt
from xlm_hf.modules.noise_schedules import make_whole_schedule


@strict
class FlexMDMConfig(RotaryTransformerConfig):
    """Architecture of a flexible masked diffusion language model: a backbone told the time, and two heads.

    A sequence reads `prompt [BOS] tokens`, some of them masks. The gap to the right of `[BOS]`, and of every token and
    mask after it, is where masks can be inserted.

    Attributes:
        conditioning: how the backbone is told the time: "adaln", or "token", which works with every backbone. Without
            a time no rate of insertion is right, so "none" is refused.
        insertion_schedule: the share of the tokens that are present at time t, masked or not, as `make_schedule`
            takes it.
        unmasking_schedule: likewise when a token that is present is clean (see `FlexMDMCollator`).
        gap_head: what the head of the gaps predicts of the number of tokens missing there: "rate", the rate r at which
            they come, the expected number being (1 - alpha_t) r; "count", the expected number as a share of
            `max_count`, as in published models; "distribution", the probabilities of 0..max_count.
        max_count: of "count" and "distribution"; None means `max_position_embeddings`.
        end_token: which token the network reads behind the text, "eos" or "pad"; its gaps are then those to the left of
            a token, as in published models. None means no such token.
        suppress_tokens: ids that no sequence gets; their logits are -inf in training and in generation. `[MASK]` is
            added.

    Raises:
        ValueError: without a conditioning, or for an unknown schedule.
    """

    model_type = "flexmdm"

    mask_token_id: Count = 2
    eos_token_id: Count | None = 3
    conditioning: Literal["none", "adaln", "token"] = "token"
    insertion_schedule: str | dict[str, Any] = "linear"
    unmasking_schedule: str | dict[str, Any] = "linear"
    gap_head: Literal["rate", "count", "distribution"] = "rate"
    max_count: PositiveInt | None = None
    end_token: Literal["eos", "pad"] | None = None

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.conditioning == "none":
            raise ValueError("This model must be told the time: choose conditioning='adaln' or 'token'.")
        for schedule in (self.insertion_schedule, self.unmasking_schedule):
            make_whole_schedule(schedule)
        if self.max_count is None:
            self.max_count = self.max_position_embeddings

    @property
    def end_token_id(self) -> int | None:
        """The token that the network reads behind the text."""
        return {"eos": self.eos_token_id, "pad": self.pad_token_id, None: None}[self.end_token]
