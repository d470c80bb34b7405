"""`atlas export` under the name that the FAQ gives it."""

import sys

from atlas.cli import main

if __name__ == "__main__":
    sys.exit(main(["export", *sys.argv[1:]]))
