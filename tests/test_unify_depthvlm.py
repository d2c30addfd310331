"""DepthVLM's published preprocessing, and where a map that isn't of the image's size is read."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from depthlm_ros.camera import Camera, unify
from depthlm_ros.cards import load_card
from depthlm_ros.engines.base import EngineInfo, ImageGrid
from depthlm_ros.errors import CameraError, ConfigError
from depthlm_ros.estimator import Estimator
from depthlm_ros.lens import Distortion
from depthlm_ros.published import canonical_size, readout_pixels, utils_size

NYU = Camera(fx=518.8579, fy=519.4696, cx=325.58, cy=253.74, width=640, height=480)
KITTI = Camera(fx=721.5377, fy=721.5377, cx=596.6, cy=149.9, width=1216, height=352)
SMALL = Camera(fx=150.0, fy=148.0, cx=63.2, cy=47.1, width=128, height=96)


def picture(camera, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (camera.height, camera.width, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("camera", "canonical", "snapped", "processed"),
    [(NYU, (1233, 925), (1232, 924), (1216, 928)), (KITTI, (1685, 488), (1680, 476), (1664, 480))],
)
def test_the_three_sizes_are_those_measured_on_the_original(camera, canonical, snapped, processed):
    assert canonical_size(camera, 1000.0) == canonical
    view = unify(picture(camera), camera, 1000.0, "published", system="depthvlm")
    assert view.image.shape[:2] == snapped[::-1]
    assert (view.camera.width, view.camera.height) == snapped
    # The processor of Qwen3-VL-4B: patches of 16, 2 x 2 merged, between 2^16 and 2^24 pixels.
    processor = Qwen2VLImageProcessorPil(
        patch_size=16, merge_size=2, size={"shortest_edge": 65536, "longest_edge": 16777216}
    )
    grid = processor(images=[view.image], return_tensors="np")["image_grid_thw"][0]
    assert (grid[2] * 16, grid[1] * 16) == processed


# Asked of qwen_vl_utils 0.0.14 itself.
@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((1217, 913), (1204, 924)), ((1921, 1079), (1932, 1092)), ((98, 126), (112, 112)), ((42, 70), (56, 56)),
        ((14, 700), (28, 700)), ((30, 30), (56, 56)), ((10, 9), (84, 56)), ((5000, 4000), (4004, 3192)),
        ((13000, 70), (12992, 56)),
    ],
)  # fmt: skip
def test_snapping_follows_qwen_vl_utils_within_and_beyond_its_limits(size, expected):
    assert utils_size(*size) == expected


def test_the_view_is_pillows_bilinear_then_bicubic():
    image = picture(NYU)
    view = unify(image, NYU, 1000.0, "published", system="depthvlm")
    twice = Image.fromarray(image).resize((1233, 925), Image.Resampling.BILINEAR)
    assert np.array_equal(view.image, twice.resize((1232, 924), Image.Resampling.BICUBIC))


def test_an_image_of_the_right_size_is_left_alone():
    camera = Camera(1000.0, 990.0, 100.0, 70.0, 224, 140)
    image = picture(camera)
    assert np.array_equal(unify(image, camera, 1000.0, "published", system="depthvlm").image, image)


@settings(max_examples=60, deadline=None)
@given(
    fx=st.floats(60, 400), ratio=st.floats(0.9, 1.1), width=st.integers(16, 160), height=st.integers(16, 160),
    place=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)  # fmt: skip
def test_a_pixel_keeps_its_ray_and_its_share_of_the_area(fx, ratio, width, height, place):
    camera = Camera(fx, fx * ratio, width / 2, height / 2, width, height)
    view = unify(picture(camera), camera, 200.0, "published", system="depthvlm")
    pixel = np.array([place]) * (width - 1, height - 1)
    seen = view.from_source(pixel)
    np.testing.assert_allclose(view.camera.rays(seen), camera.rays(pixel), atol=1e-9)
    gain = np.array([view.camera.width / width, view.camera.height / height])
    np.testing.assert_allclose(seen, (pixel + 0.5) * gain - 0.5, atol=1e-9)
    np.testing.assert_allclose(view.to_source(seen), pixel, atol=1e-9)


def test_a_distorted_lens_is_undistorted_first():
    lens = replace(SMALL, distortion=Distortion("plumb_bob", (-0.2, 0.05, 0.0, 0.0, 0.0)))
    view = unify(picture(lens), lens, 160.0, "published", system="depthvlm")
    pixels = np.array([[20.0, 30.0], [100.0, 60.0]])
    np.testing.assert_allclose(view.camera.rays(view.from_source(pixels)), lens.rays(pixels), atol=1e-6)
    assert view.camera.distortion.is_identity


def test_a_ribbon_is_refused_with_a_way_out():
    camera = Camera(1000.0, 1000.0, 1000.0, 2.0, 2000, 4)
    with pytest.raises(CameraError, match="2000x4 is too narrow .* crop the image"):
        unify(picture(camera), camera, 1000.0, "published", system="depthvlm")


def test_other_systems_keep_depthlms_way():
    image = picture(SMALL)
    usual = unify(image, SMALL, 160.0, "published")
    for system in ("depthlm", "vlm3", "own"):
        assert np.array_equal(unify(image, SMALL, 160.0, "published", system=system).image, usual.image)


def test_exact_is_the_same_for_every_system():
    image, grid = picture(SMALL), ImageGrid(32, 4096, 1 << 20)
    views = [unify(image, SMALL, 160.0, "exact", grid, system) for system in ("depthlm", "depthvlm")]
    assert np.array_equal(views[0].image, views[1].image)
    pixels = np.array([[3.0, 5.0], [99.0, 80.0]])
    assert np.array_equal(views[0].from_source(pixels), views[1].from_source(pixels))


class Ramp:
    """An engine whose depth is 1 m plus a tenth of the source column, and whose map has the processor's size."""

    info = EngineInfo("ramp", "none", "qwen3_vl", "cpu", "float32", ("a test",), 0, True)
    grid = ImageGrid(multiple=32, min_pixels=1, max_pixels=1 << 24)

    def __init__(self, width: int) -> None:
        self.width = width

    def depth_map(self, image, question):
        height, width = (round(side / 32) * 32 for side in image.shape[:2])
        column = (np.arange(width) + 0.5) * self.width / width - 0.5
        return np.tile(1 + 0.1 * column, (height, 1)).astype(np.float32)


