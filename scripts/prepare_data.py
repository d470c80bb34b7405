"""Run `atlas prepare`. This script has the name that the FAQ uses."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # use this repository's Atlas
from atlas.__main__ import run

if __name__ == "__main__":
    sys.exit(run("prepare"))
