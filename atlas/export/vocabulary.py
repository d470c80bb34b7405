"""A tokenizer → the metadata of a GGUF file, with which llama.cpp gives the same token ids.

A GGUF file holds the tokens and the merges of a tokenizer, but of the rule that splits a text into words only a name,
which llama.cpp must know (`tokenizer.ggml.pre`). For the tokenizer of another model, Atlas tries the names: it writes
the vocabulary to a small file and compares llama.cpp's token ids with the tokenizer's on difficult texts in many
scripts. The first name that gives the same ids is taken. The keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import functools
import re
import tempfile
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGUFValueType as Kind
from gguf import TokenType

from atlas.config import ModelConfig
from atlas.errors import ExportError
from atlas.export.architectures import architecture_of
from atlas.export.llama_cpp import ask_llama_cpp, is_available
from atlas.progress import item_progress
from atlas.tokenizer import ByteLevelTokenizer, Tokenizer
from atlas.tokenizer.foreign import ForeignTokenizer

KINDS = {bool: Kind.BOOL, int: Kind.UINT32, float: Kind.FLOAT32, str: Kind.STRING, list: Kind.ARRAY}
"""The type of a value in Python → its type in a GGUF file."""
TEXTS = (
    "The quick brown fox jumps over the lazy dog. It's what they've said; we'll see, I'd think, you're right.",
    "def fib(n: int) -> int:\n    if n < 2:\n\treturn n\n    return fib(n - 1) + fib(n - 2)  # O(φⁿ)\n",
    "<|endoftext|> is plain text here, <|endoftext|>twice, and so is <|im_start|> or <s>.",
    "In 1984, 12345678901234567890 people paid $3.14159 (or 2,718.28 €) for ½ kg at ²³ °C — 100%!",
    "  two spaces before,   three between,\ttabs\t\tand a trailing run   ",
    "line\nline\r\nline\n\n\nline   \n   \n\t\n end\n\n",
    "Zwölf Boxkämpfer jagen Viktor quer über den Sylter Deich. Ça va? Łódź, naïve café, İstanbul.",
    "Съешь ещё этих мягких французских булок. Ξεσκεπάζω την ψυχοφθόρα βδελυγμία.",
    "日本語のテキスト、漢字かな交じり文。中文没有空格。한국어 문장입니다.",
    "نص عربي مع أرقام ١٢٣ و עברית עם ניקוד שָׁלוֹם और देवनागरी क्षत्रिय ไทย",
    "🙂👩‍👩‍👧‍👦🏳️‍🌈 e\u0301 vs é, ﬁ ﬀ, a\u00a0b\u2003c\u200bd\u3000e, \ufeffBOM, \x00\x07\x1b[0m",
    '{"key": [1, 2.5e-3, null, true], "path": "C:\\\\new\\\\table", "url": "https://example.org/?q=a&b=c#d"}',
    "ALLCAPS CamelCase snake_case kebab-case x'sX 'S 'LL don’t ''quoted'' ...!!! ----- ##### ((()))",
    "",
    " ",
    "\n",
    "a",
)
"""Difficult texts: contractions, code, digits, white space, many scripts, combining marks, control characters."""
MORE_TEXTS = (
    "HTTPServer getURL2 iPhone15 A1b2C3 IT'S I'M WE'RE x1y22z333 v2.0.1-rc3 0x7fff 1e10 １２３４５ Ⅷ ٣٤٥٦ १२३४५६७",
    "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता और समानता प्राप्त है।",
    "সমস্ত মানুষ স্বাধীনভাবে সমান মর্যাদা।",
    "மனிதப் பிறவியினர் சகலரும் சுதந்திரமாகவே பிறக்கின்றனர். มนุษย์ทั้งหลายเกิดมามีอิสระและเสมอภาคกัน",
    "中文，标点。「引号」《书名》2024年12月31日，价格是￥1234.56元；日本語、カタカナ・ひらがな！한국어, 문장？",
    "Mọi người sinh ra đều được tự do.",
    "end.\n\nNext\n\n\n  indented\n\t\ttabs\r\n\r\nx;\n}\n});\n",
    "// ---\n/* a */\n#include <stdio.h>\n$x->y['z'] = @w::v; a&&b||!c",
    "x /path/to.file -flag --long=1 user@host.org #tag @name $HOME ${VAR} `code` **bold** [link](http://a.b/c_d?e=f%20g)",
    "Հայերեն ქართული አማርኛ ខ្មែរ ລາວ မြန်မာ සිංහල తెలుగు ಕನ್ನಡ മലയാളം ગુજરાતી ਪੰਜਾਬੀ བོད་སྐད ᏣᎳᎩ",
    "’s ‘t “quoted” … – — ′ ″ « » ‹ › ¿ ¡ § ¶ † ‡ • ™ © ® ° ± × ÷ ≠ ≤ ∑ ∫ √ ∞ α→β ⇒ ✓ ★ ♥ ♪",
    "a\u2028b\u2029c\u0085d\u00adf\x0bg\x0ch 'tis 'Twas o'clock rock'n'roll y'all'd've she'D",
)
"""Texts in which the splits of known models differ: case, digits beside letters, scripts with combining marks."""
_SPLITS = (
    "qwen2", "llama-bpe", "smollm", "gpt-2", "qwen35", "gpt-4o", "tekken", "deepseek-v3", "deepseek-llm",
    "deepseek-coder", "falcon", "dbrx", "chatglm-bpe", "bloom", "poro-chat", "viking", "exaone4", "superbpe",
    "seed-coder", "bailingmoe", "kimi-k2", "grok-2", "minimax-m2", "chameleon", "youtu", "afmoe", "tiny_aya", "default",
)  # fmt: skip
"""llama.cpp's names for splits that differ from each other, the most frequent first. Of two that give the same ids for
a vocabulary, the one with more rules comes first."""
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")


def check_tokenizer(tokenizer: Tokenizer, config: ModelConfig) -> None:
    """Raise `ExportError` unless a file can hold the tokenizer and the model, and both have the same size."""
    architecture_of(config)
    if not isinstance(tokenizer, (ByteLevelTokenizer, ForeignTokenizer)):
        raise ExportError(
            f"tokenizer {tokenizer.name}: is custom code, which no file can hold; "
            "train with gpt2 or a tokenizer.json to export"
        )
    if tokenizer.vocab_size != config.vocabulary:
        raise ExportError(
            f"model.vocab_size {config.vocabulary}: tokenizer {tokenizer.name} has {tokenizer.vocab_size} "
            "tokens, and other programs need one row per token; train with the tokenizer's size to export"
        )


@functools.lru_cache(maxsize=4)
def vocabulary_of(tokenizer: ByteLevelTokenizer | ForeignTokenizer) -> dict[str, Any]:
    """GGUF's key → value, for the metadata of a tokenizer. Lists must not be changed.

    Raises `ExportError` if llama.cpp gives other token ids with every name of a split that it knows, or is not
    installed for the tokenizer of another model.
    """
    if isinstance(tokenizer, ByteLevelTokenizer):
        return _of_byte_level(tokenizer)
    if not is_available():
        raise ExportError(
            f"tokenizer {tokenizer.name}: llama.cpp must show that it gives the same token ids; "
            'pip install "atlas-llm[llama]", or use --format hf'
        )
    texts = [*normalized(TEXTS, tokenizer), *normalized(MORE_TEXTS, tokenizer)]
    expected = tokenizer.encode_batch(texts)
    for vocabulary in item_progress(
        [*_candidates(tokenizer)], "looking for the tokenizer's split in llama.cpp"
    ):
        if ids_in_llama_cpp(vocabulary, texts) == expected:
            return vocabulary
    raise ExportError(
        f"tokenizer {tokenizer.name}: belongs to another model, and llama.cpp gives other token ids with each split "
        "that it knows; use --format hf"
    )


def normalized(texts: Sequence[str], tokenizer: Tokenizer) -> list[str]:
    """Return the texts in Unicode's NFC if the tokenizer first converts its input to NFC. llama.cpp does not convert
    it, so it can give the same ids only for such texts."""
    if isinstance(tokenizer, ForeignTokenizer) and tokenizer.is_nfc:
        return [unicodedata.normalize("NFC", text) for text in texts]
    return [*texts]


def _of_byte_level(tokenizer: ByteLevelTokenizer) -> dict[str, Any]:
    types = [int(TokenType.NORMAL)] * tokenizer.vocab_size
    types[tokenizer.eos_id] = int(TokenType.CONTROL)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": tokenizer.split,
        "tokenizer.ggml.tokens": tokenizer.token_strings(),
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": [f"{left} {right}" for left, right in tokenizer.merges()],
        "tokenizer.ggml.bos_token_id": tokenizer.eos_id,
        "tokenizer.ggml.eos_token_id": tokenizer.eos_id,
        "tokenizer.ggml.add_bos_token": False,
    }


def _candidates(tokenizer: ForeignTokenizer) -> Iterator[dict[str, Any]]:
    """Yield the metadata with which llama.cpp might give the tokenizer's ids: of a byte-level BPE with each split, or
    of SentencePiece's BPE with and without a blank before the text."""
    content = tokenizer.content
    model, special = content["model"], tokenizer.special
    if model.get("type") != "BPE":
        return
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    is_sentencepiece = bool(model.get("byte_fallback"))
    shared: dict[str, Any] = {
        "tokenizer.ggml.model": "llama" if is_sentencepiece else "gpt2",
        "tokenizer.ggml.tokens": _tokens(tokenizer, is_sentencepiece=is_sentencepiece),
        "tokenizer.ggml.token_type": _token_types(tokenizer),
        "tokenizer.ggml.bos_token_id": tokenizer.eos_id if special.bos is None else special.bos,
        "tokenizer.ggml.eos_token_id": tokenizer.eos_id,
        "tokenizer.ggml.add_bos_token": special.adds_bos,
    }
    for name, id in (("unknown", special.unk), ("padding", special.pad)):
        if id is not None:
            shared[f"tokenizer.ggml.{name}_token_id"] = id
    if ends := [id for id in special.stops if id != tokenizer.eos_id]:
        shared["tokenizer.ggml.eot_token_id"] = ends[0]
    if not is_sentencepiece:
        shared["tokenizer.ggml.merges"] = [f"{left} {right}" for left, right in merges]
        yield from ({**shared, "tokenizer.ggml.pre": split} for split in _SPLITS)
        return
    shared["tokenizer.ggml.scores"] = _scores(shared["tokenizer.ggml.tokens"], merges)
    shared["tokenizer.ggml.pre"] = "default"
    yield from ({**shared, "tokenizer.ggml.add_space_prefix": prefix} for prefix in (True, False))


