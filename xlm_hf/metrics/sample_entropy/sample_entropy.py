"""Entropy of the tokens within a sample, averaged over samples."""

import math
from collections import Counter

import datasets
import evaluate

PADDING = -100


class SampleEntropy(evaluate.Metric):
    """sample_entropy = mean over samples of -sum_v f_v ln f_v, f_v = count of v in the sample / its length; in nats.

    Args:
        predictions (list[list[int]]): lists of token ids; -100 is padding and is dropped.

    Returns:
        sample_entropy (float): mean over samples of -sum_v f_v ln f_v, f_v the share of tokens that are v.
    """

    def _info(self):
        tokens = datasets.List(datasets.Value("int64"))
        features = datasets.Features({"predictions": tokens})
        return evaluate.MetricInfo(description=__doc__, citation="", inputs_description=self.__doc__, features=features)

    def per_example(self, predictions):
        """Entropy of each sample in nats; 0 for an empty one."""
        return {"sample_entropy": [_entropy([token for token in row if token != PADDING]) for row in predictions]}

    def _compute(self, predictions):
        if not predictions:
            raise ValueError("no samples to score: sample_entropy needs at least one.")
        entropies = self.per_example(predictions)["sample_entropy"]
        return {"sample_entropy": sum(entropies) / len(entropies)}


def _entropy(tokens):
    return sum(count / len(tokens) * math.log(len(tokens) / count) for count in Counter(tokens).values())
