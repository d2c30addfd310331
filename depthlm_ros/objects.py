"""Questions about boxes in one image: VLM3's object-level task (arXiv 2605.30561), on SpatialRGPT-Bench's questions.

A question of SpatialRGPT names regions as `<mask>`; VLM3 writes a box in [0, 1000) instead:

    Can you confirm if <mask> is smaller than <mask>?
    Can you confirm if bounding box region (0, 39, 652, 999) is smaller than bounding box region (6, 380, 228, 562)?
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from depthlm_ros.errors import PixelError
from depthlm_ros.tasks import finite, mean_or_nan, strip_thinking

if TYPE_CHECKING:
    from depthlm_ros.camera import UnifiedView

# VLM3's sample data: coordinates are round(px / size * 1000), at most 999.
UNITS = 1000
REGION = "bounding box region ({x1}, {y1}, {x2}, {y2})"
MASK = "<mask>"

# VLM3's notebook decides by whichever of these words comes first.
_POSITIVE = r"yes|correct|affirmative|true|right|indeed"
_NEGATIVE = r"no|incorrect|wrong|false|not"
_YES_OR_NO = re.compile(rf"\b(?:(?P<yes>{_POSITIVE})|(?P<no>{_NEGATIVE}))\b", re.IGNORECASE)

_METRES = {
    r"m|meters?|metres?": 1.0,
    r"cm|centimeters?|centimetres?": 0.01,
    r"mm|millimeters?|millimetres?": 0.001,
    r"km|kilometers?|kilometres?": 1000.0,
    r"ft|foot|feet": 0.3048,
    r"inch|inches": 0.0254,
}
_UNITS = "|".join(_METRES)
# Digits after a comma are part of a larger number ("1,234 m"), which is refused rather than halved.
_NUMBER = r"(?<![0-9.,])((?:[0-9]+(?:\.[0-9]+)?|\.[0-9]+))"
_LENGTH = re.compile(rf"{_NUMBER}\s*({_UNITS})\b", re.IGNORECASE)
_DIRECTION = re.compile(rf"{_NUMBER}\s*(o'?\s?clock|degrees?|°)", re.IGNORECASE)


def normalise_boxes(boxes: np.ndarray, width: int, height: int) -> np.ndarray:
    """Scales boxes to the integers that stand in the text.

    Args:
        boxes: (N, 4) `(x1, y1, x2, y2)` in pixels of an image of this size, x1 <= x2 and y1 <= y2.
        width: columns of the image.
        height: rows of the image.

    Returns:
        (N, 4) int64, `round(px / size * 1000)` at most 999 (VLM3's sample data).

    Raises:
        PixelError: another shape, corners in another order, or a corner more than a pixel outside of the image.
    """
    boxes = np.asarray(boxes, np.float64)
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise PixelError(f"boxes have shape {boxes.shape}; pass an (N, 4) array of (x1, y1, x2, y2)")
    size = np.array([width, height, width, height], np.float64)
    # Written so that NaN counts as bad.
    good = ((boxes >= -1) & (boxes <= size)).all(axis=1) & (boxes[:, :2] <= boxes[:, 2:]).all(axis=1)
    if not good.all():
        box = tuple(boxes[np.flatnonzero(~good)[0]].tolist())
        raise PixelError(
            f"box {box} isn't one of the {width}x{height} image; pass (x1, y1, x2, y2) with x1 <= x2 and y1 <= y2, "
            "in its pixels"
        )
    return np.clip(np.rint(boxes / size * UNITS), 0, UNITS - 1).astype(np.int64)


def shown_boxes(view: UnifiedView, boxes: np.ndarray) -> np.ndarray:
    """Boxes of the source image as they are named in a text about the view.

    Args:
        view: what the model sees.
        boxes: (N, 4) `(x1, y1, x2, y2)` in pixels of the source image.

    Returns:
        (N, 4) int64 as of `normalise_boxes`.

    Raises:
        PixelError: as `normalise_boxes`, or a box that the lens model can't place.
    """
    source = view.source
    normalised = normalise_boxes(boxes, source.width, source.height)
    if view.policy == "published" and source.distortion.is_identity:
        # The published rule reads the image as it was before the resize.
        return normalised
    # The view may be padded or undistorted: what the box becomes there is spanned by points around its border.
    x1, y1, x2, y2 = (np.asarray(boxes, np.float64)[:, i, None] for i in range(4))
    along = np.linspace(0, 1, 17)
    across, down = x1 + (x2 - x1) * along, y1 + (y2 - y1) * along
    u = np.concatenate([across, across, np.broadcast_to(x1, down.shape), np.broadcast_to(x2, down.shape)], axis=1)
    v = np.concatenate([np.broadcast_to(y1, across.shape), np.broadcast_to(y2, across.shape), down, down], axis=1)
    border = np.clip(np.stack([u, v], axis=-1), 0, (source.width - 1, source.height - 1))
    at = view.from_source(border.reshape(-1, 2)).reshape(border.shape)
    seen = np.isfinite(at).all(axis=(1, 2))
    if not seen.all():
        box = tuple(np.asarray(boxes)[np.flatnonzero(~seen)[0]].tolist())
        raise PixelError(f"box {box} reaches beyond what the lens model can place; ask about a smaller one")
    width, height = view.camera.width, view.camera.height
    spanned = np.concatenate([at.min(axis=1), at.max(axis=1)], axis=1)
    return normalise_boxes(np.clip(spanned, 0, (width - 1, height - 1) * 2), width, height)


def region_text(box: Sequence[int]) -> str:
    """How a box is named in questions and answers.

    Args:
        box: `(x1, y1, x2, y2)` of `normalise_boxes`.
    """
    x1, y1, x2, y2 = (int(value) for value in box)
    return REGION.format(x1=x1, y1=y1, x2=x2, y2=y2)


def object_question(question: str, boxes: np.ndarray) -> str:
    """Writes boxes into a question of SpatialRGPT's form.

    Args:
        question: with a `<mask>` for each box; `<image>` at its beginning is left out.
        boxes: (N, 4) of `normalise_boxes`, in the order of the masks.

    Raises:
        PixelError: as many boxes as masks weren't given.
    """
    parts = question.strip().removeprefix("<image>").strip().split(MASK)
    if len(parts) - 1 != len(boxes):
        raise PixelError(
            f"the question has {len(parts) - 1} {MASK} for {len(boxes)} boxes; write one {MASK} where each box is meant"
        )
    regions = [region_text(box) for box in boxes]
    return parts[0] + "".join(region + part for region, part in zip(regions, parts[1:], strict=True))


def object_answer(answer: str, boxes: np.ndarray) -> str:
    """Writes boxes into a true answer of SpatialRGPT's form, which names them `Region [i]`.

    Raises:
        PixelError: a region that has no box.
    """

    def named(region: re.Match[str]) -> str:
        index = int(region.group(1))
        if index >= len(boxes):
            raise PixelError(f"the answer names {region.group(0)} but {len(boxes)} boxes were given")
        return region_text(boxes[index])

    return re.sub(r"Region \[([0-9]{1,9})\]", named, answer)


def parse_yes_no(text: str) -> bool | None:
    """Whether an answer agrees: the first word of the published lists decides; None where there is none."""
    found = _YES_OR_NO.search(strip_thinking(text))
    return None if found is None else found.group("yes") is not None


def parse_length_m(text: str) -> float | None:
    """The first length with a unit in an answer, in metres; None where there is none.

    SpatialRGPT-Bench's answers come in metres, centimetres, feet and inches. Numbers without a unit, such as those of
    a box, aren't lengths.
    """
    found = _LENGTH.search(strip_thinking(text))
    values = finite(found.group(1)) if found else None
    if not found or not values:
        return None
    metres = next(m for unit, m in _METRES.items() if re.fullmatch(unit, found.group(2), re.IGNORECASE))
    length = values[0] * metres
    return length if math.isfinite(length) else None


def parse_direction_deg(text: str) -> float | None:
    """The first direction in an answer, in [0, 360) degrees clockwise; 3 o'clock is 90; None where there is none."""
    found = _DIRECTION.search(strip_thinking(text))
    values = finite(found.group(1)) if found else None
    if not found or not values:
        return None
    return values[0] * (30 if found.group(2)[0] in "oO" else 1) % 360


@dataclass(frozen=True)
class QuantityScore:
    """How well lengths were told.

    Attributes:
        within_25: share of all questions whose answer lies within 25 % of the truth.
        abs_rel: mean of |said - true| / true over the answered ones, NaN without any.
        answered: questions with a length in their answer.
        total: questions.
    """

    within_25: float
    abs_rel: float
    answered: int
    total: int


def qualitative_accuracy(said: Sequence[bool | None], true: Sequence[bool]) -> float:
    """Share of yes-or-no questions answered right; no answer is a wrong one. NaN without questions."""
    return mean_or_nan([float(a is not None and a == b) for a, b in zip(said, true, strict=True)])


def quantitative_score(said_m: np.ndarray, true_m: np.ndarray) -> QuantityScore:
    """Scores lengths as SpatialRGPT-Bench does: within 25 % of the truth, and the relative error.

    Args:
        said_m: (N,) metres, NaN where unparsed; such rows count as wrong.
        true_m: (N,) metres, positive.
    """
    said, true = np.asarray(said_m, np.float64), np.asarray(true_m, np.float64)
    error = np.abs(said - true) / true
    answered = np.isfinite(error)
    within = mean_or_nan((answered & (error <= 0.25)).astype(float))
    return QuantityScore(within, mean_or_nan(error), int(answered.sum()), len(true))


def direction_error_deg(said_deg: np.ndarray, true_deg: np.ndarray) -> np.ndarray:
    """(N,) angle between directions, in [0, 180]; NaN where unparsed."""
    return np.abs((np.asarray(said_deg, np.float64) - np.asarray(true_deg, np.float64) + 180) % 360 - 180)
