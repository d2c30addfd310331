"""DepthLM's marker: an arrow "-->" whose tip is one pixel left of the point asked for.

Nine pixels in pure red, the target itself untouched: a shaft of five and a head of two pairs
(DepthLM_Official, utils/datasets.py, `cross_size = 5`, thickness 1).
"""

from __future__ import annotations

import numpy as np

from depthlm_ros.errors import ImageError, PixelError

ARROW_COLOUR = (255, 0, 0)
# Points closer than this to the border are left out by the authors, although the arrow needs less on three sides.
MARGIN_PX = 5
ARROW_OFFSETS = np.array([(-1, 0), (-2, 0), (-3, 0), (-4, 0), (-5, 0), (-2, -1), (-2, 1), (-3, -2), (-3, 2)])


def drawable(pixels: np.ndarray, width: int, height: int) -> np.ndarray:
    """Which pixels can carry the arrow: 5 <= u < width - 5 and 5 <= v < height - 5.

    Args:
        pixels: (N, 2) `(u, v)` of the image to be drawn on; NaN rows can't carry one.
        width: columns of that image.
        height: rows of that image.

    Returns:
        (N,) bool.
    """
    pixels = np.asarray(pixels)
    if pixels.ndim != 2 or pixels.shape[1] != 2:
        raise PixelError(f"pixels have shape {pixels.shape}; pass an (N, 2) array of (u, v)")
    return ((pixels >= MARGIN_PX) & (pixels < (width - MARGIN_PX, height - MARGIN_PX))).all(axis=1)


def arrow_patch(image: np.ndarray, pixel: tuple[int, int]) -> tuple[int, int, np.ndarray]:
    """The part of the image that `draw_arrow` changes, with the arrow in it.

    Args:
        image: (H, W, 3) uint8 RGB, already unified.
        pixel: `(u, v)`, whole numbers.

    Returns:
        Row and column of its upper left corner, and (5, 5, 3) uint8 pixels; pasted there they give what `draw_arrow`
        draws.

    Raises:
        ImageError, PixelError: as in `draw_arrow`.
    """
    u, v = _checked_target(image, pixel)
    (left, top), (right, bottom) = ARROW_OFFSETS.min(0) + (u, v), ARROW_OFFSETS.max(0) + (u, v)
    block = image[top : bottom + 1, left : right + 1].copy()
    columns, rows = (ARROW_OFFSETS - ARROW_OFFSETS.min(0)).T
    block[rows, columns] = ARROW_COLOUR
    return int(top), int(left), block


def paste(image: np.ndarray, block: tuple[int, int, np.ndarray]) -> np.ndarray:
    """A copy of the image with a block in it.

    Args:
        image: (H, W, 3) uint8 RGB.
        block: row and column of its upper left corner, and its pixels, as of `arrow_patch`.
    """
    top, left, pixels = block
    drawn = image.copy()
    drawn[top : top + pixels.shape[0], left : left + pixels.shape[1]] = pixels
    return drawn


def draw_arrow(image: np.ndarray, pixel: tuple[int, int]) -> np.ndarray:
    """Returns a copy of the image with the arrow that points at a pixel.

    Args:
        image: (H, W, 3) uint8 RGB, already unified: the arrow is drawn last.
        pixel: `(u, v)`, whole numbers.

    Raises:
        ImageError: not an (H, W, 3) uint8 image.
        PixelError: a pixel that isn't whole or too close to the border (see `drawable`).
    """
    columns, rows = (_checked_target(image, pixel) + ARROW_OFFSETS).T
    marked = image.copy()
    marked[rows, columns] = ARROW_COLOUR
    return marked


def _checked_target(image: np.ndarray, pixel: tuple[int, int]) -> np.ndarray:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ImageError(f"image is {image.dtype} of shape {image.shape}; pass (H, W, 3) uint8 RGB")
    height, width = image.shape[:2]
    target = np.asarray(pixel)
    if target.shape != (2,) or not drawable(target[None], width, height)[0] or (target != np.trunc(target)).any():
        raise PixelError(
            f"no arrow can be drawn at {tuple(target.tolist())} in a {width}x{height} image; pass whole numbers "
            f"at least {MARGIN_PX} px from the border"
        )
    return target.astype(np.intp)
