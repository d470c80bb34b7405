"""What `atlas plan` found, as tables for a person and as one JSON object for a program."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.table import Table

from atlas.cli.terminal import figure, printable
from atlas.planning.advice import GOOD_PASSES, TOKENS_PER_PARAMETER
from atlas.planning.communication import LINK_EFFICIENCY, OVERLAP, Cluster
from atlas.planning.run import SPREAD, Machine, Run, describe_duration
from atlas.planning.scaling import Scaling
from atlas.planning.summary import Summary
from atlas.training.memory.presets import PresetPlan, largest_that_fits

if TYPE_CHECKING:
    from atlas.data import TokenStream

_NARROWEST = 100  # without a terminal: wide enough for every table


@dataclass(frozen=True)
class Report:
    """`text`, `summary` and `scaling` are None where none was named; the presets' summaries stand in the order of the
    presets."""

    machine: Machine
    text: TokenStream | None
    assumes_vocabulary: bool
    summary: Summary | None
    scaling: Scaling | None
    presets: list[PresetPlan]
    preset_summaries: list[Summary]

    @property
    def largest_that_fits(self) -> str | None:
        """The preset."""
        found = largest_that_fits(self.presets)
        return found.name if found else None

    @property
    def largest_for_text(self) -> str | None:
        """The largest preset that fits the machine and for which the text is enough."""
        pairs = zip(self.presets, self.preset_summaries, strict=True)
        enough = [preset for preset, summary in pairs if summary.advice and summary.advice.fits]
        found = largest_that_fits(enough)
        return found.name if found else None


def print_json(report: Report) -> None:
    """Numbers in bytes, seconds, FLOPs and kWh; null where one is not known."""
    machine, text = report.machine, report.text
    content = {
        "machine": {
            "name": machine.name,
            "device": machine.device,
            "memory_bytes": machine.memory,
            "flops_per_second": machine.flops_per_second,
            "flops_per_second_is": machine.rate_is,
            "time_is": machine.time_is,
            "memory_bytes_per_second": machine.bytes_per_second,
            "watts": machine.watts,
        },
        "data": text
        and {
            "folder": text.name,
            "documents": text.num_documents,
            "tokens": text.num_tokens,
            "vocab_size": text.vocab_size,
        },
        "config": report.summary and _as_json(report.summary),
        "scaling": report.scaling and _scaling_as_json(report.scaling),
        "presets": {
            preset.name: _as_json(summary)
            for preset, summary in zip(report.presets, report.preset_summaries, strict=True)
        },
        "largest_preset_that_fits": report.largest_that_fits,
        "largest_preset_for_the_data": report.largest_for_text,
    }
    typer.echo(json.dumps(content, indent=2))


def _as_json(summary: Summary) -> dict[str, Any]:
    model, training = summary.config.model, summary.config.training
    return {
        "vocab_size": model.vocab_size,
        "max_seq_len": model.max_seq_len,
        "parameters": _with_total(summary.parameters),
        "training_memory_bytes": _with_total(summary.training),
        "saving_memory_bytes": summary.snapshot,
        "generating_memory_bytes": _with_total(summary.generating),
        "checkpoint_bytes": summary.checkpoint,
        "output_folder_bytes": summary.output_folder,
        "fits": summary.fits,
        "micro_batch_size": training.sequences_at_once,
        "largest_micro_batch_size": summary.largest_micro_batch,
        **asdict(summary.run),
        "passes": summary.advice and summary.advice.passes,
        "verdict": summary.advice and summary.advice.verdict,
        "what_would_help": summary.remedies,
    }


def _scaling_as_json(scaling: Scaling) -> dict[str, Any]:
    sent = scaling.communication
    return {
        **asdict(scaling.cluster),
        "ranks": scaling.cluster.ranks,
        "parallel": scaling.parallel,
        "shard_size": scaling.shard_size,
        "sequences_of_a_rank": scaling.sequences,
        "micro_batch_size": scaling.sequences_at_once,
        "rank_memory_bytes": _with_total(scaling.memory),
        "fits": scaling.fits,
        "sent_bytes": {"weights": sent.weights, "gradients": sent.gradients, "total": sent.bytes},
        "computing_seconds": scaling.computing,
        "communication_seconds": sent.seconds,
        "exposed_seconds": sent.exposed,
        "update_seconds": scaling.seconds,
        "efficiency": scaling.efficiency,
        "tokens_per_second": scaling.tokens_per_second,
    }


def _with_total(parts: Any) -> dict[str, int]:
    return {**asdict(parts), "total": parts.total}


def print_report(report: Report) -> None:
    """On standard output, as wide as the terminal."""
    console = Console(width=None if sys.stdout.isatty() else _NARROWEST, highlight=False, markup=False)
    if report.summary:
        _print_summary(console, report, report.summary)
        if report.scaling:
            _print_scaling(console, report.scaling, report.summary, report.machine.device)
    _print_presets(console, report)
    console.print(*_notes(report), sep="\n", soft_wrap=True)


def _print_summary(console: Console, report: Report, summary: Summary) -> None:
    machine, training = report.machine, summary.config.training
    _print_rows(console, "Parameters", _parts(summary.parameters, "{:,}".format))
    at_once = {
        "sequences at once": f"{training.sequences_at_once:,}",
        "at most, of an update": f"{summary.largest_micro_batch:,}",
    }
    besides = {"besides, in main memory": _gib(summary.snapshot)} if summary.snapshot else {}
    memory = _parts(summary.training, _gib) | besides | at_once
    _print_rows(console, f"Memory of training on {machine.device}", memory)
    if summary.snapshot:
        console.print(
            "Besides: the copy that checkpoints are written from while training goes on; where it does not fit, or "
            "with checkpoint.background=false, training waits for the disk.\n",
            soft_wrap=True,
        )
    if not summary.fits and report.scaling is None:
        there = f"Does not fit: {machine.name} has {_gib(machine.memory)}. What would help:"
        console.print(there, *summary.remedies, "", sep="\n", soft_wrap=True)
    _print_rows(console, f"Memory of generating on {machine.device}", _parts(summary.generating, _gib))
    disk = {
        "one checkpoint": _gb(summary.checkpoint),
        "output folder, at most": _gb(summary.output_folder),
    }
    _print_rows(console, "Disk", disk)
    _print_rows(console, "The run", dict(_run_rows(report, summary)))


def _run_rows(report: Report, summary: Summary) -> Iterator[tuple[str, str]]:
    run, text = summary.run, report.text
    if text:
        yield "tokens of the text", f"{text.num_tokens:,} in {text.num_documents:,} documents"
    if run.updates is None or run.tokens is None or run.flops is None:
        yield "updates", "not known"
    else:
        yield "updates", f"{run.updates:,}"
        yield "tokens", f"{run.tokens:,}"
        if run.epochs is not None:
            yield "epochs", f"{run.epochs:,.2f}"
        yield "tokens per parameter", figure(run.tokens / summary.parameters.total)
        yield "FLOPs", f"{run.flops:.2e}"
    yield from _time_rows(run)


def _time_rows(run: Run) -> Iterator[tuple[str, str]]:
    if run.seconds:
        yield "time", describe_duration(run.seconds)
    if run.kilowatt_hours:
        low, high = map(figure, run.kilowatt_hours)
        yield "energy of the card", f"{low} to {high} kWh"


def _print_scaling(console: Console, scaling: Scaling, summary: Summary, device: str) -> None:
    """On several GPUs, or as several processes on a CPU; the sections before are of one."""
    sent, cluster = scaling.communication, scaling.cluster
    shards = {"ranks that share a model": f"{scaling.shard_size:,}"} if scaling.parallel == "fsdp" else {}
    shared = {
        "training.parallel": scaling.parallel,
        **shards,
        "sequences of an update, each": f"{scaling.sequences:,}",
        "sequences at once": f"{scaling.sequences_at_once:,}",
    }
    _print_rows(console, f"On {_cluster(cluster, device)}", shared)
    _print_rows(console, "Memory of each of them", _parts(scaling.memory, _gib))
    if not scaling.fits:
        console.print(
            f"Does not fit: each has {_gib(scaling.available)}. What would help: {_remedy(scaling, summary)}.\n",
            soft_wrap=True,
        )
    parts = {"weights": sent.weights, "gradients": sent.gradients, "total": sent.bytes}
    moved = {name: _gb(size) for name, size in parts.items() if size or name == "total"}
    _print_rows(console, "Sent in an update by each, and received", moved)
    hidden = sent.seconds - sent.exposed
    time = {
        "computing": _time(scaling.computing),
        "communication": _time(sent.seconds),
        "of it hidden behind computing": _time(hidden),
        "of it exposed": _time(sent.exposed),
        "total": _time(scaling.seconds),
        "efficiency": f"{scaling.efficiency:.1%}",
        "tokens a second, of all": figure(scaling.tokens_per_second),
    }
    if summary.run.updates is not None:
        seconds = scaling.seconds * summary.run.updates
        time["time of the run"] = describe_duration((seconds / SPREAD, seconds * SPREAD))
    _print_rows(console, "Time of an update", time)


def _cluster(cluster: Cluster, device: str) -> str:
    name = ("process", "processes") if device == "cpu" else ("GPU", "GPUs")
    one = f"{cluster.gpus:,} {name[cluster.gpus > 1]}"
    where = f"{one} in one node"
    if cluster.nodes > 1:
        where = f"{cluster.nodes:,} nodes of {one}"
    links = [f"{cluster.inside.name} inside"] + (
        [f"{cluster.between.name} between"] if cluster.between else []
    )
    return f"{where}, {', '.join(links)}"


def _remedy(scaling: Scaling, summary: Summary) -> str:
    training = summary.config.training
    ways = ["--set training.micro_batch_size=1"] if scaling.sequences_at_once > 1 else []
    if not training.gradient_checkpointing:
        ways.append("--set training.gradient_checkpointing=true")
    if scaling.parallel == "fsdp":
        ways.append("more ranks to share a model")
    elif scaling.parallel == "ddp":
        ways.append("--set training.parallel=fsdp")
    return ", ".join(ways)


def _notes(report: Report) -> Iterator[str]:
    """How the figures came about, and what is not known."""
    machine, summary = report.machine, report.summary
    if summary:
        yield from _notes_on_length(summary, has_text=report.text is not None)
    if machine.flops_per_second is None:
        yield "Time: not known without the speed; --gpu takes a card's from a table, in half precision only."
    else:
        yield _note_on_time(machine, summary or report.preset_summaries[-1], is_one=summary is not None)
    if report.scaling:
        yield from _notes_on_scaling(report.scaling, machine.device)
    if summary and summary.advice:
        advice = summary.advice
        yield (
            f"Text: {figure(advice.tokens_per_parameter)} tokens per parameter in one pass; "
            f"this model: {advice.verdict}."
        )
    if report.text:
        yield (
            f"Passes: over the text until a parameter has seen {TOKENS_PER_PARAMETER} tokens, which uses training "
            f"time best; beyond about {GOOD_PASSES} each gives less. More: atlas info {printable(report.text.name)}"
        )
    if report.assumes_vocabulary and summary:
        yield (
            f"vocab_size is left out, so the dataset's will be taken; {summary.config.model.vocab_size} is assumed "
            "here. GPT-2's: --set model.vocab_size=50257"
        )


def _note_on_time(machine: Machine, summary: Summary, *, is_one: bool) -> str:
    """Which the times are: measured, simulated or stated, and from what."""
    reached, speed = summary.run.utilisation, machine.speed
    assert reached is not None
    assert machine.flops_per_second is not None
    rate = f"{reached:.0%} of {machine.flops_per_second / 1e9:,.0f} GFLOP/s, {machine.rate_is}"
    if speed is None:
        narrow = "; less for narrow models" if machine.device == "cpu" and not is_one else ""
        how = f"FLOPs at {rate} ({machine.time_is}{narrow})"
    else:
        how = (
            f"simulated: the FLOPs and bytes of an update at {speed.products / 1e9:,.0f} GFLOP/s and "
            f"{speed.bandwidth / 1e9:,.0f} GB/s; its FLOPs are at {rate}"
        )
    return f"Time: {how}. Evaluations and saves come on top."


def _notes_on_length(summary: Summary, *, has_text: bool) -> Iterator[str]:
    training = summary.config.training
    if training.max_hours:
        yield f"Updates: training.max_hours ends the run after {training.max_hours:g} hours at the latest."
    elif summary.run.updates is None:
        yield "Updates: neither training.max_steps nor --data says how many there will be."
    if training.epochs and not has_text and summary.run.updates is not None:
        yield "Updates: training.epochs may end the run sooner; --data says whether it does."


def _notes_on_scaling(scaling: Scaling, device: str) -> Iterator[str]:
    cluster = scaling.cluster
    yield f"Ranks: the sections up to “The run” are of one, those after it of {cluster.ranks:,}."
    if device == "cpu" and cluster.ranks > 1:
        yield "On a CPU they share its cores: more of them compute no faster. --gpu plans for cards."
    if scaling.parallel != "none":
        yield (
            f"Communication: rings at {LINK_EFFICIENCY:.0%} of the links' nominal speed, hidden behind {OVERLAP:.0%} "
            "of the computing beside them (assumed, not measured); their latency is left out."
        )
    if cluster.is_assumed:
        ports = ", one port for all GPUs of a node" if cluster.between and cluster.between.is_shared else ""
        between = f", {cluster.between.name} between nodes{ports}" if cluster.between else ""
        yield f"Links: {cluster.inside.name} inside a node{between} (assumed); --interconnect names others."


def _print_presets(console: Console, report: Report) -> None:
    fits, enough = report.largest_that_fits, report.largest_for_text
    verdict = f"the largest that fits is {fits}" if fits else "none fits"
    if report.text:
        verdict += (
            f"; the largest of them that the text is enough for is {enough}"
            if enough
            else ("; the text is small for every one")
        )
    table = Table(box=None, padding=(0, 1))
    table.add_column("preset", no_wrap=True)
    passes = ["passes"] if report.text else []
    for name in ("parameters", "memory", "fits", "at once", "at most", "time", *passes):
        table.add_column(name, no_wrap=True, justify="right")
    for preset, summary in zip(report.presets, report.preset_summaries, strict=True):
        table.add_row(
            preset.name,
            f"{preset.parameters:,}",
            _gib(preset.memory),
            "yes" if preset.fits else "no",
            str(preset.config.training.sequences_at_once),
            str(summary.largest_micro_batch),
            describe_duration(summary.run.seconds) if summary.run.seconds and preset.fits else "",
            *([figure(summary.advice.passes)] if summary.advice else []),
        )
    size = _gib(report.machine.memory)
    console.print(f"Presets on {report.machine.name}, {size}: {verdict}", table, "", sep="\n", soft_wrap=True)


def _print_rows(console: Console, title: str, rows: Mapping[str, str]) -> None:
    table = Table(box=None, show_header=False, padding=(0, 2))
    table.add_column(no_wrap=True, min_width=30)
    table.add_column(no_wrap=True, justify="right", min_width=14)
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(title, table, "", sep="\n")


def _parts(estimate: Any, show: Any) -> dict[str, str]:
    """The parts of an estimate by name, those of 0 left out, and their sum."""
    named = {name.replace("_", " "): show(size) for name, size in vars(estimate).items() if size}
    return {**named, "total": show(estimate.total)}


def _time(seconds: float) -> str:
    return f"{seconds:,.2f} s" if seconds >= 1 else f"{figure(seconds * 1e3)} ms"


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 / 10 else f"{size / 2**20:.1f} MiB"


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB"
