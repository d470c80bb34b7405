"""Run one job in a separate process, so that only one model is on the device: `python -m gpu.child PART JOB SETUP`."""

from __future__ import annotations

import importlib
import os
import sys

from gpu.figures import Figures, LeftOut, Setup

LEFT_OUT = 75


def main() -> int:
    part, job, setup = sys.argv[1], sys.argv[2], Setup.from_json(sys.argv[3])
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # output of libraries is not a figure
    from atlas.process import set_up_process

    set_up_process()  # as the command does
    try:
        importlib.import_module(f"gpu.{part}").JOBS[job](setup, Figures(setup.file, part, out))
    except LeftOut as reason:
        print(reason, file=sys.stderr)
        return LEFT_OUT
    return 0


if __name__ == "__main__":
    sys.exit(main())
