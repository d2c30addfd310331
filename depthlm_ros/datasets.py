"""Readers of labelled photographs: DepthLM's jsonl (sparse points) and DepthVLM's jsonl (dense depth maps).

Both become `LabelledImage`: an image, its camera and depth at pixels of *that image*. A reader has
`__len__` and `__getitem__`, nothing more, and says in `notes` what a row left open and how it was filled in.
DepthVLM's rows list ten points as well; their depth map holds those and all others, so the map alone is read
(the listed ScanNet++ points are in pixels of the small depth map although the image is larger).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from depthlm_ros.camera import Camera
from depthlm_ros.depth import DEPTH_KINDS
from depthlm_ros.errors import DatasetError, ImageError
from depthlm_ros.photographs import UNREADABLE, read_photograph

DEPTHLM_KEYS = ("image", "intrinsics", "pixel_coords", "depth")
DEPTHVLM_KEYS = ("image", "depth_path", "depth_scale", "original_fx", "original_rgb_size")
IMAGE_FOLDERS = ("", "rgb", "images", "image")
DEPTH_FOLDERS = ("", "depth", "depths")


@dataclass(frozen=True)
class LabelledImage:
    """One photograph with metric labels.

    Attributes:
        name: the image's path as its row gives it.
        image: (H, W, 3) uint8 RGB.
        camera: intrinsics of exactly this image.
        pixels: (N, 2) float32 `(u, v)` of the labels in this image, all inside it; fractional where
            the labels come from a depth map of another size.
        depth_m: (N,) float32 z-depth in metres, finite and positive.
        notes: what the row left open and how it was filled in, one sentence each.
    """

    name: str
    image: np.ndarray
    camera: Camera
    pixels: np.ndarray
    depth_m: np.ndarray
    notes: tuple[str, ...] = ()

    def depth_map(self) -> np.ndarray:
        """(H, W) float32 metres, NaN where unlabelled.

        Label positions are rounded to whole pixels. Where two fall on one pixel the nearer surface wins, since it
        is the one the camera sees.
        """
        height, width = self.image.shape[:2]
        depth_map = np.full((height, width), np.nan, np.float32)
        far_first = np.argsort(-self.depth_m, kind="stable")
        columns, rows = np.rint(self.pixels[far_first]).astype(int).T
        depth_map[np.clip(rows, 0, height - 1), np.clip(columns, 0, width - 1)] = self.depth_m[far_first]
        return depth_map


class LabelledImages:
    """The rows of a labels file; images are read when asked for.

    Args:
        path: the jsonl file, of either schema; which one is seen from the keys of its first row.
        images: folder the images lie in; by default the file's own folder or its `rgb`/`images`.
        depths: folder of the depth maps; by default the file's own folder or its `depth`/`depths`.
        depth_kind: what the labels measure, "z" or "euclidean". Neither schema says it reliably: DepthLM's
            curation scripts mix both (its iBims-1 labels are z-depth), DepthVLM tags all as z-depth.

    Raises:
        DatasetError: the file is missing, empty, not jsonl, or of neither schema.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        images: str | Path | None = None,
        depths: str | Path | None = None,
        depth_kind: str = "z",
    ) -> None:
        self.path = Path(path)
        if depth_kind not in DEPTH_KINDS:
            raise DatasetError(f"depth kind {depth_kind!r} is unknown; use one of {', '.join(DEPTH_KINDS)}")
        self._depth_kind = depth_kind
        self._rows = _read_rows(self.path)
        self.schema = _recognise(self._rows[0], self.path)
        self._images = [Path(images)] if images else [self.path.parent / name for name in IMAGE_FOLDERS]
        self._depths = [Path(depths)] if depths else [self.path.parent / name for name in DEPTH_FOLDERS]

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[LabelledImage]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> LabelledImage:
        """Reads one row's image and labels.

        Raises:
            DatasetError: a file or key is missing or a value can't be used; the message names file and line.
        """
        if not 0 <= index < len(self._rows):
            raise IndexError(index)
        where = f"{self.path}:{index + 1}"
        row = self._rows[index]
        needed = DEPTHLM_KEYS if self.schema == "depthlm" else DEPTHVLM_KEYS
        if missing := [key for key in needed if key not in row]:
            raise DatasetError(f"{where}: key {missing[0]!r} is missing; a {self.schema} row has {', '.join(needed)}")
        try:
            return self._depthlm(row, where) if self.schema == "depthlm" else self._depthvlm(row, where)
        except (TypeError, ValueError) as error:
            raise DatasetError(
                f"{where}: a value has the wrong type or shape ({error}); compare it with line 1"
            ) from error

    def row(self, index: int, *needed: str) -> dict:
        """A row as it stands in the file, for protocols that count by it.

        Raises:
            DatasetError: it lacks one of the `needed` keys.
        """
        row = self._rows[index]
        if missing := [key for key in needed if key not in row]:
            raise DatasetError(
                f"{self.path}:{index + 1}: key {missing[0]!r} is missing; this needs {', '.join(needed)} in every row"
            )
        return dict(row)

    def raw_depth(self, index: int) -> np.ndarray:
        """(h, w) float32 metres of a DepthVLM row's depth map, 0 where unknown, no mask applied.

        Raises:
            DatasetError: the row has no depth map, or its file can't be read.
        """
        where = f"{self.path}:{index + 1}"
        row = self.row(index, "depth_path", "depth_scale")
        return _read_depth(_find(row["depth_path"], self._depths, where, "--depths"), row, where)

    def _depthlm(self, row: dict, where: str) -> LabelledImage:
        image = _read_image(_find(row["image"], self._images, where, "--images"))
        height, width = image.shape[:2]
        intrinsics = row["intrinsics"]
        if len(intrinsics) != 6:
            raise DatasetError(f"{where}: intrinsics are {intrinsics}; give [fx, fy, cx, cy, width, height]")
        fx, fy, cx, cy = (float(value) for value in intrinsics[:4])
        notes = ()
        if fx == 0 or fy == 0:
            # DepthLM's readers do so too.
            fx, fy = fx or fy, fy or fx
            notes = ("a focal length of 0 was taken to be the other one",)
        if (width, height) != (int(intrinsics[4]), int(intrinsics[5])):
            raise DatasetError(
                f"{where}: the image is {width}x{height} but its intrinsics are for {intrinsics[4]}x{intrinsics[5]}; "
                "scale the intrinsics to the image or put the right image there"
            )
        camera = Camera(fx, fy, cx, cy, width, height)
        return self._labelled(row["image"], image, camera, _points(row, where), _values(row), notes)

    def _depthvlm(self, row: dict, where: str) -> LabelledImage:
        image = _read_image(_find(row["image"], self._images, where, "--images"))
        height, width = image.shape[:2]
        original_width, original_height = (int(side) for side in row["original_rgb_size"])
        if min(original_width, original_height) < 1:
            raise DatasetError(f"{where}: original_rgb_size is {row['original_rgb_size']}; give [width, height]")
        if abs(width * original_height - height * original_width) > max(original_width, original_height):
            raise DatasetError(
                f"{where}: the image is {width}x{height}, another shape than original_rgb_size "
                f"{original_width}x{original_height}; intrinsics of a cropped image are unknown"
            )
        fx = float(row["original_fx"]) * width / original_width
        camera = Camera(fx, fx, (width - 1) / 2, (height - 1) / 2, width, height)
        notes = (
            "fy, cx and cy are absent from the labels: assumed fy = fx and the principal point in the image centre",
        )
        depth_map = self._depth_map(row, where)
        map_height, map_width = depth_map.shape
        rows, columns = np.nonzero(depth_map > 0)
        points = np.stack([columns, rows], axis=1).astype(np.float32)
        if (map_width, map_height) != (width, height):
            notes += (f"the depth map is {map_width}x{map_height}: its pixel centres are placed in the image",)
        values = depth_map[rows, columns]
        return self._labelled(
            row["image"], image, camera, _rescaled(points, depth_map.shape, (height, width)), values, notes
        )

    def _depth_map(self, row: dict, where: str) -> np.ndarray:
        path = _find(row["depth_path"], self._depths, where, "--depths")
        depth_map = _read_depth(path, row, where)
        for key in ("mask_valid_path", "mask_transp_path"):
            if row.get(key):
                mask = _read_mask(_find(row[key], self._depths, where, "--depths"))
                if mask.shape != depth_map.shape:
                    raise DatasetError(f"{where}: {key} is {mask.shape[::-1]}, the depth map {depth_map.shape[::-1]}")
                depth_map = np.where(mask > 0, depth_map, 0)
        return depth_map

    def _labelled(self, name, image, camera, pixels, depth, notes) -> LabelledImage:
        height, width = image.shape[:2]
        inside = ((pixels > -0.5) & (pixels < np.array([width, height]) - 0.5)).all(axis=1)
        if not inside.all():
            notes += (f"{(~inside).sum()} of {len(inside)} labels lie outside the image and are left out",)
        usable = np.isfinite(depth) & (depth > 0)
        if not usable.all():
            notes += (f"{(~usable).sum()} of {len(usable)} labels are not positive numbers and are left out",)
        pixels, depth = pixels[inside & usable], depth[inside & usable].astype(np.float32)
        if self._depth_kind != "z":
            depth = DEPTH_KINDS[self._depth_kind](depth).to_z(camera.rays(pixels)).metres
            notes += ("labels are distances along the ray and were converted to z-depth",)
        return LabelledImage(str(name), image, camera, pixels.astype(np.float32), depth.astype(np.float32), notes)


