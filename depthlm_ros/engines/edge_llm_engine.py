"""TensorRT Edge-LLM on a Jetson: an export of target edge-llm whose engines were built there.

Two ways, the first that works:
    the wheel's Python runtime, in this process (`edge_llm_native.py`);
    the program llm_inference, a run a call, which loads the model each time (`edge_llm_cli.py`).
A third is engine `openai` with `tensorrt-edgellm-serve`, which takes the checkpoint itself.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from depthlm_ros.engines.base import EngineInfo
from depthlm_ros.engines.checkpoint import open_processor
from depthlm_ros.engines.edge_llm_cli import CommandBackend, find_program
from depthlm_ros.engines.edge_llm_native import PACKAGE, NativeBackend, load_bindings
from depthlm_ros.engines.edge_llm_requests import Limits
from depthlm_ros.engines.image_sizes import ImageSizes
from depthlm_ros.engines.options import EngineOptions
from depthlm_ros.engines.worded import Backend, WordedEngine
from depthlm_ros.errors import EngineError, MissingDependencyError, ModelError
from depthlm_ros.machine import this_machine
from depthlm_ros.manifest import Manifest, sha256_of

if TYPE_CHECKING:
    from depthlm_ros.cards import ModelCard
    from depthlm_ros.engines.base import Engine

ENGINES = "engines"
"""Folder of the engines in an export, as build_on_device.sh writes them."""
LLM, VISUAL = "llm.engine", "visual/visual.engine"
BUILT_ON = "built_on.json"
_BUILD = "run build_on_device.sh on this device"


def load_edge_llm(folder: Path, card: ModelCard, manifest: Manifest, options: EngineOptions) -> Engine:
    """Loads the engines that `build_on_device.sh` built.

    Args:
        folder: of the export; its files were checked.
        card: says which system text the model wants.
        manifest: of the export.
        options: `batch_size`, `guided` and `prefix_reuse` count.

    Raises:
        ModelError: the engines aren't there, or were built from another export, for other sizes or elsewhere.
        MissingDependencyError: neither the runtime nor the program is installed.
        EngineError: neither runs here; the message says why.
    """
    engines = folder / ENGINES
    checkpoint = open_processor(folder)
    sizes = ImageSizes(checkpoint)
    limits = read_limits(engines, manifest, sizes.patch_px)
    check_place(engines)
    backend, version, reasons = _backend(engines, manifest, limits, card.system_text, options)
    machine = this_machine()
    info = EngineInfo(
        engine="edge_llm",
        model=str(folder),
        architecture=checkpoint.architecture,
        device=machine.gpu or "cuda:0",
        dtype=manifest.precision,
        reasons=reasons,
        parameters=int(manifest.extra.get("parameters", 0)),
        dense=False,
        words=True,
        distributions=False,
        # Plans of two builds can differ though all versions are the same, so a parity record is of these plans.
        version=f"{version}, plans {plans_digest(engines)}",
    )
    return WordedEngine(backend, info, sizes, guided=options.guided)


def read_limits(engines: Path, manifest: Manifest, patch_px: int) -> Limits:
    """What the engines were built for, held against the export.

    Args:
        engines: folder of the engines.
        manifest: of the export.
        patch_px: side of one image token's square in pixels.

    Raises:
        ModelError: an engine or its config is absent, of another version, or too small for the export's camera.
    """
    for name in (LLM, VISUAL):
        if not (engines / name).is_file():
            raise ModelError(f"{engines} has no {name}; {_BUILD}")
    llm, visual = (_config(engines / name) for name in ("config.json", "visual/config.json"))
    wanted, built = manifest.extra.get("edgellm_version"), llm.get("edgellm_version")
    if built != wanted:
        raise ModelError(f"{engines} was built from graphs of Edge-LLM {built}, the export is of {wanted}; {_BUILD}")
    sizes, told = manifest.extra.get("sizes") or {}, {**llm["builder_config"], **visual["builder_config"]}
    names = {
        "max_input_len": 1,
        "max_kv_cache_capacity": 1,
        "max_batch_size": 1,
        "max_image_tokens_per_image": 1,
        "max_image_tokens": 1,
        "min_image_tokens": -1,
    }
    for name, sign in names.items():
        if not isinstance(told.get(name), int):
            raise ModelError(f"{engines}: builder_config has no {name}; {_BUILD}")
        if sign * told[name] < sign * sizes.get(name, told[name]) and name != "max_batch_size":
            raise ModelError(
                f"{engines} was built with {name} {told[name]}, the export's camera needs {sizes[name]}; {_BUILD}"
            )
    return Limits(
        input_tokens=told["max_input_len"],
        capacity=told["max_kv_cache_capacity"],
        batch=told["max_batch_size"],
        least_image=told["min_image_tokens"],
        most_image=told["max_image_tokens_per_image"],
        most_images=told["max_image_tokens"],
        pixels=patch_px,
    )


def check_place(engines: Path) -> None:
    """Makes sure that the engines were built on a machine like this.

    TensorRT only warns of a plan from another board with the same compute capability, and runs it.

    Raises:
        ModelError: names what differs, there and here.
    """
    path = engines / BUILT_ON
    if not path.is_file():
        return
    here = this_machine().as_dict()
    told = _config(path, builder=False)
    for name in ("board", "l4t", "tensorrt"):
        there, now = str(told.get(name) or ""), here.get(name, "")
        same = there == now
        if name == "tensorrt":
            # One of pip and one of apt spell the same version otherwise: 10.16.2.10 and 10.16.2.10-1+cuda13.2. What
            # one leaves out at the end doesn't count.
            numbers = zip(*(re.split(r"[-+]", version)[0].split(".") for version in (there, now)), strict=False)
            same = all(one == other for one, other in numbers)
        if there and now and not same:
            raise ModelError(f"{engines} was built with {name} {there}, this machine has {now}; {_BUILD}")


def plans_digest(engines: Path) -> str:
    """Sixteen hex digits of both plans."""
    told = "".join(sha256_of(engines / name) for name in (LLM, VISUAL))
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def _backend(
    engines: Path, manifest: Manifest, limits: Limits, system: str | None, options: EngineOptions
) -> tuple[Backend, str, tuple[str, ...]]:
    """The first way that works, its version, and why not the others."""
    # Without the exceptions themselves: their frames hold a runtime that failed, and with it the device's memory.
    refused: list[tuple[type[Exception], str]] = []
    ways: tuple[Callable[[], tuple[Backend, str, str]], ...] = (
        lambda: _native(engines, manifest, limits, system, options),
        lambda: _command(engines, limits, system, options),
    )
    for way in ways:
        try:
            backend, version, reason = way()
        except (MissingDependencyError, EngineError) as error:
            refused.append((type(error), str(error)))
            continue
        return backend, version, (reason, *(text.splitlines()[0] for _, text in refused))
    told = "; ".join(text for _, text in refused)
    missing = all(issubclass(kind, MissingDependencyError) for kind, _ in refused)
    kind = MissingDependencyError if missing else EngineError
    raise kind(
        f"TensorRT Edge-LLM can't be used: {told}. Or serve the checkpoint (tensorrt-edgellm-serve CHECKPOINT --host "
        "127.0.0.1) and use engine openai"
    )


def _native(
    engines: Path, manifest: Manifest, limits: Limits, system: str | None, options: EngineOptions
) -> tuple[Backend, str, str]:
    bindings, version = load_bindings()
    wanted = str(manifest.extra.get("edgellm_version"))
    if version.split(".")[:2] != wanted.split(".")[:2]:
        raise EngineError(f"{PACKAGE} is {version}, the engines are of {wanted}; install {PACKAGE}=={wanted}")
    backend = NativeBackend(bindings, engines, limits, system, options.batch_size, options.prefix_reuse)
    return backend, f"{PACKAGE} {version} in process", "the Python runtime of tensorrt-edgellm is in this process"


def _command(engines: Path, limits: Limits, system: str | None, options: EngineOptions) -> tuple[Backend, str, str]:
    program = find_program()
    backend = CommandBackend(program, engines, limits, system, options.batch_size, options.prefix_reuse)
    reason = f"{program.name} answers, and loads the model in every call: not for live images"
    return backend, f"{program.name} {sha256_of(program)[:16]}", reason


def _config(path: Path, builder: bool = True) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} can't be read ({error}); {_BUILD}") from error
    if not isinstance(data, dict) or (builder and not isinstance(data.get("builder_config"), dict)):
        raise ModelError(f"{path} has no builder_config, so no engine was built beside it; {_BUILD}")
    return data
