"""The flexible masked diffusion language model (FlexMDM, arXiv 2509.01025): where tokens are missing, and which."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.utils.generic import can_return_tuple

from xlm_hf.modules.language_model import PreTrainedLanguageModel
from xlm_hf.modules.noise_schedules import make_schedule
from xlm_hf.modules.rotary_transformer import take_of_rows
from xlm_hf.modules.time_conditioning import AdaptiveLayerNorm
from xlm_hf.modules.vocabulary_head import HeadFunction, LanguageModelOutput

from .configuration_flexmdm import FlexMDMConfig
from .generation_flexmdm import FlexMDMGenerationConfig, FlexMDMGenerationMixin


@dataclass
class FlexMDMOutput(LanguageModelOutput):
    """What `FlexMDMForFlexibleMaskedDiffusion.forward` returns: `LanguageModelOutput` and what the gaps hold.

    Attributes:
        expected_counts: (B, L), or (G,) with `gap_index`, float32: how many tokens are missing in the gap of each
            token, on average.
        count_logits: (B, L, max_count + 1), or (G, max_count + 1): of the head "distribution", logits of that number.
    """

    expected_counts: torch.Tensor | None = None
    count_logits: torch.Tensor | None = None


def final_norm(config: FlexMDMConfig) -> AdaptiveLayerNorm | None:
    """The adaptive norm before a head; None where the layers have no such norms."""
    return AdaptiveLayerNorm(config) if config.conditioning == "adaln" else None


class FlexMDMGapHead(nn.Module):
    """What is missing in a gap, from the hidden state x of its token: W2 GELU(W1 norm(x) + b1) + b2.

    The head "distribution" is W norm(x) + b.
    """

    def __init__(self, config: FlexMDMConfig):
        super().__init__()
        self.norm = final_norm(config) or nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        is_distribution, max_count = config.gap_head == "distribution", config.max_count or 0
        self.up_proj = None if is_distribution else nn.Linear(config.hidden_size, config.hidden_size)
        self.act = nn.GELU()
        self.classifier = nn.Linear(config.hidden_size, max_count + 1 if is_distribution else 1)

    def forward(self, hidden_states: torch.Tensor, conditioning: torch.Tensor | None) -> torch.Tensor:
        """Map (..., hidden_size) to float32 (..., 1), or (..., max_count + 1) of the head "distribution"."""
        hidden_states = self.norm(hidden_states) if conditioning is None else self.norm(hidden_states, conditioning)
        if self.up_proj is not None:
            hidden_states = self.act(self.up_proj(hidden_states))
        output = self.classifier(hidden_states)
        return output.to(torch.promote_types(output.dtype, torch.float32))


class FlexMDMPreTrainedModel(PreTrainedLanguageModel):
    """Ties the family to its configuration."""

    config: FlexMDMConfig


class FlexMDMForFlexibleMaskedDiffusion(FlexMDMPreTrainedModel, FlexMDMGenerationMixin):
    """Flexible masked diffusion: p(token | sequence, t) at every mask, and how many tokens are missing in every gap."""

    generation_config_class = FlexMDMGenerationConfig

    def __init__(self, config: FlexMDMConfig):
        super().__init__(config)
        # The two heads have norms of their own in place of the backbone's last one.
        self.model.final_norm = None
        self.token_norm = final_norm(config)
        self.gap_head = FlexMDMGapHead(config)
        self.insertion_schedule = make_schedule(config.insertion_schedule)
        self.unmasking_schedule = make_schedule(config.unmasking_schedule)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        times: torch.Tensor | None = None,
        logits_index: torch.Tensor | None = None,
        gap_index: torch.Tensor | None = None,
        head_function: HeadFunction | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> FlexMDMOutput:
        """Score every token at every position, and count what is missing beside it.

        Args:
            input_ids: (B, L) token ids, `mask_token_id` where a token is to be written.
            attention_mask: (B, L), 1 for tokens and 0 for padding on either side.
            position_ids: (B, L) rotary positions; by default each row counts its own tokens.
            times: (B,), or (B, L) for packed rows: the time t, from 1, where nothing is there, to 0, the text.
            logits_index: (M,) indices into the flattened (B x L) tokens whose logits are wanted; None means all.
            gap_index: (G,) likewise the tokens whose gaps are counted; None means all.
            head_function: what is made of the selected hidden states instead of logits (see `head_fields`).
            inputs_embeds: (B, L, hidden_size) vectors in place of the embeddings of `input_ids`.
            **kwargs: `segment_ids` of packed rows, what else the backbone takes, `output_hidden_states`,
                `output_attentions`.

        Returns:
            `FlexMDMOutput`; the logits of the ids that are never written are -inf.

        Raises:
            ValueError: if only one of the two indices is given, or no times.
        """
        if times is None:
            raise ValueError("The model is conditioned on the time: pass times, one number for each row or token.")
        if (logits_index is None) != (gap_index is None):
            raise ValueError("Pass logits_index and gap_index together, or neither.")
        tokens: Any = input_ids if inputs_embeds is None else inputs_embeds
        L = tokens.shape[1]
        index = None if logits_index is None or gap_index is None else torch.cat((logits_index, gap_index))
        outputs = self.model(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            output_index=index,
            timesteps=1 - times,
            **kwargs,
        )
        of_tokens, counts = self._heads(outputs.last_hidden_state, times, L, logits_index, gap_index)
        of_gaps = take_of_rows(_of_tokens(times)[..., None], L, gap_index)
        return FlexMDMOutput(
            **self.apply_head(of_tokens, head_function),
            expected_counts=self._expected_counts(counts, of_gaps),
            count_logits=counts if self.config.gap_head == "distribution" else None,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _heads(self, hidden_states: torch.Tensor, times: torch.Tensor, L: int, logits_index, gap_index):
        """The hidden states that the vocabulary head reads, and what the head of the gaps says."""
        of_tokens = of_gaps = hidden_states
        if logits_index is not None:
            of_tokens, of_gaps = hidden_states.split((len(logits_index), len(gap_index)))
        conditioning = None
        if self.token_norm is not None:
            conditioning = self.model.time_embedding(1 - _of_tokens(times))
            of_tokens = self.token_norm(of_tokens, take_of_rows(conditioning, L, logits_index))
            conditioning = take_of_rows(conditioning, L, gap_index)
        return of_tokens, self.gap_head(of_gaps, conditioning)

    def _expected_counts(self, output: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        """The mean number of missing tokens (...) from what the head says, (..., 1 or C + 1), and times (..., 1)."""
        if self.config.gap_head == "distribution":
            return output.softmax(dim=-1) @ torch.arange(output.shape[-1], device=output.device, dtype=output.dtype)
        positive = nn.functional.softplus(output)
        if self.config.gap_head == "count":
            return (positive * (self.config.max_count or 0)).squeeze(-1)
        # Tokens come at a rate that stays finite, so that what a text lacks vanishes with the time that is left.
        return (positive * self.insertion_schedule.mask_probability(times.to(positive.dtype))).squeeze(-1)


def _of_tokens(times: torch.Tensor) -> torch.Tensor:
    """Times (B, 1) or (B, L) of those of rows (B,) or tokens (B, L)."""
    return times if times.dim() == 2 else times[:, None]
