"""Where the doctor's facts come from; tests put other machines in its place."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from depthlm_ros.machine import Machine, printed_by, read_machine

CHILD_S = 90.0
"""A child that imports torch from a slow card may need this long."""

PACKAGE_FOLDER = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Child:
    """What became of a Python process.

    Attributes:
        code: exit status, negative for the signal that ended it, None where it didn't end in time.
        out: what it printed.
        err: what it printed on standard error.
    """

    code: int | None
    out: str = ""
    err: str = ""

    @property
    def facts(self) -> dict[str, Any] | None:
        """The JSON object in its last line; None where there is none."""
        try:
            facts = json.loads(self.out.strip().splitlines()[-1])
        except (ValueError, IndexError):
            return None
        return facts if isinstance(facts, dict) else None

    @property
    def fault(self) -> str:
        """What went wrong, in a few words; empty where nothing did."""
        if self.code == 0:
            return ""
        if self.code is None:
            return "didn't end in time"
        last = ([line.strip() for line in self.err.splitlines() if line.strip()] or [""])[-1]
        ended = f"killed by signal {-self.code}" if self.code < 0 else ""
        return ": ".join(filter(None, (ended, last))) or f"exit status {self.code}"


def installed_version(name: str) -> str:
    """Version of an installed distribution, "" where there is none."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def run_child(arguments: list[str], limit_s: float = CHILD_S) -> Child:
    """Runs this Python with arguments, so that what crashes there leaves this process alone."""
    paths = filter(None, (str(PACKAGE_FOLDER), os.environ.get("PYTHONPATH", "")))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    try:
        done = subprocess.run(
            [sys.executable, *arguments], capture_output=True, text=True, errors="replace", timeout=limit_s,
            check=False, env=environment, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return Child(None)
    except OSError as error:
        return Child(127, err=str(error))
    return Child(done.returncode, done.stdout, done.stderr)


def importable(name: str) -> bool:
    """Whether a module can be found; some of JetPack and of apt come without a distribution's name and version."""
    return importlib.util.find_spec(name) is not None


def bridge_fault() -> str | None:
    """Why cv_bridge can't be used, None where it can."""
    from depthlm_ros.encodings import cv_bridge_fault

    return cv_bridge_fault()


def disk_space(path: Path) -> tuple[int, int]:
    """Bytes in all and bytes free of the file system that a path is on, or will be on once it is made."""
    while not path.exists():
        path = path.parent
    usage = shutil.disk_usage(path)
    return usage.total, usage.free


@dataclass(frozen=True)
class World:
    """A machine, as far as the doctor looks at it.

    Attributes:
        machine: GPU, board and libraries.
        root: where its files are.
        environment: its variables.
        run: runs a command and returns what it prints, "" when it can't.
        child: runs Python with arguments, for so many seconds at most.
        version: of an installed distribution.
        disk: total and free bytes of where a path is.
        python: of the interpreter.
        importable: whether a module can be found.
        commands: finds a command on PATH, None where there is none.
        bridge: why cv_bridge doesn't work, None where it does.
    """

    machine: Machine = field(default_factory=Machine)
    root: Path = Path("/")
    environment: Mapping[str, str] = field(default_factory=dict)
    run: Callable[[list[str]], str] = printed_by
    child: Callable[[list[str], float], Child] = run_child
    version: Callable[[str], str] = installed_version
    disk: Callable[[Path], tuple[int, int]] = disk_space
    python: tuple[int, int] = (sys.version_info[0], sys.version_info[1])
    importable: Callable[[str], bool] = importable
    commands: Callable[[str], str | None] = shutil.which
    bridge: Callable[[], str | None] = bridge_fault

    def text(self, path: str) -> str:
        """The text of a file below the root, "" where it can't be read."""
        try:
            return (self.root / path).read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ""

    def number(self, path: str) -> int | None:
        """The whole number that a file below the root holds, None where there is none."""
        text = self.text(path).strip()
        return int(text) if text.lstrip("-").isdigit() else None

    @property
    def system(self) -> str:
        """Name of the operating system, such as "Ubuntu 24.04"."""
        release = dict(line.split("=", 1) for line in self.text("etc/os-release").splitlines() if "=" in line)
        parts = (release.get("NAME", ""), release.get("VERSION_ID", ""))
        return " ".join(part.strip('"') for part in parts if part) or platform.system()

    @property
    def in_container(self) -> bool:
        """Whether this runs in a container, as far as it shows."""
        return any((self.root / path).exists() for path in (".dockerenv", "run/.containerenv"))


def this_world() -> World:
    """The machine that runs this."""
    return World(machine=read_machine(), environment=dict(os.environ))
