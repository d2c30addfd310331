"""Focal-length unification: every model was trained on images of one focal length, so it is shown such images.

Two policies. `published` is what released weights saw, each system's in its own way (`published.py`). `exact` has
fx' = fy' = the asked focal length, no distortion, one antialiased resample and a size that the model's processor
leaves alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING

import cv2
import numpy as np

from depthlm_ros.errors import CameraError, ConfigError, ImageError, unknown_choice
from depthlm_ros.lens import Distortion
from depthlm_ros.map_reading import MapReader
from depthlm_ros.published import MAX_VIEW_PIXELS, check_size, published_view
from depthlm_ros.remember import remember

if TYPE_CHECKING:
    from depthlm_ros.camera import Camera
    from depthlm_ros.engines.base import ImageGrid

POLICIES = ("published", "exact")

# A flat image of a wide lens grows with tan(angle); beyond 60 degrees off the axis it is mostly stretched edge.
MAX_VIEW_TANGENT = math.tan(math.radians(60.0))
# Sizes within a hundred-thousandth of a pixel of a whole number are that number.
_SIZE_TOLERANCE = 1e-5
# A remap that shrinks makes twice the view's size, which an antialiased resample halves. Reading every 1.5th source
# pixel folds nothing into what that keeps: frequencies up to 1/2 per pixel come out at 1/1.5 - 1/2 and above, the view
# ends at 1/6. A source that would be read more coarsely is reduced first.
_OVERSAMPLING = 2
_COARSEST_PX = 1.5
_NOWHERE = -10_000.0
_ROWS_AT_ONCE = 256


@dataclass(frozen=True)
class UnifiedView:
    """The image a model sees and how its pixels relate to the source image's.

    Attributes:
        image: (H', W', 3) uint8 RGB.
        camera: intrinsics of `image`, without distortion.
        policy: "published" or "exact".
        source: the camera of the image it was made from.
        system: whose way `published` is.
    """

    image: np.ndarray
    camera: Camera
    policy: str
    source: Camera
    system: str = "depthlm"

    def from_source(self, pixels: np.ndarray) -> np.ndarray:
        """Maps source pixels (N, 2) to view pixels (N, 2) float64.

        `exact`: sub-pixel, u' = (u + 0.5) f / fx - 0.5 for a lens without distortion. `published`: for DepthLM and
        VLM3 whole numbers, truncated toward zero like the authors'; for DepthVLM, which names no pixels to its
        model, sub-pixel by area, u' = (u + 0.5) W' / W - 0.5. NaN where the lens model has no ray.
        """
        return _place_in_view(self.source, self.camera, self.policy, self.system, pixels)

    def to_source(self, view_pixels: np.ndarray) -> np.ndarray:
        """Maps view pixels (N, 2) to source pixels (N, 2) float64 along the same ray, without truncation."""
        return self.source.project(self.camera.rays(view_pixels))

    def inside(self, view_pixels: np.ndarray) -> np.ndarray:
        """(N,) bool: view pixels that lie on the view; False for NaN."""
        return self.camera.contains(view_pixels)


def unify(
    image: np.ndarray,
    camera: Camera,
    focal_px: float,
    policy: str,
    grid: ImageGrid | None = None,
    system: str = "depthlm",
) -> UnifiedView:
    """Shows an image at the focal length that a model was trained with.

    `published` of DepthLM, and of all but DepthVLM: s = f / fx, size int(W s) x int(H s), Pillow's BICUBIC, all four
    intrinsics times s, so fy' stays unequal to f where fx and fy differ. The authors' undistort step before it
    passes zero coefficients and on OpenCV 4.10 to 5.0 returns the image byte for byte, so the image is left alone
    and only that step's rounding of K is kept.

    `published` of DepthVLM: bilinear to round(W s) x round(H s), then bicubic to multiples of 28, so fx' and fy'
    both differ from f a little.

    In both the authors' images had no lens distortion: a lens with distortion is undistorted first with unchanged
    K, and what falls outside of that frame can't be asked. `grid` isn't used: their processors resampled once
    more, and the engine's does.

    `exact`: a source pixel u lands on u' = (u + 0.5) f / fx - 0.5. The view covers the whole source, for a lens
    with distortion up to 60 degrees off the axis, and is filled up to a whole multiple of `grid.multiple` and
    to `grid.min_pixels` by repeating the last column and row. Inside the frame of an undistorted image, what
    the lens didn't see is black.

    Args:
        image: (H, W, 3) uint8 RGB.
        camera: intrinsics of `image`.
        focal_px: the model's focal length in pixels.
        policy: "published" or "exact".
        grid: the sizes that the model's processor leaves alone.
        system: "depthlm", "vlm3", "depthvlm" or "own", whose way `published` is.

    Raises:
        ImageError: not an (H, W, 3) uint8 image.
        CameraError: the camera is of another size, or the view would be empty or have too many pixels.
        ConfigError: an unknown policy or a focal length that isn't positive.
    """
    if policy not in POLICIES:
        raise ConfigError(unknown_choice("policy", policy, POLICIES))
    if not (math.isfinite(focal_px) and focal_px > 0):
        raise ConfigError(f"focal length {focal_px}; pass the model's unified focal length in pixels, above zero")
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ImageError(f"image is {image.dtype} of shape {image.shape}; pass (H, W, 3) uint8 RGB")
    if image.shape[:2] != (camera.height, camera.width):
        raise CameraError(
            f"the image is {image.shape[1]}x{image.shape[0]} but its camera is {camera.width}x{camera.height}; "
            "pass the intrinsics of this image"
        )
    if policy == "published":
        ideal = _without_distortion(camera)
        if not camera.distortion.is_identity:
            image = _remap(image, camera, ideal)
        return UnifiedView(*published_view(image, ideal, float(focal_px), system), policy, camera, system)
    view_camera, content = _exact_camera(camera, float(focal_px), grid)
    if camera.distortion.is_identity:
        # The last column and row of the view may reach over the source's edge by less than one view pixel.
        seen = _resize(image, (focal_px / camera.fx, focal_px / camera.fy), content)
    else:
        seen = _remap(image, camera, replace(view_camera, width=content[0], height=content[1]))
    right, bottom = view_camera.width - seen.shape[1], view_camera.height - seen.shape[0]
    if right or bottom:
        seen = cv2.copyMakeBorder(seen, 0, bottom, 0, right, cv2.BORDER_REPLICATE)
    return UnifiedView(seen, view_camera, policy, camera, system)


def sample_map(depth_map: np.ndarray, view_pixels: np.ndarray, method: str = "bilinear") -> np.ndarray:
    """Reads a map at sub-pixel places.

    Args:
        depth_map: (H, W); integer coordinates are its pixel centres.
        view_pixels: (N, 2) `(u, v)`; NaN rows and rows off the map give NaN.
        method: "nearest", or "bilinear", which is NaN where one of the values it weighs is NaN.

    Returns:
        (N,) float32.
    """
    if method not in ("bilinear", "nearest"):
        raise ConfigError(f"unknown sampling method {method!r}; use 'bilinear' or 'nearest'")
    height, width = depth_map.shape
    if method == "bilinear":
        return MapReader(view_pixels, width, height).read(depth_map)
    pixels = np.asarray(view_pixels, np.float64)
    on_map = ((pixels >= -0.5) & (pixels < (width - 0.5, height - 0.5))).all(axis=1)
    out = np.full(len(pixels), np.nan, np.float32)
    column, row = np.floor(pixels[on_map] + 0.5).astype(np.intp).T
    out[on_map] = depth_map[row, column]
    return out


@remember(4)
def _place_in_view(source: Camera, view: Camera, policy: str, system: str, pixels: np.ndarray) -> np.ndarray:
    if policy == "exact" or system == "depthvlm":
        return view.project(source.rays(pixels))
    ideal = undistorted_pixels(source, pixels)
    # The authors' own order of operations: the truncation makes the last bit matter.
    gain = np.array([view.fx / source.fx, view.fy / source.fy])
    return np.trunc((ideal - (source.cx, source.cy)) * gain + (view.cx, view.cy))


def undistorted_pixels(camera: Camera, pixels: np.ndarray) -> np.ndarray:
    """(N, 2) float64: pixels of the camera's image once its lens distortion is removed with unchanged K."""
    if camera.distortion.is_identity:
        return np.asarray(pixels, np.float64)
    return _without_distortion(camera).project(camera.rays(pixels))


