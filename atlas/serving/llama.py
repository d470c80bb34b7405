"""An exported file behind the same API: llama.cpp writes, through the package `xllamacpp`.

Its server listens on the loopback interface under a key of its own, and a thread of this process asks it for each text.
"""

from __future__ import annotations

import http.client
import json
import secrets
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from atlas.errors import AtlasError
from atlas.export.gguf import read_metadata
from atlas.serving.text import Busy, Candidate, Generation, Piece, Send
from atlas.tokenizer.byte_level import token_bytes
from atlas.tokenizer.chat import Message

_SAMPLERS = ("penalties", "temperature", "top_k", "top_p", "min_p")
"""In the order of Atlas's own sampler."""
_FINISH = {"limit": "length", "eos": "stop", "word": "stop"}


class Llama:
    """A GGUF file, and llama.cpp with it."""

    def __init__(self, path: str, *, parallel: int, queue: int, threads: int) -> None:
        """Raises `AtlasError` for a file that is none, and where llama.cpp is missing."""
        facts = read_metadata(Path(path))
        self.id = Path(path).stem
        self.created = int(time.time())
        self.parallel = parallel
        self.capacity = parallel + queue
        try:
            trained = int(facts[f"{facts['general.architecture']}.context_length"])
            self._tokens: list[str] = facts["tokenizer.ggml.tokens"]
            self._eos_id = int(facts["tokenizer.ggml.eos_token_id"])
        except KeyError as error:
            raise AtlasError(
                f"--gguf {path}: says nothing of {error}: give a file with a model that writes"
            ) from None
        self.context = trained - 1  # llama.cpp keeps a place for the first new token
        self._is_byte_level = facts.get("tokenizer.ggml.model") == "gpt2"
        self._has_template = "tokenizer.chat_template" in facts
        self.vocab_size = len(self._tokens)
        self._key = secrets.token_hex()
        self._server = _load(
            path, context=trained * parallel, parallel=parallel, threads=threads, key=self._key
        )
        self._address = urlsplit(self._server.listening_address).netloc
        self._pool = ThreadPoolExecutor(parallel, thread_name_prefix="llama")
        self._lock = threading.Lock()
        self._running = 0
        self._waiting: list[Generation] = []
        self._closed = False

    def begin(self, send: Send) -> None:
        self._send = send

    def encode(self, text: str) -> list[int]:
        """Ids of a text; an empty one begins a document."""
        return self._encode(text, parse_special=False) or [self._eos_id]

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Ids of a conversation in the file's own template. Raises `AtlasError` where it has none."""
        if not self._has_template:
            raise AtlasError(f"{self.id}: the file has no chat template: ask /v1/completions")
        said = [{"role": message.role, "content": message.content} for message in messages]
        prompt = self._ask("/apply-template", {"messages": said})["prompt"]
        return self._encode(prompt, parse_special=True)

    def _encode(self, text: str, *, parse_special: bool) -> list[int]:
        body = {"content": text, "add_special": False, "parse_special": parse_special}
        ids: list[int] = self._ask("/tokenize", body)["tokens"]
        return ids

    def token_bytes(self, token: int) -> bytes:
        text = self._tokens[token]
        if not self._is_byte_level:
            return text.encode("utf-8")
        try:
            return token_bytes(text)
        except KeyError:  # one that was added, as it is written
            return text.encode("utf-8")

    def submit(self, texts: Sequence[Generation]) -> None:
        """Take all of them or, as `Busy`, none."""
        with self._lock:
            self._waiting = [text for text in self._waiting if not text.cancelled]
            if self._running + len(self._waiting) + len(texts) > self.capacity:
                raise Busy
            self._waiting += texts
        for text in texts:
            self._pool.submit(self._write, text)

    @property
    def num_running(self) -> int:
        return self._running

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def close(self) -> None:
        """What is unfinished stays so."""
        self._closed = True
        self._pool.shutdown(cancel_futures=True)
        self._server = None

    # In the threads of the pool

    def _write(self, text: Generation) -> None:
        with self._lock:
            self._waiting = [each for each in self._waiting if each is not text]
            if text.cancelled:
                return
            self._running += 1
        try:
            for piece in self._pieces(text):
                self._send([(text, piece)])
        except Exception:  # this text is lost, and the server goes on
            traceback.print_exc(file=sys.stderr)
            self._send([(text, Piece(None, "", finish="error", num_tokens=0))])
        finally:
            with self._lock:
                self._running -= 1

    def _pieces(self, text: Generation) -> Iterator[Piece]:
        sampling = text.sampling
        request = {
            "prompt": text.prompt,
            "n_predict": text.max_tokens,
            "stream": True,
            "return_tokens": True,
            "samplers": _SAMPLERS,
            "temperature": sampling.temperature,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
            "min_p": sampling.min_p,
            "repeat_penalty": sampling.repetition_penalty,
            "repeat_last_n": self.context + 1,
            "seed": text.seed % (2**32 - 1),  # the last one is llama.cpp's word for any
            "stop": text.stop,
            # At least one, or it does not tell of the token that it took.
            "n_probs": 0 if text.num_candidates is None else max(1, text.num_candidates),
        }
        connection = http.client.HTTPConnection(self._address)
        try:
            connection.request("POST", "/completion", json.dumps(request), self._headers)
            response = connection.getresponse()
            if response.status != 200:
                raise ValueError(response.read())
            told, has_ended = 0, False
            for line in response:
                if text.cancelled or self._closed:
                    return  # closing the connection ends it there, too
                if line.startswith(b"data: "):
                    event = json.loads(line[6:])
                    # It is counted, too, and after half a character told before the last event.
                    has_ended = (
                        has_ended or event.get("stop_type") == "eos" or self._eos_id in event["tokens"]
                    )
                    event["tokens"] = [token for token in event["tokens"] if token != self._eos_id]
                    total = event["tokens_predicted"] - has_ended
                    yield _piece_of(event, text.num_candidates, num_tokens=total - told)
                    told = total
        finally:
            connection.close()

    @property
    def _headers(self) -> dict[str, str]:
        return {"Content-Type": "application/json", "Authorization": f"Bearer {self._key}"}

    def _ask(self, route: str, body: dict[str, Any]) -> dict[str, Any]:
        connection = http.client.HTTPConnection(self._address)
        try:
            connection.request("POST", route, json.dumps(body), self._headers)
            answer: dict[str, Any] = json.loads(connection.getresponse().read())
        finally:
            connection.close()
        if "error" in answer:
            raise AtlasError(f"llama.cpp: {answer['error']['message']}")
        return answer


