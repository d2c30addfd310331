"""What fills in depth best between asked points, and where these should lie: measured on rendered scenes.

    python -m depthlm_training.between --scenes 24

No model is asked: the points have the true depth, or that with noise (10 % of every depth, and 8 % of the points are
off by up to a factor of 2 either way, with lower confidence). Scored are pixels that were not asked and that every
method has a depth for. A pixel near an edge of true depth flies if its depth lies between those of the surfaces within
the points' mean spacing and is not within 10 % of any.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import cv2
import numpy as np

from depthlm_ros.adaptive import second_pass
from depthlm_ros.camera import Camera
from depthlm_ros.densified import near_edges
from depthlm_ros.densify import densify
from depthlm_ros.metrics import depth_metrics
from depthlm_ros.sampling import sample_pixels
from depthlm_training.demo.bank import scene_rng
from depthlm_training.raycast import render
from depthlm_training.scenes import KINDS, random_pose, random_scene

WIDTH, HEIGHT = 640, 480
PIXELS = 20_000  # scored in each scene
FLYING_PIXELS = 1500  # of those near edges
SENSOR_NOISE = 3.0  # grey levels


@dataclass(frozen=True)
class Points:
    """Asked points of an image (H, W, 3): pixels (N, 2), z-depth (N,) in metres, confidence (N,)."""

    image: np.ndarray
    pixels: np.ndarray
    depth_m: np.ndarray
    confidence: np.ndarray

    @property
    def spacing(self) -> float:
        """Mean distance between neighbours in pixels."""
        return math.sqrt(self.image.shape[0] * self.image.shape[1] / len(self.pixels))


def nearest(points: Points, at: np.ndarray) -> np.ndarray:
    """The depth of the nearest point."""
    near, _ = _nearest(points, at, 1)
    return points.depth_m[near[:, 0]]


def linear(points: Points, at: np.ndarray) -> np.ndarray:
    """Inverse depth linear in each triangle of the points (Delaunay)."""
    height, width = points.image.shape[:2]
    mesh = cv2.Subdiv2D((0, 0, width, height))
    mesh.insert(points.pixels.astype(np.float32).tolist())
    corners = mesh.getTriangleList().reshape(-1, 3, 2)
    corners = corners[((corners >= 0) & (corners < (width, height))).all(axis=(1, 2))]
    triangle = np.full((height, width), -1, np.int32)
    for index, polygon in enumerate(np.rint(corners).astype(np.int32)):
        cv2.fillConvexPoly(triangle, polygon, index)
    inverse = np.zeros((height, width))
    u, v = points.pixels.astype(int).T
    inverse[v, u] = 1 / points.depth_m
    u, v = np.rint(corners).astype(int).transpose(2, 0, 1)
    plane = np.linalg.solve(np.stack([u, v, np.ones_like(u)], axis=-1), inverse[v, u][..., None])[..., 0]
    own = triangle[at[:, 1], at[:, 0]]
    said = (plane[own] * np.column_stack([at, np.ones(len(at))])).sum(axis=1)
    return np.where(own >= 0, 1 / said, np.nan)


def inverse_distance(points: Points, at: np.ndarray) -> np.ndarray:
    """Mean of ln depth of the 8 nearest points, weighted by confidence over squared distance."""
    near, squared = _nearest(points, at, 8)
    return _weighted(points, near, 1 / (squared + 1))


def bilateral(points: Points, at: np.ndarray) -> np.ndarray:
    """Mean of ln depth of the 8 nearest points, weighted by confidence, distance and likeness in CIELAB."""
    near, squared = _nearest(points, at, 8)
    lab = cv2.cvtColor(cv2.GaussianBlur(points.image, (0, 0), 1.0), cv2.COLOR_RGB2LAB).astype(np.float32)
    u, v = points.pixels.astype(int).T
    unlike = ((lab[at[:, 1], at[:, 0]][:, None] - lab[v, u][near]) ** 2).sum(axis=-1)
    weight = np.exp(-squared / (2 * (points.spacing / 2) ** 2) - unlike / (2 * 8.0**2))
    return _weighted(points, near, weight + 1e-12)


def edge_aware(points: Points, at: np.ndarray) -> np.ndarray:
    """`depthlm_ros.densify`."""
    whole = densify(points.pixels, points.depth_m, points.confidence, points.image)
    return whole[at[:, 1], at[:, 0]]


METHODS: dict[str, Callable[[Points, np.ndarray], np.ndarray]] = {
    "nearest point": nearest,
    "linear, 1/z": linear,
    "inverse distance": inverse_distance,
    "joint bilateral": bilateral,
    "densify": edge_aware,
}


def _nearest(points: Points, at: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    index, squared = [], []
    for part in np.array_split(at.astype(np.float32), max(1, len(at) * len(points.pixels) // 2_000_000)):
        distance = ((part[:, None] - points.pixels[None]) ** 2).sum(axis=-1)
        some = np.argpartition(distance, range(count), axis=1)[:, :count]
        index.append(some)
        squared.append(np.take_along_axis(distance, some, axis=1))
    return np.concatenate(index), np.concatenate(squared)


def _weighted(points: Points, near: np.ndarray, weight: np.ndarray) -> np.ndarray:
    weight = weight * points.confidence[near]
    return np.exp((weight * np.log(points.depth_m)[near]).sum(axis=1) / weight.sum(axis=1))


def scenes(count: int, seed: int, width: int = WIDTH, height: int = HEIGHT) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """((H, W, 3) uint8, (H, W) metres) of held-out scenes, as many of each kind, with a sensor's noise."""
    for index in range(count):
        rng = scene_rng(seed, "held_out", index)
        focal = width / 2 / math.tan(math.radians(rng.uniform(54, 70)) / 2)
        camera = Camera(focal, focal, (width - 1) / 2, (height - 1) / 2, width, height)
        scene = random_scene(rng, KINDS[index % len(KINDS)])
        image, truth = render(scene, camera, random_pose(rng, scene), 2)
        noisy = image + rng.normal(0, SENSOR_NOISE, image.shape)
        yield np.clip(noisy, 0, 255).astype(np.uint8), truth


