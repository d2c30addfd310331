"""Which pixels of a frame are asked, and which answers are kept. No ROS in here."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from depthlm_ros.config import POINTS_IN_WORDS, Parameters
from depthlm_ros.depth import DISTRIBUTION, DepthResult
from depthlm_ros.remember import fixed
from depthlm_ros.sampling import sample_pixels, stride_pixels


@dataclass(frozen=True)
class Query:
    """The pixels to ask in one frame.

    Attributes:
        pixels: (N, 2) float32 `(u, v)`.
        cloud_rows: which of them become points of the cloud; None for all.
        organised_shape: (height, width) of the cloud when its points are a grid that is to stay one, else None.
    """

    pixels: np.ndarray
    cloud_rows: np.ndarray | None = None
    organised_shape: tuple[int, int] | None = None


def plan_query(parameters: Parameters, dialect: str, width: int, height: int, whole: bool) -> Query:
    """Chooses the pixels of one frame.

    Args:
        parameters: `points`, `stride`, `sampling` and `organised` count.
        dialect: the one to be spoken.
        width: of the image.
        height: of the image.
        whole: somebody wants the depth image. In the dense dialect without a number of points it then holds
            every pixel, since they are all computed anyway; the cloud keeps its stride.

    Raises:
        PixelError: the image has fewer pixels than `points`.
    """
    if parameters.points or dialect != "dense":
        return _some(width, height, parameters.points or POINTS_IN_WORDS, parameters.sampling)
    return _strided(width, height, parameters.stride, parameters.organised, whole and parameters.stride > 1)


@lru_cache(maxsize=4)
def _some(width: int, height: int, count: int, sampling: str) -> Query:
    return Query(fixed(sample_pixels(width, height, count, sampling)))


@lru_cache(maxsize=4)
def _strided(width: int, height: int, stride: int, organised: bool, whole: bool) -> Query:
    cloud = fixed(stride_pixels(width, height, stride))
    rows = len(np.unique(cloud[:, 1]))
    shape = (rows, len(cloud) // rows) if organised else None
    if not whole:
        return Query(cloud, None, shape)
    indices = fixed((cloud[:, 1] * width + cloud[:, 0]).astype(np.intp))
    return Query(fixed(stride_pixels(width, height, 1)), indices, shape)


def keep_good(result: DepthResult, parameters: Parameters) -> DepthResult:
    """Removes the depth where it is beyond `max_depth_m` or its confidence below `min_confidence`."""
    if parameters.min_confidence <= 0 and parameters.max_depth_m <= 0:
        return result
    bad = result.confidence < parameters.min_confidence
    if parameters.max_depth_m > 0:
        bad |= result.depth_m > parameters.max_depth_m
    known = {name: values for name in DISTRIBUTION if (values := getattr(result, name)) is not None}
    return replace(
        result,
        depth_m=np.where(bad, np.float32(np.nan), result.depth_m),
        confidence=np.where(bad, 0, result.confidence),
        **{name: np.where(bad, np.float32(np.nan), values) for name, values in known.items()},
    )


def depth_image(result: DepthResult, width: int, height: int) -> np.ndarray:
    """(height, width) float32 z-depth in metres, NaN where not asked or not answered."""
    image = np.full((height, width), np.nan, np.float32)
    u, v = result.pixels.astype(np.intp).T
    image[v, u] = result.depth_m
    return image
