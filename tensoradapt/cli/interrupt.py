"""Interruptions: Ctrl-C ends a command within a second, whatever it computes.

Python looks at signals between calls alone, and threads that compute are joined before a process ends; a call into
LAPACK may take minutes. Invariant: a command that ends by itself in time has cleaned up behind it; one that does not is
ended as by a kill, after which files are the old or the new ones and an extraction can be resumed.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

INTERRUPTED = 130
SOON = 0.02  # seconds in which the watch has seen an interruption
GRACE = 0.5  # seconds that a command has to end by itself


@contextmanager
def prompt() -> Iterator[None]:
    """A watch beside the block: an interruption that has not ended it after a while ends the process.

    An error of the block that an interruption came before is that interruption: modules whose imports are cut off
    raise errors of their own.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ours, theirs = socket.socketpair()  # signals arrive here at once, whatever the main thread does
    theirs.setblocking(False)
    before = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
    seen, ended = threading.Event(), threading.Event()
    told, sys.unraisablehook = sys.unraisablehook, _quietly
    watch = threading.Thread(target=_watch, args=(ours, seen, ended), name="interruptions", daemon=True)
    watch.start()
    try:
        yield
    except Exception:
        if seen.wait(SOON):
            raise KeyboardInterrupt from None
        raise
    else:
        if seen.is_set():  # a library went on in spite of it
            raise KeyboardInterrupt
    finally:
        ended.set()
        sys.unraisablehook = told
        signal.set_wakeup_fd(before)
        theirs.close()
        watch.join()
        ours.close()


def _quietly(met: sys.UnraisableHookArgs) -> None:
    """Say nothing of an interruption of what Python calls by itself, which does not end the block: the watch does."""
    if not issubclass(met.exc_type, KeyboardInterrupt):
        sys.__unraisablehook__(met)


def _watch(signals: socket.socket, seen: threading.Event, ended: threading.Event) -> None:
    """Wait for an interruption, and then for the end of the block. An end of the stream is one of the block."""
    with suppress(OSError):
        while numbers := signals.recv(64):
            if signal.SIGINT in numbers:
                seen.set()
                if not ended.wait(GRACE):
                    leave("interrupted\n", INTERRUPTED)


def leave(words: str, code: int) -> NoReturn:
    """End the process at once, without the threads that still compute."""
    with suppress(OSError, ValueError):
        sys.stderr.write(words)
        sys.stderr.flush()
        sys.stdout.flush()
    os._exit(code)
