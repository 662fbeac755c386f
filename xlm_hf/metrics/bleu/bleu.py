"""BLEU of a corpus against one or several references of each text, as sacrebleu computes it."""

import importlib.util
import itertools

import datasets
import evaluate


class Bleu(evaluate.Metric):
    """BLEU = BP exp(mean over n = 1..4 of ln p_n), with p_n the clipped precision of n-grams over all texts.

    BP = min(1, exp(1 - r / c)), with c the length of the predictions and r that of the references nearest to it
    (Papineni et al., 2002; Post, arXiv 1804.08771).

    Args:
        predictions (list[str]): texts.
        references (list[list[str]]): one or several references of each text.
        tokenize (str): how sacrebleu tokenises: "13a"; "none" for texts that are tokenised; "zh", "char" and so on.
        lowercase (bool): whether to ignore case.

    Returns:
        bleu (float): 0 to 100.
    """

    def _info(self):
        if importlib.util.find_spec("sacrebleu") is None:
            raise ValueError("the metric bleu needs the library sacrebleu: pip install 'xlm-hf[translation]'.")
        text = datasets.Value("string")
        features = datasets.Features({"predictions": text, "references": datasets.List(text)})
        return evaluate.MetricInfo(description=__doc__, citation="", inputs_description=self.__doc__, features=features)

    def _compute(self, predictions, references, tokenize="13a", lowercase=False):
        from sacrebleu.metrics import BLEU

        # One list for the first reference of every text, one for the second, and so on; None is no reference.
        streams = [list(stream) for stream in itertools.zip_longest(*references)]
        # `force` keeps it from warning of texts that look tokenised, as those of a vocabulary of words do.
        score = BLEU(tokenize=tokenize, lowercase=lowercase, force=True).corpus_score(predictions, streams)
        return {"bleu": score.score}
