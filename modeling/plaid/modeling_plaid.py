"""The Gaussian diffusion language model (Plaid, arXiv 2305.18619): tokens of a canvas by their noisy vectors."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.functional import embedding, normalize
from transformers import initialization as init
from transformers.utils.generic import can_return_tuple

from xlm_hf.modules.devices import is_synchronous
from xlm_hf.modules.language_model import PreTrainedLanguageModel
from xlm_hf.modules.rotary_transformer import take, take_of_rows
from xlm_hf.modules.vocabulary_head import HeadFunction, LanguageModelOutput, LogitsOnDemand, head_fields

from .configuration_plaid import PlaidConfig
from .generation_plaid import PlaidGenerationConfig, PlaidGenerationMixin
from .noise_plaid import Level, NoiseSchedule, signal_and_scale

# Rows of logits that are expected over at once.
_BLOCK_ROWS = 512


@dataclass
class NoisyHead:
    """The vocabulary head at some noise. Its states (S, H + D) are what the backbone says and what a noisy vector does.

    The logits are lm_head(h) + q E^T, q = a / s^2 z (the output prior). For E with rows of length 1 the second part is
    the logarithm of q(z | x) up to a constant: by Bayes' rule the first is a prediction by the other positions.

    Attributes:
        lm_head: of the H first columns of the states; the D last are q.
        table: (V, D) E.
        gamma, slope: (S,) of `Level`.
        level: of the times of the call.
    """

    lm_head: nn.Module
    table: torch.Tensor
    gamma: torch.Tensor
    slope: torch.Tensor
    level: Level

    def parts(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The hidden states (S, H), in the type of the head, and q (S, D)."""
        hidden, query = states.split((states.shape[-1] - self.table.shape[-1], self.table.shape[-1]), dim=-1)
        return hidden.to(self.lm_head.weight.dtype), query

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        """The logits (S, V), at least float32."""
        hidden, query = self.parts(states)
        with torch.autocast(states.device.type, enabled=False):
            prior = query @ self.table.T
        return self.lm_head(hidden).to(prior.dtype) + prior


def expected_vectors(states: torch.Tensor, head: Any, suppressed_ids: Sequence[int] | None) -> torch.Tensor:
    """softmax(logits) E (S, D), without a tensor of all probabilities: the head function of self-conditioning."""
    logits = LogitsOnDemand(states, head, suppressed_ids)
    starts = range(0, max(1, len(states)), _BLOCK_ROWS)
    return torch.cat([logits[i : i + _BLOCK_ROWS].softmax(dim=-1).to(head.table.dtype) @ head.table for i in starts])


class PlaidPreTrainedModel(PreTrainedLanguageModel):
    """Ties the family to its configuration."""

    config: PlaidConfig

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, NoiseSchedule) and module.is_learnt:
            init.copy_(module.ends, torch.tensor(module.first_ends))
            for weights in (module.steepness, module.heights, module.offsets):
                init.normal_(weights)
        elif isinstance(module, nn.Embedding) and module.embedding_dim == self.config.embedding_size:
            # Of length 1 or so: only their directions count, and how fast they turn depends on their lengths.
            init.normal_(module.weight, std=self.config.embedding_size**-0.5)


