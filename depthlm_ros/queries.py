"""Which pixels of a frame are asked, and which answers are kept. No ROS in here."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from depthlm_ros.adaptive import estimate_in_two_passes
from depthlm_ros.camera import Camera
from depthlm_ros.config import POINTS_IN_WORDS, Parameters, read_region
from depthlm_ros.densify import densify
from depthlm_ros.depth import DISTRIBUTION, DepthResult
from depthlm_ros.errors import ConfigError
from depthlm_ros.remember import fixed, remember
from depthlm_ros.sampling import Region, sample_pixels, stride_pixels

if TYPE_CHECKING:
    from depthlm_ros.estimator import Estimator


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


def points_asked(parameters: Parameters, dialect: str) -> int:
    """How many pixels are placed by `sampling`; 0 where every stride-th one is asked."""
    return parameters.points or (0 if dialect == "dense" else POINTS_IN_WORDS)


def ask_frame(
    estimator: Estimator,
    image: np.ndarray,
    camera: Camera,
    parameters: Parameters,
    dialect: str,
    whole: bool,
    **options: Any,
) -> tuple[Query, DepthResult]:
    """Chooses the pixels of one frame and asks about them, in two passes where `sampling` is uncertainty.

    Args:
        estimator: who is asked.
        image: (H, W, 3) uint8 RGB.
        camera: its intrinsics.
        parameters: as for `plan_query`.
        dialect: the one to be spoken.
        whole: as for `plan_query`.
        **options: more arguments of `Estimator.estimate`.

    Raises:
        DepthLMError: as `Estimator.estimate` and `plan_query`.
    """
    count = points_asked(parameters, dialect)
    if count and parameters.sampling == "uncertainty":
        region = read_region(parameters.region)
        result = estimate_in_two_passes(estimator, image, camera, count, dialect=dialect, region=region, **options)
        return Query(result.pixels), result
    query = plan_query(parameters, dialect, camera.width, camera.height, whole, image)
    return query, estimator.estimate(image, camera, query.pixels, dialect=dialect, **options)


def plan_query(
    parameters: Parameters, dialect: str, width: int, height: int, whole: bool, image: np.ndarray | None = None
) -> Query:
    """Chooses the pixels of one frame.

    Args:
        parameters: `points`, `stride`, `sampling`, `region` and `organised` count.
        dialect: the one to be spoken.
        width: of the image.
        height: of the image.
        whole: somebody wants the depth image. In the dense dialect without a number of points it then holds
            every pixel, since they are all computed anyway; the cloud keeps its stride.
        image: (H, W, 3) uint8 RGB, which `sampling` edges can't do without.

    Raises:
        PixelError: the region isn't inside the image.
        ConfigError: `sampling` is uncertainty, where the pixels hang on answers; see `ask_frame`.
        ImageError: `sampling` is edges and there is no image.
    """
    count, region = points_asked(parameters, dialect), read_region(parameters.region)
    if not count:
        whole = whole and parameters.stride > 1
        return _strided(width, height, parameters.stride, region, parameters.organised, whole)
    if parameters.sampling == "uncertainty":
        raise ConfigError("sampling uncertainty chooses pixels by answers; they can't be told beforehand")
    if parameters.sampling == "edges":
        return Query(fixed(sample_pixels(width, height, count, "edges", region=region, image=image)))
    return _some(width, height, count, parameters.sampling, region)


@lru_cache(maxsize=4)
def _some(width: int, height: int, count: int, sampling: str, region: Region | None) -> Query:
    return Query(fixed(sample_pixels(width, height, count, sampling, region=region)))


@lru_cache(maxsize=4)
def _strided(width: int, height: int, stride: int, region: Region | None, organised: bool, whole: bool) -> Query:
    cloud = fixed(stride_pixels(width, height, stride, region))
    rows = len(np.unique(cloud[:, 1]))
    shape = (rows, len(cloud) // rows) if organised else None
    if not whole:
        return Query(cloud, None, shape)
    left, top, columns, _ = region or (0, 0, width, height)
    indices = fixed(((cloud[:, 1] - top) * columns + cloud[:, 0] - left).astype(np.intp))
    return Query(fixed(stride_pixels(width, height, 1, region)), indices, shape)


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
    image.reshape(-1)[places(result.pixels, width)] = result.depth_m
    return image


@remember(4)
def places(pixels: np.ndarray, width: int) -> np.ndarray:
    """(N,) where the pixels (N, 2) lie in a flattened image of this width."""
    u, v = pixels.astype(np.intp).T
    return v * width + u


def densified_image(answer: DepthResult, image: np.ndarray, parameters: Parameters) -> np.ndarray:
    """(H, W) float32 z-depth in metres, filled between the answers by `densify`.

    Args:
        answer: as the model gave it; what `keep_good` would leave out for its distance still says that the surface
            is far there, so it is left out of the image only.
        image: (H, W, 3) uint8 RGB that was asked about.
        parameters: `min_confidence`, `max_depth_m` and `region` count.
    """
    sure = answer.confidence >= parameters.min_confidence
    depth_m = densify(answer.pixels[sure], answer.depth_m[sure], answer.confidence[sure], image)
    if parameters.max_depth_m > 0:
        depth_m[depth_m > parameters.max_depth_m] = np.nan
    region = read_region(parameters.region)
    if region is not None:
        left, top, columns, rows = region
        inside = np.zeros(depth_m.shape, bool)
        inside[top : top + rows, left : left + columns] = True
        depth_m[~inside] = np.nan
    return depth_m
