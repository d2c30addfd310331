"""What is asked in each dialect, and how an answer is read.

The questions are the published strings, character for character: a fine-tuned model knows its own question only.

    marker        DepthLM (arXiv 2509.25413): a red arrow drawn into the image points at the pixel.
    coordinates   VLM3 (arXiv 2605.30561): the pixel stands in the text, scaled to [0, 2000).
    dense         DepthVLM (arXiv 2605.15876): one question, one depth map; no pixel is named.

Models trained by this project also know a question of its own, made to be cheap:

    compact       One sentence that never changes, then the pixel in three digits a coordinate; the bare number answers.

What is the same in every question about an image is computed once for all of them, so a point costs what comes after.
With a tokenizer of one token a digit, such as Qwen's, `512,034` and the answer's header are 12 tokens where the
published coordinates question has 75; `3.42` and its end are 5. Three digits, because a thousandth of an image is far
finer than a patch and [0, 1000) is what Qwen3-VL's own grounding speaks; always three, because digits that keep their
place are easier to learn. The pixel stands before the answer's header and not behind it, which would save five more:
this way any server that knows the chat template can ask.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Iterable, Sequence
from functools import lru_cache

import numpy as np

from depthlm_ros.errors import DatasetError, DialectError, PixelError

DIALECTS = ("dense", "coordinates", "marker", "compact")

# The system text of DepthLM's training data and of DepthVLM.
SYSTEM_TEXT = "You are a helpful assistant."

# VLM3's grid of text coordinates.
COORDINATE_RANGE = 2000

# Steps along each side in the compact dialect.
COMPACT_RANGE = 1000

# Where a number stands in an answer template, and where the number before it is repeated.
NUMBER, SAME = "{number}", "{same}"

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
# Most tokens of a number and what follows it, "10000.00 ", where every character is a token.
LONGEST_NUMBER = 9

_BETWEEN = re.compile("[ ,]")
_OPEN, _CLOSE = "<answer>", "</answer>"
_SENTENCE = f"<think> The point is around {NUMBER} meters away from the camera. </think>\n\n{_OPEN} {SAME} {_CLOSE}"


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
    nx, ny = _normalised(nx, ny, coordinate_range)
    return (
        f"Given this image, how far is the point at coordinates ({nx}, {ny}) from the camera? The coordinates are in "
        f"normalised [0, {coordinate_range}] format relative to image width and height. {_FORMAT}"
    )


def compact_question(nx: int, ny: int, coordinate_range: int = COMPACT_RANGE) -> str:
    """The question of the compact dialect about one pixel; the pixel is its very end.

    Args:
        nx: column in normalised coordinates, an integer in [0, coordinate_range).
        ny: row in normalised coordinates, likewise.
        coordinate_range: steps along each side, named in the text.

    Raises:
        PixelError: a coordinate outside the range.
    """
    return compact_questions([(nx, ny)], 1, coordinate_range)[0]


def compact_questions(
    pixels: Sequence[Sequence[int]], each: int = 1, coordinate_range: int = COMPACT_RANGE
) -> list[str]:
    """The questions of the compact dialect about many pixels, in their order.

    Args:
        pixels: (N, 2) integers `(nx, ny)` in normalised coordinates, [0, coordinate_range).
        each: pixels a question; the last question may have fewer.
        coordinate_range: steps along each side, named in the text.

    Returns:
        ceil(N / each) questions; the answer to one with k pixels is k numbers in their order.

    Raises:
        PixelError: a coordinate outside the range, or less than one pixel a question.
    """
    if each < 1:
        raise PixelError(f"{each} points a question; ask about at least 1")
    digits = len(str(coordinate_range - 1))
    checked = [_normalised(nx, ny, coordinate_range) for nx, ny in pixels]
    named = [f"{nx:0{digits}d},{ny:0{digits}d}" for nx, ny in checked]
    constant = (
        "Given this image, estimate the metric depth (in meters, rounded to two decimal places) at coordinates in "
        f"[0, {coordinate_range}): "
    )
    return [constant + " ".join(named[start : start + each]) for start in range(0, len(named), each)]


def _normalised(nx: int, ny: int, coordinate_range: int) -> tuple[int, int]:
    nx, ny = operator.index(nx), operator.index(ny)
    if not (0 <= nx < coordinate_range and 0 <= ny < coordinate_range):
        raise PixelError(
            f"normalised pixel ({nx}, {ny}) is outside [0, {coordinate_range}); make it with normalise_pixel()"
        )
    return nx, ny


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
    return _written(_SENTENCE, depth_m)


def compact_answer(depths_m: Iterable[float]) -> str:
    """The answer a model is trained to give in the compact dialect: "3.42", or "3.42 11.08" where two were asked.

    Args:
        depths_m: true depths in metres, of the kind the model's card names, in the order of the question's pixels.

    Raises:
        DatasetError: a depth that the text can't carry, as in `answer_text`.
    """
    return " ".join(_written(NUMBER, depth_m) for depth_m in depths_m)


def _written(template: str, depth_m: float) -> str:
    number = f"{depth_m:.2f}"
    if parse_compact(number) is None:
        raise DatasetError(
            f"depth {depth_m!r} m can't be written with two decimals between 0.01 and {MAX_DEPTH_M:g} m; "
            "leave the point out"
        )
    return template.replace(NUMBER, number).replace(SAME, number)


def answer_template(dialect: str, points: int = 1) -> str:
    """The answer that models of a dialect were trained to give, "{number}" in place of its number.

    An engine may expect it, and has to check it: a model can say something else. "{same}" stands where a sentence
    repeats its number; in the compact dialect each of `points` points has a number of its own.

    Args:
        dialect: one that answers in words.
        points: points asked in the question; more than one in the compact dialect only.

    Raises:
        DialectError: the dialect has no answer in words, or none about several points.
    """
    if dialect == "compact" and points >= 1:
        return " ".join([NUMBER] * points)
    if dialect not in ("coordinates", "marker") or points != 1:
        raise DialectError(
            f"dialect {dialect!r} has no answer in words about {points} points; choose coordinates or marker for one, "
            "compact for any number"
        )
    return _SENTENCE


# A frame's answers repeat each other, and those of the frame before.
@lru_cache(maxsize=4096)
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
    number, closed, _ = text.partition(_OPEN)[2].partition(_CLOSE)
    return parse_compact(number) if closed else None


def parse_compact(text: str) -> float | None:
    """Reads the depth from an answer of the compact dialect; never raises, whatever a model may write.

    The grammar: one number as `parse_depth` takes it between its tags, white space around it, and nothing else.

    Args:
        text: what the model wrote, special tokens removed.

    Returns:
        Metres, finite and positive, or None.
    """
    return _depth(text.strip())


def parse_compact_points(text: str, points: int) -> tuple[float, ...] | None:
    """Reads the answer to a question of the compact dialect about several points; never raises.

    The grammar: exactly `points` numbers with one space or one comma between two, white space around them all. One
    number too few, too many or out of bounds leaves nobody to say which point each of the others belongs to.

    Args:
        text: what the model wrote, special tokens removed.
        points: points asked in the question.

    Returns:
        `points` values in metres in the order of the question, or None for all.
    """
    numbers = _BETWEEN.split(text.strip())
    depths = [_depth(number) for number in numbers] if len(numbers) == points else [None]
    return None if None in depths else tuple(depths)


def _depth(number: str) -> float | None:
    if _NUMBER.fullmatch(number) is None:
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
