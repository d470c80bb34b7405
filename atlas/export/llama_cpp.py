"""llama.cpp's own word on a GGUF file, through the package `xllamacpp`, in a process of its own.

Its own process, because llama.cpp ends the process that gives it a file it cannot compute, writes to the
standard output and takes over Ctrl-C. That process is this module: one JSON request on standard input,
one JSON answer as the last line of standard output. What llama.cpp is asked goes over its HTTP server on
the loopback interface, the only door that tokenizes.
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

from atlas.errors import AtlasError

NUM_CANDIDATES = 10
"""Most probable tokens whose log-probabilities are asked for at each step."""


@dataclass(frozen=True)
class Step:
    """One token of llama.cpp's greedy text, and the log-probabilities of the likeliest tokens, by id."""

    token: int
    logprobs: dict[int, float]


@dataclass(frozen=True)
class Answer:
    """The ids of each text, and what follows each prompt."""

    token_ids: list[list[int]]
    continuations: list[list[Step]]


def is_available() -> bool:
    return importlib.util.find_spec("xllamacpp") is not None


def ask_llama_cpp(
    path: str | Path,
    texts: Sequence[str],
    prompts: Sequence[Sequence[int]],
    lengths: Sequence[int],
    *,
    context: int,
    threads: int,
) -> Answer:
    """Tokenize `texts`, and continue each of `prompts` (token ids) greedily by as many tokens as `lengths` says.

    Runs on the CPU with an f32 KV cache and without flash attention, which rounds to f16. Raises `AtlasError`
    if llama.cpp cannot load or run the file.
    """
    request = {
        "path": str(path),
        "texts": list(texts),
        "prompts": [list(prompt) for prompt in prompts],
        "lengths": list(lengths),
        "context": context,
        "threads": threads,
    }
    # The child finds Atlas where this process found it, installed or not.
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
        raise AtlasError(f"{path}: llama.cpp cannot run it: {_reason(process)}")
    answer = json.loads(process.stdout.splitlines()[-1])
    continuations = [
        # JSON has no nan: llama.cpp says null.
        [
            Step(token, {id: math.nan if p is None else p for id, p in candidates})
            for token, candidates in steps
        ]
        for steps in answer["continuations"]
    ]
    return Answer(answer["token_ids"], continuations)


def _reason(process: subprocess.CompletedProcess[str]) -> str:
    """llama.cpp's first error, which the later ones follow from; else the last line of a traceback."""
    lines = process.stderr.strip().splitlines()
    if not lines:
        return f"it ended with {process.returncode}"
    return lines[-1] if lines[0].startswith("Traceback") else lines[0].split(" E ", 1)[-1].strip()


def _main() -> None:
    request = json.load(sys.stdin)
    server = _load(request["path"], request["context"], request["threads"])
    post = _door(server)
    token_ids = [
        post("/tokenize", {"content": text, "add_special": False, "parse_special": False})["tokens"]
        for text in request["texts"]
    ]
    continuations = [
        _continue(post, prompt, length)
        for prompt, length in zip(request["prompts"], request["lengths"], strict=True)
    ]
    del server
    print("\n" + json.dumps({"token_ids": token_ids, "continuations": continuations}))


def _load(path: str, context: int, threads: int) -> Any:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = path
    params.n_ctx = context
    params.n_parallel = 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.n_gpu_layers = 0
    params.no_kv_offload = params.no_op_offload = True
    params.fit_params = False
    params.warmup = False
    params.verbosity = 1  # errors only
    return xllamacpp.Server(params)


def _door(server: Any) -> Callable[[str, dict[str, Any]], Any]:
    connection = http.client.HTTPConnection(urlsplit(server.listening_address).netloc)

    def post(route: str, body: dict[str, Any]) -> Any:
        connection.request("POST", route, json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        answer = response.read()
        if response.status != 200:
            raise SystemExit(f"{route}: {json.loads(answer)['error']['message']}")
        return json.loads(answer)

    return post


def _continue(post: Callable[[str, dict[str, Any]], Any], prompt: list[int], length: int) -> list[Any]:
    """[token, [[candidate, log-probability], …]] a step; the token is llama.cpp's likeliest.

    Each step is a request for one token more; the cache keeps what was computed. The request is made to say
    "a", whatever is likely: over text that ends inside a character or the document llama.cpp's server stops,
    withholds the log-probabilities or, in older versions, fails. Log-probabilities are taken before the bias.
    """
    [letter] = post("/tokenize", {"content": "a", "add_special": False})["tokens"]
    forced = {"n_predict": 1, "temperature": 0, "n_probs": NUM_CANDIDATES, "logit_bias": [[letter, 1000.0]]}
    ids, steps = list(prompt), []
    for _ in range(length):
        [said] = post("/completion", forced | {"prompt": ids})["completion_probabilities"]
        candidates = [[candidate["id"], candidate["logprob"]] for candidate in said["top_logprobs"]]
        token = candidates[0][0]
        steps.append([token, candidates])
        ids.append(token)
    return steps


if __name__ == "__main__":
    _main()
