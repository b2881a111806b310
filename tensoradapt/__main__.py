"""`python -m tensoradapt`, and the console script."""

from __future__ import annotations

import os
import sys

try:  # `python -m` looks for modules where it is called first: in a model folder, say
    if not sys.flags.safe_path and sys.path[:1] == [os.getcwd()]:
        del sys.path[0]
except OSError:  # the folder is gone
    pass

import signal


def _stopped(*_: object) -> None:
    """End the process at once: it has done nothing yet, or was interrupted before."""
    os.write(2, b"interrupted\n")
    os._exit(130)


if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _stopped)  # the imports below take most of a second on a busy machine

from tensoradapt.cli.app import run  # noqa: E402
from tensoradapt.cli.interrupt import INTERRUPTED, leave  # noqa: E402


def _interrupted(*_: object) -> None:
    """Interrupt the command; a second time, end the process: nothing that cleans up is interrupted itself."""
    signal.signal(signal.SIGINT, _stopped)
    raise KeyboardInterrupt


def main() -> None:
    """Run the command line and leave with its exit code: interrupted at once, threads of it may still compute."""
    try:
        if signal.getsignal(signal.SIGINT) in (_stopped, signal.default_int_handler):
            signal.signal(signal.SIGINT, _interrupted)
        code = run()
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # what was to be done is done
    except KeyboardInterrupt:  # before the command was read, or after it was done
        leave("interrupted\n", INTERRUPTED)
    if code == INTERRUPTED:
        leave("", code)
    sys.exit(code)


if __name__ == "__main__":
    main()
