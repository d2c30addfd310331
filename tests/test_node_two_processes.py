"""The real node in a process of its own: what it publishes is what the estimator says, point for point."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import yaml

rclpy = pytest.importorskip("rclpy")

from lifecycle_msgs.srv import GetState  # noqa: E402
from rclpy.executors import SingleThreadedExecutor  # noqa: E402
from rclpy.node import Node  # noqa: E402
from rclpy.qos import QoSProfile, ReliabilityPolicy, qos_profile_sensor_data  # noqa: E402
from sensor_msgs.msg import CameraInfo, CompressedImage, Image, PointCloud2  # noqa: E402

from depthlm_ros.camera import Camera, Distortion, camera_from_info  # noqa: E402
from depthlm_ros.cards import CARD_FILE  # noqa: E402
from depthlm_ros.messages import camera_info_message, header_stamp_ns, read_cloud, rgb_message  # noqa: E402
from depthlm_ros.middleware import large_message_profile, use_large_message_profile  # noqa: E402
from depthlm_ros.sampling import sample_pixels  # noqa: E402

PATIENCE_S = 300.0
WIDTH, HEIGHT = 96, 64
CAMERA = Camera(
    fx=80.0, fy=82.0, cx=47.0, cy=31.5, width=WIDTH, height=HEIGHT,
    distortion=Distortion("plumb_bob", (-0.05, 0.01, 0.001, -0.001, 0.0)),
)  # fmt: skip
POINTS = 12
FRAME = "camera_optical_frame"
RELIABLE = QoSProfile(depth=10, reliability=ReliabilityPolicy.RELIABLE)


def node_command(*parameters: str, remap: tuple[str, ...] = ()) -> list[str]:
    arguments = [f"-p{text}" for text in parameters] + [f"-r{text}" for text in remap]
    flags = [part for text in arguments for part in (text[:2], text[2:])]
    return [sys.executable, "-m", "depthlm_ros.node", "--ros-args", *flags]


class NodeProcess:
    """`depth_node` in another process; its log is kept for the message of a failing test."""

    def __init__(self, command: list[str]) -> None:
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.lines: list[str] = []
        self.reader = threading.Thread(target=lambda: self.lines.extend(self.process.stdout), daemon=True)
        self.reader.start()

    @property
    def log(self) -> str:
        return "".join(self.lines)

    def segments(self) -> list[Path]:
        """Files of the shared memory that Fast DDS has made in this process."""
        found = []
        for entry in Path(f"/proc/{self.process.pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                if re.fullmatch(r"/dev/shm/fastdds_[0-9a-f]+_el", name := os.readlink(entry)):
                    found += [Path(name), Path(name.removesuffix("_el"))]
        return found

    def stop(self) -> int:
        """Ctrl-C; returns the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        try:
            return self.process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(PATIENCE_S)
            raise
        finally:
            self.reader.join(PATIENCE_S)


SLOW_NODE = """
import sys, time
from types import SimpleNamespace
from depthlm_ros.engines.base import EngineInfo
from depthlm_ros.node import main

class Slow:
    card = SimpleNamespace(default_dialect="dense")
    dialects = ("dense",)
    complaints = ()
    engine = SimpleNamespace(info=EngineInfo("slow", "slow", "none", "cpu", "float32", (), 0, True))
    def describe(self): return []
    def close(self): pass
    def prepare(self, image, camera): return None
    def encode_ahead(self, view): pass
    def estimate(self, *arguments, **options):
        print("in work", flush=True)
        time.sleep(600)

sys.exit(main(load=lambda parameters: Slow()))
"""


