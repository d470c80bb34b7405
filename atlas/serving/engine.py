"""Many texts written at once by one model: they join and leave the batch between two tokens.

Continuous batching (Yu et al. 2022, "Orca", OSDI): each step writes one token of every text in the batch, whose keys
and values lie in the first rows of one static cache. A text that ends, or whose client has gone, frees its row before
the next step, and one that waits takes it.
"""

from __future__ import annotations

import sys
import threading
import time
import traceback
from collections import defaultdict, deque
from collections.abc import Sequence

import torch
from torch import Tensor

from atlas.errors import AtlasError
from atlas.inference.decoder import Decoder
from atlas.inference.generate import window_start
from atlas.inference.load import LoadedModel
from atlas.inference.sampling import Sampling, sample
from atlas.inference.text import TextStream
from atlas.model import KVCache, long_tensor
from atlas.serving.text import Busy, Candidate, Generation, Piece, Send
from atlas.tokenizer.chat import Message, encode_prompt

PREFILL_TOKENS = 1024
"""Padded positions of prompts that are read between two steps: who is being written waits for them."""


class Engine:
    """A model and the thread that writes with it."""

    def __init__(self, loaded: LoadedModel, id: str, *, parallel: int, queue: int) -> None:
        """`parallel` texts are written at once, and at most `queue` wait."""
        self.loaded = loaded
        self.id = id
        self.created = int(time.time())
        self.context = loaded.config.model.max_seq_len
        self.vocab_size = loaded.tokenizer.vocab_size
        self.parallel = parallel
        self.capacity = parallel + queue
        self._waiting: deque[_Row] = deque()
        self._rows: list[_Row] = []
        """Of the texts that are being written, in the order of the cache's rows."""
        self._outbox: list[tuple[Generation, Piece]] = []
        self._wake = threading.Condition()
        self._closed = False
        weights = next(loaded.model.parameters())
        self._device, self._dtype = weights.device, weights.dtype
        self._cache = self._empty_cache(parallel)
        self._cache.truncate([])
        self._decoder = Decoder(loaded.model, self._cache)
        self._thread = threading.Thread(target=self._run, name="atlas-engine", daemon=True)

    def begin(self, send: Send) -> None:
        self._send = send
        self._thread.start()

    def encode(self, text: str) -> list[int]:
        """Ids of a text; an empty one begins a document."""
        return self.loaded.tokenizer.encode(text) or [self.loaded.tokenizer.eos_id]

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Ids of a conversation up to where the answer begins. Raises `AtlasError`."""
        if not self.loaded.learnt_to_answer:
            raise AtlasError(
                f"{self.id} did not learn from conversations in Atlas's form: ask /v1/completions, fine-tune it on "
                "JSONL rows with messages (atlas train --init-from); an imported chat model answers from --gguf"
            )
        return encode_prompt(messages, self.loaded.tokenizer)

    def token_bytes(self, token: int) -> bytes:
        return self.loaded.tokenizer.token_bytes(token)

    def submit(self, texts: Sequence[Generation]) -> None:
        """Take all of them or, as `Busy`, none."""
        with self._wake:
            self._waiting = deque(row for row in self._waiting if not row.text.cancelled)
            if len(self._waiting) + len(texts) > self.capacity - min(self.parallel, len(self._rows)):
                raise Busy
            self._waiting.extend(_Row(text, self.loaded) for text in texts)
            self._wake.notify()

    @property
    def num_running(self) -> int:
        return len(self._rows)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def close(self) -> None:
        """End the thread; what is unfinished stays so."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        if self._thread.ident is not None:
            self._thread.join()

    # In the engine's thread

    def _run(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # each thread has a current GPU of its own
        while True:
            with self._wake:
                while not (self._rows or self._waiting or self._closed):
                    self._wake.wait()
                if self._closed:
                    return
            try:
                with torch.inference_mode():
                    self._step()
            except Exception:  # a bug, or no memory: these texts are lost, and the server goes on
                traceback.print_exc(file=sys.stderr)
                self._outbox += [
                    (row.text, Piece(None, "", finish="error", num_tokens=0)) for row in self._rows
                ]
                self._rows = []
                self._cache.clear()
                self._cache.truncate([])
            if self._outbox:
                self._send(self._outbox)
                self._outbox = []

    def _step(self) -> None:
        """One token more of every text, and the first of those that joined."""
        for row in [row for row in self._rows if row.text.cancelled]:
            self._leave(row)
        for row in [row for row in self._rows if row.length == self._cache.max_len]:
            # Its window is full: it is read again from its newest half, as `generate` does, before all who wait.
            self._leave(row)
            row.start = window_start(len(row.text.prompt), len(row.tokens), self.context)
            with self._wake:
                self._waiting.appendleft(row)
        if self._rows:
            logits = self._decoder.next_logits([row.tokens[-1] for row in self._rows])
            for row in self._write(list(self._rows), logits):
                self._leave(row)
        self._join(self._admitted(self.parallel - len(self._rows)))

    def _admitted(self, free: int) -> list[_Row]:
        """Those that waited longest and find room."""
        rows: list[_Row] = []
        with self._wake:
            while self._waiting and len(rows) < free:
                longest = max([row.length + 1 for row in [*rows, self._waiting[0]]])
                if rows and longest * (len(rows) + 1) > PREFILL_TOKENS:
                    break
                row = self._waiting.popleft()
                if not row.text.cancelled:
                    rows.append(row)
        return rows

    def _join(self, rows: list[_Row]) -> None:
        """Read the rows' windows, padded on the right, write a token of each, and put them into the batch."""
        if not rows:
            return
        self._rows += rows  # from here on, what goes wrong is theirs, too
        windows = [row.tokens[row.start :] for row in rows]
        lengths = [len(window) for window in windows]
        longest = max(lengths)
        padded = long_tensor([window + [0] * (longest - len(window)) for window in windows], self._device)
        model, cache = self.loaded.model, self._empty_cache(len(rows), max_len=longest)
        hidden = model.hidden_states(padded, cache)
        cache.truncate(lengths)
        last = long_tensor(lengths, self._device) - 1
        logits = model.head(hidden[torch.arange(len(rows), device=self._device), last])
        self._cache.append(cache)
        for row in self._write(rows, logits):
            self._leave(row)

    def _write(self, rows: list[_Row], logits: Tensor) -> list[_Row]:
        """The next token of each row by its logits (B, V); those that it ends."""
        alike: dict[Sampling, list[int]] = defaultdict(list)
        for number, row in enumerate(rows):
            alike[row.text.sampling].append(number)
        parts = []
        for sampling, numbers in alike.items():
            some = [rows[number] for number in numbers]
            seen = [row.tokens for row in some] if sampling.repetition_penalty != 1 else []
            part = logits[long_tensor(numbers, logits.device)] if len(alike) > 1 else logits
            parts.append(sample(part, sampling, seen, [row.generator for row in some]))
        chosen = [0] * len(rows)
        of_part = [number for numbers in alike.values() for number in numbers]
        for number, token in zip(of_part, torch.cat(parts).tolist(), strict=True):  # the one wait of a step
            chosen[number] = token
        ended = self._fail([row for row, token in zip(rows, chosen, strict=True) if token < 0])
        sound = [number for number, token in enumerate(chosen) if token >= 0]
        told = [number for number in sound if rows[number].text.num_candidates is not None]
        candidates = dict(zip(told, _top_logprobs(logits, told, rows, chosen), strict=True)) if told else {}
        for number in sound:
            row, token = rows[number], chosen[number]
            piece = row.add(token, candidates.get(number, []))
            self._outbox.append((row.text, piece))
            if piece.finish:
                ended.append(row)
        return ended

    def _fail(self, rows: list[_Row]) -> list[_Row]:
        """End the texts whose logits are not finite, as in half precision those of a bad model may be, before they
        spoil others: a place that is masked enters attention with weight 0, and 0 × NaN is NaN."""
        for row in rows:
            self._cache.clear(self._rows.index(row))
            self._outbox.append((row.text, Piece(None, "", finish="error", num_tokens=0)))
        if rows:
            print(f"{self.id}: {len(rows)} texts ended, their logits were not finite", file=sys.stderr)
        return rows

    def _leave(self, row: _Row) -> None:
        """As in the cache: the last row takes its place."""
        number = self._rows.index(row)
        self._cache.remove(number)
        self._rows[number] = self._rows[-1]
        del self._rows[-1]

    def _empty_cache(self, rows: int, *, max_len: int | None = None) -> KVCache:
        config = self.loaded.config.model
        return KVCache(config, rows, max_len=max_len, device=self._device, dtype=self._dtype)


class _Row:
    """A text in the making."""

    def __init__(self, text: Generation, loaded: LoadedModel) -> None:
        self.text = text
        self.tokens = list(text.prompt)
        self.start = window_start(len(self.tokens), len(self.tokens), loaded.config.model.max_seq_len)
        """Of the model's window on the tokens."""
        self.generator = torch.Generator().manual_seed(text.seed)
        self._stream = TextStream(loaded.tokenizer, text.stop)
        self._eos_id = loaded.tokenizer.eos_id

    @property
    def length(self) -> int:
        """Of what the cache holds: all of the window but the newest token."""
        return len(self.tokens) - self.start - 1

    def add(self, token: int, candidates: list[Candidate]) -> Piece:
        """`candidates` begins with the token's own, where any are asked for."""
        if token == self._eos_id:
            return Piece(None, self._stream.finish(), finish="stop", num_tokens=0)
        self.tokens.append(token)
        shown, finish = self._stream.add(token), None
        if self._stream.stopped:
            finish = "stop"
        elif len(self.tokens) - len(self.text.prompt) == self.text.max_tokens:
            shown, finish = shown + self._stream.finish(), "length"
        logprob = candidates[0].logprob if candidates else None
        return Piece(token, shown, logprob, candidates[1:], finish)


def _top_logprobs(
    logits: Tensor, told: Sequence[int], rows: Sequence[_Row], chosen: Sequence[int]
) -> list[list[Candidate]]:
    """Of each row of `told`: the chosen token and its log-probability, then as many of the likeliest as it asks for."""
    logprobs = logits[long_tensor(told, logits.device)].float().log_softmax(dim=-1)
    tokens = long_tensor([chosen[number] for number in told], logits.device)
    of_chosen = logprobs.gather(-1, tokens[:, None])[:, 0].tolist()
    most = max(rows[number].text.num_candidates or 0 for number in told)
    values, indices = (part.tolist() for part in logprobs.topk(min(most, logprobs.shape[-1]), dim=-1))
    return [
        [
            Candidate(chosen[number], of_chosen[place]),
            *map(Candidate, indices[place][: rows[number].text.num_candidates], values[place]),
        ]
        for place, number in enumerate(told)
    ]
