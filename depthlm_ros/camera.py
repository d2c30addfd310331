"""The camera: from `sensor_msgs/CameraInfo` to rays and points.

Conventions: `(u, v)` = (column, row), integer values at pixel centres, so the image spans
[-0.5, width - 0.5]; X = (u - cx) Z / fx; the optical frame is x right, y down, z forward (REP 103).
Focal-length unification lives in `unify.py` and is offered from here too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from depthlm_ros.errors import CameraError, DistortionModelError, PixelError
from depthlm_ros.lens import Distortion
from depthlm_ros.remember import remember
from depthlm_ros.unify import UnifiedView, sample_map, unify

__all__ = ["Camera", "Distortion", "UnifiedView", "camera_from_info", "sample_map", "unify"]


@dataclass(frozen=True)
class Camera:
    """Intrinsics of one image. Hashable, so that maps can be cached for it.

    Attributes:
        fx: horizontal focal length in pixels.
        fy: vertical focal length in pixels.
        cx: column of the principal point.
        cy: row of the principal point.
        width: columns of the image.
        height: rows of the image.
        distortion: the lens; `Distortion()` for a rectified image.

    Raises:
        CameraError: a non-finite value, a focal length that isn't positive, an empty image.
    """

    fx: float
    fy: float
    cx: float
    cy: float
    width: int
    height: int
    distortion: Distortion = Distortion()

    def __post_init__(self) -> None:
        for name in ("fx", "fy", "cx", "cy"):
            value = float(getattr(self, name))
            object.__setattr__(self, name, value)
            if not math.isfinite(value):
                raise CameraError(f"{name} is {value}; pass finite intrinsics in pixels")
        for name in ("fx", "fy"):
            if getattr(self, name) <= 0:
                raise CameraError(f"{name} is {getattr(self, name)}; a focal length in pixels is above zero")
        for name in ("width", "height"):
            value = getattr(self, name)
            if int(value) != value or value < 1:
                raise CameraError(f"{name} is {value}; pass a whole number of pixels, at least 1")
            object.__setattr__(self, name, int(value))

    @property
    def matrix(self) -> np.ndarray:
        """(3, 3) float64 K."""
        return np.array([[self.fx, 0.0, self.cx], [0.0, self.fy, self.cy], [0.0, 0.0, 1.0]])

    def rays(self, pixels: np.ndarray) -> np.ndarray:
        """Directions through pixels with the lens' distortion removed.

        Args:
            pixels: (..., 2) `(u, v)`.

        Returns:
            (..., 3) float64 with z = 1; rows of NaN where no direction ends in the pixel (beyond the field
            in which the lens model is one-to-one, or 90 degrees and more off the axis).
        """
        pixels = _last_axis(pixels, 2, "pixels")
        xy = self.distortion.undistort((pixels - (self.cx, self.cy)) / (self.fx, self.fy))
        rays = np.ones((*xy.shape[:-1], 3))
        rays[..., :2] = xy
        rays[np.isnan(xy[..., 0])] = np.nan
        return rays

    def unproject(self, pixels: np.ndarray, z_m: np.ndarray) -> np.ndarray:
        """Points (..., 3) in metres in the optical frame at z-depth `z_m` (...) along pixels (..., 2)."""
        return self.rays(pixels) * np.asarray(z_m, np.float64)[..., None]

    def project(self, points: np.ndarray) -> np.ndarray:
        """Pixels (..., 2) of points (..., 3) in the optical frame, distortion applied.

        Rows are NaN for points that aren't in front of the camera or are beyond the lens model's field.
        Pixels outside the image are returned as they are.
        """
        points = _last_axis(points, 3, "points")
        z = np.where(points[..., 2] > 0, points[..., 2], np.nan)
        return self.distortion.distort(points[..., :2] / z[..., None]) * (self.fx, self.fy) + (self.cx, self.cy)

    @remember(8)
    def contains(self, pixels: np.ndarray) -> np.ndarray:
        """(...) bool: pixels (..., 2) that lie on the image's area; False for NaN."""
        pixels = _last_axis(pixels, 2, "pixels")
        return ((pixels >= -0.5) & (pixels < (self.width - 0.5, self.height - 0.5))).all(axis=-1)

    def cropped(self, x: int, y: int, width: int, height: int) -> Camera:
        """The camera of the window whose first pixel is (x, y); it must lie inside the image."""
        if x < 0 or y < 0 or x + width > self.width or y + height > self.height:
            raise CameraError(
                f"window at ({x}, {y}) of {width}x{height} leaves the {self.width}x{self.height} image; pass one inside"
            )
        return replace(self, cx=self.cx - x, cy=self.cy - y, width=width, height=height)

    def scaled(self, sx: float, sy: float) -> Camera:
        """The camera of an image resampled by these factors.

        Pixel areas are kept, as image libraries resize: u' = (u + 0.5) sx - 0.5. The size is rounded.
        """
        return replace(
            self, fx=self.fx * sx, fy=self.fy * sy, cx=(self.cx + 0.5) * sx - 0.5, cy=(self.cy + 0.5) * sy - 0.5,
            width=round(self.width * sx), height=round(self.height * sy),
        )  # fmt: skip


