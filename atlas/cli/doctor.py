"""`atlas doctor`: report what this machine can do, which device and precision training will use, and what to fix."""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections.abc import Iterable
from typing import Annotated, Any

import typer

from atlas.cli.terminal import gibibytes, print_facts, print_table, printable
from atlas.errors import AtlasError
from atlas.files import local_path

Rows = Iterable[tuple[str, Any]]

SOMETHING_TO_FIX = 1
_SLOW = 3
_CLEARLY = 1.15
"""The smallest ratio of two times for which one kernel counts as clearly faster than the other. Repeated measurements
of the same kernel differ by less."""


def doctor(
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the facts as one JSON object, for programs and bug reports.")
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
    output_dir: Annotated[
        str | None,
        typer.Option(
            help="Folder on the disk to measure; the folder need not exist. Default: train's default output folder.",
            metavar="DIR",
        ),
    ] = None,
    distributed: Annotated[
        bool,
        typer.Option(
            "--distributed",
            help="Only check the connection between the processes that torchrun starts, and measure its speed.",
        ),
    ] = False,
    timeout: Annotated[
        float | None,
        typer.Option(
            help="With --distributed: seconds for which processes wait for each other. Default: 60.",
            min=1,
            metavar="SECONDS",
        ),
    ] = None,
) -> None:
    """Report what this machine can do, which device and precision `atlas train` will use, and what to fix.

    The command takes about half a minute and leaves no files. Exit code 0: there is nothing to fix. Exit code 1: the
    last lines name the problems and their remedies.
    """
    if distributed and output_dir is not None:
        raise AtlasError(f"--output-dir {output_dir}: --distributed measures no disk; omit --output-dir")
    if timeout is not None and not distributed:
        raise AtlasError(f"--timeout {timeout:g}: is for --distributed; omit --timeout")
    if distributed:
        # PyTorch reads this variable only once. Without this setting, PyTorch prints pages of text if an address cannot
        # be reached. Atlas reports the last line of the error.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
        from atlas.training.devices.network_check import DEFAULT_TIMEOUT, try_connection

        facts, show = try_connection(device, timeout or DEFAULT_TIMEOUT), _print_connection
    else:
        from atlas.cli.doctor_facts import examine

        folder = None if output_dir is None else local_path("--output-dir", output_dir)
        if sys.stderr.isatty():
            typer.echo("measuring this machine for about half a minute", err=True)
        facts, show = examine(device, folder), _print
    if facts is None:  # on ranks other than the first
        return
    if as_json:
        typer.echo(json.dumps(facts, indent=2, allow_nan=False))
    else:
        show(facts)
    if facts.get("problems"):
        raise typer.Exit(SOMETHING_TO_FIX)


def _print_connection(facts: dict[str, Any]) -> None:
    """Print the ranks of each host. For each backend, print the latency of the smallest all-reduce and the bandwidth of
    the larger all-reduces."""
    ranks = [("ranks", "host")]
    for host, group in itertools.groupby(enumerate(facts["hosts"]), key=lambda place: place[1]):
        numbers = [rank for rank, _ in group]
        ranks.append((f"{numbers[0]}-{numbers[-1]}" if len(numbers) > 1 else str(numbers[0]), host))
    print_table(ranks)
    typer.echo()
    entries = itertools.groupby(facts["all_reduce"], key=lambda entry: entry["backend"])
    by_backend = {backend: list(group) for backend, group in entries}
    (smallest, *larger), *_ = by_backend.values()
    sizes = [f"GB/s, {_bytes(entry)}" for entry in larger]
    titles = ["backend", "device", f"latency, {_bytes(smallest)}", *sizes]
    rows = [
        [backend, first["device"], f"{first['seconds'] * 1e3:.2f} ms"]
        + [f"{entry['bus_bandwidth'] / 1e9:.2f}" for entry in rest]
        for backend, (first, *rest) in by_backend.items()
    ]
    print_table([titles, *rows], right=range(2, len(titles)))
    for backend, reason in facts["left_out"].items():
        typer.echo(f"{backend} was not tested: {reason}")
    typer.echo(
        "\nEvery all-reduce sum is right. GB/s of an all-reduce over N ranks: bytes × 2 (N − 1) / N ÷ seconds"
    )


def _bytes(entry: dict[str, Any]) -> str:
    size = entry["bytes"]
    return f"{size // 10**6} MB" if size >= 10**6 else f"{size // 1000} kB"


def _print(facts: dict[str, Any]) -> None:
    """Print the facts on one screen, in a group of rows per section."""
    groups = {
        "Versions": _versions(facts["versions"]),
        "Machine": _machine(facts["machine"], facts.get("memory")),
        "Precision: a training step, compared with fp64": _precision(facts.get("precision", {})),
        "Speed": _speed(facts),
        "Train will use": _choice(facts["train"]),
    }
    for title, rows in groups.items():
        typer.echo(title)
        print_facts(rows, indent="  ", width=16)
    problems = facts["problems"]
    typer.echo(f"To fix: {len(problems)}" if problems else "Nothing to fix")
    for problem in problems:
        typer.echo(printable(f"  {problem['value']}: {problem['reason']}; {problem['remedy']}"))


