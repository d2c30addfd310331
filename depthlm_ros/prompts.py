"""What is asked in each dialect, and how an answer is read.

The questions are the published strings, character for character: a fine-tuned model knows its own question only.

    marker        DepthLM (arXiv 2509.25413): a red arrow drawn into the image points at the pixel.
    coordinates   VLM3 (arXiv 2605.30561): the pixel stands in the text, scaled to [0, 2000).
    dense         DepthVLM (arXiv 2605.15876): one question, one depth map; no pixel is named.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Iterable

import numpy as np

from depthlm_ros.errors import DatasetError, PixelError

DIALECTS = ("dense", "coordinates", "marker")

# The system text of DepthLM's training data and of DepthVLM.
SYSTEM_TEXT = "You are a helpful assistant."

# VLM3's grid of text coordinates.
COORDINATE_RANGE = 2000

# DepthLM's curation keeps depths above 1e-4 m (ETH3D script); the furthest published label lies at 120 m
# (DepthVLM's ranges), so an answer beyond 10 km is a slip of the pen and not a distance.
MIN_DEPTH_M = 1e-4
MAX_DEPTH_M = 1e4

_FORMAT = (
    "Output the thinking process in <think> </think> and final answer (the meter number only, without the unit) "
    "in <answer> </answer> tags."
)
# Written without two adjacent digit loops, so that it stays linear on a megabyte of digits.
_NUMBER = re.compile(r"(?:[0-9]+(?:\.[0-9]+)?|\.[0-9]+)")
_OPEN, _CLOSE = "<answer>", "</answer>"


def marker_question() -> str:
    """The question of the marker dialect; the same for every pixel, since the arrow is in the image.

    Source: DepthLM's published prompt (training and evaluation).
    """
    return f"Given this image, how far is the point pointed by the red arrow from the camera? {_FORMAT}"


def coordinates_question(nx: int, ny: int, coordinate_range: int = COORDINATE_RANGE) -> str:
    """The question of the coordinates dialect about one pixel.

    Source: VLM3's published inference prompt. It says "[0, 2000]" where the data's own description says
    "[0, 2000)"; the prompt is kept as published and `normalise_pixel` keeps to the half-open range.

    Args:
        nx: column in normalised coordinates, an integer in [0, coordinate_range).
        ny: row in normalised coordinates, likewise.
        coordinate_range: the upper end named in the text; the published models know 2000.

    Raises:
        PixelError: a coordinate outside the range.
    """
    nx, ny = operator.index(nx), operator.index(ny)
    if not (0 <= nx < coordinate_range and 0 <= ny < coordinate_range):
        raise PixelError(
            f"normalised pixel ({nx}, {ny}) is outside [0, {coordinate_range}); make it with normalise_pixel()"
        )
    return (
        f"Given this image, how far is the point at coordinates ({nx}, {ny}) from the camera? The coordinates are in "
        f"normalised [0, {coordinate_range}] format relative to image width and height. {_FORMAT}"
    )


def normalise_pixel(
    pixels: np.ndarray, width: int, height: int, coordinate_range: int = COORDINATE_RANGE
) -> np.ndarray:
    """Scales pixels of the image the model sees to the integers of the coordinates dialect.

    `nx = round(u / width * 2000)`, halves to even as Python rounds: VLM3's published formula on the pixels of the
    resized image. By that formula `u = width` gives 2000, and so do the last columns of an image wider than 4000
    pixels; such values are clamped to 1999, so that the text stays in [0, 2000).

    Args:
        pixels: (N, 2) `(u, v)` in the image given to the model, integers at pixel centres.
        width: width of that image in pixels.
        height: height of that image in pixels.
        coordinate_range: number of steps along each side.

    Returns:
        (N, 2) int64 in [0, coordinate_range).

    Raises:
        PixelError: wrong shape, non-finite values, or a pixel more than one pixel outside the image.
    """
    pixels = np.asarray(pixels, dtype=np.float64)
    if pixels.ndim != 2 or pixels.shape[1] != 2:
        raise PixelError(f"pixels have shape {pixels.shape}; pass an (N, 2) array of (u, v)")
    size = np.array([width, height], dtype=np.float64)
    if not (size > 0).all():
        raise PixelError(f"image size {width}x{height} is not positive; pass the size of the image the model sees")
    # Written so that NaN counts as outside.
    outside = ~((pixels >= -1) & (pixels <= size)).all(axis=1)
    if outside.any():
        u, v = pixels[np.flatnonzero(outside)[0]]
        raise PixelError(
            f"pixel ({u:g}, {v:g}) is outside the {width}x{height} image; leave out pixels that the view doesn't show"
        )
    return np.clip(np.rint(pixels / size * coordinate_range), 0, coordinate_range - 1).astype(np.int64)


def dense_question() -> str:
    """The question of the dense dialect (DepthVLM's published prompt)."""
    return (
        "Given this image, estimate the metric depth (in meters, rounded to two decimal places) "
        "for every pixel of the image."
    )


def answer_text(depth_m: float) -> str:
    """The answer a model is trained to give: thinking, an empty line, the number.

    Source: DepthLM's published training target, two decimals at every distance.

    Args:
        depth_m: true depth in metres, of the kind the model's card names.

    Raises:
        DatasetError: a depth that the text can't carry: non-finite, below 5 mm or above `MAX_DEPTH_M`.
    """
    text = (
        f"<think> The point is around {depth_m:.2f} meters away from the camera. </think>\n\n"
        f"<answer> {depth_m:.2f} </answer>"
    )
    if parse_depth(text) is None:
        raise DatasetError(
            f"depth {depth_m!r} m can't be written with two decimals between 0.01 and {MAX_DEPTH_M:g} m; "
            "leave the point out"
        )
    return text


def parse_depth(text: str) -> float | None:
    """Reads the depth from an answer; never raises, whatever a model may write.

    The grammar: exactly one `<answer>` and one `</answer>` in the text, between them one plain decimal number
    ("2.42", "3", ".5") with white space around it, between `MIN_DEPTH_M` and `MAX_DEPTH_M`.

    It is the form that VLM3's published expression
    `<answer>\\s*([-+]?\\d*\\.?\\d+(?:[eE][-+]?\\d+)?)\\s*</answer>` reads, less what no depth needs: signs,
    exponents and digits of other scripts. A unit is refused too: the question asks for "the meter number only",
    the published expression refuses it, and whoever reads "2 m" has to decide about "2 cm" and "2 miles".
    Two answers are no answer, because nothing says which one is meant.

    Args:
        text: what the model wrote, special tokens removed.

    Returns:
        Metres, finite and positive, or None.
    """
    if text.count(_OPEN) != 1 or text.count(_CLOSE) != 1:
        return None
    body = text.partition(_OPEN)[2].partition(_CLOSE)
    number = body[0].strip()
    if not body[1] or _NUMBER.fullmatch(number) is None:
        return None
    depth_m = float(number)
    return depth_m if math.isfinite(depth_m) and MIN_DEPTH_M <= depth_m <= MAX_DEPTH_M else None


def parse_depths(texts: Iterable[str]) -> np.ndarray:
    """Reads many answers.

    Returns:
        (N,) float32 metres, NaN where `parse_depth` finds none.
    """
    depths = [parse_depth(text) for text in texts]
    return np.array([math.nan if depth is None else depth for depth in depths], dtype=np.float32)