def _tokens(tokenizer: ForeignTokenizer, *, is_sentencepiece: bool) -> list[str]:
    """Return the tokens in the order of their ids. Rows of the model without a token get a name."""
    tokens = [f"[PAD{id}]" for id in range(tokenizer.vocab_size)]
    for token, id in tokenizer.hf.get_vocab(with_added_tokens=True).items():
        tokens[id] = token
    for added in tokenizer.content.get("added_tokens") or ():
        if is_sentencepiece and not added["special"]:  # llama.cpp looks for these in the text itself
            tokens[added["id"]] = added["content"].replace("▁", " ")
    return tokens


def _token_types(tokenizer: ForeignTokenizer) -> list[int]:
    """Return GGUF's type of each token."""
    types = [TokenType.UNUSED] * tokenizer.vocab_size
    for token, id in tokenizer.hf.get_vocab(with_added_tokens=True).items():
        is_byte = tokenizer.content["model"].get("byte_fallback") and _BYTE_TOKEN.fullmatch(token)
        types[id] = TokenType.BYTE if is_byte else TokenType.NORMAL
    for added in tokenizer.content.get("added_tokens") or ():
        types[added["id"]] = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
    if tokenizer.special.unk is not None and types[tokenizer.special.unk] is not TokenType.CONTROL:
        types[tokenizer.special.unk] = TokenType.UNKNOWN
    return [int(type) for type in types]


