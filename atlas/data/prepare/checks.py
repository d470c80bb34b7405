"""What must hold before a text is prepared: little of it is left out, and the disk has space."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from atlas.data.shards import token_dtype
from atlas.data.text.selection import MOST_LEFT_OUT
from atlas.data.text.sources import Sources
from atlas.errors import DataError
from atlas.progress import notify
from atlas.tokenizer import Tokenizer

_WORTH_PRINTING = 1_000_000
"""Atlas prints how much disk space a dataset needs, if the dataset needs at least this many bytes."""
_PROBE_CHARS, _PROBE_READS, _ENCODED_PROBE_CHARS = 1 << 23, 1000, 1 << 19
"""To estimate the size of a dataset, Atlas reads `_PROBE_CHARS` characters, in at most `_PROBE_READS` reads, and
tokenizes `_ENCODED_PROBE_CHARS` of them."""


def require_most(sources: Sources, ask: Callable[[str], bool] | None) -> None:
    """Raise `DataError` if Atlas would leave out much of the sources, unless `ask` returns True."""
    choice = sources.choice
    share = choice.share_left_out
    if share <= MOST_LEFT_OUT:
        return
    for line in choice.notes():
        notify(line)
    if ask is None or not ask(f"leave out {share:.0%} of the bytes in {sources.names}?"):
        command = choice.install_command()
        install = f"to read more, {command}; or " if command else ""
        raise DataError(
            f"{sources.names}: {share:.0%} of the bytes are in files that Atlas does not read (see above); {install}"
            f"leave them out with atlas prepare {choice.exclude_options()}, or choose files with --include PATTERN"
        )


def require_space(sources: Sources, tokenizer: Tokenizer, output: Path, *, done: int) -> None:
    """Print how much disk space the tokens need, estimated from the beginning of the text. Raise `DataError` if the
    disk has less free space."""
    bytes_read: list[int] = []
    tokens = encoded_chars = chars = 0
    for piece in sources.documents(advance=bytes_read.append):
        chars += len(piece.text)
        if encoded_chars < _ENCODED_PROBE_CHARS:
            tokens += len(tokenizer.encode(piece.text)) + piece.ends_document
            encoded_chars += len(piece.text)
        if chars >= _PROBE_CHARS or len(bytes_read) >= _PROBE_READS:
            break
    all_chars = chars * max(1, sources.total_bytes) / max(1, sum(bytes_read))
    all_tokens = int(all_chars * tokens / max(1, encoded_chars))
    needed = max(0, all_tokens - done) * token_dtype(tokenizer.vocab_size).itemsize
    free = shutil.disk_usage(output.absolute().parent).free
    if free < needed:
        raise DataError(
            f"{output}: its disk has {free / 1e6:,.1f} MB free, but the tokens of {sources.names} need about "
            f"{needed / 1e6:,.1f} MB; free some space, or choose a folder on another disk"
        )
    if needed >= _WORTH_PRINTING:
        notify(f"{output}: needs about {needed / 1e6:,.0f} MB of the {free / 1e6:,.0f} MB that are free")
