"""Configuration of score entropy discrete diffusion (SEDD)."""

from typing import Annotated, Any, Literal

from transformers.configuration_utils import strict

from xlm_hf.modules.backbone_config import RotaryTransformerConfig
from xlm_hf.modules.checked_options import Count, Interval
from xlm_hf.modules.noise_schedules import make_schedule


@strict
class SEDDConfig(RotaryTransformerConfig):
    """Architecture of a score entropy diffusion model: a bidirectional backbone, told the time, and a head of scores.

    A sequence is `prompt [BOS] canvas`. The head gives for each id y at a position log s_y, up to what `scaled_scores`
    says: s_y estimates the ratio of the probabilities of y and of what stands there, given the noise everywhere.

    Attributes:
        kernel: the noise: "absorb", masks; or "uniform", any tokens.
        noise_schedule: alpha_t of training and samplers, as `make_schedule` takes it.
        scaled_scores: whether the noise level is built into the scores. With "absorb" log s = logits + log(alpha / (1 -
            alpha)) - log N, as in the published model. With "uniform" log s = logits x kappa / (1 + kappa), kappa = N
            alpha / (1 - alpha), which vanishes with alpha as all true log-ratios do. Otherwise log s = logits, as in
            the published model of uniform noise; its bound over all of a schedule is infinite, and none is reported.
        conditioning: how the backbone is told the noise.
        noise_eps: the backbone is told sigma = -log(max(alpha, noise_eps)), which is finite.
        pad_token_id: fills the canvas after the text, where it is content like any other; and fills ragged rows,
            where it is never seen.
        mask_token_id: stands for what is to be written.
        bos_token_id: stands between the prompt and the canvas.
        eos_token_id: ends the text on the canvas.
        suppress_tokens: ids that no sequence gets. `[EOS]` and `[PAD]` are exempt, since a canvas holds them, and
            `[MASK]` is added. All others are N ids.

    Raises:
        ValueError: for a schedule that does not exist.
    """

    model_type = "sedd"
    written_specials = ("pad", "eos")

    kernel: Literal["absorb", "uniform"] = "absorb"
    noise_schedule: str | dict[str, Any] = "log_linear"
    scaled_scores: bool = True
    conditioning: Literal["adaln", "token"] = "adaln"
    noise_eps: Annotated[float, Interval("(0, 1)")] = 1e-3
    mask_token_id: Count = 2
    eos_token_id: Count | None = 3

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        make_schedule(self.noise_schedule)
