"""Drafts of the next tokens, which a single forward pass checks.

Prompt lookup decoding (Saxena 2023, https://github.com/apoorvumang/prompt-lookup-decoding): if the last tokens occurred
earlier in the text, the tokens that followed them there are likely to follow again. A text that quotes its prompt, JSON
and code have many such places. The model itself chooses each token, so a wrong draft costs time, but changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

_KEY = 3
"""The number of last tokens that must have occurred earlier."""
_FIRST = 4
"""The length of the first draft."""


class Drafts:
    """Drafts for one text. After a draft that is entirely right, the next one is twice as long, up to `longest` tokens;
    after one that is entirely wrong, half as long. If a draft of one token was wrong, the next try is `longest` tokens
    later."""

    def __init__(self, longest: int) -> None:
        self._longest = longest
        self._length = min(_FIRST, longest)
        self._not_before = 0
        self._next: dict[tuple[int, ...], int] = {}
        """The last `_KEY` tokens before a place → the latest such place."""
        self._num_known = 0

    def propose(self, tokens: Sequence[int], most: int) -> list[int]:
        """Return at most `most` tokens that may follow `tokens`; none if the end of the text did not occur earlier."""
        end = len(tokens)
        for place in range(max(self._num_known, _KEY), end):
            self._next[tuple(tokens[place - _KEY : place])] = place
        self._num_known = end
        if end < max(_KEY, self._not_before):
            return []
        earlier = self._next.get(tuple(tokens[end - _KEY :]))
        if earlier is None:
            return []
        draft: list[int] = []
        for place in range(
            earlier, earlier + min(self._length, most)
        ):  # a repetition goes beyond the end of the text
            draft.append(tokens[place] if place < end else draft[place - end])
        return draft

    def judge(self, num_right: int, num_drafted: int) -> None:
        """Record how many tokens of the last draft were right."""
        if num_right == num_drafted:
            self._length = min(2 * self._length, self._longest)
        elif num_right == 0:
            if self._length == 1:
                self._not_before = self._num_known + self._longest
            self._length = max(1, self._length // 2)
