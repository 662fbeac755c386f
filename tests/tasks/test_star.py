import hashlib
import inspect
import itertools
import json
import logging
import os
import re
import subprocess
import warnings
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import load_from_disk
from filelock import FileLock
from scipy.stats import chisquare
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tests.processes import forked
from xlm_hf.tasks import cache, load_task, star, tokenizers

SPECIALS = ["[PAD]", "[CLS]", "[MASK]", "[EOS]", "[BOS]", "[SEP]", "[UNK]"]
SETTINGS = {
    "star_easy": {"degree": 3, "shortest": 5, "longest": 5, "plan": 4, "labels": 20},
    "star_medium": {"degree": 3, "shortest": 3, "longest": 6, "plan": 2, "labels": 20},
    "star_hard": {"degree": 5, "shortest": 6, "longest": 12, "plan": 5, "labels": 56},
}
SMALL = {
    "name": "small",
    "degree": 2,
    "min_arm_length": 3,
    "max_arm_length": 4,
    "min_plan_length": 1,
    "num_labels": 12,
    "path_format": "edges",
    "num_train": 40,
    "num_validation": 5,
    "num_test": 20,
    "seed": 3,
}


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module", params=SETTINGS)
def full(request, cache_dir):
    """One shipped task in full: its settings and, for each split, the (edges, source, goal, target) of every row."""
    task = load_task(request.param, cache_dir=cache_dir)
    graphs = {}
    for split, dataset in task.splits.items():
        rows = zip(dataset["prompt_ids"][:], dataset["target_ids"][:], strict=True)
        graphs[split] = [(*read_prompt(prompt), [token - 7 for token in target]) for prompt, target in rows]
    return SETTINGS[request.param], task, graphs


def read_prompt(prompt_ids):
    *pairs, source, goal = [token - 7 for token in prompt_ids]
    return list(zip(pairs[::2], pairs[1::2], strict=True)), source, goal


def all_paths(edges, node, goal):
    if node == goal:
        return [[node]]
    return [[node, *rest] for u, v in edges if u == node for rest in all_paths(edges, v, goal)]


def junction(edges, degree):
    return next(node for node, count in Counter(u for u, _ in edges).items() if count == degree)


def walks(node, edges):
    """Number of edges of every chain of directed edges that leaves the node."""
    lengths = []
    for following in [v for u, v in edges if u == node]:
        lengths.append(1)
        while beyond := [v for u, v in edges if u == following]:
            (following,) = beyond
            lengths[-1] += 1
    return lengths


def test_every_graph_is_a_star_with_one_path_which_is_the_target(full):
    settings, _, graphs = full
    degree, plan = settings["degree"], settings["plan"]
    for edges, source, goal, target in graphs["train"][:300] + graphs["test"][:100] + graphs["validation"]:
        nodes = {node for edge in edges for node in edge}
        assert nodes <= set(range(settings["labels"]))
        assert len(nodes) == len(edges) + 1  # together with every node hanging on the centre, below: a tree
        out_degree, in_degree = Counter(u for u, _ in edges), Counter(v for _, v in edges)
        assert sorted(out_degree.values())[-2:] == [1, degree]
        centre = junction(edges, degree)
        assert all(count == 1 for node, count in in_degree.items() if node != centre)
        assert in_degree[source] == 0 or source == centre
        assert out_degree[goal] == 0

        paths = all_paths(edges, source, goal)
        assert len(paths) == 1
        assert target == [node for edge in itertools.pairwise(paths[0]) for node in edge]
        assert centre in paths[0]

        before, after = walks(centre, [(v, u) for u, v in edges]), walks(centre, edges)
        assert sum(before) + sum(after) == len(edges)
        assert len(after) == degree
        assert min(after) >= plan
        starts = before + [0] * (degree - len(before))
        assert any(
            all(settings["shortest"] <= b + a + 1 <= settings["longest"] for b, a in zip(order, after, strict=True))
            for order in itertools.permutations(starts)
        )
        path_centre = paths[0].index(centre)
        assert path_centre in starts
        assert len(paths[0]) - 1 - path_centre in after
        assert settings["shortest"] <= len(paths[0]) <= settings["longest"]


