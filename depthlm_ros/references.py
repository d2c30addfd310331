"""Frames to compare engines on, and what a model answered about them, on a disk.

A reference may come from another machine: nothing of it is believed before it was looked at.
"""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from depthlm_ros.camera import Camera, Distortion
from depthlm_ros.cards import models_dir
from depthlm_ros.errors import CameraError, ConfigError, ModelError
from depthlm_ros.manifest import read_json
from depthlm_ros.prompts import DIALECTS

REFERENCE_FILE = "reference.json"
FRAMES = 6
_MOST_POINTS = 1_000_000
_FORMAT = 1
_SHIPPED = "sample_drive"


@dataclass(frozen=True)
class ReferenceFrame:
    """An image to ask about: (H, W, 3) uint8 RGB, and its camera."""

    image: np.ndarray
    camera: Camera


@dataclass(frozen=True)
class Asked:
    """What a dialect answered about a frame.

    Attributes:
        frame: index of it.
        dialect: that was spoken.
        pixels: (N, 2) float32 `(u, v)`.
        depth_m: (N,) float32 z-depth in metres, NaN without an answer.
        texts: (N) answers; empty in the dense dialect.
    """

    frame: int
    dialect: str
    pixels: np.ndarray
    depth_m: np.ndarray
    texts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reference:
    """Answers to compare others with.

    Attributes:
        model: name of the model's card.
        engine: whose answers they are, with device and number format.
        frames: that were asked about.
        asked: the answers.
    """

    model: str
    engine: str
    frames: tuple[ReferenceFrame, ...]
    asked: tuple[Asked, ...]


def default_frames(camera: Camera | None = None, count: int = FRAMES) -> list[ReferenceFrame]:
    """Rendered frames: those of a camera, or frames of the shipped drive.

    Raises:
        BagError, ModelError: the shipped drive isn't there.
    """
    if camera is not None:
        return [ReferenceFrame(image, camera) for image in _rendered(camera, count)]
    return recorded_frames(models_dir() / _SHIPPED, count)


def recorded_frames(bag: Path, count: int = FRAMES) -> list[ReferenceFrame]:
    """Frames of a recording, evenly over its length.

    Raises:
        BagError: it can't be read, or has no images.
    """
    from depthlm_ros.bags import bag_info, read_frames

    info = bag_info(bag)
    images = info.count(info.image_topic)
    picked = set(np.linspace(0, max(images - 1, 0), count).round().astype(int).tolist())
    # One at a time: a recording may be larger than the memory.
    frames = [recorded.frame for i, recorded in enumerate(read_frames(bag)) if i in picked]
    if not frames:
        raise ConfigError(f"{bag} holds no images with a CameraInfo; record both topics")
    return [ReferenceFrame(frame.image, frame.camera) for frame in frames]


def _rendered(camera: Camera, count: int) -> list[np.ndarray]:
    """(H, W, 3) uint8 RGB views of rooms, corridors and streets, the same ones everywhere."""
    from depthlm_training.scenes import KINDS, random_pose, random_scene, render

    pinhole, maps = camera, None
    if camera.distortion != Distortion():
        # The renderer knows no lenses: a wider view, and each pixel of it where the lens shows it.
        pinhole = Camera(
            fx=camera.fx, fy=camera.fy, cx=camera.cx + camera.width / 4, cy=camera.cy + camera.height / 4,
            width=camera.width * 3 // 2, height=camera.height * 3 // 2,
        )  # fmt: skip
        u, v = np.meshgrid(np.arange(camera.width), np.arange(camera.height))
        rays = camera.rays(np.stack([u.ravel(), v.ravel()], 1).astype(np.float32))
        at = rays[:, :2] / rays[:, 2:] * (pinhole.fx, pinhole.fy) + (pinhole.cx, pinhole.cy)
        maps = at.reshape(camera.height, camera.width, 2).astype(np.float32)
    images = []
    for seed in range(count):
        rng = np.random.default_rng([6, seed])
        scene = random_scene(rng, KINDS[seed % len(KINDS)])
        image, _ = render(scene, pinhole, random_pose(rng, scene))
        images.append(image if maps is None else cv2.remap(image, maps, None, cv2.INTER_LINEAR))
    return images


