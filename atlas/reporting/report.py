"""A report of runs as one HTML file, which needs no network and no other file."""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Iterator, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

from atlas.files import explain_failed_write
from atlas.outputs import replacing_output
from atlas.reporting.runs import Run, chart_data, samples_by_prompt
from atlas.version import __version__

_MISSING = "–"
_MOST_EVENTS_LISTED = 200
_COLUMNS = "Run,,Steps,Tokens,Time,Training loss,Validation,Perplexity,Bits per byte,Best validation"

_STATES = {"stopped": "ended early", "unknown": "written on another machine"}
"""State → its text on the page. For other states, the text is the name of the state."""


def static_file(name: str) -> str:
    """Return the text of a file in `static/`: `charts.js`, `report.css`, `uplot/uPlot.iife.min.js`, …"""
    return files("atlas.reporting").joinpath("static", *name.split("/")).read_text(encoding="utf-8")


def write_report(path: Path, runs: Sequence[Run], *, refresh: int | None = None) -> None:
    """Write the report of `runs` to `path`, completely or not at all. With `refresh`, the page reloads itself every
    `refresh` seconds. Raises `AtlasError` if the file cannot be written."""
    with (
        explain_failed_write(f"--output {path}", "name another file"),
        replacing_output(path) as temporary,
    ):
        temporary.write_text(render(runs, refresh=refresh), encoding="utf-8", errors="replace")


def render(runs: Sequence[Run], *, refresh: int | None = None) -> str:
    """Return the HTML of the report."""
    names = ", ".join(run.name for run in runs)
    states = ", ".join(dict.fromkeys(_STATES.get(run.state, run.state) for run in runs))
    written = f"{time.strftime('%d %B %Y, %H:%M')} by Atlas {__version__}"
    live = f" The page updates itself every {refresh} seconds." if refresh else ""
    return Template(static_file("report.html")).substitute(
        title=escape(names),
        subtitle=escape(f"{states[:1].upper()}{states[1:]}. Written on {written}.{live}"),
        refresh=f'<meta http-equiv="refresh" content="{refresh}">' if refresh else "",
        styles=static_file("uplot/uPlot.min.css") + static_file("report.css"),
        scripts=static_file("uplot/uPlot.iife.min.js") + static_file("charts.js"),
        runs=json_in_html([chart_data(run) for run in runs]),
        sections="\n".join(
            f"<section>\n<h2>{title}</h2>\n{body}\n</section>" for title, body in _sections(runs)
        ),
    )


def json_in_html(value: Any) -> str:
    """Return `value` as JSON for a `<script>` element. No text inside the JSON can close the element."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")


def _sections(runs: Sequence[Run]) -> Iterator[tuple[str, str]]:
    """Yield (title, HTML) of each section."""
    about = "The training loss is smoothed. To compare models with different tokenizers, use bits per byte, not loss."
    notes = map(_aside, itertools.chain([about], *map(_notes, runs)))
    table = _table(_COLUMNS.split(","), list(map(_evaluation_row, runs)), kind="figures")
    yield "Evaluation", table + "".join(notes)
    yield "Curves", '<div id="charts"></div>'
    if len(runs) > 1:
        yield "Differences of the configs", _differences(runs)
    if any(run.samples for run in runs):
        yield "Samples over time", "".join(map(_samples, runs))
    if any(run.events for run in runs):
        yield "Events", "".join(map(_events, runs))
    yield "Machine and versions", _machine(runs)
    yield "Configs", "".join(map(_config, runs))


def _aside(text: str) -> str:
    return f'<p class="aside">{escape(text)}</p>'


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], *, kind: str = "facts") -> str:
    """Return a table in HTML. The cells of `rows` are HTML, and the first cell of a row is its name. In a table of the
    kind `figures`, the third column and all later columns contain numbers."""
    if not rows:
        return ""
    header = "".join(f"<th>{escape(name)}</th>" for name in head)
    cells = [f"<th>{name}</th>" + "".join(f"<td>{cell}</td>" for cell in row) for name, *row in rows]
    body = "\n".join(f"<tr>{row}</tr>" for row in cells)
    return f'<div class="scroll {kind}"><table><thead><tr>{header}</tr></thead><tbody>{body}</tbody></table></div>'


# The sections


def _evaluation_row(run: Run) -> list[str]:
    state, axes = run.state, run.axes()
    losses = run.records("train")["loss"]
    loss = "not finite" if losses.size else _MISSING
    if losses.size and np.isfinite(losses[-1]):
        loss = f"{chart_data(run)['series']['smoothed_loss']['value'][-1]:.4f}"
    last, best = run.evaluations() or ({}, {})
    return [
        escape(run.name),
        f'<span class="state {state}">{escape(_STATES.get(state, state))}</span>',
        f"{run.last_step:,}",
        _large(float(axes["tokens"][-1])) if "tokens" in axes else _MISSING,
        duration(float(axes["time"][-1])) if "time" in axes else _MISSING,
        loss,
        _figure(last.get("val_loss"), ".4f"),
        _figure(last.get("val_perplexity"), ",.2f"),
        _figure(last.get("bits_per_byte"), ".4f"),
        f"{best['val_loss']:.4f} at step {best['step']:,.0f}" if best else _MISSING,
    ]


def _notes(run: Run) -> Iterator[str]:
    if run.evaluations() is None:
        yield f"{run.name} was not evaluated: it has no validation data, or has not reached its first evaluation."
    loss = run.records("train")["loss"]
    if num_bad := int((~np.isfinite(loss)).sum()):
        bad = f"the loss of {num_bad:,} of {loss.size:,} records is not a finite number"
        yield f"{run.name}: {bad}; the curves leave these records out."
    if run.unreadable:
        yield f"{run.unreadable:,} lines of {run.metrics_path} are not records and are left out."


def differences(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Return the settings in which the runs differ, with each run's value. The value is – if a run's config does not
    name the setting."""
    return [
        (key, values)
        for key, values in _side_by_side([run.config for run in runs])
        if len({value for run, value in zip(runs, values, strict=True) if run.config}) > 1
    ]


