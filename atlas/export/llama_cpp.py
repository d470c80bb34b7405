"""Run a GGUF file in llama.cpp with the package `xllamacpp`, in a separate process.

The process is separate because llama.cpp ends its process if it cannot run a file. llama.cpp also writes to standard
output and handles Ctrl-C itself. The separate process runs this module. The process reads one JSON request from
standard input, and writes one JSON answer as the last line of standard output. The process sends requests to
llama.cpp's HTTP server on the loopback interface, since no other function of the package can tokenize.
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
"""The number of most probable tokens at each step whose log-probabilities are requested."""


UNDERFLOW = -80.0
"""The log-probability below which llama.cpp's fp32 softmax underflows."""

_MANY, _ALL = 300, 10**6
"""Two numbers of candidates: the first nearly always includes a given token, the second exceeds every vocabulary."""

_CERTAIN = 1000.0
"""The bias that makes the server generate a token. The server computes log-probabilities before it adds the bias."""

Post = Callable[[str, dict[str, Any]], Any]


@dataclass(frozen=True)
class Step:
    """One token of llama.cpp's greedy text, and the log-probabilities of the most probable tokens at that step, by
    id."""

    token: int
    logprobs: dict[int, float]


@dataclass(frozen=True)
class Answer:
    """The results of a request: the token ids of each text, the continuation of each prompt, and the log-probabilities
    of each window.

    A window has a log-probability for every token but the first, given the tokens before it. None means that llama.cpp
    computed nan.
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
    """Tokenize `texts`, continue each of `prompts` (token ids) greedily by its number of tokens in `lengths`, and
    evaluate `windows` (token ids, at most `context`).

    llama.cpp runs on the CPU with an f32 KV cache and without flash attention, which rounds to f16. Raises
    `ExportError` if llama.cpp cannot load or run the file.
    """
    import torch  # the separate process does not need torch

    request = {"path": str(path), "context": context, "threads": max(1, torch.get_num_threads() // 2)}
    request |= {"texts": texts, "prompts": prompts, "lengths": lengths, "windows": windows}
    # The separate process imports Atlas from the same place as this process, installed or not.
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
    """llama.cpp's first error, since it causes all later errors; without an error, the exception's message."""
    logged = [line.split(" E ", 1)[1] for line in process.stderr.splitlines() if " E " in line]
    reason = logged[:1] or process.stdout.strip().splitlines()[-1:] or process.stderr.strip().splitlines()[:1]
    return reason[0].strip() if reason else f"it ended with {process.returncode}"


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
    """Load a file into llama.cpp's server, in this process."""
    import xllamacpp

    params = server_params(path, context, threads)
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.n_gpu_layers = 0
    params.no_kv_offload = params.no_op_offload = True
    return xllamacpp.Server(params)


def connect(server: Any) -> Post:
    """A function that sends a request to a route of the server and returns the parsed answer."""
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

    Each step is a request for one more token. The server's cache keeps the earlier tokens. Each request forces the
    server to generate "a". Otherwise, after text that ends inside a character, or at the end of the document, the
    server stops, withholds the log-probabilities or, in older versions, fails.
    """
    steps: list[list[Any]] = []
    for _ in range(length):
        [record] = _force(post, [*prompt, *(step[0][0] for step in steps)], letter, NUM_CANDIDATES)
        logprobs = [(each["id"], each["logprob"]) for each in record["top_logprobs"]]
        # llama.cpp writes nan as null. The JSON of Python can hold NaN.
        steps.append([(id, math.nan if logprob is None else logprob) for id, logprob in logprobs])
    return steps


def _logprob(post: Post, prompt: list[int], token: int, letter: int) -> float | None:
    """The log-probability of `token` after `prompt`. The server is forced to generate the token.

    If the token ends inside a character, the server returns no log-probability. A second request then forces "a" and
    asks for the log-probabilities of many tokens. If `token` is not among these, a third request asks for all tokens,
    which takes up to a second with a large vocabulary.
    """
    records = _force(post, prompt, token, 1)
    for candidates in (_MANY, _ALL):
        if not records:
            [record] = _force(post, prompt, letter, candidates)
            records = [each for each in record["top_logprobs"] if each["id"] == token]
    logprob: float | None = records[0]["logprob"]
    return logprob


def _force(post: Post, prompt: list[int], token: int, candidates: int) -> list[dict[str, Any]]:
    """Force the server to generate `token` after `prompt`. Return its record: the log-probabilities of this token and
    of the most probable `candidates`. The list is empty if the server withholds the record."""
    request = {"prompt": prompt, "n_predict": 1, "temperature": 0, "n_probs": candidates}
    answer = post("/completion", request | {"logit_bias": [[token, _CERTAIN]]})
    records: list[dict[str, Any]] = answer.get("completion_probabilities", [])
    return records


if __name__ == "__main__":
    _main()
