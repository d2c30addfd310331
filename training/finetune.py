"""A recipe for a training set of one's own, with defaults that suit a first try.

    depthlm finetune SET --model demo --out runs/mine

What the model speaks already is taught: words in its dialects, and depth maps where it has a dense head, both in the
same steps. Small models are trained as a whole, large ones by LoRA. Everything else is a setting of `sft` or `dense`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from depthlm_ros.bag_labels import TRAIN_FILE
from depthlm_ros.cards import load_card
from depthlm_ros.engines.checkpoint import open_checkpoint
from depthlm_ros.errors import DatasetError
from depthlm_ros.modelcard import ModelCard
from depthlm_training import dense
from depthlm_training.asking import DEPTH
from depthlm_training.config import load
from depthlm_training.dense_recipe import DenseRecipe
from depthlm_training.export import open_recipe
from depthlm_training.recipes import keep_recipe
from depthlm_training.sft import TextRecipe
from depthlm_training.sft import dry_run as text_dry_run
from depthlm_training.trainer import train

# Above this a full fine-tune's weights, gradients and moments, 16 bytes each, are more than most machines have.
LARGE = 500_000_000
LORA_RANK = 16
WHOLE = ("vision", "merger", "embeddings", "language")


@dataclass(frozen=True)
class FinetuneOptions:
    """What a first try may want to change.

    Attributes:
        dialects: what to teach; empty for all that the model's card names.
        steps: optimiser steps.
        lr: largest learning rate; None for 1e-4, with LoRA 2e-4.
        images: of a step.
        points: questions about an image.
        lora: rank of adapters; 0 trains the whole model, None decides by its size.
        depth_kind: what the labels measure, "z" or "euclidean".
    """

    dialects: tuple[str, ...] = ()
    steps: int = 300
    lr: float | None = None
    images: int = 4
    points: int = 10
    lora: int | None = None
    depth_kind: str = "z"


def finetune_recipe(
    labels: Path, model: str, run: Path, options: FinetuneOptions, overrides: Sequence[str] = ()
) -> TextRecipe | DenseRecipe:
    """The recipe.

    Args:
        labels: a labels file, or the folder of `depthlm bag to-sft`.
        model: name of a card, folder or hub id.
        run: folder of the run.
        options: see there.
        overrides: YAML files and key=value of the recipe; they win.

    Raises:
        ConfigError: a dialect that the model doesn't speak, an unknown setting.
        DatasetError: no labels.
        ModelError: no such model.
    """
    card, source = load_card(model)
    dialects = options.dialects or card.dialects
    for dialect in dialects:
        card.require_dialect(dialect)
    rank = options.lora
    if rank is None:
        rank = LORA_RANK if open_checkpoint(source, card.revision).parameters > LARGE else 0
    entry = {"labels": str(labels_file(labels)), "depth_kind": options.depth_kind}
    kind, values = (_dense if "dense" in dialects else _text)(entry, card, dialects, options)
    parts = WHOLE if not rank else ()
    heads = ("depth_head",) if kind is DenseRecipe else ()
    says = ("lm_head",) if any(dialect in DEPTH for dialect in dialects) and not rank else ()
    values |= {"model": model, "run": str(run), "trained": [*parts, *says, *heads], "lora.rank": rank}
    lr = options.lr or (2e-4 if rank else 1e-4)
    values |= {"train.steps": options.steps, "train.lr": lr, "train.checkpoint_every": max(1, options.steps // 3)}
    return load(kind, [*(f"{key}={json.dumps(value)}" for key, value in values.items()), *overrides])


def _text(
    entry: dict[str, Any], card: ModelCard, dialects: Sequence[str], options: FinetuneOptions
) -> tuple[type[TextRecipe], dict[str, Any]]:
    values = {"data": [entry], "ask": dict.fromkeys(dialects, 1.0), "points": options.points}
    return TextRecipe, values | {"each": card.points_per_question, "images": options.images}


def _dense(
    entry: dict[str, Any], card: ModelCard, dialects: Sequence[str], options: FinetuneOptions
) -> tuple[type[DenseRecipe], dict[str, Any]]:
    said = [dialect for dialect in dialects if dialect != "dense"]
    values: dict[str, Any] = {"data": [entry], "images": options.images, "stage": "language"}
    if not said:
        return DenseRecipe, values | {"talk.images": 0}
    values |= {"talk.data": [entry], "talk.ask": dict.fromkeys(said, 1.0), "talk.points": options.points}
    return DenseRecipe, values | {"talk.each": card.points_per_question, "talk.images": options.images}


def labels_file(labels: Path) -> Path:
    """The labels to train on: the file itself, or `train.jsonl` of a folder.

    Raises:
        DatasetError: there is none.
    """
    path = labels / TRAIN_FILE if labels.is_dir() else labels
    if not path.is_file():
        raise DatasetError(f"{labels} holds no {TRAIN_FILE}; give a folder of depthlm bag to-sft, or a labels file")
    return path.resolve()


def finetune(recipe: TextRecipe | DenseRecipe, resume: bool = False) -> None:
    """Trains, and leaves a model in the run's folder, so that `--model RUN` loads it.

    Raises as `open_objective` and `train` do.
    """
    objective = open_recipe(recipe)
    keep_recipe(recipe, resume)
    train(objective, recipe.train, recipe.run, resume)
    if os.environ.get("RANK", "0") == "0":
        objective.save(recipe.run)


def dry_run(recipe: TextRecipe | DenseRecipe) -> str:
    """The settings and one sample, in words; raises as `open_objective` does."""
    return dense.dry_run(recipe) if isinstance(recipe, DenseRecipe) else text_dry_run(recipe)
