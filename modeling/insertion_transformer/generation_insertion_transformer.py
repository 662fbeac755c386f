"""Generation by the Insertion Transformer: a token into every slot that is not finished, in one forward pass."""

from typing import Any

import torch

from xlm_hf.modules.checked_options import PositiveInt
from xlm_hf.modules.counter_random import uniform
from xlm_hf.modules.edits import EditBuffer
from xlm_hf.modules.generation import (
    GenerationCall,
    NonAutoregressiveGenerationConfig,
    NonAutoregressiveGenerationMixin,
)
from xlm_hf.modules.unmasking import commit_ranks, draw_tokens
from xlm_hf.modules.vocabulary_head import LogitsOnDemand

_BLOCK_SIZE = 2**24  # logits of one block: 64 MiB


class InsertionTransformerGenerationConfig(NonAutoregressiveGenerationConfig):
    """Options of `InsertionTransformerForInsertionLM.generate`, beside those of the base class.

    Attributes:
        insertions_per_step: most tokens that one forward pass inserts, the most probable ones; None is a token into
            every slot that is not finished (parallel decoding), 1 the one most probable token (serial decoding).
        end_penalty: subtracted from the logit of `[EOS]`; more than 0 writes longer texts.
    """

    insertions_per_step: PositiveInt | None = None
    end_penalty: float = 0.0


class InsertionTransformerGenerationMixin(NonAutoregressiveGenerationMixin):
    """Adds `generate` to the Insertion Transformer (arXiv 1902.03249).

    Each slot takes its most probable token, or draws one. Where that is `[EOS]` nothing is inserted in this step; a row
    ends once no slot inserts anything. Prompts read `prompt [BOS]`; a bare one is wrapped.
    """

    def open_generation(self: Any, call: GenerationCall, input_ids, attention_mask, **inputs) -> EditBuffer:
        """Sequences that hold nothing after their prompts."""
        prompt, mask = self.completed_prompts(input_ids, attention_mask, None, self.config.bos_token_id)
        capacity = self.capacity_after(call, mask.sum(dim=-1))
        return EditBuffer(prompt, mask, capacity, self.config.pad_token_id, call.log)

    def generation_step(self: Any, call: GenerationCall, state: EditBuffer, step: int) -> bool:
        """One forward pass over the open rows: insert, and end those that lack nothing; False if none is open."""
        rows, num_slots, width, _ = state.shape_of_step()
        if num_slots == 0:
            return False
        config, end_token_id = call.config, self.config.eos_token_id
        sequences, mask, exists = state.view(rows, width)
        index, of_slots = state.slots(exists, num_slots)

        def draw(hidden_states, head, suppressed_ids) -> tuple[torch.Tensor, torch.Tensor]:
            logits = LogitsOnDemand(hidden_states, head, suppressed_ids)
            logits = logits.processed(config.suppress_tokens, call.logits_processor, sequences, index, step)
            # A slot's own number, so that neither padding nor other rows change its draw.
            row, column = index // sequences.shape[1], index % sequences.shape[1]
            uniforms = uniform(call.seeds[rows[row]], step, column - (state.prompt.shape[1] - 1))
            return _draw(logits, uniforms, config, end_token_id, self.config.vocab_size)

        output = self(sequences, attention_mask=mask, logits_index=index, head_function=draw)
        state.nfe += ~state.finished
        tokens, scores = (values[of_slots] for values in output.head_output)
        inserted = exists if end_token_id is None else exists & (tokens != end_token_id)
        state.finish(rows, ~inserted.any(dim=-1))
        # Where a row has less capacity left than tokens, the most probable of them count.
        most = (state.capacity - state.lengths)[rows, None].clamp(max=config.insertions_per_step or state.width)
        slots = torch.arange(width + 1, device=rows.device).expand_as(exists)
        state.apply(rows, step, slots, tokens, inserted & (commit_ranks(scores, inserted) < most))
        return True


def _draw(
    logits: LogitsOnDemand,
    uniforms: torch.Tensor,
    config: InsertionTransformerGenerationConfig,
    end_token_id: int | None,
    vocab_size: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A token for each of S slots, and its log-probability, both (S,), from some rows of the logits at a time."""
    tokens, scores = [], []
    for part in torch.arange(len(uniforms), device=uniforms.device).split(max(1, _BLOCK_SIZE // vocab_size)):
        block = logits[part]
        if end_token_id is not None:
            block[:, end_token_id] -= config.end_penalty
        tokens.append(draw_tokens(block, uniforms[part], config))
        scores.append(block.gather(1, tokens[-1][:, None])[:, 0] - block.logsumexp(dim=-1))
    return torch.cat(tokens), torch.cat(scores)
