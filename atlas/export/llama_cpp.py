"""Run a GGUF file in llama.cpp with the package `xllamacpp`, in a separate process.

The process is separate because llama.cpp, if it cannot run a file, ends the process that it runs in. llama.cpp also
writes to standard output and handles Ctrl-C itself. The separate process runs this module. This process reads one JSON
request from standard input, and writes one JSON answer as the last line of standard output. It sends requests to
llama.cpp's HTTP server on the loopback interface, since the package can tokenize only through this server.
"""

from __future__ import annotations

import http.client
import importlib.util
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from atlas.errors import ExportError

NUM_CANDIDATES = 10
"""The number of candidates per step: the most probable tokens, whose log-probabilities Atlas requests."""


UNDERFLOW = -80.0
"""The log-probability below which llama.cpp's fp32 softmax underflows."""

_MANY, _ALL = 300, 10**6
"""Two numbers of candidates. The `_MANY` most probable tokens nearly always include a given token. `_ALL` exceeds the
size of every vocabulary."""

_CERTAIN = 1000.0
"""The logit bias that makes the server generate a given token. The server computes log-probabilities before it adds
this bias."""

Post = Callable[[str, dict[str, Any]], Any]


@dataclass(frozen=True)
class Step:
    """A step of greedy decoding in llama.cpp: the chosen token, and the most probable tokens, as id →
    log-probability."""

    token: int
    logprobs: dict[int, float]


@dataclass(frozen=True)
class Answer:
    """The results of a request: the token ids of each text, the continuation of each prompt, and the log-probabilities
    of each window.

    Each token of a window except the first has a log-probability, given the earlier tokens of the window. None means
    that llama.cpp computed nan.
    """

    token_ids: list[list[int]]
    continuations: list[list[Step]]
    logprobs: list[list[float | None]]


def is_available() -> bool:
    """Whether xllamacpp is installed."""
    return importlib.util.find_spec("xllamacpp") is not None


