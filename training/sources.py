"""Sources of training data: each gives `Example`s by index, or says why a row can't be trained on.

| source | rows |
|---|---|
| `LabelledSource` | DepthLM's jsonl (points) and DepthVLM's jsonl (depth maps) |
| `DialogueSource` | images with questions and answers in words: objects, correspondence, pose, anything |
| `SceneSource` | rendered scenes with exact depth at every pixel |
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from depthlm_ros.camera import Camera
from depthlm_ros.datasets import DEPTH_FOLDERS, IMAGE_FOLDERS, LabelledImage
from depthlm_ros.depth import DEPTH_KINDS
from depthlm_ros.errors import CameraError, ConfigError, DatasetError, ImageError, PixelError, unknown_choice
from depthlm_ros.photographs import read_photograph
from depthlm_training.dialogue_rows import cameras_of, dialogue_of, has_zero_focal, image_files
from depthlm_training.labelled_rows import LazyLabels, check_depths, check_labels, schema_of
from depthlm_training.labels import range_m as as_range_m
from depthlm_training.raycast import render
from depthlm_training.rows import (
    CAUSES,
    MALFORMED,
    MISSING_DEPTH_MAP,
    MISSING_IMAGE,
    NO_LABELS,
    TRUNCATED_DEPTH_MAP,
    TRUNCATED_IMAGE,
    UNUSABLE_CAMERA,
    ZERO_FOCAL,
    BadRow,
    BadRows,
    Folders,
    JsonLines,
    part_of,
)
from depthlm_training.scenes import random_pose, random_scene

__all__ = [
    "CAUSES",
    "BadRow",
    "BadRows",
    "DialogueSource",
    "Example",
    "LabelledSource",
    "SceneSource",
    "Source",
]

SPLITS = ("train", "held_out")
# What reading a row with wrong values in it ends in.
_WRONG = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError)
# What Pillow raises for damaged files; a broken chunk of a png is a SyntaxError.
_UNREADABLE = (OSError, SyntaxError, struct.error, Image.DecompressionBombError)


@dataclass(frozen=True, eq=False)
class Example:
    """One row of a data set, checked.

    Attributes:
        name: file and line, for messages.
        images: (H, W, 3) uint8 RGB; two where the dialogue is about a pair.
        cameras: intrinsics of each image, None where they aren't known.
        pixels: (N, 2) float32 `(u, v)` of the labels, all inside `images[0]`; N is 0 where there are none.
        depth_m: (N,) float32 z-depth in metres, finite and positive.
        dialogue: (question, answer) pairs in words.
    """

    name: str
    images: tuple[np.ndarray, ...]
    cameras: tuple[Camera | None, ...]
    pixels: np.ndarray
    depth_m: np.ndarray
    dialogue: tuple[tuple[str, str], ...] = ()

    def depth_map(self) -> np.ndarray:
        """(H, W) float32 metres of `images[0]`, NaN where unlabelled; the nearer of two labels on one pixel stays."""
        return LabelledImage(self.name, self.images[0], self.cameras[0], self.pixels, self.depth_m).depth_map()


class Source(Protocol):
    """Rows of one data set."""

    name: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example:
        """One row.

        Raises:
            BadRow: it can't be trained on.
        """
        ...


class LabelledSource:
    """A labels file of DepthLM's or DepthVLM's schema, read row by row.

    A row with anything wrong in it is bad as a whole: a point that lies outside speaks against its neighbours too.

    Args:
        path: the .jsonl file.
        depth_kind: what the labels measure, "z" or "euclidean". Neither schema says it reliably, so it has no default.
        images: folder of the images; by default the file's own folder or its `rgb`/`images`.
        depths: folder of the depth maps; by default the file's own folder or its `depth`/`depths`.
        part: which rows, as shares of the file; DepthLM trains on (0, 0.98) of ScanNet++ and evaluates on the rest.
        range_m: labels nearer or farther than these two are left out; or the name of one of DepthVLM's data sets.

    Raises:
        DatasetError: no such file, or rows of neither schema.
        ConfigError: an unknown depth kind or range, a part without rows.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        depth_kind: str,
        images: str | Path | None = None,
        depths: str | Path | None = None,
        part: tuple[float, float] = (0.0, 1.0),
        range_m: str | Sequence[float] | None = None,
    ) -> None:
        if depth_kind not in DEPTH_KINDS:
            raise ConfigError(unknown_choice("depth kind", depth_kind, DEPTH_KINDS))
        self._lines = JsonLines(path)
        self.name = str(path)
        self._rows = part_of(len(self._lines), part, self.name)
        self._range_m = as_range_m(range_m)
        self._schema = schema_of(self._lines)
        self._images = Folders(images, self._lines.path.parent, IMAGE_FOLDERS, MISSING_IMAGE)
        self._depths = Folders(depths, self._lines.path.parent, DEPTH_FOLDERS, MISSING_DEPTH_MAP)
        self._labels = LazyLabels(self._lines, self._schema, self._images.places, self._depths.places, depth_kind)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Example:
        """One row's image and labels; raises as `Source` says."""
        line = self._rows[index]
        row, name = self._lines[line], self._lines.name(line)
        try:
            self._check(row, name)
            labelled = self._labels[line]
        except BadRow:
            raise
        except CameraError as error:
            raise BadRow(name, UNUSABLE_CAMERA, str(error)) from error
        except (DatasetError, *_UNREADABLE) as error:
            raise BadRow(name, self._cause(error, row, name), str(error).removeprefix(f"{name}: ")) from error
        except _WRONG as error:
            raise BadRow(name, MALFORMED, f"a value has the wrong type or shape ({error})") from error
        # Once more: what was positive may not be after the conversion along a ray of an absurd focal length.
        check_depths(labelled.depth_m, name)
        near_m, far_m = self._range_m
        kept = (labelled.depth_m >= near_m) & (labelled.depth_m <= far_m)
        if not kept.any():
            raise BadRow(name, NO_LABELS, f"none of {len(kept)} labels lies within {near_m:g} to {far_m:g} m")
        return Example(name, (labelled.image,), (labelled.camera,), labelled.pixels[kept], labelled.depth_m[kept])

    def _check(self, row: dict, name: str) -> None:
        self._images.find(row["image"], name)
        if self._schema == "depthvlm":
            for key in ("depth_path", "mask_valid_path", "mask_transp_path"):
                if row.get(key):
                    self._depths.find(row[key], name)
            if float(row["original_fx"]) == 0:
                raise BadRow(name, ZERO_FOCAL, "original_fx is 0")
            return
        intrinsics = row["intrinsics"]
        if 0 in intrinsics[:2]:
            raise BadRow(name, ZERO_FOCAL, f"the focal lengths are {intrinsics[:2]}")
        check_labels(row["pixel_coords"], row["depth"], intrinsics[4:6], name)

    def _cause(self, error: Exception, row: dict, name: str) -> str:
        if isinstance(error.__cause__, ImageError):
            return TRUNCATED_IMAGE
        if not isinstance(error.__cause__ or error, _UNREADABLE):
            return MALFORMED
        # Pillow's own errors don't say which of the two files they are about.
        try:
            read_photograph(self._images.find(row["image"], name))
        except (ImageError, *_UNREADABLE):
            return TRUNCATED_IMAGE
        return TRUNCATED_DEPTH_MAP


