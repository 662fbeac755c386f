"""ROUGE of texts against one or several references each, as the library rouge-score computes it."""

import importlib.util

import datasets
import evaluate

KINDS = ("rouge1", "rouge2", "rougeL")


class Rouge(evaluate.Metric):
    """F score of the words (rouge1), pairs of words (rouge2) or longest common subsequence (rougeL) of two texts.

    Each is the mean over the texts, of the reference with the highest F score (Lin, 2004).

    Args:
        predictions (list[str]): texts.
        references (list[list[str]]): one or several references of each text.
        use_stemmer (bool): whether English words count by their stems.

    Returns:
        rouge1 (float): 0 to 1, as the other two.
        rouge2 (float): likewise.
        rougeL (float): likewise.
    """

    def _info(self):
        if importlib.util.find_spec("rouge_score") is None:
            raise ValueError("the metric rouge needs the library rouge-score: pip install 'xlm-hf[translation]'.")
        text = datasets.Value("string")
        features = datasets.Features({"predictions": text, "references": datasets.List(text)})
        return evaluate.MetricInfo(description=__doc__, citation="", inputs_description=self.__doc__, features=features)

    def per_example(self, predictions, references, use_stemmer=False):
        """The three F scores of each text."""
        from rouge_score.rouge_scorer import RougeScorer

        scorer = RougeScorer(list(KINDS), use_stemmer=use_stemmer)
        scores = [
            scorer.score_multi(several, prediction) for prediction, several in zip(predictions, references, strict=True)
        ]
        return {kind: [score[kind].fmeasure for score in scores] for kind in KINDS}

    def _compute(self, predictions, references, use_stemmer=False):
        scores = self.per_example(predictions, references, use_stemmer=use_stemmer)
        return {kind: sum(values) / len(values) for kind, values in scores.items()}
