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
from typing import Any

import torch
from llguidance import LLMatcher
from torch import Tensor

from atlas.errors import AtlasError
from atlas.inference.decoder import Decoder
from atlas.inference.generate import empty_cache, last_logits, prefill_states
from atlas.inference.load import LoadedModel
from atlas.inference.sampling import Sampling, sample
from atlas.inference.text import encode_prompt
from atlas.model import long_tensor
from atlas.serving.backends.drafts import Drafts
from atlas.serving.backends.generation import Backend, Busy, Generation, Piece, failure
from atlas.serving.backends.grammar import Grammar, Vocabulary, allowed_tokens
from atlas.serving.backends.prefixes import Beginning, PrefixCache
from atlas.serving.backends.sequence_state import SequenceState, top_logprobs
from atlas.tokenizer.chat import Message, encode_chat, encode_with_special

PREFILL_TOKENS = 1024
"""The largest number of prompt positions in one prefill, padding included. Only a single prompt may have more. Running
sequences wait during a prefill."""


class Engine(Backend):
    """A model and the thread that generates text with the model."""

    def __init__(
        self,
        loaded: LoadedModel,
        id: str,
        *,
        parallel: int,
        queue: int,
        prefix_tokens: int | None = None,
        draft_tokens: int = 16,
    ) -> None:
        """Allow `parallel` sequences in the batch and `queue` more sequences in the queue. Keep the keys and values of
        `prefix_tokens` tokens of finished texts; None: of as many tokens as the batch can have. On a CPU, a single
        sequence is generated with drafts of at most `draft_tokens` tokens."""
        context, vocab_size = loaded.config.model.max_seq_len, loaded.tokenizer.vocab_size
        super().__init__(id, context=context, vocab_size=vocab_size, parallel=parallel, queue=queue)
        self.loaded = loaded
        self.longest_token = loaded.tokenizer.longest_token
        self._waiting: deque[SequenceState] = deque()
        self._running: list[SequenceState] = []
        """The sequences in the batch, in the order of the cache's rows."""
        self._outbox: list[tuple[Generation, Piece]] = []
        self._wake = threading.Condition()
        self._closed = False
        self._vocabulary: Vocabulary | None = None
        self._vocabulary_lock = threading.Lock()
        self._cache = empty_cache(loaded.model, parallel)
        self._cache.truncate([])
        self._decoder = Decoder(loaded.model, self._cache)
        # On a GPU, the CUDA graphs of `Decoder` are for one token per sequence.
        self._draft_tokens = 0 if self._cache.keys.is_cuda else draft_tokens
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
            self._waiting.extend(SequenceState(generation, self.loaded) for generation in generations)
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
        draft = self._draft(self._running[0]) if len(self._running) == 1 else []
        if draft:
            self._check(self._running[0], draft)
        elif self._running:
            newest = [each.tokens[-1] for each in self._running]
            self._sample(self._running, self._decoder.next_logits(newest))
        if joining := self._next_waiting(self.parallel - len(self._running)):
            self._join(joining)

    def _draft(self, sequence: SequenceState) -> list[int]:
        """Return the tokens that the sequence may have next, as far as its window and its limit allow."""
        left = sequence.generation.max_tokens - sequence.num_new - 1
        most = min(self._draft_tokens, left, self._cache.max_len - sequence.cached - 1)
        if most <= 0:
            return []
        sequence.drafts = sequence.drafts or Drafts(self._draft_tokens)
        return sequence.drafts.propose(sequence.tokens, most)

    def _check(self, sequence: SequenceState, draft: list[int]) -> None:
        """Compute the logits after the sequence and after each token of `draft` in one pass, and sample until the
        sequence differs from the draft."""
        tokens = long_tensor([[sequence.tokens[-1], *draft]], self._cache.keys.device)
        num_right = 0
        for logits, expected in zip(self.loaded.model(tokens, self._cache)[0], [*draft, None], strict=True):
            self._sample([sequence], logits[None])
            if not self._running:
                return  # the sequence has ended
            if sequence.tokens[-1] != expected:
                break
            num_right += 1
        self._cache.truncate([sequence.cached])
        if sequence.drafts is not None:
            sequence.drafts.judge(num_right, len(draft))

    def _join(self, joining: list[SequenceState]) -> None:
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

    def _known_beginning(self, sequence: SequenceState) -> Beginning | None:
        generation = sequence.generation
        # Scores need the hidden states of every position.
        if sequence.start > 0 or generation.scores_prompt or not generation.uses_known:
            return None
        return self._prefixes.find(sequence.window)

    def _prefill(self, group: list[SequenceState], known: Mapping[SequenceState, Beginning]) -> Tensor:
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

    def _next_waiting(self, free: int) -> list[SequenceState]:
        """Remove sequences from the front of the queue and return them: at most `free` sequences, which together have
        at most `PREFILL_TOKENS` padded positions. A single sequence may have more."""
        joining: list[SequenceState] = []
        with self._wake:
            while self._waiting and len(joining) < free:
                longest = max(each.cached + 1 for each in [*joining, self._waiting[0]])
                if joining and longest * (len(joining) + 1) > PREFILL_TOKENS:
                    break
                each = self._waiting.popleft()
                if not each.generation.cancelled:
                    joining.append(each)
        return joining

    def _sample(self, sequences: list[SequenceState], logits: Tensor) -> None:
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
        # Here, and in `top_logprobs`, the CPU waits for the GPU.
        tokens: dict[int, int] = dict(zip(order, torch.cat(parts).tolist(), strict=True))
        wanted = {
            row: each.generation.num_candidates
            for row, each in enumerate(sequences)
            if each.generation.num_candidates is not None and tokens[row] >= 0
        }
        candidates = top_logprobs(logits, tokens, wanted) if wanted else {}
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

    def _end(self, sequence: SequenceState) -> None:
        """Keep the keys and values of the sequence for later ones, and remove it."""
        if sequence.start == 0 and sequence.generation.uses_known:
            known = sequence.window[: sequence.cached]
            try:
                self._prefixes.keep(known, self._cache, self._running.index(sequence))
            except (RuntimeError, MemoryError) as error:  # the texts that run need the memory more
                print(f"{self.id}: no memory to keep a text ({error!s:.100})", file=sys.stderr)
                self._prefixes = PrefixCache(self._prefixes.most_tokens)
        self._remove(sequence)

    def _remove(self, sequence: SequenceState) -> None:
        """Remove the sequence from the batch and from the cache. In both, the last row moves into the free row."""
        row = self._running.index(sequence)
        self._cache.remove(row)
        self._running[row] = self._running[-1]
        del self._running[-1]