def ramp(folder, policy="published"):
    card = replace(load_card(folder)[0], system="depthvlm", focal_px=1000.0)
    return Estimator(card, Ramp(NYU.width), policy)


@pytest.fixture(scope="module")
def every_40th():
    return np.stack(np.meshgrid(np.arange(20, 640, 40), np.arange(20, 480, 40)), -1).reshape(-1, 2).astype(np.float32)


def test_depth_is_read_at_the_pixel_itself_although_map_and_image_differ_in_size(qwen3_vl_checkpoint, every_40th):
    result = ramp(qwen3_vl_checkpoint).estimate(picture(NYU), NYU, every_40th)
    np.testing.assert_allclose(result.depth_m, 1 + 0.1 * every_40th[:, 0], rtol=1e-5)
    assert result.asked.all()


def test_the_published_readout_takes_the_canonical_pixel_of_the_smaller_map(qwen3_vl_checkpoint, every_40th):
    result = ramp(qwen3_vl_checkpoint).estimate(picture(NYU), NYU, every_40th, readout="published")
    column = np.round(every_40th[:, 0] * 1233 / 640)
    row = np.round(every_40th[:, 1] * 925 / 480)
    assert np.array_equal(readout_pixels(every_40th, NYU, 1000.0), np.stack([column, row], 1))
    expected = 1 + 0.1 * ((column + 0.5) * 640 / 1216 - 0.5)
    np.testing.assert_allclose(result.depth_m, expected, rtol=1e-5)
    assert (expected - (1 + 0.1 * every_40th[:, 0])).max() > 0.8, "eight pixels of the source beside the pixel"


def test_the_published_readout_leaves_out_what_its_map_does_not_reach(qwen3_vl_checkpoint):
    right = np.array([[639.0, 100.0], [600.0, 100.0]], np.float32)
    result = ramp(qwen3_vl_checkpoint).estimate(picture(NYU), NYU, right, readout="published")
    assert result.asked.tolist() == [False, True]
    assert np.isnan(result.depth_m[0]) and np.isfinite(result.depth_m[1])


def test_the_published_readout_belongs_to_the_published_view(qwen3_vl_checkpoint, every_40th):
    with pytest.raises(ConfigError, match="readout 'published' is DepthVLM's.* policy 'exact'.*Use readout 'exact'"):
        ramp(qwen3_vl_checkpoint, "exact").estimate(picture(NYU), NYU, every_40th, readout="published")
    with pytest.raises(ConfigError, match="unknown readout 'nearest'"):
        ramp(qwen3_vl_checkpoint).estimate(picture(NYU), NYU, every_40th, readout="nearest")
