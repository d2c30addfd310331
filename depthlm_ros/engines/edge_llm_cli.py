"""Questions to TensorRT Edge-LLM through its program `llm_inference`, one run for all questions of a call.

The program loads the model anew in every run, some seconds for a model of some billion weights. That is good enough to
check engines, to work through a recording and to measure; for a live camera take the wheel's Python runtime
(`edge_llm_native.py`) or its server (engine `openai`, `tensorrt-edgellm-serve CHECKPOINT --host 127.0.0.1`).
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from depthlm_ros.engines.edge_llm_command import TookTooLong, last_lines, private_folder, run_command
from depthlm_ros.engines.edge_llm_requests import Limits, read_replies, request_file
from depthlm_ros.engines.worded import Ask, Reply
from depthlm_ros.errors import EngineError, MissingDependencyError

PROGRAM = "llm_inference"
VARIABLE = "LLM_INFERENCE"
"""Environment variable that names the program where it isn't on the PATH; as in run_on_device.sh."""
PLUGIN_VARIABLE = "EDGELLM_PLUGIN_PATH"
PLUGIN = "libNvInfer_edgellm_plugin.so"
REUSE_FLAG = "--enableContextReuse"
FLAGS = ("--engineDir", "--multimodalEngineDir", "--inputFile", "--outputFile")
"""Without these it is another program."""
# Loading an 8B model from a slow disk and answering a few hundred questions; only for calls without a deadline.
TIMEOUT_S = 600.0
_HELP_S = 60.0


class CommandBackend:
    """A `Backend` that runs `llm_inference`.

    Args:
        program: path of it.
        engines: folder with `llm.engine` and `visual/visual.engine`.
        limits: of these engines.
        system: text of the system message; None for none.
        batch: most questions answered together; 0 for as many as the engine takes.
        reuse: whether what questions about an image share may be kept.

    Raises:
        EngineError: it isn't Edge-LLM's program, or doesn't start here.
    """

    def __init__(
        self, program: Path, engines: Path, limits: Limits, system: str | None, batch: int = 0, reuse: bool = True
    ) -> None:
        self.complaints: tuple[str, ...] = ()
        self.deadline: float | None = None
        self._program, self._engines = program, engines
        self._limits, self._system, self._batch = limits, system, batch
        self._environment = _environment(program)
        told = self._help()
        self.can_reuse = REUSE_FLAG in told
        self._reuse = reuse

    def ask(self, asks: Sequence[Ask]) -> list[Reply]:
        """Answers all questions in one run.

        Raises:
            EngineError: it failed, took too long, or answered something else; its last lines are in the message.
        """
        if not asks:
            return []
        self._limits.check(asks)
        try:
            return self._ask(asks)
        except OSError as error:
            raise EngineError(
                f"the questions can't be written to {tempfile.gettempdir()} ({error}); make room there, or name a "
                "folder with room in TMPDIR"
            ) from error

    def close(self) -> None:
        """Nothing is kept between calls."""

    def _ask(self, asks: Sequence[Ask]) -> list[Reply]:
        with private_folder("depthlm-edge-llm-") as folder:
            files = _Files(folder)
            told = request_file(
                asks,
                files.place,
                batch=self._limits.together(asks, self._batch),
                system=self._system,
                reuse=self._reuse if self.can_reuse else None,
            )
            (folder / "input.json").write_text(json.dumps(told, ensure_ascii=False), encoding="utf-8")
            printed = self._run(folder)
            try:
                output = json.loads((folder / "output.json").read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise EngineError(
                    f"{PROGRAM} wrote no output ({error}). Its last lines:\n{last_lines(printed)}"
                ) from error
            try:
                return read_replies(output, len(asks))
            except EngineError as error:
                raise EngineError(f"{error}. Its last lines:\n{last_lines(printed)}") from error

    def _run(self, folder: Path) -> str:
        left = TIMEOUT_S if self.deadline is None else self.deadline - time.monotonic()
        if left <= 0:
            raise EngineError(f"the answer would come too late: the deadline passed before {PROGRAM} was started")
        command = [
            str(self._program),
            *("--engineDir", str(self._engines)),
            *("--multimodalEngineDir", str(self._engines)),
            *("--inputFile", str(folder / "input.json")),
            *("--outputFile", str(folder / "output.json")),
            *([REUSE_FLAG] if self.can_reuse and self._reuse else []),
        ]
        try:
            status, told = run_command(command, self._environment, left)
        except OSError as error:
            raise EngineError(f"{self._program} can't be run: {error}") from error
        except TookTooLong as error:
            raise EngineError(
                f"{PROGRAM} wasn't done after {left:.1f} s; it loads the model in every run. For live images use the "
                "Python runtime of tensorrt-edgellm, or tensorrt-edgellm-serve with engine openai. Its last lines:\n"
                f"{last_lines(str(error))}"
            ) from None
        if status != 0:
            raise EngineError(f"{PROGRAM} failed with exit status {status}. Its last lines:\n{last_lines(told)}")
        return told

    def _help(self) -> str:
        try:
            # It prints its help to the error output; some versions end with 1.
            _, told = run_command([str(self._program), "--help"], self._environment, _HELP_S)
        except (OSError, TookTooLong) as error:
            raise EngineError(f"{self._program} doesn't start on this machine ({error})") from error
        missing = [flag for flag in FLAGS if flag not in told]
        if missing:
            raise EngineError(
                f"{self._program} --help knows no {', '.join(missing)}; it isn't {PROGRAM} of TensorRT Edge-LLM. It "
                f"printed:\n{last_lines(told)}"
            )
        return told


def find_program() -> Path:
    """`llm_inference`: the one that `LLM_INFERENCE` names, else the one on the PATH.

    Raises:
        MissingDependencyError: there is none.
    """
    named = os.environ.get(VARIABLE)
    found = shutil.which(named or PROGRAM)
    if found is None:
        raise MissingDependencyError(
            f"{VARIABLE} is {named!r}, which is no program" if named else
            f"{PROGRAM} isn't on the PATH; build the examples of NVIDIA/TensorRT-Edge-LLM on this device and name the "
            f"program in {VARIABLE}"
        )  # fmt: skip
    return Path(found).resolve()


class _Files:
    """Images as PNG files, each written once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._paths: dict[int, str] = {}

    def place(self, image: np.ndarray) -> str:
        """Path of an image's file."""
        if id(image) not in self._paths:
            path = self._folder / f"{len(self._paths)}.png"
            # The program decodes it anew for every question, so it isn't compressed at all.
            if not cv2.imwrite(str(path), image[..., ::-1], [cv2.IMWRITE_PNG_COMPRESSION, 0]):
                raise EngineError(f"an image of shape {image.shape} can't be written to {path}; is the disk full?")
            self._paths[id(image)] = str(path)
        return self._paths[id(image)]


def _environment(program: Path) -> dict[str, str]:
    """Our variables and the place of Edge-LLM's plugin, which the program else looks for in its working directory.

    Only for the program: the Python runtime refuses a plugin that isn't its own.
    """
    found = dict(os.environ)
    if PLUGIN_VARIABLE not in found:
        # build/examples/llm/llm_inference and build/libNvInfer_edgellm_plugin.so of a source build.
        for folder in list(program.parents)[:4]:
            if (folder / PLUGIN).is_file():
                found[PLUGIN_VARIABLE] = str(folder / PLUGIN)
                break
    return found