def _piece_of(event: dict[str, Any], num_candidates: int | None, *, num_tokens: int) -> Piece:
    """Of one event. llama.cpp tells nothing of a token that ends inside a character, but counts it."""
    finish = _FINISH[event["stop_type"]] if event["stop"] else None
    if not event["tokens"]:
        return Piece(None, event["content"], finish=finish, num_tokens=num_tokens)
    logprob: float | None = None
    candidates: tuple[Candidate, ...] = ()
    for said in event.get("completion_probabilities", []):
        logprob = said["logprob"]
        likeliest = said["top_logprobs"][:num_candidates]
        candidates = tuple(Candidate(each["id"], each["logprob"]) for each in likeliest)
    return Piece(event["tokens"][-1], event["content"], logprob, candidates, finish, num_tokens)


def _load(path: str, *, context: int, parallel: int, threads: int, key: str) -> Any:
    try:
        import xllamacpp
    except ImportError:
        raise AtlasError('--gguf: llama.cpp is not installed: pip install "atlas-llm[llama]"') from None
    params = xllamacpp.CommonParams()
    params.model.path = path
    params.n_ctx = context
    params.n_parallel = parallel
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.api_keys = [key]
    params.fit_params = False
    params.warmup = False
    params.verbosity = 1  # errors only
    try:
        return xllamacpp.Server(params)
    except RuntimeError as error:
        raise AtlasError(
            f"--gguf {path}: llama.cpp cannot load it ({error!s:.200}): export it again"
        ) from None
