"""The plots, as SVG."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot as plt

from benchmarks.contenders import HAND_WRITTEN
from benchmarks.databases import KINDS
from benchmarks.entrants import POOL_SIZE
from benchmarks.results import Results, Row
from benchmarks.statistics import spread
from benchmarks.tables import DATABASES, TITLES

mpl.rcParams.update(
    {
        "svg.hashsalt": "repom",  # the same results give the same file
        "svg.fonttype": "none",  # text that can be searched, and a small file
        "font.family": "sans-serif",
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "figure.facecolor": "white",  # also on a dark page
    }
)

_REPOM, _OTHER = "#1f6feb", "#b6bcc4"


def ratios(results: Results, path: Path) -> None:
    """CPU time of every contender on FastAPI, to hand-written code: a panel for each case."""
    rows = [row for row in results.rows if row.host == "fastapi" and row.contender != HAND_WRITTEN]
    panels = [
        (case, database)
        for case in ("nothing", "select", "insert")
        for database in KINDS
        if any((row.case, row.database) == (case, database) for row in rows)
    ]
    figure, axes = _grid(len(panels), width=4.2, height=2.8)
    for axis, (case, database) in zip(axes, panels, strict=False):
        shown = [row for row in rows if (row.case, row.database) == (case, database)]
        _bars(axis, [row for row in reversed(shown) if not row.error])
        axis.set_title(TITLES[case] + (f", {DATABASES[database]}" if case != "nothing" else ""))
    figure.supxlabel("CPU time of a request, hand-written code = 1; grey: the null")
    _save(figure, path)


def _bars(axis: Any, rows: list[Row]) -> None:
    values = [row.ratios["cpu"].median for row in rows]
    colors = [_REPOM if row.contender.startswith("repom") else _OTHER for row in rows]
    bars = axis.barh([row.contender for row in rows], values, color=colors)
    axis.bar_label(bars, [f"{value:.2f}" for value in values], padding=3)
    doubt = max((spread(row.null["cpu"]) for row in rows), default=0)
    axis.axvspan(1 - doubt, 1 + doubt, color="#8b949e", alpha=0.35, linewidth=0)
    axis.axvline(1, color="#24292f", linewidth=0.8)
    axis.margins(x=0.15)


def growth(results: Results, path: Path) -> None:
    """Requests a second by how many are in flight, to hand-written code: a panel a database."""
    rows = [row for row in results.rows if row.case == "growth" and row.host == "fastapi"]
    databases = [kind for kind in KINDS if any(row.database == kind for row in rows)]
    figure, axes = _grid(len(databases), width=4.6, height=3.4)
    for axis, database in zip(axes, databases, strict=False):
        mine = [row for row in rows if row.database == database and not row.error]
        for name in dict.fromkeys(row.contender for row in mine):
            line = [row for row in mine if row.contender == name and _is_shown(row)]
            ours, hand = name.startswith("repom"), name == HAND_WRITTEN
            axis.plot(
                [row.concurrency for row in line],
                [1 / row.ratios["wall"].median for row in line],
                label=name,
                marker="o",
                markersize=3,
                linewidth=2 if ours or hand else 1,
                color=_REPOM if ours else "#24292f" if hand else None,
                linestyle="--" if hand else ":" if name != "repom" and ours else "-",
            )
        levels = sorted({row.concurrency for row in mine})
        axis.set_xscale("log")
        axis.set_xticks(levels, [str(level) for level in levels])
        axis.minorticks_off()
        axis.set_ylim(bottom=0)
        axis.set_title(f"one SELECT, {DATABASES[database]}, pool of {POOL_SIZE}")
        axis.set_xlabel("requests in flight")
        axis.set_ylabel("requests a second, hand-written code = 1")
    if databases:
        axes[len(databases) - 1].legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=7)
    _save(figure, path)


def _is_shown(row: Row) -> bool:
    return row.contender != HAND_WRITTEN or (row.environment == "repom" and not row.again)


def _grid(count: int, *, width: float, height: float) -> tuple[Any, list[Any]]:
    columns = min(3, max(count, 1))
    lines = -(-max(count, 1) // columns)
    figure, axes = plt.subplots(
        lines,
        columns,
        figsize=(width * columns, height * lines),
        squeeze=False,
        layout="constrained",
    )
    flat = list(axes.flat)
    for axis in flat[count:]:
        axis.set_axis_off()
    return figure, flat


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
