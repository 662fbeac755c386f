"""Tables and plots of several runs: CSV, Markdown with mean and standard deviation, PNG."""

import csv
import io
import logging
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from xlm_hf.checkpoints import INCOMPLETE_SUFFIX, write_text

logger = logging.getLogger(__name__)

# For each label the points of its curve: x, and y of each seed.
Curves = Mapping[str, Sequence[tuple[float, Sequence[float]]]]


def write_csv(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write one line for each row; the columns are all keys in the order of their first appearance."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(file, text.getvalue())


def markdown_table(rows: Sequence[Mapping[str, str]]) -> str:
    """A Markdown table whose columns are all keys in the order of their first appearance; a gap is a dash."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [columns, ["---"] * len(columns), *([row.get(name, "-") for name in columns] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def number(value: float) -> str:
    """Four significant digits; thousands in full."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def mean_and_deviation(values: Sequence[float]) -> str:
    """`mean ± standard deviation` (of the sample, n - 1); the mean alone where the values are equal or only one."""
    mean = number(statistics.fmean(values))
    return f"{mean} ± {statistics.stdev(values):.2g}" if len(set(values)) > 1 else mean


def summary_rows(
    rows: Sequence[Mapping[str, Any]], by: Sequence[str], across: str, metrics: Iterable[str]
) -> list[dict[str, str]]:
    """Mean and standard deviation of the rows that agree in `by`, a column for each metric and value of `across`."""
    several = len({row[across] for row in rows}) > 1
    summaries: dict[tuple, dict[str, str]] = {}
    for name in metrics:
        for row in rows:
            group = tuple(row[key] for key in by)
            summary = summaries.setdefault(group, {key: str(row[key]) for key in by})
            same = [other for other in rows if tuple(other[key] for key in by) == group]
            values = [other[name] for other in same if other[across] == row[across] and name in other]
            if values:
                summary[f"{row[across]} {name}" if several else name] = mean_and_deviation(values)
    return list(summaries.values())


def plot(file: Path, panels: Mapping[str, Curves], x_label: str, log_x: bool = False) -> bool:
    """Draw a panel for each title: a line through the means, with the standard deviation over seeds as bars.

    Returns:
        whether it was drawn; without matplotlib nothing is, and one sentence says how to get it.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        logger.warning('%s is not drawn, for want of matplotlib: pip install "xlm-hf[plots]".', file)
        return False
    figure = Figure(figsize=(6 * len(panels), 4), layout="constrained")
    for axes, (title, curves) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for label, points in curves.items():
            x = [point for point, _ in points]
            means = [statistics.fmean(values) for _, values in points]
            deviations = [statistics.stdev(values) if len(values) > 1 else 0.0 for _, values in points]
            axes.errorbar(x, means, yerr=deviations, label=label, marker="o", markersize=3, capsize=2)
        axes.set(xlabel=x_label, ylabel=title, xscale="log" if log_x else "linear")
        axes.grid(alpha=0.3)
        axes.legend()
    staging = file.with_name(file.name + INCOMPLETE_SUFFIX)
    figure.savefig(staging, format="png", dpi=120)
    staging.replace(file)
    return True
