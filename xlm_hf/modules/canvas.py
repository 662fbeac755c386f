"""What the generation of masked language models shares: a canvas of masks after each prompt, and how it is filled.

A canvas has a length of its own for each row. What counts as written ends with the first end-of-sequence token: a
position behind it is never written, and the row is finished when nothing before it is masked.
"""

from collections.abc import Callable
from typing import Any

import torch

from .devices import is_synchronous
from .generation import (
    NonAutoregressiveGenerationConfig,
    NonAutoregressiveGenerationMixin,
    NonAutoregressiveGenerationOutput,
    left_align_padding,
    rounded_up,
    true_indices,
)
from .token_sampling import filter_logits, sample_categorical
from .unmasking import (
    ORDERS,
    commit_bounded,
    commit_confident,
    commit_ranks,
    commit_top_k,
    num_to_commit,
    order_scores,
    statistics_in_place,
)
from .vocabulary_head import LogitsOnDemand


class UnmaskingGenerationConfig(NonAutoregressiveGenerationConfig):
    """Options of unmasking by a rule, beside those of the base class: in which order, and how much in a step.

    By default a step commits one token. At most one of the last four options can be set.

    Attributes:
        order: which masked positions come first: "confidence", the largest p1; "margin", the largest p1 - p2;
            "entropy", the smallest entropy; "random", any. All are statistics of the model's own distribution,
            before temperature, top-k and top-p.
        num_steps: forward passes in which a canvas is filled, the positions spread evenly over them.
        confidence_threshold: a step commits all tokens with p1 above this (arXiv 2505.22618).
        entropy_bound: a step commits the longest prefix of the order whose entropies (nats), the largest left out, sum
            to at most this (arXiv 2505.24857).
        error_bound: the same with 1 - p1 in place of the entropies.
    """

    order: str = "confidence"
    num_steps: int | None = None
    confidence_threshold: float | None = None
    entropy_bound: float | None = None
    error_bound: float | None = None

    def validate(self, strict: bool = False, user_set_attributes: set[str] | None = None) -> None:
        """Check every option; raises ValueError naming the option, its value and its range."""
        super().validate()
        self._check_choice("order", ORDERS)
        self._check_positive("num_steps")
        self._check_probability("confidence_threshold")
        names = ("num_steps", "confidence_threshold", "entropy_bound", "error_bound")
        for name in ("entropy_bound", "error_bound"):
            if getattr(self, name) is not None and getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0 and is {getattr(self, name)}.")
        given = [name for name in names if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} each say how much a step commits: set one of them to None.")