def test_lengths_and_centres_follow_their_law(full):
    settings, _, graphs = full
    shortest, longest, degree, plan = (settings[k] for k in ("shortest", "longest", "degree", "plan"))
    lengths = range(shortest, longest + 1)
    rows = graphs["train"]
    seen = Counter()
    for edges, source, _, target in rows:
        path = [source, *target[1::2]]
        seen[len(path), path.index(junction(edges, degree))] += 1
    law = {(n, j): 1 / len(lengths) / (n - plan) for n in lengths for j in range(n - plan)}
    assert set(seen) == set(law)
    if len(law) > 1:
        expected = [law[outcome] * len(rows) for outcome in law]
        assert chisquare([seen[outcome] for outcome in law], expected).pvalue > 1e-4

    prompt_lengths = np.array([2 * len(edges) + 2 for edges, *_ in rows])
    mean = 2 * degree * (np.mean(lengths) - 1) + 2
    error = 2 * np.sqrt(degree * np.var(lengths) / len(rows))
    assert abs(prompt_lengths.mean() - mean) <= 5 * error


@pytest.mark.parametrize(
    ("name", "prompt", "target", "at_junction"),
    [
        ("star_easy", (26, 26, 26.0), (8, 8), 1.0),
        ("star_medium", (14, 32, 23.1), (4, 10), 0.51),
        ("star_hard", (52, 112, 82.2), (10, 22), 0.36),
    ],
)
def test_figures_of_the_published_sets(name, prompt, target, at_junction, cache_dir):
    train = load_task(name, cache_dir=cache_dir).splits["train"].with_format("numpy")
    prompt_lengths = np.array([len(ids) for ids in train["prompt_ids"][:]])
    target_lengths = np.array([len(ids) for ids in train["target_ids"][:]])
    low, high, mean = prompt
    assert low <= prompt_lengths.min() <= prompt_lengths.max() <= high
    # The published figures were measured on some thousand graphs and rounded.
    assert abs(prompt_lengths.mean() - mean) < 0.3
    assert (target_lengths.min(), target_lengths.max()) == target
    degree = SETTINGS[name]["degree"]
    sample = [read_prompt(ids) for ids in train["prompt_ids"][:5000]]
    share = np.mean([source == junction(edges, degree) for edges, source, _ in sample])
    assert abs(share - at_junction) < 0.025


def test_labels_are_uniform_and_edges_shuffled(cache_dir):
    train = load_task("star_easy", cache_dir=cache_dir).splits["train"].with_format("numpy")
    prompts, targets = np.stack(train["prompt_ids"][:]), np.stack(train["target_ids"][:])
    for labels in (prompts[:, -2], prompts[:, -1], prompts[:, 0]):
        assert chisquare(np.bincount(labels - 7, minlength=20)).pvalue > 1e-4
    edges = prompts[:, :-2].reshape(len(prompts), 12, 2)
    for step in (0, 3):
        place = (edges == targets[:, None, 2 * step : 2 * step + 2]).all(axis=2)
        assert (place.sum(axis=1) == 1).all()
        assert chisquare(place.sum(axis=0)).pvalue > 1e-4


def test_no_graph_occurs_twice(full):
    _, task, graphs = full
    assert {split: len(rows) for split, rows in graphs.items()} == {"train": 50_000, "validation": 100, "test": 5_000}
    keys = [(frozenset(edges), source, goal) for rows in graphs.values() for edges, source, goal, _ in rows]
    assert len(set(keys)) == 55_100
    for dataset in task.splits.values():
        assert dataset["example_id"][:] == list(range(len(dataset)))
        assert {name: str(f) for name, f in dataset.features.items()} == {
            "example_id": "Value('int64')",
            "prompt_ids": "List(Value('int32'))",
            "target_ids": "List(Value('int32'))",
        }


def test_repeats_are_replaced_by_the_next_graphs(monkeypatch):
    """Against a slow loop over one long sequence, in a space of 8 * 7 * 6 = 336 graphs."""
    settings = {"degree": 1, "min_arm_length": 3, "max_arm_length": 3, "min_plan_length": 2, "num_labels": 8}
    rng = np.random.Generator(np.random.Philox(key=5))
    first = {}
    for edges, path in zip(*star._draw_graphs(rng, 2000, **settings), strict=True):
        first.setdefault((frozenset(map(tuple, edges.tolist())), path[0], path[-1]), path.tolist())
    monkeypatch.setattr(star, "_MIN_ROUND", 7)
    monkeypatch.setattr(star, "_MAX_ROUND", 60)
    edges, path = star._distinct_graphs(200, seed=5, **settings)
    assert path.tolist() == list(first.values())[:200]
    assert edges.shape == (200, 2, 2)


