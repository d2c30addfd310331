"""What the text ablations begin with: a network that sees depth and has not been asked anything yet.

A VLM that is taught depth has seen the world before; a network from nothing would spend an ablation's minutes on
learning to see. One base a seed, kept in the run folder; all arms begin with the same weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from depthlm_ros.markers import MARGIN_PX
from depthlm_ros.prompts import marker_question
from depthlm_training.ablations.learner import Learner, Rates, fit, map_loss, mirrored
from depthlm_training.ablations.scenery import Scenes, render_scenes
from depthlm_training.demo.dialogue import LEAST_M, pick_points, questions_about
from depthlm_training.raycast import FAR_M

NAMELESS = "nameless"  # a question that doesn't say which point it is about


@dataclass(frozen=True)
class Base:
    """What the base is made with, and how many scenes all of an ablation has."""

    steps: int = 500
    batch: int = 16
    train_scenes: int = 2000
    held_out_scenes: int = 200
    rates: Rates = Rates()

    def scenes(self, folder: Path, seed: int, split: str) -> Scenes:
        """The scenes of a split."""
        return render_scenes(folder, seed, split, self.train_scenes if split == "train" else self.held_out_scenes)


def begin(base: Base, seed: int, folder: Path) -> Learner:
    """The base of a seed: trained on dense maps, or read where it has been trained before."""
    learner = Learner(seed)
    path = folder / f"base-{seed}-{base.steps}-{base.batch}-{base.train_scenes}.safetensors"
    if path.exists():
        learner.load(path)
        return learner
    train = base.scenes(folder, seed, "train")

    def loss_of(step: int) -> torch.Tensor:
        rng = np.random.default_rng([seed, 1, step])
        pick = train.pick(rng, base.batch)
        images, depths = mirrored(train.images[pick], train.depths[pick], rng)
        return map_loss(learner.net, learner.net.encode(torch.from_numpy(images)), torch.from_numpy(depths))

    fit(learner, base.steps, loss_of, base.rates, f"base, seed {seed}")
    learner.save(path)
    return learner


@dataclass(frozen=True)
class Questioned:
    """Images with questions about points of them.

    Attributes:
        images: (B, H, W, 3) uint8 as they are shown, with arrows where the dialect draws them.
        texts: B * N questions, image after image.
        depth_m: (B * N,) true depths.
        points: (B * N, 2) `(u, v)`.
    """

    images: np.ndarray
    texts: list[str]
    depth_m: np.ndarray
    points: np.ndarray


def question(
    images: np.ndarray, depths: np.ndarray, dialect: str, each: int, rng: np.random.Generator, points=None
) -> Questioned:
    """Asks about random points far enough from the border for an arrow, the same ones in every dialect.

    Args:
        images: (B, H, W, 3) uint8.
        depths: (B, H, W) metres, NaN where unknown.
        dialect: "compact", "coordinates", "marker" or `NAMELESS`.
        each: points an image; 1 in the marker dialect.
        points: for each image (each, 2) pixels to ask about instead.
    """
    shown, texts, asked = [], [], []
    for i, (image, depth) in enumerate(zip(images, depths, strict=True)):
        chosen = pick_points(depth, each, rng, margin=MARGIN_PX) if points is None else points[i]
        if dialect == NAMELESS:
            said = [marker_question().replace(" pointed by the red arrow", "")] * each
        else:
            image, said = questions_about(image, chosen, dialect)
        shown.append(image)
        texts += said
        asked.append(chosen)
    where = np.concatenate(asked)
    of = np.repeat(np.arange(len(images)), each)
    truth = depths[of, where[:, 1], where[:, 0]].astype(np.float64).clip(LEAST_M, FAR_M)
    return Questioned(np.stack(shown), texts, truth, where)
