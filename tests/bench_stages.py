"""How long the stages around the model take. Not part of the tests, since a figure of a busy machine proves nothing:

make bench
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from depthlm_ros.camera import Camera, Distortion, unify
from depthlm_ros.encodings import decode_image
from depthlm_ros.engines.base import ImageGrid
from depthlm_ros.messages import cloud_message, read_cloud
from depthlm_ros.overlay import overlay
from depthlm_ros.sampling import sample_pixels

SIZES = {"vga": (640, 480), "1080p": (1920, 1080)}
GRID = ImageGrid(multiple=32, min_pixels=4096, max_pixels=1 << 20)


@pytest.fixture(params=SIZES, name="size")
def _size(request):
    return SIZES[request.param]


@pytest.mark.parametrize("encoding", ["rgb8", "bgr8", "bayer_rggb8", "yuv422_yuy2"])
def test_decode(benchmark, size, encoding):
    width, height = size
    step = width * {"rgb8": 3, "bgr8": 3, "bayer_rggb8": 1, "yuv422_yuy2": 2}[encoding]
    message = SimpleNamespace(
        width=width, height=height, step=step, encoding=encoding, is_bigendian=0, data=np.zeros(step * height, np.uint8)
    )
    assert benchmark(decode_image, message).shape == (height, width, 3)


@pytest.mark.parametrize(
    "lens", [Distortion(), Distortion("plumb_bob", (-0.2, 0.05, 1e-3, 1e-3, 0.0))], ids=["ideal", "plumb_bob"]
)
def test_unify(benchmark, size, lens):
    width, height = size
    camera = Camera(0.85 * width, 0.85 * width, width / 2, height / 2, width, height, lens)
    image = np.zeros((height, width, 3), np.uint8)
    assert benchmark(unify, image, camera, 200.0, "exact", GRID).camera.fx == 200


@pytest.mark.parametrize("method", ["grid", "random", "blue_noise"])
def test_sample_256(benchmark, method):
    assert len(benchmark(sample_pixels, 640, 480, 256, method)) == 256


def test_cloud_of_300000_points(benchmark):
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
