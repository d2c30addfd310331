"""LiDAR clouds as a camera sees them: placed by TF, turned to the image's moment, hidden points left out."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from depthlm_ros.bags import CLOUD_TYPE, BagInfo, RecordedFrame, messages, opened
from depthlm_ros.camera import Camera
from depthlm_ros.errors import BagError, ConfigError, TransformError
from depthlm_ros.messages import header_stamp_ns, read_cloud
from depthlm_ros.transforms import TF_TYPE, TransformTree

# Seconds per unit of the fields in which drivers write each point's time: Ouster (t, ns), Velodyne (time, s), Hesai and
# RoboSense (timestamp, s), Livox (offset_time, ns).
_TIME_FIELDS = {"t": 1e-9, "time": 1.0, "timestamp": 1.0, "offset_time": 1e-9}
# More than a year: a time since 1970, not since the sweep began.
_ABSOLUTE_S = 3e7
# Points of a sweep that are nearer in time than this move together: 1 m/s is 5 mm.
_SLICE_S = 5e-3
# A surface hides what is at least a tenth farther away: thinner things than that can't be told from a slanted surface.
_HIDDEN_RATIO = 1.1


@dataclass(frozen=True)
class LidarSettings:
    """How clouds become labels.

    Attributes:
        beam_deg: angle between neighbouring beams of the LiDAR, the larger of its two resolutions: a nearer surface is
            taken to be closed between points that are no farther apart. Too small lets through what a camera doesn't
            see, too large drops what is seen through narrow gaps.
        max_age_s: largest time between an image and the cloud that labels it.
        fixed_frame: the frame that doesn't move while the robot does, such as "odom"; None: the root of the TF tree.

    Raises:
        ConfigError: a value out of range.
    """

    beam_deg: float = 2.0
    max_age_s: float = 0.1
    fixed_frame: str | None = None

    def __post_init__(self) -> None:
        if not 0 < self.beam_deg < 45:
            raise ConfigError(f"beam_deg is {self.beam_deg}; give the angle between neighbouring beams in degrees")
        if not self.max_age_s >= 0:
            raise ConfigError(f"max_age_s is {self.max_age_s}; give seconds, such as half a sweep")


@dataclass(frozen=True)
class Cloud:
    """One sweep.

    Attributes:
        stamp_ns: of its header.
        frame_id: of its points.
        points_m: (N, 3) float64, finite.
        offsets_s: (N,) when each was measured, seconds after the stamp; None where the driver doesn't say.
    """

    stamp_ns: int
    frame_id: str
    points_m: np.ndarray
    offsets_s: np.ndarray | None = None


def cloud_of(message) -> Cloud:
    """Reads a sensor_msgs/PointCloud2.

    Raises:
        CloudError: fields that don't fit.
        BagError: there is no x, y, z.
    """
    fields = read_cloud(message)
    if "points" not in fields:
        raise BagError(f"a cloud has the fields {', '.join(fields) or 'none'}; labels need x, y and z")
    stamp_ns = header_stamp_ns(message.header)
    points = np.stack([fields[axis] for axis in "xyz"], axis=-1).reshape(-1, 3).astype(np.float64)
    measured = np.isfinite(points).all(axis=1) & points.any(axis=1)
    offsets = None
    if name := next((name for name in _TIME_FIELDS if name in fields), None):
        offsets = fields[name].reshape(-1).astype(np.float64) * _TIME_FIELDS[name]
        if len(offsets) and np.nanmax(np.abs(offsets)) > _ABSOLUTE_S:
            offsets -= stamp_ns / 1e9
        offsets = offsets[measured]
    return Cloud(stamp_ns, message.header.frame_id, points[measured], offsets)


def seen_points(cloud: Cloud, tree: TransformTree, frame_id: str, stamp_ns: int, fixed: str | None) -> np.ndarray:
    """(N, 3) points of a cloud in a camera's optical frame, where they were at the image's moment.

    Raises:
        TransformError: the frames aren't connected, or a transform isn't known at its time.
    """
    if cloud.offsets_s is None or not tree.moving(cloud.frame_id):
        return _moved(tree.between(frame_id, stamp_ns, cloud.frame_id, cloud.stamp_ns, fixed), cloud.points_m)
    slices = np.rint(cloud.offsets_s / _SLICE_S).astype(int)
    points = np.empty_like(cloud.points_m)
    for each in np.unique(slices):
        then_ns = cloud.stamp_ns + round(each * _SLICE_S * 1e9)
        pose = tree.between(frame_id, stamp_ns, cloud.frame_id, then_ns, fixed)
        points[slices == each] = _moved(pose, cloud.points_m[slices == each])
    return points


def _moved(pose: np.ndarray, points_m: np.ndarray) -> np.ndarray:
    return points_m @ pose[:3, :3].T + pose[:3, 3]


def visible(points_m: np.ndarray, camera: Camera, beam_deg: float) -> np.ndarray:
    """(N,) bool: which points no nearer surface hides from the camera.

    The z-buffer of sparse points has holes, so a point is hidden where nearer ones surround it: one at least in each
    quadrant of a window that reaches a beam's angle far. A floor comes nearer towards one side only and so is
    seen, however far apart its rings are. Points out of view are never hidden.

    Args:
        points_m: (N, 3) in the camera's optical frame.
        camera: without a lens.
        beam_deg: as in `LidarSettings`.
    """
    seen = np.ones(len(points_m), bool)
    pixels = camera.project(points_m)
    inside = np.nonzero(camera.contains(pixels))[0]
    columns, rows = np.rint(pixels[inside]).astype(int).T
    depth = points_m[inside, 2].astype(np.float32)
    buffer = np.full((camera.height, camera.width), np.inf, np.float32)
    np.minimum.at(buffer, (rows, columns), depth)
    side = max(1, math.ceil(max(camera.fx, camera.fy) * math.tan(math.radians(beam_deg)))) + 1
    surrounded = np.zeros(buffer.shape, np.float32)
    for anchor in ((0, 0), (0, side - 1), (side - 1, 0), (side - 1, side - 1)):
        # Out of the image nothing is known, so a point at its border stays.
        nearest = cv2.erode(buffer, np.ones((side, side), np.uint8), anchor=anchor, borderValue=np.inf)
        surrounded = np.maximum(surrounded, nearest)
    seen[inside] = depth <= _HIDDEN_RATIO * surrounded[rows, columns]
    return seen


class LidarPoints:
    """The points of a recording's LiDAR that a camera sees, image after image (a `bag_labels.DepthSource`).

    Args:
        info: the recording.
        topic: of its clouds; None for the only one there is.
        settings: see there.

    Attributes:
        topic: as given or found.
        dropped: points left out so far because a nearer surface hides them.

    Raises:
        BagError: no such topic, none or several, or no transforms.
        TransformError: transforms that can't be.
    """

    def __init__(self, info: BagInfo, topic: str | None = None, settings: LidarSettings = LidarSettings()) -> None:
        self.topic = topic or default_cloud_topic(info)
        if (self.topic, CLOUD_TYPE) not in {(name, kind) for name, kind, number in info.topics if number}:
            raise BagError(f"{info.path} has no clouds on {self.topic!r}; its topics are {_names(info)}")
        self.dropped: Counter[str] = Counter()
        self._settings = settings
        self._tree = read_transforms(info)
        self._clouds = _read_clouds(info.path, self.topic)
        self._kept: list[Cloud] = []
        self._moving: bool | None = None

    @property
    def notes(self) -> tuple[str, ...]:
        """What was assumed about how the robot moved."""
        fixed = self._settings.fixed_frame or "the root of the TF tree"
        if self._moving:
            return (f"between a cloud and its image the world stood still in {fixed}",)
        return ("no transform moves, so a cloud and its image were taken to be of one moment; record /tf of odometry",)

    def points(self, recorded: RecordedFrame, camera: Camera) -> np.ndarray | str:
        """(N, 3) points in the image's optical frame, or why there are none.

        Raises:
            TransformError: LiDAR, camera and fixed frame aren't connected.
        """
        frame, fixed = recorded.frame, self._settings.fixed_frame
        cloud = self._nearest(frame.stamp_ns)
        if cloud is None or abs(cloud.stamp_ns - frame.stamp_ns) > self._settings.max_age_s * 1e9:
            return f"no cloud within {self._settings.max_age_s:g} s"
        self._tree.check_connected(frame.frame_id, cloud.frame_id, *([fixed] if fixed else []))
        self._moving = self._tree.moving(frame.frame_id) or self._tree.moving(cloud.frame_id)
        try:
            points = seen_points(cloud, self._tree, frame.frame_id, frame.stamp_ns, fixed)
        except TransformError:
            return "no transform of its time"
        seen = visible(points, camera, self._settings.beam_deg)
        self.dropped["hidden by a nearer surface"] += int((~seen).sum())
        return points[seen]

    def _nearest(self, stamp_ns: int) -> Cloud | None:
        """The cloud nearest to a moment; moments are asked for in ascending order."""
        while not self._kept or self._kept[-1].stamp_ns < stamp_ns:
            cloud = next(self._clouds, None)
            if cloud is None:
                break
            self._kept = [*self._kept[-1:], cloud]
        return min(self._kept, key=lambda cloud: abs(cloud.stamp_ns - stamp_ns), default=None)


def default_cloud_topic(info: BagInfo) -> str:
    """The only topic with clouds.

    Raises:
        BagError: there is none, or several.
    """
    found = [name for name, kind, number in info.topics if kind == CLOUD_TYPE and number]
    if len(found) == 1:
        return found[0]
    told = f"has clouds on {', '.join(found)}" if found else f"has no {CLOUD_TYPE} among {_names(info)}"
    raise BagError(f"{info.path} {told}; name a topic with --cloud")


def read_transforms(info: BagInfo) -> TransformTree:
    """All transforms of a recording.

    Raises:
        BagError: it has none, or can't be read.
        TransformError: transforms that can't be.
    """
    tree = TransformTree()
    with opened(info.path) as reader:
        connections = [each for each in reader.connections if each.msgtype == TF_TYPE]
        if not connections:
            raise BagError(
                f"{info.path} has no {TF_TYPE} among {_names(info)}; record /tf and /tf_static, without them nothing "
                "says where the LiDAR is"
            )
        tree.add(
            (message, topic.endswith("tf_static")) for topic, _, message in messages(info.path, reader, connections)
        )
    return tree


def _read_clouds(path: Path, topic: str) -> Iterator[Cloud]:
    with opened(path) as reader:
        connections = [each for each in reader.connections if each.topic == topic]
        for _, _, message in messages(path, reader, connections):
            yield cloud_of(message)


def _names(info: BagInfo) -> str:
    return ", ".join(f"{name} ({number})" for name, _, number in info.topics) or "no topics"
