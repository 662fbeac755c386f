"""Generation by masked diffusion: a canvas of masks, and in every step some of them become tokens."""

from typing import ClassVar

import torch

from xlm_hf.modules.generation import Sampler
from xlm_hf.modules.masked_generation import CanvasGenerationConfig, MaskedGenerationMixin
from xlm_hf.modules.reverse_process import AncestralSampler, ConfidenceSampler, FirstHittingSampler, RemdmSampler


class MDLMGenerationConfig(CanvasGenerationConfig):
    """Options of `MDLMForMaskedDiffusion.generate`.

    `max_new_tokens` is the size of the canvas.

    Attributes:
        sampler: "ancestral" is the reverse process on `num_steps` steps (arXiv 2406.07524). "first_hitting" is its
            limit of infinitely many steps, one token at a time (arXiv 2409.02908). In "remdm" tokens may be masked
            again (arXiv 2503.00307). "confidence" commits by an order of the positions. The first three draw from the
            law of the model's process; an order other than "random" seeks its mode. The options of each are those of
            `AncestralSampler`, `FirstHittingSampler`, `RemdmSampler` and `ConfidenceSampler`.
        guidance_scale: how strongly the prompt guides what is written (classifier-free guidance, arXiv 2207.12598): w
            makes the logits w x those given the prompt + (1 - w) x those without it, in two forward passes. None is
            w = 1, in one. The model must have been trained with `condition_dropout`.
    """

    samplers: ClassVar[dict[str, type[Sampler]]] = {
        "ancestral": AncestralSampler,
        "first_hitting": FirstHittingSampler,
        "remdm": RemdmSampler,
        "confidence": ConfidenceSampler,
    }
    renamed_samplers = {"rule": "confidence", "remask": "remdm"}

    sampler: str = "ancestral"
    guidance_scale: float | None = None


class MDLMGenerationMixin(MaskedGenerationMixin):
    """Adds `generate` to the masked diffusion language model."""

    @property
    def is_told_the_time(self) -> bool:
        """Whether the network is conditioned on alpha."""
        return self.config.time_conditioning

    def time_inputs(self, alpha: torch.Tensor) -> dict[str, torch.Tensor]:
        """The share of the canvas that is clean."""
        return {"alpha": alpha}
