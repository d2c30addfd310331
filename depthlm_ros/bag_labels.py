"""Makes a training set of a recording: images and labels in DepthLM's schema, which `datasets.LabelledImages` reads.

Depth comes from depth images, or from a LiDAR's clouds that TF places in front of the camera (`lidar.py`). Labels are
z-depth in metres at whole pixels of rectified images, since the schema knows no lens. Of the recording's time the last
part is held out: neighbouring images are nearly the same, so that a random choice of images would test what was learnt
by heart.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Protocol

import cv2
import numpy as np

from depthlm_ros.bags import CLOUD_TYPE, IMAGE_TYPE, BagInfo, RecordedFrame, bag_info, image_encoder, read_frames
from depthlm_ros.camera import Camera
from depthlm_ros.errors import BagError, ConfigError
from depthlm_ros.lens import Distortion
from depthlm_ros.lidar import LidarPoints, LidarSettings

TRAIN_FILE = "train.jsonl"
HELD_OUT_FILE = "held_out.jsonl"
ABOUT_FILE = "about.json"
# A tenth of a millimetre: finer than any sensor, and short in the file.
_DECIMALS = 4


@dataclass(frozen=True)
class LabelSettings:
    """What becomes a label.

    Attributes:
        points: labels drawn from each image, 0 for all. DepthLM's curation draws 100.
        min_depth_m: nearer surfaces aren't labels: the robot itself, a sensor's blind zone.
        max_depth_m: nor are farther ones.
        every: only every n-th image of the recording.
        held_out: share of the recorded time, its last part, that goes to `held_out.jsonl`.
        gap_s: seconds before that part which go to neither file.
        seed: of the choice of points.
        images: format of the images, "png" or "jpeg:QUALITY".

    Raises:
        ConfigError: a value out of range.
    """

    points: int = 100
    min_depth_m: float = 0.1
    max_depth_m: float = 100.0
    every: int = 1
    held_out: float = 0.2
    gap_s: float = 0.5
    seed: int = 0
    images: str = "png"

    def __post_init__(self) -> None:
        if self.points < 0:
            raise ConfigError(f"points is {self.points}; give how many labels an image, or 0 for all")
        if not 0 <= self.min_depth_m < self.max_depth_m:
            raise ConfigError(
                f"depth limits are {self.min_depth_m} to {self.max_depth_m} m; the first must be the smaller, from 0"
            )
        if self.every < 1:
            raise ConfigError(f"every is {self.every}; give 1 for each image, 10 for each tenth")
        if not 0 <= self.held_out < 1:
            raise ConfigError(f"held_out is {self.held_out}; give a share of the time, from 0 to below 1")
        if self.gap_s < 0:
            raise ConfigError(f"gap_s is {self.gap_s}; give seconds, 0 for none")


@dataclass(frozen=True)
class LabelledSet:
    """What was made of a recording.

    Attributes:
        folder: holds `train.jsonl`, `held_out.jsonl`, `images/` and `about.json`.
        source: topic the depth came from.
        train: number of images to train on.
        held_out: number of images held out.
        in_gap: images between the two, in neither file.
        labels: number of labels in both files.
        left_out: images without labels, by cause.
        dropped: points that didn't become labels, by cause.
        notes: what the recording left open and what was assumed.
    """

    folder: Path
    source: str
    train: int
    held_out: int
    in_gap: int
    labels: int
    left_out: dict[str, int]
    dropped: dict[str, int]
    notes: tuple[str, ...]


class DepthSource(Protocol):
    """Where depth comes from.

    Attributes:
        topic: its name in the recording.
        dropped: points that it left out, by cause.
        notes: what was assumed.
    """

    topic: str
    dropped: Counter[str]

    @property
    def notes(self) -> tuple[str, ...]: ...

    def points(self, recorded: RecordedFrame, camera: Camera) -> np.ndarray | str:
        """(N, 3) points in metres in an image's optical frame, those that its camera sees, or why there are none.

        Args:
            camera: the image's, without its lens.
        """


class DepthImages:
    """Depth images that are registered to the colour images (a `DepthSource`)."""

    notes = ()

    def __init__(self, topic: str) -> None:
        self.topic = topic
        self.dropped: Counter[str] = Counter()

    def points(self, recorded: RecordedFrame, _camera: Camera) -> np.ndarray | str:
        """(N, 3) the surface in each pixel that has depth."""
        if recorded.truth_m is None:
            return "no depth image of its time"
        rows, columns = np.nonzero(np.isfinite(recorded.truth_m))
        return recorded.frame.camera.unproject(np.stack([columns, rows], axis=-1), recorded.truth_m[rows, columns])


def make_set(
    bag: str | Path,
    out: str | Path,
    settings: LabelSettings = LabelSettings(),
    *,
    image_topic: str | None = None,
    depth_topic: str | None = None,
    cloud_topic: str | None = None,
    lidar: LidarSettings | None = None,
    progress: Callable[[Iterable, int, str], Iterable] = lambda items, total, what: items,
) -> LabelledSet:
    """Makes a training set from a recording. The folder appears only when it is complete.

    Args:
        bag: a rosbag2 folder, or an .mcap or .db3 file.
        out: the folder to make; must not exist.
        image_topic: default: the first colour topic with a CameraInfo.
        depth_topic: 32FC1 or 16UC1 images registered to the colour images.
        cloud_topic: PointCloud2 of a LiDAR. With neither of the two: the depth images there are, or the clouds.
        lidar: how clouds become labels; default: `LidarSettings()`.
        progress: wraps the frames, to show a bar.

    Raises:
        BagError: the recording can't be read, lacks a topic, or no image of it could be labelled; `out` exists.
        ConfigError: both a depth and a cloud topic.
        TransformError: LiDAR and camera aren't connected.
    """
    if depth_topic and cloud_topic:
        raise ConfigError(f"depth from {depth_topic} and from {cloud_topic} can't be mixed; name one of the two")
    info = bag_info(bag, image_topic, depth_topic)
    clouds = any(kind == CLOUD_TYPE and number for _, kind, number in info.topics)
    if cloud_topic or (clouds and not depth_topic and not _depth_topics(info)):
        source: DepthSource = LidarPoints(info, cloud_topic, lidar or LidarSettings())
    else:
        source = DepthImages(depth_topic or default_depth_topic(info))
    frames = read_frames(bag, image_topic, source.topic if isinstance(source, DepthImages) else None)
    return write_set(out, info, source, progress(frames, info.count(info.image_topic), "label"), settings)


def default_depth_topic(info: BagInfo) -> str:
    """The depth topic of a recording: ground truth, or the only images with "depth" in their name.

    Raises:
        BagError: there is none, or several.
    """
    found = _depth_topics(info)
    if len(found) == 1:
        return found[0]
    if found:
        raise BagError(f"{info.path} has depth images on {', '.join(found)}; name one with --depth")
    topics = ", ".join(f"{name} ({number})" for name, _, number in info.topics) or "no topics"
    raise BagError(f"{info.path} has neither depth images nor {CLOUD_TYPE} among {topics}; name a topic with --depth")


def _depth_topics(info: BagInfo) -> list[str]:
    if info.truth_topic:
        return [info.truth_topic]
    return [name for name, kind, number in info.topics if kind == IMAGE_TYPE and number and "depth" in name.lower()]


def write_set(
    out: str | Path,
    info: BagInfo,
    source: DepthSource,
    frames: Iterable[RecordedFrame],
    settings: LabelSettings,
) -> LabelledSet:
    """Labels frames and writes the set; `make_set` with frames and a source of one's own.

    Raises:
        BagError: `out` exists, or no frame could be labelled.
    """
    out = Path(out)
    if out.exists():
        raise BagError(f"{out} exists already; delete it or name another folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch:
        folder = Path(scratch) / out.name
        (folder / "images").mkdir(parents=True)
        left_out: Counter[str] = Counter()
        rows = list(_labelled(folder, frames, source, settings, left_out))
        if not rows:
            causes = ", ".join(f"{cause} ({n})" for cause, n in (left_out + source.dropped).most_common())
            raise BagError(
                f"no image of {info.path} could be labelled from {source.topic}: {causes or 'there are no images'}"
            )
        parts = _split(rows, settings)
        for row in parts.pop("gap"):
            (folder / row["image"]).unlink()
        made = LabelledSet(
            folder=out,
            source=source.topic,
            train=len(parts[TRAIN_FILE]),
            held_out=len(parts[HELD_OUT_FILE]),
            in_gap=len(rows) - sum(map(len, parts.values())),
            labels=sum(len(row["depth"]) for part in parts.values() for row in part),
            left_out=dict(left_out),
            dropped=dict(source.dropped),
            notes=source.notes,
        )
        for name, part in parts.items():
            (folder / name).write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
        about = {"bag": info.path.name, "depth_kind": "z", **asdict(replace(made, folder=out.name))}
        text = json.dumps(about | {"settings": asdict(settings)}, indent=2, default=str)
        (folder / ABOUT_FILE).write_text(text + "\n", encoding="utf-8")
        shutil.move(folder, out)
    return made


def _labelled(
    folder: Path,
    frames: Iterable[RecordedFrame],
    source: DepthSource,
    settings: LabelSettings,
    left_out: Counter[str],
) -> Iterator[dict]:
    """The rows of the frames that could be labelled; their images are written."""
    suffix, encode = image_encoder(settings.images)
    for index, recorded in enumerate(frames):
        if index % settings.every:
            continue
        frame = recorded.frame
        camera = replace(frame.camera, distortion=Distortion())
        points_m = source.points(recorded, camera)
        if isinstance(points_m, str):
            left_out[points_m] += 1
            continue
        pixels, depth_m = labels(points_m, camera, settings, source.dropped)
        if not len(depth_m):
            left_out["no point in view and within the depth limits"] += 1
            continue
        rng = np.random.default_rng([settings.seed, frame.stamp_ns])
        drawn = np.sort(rng.permutation(len(depth_m))[: settings.points or None])
        name = f"images/{index:06d}.{suffix}"
        (folder / name).write_bytes(encode(rectified(frame.image, frame.camera)))
        yield {
            "image": name,
            "intrinsics": [camera.fx, camera.fy, camera.cx, camera.cy, camera.width, camera.height],
            "pixel_coords": pixels[drawn].tolist(),
            "depth": depth_m[drawn].round(_DECIMALS).tolist(),
            "depth_type": "z_depth",
            "stamp_ns": frame.stamp_ns,
        }


def labels(
    points_m: np.ndarray, camera: Camera, settings: LabelSettings, dropped: Counter[str] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Whole pixels (N, 2) of points (M, 3) in the camera's optical frame and their z-depth (N,) in metres.

    Points out of view or beyond the limits are dropped and counted; of points in one pixel the nearest stays.
    """
    dropped = Counter() if dropped is None else dropped
    in_limits = (points_m[:, 2] >= settings.min_depth_m) & (points_m[:, 2] <= settings.max_depth_m)
    pixels = camera.project(points_m)
    in_view = camera.contains(pixels)
    dropped["out of view"] += int((~in_view).sum())
    dropped["beyond the depth limits"] += int((in_view & ~in_limits).sum())
    pixels, depth_m = np.rint(pixels[in_view & in_limits]).astype(int), points_m[in_view & in_limits, 2]
    nearest_first = np.argsort(depth_m, kind="stable")
    flat = pixels[nearest_first] @ (1, camera.width)
    chosen = nearest_first[np.unique(flat, return_index=True)[1]]
    dropped["behind another in its pixel"] += len(depth_m) - len(chosen)
    return pixels[chosen], depth_m[chosen]


