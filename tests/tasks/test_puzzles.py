"""Every puzzle has the answer that its generator gives, and its checker knows a right answer from a wrong one."""

import importlib
import itertools
import random
import re
from collections import Counter
from pathlib import Path
from random import Random

import pytest
from datasets import Dataset

from xlm_hf.building import compose
from xlm_hf.metrics import load_metric
from xlm_hf.tasks import load_task
from xlm_hf.tasks.puzzles import puzzle

ROOT = Path(__file__).parent.parent.parent
PUZZLES = ["addition", "countdown", "graph_colouring", "maze", "n_queens", "sorting", "sudoku"]
FEW = {"num_train": 12, "num_validation": 3, "num_test": 4}


def module_of(name):
    return importlib.import_module(f"xlm_hf.tasks.{name}")


def drawn(name, count, **options):
    """Prompts and answers of the generator, as words."""
    generate = getattr(module_of(name), name).generate
    return [generate(Random(number), **options) for number in range(count)]


def check(name, prompt, answer):
    prompt, answer = (words.split() if isinstance(words, str) else words for words in (prompt, answer))
    return module_of(name).check(prompt, answer)


@pytest.mark.parametrize("name", PUZZLES)
def test_a_puzzle_as_a_task(name, tmp_path):
    task = load_task(name, **FEW, cache_dir=tmp_path)
    more = load_task(name, **{**FEW, "num_train": 20}, cache_dir=tmp_path)
    assert {split: len(data) for split, data in task.splits.items()} == {"train": 12, "validation": 3, "test": 4}
    # The tests stay what they are, whatever the training set.
    assert all(more.splits[split][:] == task.splits[split][:] for split in ("validation", "test"))
    assert more.splits["train"][:12] == task.splits["train"][:]
    prompts = [tuple(ids) for data in task.splits.values() for ids in data["prompt_ids"]]
    assert len(set(prompts)) == 19
    assert load_task(name, **FEW, seed=1, cache_dir=tmp_path).splits["test"][:] != task.splits["test"][:]

    config = compose("config", ["family=ilm", f"task={name}"]).task
    longest = max(len(ids) for data in task.splits.values() for ids in data["target_ids"])
    assert longest <= config.max_new_tokens
    (spec,) = [spec for spec in config.metrics if not isinstance(spec, str) and spec["name"] == "puzzle"]
    metric = load_metric(spec)
    metric.check()
    test = task.splits["test"]
    texts = {side: [task.tokenizer.decode(ids) for ids in test[f"{side}_ids"]] for side in ("prompt", "target")}
    unknown = {task.tokenizer.unk_token_id}
    assert not any(unknown & set(ids) for ids in [*test["prompt_ids"], *test["target_ids"]])
    result = metric.compute(predictions=texts["target"], prompts=texts["prompt"])
    assert (result["solved"], result["violations"]) == (1, 0)
    for wrong in ("", "nonsense"):
        values = metric.per_example(predictions=[wrong] * 4, prompts=texts["prompt"])
        assert values["solved"] == [0] * 4
        assert min(values["violations"]) > 0 or name == "maze"


@pytest.mark.parametrize("name", PUZZLES)
def test_one_changed_word_too_many_or_too_few_is_never_a_solution_of_a_puzzle_with_one(name):
    """Of puzzles with several solutions a changed answer may be another one; then nothing is violated."""
    rng = random.Random(0)
    for prompt, answer in drawn(name, 8):
        place = rng.randrange(len(answer))
        other_words = [word for word in answer if word != answer[place]] or ["x"]
        changed = [*answer[:place], rng.choice(other_words), *answer[place + 1 :]]
        for other in (changed, answer[:-1], [*answer, answer[-1]]):
            result = check(name, prompt, other)
            assert result["solved"] in (0, 1)
            if name != "maze":
                assert (result["solved"] == 1) == (result["violations"] == 0)
            if name in ("addition", "sorting", "sudoku", "countdown"):
                assert result["solved"] == 0 or name == "countdown"
        assert check(name, prompt, answer[:-1])["solved"] == 0
        assert check(name, prompt, [*answer, answer[-1]])["solved"] == 0


@pytest.mark.parametrize("name", PUZZLES)
def test_a_puzzle_is_small(name):
    assert len((ROOT / "xlm_hf" / "tasks" / f"{name}.py").read_text().splitlines()) < 120
    assert len((ROOT / "configs" / "task" / f"{name}.yaml").read_text().splitlines()) < 15


