"""The recipe of a run, kept in its folder, so that the run can be opened again without its command line."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from depthlm_training.config import as_yaml
from depthlm_training.states import found


def recipe_file(run: Path, kind: type) -> Path:
    """Where the recipe of a run lies; its name says which kind it is."""
    return run / f"{kind.__name__}.yaml"


def keep_recipe(recipe: Any, resume: bool) -> None:
    """Writes a recipe into its run's folder, unless another run is there; of several processes the first does.

    Args:
        recipe: a dataclass with `run`.
        resume: whether the run goes on.
    """
    if os.environ.get("RANK", "0") != "0" or (found(recipe.run) and not resume):
        return
    recipe.run.mkdir(parents=True, exist_ok=True)
    recipe_file(recipe.run, type(recipe)).write_text(as_yaml(recipe), encoding="utf-8")
