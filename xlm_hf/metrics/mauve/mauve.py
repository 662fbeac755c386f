"""MAUVE: the divergence between generated and human text, in the features of a language model."""

import importlib.util

import datasets
import evaluate
import numpy
import torch
from transformers import AutoModel, AutoTokenizer


class Mauve(evaluate.Metric):
    """Area under the curve of divergences between generated and human text (Pillutla et al., arXiv 2102.01454).

    The clustering and the curve are those of the library `mauve-text`. The features are
    computed here, with any model.

    Args:
        predictions (list[str]): generated texts.
        references (list[str]): as many human texts, in any order.
        feature_model (str): folder or Hub id of the language model whose last hidden state, at the last token, is the
            feature.
        max_length (int): most tokens of a text, at most the positions of the model; the rest is cut off.
        batch_size (int): texts in a forward pass; the result does not depend on it.
        num_buckets (int | str): clusters of the quantised features; "auto" is a tenth of the number of texts.
        seed (int): of the clustering.

    Returns:
        mauve (float): area under the divergence curve, in (0, 1]; 1 for equal distributions.
    """

    def _info(self):
        if importlib.util.find_spec("mauve") is None:
            raise ValueError("the metric mauve needs the library mauve-text: pip install 'xlm-hf[mauve]'.")
        text = datasets.Value("string")
        features = datasets.Features({"predictions": text, "references": text})
        return evaluate.MetricInfo(description=__doc__, citation="", inputs_description=self.__doc__, features=features)

    def _compute(
        self, predictions, references, feature_model, max_length=256, batch_size=8, num_buckets="auto", seed=25
    ):
        from mauve import compute_mauve

        model, tokenizer = AutoModel.from_pretrained(feature_model).eval(), AutoTokenizer.from_pretrained(feature_model)
        if accelerator := torch.accelerator.current_accelerator(check_available=True):
            model = model.to(accelerator)
        max_length = min(max_length, getattr(model.config, "max_position_embeddings", max_length))
        human, generated = (
            _features(model, tokenizer, texts, max_length, batch_size) for texts in (references, predictions)
        )
        result = compute_mauve(human, generated, num_buckets=num_buckets, seed=seed, verbose=False)
        return {"mauve": float(result.mauve)}


@torch.no_grad()
def _features(model, tokenizer, texts, max_length, batch_size):
    """The last hidden state at the last token of each text, (texts, hidden size); an empty text is one end token."""
    rows = [tokenizer.encode(text, add_special_tokens=False)[:max_length] for text in texts]
    rows = [row or [tokenizer.eos_token_id or 0] for row in rows]
    features = []
    for begin in range(0, len(rows), batch_size):
        batch = rows[begin : begin + batch_size]
        lengths = torch.tensor([len(row) for row in batch], device=model.device)
        width = int(lengths.max())
        ids = torch.tensor([row + [0] * (width - len(row)) for row in batch], device=model.device)
        mask = torch.arange(width, device=model.device) < lengths[:, None]
        hidden = model(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        features.append(hidden[torch.arange(len(batch), device=model.device), lengths - 1].float().cpu().numpy())
    return numpy.concatenate(features)
