"""`atlas serve`: start an OpenAI-compatible server for your own checkpoints."""

from __future__ import annotations

import gc
import re
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated
from urllib.parse import urlsplit

import typer

from atlas.cli import options
from atlas.cli.terminal import say
from atlas.errors import AtlasError
from atlas.process import stop_signals

if TYPE_CHECKING:
    from atlas.inference.load import LoadedModel
    from atlas.serving.backends.generation import Backend
    from atlas.serving.server import Server

_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_CACHE_FRACTION = 0.25
"""The fraction of the free memory that the KV cache may use."""
_MOST_PARALLEL, _LLAMA_PARALLEL = 64, 4


def serve(
    checkpoint: Annotated[
        list[str] | None,
        typer.Option(
            help="A checkpoint to serve. The option may be repeated. "
            f"Default, without --gguf: {options.BEST_CHECKPOINT}."
        ),
    ] = None,
    gguf: Annotated[
        str | None,
        typer.Option(help="A GGUF file to serve with llama.cpp, alone or in addition to checkpoints."),
    ] = None,
    host: Annotated[
        str,
        typer.Option(help="Address to listen on. An address that other machines can reach needs --api-key."),
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.", min=0, max=65535)] = 8000,
    api_key: Annotated[
        str | None, typer.Option(envvar="ATLAS_API_KEY", help="The key that clients must send.")
    ] = None,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(
            help="An origin whose pages may use the server, such as https://example.com; * for all. The option may be "
            "repeated. Default: only the server's own pages.",
        ),
    ] = None,
    parallel: Annotated[
        int | None,
        typer.Option(
            help="Parallel sequences per model. Default: at most 64, in 1/4 of the free memory; with llama.cpp: 4.",
            min=1,
            max=1024,
        ),
    ] = None,
    queue: Annotated[
        int,
        typer.Option(
            help="Sequences that may wait for a slot. The server answers further requests with status 429.",
            min=0,
        ),
    ] = 256,
    prefix_cache: Annotated[
        int | None,
        typer.Option(
            help="Tokens of finished texts whose keys and values are kept, so that a text with the same beginning is "
            "read only from where it differs. Default: as many as the parallel sequences may have, in 1/4 of the free "
            "memory; 0: none.",
            min=0,
        ),
    ] = None,
    runs: Annotated[
        str, typer.Option(help="Folder of the runs that the page at /runs shows, subfolders included.")
    ] = "checkpoints",
    max_tokens: Annotated[
        int, typer.Option(help="The largest number of new tokens per generation.", min=1)
    ] = 4096,
    timeout: Annotated[
        float,
        typer.Option(
            help="The time limit in seconds for a request, and for the shutdown.", min=1, max=86_400
        ),
    ] = 300.0,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    context: options.Context = None,
    tokenizer: options.CustomTokenizer = None,
) -> None:
    """Start an OpenAI-compatible server. Ctrl-C or SIGTERM stops the server after current generations have finished."""
    if host not in _LOOPBACK and not api_key:
        raise AtlasError(
            f"--host {host}: others can reach this address: set --api-key (or ATLAS_API_KEY), or listen on 127.0.0.1"
        )
    if api_key is not None:
        api_key = api_key.strip()
        if not re.fullmatch("[!-~]+", api_key):  # the characters that every client can send in a header
            raise AtlasError(
                "--api-key: must be ASCII letters, digits and signs, without spaces; or omit --api-key"
            )
    origins = tuple(_origin(each) for each in allow_origin or [])
    try:
        from atlas.serving.app import build_app
        from atlas.serving.dispatcher import ServerSettings
        from atlas.serving.server import Server, listen
    except ImportError as error:
        raise AtlasError(f'atlas serve needs {error.name}: pip install "atlas-llm[serve]"') from None
    from atlas.inference.load import load_model

    listener = listen(host, port)
    paths = checkpoint or ([] if gguf else [options.BEST_CHECKPOINT])
    models = [
        load_model(path, device=device, tokenizer=tokenizer, dtype=dtype, context=context) for path in paths
    ]
    backends: list[Backend] = [
        _engine(model, name, parallel=parallel, queue=queue, prefix_tokens=prefix_cache)
        for model, name in zip(models, _names([model.path for model in models]), strict=True)
    ]
    if gguf:
        import torch

        from atlas.serving.backends.llama import Llama

        parallel = parallel or _LLAMA_PARALLEL
        threads = torch.get_num_threads()
        llama = Llama(gguf, parallel=parallel, queue=queue, threads=threads, context=context)
        say(f"{llama.id}: {gguf}: {parallel} sequences in parallel in llama.cpp")
        if llama.id in [backend.id for backend in backends]:
            raise AtlasError(f"--gguf {gguf}: a checkpoint has the same name: rename one of the two files")
        backends.append(llama)
    app = build_app(backends, ServerSettings(max_tokens, timeout, api_key, Path(runs), origins))
    server = Server(app, listener, seconds_to_drain=timeout)
    address, port = listener.getsockname()[:2]
    address = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address, address)
    try:
        _run(server, f"http://[{address}]:{port}" if ":" in address else f"http://{address}:{port}")
    finally:
        for backend in backends:
            backend.close()