class DialogueSource:
    """Questions with answers in words about an image or a pair.

        {"image": "a.png", "dialogue": [["How many chairs are there?", "Four."]]}
        {"images": ["a.png", "b.png"], "intrinsics": [[fx, fy, cx, cy, width, height], [...]], "dialogue": [...]}

    Intrinsics may be left out. Rows of VLM3's object, correspondence and pose files are understood too, one a line
    (`jq -c . pose_labels.json` makes one of a file).

    Args:
        path: the .jsonl file.
        images: folder of the images; by default the file's own folder or its `rgb`/`images`.
        part: which rows, as shares of the file.

    Raises:
        DatasetError: no such file, or it is empty.
        ConfigError: a part without rows.
    """

    def __init__(
        self, path: str | Path, *, images: str | Path | None = None, part: tuple[float, float] = (0.0, 1.0)
    ) -> None:
        self._lines = JsonLines(path)
        self.name = str(path)
        self._rows = part_of(len(self._lines), part, self.name)
        self._images = Folders(images, self._lines.path.parent, IMAGE_FOLDERS, MISSING_IMAGE)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Example:
        """One row's images and pairs; raises as `Source` says."""
        line = self._rows[index]
        row, name = self._lines[line], self._lines.name(line)
        try:
            images = tuple(read_photograph(self._images.find(file, name)) for file in image_files(row))
            cameras = cameras_of(row, images)
            dialogue = dialogue_of(row)
        except (ImageError, *_UNREADABLE) as error:
            raise BadRow(name, TRUNCATED_IMAGE, str(error)) from error
        except CameraError as error:
            raise BadRow(name, ZERO_FOCAL if has_zero_focal(row) else UNUSABLE_CAMERA, str(error)) from error
        except (*_WRONG, PixelError) as error:
            raise BadRow(name, MALFORMED, f"a value is missing or has the wrong type or shape ({error})") from error
        if not dialogue:
            raise BadRow(name, NO_LABELS, "the dialogue is empty")
        return Example(name, images, cameras, np.zeros((0, 2), np.float32), np.zeros(0, np.float32), dialogue)


class SceneSource:
    """Rendered scenes, the same for the same seed, split and index whoever renders them.

    Args:
        seed: of all scenes.
        split: "train" or "held_out"; scenes of one are never those of the other.
        count: how many.
        cameras: one of them looks at each scene.
        points: how many pixels of each image are labelled; None for all that show a surface.
        supersample: rays a pixel side for colour.
    """

    def __init__(
        self,
        seed: int,
        split: str,
        count: int,
        cameras: Sequence[Camera],
        points: int | None = None,
        supersample: int = 1,
    ) -> None:
        if split not in SPLITS:
            raise ConfigError(unknown_choice("split", split, SPLITS))
        if count < 1 or not cameras:
            raise ConfigError(f"{count} scenes with {len(cameras)} cameras; give at least one of each")
        self.name = f"scenes of seed {seed}, {split}"
        self._key = (seed, SPLITS.index(split))
        self._count, self._cameras, self._points = count, tuple(cameras), points
        self._supersample = supersample

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Example:
        """Renders one scene; raises as `Source` says."""
        if not 0 <= index < self._count:
            raise IndexError(index)
        name = f"{self.name}:{index + 1}"
        rng = np.random.default_rng([*self._key, index])
        scene = random_scene(rng)
        pose = random_pose(rng, scene)
        camera = self._cameras[rng.integers(len(self._cameras))]
        image, depth = render(scene, camera, pose, self._supersample)
        rows, columns = np.nonzero(np.isfinite(depth))
        if len(rows) == 0:
            raise BadRow(name, NO_LABELS, "nothing but sky is seen")
        if self._points is not None:
            chosen = np.sort(rng.permutation(len(rows))[: self._points])
            rows, columns = rows[chosen], columns[chosen]
        pixels = np.stack([columns, rows], axis=1).astype(np.float32)
        return Example(name, (image,), (camera,), pixels, depth[rows, columns])
