"""Generate many sequences in parallel with one model. Sequences join and leave the batch between two steps.

Continuous batching (Yu et al. 2022, "Orca", OSDI): each step generates one token of every sequence in the batch. The
keys and values of these sequences are in the first rows of one static cache. A sequence that ends, or whose client
disconnects, frees its row before the next step, and a waiting sequence takes that row.
"""

from __future__ import annotations

import sys
import threading
import traceback
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from llguidance import LLMatcher
from torch import Tensor

from atlas.errors import AtlasError
from atlas.inference.decoder import Decoder
from atlas.inference.generate import empty_cache, last_logits, prefill_states, window_start
from atlas.inference.load import LoadedModel
from atlas.inference.sampling import BAN, Sampling, sample
from atlas.inference.text import TextStream, encode_prompt
from atlas.model import AtlasLM, long_tensor
from atlas.serving.backends.generation import Backend, Busy, Candidate, Generation, Piece, failure
from atlas.serving.backends.grammar import Grammar, Vocabulary, allowed_tokens
from atlas.serving.backends.prefixes import Beginning, PrefixCache
from atlas.tokenizer.chat import Message, encode_chat, encode_with_special

PREFILL_TOKENS = 1024
"""The largest number of prompt positions in one prefill, padding included. Only a single prompt may have more. Running
sequences wait during a prefill."""
_SCORED_AT_ONCE = 128
"""The number of positions of a prompt whose logits are computed in one chunk, since a position needs 4 bytes per token
of the vocabulary."""