class PlaidForGaussianDiffusion(PlaidPreTrainedModel, PlaidGenerationMixin):
    """Gaussian diffusion: p(x_l | noisy vectors, gamma) for every position l, a bidirectional backbone and a head."""

    generation_config_class = PlaidGenerationConfig

    def __init__(self, config: PlaidConfig):
        super().__init__(config)
        self.vectors = nn.Embedding(config.vocab_size, config.embedding_size)
        self.vector_proj = nn.Linear(config.embedding_size, config.hidden_size, bias=False)
        self.expected_proj = None
        if config.self_conditioning:
            self.expected_proj = nn.Linear(config.embedding_size, config.hidden_size, bias=False)
        self.schedule = NoiseSchedule(config)
        self.post_init()

    def table(self) -> torch.Tensor:
        """The vectors of all tokens (V, D), each of length 1, at least float32."""
        weight = self.vectors.weight
        return normalize(weight.to(torch.promote_types(weight.dtype, torch.float32)), dim=-1)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """As in transformers; the tokens that come have fresh vectors."""
        embeddings, old = super().resize_token_embeddings(*args, **kwargs), self.vectors
        self.vectors = nn.Embedding(embeddings.num_embeddings, old.embedding_dim).to(old.weight)
        self._init_weights(self.vectors)
        num = min(old.num_embeddings, self.vectors.num_embeddings)
        self.vectors.weight.data[:num] = old.weight.data[:num]
        return embeddings

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        times: torch.Tensor | None = None,
        time_index: torch.Tensor | None = None,
        is_canvas: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
        latents: torch.Tensor | None = None,
        expected: torch.Tensor | None = None,
        self_conditioned: torch.Tensor | None = None,
        logits_index: torch.Tensor | None = None,
        head_function: HeadFunction | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> LanguageModelOutput:
        """Score every token at every position.

        Args:
            input_ids: (B, L) token ids; on the canvas the clean ones, or any with `latents`.
            attention_mask: (B, L), 1 for tokens, those of the canvas included, and 0 for padding on either side.
            position_ids: (B, L) rotary positions; by default each row counts its own tokens.
            times: (D,) in [0, 1], 1 being pure noise.
            time_index: (B,) which of the times each row has, or (B, L) each token; None is row by row.
            is_canvas: (B, L) bool, the tokens of which the network sees noisy vectors alone; None is all or, without
                noise and latents, none.
            noise: (B, L, embedding_size) normal, which makes the noisy vectors of `input_ids`.
            latents: (B, L, embedding_size) noisy vectors instead.
            expected: (B, L, embedding_size) what was expected of the canvas before; None is nothing.
            self_conditioned: (B,) or (B, L), where a first pass without gradients says what is expected.
            logits_index: (S,) indices into the flattened (B x L) tokens whose logits are wanted; None means all.
            head_function: what is made of states (S, hidden_size + embedding_size) and a `NoisyHead`.
            inputs_embeds: (B, L, hidden_size) vectors in place of the embeddings of `input_ids`.
            **kwargs: `segment_ids` of packed rows, and what else the backbone takes.

        Returns:
            `LanguageModelOutput` with `logits` (B, L, V), or (S, V) with `logits_index`. Those of the ids that are
            never written are -inf. Those of tokens that are not on the canvas mean nothing.
        """
        if times is None:
            raise ValueError("The model is told the noise: pass times, one for each row.")
        if input_ids is None:
            raise ValueError("The model sees vectors of the ids too: pass input_ids beside inputs_embeds.")
        if is_canvas is None:
            is_noisy = noise is not None or latents is not None
            is_canvas = torch.full_like(input_ids, is_noisy, dtype=torch.bool)
        of_rows = {"attention_mask": attention_mask, "position_ids": position_ids, "inputs_embeds": inputs_embeds}
        of_rows |= {"input_ids": input_ids, "is_canvas": is_canvas, "noise": noise, "latents": latents}
        every = torch.arange(len(input_ids), device=input_ids.device)
        of_rows |= {"time_index": every if time_index is None else time_index, **kwargs}
        if self_conditioned is not None and self.expected_proj is not None:
            expected = self._expected_before(self_conditioned, logits_index, times, of_rows)
        return self._score(times, logits_index, head_function, expected=expected, **of_rows)

    @torch.no_grad()
    def _expected_before(self, chosen, logits_index, times, of_rows) -> torch.Tensor:
        """What is expected of the vectors (B, L, size) where documents are `chosen` (B,) or (B, L), 0 elsewhere.

        Rows without any are left out, unless the host would have to ask the device which ones they are.
        """
        B, L = of_rows["is_canvas"].shape
        chosen = chosen if chosen.dim() == 2 else chosen[:, None]
        rows, index = chosen.any(dim=1), torch.arange(B * L, device=chosen.device)
        index = index if logits_index is None else logits_index
        among = index
        if is_synchronous(rows.device) and not torch.compiler.is_compiling():
            index = index[rows[index // L]]
            among = (rows.cumsum(0) - 1)[index // L] * L + index % L
            of_rows = {name: x[rows] if torch.is_tensor(x) else x for name, x in of_rows.items()}
        if len(among) == 0:
            return self.vectors.weight.new_zeros(B, L, self.config.embedding_size)
        found = self._score(times, among, expected_vectors, **of_rows).head_output
        expected = found.new_zeros(B * L, found.shape[1]).index_copy(0, index, found).view(B, L, -1)
        return expected * chosen[..., None]

    def _score(
        self,
        times: torch.Tensor,
        logits_index: torch.Tensor | None,
        head_function: HeadFunction | None,
        *,
        input_ids,
        is_canvas,
        time_index,
        noise,
        latents,
        inputs_embeds,
        expected=None,
        **kwargs: Any,
    ) -> LanguageModelOutput:
        """One pass; see `forward`."""
        table, (B, L), size = self.table(), is_canvas.shape, self.config.embedding_size
        level = self.schedule(times.to(table.dtype))
        of_times = (level.gamma[time_index], level.slope[time_index])
        gamma, slope = (x if x.dim() == 2 else x[:, None] for x in of_times)
        signal, scale = signal_and_scale(gamma[..., None])
        if noise is not None:
            latents = signal * embedding(input_ids, table) + scale * noise.to(table.dtype)
        z = table.new_zeros(B, L, size) if latents is None else latents.to(table.dtype) * is_canvas[..., None]
        # The backbone sees one id all over the canvas, and not that to which a time may be added.
        input_ids, is_given = (
            input_ids.masked_fill(is_canvas, int(self.config.bos_token_id == 0)),
            ~is_canvas[..., None],
        )
        given = self.model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        shown = z * (signal.square() / size + scale.square()).rsqrt()
        shown = shown + size**0.5 * embedding(input_ids, table) * is_given
        outputs = self.model(
            input_ids,
            inputs_embeds=given * is_given + self._of_vectors(shown, expected),
            output_index=logits_index,
            timesteps=gamma if gamma.shape[1] == L else gamma[:, 0],
            **kwargs,
        )
        gamma, slope = (take_of_rows(x, L, logits_index) for x in (gamma, slope))
        head: Any = NoisyHead(self.lm_head, table, gamma, slope, level)
        query = take(signal / scale.square() * z, logits_index)
        states = torch.cat((outputs.last_hidden_state.to(query.dtype), query), dim=-1)
        suppressed_ids = None if self.config.softmax_over_suppressed else self.config.suppressed_ids
        return LanguageModelOutput(
            **head_fields(states, head, suppressed_ids, head_function),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _of_vectors(self, shown: torch.Tensor, expected: torch.Tensor | None) -> torch.Tensor:
        """What the layers see of vectors (B, L, size), `shown` with entries of size 1 or so: (B, L, hidden_size)."""
        dtype = self.vector_proj.weight.dtype
        inputs = self.vector_proj(shown.to(dtype))
        if self.expected_proj is None or expected is None:
            return inputs
        return inputs + self.expected_proj((shown.shape[-1] ** 0.5 * expected).to(dtype))
