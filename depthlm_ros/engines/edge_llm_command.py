"""Runs a program of others to its end, with a time-out that also ends what it started."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Mapping, Sequence

LINES = 12
"""Of a program's output that an error message repeats."""


class TookTooLong(Exception):
    """The program was stopped; holds what it had printed."""


def run_command(command: Sequence[str], environment: Mapping[str, str], timeout_s: float) -> tuple[int, str]:
    """Runs a program with no input.

    Args:
        command: program and arguments.
        environment: all variables that it sees.
        timeout_s: after which it and its children are stopped.

    Returns:
        Exit status, and what it printed to both outputs.

    Raises:
        OSError: it can't be started.
        TookTooLong: it was stopped.
    """
    # A session of its own, so that its children end with it, and a Ctrl-C reaches us alone.
    running = subprocess.Popen(
        list(command), env=dict(environment), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True,
    )  # fmt: skip
    try:
        told, _ = running.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        raise TookTooLong(_ended(running)) from None
    except BaseException:
        _ended(running)
        raise
    return running.returncode, told


def last_lines(text: str, count: int = LINES) -> str:
    """The last lines of a program's output that say something."""
    return "\n".join([line.rstrip() for line in text.splitlines() if line.strip()][-count:])


def _ended(running: subprocess.Popen[str]) -> str:
    try:
        os.killpg(running.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    told, _ = running.communicate()
    return told or ""
