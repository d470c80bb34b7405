"""`atlas report`: the records of runs on one page."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from atlas.cli.terminal import say

_SECONDS = 5
"""Between two updates of a live report."""


def report(
    runs: Annotated[
        list[str], typer.Argument(help="Output folders of runs, or their metrics.jsonl.", metavar="RUN...")
    ],
    output: Annotated[str, typer.Option(help="The HTML file to write.")] = "report.html",
    png: Annotated[
        str | None,
        typer.Option(help="Also draw the losses as a PNG for a paper; needs matplotlib.", metavar="FILE"),
    ] = None,
    live: Annotated[
        bool,
        typer.Option("--live", help=f"Update it every {_SECONDS} seconds until the runs end or Ctrl-C."),
    ] = False,
) -> None:
    """Write an HTML file with the curves, configs, samples and results of runs, which opens without a network.

    Several runs are drawn over each other, by step, tokens or time.
    """
    from atlas.reporting.figure import draw_losses, shared_axis
    from atlas.reporting.report import write_report
    from atlas.reporting.runs import read_runs
    from atlas.reporting.targets import check_png, check_target

    page = Path(output)
    check_target("--output", page, "an HTML page", ".html", ".htm")
    if png:
        check_png("--png", Path(png))
    found = read_runs(runs)
    if live:
        say(f"{page} is updated every {_SECONDS} seconds until the run ends; Ctrl-C stops it earlier")
        try:
            # An unknown run, on another machine, may continue.
            while any(run.state in ("running", "unknown") for run in found):
                write_report(page, found, refresh=_SECONDS)
                time.sleep(_SECONDS)
                for run in found:
                    run.refresh()
        except KeyboardInterrupt:
            say("no longer updated")
    write_report(page, found)
    typer.echo(f"report: {page}")
    if png:
        axis = shared_axis(found)
        draw_losses(Path(png), found, axis=axis)
        typer.echo(f"figure: {png}, by {axis}")
