"""Every system behind one parameter: the real node in another process, of which only `model:=` differs."""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

rclpy = pytest.importorskip("rclpy")

from checkpoints import make_checkpoint  # noqa: E402
from diagnostic_msgs.msg import DiagnosticArray  # noqa: E402
from geometry_msgs.msg import Point, PointStamped, PoseStamped  # noqa: E402
from rclpy.executors import SingleThreadedExecutor  # noqa: E402
from rclpy.node import Node  # noqa: E402
from rclpy.qos import QoSProfile  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from sensor_msgs.msg import CameraInfo, Image, PointCloud2  # noqa: E402
from std_msgs.msg import String  # noqa: E402
from test_dpt_head import dpt_checkpoint, remembered_bytes, tensor_bytes  # noqa: E402
from test_node import until  # noqa: E402
from test_node_questions import AskingWorld  # noqa: E402
from test_node_two_processes import (  # noqa: E402
    CARD,
    FRAME,
    PATIENCE_S,
    RELIABLE,
    SLOW_NODE,
    NodeProcess,
    node_command,
    wait,
)

from depthlm_ros.camera import Camera  # noqa: E402
from depthlm_ros.cards import CARD_FILE  # noqa: E402
from depthlm_ros.messages import camera_info_message, header_stamp_ns, read_cloud, rgb_message  # noqa: E402
from depthlm_ros.node import load_estimator  # noqa: E402
from depthlm_ros.questions import LIMIT  # noqa: E402

# Nearly the focal length that all these systems want, so that small images stay small.
CAMERA = Camera(fx=900.0, fy=900.0, cx=47.5, cy=31.5, width=96, height=64)
DISTANCE_M = 2.47
DEPTH_TEXT = f"<think> It is near. </think>\n\n<answer> {DISTANCE_M} </answer>"
POSE_TEXT = "rotation 90 degrees: yaw = 90, pitch = 0, roll = 0; moved right (1.0, 0.0, 0.0), 2.50 meters"
POINTS = 6


class Peer:
    """A camera, a listener to everything, and somebody who asks, in this process."""

    HEARD = {
        "points": PointCloud2, "relative_pose": PoseStamped, "depth_node/answer": String,
        "depth_node/query/point": PointStamped,
    }  # fmt: skip

    def __init__(self) -> None:
        self.context = rclpy.Context()
        rclpy.init(context=self.context)
        self.node = Node("peer", context=self.context)
        self.heard: dict[str, list[Any]] = {name: [] for name in self.HEARD}
        for name, kind in self.HEARD.items():
            self.node.create_subscription(kind, name, self.heard[name].append, RELIABLE)
        self.status: dict[str, str] = {}
        self.messages: list[str] = []
        self.node.create_subscription(DiagnosticArray, "/diagnostics", self._on_diagnostics, 10)
        self.images = self.node.create_publisher(Image, "image", RELIABLE)
        self.infos = self.node.create_publisher(CameraInfo, "camera_info", RELIABLE)
        # As many as may be on their way at once.
        self.ask = self.node.create_publisher(String, "depth_node/ask", QoSProfile(depth=100))
        self.query = self.node.create_publisher(PointStamped, "depth_node/query", QoSProfile(depth=100))
        self.executor = SingleThreadedExecutor(context=self.context)
        self.executor.add_node(self.node)
        threading.Thread(target=self.executor.spin, daemon=True).start()
        self.stamp = 0

    def _on_diagnostics(self, message: DiagnosticArray) -> None:
        for status in message.status:
            self.status = {entry.key: entry.value for entry in status.values}
            self.messages.append(status.message)

    def send(self) -> None:
        self.stamp += 1
        image = np.random.default_rng(self.stamp).integers(0, 256, (CAMERA.height, CAMERA.width, 3), dtype=np.uint8)
        self.infos.publish(camera_info_message(CAMERA, self.stamp, FRAME))
        self.images.publish(rgb_message(image, self.stamp, FRAME))

    def send_until(self, process: NodeProcess, condition: Callable[[], bool], what: str) -> None:
        """Sends frames until the node has done something; it takes the newest."""

        def sent_and_true() -> bool:
            self.send()
            done = threading.Event()
            done.wait(0.1)
            return condition()

        wait(process, sent_and_true, what)

    def close(self) -> None:
        self.executor.shutdown(timeout_sec=PATIENCE_S)
        self.node.destroy_node()
        rclpy.try_shutdown(context=self.context)


