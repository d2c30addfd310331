"""Pixel correspondence between two images: VLM3's third task (arXiv 2605.30561).

Both images are resized to a longest edge of 1024 pixels, which asks for no intrinsics; pixels stand in the text as
integers on [0, 1000] of each image's own width and height.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from depthlm_ros.errors import ImageError, PixelError
from depthlm_ros.tasks import checked_pixels, finite, mean_or_nan, strip_thinking

if TYPE_CHECKING:
    from depthlm_ros.engines.base import ImageGrid

LONG_EDGE_PX = 1024
UNITS = 1000

# VLM3's sample data.
QUESTION = (
    "Given these two images, what pixel in the second image corresponds to pixel ({x1}, {y1}) in the first image? "
    "Report the answer as (x, y)."
)
THINKING = ' Please think step by step and follow the format: "<think> [think process] </think>\n\n[answer]".'

# The published expression \(?\s*(-?\d+(?:\.\d+)?)\s*,\s*(-?\d+(?:\.\d+)?)\s*\)? less its optional ends, which change
# neither which pair is found first nor what is read from it.
_PAIR = re.compile(r"(-?(?<![0-9])[0-9]+(?:\.[0-9]+)?)\s*,\s*(-?[0-9]+(?:\.[0-9]+)?)")


@dataclass(frozen=True)
class LongEdgeView:
    """An image of the pair as the model sees it.

    Attributes:
        image: (H', W', 3) uint8 RGB.
        width: columns of the image it was made from.
        height: rows of that image.
        scale: `(x, y)` view pixels for each source pixel.
    """

    image: np.ndarray
    width: int
    height: int
    scale: tuple[float, float]

    @property
    def _units_per_px(self) -> np.ndarray:
        size = np.array([self.image.shape[1], self.image.shape[0]], np.float64)
        return np.array(self.scale) / size * UNITS

    def to_units(self, pixels: np.ndarray) -> np.ndarray:
        """Scales source pixels (N, 2) to the (N, 2) int64 on [0, 1000] that stand in the text.

        Raises:
            PixelError: another shape, or a pixel that isn't on the image.
        """
        pixels = checked_pixels(pixels, self.width, self.height)
        return np.clip(np.rint(pixels * self._units_per_px), 0, UNITS).astype(np.int64)

    def to_source(self, units: np.ndarray) -> np.ndarray:
        """Scales what an answer says, (N, 2) on [0, 1000], to source pixels (N, 2) float64.

        NaN for a place off the scale. The scale's far end lies half a pixel beyond the image: it is the last pixel.
        """
        units = np.asarray(units, np.float64).reshape(-1, 2)
        on_scale = ((units >= 0) & (units <= UNITS)).all(axis=1, keepdims=True)
        pixels = np.minimum(units / self._units_per_px, (self.width - 1, self.height - 1))
        return np.where(on_scale, pixels, np.nan)


def long_edge_view(image: np.ndarray, policy: str = "published", grid: ImageGrid | None = None) -> LongEdgeView:
    """Resizes an image to a longest edge of 1024 pixels, a smaller one too.

    Args:
        image: (H, W, 3) uint8 RGB.
        policy: "published" keeps the shape (600x400 becomes 1024x683 as in VLM3's sample data) and leaves it to the
            model's processor to resample once more; "exact" resamples once, to the size that the processor wants.
        grid: sizes that the processor leaves alone, for "exact".

    Raises:
        ImageError: not an (H, W, 3) uint8 image.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ImageError(f"image is {image.dtype} of shape {image.shape}; pass (H, W, 3) uint8 RGB")
    height, width = image.shape[:2]
    scale = LONG_EDGE_PX / max(width, height)
    multiple = grid.multiple if policy == "exact" and grid is not None else 1
    size = tuple(max(1, round(side * scale / multiple)) * multiple for side in (width, height))
    # Pillow's default for photographs; the published filter isn't known.
    resized = Image.fromarray(np.ascontiguousarray(image)).resize(size, Image.Resampling.BICUBIC)
    scales = (size[0] / width, size[1] / height) if policy == "exact" else (scale, scale)
    return LongEdgeView(np.asarray(resized), width, height, scales)


def correspondence_question(x: int, y: int, think: bool = False) -> str:
    """The question about one pixel of the first image.

    Args:
        x: column on [0, 1000] of the first image.
        y: row on [0, 1000] of it.
        think: ask for a thought first, as one of the published evaluations does.

    Raises:
        PixelError: a coordinate off the scale.
    """
    if not (0 <= x <= UNITS and 0 <= y <= UNITS):
        raise PixelError(f"pixel ({x}, {y}) is outside [0, {UNITS}]; make it with LongEdgeView.to_units()")
    return QUESTION.format(x1=int(x), y1=int(y)) + (THINKING if think else "")


def parse_correspondence(text: str) -> tuple[float, float] | None:
    """The first pair of numbers after the thoughts, as the published expression finds it; None where there is none.

    Places off the scale are returned as they were said, since they count in the published error.
    """
    found = _PAIR.search(strip_thinking(text))
    return finite(*found.groups()) if found else None


@dataclass(frozen=True, eq=False)
class MatchResult:
    """Where pixels of image A are in image B. Row i of every array belongs to question i.

    Attributes:
        pixels_a: (N, 2) float64 `(u, v)` of image A.
        pixels_b: (N, 2) float64 `(u, v)` of image B in its own pixels; NaN where the answer names none of them.
        units_a: (N, 2) int64 what was asked, on [0, 1000] of image A.
        units_b: (N, 2) float64 what was said, on [0, 1000] of image B; NaN where unparsed, may be off the scale.
        texts: the model's answers.
    """

    pixels_a: np.ndarray
    pixels_b: np.ndarray
    units_a: np.ndarray
    units_b: np.ndarray
    texts: tuple[str, ...]

    @property
    def valid(self) -> np.ndarray:
        """(N,) bool: rows with a pixel in image B."""
        return np.isfinite(self.pixels_b).all(axis=1)

    def __len__(self) -> int:
        return len(self.pixels_a)


def read_matches(view_a: LongEdgeView, view_b: LongEdgeView, pixels_a: np.ndarray, texts: list[str]) -> MatchResult:
    """Puts answers in the order of their questions into a result."""
    pairs = [parse_correspondence(text) or (math.nan, math.nan) for text in texts]
    said = np.array(pairs, np.float64).reshape(-1, 2)
    pixels_a = np.asarray(pixels_a, np.float64)
    return MatchResult(pixels_a, view_b.to_source(said), view_a.to_units(pixels_a), said, tuple(texts))


@dataclass(frozen=True)
class EndpointError:
    """How far the said places are from the true ones, in the unit of what was compared.

    Attributes:
        mean: over the answered rows, as published; NaN without any.
        median: likewise.
        answered: rows with a place.
        total: rows with a true place.
    """

    mean: float
    median: float
    answered: int
    total: int


def endpoint_error(said: np.ndarray, true: np.ndarray) -> EndpointError:
    """EPE: the Euclidean distance between places, in pixels or in units of [0, 1000], whichever is given.

    The published mean leaves unparsed answers out; `answered` tells how many it is of.

    Args:
        said: (N, 2), NaN where there is no answer.
        true: (N, 2); rows with NaN are left out.
    """
    said, true = np.asarray(said, np.float64).reshape(-1, 2), np.asarray(true, np.float64).reshape(-1, 2)
    if said.shape != true.shape:
        raise PixelError(f"{len(said)} places were said and {len(true)} are true; pass as many of both")
    known = np.isfinite(true).all(axis=1)
    distance = np.linalg.norm(said - true, axis=1)[known]
    answered = np.isfinite(distance)
    median = float(np.median(distance[answered])) if answered.any() else math.nan
    return EndpointError(mean_or_nan(distance), median, int(answered.sum()), int(known.sum()))
