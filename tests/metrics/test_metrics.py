import inspect
import random
import re
from pathlib import Path

import evaluate
import numpy as np
import pytest
from omegaconf import OmegaConf

import xlm_hf.metrics
from xlm_hf.metrics import load_metric
from xlm_hf.metrics.exact_match.exact_match import ExactMatch
from xlm_hf.metrics.star_path.star_path import StarPath

ROOT = Path(xlm_hf.metrics.__file__).parent
FOLDERS = sorted(readme.parent for readme in ROOT.glob("*/README.md"))
README_BLOCKS = [
    pytest.param(block, id=f"{folder.name}-{number}")
    for folder in FOLDERS
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL))
]


def random_rows(rng, count):
    """Ragged predictions and references that often agree, with padding anywhere."""

    def padded(tokens):
        tokens = list(tokens)
        for _ in range(rng.randrange(3)):
            tokens.insert(rng.randrange(len(tokens) + 1), -100)
        return tokens

    references = [[rng.randrange(3) for _ in range(rng.randint(1, 4))] for _ in range(count)]
    predictions = [
        ref[: rng.randint(0, 5)] if rng.random() < 0.7 else [rng.randrange(3) for _ in range(rng.randint(0, 5))]
        for ref in references
    ]
    return predictions, references, [padded(p) for p in predictions], [padded(r) for r in references]


@pytest.mark.parametrize("block", README_BLOCKS)
def test_readme_examples_run(block):
    assert "assert" in block
    exec(compile(block, "README.md", "exec"), {})


def test_every_metric_has_a_readme_with_an_example():
    modules = {path.parent for path in ROOT.glob("*/*.py") if path.stem == path.parent.name}
    assert set(FOLDERS) == modules
    assert {block.id.rsplit("-", 1)[0] for block in README_BLOCKS} == {folder.name for folder in FOLDERS}


def test_exact_match_and_token_accuracy_against_loops():
    predictions, references, padded_predictions, padded_references = random_rows(random.Random(0), 500)
    matches, accuracies = 0, []
    for prediction, reference in zip(predictions, references, strict=True):
        matches += len(prediction) == len(reference) and all(p == r for p, r in zip(prediction, reference, strict=True))
        right = 0
        for i in range(len(reference)):
            right += i < len(prediction) and prediction[i] == reference[i]
        accuracies.append(right / len(reference))
    assert 0.1 < matches / 500 < 0.9
    for inputs in (
        {"predictions": predictions, "references": references},
        {"predictions": padded_predictions, "references": padded_references},
    ):
        assert load_metric("exact_match").compute(**inputs) == {"exact_match": matches / 500}
        assert load_metric("token_accuracy").compute(**inputs)["token_accuracy"] == pytest.approx(np.mean(accuracies))


def test_a_prediction_that_stops_early_or_runs_on_is_no_match():
    result = load_metric("exact_match").compute(
        predictions=[[1], [1, 2, 3], [], [1, 2]], references=[[1, 2], [1, 2], [1, 2], [1, 2]]
    )
    assert result == {"exact_match": 0.25}


# 1 -> 2 -> 3 -> 4 and 0 -> 2 -> 5; source 1, goal 4
PROMPT = [2, 5, 1, 2, 3, 4, 0, 2, 2, 3, 1, 4]


@pytest.mark.parametrize(
    ("edges", "nodes", "is_path"),
    [
        ([1, 2, 2, 3, 3, 4], [1, 2, 3, 4], True),
        ([1, 2, 2, 3], [1, 2, 3], False),  # stops before the goal
        ([2, 3, 3, 4], [2, 3, 4], False),  # starts after the source
        ([0, 2, 2, 3, 3, 4], [0, 2, 3, 4], False),  # from another root
        ([1, 2, 2, 5], [1, 2, 5], False),  # to another leaf
        ([1, 4], [1, 4], False),  # no edge
        ([4, 3, 3, 2, 2, 1], [4, 3, 2, 1], False),  # backwards
        ([1, 2, 2, 3, 3, 4, 4, 4], [1, 2, 3, 4, 4], False),  # goes on
        ([1, 2, 0, 2, 3, 4], [1, 2, 0, 2, 3, 4], False),  # edges that do not chain
        ([1, 2, 3, 4], [1, 3, 4], False),  # one is missing
        ([1, 2, 2, 3, 3], [1], False),  # odd
        ([], [], False),
    ],
)
def test_star_path(edges, nodes, is_path):
    metric = load_metric("star_path")
    assert metric.compute(predictions=[edges], prompts=[PROMPT]) == {"star_path": is_path}
    assert metric.compute(predictions=[[-100, *edges, -100]], prompts=[[-100, *PROMPT]]) == {"star_path": is_path}
    assert load_metric("star_path", path_format="nodes").compute(predictions=[nodes], prompts=[PROMPT]) == {
        "star_path": is_path
    }


def test_star_path_is_a_share_and_accepts_another_right_path():
    diamond = [1, 2, 2, 4, 1, 3, 3, 4, 1, 4]
    paths = [[1, 2, 2, 4], [1, 3, 3, 4], [1, 2, 3, 4]]
    assert load_metric("star_path").compute(predictions=paths, prompts=[diamond] * 3) == {"star_path": 2 / 3}


