"""Tokenizers: GPT-2's, a byte-level BPE that Atlas trained, the tokenizer of another model, or a custom object."""

from atlas.tokenizer import load as load  # gives `Tokenizer` its constructors
from atlas.tokenizer.base import END_OF_TEXT, MAX_FILE_BYTES, STORED_AS_FILE, Tokenizer
from atlas.tokenizer.byte_level import ByteLevelTokenizer
from atlas.tokenizer.custom import CustomTokenizer

__all__ = [
    "END_OF_TEXT",
    "MAX_FILE_BYTES",
    "STORED_AS_FILE",
    "ByteLevelTokenizer",
    "CustomTokenizer",
    "Tokenizer",
]
