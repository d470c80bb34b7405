"""The grammar of a request: its format, its schema and its functions."""

from __future__ import annotations

from typing import Any

from atlas.serving.api.errors import ApiError
from atlas.serving.api.requests import ChatRequest, CompletionRequest
from atlas.serving.backends.generation import Backend
from atlas.serving.backends.grammar import Grammar
from atlas.serving.tools import call_grammar


def constraint_of(
    body: CompletionRequest | ChatRequest, backend: Backend, *, field: str = "response_format"
) -> Any:
    """Return the grammar of the texts, as `Backend.constrain` returns it; None: any text. `field` is the field with the
    format, which an error names."""
    try:
        grammar = _grammar(body, field)
        return None if grammar is None else backend.constrain(grammar)
    except RecursionError:
        raise ApiError(400, "the schema is nested too deeply: use references") from None


def _grammar(body: CompletionRequest | ChatRequest, field: str) -> Grammar | None:
    form, schema = body.response_format, body.json_schema or None
    formats = [Grammar(schema, "json_schema")] if schema else []
    if form is not None and form.schema_of_text is not None:
        formats.append(Grammar(form.schema_of_text, field, is_strict=form.is_strict))
    if len(formats) > 1:
        raise ApiError(400, "json_schema: not together with response_format", param="json_schema")
    answer = formats[0] if formats else None
    if isinstance(body, ChatRequest) and (tools := body.offered):
        is_one = body.parallel_tool_calls is False
        return call_grammar(tools, must_call=body.must_call, is_one=is_one, answer=answer)
    return answer
