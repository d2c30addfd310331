"""How good a checkpoint is on 200 held-out rendered scenes, through the same estimator that the node runs.

The cameras differ in size, field of view and principal point from those of training; questions are asked and answers
scored in the source image's pixels.

    python -m depthlm_training.demo.score models/demo
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from depthlm_ros.camera import Camera
from depthlm_ros.estimator import Estimator
from depthlm_ros.metrics import best_constant, delta1_interval, depth_metrics, row_prior
from depthlm_training.demo.bank import scene_rng
from depthlm_training.raycast import render
from depthlm_training.scenes import random_pose, random_scene

SCENES = 200
POINTS = 50  # of each scene
MARKER_POINTS = 10  # of each scene in the marker dialect, which runs the whole network for each
PRIOR_SCENES = 200  # training scenes the row prior is learnt on
SIZES = ((640, 480), (800, 600), (1280, 720), (640, 400))


@dataclass(frozen=True)
class HeldOut:
    """One scene: `image` (H, W, 3) uint8, its camera, pixels (N, 2) and their true z-depth (N,) in metres."""

    image: np.ndarray
    camera: Camera
    pixels: np.ndarray
    truth_m: np.ndarray


def held_out(index: int, seed: int, split: str = "held_out", points: int = POINTS) -> HeldOut:
    """Scene `index` of a split, seen by a camera of its own; sky is never asked."""
    rng = scene_rng(seed, split, index)
    width, height = SIZES[rng.integers(len(SIZES))]
    focal = width / 2 / math.tan(math.radians(rng.uniform(54, 70)) / 2)
    camera = Camera(
        fx=focal * rng.uniform(0.99, 1.01),
        fy=focal,
        cx=(width - 1) / 2 + rng.normal(0, width / 100),
        cy=(height - 1) / 2 + rng.normal(0, height / 100),
        width=width,
        height=height,
    )
    scene = random_scene(rng)
    image, depth = render(scene, camera, random_pose(rng, scene))
    v, u = np.divmod(rng.choice(np.flatnonzero(np.isfinite(depth)), points), width)
    return HeldOut(image, camera, np.stack([u, v], 1).astype(np.float32), depth[v, u])


def baselines(seed: int) -> tuple[list[HeldOut], dict[str, float]]:
    """The held-out scenes, and δ1 of what knows no image: the best constant and two priors for the image row.

    The constant is the best one *for these very points*; the priors are learnt on training scenes.
    """
    scenes = [held_out(i, seed) for i in tqdm(range(SCENES), desc="held-out scenes", unit="scene")]
    known = [held_out(i, seed, "train") for i in tqdm(range(PRIOR_SCENES), desc="scenes for the prior", unit="scene")]
    truth = np.concatenate([s.truth_m for s in scenes])

    def rows_of(items: list[HeldOut]) -> tuple[np.ndarray, np.ndarray]:
        return (np.concatenate([s.pixels[:, 1] for s in items]), np.repeat([s.camera.height for s in items], POINTS))

    figures = {"best_constant": best_constant(truth)[1]}
    rows, heights = rows_of(known)
    for name, statistic in (("row_mean", "arithmetic"), ("row_best", "best_constant")):
        prior = row_prior(rows, heights, np.concatenate([s.truth_m for s in known]), bins=24, statistic=statistic)
        figures[name] = depth_metrics(prior.predict(*rows_of(scenes)), truth).delta1
    return scenes, figures


def score(model: str, seed: int = 0) -> dict:
    """Scores every dialect that the model speaks; the figures are those of the card."""
    scenes, figures = baselines(seed)
    result: dict = {"scenes": SCENES, "baselines": figures, "dialects": {}}
    with Estimator.load(model) as estimator:
        result["parameters"] = estimator.engine.info.parameters
        for dialect in estimator.dialects:
            result["dialects"][dialect] = _score(estimator, scenes, dialect, figures)
        each = estimator.card.points_per_question
        if "compact" in estimator.dialects and each > 1:
            several = _score(estimator, scenes, "compact", figures, each)
            result["several_points"] = {"points_per_question": each} | several
    return result


def _score(estimator: Estimator, scenes: list[HeldOut], dialect: str, figures: dict[str, float], each: int = 1) -> dict:
    count = MARKER_POINTS if dialect == "marker" else POINTS
    guesses, truth, groups = [], [], []
    for i, scene in enumerate(tqdm(scenes, desc=dialect if each == 1 else f"{dialect}, {each} points", unit="scene")):
        pixels = scene.pixels[:count]
        answer = estimator.estimate(scene.image, scene.camera, pixels, dialect=dialect, points_per_question=each)
        guesses.append(answer.depth_m[answer.asked])
        truth.append(scene.truth_m[:count][answer.asked])
        groups.append(np.full(int(answer.asked.sum()), i))
    guess, true, group = (np.concatenate(x) for x in (guesses, truth, groups))
    metrics = depth_metrics(guess, true)
    low, high = delta1_interval(guess, true, group)
    return {
        "delta1": metrics.delta1,
        "delta1_95": [low, high],
        "abs_rel": metrics.abs_rel,
        "rmse_m": metrics.rmse,
        "answered": metrics.answered,
        "asked": metrics.total,
        "above_baselines": metrics.delta1 - max(figures["best_constant"], figures["row_mean"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Scores a checkpoint on held-out rendered scenes.")
    parser.add_argument("model", help="name of a card, or a folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    args = parser.parse_args()
    result = score(args.model, args.seed)
    text = json.dumps(result, indent=2)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