def rectified(image: np.ndarray, camera: Camera) -> np.ndarray:
    """(H, W, 3) uint8 of the same size and intrinsics without the lens; black where the camera saw nothing."""
    if camera.distortion.is_identity:
        return image
    ideal = replace(camera, distortion=Distortion())
    grid = np.stack(np.meshgrid(np.arange(camera.width), np.arange(camera.height)), axis=-1)
    source = np.nan_to_num(camera.project(ideal.rays(grid)), nan=-1e4).astype(np.float32)
    return cv2.remap(image, source[..., 0], source[..., 1], cv2.INTER_LINEAR)


def _split(rows: list[dict], settings: LabelSettings) -> dict[str, list[dict]]:
    """The rows of both files and of the gap between them, by time."""
    stamps = np.array([row["stamp_ns"] for row in rows], np.int64)
    first, last = int(stamps.min()), int(stamps.max())
    border = first + (1 - settings.held_out) * (last - first)
    parts: dict[str, list[dict]] = {TRAIN_FILE: [], HELD_OUT_FILE: [], "gap": []}
    for row, stamp in zip(rows, stamps, strict=True):
        if settings.held_out and stamp > border:
            parts[HELD_OUT_FILE].append(row)
        elif settings.held_out and stamp > border - settings.gap_s * 1e9:
            parts["gap"].append(row)
        else:
            parts[TRAIN_FILE].append(row)
    return parts
