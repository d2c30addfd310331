"""Plays a recording as ROS 2 messages to `depth_node` in another process and scores the clouds it publishes.

Images go out byte for byte as they were recorded, with their own stamps, on the recording's own topics. Both processes
share a ROS domain that nobody else on this machine uses: a robot's traffic neither disturbs a replay nor hears it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import yaml

from depthlm_ros.bags import BagInfo, RecordedFrame, bag_info, read_frames
from depthlm_ros.cards import load_card
from depthlm_ros.config import NODE_NAME, Parameters
from depthlm_ros.densified import Densified
from depthlm_ros.encodings import decode_depth
from depthlm_ros.errors import BagError, EngineError, MissingDependencyError
from depthlm_ros.evaluate import (
    DENSE_SHARE,
    AnsweredFrame,
    Run,
    Tally,
    dialect_notes,
    machine,
    progress,
    up_to_failure,
)
from depthlm_ros.messages import header_stamp_ns, read_cloud
from depthlm_ros.middleware import release_shared_memory, use_large_message_profile
from depthlm_ros.queries import plan_query, points_asked

# Above 101 the ports of a domain (7400 + 250 * domain) run into those that Linux hands out itself.
_DOMAINS = range(1, 101)
# A cloud of 20 bytes a point stays under the 16 MiB that config/fastdds.xml gives a message in shared memory.
_MOST_POINTS = 700_000
_POLL_S = 0.02
# The depth image follows its cloud at once, if the node knew that it is wanted.
_GRACE_S = 1.0
_FATES = ("processed", "dropped", "failed")


@dataclass(frozen=True)
class ReplayOptions:
    """How to play.

    Attributes:
        topic: image topic; None takes the first colour one with a CameraInfo.
        rate: times the recorded speed; None plays in lockstep, each image after the cloud of the last one.
        timeout_s: how long to wait for one cloud.
        startup_timeout_s: how long to wait until the node listens.
        frames: play only so many images; 0 plays all.
        match_px: how near an answer must be to a sparse label to be compared with it.
    """

    topic: str | None = None
    rate: float | None = None
    timeout_s: float = 60.0
    startup_timeout_s: float = 180.0
    frames: int = 0
    match_px: float = 2.0


def replay(bag: str | Path, settings: dict, options: ReplayOptions | None = None, *, log_folder: str | Path) -> Run:
    """Plays a recording to a node of its own and collects the clouds.

    Args:
        bag: a rosbag2 folder, or an .mcap or .db3 file.
        settings: the node's parameters that differ from their defaults, names of `config.Parameters`.
        options: how to play.
        log_folder: where the node's parameters and log go.

    Raises:
        BagError: the recording can't be read or lacks a topic.
        EngineError: the node ended or never listened; the message has the tail of its log.
        MissingDependencyError: no rclpy here.
    """
    options = options or ReplayOptions()
    info = bag_info(bag, options.topic)
    first = next(read_frames(bag, options.topic), None)
    if first is None:
        raise BagError(f"{bag} holds no image on {info.image_topic}; record one or name another with --topic")
    parameters = Parameters.from_mapping({**_sensible(first, settings), **settings, "compressed": info.compressed})
    # The node resolves an empty dialect the same way; with it, what was asked and not answered can be told.
    card, _ = load_card(parameters.model, commercial_use=parameters.commercial_use)
    dialect = card.require_dialect(parameters.dialect or None)
    total = min(options.frames or sys.maxsize, info.count(info.image_topic))
    tally = Tally(total, match_px=options.match_px)
    with _own_world(Path(log_folder)), _node_process(parameters, info, options, Path(log_folder)) as process:
        with _Player(info, process, Path(log_folder)) as player:
            player.wait_until_heard(options.startup_timeout_s)
            frames = (frame for frame, _ in zip(read_frames(bag, options.topic), range(total), strict=False))
            play = _in_lockstep if options.rate is None else _in_real_time
            failures: list[str] = []
            for frame in up_to_failure(play(player, progress(frames, total, "replay"), options), failures):
                tally.add(_with_densified(_with_unanswered(frame, parameters, dialect), parameters, dialect))
            if process.poll() is None:
                player.wait_for_report()
            run = _run(info, tally, player, options, parameters, dialect)
            return replace(run, about_model=card.about, broke_off="; ".join(failures))


def _sensible(first: RecordedFrame, settings: dict) -> dict:
    """Where truth is a few labels, asks every pixel (as far as a message carries), so that each label is compared."""
    if first.truth_m is None or "stride" in settings or np.isfinite(first.truth_m).mean() >= DENSE_SHARE:
        return {}
    return {"stride": int(np.ceil(np.sqrt(max(1.0, first.truth_m.size / _MOST_POINTS))))}


# ---------------------------------------------------------------- the other process


@contextlib.contextmanager
def _own_world(log_folder: Path) -> Iterator[None]:
    """Environment for this process and its children: a ROS domain of their own, on this machine alone."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as reservation:
        # A name in Linux' abstract namespace is gone with the process that holds it, however that ends.
        for offset in range(len(_DOMAINS)):
            domain = _DOMAINS[(os.getpid() + offset) % len(_DOMAINS)]
            with contextlib.suppress(OSError):
                reservation.bind(f"\0depthlm_ros_domain_{domain}")
                break
        else:
            raise EngineError(f"all ROS domains from {_DOMAINS[0]} to {_DOMAINS[-1]} are taken; end other replays")
        log_folder.mkdir(parents=True, exist_ok=True)
        before = dict(os.environ)
        os.environ.update(
            ROS_DOMAIN_ID=str(domain),
            ROS_AUTOMATIC_DISCOVERY_RANGE="LOCALHOST",
            ROS_LOG_DIR=str(log_folder.resolve() / "ros"),
        )
        use_large_message_profile(os.environ)
        try:
            yield
        finally:
            os.environ.clear()
            os.environ.update(before)


