"""`python -m tensoradapt`, and the console script."""

from __future__ import annotations

import os
import signal
import sys


def _stopped(*_: object) -> None:
    """End the process, which has done nothing yet."""
    os.write(2, b"interrupted\n")
    os._exit(130)


if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _stopped)  # the imports below take most of a second on a busy machine

from tensoradapt.cli.app import run  # noqa: E402
from tensoradapt.cli.interrupt import INTERRUPTED, leave  # noqa: E402


def main() -> None:
    """Run the command line and leave with its exit code: interrupted at once, threads of it may still compute."""
    if signal.getsignal(signal.SIGINT) is _stopped:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    code = run()
    if code == INTERRUPTED:
        leave("", code)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # what was to be done is done
    sys.exit(code)


if __name__ == "__main__":
    main()
