"""Writes and reads point clouds as PLY, binary little endian, which CloudCompare, MeshLab and Open3D open."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from depthlm_ros.errors import DatasetError

POINT = np.dtype(
    [
        ("x", "<f4"),
        ("y", "<f4"),
        ("z", "<f4"),
        ("red", "u1"),
        ("green", "u1"),
        ("blue", "u1"),
        ("confidence", "<f4"),
    ]
)
_NAMES = {"f4": "float", "u1": "uchar"}


def write_ply(path: str | Path, xyz_m: np.ndarray, rgb: np.ndarray, confidence: np.ndarray, comment: str = "") -> int:
    """Writes a coloured cloud; rows without a finite position are left out.

    Args:
        path: the file; its folder is made.
        xyz_m: (N, 3) metres in the camera's optical frame (x right, y down, z forward).
        rgb: (N, 3) uint8.
        confidence: (N,) in [0, 1].
        comment: one line about where the cloud comes from.

    Returns:
        Number of points written.
    """
    kept = np.isfinite(xyz_m).all(axis=1)
    points = np.empty(int(kept.sum()), POINT)
    points["x"], points["y"], points["z"] = np.asarray(xyz_m, np.float32)[kept].T
    points["red"], points["green"], points["blue"] = np.asarray(rgb, np.uint8)[kept].T
    points["confidence"] = np.asarray(confidence, np.float32)[kept]
    lines = ["ply", "format binary_little_endian 1.0"]
    lines += [f"comment {' '.join(comment.split())}"] if comment else []
    lines += ["comment metres, optical frame: x right, y down, z forward", f"element vertex {len(points)}"]
    lines += [f"property {_NAMES[POINT[name].str[1:]]} {name}" for name in POINT.names]
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("\n".join([*lines, "end_header", ""]).encode() + points.tobytes())
    return len(points)


def read_ply(path: str | Path) -> np.ndarray:
    """Reads a cloud that `write_ply` wrote.

    Returns:
        (N,) structured array with the fields of `POINT`.

    Raises:
        DatasetError: another kind of PLY, or a truncated one.
    """
    raw = Path(path).read_bytes()
    header, mark, body = raw.partition(b"end_header\n")
    lines = header.decode("ascii", "replace").splitlines()
    properties = [f"property {_NAMES[POINT[name].str[1:]]} {name}" for name in POINT.names]
    counts = [int(line.split()[-1]) for line in lines if line.startswith("element vertex ")]
    if not mark or len(counts) != 1 or [line for line in lines if line.startswith("property ")] != properties:
        raise DatasetError(
            f"{path} is not a cloud of this package: its header is {lines[:12]}; write it with write_ply"
        )
    if len(body) != counts[0] * POINT.itemsize:
        raise DatasetError(f"{path} has {len(body)} bytes for {counts[0]} points; it is truncated, write it again")
    return np.frombuffer(body, POINT)
