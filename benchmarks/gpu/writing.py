"""Measure tokens per second of generation in bf16, for one text and for eight in parallel, compared with transformers.

`tokens_per_second` includes the time to capture CUDA graphs; `steady_tokens_per_second` comes from the median time
between two tokens. Each token needs at least the time to read all weights from memory. `limit` is the speed that this
time allows, and `part_of_limit` is the fraction of the limit that the steady rate reaches. The host waits for each
token, so the host's clock measures the time. See also `benchmarks/decode.py`.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import statistics

from gpu.figures import Figures, LeftOut, Setup
from gpu.timing import memory_rate

LIMIT = 35


def writing(preset: str, kind: str, setup: Setup, figures: Figures) -> None:
    if kind == "transformers" and importlib.util.find_spec("transformers") is None:
        raise LeftOut("transformers is not installed")
    import torch
    from decode import PROMPTS, Shape, bytes_per_token, prepare, tokens_per_second

    rate = memory_rate(setup.device)
    if setup.device == "cuda":
        torch.cuda.empty_cache()
    tokens, rounds = (8, 1) if setup.rehearse else (200, 3)
    threads = torch.get_num_threads()
    shape = Shape("nano" if setup.rehearse else preset, setup.device, threads, gguf="", dtype="bf16")
    num_bytes = bytes_per_token(shape.model())
    write = prepare(kind, shape)
    for texts in (1, len(PROMPTS)):
        name = f"{preset}: {kind}, {texts} text{'s' * (texts > 1)}"
        if figures.get(name) is not None:
            continue
        moments = [write([texts, tokens]) for _ in range(rounds)]
        speed = statistics.median(map(tokens_per_second, moments))
        gaps = [after - before for rows in moments for before, after in itertools.pairwise(rows[0])]
        steady = texts / statistics.median(gaps)
        limit = texts * rate / num_bytes
        figures.add(
            name,
            tokens_per_second=round(speed, 1),
            steady_tokens_per_second=round(steady, 1),
            limit=round(limit, 1),
            part_of_limit=round(steady / limit, 4),
            bytes_per_token=num_bytes,
            bytes_per_second=round(rate),
        )


JOBS = {
    f"{preset}: {kind}": functools.partial(writing, preset, kind)
    for preset in ("small", "default")
    for kind in ("atlas", "transformers")
}
