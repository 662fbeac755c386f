"""Configuration of the generalized interpolating discrete diffusion model (GIDD)."""

from typing import Annotated, Any, Literal

from transformers.configuration_utils import strict

from xlm_hf.modules.backbone_config import RotaryTransformerConfig
from xlm_hf.modules.checked_options import Count, Interval, PartialShare
from xlm_hf.modules.noise_schedules import make_whole_schedule


@strict
class GIDDConfig(RotaryTransformerConfig):
    """Architecture and noise of GIDD: a bidirectional backbone, told the time, and a vocabulary head.

    A sequence is `prompt [BOS] canvas`. Noise turns tokens of the canvas into masks, or replaces them by uniformly
    drawn ones: the text, `[EOS]`, and then `[PAD]` up to its end.

    Attributes:
        uniform_share: p_u, the share of uniform noise at t = 1/2, in [0, 1). With 0 there are masks alone, as in MDLM.
        gamma: how the uniform share rises and falls, in (0, 2] (see `MixedKernel`). Beyond 2 no token could become a
            mask near t = 1.
        noise_schedule: the pace of time, as `make_schedule` takes it. Samplers space their steps by it; the bound does
            not depend on it.
        conditioning: how the backbone is told the time t, since no position but a mask shows whether it holds noise.
            "adaln" by default, as in the published code; "token" works on every backbone; "none" tells no time.
        pad_token_id: fills the canvas after the text, where it is content like any other; and fills ragged rows,
            where it is never seen.
        mask_token_id: one kind of noise; and what is to be filled in, in prompts.
        bos_token_id: stands between the prompt and the canvas.
        eos_token_id: ends the text on the canvas.
        suppress_tokens: ids that no sequence gets, and no noise. `[EOS]` and `[PAD]` are exempt, since a canvas holds
            them, and `[MASK]` is added. All others are the N ids of the uniform noise.

    Raises:
        ValueError: for a share or gamma out of range, or a schedule that is unknown or not whole.
    """

    model_type = "gidd"
    written_specials = ("pad", "eos")

    uniform_share: PartialShare = 0.2
    gamma: Annotated[float, Interval("(0, 2]")] = 1.0
    noise_schedule: str | dict[str, Any] = "linear"
    conditioning: Literal["none", "adaln", "token"] = "adaln"
    mask_token_id: Count = 2
    eos_token_id: Count | None = 3

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        make_whole_schedule(self.noise_schedule)
