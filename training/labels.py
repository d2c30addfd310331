"""Labels of the dense head: each known depth at the place of the head's map where the camera saw it.

A label is neither moved to a pixel's centre nor resized. DepthVLM shrinks its sparse maps with a nearest-neighbour
resize, which keeps a third of a LiDAR's points; here all of them count, read between the map's pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from depthlm_ros.camera import Camera
from depthlm_ros.depth import DEPTH_KINDS
from depthlm_ros.errors import ConfigError, unknown_choice
from depthlm_ros.published import canonical_size
from depthlm_ros.unify import UnifiedView, undistorted_pixels

# Metres that count in DepthVLM's data sets (its `utils/datasets.py`), which it tells by parts of file names.
PUBLISHED_RANGES_M = {
    "argoverse": (0.05, 120.0), "waymo": (0.05, 70.0), "nuscenes": (0.05, 80.0), "ddad": (0.05, 120.0),
    "scannetpp": (0.001, 10.0), "taskonomy": (0.005, 15.0), "hm3d": (0.01, 10.0), "matterport": (0.01, 10.0),
    "sunrgbd": (0.005, 8.0), "ibims": (0.005, 25.0), "nyuv2": (0.005, 10.0), "eth3d": (0.01, 50.0),
}  # fmt: skip
READOUTS = ("exact", "published")


@dataclass(frozen=True)
class Labels:
    """What is known of one image's depth.

    Attributes:
        places: (N, 2) float32 `(u, v)` on the head's map, whole numbers at its pixels' centres.
        depth_m: (N,) float32 of the kind that the model answers.
        grid: (h, w) int32, the label's number in each cell of the source image, -1 where there is none: who is whose
            neighbour. A cell is a pixel where labels are dense, and wide enough to hold one on average where not.
    """

    places: np.ndarray
    depth_m: np.ndarray
    grid: np.ndarray

    def __len__(self) -> int:
        return len(self.depth_m)


def range_m(limits: str | tuple[float, float] | list[float] | None) -> tuple[float, float]:
    """Nearest and farthest depth that counts, from what a configuration says.

    Args:
        limits: the name of one of DepthVLM's data sets, two numbers in metres, or None for no limits.

    Raises:
        ConfigError: an unknown name, or numbers that aren't a range.
    """
    if limits is None:
        return 0.0, float("inf")
    if isinstance(limits, str):
        if limits not in PUBLISHED_RANGES_M:
            raise ConfigError(unknown_choice("range", limits, PUBLISHED_RANGES_M))
        return PUBLISHED_RANGES_M[limits]
    if len(limits) != 2 or not 0 <= limits[0] < limits[1]:
        raise ConfigError(f"range {limits!r}; give the nearest and the farthest depth in metres, such as [0.05, 80]")
    return float(limits[0]), float(limits[1])


def place_labels(
    view: UnifiedView,
    pixels: np.ndarray,
    depth_m: np.ndarray,
    map_size: tuple[int, int],
    *,
    depth_kind: str = "z",
    readout: str = "exact",
    focal_px: float | None = None,
) -> Labels:
    """Puts an image's labels on the map that the head makes of its view.

    Args:
        view: what the model is shown.
        pixels: (N, 2) labelled `(u, v)` of the source image; those that the view doesn't show are left out.
        depth_m: (N,) z-depth in metres.
        map_size: (width, height) of the head's map, the processor's final size.
        depth_kind: what the model answers, "z" or "euclidean".
        readout: "exact", where `Estimator` reads the map; or "published", as DepthVLM's training does: whole pixels of
            the canonical image, the map stretched to it corner to corner.
        focal_px: the model's, for "published".
    """
    camera = view.source
    if readout == "published":
        places = _published_places(camera, pixels, canonical_size(camera, focal_px), map_size)
        shown = np.isfinite(places).all(axis=1)
    else:
        at = view.from_source(pixels)
        shown = view.inside(at)
        gain = np.array(map_size) / (view.camera.width, view.camera.height)
        places = (at + 0.5) * gain - 0.5
    pixels, places, depth_m = pixels[shown], places[shown], depth_m[shown]
    if DEPTH_KINDS[depth_kind] is not DEPTH_KINDS["z"]:
        depth_m = depth_m * np.linalg.norm(camera.rays(pixels), axis=1)
    grid = neighbour_grid(pixels, depth_m, (camera.width, camera.height))
    return Labels(places.astype(np.float32), depth_m.astype(np.float32), grid)


def neighbour_grid(pixels: np.ndarray, depth_m: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(h, w) int32 number of each cell's label, the nearest to the camera where there are several; -1 for none.

    Args:
        pixels: (N, 2) `(u, v)` of the source image.
        depth_m: (N,) metres.
        size: (width, height) of the source image.
    """
    width, height = size
    cell = max(1, int(np.sqrt(width * height / max(len(pixels), 1))))
    grid = np.full((-(-height // cell), -(-width // cell)), -1, np.int32)
    far_first = np.argsort(-depth_m, kind="stable").astype(np.int32)
    columns, rows = np.clip(np.floor((pixels[far_first] + 0.5) / cell).astype(int), 0, np.array(grid.shape[::-1]) - 1).T
    grid[rows, columns] = far_first
    return grid


def _published_places(
    camera: Camera, pixels: np.ndarray, canonical: tuple[int, int], map_size: tuple[int, int]
) -> np.ndarray:
    canonical, last = np.array(canonical), np.array(map_size) - 1
    whole = np.floor((undistorted_pixels(camera, pixels) + 0.5) * canonical / (camera.width, camera.height))
    inside = ((whole >= 0) & (whole < canonical)).all(axis=1, keepdims=True)
    return np.where(inside, whole * last / np.maximum(canonical - 1, 1), np.nan)
