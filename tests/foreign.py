"""Tokenizers as other models have them, for tests."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

DIGITS = pre_tokenizers.Digits(individual_digits=True)
"""The split of SmolLM, which is followed by GPT-2's."""


def byte_level_bpe(
    texts: Iterable[str],
    vocab_size: int,
    special_tokens: Sequence[str],
    split: pre_tokenizers.PreTokenizer | None = DIGITS,
    *,
    nfc: bool = False,
) -> tokenizers.Tokenizer:
    """Train a byte-level BPE with a split of its own, or with GPT-2's alone."""
    own = tokenizers.Tokenizer(models.BPE())
    if nfc:
        own.normalizer = normalizers.NFC()
    use_regex = split is None or isinstance(split, pre_tokenizers.Digits)
    steps = [] if split is None else [split]
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex))
    own.pre_tokenizer = pre_tokenizers.Sequence(steps)
    own.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[*special_tokens],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    own.train_from_iterator(texts, trainer)
    return own