def _scores(tokens: Sequence[str], merges: Sequence[Sequence[str]]) -> list[float]:
    """Return SentencePiece's score of each token: the earlier its merge, the higher. A token that no merge makes has
    the lowest score."""
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        ranks.setdefault(left + right, rank)
    return [-float(ranks.get(token, 10 * len(merges))) for token in tokens]


def ids_in_llama_cpp(vocabulary: dict[str, Any], texts: Sequence[str]) -> list[list[int]] | None:
    """Return llama.cpp's token ids of the texts with a vocabulary, or None if llama.cpp refuses the vocabulary."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "vocabulary.gguf")
        _write_model_without_weights(file, vocabulary)
        try:
            return ask_llama_cpp(file, texts, context=8).token_ids
        except ExportError:
            return None


def _write_model_without_weights(file: Path, vocabulary: dict[str, Any]) -> None:
    """Write a model of one small layer of zeros, since llama.cpp's server loads no vocabulary without a model."""
    width, rows = 32, len(vocabulary["tokenizer.ggml.tokens"])
    sizes = {
        "context_length": 8,
        "embedding_length": width,
        "feed_forward_length": width,
        "block_count": 1,
        "attention.head_count": 1,
        "vocab_size": rows,
    }
    shapes = {"token_embd": (rows, width), "output_norm": (width,)}
    shapes |= {f"blk.0.{name}_norm": (width,) for name in ("attn", "ffn")}
    matrices = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    shapes |= {f"blk.0.{name}": (width, width) for name in matrices}
    with closing(gguf.GGUFWriter(str(file), "llama")) as writer:
        settings = {f"llama.{key}": value for key, value in sizes.items()}
        settings["llama.attention.layer_norm_rms_epsilon"] = 1e-5  # type: ignore[assignment]
        add_metadata(writer, {**settings, **vocabulary})
        for name, shape in shapes.items():
            kind = np.float16 if len(shape) == 2 else np.float32
            writer.add_tensor(f"{name}.weight", np.zeros(shape, kind))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()


def add_metadata(writer: gguf.GGUFWriter, values: dict[str, Any]) -> None:
    """Add values to a file. Empty texts and lists are left out."""
    for key, value in values.items():
        if value not in ("", []):  # the writer takes the type of a list from its first element
            writer.add_key_value(key, value, KINDS[type(value)])