def _origin(text: str) -> str:
    """Return an origin as a browser sends it: in lower case and ASCII, without a slash at the end, and without the
    default port."""
    origin = text.strip()
    if origin in ("*", "null"):
        return origin
    try:
        parts = urlsplit(origin)
        host, port = (parts.hostname or "").encode("idna").decode(), parts.port
        if ":" in host:
            host = f"[{host}]"
        is_origin = parts.scheme and re.fullmatch(r"[a-z0-9._-]+|\[[0-9a-f:.]+\]", host)
        if is_origin and not (parts.path.strip("/") or parts.query or parts.fragment or "@" in parts.netloc):
            is_default = port in (None, {"http": 80, "https": 443}.get(parts.scheme))
            return f"{parts.scheme}://{host}{'' if is_default else f':{port}'}"
    except ValueError:  # not a port, or not a name
        pass
    raise AtlasError(f"--allow-origin {text}: must be an origin such as https://example.com, or *")


def _names(paths: list[Path]) -> list[str]:
    """Return the models' names in the API. A name is the file's name, with the folder's name in front if two files have
    the same name."""
    stems = [path.stem for path in paths]
    names = [
        stem if stems.count(stem) == 1 else f"{path.resolve().parent.name}/{stem}"
        for path, stem in zip(paths, stems, strict=True)
    ]
    for name in names:
        if names.count(name) > 1:
            raise AtlasError(
                f"--checkpoint: two checkpoints are called {name}: name each file once, or copy one to another folder"
            )
    return names


def _engine(
    model: LoadedModel, name: str, *, parallel: int | None, queue: int, prefix_tokens: int | None
) -> Backend:
    from atlas.inference.layout import lay_out_for_decoding
    from atlas.machine import measure_memory
    from atlas.planning.inference import estimate_inference_memory
    from atlas.serving.backends.engine import Engine

    weights = next(model.model.parameters())
    device = weights.device.type
    fp32 = estimate_inference_memory(model.config.model, device=device).cache
    per_sequence, free = fp32 * weights.element_size() // 4, measure_memory(device)
    context = model.config.model.max_seq_len
    kept = (prefix_tokens or 0) * per_sequence // context
    if prefix_tokens and (parallel or 1) * per_sequence + kept > free:
        raise AtlasError(
            f"--prefix-cache {prefix_tokens}: needs {kept / 1e6:,.1f} MB beside the running texts, and "
            f"{free / 1e6:,.1f} MB of memory are free: use a smaller --prefix-cache, --parallel or --context"
        )
    if (parallel or 1) * per_sequence > free:
        raise AtlasError(
            f"--parallel {parallel or 1}: the cache of a sequence needs {per_sequence / 1e6:,.1f} MB, and "
            f"{free / 1e6:,.1f} MB of memory are free: use a smaller --parallel or --context, or serve a smaller model"
        )
    parallel = parallel or max(1, min(_MOST_PARALLEL, int(_CACHE_FRACTION * free) // per_sequence))
    if prefix_tokens is None:
        left = max(0, min(_CACHE_FRACTION * free, free - parallel * per_sequence))
        prefix_tokens = min(parallel * context, int(left) * context // per_sequence)
    if device == "cpu":
        lay_out_for_decoding(model.model)
    step = model.facts.get("step")
    say(f"{name}: {model.path}, step {step}: {parallel} sequences in parallel on {device}")
    return Engine(model, name, parallel=parallel, queue=queue, prefix_tokens=prefix_tokens)


def _run(server: Server, address: str) -> None:
    """Run the server until a signal arrives. After the first signal, current generations finish; a second signal ends
    them."""

    def end(number: int, frame: object) -> None:
        say("shutting down: current generations finish; a second Ctrl-C or signal ends them")
        server.drain()

    for number in stop_signals():
        signal.signal(number, end)
    gc.freeze()  # otherwise, a full collection visits PyTorch's 200,000 objects, and stops the server for 0.1 s
    server.start()
    is_reported = False
    while not server.wait(0.1):
        if server.is_ready and not is_reported:
            is_reported = True
            pages = f"{address} for pages, {address}/chat for conversations, {address}/runs for curves"
            say(f"{pages}, {address}/v1 for OpenAI's clients")