class Engine(Backend):
    """A model and the thread that generates text with the model."""

    def __init__(
        self, loaded: LoadedModel, id: str, *, parallel: int, queue: int, prefix_tokens: int | None = None
    ) -> None:
        """Allow `parallel` sequences in the batch and `queue` more sequences in the queue. Keep the keys and values of
        `prefix_tokens` tokens of finished texts; None: of as many tokens as the batch can have."""
        context, vocab_size = loaded.config.model.max_seq_len, loaded.tokenizer.vocab_size
        super().__init__(id, context=context, vocab_size=vocab_size, parallel=parallel, queue=queue)
        self.loaded = loaded
        self.longest_token = loaded.tokenizer.longest_token
        self._waiting: deque[_Sequence] = deque()
        self._running: list[_Sequence] = []
        """The sequences in the batch, in the order of the cache's rows."""
        self._outbox: list[tuple[Generation, Piece]] = []
        self._wake = threading.Condition()
        self._closed = False
        self._vocabulary: Vocabulary | None = None
        self._vocabulary_lock = threading.Lock()
        self._cache = empty_cache(loaded.model, parallel)
        self._cache.truncate([])
        self._decoder = Decoder(loaded.model, self._cache)
        self._prefixes = PrefixCache(parallel * context if prefix_tokens is None else prefix_tokens)
        self._thread = threading.Thread(target=self._run, name="atlas-engine", daemon=True)

    def start(self) -> None:
        """Start the engine's thread."""
        super().start()
        self._thread.start()

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text. For an empty text, return the id that begins a document."""
        self.check_length(text)
        return encode_prompt(text, self.loaded.tokenizer)

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        """Return the token ids of a text, with the token that begins a text if `add_special` is true. If
        `parse_special` is true, special tokens in the text are read as such."""
        self.check_length(text)
        tokenizer = self.loaded.tokenizer
        ids = encode_with_special(text, tokenizer) if parse_special else tokenizer.encode(text)
        return [*tokenizer.begin_ids, *ids] if add_special else ids

    @property
    def named_tokens(self) -> Mapping[str, str]:
        """`bos`, `eos` and so on → the special token with this meaning."""
        return self.loaded.tokenizer.named_tokens()

    def encode_chat(
        self,
        messages: Sequence[Message],
        *,
        continues_last: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Return the token ids of a conversation, up to the start of the answer. Raises `AtlasError` if the model has
        no chat template, or if the template refuses the conversation."""
        if self.loaded.chat_template is None:
            raise AtlasError(
                f"{self.id} was not trained on conversations: use /v1/completions, or fine-tune it on JSONL rows with "
                "messages (atlas train --init-from)"
            )
        self.check_length(*(message.content.strip() for message in messages))
        return encode_chat(
            messages, self.loaded.tokenizer, continues_last=continues_last, variables=variables
        )

    @property
    def chat_template(self) -> str | None:
        """The model's chat template in Jinja; None if it has none."""
        return self.loaded.tokenizer.chat_template

    def constrain(self, grammar: Grammar) -> LLMatcher:
        """Return the start of a grammar. Raises `ApiError` if its schema is not valid or not supported."""
        with self._vocabulary_lock:
            self._vocabulary = self._vocabulary or Vocabulary(self.loaded.tokenizer)
        return self._vocabulary.matcher(grammar)

    def token_bytes(self, token: int) -> bytes:
        """Return the bytes of a token."""
        return self.loaded.tokenizer.token_bytes(token)

    def submit(self, generations: Sequence[Generation]) -> None:
        """Put all generations into the queue. If the queue is too full, add no generation and raise `Busy`."""
        with self._wake:
            self._waiting = deque(each for each in self._waiting if not each.generation.cancelled)
            if len(self._waiting) + len(self._running) + len(generations) > self.capacity:
                raise Busy
            self._waiting.extend(_Sequence(generation, self.loaded) for generation in generations)
            self._wake.notify()

    def close(self) -> None:
        """End the engine's thread. Running generations stop without a last piece."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        if self._thread.ident is not None:
            self._thread.join()

    # The following methods run in the engine's thread.

    def _run(self) -> None:
        device = self._cache.keys.device
        if device.type == "cuda":
            torch.cuda.set_device(device)  # each thread has its own current GPU
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._running or self._waiting or self._closed)
                if self._closed:
                    return
            try:
                with torch.inference_mode():
                    self._step()
            except Exception:  # a bug or out of memory; the server continues with the waiting sequences
                traceback.print_exc(file=sys.stderr)
                self._outbox += [(each.generation, failure("error")) for each in self._running]
                self._running = []
                self._prefixes = PrefixCache(self._prefixes.most_tokens)
                self._cache.clear()
                self._cache.truncate([])
            if self._outbox:
                self._send(self._outbox)
                self._outbox = []

    def _step(self) -> None:
        """Generate the next token of every running sequence, and the first token of every sequence that joins the
        batch."""
        for each in list(self._running):
            if each.generation.cancelled:
                self._end(each)
            elif each.cached == self._cache.max_len:
                # The sequence's window is full. As in `generate`, the newest half of the window is prefilled again,
                # ahead of waiting sequences.
                self._remove(each)
                each.slide(self.context)
                with self._wake:
                    self._waiting.appendleft(each)
        if self._running:
            newest = [each.tokens[-1] for each in self._running]
            self._sample(self._running, self._decoder.next_logits(newest))
        if joining := self._next_waiting(self.parallel - len(self._running)):
            self._join(joining)

    def _join(self, joining: list[_Sequence]) -> None:
        """Prefill sequences, add them to the batch, and sample the first token of each. A sequence whose beginning is
        known is prefilled only from where it differs."""
        known = {
            each: beginning for each in joining if (beginning := self._known_beginning(each)) is not None
        }
        for each, beginning in known.items():
            each.generation.num_reused = beginning.num_tokens
        groups = [[each for each in joining if each not in known], list(known)]
        starts = [beginning.num_tokens for beginning in known.values()]
        rests = [len(each.window) - start for each, start in zip(known, starts, strict=True)]
        if known and max(starts) + max(rests) > self.context:
            groups[1:] = [[each] for each in known]  # with padding, a position would lie beyond the context
        groups = [group for group in groups if group]
        joining = [each for group in groups for each in group]
        self._running += joining  # from here on, an error also ends the joining sequences
        self._sample(joining, torch.cat([self._prefill(group, known) for group in groups]))

    def _known_beginning(self, sequence: _Sequence) -> Beginning | None:
        if (
            sequence.start > 0 or sequence.generation.scores_prompt
        ):  # scores need the hidden states of every position
            return None
        return self._prefixes.find(sequence.window)

    def _prefill(self, group: list[_Sequence], known: Mapping[_Sequence, Beginning]) -> Tensor:
        """Prefill sequences in one forward pass, in the next rows of the cache. `known` are the known beginnings of all
        of them, or of none. Return the logits (B, V) of their next tokens."""
        starts = [known[each].num_tokens if each in known else 0 for each in group]
        rows = self._cache.free_rows(starts)
        for row, (each, start) in enumerate(zip(group, starts, strict=True)):
            if start:
                rows.keys[:, row, :, :start] = known[each].keys
                rows.values[:, row, :, :start] = known[each].values
        rests = [each.window[start:] for each, start in zip(group, starts, strict=True)]
        states = prefill_states(self.loaded.model, rests, rows)
        self._cache.truncate([*self._cache.row_lengths, *rows.row_lengths])
        for each, row_states in zip(group, states, strict=True):
            each.score_prompt(self.loaded.model, row_states)
        return last_logits(self.loaded.model, states, rests)

    def _next_waiting(self, free: int) -> list[_Sequence]:
        """Remove sequences from the front of the queue and return them: at most `free` sequences, which together have
        at most `PREFILL_TOKENS` padded positions. A single sequence may have more."""
        joining: list[_Sequence] = []
        with self._wake:
            while self._waiting and len(joining) < free:
                longest = max(each.cached + 1 for each in [*joining, self._waiting[0]])
                if joining and longest * (len(joining) + 1) > PREFILL_TOKENS:
                    break
                each = self._waiting.popleft()
                if not each.generation.cancelled:
                    joining.append(each)
        return joining

    def _sample(self, sequences: list[_Sequence], logits: Tensor) -> None:
        """Sample the next token of each sequence from its row of `logits` (B, V), and remove the sequences that end."""
        groups: dict[Sampling, list[int]] = defaultdict(list)
        for row, each in enumerate(sequences):
            groups[each.sampling].append(row)
        parts, order = [], []
        for sampling, rows in groups.items():
            group = [sequences[row] for row in rows]
            seen, generators = [each.tokens for each in group], [each.generator for each in group]
            part = logits[long_tensor(rows, logits.device)] if len(groups) > 1 else logits
            matchers = [each.matcher for each in group]
            allowed = allowed_tokens(matchers, part.shape[-1], part.device) if any(matchers) else None
            parts.append(sample(part, sampling, seen, generators, allowed))
            order += rows
        # Here, and in `_top_logprobs`, the CPU waits for the GPU.
        tokens: dict[int, int] = dict(zip(order, torch.cat(parts).tolist(), strict=True))
        wanted = {
            row: each.generation.num_candidates
            for row, each in enumerate(sequences)
            if each.generation.num_candidates is not None and tokens[row] >= 0
        }
        candidates = _top_logprobs(logits, tokens, wanted) if wanted else {}
        for row, each in enumerate(list(sequences)):
            if tokens[row] >= 0:
                piece = each.add(tokens[row], candidates.get(row, []))
            else:
                # The logits are not finite, for example because the model overflows in half precision. Clear the
                # cache's row: attention multiplies a masked slot by weight 0, and 0 × NaN would give NaN in the row's
                # next sequence.
                self._cache.clear(self._running.index(each))
                print(f"{self.id}: a generation ended because its logits were not finite", file=sys.stderr)
                piece = failure("error")
            self._outbox.append((each.generation, piece))
            if piece.finish == "error":
                self._remove(each)
            elif piece.finish:
                self._end(each)

    def _end(self, sequence: _Sequence) -> None:
        """Keep the keys and values of the sequence for later ones, and remove it."""
        if sequence.start == 0:
            known = sequence.window[: sequence.cached]
            self._prefixes.keep(known, self._cache, self._running.index(sequence))
        self._remove(sequence)

    def _remove(self, sequence: _Sequence) -> None:
        """Remove the sequence from the batch and from the cache. In both, the last row moves into the free row."""
        row = self._running.index(sequence)
        self._cache.remove(row)
        self._running[row] = self._running[-1]
        del self._running[-1]


class _Sequence:
    """A waiting or running generation, with its tokens, its window and its random generator."""

    def __init__(self, generation: Generation, loaded: LoadedModel) -> None:
        self.generation = generation
        self.tokens = list(generation.prompt)
        self.slide(loaded.config.model.max_seq_len)
        self.generator = torch.Generator().manual_seed(generation.seed)
        self._stream = TextStream(loaded.tokenizer, generation.stop)
        self._stop_ids = loaded.tokenizer.stop_ids
        self._prompt: list[list[Candidate]] = []
        self.matcher: LLMatcher | None = generation.constraint.deep_copy() if generation.constraint else None
        bans = tuple((id, BAN) for id in sorted(self._stop_ids))
        self._endless = replace(generation.sampling, logit_bias=generation.sampling.logit_bias + bans)

    def slide(self, context: int) -> None:
        """Set `start`, the index of the first token in the model's window."""
        self.start = window_start(len(self.generation.prompt), len(self.tokens), context)

    @property
    def window(self) -> list[int]:
        """The tokens in the model's window."""
        return self.tokens[self.start :]

    @property
    def cached(self) -> int:
        """The number of tokens in the cache: all tokens of the window except the newest."""
        return len(self.tokens) - self.start - 1

    @property
    def num_new(self) -> int:
        """The number of tokens after the prompt."""
        return len(self.tokens) - len(self.generation.prompt)

    @property
    def sampling(self) -> Sampling:
        """The settings for the next token."""
        must_continue = self.generation.ignore_eos or self.num_new < self.generation.min_tokens
        return self._endless if must_continue else self.generation.sampling

    def score_prompt(self, model: AtlasLM, states: Tensor) -> None:
        """If the client requested it, compute the log-probabilities of the prompt from `states` (T, C), the final
        hidden states."""
        wanted = self.generation.num_candidates
        if self.generation.scores_prompt and wanted is not None and self.num_new == 0:
            ids = self.tokens[1:]
            for start in range(0, len(ids), _SCORED_AT_ONCE):
                tokens = dict(enumerate(ids[start : start + _SCORED_AT_ONCE]))
                logits = model.head(states[start : start + len(tokens)])
                candidates = _top_logprobs(logits, tokens, dict.fromkeys(tokens, wanted))
                self._prompt += candidates.values()

    def add(self, token: int, candidates: list[Candidate]) -> Piece:
        """Append a token, and return the piece for this token. If the client requested `candidates`, the first
        candidate is the token."""
        generation, prompt, self._prompt = self.generation, self._prompt, []
        if generation.max_tokens == 0:
            return Piece("", finish="length", num_tokens=0, prompt=prompt)
        if self.matcher is not None and self.matcher.is_error():  # the choice of the token had no mask
            return failure("too complex")
        if token in self._stop_ids:
            shown = candidates if generation.scores_prompt else ()
            return Piece(self._stream.finish(), shown, finish="stop", num_tokens=0, prompt=prompt)
        self.tokens.append(token)
        text, finish = self._stream.add(token), None
        if self._stream.stopped:
            finish = "stop"
        elif self.matcher is not None and not self.matcher.consume_token(token):
            return failure("too complex")
        elif self.matcher is not None and self.matcher.is_stopped():
            text, finish = text + self._stream.finish(), "stop"
        elif self.num_new == generation.max_tokens:
            text, finish = text + self._stream.finish(), "length"
        return Piece(text, candidates, finish, prompt=prompt)


def _top_logprobs(
    logits: Tensor, tokens: dict[int, int], wanted: dict[int, int]
) -> dict[int, list[Candidate]]:
    """Return, for each row in `wanted`, the candidates: the row's token in `tokens`, then the `wanted[row]` likeliest
    tokens."""
    logprobs = logits[long_tensor(list(wanted), logits.device)].float().log_softmax(dim=-1)
    own = logprobs.gather(-1, long_tensor([[tokens[row]] for row in wanted], logits.device))
    top = logprobs.topk(min(max(wanted.values()), logprobs.shape[-1]), dim=-1)
    columns = zip(wanted, own.tolist(), top.indices.tolist(), top.values.tolist(), strict=True)
    return {
        row: [Candidate(tokens[row], logprob), *map(Candidate, ids[: wanted[row]], values)]
        for row, [logprob], ids, values in columns
    }
