"""The application: its commands, and what becomes of errors."""

from __future__ import annotations

import ast
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from inspect import cleandoc
from pathlib import Path
from typing import Annotated

import typer

from tensoradapt.cli.analyze import analyze
from tensoradapt.cli.budget import budget
from tensoradapt.cli.convert import convert
from tensoradapt.cli.demo import demo
from tensoradapt.cli.export import export
from tensoradapt.cli.extract import extract
from tensoradapt.cli.info import info
from tensoradapt.cli.interrupt import INTERRUPTED, prompt
from tensoradapt.cli.merge import merge
from tensoradapt.cli.plan import plan
from tensoradapt.cli.plot import plot
from tensoradapt.cli.presets import presets
from tensoradapt.cli.verify import verify
from tensoradapt.errors import FileError, TensorAdaptError
from tensoradapt.version import VERSION

AT_FAULT = 2
UNREAD = 141  # as a shell says of a program that wrote to a pipe which nobody reads: 128 and the signal's number
# Recent versions of typer carry their own copy of click, so the class is found by what it is the base of.
UsageError: type[Exception] = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")


def application() -> typer.Typer:
    """The command line's application."""
    app = typer.Typer(
        name="tensoradapt",
        no_args_is_help=True,
        add_completion=True,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_root)
    for command in (presets, plan, budget, analyze, extract, convert, export, merge, verify, info, plot, demo):
        app.command(help=_laid_out(command))(command)
    return app


def _laid_out(command: Callable[..., None]) -> str:
    """A command's help: paragraphs that fit the terminal, examples as they stand."""
    paragraphs = cleandoc(command.__doc__ or _in_source(command)).split("\n\n")
    return "\n\n".join(f"\b\n{text}" if text.startswith("Example:") else text for text in paragraphs)


def _in_source(command: Callable[..., None]) -> str:
    """A command's docstring where Python has left it out (-OO)."""
    parsed = ast.parse(Path(command.__code__.co_filename).read_text("utf-8"))
    return next((ast.get_docstring(n) or "" for n in parsed.body if getattr(n, "name", "") == command.__name__), "")  # type: ignore[arg-type]


def _version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"tensoradapt {VERSION}\n")
        raise typer.Exit


def _root(
    show: Annotated[
        bool, typer.Option("--version", help="Print the version and leave.", is_eager=True, callback=_version)
    ] = False,
) -> None:
    """Build, analyse, extract and compare tensor-structured adapters."""


def _tell(error: TensorAdaptError) -> None:
    """Print an error in the words of the command line."""
    from tensoradapt.cli.run.words import in_options

    _say(f"error: {in_options(str(error))}\n")


def _say(text: str) -> None:
    """Write on stderr, where it can be written."""
    with suppress(OSError, ValueError):
        sys.stderr.write(text)


def _unread(code: int) -> int:
    """Give up stdout, which cannot be written: what is left in its buffer would be tried again at the end."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return code


def run(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; the exit code.

    0 done, 1 a tolerance missed, 2 the input or the disk is at fault, 130 interrupted, 141 nobody reads the output.
    """
    for stream in (sys.stdout, sys.stderr):  # a terminal may lack letters of a path, or of a sentence
        with suppress(AttributeError, ValueError):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        command = typer.main.get_command(application())
        given = list(sys.argv[1:] if arguments is None else arguments)
        with prompt():
            code = command.main(args=given, prog_name="tensoradapt", standalone_mode=False)
        if code == INTERRUPTED:  # recent versions of typer turn the interruption into its code themselves
            raise KeyboardInterrupt
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except (BrokenPipeError, SystemExit):  # the latter is what the command line's library makes of it
        return _unread(UNREAD)
    except TensorAdaptError as error:
        if not error.told:
            _tell(error)
        return AT_FAULT
    except UsageError as error:
        error.show()  # type: ignore[attr-defined]
        return AT_FAULT
    except (KeyboardInterrupt, typer.Abort):
        _say("interrupted\n")
        return INTERRUPTED
    except OSError as error:
        _tell(FileError("a file cannot be read or written", got=error, hint="look at the disk, and at permissions"))
        return _unread(AT_FAULT)
