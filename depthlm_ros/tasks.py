"""What the rooms of the single tasks share: which tasks there are, how long answers get, how a text is read.

    objects.py          VLM3: questions about boxes in one image
    correspondence.py   VLM3: the pixel of image B that shows what a pixel of image A shows
    pose.py             VLM3: rotation and translation between two images
    motion.py           DepthLM's multi-task model: distances, speed, time, metres moved

Each of them holds the published questions character for character, reads answers without ever raising, and scores
them. They know texts and numbers only; `assistant.py` puts images, cameras and a model to them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import numpy as np

from depthlm_ros.errors import PixelError

# VLM3's notebook, longest answer in tokens.
OBJECT_MAX_NEW_TOKENS = 512
CORRESPONDENCE_MAX_NEW_TOKENS = 256
CORRESPONDENCE_THINKING_MAX_NEW_TOKENS = 2048
POSE_MAX_NEW_TOKENS = 512

# Focal length in pixels that VLM3 shows images at, by task. Correspondence needs none: `correspondence.LONG_EDGE_PX`.
VLM3_FOCAL_PX = {"depth": 1000.0, "object": 1000.0, "pose": 750.0}

# A plain decimal number as the published expressions know it. The look-behind starts it at the first digit of a run,
# where the published ones start too; without it a megabyte of digits takes hours.
SIGNED = r"[-+]?(?<![0-9])[0-9]+(?:\.[0-9]+)?"

_OPEN, _CLOSE = "<think>", "</think>"


def strip_thinking(text: str) -> str:
    """The text without what stands between `<think>` and `</think>`.

    A thought that was never closed (the answer budget ran out) takes the rest of the text with it, and one that was
    never opened (the chat template had done so) takes everything before: numbers in thoughts are no answers.
    """
    kept, start = [], 0
    while (opened := text.find(_OPEN, start)) >= 0:
        kept.append(text[start:opened])
        closed = text.find(_CLOSE, opened)
        if closed < 0:
            start = len(text)
            break
        start = closed + len(_CLOSE)
    kept.append(text[start:])
    return "".join(kept).rpartition(_CLOSE)[2]


def finite(*numbers: str) -> tuple[float, ...] | None:
    """The numbers that were written, or None where one of them is too large for a float."""
    values = tuple(float(number) for number in numbers)
    return values if all(map(math.isfinite, values)) else None


def first_number(pattern: re.Pattern[str], text: str) -> float | None:
    """Group 1 of the first match in the text without its thoughts, as a finite number."""
    found = pattern.search(strip_thinking(text))
    values = finite(found.group(1)) if found else None
    return values[0] if values else None


def or_nan(value: float | None) -> float:
    """The value, NaN for None."""
    return math.nan if value is None else value


def checked_pixels(pixels: np.ndarray, width: int, height: int) -> np.ndarray:
    """(N, 2) float64 `(u, v)`, known to lie on an image of this size.

    Raises:
        PixelError: another shape, or a pixel that isn't on the image.
    """
    pixels = np.asarray(pixels, np.float64)
    if pixels.ndim != 2 or pixels.shape[1] != 2:
        raise PixelError(f"pixels have shape {pixels.shape}; pass an (N, 2) array of (u, v)")
    inside = ((pixels >= -0.5) & (pixels < (width - 0.5, height - 0.5))).all(axis=1)
    if not inside.all():
        u, v = pixels[np.flatnonzero(~inside)[0]]
        raise PixelError(f"pixel ({u:g}, {v:g}) is outside of the {width}x{height} image; leave it out")
    return pixels


def mean_or_nan(values: Sequence[float] | np.ndarray) -> float:
    """The mean of what is finite, NaN where nothing is."""
    values = np.asarray(values, np.float64)
    values = values[np.isfinite(values)]
    return float(values.mean()) if len(values) else math.nan
