"""Sparse labels or dense ones, on the same images.

DepthVLM (arXiv 2605.15876) trains its head on dense maps where there are some, DepthLM (arXiv 2509.25413) finds one
label an image enough. Here the same images, steps and order; what differs is how many of an image's pixels are
labelled, each time the same ones, as in a recording with a LiDAR. The head learns from the labelled pixels alone.

    python -m depthlm_training.ablations.sparse --seeds 3
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from depthlm_training.ablations.learner import Learner, Rates, fit, map_delta1, map_loss, mirrored
from depthlm_training.ablations.scenery import render_scenes
from depthlm_training.ablations.study import Contrast, Outcome, Study, main

DENSE = "every pixel"
METRIC = "δ1 of all pixels"


@dataclass(frozen=True)
class Settings:
    """What decides the result; `points` are the labelled pixels an image of the sparse arms."""

    steps: int = 500
    batch: int = 16
    train_scenes: int = 2000
    held_out_scenes: int = 200
    points: tuple[int, ...] = (128, 16, 1)
    rates: Rates = Rates()


def labelled(depths: np.ndarray, points: int, seed: int) -> np.ndarray:
    """Keeps the labels of a few random pixels of each map (N, H, W) and makes the others NaN."""
    kept = np.full_like(depths, np.nan)
    for i, depth in enumerate(depths):
        places = np.flatnonzero(np.isfinite(depth))
        chosen = np.random.default_rng([seed, 3, i]).permutation(places)[:points]
        kept[i].reshape(-1)[chosen] = depth.reshape(-1)[chosen]
    return kept


def arm_name(points: int) -> str:
    """The arm with this many labelled pixels an image."""
    return f"{points} pixel{'s' if points > 1 else ''}"


def run(settings: Settings, arm: str, seed: int, folder: Path) -> dict[str, Outcome]:
    """Trains one arm with one seed and scores it."""
    train = render_scenes(folder, seed, "train", settings.train_scenes)
    labels = {arm_name(points): points for points in settings.points}
    depths = train.depths if arm == DENSE else labelled(train.depths, labels[arm], seed)
    learner = Learner(seed)

    def loss_of(step: int) -> torch.Tensor:
        rng = np.random.default_rng([seed, 1, step])
        pick = train.pick(rng, settings.batch)
        images, shown = mirrored(train.images[pick], depths[pick], rng)
        return map_loss(learner.net, learner.net.encode(torch.from_numpy(images)), torch.from_numpy(shown))

    effort = fit(learner, settings.steps, loss_of, settings.rates, f"{arm}, seed {seed}")
    took = {
        "cpu_seconds": effort.cpu_seconds,
        "images": settings.steps * settings.batch,
        "labels": float(np.isfinite(depths).sum()),
    }
    held_out = render_scenes(folder, seed, "held_out", settings.held_out_scenes)
    return {arm: Outcome({METRIC: map_delta1(learner.net, held_out)}, took)}


def study(settings: Settings | None = None) -> Study:
    """The ablation with its defaults or with other settings."""
    settings = settings or Settings()
    sparse = [arm_name(points) for points in settings.points]
    return Study(
        "sparse",
        "How much is lost where only a few pixels of an image are labelled?",
        (DENSE, *sparse),
        tuple(Contrast(f"dense maps teach more than {arm} an image", METRIC, DENSE, arm) for arm in sparse),
        lambda task, seed, folder: run(settings, task, seed, folder),
        settings,
    )


if __name__ == "__main__":
    main(study())
