"""Share of the reference's tokens that the prediction has at the same position."""

import datasets
import evaluate

PADDING = -100

_DESCRIPTION = "Share of the reference's tokens that the prediction has at the same position, averaged over examples."

_INPUTS = """
Args:
    predictions: lists of token ids; -100 is padding and is dropped.
    references: lists of token ids, none of them empty; -100 is padding and is dropped.
Returns:
    token_accuracy: mean over examples of the share of the reference's positions where the prediction agrees.
"""


class TokenAccuracy(evaluate.Metric):
    """token_accuracy = mean over examples of |{i < n : prediction[i] == reference[i]}| / n, n = len(reference).

    The padding -100 of either is dropped first. Positions that the prediction does not reach are wrong; what it has
    beyond the reference does not count.
    """

    def _info(self):
        tokens = datasets.List(datasets.Value("int64"))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": tokens, "references": tokens}),
        )

    def _compute(self, predictions, references):
        if not predictions:
            raise ValueError("no predictions to score: token_accuracy needs at least one.")
        total = 0.0
        for row, (prediction, reference) in enumerate(zip(predictions, references, strict=True)):
            prediction = [token for token in prediction if token != PADDING]
            reference = [token for token in reference if token != PADDING]
            if not reference:
                raise ValueError(f"reference {row} has no tokens: token_accuracy needs at least one in each.")
            total += sum(p == r for p, r in zip(prediction, reference, strict=False)) / len(reference)
        return {"token_accuracy": total / len(predictions)}
