"""Generation by GIDD: a canvas of masks, which become tokens that may change until the last step, and after it."""

from typing import Any, ClassVar

import torch

from xlm_hf.modules.generation import GenerationCall, NonAutoregressiveGenerationConfig, Sampler
from xlm_hf.modules.kernel_samplers import KernelProcess, KernelSampler, PsiSampler
from xlm_hf.modules.noise_schedules import make_schedule
from xlm_hf.modules.reverse_process import ConfidenceSampler

from .correction_gidd import SelfCorrectionMixin, SelfCorrectionSampler
from .kernel_gidd import MixedKernel


class GIDDGenerationConfig(NonAutoregressiveGenerationConfig):
    """Options of `GIDDForInterpolatingDiffusion.generate`.

    `max_new_tokens` is the size of the canvas. Temperature, top-k and top-p act on what is predicted of a token by the
    others.

    Attributes:
        sampler: "ancestral" is the reverse process on `num_steps` steps (arXiv 2503.04482). In "psi" a
            share of the positions forgets its noise in each step (arXiv 2602.21185). "self_correction" goes on after
            the last step of "ancestral", token by token, and takes texts that are written already: rows `prompt [BOS]
            text`. "confidence" fills the masks by an order of the positions, and takes what it wrote to be without
            noise. The options of each are those of `KernelSampler`, `PsiSampler`, `SelfCorrectionSampler` and
            `ConfidenceSampler`.
        guidance_scale: how strongly the prompt guides what is written (classifier-free guidance, arXiv 2207.12598): w
            makes the logits w x those given the prompt + (1 - w) x those without it, in two forward passes. None is
            w = 1, in one. The model must have been trained with `condition_dropout`.
    """

    samplers: ClassVar[dict[str, type[Sampler]]] = {
        "ancestral": KernelSampler,
        "psi": PsiSampler,
        "self_correction": SelfCorrectionSampler,
        "confidence": ConfidenceSampler,
    }

    sampler: str = "ancestral"
    guidance_scale: float | None = None


class GIDDProcess(KernelProcess):
    """Where each row of a canvas stands in the reverse process."""

    def level(self, t: torch.Tensor) -> torch.Tensor:
        """1 less the time as the kernel takes it, whatever the pace of the schedule."""
        kernel: Any = self.kernel
        return kernel.schedule.alpha(t)


class GIDDGenerationMixin(SelfCorrectionMixin):
    """Adds `generate` to the model."""

    def open_generation(self: Any, call: GenerationCall, input_ids, attention_mask, **inputs) -> KernelProcess:
        """A canvas of masks after each prompt, or of a text that it holds; mask tokens in a prompt are filled in."""
        config = self.config
        canvas = self.open_canvas(call, input_ids, attention_mask, **inputs)
        every = torch.arange(config.vocab_size, device=canvas.ids.device)
        suppressed = torch.tensor(config.suppressed_ids, dtype=torch.int64, device=canvas.ids.device)
        kernel = MixedKernel(
            uniform_share=config.uniform_share,
            gamma=config.gamma,
            schedule=make_schedule(config.noise_schedule),
            mask_token_id=config.mask_token_id,
            writable_ids=every[~torch.isin(every, suppressed)],
        )
        return GIDDProcess(canvas, call.config.make_sampler(), call, kernel)

    def time_inputs(self, alpha: torch.Tensor) -> dict[str, torch.Tensor]:
        """The time: 1 less what is told, be it the `level` of a process or the share of the canvas that is written."""
        return {"timesteps": 1 - alpha}
