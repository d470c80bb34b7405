"""The routes for tokens and embeddings of texts, and for the properties of a model."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from fastapi import APIRouter, Request
from fastapi.responses import Response

from atlas.inference.look import embedding
from atlas.serving.api.errors import ApiError
from atlas.serving.api.shapes import Detokenized, Embeddings, Properties, Tokenized, TokenizerInfo
from atlas.serving.api.texts import DetokenizeRequest, EmbeddingRequest, TokenizeRequest
from atlas.serving.backends.engine import Engine
from atlas.serving.backends.generation import Backend, Busy, TooLong
from atlas.serving.dispatcher import Dispatcher
from atlas.serving.prompts import check_known, each_prompt, encode_conversation, text_of
from atlas.serving.stream import Json, until_disconnect
from atlas.version import __version__


def text_routes(dispatcher: Dispatcher) -> APIRouter:
    """Return the routes /tokenize, /detokenize, /tokenizer_info, /props and /v1/embeddings."""
    router = APIRouter()
    _add_embeddings(router, dispatcher)

    @router.post("/tokenize", response_model=Tokenized)
    async def tokenize(body: TokenizeRequest) -> Response:
        """Return the tokens of a text or of a conversation, as llama.cpp's and vLLM's servers do."""
        backend = dispatcher.model(body.model)
        ids = await asyncio.to_thread(_tokens, body, backend)
        answer: dict[str, Any] = {"tokens": ids, "count": len(ids), "max_model_len": backend.context}
        if body.return_token_strs:
            answer["token_strs"] = [_text(backend, id) for id in ids]
        if body.with_pieces:
            answer["tokens"] = [{"id": id, "piece": _piece(backend, id)} for id in ids]
        return Json(answer, headers=dispatcher.ignored(body))

    @router.post("/detokenize", response_model=Detokenized)
    async def detokenize(body: DetokenizeRequest) -> Response:
        """Return the text of tokens, as llama.cpp's server does (`content`) and as vLLM's does (`prompt`)."""
        backend = dispatcher.model(body.model)
        check_known(body.tokens, backend, "tokens")
        text = text_of(body.tokens, backend)
        return Json({"content": text, "prompt": text}, headers=dispatcher.ignored(body))

    @router.get("/props", response_model=Properties)
    async def props(model: str | None = None) -> dict[str, Any]:
        """Return what llama.cpp's clients ask about a model: its context, its slots and its chat template."""
        backend = dispatcher.model(model)
        return {
            "default_generation_settings": {"n_ctx": backend.context},
            "total_slots": backend.parallel,
            "model_alias": backend.id,
            "chat_template": backend.chat_template or "",
            "modalities": {"vision": False, "audio": False},
            "build_info": f"atlas {__version__}",
        }

    @router.get("/tokenizer_info", response_model=TokenizerInfo)
    async def tokenizer_info(model: str | None = None) -> dict[str, Any]:
        """Return what vLLM's clients, such as lm-eval, ask about a tokenizer."""
        backend = dispatcher.model(model)
        named = {f"{name}_token": backend.named_tokens.get(name) for name in ("bos", "eos", "pad")}
        return {**named, "model_max_length": backend.context, "chat_template": backend.chat_template}

    return router


def _add_embeddings(router: APIRouter, dispatcher: Dispatcher) -> None:
    # Embeddings are computed one after the other in their own thread, so that they do not block tokenization.
    thread, running = ThreadPoolExecutor(1, thread_name_prefix="embed"), set[Request]()
    seconds = dispatcher.settings.seconds

    @router.post("/v1/embeddings", response_model=Embeddings)
    async def embeddings(body: EmbeddingRequest, request: Request) -> Response:
        """Return the embedding of each text: the mean of its hidden states after the final norm, scaled to length 1."""
        backend = dispatcher.model(body.model)
        if not isinstance(backend, Engine):
            raise ApiError(400, f"{backend.id}: a GGUF file has no embeddings here: serve the checkpoint")
        size = backend.loaded.config.model.hidden_size
        if body.dimensions not in (None, size):
            rule = f"must be {size} or null, since an embedding cannot be shortened, not {body.dimensions}"
            raise ApiError(400, f"dimensions: {rule}", param="dimensions")
        texts = await asyncio.to_thread(_texts, body, backend)
        if len(running) >= backend.capacity:
            raise Busy
        running.add(request)
        try:
            work = asyncio.wait_for(_embedded(texts, backend, thread), seconds)
            answer = await until_disconnect(request.receive, work)
        except asyncio.TimeoutError:
            late = f"not finished within {seconds:g} s: send fewer texts, or raise --timeout"
            raise ApiError(504, late) from None
        finally:
            running.discard(request)
        as_base64 = body.encoding_format == "base64"
        data = [
            {
                "object": "embedding",
                "index": index,
                "embedding": _base64(each) if as_base64 else each.tolist(),
            }
            for index, each in enumerate(answer or [])
        ]
        count = sum(map(len, texts))
        dispatcher.metrics.count_prompt(backend.id, count)
        usage = {"prompt_tokens": count, "total_tokens": count}
        content = {"object": "list", "data": data, "model": backend.id, "usage": usage}
        return Json(content, headers=dispatcher.ignored(body))


def _tokens(body: TokenizeRequest, backend: Backend) -> list[int]:
    if (conversation := body.conversation) is not None:
        return encode_conversation(conversation, backend)
    text, parse_special = body.content or body.prompt or "", body.parse_special is not False
    return backend.tokenize(text, add_special=body.adds_special, parse_special=parse_special)


def _text(backend: Backend, id: int) -> str:
    return backend.token_bytes(id).decode("utf-8", "replace")


def _piece(backend: Backend, id: int) -> str | list[int]:
    """A token's text, or its bytes if it is a part of a character, as llama.cpp's server returns it."""
    piece = backend.token_bytes(id)
    try:
        return piece.decode("utf-8")
    except UnicodeDecodeError:
        return list(piece)


def _texts(body: EmbeddingRequest, backend: Backend) -> list[list[int]]:
    """Return the token ids of each text of a request."""
    texts, most = [], body.truncate_prompt_tokens
    for each in each_prompt(body.input):
        ids = backend.encode(each) if isinstance(each, str) else each
        check_known(ids, backend, "input")
        if most is not None:
            ids = ids[-max(1, backend.context if most == -1 else min(most, backend.context)) :]
        if len(ids) > backend.context:
            raise TooLong(backend.context, len(ids), "input")
        texts.append(ids)
    return texts


async def _embedded(
    texts: Sequence[list[int]], engine: Engine, thread: ThreadPoolExecutor
) -> list[np.ndarray[Any, Any]]:
    loop = asyncio.get_running_loop()
    vectors = []
    for ids in texts:
        vector = (await loop.run_in_executor(thread, embedding, engine.loaded, ids)).numpy()
        if not np.isfinite(vector).all():
            raise ApiError(500, "the model failed: its embedding is not finite")
        vectors.append(vector)
    return vectors


def _base64(numbers: np.ndarray[Any, Any]) -> str:
    return base64.b64encode(numbers.astype("<f4").tobytes()).decode()