def test_a_graph_is_the_same_whatever_the_order_of_its_edges():
    edges = np.array([[[1, 2], [2, 3], [2, 4]], [[2, 4], [1, 2], [2, 3]], [[1, 2], [2, 3], [2, 5]]])
    path = np.array([[1, 2, 3], [1, 2, 3], [1, 2, 3]])
    same, shuffled, other = star._graph_keys(edges, path)
    assert same == shuffled != other
    other_goal, other_source = star._graph_keys(edges[:2], np.array([[1, 2, 4], [2, 3, -1]]))
    assert same not in (other_goal, other_source)


def test_too_few_distinct_graphs_are_refused(tmp_path):
    settings = {**SMALL, "degree": 1, "max_arm_length": 3, "min_plan_length": 2, "num_labels": 8, "num_train": 312}
    with pytest.raises(ValueError, match=r"337 are asked for and only 336 were found"):
        star.star_graphs(**settings, cache_dir=tmp_path)
    assert not [p for p in tmp_path.iterdir() if p.is_dir()]


@pytest.mark.parametrize(
    ("name", "digest"),
    [("star_easy", "c28deadfc31fad41"), ("star_medium", "9657574e78624d08"), ("star_hard", "d003b89e13941e8e")],
)
def test_the_graphs_of_a_seed_never_change(name, digest, cache_dir):
    # When these have to change, raise GENERATOR_VERSION: else caches keep the old graphs.
    splits = load_task(name, cache_dir=cache_dir).splits
    rows = [splits[split][:100] for split in ("train", "validation", "test")]
    assert hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16] == digest


def test_the_seed_decides_and_nothing_else(tmp_path):
    def rows(folder, **changes):
        return star.star_graphs(**{**SMALL, **changes}, cache_dir=tmp_path / folder).splits

    splits = rows("a")
    assert all(splits[s][:] == rows("b")[s][:] for s in splits)
    assert splits["test"][:] != rows("a", seed=4)["test"][:]
    longer = rows("a", num_train=200)
    assert longer["test"][:] == splits["test"][:]
    assert longer["validation"][:] == splits["validation"][:]
    assert longer["train"][:40] == splits["train"][:]


def test_path_formats_agree(tmp_path):
    edges = star.star_graphs(**SMALL, cache_dir=tmp_path).splits
    nodes = star.star_graphs(**{**SMALL, "path_format": "nodes"}, cache_dir=tmp_path).splits
    for split in edges:
        for a, b in zip(edges[split], nodes[split], strict=True):
            assert a["prompt_ids"] == b["prompt_ids"]
            path = b["target_ids"]
            assert 3 <= len(path) <= 4
            assert [path[0], path[-1]] == a["prompt_ids"][-2:]
            assert a["target_ids"] == [node for edge in itertools.pairwise(path) for node in edge]


CHANGES = {
    "degree": 3,
    "min_arm_length": 4,
    "max_arm_length": 5,
    "min_plan_length": 2,
    "num_labels": 13,
    "path_format": "nodes",
    "num_train": 41,
    "num_validation": 6,
    "num_test": 21,
    "seed": 4,
    "name": "other",
}


def test_every_parameter_is_in_the_cache_key(tmp_path, monkeypatch):
    assert set(CHANGES) == set(inspect.signature(star.star_graphs).parameters) - {
        "cache_dir",
        "blank_rate",
        "edit_rate",
        "path",
    }

    def folders():
        return {path.name for path in tmp_path.iterdir() if path.is_dir()}

    star.star_graphs(**SMALL, cache_dir=tmp_path)
    for count, (option, value) in enumerate(CHANGES.items(), start=2):
        star.star_graphs(**{**SMALL, option: value}, cache_dir=tmp_path)
        assert len(folders()) == count, option
    monkeypatch.setattr(star, "GENERATOR_VERSION", star.GENERATOR_VERSION + 1)
    star.star_graphs(**SMALL, cache_dir=tmp_path)
    assert len(folders()) == count + 1


