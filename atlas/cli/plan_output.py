"""The output of `atlas plan`: tables for people, or one JSON object for programs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import typer

from atlas.cli.plan_report import Report, Summary
from atlas.cli.terminal import figure, gibibytes, print_table, printable
from atlas.model.cost import count_parameters
from atlas.planning.advice import GOOD_PASSES, TOKENS_PER_PARAMETER
from atlas.planning.communication import LINK_EFFICIENCY, OVERLAP, Cluster
from atlas.planning.inference import estimate_inference_memory
from atlas.planning.run import describe_duration, spread
from atlas.planning.scaling import Scaling
from atlas.training.memory.estimate import checkpoint_bytes, output_folder_bytes, snapshot_bytes


def print_json(report: Report) -> None:
    """Print the report as JSON, with numbers in bytes, seconds, FLOPs and kWh, and null for unknown values."""
    machine, text, device = report.machine, report.text, report.machine.device
    content = {
        "machine": {
            "name": machine.name,
            "device": device,
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
        "config": report.summary and _as_json(report.summary, device),
        "scaling": report.scaling and _scaling_as_json(report.scaling),
        "presets": {preset.name: _as_json(summary, device) for preset, summary in report.presets},
        "largest_preset_that_fits": report.largest(),
        "largest_preset_for_the_data": report.largest(for_text=True),
    }
    typer.echo(json.dumps(content, indent=2))


def _as_json(summary: Summary, device: str) -> dict[str, Any]:
    config, advice = summary.config, summary.advice
    return {
        "vocab_size": config.model.vocab_size,
        "max_seq_len": config.model.max_seq_len,
        "parameters": _with_total(count_parameters(config.model)),
        "training_memory_bytes": _with_total(summary.memory),
        "saving_memory_bytes": snapshot_bytes(config, device=device),
        "generating_memory_bytes": _with_total(estimate_inference_memory(config.model, device=device)),
        "checkpoint_bytes": checkpoint_bytes(config),
        "output_folder_bytes": output_folder_bytes(config),
        "fits": not summary.remedies,
        "micro_batch_size": config.training.sequences_at_once,
        "largest_micro_batch_size": summary.largest_micro_batch,
        **asdict(summary.run),
        "passes": advice and advice.passes,
        "verdict": advice and advice.verdict,
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
        "micro_batch_size": scaling.micro_batch,
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
    """Print the report as tables and notes on standard output."""
    if report.summary:
        _print_summary(report, report.summary)
        if report.scaling:
            _print_scaling(report.scaling, report.summary, report.machine.device)
    _print_presets(report)
    for note in _notes(report):
        typer.echo(note)


def _print_summary(report: Report, summary: Summary) -> None:
    machine, config, run, text = report.machine, summary.config, summary.run, report.text
    _print_rows("Parameters", _parts(count_parameters(config.model), "{:,}".format))
    copy = snapshot_bytes(config, device=machine.device)
    memory = {
        **_parts(summary.memory, gibibytes),
        "checkpoint copy, main memory": copy and gibibytes(copy),
        "sequences per micro-batch": f"{config.training.sequences_at_once:,}",
        "at most in a micro-batch": f"{summary.largest_micro_batch:,}",
    }
    _print_rows(f"Memory of training on {machine.device}", memory)
    if copy:
        typer.echo(
            "Checkpoint copy: the copy of the state from which Atlas writes a checkpoint while training continues. If "
            "the copy does not fit, or with checkpoint.background=false, training waits for the disk.\n"
        )
    if summary.remedies and report.scaling is None:
        there = f"Does not fit: {machine.name} has {gibibytes(machine.memory)}. What would help:"
        typer.echo("\n".join([there, *summary.remedies, ""]))
    generating = estimate_inference_memory(config.model, device=machine.device)
    _print_rows(f"Memory of generating on {machine.device} in f32", _parts(generating, gibibytes))
    one, most = _gb(checkpoint_bytes(config)), _gb(output_folder_bytes(config))
    _print_rows("Disk", {"one checkpoint": one, "output folder, at most": most})
    figures = {
        "tokens of the text": text and f"{text.num_tokens:,} in {text.num_documents:,} documents",
        "updates": "not known" if run.updates is None else f"{run.updates:,}",
        "tokens": run.tokens and f"{run.tokens:,}",
        "epochs": run.epochs and f"{run.epochs:,.2f}",
        "tokens per parameter": run.tokens_per_parameter and figure(run.tokens_per_parameter),
        "FLOPs": run.flops and f"{run.flops:.2e}",
        "time": run.seconds and describe_duration(run.seconds),
        "energy of the card": run.kilowatt_hours and f"{' to '.join(map(figure, run.kilowatt_hours))} kWh",
    }
    _print_rows("The run", figures)


def _print_scaling(scaling: Scaling, summary: Summary, device: str) -> None:
    """Print the plan of a run on several GPUs, or in several processes on a CPU. All earlier sections are for a single
    rank."""
    sent, updates = scaling.communication, summary.run.updates
    shared = {
        "training.parallel": scaling.parallel,
        "ranks that share a model": scaling.parallel == "fsdp" and f"{scaling.shard_size:,}",
        "sequences per rank and update": f"{scaling.sequences:,}",
        "sequences per micro-batch": f"{scaling.micro_batch:,}",
    }
    _print_rows(f"On {_cluster(scaling.cluster, device)}", shared)
    _print_rows("Memory of each rank", _parts(scaling.memory, gibibytes))
    if not scaling.fits:
        remedies = ", ".join(_remedies(scaling, summary))
        typer.echo(
            f"Does not fit: each rank has {gibibytes(scaling.available)}. What would help: {remedies}.\n"
        )
    parts = {"weights": sent.weights, "gradients": sent.gradients}
    moved = {name: size and _gb(size) for name, size in parts.items()}
    _print_rows("Sent, and received, by each rank in an update", {**moved, "total": _gb(sent.bytes)})
    time = {
        "computing": _time(scaling.computing),
        "communication": _time(sent.seconds),
        "communication hidden": _time(sent.seconds - sent.exposed),
        "communication exposed": _time(sent.exposed),
        "total": _time(scaling.seconds),
        "efficiency": f"{scaling.efficiency:.1%}",
        "tokens per second, all ranks": figure(scaling.tokens_per_second),
        "time of the run": updates and describe_duration(spread(scaling.seconds * updates)),
    }
    _print_rows("Time of an update", time)


def _cluster(cluster: Cluster, device: str) -> str:
    one, several = ("process", "processes") if device == "cpu" else ("GPU", "GPUs")
    ranks = f"{cluster.gpus:,} {several if cluster.gpus > 1 else one}"
    where = f"{cluster.nodes:,} nodes of {ranks}" if cluster.nodes > 1 else f"{ranks} in one node"
    between = f", {cluster.between.name} between" if cluster.between else ""
    return f"{where}, {cluster.inside.name} inside{between}"


def _remedies(scaling: Scaling, summary: Summary) -> Iterator[str]:
    if scaling.micro_batch > 1:
        yield "--set training.micro_batch_size=1"
    if not summary.config.training.gradient_checkpointing:
        yield "--set training.gradient_checkpointing=true"
    if scaling.parallel == "fsdp":
        yield "more ranks to share a model"
    elif scaling.parallel == "ddp":
        yield "--set training.parallel=fsdp"


def _notes(report: Report) -> Iterator[str]:
    """Yield notes on the sources of the printed values, and on unknown values."""
    machine, summary, scaling = report.machine, report.summary, report.scaling
    if summary:
        yield from _notes_on_length(summary, has_text=report.text is not None)
    yield _note_on_time(report)
    if scaling:
        yield from _notes_on_scaling(scaling, machine.device)
    if summary and (advice := summary.advice):
        tokens = figure(advice.tokens_per_parameter)
        yield f"Text: {tokens} tokens per parameter in one pass; this model: {advice.verdict}."
    if report.text:
        yield (
            f"Passes: the passes over the text to reach {TOKENS_PER_PARAMETER} tokens per parameter, the best use of "
            f"training time. Each pass beyond about {GOOD_PASSES} improves the model less. "
            f"More: atlas info {printable(report.text.name)}"
        )
    if report.assumes_vocabulary and summary:
        yield (
            f"model.vocab_size is not set, so training uses the dataset's vocabulary; this plan assumes "
            f"{summary.config.model.vocab_size} tokens. For GPT-2's vocabulary: --set model.vocab_size=50257"
        )


def _note_on_time(report: Report) -> str:
    """Return a note on the source of the times (measured, simulated or stated) and on the rates behind them."""
    machine, speed = report.machine, report.machine.speed
    reached = (report.summary or report.presets[-1][1]).run.utilisation
    if machine.flops_per_second is None or reached is None:
        return "Time: not known without the GPU's speed. --gpu uses a known card's speed, in half precision only."
    rate = f"{reached:.0%} of {machine.flops_per_second / 1e9:,.0f} GFLOP/s, {machine.rate_is}"
    if speed is None:
        narrow = "; less for narrow models" if machine.device == "cpu" and not report.summary else ""
        source = "" if machine.device == "cpu" else f" ({machine.time_is})"
        how = f"FLOPs at {rate}{source}{narrow}"
    else:
        how = (
            f"simulated: the FLOPs and bytes of an update at {speed.products / 1e9:,.0f} GFLOP/s and "
            f"{speed.bandwidth / 1e9:,.0f} GB/s; the update reaches {rate}"
        )
    return f"Time: {how}. Evaluations and saves take additional time."


def _notes_on_length(summary: Summary, *, has_text: bool) -> Iterator[str]:
    training = summary.config.training
    if training.max_hours:
        yield f"Updates: training.max_hours ends the run after {training.max_hours:g} hours at the latest."
    elif summary.run.updates is None:
        yield "Updates: the number is not known without training.max_steps or --data."
    if training.epochs and not has_text and summary.run.updates is not None:
        yield "Updates: training.epochs may end the run sooner; to check this, give --data."


def _notes_on_scaling(scaling: Scaling, device: str) -> Iterator[str]:
    cluster = scaling.cluster
    yield f"Ranks: the sections up to “The run” are for one rank, the later sections for {cluster.ranks:,} ranks."
    if device == "cpu" and cluster.ranks > 1:
        yield "On a CPU, all ranks share the cores, so more ranks compute no faster. --gpu plans for a GPU."
    if scaling.parallel != "none":
        yield (
            f"Communication: rings at {LINK_EFFICIENCY:.0%} of the links' nominal bandwidth; {OVERLAP:.0%} of the time "
            "of simultaneous computation can hide communication. Both values are assumed, not measured. The estimate "
            "ignores the links' latency."
        )
    if cluster.is_assumed:
        ports = ", one port for all GPUs of a node" if cluster.between and cluster.between.is_shared else ""
        between = f", {cluster.between.name} between nodes{ports}" if cluster.between else ""
        yield f"Links: {cluster.inside.name} inside a node{between} (assumed); --interconnect sets other links."


def _print_presets(report: Report) -> None:
    fits, enough, text = report.largest(), report.largest(for_text=True), report.text
    verdict = f"the largest that fits is {fits}" if fits else "none fits"
    if enough:
        verdict += f"; the largest for which the text is also large enough is {enough}"
    elif text:
        verdict += "; the text is too small for every preset"
    titles = [" preset", "parameters", "memory", "fits", "micro-batch", "at most", "time"]
    rows = [titles + ["passes"] * bool(text)]
    for preset, summary in report.presets:
        cells = [
            f" {preset.name}",
            f"{preset.parameters:,}",
            gibibytes(preset.memory),
            "yes" if preset.fits else "no",
            str(preset.config.training.sequences_at_once),
            str(summary.largest_micro_batch),
            describe_duration(summary.run.seconds) if summary.run.seconds and preset.fits else "",
        ]
        rows.append(cells + ([figure(summary.advice.passes)] if summary.advice else []))
    typer.echo(f"Presets on {report.machine.name}, {gibibytes(report.machine.memory)}: {verdict}")
    print_table(rows, right=range(1, len(rows[0])))
    typer.echo()


def _print_rows(title: str, rows: dict[str, Any]) -> None:
    """Print a section: a line with the name and the value of each row. Values that are None, 0 or False are left
    out."""
    typer.echo(title)
    shown = {name: value for name, value in rows.items() if value}
    width = max(14, *map(len, shown.values()))
    for name, value in shown.items():
        typer.echo(f"  {name:<30}    {value:>{width}}")
    typer.echo()


def _parts(estimate: Any, show: Callable[[int], str]) -> dict[str, Any]:
    """Return name → text for the parts of an estimate and their total."""
    return {name.replace("_", " "): size and show(size) for name, size in _with_total(estimate).items()}


def _time(seconds: float) -> str:
    return f"{seconds:,.2f} s" if seconds >= 1 else f"{figure(seconds * 1e3)} ms"


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB"
