"""How long the stages around the model take. Not part of the tests, since a figure of a busy machine proves nothing:

make bench

Everything runs on one core, OpenCV's, torch's and the middleware's threads included. `test_image_in_cloud_out` is a
whole frame but for the model: image message, decoding, the model's view, pixels, answers that are ready at once, cloud
message, published through rclpy to a subscription in this process. The bars: 3 ms at 640x480, 10 ms at 1920x1080, and
5 ms for `test_cloud_of_300000_points_built_and_published`.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest

from depthlm_ros.adaptive import second_pass
from depthlm_ros.camera import Camera, Distortion, unify
from depthlm_ros.cards import load_card
from depthlm_ros.config import Parameters
from depthlm_ros.densify import densify
from depthlm_ros.encodings import decode_image
from depthlm_ros.engines.base import Answer, EngineInfo, ImageGrid
from depthlm_ros.estimator import Estimator
from depthlm_ros.messages import camera_info_message, cloud_message, read_cloud, rgb_message
from depthlm_ros.overlay import overlay
from depthlm_ros.prompts import answer_text
from depthlm_ros.sampling import sample_pixels

SIZES = {"vga": (640, 480), "1080p": (1920, 1080)}
GRID = ImageGrid(multiple=32, min_pixels=65_536, max_pixels=1 << 24)
LENSES = {"ideal": Distortion(), "plumb_bob": Distortion("plumb_bob", (-0.2, 0.05, 1e-3, 1e-3, 0.0))}
# What is asked: card, parameters.
ASKED = {
    "dense": ("demo", {"dialect": "dense"}),
    "dense-every-pixel": ("demo", {"dialect": "dense", "stride": 1}),
    "256-in-words": ("demo", {"dialect": "coordinates", "points": 256}),
    "1024-in-words": ("demo", {"dialect": "coordinates", "points": 1024}),
    "published-256-in-words": ("vlm3-depth", {"points": 256}),
}


@pytest.fixture(scope="module", autouse=True)
def _one_core() -> Iterator[None]:
    torch = pytest.importorskip("torch")
    allowed, threads = os.sched_getaffinity(0), (cv2.getNumThreads(), torch.get_num_threads())
    os.sched_setaffinity(0, {max(allowed)})
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    yield
    os.sched_setaffinity(0, allowed)
    cv2.setNumThreads(threads[0])
    torch.set_num_threads(threads[1])


@pytest.fixture(params=SIZES, name="size")
def _size(request: pytest.FixtureRequest) -> tuple[int, int]:
    return SIZES[request.param]


@pytest.fixture(params=LENSES, name="lens")
def _lens(request: pytest.FixtureRequest) -> Distortion:
    return LENSES[request.param]


@pytest.fixture(scope="module", name="publish")
def _publish(ros_domain_module: int) -> Iterator[Callable[[Any], None]]:
    """Publishes a cloud to a subscription in this process, whose reader never comes."""
    rclpy = pytest.importorskip("rclpy")
    from rclpy.node import Node
    from sensor_msgs.msg import PointCloud2

    from depthlm_ros.middleware import use_large_message_profile
    from depthlm_ros.qos import output_qos

    use_large_message_profile(os.environ)
    context = rclpy.Context()
    rclpy.init(context=context)
    talker, listener = (Node(name, context=context) for name in ("talker", "listener"))
    publisher = talker.create_publisher(PointCloud2, "points", output_qos())
    listener.create_subscription(PointCloud2, "points", lambda message: None, 1)
    while not publisher.get_subscription_count():
        pass
    yield publisher.publish
    for node in (talker, listener):
        node.destroy_node()
    rclpy.shutdown(context=context)


class ReadyEngine:
    """Stands in for the model: its answers are there before the question."""

    info = EngineInfo("ready", "ready", "none", "cpu", "float32", (), 0, True)
    grid = GRID

    def __init__(self) -> None:
        self.maps: dict[tuple[int, ...], np.ndarray] = {}
        self.answers = [Answer(answer_text(depth), (), 0.9) for depth in np.linspace(1, 9, 200).tolist()]

    def encode_ahead(self, image: np.ndarray) -> bool:
        return False

    def depth_map(self, image: np.ndarray, question: str) -> np.ndarray:
        if image.shape not in self.maps:
            self.maps[image.shape] = np.random.default_rng(0).uniform(1, 5, image.shape[:2]).astype(np.float32)
        return self.maps[image.shape]

    def answer_shared(self, image: np.ndarray, questions: Any, max_new_tokens: int, **options: Any) -> list[Answer]:
        return list(itertools.islice(itertools.cycle(self.answers), len(questions)))

    def close(self) -> None:
        pass


def picture(width: int, height: int) -> np.ndarray:
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    return cv2.GaussianBlur(noise, (0, 0), 1)


def camera_of(width: int, height: int, lens: Distortion = LENSES["ideal"]) -> Camera:
    """About 61 degrees wide."""
    return Camera(0.85 * width, 0.85 * width, width / 2, height / 2, width, height, lens)


def frame_of(asked: str, publish: Callable[[Any], None]) -> Callable[[Any, Any], None]:
    """What the node does with an image message and its CameraInfo."""
    from depthlm_ros.inference import Inference
    from depthlm_ros.outputs import build_outputs

    model, options = ASKED[asked]
    inference, parameters = Inference(Estimator(load_card(model)[0], ReadyEngine())), Parameters(**options)

    def run(message: Any, info: Any) -> None:
        prepared = inference.prepare(message, info, compressed=False, rectified=False, depth=True)
        frame = prepared.frame
        measured = inference.measure(prepared, parameters, whole=False)
        outputs = build_outputs(
            {"points"}, frame.image, frame.camera, info, message.header, measured.query, measured.result
        )
        publish(outputs["points"])

    return run


@pytest.mark.parametrize("asked", ASKED)
def test_image_in_cloud_out(benchmark, size, lens, asked, publish):
    camera, run = camera_of(*size, lens), frame_of(asked, publish)
    info = camera_info_message(camera, 1, "optical")
    # Two, because a message that was decoded a moment ago isn't decoded again.
    images = itertools.cycle([rgb_message(picture(*size), stamp, "optical") for stamp in (1, 2)])
    run(next(images), info)
    benchmark(lambda: run(next(images), info))


@pytest.mark.parametrize("asked", ["dense", "256-in-words"])
def test_the_first_frame_of_a_camera(benchmark, size, lens, asked, publish):
    camera, run = camera_of(*size, lens), frame_of(asked, publish)
    images = itertools.cycle([rgb_message(picture(*size), stamp, "optical") for stamp in (1, 2)])
    # Another principal point is another camera.
    shifts = itertools.count(1)

    def another() -> tuple[tuple[Any, Any], dict[str, Any]]:
        new = replace(camera, cx=camera.cx + next(shifts) / 1000)
        return (next(images), camera_info_message(new, 1, "optical")), {}

    benchmark.pedantic(run, setup=another, rounds=5)


def test_cloud_of_300000_points_built_and_published(benchmark, publish):
    from depthlm_ros.depth import DepthResult
    from depthlm_ros.outputs import build_outputs
    from depthlm_ros.queries import Query
    from depthlm_ros.remember import fixed
    from depthlm_ros.sampling import stride_pixels

    camera = camera_of(600, 500)
    image, info = picture(600, 500), camera_info_message(camera, 1, "optical")
    pixels = fixed(stride_pixels(600, 500, 1))
    n = len(pixels)
    depth_m = np.linspace(1, 9, n, dtype=np.float32)
    result = DepthResult(pixels, depth_m, np.ones(n, np.float32), np.ones(n, bool), "dense")

    def run() -> None:
        publish(build_outputs({"points"}, image, camera, info, info.header, Query(pixels), result)["points"])

    run()
    benchmark(run)


@pytest.mark.parametrize("encoding", ["rgb8", "bgr8", "bayer_rggb8", "yuv422_yuy2"])
def test_decode(benchmark, size, encoding):
    width, height = size
    step = width * {"rgb8": 3, "bgr8": 3, "bayer_rggb8": 1, "yuv422_yuy2": 2}[encoding]
    message = SimpleNamespace(
        width=width, height=height, step=step, encoding=encoding, is_bigendian=0, data=np.zeros(step * height, np.uint8)
    )
    assert benchmark(decode_image, message).shape == (height, width, 3)


@pytest.mark.parametrize(("policy", "focal_px"), [("exact", 200.0), ("published", 1000.0)])
def test_unify(benchmark, size, lens, policy, focal_px):
    image, camera = picture(*size), camera_of(*size, lens)
    assert benchmark(unify, image, camera, focal_px, policy, GRID).camera.fx == pytest.approx(focal_px)


@pytest.mark.parametrize("method", ["grid", "random", "blue_noise", "edges"])
def test_sample_256(benchmark, method):
    image = squares(640, 480)
    assert len(benchmark(sample_pixels, 640, 480, 256, method, image=image)) == 256


def test_second_pass_of_256(benchmark):
    pixels = sample_pixels(640, 480, 128, "blue_noise")
    depth_m = 2 + pixels[:, 0] // 200
    assert len(benchmark(second_pass, pixels, depth_m, np.full(128, 0.5), 128, (640, 480))) == 128


@pytest.mark.parametrize("points", [256, 1024, 4096])
def test_densify(benchmark, points):
    image, pixels = squares(640, 480), sample_pixels(640, 480, points, "blue_noise")
    whole = benchmark(densify, pixels, 2 + pixels[:, 0] // 200, np.ones(points), image)
    assert np.isfinite(whole).mean() > 0.9


def squares(width: int, height: int) -> np.ndarray:
    """(H, W, 3) uint8: overlapping rectangles with the noise of a sensor."""
    rng = np.random.default_rng(0)
    image = np.full((height, width, 3), 128, np.int16)
    for _ in range(30):
        u, v = rng.integers(0, (width, height))
        image[v : v + 90, u : u + 120] = rng.integers(0, 255, 3)
    return np.clip(image + rng.normal(0, 3, image.shape), 0, 255).astype(np.uint8)


def test_cloud_message_of_300000_points(benchmark):
    points, rgb = np.ones((300_000, 3), np.float32), np.zeros((300_000, 3), np.uint8)
    message = benchmark(cloud_message, 0, "camera", points, rgb, np.ones(300_000, np.float32), (500, 600))
    assert message.width * message.height == 300_000


def test_read_cloud_of_300000_points(benchmark):
    points, rgb = np.ones((300_000, 3), np.float32), np.zeros((300_000, 3), np.uint8)
    message = cloud_message(0, "camera", points, rgb, np.ones(300_000, np.float32))
    assert benchmark(read_cloud, message)["points"].shape == (300_000, 3)


def test_overlay_1024_points(benchmark):
    image = np.zeros((480, 640, 3), np.uint8)
    pixels = sample_pixels(640, 480, 1024)
    assert benchmark(overlay, image, pixels, np.linspace(1, 9, 1024, dtype=np.float32)).shape == image.shape
