"""`atlas prepare` under the name that the FAQ gives it."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # Atlas beside this script, installed or not
from atlas.__main__ import run

if __name__ == "__main__":
    sys.exit(run("prepare"))