def _without_distortion(camera: Camera) -> Camera:
    return replace(camera, distortion=Distortion())


@lru_cache(maxsize=16)
def _exact_camera(camera: Camera, focal_px: float, grid: ImageGrid | None) -> tuple[Camera, tuple[int, int]]:
    """The view's camera and the (width, height) of that part of it which shows the source."""
    left, top, right, bottom = _field(camera)
    content = tuple(math.ceil(span * focal_px - _SIZE_TOLERANCE) for span in (right - left, bottom - top))
    multiple, min_pixels, max_pixels = (1, 1, MAX_VIEW_PIXELS)
    if grid is not None:
        multiple, min_pixels, max_pixels = grid.multiple, grid.min_pixels, min(grid.max_pixels, MAX_VIEW_PIXELS)
    width, height = _filled_size(content, multiple, min_pixels)
    check_size(width, height, camera, focal_px, max_pixels)
    view_camera = replace(
        camera, fx=focal_px, fy=focal_px, cx=-left * focal_px - 0.5, cy=-top * focal_px - 0.5,
        width=width, height=height, distortion=Distortion(),
    )  # fmt: skip
    return view_camera, content


def _field(camera: Camera) -> tuple[float, float, float, float]:
    """Left, top, right, bottom of what the camera sees, as tangents (normalised coordinates)."""
    if camera.distortion.is_identity:
        corners = np.array([[-0.5, -0.5], [camera.width - 0.5, camera.height - 0.5]])
        (left, top), (right, bottom) = (corners - (camera.cx, camera.cy)) / (camera.fx, camera.fy)
        return left, top, right, bottom
    columns, rows = np.linspace(-0.5, camera.width - 0.5, 129), np.linspace(-0.5, camera.height - 0.5, 129)
    mesh = np.stack(np.meshgrid(columns, rows), axis=-1).reshape(-1, 2)
    # The extremes lie on the border, which is therefore read at every pixel, unless the lens ends before it.
    u, v = np.arange(camera.width + 1) - 0.5, np.arange(camera.height + 1) - 0.5
    border = [np.stack(np.broadcast_arrays(u, edge), axis=-1) for edge in (rows[0], rows[-1])]
    border += [np.stack(np.broadcast_arrays(edge, v), axis=-1) for edge in (columns[0], columns[-1])]
    seen = camera.rays(np.concatenate([mesh, *border]))[:, :2]
    seen = np.clip(seen[np.isfinite(seen).all(axis=1)], -MAX_VIEW_TANGENT, MAX_VIEW_TANGENT)
    if len(seen) == 0:
        raise CameraError(f"the lens model {camera.distortion} has no ray for any pixel; calibrate the camera again")
    return (*seen.min(axis=0), *seen.max(axis=0))


