"""Run the variants on fake CUDA, and print each one's waits, or its traceback, as JSON:

    python -m tests.cuda_path.child [VARIANT … | saved]

Fake CUDA changes PyTorch for the entire process, so this is a separate one.
"""

from __future__ import annotations

import gc
import json
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any

from benchmarks.fake_cuda import FakeCuda, waits


def main(asked: list[str]) -> None:
    device = FakeCuda()
    from tests.cuda_path import variants

    gc.disable()  # it would take a tenth of the time
    variants.patch()
    seen = waits()
    work: dict[str, Callable[[Any], Any]] = {
        name: partial(variants.train, settings) for name, settings in variants.TRAINING.items()
    }
    work |= variants.others()
    results: dict[str, Any] = {}
    for name in asked or [*work, "graphs"]:
        begin = time.perf_counter()
        try:
            with device, seen:
                seen.seen.clear()
                if name == "graphs":
                    results[name] = {"seen": variants.graphs(device, seen.seen)}
                elif name == "saved":
                    results[name] = {"seen": variants.saved(device)}
                else:
                    work[name](seen.seen)
                    results[name] = {"seen": dict(seen.seen)}
        except Exception:
            results[name] = {"error": traceback.format_exc()}
        results[name]["seconds"] = time.perf_counter() - begin
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1:])
