"""`atlas serve`: OpenAI's API over checkpoints of one's own."""

from __future__ import annotations

import re
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from atlas.errors import AtlasError

if TYPE_CHECKING:
    from atlas.inference.load import LoadedModel
    from atlas.serving.server import Server
    from atlas.serving.text import Backend

_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_PART_FOR_CACHE = 0.25
"""Of the free memory, for what the texts in the batch remember."""
_MOST_PARALLEL, _LLAMA_PARALLEL = 64, 4


def serve(
    checkpoint: Annotated[
        list[str] | None,
        typer.Option(
            help="A checkpoint to serve; may be repeated. Left out, without --gguf: checkpoints/atlas_best.pt."
        ),
    ] = None,
    gguf: Annotated[
        str | None,
        typer.Option(help="An exported file to serve through llama.cpp, alone or beside checkpoints."),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; one that others reach needs --api-key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.", min=0, max=65535)] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="ATLAS_API_KEY", help="Clients must send this key.", show_envvar=True),
    ] = None,
    parallel: Annotated[
        int | None,
        typer.Option(
            help="Texts written at once by each model; left out: 64, or what a quarter of the free memory holds; "
            "4 in llama.cpp.",
            min=1,
            max=1024,
        ),
    ] = None,
    queue: Annotated[
        int, typer.Option(help="Texts that may wait for a place; more are refused with 429.", min=0)
    ] = 256,
    runs: Annotated[
        str, typer.Option(help="Folder whose runs, also those of folders in it, are drawn at /runs.")
    ] = "checkpoints",
    max_tokens: Annotated[int, typer.Option(help="The most new tokens a text may have.", min=1)] = 4096,
    timeout: Annotated[
        float,
        typer.Option(help="Seconds a request may take, and the server itself to end.", min=1, max=86_400),
    ] = 300.0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
    dtype: Annotated[
        str,
        typer.Option(
            help="Precision of weights and cache: auto (half on CUDA, else f32), f32, bf16 or f16.",
            metavar="DTYPE",
        ),
    ] = "auto",
    tokenizer: Annotated[
        str | None, typer.Option(help="package.module:factory, for a model trained with a custom tokenizer.")
    ] = None,
) -> None:
    """Serve OpenAI's API, until Ctrl-C or SIGTERM, which let texts finish."""
    if host not in _LOOPBACK and not api_key:
        raise AtlasError(
            f"--host {host}: others can reach this address: set --api-key (or ATLAS_API_KEY), or listen on 127.0.0.1"
        )
    if api_key is not None:
        api_key = api_key.strip()
        if not re.fullmatch("[!-~]+", api_key):  # what every client can put into a header
            raise AtlasError(
                "--api-key: must be letters, digits and signs of ASCII without blanks; or leave it out"
            )
    try:
        from atlas.serving.app import build_app
        from atlas.serving.dispatcher import Rules
        from atlas.serving.server import Server, listen
    except ImportError as error:
        raise AtlasError(f'atlas serve needs {error.name}: pip install "atlas-llm[serve]"') from None
    from atlas.inference.load import load_model

    listener = listen(host, port)
    paths = list(checkpoint or ([] if gguf else ["checkpoints/atlas_best.pt"]))
    models = [load_model(path, device=device, tokenizer=tokenizer, dtype=dtype) for path in paths]
    backends: list[Backend] = [
        _engine(model, name, parallel=parallel, queue=queue)
        for model, name in zip(models, _names([model.path for model in models]), strict=True)
    ]
    if gguf:
        backends.append(_llama(gguf, parallel=parallel or _LLAMA_PARALLEL, queue=queue))
        if backends[-1].id in [backend.id for backend in backends[:-1]]:
            raise AtlasError(f"--gguf {gguf}: a checkpoint has this name as well: rename one of the files")
    rules = Rules(max_tokens, timeout, api_key, Path(runs))
    app = build_app(backends, rules)
    server = Server(app, listener, seconds_to_drain=timeout)
    where = listener.getsockname()
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(
        where[0], f"[{where[0]}]" if ":" in where[0] else where[0]
    )
    try:
        _run(server, f"http://{shown}:{where[1]}", runs)
    finally:
        for backend in backends:
            backend.close()


def _names(paths: list[Path]) -> list[str]:
    """What clients call the models: the file's name; with its folder's where that alone is not enough."""
    stems = [path.stem for path in paths]
    names = [
        stem if stems.count(stem) == 1 else f"{path.resolve().parent.name}/{stem}"
        for path, stem in zip(paths, stems, strict=True)
    ]
    for name in names:
        if names.count(name) > 1:
            raise AtlasError(
                f"--checkpoint: two are called {name}: name each once, or copy one to another folder"
            )
    return names


def _engine(model: LoadedModel, name: str, *, parallel: int | None, queue: int) -> Backend:
    from atlas.inference.layout import lay_out_for_decoding
    from atlas.machine import measure_memory
    from atlas.planning.inference import estimate_inference_memory
    from atlas.serving.engine import Engine

    weights = next(model.model.parameters())
    device = weights.device.type
    fp32 = estimate_inference_memory(model.config.model, device=device).cache
    one, free = fp32 * weights.element_size() // 4, measure_memory(device)
    if (parallel or 1) * one > free:
        raise AtlasError(
            f"--parallel {parallel or 1}: the cache of a text takes {one / 1e6:,.1f} MB, and {free / 1e6:,.1f} MB of "
            "memory are free: ask for fewer, or serve a smaller model"
        )
    at_once = parallel or max(1, min(_MOST_PARALLEL, int(_PART_FOR_CACHE * free) // one))
    if device == "cpu":
        lay_out_for_decoding(model.model)
    step = model.facts.get("step")
    typer.echo(f"{name}: {model.path}, step {step}: {at_once} texts at once on {device}", err=True)
    return Engine(model, name, parallel=at_once, queue=queue)


def _llama(path: str, *, parallel: int, queue: int) -> Backend:
    import torch

    from atlas.serving.llama import Llama

    llama = Llama(path, parallel=parallel, queue=queue, threads=torch.get_num_threads())
    typer.echo(f"{llama.id}: {path}: {parallel} texts at once in llama.cpp", err=True)
    return llama


def _run(server: Server, address: str, runs: str) -> None:
    """Until a signal; the second does not wait for the texts."""

    def end(number: int, frame: object) -> None:
        typer.echo("ending: texts that are being written finish; again: at once", err=True)
        server.drain()

    for name in ("SIGINT", "SIGTERM", "SIGBREAK"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), end)
    server.start()
    told = False
    while not server.wait(0.1):
        if server.is_ready and not told:
            told = True
            typer.echo(
                f"{address} to write and look, {address}/runs for curves, {address}/v1 for OpenAI's clients",
                err=True,
            )
