"""Focal unification or none, on mixed cameras.

DepthLM (arXiv 2509.25413): a camera's focal length and an object's distance look the same in a picture, so images are
brought to one focal length before a model sees them; without it accuracy halves. Here a dense head learns from four
cameras with one sensor and four lenses; one arm sees every image as it was taken, the other resampled to one focal
length, with as many image tokens on average. Both are scored at the same points of the source images, by the lenses of
training and by three in between that no arm has seen.

    python -m depthlm_training.ablations.focal --seeds 3
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from depthlm_ros.engines.base import ImageGrid
from depthlm_ros.unify import unify
from depthlm_training.ablations.learner import Learner, Rates, fit, ratio_within
from depthlm_training.ablations.scenery import Scenes, render_scenes
from depthlm_training.ablations.study import Contrast, Outcome, Study, main
from depthlm_training.demo.bank import View
from depthlm_training.demo.model import TOKEN_PX, DemoNet

UNIFIED, AS_TAKEN = "unified", "as taken"


@dataclass(frozen=True)
class Settings:
    """What decides the result; `focals_px` and `between_px` are those of a 128 x 96 sensor, 90 to 39 degrees wide."""

    steps: int = 400
    train_scenes: int = 800
    held_out_scenes: int = 100
    focals_px: tuple[float, ...] = (64.0, 90.0, 128.0, 180.0)
    between_px: tuple[float, ...] = (76.0, 107.0, 152.0)
    unified_px: float = 90.0
    images_each: int = 4
    points: int = 1024
    scored_points: int = 256
    rates: Rates = Rates()


@dataclass(frozen=True)
class Shown:
    """Scenes as a model sees them: `images` (N, H', W', 3) uint8, `scale` view pixels a source pixel."""

    images: np.ndarray
    scale: float
    source: Scenes

    def points(self, i: int, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Random labelled pixels of a source image: their places in the view, (count, 2) in [-1, 1], and depths."""
        depth = self.source.depths[i].astype(np.float32)
        known = np.flatnonzero(np.isfinite(depth))
        v, u = np.divmod(rng.choice(known, count, replace=len(known) < count), depth.shape[1])
        height, width = self.images.shape[1:3]
        edges = np.stack([u + 0.5, v + 0.5], 1) * self.scale  # from the image's corner, not from a pixel's centre
        return (2 * edges / (width, height) - 1).astype(np.float32), depth[v, u]


def show(scenes: Scenes, focal_px: float | None) -> Shown:
    """Brings images to a focal length, as the estimator does for new models; None leaves them as they were taken."""
    if focal_px is None:
        return Shown(scenes.images, 1.0, scenes)
    grid = ImageGrid(TOKEN_PX, min_pixels=1, max_pixels=2**20)
    seen = [unify(image, scenes.view.camera, focal_px, "exact", grid).image for image in scenes.images]
    return Shown(np.stack(seen), focal_px / scenes.view.focal_px, scenes)


def log_depth_at(net: DemoNet, images: np.ndarray, places: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, P) log-depth of head and of probe at places (B, P, 2) of images (B, H, W, 3), bilinear."""
    encoded = net.encode(torch.from_numpy(images))
    grid = torch.from_numpy(places)[:, None]
    maps = (net.log_depth(encoded).float(), net.probe_log_depth(encoded).float())
    read = [nn.functional.grid_sample(m[:, None], grid, padding_mode="border", align_corners=False) for m in maps]
    return read[0][:, 0, 0], read[1][:, 0, 0]


def _views(settings: Settings, arm: str, seed: int, split: str, folder: Path) -> dict[float, Shown]:
    train = split == "train"
    count = settings.train_scenes if train else settings.held_out_scenes
    focals = settings.focals_px if train else settings.focals_px + settings.between_px
    target = settings.unified_px if arm == UNIFIED else None
    return {f: show(render_scenes(folder, seed, split, count, View(128, 96, f)), target) for f in focals}


def run(settings: Settings, arm: str, seed: int, folder: Path) -> dict[str, Outcome]:
    """Trains one arm with one seed and scores it."""
    views = _views(settings, arm, seed, "train", folder)
    learner = Learner(seed)

    def loss_of(step: int) -> torch.Tensor:
        rng = np.random.default_rng([seed, 1, step])
        errors = []
        for shown in views.values():
            pick = shown.source.pick(rng, settings.images_each)
            places, depths = zip(*(shown.points(i, settings.points, rng) for i in pick), strict=True)
            truth = torch.from_numpy(np.stack(depths)).log()
            head, probe = log_depth_at(learner.net, shown.images[pick], np.stack(places))
            errors.append((head - truth).abs().mean() + 0.3 * (probe - truth).abs().mean())
        return torch.stack(errors).mean()

    effort = fit(learner, settings.steps, loss_of, settings.rates, f"{arm}, seed {seed}")
    area = np.mean([shown.images[0, ..., 0].size for shown in views.values()])
    images = settings.steps * settings.images_each * len(views)
    took = {"cpu_seconds": effort.cpu_seconds, "images": images, "tokens_an_image": area / TOKEN_PX**2}
    return {arm: Outcome(_scores(settings, learner.net, _views(settings, arm, seed, "held_out", folder), seed), took)}


@torch.no_grad()
def _scores(settings: Settings, net: DemoNet, views: dict[float, Shown], seed: int) -> dict[str, list[float]]:
    by_focal = {}
    for focal, shown in views.items():
        rng = np.random.default_rng([seed, 2])
        right = []
        for start in range(0, len(shown.images), 25):
            chosen = range(start, min(start + 25, len(shown.images)))
            places, depths = zip(*(shown.points(i, settings.scored_points, rng) for i in chosen), strict=True)
            said = log_depth_at(net, shown.images[chosen.start : chosen.stop], np.stack(places))[0].exp().numpy()
            right += list(ratio_within(said, np.stack(depths)).mean(1))
        by_focal[focal] = np.array(right)
    seen = np.mean([by_focal[f] for f in settings.focals_px], 0)
    between = np.mean([by_focal[f] for f in settings.between_px], 0)
    return {"δ1, lenses of training": seen.tolist(), "δ1, lenses between": between.tolist()}


def study(settings: Settings | None = None) -> Study:
    """The ablation with its defaults or with other settings."""
    settings = settings or Settings()
    claims = (
        Contrast("unified beats as taken (DepthLM)", metric, UNIFIED, AS_TAKEN)
        for metric in ("δ1, lenses of training", "δ1, lenses between")
    )
    return Study(
        "focal",
        "Does bringing all images to one focal length help where cameras are mixed?",
        (UNIFIED, AS_TAKEN),
        tuple(claims),
        lambda task, seed, folder: run(settings, task, seed, folder),
        settings,
    )


if __name__ == "__main__":
    main(study())
