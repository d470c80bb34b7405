"""Answers in the format of OpenAI's API: complete or in chunks, with log-probabilities if the client requests them."""

from __future__ import annotations

import codecs
import math
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

from atlas.serving.backends.generation import Candidate, GenerationRequest, Piece
from atlas.serving.stream import event
from atlas.serving.tools import Call, CallStream, read_calls

_LOWEST = -9999.0
"""The log-probability that OpenAI's API returns for an impossible token, since JSON has no infinity."""


class Answer:
    """The answer to `request`: a chat completion if `is_chat` is true, otherwise a text completion.

    Of every `of` generations, the answer has the `best` ones: those whose tokens have the largest mean log-probability.
    `must_call` is not None if the model may call functions: true if the text is a call, false if it may contain calls.
    """

    def __init__(
        self,
        request: GenerationRequest,
        *,
        is_chat: bool,
        has_logprobs: bool,
        best: int = 1,
        of: int = 1,
        must_call: bool | None = None,
    ) -> None:
        self.request = request
        self.must_call = must_call
        self.is_chat = is_chat
        self.has_logprobs = has_logprobs
        self.best, self.of = best, of
        self.head = {
            "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{uuid.uuid4().hex}",
            "object": "chat.completion" if is_chat else "text_completion",
            "created": int(time.time()),
            "model": request.backend.id,
        }
        self._offsets = [0] * len(request.generations)
        """Number of characters in each generation's tokens so far."""
        self._decoders = [codecs.getincrementaldecoder("utf-8")("replace") for _ in request.generations]
        self._echoed: Sequence[str] = [""] * len(request.generations)
        self._unscored = {each.index for each in request.generations if each.scores_prompt}
        """The generations whose prompt's first token, which has no log-probability, is not written yet."""

    def echo(self, texts: Sequence[str]) -> None:
        """Put a text in front of the text of each generation."""
        self._echoed = texts

    async def complete(self) -> dict[str, Any]:
        """Wait until all generations have ended, and return the answer. Raises `ApiError` if a generation fails or the
        time limit is over."""
        generated: list[list[Piece]] = [[] for _ in self.request.generations]
        async for index, piece in self.request.pieces():
            generated[index].append(piece)
        choices: list[dict[str, Any]] = []
        for index in self._best_of(generated):
            text, calls = "".join(piece.text for piece in generated[index]), list[Call]()
            if self.must_call is not None:
                text, calls = read_calls(text, must_call=self.must_call)
            text = self._echoed[index] + text
            message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
            if calls:
                message |= {"content": text or None, "tool_calls": [call.shown() for call in calls]}
            content = {"message": message} if self.is_chat else {"text": text}
            choice = {**self._choice(index, content, generated[index]), "index": len(choices)}
            choices.append({**choice, "finish_reason": "tool_calls"} if calls else choice)
        return {**self.head, "choices": choices, "usage": self.usage}

    def _best_of(self, generated: Sequence[Sequence[Piece]]) -> list[int]:
        """Return the indices of the best generations of each prompt, the best first. If no generation is left out, the
        order stays."""
        if self.best == self.of:
            return list(range(len(generated)))
        chosen = []
        for start in range(0, len(generated), self.of):
            group = range(start, start + self.of)
            chosen += sorted(group, key=lambda index: -_mean_logprob(generated[index]))[: self.best]
        return chosen

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
        echoed, calls = list(self._echoed), [CallStream(must_call=bool(self.must_call)) for _ in self._echoed]
        async for index, piece in self.request.pieces():
            text = piece.text
            if self.must_call is not None:
                text = calls[index].add(text, is_last=piece.finish is not None)
            text, echoed[index] = echoed[index] + text, ""
            if text or piece.finish or self.has_logprobs:
                delta: dict[str, Any] = {"content": text} if text else {}
                content = {"delta": delta} if self.is_chat else {"text": text}
                choice = self._choice(index, content, [piece])
                if piece.finish and (found := calls[index].calls):
                    delta["tool_calls"] = [call.shown(number) for number, call in enumerate(found)]
                    choice["finish_reason"] = "tool_calls"
                yield event({**head, "choices": [choice]})
        if include_usage:
            yield event({**head, "choices": [], "usage": self.usage})
        yield "data: [DONE]\n\n"

    @property
    def usage(self) -> dict[str, Any]:
        """The number of tokens in the prompts, and in the generations so far."""
        prompt, completion = self.request.num_prompt_tokens, self.request.num_generated
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": self.request.num_reused},
        }

    def _choice(self, index: int, content: dict[str, Any], pieces: Sequence[Piece]) -> dict[str, Any]:
        logprobs = self.logprobs(index, pieces) if self.has_logprobs else None
        return {"index": index, **content, "logprobs": logprobs, "finish_reason": pieces[-1].finish}

    def logprobs(self, index: int, pieces: Sequence[Piece]) -> dict[str, Any]:
        """Return the log-probabilities of the tokens in the next pieces of a generation."""
        tokens = [each for piece in pieces for each in (*piece.prompt, piece.candidates) if each]
        if self.is_chat:
            content = [
                {**self._candidate(chosen), "top_logprobs": [self._candidate(each) for each in likeliest]}
                for chosen, *likeliest in tokens
            ]
            return {"content": content, "refusal": None}
        shown: list[tuple[int, float | None, dict[str, float] | None]] = []
        if index in self._unscored:
            self._unscored.discard(index)
            shown.append((self.request.generations[index].prompt[0], None, None))
        for candidates in tokens:
            chosen = candidates[0]
            shown.append((chosen.token, max(chosen.logprob, _LOWEST), self._top_logprobs(*candidates)))
        offsets = []
        for token, *_ in shown:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(self._decoders[index].decode(self.request.backend.token_bytes(token)))
        return {
            "tokens": [self._text(token) for token, *_ in shown],
            "token_logprobs": [logprob for _, logprob, _ in shown],
            "top_logprobs": [alternatives for _, _, alternatives in shown],
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


def _mean_logprob(pieces: Sequence[Piece]) -> float:
    """The mean log-probability of the tokens of a generation; -inf if it has none."""
    logprobs = [piece.candidates[0].logprob for piece in pieces if piece.candidates]
    return sum(logprobs) / len(logprobs) if logprobs else -math.inf
