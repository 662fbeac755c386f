"""Share of the reference's tokens that the prediction has at the same position."""

import datasets
import evaluate

PADDING = -100


class TokenAccuracy(evaluate.Metric):
    """token_accuracy = mean over examples of |{i < n : prediction[i] == reference[i]}| / n, n = len(reference).

    The padding -100 of both is dropped first. Positions that the prediction does not reach are wrong. Tokens beyond
    the reference do not count.

    Args:
        predictions (list[list[int]]): lists of token ids; -100 is padding and is dropped.
        references (list[list[int]]): lists of token ids, none of them empty; -100 is padding and is dropped.
        blanks (list[list[bool]]): for infilling, True where an example was blank, as long as its reference. Only these
            positions count; by default all do.

    Returns:
        token_accuracy (float): mean over examples of the share of positions where the prediction agrees.
    """

    def _info(self):
        tokens = datasets.List(datasets.Value("int64"))
        features = datasets.Features({"predictions": tokens, "references": tokens})
        return evaluate.MetricInfo(description=__doc__, citation="", inputs_description=self.__doc__, features=features)

    def per_example(self, predictions, references, blanks=None):
        """Accuracy of each example."""
        accuracies = []
        for row, (prediction, reference) in enumerate(zip(predictions, references, strict=True)):
            if blanks is not None:
                chosen = [i for i, (_, blank) in enumerate(zip(reference, blanks[row], strict=True)) if blank]
                # Where gaps are open, a prediction may be shorter.
                prediction = [prediction[i] if i < len(prediction) else None for i in chosen]
                reference = [reference[i] for i in chosen]
            prediction = [token for token in prediction if token != PADDING]
            reference = [token for token in reference if token != PADDING]
            if not reference:
                raise ValueError(f"reference {row} has no tokens: token_accuracy needs at least one in each.")
            accuracies.append(sum(p == r for p, r in zip(prediction, reference, strict=False)) / len(reference))
        return {"token_accuracy": accuracies}

    def _compute(self, predictions, references, blanks=None):
        if not predictions:
            raise ValueError("no predictions to score: token_accuracy needs at least one.")
        accuracies = self.per_example(predictions, references, blanks=blanks)["token_accuracy"]
        return {"token_accuracy": sum(accuracies) / len(accuracies)}
