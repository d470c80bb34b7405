"""`python -m atlas`, which is also what torchrun starts."""

import sys

from atlas.cli import main

if __name__ == "__main__":
    sys.exit(main())
