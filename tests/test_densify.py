"""A whole depth image from some points: exact on planes, sharp at edges, nothing where nothing supports it."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from depthlm_ros.densified import near_edges
from depthlm_ros.densify import densify
from depthlm_ros.errors import PixelError
from depthlm_ros.metrics import depth_metrics
from depthlm_ros.sampling import sample_pixels
from depthlm_training import between

WIDTH, HEIGHT = 320, 240


def plane(a: float, b: float, c: float) -> np.ndarray:
    """(H, W) z-depth of a plane in space, whose inverse depth is a u + b v + c."""
    v, u = np.mgrid[:HEIGHT, :WIDTH]
    return (1 / (a * u + b * v + c)).astype(np.float32)


def asked(truth: np.ndarray, count: int, seed: int = 0, method: str = "blue_noise") -> tuple[np.ndarray, np.ndarray]:
    pixels = sample_pixels(truth.shape[1], truth.shape[0], count, method, seed)
    u, v = pixels.astype(int).T
    known = np.isfinite(truth[v, u])
    return pixels[known], truth[v, u][known]


def nearest(pixels: np.ndarray, depth_m: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    free = np.ones(shape, np.uint8)
    u, v = pixels.astype(int).T
    free[v, u] = 0
    _, label = cv2.distanceTransformWithLabels(free, cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL)
    depth = np.zeros(label.max() + 1, np.float32)
    depth[label[v, u]] = depth_m
    return depth[label]


def wall_with_a_box() -> tuple[np.ndarray, np.ndarray]:
    """A grey wall at 4 m and in front of it a red box at 2 m, with the noise of a sensor."""
    image = np.full((HEIGHT, WIDTH, 3), (120, 120, 120), np.int16)
    truth = np.full((HEIGHT, WIDTH), 4, np.float32)
    image[70:170, 110:230] = 170, 60, 50
    truth[70:170, 110:230] = 2
    image += np.random.default_rng(0).normal(0, 3, image.shape).astype(np.int16)
    return image.clip(0, 255).astype(np.uint8), truth


@pytest.mark.parametrize("slopes", [(0, 0), (4e-4, 0), (-3e-4, 9e-4)])
@pytest.mark.parametrize("method", ["grid", "blue_noise"])
def test_a_plane_in_space_comes_back_whatever_is_painted_on_it(slopes, method):
    truth = plane(*slopes, 0.3)
    tiles = (np.indices((HEIGHT, WIDTH)) // 24).sum(0) % 2 * 120 + 60
    image = np.repeat(tiles[..., None], 3, axis=2).astype(np.uint8)
    pixels, depth_m = asked(truth, 150, method=method)
    whole = densify(pixels, depth_m, np.ones(len(pixels)), image)
    known = np.isfinite(whole)
    assert known.mean() > 0.95
    off = np.abs(np.log(whole / truth))[known]
    # At the image's rim a plane isn't followed all the way.
    assert np.quantile(off, 0.98) < 0.02 and off.mean() < 0.01


def test_depth_jumps_where_the_image_does_not_between_the_points():
    image, truth = wall_with_a_box()
    pixels, depth_m = asked(truth, 60)
    whole = densify(pixels, depth_m, np.ones(len(pixels)), image)
    wrong = np.abs(whole - truth) > 0.1
    assert (wrong & np.isfinite(whole)).mean() < 0.01
    assert (np.abs(nearest(pixels, depth_m, truth.shape) - truth) > 0.1).mean() > 0.05


def test_there_is_no_depth_between_two_surfaces():
    image, truth = wall_with_a_box()
    pixels, depth_m = asked(truth, 60)
    whole = densify(pixels, depth_m, np.ones(len(pixels)), image)
    assert not ((whole > 2.15) & (whole < 3.85)).any()


def test_beyond_the_points_there_is_no_depth():
    image = np.full((HEIGHT, WIDTH, 3), 128, np.uint8)
    pixels = sample_pixels(WIDTH, HEIGHT, 60, region=(100, 80, 100, 60))
    whole = densify(pixels, np.full(60, 3), np.ones(60), image)
    assert np.isfinite(whole[85:135, 105:195]).all()
    assert np.isnan(whole[:70]).all() and np.isnan(whole[:, :90]).all()
    # A point of a grid stands for its cell, so the cells of the outermost points are covered.
    assert np.isfinite(whole).sum() == pytest.approx(100 * 60, rel=0.1)


def test_a_whole_grid_covers_the_whole_image():
    image = np.full((HEIGHT, WIDTH, 3), 128, np.uint8)
    pixels = sample_pixels(WIDTH, HEIGHT, 192)
    assert np.isfinite(densify(pixels, np.full(192, 3), np.ones(192), image)).mean() > 0.97


def test_an_answer_of_little_confidence_is_outvoted():
    image = np.full((HEIGHT, WIDTH, 3), 128, np.uint8)
    pixels = sample_pixels(WIDTH, HEIGHT, 100)
    depth_m, confidence = np.full(100, 3.0), np.full(100, 0.9)
    depth_m[55], confidence[55] = 3.4, 0.01
    u, v = pixels[55].astype(int)
    assert densify(pixels, depth_m, confidence, image)[v, u] == pytest.approx(3, rel=0.03)
    assert densify(pixels, depth_m, np.ones(100), image)[v, u] > 3.15


def test_around_an_unsure_answer_that_no_neighbour_agrees_with_there_is_no_depth():
    image, truth = wall_with_a_box()
    pixels, depth_m = asked(truth, 60)
    confidence = np.full(len(pixels), 0.9)
    depth_m[30], confidence[30] = 9, 0.01
    u, v = pixels[30].astype(int)
    assert np.isnan(densify(pixels, depth_m, confidence, image)[v, u])
    assert np.isfinite(densify(pixels, depth_m, np.ones(len(pixels)), image)[v, u])


def test_answers_without_depth_are_left_out():
    image, truth = wall_with_a_box()
    pixels, depth_m = asked(truth, 100)
    depth_m[::3] = np.nan
    few = np.isfinite(depth_m)
    np.testing.assert_array_equal(
        densify(pixels, depth_m, np.ones(len(pixels)), image),
        densify(pixels[few], depth_m[few], np.ones(few.sum()), image),
    )


@settings(deadline=None, max_examples=60)
@given(
    width=st.integers(1, 70), height=st.integers(1, 70), count=st.integers(0, 200), seed=st.integers(0, 9),
    whole=st.booleans(),
)  # fmt: skip
def test_any_points_in_any_image_give_depths_among_theirs_or_none(width, height, count, seed, whole):
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (height, width, 3)).astype(np.uint8)
    pixels = rng.uniform(-0.49, (width - 0.51, height - 0.51), (count, 2))
    pixels = np.rint(pixels) if whole else pixels
    depth_m = rng.choice([np.nan, 1, 2, 7], count).astype(np.float32)
    dense = densify(pixels, depth_m, rng.random(count), image)
    assert dense.shape == (height, width) and dense.dtype == np.float32
    assert np.isfinite(dense).any() <= np.isfinite(depth_m).any()
    known = dense[np.isfinite(dense)]
    assert ((known > 0.1) & (known < 100)).all()


def test_a_single_point_stands_for_itself():
    image = np.zeros((20, 30, 3), np.uint8)
    whole = densify(np.array([[3, 4]]), np.array([2.0]), np.array([1.0]), image)
    assert whole[4, 3] == 2
    assert np.isnan(whole[15, 20])


def test_points_outside_of_the_image_are_refused():
    with pytest.raises(PixelError, match="outside of the 30x20 image"):
        densify(np.array([[30, 4]]), np.array([2.0]), np.array([1.0]), np.zeros((20, 30, 3), np.uint8))


@pytest.mark.parametrize("noise", [False, True])
def test_on_rendered_scenes_it_beats_the_nearest_point_and_no_more_points_fly(worlds, noise):
    pairs, rates = {"nearest": [], "densify": []}, {"nearest": [], "densify": []}
    for index, (image, truth) in enumerate(worlds):
        points = between.asked(image, truth, 256, "blue_noise", noise, index)
        at = between.scored_pixels(points, truth, index)
        u, v = at.T
        own = truth[v, u]
        said = {"nearest": between.nearest(points, at), "densify": between.edge_aware(points, at)}
        known = np.isfinite(said["densify"])
        edge = known & near_edges(truth)[v, u]
        for name, depth_m in said.items():
            pairs[name].append((depth_m[known], own[known]))
            if edge.any():
                rates[name].append(between.flying(depth_m[edge], truth, at[edge], round(points.spacing)))
    scores = {name: depth_metrics(*map(np.concatenate, zip(*both, strict=True))) for name, both in pairs.items()}
    assert scores["densify"].abs_rel < 0.6 * scores["nearest"].abs_rel
    assert scores["densify"].delta1 > scores["nearest"].delta1
    assert np.mean(rates["densify"]) <= np.mean(rates["nearest"]) + 0.01


@pytest.fixture(scope="module", name="worlds")
def _worlds():
    return list(between.scenes(6, 5, WIDTH, HEIGHT))
