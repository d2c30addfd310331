"""What becomes of an image message: prepared, measured, published; a step for each of the worker's threads."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from sensor_msgs.msg import CompressedImage

from depthlm_ros.camera_input import Pair
from depthlm_ros.depth import Frame
from depthlm_ros.errors import EngineError
from depthlm_ros.inference import Inference, Measurement, Prepared
from depthlm_ros.monitor import Monitor
from depthlm_ros.outputs import build_outputs, pose_message

if TYPE_CHECKING:
    from depthlm_ros.node import DepthNode

DEPTH_TOPICS = ("points", "depth", "overlay")
"""Topics that depth is measured for; depth/camera_info alone is nothing to measure for."""


@dataclass(frozen=True)
class Arrival:
    """An image with its CameraInfo, and when it came, in seconds of `time.perf_counter`."""

    pair: Pair
    seconds: float


@dataclass(frozen=True)
class ReadyFrame:
    """A frame that waits for the model."""

    arrival: Arrival
    prepared: Prepared


@dataclass(frozen=True)
class MeasuredFrame:
    """What the model said about a frame.

    Attributes:
        arrival: of the image.
        frame: the image.
        activation: under which the model was asked.
        wanted: topics that somebody listened to then.
        measured: None where nobody wanted depth.
        timing_s: seconds by stage.
        ended_s: when the model, or what came after it, was done; of `time.perf_counter`.
        published: whether the depth has been published.
    """

    arrival: Arrival
    frame: Frame
    activation: int
    wanted: frozenset[str]
    measured: Measurement | None
    timing_s: dict[str, float]
    ended_s: float
    published: bool = False


class FramePath:
    """The way of a frame through one configured node.

    Args:
        node: publishes; its parameters count when the model is asked.
        inference: who answers.
        monitor: is told how long each stage took.
        wanted: topics that somebody listens to and that this model has something for.
    """

    def __init__(
        self, node: DepthNode, inference: Inference, monitor: Monitor, wanted: Callable[[], frozenset[str]]
    ) -> None:
        self._node = node
        self._inference = inference
        self._monitor = monitor
        self._wanted = wanted

    def decode(self, pair: Pair) -> Frame:
        """Makes a frame of an image message and its CameraInfo; in any thread.

        Raises:
            ImageError, CameraError: one of them can't be used, or there is no CameraInfo.
        """
        return self._inference.frame(*self._both(pair), **self._kind(pair))

    def prepare(self, arrival: Arrival) -> ReadyFrame:
        """Does what needs no model."""
        pair, depth = arrival.pair, not self._wanted().isdisjoint(DEPTH_TOPICS)
        return ReadyFrame(arrival, self._inference.prepare(*self._both(pair), **self._kind(pair), depth=depth))

    def measure(self, ready: ReadyFrame) -> MeasuredFrame:
        """Asks the model what somebody wants to know now, with the parameters as they are now."""
        begun = time.perf_counter()
        activation, parameters, wanted = self._node.activation, self._node.parameters, self._wanted()
        self._inference.deadline = self._deadline(ready.arrival)
        stages = dict(ready.prepared.timing_s)
        stages["prepare-wait"] = begun - ready.arrival.seconds - sum(stages.values())
        measured = None
        if not wanted.isdisjoint(DEPTH_TOPICS):
            measured = self._inference.measure(ready.prepared, parameters, whole="depth" in wanted)
            stages |= measured.answer.timing_s
        frame, ended_s = ready.prepared.frame, time.perf_counter()
        done = MeasuredFrame(ready.arrival, frame, activation, wanted, measured, stages, ended_s)
        if "relative_pose" in wanted:
            # The model takes as long again for a pose, and the cloud isn't to wait for it.
            return self._tell_pose(self._publish_depth(done))
        self._inference.forget()
        return done

    def publish(self, done: MeasuredFrame) -> None:
        """Publishes the depth that somebody listened to when the model was asked."""
        if not done.published:
            done = self._publish_depth(done)
        points = {"asked": 0, "answered": 0}
        if done.measured is not None:
            answer = done.measured.answer
            asked = int(answer.asked.sum())
            points = {"asked": asked, "answered": int(answer.valid.sum()), "unaskable": len(answer) - asked,
                      "shifted": int(answer.shifted.sum())}  # fmt: skip
        self._monitor.frame_done(done.timing_s | {"total": done.ended_s - done.arrival.seconds}, **points)

    def _publish_depth(self, done: MeasuredFrame) -> MeasuredFrame:
        if done.measured is None:
            return replace(done, published=True)
        self._deadline(done.arrival)
        (image, info), frame, measured = done.arrival.pair, done.frame, done.measured
        depth_m = measured.depth_image(frame.image) if "depth" in done.wanted else None
        messages = build_outputs(
            done.wanted, frame.image, frame.camera, info, image.header, measured.query, measured.result, depth_m
        )
        built = time.perf_counter()
        self._node.publish(done.activation, messages)
        published = time.perf_counter()
        stages = done.timing_s | {"message": built - done.ended_s, "publish": published - built}
        return replace(done, timing_s=stages, ended_s=published, published=True)

    def _tell_pose(self, done: MeasuredFrame) -> MeasuredFrame:
        begun = time.perf_counter()
        try:
            told = self._inference.pose(done.frame, run=done.activation)
            if told is not None:
                self._deadline(done.arrival, "pose")
        except EngineError as error:
            # An engine that knows the deadline gives up by itself. Depth that is out already is no failed frame.
            if done.measured is None or not self._too_late(done.arrival, "pose"):
                raise
            told = None
            self._monitor.pose_late(str(error))
            self._node.complain("late pose", f"no relative pose: {error}")
        if told is not None:
            first, pose = told
            message = pose_message(first, pose)
            self._monitor.pose_done(message is not None)
            if message is not None:
                self._node.publish(done.activation, {"relative_pose": message})
            else:
                text = f"no relative pose: the answers can't be read: {dict(pose.texts)}"
                self._node.complain("relative_pose", text)
        ended = time.perf_counter()
        return replace(done, timing_s=done.timing_s | {"pose": ended - begun}, ended_s=ended)

    def _deadline(self, arrival: Arrival, what: str = "answer") -> float | None:
        """When an answer about an image is of no use any more, in seconds of `time.monotonic`; None for never.

        Its age counts from when it came: the clock of a camera or of a recording may be any.

        Raises:
            EngineError: it is too late already.
        """
        if late := self._too_late(arrival, what):
            raise EngineError(late)
        most = self._node.parameters.max_age_s
        return time.monotonic() + most - (time.perf_counter() - arrival.seconds) if most else None

    def _too_late(self, arrival: Arrival, what: str) -> str:
        """How late an answer is; empty while it is of use."""
        most, age = self._node.parameters.max_age_s, time.perf_counter() - arrival.seconds
        if not most or age <= most:
            return ""
        return (
            f"the {what} came {age:.1f} s after the image, max_age_s is {most:g}: not published; ask fewer points, "
            "take a faster engine, or allow more"
        )

    def _both(self, pair: Pair) -> Pair:
        return pair[0], self._node.require_info(pair[1])

    def _kind(self, pair: Pair) -> dict[str, bool]:
        return {"compressed": isinstance(pair[0], CompressedImage), "rectified": self._node.parameters.rectified}
