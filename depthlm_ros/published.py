"""What the released weights saw: the preprocessing of the published programs, step by step.

Whole numbers are rounded where and how the authors' programs round them, sizes and pixels hang on it.

| | DepthLM, VLM3 | DepthVLM |
|---|---|---|
| size | int(W f / fx), int(H f / fx) | round(W f / fx), round(H f / fx), then multiples of 28 |
| resampling | bicubic | bilinear, then bicubic |
| pixel | truncated | read off by pixel area; `readout_pixels` has the authors' way |

Each ends with the model's own image processor, which resamples once more.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from depthlm_ros.errors import CameraError

if TYPE_CHECKING:
    from depthlm_ros.camera import Camera

# 64 megapixels: no model reads more, and a wrong focal length shouldn't fill the memory.
MAX_VIEW_PIXELS = 1 << 26
# qwen_vl_utils 0.0.14, `process_vision_info` with its default patches of 14 pixels, which DepthVLM leaves as it is
# although its model has patches of 16.
UTILS_MULTIPLE = 28
UTILS_MIN_PIXELS = 4 * UTILS_MULTIPLE**2
UTILS_MAX_PIXELS = 16384 * UTILS_MULTIPLE**2
UTILS_MAX_RATIO = 200


def published_view(image: np.ndarray, camera: Camera, focal_px: float, system: str) -> tuple[np.ndarray, Camera]:
    """The image as a published program hands it to its processor, and that image's camera.

    Args:
        image: (H, W, 3) uint8 RGB without lens distortion; none of the authors' images had any.
        camera: its intrinsics.
        focal_px: the model's focal length.
        system: "depthvlm"; all others are DepthLM's way.

    Raises:
        CameraError: the image would be empty, have too many pixels, or be too narrow for the program.
    """
    if system == "depthvlm":
        return _depthvlm_view(image, camera, focal_px)
    return _depthlm_view(image, camera, focal_px)


def published_pose_image(image: np.ndarray, camera: Camera, focal_px: float) -> np.ndarray:
    """An image at the focal length of VLM3's pose questions, (H', W', 3) uint8.

    Its sample data has fx = fy = 750 there (1752x1168 became 2830x1884, each side by its own focal length), unlike in
    its other tasks, which scale by fx alone.

    Args:
        image: (H, W, 3) uint8 RGB without lens distortion.
        camera: its intrinsics.
        focal_px: VLM3's of this task.

    Raises:
        CameraError: the camera is another image's, or the result would be empty or have too many pixels.
    """
    if image.shape[:2] != (camera.height, camera.width):
        raise CameraError(
            f"the image is {image.shape[1]}x{image.shape[0]} but its camera is {camera.width}x{camera.height}; "
            "pass the intrinsics of this image"
        )
    size = int(camera.width * (focal_px / camera.fx)), int(camera.height * (focal_px / camera.fy))
    check_size(*size, camera, focal_px, MAX_VIEW_PIXELS)
    return np.asarray(_picture(image).resize(size, Image.Resampling.BICUBIC))


def check_size(width: int, height: int, camera: Camera, focal_px: float, max_pixels: int) -> None:
    """Refuses sizes that come from a wrong focal length.

    Raises:
        CameraError: no pixels or more than `max_pixels`.
    """
    if width < 1 or height < 1 or width * height > max_pixels:
        raise CameraError(
            f"at a focal length of {focal_px:g} px this {camera.width}x{camera.height} image with fx "
            f"{camera.fx:g} px becomes {width}x{height}; the limit is 1 to {max_pixels} pixels. Check the unit of "
            "the intrinsics (pixels), or crop the image and its camera to the region of interest"
        )


def authors_intrinsics(camera: Camera) -> tuple[float, float, float, float]:
    """fx, fy, cx, cy as they leave DepthLM's undistort step: the same but for the last bit.

    Where fx and fy differ by more than 1e-3 the authors pass K through cv2.getOptimalNewCameraMatrix with zero
    coefficients and alpha = 1, which fits the frame to the undistorted border. In OpenCV 4.10 to 5.0 that is
    the identity with these roundings (4.5 scaled by (W - 1) / W); truncated pixels and sizes can hang on them.
    """
    if abs(camera.fx - camera.fy) <= 1e-3 or camera.width == 1 or camera.height == 1:
        return camera.fx, camera.fy, camera.cx, camera.cy
    per_px_x, per_px_y = 1 / camera.fx, 1 / camera.fy
    left, right = -camera.cx * per_px_x, (camera.width - 1 - camera.cx) * per_px_x
    top, bottom = -camera.cy * per_px_y, (camera.height - 1 - camera.cy) * per_px_y
    fx, fy = (camera.width - 1) / (right - left), (camera.height - 1) / (bottom - top)
    return fx, fy, -fx * left, -fy * top


def canonical_size(camera: Camera, focal_px: float) -> tuple[int, int]:
    """DepthVLM's (width, height): both sides by fx; halves go to the even number, as Python rounds."""
    scale = focal_px / camera.fx
    return round(camera.width * scale), round(camera.height * scale)


