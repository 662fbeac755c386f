"""Configuration of the masked diffusion language model (MDLM)."""

from typing import Annotated, Any

from transformers.configuration_utils import strict

from xlm_hf.modules.backbone_config import RotaryTransformerConfig
from xlm_hf.modules.checked_options import Count, Interval
from xlm_hf.modules.noise_schedules import make_schedule


@strict
class MDLMConfig(RotaryTransformerConfig):
    """Architecture of a masked diffusion language model: a bidirectional backbone and a vocabulary head.

    A sequence is `prompt [BOS] canvas`. The canvas is masked and written: the text, `[EOS]`, and then `[PAD]` up to its
    end. A canvas has a fixed number of positions, so the model also writes where the text ends.

    Attributes:
        conditioning: "none" by default, since the masks say the time. With "adaln", as in the published code, or
            "token" the backbone is told the total noise sigma.
        time_conditioning: whether a conditioned backbone is told that noise; otherwise it is told sigma = 0 at all
            times, as the published models of the paper are.
        noise_schedule: alpha_t of the training, as `make_schedule` takes it. Samplers space their steps by it; the
            bound does not depend on it.
        noise_eps: the backbone is told sigma = -log(noise_eps + (1 - noise_eps) alpha_t).
        pad_token_id: fills the canvas after the text, where it is content like any other; and fills ragged rows,
            where it is never seen.
        mask_token_id: stands for what is to be written.
        bos_token_id: stands between the prompt and the canvas.
        eos_token_id: ends the text on the canvas.
        suppress_tokens: ids that no sequence gets; their logits are -inf in training and in generation. `[EOS]` and
            `[PAD]` are exempt, since a canvas holds them, and `[MASK]` is added.

    Raises:
        ValueError: for an unknown schedule.
    """

    model_type = "mdlm"
    written_specials = ("pad", "eos")

    time_conditioning: bool = True
    noise_schedule: str | dict[str, Any] = "log_linear"
    noise_eps: Annotated[float, Interval("(0, 1)")] = 1e-3
    mask_token_id: Count = 2
    eos_token_id: Count | None = 3

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        make_schedule(self.noise_schedule)
        self.time_conditioning = self.time_conditioning and self.conditioning != "none"