@pytest.fixture
def start(ros_domain) -> Iterator[Callable[..., tuple[NodeProcess, Peer]]]:
    started: list[Any] = []

    def make(model: Path, *parameters: str) -> tuple[NodeProcess, Peer]:
        fixed = ("device:=cpu", "dtype:=float32", "cpu_threads:=1", f"points:={POINTS}", "answer_tokens:=12",
                 "question_timeout_s:=600.0")  # fmt: skip
        process = NodeProcess(node_command(f"model:={model}", *fixed, *parameters))
        peer = Peer()
        started.extend((process, peer))
        takers = (peer.ask, peer.query)
        wait(process, lambda: all(taker.get_subscription_count() for taker in takers), "the node to take questions")
        return process, peer

    yield make
    for each in reversed(started):
        each.close() if isinstance(each, Peer) else each.stop()


@dataclass(frozen=True)
class System:
    """A kind of checkpoint as somebody would drop it into a folder: nothing but config.json says what it is."""

    make: Callable[[Path], Path]
    dialect: str
    assumed: str


def speaker(architecture: str) -> Callable[[Path], Path]:
    return lambda folder: make_checkpoint(folder, architecture, dense_head=False, says=DEPTH_TEXT)


SYSTEMS = {
    "DepthLM, Pixtral": System(speaker("llava"), "marker", "DepthLM 12B"),
    "DepthLM, Qwen2.5-VL": System(speaker("qwen2_5_vl"), "marker", "DepthLM 3B/7B"),
    "VLM3, Qwen3-VL": System(speaker("qwen3_vl"), "coordinates", "VLM3"),
    "DepthVLM, DPT head": System(dpt_checkpoint, "dense", "DepthVLM"),
}


def at_rest(node: Any) -> bool:
    """Whether no step of a node's worker has a frame any more."""
    counts = node.counts
    return not node._worker.busy and counts.received == counts.dropped + counts.processed + counts.failed


@pytest.mark.parametrize("name", SYSTEMS)
def test_the_model_is_the_only_switch(start, tmp_path, name):
    system = SYSTEMS[name]
    process, peer = start(system.make(tmp_path / "model"))
    peer.ask.publish(String(data="What is it?"))
    peer.query.publish(PointStamped(point=Point(x=40.0, y=30.0)))
    wanted = [peer.heard[topic] for topic in ("points", "depth_node/answer", "depth_node/query/point")]
    peer.send_until(process, lambda: all(wanted), "a cloud, an answer and a point")
    wait(process, lambda: peer.status.get("frames processed", "0") != "0", "the frame in the diagnostics")

    assert peer.status["dialect"] == system.dialect
    assert f"taken for a model trained like {system.assumed}" in process.log
    cloud, answer, point = (messages[0] for messages in wanted)
    assert cloud.header.frame_id == point.header.frame_id == FRAME
    assert 1 <= header_stamp_ns(cloud.header) <= peer.stamp
    content = read_cloud(cloud)
    assert len(content["points"]) == POINTS and (content["z"] > 0).all()
    distances = np.linalg.norm([*content["points"], (point.point.x, point.point.y, point.point.z)], axis=1)
    if system.dialect == "dense":
        assert np.isfinite(distances).all()
    else:
        np.testing.assert_allclose(distances, DISTANCE_M, rtol=1e-5)
        assert answer.data == DEPTH_TEXT
    assert process.stop() == 0, process.log


