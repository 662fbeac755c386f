"""Share of predictions that equal their reference, token for token."""

import datasets
import evaluate

PADDING = -100


class ExactMatch(evaluate.Metric):
    """exact_match = mean over examples of 1[prediction == reference], without the padding -100 of either.

    Args:
        predictions (list[list[int]]): lists of token ids; -100 is padding and is dropped.
        references (list[list[int]]): lists of token ids; -100 is padding and is dropped.

    Returns:
        exact_match (float): mean over examples of 1[prediction == reference].
    """

    def _info(self):
        tokens = datasets.List(datasets.Value("int64"))
        features = datasets.Features({"predictions": tokens, "references": tokens})
        return evaluate.MetricInfo(description=__doc__, citation="", inputs_description=self.__doc__, features=features)

    def per_example(self, predictions, references):
        """1 or 0 for each example."""
        matches = [
            [token for token in prediction if token != PADDING] == [token for token in reference if token != PADDING]
            for prediction, reference in zip(predictions, references, strict=True)
        ]
        return {"exact_match": [int(match) for match in matches]}

    def _compute(self, predictions, references):
        if not predictions:
            raise ValueError("no predictions to score: exact_match needs at least one.")
        matches = self.per_example(predictions, references)["exact_match"]
        return {"exact_match": sum(matches) / len(matches)}
