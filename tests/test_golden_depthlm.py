"""`published` shows the model the very bytes that DepthLM's own program does.

golden/depthlm/dev.json holds what DepthLM's `dataset_inference` made (OpenCV 5.0, Pillow 13) of images given by
formulas: `expected[i]` belongs to `pixels[i]` and is null where the authors' border rule skips the point.
"""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from depthlm_ros.camera import Camera, unify
from depthlm_ros.markers import draw_arrow, drawable

CASES = json.loads((Path(__file__).parent / "golden" / "depthlm" / "dev.json").read_text())


def golden_image(width, height, seed):
    y, x = np.mgrid[0:height, 0:width].astype(np.int64)
    red = 7 * x + 3 * y + 31 * seed
    green = (x * y) // 5 + 17 * seed
    blue = (x // 8) * 40 + (y // 8) * 90 + 53 * seed
    return (np.stack([red, green, blue], axis=-1) % 256).astype(np.uint8)


def published(case):
    camera = Camera(*case["intrinsics"], case["width"], case["height"])
    view = unify(golden_image(case["width"], case["height"], case["seed"]), camera, case["focal"], "published")
    pixels = view.from_source(np.array(case["pixels"]))
    return view, pixels, drawable(pixels, view.camera.width, view.camera.height)


each_case = pytest.mark.parametrize("case", CASES, ids=[f"seed{case['seed']}" for case in CASES])


def test_the_golden_file_is_whole():
    assert len(CASES) == 12
    assert sum(expected is not None for case in CASES for expected in case["expected"]) == 56


@each_case
def test_skips_the_points_that_the_authors_skip(case):
    assert published(case)[2].tolist() == [expected is not None for expected in case["expected"]]


@each_case
def test_size_and_intrinsics_equal_the_authors_to_the_last_bit(case):
    camera = published(case)[0].camera
    for expected in filter(None, case["expected"]):
        assert expected["size"] == [camera.width, camera.height]
        assert expected["intrinsics"] == [camera.fx, camera.fy, camera.cx, camera.cy, camera.width, camera.height]


@each_case
def test_pixels_equal_the_authors(case):
    pixels = published(case)[1]
    for pixel, expected in zip(pixels.tolist(), case["expected"], strict=True):
        assert expected is None or pixel == expected["pixel"]


@each_case
def test_marked_images_equal_the_authors_byte_for_byte(case):
    view, pixels, _ = published(case)
    for pixel, expected in zip(pixels, case["expected"], strict=True):
        if expected is not None:
            marked = draw_arrow(view.image, pixel)
            assert (marked == (255, 0, 0)).all(axis=-1).sum() == expected["red"]
            assert hashlib.sha256(marked.tobytes()).hexdigest() == expected["sha256"]
