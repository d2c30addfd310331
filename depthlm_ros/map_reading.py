"""Reads maps between their pixels, at the same places in every frame."""

from __future__ import annotations

import numpy as np

from depthlm_ros.errors import PixelError
from depthlm_ros.remember import remember


class MapReader:
    """Bilinear reading of maps of one size at the same places; what the places alone decide is computed here.

    Args:
        places: (N, 2) `(u, v)`, integers at the map's pixel centres; NaN rows and rows off the map give NaN. Within the
            outer half of a border pixel its value holds.
        width: of the maps.
        height: of the maps.

    Raises:
        PixelError: places of another shape.
    """

    def __init__(self, places: np.ndarray, width: int, height: int) -> None:
        places = np.asarray(places, np.float64)
        if places.ndim != 2 or places.shape[1] != 2:
            raise PixelError(f"pixels have shape {places.shape}; pass an (N, 2) array of (u, v)")
        self._shape = (height, width)
        last = np.array([width - 1, height - 1])
        self._off = ~((places >= -0.5) & (places < last + 0.5)).all(axis=1)
        safe = np.where(self._off[:, None], 0.0, places)
        low = np.floor(safe).astype(np.intp)
        (u0, v0), (u1, v1) = np.clip(low, 0, last).T, np.clip(low + 1, 0, last).T
        self._corners = tuple(np.ascontiguousarray(v * width + u) for v in (v0, v1) for u in (u0, u1))
        self._right, self._below = (np.clip(safe, 0, last) - np.clip(low, 0, last)).astype(np.float32).T.copy()
        self._any_off = bool(self._off.any())

    def read(self, values: np.ndarray) -> np.ndarray:
        """(N,) float32 of a map (height, width); NaN where one of the values that count is NaN."""
        return self._blend(self._around(values))

    def read_with_spread(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As `read`, and how much the four values around each place differ: (highest - lowest) / highest in [0, 1]."""
        around = self._around(values)
        highest = np.maximum(np.maximum(around[0], around[1]), np.maximum(around[2], around[3]))
        lowest = np.minimum(np.minimum(around[0], around[1]), np.minimum(around[2], around[3]))
        return self._blend(around), np.clip((highest - lowest) / highest, 0, 1)

    def _around(self, values: np.ndarray) -> list[np.ndarray]:
        """The values left above, right above, left below and right below of each place."""
        if values.shape != self._shape:
            raise PixelError(f"the map has shape {values.shape}; these places are read in maps of shape {self._shape}")
        flat = np.ascontiguousarray(values, np.float32).reshape(-1)
        return [flat.take(corner) for corner in self._corners]

    def _blend(self, around: list[np.ndarray]) -> np.ndarray:
        above, right_above, below, right_below = around
        with np.errstate(invalid="ignore"):
            above = above + (right_above - above) * self._right
            below = below + (right_below - below) * self._right
            below -= above
            below *= self._below
            above += below
        unknown = ~np.isfinite(above)
        if unknown.any():
            above[unknown] = self._blend_known(around, unknown)
        if self._any_off:
            above[self._off] = np.nan
        return above

    def _blend_known(self, around: list[np.ndarray], rows: np.ndarray) -> np.ndarray:
        """The blend of some rows in which a neighbour without weight doesn't spread its NaN."""
        right, below = self._right[rows], self._below[rows]
        shares = ((1 - right) * (1 - below), right * (1 - below), (1 - right) * below, right * below)
        with np.errstate(invalid="ignore"):
            parts = [np.where(share > 0, each[rows] * share, 0) for share, each in zip(shares, around, strict=True)]
        return sum(parts)


@remember(4)
def map_reader(view_pixels: np.ndarray, view_size: tuple[int, int], map_size: tuple[int, int]) -> MapReader:
    """Reads maps of a view that may have another size than the view.

    Args:
        view_pixels: (N, 2) places in the view.
        view_size: (width, height) of the view.
        map_size: (width, height) of the maps; they show the same as the view.
    """
    if view_size != map_size:
        gain = np.array(map_size) / view_size
        view_pixels = (np.asarray(view_pixels, np.float64) + 0.5) * gain - 0.5
    return MapReader(view_pixels, *map_size)
