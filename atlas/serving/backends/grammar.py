"""Which tokens may come next, so that a generated text follows a JSON schema or calls a function.

The package llguidance (https://github.com/guidance-ai/llguidance) follows the grammar from token to token. An answer
that ends by itself then always parses, however small the model is. An answer that ends at the limit of tokens may be
incomplete.
"""

from __future__ import annotations

import json
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper
from torch import Tensor

from atlas.serving.api.errors import ApiError
from atlas.tokenizer import Tokenizer

CALL_BEGIN, CALL_END = "<tool_call>", "</tool_call>"
"""The marks around a function call in a text, as in the format of Hermes 2 Pro and Qwen."""
TOO_COMPLEX = "the schema is too complex: use fewer properties or shorter patterns"
_JSON = {"whitespace_pattern": r"( |\n {0,16})?"}
"""White space in JSON is limited. Otherwise a small model could write spaces without end."""

_SCHEMAS = {"items", "prefixItems", "additionalProperties", "anyOf", "oneOf", "allOf", "contains"}
_NAMED_SCHEMAS = {"properties", "patternProperties", "$defs", "definitions"}
_OPEN = {
    "additionalProperties",
    "unevaluatedProperties",
    "patternProperties",
    "anyOf",
    "oneOf",
    "allOf",
    "$ref",
}
"""Keywords of JSON Schema: those whose values are schemas, those whose values are objects of schemas, and those beside
which an object may have properties that `properties` does not name."""


@dataclass(frozen=True)
class Grammar:
    """What a generation must be: JSON that follows `schema`, or, if `is_call` is true, any text with calls.

    Each call is JSON between `CALL_BEGIN` and `CALL_END`. If there is an `answer`, a text without calls follows this
    grammar, and a text with calls has nothing beside them.
    """

    schema: dict[str, Any]
    field: str
    """The field of the request that an error names."""
    is_strict: bool = True
    """Whether a keyword of JSON Schema that cannot be enforced is an error. Otherwise it is ignored."""
    is_call: bool = False
    is_one: bool = False
    """Whether a text may have only one call."""
    answer: Grammar | None = None


def rules_of(grammar: Grammar, special: Container[str]) -> str:
    """Return the rules of a grammar in llguidance's variant of Lark. `special` are the tokenizer's special tokens.
    Raises `ApiError` if the grammar's schema is not valid or not supported."""
    value = _json(grammar)
    if not grammar.is_call:
        return f"%llguidance {{}}\nstart: {value}\n"
    begin, end = (mark if mark in special else json.dumps(mark) for mark in (CALL_BEGIN, CALL_END))
    call = f'"\\n" {value} "\\n" {end}\n'
    if grammar.answer is not None:
        several = "" if grammar.is_one else ' ("\\n" call)*'
        return f"%llguidance {{}}\nstart: call{several} | {_json(grammar.answer)}\ncall: {begin} {call}"
    # A lazy rule ends as soon as it can. So the mark begins a call wherever it occurs in a text.
    is_token = CALL_BEGIN in special
    head = f"head: ANY {begin}" if is_token else f"head[lazy]: ANY {begin}"
    text = "ANY" if is_token else f"ANY & ~/(.|\\n)*{CALL_BEGIN}(.|\\n)*/"
    start = f"start: call{'?' if grammar.is_one else '*'} TEXT"
    return f"%llguidance {{}}\n{start}\ncall: head {call}{head}\nTEXT: {text}\nANY: /(.|\\n)*/\n"


def _json(grammar: Grammar) -> str:
    """Return the rule for JSON that follows the schema of a grammar. Raises `ApiError` if it is not supported."""
    # `oneOf` is followed as `anyOf`, whose answers may match several of the schemas.
    options = {**_JSON, "lenient": not grammar.is_strict, "coerce_one_of": not grammar.is_strict}
    schema = grammar.schema if _has_all_of(grammar.schema) else _closed(grammar.schema)
    rule = f"%json {json.dumps({**schema, 'x-guidance': options})}"
    is_wrong, messages = LLMatcher.validate_grammar_with_warnings(f"%llguidance {{}}\nstart: {rule}\n")
    if is_wrong:
        reason = messages[0].partition("failed to compile JSON schema: ")[2] or messages[0]
        if grammar.is_strict and reason.startswith("Unimplemented keys"):
            remedy = "leave them out, or set strict to false to ignore them"
            reason = f"{reason.splitlines()[0]} cannot be enforced: {remedy}"
        raise ApiError(400, f"{grammar.field}: {reason.splitlines()[0]:.300}", param=grammar.field)
    return rule


def _closed(schema: Any) -> Any:
    """Return a schema whose objects have only the properties that it names, unless it says more about other properties.
    Otherwise a small model would invent properties. What follows the new schema also follows the old one."""
    if isinstance(schema, list):
        return [_closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    closed = dict(schema)
    for name in _SCHEMAS & schema.keys():
        closed[name] = _closed(schema[name])
    for name in _NAMED_SCHEMAS & schema.keys():
        if isinstance(schema[name], dict):
            closed[name] = {key: _closed(value) for key, value in schema[name].items()}
    if "properties" in schema and not _OPEN & schema.keys():
        closed["additionalProperties"] = False
    return closed


def _has_all_of(schema: Any) -> bool:
    """Return whether a schema joins several schemas, none of which may then be closed."""
    if isinstance(schema, dict):
        joined = schema.get("allOf")
        return (isinstance(joined, list) and len(joined) > 1) or any(map(_has_all_of, schema.values()))
    return isinstance(schema, list) and any(map(_has_all_of, schema))


class Vocabulary:
    """The tokens of a tokenizer in the form that llguidance needs. The constructor takes about a second for 50,000
    tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._special = tokenizer.special_strings
        tokens = _Tokens(tokenizer)
        self._tokens = LLTokenizer(TokenizerWrapper(tokens), eos_token=sorted(tokenizer.stop_ids))

    def matcher(self, grammar: Grammar) -> LLMatcher:
        """Return the start of a grammar. Raises `ApiError` if the grammar's schema is not valid or not supported."""
        matcher = LLMatcher(self._tokens, rules_of(grammar, self._special), log_level=0)
        first = matcher.deep_copy()  # the first steps often show whether a grammar is too complex
        first.consume_tokens(first.compute_ff_tokens())
        first.compute_bitmask()
        if matcher.is_error() or first.is_error():
            raise ApiError(400, f"{grammar.field}: {TOO_COMPLEX}", param=grammar.field)
        return matcher


class _Tokens:
    """The attributes of a tokenizer that llguidance reads."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.tokens = [tokenizer.token_bytes(id) for id in range(tokenizer.vocab_size)]
        self.eos_token_id, self.bos_token_id = tokenizer.eos_id, None
        self.special_token_ids = sorted({*tokenizer.special_strings.values(), *tokenizer.stop_ids})

    def __call__(self, text: bytes) -> list[int]:
        return self._tokenizer.encode(text.decode("utf-8", "replace"))


def allowed_tokens(matchers: Sequence[LLMatcher | None], width: int, device: torch.device) -> Tensor:
    """Return (B, `width`): whether each token may come next in each row. A row without a matcher allows all tokens."""
    allowed = np.ones((len(matchers), width), dtype=bool)
    for row, matcher in zip(allowed, matchers, strict=True):
        if matcher is not None:
            bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")[
                :width
            ]
            row[:] = False
            row[: len(bits)] = bits
    return torch.from_numpy(allowed).to(device, non_blocking=True)
