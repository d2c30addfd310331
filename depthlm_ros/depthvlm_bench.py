"""DepthVLM-Bench: which points it asks of a depth map, which depths it knows, and how it counts.

Sparse points of each image, the share of right ones in each image, and the mean of that over images.
"""

from __future__ import annotations

import numpy as np

from depthlm_ros.metrics import DELTA

_SEED = 42

# Metres outside of which a true depth counts as unknown, by the first name that the labels path contains.
DEPTH_RANGES_M = {
    "argoverse": (0.05, 120.0),
    "waymo": (0.05, 70.0),
    "nuscenes": (0.05, 80.0),
    "ddad": (0.05, 120.0),
    "scannetpp": (0.001, 10.0),
    "taskonomy": (0.005, 15.0),
    "hm3d": (0.01, 10.0),
    "matterport": (0.01, 10.0),
    "sunrgbd": (0.005, 8.0),
    "ibims": (0.005, 25.0),
    "nyuv2": (0.005, 10.0),
    "eth3d": (0.01, 50.0),
}


def bench_points(depth_m: np.ndarray, count: int, index: int) -> tuple[np.ndarray, np.ndarray]:
    """The points that DepthVLM-Bench asks of an image: drawn evenly, with a seed of the image's own.

    Args:
        depth_m: (H, W) metres, 0 where unknown or out of range (`in_range`).
        count: how many, fewer where fewer are known.
        index: the image's row in the benchmark's file.

    Returns:
        (n, 2) `(u, v)` of the depth map and (n,) metres rounded to four decimals.
    """
    known = np.argwhere(depth_m > 0)
    if not len(known):
        return np.empty((0, 2), np.int64), np.empty(0)
    drawn = np.random.RandomState(_SEED + index).choice(len(known), size=min(count, len(known)), replace=False)
    rows, columns = known[drawn].T
    depths = np.array([round(float(depth), 4) for depth in depth_m[rows, columns]])
    return np.stack([columns, rows], axis=1), depths


def bench_points_per_image(total_points: int, images: int) -> list[int]:
    """How many points each image gets when a benchmark of `total_points` is spread: the first ones one more."""
    least, more = divmod(total_points, images)
    return [least + (index < more) for index in range(images)]


def in_range(depth_m: np.ndarray, path: str) -> np.ndarray:
    """The map with 0 where DepthVLM calls a depth invalid, by the data set's name in the labels' path."""
    low, high = next((limits for name, limits in DEPTH_RANGES_M.items() if name in path.lower()), (0.0, np.inf))
    return np.where((depth_m < low) | (depth_m > high), 0, depth_m)


def bench_delta1(predicted: np.ndarray, true: np.ndarray) -> float:
    """DepthVLM's delta1 of one image: over points with both depths above 0, and 0 where there are none.

    Its figure for a data set is the mean of this over images, so an image with few points weighs as much as any.

    Args:
        predicted: (N,) metres; NaN or 0 without an answer, which is left out and not wrong.
        true: (N,) metres, 0 where unknown.
    """
    both = (predicted > 0) & (true > 0)
    predicted, true = predicted[both], true[both]
    return float(np.mean(np.maximum(predicted / true, true / predicted) < DELTA)) if both.any() else 0.0
