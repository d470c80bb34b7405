"""What goes wrong between a client and a server, in OpenAI's shape: status, type, code, and the field it is about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi.responses import JSONResponse

_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class Refusal(Exception):
    """An answer of `status` that says why there is no other."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = error_body(status, message, param=param, code=code)


def error_body(
    status: int, message: str, *, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def response(refusal: Refusal, headers: Mapping[str, str] | None = None) -> JSONResponse:
    # OpenAI's clients would ask once more of what took too long, and wait as long again.
    once = {"x-should-retry": "false"} if refusal.status == 504 else {}
    return JSONResponse(refusal.body, refusal.status, {**once, **(headers or {})})


def of_validation(problems: Sequence[Mapping[str, Any]]) -> Refusal:
    """The first thing that is wrong with a body, by pydantic."""
    problem = problems[0]
    if problem["type"] == "json_invalid":
        return Refusal(400, f"the body is not JSON: {problem.get('ctx', {}).get('error', problem['msg'])}")
    if isinstance(problem.get("input"), bytes):
        return Refusal(400, "the body is not said to be JSON: send the header Content-Type: application/json")
    # Among the names are those of a union's types: str, list[str], ….
    names = [
        part
        for part in problem["loc"][1:]
        if isinstance(part, int) or (part.isidentifier() and part != "str")
    ]
    param = ".".join(map(str, names)) or None
    if problem["type"] == "extra_forbidden":
        return Refusal(400, f"Unrecognized request argument supplied: {param}", param=param)
    given = repr(problem.get("input"))
    shown = given if len(given) <= 60 else given[:60] + "…"
    reason = str(problem["msg"]).replace("Input should be", "must be")
    return Refusal(400, f"{param or 'the body'}: {reason}, not {shown}", param=param)
