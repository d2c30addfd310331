"""Which pixels of an image are asked.

All methods are deterministic in `seed`, give no pixel twice and keep `(u, v)` integer, at pixel centres.
"""

from __future__ import annotations

import math

import cv2
import numpy as np

from depthlm_ros.errors import ConfigError, ImageError, PixelError, unknown_choice

METHODS = ("grid", "random", "blue_noise", "edges")
# (u, v, width, height) in pixels, as in sensor_msgs/RegionOfInterest.
Region = tuple[int, int, int, int]

# Cells of a grid may be this much longer than wide before rows of unequal length are the better choice.
_CELL_ASPECT = 1.5

# The R2 sequence: the plastic number solves x^3 = x + 1 (M. Roberts, "The Unreasonable Effectiveness of
# Quasirandom Sequences", 2018).
_PLASTIC = 1.32471795724474602596
_R2 = (1 / _PLASTIC, 1 / _PLASTIC**2)

# Jitter in units of the mean spacing of the points. Enough to break the rows of the lattice, little enough to keep
# neighbours apart.
_JITTER = 0.2

# Share of the points of `edges` that is spread evenly over the area whatever the image shows: what has no contrast
# may still have depth.
EVEN_SHARE = 0.5
# Edges are looked for in the image shrunk to about this many pixels along its longer side: outlines of things survive
# that, sensor noise and fine texture don't, and it is quick.
_EDGE_SIDE = 320
# The band beside an edge, in pixels of the shrunk image: nearer, the pixel shows both sides and its depth is
# ambiguous; farther, it says nothing about where the depth jumps.
_BAND = (1.5, 5.0)
# How much of the mean contrast around a pixel is taken off its own, so that texture counts less than outlines
# (surround suppression: Grigorescu et al., "Contour detection based on nonclassical receptive field inhibition", 2003).
_SURROUND, _SURROUND_PX = 1.0, 31
# Thresholds of Canny's edges, in units of a 3x3 Sobel on 8-bit values: an edge of 15 grey levels begins a line, one of
# 8 continues it.
_WEAK, _STRONG = 32, 60
# Never more points than this beside an edge, in units of an even spread: a picture with one short edge is not to have
# half of its points there.
_MOST_DENSE = 8.0


def sample_pixels(
    width: int,
    height: int,
    count: int,
    method: str = "grid",
    seed: int = 0,
    margin_px: int = 0,
    region: Region | None = None,
    image: np.ndarray | None = None,
) -> np.ndarray:
    """Chooses the pixels to ask.

    Exactly `count` pixels come back, or every pixel there is where the area holds fewer.

    Methods:
        grid: centres of cells that cover the area, row by row. The cells are equal, rows x columns = count, when
            count splits so that no cell is more than 1.5 times longer than wide; otherwise the rows are equally
            high and their lengths differ by one cell. The seed changes nothing.
        random: uniform without replacement.
        blue_noise: even but irregular: the R2 sequence, shifted and jittered by the seed. Every prefix is even
            too, so an answer that is cut short still covers the image.
        edges: blue noise that is denser beside the image's edges, on both of their sides and never on them, since
            depth jumps there and a pixel on the edge itself shows both sides. Half of the points keep to the even
            spread. Every prefix follows the same density. Filled in by `densify`, 256 true points of `edges` come to
            AbsRel 0.0077 where those of blue_noise come to 0.0095 and those of grid to 0.0129 (see there).

    Args:
        width: image width in pixels.
        height: image height in pixels.
        count: how many pixels, at least 1.
        method: one of `METHODS`.
        seed: of the random methods; the same seed gives the same pixels.
        margin_px: pixels to keep clear along each border of the image.
        region: `(u, v, width, height)` inside the image, as in `sensor_msgs/RegionOfInterest`; None = all of it.
        image: (height, width, 3) uint8 RGB; only `edges` looks at it and can't do without.

    Returns:
        (N, 2) float32 `(u, v)`, integer-valued, unique.

    Raises:
        PixelError: nothing to choose from: the region lies outside the image or the margin leaves nothing.
        ConfigError: an unknown method, a count below 1, a negative margin or seed.
        ImageError: `edges` without an image of this size.
    """
    if method not in METHODS:
        raise ConfigError(unknown_choice("sampling method", method, METHODS))
    if count < 1:
        raise ConfigError(f"count is {count}; ask at least 1 pixel")
    if margin_px < 0 or seed < 0:
        raise ConfigError(f"margin_px is {margin_px} and seed is {seed}; neither may be negative")
    left, top, columns, rows = _area(width, height, margin_px, region)
    if method == "edges":
        if image is None or image.shape[:2] != (height, width):
            seen = "no image" if image is None else f"an image of {image.shape[1]}x{image.shape[0]}"
            raise ImageError(f"sampling by edges got {seen}; pass the {width}x{height} image whose pixels are chosen")
        density = edge_density(image)[top : top + rows, left : left + columns]
        return density_pixels(density, count, seed) + np.array([left, top], np.float32)
    area = columns * rows
    if count >= area:
        cells = np.arange(area)
    elif method == "grid":
        cells = _grid(columns, rows, count)
    elif method == "random":
        cells = np.random.default_rng(seed).choice(area, count, replace=False)
    else:
        cells = _blue_noise(columns, rows, count, seed)
    v, u = np.divmod(cells, columns)
    return np.stack([u + left, v + top], axis=1).astype(np.float32)


