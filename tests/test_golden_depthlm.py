"""`published` shows the model the very bytes that DepthLM's own program does.

golden/depthlm/dev.json holds what DepthLM's `dataset_inference` made (OpenCV 5.0, Pillow 13) of images given by
formulas: `expected[i]` belongs to `pixels[i]` and is null where the authors' border rule skips the point.
"""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from depthlm_ros.benchmark import run_protocol
from depthlm_ros.camera import Camera, unify
from depthlm_ros.cards import load_card
from depthlm_ros.engines.base import Answer, EngineInfo, ImageGrid
from depthlm_ros.estimator import Estimator
from depthlm_ros.markers import draw_arrow, drawable, paste

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


class Eye:
    """An engine that keeps what it was shown and asked."""

    info = EngineInfo("eye", "none", "llava", "cpu", "float32", ("a test",), 0, False)
    grid = ImageGrid(multiple=16, min_pixels=256, max_pixels=1 << 22)

    def __init__(self):
        self.seen = []

    def answer_marked(self, image, blocks, questions, max_new_tokens, **options):
        return self.answer_each([paste(image, block) for block in blocks], questions, max_new_tokens, **options)

    def answer_each(self, images, questions, max_new_tokens, *, expects=None):
        self.seen += [(image.shape[1::-1], image, text) for image, text in zip(images, questions, strict=True)]
        return [Answer("<answer> 2.00 </answer>", (), 0.5)] * len(images)


def test_the_golden_file_has_points_of_both_kinds():
    skipped = [expected is None for case in CASES for expected in case["expected"]]
    assert any(skipped) and not all(skipped)
    assert all(len(case["pixels"]) == len(case["expected"]) for case in CASES)


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


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
@each_case
def test_a_labels_file_puts_the_authors_images_and_question_before_the_model(case, mode, tmp_path):
    pytest.importorskip("math_verify")
    width, height = case["width"], case["height"]
    Image.fromarray(golden_image(width, height, case["seed"])).convert(mode).save(tmp_path / "a.png")
    row = {
        "image": "/a.png", "intrinsics": [*case["intrinsics"], width, height], "pixel_coords": case["pixels"],
        "depth": [2.0] * len(case["pixels"]),
    }  # fmt: skip
    (tmp_path / "labels.jsonl").write_text(json.dumps(row))
    estimator = Estimator(replace(load_card("depthlm-12b")[0], focal_px=float(case["focal"])), Eye())
    figures = run_protocol(tmp_path / "labels.jsonl", estimator, "dataset_inference", samples=0).figures
    asked = [expected for expected in case["expected"] if expected is not None]
    assert (figures["questions"], figures["not_askable"]) == (len(case["pixels"]), len(case["pixels"]) - len(asked))
    for expected, (size, image, question) in zip(asked, estimator.engine.seen, strict=True):
        assert expected["size"] == list(size) and expected["prompt"] == question
        assert hashlib.sha256(image.tobytes()).hexdigest() == expected["sha256"]
