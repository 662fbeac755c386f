"""Star graphs: find the path from a source to a goal in a tree of arms that share one centre.

The task of Bachmann and Nagarajan, "The pitfalls of next-token prediction" (ICML 2024), with the asymmetric variants of
Patel et al., "Insertion language models" (arXiv 2505.05755). There arms of different lengths pass *through* the centre.
So the source need not be the centre, and only the far end of an arm shows whether to follow it.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset, DatasetDict, Features, List, Value

from xlm_hf.modules.checked_options import Count, Interval, PositiveInt, Share, check_value, checked
from xlm_hf.modules.counter_random import uniform
from xlm_hf.tasks import Task
from xlm_hf.tasks.blanks import with_blanks
from xlm_hf.tasks.cache import Prepared, cached
from xlm_hf.tasks.corpora import UNUSED, content_key, local_files, locate
from xlm_hf.tasks.correction import with_sources
from xlm_hf.tasks.readers import rows
from xlm_hf.tasks.tokenizers import NUMBER_TOKENS, number_tokenizer

# Part of the cache key: raise it with every change that makes other graphs or other columns from the same settings.
GENERATOR_VERSION = 2


# Graphs drawn at a time: enough for the share of repeats to mean something, and few enough for memory.
_MIN_ROUND = 1_000
_MAX_ROUND = 100_000


@checked
def star_graphs(
    name: str,
    degree: PositiveInt,
    min_arm_length: Annotated[int, Interval("[2, inf)")],
    max_arm_length: Annotated[int, Interval("[2, inf)")],
    min_plan_length: PositiveInt,
    num_labels: PositiveInt,
    path_format: Literal["edges", "nodes"] = "edges",
    blank_rate: Share | None = None,
    edit_rate: Share | None = None,
    num_train: PositiveInt = 50_000,
    num_validation: PositiveInt = 100,
    num_test: PositiveInt = 5_000,
    path: str | None = None,
    seed: Count = 42,
    cache_dir: str | os.PathLike | None = None,
) -> Task:
    """Star graphs as a seq2seq task: prompt = shuffled edges, source and goal; target = the path between the two.

    Arm i is a directed path of l_i ~ U{min_arm_length..max_arm_length} nodes. All arms share one node, the centre,
    which is number j_i ~ U{0..l_i - min_plan_length - 1} of arm i, so each arm goes on for at least `min_plan_length`
    edges after it. Source and goal are the ends of arm 0. Labels are drawn without replacement. A classical star, whose
    source is the centre, is the special case min_arm_length = max_arm_length = min_plan_length + 1.

    No two examples of the three splits are the same graph: the same set of edges, source and goal. The test split holds
    the first graphs drawn, validation the next and train the rest. So the number of training examples does not change
    the tests.

    Args:
        name: of the task and of its cache folder.
        degree: the number of arms.
        min_arm_length: the fewest nodes of an arm, the centre included.
        max_arm_length: the most nodes of an arm, the centre included.
        min_plan_length: the fewest edges of an arm after the centre.
        num_labels: of the nodes, 0 .. num_labels - 1.
        path_format: "edges" writes the path a-b-c as `a b b c`, "nodes" as `a b c`.
        blank_rate: makes it an infill task, see `with_blanks`; None leaves the whole path to be written.
        edit_rate: makes it a correction task, see `xlm_hf.tasks.correction.with_sources`.
        num_train: examples of the train split; `num_validation` and `num_test` are those of the others.
        path: a file or folder of graphs as they were published, in place of the generator: columns `edge_list`,
            `source`, `goal` and `path`. Of the settings only `num_labels` and those after it count. Sets that a source
            lacks are drawn from its training graphs, of each at most a twentieth.
        seed: of the generator; the same seed gives the same graphs on every machine.
        cache_dir: see `xlm_hf.tasks.cache.cached`.

    Raises:
        ValueError: for settings that no graph, or not enough distinct graphs, can meet, and for a file that holds none.
    """
    settings = {"degree": degree, "min_arm_length": min_arm_length, "max_arm_length": max_arm_length}
    settings |= {"min_plan_length": min_plan_length, "num_labels": num_labels, "seed": seed}
    sizes = {"test": num_test, "validation": num_validation, "train": num_train}
    (splits, tokenizer), files = _prepared(name, settings, sizes, path_format, path, cache_dir)
    task = Task(name=name, kind="seq2seq", splits=splits, tokenizer=tokenizer, files=files)
    task = task if edit_rate is None else with_sources(task, edit_rate, seed)
    return task if blank_rate is None else with_blanks(task, blank_rate, seed)


def _prepared(
    name: str, settings: dict[str, int], sizes: dict[str, int], path_format: str, path: str | None, cache_dir: Any
) -> tuple[Prepared, Mapping[str, Sequence[Path]]]:
    """The splits, drawn or read, and the files that they were read from."""
    key = {"generator": GENERATOR_VERSION, **settings, "sizes": sizes, "path_format": path_format}
    if path is None:
        _check(settings)
        return cached(name, key, lambda _: _build(settings, sizes, path_format), cache_dir), {}
    files = local_files(source := locate(path, "path"))
    key["path"] = content_key(source)
    return cached(name, key, lambda _: _read(files, settings, sizes, path_format), cache_dir), files


def _build(settings: dict[str, int], sizes: dict[str, int], path_format: str) -> Prepared:
    edges, path = _distinct_graphs(sum(sizes.values()), **settings)
    ends = np.cumsum(list(sizes.values()))
    splits = {
        split: _to_dataset(edges[end - size : end], path[end - size : end], path_format)
        for (split, size), end in zip(sizes.items(), ends, strict=True)
    }
    return DatasetDict(splits), number_tokenizer(settings["num_labels"])


def _read(
    files: Mapping[str, Sequence[Path]], settings: dict[str, int], sizes: dict[str, int], path_format: str
) -> Prepared:
    """The splits of published graphs."""
    if not files:
        raise ValueError("Star graphs are read from a file or folder: download the data set, and name it as path.")
    graphs = {
        split: [
            _graph(where, row, settings["num_labels"], path_format) for file in named for where, row in _rows_of(file)
        ]
        for split, named in files.items()
        if split != UNUSED
    }
    train = graphs.get("train", [])
    order = uniform(settings["seed"], torch.arange(len(train))).argsort().tolist()
    for split in ("test", "validation"):
        if split not in graphs:
            drawn = max(1, min(sizes[split], len(train) // 20))
            graphs[split], order = [train[i] for i in sorted(order[:drawn])], order[drawn:]
    graphs["train"] = [train[i] for i in sorted(order)]
    if empty := [split for split, found in graphs.items() if not found]:
        raise ValueError(f"There are too few star graphs for a split {empty[0]!r}: provide it, or more graphs.")
    ids = List(Value("int32"))
    kinds = Features({"example_id": Value("int64"), "prompt_ids": ids, "target_ids": ids})
    columns = {
        split: {
            "example_id": range(len(found)),
            "prompt_ids": [p for p, _ in found],
            "target_ids": [t for _, t in found],
        }
        for split, found in graphs.items()
    }
    splits = {split: Dataset.from_dict(columns[split], kinds) for split in ("train", "validation", "test")}
    return DatasetDict(splits), number_tokenizer(settings["num_labels"])


def _rows_of(file: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for number, row in rows(file, ("edge_list", "source", "goal", "path")):
        yield f"{file}, line {number}", row


def _graph(where: str, row: Mapping[str, Any], num_labels: int, path_format: str) -> tuple[list[int], list[int]]:
    """Token ids of the prompt and of the path."""
    for name, kind in {"edge_list": list[list[int]], "source": int, "goal": int, "path": list[int]}.items():
        check_value(f"{where}: {name}", row.get(name), kind)
    edges, path = [tuple(edge) for edge in row["edge_list"]], row["path"]
    steps = [*pairwise(path)]
    is_path = [*path[:1], *path[-1:]] == [row["source"], row["goal"]] and {*steps} <= {*edges}
    if not is_path or any(len(edge) != 2 for edge in edges):
        raise ValueError(f"{where}: path {path} does not lead along the edges from {row['source']} to {row['goal']}.")
    prompt = [*chain(*edges), row["source"], row["goal"]]
    check_value(f"{where}: a label", prompt, Annotated[list[int], Interval(f"[0, {num_labels})")])
    target = [*chain(*steps)] if path_format == "edges" else path
    return [len(NUMBER_TOKENS) + node for node in prompt], [len(NUMBER_TOKENS) + node for node in target]


def _check(settings: dict[str, int]) -> None:
    shortest, longest = settings["min_arm_length"], settings["max_arm_length"]
    if longest < shortest:
        raise ValueError(f"max_arm_length={longest} must be at least min_arm_length={shortest}: raise it.")
    if settings["min_plan_length"] >= shortest:
        raise ValueError(
            f"min_plan_length={settings['min_plan_length']} does not fit in an arm of {shortest} nodes, which has "
            f"{shortest - 1} edges: lower it to {shortest - 1} or raise min_arm_length."
        )
    needed = _num_nodes(settings["degree"], longest)
    if settings["num_labels"] < needed:
        raise ValueError(
            f"num_labels={settings['num_labels']} is too few for {settings['degree']} arms of up to {longest} nodes "
            f"through one centre, which need {needed} labels: raise num_labels or lower degree or max_arm_length."
        )


def _num_nodes(degree: int, arm_length: int) -> int:
    return degree * (arm_length - 1) + 1


def _distinct_graphs(count: int, seed: int, **settings: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw the first `count` distinct graphs of the seed's sequence (see `_draw_graphs`)."""
    # Every graph takes the same number of uniform draws, so how they fall into rounds does not matter.
    rng = np.random.Generator(np.random.Philox(key=seed))
    edges, path = _draw_graphs(rng, 0, **settings)
    first = np.zeros(0, dtype=np.int64)
    while len(first) < count:
        num_draws = int(np.clip(count - len(first), _MIN_ROUND, _MAX_ROUND))
        new_edges, new_path = _draw_graphs(rng, num_draws, **settings)
        edges, path = np.concatenate([edges[first], new_edges]), np.concatenate([path[first], new_path])
        num_known = len(first)
        first = np.sort(np.unique(_graph_keys(edges, path), return_index=True)[1])
        if len(first) < count and len(first) - num_known < num_draws / 10:
            raise ValueError(
                f"the settings allow too few distinct star graphs: {count} are asked for and only {len(first)} were "
                f"found before nine in ten draws were repeats; raise num_labels or ask for fewer examples."
            )
    return edges[first[:count]], path[first[:count]]


