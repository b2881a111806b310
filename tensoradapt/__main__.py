"""`python -m tensoradapt`, and the console script."""

from __future__ import annotations

import sys

from tensoradapt.cli.app import run
from tensoradapt.cli.interrupt import INTERRUPTED, leave


def main() -> None:
    """Run the command line and leave with its exit code: interrupted at once, threads of it may still compute."""
    code = run()
    if code == INTERRUPTED:
        leave("", code)
    sys.exit(code)


if __name__ == "__main__":
    main()
