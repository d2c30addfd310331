"""Engines: what turns an image and questions into answers. Loaded late, since torch is heavy."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from depthlm_ros.engines.options import EngineOptions
from depthlm_ros.errors import ConfigError, MissingDependencyError, unknown_choice
from depthlm_ros.manifest import require_manifest

if TYPE_CHECKING:
    from depthlm_ros.cards import ModelCard
    from depthlm_ros.engines.base import Engine

# Oldest versions that have been tried.
REQUIRED = {"torch": "2.11", "transformers": "5.14"}
# Of engines that only bring images to the size that a model's processor keeps.
REQUIRED_FOR_SIZES = {"transformers": "4.57"}

ENGINES = ("transformers", "onnxruntime", "tensorrt", "tensorrt_llm", "openai", "edge_llm")
"""What can run a model; the README says which for what."""

WITHOUT_TORCH = ("onnxruntime", "openai", "edge_llm")
"""Engines on machines that may have no torch; one that computes here is told its threads in its options."""


def load_engine(
    path_or_hub_id: str | Path,
    card: ModelCard,
    *,
    engine: str = "transformers",
    options: EngineOptions | None = None,
    attn: str | None = None,
    plain: bool = False,
) -> Engine:
    """Loads a model into an engine.

    Args:
        path_or_hub_id: folder of a checkpoint or of an export, or hub id.
        card: says which system text and revision the model wants.
        engine: one of `ENGINES`.
        options: device, number format, servers and the like.
        attn: attention implementation of transformers; None takes "sdpa".
        plain: take transformers' own forward and cache, the slow reference of every faster path.

    Raises:
        MissingDependencyError: a package is absent or too old; the message holds the line that installs it.
        ModelError: the model can't be loaded, or wasn't made for this machine.
        ConfigError: an unknown engine, or a device or dtype that isn't there.
        EngineError: no server answers.
    """
    options = options or EngineOptions()
    if engine == "transformers":
        require_versions()
        from depthlm_ros.engines.transformers_engine import TransformersEngine

        return TransformersEngine.load(
            path_or_hub_id,
            system_text=card.system_text,
            revision=card.revision,
            device=options.device,
            dtype=options.dtype,
            attn=attn,
            batch_size=options.batch_size,
            plain=plain,
        )
    if engine == "openai":
        require_versions(REQUIRED_FOR_SIZES)
        from depthlm_ros.engines.served.engine import load_served

        return load_served(path_or_hub_id, card, options)
    if engine == "tensorrt_llm":
        from depthlm_ros.engines.tensorrt_llm_engine import load_tensorrt_llm

        return load_tensorrt_llm(path_or_hub_id, card, options)
    if engine not in ENGINES:
        raise ConfigError(unknown_choice("engine", engine, ENGINES))
    folder = Path(path_or_hub_id)
    manifest = require_manifest(folder, engine)
    if engine == "onnxruntime":
        from depthlm_ros.engines.onnxruntime_engine import load_onnxruntime

        return load_onnxruntime(folder, manifest, options)
    if engine == "tensorrt":
        from depthlm_ros.engines.tensorrt_engine import load_tensorrt

        return load_tensorrt(folder, manifest, options)
    require_versions(REQUIRED_FOR_SIZES)
    from depthlm_ros.engines.edge_llm_engine import load_edge_llm

    return load_edge_llm(folder, card, manifest, options)


def require_versions(required: dict[str, str] = REQUIRED) -> None:
    """Checks that the packages are there and new enough, without importing them.

    Raises:
        MissingDependencyError: names the version seen and the line that installs a better one.
    """
    for name, oldest in required.items():
        try:
            seen = metadata.version(name)
        except metadata.PackageNotFoundError:
            seen = None
        if seen is None or _release(seen) < _release(oldest):
            state = "is not installed" if seen is None else f"{seen} is too old"
            raise MissingDependencyError(f'{name} {state}; run: pip install "{name}>={oldest}"')


def _release(version: str) -> tuple[int, ...]:
    numbers = []
    for part in version.split("+")[0].split(".")[:2]:
        digits = "".join(c for c in part if c.isdigit())
        numbers.append(int(digits or 0))
    return tuple(numbers)
