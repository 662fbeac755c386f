"""What the checker of a puzzle says of answers, on average."""

import pkgutil

import datasets
import evaluate


class Puzzle(evaluate.Metric):
    """The means of what `checker(prompt, answer)` returns: `solved`, `violations` and others.

    Args:
        predictions (list[str]): answers, words with blanks between them.
        prompts (list[str]): puzzles.
        checker (str): dotted name of a function. It takes the words of a prompt and of an answer, and returns a dict of
            numbers: `solved`, 1 for a right answer and else 0, and `violations`, how many rules it breaks.
        options (dict): further arguments of the checker.

    Returns:
        solved (float): share of right answers.
        violations (float): broken rules of an answer.
    """

    def _info(self):
        text = datasets.Value("string")
        features = datasets.Features({"predictions": text, "prompts": text})
        return evaluate.MetricInfo(description=__doc__, citation="", inputs_description=self.__doc__, features=features)

    def check(self, checker, options=None):
        """Refuse a checker that is not there."""
        try:
            pkgutil.resolve_name(checker)
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(f"puzzle: the checker {checker!r} cannot be imported: {error}.") from error

    def per_example(self, predictions, prompts, checker, options=None):
        """What the checker says of each answer."""
        function = pkgutil.resolve_name(checker)
        rows = [
            function(prompt.split(), prediction.split(), **(options or {}))
            for prediction, prompt in zip(predictions, prompts, strict=True)
        ]
        return {name: [row[name] for row in rows] for name in rows[0]}

    def _compute(self, predictions, prompts, checker, options=None):
        values = self.per_example(predictions, prompts, checker=checker, options=options)
        return {name: sum(column) / len(column) for name, column in values.items()}
