"""Spends points where a first look leaves the depth in doubt.

    result = estimate_in_two_passes(estimator, image, camera, 256)

Half of the points look everywhere, the other half where the first half was unsure of itself or found depths that
differ. The rows of the result are the points of the first pass, then those of the second.
"""

from __future__ import annotations

import math
from dataclasses import fields, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

from depthlm_ros.camera import Camera
from depthlm_ros.depth import DepthResult
from depthlm_ros.errors import ConfigError, PixelError
from depthlm_ros.sampling import Region, density_pixels, sample_pixels, stride_pixels

if TYPE_CHECKING:
    from depthlm_ros.estimator import Estimator

# Share of the points that look everywhere first.
FIRST_SHARE = 0.5
# The second pass keeps this much doubt everywhere, beside 1 for an answer of no confidence and 1 for a jump by a factor
# of e between neighbours: the first pass may have missed a thing that lies between its points.
_DOUBT_ANYWHERE = 0.1
# The map of doubts has this many pixels between neighbouring points of the first pass.
_PER_SPACING = 6.0


def second_pass(
    pixels: np.ndarray,
    depth_m: np.ndarray,
    confidence: np.ndarray,
    count: int,
    size: tuple[int, int],
    seed: int = 0,
    *,
    asked: np.ndarray | None = None,
    region: Region | None = None,
) -> np.ndarray:
    """Chooses where to ask again.

    A pixel's doubt is high where the nearest answer's confidence is below what is usual in this image (confidences of
    different models and dialects aren't to be compared), where there was no answer, and where the answers around
    differ in depth; it falls to nothing towards a pixel that has been asked.

    Args:
        pixels: (N, 2) `(u, v)` of the first pass.
        depth_m: (N,) metres, NaN without an answer.
        confidence: (N,) in [0, 1].
        count: how many pixels to choose.
        size: (width, height) of the image.
        seed: of the even spread within the doubts.
        asked: (N,) bool, False where the question couldn't be put, which is no reason to ask beside it; None for all.
        region: `(u, v, width, height)` to stay in; None = the whole image.

    Returns:
        (M, 2) float32 `(u, v)`, integer-valued, unique and none of `pixels`; M = count, or all that is left where
        there are fewer.

    Raises:
        PixelError: arrays of different lengths, or pixels outside of the image.
    """
    width, height = size
    pixels = np.asarray(pixels)
    n = len(pixels)
    if pixels.shape != (n, 2) or len(depth_m) != n or len(confidence) != n:
        raise PixelError(f"{pixels.shape} pixels, {len(depth_m)} depths, {len(confidence)} confidences; give N of each")
    u, v = pixels.astype(np.intp).T
    if n and not ((u >= 0) & (v >= 0) & (u < width) & (v < height)).all():
        raise PixelError(f"pixels of the first pass lie outside of the {width}x{height} image; pass that image's size")
    left, top, columns, rows = region or (0, 0, width, height)
    asked = np.ones(n, bool) if asked is None else asked
    doubt = _doubt_map(pixels, np.asarray(depth_m), np.asarray(confidence), asked, size, columns * rows)
    doubt[v, u] = 0
    doubt = doubt[top : top + rows, left : left + columns]
    offset = np.array([left, top], np.float32)
    # Asked pixels have no density, so they come last of all; what is left of those is cut off.
    free = columns * rows - len(np.unique((v * width + u)[_inside(pixels, (left, top, columns, rows))]))
    return density_pixels(doubt, min(count, free), seed) + offset if min(count, free) else np.empty((0, 2), np.float32)


def estimate_in_two_passes(
    estimator: Estimator,
    image: np.ndarray,
    camera: Camera,
    count: int,
    *,
    dialect: str | None = None,
    seed: int = 0,
    region: Region | None = None,
    **options: Any,
) -> DepthResult:
    """Measures depth at `count` pixels, the later ones chosen by the answers to the earlier ones.

    In the dialects that answer in words the estimator is asked twice. The dense dialect computes the whole map anyway,
    so there it is asked once and both passes read from that.

    Args:
        estimator: who is asked.
        image: (H, W, 3) uint8 RGB.
        camera: intrinsics of `image`.
        count: pixels in all.
        dialect: as in `Estimator.estimate`.
        seed: of both passes.
        region: `(u, v, width, height)` to stay in; None = the whole image.
        **options: more arguments of `Estimator.estimate`.

    Raises:
        DepthLMError: as `Estimator.estimate` and `sample_pixels`.
    """
    dialect = dialect or estimator.card.default_dialect
    width, height = camera.width, camera.height
    looks = max(1, round(count * FIRST_SHARE))
    pixels = sample_pixels(width, height, looks, "blue_noise", seed, region=region)
    if dialect == "dense":
        progress = options.pop("progress", None)
        whole = estimator.estimate(image, camera, stride_pixels(width, height, 1), dialect=dialect, **options)
        ask = partial(_read, whole, width)
    else:
        progress = None
        ask = partial(estimator.estimate, image, camera, dialect=dialect, **options)
    first = ask(pixels)
    again = second_pass(
        pixels,
        first.depth_m,
        first.confidence,
        count - looks,
        (width, height),
        seed + 1,
        asked=first.asked,
        region=region,
    )
    result = joined(first, ask(again)) if len(again) else first
    if dialect == "dense":
        result = replace(result, timing_s=whole.timing_s)
    if progress is not None:
        progress(len(result))
    return result