def solutions(grid):
    """All solutions of a sudoku, the plain way."""
    empty = [cell for cell in range(81) if grid[cell] == "0"]
    if not empty:
        return [grid]
    allowed = []
    for cell in empty:
        row, column = divmod(cell, 9)
        seen = {
            grid[other]
            for other in range(81)
            if other // 9 == row or other % 9 == column or (other // 27, other % 9 // 3) == (row // 3, column // 3)
        }
        allowed.append((sorted(set("123456789") - seen), cell))
    digits, cell = min(allowed, key=lambda pair: len(pair[0]))
    return [found for digit in digits for found in solutions([*grid[:cell], digit, *grid[cell + 1 :]])]


@pytest.mark.parametrize(("low", "high"), [(30, 40), (26, 27)])
def test_a_sudoku_has_one_solution_and_as_many_givens_as_asked_for(low, high):
    counts = Counter()
    for prompt, answer in drawn("sudoku", 12, min_givens=low, max_givens=high):
        assert solutions(prompt) == [answer]
        counts[sum(digit != "0" for digit in prompt)] += 1
    assert low <= min(counts) <= max(counts) <= high
    assert len(counts) > 1


def test_violations_of_a_sudoku():
    prompt, answer = drawn("sudoku", 1)[0]
    given, free = (next(cell for cell in range(81) if (prompt[cell] != "0") == is_given) for is_given in (True, False))
    same_row = next(cell for cell in range(9 * (given // 9), 81) if prompt[cell] == "0")
    changed = answer.copy()
    changed[free] = answer[free + 1 if free % 9 < 8 else free - 1]
    # The digit of the cell is missing in its row, column and box.
    assert check("sudoku", prompt, changed) == {"solved": 0, "violations": 3}
    changed = answer.copy()
    changed[given], changed[same_row] = answer[same_row], answer[given]
    assert check("sudoku", prompt, changed)["violations"] >= 1 + 2
    assert check("sudoku", prompt, [*answer, "1"]) == {"solved": 0, "violations": 1}
    assert check("sudoku", prompt, []) == {"solved": 0, "violations": 243}
    swapped = [{"1": "2", "2": "1"}.get(digit, digit) for digit in answer]
    assert check("sudoku", prompt, swapped)["violations"] == sum(digit in "12" for digit in prompt)


def test_an_empty_cell_may_be_a_blank(tmp_path):
    task = load_task("sudoku", **FEW, blank="[MASK]", cache_dir=tmp_path)
    assert task.kind == "infill"
    for row in task.splits["train"]:
        given, whole = (task.tokenizer.convert_ids_to_tokens(row[name]) for name in ("input_ids", "target_ids"))
        assert 30 <= sum(word != "[MASK]" for word in given) <= 40
        assert solutions([word.replace("[MASK]", "0") for word in given]) == [whole]


@pytest.mark.parametrize("suffix", ["parquet", "jsonl", "csv"])
def test_a_file_of_puzzles_is_the_test_set(suffix, tmp_path):
    rows = [("".join(prompt), "".join(answer)) for prompt, answer in drawn("sudoku", 3)]
    # A column of digits must not be read as numbers, which have no leading zeros.
    data = Dataset.from_dict({"quizzes": [prompt for prompt, _ in rows], "solutions": [answer for _, answer in rows]})
    file = tmp_path / f"published.{suffix}"
    {"parquet": data.to_parquet, "jsonl": data.to_json, "csv": data.to_csv}[suffix](file)
    task = load_task("sudoku", **FEW, test_path=str(file), cache_dir=tmp_path)
    decoded = [
        tuple(task.tokenizer.decode(row[name]).replace(" ", "") for name in ("prompt_ids", "target_ids"))
        for row in task.splits["test"]
    ]
    assert decoded == rows
    assert len(task.splits["train"]) == 12
    with pytest.raises(ValueError, match=r"has no column 'puzzle'|cannot be read with the columns puzzle, sol"):
        load_task("sudoku", **FEW, test_path=str(file), test_columns=["puzzle", "solutions"], cache_dir=tmp_path)
    with pytest.raises(ValueError, match=r"test_path='none.csv' is no file"):
        load_task("sudoku", **FEW, test_path="none.csv", cache_dir=tmp_path)


def test_every_placement_of_few_queens_is_checked():
    boards = list(itertools.product(range(4), repeat=4))
    right = [board for board in boards if check("n_queens", [".", ".", ".", "."], list(map(str, board)))["solved"]]
    assert right == [(1, 3, 0, 2), (2, 0, 3, 1)]
    assert check("n_queens", ". . . .", "0 1 2 3") == {"solved": 0, "violations": 6}
    assert check("n_queens", "1 . . .", "2 0 3 1") == {"solved": 0, "violations": 1}
    assert check("n_queens", ". . . .", "1 x 0 2") == {"solved": 0, "violations": 1}
    for prompt, answer in drawn("n_queens", 20):
        assert 1 <= sum(word != "." for word in prompt) <= 4
        assert all(given in (".", word) for given, word in zip(prompt, answer, strict=True))


def test_colourings_of_a_triangle_and_of_what_is_drawn():
    triangle = list("011202")
    colourings = [words for words in itertools.product("012", repeat=3) if colour(triangle, words)["solved"]]
    assert sorted(colourings) == sorted(itertools.permutations("012"))
    assert colour(triangle, "000") == {"solved": 0, "violations": 3}
    assert colour(triangle, "01") == {"solved": 0, "violations": 1}
    assert colour(triangle, "017") == {"solved": 0, "violations": 1}
    assert colour(triangle, "0121") == {"solved": 0, "violations": 1}
    for prompt, answer in drawn("graph_colouring", 20):
        edges = {frozenset(edge) for edge in zip(prompt[::2], prompt[1::2], strict=True)}
        assert len(edges) == 24
        assert sorted(Counter(answer).values()) == [4, 4, 4]
        exchanged = [{"0": "1", "1": "0"}.get(word, word) for word in answer]
        assert check("graph_colouring", prompt, exchanged)["solved"]


def colour(prompt, answer):
    return module_of("graph_colouring").check(prompt, list(answer), num_nodes=3, num_colours=3)


def test_a_countdown_is_calculated():
    prompt = list("7,3,12,2:33")
    # Some of many ways.
    for answer in ("7-2=5,12-5=7", "12*3=36,7-2=5,36-5=31"):
        assert check("countdown", prompt, list(answer))["solved"] == 0
    assert check("countdown", list("7,3,12,2:30"), list("12*3=36,7*2=14,36-14=22"))["violations"] == 1
    assert check("countdown", list("7,3,12,2:22"), list("12*3=36,7*2=14,36-14=22")) == {"solved": 1, "violations": 0}
    assert check("countdown", list("7,3:10"), list("7+3=11"))["solved"] == 0
    assert check("countdown", list("7,3:10"), list("5+5=10"))["solved"] == 0
    assert check("countdown", list("7,3:7"), list("7+3=10,10-3=7"))["solved"] == 0
    assert check("countdown", list("6,4:2"), list("4/6=2"))["solved"] == 0
    for prompt, answer in drawn("countdown", 40):
        numbers, goal = "".join(prompt).split(":")
        left = Counter(map(int, numbers.split(",")))
        assert left.total() == 4
        for step in "".join(answer).split(","):
            a, sign, b, c = re.fullmatch(r"(\d+)([-+*/])(\d+)=(\d+)", step).groups()
            assert eval(f"{a}{sign}{b}") == int(c) > 0
            for number in (a, b):
                assert left[int(number)] > 0
                left[int(number)] -= 1
            left[int(c)] += 1
        assert +left == Counter([int(goal)])
        assert int(goal) <= 100


def paths(prompt, longest):
    """All walks from start to goal of at most so many moves, by trying everything."""
    rows = "".join(prompt).split("/")
    (start,) = [(r, row.index("S")) for r, row in enumerate(rows) if "S" in row]
    found, walks = [], [((), start)]
    for _ in range(longest):
        longer = []
        for moves, (r, c) in walks:
            for move, (down, right) in {"U": (-1, 0), "D": (1, 0), "L": (0, -1), "R": (0, 1)}.items():
                y, x = r + down, c + right
                if 0 <= y < len(rows) and 0 <= x < len(rows) and rows[y][x] != "#":
                    longer.append(((*moves, move), (y, x)))
                    if rows[y][x] == "G":
                        found.append((*moves, move))
        walks = longer
        if found:
            break
    return found


def test_a_path_through_a_maze_is_a_shortest_one():
    several = 0
    for prompt, answer in drawn("maze", 30, size=3, num_loops=2):
        shortest = paths(prompt, 12)
        assert tuple(answer) in shortest
        several += len(shortest) > 1
        for moves in shortest:
            assert check("maze", prompt, list(moves)) == {"solved": 1, "reached": 1, "violations": 0}
        back = {"U": "D", "D": "U", "L": "R", "R": "L"}[answer[0]]
        detour = [answer[0], back, *answer]
        assert check("maze", prompt, detour) == {"solved": 0, "reached": 1, "violations": 0}
        assert check("maze", prompt, answer[:-1]) == {"solved": 0, "reached": 0, "violations": 0}
    assert several
    prompt = list("S.G/###/...")
    assert check("maze", prompt, list("DRR")) == {"solved": 0, "reached": 0, "violations": 1}
    # The end of a row is not the beginning of the next, and the map has edges.
    assert check("maze", list("S#./.#G/..."), list("L"))["violations"] == 1
    assert check("maze", list("S#G/.#./..."), list("UDDRRUU"))["violations"] == 1
    assert check("maze", list("S#G/.#./..."), list("DDRRUU"))["solved"] == 1


def test_a_maze_is_connected_and_has_its_loops():
    for prompt, _ in drawn("maze", 10, size=4, num_loops=3):
        rows = "".join(prompt).split("/")
        assert [len(row) for row in rows] == [7] * 7
        cells = sum(rows[r][c] != "#" for r in range(0, 7, 2) for c in range(0, 7, 2))
        passages = sum(rows[r][c] != "#" for r in range(7) for c in range(7) if (r + c) % 2)
        assert cells == 16
        assert passages == 15 + 3
        assert len(module_of("maze")._distances(prompt)) == 16 + 18


def test_sorting_and_addition():
    assert check("sorting", "3 1 1", "1 1 3")["solved"] == 1
    assert check("sorting", "3 1 1", "1 3 1") == {"solved": 0, "violations": 1}
    assert check("sorting", "3 1 1", "1 3") == {"solved": 0, "violations": 1}
    assert check("sorting", "3 1 1", "1 1 2") == {"solved": 0, "violations": 2}
    assert check("addition", list("99+01"), list("100"))["solved"] == 1
    assert check("addition", list("99+01"), list("101")) == {"solved": 0, "violations": 1}
    assert check("addition", list("99+01"), list("10")) == {"solved": 0, "violations": 1}
    for prompt, answer in drawn("addition", 20):
        assert eval("+".join(str(int(number)) for number in "".join(prompt).split("+"))) == int("".join(answer))
    for prompt, answer in drawn("sorting", 20):
        assert list(map(int, answer)) == sorted(map(int, prompt))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("sudoku", {"min_givens": 41}, "min_givens=41 and max_givens=40 must be in order, from 20 to 81"),
        ("n_queens", {"size": 3}, "size=3 must be at least 4"),
        ("graph_colouring", {"num_edges": 49}, "num_edges=49 must be from 1 to 48"),
        ("maze", {"num_loops": 17}, "num_loops from 0 to 16"),
        ("addition", {"num_digits": 1, "num_train": 100}, "104 puzzles .* only 100 different ones were found"),
        ("sorting", {"num_test": 0}, "num_test must be at least 1 and is 0"),
        ("sorting", {"lenght": 3}, "Task 'sorting' has no option 'lenght': did you mean 'length'"),
    ],
)
def test_options_that_do_not_fit_are_refused(name, options, message, tmp_path):
    with pytest.raises(ValueError, match=message.replace("num_loops from", ".*num_loops=17 from")):
        load_task(name, **{"num_validation": 3, "num_test": 1, "num_train": 5, **options}, cache_dir=tmp_path)


def test_a_checker_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match=r"puzzle: the checker 'xlm_hf\.tasks\.sudoku\.chek' cannot be imported"):
        load_metric("puzzle", checker="xlm_hf.tasks.sudoku.chek").check()


def test_a_puzzle_of_ones_own(tmp_path):
    """The options are those of the generator, and a changed option or seed makes another data set."""

    @puzzle(symbols=lambda top, **_: map(str, range(top + 1)))
    def next_number(random, top=30):
        number = random.randrange(top)
        return [str(number)], [str(number + 1)]

    task = next_number("own", num_train=5, num_validation=2, num_test=2, cache_dir=tmp_path)
    for row in task.splits["train"]:
        assert row["target_ids"][0] == row["prompt_ids"][0] + 1
    assert len(task.tokenizer) == 7 + 31
    assert len(next_number("own", 5, 2, 2, top=40, cache_dir=tmp_path).tokenizer) == 7 + 41
