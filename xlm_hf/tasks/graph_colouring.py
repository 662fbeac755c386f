"""Graph colouring: a colour for every node, so that no edge joins two nodes of one colour."""

from itertools import combinations
from random import Random

from xlm_hf.modules.checked_options import PositiveInt
from xlm_hf.tasks.puzzles import Puzzle, puzzle


@puzzle(symbols=lambda num_nodes, num_colours, **_: map(str, range(max(num_nodes, num_colours))))
def graph_colouring(
    random: Random, num_nodes: PositiveInt = 12, num_colours: PositiveInt = 3, num_edges: PositiveInt = 24
) -> Puzzle:
    """The edges `u v` in random order; the answer is the colour of every node.

    The nodes get colours at random, as evenly as can be, and the edges are drawn between nodes of different colours. So
    there is a colouring, and with every one there are those with the colours exchanged.

    Args:
        num_nodes: of the graph.
        num_colours: that may be used.
        num_edges: of the graph; the more, the fewer colourings.
    """
    colours = [node % num_colours for node in range(num_nodes)]
    random.shuffle(colours)
    allowed = [edge for edge in combinations(range(num_nodes), 2) if colours[edge[0]] != colours[edge[1]]]
    if not 0 < num_edges <= len(allowed):
        raise ValueError(
            f"num_edges={num_edges} must be from 1 to {len(allowed)}, the pairs of {num_nodes} nodes of different "
            f"colours: lower it, or raise num_colours."
        )
    edges = [random.sample(edge, 2) for edge in random.sample(allowed, num_edges)]
    return [str(node) for edge in edges for node in edge], list(map(str, colours))


def check(prompt: list[str], answer: list[str], num_nodes: int = 12, num_colours: int = 3) -> dict[str, float]:
    """`violations`: edges within one colour, and nodes that lack a colour or have one too many."""
    known = set(map(str, range(num_colours)))
    colours = {str(node): colour for node, colour in enumerate(answer[:num_nodes]) if colour in known}
    edges = zip(prompt[::2], prompt[1::2], strict=True)
    within = sum(u in colours and colours[u] == colours.get(v) for u, v in edges)
    violations = within + num_nodes - len(colours) + max(0, len(answer) - num_nodes)
    return {"solved": float(not violations), "violations": violations}
