"""A text in OpenAI's shapes: whole or as chunks of a stream, with log-probabilities where they are asked for."""

from __future__ import annotations

import codecs
import math
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from atlas.serving.errors import Refusal
from atlas.serving.stream import event
from atlas.serving.text import Backend, Candidate, GenerationRequest, Piece

_LEAST = -9999.0
"""What OpenAI says of a token that cannot be: JSON has no infinity."""


@dataclass
class Choice:
    """What has been written of one text."""

    text: str = ""
    pieces: list[Piece] = field(default_factory=list)
    offset: int = 0
    """Characters of the tokens so far."""
    reader: codecs.IncrementalDecoder = field(
        default_factory=lambda: codecs.getincrementaldecoder("utf-8")("replace")
    )
    """Of their bytes."""
    finish: str | None = None


class Answer:
    """`is_chat` decides the shape. `logprobs`: whether they are told."""

    def __init__(self, generation_request: GenerationRequest, *, is_chat: bool, logprobs: bool) -> None:
        self.generation_request = generation_request
        self.is_chat = is_chat
        self.logprobs = logprobs
        self.backend: Backend = generation_request.backend
        self.head = {
            "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{uuid.uuid4().hex}",
            "object": "chat.completion" if is_chat else "text_completion",
            "created": int(time.time()),
            "model": generation_request.backend.id,
        }
        self._choices = [Choice() for _ in generation_request.texts]

    async def whole(self, seconds: float) -> dict[str, Any]:
        """The answer when all texts are written. Raises `Refusal`."""
        async for index, piece in self.generation_request.pieces(seconds):
            if piece.finish in ("error", "timeout"):
                raise refusal(piece, seconds)
            choice = self._choices[index]
            choice.text += piece.text
            choice.pieces.append(piece)
            choice.finish = piece.finish
        choices = []
        for index, choice in enumerate(self._choices):
            said = self._top_logprobs(choice, [piece for piece in choice.pieces if piece.token is not None])
            content = (
                {"message": {"role": "assistant", "content": choice.text, "refusal": None}}
                if self.is_chat
                else {"text": choice.text}
            )
            choices.append({"index": index, **content, "logprobs": said, "finish_reason": choice.finish})
        return {**self.head, "choices": choices, "usage": self.usage}

    async def stream(self, seconds: float, *, include_usage: bool) -> AsyncIterator[str]:
        """The same as server-sent events, a chunk for each piece that shows anything."""
        head: dict[str, Any] = {**self.head, **({"object": "chat.completion.chunk"} if self.is_chat else {})}
        if include_usage:
            head["usage"] = None
        if self.is_chat:
            for index in range(len(self._choices)):
                delta = {"role": "assistant", "content": ""}
                yield event({**head, "choices": [_choice(index, delta=delta)]})
        async for index, piece in self.generation_request.pieces(seconds):
            if piece.finish in ("error", "timeout"):
                yield event(refusal(piece, seconds).body)
                return
            if not (piece.text or piece.finish or self.logprobs):
                continue
            said = self._top_logprobs(self._choices[index], [] if piece.token is None else [piece])
            if self.is_chat:
                content: dict[str, Any] = {"delta": {"content": piece.text} if piece.text else {}}
            else:
                content = {"text": piece.text}
            chunk = _choice(index, **content, logprobs=said, finish_reason=piece.finish)
            yield event({**head, "choices": [chunk]})
        if include_usage:
            yield event({**head, "choices": [], "usage": self.usage})
        yield "data: [DONE]\n\n"

    @property
    def usage(self) -> dict[str, int]:
        prompt, written = self.generation_request.num_prompt_tokens, self.generation_request.num_written
        return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}

    def _top_logprobs(self, choice: Choice, pieces: Sequence[Piece]) -> dict[str, Any] | None:
        if not self.logprobs:
            return None
        if self.is_chat:
            return {"content": [self._chat_token(piece) for piece in pieces], "refusal": None}
        told: dict[str, list[Any]] = {
            "tokens": [],
            "token_logprobs": [],
            "top_logprobs": [],
            "text_offset": [],
        }
        for piece in pieces:
            assert piece.token is not None
            text = self._shown(piece.token)
            told["tokens"].append(text)
            told["token_logprobs"].append(_finite(piece.logprob))
            # The token itself is among them, as OpenAI has it, so that there may be one more than were asked for.
            likeliest = {self._shown(each.token): _finite(each.logprob) for each in piece.candidates}
            told["top_logprobs"].append({**likeliest, text: _finite(piece.logprob)} if likeliest else {})
            told["text_offset"].append(choice.offset)
            choice.offset += len(choice.reader.decode(self.backend.token_bytes(piece.token)))
        return told

    def _chat_token(self, piece: Piece) -> dict[str, Any]:
        assert piece.token is not None
        own = self._candidate(Candidate(piece.token, piece.logprob or 0.0))
        return {**own, "top_logprobs": [self._candidate(each) for each in piece.candidates]}

    def _candidate(self, candidate: Candidate) -> dict[str, Any]:
        token = self.backend.token_bytes(candidate.token)
        return {
            "token": self._shown(candidate.token),
            "logprob": _finite(candidate.logprob),
            "bytes": list(token),
        }

    def _shown(self, token: int) -> str:
        """Its text; of bytes that are no character OpenAI's spelling, `bytes:\\xe2\\x82`, so that no two are alike."""
        data = self.backend.token_bytes(token)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _choice(
    index: int, *, logprobs: Any = None, finish_reason: str | None = None, **content: Any
) -> dict[str, Any]:
    return {"index": index, **content, "logprobs": logprobs, "finish_reason": finish_reason}


def _finite(logprob: float | None) -> float:
    return _LEAST if logprob is None or not math.isfinite(logprob) else logprob


def refusal(piece: Piece, seconds: float) -> Refusal:
    if piece.finish == "timeout":
        return Refusal(504, f"not written within {seconds:g} s: ask for fewer tokens, or raise --timeout")
    return Refusal(500, "the model failed at this text: the server's log says how")