@contextlib.contextmanager
def _node_process(
    parameters: Parameters, info: BagInfo, options: ReplayOptions, log_folder: Path
) -> Iterator[subprocess.Popen]:
    image_topic = info.image_topic.removesuffix("/compressed") if info.compressed else info.image_topic
    values = {name: getattr(parameters, name) for name in Parameters.__dataclass_fields__}
    if options.rate is None:
        # In lockstep a lost image would be taken for a dropped one, so the transport may lose none.
        topics = (info.image_topic, info.info_topic)
        values["qos_overrides"] = {topic: {"subscription": {"reliability": "reliable"}} for topic in topics}
    parameter_file = log_folder / "node_parameters.yaml"
    parameter_file.write_text(yaml.safe_dump({NODE_NAME: {"ros__parameters": values}}), encoding="utf-8")
    command = [sys.executable, "-m", "depthlm_ros.node", "--ros-args"]
    command += ["-r", f"image:={image_topic}", "--params-file", str(parameter_file)]
    with (log_folder / "node.log").open("wb") as log:
        # In a session of its own, so that Ctrl-C reaches this process alone and the node is ended in order.
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            yield process
        finally:
            _end(process)


def _end(process: subprocess.Popen) -> None:
    for how, patience_s in ((signal.SIGINT, 5.0), (signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0)):
        if process.poll() is not None:
            return
        if how == signal.SIGKILL:
            release_shared_memory(Path(f"/proc/{process.pid}/fd"))
        process.send_signal(how)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience_s)


# ---------------------------------------------------------------- this process


@dataclass(frozen=True)
class _Cloud:
    points: np.ndarray
    confidence: np.ndarray
    arrived_s: float
    # Of `_Player.quiet_s`, when it came.
    quiet_s: float


