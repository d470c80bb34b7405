"""A report of runs in one HTML file, which needs no network and nothing beside it."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

from atlas.errors import AtlasError
from atlas.reporting.runs import Run, chart_data, samples_by_prompt
from atlas.version import __version__

_STATIC = files("atlas.reporting") / "static"
_UNTOLD = "–"
_MOST_EVENTS_LISTED = 200

STATES = {
    "finished": "finished",
    "running": "running",
    "interrupted": "interrupted",
    "stopped": "ended early",
    "unknown": "written on another machine",
}


def static_file(name: str) -> str:
    """The text of a file of `static/`: `charts.js`, `report.css`, `uplot/uPlot.iife.min.js`, …"""
    return _STATIC.joinpath(*name.split("/")).read_text(encoding="utf-8")


def write_report(path: Path, runs: Sequence[Run], *, refresh: int | None = None) -> None:
    """Put the report of `runs` at `path`, whole or not at all. With `refresh` the page reloads itself after so many
    seconds. Raises `AtlasError` where it cannot be written."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(render(runs, refresh=refresh), encoding="utf-8", errors="replace")
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise AtlasError(
            f"--output {path}: cannot be written ({error.strerror or error}): name another file"
        ) from None


def render(runs: Sequence[Run], *, refresh: int | None = None) -> str:
    """The page."""
    names = ", ".join(run.name for run in runs)
    states = ", ".join(dict.fromkeys(STATES[run.state] for run in runs))
    written = time.strftime("%d %B %Y, %H:%M")
    live = f" The page follows the run, every {refresh} seconds." if refresh else ""
    return Template(static_file("report.html")).substitute(
        title=escape(names),
        subtitle=escape(
            f"{states[0].upper()}{states[1:]}. Written on {written} by Atlas {__version__}.{live}"
        ),
        refresh=f'<meta http-equiv="refresh" content="{refresh}">' if refresh else "",
        styles=static_file("uplot/uPlot.min.css") + static_file("report.css"),
        scripts=static_file("uplot/uPlot.iife.min.js") + static_file("charts.js"),
        runs=json_in_html([chart_data(run) for run in runs]),
        sections="\n".join(_sections(runs)),
    )


def json_in_html(value: Any) -> str:
    """JSON for inside a `<script>`, which no text in it can end."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")


def _sections(runs: Sequence[Run]) -> Iterator[str]:
    yield _section("Evaluation", _evaluation(runs) + _notes(runs))
    yield _section("Curves", '<div id="charts"></div>')
    if len(runs) > 1:
        yield _section("Differences of the configs", _differences(runs))
    if any(run.samples for run in runs):
        yield _section("Samples over time", "".join(map(_samples, runs)))
    if any(run.events for run in runs):
        yield _section("Events", "".join(_events(run, is_alone=len(runs) == 1) for run in runs))
    yield _section("Machine and versions", _machine(runs))
    yield _section("Configs", "".join(map(_config, runs)))


def _section(title: str, body: str) -> str:
    return f"<section>\n<h2>{escape(title)}</h2>\n{body}\n</section>"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], *, right: int | None = None) -> str:
    """Rows of HTML, whose first cell names them; from the column `right` on they hold numbers."""
    if not rows:
        return ""

    def cell(tag: str, place: int, content: str) -> str:
        number = ' class="number"' if right is not None and place >= right else ""
        return f"<{tag}{number}>{content}</{tag}>"

    header = "".join(cell("th", place, escape(name)) for place, name in enumerate(head))
    body = "\n".join(
        "<tr>" + "".join(cell("td" if place else "th", place, c) for place, c in enumerate(row)) + "</tr>"
        for row in rows
    )
    kind = "facts" if right is None else "figures"
    return f'<div class="scroll {kind}"><table><thead><tr>{header}</tr></thead><tbody>{body}</tbody></table></div>'


# The sections


def _evaluation(runs: Sequence[Run]) -> str:
    head = (
        "Run",
        "",
        "Steps",
        "Tokens",
        "Time",
        "Training loss",
        "Validation",
        "Perplexity",
        "Bits per byte",
    )
    return _table((*head, "Best validation"), [_evaluation_row(run) for run in runs], right=2)


def _evaluation_row(run: Run) -> list[str]:
    state = run.state
    axes, _ = run.axes()
    loss = run.records("train")["loss"]
    series = chart_data(run)["series"]
    smoothed = series.get("smoothed_loss", {"value": []})["value"]
    tokens, seconds = (float(axes[axis][-1]) if axis in axes else None for axis in ("tokens", "time"))
    row = [
        escape(run.name),
        f'<span class="state {state}">{escape(STATES[state])}</span>',
        f"{run.last_step:,}",
        _UNTOLD if tokens is None else _large(tokens),
        _UNTOLD if seconds is None else duration(seconds),
        f"{smoothed[-1]:.4f}"
        if smoothed and np.isfinite(loss[-1])
        else "not finite"
        if loss.size
        else _UNTOLD,
    ]
    evaluations = run.evaluations()
    if evaluations is None:
        return [*row, *[_UNTOLD] * 4]
    last, best = evaluations
    return [
        *row,
        f"{last['val_loss']:.4f}",
        _figure(last["val_perplexity"], ",.2f"),
        _figure(last["bits_per_byte"], ".4f"),
        f"{best['val_loss']:.4f} at step {best['step']:,.0f}",
    ]


def _notes(runs: Sequence[Run]) -> str:
    notes = [
        "The training loss is smoothed. Bits per byte compare models with different tokenizers; losses do not."
    ]
    for run in runs:
        if run.evaluations() is None:
            notes.append(
                f"{run.name} was not evaluated: it has no validation data, or has not come that far."
            )
        loss = run.records("train")["loss"]
        if num_bad := int((~np.isfinite(loss)).sum()):
            notes.append(
                f"{run.name}: the loss of {num_bad:,} of {loss.size:,} records is not a finite number; the curves and "
                "figures leave it out."
            )
        if run.unreadable:
            notes.append(f"{run.unreadable:,} lines of {run.metrics_path} are no records and are left out.")
    return "".join(f'<p class="aside">{escape(note)}</p>' for note in notes)


def differences(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """The settings that the runs do not share, with each run's value; a setting that a config does not name is –."""
    known = [run for run in runs if run.config]
    keys = dict.fromkeys(key for run in known for key in run.config)
    rows = []
    for key in keys:
        values = [_value(run.config[key]) if key in run.config else _UNTOLD for run in runs]
        if len({value for run, value in zip(runs, values, strict=True) if run.config}) > 1:
            rows.append((key, values))
    return rows


