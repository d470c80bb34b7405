"""`atlas report`: write the records of runs as one HTML page."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from atlas.cli.terminal import say
from atlas.files import local_path

_SECONDS = 5
"""Seconds between two updates of a live report."""


def report(
    runs: Annotated[
        list[str], typer.Argument(help="Output folders of runs, or their metrics.jsonl.", metavar="RUN...")
    ],
    output: Annotated[str, typer.Option(help="The HTML file to write.")] = "report.html",
    png: Annotated[
        str | None,
        typer.Option(help="Also draw the losses as a PNG for a paper. Needs matplotlib.", metavar="FILE"),
    ] = None,
    live: Annotated[
        bool,
        typer.Option(
            "--live", help=f"Update the page every {_SECONDS} seconds until the runs end, or until Ctrl-C."
        ),
    ] = False,
) -> None:
    """Write an HTML file with the curves, configs, samples and results of runs. The file needs no network.

    The charts show all runs together, by step, tokens or time.
    """
    from atlas.reporting.figure import draw_losses, shared_axis
    from atlas.reporting.report import write_report
    from atlas.reporting.runs import read_runs
    from atlas.reporting.targets import check_png, check_target

    page = local_path("--output", output)
    image = None if png is None else local_path("--png", png)
    check_target("--output", page, "an HTML page", ".html", ".htm")
    if image:
        check_png("--png", image)
    found = read_runs(runs)
    if live:
        say(f"{page} is updated every {_SECONDS} seconds until the runs end; Ctrl-C ends the updates earlier")
        try:
            # A run of another machine has the state `unknown` and may still be running.
            while any(run.state in ("running", "unknown") for run in found):
                write_report(page, found, refresh=_SECONDS)
                time.sleep(_SECONDS)
                for run in found:
                    run.refresh()
        except KeyboardInterrupt:
            say("the page is no longer updated")
    write_report(page, found)
    typer.echo(f"report: {page}")
    if image:
        axis = shared_axis(found)
        draw_losses(image, found, axis=axis)
        typer.echo(f"figure: {image}, by {axis}")
