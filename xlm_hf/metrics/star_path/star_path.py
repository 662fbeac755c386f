"""Share of predictions that are a path from source to goal in the graph of their prompt."""

import itertools

import datasets
import evaluate

PADDING = -100


class StarPath(evaluate.Metric):
    """star_path = share of predictions that follow edges of the prompt's graph from its source to its goal.

    In edge form a prediction is `a b b c c d`: each pair is an edge and starts where the one before it ended. In node
    form it is `a b c d`: every two neighbours are an edge.

    Args:
        predictions (list[list[int]]): lists of token ids; -100 is padding and is dropped.
        prompts (list[list[int]]): token ids `u v` for every edge, then source and goal; -100 is padding and is dropped.
        path_format (str): "edges" if a prediction writes the path a-b-c as `a b b c`, "nodes" if as `a b c`.

    Returns:
        star_path (float): share of predictions that follow edges of the graph from source to goal.
    """

    def _info(self):
        tokens = datasets.List(datasets.Value("int64"))
        features = datasets.Features({"predictions": tokens, "prompts": tokens})
        return evaluate.MetricInfo(description=__doc__, citation="", inputs_description=self.__doc__, features=features)

    def per_example(self, predictions, prompts, path_format="edges"):
        """1 or 0 for each example."""
        if path_format not in ("edges", "nodes"):
            raise ValueError(f"unknown path_format {path_format!r}: choose 'edges' or 'nodes'.")
        paths = []
        for row, (prediction, prompt) in enumerate(zip(predictions, prompts, strict=True)):
            prediction = [token for token in prediction if token != PADDING]
            prompt = [token for token in prompt if token != PADDING]
            if len(prompt) < 4 or len(prompt) % 2:
                raise ValueError(
                    f"prompt {row} has {len(prompt)} tokens: give `u v` of one or more edges, then source and goal."
                )
            nodes = _nodes_of_edges(prediction) if path_format == "edges" else prediction
            paths.append(int(_is_path(nodes, prompt)))
        return {"star_path": paths}

    def _compute(self, predictions, prompts, path_format="edges"):
        if not predictions:
            raise ValueError("no predictions to score: star_path needs at least one.")
        paths = self.per_example(predictions, prompts, path_format=path_format)["star_path"]
        return {"star_path": sum(paths) / len(paths)}


def _nodes_of_edges(tokens):
    """Nodes a, b, c, d of the chained edges `a b b c c d`; none if the tokens are not chained edges."""
    if not tokens or len(tokens) % 2 or tokens[1:-1:2] != tokens[2::2]:
        return []
    return tokens[::2] + tokens[-1:]


def _is_path(nodes, prompt):
    *pairs, source, goal = prompt
    edges = set(zip(pairs[::2], pairs[1::2], strict=True))
    return bool(nodes) and nodes[0] == source and nodes[-1] == goal and edges.issuperset(itertools.pairwise(nodes))
