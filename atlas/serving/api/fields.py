"""The fields that OpenAI's, llama.cpp's and vLLM's servers know and that Atlas does not act on.

Clients send more fields than a server needs. A field that does not change the answer is taken. A field that would
change the answer, but that Atlas lacks, is taken only with the value that asks for nothing; any other value is an
error, so that the server never ignores a client's setting silently. The remaining fields, which none of the three
servers knows, are ignored, and the response names them.

Sources: https://platform.openai.com/docs/api-reference, llama.cpp's `tools/server/server-schema.cpp`, and the protocol
classes in vLLM's `vllm/entrypoints/openai`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any, NamedTuple

from pydantic_core import PydanticCustomError

MOST_NAMED = 10
"""The largest number of ignored fields that a response names."""
_LONGEST_NAME = 64
_UNCLEAN = re.compile(r"[^!-+\--~]")  # everything except printable ASCII without spaces and commas

# What OpenAI stores, bills and caches, and hints for reasoning models.
_OPENAI = """
    metadata user store service_tier safety_identifier prompt_cache_key prompt_cache_retention prompt_cache_options
    prompt_cache_breakpoint prediction verbosity reasoning_effort parallel_tool_calls include_obfuscation
"""
# What clients add to messages, or what an earlier answer had.
_IN_MESSAGES = """
    name refusal annotations cache_control reasoning reasoning_content id status phase namespace caller summary
    encrypted_content
"""
# Of the Responses API: what concerns tools and programs that OpenAI itself runs.
_RESPONSES = "background_options access_programs allowed_callers output_schema stream_options"
# Scheduling, caches, other modalities, and options of the beam search, which itself is refused.
_VLLM = """
    priority request_id session_id kv_transfer_params ec_transfer_params media_io_kwargs mm_processor_kwargs
    return_mm_kwargs routed_experts_prompt_start stream_interval include_reasoning length_penalty
    spaces_between_special_tokens guided_decoding_backend guided_whitespace_pattern
"""
# Slots, caches, reports on progress, and options of samplers, which themselves are refused.
_LLAMA_CPP = """
    id_slot n_cache_reuse n_keep n_discard sse_ping_interval timings_per_token return_progress verbose
    response_fields backend_sampling dynatemp_exponent xtc_threshold mirostat_tau mirostat_eta dry_base
    dry_allowed_length dry_penalty_last_n dry_sequence_breakers adaptive_decay penalize_nl parse_tool_calls chat_format
    chat_parser generation_prompt reasoning_format reasoning_control reasoning_in_content reasoning_budget_start_tag
    reasoning_budget_end_tag reasoning_budget_end_tags reasoning_budget_message thinking_forced_open
