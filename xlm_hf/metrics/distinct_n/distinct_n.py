"""Share of n-grams that differ, within samples and across them."""

import datasets
import evaluate

PADDING = -100


class DistinctN(evaluate.Metric):
    """distinct_n = different n-grams / n-grams, over all samples together (Li et al., arXiv 1510.03055).

    `distinct_<n>_within` is the mean of this quotient within each sample that has an n-gram.

    Args:
        predictions (list[list[int]]): lists of token ids; -100 is padding and is dropped.
        sizes (Sequence[int]): the n to report.

    Returns:
        distinct_N (float): for each n, different n-grams / n-grams of all samples; 0 if there are none.
        distinct_N_within (float): mean of the same quotient within each sample that has an n-gram; 0 if none has.
    """

    def _info(self):
        tokens = datasets.List(datasets.Value("int64"))
        features = datasets.Features({"predictions": tokens})
        return evaluate.MetricInfo(description=__doc__, citation="", inputs_description=self.__doc__, features=features)

    def _compute(self, predictions, sizes=(1, 2, 3)):
        rows = [[token for token in row if token != PADDING] for row in predictions]
        result = {}
        for n in sizes:
            grams = [list(zip(*(row[start:] for start in range(n)), strict=False)) for row in rows]
            within = [len(set(row)) / len(row) for row in grams if row]
            num_grams = sum(map(len, grams))
            result[f"distinct_{n}"] = len(set().union(*grams)) / max(num_grams, 1)
            result[f"distinct_{n}_within"] = sum(within) / max(len(within), 1)
        return result
