"""Depth made visible: dots on the image, coloured by depth on a logarithmic scale.

Near is red and far is blue (OpenCV's Turbo colour map). What has no answer is magenta, a colour that Turbo lacks.
"""

from __future__ import annotations

import cv2
import numpy as np

from depthlm_ros.errors import PixelError

NO_ANSWER = (255, 0, 255)
"""RGB of asked pixels without a depth."""


def depth_range(depth_m: np.ndarray) -> tuple[float, float]:
    """(near, far) in metres that hold all but the outermost 1 % of the finite depths; (1, 10) if there are none."""
    known = depth_m[np.isfinite(depth_m) & (depth_m > 0)]
    if not known.size:
        return 1.0, 10.0
    near, far = np.percentile(known, (1, 99))
    return float(near), float(max(far, near * 1.01))


def depth_colours(depth_m: np.ndarray, near_m: float, far_m: float) -> np.ndarray:
    """Colours depth on a logarithmic scale, clipped to [near_m, far_m].

    Args:
        depth_m: metres, any shape; NaN where unknown.
        near_m: this depth and what is nearer gets the map's red end.
        far_m: this depth and what is farther gets the map's blue end.

    Returns:
        (..., 3) uint8 RGB; `NO_ANSWER` where depth isn't finite and positive.

    Raises:
        PixelError: a range that isn't 0 < near_m < far_m.
    """
    if not 0 < near_m < far_m < np.inf:
        raise PixelError(f"depth range {near_m} to {far_m} m can't be coloured; it must be 0 < near < far")
    depth_m = np.asarray(depth_m, np.float32)
    known = np.isfinite(depth_m) & (depth_m > 0)
    nearness = np.log(far_m / np.where(known, depth_m, far_m)) / np.log(far_m / near_m)
    level = np.where(known, np.rint(np.clip(nearness, 0, 1) * 255), 256).astype(np.intp)
    return _palette()[level]


def overlay(
    image: np.ndarray,
    pixels: np.ndarray,
    depth_m: np.ndarray,
    *,
    radius_px: int | None = None,
    near_m: float | None = None,
    far_m: float | None = None,
    legend: bool = False,
) -> np.ndarray:
    """Draws the queried pixels as dots coloured by depth; where dots overlap the nearest point is on top.

    Args:
        image: (H, W, 3) uint8 RGB; left as it is.
        pixels: (N, 2) `(u, v)`; those outside the image are left out.
        depth_m: (N,) metres, NaN without an answer.
        radius_px: of the dots; None fits it to the density of the pixels (at most 5, 0 is a single pixel).
        near_m: red end of the scale; None takes it from `depth_range`.
        far_m: blue end of the scale; None takes it from `depth_range`.
        legend: whether to draw the scale with its ends in metres into the lower left corner.

    Returns:
        (H, W, 3) uint8 RGB, a new array.

    Raises:
        PixelError: arrays of different lengths or a range that can't be coloured.
    """
    n = len(pixels)
    if pixels.shape != (n, 2) or depth_m.shape != (n,):
        raise PixelError(f"pixels {pixels.shape} and depth {depth_m.shape} don't belong together; pass (N, 2) and (N,)")
    height, width = image.shape[:2]
    own_near, own_far = depth_range(depth_m)
    near_m = own_near if near_m is None else near_m
    far_m = max(own_far, near_m * 1.01) if far_m is None else far_m
    if radius_px is None:
        radius_px = int(np.clip(0.3 * np.sqrt(height * width / max(n, 1)), 0, 5))

    # Numpy's assignment lets the last of several equal indices win: far first, near last, unknown before all.
    order = np.argsort(np.where(np.isfinite(depth_m), -depth_m, -np.inf), kind="stable")
    span = np.arange(-radius_px, radius_px + 1)
    dv, du = np.argwhere(span[:, None] ** 2 + span**2 <= radius_px**2 + 1).T - radius_px
    centres = np.rint(pixels[order]).astype(np.int64)
    u = centres[:, :1] + du
    v = centres[:, 1:] + dv
    inside = (u >= 0) & (u < width) & (v >= 0) & (v < height)
    inside &= ((centres >= 0) & (centres < (width, height))).all(axis=1, keepdims=True)
    colours = depth_colours(depth_m, near_m, far_m)[order]
    drawn = np.array(image, order="C")
    drawn.reshape(-1, 3)[(v * width + u)[inside]] = np.broadcast_to(colours[:, None], (*u.shape, 3))[inside]
    if legend:
        _draw_legend(drawn, near_m, far_m)
    return drawn


def _palette() -> np.ndarray:
    """(257, 3) RGB: Turbo from far to near, then `NO_ANSWER`."""
    turbo = cv2.applyColorMap(np.arange(256, dtype=np.uint8)[:, None], cv2.COLORMAP_TURBO)[:, 0, ::-1]
    return np.concatenate([turbo, np.array([NO_ANSWER], np.uint8)])


def _draw_legend(image: np.ndarray, near_m: float, far_m: float) -> None:
    height, width = image.shape[:2]
    bar_height, bar_width = max(4, height // 60), min(160, width // 3)
    top, left = height - 2 * bar_height, bar_height
    if top < 0 or bar_width < 2:
        return
    image[top : top + bar_height, left : left + bar_width] = _palette()[np.linspace(255, 0, bar_width).astype(int)]
    scale = height / 960 + 0.15
    for text, u in ((f"{near_m:.2g} m", left), (f"{far_m:.2g} m", left + bar_width)):
        for colour, thickness in (((0, 0, 0), 3), ((255, 255, 255), 1)):
            cv2.putText(image, text, (u, top - bar_height // 2), cv2.FONT_HERSHEY_SIMPLEX, scale, colour, thickness)