def _draw_graphs(
    rng: np.random.Generator,
    count: int,
    degree: PositiveInt,
    min_arm_length: Annotated[int, Interval("[2, inf)")],
    max_arm_length: Annotated[int, Interval("[2, inf)")],
    min_plan_length: PositiveInt,
    num_labels: PositiveInt,
) -> tuple[np.ndarray, np.ndarray]:
    """Draw graphs, repeats included; -1 fills what a graph does not use.

    Returns:
        edges: int32 (count, degree * (max_arm_length - 1), 2), each graph's edges in shuffled order, then the filling.
        path: int32 (count, max_arm_length), the nodes of arm 0.
    """
    num_edges = _num_nodes(degree, max_arm_length) - 1
    draws = rng.random((count, 2 * degree + num_labels + num_edges))
    u_length, u_centre, u_label, u_edge = np.split(draws, np.cumsum([degree, degree, num_labels]), axis=1)
    length = min_arm_length + np.floor(u_length * (max_arm_length - min_arm_length + 1)).astype(np.int32)
    centre = np.floor(u_centre * (length - min_plan_length)).astype(np.int32)

    # Number 0 of the shuffled labels is the centre; the other positions of the arms take the next ones in turn.
    position = np.arange(max_arm_length)
    offset = 1 + (max_arm_length - 1) * np.arange(degree)[:, None]
    slot = np.where(position == centre[..., None], 0, offset + position - (position > centre[..., None]))
    labels = np.argsort(u_label, axis=1, kind="stable").astype(np.int32)
    nodes = np.take_along_axis(labels, slot.reshape(count, degree * max_arm_length), axis=1).reshape(slot.shape)
    nodes[position >= length[..., None]] = -1

    edges = np.stack([nodes[..., :-1], nodes[..., 1:]], axis=-1).reshape(count, num_edges, 2)
    is_filling = edges[..., 1] < 0
    edges[is_filling] = -1
    order = np.argsort(np.where(is_filling, 1.0, u_edge), axis=1, kind="stable")
    return np.take_along_axis(edges, order[..., None], axis=1), nodes[:, 0]


