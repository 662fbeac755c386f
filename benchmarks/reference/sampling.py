"""Samplers of all families with the vocabulary head at every position, all rows in every step, nothing cached.

Each takes prompts of one length without padding and draws with the numbers that the family's `generate` draws with,
so that with the same seed all write the same. `savings` leave out work that the result does not need:

    gather: only what is written is normalised and drawn, instead of a log-softmax and a draw everywhere.
    rows: rows that are finished, or in which a step of the process writes nothing, leave the batch.
    width: the columns that nothing stands in yet are cut off.
    head: the vocabulary head is applied only where its logits are used.

None of them is *dense*, the first alone is *plain*; `LADDERS` says which there are for a family, in the order in which
the ablation adds them.
"""

from collections.abc import Collection

import torch

from xlm_hf.modules.counter_random import uniform
from xlm_hf.modules.generation import row_seeds

LADDERS = {
    "ilm": ("gather", "rows", "width", "head"),
    "arlm": ("gather", "width", "head"),
    "mlm": ("gather", "head"),
    "mdlm": ("gather", "head", "rows"),
}


def _draw(logits: torch.Tensor, uniforms: torch.Tensor | None) -> torch.Tensor:
    """Tokens of (..., V) logits: the inverse of the cumulative distribution at `uniforms`, or without them argmax."""
    if uniforms is None:
        return logits.argmax(dim=-1)
    cumulative = logits.softmax(dim=-1).cumsum(dim=-1)
    threshold = uniforms[..., None].float() * cumulative[..., -1:]
    return torch.searchsorted(cumulative, threshold, right=True).squeeze(-1)


