"""A chart of the losses of runs as a PNG, for a paper."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from atlas.errors import AtlasError
from atlas.reporting.runs import Run, chart_data
from atlas.reporting.targets import save_png

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#444444", "#7A6CC9")


def shared_axis(runs: Sequence[Run]) -> str:
    """Return `tokens` if all runs logged tokens, else `step`. Runs with different batch sizes are comparable over
    tokens, not over steps."""
    return "tokens" if all("tokens" in run.axes() for run in runs) else "step"


def draw_losses(path: Path, runs: Sequence[Run], *, axis: str) -> None:
    """Draw the losses of each run over `axis`, as a PNG of 2100 × 1260 pixels: 7 inches at 300 dpi, a page's width.

    The smoothed training loss is drawn over the raw training loss, which has a lighter shade. The validation loss is
    dashed.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    all_series = [chart_data(run)["series"] for run in runs]
    if not any("loss" in series for series in all_series):
        raise AtlasError(
            f"--png {path}: no run has logged a loss yet, so there is nothing to draw: wait until a run logs a loss"
        )
    figure = Figure(figsize=(7, 4.2), dpi=300, layout="constrained")
    axes = figure.add_subplot()
    for run, series, colour in zip(runs, all_series, itertools.cycle(_COLOURS), strict=False):
        # matplotlib leaves out labels that begin with an underscore.
        label = f" {run.name}" if run.name.startswith("_") else run.name
        for key, style in (
            ("loss", {"alpha": 0.25, "linewidth": 0.6}),
            ("smoothed_loss", {"linewidth": 1.5, "label": label}),
            ("val_loss", {"linewidth": 1.2, "linestyle": "--", "marker": "o", "markersize": 2.5}),
        ):
            if key in series:
                values = series[key]["value"]
                dot: dict[str, Any] = {"marker": "o", "markersize": 3} if len(values) == 1 else {}
                axes.plot(series[key][axis], values, color=colour, **style | dot)
    if any("val_loss" in series for series in all_series):
        axes.plot([], [], color="0.4", linestyle="--", marker="o", markersize=2.5, label="validation")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set(xlabel=axis, ylabel="loss (nats per token)")
    axes.grid(color="0.92", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    for text in axes.legend(frameon=False).get_texts():
        text.set_parse_math(False)  # otherwise matplotlib would read a name with two $ as a formula
    save_png("--png", path, figure)
