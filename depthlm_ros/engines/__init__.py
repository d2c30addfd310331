"""Engines: what turns an image and questions into answers. Loaded late, since torch is heavy."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from depthlm_ros.errors import MissingDependencyError

if TYPE_CHECKING:
    from depthlm_ros.cards import ModelCard
    from depthlm_ros.engines.transformers_engine import TransformersEngine

# Oldest versions that the tests have run with.
REQUIRED = {"torch": "2.11", "transformers": "5.14"}


def load_engine(
    path_or_hub_id: str | Path,
    card: ModelCard,
    *,
    device: str = "auto",
    dtype: str = "auto",
    attn: str | None = None,
    batch_size: int = 0,
    plain: bool = False,
) -> TransformersEngine:
    """Loads a checkpoint into the `transformers` engine.

    Args:
        path_or_hub_id: folder of a checkpoint or hub id.
        card: says which system text and revision the model wants.
        device: "auto", "cpu", "cuda" or "cuda:N".
        dtype: "auto", "float32", "bfloat16" or "float16".
        attn: attention implementation of transformers; None takes "sdpa".
        batch_size: most questions decoded together; 0 for as many as fit and help.
        plain: take transformers' own forward and cache, the slow reference of every faster path.

    Raises:
        MissingDependencyError: torch or transformers are absent or too old.
        ModelError: the checkpoint can't be loaded.
        ConfigError: the device or dtype isn't there.
    """
    require_versions()
    from depthlm_ros.engines.transformers_engine import TransformersEngine

    return TransformersEngine.load(
        path_or_hub_id,
        system_text=card.system_text,
        revision=card.revision,
        device=device,
        dtype=dtype,
        attn=attn,
        batch_size=batch_size,
        plain=plain,
    )


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