def _filled_size(content: tuple[int, int], multiple: int, min_pixels: int) -> tuple[int, int]:
    """The least whole multiples that hold the content and have enough pixels, growing the shorter side first."""
    width, height = (math.ceil(max(side, 1) / multiple) * multiple for side in content)
    while width * height < min_pixels:
        if width <= height:
            width += multiple
        else:
            height += multiple
    return width, height


def _resize(image: np.ndarray, scale: tuple[float, float], size: tuple[int, int]) -> np.ndarray:
    from depthlm_ros.engines.resampling import resize_bicubic

    return resize_bicubic(image, scale, size)


def _remap(image: np.ndarray, source: Camera, view: Camera) -> np.ndarray:
    """Samples a distorted image on the view's pixels; black where the source has none."""
    reduction, maps, samples = _remap_tables(source, view)
    if reduction != (1.0, 1.0):
        image = _resize(image, reduction, _reduced_size(source, reduction))
    out = cv2.remap(np.ascontiguousarray(image), *maps, cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT)
    return out if samples == 1 else _resize(out, (1 / samples, 1 / samples), (view.width, view.height))


@lru_cache(maxsize=4)
def _remap_tables(source: Camera, view: Camera) -> tuple[tuple[float, float], tuple[np.ndarray, np.ndarray], int]:
    """Factors by which the source is reduced first, fixed-point maps, and how many times the view's size they make."""
    shrink = source.fx / view.fx, source.fy / view.fy
    samples = 1 if max(shrink) <= 1 + _SIZE_TOLERANCE else _OVERSAMPLING
    coarse = max(shrink) > samples * _COARSEST_PX
    reduction = tuple(min(1.0, samples / each) if coarse else 1.0 for each in shrink)
    u = (np.arange(view.width * samples) + 0.5) / samples - 0.5
    v = (np.arange(view.height * samples) + 0.5) / samples - 0.5
    last = np.array(_reduced_size(source, reduction)) - 1
    places = np.empty((len(v), len(u), 2), np.float32)
    # In float64 a whole 12-megapixel map would take a gigabyte on its way.
    for start in range(0, len(v), _ROWS_AT_ONCE):
        at = source.project(view.rays(np.stack(np.meshgrid(u, v[start : start + _ROWS_AT_ONCE]), axis=-1)))
        seen = source.contains(at)
        at = np.clip((at + 0.5) * reduction - 0.5, 0, last)
        at[~seen] = _NOWHERE
        places[start : start + _ROWS_AT_ONCE] = at
    return reduction, cv2.convertMaps(places, None, cv2.CV_16SC2), samples


def _reduced_size(source: Camera, reduction: tuple[float, float]) -> tuple[int, int]:
    width, height = source.width * reduction[0], source.height * reduction[1]
    return math.ceil(width - _SIZE_TOLERANCE), math.ceil(height - _SIZE_TOLERANCE)
