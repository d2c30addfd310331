"""Rendered scenes of an ablation: drawn from its seed, rendered once for each camera, kept in the run folder."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from depthlm_training.demo.bank import View, scene_rng
from depthlm_training.raycast import render
from depthlm_training.scenes import random_pose, random_scene

# 12 image tokens; with its 65 degrees the field of view of the demo model's own camera in half of the pixels.
SMALL = View(width=128, height=96, focal_px=100.0)


@dataclass(frozen=True)
class Scenes:
    """Views of scenes by one camera.

    Attributes:
        images: (N, H, W, 3) uint8 RGB.
        depths: (N, H, W) float16 z-depth in metres, NaN for sky.
        view: the camera.
    """

    images: np.ndarray
    depths: np.ndarray
    view: View

    def __len__(self) -> int:
        return len(self.images)

    def pick(self, rng: np.random.Generator, count: int, among: int | None = None) -> np.ndarray:
        """(count,) indices of different scenes, of the first `among` only if given."""
        among = len(self) if among is None else among
        return rng.choice(among, count, replace=count > among)


def render_scenes(folder: Path, seed: int, split: str, count: int, view: View = SMALL) -> Scenes:
    """Renders the first `count` scenes of a split, or reads them where they have been rendered before.

    Args:
        folder: the run folder; made if absent.
        split: "train" or "held_out". No two seeds and splits share a scene.
        view: every scene is seen by this camera; scene and pose are the same for all cameras.
    """
    path = folder / "scenes" / f"{seed}-{split}-{count}-{view.width}x{view.height}-{view.focal_px:g}.npz"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        images = np.empty((count, view.height, view.width, 3), np.uint8)
        depths = np.empty((count, view.height, view.width), np.float16)
        for i in tqdm(range(count), desc=f"rendering {split} scenes, f = {view.focal_px:g} px", unit="scene"):
            rng = scene_rng(seed, split, i)
            scene = random_scene(rng)
            images[i], depths[i] = render(scene, view.camera, random_pose(rng, scene))
        part = path.with_suffix(".part")
        with part.open("wb") as file:
            np.savez(file, images=images, depths=depths)
        os.replace(part, path)
    with np.load(path, allow_pickle=False) as file:
        return Scenes(file["images"], file["depths"], view)
