"""How good depth is between asked points. Never pooled with theirs: there the model answers, here we interpolate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from depthlm_ros.metrics import delta1_interval, depth_metrics

# Pixels scored in an image, drawn evenly from all that weren't asked.
MOST_PIXELS = 20_000
# A jump of true depth by more than this factor between neighbours is an edge, and what lies within this share of the
# image's longer side of one is near it: 8 pixels of 640.
EDGE_FACTOR, NEAR_SHARE = 1.1, 1 / 80


@dataclass(frozen=True)
class Densified:
    """A depth image that was filled in between asked points.

    Attributes:
        depth_m: (H, W) metres, NaN where nothing supported a depth.
        pixels: (N, 2) `(u, v)` of the points that it was made from.
    """

    depth_m: np.ndarray
    pixels: np.ndarray


@dataclass(frozen=True)
class Between:
    """Pairs of filled-in and true depth of one image, at pixels that weren't asked.

    Attributes:
        predicted: (M,) metres, NaN without a depth.
        true: (M,) metres.
        near_edge: (M,) bool, near a jump of true depth; False where truth is too sparse to tell.
    """

    predicted: np.ndarray
    true: np.ndarray
    near_edge: np.ndarray


def compare_between(densified: Densified, truth_m: np.ndarray, seed: int = 0) -> Between:
    """Pairs what was filled in with true depths, without the points that it was made from.

    Args:
        densified: the depth image and its points.
        truth_m: (H, W) metres, NaN where unknown.
        seed: of the choice among more than `MOST_PIXELS` pixels.
    """
    scored = np.isfinite(truth_m)
    height, width = truth_m.shape
    u, v = np.clip(np.rint(densified.pixels).astype(np.intp), 0, (width - 1, height - 1)).T
    scored[v, u] = False
    at = np.flatnonzero(scored)
    if len(at) > MOST_PIXELS:
        at = np.sort(np.random.default_rng(seed).choice(at, MOST_PIXELS, replace=False))
    near = near_edges(truth_m).ravel()[at]
    return Between(densified.depth_m.ravel()[at], truth_m.ravel()[at], near)


def near_edges(truth_m: np.ndarray) -> np.ndarray:
    """(H, W) bool: near a jump of true depth; next to unknown depth there is none, it may be anything."""
    logs = np.log(truth_m)
    jumps = np.zeros(truth_m.shape, np.uint8)
    for step, one, other in (
        (np.diff(logs, axis=0), np.s_[:-1], np.s_[1:]),
        (np.diff(logs, axis=1), np.s_[:, :-1], np.s_[:, 1:]),
    ):
        edge = np.abs(step) > math.log(EDGE_FACTOR)
        jumps[one] |= edge
        jumps[other] |= edge
    away = cv2.distanceTransform(1 - jumps, cv2.DIST_L2, 5)
    return (away <= NEAR_SHARE * max(truth_m.shape)) & bool(jumps.any())


def densified_scores(frames: Sequence[Between]) -> dict:
    """Scores of all images pooled, as metrics.json holds them; empty where nothing could be compared."""
    if not sum(len(frame.true) for frame in frames):
        return {}
    near = [Between(*(a[frame.near_edge] for a in (frame.predicted, frame.true, frame.near_edge))) for frame in frames]
    return {
        **_pooled(frames),
        "near_edges": _pooled(near) if any(len(frame.true) for frame in near) else None,
        "note": "depth filled in between asked points, at pixels that were not asked; without a depth counts as wrong",
    }


def _pooled(frames: Sequence[Between]) -> dict:
    predicted, true = (np.concatenate([getattr(frame, name) for frame in frames]) for name in ("predicted", "true"))
    groups = np.repeat(np.arange(len(frames)), [len(frame.true) for frame in frames])
    low, high = delta1_interval(predicted, true, groups)
    return {
        "depth": depth_metrics(predicted, true).to_json(),
        "delta1_interval_95": None if math.isnan(low) else [low, high],
        "pixels": len(true),
    }