def _read_rows(path: Path) -> list[dict]:
    if not path.is_file():
        raise DatasetError(f"labels file {path} does not exist; give the path of a .jsonl file")
    rows = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise DatasetError(f"{path} is not a text file ({error}); give a .jsonl file") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DatasetError(f"{path}:{number} is not JSON ({error}); each line is one JSON object") from error
        if not isinstance(row, dict):
            raise DatasetError(f"{path}:{number} holds a {type(row).__name__}; each line is one JSON object")
        rows.append({"image": row.pop("image_path"), **row} if "image" not in row and "image_path" in row else row)
    if not rows:
        raise DatasetError(f"{path} is empty; each line is one JSON object with an image and its labels")
    return rows


def _recognise(row: dict, path: Path) -> str:
    if "original_fx" in row or "depth_path" in row:
        return "depthvlm"
    if "intrinsics" in row:
        return "depthlm"
    raise DatasetError(
        f"{path} has rows with the keys {sorted(row)}; DepthLM's have {', '.join(DEPTHLM_KEYS)}, "
        f"DepthVLM's have {', '.join(DEPTHVLM_KEYS)}"
    )


def _find(name: str, folders: list[Path], where: str, option: str) -> Path:
    # A name with a slash in front is a path of its own or, as DepthLM's readers take it, below the folder all the same.
    for place in (folder / below for below in (name, name.lstrip("/")) for folder in folders):
        try:
            if place.is_file():
                return place
        except OSError as error:
            raise DatasetError(f"{where}: {str(name)[:80]!r} is no file name ({error.strerror})") from error
    looked = ", ".join(str(folder) for folder in folders)
    raise DatasetError(f"{where}: file {name!r} was not found in {looked}; name its folder with {option}")