class MaskedCanvas:
    """The rows being written: prompts, padded on the left, and a canvas of mask tokens after each, padded on the right.

    A mask token inside a prompt is filled like the canvas is.

    Args:
        prompt: (B, P) ids, padded on the left.
        prompt_mask: (B, P) bool, True for tokens.
        lengths: (B,) mask tokens to append to each prompt.
        mask_token_id: stands for what is not written yet.
        pad_token_id: fills ragged rows.
        eos_token_id: ends what is written in a canvas; None if nothing does.

    Attributes:
        ids: (B, L) int64, the rows as the model sees them.
        attention_mask: (B, L) bool, True for everything but the padding of ragged rows.
        masked: (B, L) bool, what is still to be written; a position behind an end-of-sequence token no longer is.
        positions: (B, L) int64, the place of each token in its own row.
        nfe: (B,) int64, forward passes that each row took part in.
        is_padded: whether the attention mask says anything.
    """

    def __init__(
        self,
        prompt: torch.Tensor,
        prompt_mask: torch.Tensor,
        lengths: torch.Tensor,
        mask_token_id: int,
        pad_token_id: int,
        eos_token_id: int | None,
    ):
        self.prompt_width, self.pad_token_id, self.eos_token_id = prompt.shape[1], pad_token_id, eos_token_id
        appended = torch.arange(int(lengths.max()), device=prompt.device) < lengths[:, None]
        canvas = torch.full(appended.shape, pad_token_id, device=prompt.device).masked_fill(appended, mask_token_id)
        self.ids = torch.cat((prompt, canvas), dim=1)
        self.attention_mask = torch.cat((prompt_mask, appended), dim=1)
        self.masked = (self.ids == mask_token_id) & self.attention_mask
        self.positions = (self.attention_mask.long().cumsum(dim=-1) - 1).clamp(min=0)
        self.nfe = torch.zeros_like(lengths)
        self.is_padded = not bool(self.attention_mask.all())
        self._steps = torch.full_like(self.ids, -1)

    def commit(self, rows: torch.Tensor, chosen: torch.Tensor, tokens: torch.Tensor, step: int | torch.Tensor) -> None:
        """Write `tokens`, in reading order, where `chosen` (R, L) in the rows of indices `rows` (R,).

        There may be more tokens than places. `step` is what the history says of them: a number, or (R, 1).
        """
        self.ids[rows] = self.ids[rows].masked_scatter(chosen, tokens)
        self._steps[rows] = torch.where(chosen, step, self._steps[rows])
        self.masked[rows] &= ~chosen
        if self.eos_token_id is not None:
            self.masked &= ~self._behind_eos()

    def written(self) -> torch.Tensor:
        """What stands after the prompts, mask tokens included; the whole rows where nothing was appended to any."""
        return self.ids[:, self.prompt_width :] if self.ids.shape[1] > self.prompt_width else self.ids

    def output(self, return_history: bool) -> NonAutoregressiveGenerationOutput:
        """Gather the result of `generate`: rows end with their end-of-sequence token, the rest is padding."""
        behind_eos = self._behind_eos()
        kept = self.attention_mask & ~behind_eos
        # Columns of padding alone are left out at the end.
        width = max(
            self.prompt_width, int((kept.any(dim=0) * torch.arange(1, kept.shape[1] + 1).to(kept.device)).max())
        )
        history = self._steps.masked_fill(~kept, -1)[:, :width]
        stopped = self._is_eos().any(dim=-1)
        return NonAutoregressiveGenerationOutput(
            sequences=self.ids.masked_fill(behind_eos, self.pad_token_id)[:, :width],
            tokens_per_forward=(history >= 0).sum(dim=-1) / self.nfe.clamp(min=1),
            nfe=self.nfe,
            finish_reason=["stop" if row else "length" for row in stopped.tolist()],
            history=history if return_history else None,
        )

    def _is_eos(self) -> torch.Tensor:
        if self.eos_token_id is None:
            return torch.zeros_like(self.masked)
        in_canvas = torch.arange(self.ids.shape[1], device=self.ids.device) >= self.prompt_width
        return (self.ids == self.eos_token_id) & in_canvas & self.attention_mask

    def _behind_eos(self) -> torch.Tensor:
        is_eos = self._is_eos().long()
        return is_eos.cumsum(dim=-1) - is_eos > 0


class MaskedGenerationMixin(NonAutoregressiveGenerationMixin):
    """The steps of `generate` that masked language models have in common.

    The model's `config` names `mask_token_id`, `bos_token_id`, `pad_token_id` and `eos_token_id`; its forward takes
    `logits_index`, flat indices into (B x L), and `head_function`.
    """

    def open_canvas(
        self,
        generation_config: NonAutoregressiveGenerationConfig,
        input_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        canvas_lengths: torch.Tensor | None = None,
    ) -> MaskedCanvas:
        """Check prompts and put a canvas after each.

        A prompt without mask tokens gets a canvas of as many tokens as the options leave it room for; `bos_token_id`
        is put between the two if the prompt does not end with it. A prompt with mask tokens is a canvas itself, and
        nothing is appended.

        Args:
            generation_config: the options.
            input_ids: (B, P) prompts, padded on either side; None is one empty prompt.
            attention_mask: (B, P), 1 for tokens; by default everything but `pad_token_id`.
            canvas_lengths: (B,) length of each row's canvas, within that room; 0 appends nothing, so that only the
                mask tokens of the prompt are filled.

        Raises:
            ValueError: for an id outside the vocabulary, or a prompt without room after it.
        """
        config = self.config
        if input_ids is None:
            input_ids = torch.tensor([[config.bos_token_id]], device=self.device)
            # Some vocabularies have one id for everything special.
            attention_mask = torch.ones_like(input_ids)
        self.check_token_ids(input_ids)
        mask = input_ids != config.pad_token_id if attention_mask is None else attention_mask.bool()
        input_ids, mask = left_align_padding(input_ids, mask)
        if canvas_lengths is None:
            extended = ~((input_ids == config.mask_token_id) & mask).any(dim=-1)
        else:
            extended = canvas_lengths > 0
        lacks_bos = extended & ~((input_ids[:, -1] == config.bos_token_id) & mask[:, -1])
        if lacks_bos.any():
            input_ids = torch.cat((input_ids, torch.full_like(input_ids[:, :1], config.bos_token_id)), dim=1)
            input_ids, mask = left_align_padding(input_ids, torch.cat((mask, lacks_bos[:, None]), dim=1))
            input_ids = input_ids.masked_fill(~mask, config.pad_token_id)
        lengths = self._room_after(generation_config, mask.sum(dim=-1), extended)
        if canvas_lengths is not None:
            lengths = torch.minimum(lengths, canvas_lengths)
        return MaskedCanvas(input_ids, mask, lengths, config.mask_token_id, config.pad_token_id, config.eos_token_id)

    def _room_after(self, generation_config, prompt_lengths: torch.Tensor, extended: torch.Tensor) -> torch.Tensor:
        longest, positions = int(prompt_lengths.max()), self.config.max_position_embeddings
        if longest > positions:
            raise ValueError(
                f"The input has {longest} tokens and the model has {positions} positions: shorten it or train with a "
                "larger max_position_embeddings."
            )
        room = torch.zeros_like(prompt_lengths)
        if extended.any():
            room[extended] = self.room_for_new_tokens(generation_config, prompt_lengths[extended])
        return room

    def apply_to_logits(
        self: Any,
        function: Callable[[LogitsOnDemand], Any],
        canvas: MaskedCanvas,
        rows: torch.Tensor,
        wanted: torch.Tensor,
        num_wanted: int,
        generation_config: NonAutoregressiveGenerationConfig,
        logits_processor: Any,
        step: int,
        **model_inputs,
    ) -> Any:
        """One forward pass over `rows` (R,), and what `function` makes in it of the logits at the `wanted` (R, L).

        They come in reading order, `num_wanted` of them, after `generation_config.suppress_tokens` and
        `logits_processor` (see `LogitsOnDemand.processed`).
        """
        ids, index = canvas.ids[rows], true_indices(wanted, num_wanted)

        def head_function(hidden_states, head, suppressed_ids):
            logits = LogitsOnDemand(hidden_states, head, suppressed_ids)
            return function(logits.processed(generation_config.suppress_tokens, logits_processor, ids, index, step))

        mask = canvas.attention_mask[rows] if canvas.is_padded else None
        inputs = {"attention_mask": mask, "logits_index": index, **model_inputs}
        return self(ids, head_function=head_function, **inputs).head_output


