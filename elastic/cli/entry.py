"""How a command of ours begins and ends in whatever it was started: closed or full streams, another user's files.

Trouble of the environment is one line on stderr and exit status 1, as an ElasticError is (`command.py`). Any other
exception is a defect of ours and keeps its traceback.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from io import TextIOWrapper

OUTPUT_HINT = "what it was to do may be done: ask again with another stdout"


def run(app: Callable[[], object]) -> None:
    """Run the app, which exits."""
    repair_streams()
    try:
        try:
            app()
        finally:
            sys.stdout.flush()
    except (OSError, UnicodeEncodeError) as error:
        with suppress(OSError):
            sys.stderr.write(f"error: {in_words(error)}\n".replace("\n", " ").rstrip() + "\n")
            sys.stderr.flush()
        _give_up_output()
        sys.exit(1)


def repair_streams() -> None:
    """Closed streams are opened, lest a socket of ours gets their number: then output fails, and errors go nowhere.

    What a stream's encoding cannot say is escaped.
    """
    for number, flags in ((0, os.O_RDONLY), (1, os.O_RDONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, flags), True)  # the lowest number that is free: this one
    sys.stdin = sys.stdin or open(0, encoding="locale", closefd=False)  # noqa: SIM115 - open as long as the process
    sys.stdout = sys.stdout or open(1, "w", encoding="locale", closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", encoding="locale", closefd=False)  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def in_words(error: OSError | UnicodeEncodeError) -> str:
    """What went wrong, and what to do."""
    if isinstance(error, UnicodeEncodeError):
        return f"{error.object[error.start : error.end]!r} is no text in UTF-8 (rename it, or write it otherwise)"
    try:
        sys.stdout.flush()
    except OSError as trouble:
        return f"cannot write to stdout: {trouble.strerror} ({OUTPUT_HINT})"
    try:
        os.getcwd()
    except FileNotFoundError:
        return "the current directory was removed (cd to one that exists)"
    where = f"{os.fspath(error.filename)!r}: " if isinstance(error.filename, str | bytes) else ""
    return f"{where}{error.strerror or error}"


def _give_up_output() -> None:
    """Whatever is still buffered goes nowhere: the interpreter would report it at its end, and exit with 120."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)
