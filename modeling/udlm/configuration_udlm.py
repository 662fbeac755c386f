"""Configuration of the uniform diffusion language model (UDLM)."""

from typing import Annotated, Any, Literal

from transformers.configuration_utils import strict

from xlm_hf.modules.backbone_config import RotaryTransformerConfig
from xlm_hf.modules.checked_options import Count, Interval
from xlm_hf.modules.noise_schedules import make_schedule


@strict
class UDLMConfig(RotaryTransformerConfig):
    """Architecture of a uniform diffusion language model: a bidirectional backbone, told the time, and a head.

    A sequence is `prompt [BOS] canvas`. Noise replaces tokens of the canvas by uniformly drawn ones: the text, `[EOS]`,
    and then `[PAD]` up to its end.

    Attributes:
        noise_schedule: alpha_t of the noise, as `make_schedule` takes it: that of training, and of every sampler.
        prediction_type: what the head predicts of a position. "leave_one_out": its clean token by all other positions,
            which is the optimum of the bound. "denoiser": by its own noisy token too, the optimum of a cross-entropy.
            Each follows from the other (`DenoiserKernel`).
        conditioning: how the backbone is told the noise; no position shows whether it holds noise. "adaln" by default,
            as in the published code; "token" works on every backbone.
        time_conditioning: whether a conditioned backbone is told it; otherwise it is told alpha = 1 at all times.
        noise_eps: the backbone is told sigma = -log(max(alpha, noise_eps)), which is finite.
        pad_token_id: fills the canvas after the text, where it is content like any other; and fills ragged rows,
            where it is never seen.
        mask_token_id: stands for what is to be filled in, in prompts alone: the network never sees it. An id beyond the
            vocabulary means that there is none.
        bos_token_id: stands between the prompt and the canvas.
        eos_token_id: ends the text on the canvas.
        suppress_tokens: ids that no sequence gets, and no noise. `[EOS]` and `[PAD]` are exempt, since a canvas holds
            them, and `[MASK]` is added. All others are the N ids of the noise.

    Raises:
        ValueError: for a schedule that does not exist.
    """

    model_type = "udlm"
    written_specials = ("pad", "eos")

    noise_schedule: str | dict[str, Any] = "log_linear"
    prediction_type: Literal["leave_one_out", "denoiser"] = "leave_one_out"
    conditioning: Literal["none", "adaln", "token"] = "adaln"
    time_conditioning: bool = True
    noise_eps: Annotated[float, Interval("(0, 1)")] = 1e-3
    mask_token_id: Count = 2
    eos_token_id: Count | None = 3

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self.time_conditioning = self.time_conditioning and self.conditioning != "none"
        make_schedule(self.noise_schedule)