def _goal(path: np.ndarray) -> np.ndarray:
    return np.take_along_axis(path, (path >= 0).sum(axis=1, keepdims=True) - 1, axis=1)


def _graph_keys(edges: np.ndarray, path: np.ndarray) -> np.ndarray:
    """One opaque value per graph, equal if and only if the set of edges, the source and the goal are."""
    codes = np.sort(edges.astype(np.int64) @ np.array([1 << 32, 1]), axis=1)
    key = np.ascontiguousarray(np.concatenate([codes, path[:, :1], _goal(path)], axis=1))
    return key.view(np.dtype((np.void, key.itemsize * key.shape[1])))[:, 0]


def _to_dataset(edges: np.ndarray, path: np.ndarray, path_format: str) -> Dataset:
    prompt = np.concatenate([edges.reshape(len(edges), -1), path[:, :1], _goal(path)], axis=1)
    if path_format == "edges":
        steps = np.stack([path[:, :-1], path[:, 1:]], axis=-1)
        steps[steps[..., 1] < 0] = -1
        path = steps.reshape(len(path), -1)
    example_id = pa.array(np.arange(len(path), dtype=np.int64))
    return Dataset.from_dict({"example_id": example_id, "prompt_ids": _ragged(prompt), "target_ids": _ragged(path)})


def _ragged(labels: np.ndarray) -> pa.ListArray:
    """Token ids of the non-negative entries of each row."""
    used = labels >= 0
    offsets = np.concatenate([[0], np.cumsum(used.sum(axis=1))]).astype(np.int32)
    return pa.ListArray.from_arrays(offsets, labels[used] + np.int32(len(NUMBER_TOKENS)))