def stride_pixels(width: int, height: int, stride: int, region: Region | None = None) -> np.ndarray:
    """Every stride-th pixel in both directions, row by row, each in the middle of its stride x stride cell.

    Args:
        width: image width in pixels.
        height: image height in pixels.
        stride: in pixels.
        region: `(u, v, width, height)` inside the image, filled with cells from its corner on; None = all of it.

    Returns:
        (N, 2) float32 `(u, v)`, integer-valued.

    Raises:
        ConfigError: a stride below 1.
        PixelError: an empty image, or a region that isn't inside the image.
    """
    if stride < 1:
        raise ConfigError(f"stride is {stride}; it must be at least 1 pixel")
    left, top, columns, rows = _area(width, height, 0, region)
    u, v = (
        start + np.arange(min(stride // 2, (size - 1) // 2), size, stride)
        for start, size in ((left, columns), (top, rows))
    )
    return np.stack(np.meshgrid(u, v), axis=-1).reshape(-1, 2).astype(np.float32)


def density_pixels(density: np.ndarray, count: int, seed: int = 0) -> np.ndarray:
    """Pixels spread evenly within a density: blue noise with more of it where the density is higher.

    A sequence whose every prefix is even is thinned: pixel number i of it stays where i is small against the density.
    The first k numbers of the sequence are even for every k, so what stays is even at every density, and
    ordering by i / density gives exactly `count` of them.

    Args:
        density: (H, W), not negative, in any unit; pixels of density 0 are taken only when there are no others.
        count: how many pixels.
        seed: of the sequence.

    Returns:
        (N, 2) float32 `(u, v)`, integer-valued, unique; N = count, or every pixel where there are fewer.

    Raises:
        ConfigError: a density that is negative or not finite.
    """
    density = np.asarray(density, np.float64)
    rows, columns = density.shape
    total = density.sum()
    if not np.isfinite(total) or density.min() < 0:
        raise ConfigError(f"the density goes from {density.min()} to {density.max()}; it must be finite, not negative")
    flat = density.ravel()
    cells = np.arange(0)
    if total > 0 and count < flat.size:
        # As long a sequence as the densest place needs to be full, and a tenth more for its unevenness.
        most = math.ceil(count * flat.max() * flat.size / total * 1.1) + 64
        cells = _blue_noise(columns, rows, min(most, flat.size), seed)
        cells = cells[flat[cells] > 0]
        late = (np.arange(len(cells)) + 0.5) / flat[cells]
        cells = cells[np.argsort(late, kind="stable")][:count]
    if len(cells) < min(count, flat.size):
        free = np.setdiff1d(np.arange(flat.size), cells)
        drawn = np.random.default_rng(seed).permutation(free)
        # Those of some density before those of none.
        drawn = drawn[np.argsort(flat[drawn] <= 0, kind="stable")]
        cells = np.concatenate([cells, drawn[: count - len(cells)]])
    v, u = np.divmod(cells, columns)
    return np.stack([u, v], axis=1).astype(np.float32)


def edge_density(image: np.ndarray) -> np.ndarray:
    """How densely `edges` asks: even plus as much again in bands on both sides of the image's edges.

    Args:
        image: (H, W, 3) uint8 RGB.

    Returns:
        (H, W) float32, 0 on edges, mean about 1.
    """
    height, width = image.shape[:2]
    shrink = min(1.0, _EDGE_SIDE / max(width, height))
    size = max(1, round(width * shrink)), max(1, round(height * shrink))
    small = cv2.GaussianBlur(cv2.resize(image, size, interpolation=cv2.INTER_AREA), (0, 0), 1.0)
    across, down = (
        _steepest(cv2.Sobel(small, cv2.CV_16S, 1, 0)),
        _steepest(cv2.Sobel(small, cv2.CV_16S, 0, 1)),
    )
    contrast = cv2.magnitude(across.astype(np.float32), down.astype(np.float32))
    strength = np.maximum(contrast - _SURROUND * cv2.blur(contrast, (_SURROUND_PX, _SURROUND_PX)), 0)
    lines = (cv2.Canny(across, down, _WEAK, _STRONG, L2gradient=True) > 0) & (strength > 0)
    away = cv2.distanceTransform((~lines).astype(np.uint8), cv2.DIST_L2, 3)
    band = cv2.GaussianBlur(np.where(lines, np.sqrt(strength), 0).astype(np.float32), (0, 0), _BAND[1] / 2)
    band[away < _BAND[0]] = 0
    mean = float(band.mean())
    density = np.full(band.shape, EVEN_SHARE, np.float32)
    if mean > 0:
        density += np.minimum(band * ((1 - EVEN_SHARE) / mean), _MOST_DENSE)
    whole = cv2.resize(density, (width, height), interpolation=cv2.INTER_LINEAR)
    whole[cv2.resize(away, (width, height), interpolation=cv2.INTER_LINEAR) < _BAND[0]] = 0
    return whole


def _steepest(slopes: np.ndarray) -> np.ndarray:
    """(H, W) of (H, W, 3): of each pixel the channel's slope that is steepest, with its sign."""
    red, green, blue = cv2.split(slopes)
    high = cv2.max(cv2.max(red, green), blue)
    low = cv2.min(cv2.min(red, green), blue)
    return np.where(high > -low, high, low)


def _area(width: int, height: int, margin_px: int, region: Region | None) -> tuple[int, int, int, int]:
    """Image without margin, cut by the region, as (left, top, columns, rows)."""
    if width < 1 or height < 1:
        raise PixelError(f"image size {width}x{height} has no pixels")
    left, top, right, bottom = margin_px, margin_px, width - margin_px, height - margin_px
    if region is not None:
        u, v, columns, rows = region
        if u < 0 or v < 0 or columns < 1 or rows < 1 or u + columns > width or v + rows > height:
            raise PixelError(
                f"region {tuple(region)} is not inside the {width}x{height} image; give (u, v, width, height)"
            )
        left, top, right, bottom = max(left, u), max(top, v), min(right, u + columns), min(bottom, v + rows)
    if left >= right or top >= bottom:
        raise PixelError(
            f"a margin of {margin_px} px leaves no pixel of the {width}x{height} image"
            + ("" if region is None else f" in region {tuple(region)}")
            + "; make the margin smaller"
        )
    return left, top, right - left, bottom - top


def _grid(columns: int, rows: int, count: int) -> np.ndarray:
    divisors = np.arange(1, math.isqrt(count) + 1)
    divisors = divisors[count % divisors == 0]
    per_row = np.concatenate([divisors, count // divisors])
    aspect = np.abs(np.log((columns / per_row) / (rows / (count // per_row))))
    aspect[(per_row > columns) | (count // per_row > rows)] = np.inf
    best = int(np.argmin(aspect))
    if aspect[best] <= math.log(_CELL_ASPECT):
        n = int(per_row[best])
        lengths = np.full(count // n, n)
    else:
        n_rows = round(math.sqrt(count * rows / columns))
        n_rows = min(max(n_rows, math.ceil(count / columns), 1), rows, count)
        # Bresenham's split: the longer rows are spread over the height.
        lengths = np.diff(np.arange(n_rows + 1) * count // n_rows)
    row = np.repeat(np.arange(len(lengths)), lengths)
    column = np.arange(count) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    u = (2 * column + 1) * columns // (2 * lengths[row])
    v = (2 * row + 1) * rows // (2 * len(lengths))
    return v * columns + u


def _blue_noise(columns: int, rows: int, count: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    side = max(columns, rows)
    # The sequence lives in a square, so that spacing is the same in both directions; a long area is cut out of it.
    # The spare covers the uneven cut and points that fall on one pixel.
    drawn = math.ceil(count * 1.1 * side / min(columns, rows)) + 64
    shift, wobble = rng.random(2), rng.random((drawn, 2)) - 0.5
    spacing = side / math.sqrt(drawn)
    unit = (shift + np.arange(1, drawn + 1)[:, None] * _R2) % 1.0
    points = np.floor(unit * side + wobble * (2 * _JITTER * spacing)).astype(np.int64) % side
    points = points[(points[:, 0] < columns) & (points[:, 1] < rows)]
    cells = points[:, 1] * columns + points[:, 0]
    cells = cells[np.sort(np.unique(cells, return_index=True)[1])][:count]
    if len(cells) < count:
        # So many pixels are wanted that the sequence repeats itself: fill up from those still free.
        free = np.setdiff1d(np.arange(columns * rows), cells, assume_unique=True)
        cells = np.concatenate([cells, rng.choice(free, count - len(cells), replace=False)])
    return cells