class CameraDriver:
    """A camera and a listener in this process."""

    def __init__(self, kind: type, topic: str, info_topic: str) -> None:
        self.context = rclpy.Context()
        rclpy.init(context=self.context)
        self.node = Node("camera", context=self.context)
        self.images = self.node.create_publisher(kind, topic, RELIABLE)
        self.infos = self.node.create_publisher(CameraInfo, info_topic, RELIABLE)
        self.clouds: dict[int, PointCloud2] = {}
        self.node.create_subscription(
            PointCloud2, "points", lambda m: self.clouds.setdefault(header_stamp_ns(m.header), m), RELIABLE
        )
        self.executor = SingleThreadedExecutor(context=self.context)
        self.executor.add_node(self.node)
        threading.Thread(target=self.executor.spin, daemon=True).start()

    def send(self, image: Any, stamp: int, process: NodeProcess, arrived: Callable[[], bool]) -> None:
        """Repeats a frame until its effect is seen: the node listens at best effort, which may lose the first ones."""
        deadline = time.monotonic() + PATIENCE_S
        while not arrived():
            assert process.process.poll() is None, f"the node ended while frame {stamp} was sent:\n{process.log}"
            assert time.monotonic() < deadline, f"frame {stamp} had no effect; the node said:\n{process.log}"
            self.infos.publish(camera_info_message(CAMERA, stamp, FRAME))
            self.images.publish(image)
            pause = time.monotonic() + 1.0
            while not arrived() and time.monotonic() < pause:
                time.sleep(0.02)

    def close(self) -> None:
        self.executor.shutdown(timeout_sec=PATIENCE_S)
        self.node.destroy_node()
        rclpy.try_shutdown(context=self.context)