def ask_llama_cpp(
    path: str | Path,
    texts: Sequence[str] = (),
    prompts: Sequence[list[int]] = (),
    lengths: Sequence[int] = (),
    *,
    windows: Sequence[list[int]] = (),
    context: int,
) -> Answer:
    """Run llama.cpp: tokenize `texts`, continue `prompts` greedily, and compute the log-probabilities of `windows`.

    Prompts and windows are lists of token ids. `lengths` has the number of new tokens for each prompt. A window has at
    most `context` tokens. llama.cpp runs on the CPU with an f32 KV cache, and without flash attention, which would
    round to f16. Raises `ExportError` if llama.cpp cannot load or run the file.
    """
    import torch  # the separate process does not need torch

    request = {"path": str(path), "context": context, "threads": max(1, torch.get_num_threads() // 2)}
    request |= {"texts": texts, "prompts": prompts, "lengths": lengths, "windows": windows}
    # The separate process imports Atlas from the same place as this process, whether Atlas is installed or not.
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONIOENCODING": "utf-8"}
    process = subprocess.run(
        [sys.executable, "-m", "atlas.export.llama_cpp"],
        input=json.dumps(request),
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        env=environment,
    )
    if process.returncode != 0:
        raise ExportError(f"{path}: llama.cpp cannot run it: {_reason(process)}")
    answer = json.loads(process.stdout.splitlines()[-1])
    continuations = [
        [Step(candidates[0][0], dict(candidates)) for candidates in steps]
        for steps in answer["continuations"]
    ]
    return Answer(answer["token_ids"], continuations, answer["logprobs"])


def _reason(process: subprocess.CompletedProcess[str]) -> str:
    """Return the first error that llama.cpp logged, since this error causes the later errors. Without a logged error,
    return the exception's message or the first line of standard error."""
    logged = [line.split(" E ", 1)[1] for line in process.stderr.splitlines() if " E " in line]
    reason = logged[:1] or process.stdout.strip().splitlines()[-1:] or process.stderr.strip().splitlines()[:1]
    return reason[0].strip() if reason else f"the process ended with exit status {process.returncode}"


def _main() -> None:
    try:
        _answer(json.load(sys.stdin))
    except Exception as error:
        # A thread of llama.cpp may be writing to standard error, so this line goes to standard output.
        print(f"\n{error}")
        sys.exit(1)


def _answer(request: dict[str, Any]) -> None:
    server = load(request["path"], request["context"], request["threads"])
    post = connect(server)
    token_ids = [
        post("/tokenize", {"content": text, "add_special": False, "parse_special": False})["tokens"]
        for text in request["texts"]
    ]
    letter = post("/tokenize", {"content": "a", "add_special": False})["tokens"][
        -1
    ]  # after a blank, in some models
    continuations = [
        _continue(post, prompt, length, letter)
        for prompt, length in zip(request["prompts"], request["lengths"], strict=True)
    ]
    logprobs = [
        [_logprob(post, window[:place], window[place], letter) for place in range(1, len(window))]
        for window in request["windows"]
    ]
    del server
    print("\n" + json.dumps({"token_ids": token_ids, "continuations": continuations, "logprobs": logprobs}))


def server_params(path: str, context: int, threads: int, *, parallel: int = 1) -> Any:
    """The settings of llama.cpp's server for a file. All `parallel` sequences share a context of `context` tokens."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = path
    params.n_ctx = context
    params.n_parallel = parallel
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.fit_params = False
    params.warmup = False
    params.verbosity = 1  # errors only
    return params


def load(path: str, context: int, threads: int) -> Any:
    """Start llama.cpp's server for a file, in this process. The server computes on the CPU, with an f32 KV cache."""
    import xllamacpp

    params = server_params(path, context, threads)
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.n_gpu_layers = 0
    params.no_kv_offload = params.no_op_offload = True
    return xllamacpp.Server(params)


def connect(server: Any) -> Post:
    """Return a function that posts a JSON body to a route of the server and returns the parsed response."""
    connection = http.client.HTTPConnection(urlsplit(server.listening_address).netloc)

    def post(route: str, body: dict[str, Any]) -> Any:
        connection.request("POST", route, json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        answer = response.read()
        if response.status != 200:
            raise RuntimeError(f"{route}: {json.loads(answer)['error']['message']}")
        return json.loads(answer)

    return post


def _continue(post: Post, prompt: list[int], length: int, letter: int) -> list[Any]:
    """Return the candidates of each of `length` steps: [[id, log-probability], …], the most probable first. The first
    candidate is the token of its step.

    Each step sends a request for one more token, while the server's cache keeps the earlier tokens. Each request forces
    the server to generate `letter`, the token "a". Otherwise the server could return no log-probabilities, or fail in
    older versions, if the text ends inside a character or the document ends.
    """
    steps: list[list[Any]] = []
    for _ in range(length):
        [record] = _force(post, [*prompt, *(step[0][0] for step in steps)], letter, NUM_CANDIDATES)
        logprobs = [(each["id"], each["logprob"]) for each in record["top_logprobs"]]
        # llama.cpp writes nan as null. Python's `json` can write and read NaN.
        steps.append([(id, math.nan if logprob is None else logprob) for id, logprob in logprobs])
    return steps


def _logprob(post: Post, prompt: list[int], token: int, letter: int) -> float | None:
    """The log-probability of `token` after `prompt`. The request forces the server to generate `token`.

    If `token` ends inside a character, the server returns no log-probability. A second request then forces the complete
    character "a" instead, and asks for the log-probabilities of many tokens. If `token` is not among these tokens, a
    third request asks for all tokens. With a large vocabulary, this request takes up to a second.
    """
    records = _force(post, prompt, token, 1)
    for candidates in (_MANY, _ALL):
        if not records:
            [record] = _force(post, prompt, letter, candidates)
            records = [each for each in record["top_logprobs"] if each["id"] == token]
    logprob: float | None = records[0]["logprob"]
    return logprob


def _force(post: Post, prompt: list[int], token: int, candidates: int) -> list[dict[str, Any]]:
    """Force the server to generate `token` after `prompt`. Return a list with one record: the log-probabilities of
    `token` and of the `candidates` most probable tokens. The list is empty if the server reports no
    log-probabilities."""
    request = {"prompt": prompt, "n_predict": 1, "temperature": 0, "n_probs": candidates}
    answer = post("/completion", request | {"logit_bias": [[token, _CERTAIN]]})
    records: list[dict[str, Any]] = answer.get("completion_probabilities", [])
    return records


if __name__ == "__main__":
    _main()
