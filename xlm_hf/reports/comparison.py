"""Tables and plots of several runs: CSV, Markdown with mean and standard deviation, PNG."""

import logging
import math
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from xlm_hf.files import INCOMPLETE_SUFFIX, write_text

logger = logging.getLogger(__name__)

# Endings of what says something of a metric, and is none.
NOT_IN_TABLE = ("/samples", "/seconds", "_standard_error")


# Of a table that a page can hold; the CSV has them all.
MOST_COLUMNS = 10
# Of Okabe and Ito, apart for the colour-blind; each curve has a marker and a line of its own too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS, LINES = "osD^vP*X<", ("-", "--", "-.", ":")
_WORDS = {"step": "training step", "nfe": "forward passes"}


def number(value: float) -> str:
    """Four significant digits; thousands in full; a dash for what is not there."""
    return "-" if pd.isna(value) else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def mean_and_deviation(values: pd.Series) -> str:
    """`mean ± standard deviation` (of the sample, n - 1); the mean alone where the values are equal or only one."""
    deviation = values.std()
    return number(values.mean()) + (f" ± {deviation:.2g}" if deviation > 0 else "")


def summarise(runs: pd.DataFrame, by: list[str], metrics: list[str]) -> pd.DataFrame:
    """Mean and standard deviation of the runs that agree in `by` and task; a column for each metric and task."""
    table = runs.groupby([*by, "task"], sort=False)[metrics].agg(mean_and_deviation).unstack("task", fill_value="-")
    several = runs["task"].nunique() > 1
    table.columns = [f"{task} {metric}" if several else metric for metric, task in table.columns]
    return table.reset_index()


def markdown_table(table: pd.DataFrame) -> str:
    """A table of strings in Markdown, of its first ten columns."""
    table = table.iloc[:, :MOST_COLUMNS]
    lines = [list(table.columns), ["---"] * len(table.columns), *table.to_numpy().tolist()]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def write_tables(folder: Path, name: str, runs: pd.DataFrame, text: str) -> None:
    """Write `NAME.csv`, a line for each run, and `NAME.md`."""
    write_text(folder / f"{name}.csv", runs.to_csv(index=False))
    write_text(folder / f"{name}.md", text)


def _in_words(name: str) -> str:
    evaluation_set, _, metric = name.rpartition("/")
    words = _WORDS.get(metric, metric.replace("_", " "))
    return f"{words} ({evaluation_set})" if evaluation_set else words


def plot(file: Path, points: pd.DataFrame, same: str, x: str, metrics: Sequence[str]) -> None:
    """Draw each metric on each task against `x`: for each family the means of the points that agree in `same`.

    Bars show the standard deviation over seeds; those of a share end at 0 and 1. Without matplotlib nothing is drawn;
    one sentence says how to get it.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        logger.warning('%s is not drawn, for want of matplotlib: pip install "xlm-hf[plots]".', file)
        return
    panels = [(task, metric) for task in points["task"].unique() for metric in metrics]
    if not panels:
        return
    figure, families = Figure(figsize=(6 * len(panels), 4.5), layout="constrained"), list(points["family"].unique())
    for axes, (task, metric) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        found = points[points["task"] == task].dropna(subset=[x, metric])
        bounds = (0.0, 1.0) if found[metric].between(0, 1).all() else (-math.inf, math.inf)
        for family, curve in found.groupby("family", sort=False):
            i = families.index(family)
            means = curve.groupby(same)[[x, metric]].agg(["mean", "std"]).sort_values((x, "mean")).fillna(0)
            mean, std = means[metric, "mean"], means[metric, "std"]
            bars = [std.clip(upper=mean - bounds[0]), std.clip(upper=bounds[1] - mean)]
            style = {"color": COLOURS[i % 7], "marker": MARKERS[i % 9], "linestyle": LINES[i % 4]}
            axes.errorbar(means[x, "mean"], mean, bars, label=family, capsize=2, **style)
        axes.set(title=task, xlabel=_in_words(x), ylabel=_in_words(metric))
        axes.grid(alpha=0.3)
        seeds = found["seed"].nunique()
        title = f"mean and standard deviation over {seeds} seeds" if seeds > 1 else "one seed"
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=3, title=title)
    staging = file.with_name(file.name + INCOMPLETE_SUFFIX)
    figure.savefig(staging, format="png", dpi=120)
    staging.replace(file)
