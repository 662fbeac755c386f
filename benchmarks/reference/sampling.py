"""Samplers of all families with the vocabulary head at every position, all rows in every step, nothing cached.

Each takes prompts of one length without padding and draws with the numbers that the family's `generate` draws with,
so that with the same seed all write the same. `dense` adds a log-softmax and a draw over all positions in every step;
without it only what is written is normalised and drawn.
"""

import torch

from xlm_hf.modules.counter_random import uniform
from xlm_hf.modules.generation import row_seeds


def _draw(logits: torch.Tensor, uniforms: torch.Tensor | None) -> torch.Tensor:
    """Tokens of (..., V) logits: the inverse of the cumulative distribution at `uniforms`, or without them argmax."""
    if uniforms is None:
        return logits.argmax(dim=-1)
    cumulative = logits.softmax(dim=-1).cumsum(dim=-1)
    threshold = uniforms[..., None].float() * cumulative[..., -1:]
    return torch.searchsorted(cumulative, threshold, right=True).squeeze(-1)


def _canvas(model, prompts: torch.Tensor, max_new_tokens: int, fill: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts with `max_new_tokens` places behind each, and which columns those are."""
    places = torch.full((len(prompts), max_new_tokens), fill)
    ids = torch.cat((prompts, places), dim=1)
    return ids, torch.arange(ids.shape[1]).expand_as(ids)


@torch.no_grad()
def left_to_right(model, prompts, max_new_tokens: int, do_sample: bool, seed: int, dense: bool, **_) -> torch.Tensor:
    """One token after the other; every step runs over the whole block."""
    seeds = row_seeds(seed, len(prompts), prompts.device)
    ids, _columns = _canvas(model, prompts, max_new_tokens, model.config.pad_token_id)
    for step in range(max_new_tokens):
        end = prompts.shape[1] + step
        logits = model(ids, attention_mask=torch.ones_like(ids), use_cache=False).logits.float()
        if dense:
            logits = logits.log_softmax(dim=-1)
        ids[:, end] = _draw(logits[:, end - 1], uniform(seeds, step) if do_sample else None)
    return ids


@torch.no_grad()
def unmasking(
    model, prompts, max_new_tokens: int, do_sample: bool, seed: int, dense: bool, num_steps: int | None = None, **_
) -> torch.Tensor:
    """The most confident masks first, evenly over `num_steps`."""
    seeds = row_seeds(seed, len(prompts), prompts.device)
    ids, columns = _canvas(model, prompts, max_new_tokens, model.config.mask_token_id)
    num_steps = num_steps or max_new_tokens
    for step in range(num_steps):
        masked = ids == model.config.mask_token_id
        logits = model(ids, attention_mask=torch.ones_like(ids)).logits.float()
        confidence = (logits.log_softmax(dim=-1).exp() if dense else logits.softmax(dim=-1)).amax(dim=-1)
        k = -(-int(masked[0].sum()) // (num_steps - step))
        if k == 0:
            break
        order = confidence.masked_fill(~masked, -1.0).argsort(dim=-1, descending=True, stable=True)[:, :k]
        chosen = torch.zeros_like(masked).scatter(-1, order, True)
        _commit(ids, chosen, logits, uniform(seeds[:, None], columns, 1) if do_sample else None, dense)
    return ids


@torch.no_grad()
def diffusion(
    model, prompts, max_new_tokens: int, do_sample: bool, seed: int, dense: bool, num_steps: int | None = None, **_
) -> torch.Tensor:
    """The reverse process of the log-linear schedule: a step from t to s writes a mask with probability (t - s) / t."""
    seeds = row_seeds(seed, len(prompts), prompts.device)
    ids, columns = _canvas(model, prompts, max_new_tokens, model.config.mask_token_id)
    num_steps = num_steps or max_new_tokens
    for step in range(num_steps):
        t, s = ((torch.tensor(float(num_steps - n), dtype=torch.float64) / num_steps) for n in (step, step + 1))
        masked = ids == model.config.mask_token_id
        logits = model(ids, attention_mask=torch.ones_like(ids)).logits.float()
        chosen = masked & (uniform(seeds[:, None], step, columns, 0) < (t - s) / t)
        _commit(ids, chosen, logits, uniform(seeds[:, None], step, columns, 1) if do_sample else None, dense)
    return ids


def _commit(ids, chosen, logits, uniforms, dense: bool) -> None:
    """Write at `chosen` what is drawn; densely, everything is drawn and most of it thrown away."""
    if dense:
        ids[chosen] = _draw(logits.log_softmax(dim=-1), uniforms)[chosen]
    else:
        ids[chosen] = _draw(logits[chosen], None if uniforms is None else uniforms[chosen])


@torch.no_grad()
def insertion(
    model, prompts, max_new_tokens: int, do_sample: bool, seed: int, dense: bool, stop: bool = False, **_
) -> torch.Tensor:
    """One token a step into any slot from the last token of the prompt on; `stop` listens to the stopping head."""
    B, P = prompts.shape
    rows, seeds = torch.arange(B), row_seeds(seed, B, prompts.device)
    ids, columns = _canvas(model, prompts, max_new_tokens, model.config.pad_token_id)
    lengths, finished = torch.full((B,), P), torch.zeros(B, dtype=torch.bool)
    for step in range(max_new_tokens + 1):
        outputs = model(ids, attention_mask=columns < lengths[:, None])
        if stop:
            finished |= outputs.stop_logits.float().softmax(dim=-1)[:, 0] >= 0.5
        finished |= lengths == ids.shape[1]
        if finished.all():
            break
        slots = (columns >= P - 1) & (columns < lengths[:, None])
        grid = outputs.logits.float().masked_fill(~slots[..., None], -torch.inf)
        if dense:
            grid = grid.flatten(1).log_softmax(dim=-1).view_as(grid)
        scores = grid.logsumexp(dim=-1) if do_sample else grid.amax(dim=-1)
        slot = _draw(scores, uniform(seeds, step, 0, 0) if do_sample else None)
        token = _draw(grid[rows, slot], uniform(seeds, step, 0, 1) if do_sample else None)
        source = (columns - (columns > slot[:, None] + 1).long()).clamp(min=0)
        inserted = ids.gather(-1, source).masked_scatter(columns == slot[:, None] + 1, token)
        ids = torch.where(finished[:, None], ids, inserted)
        lengths = lengths + (~finished).long()
    return ids


SAMPLERS = {"ilm": insertion, "arlm": left_to_right, "mlm": unmasking, "mdlm": diffusion}
