"""Perplexity of samples under another language model, beside their entropy."""

import functools
import math
from collections import Counter

import datasets
import evaluate
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


class GenerativePerplexity(evaluate.Metric):
    """generative_nll = sum of -ln p(x_i | x_<i) over all scored tokens / their number, p being another model.

    generative_perplexity = exp(generative_nll); generative_perplexity_per_sample = mean over the texts of exp(nats of
    the text / its scored tokens); generative_bits_per_character = sum of -log2 p(x_i | x_<i) / the characters of the
    scored tokens; generative_entropy = mean over the texts of the entropy of their scored tokens.

    Per token, a judge can rank text with shuffled characters above the text itself: its tokenizer cuts nonsense into
    many short tokens, each of them cheap. Per character that is not so.

    Args:
        predictions (list[str]): texts.
        eval_model (str | PreTrainedModel): the judge: the folder or Hub id of a causal language model, or the
            model itself.
        eval_tokenizer (str | None): its tokenizer; by default the one of the same folder or Hub id.
        first_token (str): "unscored" leaves the first token of each text out; "after_bos" scores it after
            the tokenizer's beginning-of-sequence token.
        batch_size (int): texts in a forward pass; the result does not depend on it.
        max_length (int): most tokens of a text, the beginning-of-sequence token included; the rest is cut off.

    Returns:
        generative_tokens (float): number of scored tokens; if there are none, the next four are left out.
        generative_nll (float): nats per scored token of all texts together.
        generative_perplexity (float): exp(generative_nll).
        generative_perplexity_per_sample (float): mean over texts of exp(nats per scored token of the text).
        generative_bits_per_character (float): bits of all texts together / characters of their scored tokens. It is
            left out for a tokenizer written in Python, which does not say where in a text a token stands.
        generative_entropy (float): mean over texts of the entropy of the text's scored tokens, in nats.
    """

    def _info(self):
        features = datasets.Features({"predictions": datasets.Value("string")})
        return evaluate.MetricInfo(description=__doc__, citation="", inputs_description=self.__doc__, features=features)

    def check(self, eval_model, eval_tokenizer=None, **_):
        """Raise ValueError if the judge cannot be loaded, before any sample is written."""
        _load(AutoTokenizer, eval_model if eval_tokenizer is None else eval_tokenizer)

    def _compute(
        self, predictions, eval_model, eval_tokenizer=None, first_token="unscored", batch_size=8, max_length=1024
    ):
        if first_token not in ("unscored", "after_bos"):
            raise ValueError(f"unknown first_token {first_token!r}: choose 'unscored' or 'after_bos'.")
        model = _load(AutoModelForCausalLM, eval_model).eval()
        tokenizer = _load(AutoTokenizer, eval_model if eval_tokenizer is None else eval_tokenizer)
        start = [tokenizer.bos_token_id] if first_token == "after_bos" else []
        if None in start:
            raise ValueError("the tokenizer of eval_model has no bos_token: use first_token='unscored'.")
        longest = min(max_length, getattr(model.config, "max_position_embeddings", max_length))
        longest -= len(start)
        options = {"add_special_tokens": False, "return_offsets_mapping": tokenizer.is_fast}
        encoded = [tokenizer(text, **options) for text in predictions]
        rows = [start + of_text["input_ids"][:longest] for of_text in encoded]
        entropies = [_entropy(row[1:]) for row in rows]
        characters = 0
        for of_text in encoded if tokenizer.is_fast else ():
            # A first token that is only context has no characters here, and neither has what is cut off.
            ends = [end for _, end in of_text["offset_mapping"][:longest]] or [0]
            characters += ends[-1] - (0 if start else ends[0])
        rows = [row for row in rows if len(row) > 1]
        nlls, lengths = _nlls(model, rows, batch_size), [len(row) - 1 for row in rows]
        result = {"generative_tokens": sum(lengths), "generative_entropy": sum(entropies) / max(len(entropies), 1)}
        if rows:
            result["generative_nll"] = sum(nlls) / sum(lengths)
            result["generative_perplexity"] = math.exp(result["generative_nll"])
            if tokenizer.is_fast:
                result["generative_bits_per_character"] = sum(nlls) / math.log(2) / characters
            per_sample = [math.exp(nll / length) for nll, length in zip(nlls, lengths, strict=True)]
            result["generative_perplexity_per_sample"] = sum(per_sample) / len(per_sample)
        return result


@torch.no_grad()
def _nlls(model, rows, batch_size):
    """Sum over i >= 1 of -ln p(x_i | x_<i) for each row of ids, in float32."""
    nlls = []
    for begin in range(0, len(rows), batch_size):
        batch = rows[begin : begin + batch_size]
        lengths = torch.tensor([len(row) for row in batch], device=model.device)
        width = int(lengths.max())
        ids = torch.tensor([row + [0] * (width - len(row)) for row in batch], device=model.device)
        mask = torch.arange(width, device=model.device) < lengths[:, None]
        logits = model(input_ids=ids, attention_mask=mask.long()).logits[:, :-1].float()
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        # Not a product: a judge that never writes its padding token gives it an infinite loss.
        nlls += losses.masked_fill(~mask[:, 1:], 0.0).sum(dim=-1).tolist()
    return nlls


def _entropy(tokens):
    return sum(count / len(tokens) * math.log(len(tokens) / count) for count in Counter(tokens).values())


def _load(auto_class, source):
    """The object itself, or what the folder or Hub id holds."""
    return _load_once(auto_class, source) if isinstance(source, str) else source


@functools.lru_cache(maxsize=2)
def _load_once(auto_class, source):
    try:
        loaded = auto_class.from_pretrained(source)
    except OSError:
        raise ValueError(f"eval_model {source!r} is not a folder or Hub id with a model and its tokenizer.") from None
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return loaded if accelerator is None or auto_class is AutoTokenizer else loaded.float().to(accelerator)