def joined(first: DepthResult, second: DepthResult) -> DepthResult:
    """The rows of two results of one image and one dialect, one after the other; seconds are added up by stage.

    Raises:
        ConfigError: they are of two dialects.
    """
    if first.dialect != second.dialect:
        raise ConfigError(f"results of dialects {first.dialect!r} and {second.dialect!r}; join answers of one dialect")
    both = {field.name: (getattr(first, field.name), getattr(second, field.name)) for field in fields(DepthResult)}
    return DepthResult(**{name: _concatenated(one, other) for name, (one, other) in both.items()})


def _concatenated(one: Any, other: Any) -> Any:
    if isinstance(one, np.ndarray):
        return np.concatenate([one, other])
    if isinstance(one, dict):
        return {stage: one.get(stage, 0.0) + other.get(stage, 0.0) for stage in {**one, **other}}
    return one + other if isinstance(one, tuple) else one


def _read(whole: DepthResult, width: int, pixels: np.ndarray) -> DepthResult:
    """The rows of a result about every pixel of an image, that belong to some pixels."""
    u, v = pixels.astype(np.intp).T
    rows = v * width + u
    arrays = {
        field.name: getattr(whole, field.name)[rows]
        for field in fields(DepthResult)
        if isinstance(getattr(whole, field.name), np.ndarray)
    }
    return replace(whole, **arrays)


def _doubt_map(
    pixels: np.ndarray, depth_m: np.ndarray, confidence: np.ndarray, asked: np.ndarray, size: tuple[int, int], area: int
) -> np.ndarray:
    """(H, W) float32: how much is to be learnt by asking at each pixel."""
    width, height = size
    if not asked.any():
        return np.ones((height, width), np.float32)
    spacing = math.sqrt(area / len(pixels))
    shrink = min(1.0, _PER_SPACING / spacing)
    small = max(1, round(width * shrink)), max(1, round(height * shrink))
    usual = float(np.median(confidence[asked]))
    unsure = np.clip(1 - confidence / usual, 0, 1) if usual > 0 else np.zeros(len(pixels))
    answered = asked & np.isfinite(depth_m)
    unsure = np.where(asked & ~answered, 1, np.where(asked, unsure, 0))
    nearest, distance = _nearest(pixels, small, size)
    doubt = _DOUBT_ANYWHERE + unsure.astype(np.float32)[nearest]
    if answered.any():
        log_depth = np.log(depth_m[answered]).astype(np.float32)[_nearest(pixels[answered], small, size)[0]]
        around = np.ones((round(_PER_SPACING) // 2 * 2 + 1,) * 2, np.uint8)
        doubt += np.minimum(cv2.dilate(log_depth, around) - cv2.erode(log_depth, around), 1)
    # What lies beside a pixel of the first pass is known from it, or can't be asked either.
    doubt *= np.minimum(distance / (_PER_SPACING / 2), 1)
    return cv2.resize(doubt, size, interpolation=cv2.INTER_LINEAR)


def _nearest(pixels: np.ndarray, small: tuple[int, int], size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Index of the nearest of some pixels, and the distance to it, at each pixel of an image that was shrunk."""
    u, v = (((pixels + 0.5) * small / size).astype(np.intp)).T
    free = np.ones(small[::-1], np.uint8)
    free[v, u] = 0
    distance, label = cv2.distanceTransformWithLabels(free, cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL)
    index = np.zeros(label.max() + 1, np.intp)
    index[label[v, u]] = np.arange(len(pixels))
    return index[label], distance


def _inside(pixels: np.ndarray, region: Region) -> np.ndarray:
    left, top, columns, rows = region
    return ((pixels >= (left, top)) & (pixels < (left + columns, top + rows))).all(axis=1)
