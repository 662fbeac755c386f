"""Write the tables and the plot of benchmarks/results/speed/README.md from benchmarks/results/speed/*.json.

    python -m benchmarks.tables

Each table stands between `<!-- NAME -->` and `<!-- end -->`; the text around them stays. The plot needs matplotlib.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path

from benchmarks.measure import ROOT
from benchmarks.run import RESULTS

PAGE = RESULTS / "README.md"
PLOT = ROOT / "docs" / "assets" / "speed.png"


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _mebibytes(value: int | None) -> str:
    return "" if value is None else f"{value / 2**20:,.0f}"


def training(records: list[dict]) -> str:
    """Seconds, ratios, share of the matrix-product rate, and the memory that came with the steps."""
    header = ["setting", "family", "ours, s", "dense / ours", "plain / ours", "Gflop", "share of product rate"]
    header += ["MiB, ours", "MiB, dense", "MiB, plain"]
    return _table(
        header,
        [
            [r["setting"], r["family"], _number(r["cpu_seconds"]["ours"])]
            + [_number(r["ratios"][f"{name}/ours"]) for name in ("dense", "plain")]
            + [_number(r["operations"] / 1e9), f"{r['share_of_matrix_product_rate']:.0%}"]
            + [_mebibytes(r.get("step_bytes", {}).get(name)) for name in ("ours", "dense", "plain")]
            for r in records
        ],
    )


def generation(records: list[dict]) -> str:
    """Seconds, ratios, passes and tokens a second."""
    header = ["setting", "family", "rows x tokens", "ours, s", "dense / ours", "plain / ours", "NFE", "tokens / s"]
    return _table(
        [*header, "Gflop", "share of product rate", "repetitions"],
        [
            [r["setting"], r["family"], f"{r['rows']} x {r['length']}", _number(r["cpu_seconds"]["ours"])]
            + [_number(r["ratios"].get(f"{name}/ours")) for name in ("dense", "plain")]
            + [_number(r["nfe"]), _number(r["tokens_per_second"]), _number(r["operations"] / 1e9)]
            + [f"{r['share_of_matrix_product_rate']:.0%}", str(len(r["samples"]["ours"]))]
            for r in records
        ],
    )


def collation(records: list[dict]) -> str:
    """Examples a second."""
    names = ("ours", "plain", "dense")
    return _table(
        ["setting", "family", *(f"{name}, examples / s" for name in names)],
        [[r["setting"], r["family"], *(_number(r["examples_per_second"].get(n)) for n in names)] for r in records],
    )


def preparation(records: list[dict]) -> str:
    """Imports and data sets."""
    imports, examples = records[0]["import_cpu_seconds"], records[1]["examples_per_second"]
    rows = [[f"`{name}`", f"{seconds:.2f} s"] for name, seconds in imports.items()]
    rows += [[f"star easy, {name}", f"{_number(speed)} examples / s"] for name, speed in examples.items()]
    return _table(["what", "CPU time"], rows)


def ablation(records: list[dict]) -> str:
    """Seconds of each rung, and how many times faster than the one above it."""
    rows = []
    for r in records:
        ours = {"ours": r["cpu_seconds"]["ours"]}
        rungs = list(({n: s for n, s in r["cpu_seconds"].items() if n != "ours"} | ours).items())
        for number, (name, seconds) in enumerate(rungs):
            gained = f"{rungs[number - 1][1] / seconds:.2f}" if number else ""
            what = [f"{r['what']}: {r['setting']}", r["family"]] if number == 0 else ["", ""]
            rows.append([*what, name, _number(seconds), gained])
    return _table(["what", "family", "rung", "CPU seconds", "times faster"], rows)


TABLES: dict[str, Callable[[list[dict]], str]] = {
    function.__name__: function for function in (training, generation, collation, preparation, ablation)
}


def renew(page: str, folder: Path) -> str:
    """The page with every table for which there are results, and what they were measured on, made anew."""
    for name, table in TABLES.items():
        file = folder / f"{name}.json"
        if not file.exists():
            continue
        result = json.loads(file.read_text())
        rates = sorted(result[key] for key in ("matrix_product_gflops", "matrix_product_gflops_at_the_end"))
        source = (
            f"Commit {result['commit']}, {result['device']}, matrix product at {rates[0]:.0f} to {rates[1]:.0f} "
            f"Gflop/s; `python -m benchmarks.run {name}`."
        )
        body = f"<!-- {name} -->\n{table(result['records'])}\n\n{source}\n<!-- end -->"
        page, found = re.subn(rf"<!-- {name} -->.*?<!-- end -->", lambda _, b=body: b, page, flags=re.DOTALL)
        if found != 1:
            raise ValueError(f"{PAGE.name} has {found} marks for the table {name!r}: it must have one.")
    return page


def draw(folder: Path, file: Path) -> None:
    """Draw how many times longer the references take, in training and in generation."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6), layout="constrained")
    for axes, name in zip(figure.subplots(1, 2), ("training", "generation"), strict=True):
        records = [r for r in json.loads((folder / f"{name}.json").read_text())["records"] if r["ratios"]]
        heights = range(len(records), 0, -1)
        for reference, colour, marker in (("dense", "#D55E00", "s"), ("plain", "#0072B2", "o")):
            ratios = [r["ratios"][f"{reference}/ours"] for r in records]
            axes.scatter(ratios, heights, color=colour, marker=marker, label=f"{reference} / ours", zorder=2)
        axes.set_yticks(heights, [f"{r['setting']}: {r['family'].upper()}" for r in records], fontsize=7)
        axes.set_xscale("log")
        axes.set_xticks(ticks := [1, 2, 4, 8, 16], [str(tick) for tick in ticks])
        axes.axvline(1, color="black", linewidth=0.8)
        axes.grid(alpha=0.3)
        axes.set(title=name, xlabel="CPU seconds of a reference / ours")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=2)
    figure.savefig(file, dpi=110)


if __name__ == "__main__":
    draw(RESULTS, PLOT)
    PAGE.write_text(renew(PAGE.read_text(), RESULTS))