class _Player:
    """Publishes recorded messages and collects what the node answers, by the stamp of the image.

    Attributes:
        quiet: whether nothing came while it was last waited.
        quiet_s: seconds that were waited for a message in vain. Whether something will still come is judged by these:
            after a while in which this process could not run, messages that came in time have yet to be handled.
    """

    def __init__(self, info: BagInfo, process: subprocess.Popen, log_folder: Path) -> None:
        try:
            import rclpy
            from diagnostic_msgs.msg import DiagnosticArray
            from rclpy.executors import SingleThreadedExecutor
            from rclpy.qos import QoSProfile, ReliabilityPolicy
            from sensor_msgs.msg import CameraInfo, CompressedImage, Image, PointCloud2
        except ImportError as error:
            raise MissingDependencyError(
                f"replay needs ROS 2 ({str(error).splitlines()[0]}): source a ROS 2 installation, or use the "
                "environment that 'make env' makes; without ROS, 'depthlm evaluate' scores the same recording"
            ) from error
        self._process, self._log = process, log_folder / "node.log"
        self._context = rclpy.Context()
        rclpy.init(context=self._context)
        self._node = rclpy.create_node("depthlm_replay", context=self._context)
        self._executor = SingleThreadedExecutor(context=self._context)
        self._executor.add_node(self._node)
        deep = QoSProfile(depth=50, reliability=ReliabilityPolicy.RELIABLE)
        kind = CompressedImage if info.compressed else Image
        self._image = self._node.create_publisher(kind, info.image_topic, deep)
        self._info = self._node.create_publisher(CameraInfo, info.info_topic, deep)
        self._node.create_subscription(PointCloud2, "points", self._on_cloud, deep)
        self._node.create_subscription(Image, "depth", self._on_depth, deep)
        self._node.create_subscription(DiagnosticArray, "/diagnostics", self._on_diagnostics, deep)
        self.clouds: dict[int, _Cloud] = {}
        self.depths: dict[int, np.ndarray] = {}
        self.report: dict[str, str] = {}
        self.reports = 0
        self.sent = 0
        self.quiet_s = 0.0
        self.quiet = False
        self._handled = 0

    def __enter__(self) -> _Player:
        return self

    def __exit__(self, *_: object) -> None:
        self._executor.shutdown()
        self._node.destroy_node()
        self._context.try_shutdown()

    def _on_cloud(self, message) -> None:
        arrived_s = time.perf_counter()
        self._handled += 1
        arrays = read_cloud(message)
        points = arrays["points"].reshape(-1, 3)
        known = np.isfinite(points).all(axis=1)
        confidence = arrays["confidence"].reshape(-1)[known]
        self.clouds[header_stamp_ns(message.header)] = _Cloud(points[known], confidence, arrived_s, self.quiet_s)

    def _on_depth(self, message) -> None:
        self._handled += 1
        self.depths[header_stamp_ns(message.header)] = decode_depth(message)

    def _on_diagnostics(self, message) -> None:
        self._handled += 1
        for status in message.status:
            if status.name.startswith(NODE_NAME):
                self.report = {pair.key: pair.value for pair in status.values}
                self.reports += 1

    def answered(self, stamp_ns: int) -> bool:
        """Whether all that will come for this image has come."""
        cloud = self.clouds.get(stamp_ns)
        return cloud is not None and (stamp_ns in self.depths or self.quiet_s - cloud.quiet_s > _GRACE_S)

    def count(self, name: str) -> int:
        """A counter of the node's last report, 0 before the first."""
        return int(self.report.get(name, 0))

    def idle(self) -> bool:
        """Whether the node's last report accounts for every frame that reached it."""
        return self.count("frames received") == sum(self.count(f"frames {fate}") for fate in _FATES)

    def spin(self, seconds: float = _POLL_S) -> None:
        """Handles what arrived.

        Raises:
            EngineError: the node has ended.
        """
        handled = self._handled
        self._executor.spin_once(timeout_sec=seconds)
        self.quiet = self._handled == handled
        if self.quiet:
            self.quiet_s += seconds
        if self._process.poll() is not None:
            raise EngineError(
                f"the node ended with status {self._process.returncode}; its log {self._log} ends:\n{self._tail()}"
            )

    def wait_until_heard(self, patience_s: float) -> None:
        """Waits until the node subscribes to image and CameraInfo, which it does when it is active."""
        deadline = time.monotonic() + patience_s
        while not (self._image.get_subscription_count() and self._info.get_subscription_count()):
            if time.monotonic() > deadline:
                raise EngineError(
                    f"the node did not subscribe to {self._image.topic_name} within {patience_s:g} s; raise "
                    f"--startup-timeout if the model is large. The end of its log {self._log}:\n{self._tail()}"
                )
            self.spin()
        # The node may know of our publishers a moment later than we know of it, and of who listens: best effort doesn't
        # repeat itself, and a depth image is made only for those that listen.
        settled_s = time.monotonic() + _GRACE_S
        while time.monotonic() < settled_s:
            self.spin()

    def wait_for_report(self, patience_s: float = 30.0) -> None:
        """Waits for diagnostics that were made after now, so that they count every frame.

        They come once a second; only a node that hangs, or a machine that stands still, needs the patience.
        """
        deadline, seen = time.monotonic() + patience_s, self.reports
        while self.reports < seen + 2 and time.monotonic() < deadline:
            self.spin()

    def publish(self, recorded: RecordedFrame) -> float:
        """Sends one image with its CameraInfo; returns when, in `time.perf_counter` seconds."""
        sent_s = time.perf_counter()
        self._info.publish(_stamped(recorded))
        self._image.publish(recorded.image_raw)
        self.sent += 1
        return sent_s

    def _tail(self, lines: int = 15) -> str:
        return "\n".join(self._log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])


