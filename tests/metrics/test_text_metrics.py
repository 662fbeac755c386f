"""Metrics of texts with references against loops."""

import math
import random
from collections import Counter

import pytest

from xlm_hf.metrics import load_metric

WORDS = ["the", "cat", "sat", "on", "a", "mat"]


def corpus(seed=0, count=40):
    """Predictions of words that often agree with one of one to three references."""
    rng = random.Random(seed)
    predictions, references = [], []
    for _ in range(count):
        several = [" ".join(rng.choices(WORDS, k=rng.randint(4, 9))) for _ in range(rng.randint(1, 3))]
        words = rng.choice(several).split()
        for _ in range(rng.randint(0, 2)):
            words[rng.randrange(len(words))] = rng.choice(WORDS)
        predictions.append(" ".join(words[: rng.randint(3, 9)]))
        references.append(several)
    return predictions, references


def grams(items, n):
    return Counter(tuple(items[start : start + n]) for start in range(len(items) - n + 1))


def bleu_by_loops(predictions, references):
    hits, totals, length, wanted = [0] * 4, [0] * 4, 0, 0
    for prediction, several in zip(predictions, references, strict=True):
        words = prediction.split()
        length += len(words)
        wanted += min((abs(len(r.split()) - len(words)), len(r.split())) for r in several)[1]
        for n in range(1, 5):
            own = grams(words, n)
            totals[n - 1] += sum(own.values())
            for gram, count in own.items():
                hits[n - 1] += min(count, max(grams(reference.split(), n)[gram] for reference in several))
    precisions = sum(math.log(hit / total) for hit, total in zip(hits, totals, strict=True)) / 4
    return 100 * min(1, math.exp(1 - wanted / length)) * math.exp(precisions)


def test_bleu_against_loops():
    pytest.importorskip("sacrebleu")
    predictions, references = corpus()
    expected = bleu_by_loops(predictions, references)
    assert 10 < expected < 95
    assert load_metric("bleu").compute(predictions=predictions, references=references)["bleu"] == pytest.approx(
        expected
    )
    # The first reference alone is another measure, and case counts unless it shall not.
    first = [several[:1] for several in references]
    assert load_metric("bleu").compute(predictions=predictions, references=first)["bleu"] < expected
    upper = [text.upper() for text in predictions]
    assert load_metric("bleu").compute(predictions=upper, references=references)["bleu"] < 1
    metric = load_metric("bleu", tokenize="none", lowercase=True)
    assert metric.compute(predictions=upper, references=references)["bleu"] == pytest.approx(expected)


def chrf_by_loops(predictions, references):
    sums = {n: [0, 0, 0] for n in range(1, 7)}
    for prediction, several in zip(predictions, references, strict=True):
        options = []
        for reference in several:
            counts = []
            for n in range(1, 7):
                ours, theirs = (grams(text.replace(" ", ""), n) for text in (prediction, reference))
                counts.append((sum((ours & theirs).values()), sum(ours.values()), sum(theirs.values())))
            options.append((f_score(counts), counts))
        for n, counts in enumerate(max(options, key=lambda option: option[0])[1], 1):
            sums[n] = [total + count for total, count in zip(sums[n], counts, strict=True)]
    return f_score(list(sums.values()))


def f_score(counts):
    used = [(hits / ours, hits / theirs) for hits, ours, theirs in counts if ours and theirs]
    precision, recall = (sum(values) / len(used) for values in zip(*used, strict=True))
    return 100 * 5 * precision * recall / (4 * precision + recall) if precision + recall else 0.0


def test_chrf_against_loops():
    pytest.importorskip("sacrebleu")
    predictions, references = corpus(seed=1)
    expected = chrf_by_loops(predictions, references)
    assert 20 < expected < 95
    metric = load_metric("chrf")
    assert metric.compute(predictions=predictions, references=references)["chrf"] == pytest.approx(expected)
    plus = load_metric("chrf", word_order=2).compute(predictions=predictions, references=references)["chrf"]
    assert plus != pytest.approx(expected)


def longest_common(a, b):
    if not a or not b:
        return 0
    if a[-1] == b[-1]:
        return 1 + longest_common(a[:-1], b[:-1])
    return max(longest_common(a[:-1], b), longest_common(a, b[:-1]))


def test_rouge_against_loops():
    pytest.importorskip("rouge_score")
    predictions, references = corpus(seed=2)
    expected = {"rouge1": [], "rouge2": [], "rougeL": []}
    for prediction, several in zip(predictions, references, strict=True):
        ours = prediction.split()
        scores = {name: [] for name in expected}
        for theirs in map(str.split, several):
            for name, n in (("rouge1", 1), ("rouge2", 2)):
                hits = sum((grams(ours, n) & grams(theirs, n)).values())
                scores[name].append(2 * hits / (len(ours) + len(theirs) + 2 - 2 * n))
            scores["rougeL"].append(2 * longest_common(ours, theirs) / (len(ours) + len(theirs)))
        for name, values in scores.items():
            expected[name].append(max(values))
    metric = load_metric("rouge")
    values = metric.per_example(predictions=predictions, references=references)
    results = metric.compute(predictions=predictions, references=references)
    for name, row in expected.items():
        assert values[name] == pytest.approx(row)
        assert results[name] == pytest.approx(sum(row) / len(row))
        assert 0.1 < results[name] < 0.95


def test_an_answer_is_one_of_several():
    predictions = ["a , b", "c", "", "#### 1", "x #### 2 y #### 3", "Paris"]
    references = [["x", "a,b"], ["b"], ["d"], ["1", "#### 01"], ["#### 5", "so #### 3"], ["paris"]]
    metric = load_metric("answer_match")
    values = [1, 0, 0, 0, 0, 0]
    assert metric.per_example(predictions=predictions, references=references)["answer_match"] == values
    assert metric.compute(predictions=predictions, references=references) == {"answer_match": 1 / 6}
    metric = load_metric("answer_match", pattern=r"####\s*(\S+)")
    assert metric.per_example(predictions=predictions, references=references)["answer_match"] == [0, 0, 0, 0, 1, 0]
    # Where no answer is to be found, none is right.
    assert metric.compute(predictions=["a"], references=[["a"]]) == {"answer_match": 0.0}


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("(", r"pattern='\(' is no regular expression"),
        ("a", "pattern='a' has no group: put brackets around the answer"),
    ],
)
def test_a_pattern_that_finds_no_answer_is_refused(pattern, message):
    with pytest.raises(ValueError, match=message):
        load_metric("answer_match", pattern=pattern).check()


@pytest.mark.parametrize(
    ("name", "library", "extra"),
    [
        ("bleu", "sacrebleu", "translation"),
        ("chrf", "sacrebleu", "translation"),
        ("rouge", "rouge-score", "translation"),
    ],
)
def test_without_its_library_a_metric_says_what_to_install(name, library, extra, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=rf"needs the library {library}: pip install 'xlm-hf\[{extra}\]'"):
        load_metric(name)
