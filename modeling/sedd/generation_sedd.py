"""Generation by score entropy diffusion: steps of the reverse process by ratios of probabilities."""

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch

from xlm_hf.modules.checked_options import PositiveInt
from xlm_hf.modules.generation import GenerationCall, NonAutoregressiveGenerationConfig, Sampler
from xlm_hf.modules.kernel_samplers import KernelProcess, Move
from xlm_hf.modules.kernels import Kernel, Shares, UniformKernel
from xlm_hf.modules.masked_generation import MaskedGenerationMixin
from xlm_hf.modules.noise_schedules import NoiseSchedule, make_schedule
from xlm_hf.modules.reverse_process import CanvasProcess, ConfidenceSampler
from xlm_hf.modules.token_sampling import filter_logits, sample_categorical

_STAY, _TOKEN = 2, 3  # which of the numbers of a move decide whether a mask stays, and by which token it goes


@dataclass(frozen=True, kw_only=True, eq=False)
class AbsorbingKernel(Kernel):
    """Tokens become masks: m_t = 1 - alpha_t."""

    schedule: NoiseSchedule

    def shares(self, t: torch.Tensor) -> Shares:
        """alpha_t, 1 - alpha_t and 0."""
        return Shares(self.schedule.alpha(t), self.schedule.mask_probability(t), torch.zeros_like(t))


