"""The recipe of a run, kept in its folder, so that the run can be opened again without its command line."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from depthlm_ros.errors import ConfigError
from depthlm_training import dense, sft
from depthlm_training.config import as_yaml, load
from depthlm_training.dense import DenseObjective
from depthlm_training.dense_recipe import DenseRecipe
from depthlm_training.sft import TextObjective, TextRecipe

# File in a run's folder, what it holds, how it becomes what is trained.
KINDS = {"text.yaml": (TextRecipe, sft.open_objective), "dense.yaml": (DenseRecipe, dense.open_objective)}


def keep_recipe(recipe: TextRecipe | DenseRecipe) -> Path | None:
    """Writes a recipe into its run's folder; of several processes the first does."""
    if os.environ.get("RANK", "0") != "0":
        return None
    name = next(name for name, (kind, _) in KINDS.items() if kind is type(recipe))
    recipe.run.mkdir(parents=True, exist_ok=True)
    path = recipe.run / name
    path.write_text(as_yaml(recipe), encoding="utf-8")
    return path


def kept_recipe(run: Path) -> TextRecipe | DenseRecipe:
    """Reads the recipe of a run.

    Raises:
        ConfigError: there is none, or it is damaged.
    """
    for name, (kind, _) in KINDS.items():
        if (run / name).is_file():
            return load(kind, [str(run / name)])
    raise ConfigError(f"{run} holds none of {', '.join(KINDS)}, so it is no run; give the folder of a training")


def open_recipe(recipe: Any) -> TextObjective | DenseObjective:
    """What a recipe trains, before any step; raises as the `open_objective` of its kind."""
    return next(opens for kind, opens in KINDS.values() if kind is type(recipe))(recipe)