def _canvas(prompts: torch.Tensor, max_new_tokens: int, fill: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts with `max_new_tokens` places behind each, and the number of each column."""
    places = torch.full((len(prompts), max_new_tokens), fill)
    ids = torch.cat((prompts, places), dim=1)
    return ids, torch.arange(ids.shape[1]).expand_as(ids)


def _logits(model, ids: torch.Tensor, wanted: torch.Tensor | None) -> torch.Tensor:
    """Logits (B, L, V), or with `wanted` (B, L) the (S, V) of those positions in reading order."""
    index = {} if wanted is None else {"logits_index": wanted.flatten().nonzero().squeeze(-1)}
    return model(ids, attention_mask=torch.ones_like(ids), **index).logits.float()


@torch.no_grad()
def left_to_right(
    model, prompts, max_new_tokens: int, do_sample: bool, seed: int, savings: Collection[str] = (), **_
) -> torch.Tensor:
    """One token after the other, every step from the start."""
    seeds = row_seeds(seed, len(prompts), prompts.device)
    ids, columns = _canvas(prompts, max_new_tokens, model.config.pad_token_id)
    for step in range(max_new_tokens):
        end = prompts.shape[1] + step
        seen = ids[:, :end] if "width" in savings else ids
        last = columns[:, : seen.shape[1]] == end - 1
        logits = _logits(model, seen, last if "head" in savings else None)
        if "gather" not in savings:
            logits = logits.log_softmax(dim=-1)
        logits = logits if "head" in savings else logits[:, end - 1]
        ids[:, end] = _draw(logits, uniform(seeds, step) if do_sample else None)
    return ids


@torch.no_grad()
def unmasking(
    model,
    prompts,
    max_new_tokens: int,
    do_sample: bool,
    seed: int,
    savings: Collection[str] = (),
    num_steps: int | None = None,
    **_,
) -> torch.Tensor:
    """The most confident masks first, evenly over `num_steps`."""
    seeds = row_seeds(seed, len(prompts), prompts.device)
    ids, columns = _canvas(prompts, max_new_tokens, model.config.mask_token_id)
    num_steps = num_steps or max_new_tokens
    for step in range(num_steps):
        masked = ids == model.config.mask_token_id
        k = -(-int(masked[0].sum()) // (num_steps - step))
        if k == 0:
            break
        looked_at = masked if "head" in savings else torch.ones_like(masked)
        logits = _logits(model, ids, masked if "head" in savings else None)
        confidence = (logits.softmax(dim=-1) if "gather" in savings else logits.log_softmax(dim=-1).exp()).amax(dim=-1)
        confidence = torch.zeros(ids.shape).masked_scatter(looked_at, confidence)
        order = confidence.masked_fill(~masked, -1.0).argsort(dim=-1, descending=True, stable=True)[:, :k]
        chosen = torch.zeros_like(masked).scatter(-1, order, True)
        uniforms = uniform(seeds[:, None], columns, 1) if do_sample else None
        _commit(ids, chosen, looked_at, logits, uniforms, savings)
    return ids


@torch.no_grad()
def diffusion(
    model,
    prompts,
    max_new_tokens: int,
    do_sample: bool,
    seed: int,
    savings: Collection[str] = (),
    num_steps: int | None = None,
    **_,
) -> torch.Tensor:
    """The reverse process of the log-linear schedule: a mask goes at a time t ~ U(0, 1), in the step that passes it."""
    all_seeds = row_seeds(seed, len(prompts), prompts.device)
    all_ids, columns = _canvas(prompts, max_new_tokens, model.config.mask_token_id)
    num_steps = num_steps or max_new_tokens
    times = uniform(all_seeds[:, None], columns, 0)
    for step in range(num_steps):
        masked = all_ids == model.config.mask_token_id
        chosen = masked & (times >= (num_steps - step - 1) / num_steps)
        rows = chosen.any(dim=-1) if "rows" in savings else torch.ones_like(chosen[:, 0])
        if not rows.any():
            continue
        ids, chosen, seeds = all_ids[rows], chosen[rows], all_seeds[rows]
        looked_at = chosen if "head" in savings else torch.ones_like(chosen)
        logits = _logits(model, ids, chosen if "head" in savings else None)
        uniforms = uniform(seeds[:, None], step, columns[rows], 1) if do_sample else None
        _commit(ids, chosen, looked_at, logits, uniforms, savings)
        all_ids[rows] = ids
    return all_ids


def _commit(ids, chosen, looked_at, logits, uniforms, savings: Collection[str]) -> None:
    """Write at `chosen` what is drawn from the logits at the places `looked_at`."""
    logits = logits.flatten(0, -2)
    uniforms = None if uniforms is None else uniforms[looked_at]
    among = chosen[looked_at]
    if "gather" in savings:
        ids[chosen] = _draw(logits[among], None if uniforms is None else uniforms[among])
    else:
        ids[chosen] = _draw(logits.log_softmax(dim=-1), uniforms)[among]


@torch.no_grad()
def insertion(
    model,
    prompts,
    max_new_tokens: int,
    do_sample: bool,
    seed: int,
    savings: Collection[str] = (),
    stop: bool = False,
    **_,
) -> torch.Tensor:
    """One token a step into any slot from the last token of the prompt on; `stop` listens to the stopping head."""
    B, P = prompts.shape
    seeds = row_seeds(seed, B, prompts.device)
    ids, _columns = _canvas(prompts, max_new_tokens, model.config.pad_token_id)
    lengths, finished = torch.full((B,), P), torch.zeros(B, dtype=torch.bool)
    for step in range(max_new_tokens + 1):
        rows = (~finished if "rows" in savings else torch.ones_like(finished)).nonzero().squeeze(-1)
        width = int(lengths[rows].max()) if "width" in savings else ids.shape[1]
        seen, ends, columns = ids[rows, :width], lengths[rows, None], torch.arange(width)
        slots = (columns >= P - 1) & (columns < ends)
        index = {"slot_index": slots.flatten().nonzero().squeeze(-1)} if "head" in savings else {}
        outputs = model(seen, attention_mask=columns < ends, **index)
        if stop:
            finished[rows] |= outputs.stop_logits.float().softmax(dim=-1)[:, 0] >= 0.5
        finished |= lengths == ids.shape[1]
        if finished.all():
            break
        if index:
            grid = outputs.logits.new_full((*seen.shape, outputs.logits.shape[-1]), -torch.inf)
            grid[slots] = outputs.logits
        else:
            grid = outputs.logits.float().masked_fill(~slots[..., None], -torch.inf)
        if "gather" not in savings:
            grid = grid.flatten(1).log_softmax(dim=-1).view_as(grid)
        uniforms = [uniform(seeds[rows], step, 0, n) if do_sample else None for n in (0, 1)]
        slot = _draw(grid.logsumexp(dim=-1) if do_sample else grid.amax(dim=-1), uniforms[0])
        token = _draw(grid[torch.arange(len(rows)), slot], uniforms[1])
        for row, place, word in zip(rows.tolist(), (slot + 1).tolist(), token.tolist(), strict=True):
            if not finished[row]:
                ids[row, place + 1 :] = ids[row, place:-1].clone()
                ids[row, place] = word
        lengths += (~finished).long()
    return ids


SAMPLERS = {"ilm": insertion, "arlm": left_to_right, "mlm": unmasking, "mdlm": diffusion}