def asked(image: np.ndarray, truth: np.ndarray, count: int, sampling: str, noise: bool, seed: int) -> Points:
    """Points of a scene placed by a sampling, with their true depth or a noisy one; the sky has none."""
    size, rng = (truth.shape[1], truth.shape[0]), np.random.default_rng(seed)
    first = "blue_noise" if sampling == "uncertainty" else sampling
    pixels = sample_pixels(*size, count // 2 if sampling == "uncertainty" else count, first, seed, image=image)
    if sampling == "uncertainty":
        depth_m = _read(truth, pixels)
        # The sky can be asked like anything else; that it is far is an answer.
        far = np.nan_to_num(depth_m, nan=100.0)
        again = second_pass(pixels, far, np.full(len(pixels), 0.5), count - len(pixels), size, seed)
        pixels = np.concatenate([pixels, again])
    depth_m = _read(truth, pixels)
    pixels, depth_m = pixels[np.isfinite(depth_m)], depth_m[np.isfinite(depth_m)].astype(np.float64)
    confidence = np.ones(len(pixels))
    if noise:
        off = rng.normal(0, 0.1, len(pixels))
        off = np.where(rng.random(len(pixels)) < 0.08, rng.uniform(-0.7, 0.7, len(pixels)), off)
        confidence = np.clip(np.exp(-np.abs(off) / 0.25) * rng.uniform(0.6, 1, len(pixels)), 0.02, 1)
        depth_m *= np.exp(off)
    return Points(image, pixels, depth_m, confidence)


def _read(truth: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    u, v = pixels.astype(int).T
    return truth[v, u]


def scored_pixels(points: Points, truth: np.ndarray, seed: int) -> np.ndarray:
    """(M, 2) int pixels of known depth inside the points' hull that were not asked."""
    inside = np.zeros(truth.shape, np.uint8)
    cv2.fillConvexPoly(inside, cv2.convexHull(points.pixels.astype(np.int32)), 1)
    u, v = points.pixels.astype(int).T
    inside[v, u] = 0
    at = np.flatnonzero((inside > 0) & np.isfinite(truth))
    at = np.random.default_rng(seed).choice(at, min(PIXELS, len(at)), replace=False)
    return np.stack([at % truth.shape[1], at // truth.shape[1]], axis=1)


def flying(said: np.ndarray, truth: np.ndarray, at: np.ndarray, radius: int) -> float:
    """Share of pixels whose depth lies between those of the surfaces around and is that of none of them."""
    height, width = truth.shape
    steps = np.arange(-radius, radius + 1, 3)
    v = np.clip(at[:, 1, None, None] + steps[None, :, None], 0, height - 1)
    u = np.clip(at[:, 0, None, None] + steps[None, None, :], 0, width - 1)
    around = truth[v, u].reshape(len(at), -1)
    off = np.nan_to_num(np.abs(np.log(around / said[:, None])), nan=np.inf).min(axis=1)
    between = (said > np.nanmin(around, axis=1)) & (said < np.nanmax(around, axis=1))
    return float(np.mean(between & (off > math.log(1.1))))


def _compare(
    worlds: list, cases: dict[str, tuple[str, Callable]], count: int, noise: bool
) -> Iterator[tuple[str, str]]:
    """For each case (sampling, method) a row of figures, pooled over the scenes."""
    pairs = {name: [] for name in cases}
    for index, (image, truth) in enumerate(worlds):
        near = near_edges(truth)
        points = {s: asked(image, truth, count, s, noise, index) for s in {sampling for sampling, _ in cases.values()}}
        at = {s: scored_pixels(p, truth, index) for s, p in points.items()}
        said = {name: method(points[s], at[s]) for name, (s, method) in cases.items()}
        for name, (sampling, _) in cases.items():
            # Only where all methods that share these points have a depth.
            shared = [said[other] for other, (s, _) in cases.items() if s == sampling]
            known = np.isfinite(shared).all(axis=0)
            u, v = at[sampling].T
            edge = np.flatnonzero(known & near[v, u])[:FLYING_PIXELS]
            rate = (
                flying(said[name][edge], truth, at[sampling][edge], round(points[sampling].spacing))
                if len(edge)
                else np.nan
            )
            pairs[name].append((said[name], truth[v, u], known, near[v, u], rate))
    for name, rows in pairs.items():
        said, true, known, near = (np.concatenate([row[k] for row in rows]) for k in range(4))
        everywhere, beside = (depth_metrics(said[mask], true[mask]) for mask in (known, known & near))
        yield (
            name,
            (
                f"{everywhere.abs_rel:.4f}  {everywhere.delta1:.4f}  {everywhere.rmse:.3f} | {beside.abs_rel:.4f}  "
                f"{beside.delta1:.4f}  {beside.rmse:.3f} | {np.nanmean([row[4] for row in rows]):.4f} | "
                f"{np.isfinite(said).mean():.4f}"
            ),
        )


def main() -> None:
    """Prints two tables: methods at the same points, and samplings with the same method."""
    parser = argparse.ArgumentParser(description="Compares ways to fill in depth between points, and to place them.")
    parser.add_argument("--scenes", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--points", type=int, nargs="+", default=[256, 1024])
    arguments = parser.parse_args()
    started = time.perf_counter()
    worlds = list(scenes(arguments.scenes, arguments.seed))
    print(f"{arguments.scenes} scenes of {WIDTH}x{HEIGHT}, rendered in {time.perf_counter() - started:.0f} s")
    methods = {name: ("blue_noise", method) for name, method in METHODS.items()}
    samplings = {name: (name, edge_aware) for name in ("grid", "blue_noise", "edges", "uncertainty")}
    for title, cases in (("methods, points in blue noise", methods), ("samplings, filled in by densify", samplings)):
        for count in arguments.points:
            for noise in (False, True):
                print(f"\n{title}; {count} points, {'noisy' if noise else 'true'} depth")
                print(f"{'':18}AbsRel  δ1      RMSE  | near edges             | flying | has a depth")
                for name, row in _compare(worlds, cases, count, noise):
                    print(f"{name:18}{row}", flush=True)


if __name__ == "__main__":
    main()
