"""Which pixels of an image are asked.

All methods are deterministic in `seed`, give no pixel twice and keep `(u, v)` integer, at pixel centres.
"""

from __future__ import annotations

import math

import numpy as np

from depthlm_ros.errors import ConfigError, PixelError, unknown_choice

METHODS = ("grid", "random", "blue_noise")

# Cells of a grid may be this much longer than wide before rows of unequal length are the better choice.
_CELL_ASPECT = 1.5

# The R2 sequence: the plastic number solves x^3 = x + 1 (M. Roberts, "The Unreasonable Effectiveness of
# Quasirandom Sequences", 2018).
_PLASTIC = 1.32471795724474602596
_R2 = (1 / _PLASTIC, 1 / _PLASTIC**2)

# Jitter in units of the mean spacing of the points. Enough to break the rows of the lattice, little enough to keep
# neighbours apart.
_JITTER = 0.2


def sample_pixels(
    width: int,
    height: int,
    count: int,
    method: str = "grid",
    seed: int = 0,
    margin_px: int = 0,
    region: tuple[int, int, int, int] | None = None,
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

    Args:
        width: image width in pixels.
        height: image height in pixels.
        count: how many pixels, at least 1.
        method: one of `METHODS`.
        seed: of the random methods; the same seed gives the same pixels.
        margin_px: pixels to keep clear along each border of the image.
        region: `(u, v, width, height)` inside the image, as in `sensor_msgs/RegionOfInterest`; None = all of it.

    Returns:
        (N, 2) float32 `(u, v)`, integer-valued, unique.

    Raises:
        PixelError: nothing to choose from: the region lies outside the image or the margin leaves nothing.
        ConfigError: an unknown method, a count below 1, a negative margin or seed.
    """
    if method not in METHODS:
        raise ConfigError(unknown_choice("sampling method", method, METHODS))
    if count < 1:
        raise ConfigError(f"count is {count}; ask at least 1 pixel")
    if margin_px < 0 or seed < 0:
        raise ConfigError(f"margin_px is {margin_px} and seed is {seed}; neither may be negative")
    left, top, columns, rows = _area(width, height, margin_px, region)
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


def stride_pixels(width: int, height: int, stride: int) -> np.ndarray:
    """Every stride-th pixel in both directions, row by row, each in the middle of its stride x stride cell.

    Returns:
        (N, 2) float32 `(u, v)`, integer-valued.

    Raises:
        ConfigError: a stride below 1.
        PixelError: an empty image.
    """
    if stride < 1:
        raise ConfigError(f"stride is {stride}; it must be at least 1 pixel")
    _area(width, height, 0, None)
    u, v = (np.arange(min(stride // 2, (size - 1) // 2), size, stride) for size in (width, height))
    return np.stack(np.meshgrid(u, v), axis=-1).reshape(-1, 2).astype(np.float32)


def _area(
    width: int, height: int, margin_px: int, region: tuple[int, int, int, int] | None
) -> tuple[int, int, int, int]:
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
