"""Configuration of the Gaussian diffusion language model (Plaid)."""

from typing import Literal

from transformers.configuration_utils import strict

from xlm_hf.modules.backbone_config import RotaryTransformerConfig
from xlm_hf.modules.checked_options import Count, PositiveInt


@strict
class PlaidConfig(RotaryTransformerConfig):
    """Architecture of a Gaussian diffusion language model: a bidirectional backbone, told the noise, and a head.

    A sequence is `prompt [BOS] canvas`. The network sees noisy vectors of the canvas - the text, `[EOS]`, and then
    `[PAD]` up to its end - and clean ones of everything else.

    Attributes:
        embedding_size: dimensions of the vectors of the tokens, which have length 1.
        gamma_min: log of the ratio of noise to signal at time 0, the text; with a learnt schedule, before training.
        gamma_max: the same at time 1, pure noise.
        noise_schedule: how gamma runs between the two: "linear", or "learnt" with the weights, and both ends with it.
        self_conditioning: whether the network is also shown what it expected of the canvas before.
        conditioning: how the backbone is told gamma; no position shows how noisy it is. "adaln" by default; "token"
            works on every backbone.
        pad_token_id: fills the canvas after the text, where it is content like any other; and fills ragged rows,
            where it is never seen.
        mask_token_id: stands for what is to be filled in, in prompts alone: the network never sees it. An id beyond the
            vocabulary means that there is none.
        bos_token_id: stands between the prompt and the canvas.
        eos_token_id: ends the text on the canvas.
        suppress_tokens: ids that no sequence gets. `[EOS]` and `[PAD]` are exempt, since a canvas holds them, and
            `[MASK]` is added.

    Raises:
        ValueError: unless gamma_min < gamma_max, and for a backbone that is told no noise.
    """

    model_type = "plaid"
    written_specials = ("pad", "eos")

    embedding_size: PositiveInt = 16
    gamma_min: float = -3.0
    gamma_max: float = 6.0
    noise_schedule: Literal["linear", "learnt"] = "learnt"
    self_conditioning: bool = True
    conditioning: Literal["none", "adaln", "token"] = "adaln"
    mask_token_id: Count = 2
    eos_token_id: Count | None = 3

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.gamma_min >= self.gamma_max:
            raise ValueError(
                f"gamma_min ({self.gamma_min}) must be less than gamma_max ({self.gamma_max}): change one."
            )
        if self.conditioning == "none":
            raise ValueError("conditioning is 'none', and no position shows how noisy it is: choose adaln or token.")
