"""chrF of a corpus against one or several references of each text, as sacrebleu computes it."""

import importlib.util
import itertools

import datasets
import evaluate


class Chrf(evaluate.Metric):
    """chrF = (1 + beta^2) P R / (beta^2 P + R), with P and R the mean precision and recall of n-grams of characters.

    n goes from 1 to 6, beta is 2, and blanks do not count (Popović, 2015 and 2017).

    Args:
        predictions (list[str]): texts.
        references (list[list[str]]): one or several references of each text; the nearest one counts.
        word_order (int): longest n-grams of words that count beside those of characters; 2 is chrF++.

    Returns:
        chrf (float): 0 to 100.
    """

    def _info(self):
        if importlib.util.find_spec("sacrebleu") is None:
            raise ValueError("the metric chrf needs the library sacrebleu: pip install 'xlm-hf[translation]'.")
        text = datasets.Value("string")
        features = datasets.Features({"predictions": text, "references": datasets.List(text)})
        return evaluate.MetricInfo(description=__doc__, citation="", inputs_description=self.__doc__, features=features)

    def _compute(self, predictions, references, word_order=0):
        from sacrebleu.metrics import CHRF

        # One list for the first reference of every text, one for the second, and so on; None is no reference.
        streams = [list(stream) for stream in itertools.zip_longest(*references)]
        return {"chrf": CHRF(word_order=word_order).corpus_score(predictions, streams).score}