def wait(process: NodeProcess, condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert process.process.poll() is None, f"the node ended while waiting for {what}:\n{process.log}"
        assert time.monotonic() < deadline, f"waited {PATIENCE_S} s for {what}; the node said:\n{process.log}"
        time.sleep(0.02)


def picture(seed: int) -> np.ndarray:
    """Smooth enough for JPEG, different for each seed."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    return cv2.resize(coarse, (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)


def bgr_message(image: np.ndarray, stamp: int) -> Image:
    message = rgb_message(np.ascontiguousarray(image[..., ::-1]), stamp, FRAME)
    message.encoding = "bgr8"
    return message


CARD = {
    "name": "two_processes",
    "source": ".",
    "licence": "Apache-2.0",
    "commercial_use": True,
    "architecture": "qwen3_vl",
    "dialects": ["dense"],
    "default_dialect": "dense",
    "focal_px": 100.0,
    "policy": "exact",
    "depth_kind": "z",
    "max_new_tokens": 24,
    "description": "Random weights with a small focal length, so that images stay small.",
}


@pytest.fixture(scope="module")
def model(qwen3_vl_checkpoint, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("two_processes") / "two_processes"
    shutil.copytree(qwen3_vl_checkpoint, folder)
    (folder / CARD_FILE).write_text(yaml.safe_dump(CARD), encoding="utf-8")
    return folder


@pytest.fixture
def start(ros_domain, model) -> Iterator[Callable[..., tuple[NodeProcess, CameraDriver]]]:
    started: list[Any] = []

    def make(
        *parameters: str,
        kind: type = Image,
        topic: str = "image",
        info_topic: str = "camera_info",
        remap: tuple[str, ...] = (),
    ) -> tuple[NodeProcess, CameraDriver]:
        # Frames in work are tiny here; one thread keeps both processes from fighting over the cores.
        fixed = (f"model:={model}", "device:=cpu", "dtype:=float32", "cpu_threads:=1")
        process = NodeProcess(node_command(*fixed, *parameters, remap=remap))
        started.append(process)
        camera = CameraDriver(kind, topic, info_topic)
        started.append(camera)
        wait(process, lambda: camera.images.get_subscription_count() > 0, "the node to subscribe to the image")
        wait(process, lambda: camera.infos.get_subscription_count() > 0, "the node to subscribe to camera_info")
        return process, camera

    yield make
    for each in reversed(started):
        each.close() if isinstance(each, CameraDriver) else each.stop()


@pytest.fixture(scope="module")
def estimator(model):
    from depthlm_ros.estimator import Estimator

    with Estimator.load(str(model), device="cpu", dtype="float32") as loaded:
        yield loaded


def expected(estimator: Any, image: np.ndarray) -> dict[str, np.ndarray]:
    """The cloud as the pipeline gives it without ROS."""
    camera = camera_from_info(camera_info_message(CAMERA), (WIDTH, HEIGHT), rectified=False)
    pixels = sample_pixels(WIDTH, HEIGHT, POINTS)
    result = estimator.estimate(image, camera, pixels, dialect="dense")
    known = result.valid
    u, v = pixels[known].astype(int).T
    return {
        "points": camera.unproject(pixels[known], result.depth_m[known]),
        "rgb": image[v, u],
        "confidence": result.confidence[known],
    }


def assert_same(message: PointCloud2, stamp: int, cloud: dict[str, np.ndarray]) -> None:
    received = read_cloud(message)
    assert header_stamp_ns(message.header) == stamp
    assert message.header.frame_id == FRAME
    assert len(cloud["points"]) > 0, "the random model answered nothing; the comparison would be empty"
    np.testing.assert_allclose(received["points"], cloud["points"], rtol=0, atol=1e-5)
    np.testing.assert_array_equal(received["rgb"], cloud["rgb"])
    np.testing.assert_allclose(received["confidence"], cloud["confidence"], rtol=0, atol=1e-6)


def test_clouds_equal_the_estimators_own_answers_and_a_bad_frame_changes_nothing(start, estimator):
    process, camera = start(f"points:={POINTS}")
    stamps = {"rgb8": 1_000_000_001, "bad": 2_000_000_002, "bgr8": 3_000_000_003}
    rgb = rgb_message(picture(1), stamps["rgb8"], FRAME)
    camera.send(rgb, stamps["rgb8"], process, lambda: stamps["rgb8"] in camera.clouds)
    bad = rgb_message(picture(2), stamps["bad"], FRAME)
    bad.data = bad.data[:-7]
    camera.send(bad, stamps["bad"], process, lambda: "frame skipped" in process.log)
    bgr = bgr_message(picture(3), stamps["bgr8"])
    camera.send(bgr, stamps["bgr8"], process, lambda: stamps["bgr8"] in camera.clouds)

    assert_same(camera.clouds[stamps["rgb8"]], stamps["rgb8"], expected(estimator, picture(1)))
    assert_same(camera.clouds[stamps["bgr8"]], stamps["bgr8"], expected(estimator, picture(3)))
    assert stamps["bad"] not in camera.clouds
    assert process.stop() == 0, process.log


def test_the_cloud_of_a_compressed_image_of_a_remapped_topic_equals_the_estimators_answers(start, estimator):
    process, camera = start(
        f"points:={POINTS}",
        "compressed:=true",
        kind=CompressedImage,
        topic="/front/image_raw/compressed",
        info_topic="/front/camera_info",
        remap=("image:=/front/image_raw",),
    )
    stamp = 5_000_000_005
    message = CompressedImage(header=rgb_message(picture(4), stamp, FRAME).header, format="jpeg")
    encoded = cv2.imencode(".jpg", picture(4)[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 90])[1]
    message.data = encoded.tobytes()
    camera.send(message, stamp, process, lambda: stamp in camera.clouds)
    decoded = np.ascontiguousarray(cv2.imdecode(encoded, cv2.IMREAD_COLOR)[..., ::-1])
    assert_same(camera.clouds[stamp], stamp, expected(estimator, decoded))


def run_to_its_end(*parameters: str) -> tuple[int, str]:
    done = subprocess.run(
        node_command(*parameters), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=PATIENCE_S
    )
    return done.returncode, done.stdout


def test_a_folder_without_weights_ends_the_process_with_the_reason(ros_domain, tmp_path):
    status, log = run_to_its_end(f"model:={tmp_path}")
    assert status == 1
    assert str(tmp_path) in log and "Traceback" not in log


def test_a_misspelt_parameter_ends_the_process_with_the_right_name(ros_domain):
    status, log = run_to_its_end("pionts:=5")
    assert status == 1
    assert "did you mean 'points'" in log and "Traceback" not in log


def test_without_autostart_the_node_waits_unconfigured_and_ends_on_ctrl_c(ros_domain, tmp_path):
    process = NodeProcess(node_command(f"model:={tmp_path}", "autostart:=false"))
    context = rclpy.Context()
    rclpy.init(context=context)
    peer = Node("peer", context=context)
    # An answer, since a name in the graph may be a ghost's, of a node that has just ended.
    asked = peer.create_client(GetState, "depth_node/get_state")
    executor = SingleThreadedExecutor(context=context)
    answers: list[Any] = []

    def answered() -> bool:
        if asked.service_is_ready():
            # Again and again: a node that has not yet found its asker drops the answer.
            answers.append(asked.call_async(GetState.Request()))
            executor.spin_until_future_complete(answers[-1], timeout_sec=5.0)
        return any(answer.done() for answer in answers)

    executor.add_node(peer)
    wait(process, answered, "the node to answer")
    answer = next(answer for answer in answers if answer.done())
    assert answer.result().current_state.label == "unconfigured"
    executor.shutdown()
    peer.destroy_node()
    rclpy.try_shutdown(context=context)
    assert process.stop() == 0, process.log


@pytest.mark.parametrize("turn", range(4))
def test_ctrl_c_while_the_node_is_being_made_ends_it_with_one_exit_status(ros_domain, turn):
    # rclpy ends the context first and Python interrupts later, where the first has led to: both are one Ctrl-C.
    process = NodeProcess([sys.executable, "-c", INTERRUPTED_NODE, str(turn)])
    assert process.process.wait(PATIENCE_S) == 0, process.log
    process.reader.join(PATIENCE_S)
    assert "KeyboardInterrupt" not in process.log and "ended" in process.log


INTERRUPTED_NODE = """
import os, signal, sys
import rclpy, rclpy.lifecycle
from depthlm_ros import node
turn = int(sys.argv[1])
if turn == 0:
    made = node.DepthNode.__init__
    def interrupted(self, load):
        os.kill(os.getpid(), signal.SIGINT)
        made(self, load)
    node.DepthNode.__init__ = interrupted
elif turn == 3:
    started = node.rclpy.init
    def interrupted(args):
        os.kill(os.getpid(), signal.SIGINT)
        started(args=args)
    node.rclpy.init = interrupted
elif turn == 1:
    made = node.DepthNode.__init__
    def interrupted(self, load):
        made(self, load)
        rclpy.shutdown()
    node.DepthNode.__init__ = interrupted
    ok = rclpy.ok
    def late(**arguments):
        os.kill(os.getpid(), signal.SIGINT)
        return ok(**arguments)
    node.rclpy.ok = late
else:
    closed = node.DepthNode.close
    def interrupted(self):
        os.kill(os.getpid(), signal.SIGINT)
        return closed(self)
    node.DepthNode.close = interrupted
    node.rclpy.spin = lambda node: None
status = node.main(["--ros-args", "-p", "autostart:=false", "-p", "model:=/nowhere"])
print("ended", flush=True)
sys.exit(status)
"""


@pytest.mark.parametrize(("autostart", "stride"), [("false", 41), ("true", 211)])
def test_a_context_that_ends_anywhere_while_the_node_is_made_or_started_is_no_fault(ros_domain, autostart, stride):
    # What a signal does first; Python's interrupt may come much later, or to a thread that computes.
    process = NodeProcess([sys.executable, "-c", ENDED_CONTEXT_NODE, autostart, str(stride)])
    assert process.process.wait(PATIENCE_S) == 0, process.log
    process.reader.join(PATIENCE_S)
    assert int(re.search(r"rounds: (\d+)", process.log)[1]) > 20 and "Traceback" not in process.log


ENDED_CONTEXT_NODE = """
import itertools, os, sys
from types import SimpleNamespace
import rclpy
from depthlm_ros import node
from depthlm_ros.engines.base import EngineInfo

calls, end_at = 0, 0

def count(frame, event, argument):
    global calls
    if event == "call" and os.sep + "rclpy" + os.sep in frame.f_code.co_filename:
        calls += 1
        if calls == end_at:
            sys.setprofile(None)
            rclpy.shutdown()

def started(load):
    sys.setprofile(count)
    return made(load)

def reached(node):
    sys.setprofile(None)
    rclpy.shutdown()

class Estimator:
    card = SimpleNamespace(default_dialect="dense")
    dialects = ("dense",)
    complaints = ()
    engine = SimpleNamespace(info=EngineInfo("none", "none", "none", "cpu", "float32", (), 0, True))
    def describe(self): return []
    def close(self): pass

made, node.DepthNode = node.DepthNode, started
node.rclpy.spin = reached
for rounds in itertools.count(1):
    end_at, calls = 1 + (rounds - 1) * int(sys.argv[2]), 0
    status = node.main(["--ros-args", "-p", f"autostart:={sys.argv[1]}"], load=lambda parameters: Estimator())
    sys.setprofile(None)
    assert status == 0, (status, end_at)
    if calls < end_at:
        break
print("rounds:", rounds, flush=True)
os._exit(0)
"""


@pytest.mark.parametrize("ended", [False, True], ids=["while it runs", "after a signal"])
def test_a_fault_of_the_node_itself_is_told_and_leaves_nothing_behind(ros_domain, ended):
    process = NodeProcess([sys.executable, "-c", FAULTY_NODE, str(int(ended))])
    assert process.process.wait(PATIENCE_S) == (0 if ended else 1), process.log
    process.reader.join(PATIENCE_S)
    assert "closed" in process.log and "AttributeError: no such thing" in process.log
    assert ("Traceback" in process.log) != ended
    assert ("while it was told to end" in process.log) == ended


FAULTY_NODE = """
import sys
import rclpy
from depthlm_ros import node

def fault(_):
    if int(sys.argv[1]):
        rclpy.shutdown()
    raise AttributeError("no such thing")

def close(self, *arguments):
    print("closed", flush=True)
    return closed(self, *arguments)

closed, node.DepthNode.close = node.DepthNode.close, close
node.rclpy.spin = fault
sys.exit(node.main(["--ros-args", "-p", "autostart:=false", "-p", "model:=/nowhere"]))
"""


@pytest.mark.parametrize("how", ["swallowed once", "always swallowed", "a library computes"])
def test_ctrl_c_that_a_library_swallows_while_the_model_loads_can_be_repeated(ros_domain, how):
    process = NodeProcess([sys.executable, "-c", SWALLOWING_NODE, how])
    stubborn = how != "swallowed once"
    for count in range(1, 4 if stubborn else 3):
        lines = 2 if how == "a library computes" and count == 3 else count
        wait(process, lambda: process.log.count("waiting") == lines, f"wait {count}")  # noqa: B023
        wait(process, lambda: process.log.count("counted") == count - 1, f"Ctrl-C {count - 1}")  # noqa: B023
        # What comes sooner than a second is the same Ctrl-C, told twice; the last one was noted before it was told.
        time.sleep(1.2 if count > 1 else 0)
        segments = process.segments()
        process.process.send_signal(signal.SIGINT)
    assert process.process.wait(PATIENCE_S) == (130 if stubborn else 0), process.log
    assert not any(segment.exists() for segment in segments)
    process.reader.join(PATIENCE_S)
    assert ("ended by the third Ctrl-C" in process.log) == stubborn


def test_signals_within_a_second_are_one_ctrl_c_and_none_counts_once_the_node_is_closed(monkeypatch):
    from depthlm_ros import interrupt as module

    class Ended(BaseException):
        pass

    def end(status):
        raise Ended(status)

    clock = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(module.os, "_exit", end)
    # Nothing could be started after it, and this process goes on.
    monkeypatch.setattr(module, "end_all", lambda: None)
    monkeypatch.setattr(module, "release_shared_memory", lambda: None)

    def told(*seconds: float, muted: bool = False) -> list[str]:
        interrupt, seen = module.Interrupt(), []
        # No real signals here.
        interrupt.restore()
        if muted:
            interrupt.ignore()
        for clock[0] in seconds:
            try:
                interrupt._count_one()
                interrupt._handle(signal.SIGINT, None)
                seen.append("")
            except (KeyboardInterrupt, Ended) as raised:
                seen.append(f"{type(raised).__name__}{raised}")
        return seen

    assert told(5.0, 5.0, 5.9) == ["KeyboardInterrupt", "", ""]
    assert told(5.0, 5.5, 6.1, 6.9, 7.2) == ["KeyboardInterrupt", "", "KeyboardInterrupt", "", "Ended130"]
    assert told(5.0, 6.1, 7.2, muted=True) == ["", "", ""]


SWALLOWING_NODE = """
import ctypes, sys, threading, time
from depthlm_ros.interrupt import Interrupt
from depthlm_ros.node import main

count = Interrupt._count_one
def told(self):
    count(self)
    print("counted\\n", end="", flush=True)
Interrupt._count_one = told

class Library:
    def __del__(self):
        print("waiting", flush=True)
        time.sleep(600)

def load(parameters):
    Library()
    if sys.argv[1] == "a library computes":
        # A lock of C's, taken twice: no signal gets through. That it waits is told by another thread, which can run as
        # soon as this one gives up the interpreter's lock, and not before: it is in C then.
        lock, take = ctypes.create_string_buffer(256), ctypes.CDLL(None).pthread_mutex_lock
        take(lock)
        within = threading.Lock()
        within.acquire()
        def tell():
            within.acquire()
            print("waiting\\n", end="", flush=True)
        threading.Thread(target=tell, daemon=True).start()
        sys.setswitchinterval(1e6)
        within.release()
        take(lock)
    while True:
        try:
            print("waiting", flush=True)
            time.sleep(600)
        except KeyboardInterrupt:
            if sys.argv[1] == "swallowed once":
                raise

sys.exit(main(["--ros-args", "-p", "model:=none"], load=load))
"""


def test_ctrl_c_ends_the_process_although_the_frame_in_work_takes_ten_minutes(ros_domain):
    process = NodeProcess([sys.executable, "-c", SLOW_NODE])
    camera = CameraDriver(Image, "image", "camera_info")
    wait(process, lambda: camera.images.get_subscription_count() > 0, "the node to subscribe")
    wait(process, lambda: camera.infos.get_subscription_count() > 0, "the node to subscribe to camera_info")
    camera.send(rgb_message(picture(1), 1, FRAME), 1, process, lambda: "in work" in process.log)
    camera.close()
    segments = process.segments()
    assert process.stop() == 0, process.log
    assert "Traceback" not in process.log
    assert not any(segment.exists() for segment in segments), "64 MB are lost until the machine restarts"


FULL_HD_SCRIPT = """
import array, sys, time
from depthlm_ros.middleware import use_large_message_profile
import os
use_large_message_profile(os.environ)
import rclpy
from rclpy.qos import qos_profile_sensor_data
from sensor_msgs.msg import Image
rclpy.init()
node = rclpy.create_node("full_hd")
publisher = node.create_publisher(Image, "image", qos_profile_sensor_data)
while publisher.get_subscription_count() == 0:
    time.sleep(0.02)
message = Image(height=1080, width=1920, encoding="rgb8", step=5760, data=array.array("B", bytes(1080 * 5760)))
# One for each line.
for line in sys.stdin:
    message.header.stamp.sec = int(line)
    publisher.publish(message)
"""


@pytest.mark.parametrize(
    ("arguments", "without", "expected"),
    [
        ([], ("HOME", "ROS_HOME", "ROS_LOG_DIR"), "set HOME or ROS_LOG_DIR"),
        (["--params-file", "none.yaml"], (), "none.yaml.*correct what follows --ros-args"),
    ],
)
def test_ros_that_does_not_start_is_explained_in_words(monkeypatch, arguments, without, expected):
    for name in without:
        monkeypatch.delenv(name, raising=False)
    result = subprocess.run([*node_command(), *arguments], capture_output=True, text=True, timeout=PATIENCE_S)
    assert result.returncode == 1
    assert re.search(f"depth_node: ROS does not start: .*{expected}", result.stderr), result.stderr
    assert "Traceback" not in result.stderr


def test_full_hd_images_cross_processes_at_best_effort_with_the_shipped_profile(ros_domain):
    from conftest import ROOT

    assert large_message_profile() == ROOT / "config" / "fastdds.xml"
    process = subprocess.Popen([sys.executable, "-c", FULL_HD_SCRIPT], stdin=subprocess.PIPE, text=True)
    with pytest.MonkeyPatch.context() as patch:
        chosen: dict[str, str] = {}
        use_large_message_profile(chosen)
        for name, path in chosen.items():
            patch.setenv(name, path)
        context = rclpy.Context()
        rclpy.init(context=context)
        node = Node("listener", context=context)
    seconds: list[int] = []
    images = node.create_subscription(
        Image, "image", lambda m: seconds.append(m.header.stamp.sec), qos_profile_sensor_data
    )
    executor = SingleThreadedExecutor(context=context)
    executor.add_node(node)

    def spin(patience_s: float, arrived: Callable[[], bool]) -> None:
        deadline = time.monotonic() + patience_s
        while not arrived() and time.monotonic() < deadline:
            executor.spin_once(timeout_sec=0.1)

    spin(PATIENCE_S, lambda: images.get_publisher_count() > 0)
    # One at a time, so that none is lost because somebody was busy elsewhere.
    for number in range(20):
        if len(seconds) < 5:
            process.stdin.write(f"{number}\n")
            process.stdin.flush()
            spin(3.0, lambda: number in seconds)  # noqa: B023
    process.communicate()
    executor.shutdown()
    node.destroy_node()
    rclpy.try_shutdown(context=context)
    # Some may be replaced while this machine is busy; with Fast DDS' defaults 0 or 1 of 60 arrive.
    assert len(seconds) >= 5


def test_a_profile_that_somebody_chose_is_left_alone():
    environment = {"FASTRTPS_DEFAULT_PROFILES_FILE": "/mine.xml"}
    use_large_message_profile(environment)
    assert environment == {"FASTRTPS_DEFAULT_PROFILES_FILE": "/mine.xml"}
    empty: dict[str, str] = {}
    use_large_message_profile(empty)
    assert [Path(path).name for path in empty.values()] == ["fastdds.xml"]
