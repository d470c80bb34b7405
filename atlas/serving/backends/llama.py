"""A backend that serves a GGUF file: llama.cpp generates the text, through the package `xllamacpp`.

llama.cpp's server listens on the loopback interface and has its own API key. Threads of this process send requests to
that server.
"""

from __future__ import annotations

import http.client
import json
import math
import secrets
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from atlas.errors import AtlasError
from atlas.export.gguf import read_metadata
from atlas.export.llama_cpp import server_params
from atlas.inference.sampling import BAN
from atlas.serving.api.errors import ApiError
from atlas.serving.backends.generation import Backend, Busy, Candidate, Generation, Piece, failure
from atlas.serving.backends.grammar import Grammar, rules_of
from atlas.tokenizer.byte_level import token_bytes
from atlas.tokenizer.chat import Message

_SAMPLERS = ("penalties", "temperature", "top_k", "top_p", "min_p")
"""The names of llama.cpp's samplers, in the order in which Atlas applies its own samplers."""
_FINISH = {"limit": "length", "eos": "stop", "word": "stop"}
_WITHHELD: dict[str, Any] = {"logprob": None, "top_logprobs": []}


class Llama(Backend):
    """A GGUF file and the llama.cpp server that runs it."""

    def __init__(
        self, path: str, *, parallel: int, queue: int, threads: int, context: int | None = None
    ) -> None:
        """Load the file. `context` is a shorter context than the file's. Raises `AtlasError` if the file is not the
        GGUF file of a language model, or if llama.cpp is not installed."""
        metadata = read_metadata(Path(path))
        try:
            trained = int(metadata[f"{metadata['general.architecture']}.context_length"])
            self._tokens: list[str] = metadata["tokenizer.ggml.tokens"]
            self._eos_id = int(metadata["tokenizer.ggml.eos_token_id"])
        except KeyError as error:
            raise AtlasError(f"--gguf {path}: has no {error}: give the file of a language model") from None
        if context is not None and not 2 <= context <= trained:
            raise AtlasError(f"--context {context}: {path} has a context of {trained:,} tokens")
        used = context or trained
        name, vocab_size = Path(path).stem, len(self._tokens)
        # llama.cpp needs one position for the first new token
        super().__init__(name, context=used - 1, vocab_size=vocab_size, parallel=parallel, queue=queue)
        self._is_byte_level = metadata.get("tokenizer.ggml.model") == "gpt2"
        self.longest_token = max(map(len, self._tokens)) if self._is_byte_level else None
        ids = {name: metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos")}
        self._named = {name: self._tokens[id] for name, id in ids.items() if id is not None}
        self._template: str | None = metadata.get("tokenizer.chat_template")
        self._key = secrets.token_hex()
        try:
            import xllamacpp

            params = server_params(path, used * parallel, threads, parallel=parallel)
            params.api_keys = [self._key]
            params.prefill_assistant = False  # `encode_chat` continues a message itself
            self._server = xllamacpp.Server(params)
        except ImportError:
            raise AtlasError('--gguf: llama.cpp is not installed: pip install "atlas-llm[llama]"') from None
        except RuntimeError as error:
            reason = f"llama.cpp cannot load it ({error!s:.200}): export it again"
            raise AtlasError(f"--gguf {path}: {reason}") from None
        self._address = urlsplit(self._server.listening_address).netloc
        self._pool = ThreadPoolExecutor(parallel, thread_name_prefix="llama")
        self._lock = threading.Lock()
        self._running: set[Generation] = set()
        self._waiting: set[Generation] = set()
        self._closed = False

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text. For an empty text, return the id that begins a document. As in llama.cpp's
        own server, special tokens in the text, such as `<|im_end|>`, are read as special tokens."""
        return self.tokenize(text, add_special=True, parse_special=True) or [self._eos_id]

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        """Return the token ids of a text, with the token that begins a text if `add_special` is true. If
        `parse_special` is true, special tokens in the text are read as such."""
        self.check_length(text)
        body = {"content": text, "add_special": add_special, "parse_special": parse_special}
        ids: list[int] = self._ask("/tokenize", body)["tokens"]
        return ids

    def encode_chat(
        self,
        messages: Sequence[Message],
        *,
        continues_last: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Return the token ids of a conversation in the file's chat template, up to the start of the answer. Raises
        `AtlasError` if there is no template, or if the template refuses the conversation."""
        if self._template is None:
            raise AtlasError(f"{self.id}: the file has no chat template: use /v1/completions")
        self.check_length(*(message.content.strip() for message in messages))
        earlier = messages[:-1] if continues_last else messages
        others = dict(variables or {})
        tools = others.pop("tools", None)
        body: dict[str, Any] = {
            "messages": [{"role": each.role, "content": each.content} for each in earlier]
        }
        body |= {"chat_template_kwargs": others, **({"tools": tools} if tools else {})}
        text = self._ask("/apply-template", body)["prompt"]
        text += messages[-1].content.lstrip() if continues_last else ""
        return self.tokenize(text, add_special=True, parse_special=True)

    @property
    def named_tokens(self) -> Mapping[str, str]:
        """`bos`, `eos` and so on → the special token with this meaning."""
        return self._named

    @property
    def chat_template(self) -> str | None:
        """The file's chat template in Jinja; None if it has none."""
        return self._template

    def constrain(self, grammar: Grammar) -> str:
        """Return the rules of a grammar, which llama.cpp follows with its own llguidance. Raises `ApiError` if the
        schema is not valid or not supported."""
        return rules_of(grammar, self._tokens)

    def token_bytes(self, token: int) -> bytes:
        """Return the bytes of a token."""
        text = self._tokens[token]
        if self._is_byte_level:
            with suppress(KeyError):  # an added token is stored as plain text
                return token_bytes(text)
        return text.encode("utf-8")

    def submit(self, generations: Sequence[Generation]) -> None:
        """Put all generations into the queue. If the queue is too full, add no generation and raise `Busy`. Raises
        `ApiError` for what llama.cpp's server cannot do."""
        for name, is_wanted in (
            ("min_tokens", generations[0].min_tokens > 0),
            ("echo with logprobs", generations[0].scores_prompt),
        ):
            if is_wanted:
                raise ApiError(
                    400,
                    f"{name}: llama.cpp's server cannot do this: serve the checkpoint",
                    param=name.split()[0],
                )
        with self._lock:
            self._waiting = {each for each in self._waiting if not each.cancelled}
            if len(self._running) + len(self._waiting) + len(generations) > self.capacity:
                raise Busy
            self._waiting.update(generations)
        for generation in generations:
            self._pool.submit(self._generate, generation)

    def close(self) -> None:
        """Stop llama.cpp's server. Running generations stop without a last piece."""
        self._closed = True
        self._pool.shutdown(cancel_futures=True)
        self._server = None

    # The following methods run in the threads of the pool.

    def _generate(self, generation: Generation) -> None:
        with self._lock:
            self._waiting.discard(generation)
            if generation.cancelled:
                return
            self._running.add(generation)
        try:
            for piece in self._pieces(generation):
                self._send([(generation, piece)])
        except Exception:  # only this generation fails; the server continues
            traceback.print_exc(file=sys.stderr)
            self._send([(generation, failure("error"))])
        finally:
            with self._lock:
                self._running.remove(generation)

    def _pieces(self, generation: Generation) -> Iterator[Piece]:
        sampling = generation.sampling
        body = {
            "prompt": generation.prompt,
            "n_predict": generation.max_tokens,
            "stream": True,
            "return_tokens": True,
            "samplers": _SAMPLERS,
            **asdict(sampling),  # llama.cpp uses the same names, except for the repetition penalty
            "repeat_penalty": sampling.repetition_penalty,
            "repeat_last_n": self.context + 1 if sampling.repeat_last_n < 0 else sampling.repeat_last_n,
            "logit_bias": [[id, bias if bias > BAN else False] for id, bias in sampling.logit_bias],
            "ignore_eos": generation.ignore_eos,
            "cache_prompt": generation.uses_known,
            "grammar": generation.constraint or "",
            "seed": generation.seed % (2**32 - 1),  # 2³² − 1 means a random seed in llama.cpp
            "stop": generation.stop,
            # With `n_probs` 0, llama.cpp would not report the probability of the chosen token.
            "n_probs": 0 if generation.num_candidates is None else max(1, generation.num_candidates),
        }
        with self._post("/completion", body) as response:
            if response.status != 200:
                raise ValueError(response.read())
            reported, has_ended = 0, False
            for line in response:
                if generation.cancelled or self._closed:
                    return  # closing the connection also ends the generation in llama.cpp
                if line.startswith(b"data: "):
                    event = json.loads(line[6:])
                    # `tokens_predicted` includes the end-of-text token. If this token follows an incomplete character,
                    # llama.cpp reports it before the last event.
                    has_ended |= event.get("stop_type") == "eos" or self._eos_id in event["tokens"]
                    event["tokens"] = [token for token in event["tokens"] if token != self._eos_id]
                    total = event["tokens_predicted"] - has_ended
                    generation.num_reused = event.get("timings", {}).get("cache_n", generation.num_reused)
                    yield _piece_of(event, generation.num_candidates, num_tokens=total - reported)
                    reported = total

    @contextmanager
    def _post(self, route: str, body: dict[str, Any]) -> Iterator[http.client.HTTPResponse]:
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self._key}"}
        with closing(http.client.HTTPConnection(self._address)) as connection:
            connection.request("POST", route, json.dumps(body), headers)
            yield connection.getresponse()

    def _ask(self, route: str, body: dict[str, Any]) -> dict[str, Any]:
        with self._post(route, body) as response:
            answer: dict[str, Any] = json.loads(response.read())
        if "error" in answer:
            raise AtlasError(f"llama.cpp: {answer['error']['message']}")
        return answer


def _piece_of(event: dict[str, Any], num_candidates: int | None, *, num_tokens: int) -> Piece:
    """Return the piece for one event. If a token ends inside a character, llama.cpp counts the token, but does not
    report it."""
    candidates = []
    if event["tokens"] and num_candidates is not None:
        chosen = (event.get("completion_probabilities") or [_WITHHELD])[-1]
        reported = [{**chosen, "id": event["tokens"][-1]}, *chosen["top_logprobs"][:num_candidates]]
        # llama.cpp writes null for numbers that are not finite.
        logprobs = [-math.inf if each["logprob"] is None else each["logprob"] for each in reported]
        candidates = [Candidate(each["id"], p) for each, p in zip(reported, logprobs, strict=True)]
    finish = _FINISH[event["stop_type"]] if event["stop"] else None
    return Piece(event["content"], candidates, finish, num_tokens)
