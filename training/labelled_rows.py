"""Rows of labelled images, read one by one, and what may be wrong with their labels."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from depthlm_ros.datasets import LabelledImages
from depthlm_ros.errors import DatasetError
from depthlm_training.rows import (
    NO_LABELS,
    NON_FINITE_DEPTH,
    NON_POSITIVE_DEPTH,
    POINT_OUTSIDE,
    BadRow,
    JsonLines,
)


class LazyLabels(LabelledImages):
    """`LabelledImages` over rows that are read when asked for; the class itself holds the whole file in memory."""

    def __init__(self, lines: JsonLines, schema: str, images: list[Path], depths: list[Path], depth_kind: str) -> None:
        self.path, self.schema = lines.path, schema
        self._rows, self._images, self._depths, self._depth_kind = lines, images, depths, depth_kind


def schema_of(lines: JsonLines) -> str:
    """Whose schema it is, "depthlm" or "depthvlm", from the keys of the first line that is a row.

    Raises:
        DatasetError: neither's, or no line is a row.
    """
    for index in range(len(lines)):
        try:
            row = lines[index]
        except BadRow:
            continue
        if "depth_path" in row or "original_fx" in row:
            return "depthvlm"
        if "intrinsics" in row:
            return "depthlm"
        raise DatasetError(f"{lines.name(index)} has the keys {sorted(row)}, neither DepthLM's nor DepthVLM's")
    raise DatasetError(f"{lines.path} holds no JSON object; each line is one")


def check_labels(points: list, depths: list, size: list, name: str) -> None:
    """Looks for what is wrong with labelled points.

    Args:
        points: N `[u, v]`.
        depths: N metres.
        size: `[width, height]` of the image.
        name: of the row.

    Raises:
        BadRow: a point outside the image, or what `check_depths` finds.
    """
    pixels, depth_m = np.asarray(points, np.float64).reshape(-1, 2), np.asarray(depths, np.float64).reshape(-1)
    outside = ~((pixels > -0.5) & (pixels < np.asarray(size, np.float64) - 0.5)).all(axis=1)
    if outside.any():
        raise BadRow(name, POINT_OUTSIDE, f"point {pixels[outside][0].tolist()} is outside the image of size {size}")
    check_depths(depth_m, name)


def check_depths(depth_m: np.ndarray, name: str) -> None:
    """Looks for what is wrong with (N,) metres.

    Raises:
        BadRow: one isn't finite or isn't positive, or there are none.
    """
    if not np.isfinite(depth_m).all():
        raise BadRow(name, NON_FINITE_DEPTH, f"a depth is {depth_m[~np.isfinite(depth_m)][0]}")
    if (depth_m <= 0).any():
        raise BadRow(name, NON_POSITIVE_DEPTH, f"a depth is {depth_m[depth_m <= 0][0]:g} m")
    if len(depth_m) == 0:
        raise BadRow(name, NO_LABELS, "no pixel has a depth")