def test_a_model_for_poses_tells_them_and_says_why_no_cloud_comes(start, tmp_path):
    folder = make_checkpoint(tmp_path / "model", "qwen3_vl", dense_head=False, says=POSE_TEXT)
    card = CARD | {"dialects": [], "tasks": ["pose"], "system": "vlm3", "focal_px": 750.0, "max_new_tokens": 24}
    del card["default_dialect"], card["depth_kind"]
    (folder / CARD_FILE).write_text(yaml.safe_dump(card), encoding="utf-8")
    process, peer = start(folder, "relative_pose:=true")
    peer.ask.publish(String(data="What is it?"))
    answers, poses = peer.heard["depth_node/answer"], peer.heard["relative_pose"]
    peer.send_until(process, lambda: len(poses) > 1 and bool(answers), "poses and an answer")
    wait(process, lambda: any("nothing comes on points" in m and "it is for pose" in m for m in peer.messages), "why")
    where, turned = poses[0].pose.position, poses[0].pose.orientation
    assert (where.x, where.y, where.z) == (2.5, 0.0, 0.0)
    assert turned.y == pytest.approx(math.sqrt(0.5)) and turned.w == pytest.approx(math.sqrt(0.5))
    assert header_stamp_ns(poses[0].header) < header_stamp_ns(poses[1].header)
    assert answers[0].data == POSE_TEXT and peer.heard["points"] == []
    assert process.stop() == 0, process.log


def test_ctrl_c_ends_the_process_quietly_while_questions_wait(ros_domain):
    command = [sys.executable, "-c", SLOW_NODE, "--ros-args", "-p", "question_timeout_s:=600.0"]
    process, peer = NodeProcess(command), Peer()
    wait(process, lambda: peer.ask.get_subscription_count() > 0, "the node to take questions")
    peer.send_until(process, lambda: "in work" in process.log, "a frame to be in work")
    for _ in range(LIMIT + 1):
        peer.ask.publish(String(data="What is it?"))
    wait(process, lambda: len(peer.heard["depth_node/answer"]) == 1, "the oldest question to be refused")
    peer.close()
    assert process.stop() == 0, process.log
    assert "Traceback" not in process.log


def test_clouds_answers_and_points_at_once_come_from_one_copy_of_the_weights(ros_domain, tmp_path):
    folder = make_checkpoint(tmp_path / "model", "qwen3_vl", tie_word_embeddings=False)
    card = CARD | {"dialects": ["dense", "coordinates"]}
    (folder / CARD_FILE).write_text(yaml.safe_dump(card), encoding="utf-8")
    stored = sum(weight.nbytes for weight in load_file(folder / "model.safetensors").values())
    before = tensor_bytes()
    estimators = []

    def load(parameters):
        estimators.append(load_estimator(parameters))
        return estimators[0]

    world = AskingWorld(load=load, model=str(folder), device="cpu", dtype="float32", answer_tokens=4, cpu_threads=1)
    try:
        world.start()
        world.listen(PointCloud2, "points")
        world.camera()

        asked = 0

        def told() -> bool:
            nonlocal asked
            asked += 1
            world.ask("What is it?")
            world.query(3.0, 4.0)
            return len(world.heard["points"]) > 3 and len(world.answers) > 3 and len(world.points) > 3

        world.keep_sending(told, "clouds, answers and points")
        until(lambda: len(world.answers) == len(world.points) == asked, "a message for each question")
        until(lambda: at_rest(world.node), "the worker to rest")
        assert any(math.isfinite(message.point.z) and message.point.z > 0 for message in world.points)
        engine = estimators[0].engine
        loaded = tensor_bytes() - before - engine._answering._kept.bytes - remembered_bytes(engine)
        assert stored <= loaded < 1.05 * stored, "tables of rotary angles are all that is added"
    finally:
        world.close()
