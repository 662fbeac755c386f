"""Generation by score entropy diffusion: steps of the reverse process by ratios of probabilities."""

import math
from dataclasses import dataclass, replace
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
from xlm_hf.modules.unmasking import draw_tokens
from xlm_hf.modules.vocabulary_head import LogitsOnDemand

_STAY, _TOKEN = 2, 3  # which of the numbers of a move decide whether a mask stays, and by which token it goes


@dataclass(frozen=True, kw_only=True, eq=False)
class AbsorbingKernel(Kernel):
    """Tokens become masks: m_t = 1 - alpha_t."""

    schedule: NoiseSchedule

    def shares(self, t: torch.Tensor) -> Shares:
        """alpha_t, 1 - alpha_t and 0."""
        return Shares(self.schedule.alpha(t), self.schedule.mask_probability(t), torch.zeros_like(t))


@dataclass(frozen=True, kw_only=True)
class ScoreMove(Move):
    """What a step makes of positions by their scores; `own` is not used.

    Attributes:
        num_ids: N, the ids that the model's config does not suppress.
        is_exact: whether the step is the analytic one, else Euler's.
        is_scaled: see `SEDDConfig.scaled_scores`.
        noise_eps: no alpha is taken to be less.
        log_mass: (S,) log sum exp of the logits as the network gives them; None where the call changes none of them.
    """

    num_ids: int
    is_exact: bool = True
    is_scaled: bool = True
    noise_eps: float = 1e-3
    log_mass: torch.Tensor | None = None

    per_position: ClassVar[tuple[str, ...]] = (*Move.per_position, "log_mass")

    def __call__(self, logits: LogitsOnDemand) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Move`."""
        if logits.unprocessed is None or self.log_mass is not None:
            return super().__call__(logits)
        return replace(self, log_mass=logits.unprocessed.statistic("log_mass"))(logits)

    def predictions(self, scores: torch.Tensor) -> torch.Tensor:
        """The logits (S, V) as they are."""
        return scores

    def tokens(self, scores: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        """The tokens (S,) at s."""
        if self.kernel.mask_token_id is not None:
            return self._unmasked(scores)
        return sample_categorical(self.law(scores).log(), self.uniforms[_TOKEN])

    def law(self, scores: torch.Tensor) -> torch.Tensor:
        """Probabilities (S, V), up to a factor, of the tokens at s where the noise is uniform, by logits (S, V)."""
        alpha_t, alpha_s = self._alphas()
        s, ratio = self._ratios(scores, alpha_t), alpha_t / alpha_s
        if self.is_exact:
            # (exp(-change Q) s)_y x q(z_t | y at s), with exp(-change Q) = (1 - 1 / ratio) / N + 1 / ratio at y.
            p = (s / ratio + (1 - 1 / ratio) / self.num_ids * s.sum(dim=-1, keepdim=True)).clamp(min=0)
            stays = torch.zeros_like(p).scatter(1, self.ids[:, None], 1.0)
            p = p * ((1 - ratio) / self.num_ids + ratio * stays)
        else:
            p = -ratio.log() / self.num_ids * s
            p = p.scatter(1, self.ids[:, None], 0.0)
            p = p.scatter(1, self.ids[:, None], (1 - p.sum(dim=-1, keepdim=True)).clamp(min=0))
        # Noise may be an id that `suppress_tokens` leaves out, what is written may not.
        return p.masked_fill((scores == -torch.inf) & (self.s == 0)[:, None], 0.0)

    def _alphas(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The shares alpha (S, 1) at t and at s."""
        alpha_t, alpha_s = (self.kernel.shares(x).alpha.clamp(min=self.noise_eps)[:, None] for x in (self.t, self.s))
        return alpha_t, alpha_s

    def _ratios(self, scores: torch.Tensor, alpha_t: torch.Tensor) -> torch.Tensor:
        """The scores s (S, V), 1 at the present ids: the network's, or those of its prediction after the options.

        With q_y proportional to s_y = alpha p_y + (1 - alpha) / N, the prediction p_y of the clean token by the others
        is proportional to s_y - (1 - alpha) x mean of s, which free scores may have below 0. The options make p' of it,
        and p' makes the scores (alpha p'_y + (1 - alpha) / N) / (alpha p'_z + (1 - alpha) / N).
        """
        config, ids, num_ids = self.config, self.ids[:, None], self.num_ids
        kappa = num_ids * alpha_t / (1 - alpha_t)
        log_s = scores.double() * (kappa / (1 + kappa) if self.is_scaled else 1.0)
        s = log_s.scatter(1, ids, 0.0).exp()
        draws_all = config.do_sample and config.temperature == 1 and not config.top_k and config.top_p in (None, 1)
        if draws_all and self.log_mass is None:
            return s
        # What the call leaves out has p_y = 0, so that s_y = (1 - alpha) x mean of s.
        is_left = scores > -torch.inf
        num_out = num_ids - is_left.scatter(1, ids, True).sum(dim=-1, keepdim=True)
        mean = s.sum(dim=-1, keepdim=True) / (num_ids - num_out * (1 - alpha_t))
        p = (s - (1 - alpha_t) * mean).clamp(min=0) * is_left
        p = torch.where(p.sum(dim=-1, keepdim=True) > 0, p, s * is_left)
        q = alpha_t * _filtered(p, config)
        q[:, self.kernel.writable_ids] += (1 - alpha_t) / num_ids
        noised = q / q.gather(1, ids)
        # A processor may leave a row as it is.
        return torch.where(is_left.sum(dim=-1, keepdim=True) < num_ids, noised, s) if draws_all else noised

    def _unmasked(self, scores: torch.Tensor) -> torch.Tensor:
        """Ids (S,), or masks where they stay; the last step leaves none."""
        alpha_t, alpha_s = self._alphas()
        log_odds = alpha_t.log() - torch.log1p(-alpha_t)
        # Ids that the call leaves out do not slow the steps down: the others get their mass.
        mass = (scores.double().logsumexp(dim=-1) if self.log_mass is None else self.log_mass.double())[:, None]
        total = (mass + log_odds - math.log(self.num_ids) if self.is_scaled else mass).exp()
        change = alpha_s / alpha_t
        leaves = (change - 1 if self.is_exact else change.log()) * total
        is_unmasked = (self.uniforms[_STAY] < leaves[:, 0]) | (self.s == 0)
        return torch.where(is_unmasked, draw_tokens(scores, self.uniforms[_TOKEN], self.config), self.ids)


def _filtered(p: torch.Tensor, config: Any) -> torch.Tensor:
    """Probabilities (S, V) that are proportional to p after temperature, top-k and top-p, or all on the largest."""
    if not config.do_sample:
        return torch.zeros_like(p).scatter_(1, p.argmax(dim=-1, keepdim=True), 1.0)
    return filter_logits(p.log(), config.temperature, config.top_k, config.top_p).double().softmax(dim=-1)


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

    `max_new_tokens` is the size of the canvas. Temperature, top-k and top-p act on the prediction of the clean token by
    the others: with masks the scores, with uniform noise what the scores say of it. Without `do_sample` it is all on
    its most probable token; then only the noise is random.

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
        process.score_options = {
            "num_ids": config.vocab_size - len(config.suppressed_ids),
            "is_scaled": config.scaled_scores,
            "noise_eps": config.noise_eps,
        }
        return process

    def time_inputs(self, alpha: torch.Tensor) -> dict[str, torch.Tensor]:
        """The share of the canvas that is without noise."""
        return {"alpha": alpha}