"""
WITHOUT_EFFECT = frozenset(" ".join((_OPENAI, _IN_MESSAGES, _RESPONSES, _VLLM, _LLAMA_CPP)).split())
"""Fields that do not change what the model writes. Every value is taken."""


class Unsupported(NamedTuple):
    """A field that would change the answer, and that Atlas lacks."""

    neutral: tuple[Any, ...]
    """The values that ask for nothing, besides null."""
    reason: str
    """Why other values are refused, and what to use instead."""


_SAMPLERS = "use temperature, top_k, top_p and min_p"
_TEXT = "the model reads and writes only text"
_SHAPE = "the response has OpenAI's shape"
_TOOLS = "only /v1/chat/completions and /v1/responses can call functions, with tools and tool_choice"
_LENGTH = "use max_output_tokens in /v1/responses, and max_tokens in other routes that generate"
_ELSEWHERE = "only /v1/completions and /v1/chat/completions have this field"
_FORMATS = "use response_format or json_schema"
_STOPS = "use stop"

UNSUPPORTED: Mapping[str, Unsupported] = {
    "previous_response_id": Unsupported(
        ("",), "this server keeps no answers: send the earlier items in input"
    ),
    "conversation": Unsupported((), "this server keeps no conversations: send the earlier items in input"),
    "background": Unsupported((False,), "this server keeps no answers: use stream"),
    "context_management": Unsupported(([],), "use truncation"),
    "max_tool_calls": Unsupported((), "your program runs the functions, and can count the calls"),
    "image": Unsupported((), _TEXT),
    "defer_loading": Unsupported((False,), "the model reads all functions"),
    "async": Unsupported((False,), "your program runs the functions"),
    "input": Unsupported((), "send it to /v1/responses or /v1/embeddings"),
    "instructions": Unsupported(("",), "send a system message"),
    "max_output_tokens": Unsupported((-1,), _LENGTH),
    "max_tokens": Unsupported((-1,), _LENGTH),
    "max_completion_tokens": Unsupported((-1,), _LENGTH),
    "n_predict": Unsupported((-1,), _LENGTH),
    "response_format": Unsupported(({"type": "text"},), "use text.format in /v1/responses"),
    "json_schema": Unsupported(({},), "use text.format in /v1/responses"),
    "n": Unsupported((1,), _ELSEWHERE),
    "stop": Unsupported(("", []), _ELSEWHERE),
    "min_tokens": Unsupported((0,), _ELSEWHERE),
    "ignore_eos": Unsupported((False,), _ELSEWHERE),
    "echo": Unsupported((False,), _ELSEWHERE),
    "logprobs": Unsupported((False,), "use include in /v1/responses"),
    "continue_final_message": Unsupported((False,), "only /v1/chat/completions has this field"),
    "suffix": Unsupported(("",), "the model only continues a text"),
    "messages": Unsupported((), "send a conversation to /v1/chat/completions"),
    "prompt": Unsupported(("",), "send a text to continue to /v1/completions"),
    "best_of": Unsupported((1,), "only /v1/completions can choose the best of several texts"),
    "n_cmpl": Unsupported((1,), "use n"),
    "modalities": Unsupported(([], ["text"]), _TEXT),
    "audio": Unsupported((), _TEXT),
    "prompt_embeds": Unsupported((), _TEXT),
    "multimodal_data": Unsupported(([],), _TEXT),
    "moderation": Unsupported((), "this server does not moderate"),
    "web_search_options": Unsupported((), "this server does not search the web"),
    "documents": Unsupported(([],), "write the documents into a message"),
    "chat_template": Unsupported(("",), "the model's own chat template is used"),
    "tools": Unsupported(([],), _TOOLS),
    "tool_choice": Unsupported(("none", "auto", ""), _TOOLS),
    "functions": Unsupported(([],), _TOOLS),
    "function_call": Unsupported(("none", "auto", ""), _TOOLS),
    "structured_outputs": Unsupported(({},), _FORMATS),
    "guided_json": Unsupported(("", {}), _FORMATS),
    "guided_regex": Unsupported(("",), _FORMATS),
    "guided_choice": Unsupported(([],), _FORMATS),
    "guided_grammar": Unsupported(("",), _FORMATS),
    "structural_tag": Unsupported(("",), _FORMATS),
    "grammar": Unsupported(("",), _FORMATS),
    "grammar_lazy": Unsupported((False,), _FORMATS),
    "grammar_triggers": Unsupported(([],), _FORMATS),
    "preserved_tokens": Unsupported(([],), _FORMATS),
    "n_indent": Unsupported((0,), _FORMATS),
    "use_beam_search": Unsupported((False,), "use best_of"),
    "stop_token_ids": Unsupported(([],), _STOPS),
    "bad_words": Unsupported(([],), "use logit_bias"),
    "allowed_token_ids": Unsupported(([],), "use logit_bias"),
    "logits_processors": Unsupported(([], {}), "use logit_bias"),
    "include_stop_str_in_output": Unsupported((False,), "a text ends before the stop string"),
    "skip_special_tokens": Unsupported((True,), "a text has no special tokens"),
    "truncation_side": Unsupported(("left",), "the oldest tokens are removed"),
    "watermarking": Unsupported((False,), _SAMPLERS),
    "typical_p": Unsupported((1,), _SAMPLERS),
    "tfs_z": Unsupported((1,), _SAMPLERS),
    "top_n_sigma": Unsupported((-1, 0), _SAMPLERS),
    "xtc_probability": Unsupported((0,), _SAMPLERS),
    "dynatemp_range": Unsupported((0,), _SAMPLERS),
    "mirostat": Unsupported((0,), _SAMPLERS),
    "adaptive_target": Unsupported((-1,), _SAMPLERS),
    "samplers": Unsupported(([], ""), "the order is temperature, top_k, top_p, min_p"),
    "min_keep": Unsupported((0, 1), _SAMPLERS),
    "dry_multiplier": Unsupported((0,), "use repetition_penalty"),
    "repetition_detection": Unsupported(({},), "use repetition_penalty"),
    "t_max_predict_ms": Unsupported((-1, 0), "use max_tokens"),
    "thinking_token_budget": Unsupported((-1,), "use max_tokens"),
    "reasoning_budget_tokens": Unsupported((-1,), "use max_tokens"),
    "lora": Unsupported(([],), "serve a checkpoint with the adapter"),
    "vllm_xargs": Unsupported(({},), "this server has no extensions"),
    "n_probs": Unsupported((0,), "use logprobs"),
    "prompt_logprobs": Unsupported((False,), "use echo and logprobs in /v1/completions"),
    "logprob_token_ids": Unsupported(([],), "use logprobs"),
    "post_sampling_probs": Unsupported((False,), "log-probabilities are the model's, before sampling"),
    "continuous_usage_stats": Unsupported((False,), "the counts are in the last chunk"),
    "return_tokens": Unsupported((False,), _SHAPE),
    "return_token_ids": Unsupported((False,), _SHAPE),
    "return_token_offsets": Unsupported((False,), _SHAPE),
    "return_tokens_as_token_ids": Unsupported((False,), _SHAPE),
    "return_prompt_text": Unsupported((False,), _SHAPE),
}
"""Fields that are taken only with a neutral value. If the route itself has a field of this name, the entry does not
apply."""


def check_neutral(name: str, value: Any) -> None:
    """Raise `PydanticCustomError` if this is an unsupported field with a value that is not neutral."""
    field = UNSUPPORTED.get(name)
    if field is None or value is None or value in field.neutral:
        return
    neutral = " or ".join([*map(json.dumps, field.neutral), "null"])
    raise PydanticCustomError(
        "unsupported",
        "must be {neutral} ({reason})",
        {"name": name, "neutral": neutral, "reason": field.reason},
    )


def unknown(names: Iterable[str], own: Iterable[str]) -> tuple[str, ...]:
    """Return the first `MOST_NAMED` of the names that no server knows. `own` are the names that the route has."""
    known = {*own, *WITHOUT_EFFECT, *UNSUPPORTED}
    found = (name for name in names if name not in known and not name.startswith("speculative."))
    return tuple(islice(found, MOST_NAMED))


def shown(name: str) -> str:
    """Return a field's name as a header and the log show it: at most 64 characters of printable ASCII, without spaces
    and commas."""
    return _UNCLEAN.sub("?", name[:_LONGEST_NAME])
