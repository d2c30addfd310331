"""Is a CameraInfo believable? Depth in metres is no better than the focal length that it says."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np

from depthlm_ros.camera import Camera, camera_from_info
from depthlm_ros.doctor.page import Finding, fail, note, ok, warn
from depthlm_ros.errors import CameraError

# Sensors have square pixels to well under 1 %; more is a stretched image or a calibration that went wrong.
SQUARE = 0.05
# Principal points of real lenses lie within a few percent of the middle; a crop that nobody told of moves them further.
CENTRED = 0.10
# Fields of view outside these are mistakes more often than lenses (degrees, across the width).
NARROW_DEG, WIDE_DEG, WIDEST_PINHOLE_DEG = 10.0, 120.0, 150.0
CALIBRATE = "calibrate the camera (ros2 run camera_calibration cameracalibrator) at this resolution"


def as_info(fields: Mapping[str, Any]) -> SimpleNamespace:
    """A CameraInfo of plain fields, as `listen.info_fields` tells them."""
    return SimpleNamespace(**{**fields, "roi": SimpleNamespace(**fields["roi"])})


def check_intrinsics(
    fields: Mapping[str, Any], image_size: tuple[int, int] | None, topic: str
) -> Iterable[Finding]:
    """Checks one CameraInfo.

    Args:
        fields: of the CameraInfo.
        image_size: (width, height) of the image beside it; None where none was seen.
        topic: of the image, or of the CameraInfo; its name tells whether it should be rectified.
    """
    info = as_info(fields)
    rectified = looks_rectified(info)
    named_rectified = is_rectified_topic(topic)
    size = image_size or described_size(info)
    try:
        camera = camera_from_info(info, size, rectified=named_rectified)
    except CameraError as error:
        told, _, remedy = str(error).partition("; ")
        yield fail(f"CameraInfo: {told}", remedy or CALIBRATE)
        return
    yield ok(
        f"{'P' if named_rectified else 'K'}: fx {camera.fx:.1f}, fy {camera.fy:.1f}, cx {camera.cx:.1f}, "
        f"cy {camera.cy:.1f} for {camera.width}x{camera.height}, {_view(camera):.0f} degrees across; distortion: "
        f"{'removed' if named_rectified else camera.distortion.model}"
    )
    yield from _numbers(camera)
    yield from _lens(camera, info, named_rectified, rectified)
    yield from _window(info)


def is_rectified_topic(topic: str) -> bool:
    """Whether a topic's name says that its images are rectified, as image_proc names them (image_rect_color)."""
    return "image_rect" in topic


def described_size(info: Any) -> tuple[int, int]:
    """(width, height) of the image that a CameraInfo says it belongs to, region and binning applied."""
    roi = info.roi
    width, height = (roi.width, roi.height) if roi.width or roi.height else (info.width, info.height)
    return width // max(1, info.binning_x), height // max(1, info.binning_y)


def looks_rectified(info: Any) -> bool:
    """Whether K and P say the same and there is no distortion left."""
    k, p = np.asarray(info.k, float), np.asarray(info.p, float)
    if k.size != 9 or p.size != 12 or not p[0]:
        return False
    return not any(info.d) and np.allclose(p[[0, 5, 2, 6]], k[[0, 4, 2, 5]], rtol=1e-3, atol=0.5)


def _numbers(camera: Camera) -> Iterable[Finding]:
    ratio = camera.fx / camera.fy
    if abs(ratio - 1) > SQUARE:
        yield warn(
            f"fx and fy differ by {abs(ratio - 1):.0%}: pixels that aren't square, or an image that was stretched",
            f"publish the sensor's own shape of image; if it is not stretched, {CALIBRATE}",
        )
    off = ((camera.cx + 0.5) / camera.width - 0.5, (camera.cy + 0.5) / camera.height - 0.5)
    if max(map(abs, off)) > CENTRED:
        told = f"the principal point is {off[0]:+.0%} of the width and {off[1]:+.0%} of the height off the middle"
        scale = 2 * (camera.cx + 0.5) / camera.width
        if all(abs(2 * (0.5 + each) - scale) < 0.2 for each in off) and not 0.75 < scale < 1.25:
            told += f"; K fits an image {scale:.2g} times as large"
        yield warn(told, "scale K to the published size, set roi or binning where the driver crops, or calibrate again")
    view = _view(camera)
    if not NARROW_DEG <= view <= WIDE_DEG:
        pinhole = camera.distortion.model != "equidistant" and view > WIDEST_PINHOLE_DEG
        yield (warn if view < NARROW_DEG or pinhole else note)(
            f"a field of view of {view:.0f} degrees is unusual",
            f"compare with the lens' data sheet; if it differs, {CALIBRATE}",
        )
    if camera.fx == camera.fy and camera.cx * 2 in (camera.width, camera.width - 1) and camera.fx in (
        camera.width, camera.height, camera.width / 2, 1.0
    ):
        yield warn("K looks made up: the focal length is exactly a size of the image",
                   f"a wrong focal length makes every depth wrong by the same factor; {CALIBRATE}")  # fmt: skip


def _lens(camera: Camera, info: Any, named_rectified: bool, rectified: bool) -> Iterable[Finding]:
    if named_rectified and not rectified and any(info.d):
        yield note("the topic's name says rectified and D is not zero: P is used, as it should be",
                   "run depth_node with rectified:=true on this topic")  # fmt: skip
    elif named_rectified:
        yield note("the image is rectified by its name", "run depth_node with rectified:=true on this topic")
    elif rectified and not any(info.d):
        yield note(
            "no distortion at all: a simulator, a rectified image, or a driver without a calibration",
            "if straight edges are bent in the image, calibrate the lens; a rectified image wants rectified:=true",
        )
    elif not np.isfinite(camera.rays(_corners(camera))).all():
        yield warn(
            f"the lens model ({info.distortion_model}) breaks down before the corners of the image: no depth there",
            "calibrate again with the board near all corners; wide lenses want rational_polynomial or equidistant",
        )
    p = np.asarray(info.p, float)
    if p.size == 12 and p[0] and p[3]:
        yield note(f"P holds a stereo baseline of {-p[3] / p[0]:.3f} m: the second camera of a pair")


def _window(info: Any) -> Iterable[Finding]:
    roi = info.roi
    if max(info.binning_x, info.binning_y) > 1:
        yield note(f"binning {info.binning_x}x{info.binning_y} is applied to K")
    if (roi.width or roi.height) and (roi.width, roi.height) != (info.width, info.height):
        yield note(f"region of interest {roi.width}x{roi.height} at ({roi.x_offset}, {roi.y_offset}) is applied to K")


def _corners(camera: Camera) -> np.ndarray:
    right, bottom = camera.width - 1, camera.height - 1
    return np.array([[0, 0], [right, 0], [0, bottom], [right, bottom]], float)


def _view(camera: Camera) -> float:
    """Angle in degrees between the middles of the left and the right side, lens included where its model reaches."""
    row = camera.height / 2 - 0.5
    rays = camera.rays(np.array([[0.0, row], [camera.width - 1.0, row]]))
    if np.isfinite(rays).all():
        left, right = rays / np.linalg.norm(rays, axis=1, keepdims=True)
        return math.degrees(math.acos(float(np.clip(left @ right, -1, 1))))
    return math.degrees(2 * math.atan(camera.width / (2 * camera.fx)))
