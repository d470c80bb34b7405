"""Answers in the format of OpenAI's API: complete or in chunks, with log-probabilities if the client requests them."""

from __future__ import annotations

import codecs
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

from atlas.serving.backends.generation import Candidate, GenerationRequest, Piece
from atlas.serving.stream import event

_LOWEST = -9999.0
"""The log-probability that OpenAI's API returns for an impossible token, since JSON has no infinity."""


class Answer:
    """The answer to `request`: a chat completion if `is_chat` is true, otherwise a text completion."""

    def __init__(self, request: GenerationRequest, *, is_chat: bool) -> None:
        self.request = request
        self.is_chat = is_chat
        self.has_logprobs = request.generations[0].num_candidates is not None
        self.head = {
            "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{uuid.uuid4().hex}",
            "object": "chat.completion" if is_chat else "text_completion",
            "created": int(time.time()),
            "model": request.backend.id,
        }
        self._offsets = [0] * len(request.generations)
        """Number of characters in each generation's tokens so far."""
        self._decoders = [codecs.getincrementaldecoder("utf-8")("replace") for _ in request.generations]

    async def complete(self) -> dict[str, Any]:
        """Wait until all generations have ended, and return the answer. Raises `ApiError` if a generation fails or the
        time limit is over."""
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
        """Yield the answer as server-sent events: a chunk for each piece with text, log-probabilities or a finish
        reason."""
        head: dict[str, Any] = {**self.head, **({"object": "chat.completion.chunk"} if self.is_chat else {})}
        if include_usage:
            head["usage"] = None
        if self.is_chat:
            for index in range(len(self.request.generations)):
                first = {"index": index, "delta": {"role": "assistant", "content": ""}}
                yield event({**head, "choices": [{**first, "logprobs": None, "finish_reason": None}]})
        async for index, piece in self.request.pieces():
            if piece.text or piece.finish or self.has_logprobs:
                delta = {"content": piece.text} if piece.text else {}
                content = {"delta": delta} if self.is_chat else {"text": piece.text}
                yield event({**head, "choices": [self._choice(index, content, [piece])]})
        if include_usage:
            yield event({**head, "choices": [], "usage": self.usage})
        yield "data: [DONE]\n\n"

    @property
    def usage(self) -> dict[str, int]:
        """The number of tokens in the prompts, and in the generations so far."""
        prompt, completion = self.request.num_prompt_tokens, self.request.num_generated
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}

    def _choice(self, index: int, content: dict[str, Any], pieces: Sequence[Piece]) -> dict[str, Any]:
        logprobs = self._logprobs(index, pieces) if self.has_logprobs else None
        return {"index": index, **content, "logprobs": logprobs, "finish_reason": pieces[-1].finish}

    def _logprobs(self, index: int, pieces: Sequence[Piece]) -> dict[str, Any]:
        tokens = [piece.candidates for piece in pieces if piece.candidates]
        if self.is_chat:
            content = [
                {**self._candidate(chosen), "top_logprobs": [self._candidate(each) for each in likeliest]}
                for chosen, *likeliest in tokens
            ]
            return {"content": content, "refusal": None}
        offsets = []
        for chosen, *_ in tokens:
            offsets.append(self._offsets[index])
            data = self.request.backend.token_bytes(chosen.token)
            self._offsets[index] += len(self._decoders[index].decode(data))
        return {
            "tokens": [self._text(chosen.token) for chosen, *_ in tokens],
            "token_logprobs": [max(chosen.logprob, _LOWEST) for chosen, *_ in tokens],
            "top_logprobs": [self._top_logprobs(*candidates) for candidates in tokens],
            "text_offset": offsets,
        }

    def _top_logprobs(self, chosen: Candidate, *likeliest: Candidate) -> dict[str, float]:
        """Return the text of each candidate → the log-probability of this candidate.

        As in OpenAI's API, the chosen token is included, so there may be one candidate more than requested.
        """
        shown = (*likeliest, chosen) if likeliest else ()
        return {self._text(each.token): max(each.logprob, _LOWEST) for each in shown}

    def _candidate(self, candidate: Candidate) -> dict[str, Any]:
        return {
            "token": self._text(candidate.token),
            "logprob": max(candidate.logprob, _LOWEST),
            "bytes": list(self.request.backend.token_bytes(candidate.token)),
        }

    def _text(self, token: int) -> str:
        """Return the text of a token. The bytes of an incomplete character are written as in OpenAI's API:
        `bytes:\\xe2\\x82`."""
        data = self.request.backend.token_bytes(token)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