def _side_by_side(facts: Sequence[dict[str, Any]]) -> list[tuple[str, list[str]]]:
    """Return each key with its value in each of `facts`, as text."""
    keys = dict.fromkeys(itertools.chain(*facts))
    return [(key, [_value(each.get(key)) for each in facts]) for key in keys]


def _differences(runs: Sequence[Run]) -> str:
    rows = [[f"<code>{escape(key)}</code>", *map(escape, values)] for key, values in differences(runs)]
    missing = "".join(_no_config(run) for run in runs if not run.config)
    equal = _aside("The configs are the same.") if not rows and not missing else ""
    return _table(("Setting", *(run.name for run in runs)), rows) + equal + missing


def _no_config(run: Run) -> str:
    return _aside(f"The config of {run.name} is not known: {run.config_problem}.")


def _samples(run: Run) -> str:
    parts = [f"<h3>{escape(run.name)}</h3>"] if run.samples else []
    for number, (prompt, texts) in enumerate(samples_by_prompt(run).items()):
        rows = "".join(
            f'<dt>step {step:,}</dt><dd><span class="prompt">{escape(prompt)}</span>'
            f"{escape(text.removeprefix(prompt))}</dd>"
            for step, text in texts
        )
        parts.append(
            f"<details{'' if number else ' open'}><summary>{escape(prompt) or 'Without a prompt'}</summary>"
            f'<dl class="sample">{rows}</dl></details>'
        )
    return "".join(parts)


def _events(run: Run) -> str:
    if not run.events:
        return ""
    rows = []
    for event in chart_data(run)["events"][-_MOST_EVENTS_LISTED:]:
        time_of = duration(event["time"]) if "time" in event else _MISSING
        rows.append([f"{event['step']:,}", time_of, escape(event["text"])])
    num_events = len(run.events)
    note = (
        _aside(f"{num_events - len(rows):,} earlier events are left out.") if num_events > len(rows) else ""
    )
    summary = f"{escape(run.name)}: {num_events:,} event{'' if num_events == 1 else 's'}"
    table = _table(("Step", "Time", "What happened"), rows)
    opened = " open" if len(rows) <= 12 else ""
    return f"<details{opened}><summary>{summary}</summary>{table}{note}</details>"


def _machine(runs: Sequence[Run]) -> str:
    facts = _side_by_side([run.start() for run in runs])
    rows = [[escape(key.replace("_", " ").replace(".", ": ")), *map(escape, values)] for key, values in facts]
    silent = [run.name for run in runs if not run.start()]
    notes = [_aside(f"{name} did not record its machine: an older Atlas wrote this run.") for name in silent]
    return _table(("", *(run.name for run in runs)), rows) + "".join(notes)


def _config(run: Run) -> str:
    if not run.config:
        return _no_config(run)
    rows = [[f"<code>{escape(key)}</code>", escape(_value(value))] for key, value in run.config.items()]
    return f"<details><summary>{escape(run.name)}</summary>{_table(('Setting', 'Value'), rows)}</details>"


# Values as text


def _value(value: Any) -> str:
    if isinstance(value, (bool, list, dict)):
        return json.dumps(value, ensure_ascii=False, default=str)
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, int) and abs(value) >= 10_000:
        return f"{value:,}"
    return _MISSING if value is None else str(value)


def _figure(value: float | None, form: str) -> str:
    return _MISSING if value is None or math.isnan(value) else format(value, form)


def _large(value: float) -> str:
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:,.0f}"


def duration(seconds: float) -> str:
    """Return a duration as text, such as `1 d 2 h`, `3 h 25 min`, `4 min 7 s` or `12 s`."""
    seconds = round(seconds)
    for unit, length, smaller, part in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if seconds >= length:
            return f"{seconds // length:,} {unit} {seconds % length // part} {smaller}"
    return f"{seconds} s"
