"""Runs a program of others to its end, with a time-out that also ends what it started.

The node's last resort imports this, so it needs nothing but Python.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

LINES = 12
"""Of a program's output that an error message repeats."""
# A killed program is gone at once, unless a driver holds it.
_LAST_WAIT_S = 2.0

# What has to go when this process ends without a clean-up.
_lock = threading.Lock()
_running: set[subprocess.Popen[str]] = set()
_folders: set[Path] = set()
_ending = False


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
    with _lock:
        if _ending:
            raise OSError("this process is ending")
        # A session of its own, so that its children end with it, and a Ctrl-C reaches us alone.
        running = subprocess.Popen(
            list(command), env=dict(environment), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True,
        )  # fmt: skip
        _running.add(running)
    try:
        told, _ = running.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        raise TookTooLong(_ended(running)) from None
    except BaseException:
        _ended(running)
        raise
    finally:
        with _lock:
            _running.discard(running)
    return running.returncode, told


@contextlib.contextmanager
def private_folder(prefix: str) -> Iterator[Path]:
    """A folder that only this user can read, and that is gone afterwards; after `end_all`, too.

    Raises:
        OSError: it can't be made.
    """
    with tempfile.TemporaryDirectory(prefix=prefix, ignore_cleanup_errors=True) as name:
        folder = Path(name)
        with _lock:
            _folders.add(folder)
        try:
            yield folder
        finally:
            with _lock:
                _folders.discard(folder)


def end_all() -> None:
    """Ends what runs and removes its folders, and nothing more is started: for a process that ends by `os._exit`.

    A program here has a session of its own and would outlive us, with the GPU's memory and the camera's images.
    """
    global _ending
    # Whoever holds it may never go on.
    held = _lock.acquire(timeout=_LAST_WAIT_S)
    _ending = True
    running, folders = list(_running), list(_folders)
    if held:
        _lock.release()
    for program in running:
        # One that was waited for is gone, and its number may be another's.
        if program.returncode is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(program.pid, signal.SIGKILL)
    for program in running:
        with contextlib.suppress(subprocess.TimeoutExpired):
            program.wait(_LAST_WAIT_S)
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


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