@pytest.fixture
def builds(monkeypatch):
    """How many times graphs were generated, as a list of one entry each."""
    calls, original = [], star._distinct_graphs
    monkeypatch.setattr(star, "_distinct_graphs", lambda *a, **k: calls.append(1) or original(*a, **k))
    return calls


def test_the_second_load_reads_the_cache(tmp_path, builds):
    first = star.star_graphs(**SMALL, cache_dir=tmp_path)
    again = star.star_graphs(**SMALL, cache_dir=tmp_path)
    assert len(builds) == 1
    assert all(first.splits[s][:] == again.splits[s][:] for s in first.splits)
    assert first.tokenizer.get_vocab() == again.tokenizer.get_vocab()


def test_where_the_cache_lives(tmp_path, monkeypatch):
    monkeypatch.setenv("XLM_HF_CACHE", str(tmp_path / "chosen"))
    star.star_graphs(**SMALL)
    assert [p.is_dir() for p in (tmp_path / "chosen").glob("small-????????????????")] == [True]
    monkeypatch.delenv("XLM_HF_CACHE")
    monkeypatch.setattr(cache, "HF_HOME", str(tmp_path / "home"))
    star.star_graphs(**SMALL)
    assert [p.is_dir() for p in (tmp_path / "home/xlm_hf").glob("small-????????????????")] == [True]


def halve(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("train/data-00000-of-00001.arrow", halve),
        ("test/data-00000-of-00001.arrow", lambda path: path.write_bytes(b"\0" * path.stat().st_size)),
        ("validation/dataset_info.json", lambda path: path.unlink()),
        ("train/state.json", lambda path: path.write_bytes(b"?" * path.stat().st_size)),
        ("tokenizer.json", halve),
        ("manifest.json", halve),
        ("manifest.json", lambda path: path.unlink()),
    ],
)
def test_a_damaged_cache_is_built_anew(file, damage, tmp_path, builds, caplog):
    expected = {s: d[:] for s, d in star.star_graphs(**SMALL, cache_dir=tmp_path).splits.items()}
    (folder,) = (p for p in tmp_path.iterdir() if p.is_dir())
    damage(folder / file)
    for _ in range(2):
        splits = star.star_graphs(**SMALL, cache_dir=tmp_path).splits
        assert {s: d[:] for s, d in splits.items()} == expected
    assert len(builds) == 2
    assert "cannot be read" in caplog.text
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == [folder.name]


def test_a_cache_cut_between_two_record_batches_is_built_anew(tmp_path):
    """Arrow reads such a file without an error, as a shorter one."""
    star.star_graphs(**{**SMALL, "num_train": 1500}, cache_dir=tmp_path)
    (file,) = tmp_path.glob("*/train/*.arrow")
    reader = pa.ipc.open_stream(file.read_bytes())
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, reader.schema) as writer:
        writer.write_batch(next(reader))
    end_of_stream = 8
    file.write_bytes(sink.getvalue().to_pybytes()[:-end_of_stream])
    assert len(load_from_disk(file.parent)) == 1000
    assert len(star.star_graphs(**{**SMALL, "num_train": 1500}, cache_dir=tmp_path).splits["train"]) == 1500