def unmask(
    logits: LogitsOnDemand,
    masked: torch.Tensor,
    num_masked: int,
    positions: torch.Tensor,
    order_seeds: torch.Tensor,
    config: UnmaskingGenerationConfig,
    uniforms: torch.Tensor,
    steps_left: int | torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose positions by the rule of `config`, at least one in each row that has any, and draw their tokens.

    Args:
        logits: of the `masked` positions in reading order, before temperature, top-k and top-p.
        masked: (R, L) bool.
        num_masked: how many they are, or a bound of it.
        positions: (R, L) place of each token in its own row.
        order_seeds: (R,) for a random order. It is drawn anew in each step: how far a bound lets one go tells something
            about the rest of it.
        config: the options.
        uniforms: (R, L) in [0, 1), to draw a token by at each position.
        steps_left: with `num_steps`, how many are left, this one included, of all rows or (R,) of each.

    Returns:
        the chosen positions (R, L) bool, and their tokens in reading order, behind which may stand others.
    """
    statistic = statistics_in_place(logits, masked)
    ranks = commit_ranks(order_scores(config.order, statistic, order_seeds, positions), masked)
    most, rows = num_masked, len(masked)
    if config.confidence_threshold is not None:
        chosen = commit_confident(ranks, masked, statistic("confidence"), config.confidence_threshold)
    elif config.entropy_bound is not None:
        chosen = commit_bounded(ranks, masked, statistic("entropy"), config.entropy_bound)
    elif config.error_bound is not None:
        chosen = commit_bounded(ranks, masked, 1 - statistic("confidence"), config.error_bound)
    elif steps_left is None:
        chosen, most = masked & (ranks == 0), min(num_masked, rows)
    else:
        chosen = commit_top_k(ranks, masked, num_to_commit(masked.sum(dim=-1), steps_left))
        if isinstance(steps_left, int):
            # sum_i ceil(m_i / r) is at most this.
            most = min(num_masked, num_masked // steps_left + rows)
    # An accelerator is not asked how many there are.
    if is_synchronous(chosen.device):
        most = int(chosen.sum())
    places = true_indices(chosen, rounded_up(most, chosen.numel(), chosen.device))
    numbers = (masked.flatten().cumsum(dim=0) - 1).clamp(min=0)
    return chosen, draw_tokens(logits[numbers[places]], uniforms.flatten()[places], config)


def draw_tokens(
    logits: torch.Tensor, uniforms: torch.Tensor, config: NonAutoregressiveGenerationConfig
) -> torch.Tensor:
    """Tokens (S,) for (S, V) logits: drawn by (S,) uniforms after temperature, top-k and top-p, or argmax."""
    if not config.do_sample:
        return logits.argmax(dim=-1)
    return sample_categorical(filter_logits(logits, config.temperature, config.top_k, config.top_p), uniforms)
