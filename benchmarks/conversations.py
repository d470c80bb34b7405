"""Measure the time to the first token in conversations of 8 turns, with and without the server's prefix cache.

    python benchmarks/conversations.py                              small, one client, 6 rounds
    python benchmarks/conversations.py --preset tiny --clients 4
    python benchmarks/conversations.py --checkpoint checkpoints/atlas_best.pt

Two servers run the same model: `atlas serve`, and `atlas serve --prefix-cache 0`. In each round, the clients hold their
conversations in parallel with one server, and then with the other one. Each turn sends the whole text so far and a new
question, and receives a stream of `--tokens` new tokens. All conversations are different. The turns are as long as the
model's context allows. By default, the model has random weights and the preset's shape.

The table shows the median time from a request's first byte to the first event, for each turn. The last line shows the
mean of the medians of all turns but the first one, in which both servers read the same.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import statistics
import tempfile
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from results import add_record_option, recorded
from serve import WORDS, Served, random_checkpoint, served

TURNS = 8
Times = dict[int, list[float]]
"""Turn → the seconds to the first token."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="small")
    parser.add_argument("--checkpoint", help="a trained model instead of random weights")
    parser.add_argument("--clients", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=16, help="new tokens of each answer")
    parser.add_argument("--device", default="cpu")
    add_record_option(parser)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, recorded("Conversations", arguments), ExitStack() as stack:
        checkpoint = arguments.checkpoint or random_checkpoint(arguments.preset, Path(folder))
        with_cache, without = (
            stack.enter_context(served(checkpoint, arguments, *options))
            for options in ((), ("--prefix-cache", "0"))
        )
        question = words_per_question(with_cache, arguments.tokens)
        times: tuple[Times, Times] = defaultdict(list), defaultdict(list)
        for number in range(-1, arguments.rounds):  # the first requests load and create things
            for server, measured in zip((with_cache, without), times, strict=True):
                found: Times = defaultdict(list)
                converse_all(server, arguments, question, number, found)
                for turn, seconds in found.items() if number >= 0 else ():
                    measured[turn] += seconds
        show(times, arguments.clients)


def show(times: tuple[Times, Times], clients: int) -> None:
    print(f"{clients} client{'s' * (clients > 1)}, medians of {len(times[0][0])} first tokens per turn")
    print("\n| turn | with, ms | without, ms | with ÷ without |\n|---:|---:|---:|---:|")
    rows = [[1e3 * statistics.median(each[turn]) for each in times] for turn in range(TURNS)]
    for turn, (ours, other) in enumerate(rows):
        print(f"| {turn + 1} | {ours:.1f} | {other:.1f} | {ours / other:.2f} |")
    ours, other = (statistics.mean(column) for column in list(zip(*rows[1:], strict=True)))
    print(
        f"\nTurns 2 to {TURNS}: {ours:.1f} ms with the prefix cache, {ours / other:.2f} of {other:.1f} ms without it"
    )


def words_per_question(server: Served, tokens: int) -> int:
    """The number of words of a question with which eight turns fill the context."""
    text = " ".join(WORDS * 10)
    answer = ask(server, "/tokenize", {"prompt": text})
    per_word = answer["count"] / len(text.split())
    context: int = answer["max_model_len"]
    # In a prompt, an answer has at most one token per character. A tenth stays free, since words differ.
    return max(1, int((0.9 * context / TURNS - 2 * tokens) / per_word))


def converse_all(
    server: Served, arguments: argparse.Namespace, question: int, number: int, times: Times
) -> None:
    with ThreadPoolExecutor(arguments.clients) as pool:
        jobs = [
            pool.submit(
                converse, server, random.Random(f"{number} {client}"), question, arguments.tokens, times
            )
            for client in range(arguments.clients)
        ]
        for job in jobs:
            job.result()


def converse(server: Served, words: random.Random, question: int, tokens: int, times: Times) -> None:
    text = ""
    for turn in range(TURNS):
        text += " ".join(words.choices(WORDS, k=question)) + "\n"
        body = {
            "prompt": text,
            "max_tokens": tokens,
            "stream": True,
            "ignore_eos": True,
            "truncation": "auto",
        }
        connection = http.client.HTTPConnection("127.0.0.1", server.port)
        start = time.perf_counter()
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        response, first, answer = connection.getresponse(), 0.0, ""
        for line in response:
            if line.startswith(b"data: {"):
                first = first or time.perf_counter() - start
                answer += json.loads(line[6:])["choices"][0]["text"]
        connection.close()
        assert first, f"turn {turn + 1} has no answer"
        times[turn].append(first)
        text += "".join(each for each in answer if each.isascii())[: 2 * tokens] + "\n"


def ask(server: Served, route: str, body: dict) -> dict:
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    connection.request("POST", route, json.dumps(body), {"Content-Type": "application/json"})
    answer: dict = json.loads(connection.getresponse().read())
    connection.close()
    return answer


if __name__ == "__main__":
    main()