@dataclass(frozen=True)
class ScoreMove(Move):
    """What a step makes of positions by their scores; `own` is not used.

    Attributes:
        is_exact: whether the step is the analytic one, else Euler's.
        is_scaled: see `SEDDConfig.scaled_scores`.
        noise_eps: no alpha is taken to be less.
    """

    is_exact: bool = True
    is_scaled: bool = True
    noise_eps: float = 1e-3

    def predictions(self, scores: torch.Tensor) -> torch.Tensor:
        """The logits (S, V) as they are."""
        return scores

    def drawn(self, scores: torch.Tensor) -> torch.Tensor:
        """Ids (S,) drawn from logits (S, V) after the options, or the most probable ones."""
        if not self.config.do_sample:
            return scores.argmax(dim=-1)
        filtered = filter_logits(scores, self.config.temperature, self.config.top_k, self.config.top_p)
        return sample_categorical(filtered, self.uniforms[_TOKEN])

    def tokens(self, scores: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        """The tokens (S,) at s."""
        alpha_t, alpha_s = (self.kernel.shares(x).alpha.clamp(min=self.noise_eps)[:, None] for x in (self.t, self.s))
        num_ids = scores.isfinite().sum(dim=-1, keepdim=True)
        if self.kernel.mask_token_id is not None:
            return self._unmasked(scores, num_ids, alpha_t, alpha_s)
        kappa = num_ids * alpha_t / (1 - alpha_t)
        log_s = scores.double() * (kappa / (1 + kappa) if self.is_scaled else 1.0)
        s = log_s.scatter(1, self.ids[:, None], 0.0).exp()
        ratio = alpha_t / alpha_s
        if self.is_exact:
            # (exp(-change Q) s)_y x q(z_t | y at s), with exp(-change Q) = (1 - 1 / ratio) / N + 1 / ratio at y.
            p = (s / ratio + (1 - 1 / ratio) / num_ids * s.sum(dim=-1, keepdim=True)).clamp(min=0)
            stays = torch.zeros_like(p).scatter(1, self.ids[:, None], 1.0)
            p = p * ((1 - ratio) / num_ids + ratio * stays)
        else:
            p = -ratio.log() / num_ids * s
            p = p.scatter(1, self.ids[:, None], 0.0)
            p = p.scatter(1, self.ids[:, None], (1 - p.sum(dim=-1, keepdim=True)).clamp(min=0))
        return self.drawn(p.masked_fill(scores == -torch.inf, 0.0).log().float())

    def _unmasked(self, scores, num_ids, alpha_t, alpha_s) -> torch.Tensor:
        """Ids, or masks where they stay; the last step leaves none."""
        log_odds = alpha_t.log() - torch.log1p(-alpha_t)
        mass = scores.double().logsumexp(dim=-1, keepdim=True)
        total = (mass + log_odds - num_ids.log() if self.is_scaled else mass).exp()
        change = alpha_s / alpha_t
        leaves = (change - 1 if self.is_exact else change.log()) * total
        is_unmasked = (self.uniforms[_STAY] < leaves[:, 0]) | (self.s == 0)
        return torch.where(is_unmasked, self.drawn(scores), self.ids)


@dataclass
class ScoreSampler(Sampler):
    """The reverse process in steps that use the scores.

    Attributes:
        num_steps: steps from noise to text, each of one forward pass; None means one for each position.
    """

    num_steps: PositiveInt | None = None

    block_length: ClassVar[int | None] = None
    writes_behind_the_end: ClassVar[bool] = True
    takes_all_steps: ClassVar[bool] = True
    is_exact: ClassVar[bool] = True

    def open(self, process: Any) -> None:
        """Nothing is prepared: the first step begins with noise."""

    def step(self, process: Any, predict: Any, number: int) -> bool:
        """A step of each row that is open; False if there is none, or none that has a mask."""
        if number == 0:
            process.start()
        cells, n = process.in_block(), process.num_steps().clamp(min=1)
        if process.kernel.mask_token_id is not None:
            cells = cells & (process.canvas.ids == process.kernel.mask_token_id)
        t, s = (n - process.step) / n.double(), (n - process.step - 1) / n.double()
        kind = partial(ScoreMove, is_exact=self.is_exact, **process.score_options)
        return process.move(predict, kind, cells, t, s)


@dataclass
class AnalyticSampler(ScoreSampler):
    """Steps that undo the noise of their length (arXiv 2310.16834, theorem 4.2)."""


@dataclass
class EulerSampler(ScoreSampler):
    """Steps of the reverse rates (arXiv 2310.16834, equation 16)."""

    is_exact: ClassVar[bool] = False


class SEDDGenerationConfig(NonAutoregressiveGenerationConfig):
    """Options of `SEDDForScoreEntropy.generate`.

    `max_new_tokens` is the size of the canvas. Temperature, top-k and top-p act on what a token is drawn from: with
    masks the scores, with uniform noise the law of the step.

    Attributes:
        sampler: "analytic" or "euler", see `AnalyticSampler` and `EulerSampler`; with masks also "confidence", which
            takes the scores of a mask as probabilities up to a factor and commits by an order of the positions, see
            `ConfidenceSampler`.
        guidance_scale: how strongly the prompt guides what is written (classifier-free guidance, arXiv 2207.12598): w
            makes the logits w x those given the prompt + (1 - w) x those without it, in two forward passes. None is
            w = 1, in one. The model must have been trained with `condition_dropout`.
    """

    samplers: ClassVar[dict[str, type[Sampler]]] = {
        "analytic": AnalyticSampler,
        "euler": EulerSampler,
        "confidence": ConfidenceSampler,
    }

    sampler: str = "analytic"
    guidance_scale: float | None = None


class SEDDGenerationMixin(MaskedGenerationMixin):
    """Adds `generate` to score entropy diffusion."""

    def open_generation(self: Any, call: GenerationCall, input_ids, attention_mask, **inputs) -> CanvasProcess:
        """A canvas of noise after each prompt; mask tokens in a prompt become noise that is filled in."""
        config, sampler = self.config, call.config.make_sampler()
        if config.kernel == "uniform" and isinstance(sampler, ConfidenceSampler):
            raise ValueError("The sampler 'confidence' writes into masks, and the model has uniform noise: unset it.")
        canvas = self.open_canvas(call, input_ids, attention_mask, **inputs)
        schedule = make_schedule(config.noise_schedule)
        if config.kernel == "absorb":
            kernel: Any = AbsorbingKernel(schedule=schedule, mask_token_id=config.mask_token_id)
        else:
            suppressed = torch.tensor(config.suppressed_ids, dtype=torch.int64, device=canvas.ids.device)
            every = torch.arange(config.vocab_size, device=canvas.ids.device)
            kernel = UniformKernel(schedule=schedule, writable_ids=every[~torch.isin(every, suppressed)])
        process: Any = KernelProcess(canvas, sampler, call, kernel)
        process.score_options = {"is_scaled": config.scaled_scores, "noise_eps": config.noise_eps}
        return process

    def time_inputs(self, alpha: torch.Tensor) -> dict[str, torch.Tensor]:
        """The share of the canvas that is without noise."""
        return {"alpha": alpha}
