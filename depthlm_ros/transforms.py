"""Where frames are, from recorded tf2 messages: a tree of transforms, interpolated in time, never extrapolated."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from depthlm_ros.errors import TransformError

TF_TYPE = "tf2_msgs/msg/TFMessage"


def rotation_matrix(quaternion_xyzw: np.ndarray) -> np.ndarray:
    """(3, 3) of a quaternion of any length.

    Raises:
        TransformError: a quaternion without a direction: zero, or not finite.
    """
    quaternion = np.asarray(quaternion_xyzw, np.float64)
    length = np.linalg.norm(quaternion)
    if not (np.isfinite(length) and length > 1e-6):
        raise TransformError(f"quaternion {quaternion.tolist()} is no rotation; mend the publisher of this transform")
    x, y, z, w = quaternion / length
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
            [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
            [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
        ]
    )


@dataclass
class _Edge:
    """How a frame sits in its parent: at one time for all, or at stamps in ascending order."""

    parent: str
    static: bool
    stamps_ns: list[int] = field(default_factory=list)
    translations_m: list[np.ndarray] = field(default_factory=list)
    quaternions: list[np.ndarray] = field(default_factory=list)

    def at(self, child: str, stamp_ns: int) -> np.ndarray:
        """(4, 4) from child to parent."""
        if self.static:
            return _matrix(self.translations_m[-1], self.quaternions[-1])
        if not self.stamps_ns[0] <= stamp_ns <= self.stamps_ns[-1]:
            raise TransformError(
                f"no transform {self.parent} <- {child} at {stamp_ns} ns, it is known from {self.stamps_ns[0]} to "
                f"{self.stamps_ns[-1]} ns; record /tf from before the first image to after the last"
            )
        after = max(1, bisect_left(self.stamps_ns, stamp_ns))
        if after == len(self.stamps_ns):
            return _matrix(self.translations_m[-1], self.quaternions[-1])
        start, end = self.stamps_ns[after - 1 : after + 1]
        share = (stamp_ns - start) / (end - start) if end > start else 0.0
        translation = (1 - share) * self.translations_m[after - 1] + share * self.translations_m[after]
        return _matrix(translation, _slerp(*self.quaternions[after - 1 : after + 1], share))


class TransformTree:
    """All transforms of a recording. Frames are named without a leading slash."""

    def __init__(self) -> None:
        self._edges: dict[str, _Edge] = {}

    def add(self, messages: Iterable[tuple[Any, bool]]) -> None:
        """Takes up the transforms of tf2_msgs/TFMessage messages, each with whether it is of `/tf_static`.

        Raises:
            TransformError: a rotation that is none, or a frame that is its own ancestor.
        """
        for message, static in messages:
            for stamped in message.transforms:
                self._add_one(stamped, static)
        for child, edge in self._edges.items():
            self._chain(child)
            order = sorted(range(len(edge.stamps_ns)), key=edge.stamps_ns.__getitem__)
            for values in (edge.stamps_ns, edge.translations_m, edge.quaternions):
                values[:] = [values[index] for index in order]

    def _add_one(self, stamped: Any, static: bool) -> None:
        parent, child = frame_name(stamped.header.frame_id), frame_name(stamped.child_frame_id)
        at, turned = stamped.transform.translation, stamped.transform.rotation
        quaternion = np.array([turned.x, turned.y, turned.z, turned.w], np.float64)
        rotation_matrix(quaternion)
        edge = self._edges.get(child)
        if edge is None or edge.parent != parent or edge.static != static:
            # A frame has one parent: whoever said so last, as in tf2.
            edge = self._edges[child] = _Edge(parent, static)
        edge.stamps_ns.append(stamped.header.stamp.sec * 10**9 + stamped.header.stamp.nanosec)
        edge.translations_m.append(np.array([at.x, at.y, at.z], np.float64))
        edge.quaternions.append(quaternion / np.linalg.norm(quaternion))

    def root(self, frame: str) -> str:
        """The frame at the top of the tree that a frame hangs in; the frame itself where nothing is known of it."""
        return self._chain(frame_name(frame))[-1]

    def moving(self, frame: str) -> bool:
        """Whether anything between a frame and its root changes in time."""
        return any(not self._edges[child].static for child in self._chain(frame_name(frame))[:-1])

    def check_connected(self, *frames: str) -> None:
        """Raises TransformError unless all frames hang in one tree."""
        roots = {frame: self.root(frame) for frame in map(frame_name, frames)}
        if len(set(roots.values())) > 1:
            where = ", ".join(f"{frame!r} hangs below {root!r}" for frame, root in roots.items())
            raise TransformError(f"frames aren't connected: {where}; record /tf and /tf_static of the whole robot")

    def between(self, target: str, target_ns: int, source: str, source_ns: int, fixed: str | None = None) -> np.ndarray:
        """(4, 4) that takes points of `source` at one time to `target` at another.

        Args:
            fixed: the frame that is taken not to move between the two times; default: the root of both.

        Raises:
            TransformError: the frames aren't connected, or a transform isn't known at its time.
        """
        target, source = frame_name(target), frame_name(source)
        if target == source and target_ns == source_ns:
            return np.eye(4)
        self.check_connected(target, source, *([] if fixed is None else [fixed]))
        return np.linalg.inv(self._in(fixed, target, target_ns)) @ self._in(fixed, source, source_ns)

    def _in(self, fixed: str | None, frame: str, stamp_ns: int) -> np.ndarray:
        """(4, 4) from a frame to the fixed one at one time."""
        own, other = self._chain(frame), self._chain(frame_name(fixed)) if fixed else []
        shared = next((name for name in own if name in other), own[-1])
        up = self._up(frame, shared, stamp_ns)
        return np.linalg.inv(self._up(frame_name(fixed), shared, stamp_ns)) @ up if fixed else up

    def _up(self, frame: str, ancestor: str, stamp_ns: int) -> np.ndarray:
        matrix = np.eye(4)
        while frame != ancestor:
            matrix = self._edges[frame].at(frame, stamp_ns) @ matrix
            frame = self._edges[frame].parent
        return matrix

    def _chain(self, frame: str) -> list[str]:
        """A frame and its ancestors."""
        chain = [frame]
        while (edge := self._edges.get(chain[-1])) is not None:
            if edge.parent in chain:
                raise TransformError(f"frame {frame!r} is its own ancestor: {' -> '.join([*chain, edge.parent])}")
            chain.append(edge.parent)
        return chain


def frame_name(name: str) -> str:
    """A frame's name as tf2 knows it; ROS 1 drivers wrote a slash before it."""
    return name.removeprefix("/")


def _matrix(translation_m: np.ndarray, quaternion: np.ndarray) -> np.ndarray:
    matrix = np.eye(4)
    matrix[:3, :3], matrix[:3, 3] = rotation_matrix(quaternion), translation_m
    return matrix


def _slerp(start: np.ndarray, end: np.ndarray, share: float) -> np.ndarray:
    """The quaternion between two of length 1, by the shorter way."""
    cosine = float(start @ end)
    if cosine < 0:
        end, cosine = -end, -cosine
    if cosine > 0.9999:
        return start + share * (end - start)
    angle = np.arccos(cosine)
    return (np.sin((1 - share) * angle) * start + np.sin(share * angle) * end) / np.sin(angle)