def _stamped(recorded: RecordedFrame):
    """The recorded CameraInfo; with the image's stamp where a driver recorded them apart, so that they pair."""
    from rclpy.serialization import deserialize_message
    from sensor_msgs.msg import CameraInfo

    message = deserialize_message(recorded.info_raw, CameraInfo)
    message.header.stamp.sec, message.header.stamp.nanosec = divmod(recorded.frame.stamp_ns, 10**9)
    return message


def _in_lockstep(player: _Player, frames: Iterator[RecordedFrame], options: ReplayOptions) -> Iterator[AnsweredFrame]:
    """Sends each image after the cloud of the last one came, or the node reported a failure, or time ran out."""
    for index, recorded in enumerate(frames):
        stamp_ns = recorded.frame.stamp_ns
        failed = player.count("frames failed")
        sent_s = player.publish(recorded)
        deadline = time.monotonic() + options.timeout_s
        while not player.answered(stamp_ns):
            if player.count("frames failed") > failed or time.monotonic() > deadline:
                break
            player.spin()
        if stamp_ns in player.clouds:
            yield _answered(player, recorded, index, sent_s)


def _in_real_time(player: _Player, frames: Iterator[RecordedFrame], options: ReplayOptions) -> Iterator[AnsweredFrame]:
    """Sends the images when they are due, whatever the node is doing, and yields the answered ones."""
    open_frames: dict[int, tuple[int, RecordedFrame, float]] = {}
    started_s, first_ns = time.perf_counter(), None
    for index, recorded in enumerate(frames):
        first_ns = recorded.frame.stamp_ns if first_ns is None else first_ns
        due_s = started_s + (recorded.frame.stamp_ns - first_ns) / 1e9 / options.rate
        while (left := due_s - time.perf_counter()) > 0:
            player.spin(min(left, _POLL_S))
        open_frames[recorded.frame.stamp_ns] = index, recorded, player.publish(recorded)
        yield from _collected(player, open_frames)
    deadline, reports = time.monotonic() + options.timeout_s, player.reports
    while open_frames and time.monotonic() < deadline:
        player.spin()
        yield from _collected(player, open_frames)
        # A report from after the last image in which nothing is in work, and nothing to be handled: what is still open
        # will never come.
        done = player.reports >= reports + 2 and player.idle() and player.quiet
        if done and not player.clouds.keys() & open_frames.keys():
            break


def _collected(player: _Player, open_frames: dict[int, tuple[int, RecordedFrame, float]]) -> Iterator[AnsweredFrame]:
    for stamp_ns in [stamp_ns for stamp_ns in open_frames if player.answered(stamp_ns)]:
        index, recorded, sent_s = open_frames.pop(stamp_ns)
        yield _answered(player, recorded, index, sent_s)


