"""Small recordings, labels and a model with a card, for the tests of what reads and plays them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

from depthlm_ros.bags import START_NS, RecordedFrame
from depthlm_ros.camera import Camera
from depthlm_ros.depth import Frame

CAMERA = Camera(fx=60, fy=62, cx=31, cy=24.5, width=64, height=48)
STEP_NS = 200_000_000


def picture(seed: int = 0, width: int = 64, height: int = 48) -> np.ndarray:
    """(H, W, 3) uint8, smooth with some noise."""
    v, u = np.mgrid[0:height, 0:width]
    noise = np.random.default_rng(seed).integers(0, 30, (height, width, 3))
    return (np.stack([2 * u + 20 * seed, 3 * v, u + v], axis=-1) % 200 + noise).astype(np.uint8)


def floor_depth(width: int = 64, height: int = 48) -> np.ndarray:
    """(H, W) float32 metres of a floor under a camera; the sky above the horizon is NaN."""
    rows = np.arange(height) - height / 3
    depth = np.where(rows > 0, 40 / np.maximum(rows, 1), np.nan).astype(np.float32)
    return np.repeat(depth[:, None], width, axis=1)


def drive(count: int, truth: bool = True) -> Iterator[RecordedFrame]:
    """Frames 0.2 s apart with a floor as ground truth."""
    for index in range(count):
        frame = Frame(picture(index), CAMERA, START_NS + index * STEP_NS, "front_optical_frame")
        yield RecordedFrame(frame, floor_depth() if truth else None)


def write_depthlm_labels(folder: Path, images: int = 2, points: int = 5, **changes: object) -> Path:
    """A labels file in DepthLM's schema with its images in `rgb/`."""
    (folder / "rgb").mkdir(parents=True, exist_ok=True)
    rows = []
    for index in range(images):
        Image.fromarray(picture(index)).save(folder / "rgb" / f"{index}.png")
        pixels = np.random.default_rng(index).permutation(64 * 48)[:points]
        row = {
            "image": f"rgb/{index}.png",
            "intrinsics": [60, 62, 31, 24.5, 64, 48],
            "pixel_coords": [[int(p % 64), int(p // 64)] for p in pixels],
            "depth": [round(1 + 0.37 * i, 2) for i in range(points)],
        }
        rows.append({**row, **changes})
    return _write_rows(folder / "labels.jsonl", rows)


def write_depthvlm_labels(folder: Path, **changes: object) -> Path:
    """A labels file in DepthVLM's schema: a 64x48 image with a 16x12 depth map in millimetres."""
    (folder / "rgb").mkdir(parents=True, exist_ok=True)
    (folder / "depth").mkdir(exist_ok=True)
    Image.fromarray(picture()).save(folder / "rgb" / "a.png")
    millimetres = (1000 + np.arange(16 * 12).reshape(12, 16)).astype(np.uint16)
    millimetres[0, 0] = 0
    Image.fromarray(millimetres).save(folder / "depth" / "a.png")
    row = {
        "scene_id": "a",
        "image": "a.png",
        "depth_path": "a.png",
        "depth_scale": 1000.0,
        "original_rgb_size": [64, 48],
        "original_depth_size": [16, 12],
        "original_fx": 60.0,
        "pixel_coords": [[3, 2]],
        "depth": [1.035],
        "depth_type": "z_depth",
    }
    return _write_rows(folder / "labels.jsonl", [{**row, **changes}])


def small_model(checkpoint: Path, folder: Path) -> Path:
    """A copy of a checkpoint with a card that lets it take pictures of this size and speak every dialect."""
    shutil.copytree(checkpoint, folder)
    card = {
        "name": "small",
        "source": ".",
        "licence": "Apache-2.0",
        "commercial_use": True,
        "architecture": "qwen3_vl",
        "dialects": ["dense", "coordinates", "marker", "compact"],
        "points_per_question": 8,
        "default_dialect": "dense",
        "focal_px": 100,
        "policy": "exact",
        "depth_kind": "z",
        "max_new_tokens": 8,
        "description": "random weights",
    }
    (folder / "depthlm_card.yaml").write_text(yaml.safe_dump(card), encoding="utf-8")
    return folder


def _write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