def test_a_damaged_file_of_the_right_size_is_noticed(tmp_path, builds, caplog):
    load_task("star_easy", num_train=50, num_validation=5, num_test=5, cache_dir=tmp_path)
    builds.clear()
    arrow = next(tmp_path.glob("*/train/*.arrow"))
    content = bytearray(arrow.read_bytes())
    content[len(content) // 2] ^= 1
    arrow.write_bytes(content)
    load_task("star_easy", num_train=50, num_validation=5, num_test=5, cache_dir=tmp_path)
    assert builds
    assert f"train/{arrow.name} is damaged" in caplog.text


def test_what_a_killed_preparation_left_is_removed_by_the_next_one(tmp_path):
    for name in ("running.incomplete", "killed.incomplete"):
        (tmp_path / name).mkdir()
    with FileLock(tmp_path / "running.lock"):
        load_task("star_easy", num_train=50, num_validation=5, num_test=5, cache_dir=tmp_path)
    assert [file.name for file in tmp_path.glob("*.incomplete")] == ["running.incomplete"]


def test_an_interrupted_build_leaves_no_cache(tmp_path, monkeypatch):
    class Full(Exception):
        pass

    def fail(self, path):
        (path / "half").write_text("")
        raise Full

    with monkeypatch.context() as patch:
        patch.setattr(cache.DatasetDict, "save_to_disk", fail)
        with pytest.raises(Full):
            star.star_graphs(**SMALL, cache_dir=tmp_path)
    assert not list(tmp_path.glob("small-????????????????"))
    assert len(star.star_graphs(**SMALL, cache_dir=tmp_path).splits["train"]) == 40
    (folder,) = (p for p in tmp_path.iterdir() if p.is_dir())
    assert not (folder / "half").exists()


def test_two_processes_at_once_build_once(tmp_path):
    script = f"""
import os, pathlib, time
from xlm_hf.tasks import star
root, original = pathlib.Path({str(tmp_path)!r}), star._distinct_graphs
def slow(*args, **kwargs):
    with open(root / "builds", "a") as file:
        file.write("x")
    time.sleep(1)
    return original(*args, **kwargs)
star._distinct_graphs = slow
(root / f"ready-{{os.getpid()}}").touch()
while len(list(root.glob("ready-*"))) < 2:
    time.sleep(0.01)
print(star.star_graphs(**{SMALL!r}, cache_dir=root / "cache").splits["train"][:])
"""
    processes = [
        subprocess.Popen(forked("-c", script), stdout=subprocess.PIPE, text=True, env=os.environ) for _ in range(2)
    ]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert outputs[0] == outputs[1] == f"{star.star_graphs(**SMALL, cache_dir=tmp_path / 'cache').splits['train'][:]}\n"
    assert (tmp_path / "builds").read_text() == "x"


def test_tokenizer(tmp_path):
    tokenizer = tokenizers.number_tokenizer(20)
    assert tokenizer.convert_ids_to_tokens(range(27)) == [*SPECIALS, *map(str, range(20))]
    assert len(tokenizer) == 27
    assert tokenizer("3 19 0 20 [MASK] seven")["input_ids"] == [10, 26, 7, 6, 2, 6]
    assert tokenizer.decode([10, 26, 7]) == " 3 19 0"
    assert tokenizer.decode([4, 10, 3, 0], skip_special_tokens=True) == " 3"
    names = ("pad", "cls", "mask", "eos", "bos", "sep", "unk")
    assert [getattr(tokenizer, f"{name}_token_id") for name in names] == list(range(7))


def test_tokenizer_round_trip_without_a_warning(tmp_path):
    records = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = records.append
    logging.getLogger("transformers").addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            tokenizer = tokenizers.number_tokenizer(20)
            tokenizer.save_pretrained(tmp_path)
            loaded = [cls.from_pretrained(tmp_path) for cls in (PreTrainedTokenizerFast, AutoTokenizer)]
    finally:
        logging.getLogger("transformers").removeHandler(handler)
    assert records == []
    for other in loaded:
        assert other.get_vocab() == tokenizer.get_vocab()
        assert other.special_tokens_map == tokenizer.special_tokens_map
        assert other.decode(other("3 19 0")["input_ids"]) == " 3 19 0"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_labels": 6}, r"num_labels=6 is too few for 2 arms of up to 4 nodes .* need 7 labels: raise num_labels"),
        ({"min_plan_length": 3}, r"min_plan_length=3 does not fit in an arm of 3 nodes.*lower it to 2 or raise"),
        ({"min_plan_length": 0}, r"min_plan_length must be at least 1 and is 0"),
        ({"max_arm_length": 2}, r"max_arm_length=2 must be at least min_arm_length=3"),
        ({"degree": 0}, r"degree must be at least 1 and is 0"),
        ({"num_test": 0}, r"num_test must be at least 1 and is 0"),
        ({"num_train": 1e3}, r"num_train must be an integer and is 1000.0"),
        ({"seed": -1}, r"seed must be at least 0 and is -1"),
        ({"path_format": "node"}, r"path_format must be one of edges, nodes and is 'node'"),
    ],
)
def test_impossible_settings_are_refused_before_any_work(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message) as error:
        star.star_graphs(**{**SMALL, **changes}, cache_dir=tmp_path)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_the_tightest_possible_settings_work(tmp_path):
    task = star.star_graphs(**{**SMALL, "num_labels": 7, "min_plan_length": 2}, cache_dir=tmp_path)
    assert len(task.splits["train"]) == 40


