"""Mazes: a shortest path from start to goal on a grid with walls."""

from collections import deque
from random import Random

from xlm_hf.modules.checked_options import Count, PositiveInt
from xlm_hf.tasks.puzzles import Puzzle, puzzle

WALL, FREE, START, GOAL = "#", ".", "S", "G"


@puzzle(symbols=lambda size, **_: [WALL, FREE, START, GOAL, "/", "U", "D", "L", "R"])
def maze(random: Random, size: PositiveInt = 5, num_loops: Count = 4) -> Puzzle:
    """The map of a maze, row by row with "/" between rows; the answer is the moves U, D, L, R of a shortest path.

    Of `size` x `size` cells, neighbours have a wall or a passage between them. A random depth-first walk makes a tree
    of passages, and `num_loops` more give a choice of paths. Start and goal are different cells.

    Args:
        size: cells in a row and in a column; the map is 2 size - 1 wide.
        num_loops: walls of the tree that are taken away.
    """
    width = 2 * size - 1
    if size < 2 or not 0 <= num_loops <= (size - 1) ** 2:
        raise ValueError(f"size={size} must be at least 2, and num_loops={num_loops} from 0 to {(size - 1) ** 2}.")
    grid = [[WALL] * width for _ in range(width)]
    cells = [(row, column) for row in range(0, width, 2) for column in range(0, width, 2)]
    path = [random.choice(cells)]
    grid[path[0][0]][path[0][1]] = FREE
    while path:
        row, column = path[-1]
        new = [(r, c) for r, c in cells if abs(r - row) + abs(c - column) == 2 and grid[r][c] == WALL]
        if not new:
            path.pop()
            continue
        path.append(random.choice(new))
        for r, c in (path[-1], ((row + path[-1][0]) // 2, (column + path[-1][1]) // 2)):
            grid[r][c] = FREE
    walls = [(r, c) for r in range(width) for c in range(width) if (r + c) % 2 and grid[r][c] == WALL]
    for r, c in random.sample(walls, num_loops):
        grid[r][c] = FREE
    (r, c), (other_r, other_c) = random.sample(cells, 2)
    grid[r][c], grid[other_r][other_c] = START, GOAL
    prompt = list("/".join(map("".join, grid)))
    moves, step = [], prompt.index(START)
    distance = _distances(prompt)
    while prompt[step] != GOAL:
        move = random.choice(
            [m for m, offset in _moves(prompt).items() if distance.get(step + offset) == distance[step] - 1]
        )
        moves.append(move)
        step += _moves(prompt)[move]
    return prompt, moves


def _moves(prompt: list[str]) -> dict[str, int]:
    """What each move adds to a position in the prompt."""
    line = prompt.index("/") + 1
    return {"U": -line, "D": line, "L": -1, "R": 1}


def _can_go(prompt: list[str], position: int) -> bool:
    return 0 <= position < len(prompt) and prompt[position] not in (WALL, "/")


def _distances(prompt: list[str]) -> dict[int, int]:
    """The number of moves to the goal from every position that can reach it."""
    goal = prompt.index(GOAL)
    distance, queue = {goal: 0}, deque([goal])
    while queue:
        position = queue.popleft()
        for offset in _moves(prompt).values():
            if position + offset not in distance and _can_go(prompt, position + offset):
                distance[position + offset] = distance[position] + 1
                queue.append(position + offset)
    return distance


def check(prompt: list[str], answer: list[str]) -> dict[str, float]:
    """`solved` by a shortest path, `reached` by any; `violations`: moves that are none or go into a wall."""
    position, violations = prompt.index(START), 0
    for move in answer:
        step = position + _moves(prompt).get(move, len(prompt))
        if _can_go(prompt, step):
            position = step
        else:
            violations += 1
    has_reached = not violations and prompt[position] == GOAL
    is_shortest = has_reached and len(answer) == _distances(prompt)[prompt.index(START)]
    return {"solved": float(is_shortest), "reached": float(has_reached), "violations": violations}