def read_reference(folder: Path) -> Reference:
    """Reads what `record_reference` wrote.

    Raises:
        ModelError: there is none, or it is damaged.
    """
    path = folder / REFERENCE_FILE
    if not path.is_file():
        raise ModelError(f"{folder} has no {REFERENCE_FILE}; record one: depthlm parity MODEL --record {folder}")
    try:
        data = read_json(path)
        if data["format"] != _FORMAT:
            raise ModelError(f"{path} has format {data['format']}, this version reads {_FORMAT}; record it again")
        frames = tuple(_read_frame(folder, told) for told in data["frames"])
        with np.load(folder / "depths.npz", allow_pickle=False) as stored:
            asked = tuple(_read_asked(told, stored, i, frames) for i, told in enumerate(data["asked"]))
        if not asked:
            raise ValueError("it has no answers")
        return Reference(str(data["model"]), str(data["engine"]), frames, asked)
    except _DAMAGE as error:
        raise ModelError(f"{folder} is damaged ({type(error).__name__}: {error}); record it again") from error


# What a file that was cut off or changed makes of json, numpy, zipfile and OpenCV.
_DAMAGE = (
    OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, MemoryError, EOFError,
    zipfile.BadZipFile, zlib.error, cv2.error, CameraError,
)  # fmt: skip


def _read_asked(told: dict[str, Any], stored: Any, number: int, frames: Sequence[ReferenceFrame]) -> Asked:
    index, dialect, texts = told["frame"], told["dialect"], told["texts"]
    if type(index) is not int or not 0 <= index < len(frames) or dialect not in DIALECTS:
        raise ValueError(f"answers {number} are about frame {index!r} in dialect {dialect!r}")
    pixels, depth_m = stored[f"pixels_{number}"], stored[f"depth_m_{number}"]
    count = len(pixels)
    words = 0 if dialect == "dense" else count
    if (
        not 0 < count <= _MOST_POINTS
        or pixels.shape != (count, 2)
        or depth_m.shape != (count,)
        or {pixels.dtype, depth_m.dtype} != {np.dtype(np.float32)}
        or not isinstance(texts, list)
        or len(texts) != words
        or not all(isinstance(text, str) for text in texts)
        or not frames[index].camera.contains(pixels).all()
    ):
        raise ValueError(f"answers {number} don't fit together: {pixels.shape}, {depth_m.shape}, {len(texts)} texts")
    return Asked(index, dialect, pixels, depth_m, tuple(texts))


def _read_frame(folder: Path, told: dict[str, Any]) -> ReferenceFrame:
    name = told["image"]
    path = folder / name
    # A reference may come from elsewhere, and its frames are shown to servers.
    if Path(name).name != name or path.is_symlink():
        raise ValueError(f"image {name!r} is not a file of the folder")
    image = cv2.imread(str(path), cv2.IMREAD_COLOR)
    if image is None:
        raise ValueError(f"{name} can't be read")
    camera = camera_of(told["camera"])
    if image.shape[:2] != (camera.height, camera.width):
        raise ValueError(f"{name} has {image.shape[1]}x{image.shape[0]} pixels, its camera another size")
    return ReferenceFrame(cv2.cvtColor(image, cv2.COLOR_BGR2RGB), camera)


def camera_of(told: dict[str, Any]) -> Camera:
    """A camera from `camera_values`."""
    lens = told.get("distortion") or {}
    distortion = Distortion(lens["model"], tuple(lens["coefficients"])) if lens else Distortion()
    return Camera(**{**told, "distortion": distortion})


def camera_values(camera: Camera) -> dict[str, Any]:
    """A camera as JSON holds it."""
    values = asdict(camera)
    lens = camera.distortion
    bare = lens == Distortion()
    values["distortion"] = None if bare else {"model": lens.model, "coefficients": list(lens.coefficients)}
    return values


def write_reference(reference: Reference, folder: Path) -> None:
    """Writes answers and frames into a folder, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    frames = []
    for i, frame in enumerate(reference.frames):
        name = f"frame_{i}.png"
        if not cv2.imwrite(str(folder / name), cv2.cvtColor(frame.image, cv2.COLOR_RGB2BGR)):
            raise OSError(f"{folder / name} can't be written")
        frames.append({"image": name, "camera": camera_values(frame.camera)})
    arrays = {f"pixels_{i}": asked.pixels for i, asked in enumerate(reference.asked)}
    arrays |= {f"depth_m_{i}": asked.depth_m for i, asked in enumerate(reference.asked)}
    np.savez_compressed(folder / "depths.npz", **arrays)
    data = {
        "format": _FORMAT,
        "model": reference.model,
        "engine": reference.engine,
        "frames": frames,
        "asked": [{"frame": a.frame, "dialect": a.dialect, "texts": list(a.texts)} for a in reference.asked],
    }
    (folder / REFERENCE_FILE).write_text(json.dumps(data, indent=1), encoding="utf-8")
