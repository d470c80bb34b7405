"""Run a GGUF file in llama.cpp, through the package `xllamacpp`, in a separate process.

A separate process, because llama.cpp ends the process that gives it a file it cannot compute, writes to standard
output and handles Ctrl-C itself. That process runs this module: one JSON request on standard input, one JSON answer as
the last line of standard output. It sends its requests to llama.cpp's HTTP server on the loopback interface, the only
interface of the package that can tokenize.
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
"""The most probable tokens at each step, whose log-probabilities are requested."""


UNDERFLOW = -80.0
"""Below this log-probability llama.cpp's fp32 softmax underflows."""

_MANY, _ALL = 300, 10**6
"""Numbers of candidates: one that nearly always includes a token, and one larger than any vocabulary."""

_CERTAIN = 1000.0
"""Added to a logit, so that its token is generated. Log-probabilities are computed before it is added."""

Post = Callable[[str, dict[str, Any]], Any]


@dataclass(frozen=True)
class Step:
    """One token of llama.cpp's greedy text, and the log-probabilities of the most probable tokens, by id."""

    token: int
    logprobs: dict[int, float]


@dataclass(frozen=True)
class Answer:
    """The token ids of each text, the continuation of each prompt, and for each window the log-probability of every
    token but the first, given the tokens before it; None where llama.cpp computes nan."""

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
    """Tokenize `texts`, continue each of `prompts` (token ids) greedily by its number of tokens in `lengths`, and
    evaluate `windows` (token ids, at most `context`).

    Runs on the CPU with an f32 KV cache and without flash attention, which rounds to f16. Raises `ExportError`
    if llama.cpp cannot load or run the file.
    """
    import torch  # which the other process does not need

    request = {"path": str(path), "context": context, "threads": max(1, torch.get_num_threads() // 2)}
    request |= {"texts": texts, "prompts": prompts, "lengths": lengths, "windows": windows}
    # The child imports Atlas from where this process did, installed or not.
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
    """llama.cpp's first error, which causes the later ones; else the exception's message."""
    logged = [line.split(" E ", 1)[1] for line in process.stderr.splitlines() if " E " in line]
    reason = logged[:1] or process.stdout.strip().splitlines()[-1:] or process.stderr.strip().splitlines()[:1]
    return reason[0].strip() if reason else f"it ended with {process.returncode}"


def _main() -> None:
    try:
        _answer(json.load(sys.stdin))
    except Exception as error:
        # To standard output: a thread of llama.cpp may be writing parts of a line to standard error.
        print(f"\n{error}")
        sys.exit(1)


def _answer(request: dict[str, Any]) -> None:
    server = load(request["path"], request["context"], request["threads"])
    post = connect(server)
    token_ids = [
        post("/tokenize", {"content": text, "add_special": False, "parse_special": False})["tokens"]
        for text in request["texts"]
    ]
    [letter] = post("/tokenize", {"content": "a", "add_special": False})["tokens"]
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
    """The settings of llama.cpp's server for a file, and for `context` tokens of all `parallel` sequences together."""
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
    """Load a file into llama.cpp's server, in this process."""
    import xllamacpp

    params = server_params(path, context, threads)
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.n_gpu_layers = 0
    params.no_kv_offload = params.no_op_offload = True
    return xllamacpp.Server(params)


def connect(server: Any) -> Post:
    """A function that sends a request to a route of the server and returns the answer."""
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
    """[[candidate, log-probability], …] per step. The first candidate, the most probable one, is the step's token.

    Each step is a request for one more token; the server's cache keeps the earlier ones. The request is forced to
    generate "a": after text that ends inside a character, or at the end of the document, llama.cpp's server stops,
    withholds the log-probabilities or, in older versions, fails.
    """
    steps: list[list[Any]] = []
    for _ in range(length):
        [record] = _force(post, [*prompt, *(step[0][0] for step in steps)], letter, NUM_CANDIDATES)
        logprobs = [(each["id"], each["logprob"]) for each in record["top_logprobs"]]
        # llama.cpp writes null for nan, and Python reads and writes NaN.
        steps.append([(id, math.nan if logprob is None else logprob) for id, logprob in logprobs])
    return steps


def _logprob(post: Post, prompt: list[int], token: int, letter: int) -> float | None:
    """The log-probability of `token` after `prompt`: the server is forced to generate it.

    For a token that ends inside a character the server returns nothing. It is then forced to generate "a" and asked for
    the log-probabilities of many tokens, and if `token` is not among them, of all tokens, which takes up to a second
    with a large vocabulary.
    """
    records = _force(post, prompt, token, 1)
    for candidates in (_MANY, _ALL):
        if not records:
            [record] = _force(post, prompt, letter, candidates)
            records = [each for each in record["top_logprobs"] if each["id"] == token]
    logprob: float | None = records[0]["logprob"]
    return logprob


def _force(post: Post, prompt: list[int], token: int, candidates: int) -> list[dict[str, Any]]:
    """The server's record of `token`, which it is forced to generate after `prompt`: its log-probability, and those of
    the most probable `candidates`. Empty if the server withholds them."""
    request = {"prompt": prompt, "n_predict": 1, "temperature": 0, "n_probs": candidates}
    answer = post("/completion", request | {"logit_bias": [[token, _CERTAIN]]})
    records: list[dict[str, Any]] = answer.get("completion_probabilities", [])
    return records


if __name__ == "__main__":
    _main()
