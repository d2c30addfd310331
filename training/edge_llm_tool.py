"""Finds and runs TensorRT Edge-LLM's exporter, a program in an environment of its own.

It pins versions of torch, transformers, onnx and numpy that clash with ours (config/edge_llm_requirements.txt).
"""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

from depthlm_ros.engines.edge_llm_command import TookTooLong, last_lines, run_command
from depthlm_ros.errors import ConfigError, EngineError, MissingDependencyError

PROGRAM = "tensorrt-edgellm-export"
VARIABLE = "DEPTHLM_EDGE_LLM"
"""Environment variable that names the exporter, the Python beside it or the folder of their environment."""
ENVIRONMENT = ".venv-edge-llm"
# The largest supported model (8B) was never exported here; small ones take 20 s on one core. A stuck export ends.
TIMEOUT_S = 4 * 3600.0

_INSTALL = (
    "it needs an environment of its own: run `make edge-llm` in the checkout, or `python3 -m venv .venv-edge-llm && "
    ".venv-edge-llm/bin/pip install torch==2.13.0 && .venv-edge-llm/bin/pip install -r "
    f"config/edge_llm_requirements.txt`, and where that folder is elsewhere name it in {VARIABLE}"
)
# Packages of another environment, and the switch of the exporter that changes the graphs.
_OTHERS = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "_ROS_WHEELS_BOOTSTRAP_COMPLETE", "USE_TRT_NATIVE_ATTN")


def find_exporter(given: str | None = None) -> Path:
    """The exporter's program.

    Args:
        given: path of it, of the Python beside it or of the folder of their environment; empty looks in the
            environment variable `DEPTHLM_EDGE_LLM`, in .venv-edge-llm of the working directory and of the checkout,
            and on the PATH.

    Raises:
        ConfigError: there is none where it was said to be.
        MissingDependencyError: there is none.
    """
    for told, by in ((given, "exporter"), (os.environ.get(VARIABLE), VARIABLE)):
        if told:
            program = _program(Path(told).expanduser())
            if program is None:
                raise ConfigError(f"{by} is {told!r}, where no {PROGRAM} is; {_INSTALL}")
            return program
    for folder in (Path.cwd(), Path(__file__).resolve().parents[1]):
        program = _program(folder / ENVIRONMENT)
        if program is not None:
            return program
    on_path = shutil.which(PROGRAM)
    if on_path is None:
        raise MissingDependencyError(f"TensorRT Edge-LLM's exporter ({PROGRAM}) isn't installed; {_INSTALL}")
    return Path(on_path)


def run_exporter(program: Path, checkpoint: Path, out: Path, timeout_s: float = TIMEOUT_S) -> None:
    """Exports a checkpoint into `out`.

    Raises:
        EngineError: it failed or took too long; the message ends with the last lines that it printed.
    """
    command = [str(program), str(checkpoint), str(out), "--dtype", "float16"]
    environment = {name: value for name, value in os.environ.items() if name not in _OTHERS}
    if "_ROS_WHEELS_BOOTSTRAP_COMPLETE" in os.environ:
        # Set by the ROS wheels for their own libraries.
        environment.pop("LD_LIBRARY_PATH", None)
    # Nothing is fetched: the checkpoint is a folder.
    environment |= {"HF_HUB_OFFLINE": "1", "PYTHONNOUSERSITE": "1", "NO_COLOR": "1"}
    # What it says last is why it failed, so its two outputs have to come in their order.
    environment["PYTHONUNBUFFERED"] = "1"
    try:
        status, told = run_command(command, environment, timeout_s)
    except OSError as error:
        raise EngineError(f"{program} can't be run ({error}); {_INSTALL}") from error
    except TookTooLong as error:
        raise EngineError(
            f"{PROGRAM} wasn't done after {timeout_s:g} s and was stopped; it needs 1.5 times the checkpoint's size in "
            f"memory. Its last lines:\n{last_lines(str(error))}"
        ) from None
    if status != 0:
        killed = " (killed, as the kernel does where memory is short)" if status == -signal.SIGKILL else ""
        raise EngineError(f"{PROGRAM} failed with exit status {status}{killed}. Its last lines:\n{last_lines(told)}")


def _program(path: Path) -> Path | None:
    if path.is_dir():
        path = path / "bin" / PROGRAM
    elif path.name.startswith("python"):
        path = path.with_name(PROGRAM)
    return path.absolute() if path.is_file() and os.access(path, os.X_OK) else None

