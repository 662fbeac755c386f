"""Generation by uniform diffusion: a canvas of random tokens, which change step by step into a text."""

from typing import Any, ClassVar

import torch

from xlm_hf.modules.generation import GenerationCall, NonAutoregressiveGenerationConfig, Sampler
from xlm_hf.modules.kernel_samplers import KernelProcess, KernelSampler, PsiSampler
from xlm_hf.modules.kernels import UniformKernel
from xlm_hf.modules.masked_generation import MaskedGenerationMixin
from xlm_hf.modules.noise_schedules import make_schedule


class UDLMGenerationConfig(NonAutoregressiveGenerationConfig):
    """Options of `UDLMForUniformDiffusion.generate`.

    `max_new_tokens` is the size of the canvas. Temperature, top-k and top-p act on what is predicted of a token by the
    others (leave-one-out), whatever the network predicts.

    Attributes:
        sampler: "ancestral" is the reverse process on `num_steps` steps (arXiv 2412.10193). In "psi" a share of the
            positions forgets its noise in each step (arXiv 2602.21185). The options of each are those of
            `KernelSampler` and `PsiSampler`.
        guidance_scale: how strongly the prompt guides what is written (classifier-free guidance, arXiv 2207.12598): w
            makes the logits w x those given the prompt + (1 - w) x those without it, in two forward passes. None is
            w = 1, in one. The model must have been trained with `condition_dropout`.
    """

    samplers: ClassVar[dict[str, type[Sampler]]] = {"ancestral": KernelSampler, "psi": PsiSampler}

    sampler: str = "ancestral"
    guidance_scale: float | None = None


class DenoiserKernel(UniformKernel):
    """Uniform noise, to a network that predicts a token from all that is seen, its own noisy token included."""

    def leave_one_out(self, logits: torch.Tensor, ids: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """The logits less log q(z | x = z) - log q(z | another x) = log(1 + N alpha / (1 - alpha)) at the token z.

        For p(x | z, others) is proportional to p(x | others) q(z | x).
        """
        writable: Any = self.writable_ids
        alpha, _, noise = self.shares(t)
        evidence = torch.log1p(len(writable) * alpha / noise).to(logits.dtype)
        return logits.scatter_add(1, ids[:, None], -evidence[:, None])


class UDLMGenerationMixin(MaskedGenerationMixin):
    """Adds `generate` to the uniform diffusion language model."""

    def open_generation(self: Any, call: GenerationCall, input_ids, attention_mask, **inputs) -> KernelProcess:
        """A canvas of noise after each prompt; mask tokens in a prompt become noise that is filled in."""
        canvas = self.open_canvas(call, input_ids, attention_mask, **inputs)
        suppressed = torch.tensor(self.config.suppressed_ids, dtype=torch.int64, device=canvas.ids.device)
        every = torch.arange(self.config.vocab_size, device=canvas.ids.device)
        kind = DenoiserKernel if self.config.prediction_type == "denoiser" else UniformKernel
        kernel = kind(
            schedule=make_schedule(self.config.noise_schedule), writable_ids=every[~torch.isin(every, suppressed)]
        )
        return KernelProcess(canvas, call.config.make_sampler(), call, kernel)

    def time_inputs(self, alpha: torch.Tensor) -> dict[str, torch.Tensor]:
        """The share of the canvas that is without noise."""
        return {"alpha": alpha}