def _versions(versions: dict[str, Any]) -> Rows:
    cuda, rocm = versions["cuda"], versions["rocm"]
    build = f"with CUDA {cuda}" if cuda else f"with ROCm {rocm}" if rocm else "without CUDA and ROCm"
    yield "atlas", versions["atlas"]
    yield "Python", versions["python"]
    yield "PyTorch", f"{versions['torch']}, {build}"
    yield "NumPy", versions["numpy"]
    packages = {name: version for extra in versions["extras"].values() for name, version in extra.items()}
    yield "optional", ", ".join(f"{name} {version}" for name, version in packages.items() if version)
    yield "not installed", ", ".join(name for name, version in packages.items() if not version)


def _machine(machine: dict[str, Any], memory: dict[str, Any] | None) -> Rows:
    threads, cpus = machine["cpu_threads"], machine["cpu_count"]
    arithmetic = "computes in bf16" if machine["cpu_bf16"] else "no bf16 arithmetic"
    available, total = machine["memory_available"], machine["memory_total"]
    yield "system", machine["system"]
    cores = f"{_threads(threads)} on {cpus} logical CPUs, {machine['cpu_capability']}"
    yield "CPU", f"{machine['cpu']}: {cores}, {arithmetic}"
    yield "memory", f"{gibibytes(available)} free of {gibibytes(total)}"
    yield "NVIDIA driver", machine["nvidia_driver"]
    for gpu in machine["gpus"]:
        known = gpu.get("compute_capability")
        computes = f", compute capability {known}" if known else ""
        yield "GPU", f"{gpu['name']}: {gibibytes(gpu['memory_total'])}{computes}"
    if memory:
        fits = f"up to {memory['preset']}" if memory["preset"] else "none"
        yield "presets that fit", f"{fits}, in {gibibytes(memory['available'])} on {memory['device']}"


def _precision(precision: dict[str, Any]) -> Rows:
    """Yield a row for each precision. If training does not use a precision, the row gives the reason. An error in such
    a precision is not a problem to fix."""
    for name, step in precision.items():
        unused = "" if step["refusal"] is None else f", and training does not use it ({step['refusal']})"
        if "error" in step:
            verdict = f"{'not available' if unused else 'does not compute'}: {step['error']}{unused}"
        else:
            off = ", ".join(f"{part} off by {_off(step[f'{part}_error'])}" for part in ("loss", "gradient"))
            verdict = "right" if step["right"] else f"wrong{unused}" if unused else "WRONG"
            verdict += f": {off} (bound {step['bound']:.0e})"
            if (times := step["product_times_fp32"]) and times >= _SLOW:
                verdict += f"; but a matrix product is {times:.0f} times slower than in fp32"
        yield name, verdict


def _off(error: float | None) -> str:
    return "NaN" if error is None else f"{error:.0e}"


def _threads(count: int) -> str:
    return f"{count} thread{'s' * (count > 1)}"


def _speed(facts: dict[str, Any]) -> Rows:
    on_cpu = facts["train"]["device"] == "cpu"
    threads = f" with {_threads(facts['machine']['cpu_threads'])}" if on_cpu else ""
    for name, rate in facts.get("matrix_products", {}).items():
        measured = f"{rate / 1e12:,.2f} TFLOP/s{threads}" if rate else "not measured: no memory left"
        yield f"products, {name}", measured
    if facts.get("copy"):
        yield "copy", f"{facts['copy'] / 1e9:,.1f} GB/s read and written"
    if attention := facts.get("attention"):
        works = [name for name, runs in attention.items() if runs]
        fails = [name for name, runs in attention.items() if not runs]
        yield "attention", ", ".join(works) + (f"; not available: {', '.join(fails)}" if fails else "")
    if times := facts.get("attention_times"):
        yield "attention time", _attention_times(times)
    compiled, disk = facts["compile"], facts["disk"]
    took = f"works; compiling a test function took {compiled['seconds']:.0f} s"
    without = f"not available: {compiled['reason']}; training runs without it"
    yield "compile", without if compiled["reason"] else took
    if "error" in disk:
        yield "disk", f"{disk['folder']}: {disk['error']}"
    else:
        memory = " (perhaps from memory)" if disk["read_from_memory"] else ""
        written, read = (f"{disk[way] / 1e6:,.0f} MB/s" for way in ("write", "read"))
        yield "disk", f"{written} written, {read} read{memory}, in {disk['folder']}"


def _attention_times(times: dict[str, Any]) -> str:
    """Return a text with PyTorch's choice of kernel, a clearly faster kernel if there is one, and all measured
    times."""
    chosen, seconds, shape = times["chosen"], times["seconds"], times["shape"]
    by_time = sorted(seconds, key=seconds.get)
    measured = ", ".join(f"{name} {seconds[name] * 1e3:.2f} ms" for name in by_time)
    said = f"{chosen or 'an unknown kernel'}, chosen by PyTorch"
    if by_time and chosen in seconds and (ratio := seconds[chosen] / seconds[by_time[0]]) >= _CLEARLY:
        said += f", although {by_time[0]} is {ratio:.1f} times as fast"
    sizes = f"{shape['batch']} × {shape['tokens']:,} tokens, {shape['heads']} heads of {shape['head_size']}"
    return f"{said}; forward and backward of {sizes}: {measured or 'none works'}"


def _choice(train: dict[str, Any]) -> Rows:
    for name in ("device", "precision", "compile"):
        yield name, f"{train[name]}: {train[f'{name}_reason']}"