def _read_image(path: Path) -> np.ndarray:
    """(H, W, 3) uint8 RGB as stored: intrinsics belong to the stored pixels, so an EXIF rotation is not applied."""
    try:
        return read_photograph(path)
    except ImageError as error:
        raise DatasetError(str(error)) from error


def _read_depth(path: Path, row: dict, where: str) -> np.ndarray:
    """(h, w) float32 metres, 0 where unknown; 16-bit png divided by depth_scale, or raw float32 metres (ETH3D)."""
    if row.get("depth_format") == "binary_float32":
        width, height = (int(side) for side in row["original_depth_size"])
        raw = np.fromfile(path, np.float32)
        if raw.size != width * height:
            raise DatasetError(f"{where}: {path} holds {raw.size} floats, not {width}x{height}; fetch the file again")
        return np.nan_to_num(raw.reshape(height, width), nan=0.0, posinf=0.0, neginf=0.0)
    scale = float(row["depth_scale"])
    if not scale > 0:
        raise DatasetError(f"{where}: depth_scale is {scale}; it is the number of units in a metre, such as 1000")
    try:
        with Image.open(path) as image:
            raw = np.asarray(image)
    except UNREADABLE as error:
        raise DatasetError(f"depth map {path} can't be read ({error}); replace the file") from error
    if raw.ndim != 2:
        raise DatasetError(f"{where}: depth map {path} has shape {raw.shape}; it must have one channel")
    return (raw / scale).astype(np.float32)


def _read_mask(path: Path) -> np.ndarray:
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("L"))
    except UNREADABLE as error:
        raise DatasetError(f"mask {path} can't be read ({error}); replace the file") from error


def _points(row: dict, where: str) -> np.ndarray:
    points = np.asarray(row["pixel_coords"], np.float32).reshape(-1, 2)
    if len(points) != len(row["depth"]):
        raise DatasetError(f"{where}: {len(points)} pixel_coords but {len(row['depth'])} depths; they belong pairwise")
    return points


def _values(row: dict) -> np.ndarray:
    return np.asarray(row["depth"], np.float32).reshape(-1)


def _rescaled(points: np.ndarray, shape_from: tuple[int, int], shape_to: tuple[int, int]) -> np.ndarray:
    """Maps pixel centres of one raster onto another over the same field of view; shapes are (height, width)."""
    scale = np.array([shape_to[1] / shape_from[1], shape_to[0] / shape_from[0]], np.float32)
    return (points + 0.5) * scale - 0.5
