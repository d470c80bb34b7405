"""A model behind a real socket, in this process, for tests that talk to it as clients do."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from atlas.config import AtlasConfig, ModelConfig
from atlas.errors import AtlasError
from atlas.export.gguf import export_gguf
from atlas.inference.load import LoadedModel
from atlas.model import build_model
from atlas.serving.app import build_app
from atlas.serving.backends.engine import Engine
from atlas.serving.backends.generation import Backend
from atlas.serving.dispatcher import ServerSettings
from atlas.serving.server import Server, listen
from atlas.tokenizer import Tokenizer
from atlas.tokenizer.chat import CHAT_TEMPLATE
from tests.conftest import corpus


def random_model(*, chat: bool = False, seed: int = 0, max_seq_len: int = 64) -> LoadedModel:
    """Large random weights, so that the likeliest token is not a near-tie, and a small vocabulary."""
    tokenizer = Tokenizer.train([corpus(), "größer — 漢字 🙂"], 400)
    shape = ModelConfig(
        hidden_size=32, num_layers=2, num_heads=4, vocab_size=tokenizer.vocab_size, max_seq_len=max_seq_len
    )
    model = build_model(shape, seed=seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
    tokenizer.chat_template = CHAT_TEMPLATE if chat else None
    facts = {"step": 7, "data": {}}
    return LoadedModel(model.eval(), tokenizer, AtlasConfig(model=shape), Path("random.pt"), facts)


@contextmanager
def served(backends: Sequence[Backend], settings: ServerSettings | None = None) -> Iterator[str]:
    """Serve the backends; gives the server's address."""
    listener = listen("127.0.0.1", 0)
    server = Server(build_app(backends, settings or ServerSettings()), listener, seconds_to_drain=5)
    server.start()
    while not server.is_ready:
        assert not server.wait(0.02)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.drain()
        assert server.wait(20)


@contextmanager
def served_model(
    loaded: LoadedModel, *, parallel: int = 8, queue: int = 64, settings: ServerSettings | None = None
) -> Iterator[tuple[str, Engine]]:
    engine = Engine(loaded, "random", parallel=parallel, queue=queue)
    with served([engine], settings) as address:
        yield address, engine


def with_llama_cpp(loaded: LoadedModel, folder: Path) -> list[Backend]:
    """`random`, the model, and `exported`, the same model in llama.cpp, if llama.cpp is installed."""
    backends: list[Backend] = [Engine(loaded, "random", parallel=8, queue=64)]
    try:
        from atlas.serving.backends.llama import Llama

        path = folder / "exported.gguf"
        export_gguf(loaded.model, loaded.tokenizer, path, quantize="f32", chat_template=loaded.chat_template)
        backends.append(Llama(str(path), parallel=4, queue=64, threads=1))
    except AtlasError as error:
        if "llama.cpp is not installed" not in str(error):
            raise
    return backends


def until(condition: object, seconds: float = 10.0) -> None:
    """Wait until `condition()` is true."""
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end, "it did not come true in time"
        time.sleep(0.005)