def _differences(runs: Sequence[Run]) -> str:
    rows = [[f"<code>{escape(key)}</code>", *map(escape, values)] for key, values in differences(runs)]
    missing = "".join(_no_config(run) for run in runs if not run.config)
    alike = '<p class="aside">The configs are the same.</p>' if not rows and not missing else ""
    return _table(("Setting", *(run.name for run in runs)), rows) + alike + missing


def _no_config(run: Run) -> str:
    return f'<p class="aside">The config of {escape(run.name)} is not known: {escape(str(run.config_problem))}.</p>'


def _samples(run: Run) -> str:
    parts = [f"<h3>{escape(run.name)}</h3>"] if run.samples else []
    for number, (prompt, texts) in enumerate(samples_by_prompt(run).items()):
        rows = "".join(
            f'<dt>step {step:,}</dt><dd><span class="prompt">{escape(prompt)}</span>'
            f"{escape(_continuation(prompt, text))}</dd>"
            for step, text in texts
        )
        is_open = "" if number else " open"
        parts.append(
            f"<details{is_open}><summary>{escape(prompt) or 'Without a prompt'}</summary>"
            f'<dl class="sample">{rows}</dl></details>'
        )
    return "".join(parts)


def _continuation(prompt: str, text: str) -> str:
    """The text without the prompt, where it repeats it."""
    return text[len(prompt) :] if text.startswith(prompt) else text


def _events(run: Run, *, is_alone: bool) -> str:
    if not run.events:
        return ""
    found = chart_data(run)["events"][-_MOST_EVENTS_LISTED:]
    rows = [
        [f"{event['step']:,}", duration(event["time"]) if "time" in event else _UNTOLD, escape(event["text"])]
        for event in found
    ]
    left_out = len(run.events) - len(rows)
    note = f'<p class="aside">{left_out:,} more are left out.</p>' if left_out > 0 else ""
    plural = "" if len(run.events) == 1 else "s"
    summary = "" if is_alone else f"{escape(run.name)}: "
    return (
        f"<details{' open' if len(rows) <= 12 else ''}><summary>{summary}{len(run.events):,} event{plural}</summary>"
        + _table(("Step", "Time", "What happened"), rows)
        + note
        + "</details>"
    )


def _machine(runs: Sequence[Run]) -> str:
    starts = [run.start() for run in runs]
    keys = dict.fromkeys(key for start in starts for key in start)
    rows = [
        [escape(key.replace("_", " ").replace(".", ": ")), *(escape(_value(s.get(key))) for s in starts)]
        for key in keys
    ]
    silent = "".join(
        f'<p class="aside">{escape(run.name)} did not write down its machine: it is of an older Atlas.</p>'
        for run, start in zip(runs, starts, strict=True)
        if not start
    )
    return _table(("", *(run.name for run in runs)), rows) + silent


def _config(run: Run) -> str:
    if not run.config:
        return _no_config(run)
    rows = [[f"<code>{escape(key)}</code>", escape(_value(value))] for key, value in run.config.items()]
    return f"<details><summary>{escape(run.name)}</summary>{_table(('Setting', 'Value'), rows)}</details>"


# Values in words


def _value(value: Any) -> str:
    if value is None:
        return _UNTOLD
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, (list, dict)):
        return json.dumps(value, ensure_ascii=False, default=str)
    return str(value)


def _figure(value: float, form: str) -> str:
    return format(value, form) if math.isfinite(value) else _UNTOLD


def _large(value: float) -> str:
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:,.0f}"


def duration(seconds: float) -> str:
    """As in `1 d 2 h`, `3 h 25 min`, `4 min 7 s` or `12 s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days:,} d {hours} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
