"""Edit distances of predictions, and of what they correct, to their references."""

import datasets
import evaluate

PADDING = -100


class EditDistance(evaluate.Metric):
    """edit_distance = mean of d(prediction, reference), edit_distance_before = mean of d(source, reference).

    d is the Levenshtein distance: the fewest insertions, deletions and substitutions of tokens.

    Args:
        predictions (list[list[int]]): lists of token ids; -100 is padding and is dropped.
        references (list[list[int]]): lists of token ids; -100 is padding and is dropped.
        sources (list[list[int]]): the texts that were to be corrected; -100 is padding and is dropped.

    Returns:
        edit_distance (float): mean over examples of the distance of prediction and reference.
        edit_distance_before (float): mean over examples of the distance of source and reference.
    """

    def _info(self):
        tokens = datasets.List(datasets.Value("int64"))
        features = datasets.Features({"predictions": tokens, "references": tokens, "sources": tokens})
        return evaluate.MetricInfo(description=__doc__, citation="", inputs_description=self.__doc__, features=features)

    def per_example(self, predictions, references, sources):
        """The two distances of each example."""
        return {
            "edit_distance": list(map(distance, predictions, references)),
            "edit_distance_before": list(map(distance, sources, references)),
        }

    def _compute(self, predictions, references, sources):
        if not predictions:
            raise ValueError("no predictions to score: edit_distance needs at least one.")
        values = self.per_example(predictions, references, sources)
        return {name: sum(of_examples) / len(of_examples) for name, of_examples in values.items()}


def distance(source, target):
    """The Levenshtein distance of two lists of token ids, without padding."""
    source, target = ([token for token in ids if token != PADDING] for ids in (source, target))
    row = list(range(len(target) + 1))
    for i, token in enumerate(source, 1):
        corner, row[0] = row[0], i
        for j, other in enumerate(target, 1):
            corner, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, corner + (token != other))
    return row[-1]