def test_blanks_are_a_share_of_the_path_and_at_least_one(tmp_path):
    whole = star.star_graphs(**SMALL, cache_dir=tmp_path)
    for rate in (0.3, 1e-9, 1.0):
        task = star.star_graphs(**SMALL, blank_rate=rate, cache_dir=tmp_path)
        assert task.kind == "infill"
        shares = []
        for split, rows in task.splits.items():
            for row, graph in zip(rows, whole.splits[split], strict=True):
                assert row["target_ids"] == graph["prompt_ids"] + graph["target_ids"]
                pairs = list(zip(row["input_ids"], row["target_ids"], strict=True))
                blank = [given == task.tokenizer.mask_token_id for given, _ in pairs]
                assert all(given == token for (given, token), hidden in zip(pairs, blank, strict=True) if not hidden)
                start = len(graph["prompt_ids"])
                assert not any(blank[:start])
                assert any(blank)
                shares.append(sum(blank) / (len(blank) - start))
        assert rate - 0.05 < np.mean(shares) < rate + 0.3
        assert {0.3: len(set(shares)) > 2, 1e-9: max(shares) <= 1 / 2, 1.0: min(shares) == 1}[rate]
    with pytest.raises(ValueError, match="blank_rate must be in"):
        star.star_graphs(**SMALL, blank_rate=0.0, cache_dir=tmp_path)


def published(dataset, path_format):
    """Rows as the data set of the paper has them."""
    for prompt, target in zip(dataset["prompt_ids"][:], dataset["target_ids"][:], strict=True):
        edges, source, goal = read_prompt(prompt)
        nodes = [token - 7 for token in target]
        path = [*nodes[::2], nodes[-1]] if path_format == "edges" else nodes
        yield {"edge_list": [list(edge) for edge in edges], "source": source, "goal": goal, "path": path}


@pytest.mark.parametrize("path_format", ["edges", "nodes"])
def test_published_graphs_are_read(path_format, tmp_path):
    options = {**SMALL, "path_format": path_format, "cache_dir": tmp_path / "cache"}
    made = star.star_graphs(**options)
    folder = tmp_path / "published"
    folder.mkdir()
    for split, data in made.splits.items():
        rows = [*published(data, path_format)]
        if split == "test":
            (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        else:
            pq.write_table(pa.Table.from_pylist(rows), folder / f"{split}.parquet")
    task = star.star_graphs(**options, path=str(folder))
    for split, data in made.splits.items():
        for column in ("example_id", "prompt_ids", "target_ids"):
            assert task.splits[split][column][:] == data[column][:]
    assert task.files["train"] == [folder / "train.parquet"]
    # Of a single file, each is in one set.
    drawn = star.star_graphs(**options, path=str(folder / "train.parquet"))
    assert {split: len(data) for split, data in drawn.splits.items()} == {"train": 36, "validation": 2, "test": 2}
    found = [row for data in drawn.splits.values() for row in data["prompt_ids"][:]]
    assert sorted(found) == sorted(made.splits["train"]["prompt_ids"][:])


GRAPH = {"edge_list": [[0, 1], [1, 2]], "source": 0, "goal": 2, "path": [0, 1, 2]}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"edge_list": None}, "line 1: edge_list must be a list of list of integers"),
        ({"edge_list": "0-1"}, "line 1: edge_list must be a list of"),
        ({"source": 1.5}, "line 1: source must be an integer and is 1.5"),
        ({"path": [0, "1", 2]}, "line 1: path must be a list of integers"),
        ({"path": [0, 2]}, "line 1: path [0, 2] does not lead along the edges from 0 to 2"),
        ({"path": []}, "line 1: path [] does not lead along the edges"),
        ({"goal": 1}, "does not lead along the edges from 0 to 1"),
        ({"edge_list": [[0, 1], [1, 2], [3, 12]]}, "line 1: a label must be in [0, 12) and is"),
        ({"edge_list": [[0, 1], [1, 2], [3, 4, 5]]}, "does not lead along the edges"),
        ({}, "There are too few star graphs for a split"),
    ],
)
def test_what_is_no_published_graph_is_said_with_its_line(change, words, tmp_path):
    (tmp_path / "graphs.jsonl").write_text(json.dumps({**GRAPH, **change}) + "\n")
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        star.star_graphs(**SMALL, cache_dir=tmp_path, path=str(tmp_path / "graphs.jsonl"))
    assert "\n" not in str(error.value)