def utils_size(width: int, height: int) -> tuple[int, int]:
    """The (width, height) that qwen_vl_utils makes of an image: multiples of 28 within its limits of pixels.

    Raises:
        CameraError: one side is more than 200 times the other.
    """
    if max(width, height) > UTILS_MAX_RATIO * min(width, height):
        raise CameraError(
            f"an image of {width}x{height} is too narrow for DepthVLM's preprocessing, which takes sides up to "
            f"{UTILS_MAX_RATIO}:1; crop the image and its camera, or use the policy 'exact'"
        )
    sides = (width, height)
    snapped = tuple(max(UTILS_MULTIPLE, round(side / UTILS_MULTIPLE) * UTILS_MULTIPLE) for side in sides)
    if snapped[0] * snapped[1] > UTILS_MAX_PIXELS:
        shrink = math.sqrt(height * width / UTILS_MAX_PIXELS)
        snapped = tuple(math.floor(side / shrink / UTILS_MULTIPLE) * UTILS_MULTIPLE for side in sides)
    elif snapped[0] * snapped[1] < UTILS_MIN_PIXELS:
        grow = math.sqrt(UTILS_MIN_PIXELS / (height * width))
        snapped = tuple(math.ceil(side * grow / UTILS_MULTIPLE) * UTILS_MULTIPLE for side in sides)
    return snapped


def readout_pixels(pixels: np.ndarray, camera: Camera, focal_px: float) -> np.ndarray:
    """Where DepthVLM's evaluation reads its map: (N, 2) whole numbers, rounded pixels of the canonical image.

    The map has the processor's size instead, 1216 columns where the canonical image of NYU has 1233, so towards
    the right and bottom its program reads up to half a token beside the pixel, and skips what is off the map. This
    is for comparing scores; depth that is meant is read with `UnifiedView.from_source`.

    Args:
        pixels: (N, 2) `(u, v)` of the image without distortion.
        camera: of that image.
        focal_px: the model's focal length.
    """
    gain = np.array(canonical_size(camera, focal_px)) / (camera.width, camera.height)
    return np.round(np.asarray(pixels, np.float64) * gain)


def _depthlm_view(image: np.ndarray, camera: Camera, focal_px: float) -> tuple[np.ndarray, Camera]:
    fx, fy, cx, cy = authors_intrinsics(camera)
    scale = focal_px / fx
    width, height = int(camera.width * scale), int(camera.height * scale)
    check_size(width, height, camera, focal_px, MAX_VIEW_PIXELS)
    resized = _picture(image).resize((width, height), Image.Resampling.BICUBIC)
    scaled = replace(
        camera, fx=fx * scale, fy=fy * scale, cx=cx * scale, cy=cy * scale, width=width, height=height
    )  # fmt: skip
    return np.asarray(resized), scaled


def _depthvlm_view(image: np.ndarray, camera: Camera, focal_px: float) -> tuple[np.ndarray, Camera]:
    canonical = canonical_size(camera, focal_px)
    check_size(*canonical, camera, focal_px, MAX_VIEW_PIXELS)
    width, height = utils_size(*canonical)
    # Two resamplings where one would do, because the weights saw two. `resize` leaves its own size alone.
    resized = _picture(image).resize(canonical, Image.Resampling.BILINEAR)
    resized = resized.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(resized), camera.scaled(width / camera.width, height / camera.height)


def _picture(image: np.ndarray) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(image))