def _last_axis(values: np.ndarray, size: int, name: str) -> np.ndarray:
    values = np.asarray(values, np.float64)
    if values.ndim == 0 or values.shape[-1] != size:
        raise PixelError(f"{name} have shape {values.shape}; the last axis must have {size} values")
    return values


def camera_from_info(info: Any, image_size: tuple[int, int], rectified: bool) -> Camera:
    """Reads the intrinsics of one image from its CameraInfo.

    A rectified image is described by P and has no distortion; a raw one by K and D. Points come out in the
    frame of the camera that took the image, so the baseline in P[3] isn't used. Region of interest and
    binning are applied as image_geometry does (offset first, then everything divided by the binning, cx
    included), so that our clouds coincide with those of depth_image_proc.

    Args:
        info: a sensor_msgs/CameraInfo or anything with its fields.
        image_size: (width, height) of the image that came with it.
        rectified: whether the image is rectified (`image_rect*` topics).

    Raises:
        CameraError: uncalibrated (K[0] = 0), non-finite or negative intrinsics, or another size than the image's.
        DistortionModelError: an unknown lens model or a wrong number of coefficients (raw images only).
    """
    k, p = _numbers(info.k, 9, "K"), _numbers(info.p, 12, "P")
    if k[0] == 0.0:
        raise CameraError(
            "the camera is uncalibrated: CameraInfo.K[0] is 0; calibrate it (camera_calibration) or set the "
            "driver's camera_info_url to its calibration file"
        )
    name, values = ("P", p[[0, 5, 2, 6]]) if rectified else ("K", k[[0, 4, 2, 5]])
    if not np.isfinite(values).all():
        raise CameraError(f"CameraInfo.{name} has non-finite values {values.tolist()}; calibrate the camera again")
    if (values[:2] <= 0).any():
        raise CameraError(
            f"CameraInfo.{name} has focal lengths {values[:2].tolist()}; they must be above zero. "
            + ("If the image is raw, say so (rectified: false)" if rectified else "Calibrate the camera again")
        )
    distortion = Distortion() if rectified else _distortion(info)

    full = (int(info.width), int(info.height))
    roi = info.roi
    window = (int(roi.x_offset), int(roi.y_offset), int(roi.width), int(roi.height))
    if window[2] == 0 and window[3] == 0:
        window = (0, 0, *full)
    # Zero means the same as one: sensor_msgs/CameraInfo.
    binning = (max(1, int(info.binning_x)), max(1, int(info.binning_y)))
    size = (window[2] // binning[0], window[3] // binning[1])
    if size != tuple(image_size):
        raise CameraError(
            f"the image is {image_size[0]}x{image_size[1]} but CameraInfo describes {size[0]}x{size[1]} (full "
            f"resolution {full[0]}x{full[1]}, region of interest {window}, binning {binning}); use the camera_info "
            "topic beside this image, or scale the calibration to its size"
        )
    fx, fy, cx, cy = (float(value) for value in values)
    camera = Camera(fx, fy, cx, cy, *full, distortion).cropped(*window)
    return replace(
        camera, fx=camera.fx / binning[0], fy=camera.fy / binning[1], cx=camera.cx / binning[0],
        cy=camera.cy / binning[1], width=size[0], height=size[1],
    )  # fmt: skip


def _numbers(values: Any, count: int, name: str) -> np.ndarray:
    array = np.asarray(values, np.float64).reshape(-1)
    if array.size != count:
        raise CameraError(f"CameraInfo.{name} has {array.size} numbers, it must have {count}; correct the publisher")
    return array


def _distortion(info: Any) -> Distortion:
    coefficients = tuple(float(c) for c in info.d)
    model = info.distortion_model
    if not any(coefficients) and model == "":
        return Distortion()
    if model == "":
        raise DistortionModelError(
            f"CameraInfo.distortion_model is empty but D is {coefficients}; name the model (plumb_bob, "
            "rational_polynomial or equidistant) in the calibration file"
        )
    # Simulators publish plumb_bob with an empty D for a perfect lens; image_geometry reads it so too.
    if not coefficients and model in ("plumb_bob", "rational_polynomial"):
        return Distortion()
    distortion = Distortion(model, coefficients)
    return Distortion() if distortion.is_identity else distortion
