"""Share of texts that are one of several answers."""

import re

import datasets
import evaluate


class AnswerMatch(evaluate.Metric):
    r"""answer_match = mean over texts of 1[the answer in the prediction is that in one of its references].

    Blanks do not count, since a vocabulary of words does not keep them.

    Args:
        predictions (list[str]): texts.
        references (list[list[str]]): one or several texts with a right answer.
        pattern (str): a regular expression whose first group is the answer in a text; its last match counts, and a
            prediction without one is wrong. By default the whole text is the answer.

    Returns:
        answer_match (float): share of right answers.
    """

    def _info(self):
        text = datasets.Value("string")
        features = datasets.Features({"predictions": text, "references": datasets.List(text)})
        return evaluate.MetricInfo(description=__doc__, citation="", inputs_description=self.__doc__, features=features)

    def check(self, pattern=None):
        """Refuse a pattern that cannot be used."""
        try:
            num_groups = 1 if pattern is None else re.compile(pattern).groups
        except re.error as error:
            raise ValueError(f"answer_match: pattern={pattern!r} is no regular expression: {error}.") from error
        if not num_groups:
            raise ValueError(f"answer_match: pattern={pattern!r} has no group: put brackets around the answer.")

    def per_example(self, predictions, references, pattern=None):
        """1 or 0 for each text."""
        values = []
        for prediction, several in zip(predictions, references, strict=True):
            given = _answer(prediction, pattern)
            values.append(int(given is not None and given in [_answer(reference, pattern) for reference in several]))
        return {"answer_match": values}

    def _compute(self, predictions, references, pattern=None):
        values = self.per_example(predictions, references, pattern=pattern)["answer_match"]
        return {"answer_match": sum(values) / len(values)}


def _answer(text, pattern):
    """The answer in a text, without blanks; None if there is none."""
    found = [text] if pattern is None else [match[1] for match in re.finditer(pattern, text)]
    return "".join(found[-1].split()) if found else None