def _answered(player: _Player, recorded: RecordedFrame, index: int, sent_s: float) -> AnsweredFrame:
    stamp_ns = recorded.frame.stamp_ns
    cloud = player.clouds.pop(stamp_ns)
    camera = recorded.frame.camera
    return AnsweredFrame(
        name=f"frame {index}",
        image=recorded.frame.image,
        camera=camera,
        pixels=camera.project(cloud.points.astype(np.float64)),
        depth_m=cloud.points[:, 2],
        confidence=cloud.confidence,
        truth_m=recorded.truth_m,
        latency_s=cloud.arrived_s - sent_s,
        depth_map_m=player.depths.pop(stamp_ns, None),
    )


def _with_unanswered(frame: AnsweredFrame, parameters: Parameters, dialect: str) -> AnsweredFrame:
    """Adds the pixels that were asked but have no point in the cloud, so that they count as wrong.

    A list cloud holds answers only; which pixels were asked follows from the parameters, unless `sampling` follows the
    answers. Points that a filter of the node removed on purpose are no missing answers.
    """
    by_answers = points_asked(parameters, dialect) > 0 and parameters.sampling == "uncertainty"
    if parameters.max_depth_m or parameters.min_confidence or by_answers:
        return frame
    height, width = frame.image.shape[:2]
    asked = plan_query(parameters, dialect, width, height, whole=False, image=frame.image).pixels.astype(int)
    at = np.rint(frame.pixels).astype(int)
    missing = asked[~np.isin(asked[:, 1] * width + asked[:, 0], at[:, 1] * width + at[:, 0])]
    return replace(
        frame,
        pixels=np.concatenate([frame.pixels, missing]),
        depth_m=np.concatenate([frame.depth_m, np.full(len(missing), np.nan, np.float32)]),
        confidence=np.concatenate([frame.confidence, np.zeros(len(missing), np.float32)]),
    )


def _with_densified(frame: AnsweredFrame, parameters: Parameters, dialect: str) -> AnsweredFrame:
    """Says of a depth image that the node filled in that it did so."""
    if not parameters.densify or not points_asked(parameters, dialect) or frame.depth_map_m is None:
        return frame
    return replace(frame, densified=Densified(frame.depth_map_m, frame.pixels))


def _run(
    info: BagInfo, tally: Tally, player: _Player, options: ReplayOptions, parameters: Parameters, dialect: str
) -> Run:
    asked, unanswered = player.count("points asked"), player.count("points unanswered")
    figures = {
        "frames_sent": player.sent,
        "frames_answered": len(tally.frames),
        "frames_dropped": player.sent - len(tally.frames),
        "frames_dropped_by_node": player.count("frames dropped"),
        "frames_lost_before_node": player.sent - player.count("frames received"),
        "frames_failed": player.count("frames failed"),
        "points": sum(frame["points"] for frame in tally.frames),
        "pixels_asked": asked,
        "pixels_unanswered": unanswered,
        "points_per_second": tally.points_per_second(),
        **{f"latency_{name}": value for name, value in tally.latency().items()},
    }
    report = player.report
    environment = {name: report[name] for name in ("model", "dialect", "device", "dtype", "why") if report.get(name)}
    environment["mode"] = "lockstep" if options.rate is None else f"real time, {options.rate:g} times recorded speed"
    changed = {s: getattr(parameters, s) for s in ("points", "stride", "sampling")}
    environment["pixels"] = ", ".join(f"{name} {value}" for name, value in changed.items())
    notes = [*(f"{key}: {value}" for key, value in info.notes.items()), *dialect_notes(dialect)]
    if info.truth_topic is None:
        notes.append("the recording has no ground truth, so nothing is scored")
    if report.get("last error"):
        notes.append(f"the node's last error: {report['last error']}")
    return Run(
        f"Replay of {info.path.name} through the node", tally, figures, {**environment, **machine()}, tuple(notes)
    )
