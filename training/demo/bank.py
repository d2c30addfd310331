"""A bank of rendered scenes on disk: made once, in pieces that survive an interruption, mapped and not read.

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
from depthlm_ros.markers import ARROW_COLOUR, ARROW_OFFSETS, MARGIN_PX
from depthlm_training.demo.stages import Stage
from depthlm_training.demo.tower import TOKEN_PX
from depthlm_training.raycast import render
from depthlm_training.scenes import random_pose, random_scene

SPLITS = {"train": 0, "held_out": 1}
FIELDS_DEG = (52.0, 71.0)  # horizontal fields of view of the cameras
ASPECTS = (4 / 3, 4 / 3, 16 / 10, 16 / 9)  # of their images

MONITOR = 128  # the bank's first scenes are never trained on; the course of training is watched on them
SHARD = 250  # scenes a shard: 250 x 288 x 224 x 5 bytes = 81 MB


@dataclass(frozen=True)
class View:
    """The camera every bank image is rendered with: the demo model's unified focal length, so nothing is resampled."""

    width: int = 288
    height: int = 224
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


def _files(folder: Path, shard: int) -> tuple[Path, Path]:
    return folder / f"{shard:05d}.images.npy", folder / f"{shard:05d}.depths.npy"


def _render_shard(folder: str, seed: int, shard: int, view: View) -> None:
    paths = _files(Path(folder), shard)
    if all(path.exists() for path in paths):
        return
    images = np.empty((SHARD, view.height, view.width, 3), np.uint8)
    depths = np.empty((SHARD, view.height, view.width), np.float16)
    for i in range(SHARD):
        rng = scene_rng(seed, "train", shard * SHARD + i)
        scene = random_scene(rng)
        images[i], depths[i] = render(scene, view.camera, random_pose(rng, scene))
    for path, array in zip(paths, (images, depths), strict=True):
        part = path.with_suffix(".part")
        with part.open("wb") as file:
            np.save(file, array)
        os.replace(part, path)  # a killed renderer leaves no half file behind


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
    """The scenes of a folder, mapped; `[i]` is ((H, W, 3) uint8, (H, W) float16 z-depth, NaN for sky)."""

    def __init__(self, folder: Path, scenes: int) -> None:
        shards = range(-(-scenes // SHARD))
        self.shards = [[np.load(path, mmap_mode="r") for path in _files(folder, i)] for i in shards]

    def __len__(self) -> int:
        return len(self.shards) * SHARD

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        images, depths = self.shards[i // SHARD]
        return images[i % SHARD], depths[i % SHARD]


def frame(rng: np.random.Generator) -> tuple[int, int]:
    """(width, height) of what a random camera's image becomes at the unified focal length."""
    width = 2 * View.focal_px * np.tan(np.radians(rng.uniform(*FIELDS_DEG)) / 2)
    return round(width), round(width / rng.choice(ASPECTS) * rng.uniform(0.98, 1.02))


def canvas(size: tuple[int, int]) -> tuple[int, int]:
    """(width, height) of the canvas that a frame is padded to: whole tokens."""
    return -(-size[0] // TOKEN_PX) * TOKEN_PX, -(-size[1] // TOKEN_PX) * TOKEN_PX


@dataclass(frozen=True)
class Batch:
    """Augmented images of one size.

    Attributes:
        images: (B, H, W, 3) uint8, H and W multiples of 32.
        depths: (B, H, W) float32 metres, NaN where unknown.
        marks: (B, A, 2) whole `(u, v)` that drawn arrows point at, -1 where none is drawn.
    """

    images: np.ndarray
    depths: np.ndarray
    marks: np.ndarray


def make_batch(bank: SceneBank, stage: Stage, seed: int, step: int) -> Batch:
    """The augmented batch of a step: the same one however often the run was interrupted.

    Augmentation keeps the geometry true: mirror images, colour, blur (what antialiased downscaling does to a real
    photograph), noise, and crops to the frames of other cameras, padded as `unify(policy="exact")` pads. The bank's
    first `MONITOR` scenes are left out.
    """
    rng = np.random.default_rng([seed, 7, step])
    frames = [frame(rng)]
    shared = canvas(frames[0])
    while len(frames) < stage.batch:
        frames += [f for f in [frame(rng)] if canvas(f) == shared]
    images = np.empty((stage.batch, shared[1], shared[0], 3), np.uint8)
    depths = np.empty(images.shape[:3], np.float32)
    marks = np.full((stage.batch, stage.arrows, 2), -1)
    for i, scene in enumerate(rng.integers(MONITOR, len(bank), stage.batch)):
        images[i], depths[i] = _augmented(*bank[scene], frames[i], shared, rng)
        if rng.random() < stage.marked:
            for k in range(rng.integers(1, stage.arrows + 1)):
                marks[i, k] = _mark(depths[i], frames[i], rng)
                _draw_large(images[i], marks[i, k], int(rng.integers(1, stage.largest + 1)))
    return Batch(images, depths, marks)


def _mark(depth: np.ndarray, size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """A place for an arrow, where depth is known if that is easy to find."""
    for _ in range(8):
        u, v = rng.integers(MARGIN_PX, (size[0] - MARGIN_PX, size[1] - MARGIN_PX))
        if np.isfinite(depth[v, u]):
            break
    return np.array([u, v])


def _draw_large(image: np.ndarray, mark: np.ndarray, size: int) -> None:
    """Draws the marker's arrow, each of its pixels as a square of size x size; as at inference if size is 1."""
    square = np.stack(np.meshgrid(np.arange(size), np.arange(size) - size // 2), -1).reshape(-1, 2)
    u, v = (mark + size * ARROW_OFFSETS[:, None] + square).reshape(-1, 2).T
    inside = (u >= 0) & (v >= 0) & (v < image.shape[0])
    image[v[inside], u[inside]] = ARROW_COLOUR


def _augmented(
    image: np.ndarray, depth: np.ndarray, size: tuple[int, int], onto: tuple[int, int], rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    (w, h), (full_h, full_w) = size, depth.shape
    # A real principal point is a little off the middle.
    left = int(np.clip((full_w - w) // 2 + round(rng.normal(0, 2)), 0, full_w - w))
    top = int(np.clip((full_h - h) // 2 + round(rng.normal(0, 2)), 0, full_h - h))
    image, depth = image[top : top + h, left : left + w], depth[top : top + h, left : left + w].astype(np.float32)
    if rng.random() < 0.5:
        image, depth = image[:, ::-1], depth[:, ::-1]
    pixels = image.astype(np.float32)
    if rng.random() < 0.5:
        pixels[1:-1, 1:-1] = 0.5 * pixels[1:-1, 1:-1] + 0.125 * (
            pixels[:-2, 1:-1] + pixels[2:, 1:-1] + pixels[1:-1, :-2] + pixels[1:-1, 2:]
        )
    gain = rng.uniform(0.75, 1.25) * rng.uniform(0.92, 1.08, 3)
    pixels = pixels * gain.astype(np.float32) + np.float32(rng.uniform(-12, 12))
    if rng.random() < 0.3:
        pixels += rng.standard_normal(pixels.shape, np.float32) * np.float32(rng.uniform(0, 6))
    image = np.clip(pixels, 0, 255).astype(np.uint8)
    pad = ((0, onto[1] - h), (0, onto[0] - w))
    return np.pad(image, (*pad, (0, 0)), mode="edge"), np.pad(depth, pad, constant_values=np.nan)