def test_star_path_in_edge_form_takes_whole_edges_only():
    loop_at_goal = [1, 4, 4, 4, 1, 4]
    paths = [[1, 4], [1, 4, 4, 4], [1, 4, 4]]
    assert load_metric("star_path").compute(predictions=paths, prompts=[loop_at_goal] * 3) == {"star_path": 2 / 3}


def test_inputs_can_be_seen_in_the_features():
    assert set(load_metric("exact_match").features) == {"predictions", "references"}
    assert set(load_metric("token_accuracy").features) == {"predictions", "references"}
    metric = load_metric("star_path")
    assert set(metric.features) == {"predictions", "prompts"}
    path = [1, 2, 2, 3, 3, 4]
    assert metric.compute(predictions=[path], prompts=[PROMPT], references=[path]) == {"star_path": 1.0}


def test_arrays_and_batches_are_accepted():
    metric = load_metric("exact_match")
    padded = np.array([[1, 2, -100], [3, -100, -100]])
    assert metric.compute(predictions=padded, references=[[1, 2], [4]]) == {"exact_match": 0.5}
    for prediction in ([1, 2], [3]):
        metric.add_batch(predictions=[prediction], references=[[1, 2]])
    assert metric.compute() == {"exact_match": 0.5}


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_the_folder_works_alone(folder, tmp_path):
    text = (folder / f"{folder.name}.py").read_text()
    assert "xlm_hf" not in text
    copy = tmp_path / folder.name
    copy.mkdir()
    (copy / f"{folder.name}.py").write_text(text)
    ours = load_metric(folder.name)
    inputs = {name: [PROMPT, PROMPT] for name in ours.features}
    expected = ours.compute(**inputs)
    for other in (
        evaluate.load(str(copy)),
        load_metric(str(copy)),
        load_metric(str(copy / f"{folder.name}.py")),
        load_metric({"name": str(copy)}),
    ):
        assert type(other).__module__.startswith("evaluate_modules.")
        assert other.compute(**inputs) == expected
        assert other.features == ours.features


def test_options_become_defaults_of_compute():
    for metric in (
        load_metric("star_path", path_format="nodes"),
        load_metric({"name": "star_path", "path_format": "nodes"}),
        load_metric({"name": "star_path", "path_format": "edges"}, path_format="nodes"),
        load_metric({"_target_": "xlm_hf.metrics.star_path.star_path.StarPath", "path_format": "nodes"}),
        load_metric(OmegaConf.create({"f": "nodes", "m": {"name": "star_path", "path_format": "${f}"}}).m),
    ):
        inputs = {"predictions": [[1, 2, 3, 4]], "prompts": [PROMPT]}
        assert isinstance(metric, StarPath)
        assert metric.keep_in_memory
        assert metric.compute(**inputs) == {"star_path": 1.0}
        assert metric.compute(**inputs, path_format="edges") == {"star_path": 0.0}


def test_shipped_names_give_the_importable_class():
    assert type(load_metric("exact_match")) is ExactMatch
    assert all("keep_in_memory" in inspect.signature(type(load_metric(f.name))).parameters for f in FOLDERS)


@pytest.mark.parametrize(
    ("metric", "options", "message"),
    [
        ("exact_mtch", {}, r"unknown metric 'exact_mtch', .* did you mean 'exact_match'\?"),
        ("no/such/folder", {}, r"unknown metric 'no/such/folder', which is neither a shipped one nor the path"),
        ("star_path", {"pathformat": "nodes"}, r"unknown option 'pathformat' of metric 'star_path'.*'path_format'\?"),
        ({"name": "exact_match", "k": 1}, {}, r"unknown option 'k' of metric 'exact_match': there are none"),
        ({"path_format": "nodes"}, {}, r"needs `name` or `_target_`; this one has the keys \['path_format'\]"),
        ({"_target_": "no_such.Metric"}, {}, r"target 'no_such.Metric' cannot be imported"),
    ],
)
def test_unknown_metrics_and_options_are_refused(metric, options, message):
    with pytest.raises(ValueError, match=message) as error:
        load_metric(metric, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "inputs", "message"),
    [
        ("exact_match", {"predictions": [], "references": []}, "no predictions to score"),
        ("token_accuracy", {"predictions": [], "references": []}, "no predictions to score"),
        ("star_path", {"predictions": [], "prompts": []}, "no predictions to score"),
        ("token_accuracy", {"predictions": [[1], [1]], "references": [[1], [-100]]}, "reference 1 has no tokens"),
        ("star_path", {"predictions": [[1]], "prompts": [[1, 2, 1]]}, "prompt 0 has 3 tokens"),
        ("star_path", {"predictions": [[1]], "prompts": [[1, 2, 1, 2]], "path_format": "x"}, "unknown path_format 'x'"),
        ("exact_match", {"predictions": [[1], [2]], "references": [[1]]}, "Mismatch in the number"),
        ("star_path", {"predictions": [[1]]}, "inputs are missing"),
    ],
)
def test_bad_inputs_are_refused_and_the_metric_still_works(name, inputs, message):
    metric = load_metric(name)
    with pytest.raises(ValueError, match=message):
        metric.compute(**inputs)
    assert metric.compute(**{n: [PROMPT] for n in metric.features}) == {name: 0.0 if name == "star_path" else 1.0}
