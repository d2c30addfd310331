"""More images or more labels an image, with the same number of labels.

DepthLM (arXiv 2509.25413, Figure 5): with 80,000 labels in all, more images beat more labels an image. Here every arm
has the same number of labels, takes the same steps and sees as many images in each; an image comes with all its
labels. So the arm with the most labels an image has the most labels in a step, and still has fewer images.

    python -m depthlm_training.ablations.budget --seeds 3
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from depthlm_training.ablations.learner import Learner, Rates, fit, map_delta1, map_loss, mirrored
from depthlm_training.ablations.scenery import render_scenes
from depthlm_training.ablations.sparse import METRIC, labelled
from depthlm_training.ablations.study import Contrast, Outcome, Study, main


@dataclass(frozen=True)
class Settings:
    """What decides the result; `labels` are those of all images together, `images` how many share them, by arm."""

    steps: int = 500
    batch: int = 16
    labels: int = 2000
    images: tuple[int, ...] = (2000, 500, 125, 25)
    held_out_scenes: int = 200
    rates: Rates = Rates()


def arm_name(settings: Settings, images: int) -> str:
    """The arm with this many images."""
    return f"{images} x {settings.labels // images}"


def run(settings: Settings, arm: str, seed: int, folder: Path) -> dict[str, Outcome]:
    """Trains one arm with one seed and scores it."""
    images = {arm_name(settings, n): n for n in settings.images}[arm]
    train = render_scenes(folder, seed, "train", max(settings.images))
    depths = labelled(train.depths[:images], settings.labels // images, seed)
    learner = Learner(seed)

    def loss_of(step: int) -> torch.Tensor:
        rng = np.random.default_rng([seed, 1, step])
        pick = train.pick(rng, settings.batch, among=images)
        seen, shown = mirrored(train.images[pick], depths[pick], rng)
        return map_loss(learner.net, learner.net.encode(torch.from_numpy(seen)), torch.from_numpy(shown))

    effort = fit(learner, settings.steps, loss_of, settings.rates, f"{arm}, seed {seed}")
    took = {
        "cpu_seconds": effort.cpu_seconds,
        "images": images,
        "labels": float(np.isfinite(depths).sum()),
    }
    held_out = render_scenes(folder, seed, "held_out", settings.held_out_scenes)
    return {arm: Outcome({METRIC: map_delta1(learner.net, held_out)}, took)}


def study(settings: Settings | None = None) -> Study:
    """The ablation with its defaults or with other settings."""
    settings = settings or Settings()
    arms = [arm_name(settings, images) for images in settings.images]
    pairs = [(arms[0], arm) for arm in arms[1:]]
    return Study(
        "budget",
        "Do more images or more labels an image teach more, the number of labels being the same?",
        tuple(arms),
        tuple(Contrast(f"{many} (images x labels) beats {few}", METRIC, many, few) for many, few in pairs),
        lambda task, seed, folder: run(settings, task, seed, folder),
        settings,
    )


if __name__ == "__main__":
    main(study())
