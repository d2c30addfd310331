"""A bank of rendered scenes on disk: made once, in pieces that survive an interruption, read without copying.

Every scene is drawn from `numpy.random.default_rng([seed, split, index])`, so a bank is the same whoever renders it,
in whatever order and on however many processes.
"""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from depthlm_ros.camera import Camera
from depthlm_training.raycast import render
from depthlm_training.scenes import random_pose, random_scene

SPLITS = {"train": 0, "held_out": 1}
Canvases = tuple[tuple[tuple[int, int], float], ...]

MONITOR = 128  # the bank's last scenes are never trained on; the course of training is watched on them
SHARD = 250  # scenes a file: 250 x 288 x 192 x 5 bytes = 69 MB


@dataclass(frozen=True)
class View:
    """The camera every bank image is rendered with: the demo model's unified focal length, so nothing is resampled."""

    width: int = 288
    height: int = 192
    focal_px: float = 200.0

    @property
    def camera(self) -> Camera:
        return Camera(
            fx=self.focal_px,
            fy=self.focal_px,
            cx=(self.width - 1) / 2,
            cy=(self.height - 1) / 2,
            width=self.width,
            height=self.height,
        )


def scene_rng(seed: int, split: str, index: int) -> np.random.Generator:
    """The generator that scene `index` of a split is drawn from."""
    return np.random.default_rng([seed, SPLITS[split], index])


def _render_shard(folder: str, seed: int, shard: int, view: View) -> int:
    path = Path(folder) / f"{shard:05d}.npz"
    if path.exists():
        return shard
    images = np.empty((SHARD, view.height, view.width, 3), np.uint8)
    depths = np.empty((SHARD, view.height, view.width), np.float16)
    for i in range(SHARD):
        rng = scene_rng(seed, "train", shard * SHARD + i)
        scene = random_scene(rng)
        images[i], depths[i] = render(scene, view.camera, random_pose(rng, scene))
    part = path.with_suffix(".part")
    with part.open("wb") as file:
        np.savez(file, images=images, depths=depths)
    os.replace(part, path)  # a killed renderer leaves no half shard behind
    return shard


def render_bank(folder: Path, scenes: int, seed: int, view: View | None = None, processes: int | None = None) -> Path:
    """Renders the training scenes that the folder doesn't hold yet.

    Args:
        folder: where the shards go; made if absent.
        scenes: how many scenes in all, rounded up to whole shards.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shards = -(-scenes // SHARD)
    with ProcessPoolExecutor(processes or os.cpu_count()) as pool:
        jobs = [pool.submit(_render_shard, str(folder), seed, i, view or View()) for i in range(shards)]
        for job in tqdm(jobs, desc=f"rendering {shards * SHARD} scenes", unit="shard"):
            job.result()
    return folder


class SceneBank:
    """All scenes of a folder in memory; `[i]` is ((H, W, 3) uint8, (H, W) float16 z-depth, NaN for sky)."""

    def __init__(self, folder: Path, scenes: int) -> None:
        shards = [np.load(folder / f"{i:05d}.npz", allow_pickle=False) for i in range(-(-scenes // SHARD))]
        self.images = np.concatenate([s["images"] for s in tqdm(shards, desc="reading scenes", unit="shard")])
        self.depths = np.concatenate([s["depths"] for s in shards])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        return self.images[i], self.depths[i]


@dataclass(frozen=True)
class Batch:
    """`images` (B, H, W, 3) uint8 and `depths` (B, H, W) float32 metres, NaN where unknown; H, W multiples of 32."""

    images: np.ndarray
    depths: np.ndarray


# (width, height) of the padded image, and how often. First the two that are most common: 640x480 at 65 degrees, 16:9 at
# 70 degrees; then all that 4:3, 16:10 and 16:9 cameras of 52 to 71 degrees become.
CANVASES = (((256, 192), 0.85), ((288, 160), 0.15))


ALL_CANVASES = (
    ((256, 192), 0.25),
    ((224, 128), 0.1),
    ((224, 160), 0.15),
    ((224, 192), 0.05),
    ((256, 128), 0.05),
    ((256, 160), 0.15),
    ((288, 160), 0.15),
    ((288, 192), 0.1),
)


def make_batch(
    bank: SceneBank, size: int, seed: int, step: int, canvases: Canvases = CANVASES, narrower: float = 0.3
) -> Batch:
    """The augmented batch of a step: the same one however often the run was interrupted.

    Augmentation keeps the geometry true: mirror images, colour, blur (what antialiased downscaling does to a real
    photograph), noise, and centred crops to narrower fields of view, padded as `unify(policy="exact")` pads.

    Args:
        canvases: sizes of the padded images, with their shares.
        narrower: share of the images that don't fill their canvas.
    """
    rng = np.random.default_rng([seed, 7, step])
    width, height = canvases[rng.choice(len(canvases), p=[p for _, p in canvases])][0]
    pairs = [_augmented(*bank[i], width, height, narrower, rng) for i in rng.integers(0, len(bank) - MONITOR, size)]
    return Batch(np.stack([p[0] for p in pairs]), np.stack([p[1] for p in pairs]))


def _augmented(
    image: np.ndarray, depth: np.ndarray, width: int, height: int, narrower: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    full_h, full_w = depth.shape
    w, h = width, height
    if rng.random() < narrower:
        w, h = int(rng.integers(width - 31, width + 1)), int(rng.integers(height - 31, height + 1))
    left, top = (full_w - w) // 2, (full_h - h) // 2
    image, depth = image[top : top + h, left : left + w], depth[top : top + h, left : left + w].astype(np.float32)
    if rng.random() < 0.5:
        image, depth = image[:, ::-1], depth[:, ::-1]
    pixels = image.astype(np.float32)
    if rng.random() < 0.5:
        pixels[1:-1, 1:-1] = 0.5 * pixels[1:-1, 1:-1] + 0.125 * (
            pixels[:-2, 1:-1] + pixels[2:, 1:-1] + pixels[1:-1, :-2] + pixels[1:-1, 2:]
        )
    gain = rng.uniform(0.75, 1.25) * rng.uniform(0.92, 1.08, 3)
    pixels = pixels * gain.astype(np.float32) + rng.uniform(-12, 12)
    if rng.random() < 0.3:
        pixels += rng.normal(0, rng.uniform(0, 6), pixels.shape).astype(np.float32)
    image = np.clip(pixels, 0, 255).astype(np.uint8)
    pad = ((0, height - h), (0, width - w))
    return np.pad(image, (*pad, (0, 0)), mode="edge"), np.pad(depth, pad, constant_values=np.nan)
