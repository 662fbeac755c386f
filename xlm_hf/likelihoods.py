"""Metrics of likelihoods: nats per token, perplexity, bits per character."""

import math
from collections.abc import Iterable

import datasets
import numpy as np
from transformers import PreTrainedTokenizerBase


def likelihood_metrics(
    nats: np.ndarray, tokens: np.ndarray, num_characters: int | None = None, conditions: Iterable[str] = ()
) -> dict[str, float]:
    """Metrics of the negative log-likelihood of N sequences, or of n estimates each of an upper bound of it.

    With x_i the mean of the estimates of sequence i, t_i its tokens and T = sum_i t_i:

        nats_per_token = sum_i x_i / T
        nats_per_token_standard_error = sqrt(N / (N - 1) sum_i (x_i - nats_per_token t_i)^2) / T
        nats_per_token_monte_carlo_standard_error = sqrt(sum_i s_i^2 / n) / T
        perplexity = exp(nats_per_token)
        perplexity_standard_error = perplexity x nats_per_token_standard_error (delta method)
        bits_per_character = sum_i x_i / (ln 2 x characters)

    The first standard error is that of a ratio estimate (Cochran, 1977, equation 6.9). It covers the choice of
    sequences and their draws together. The Monte Carlo error covers the draws alone, for these sequences. s_i^2 is the
    variance of the n > 1 estimates of sequence i. It treats them as independent; evenly spread times make the true
    error smaller.

    For a bound, the perplexity and the bits are upper bounds. Nats under a condition have other names:
    `perplexity_given_length` and so on.

    Args:
        nats: (N, n).
        tokens: (N,), of the text and, where the text ends, of its end.
        num_characters: of all texts; None leaves out the bits.
        conditions: what is given beside what the law of a text includes, e.g. `["length"]`.
    """
    num_sequences, num_draws = nats.shape
    means, num_tokens = nats.mean(axis=1), tokens.sum()
    given = "".join(f"_given_{condition}" for condition in sorted(conditions))
    per_token, perplexity = f"nats_per_token{given}", f"perplexity{given}"
    metrics = {per_token: means.sum() / num_tokens}
    metrics[perplexity] = np.exp(metrics[per_token])
    if num_sequences > 1:
        squares = np.square(means - metrics[per_token] * tokens).sum() * num_sequences / (num_sequences - 1)
        metrics[f"{per_token}_standard_error"] = math.sqrt(squares) / num_tokens
        metrics[f"{perplexity}_standard_error"] = metrics[perplexity] * metrics[f"{per_token}_standard_error"]
    if num_draws > 1:
        variance = nats.var(axis=1, ddof=1).sum() / num_draws
        metrics[f"{per_token}_monte_carlo_standard_error"] = math.sqrt(variance) / num_tokens
    if num_characters is not None:
        metrics[f"bits_per_character{given}"] = means.sum() / (math.log(2) * num_characters)
    return {name: float(value) for name, value in metrics.items()}


def text_counts(rows: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, kind: str) -> tuple[int | None, int, int]:
    """What the texts of some examples count.

    Args:
        rows: the examples.
        tokenizer: names the unknown token.
        kind: of `EvaluationSet`: where in an example the text is, whose likelihood is measured.

    Returns:
        the characters of the original texts, None without the column `num_characters`; the unknown tokens; all tokens.
    """
    num_characters = sum(rows["num_characters"]) if "num_characters" in rows.column_names else None
    # Byte-level tokenizers name their end of a text for what is unknown too, which for them is nothing.
    unknown = None if tokenizer.unk_token_id == tokenizer.eos_token_id else tokenizer.unk_token_id
    num_unknown, num_tokens = 0, 0
    for example in rows:
        ids = example["input_ids" if kind == "lm" else "target_ids"]
        if kind == "infill":
            pairs = zip(example["input_ids"], ids, strict=True)
            ids = [token for shown, token in pairs if shown == tokenizer.mask_token_id]
        num_unknown += ids.count(unknown)
        num_tokens += len(ids)
    return num_characters, num_unknown, num_tokens
