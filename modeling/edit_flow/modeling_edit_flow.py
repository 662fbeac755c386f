"""The edit flow language model (arXiv 2506.09018): at which rates tokens are inserted, deleted and substituted."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.utils.generic import can_return_tuple

from xlm_hf.modules.language_model import PreTrainedLanguageModel
from xlm_hf.modules.noise_schedules import make_schedule
from xlm_hf.modules.vocabulary_head import LanguageModelOutput

from .configuration_edit_flow import EditFlowConfig
from .generation_edit_flow import EditFlowGenerationConfig, EditFlowGenerationMixin, EditRates

# Least slack of a rate, which bounds the rate of an edit at the end of the time.
_LEAST_SLACK = 1e-6
# What is told of the time is its logarithm, down to this share.
_LEAST_TIME = 1e-3


@dataclass
class EditFlowOutput(LanguageModelOutput):
    """What `EditFlowForEditLM.forward` returns: `LanguageModelOutput` and the rates of edits.

    Entry (i, v) of `logits` (B, L, V) scores the insertion of token v right of token i.

    Attributes:
        rates: `EditRates` of all tokens (B, L, K), or (S, K) with `slot_index`.
        substitution_logits: (B, L, V), or (S, V), score token v in place of token i, its own included; None without
            substitutions, and with a head function.
    """

    rates: EditRates | None = None
    substitution_logits: torch.Tensor | None = None


class EditRateHead(nn.Module):
    """From the hidden state x of a token to the rates of its edits: W2 GELU(W1 x + b1) + b2, two numbers for each kind.

    The first, a, gives the count softplus(a); the second, b, the slack sigmoid(b), at least 10^-6 (see `EditRates`).
    """

    def __init__(self, config: EditFlowConfig):
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.act = nn.GELU()
        self.down_proj = nn.Linear(config.hidden_size, 2 * config.num_edit_kinds)

    def forward(self, hidden_states: torch.Tensor) -> EditRates:
        """Map (..., hidden_size) to float32 rates (..., K)."""
        output = self.down_proj(self.act(self.up_proj(hidden_states)))
        counts, slack = output.to(torch.promote_types(output.dtype, torch.float32)).chunk(2, dim=-1)
        return EditRates(nn.functional.softplus(counts), slack.sigmoid() + _LEAST_SLACK)


class EditFlowForEditLM(PreTrainedLanguageModel, EditFlowGenerationMixin):
    """Edit flow: the rate of every insertion, deletion and substitution, given a sequence and the time that is left."""

    config: EditFlowConfig
    generation_config_class = EditFlowGenerationConfig

    def __init__(self, config: EditFlowConfig):
        super().__init__(config)
        self.rate_head = EditRateHead(config)
        # What stands in for a token is scored by the same vocabulary head, from another view of its hidden state.
        self.substitution_proj = None
        if config.num_edit_kinds > 1:
            self.substitution_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.noise_schedule = make_schedule(config.noise_schedule)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        time_left: torch.Tensor | None = None,
        slot_index: torch.Tensor | None = None,
        insertion_slots: torch.Tensor | None = None,
        substitution_slots: torch.Tensor | None = None,
        head_function: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> EditFlowOutput:
        """Rate every edit.

        Args:
            input_ids: (B, L) token ids.
            attention_mask: (B, L), 1 for tokens and 0 for padding on either side.
            time_left: (B,), or (B, L) for packed rows: from 1, where no edit is made, to 0, the text.
            slot_index: (S,) indices into the flattened (B x L) tokens whose edits are wanted; None means all.
            insertion_slots: (I,) for which of them the head function gets hidden states of insertions; None means all.
            substitution_slots: (U,) likewise of substitutions, which come behind those of insertions.
            head_function: with `slot_index`, what is made of the hidden states instead of logits (see `head_fields`).
                It is called with `rates` by name too, since which tokens are wanted depends on them.
            inputs_embeds: (B, L, hidden_size) vectors in place of the embeddings of `input_ids`.
            **kwargs: `position_ids`, `segment_ids` of packed rows and what else the backbone takes,
                `output_hidden_states`, `output_attentions`.

        Returns:
            `EditFlowOutput`; the logits of `config.suppressed_ids` are -inf.

        Raises:
            ValueError: without a time.
        """
        if time_left is None:
            raise ValueError("The model is conditioned on the time: pass time_left, one number for each row or token.")
        outputs = self.model(
            input_ids,
            attention_mask=attention_mask,
            output_index=slot_index,
            timesteps=-(time_left + _LEAST_TIME).log(),
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        states = outputs.last_hidden_state
        rates = self.rate_head(states)
        if head_function is None:
            fields = self.apply_head(states, None)
            if self.substitution_proj is not None:
                fields["substitution_logits"] = self.apply_head(self.substitution_proj(states), None)["logits"]
        else:
            wanted = [states if insertion_slots is None else states[insertion_slots]]
            if self.substitution_proj is not None:
                changed = states if substitution_slots is None else states[substitution_slots]
                wanted.append(self.substitution_proj(changed))
            fields = self.apply_head(torch.cat(wanted), partial(head_function, rates=rates))
        return EditFlowOutput(**fields, rates=rates, hidden_states=outputs.hidden_states, attentions=outputs.attentions)
