"""A base taught to answer questions of one dialect, and scored on what it then says."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from depthlm_ros.markers import MARGIN_PX
from depthlm_ros.prompts import answer_text
from depthlm_training.ablations.base import Base, begin, question
from depthlm_training.ablations.learner import Learner, Rates, fit, mirrored, ratio_within, say, text_loss
from depthlm_training.ablations.scenery import Scenes
from depthlm_training.ablations.study import Outcome
from depthlm_training.demo.dialogue import pick_points

SCORE = "δ1 of said depths"
SCORED_POINTS = 8  # of each held-out scene


@dataclass(frozen=True)
class Lesson:
    """What is asked in a training step: `each` questions about each of `images` images."""

    dialect: str
    images: int
    each: int
    steps: int
    rates: Rates


def teach(lesson: Lesson, base: Base, name: str, seed: int, folder: Path) -> Outcome:
    """Teaches the base of a seed a lesson, from answers in text alone, and scores it."""
    train = base.scenes(folder, seed, "train")
    learner = begin(base, seed, folder)

    def loss_of(step: int) -> torch.Tensor:
        rng = np.random.default_rng([seed, 4, step])
        pick = train.pick(rng, lesson.images)
        images, depths = mirrored(train.images[pick], train.depths[pick], rng)
        asked = question(images, depths, lesson.dialect, lesson.each, rng)
        # Up to the first number: what a sentence says after it is known by then.
        rows = learner.dialogue.rows(asked.texts, asked.depth_m, whole=False, dialect=lesson.dialect)
        return text_loss(learner, learner.net.encode(torch.from_numpy(asked.images)), rows, asked.depth_m)

    effort = fit(learner, lesson.steps, loss_of, lesson.rates, f"{name}, seed {seed}")
    scores = heard(learner, lesson.dialect, base.scenes(folder, seed, "held_out"), seed)
    answers = lesson.steps * lesson.images * lesson.each
    took = {"cpu_seconds": effort.cpu_seconds, "images": lesson.steps * lesson.images, "answers": answers}
    return Outcome({SCORE: scores}, took)


def heard(learner: Learner, dialect: str, scenes: Scenes, seed: int) -> list[float]:
    """δ1 of greedily said depths for each scene, at the same points in every dialect; silence counts as wrong."""
    opening = "" if dialect == "compact" else answer_text(1.0).partition("1.00")[0]
    right = []
    for start in range(0, len(scenes), 20):
        images, depths = (kind[start : start + 20] for kind in (scenes.images, scenes.depths))
        rng = np.random.default_rng([seed, 5, start])
        points, each = [pick_points(depth, SCORED_POINTS, rng, margin=MARGIN_PX) for depth in depths], SCORED_POINTS
        if dialect == "marker":  # an arrow shows one point, so every question has an image of its own
            images, depths = (np.repeat(kind, SCORED_POINTS, 0) for kind in (images, depths))
            points, each = np.concatenate(points)[:, None], 1
        asked = question(images, depths, dialect, each, rng, points)
        said = say(learner, asked.images, asked.texts, opening)
        right += list(ratio_within(said, asked.depth_m).reshape(-1, SCORED_POINTS).mean(1))
    return [float(share) for share in right]
