"""The answer to a request in OpenAI's shape: complete or in chunks, with log-probabilities on request."""

from __future__ import annotations

import codecs
import math
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

from atlas.serving.generation import Candidate, GenerationRequest, Piece
from atlas.serving.stream import event

_LOWEST = -9999.0
"""OpenAI's log-probability of an impossible token: JSON has no infinity."""


class Answer:
    """The answer to `request`. `is_chat` decides its shape, `logprobs` whether it has log-probabilities."""

    def __init__(self, request: GenerationRequest, *, is_chat: bool, logprobs: bool) -> None:
        self.request = request
        self.is_chat = is_chat
        self.logprobs = logprobs
        self.head = {
            "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{uuid.uuid4().hex}",
            "object": "chat.completion" if is_chat else "text_completion",
            "created": int(time.time()),
            "model": request.backend.id,
        }
        self._offsets = [0] * len(request.generations)
        """Characters of each generation's tokens so far."""
        self._decoders = [codecs.getincrementaldecoder("utf-8")("replace") for _ in request.generations]

    async def complete(self) -> dict[str, Any]:
        """The answer when all generations have ended. Raises `ApiError`."""
        generated: list[list[Piece]] = [[] for _ in self.request.generations]
        async for index, piece in self.request.pieces():
            generated[index].append(piece)
        choices = []
        for index, pieces in enumerate(generated):
            text = "".join(piece.text for piece in pieces)
            message = {"role": "assistant", "content": text, "refusal": None}
            content = {"message": message} if self.is_chat else {"text": text}
            choices.append(self._choice(index, content, pieces))
        return {**self.head, "choices": choices, "usage": self.usage}

    async def stream(self, *, include_usage: bool) -> AsyncIterator[str]:
        """The answer as server-sent events, a chunk for each piece that shows anything."""
        head: dict[str, Any] = {**self.head, **({"object": "chat.completion.chunk"} if self.is_chat else {})}
        if include_usage:
            head["usage"] = None
        if self.is_chat:
            for index in range(len(self.request.generations)):
                first = {"delta": {"role": "assistant", "content": ""}}
                yield event(
                    {**head, "choices": [{"index": index, **first, "logprobs": None, "finish_reason": None}]}
                )
        async for index, piece in self.request.pieces():
            if piece.text or piece.finish or self.logprobs:
                delta = {"content": piece.text} if piece.text else {}
                content = {"delta": delta} if self.is_chat else {"text": piece.text}
                yield event({**head, "choices": [self._choice(index, content, [piece])]})
        if include_usage:
            yield event({**head, "choices": [], "usage": self.usage})
        yield "data: [DONE]\n\n"

    @property
    def usage(self) -> dict[str, int]:
        """Tokens of the prompts and of the generations so far."""
        prompt, completion = self.request.num_prompt_tokens, self.request.num_generated
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}

    def _choice(self, index: int, content: dict[str, Any], pieces: Sequence[Piece]) -> dict[str, Any]:
        logprobs = self._logprobs(index, pieces) if self.logprobs else None
        return {"index": index, **content, "logprobs": logprobs, "finish_reason": pieces[-1].finish}

    def _logprobs(self, index: int, pieces: Sequence[Piece]) -> dict[str, Any]:
        chosen = [(piece, piece.token) for piece in pieces if piece.token is not None]
        if self.is_chat:
            content = [
                {
                    **self._candidate(Candidate(token, piece.logprob or 0.0)),
                    "top_logprobs": [self._candidate(each) for each in piece.candidates],
                }
                for piece, token in chosen
            ]
            return {"content": content, "refusal": None}
        offsets = []
        for _, token in chosen:
            offsets.append(self._offsets[index])
            data = self.request.backend.token_bytes(token)
            self._offsets[index] += len(self._decoders[index].decode(data))
        return {
            "tokens": [self._text(token) for _, token in chosen],
            "token_logprobs": [_finite(piece.logprob) for piece, _ in chosen],
            "top_logprobs": [self._top_logprobs(piece, token) for piece, token in chosen],
            "text_offset": offsets,
        }

    def _top_logprobs(self, piece: Piece, token: int) -> dict[str, float]:
        """As in OpenAI's API, the chosen token is included, so there may be one more than requested."""
        likeliest = {self._text(each.token): _finite(each.logprob) for each in piece.candidates}
        return {**likeliest, self._text(token): _finite(piece.logprob)} if likeliest else {}

    def _candidate(self, candidate: Candidate) -> dict[str, Any]:
        return {
            "token": self._text(candidate.token),
            "logprob": _finite(candidate.logprob),
            "bytes": list(self.request.backend.token_bytes(candidate.token)),
        }

    def _text(self, token: int) -> str:
        """The text of a token. Bytes of an incomplete character get OpenAI's unique spelling, `bytes:\\xe2\\x82`."""
        data = self.request.backend.token_bytes(token)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _finite(logprob: float | None) -> float:
    return _LOWEST if logprob is None or not math.isfinite(logprob) else logprob
