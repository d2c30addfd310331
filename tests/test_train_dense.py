"""The dense head learns: its losses, where labels lie on its map, its two stages, and what becomes of language."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from depthlm_ros.camera import Camera
from depthlm_ros.errors import ConfigError
from depthlm_ros.lens import Distortion
from depthlm_ros.map_reading import MapReader, map_reader
from depthlm_ros.unify import unify
from depthlm_training.labels import PUBLISHED_RANGES_M, neighbour_grid, place_labels, range_m
from depthlm_training.losses import SILOG_FLOOR, gradient_term, log_ratio, read_map, silog

# Map size, label size, share of labels, loss and norm of its gradient: what DepthVLM's own `_silog_loss` (commit
# 940a9ba) gave for `drawn_maps`, its prediction resized and its pixels chosen as in its `forward`; float32 on a CPU.
PUBLISHED_LOSSES = [
    ((64, 96), (64, 96), 1.0, 0.856668532, 0.00705912197),
    ((64, 96), (70, 101), 1.0, 0.798298478, 0.00596487942),
    ((96, 128), (48, 64), 0.05, 0.704331160, 0.02443405055),
    ((32, 32), (33, 47), 0.3, 0.793928385, 0.01759921014),
]


def drawn_maps(seed, map_hw, label_hw, share):
    """A prediction and its truth in metres; 0 m where nothing is predicted or known."""
    random = np.random.RandomState(seed)
    predicted = np.exp(random.standard_normal(map_hw) * 0.5 + 1).astype(np.float32)
    predicted.flat[::97] = 0
    truth = np.exp(random.standard_normal(label_hw) * 0.7 + 1.2).astype(np.float32)
    truth[random.uniform(size=label_hw) >= share] = 0
    return predicted, truth


@pytest.mark.parametrize("seed", range(len(PUBLISHED_LOSSES)))
def test_the_same_maps_give_the_published_loss_and_gradient(seed):
    map_hw, label_hw, share, loss, slope = PUBLISHED_LOSSES[seed]
    predicted, truth = drawn_maps(seed, map_hw, label_hw, share)
    height, width = label_hw
    # One source pixel a label, so that the canonical image is the source itself.
    camera = Camera(500.0, 500.0, width / 2, height / 2, width, height)
    view = unify(np.zeros((height, width, 3), np.uint8), camera, 500.0, "published", system="depthvlm")
    rows, columns = np.nonzero(truth)
    labels = place_labels(
        view, np.stack([columns, rows], 1), truth[rows, columns], map_hw[::-1], readout="published", focal_px=500.0
    )
    assert len(labels) == len(rows)
    depth_map = torch.from_numpy(predicted).requires_grad_()
    read = read_map(depth_map, torch.from_numpy(labels.places))
    ours = silog(*log_ratio(read, torch.from_numpy(labels.depth_m)))
    ours.backward()
    assert ours.item() == pytest.approx(loss, rel=1e-6)
    assert depth_map.grad.norm().item() == pytest.approx(slope, rel=1e-4)


def test_silog_forgives_half_of_a_common_error_of_scale():
    truth = torch.tensor([1.0, 2.0, 5.0])
    ratio, good = log_ratio(1.3 * truth, truth)
    assert silog(ratio, good, 0.5).item() == pytest.approx(np.log(1.3) * 0.5**0.5, rel=1e-5)
    assert silog(ratio, good, 1.0).item() == pytest.approx(SILOG_FLOOR**0.5, rel=1e-3)


def test_silog_of_nothing_has_a_slope_of_zero():
    predicted = torch.ones(4, requires_grad=True)
    silog(*log_ratio(predicted, torch.zeros(4))).backward()
    assert predicted.grad.tolist() == [0.0] * 4


def test_bfloat16_predictions_are_compared_in_float32():
    predicted = torch.full((3,), 2.0, dtype=torch.bfloat16)
    ratio, _ = log_ratio(predicted, torch.tensor([2.001, 2.002, 2.003]))
    assert ratio.dtype == torch.float32 and (ratio < 0).all()


def test_the_map_is_read_in_training_as_at_inference():
    rng = np.random.default_rng(3)
    depth_map = rng.uniform(0.5, 9, (12, 17)).astype(np.float32)
    places = rng.uniform((-0.5, -0.5), (16.49, 11.49), (200, 2)).astype(np.float32)
    read = read_map(torch.from_numpy(depth_map), torch.from_numpy(places))
    np.testing.assert_allclose(read, MapReader(places, 17, 12).read(depth_map), rtol=1e-5)


def plane_labels(hw, scale=1.0, tilt=0.0, step=1):
    """ln(predicted / true) on a grid of labels: an error of scale and one that grows from left to right."""
    rows, columns = np.mgrid[0 : hw[0] : step, 0 : hw[1] : step].reshape(2, -1)
    ratio = torch.from_numpy(np.log(scale) + tilt * columns).float()
    pixels = np.stack([columns, rows], 1).astype(np.float32)
    grid = neighbour_grid(pixels, np.ones(len(pixels)), hw[::-1])
    return ratio, torch.ones(len(ratio), dtype=torch.bool), torch.from_numpy(grid)


def test_the_gradient_term_is_blind_to_scale_and_sees_a_tilt():
    assert gradient_term(*plane_labels((16, 24), scale=2.0)).item() == 0
    ratio, good, grid = plane_labels((64, 64), tilt=0.01)
    # At every s-th pixel the error changes by 0.01 s to the right and by nothing below.
    assert gradient_term(ratio, good, grid).item() == pytest.approx(0.01 * (1 + 2 + 4 + 8) / 4 / 2, rel=1e-4)


def test_labels_far_apart_have_neighbours_too():
    assert gradient_term(*plane_labels((60, 80), tilt=0.01, step=5)).item() > 0.01


def test_the_gradient_term_leaves_out_pairs_with_an_unknown_end():
    ratio, good, grid = plane_labels((8, 8))
    ratio[27], good[27] = 50.0, False
    assert gradient_term(ratio, good, grid).item() == 0


def sparse_labels(camera, count=300, seed=0):
    rng = np.random.default_rng(seed)
    pixels = rng.uniform((-0.5, -0.5), (camera.width - 0.5, camera.height - 0.5), (count, 2))
    return pixels, rng.uniform(1, 40, count)


LENS = Distortion("plumb_bob", (-0.2, 0.05, 0.001, 0.0, 0.0))


@pytest.mark.parametrize("policy, lens", [("exact", Distortion()), ("exact", LENS), ("published", Distortion())])
def test_every_label_lies_where_the_estimator_reads_its_pixel(policy, lens):
    camera = Camera(210.0, 200.0, 95.0, 70.0, 200, 150, lens)
    view = unify(np.zeros((150, 200, 3), np.uint8), camera, 160.0, policy, system="depthvlm")
    pixels, depth_m = sparse_labels(camera)
    map_size = (160, 128)  # not the view's: the processor resampled it
    labels = place_labels(view, pixels, depth_m, map_size)
    assert len(labels) == len(pixels)
    depth_map = np.random.default_rng(1).uniform(1, 5, map_size[::-1]).astype(np.float32)
    at_inference = map_reader(view.from_source(pixels), (view.camera.width, view.camera.height), map_size)
    read = read_map(torch.from_numpy(depth_map), torch.from_numpy(labels.places))
    np.testing.assert_allclose(read, at_inference.read(depth_map), rtol=1e-4)


def test_no_label_is_lost_where_a_nearest_resize_loses_most():
    camera = Camera(800.0, 800.0, 400.0, 300.0, 800, 600)
    view = unify(np.zeros((600, 800, 3), np.uint8), camera, 200.0, "exact")
    pixels, depth_m = sparse_labels(camera, count=2000)
    assert len(place_labels(view, pixels, depth_m, (view.camera.width, view.camera.height))) == 2000


def test_labels_are_of_the_kind_that_the_model_answers():
    camera = Camera(100.0, 100.0, 49.5, 49.5, 100, 100)
    view = unify(np.zeros((100, 100, 3), np.uint8), camera, 100.0, "exact")
    labels = place_labels(view, np.array([[49.5, 49.5], [99.0, 49.5]]), np.ones(2), (100, 100), depth_kind="euclidean")
    np.testing.assert_allclose(labels.depth_m, [1, np.hypot(1, 0.495)], rtol=1e-6)


def test_of_labels_in_one_cell_the_nearest_counts_as_neighbour():
    grid = neighbour_grid(np.array([[1.2, 0.0], [0.9, 0.1], [3, 1]]), np.array([2.0, 5.0, 1.0]), (4, 2))
    assert grid[0, 1] == 0 and grid[1, 3] == 2 and (grid >= 0).sum() == 2


def test_ranges_are_the_published_ones_by_name_or_numbers():
    assert range_m("waymo") == PUBLISHED_RANGES_M["waymo"] == (0.05, 70.0)
    assert range_m([0.1, 20]) == (0.1, 20.0)
    assert range_m(None) == (0.0, float("inf"))
    with pytest.raises(ConfigError, match="did you mean 'waymo'"):
        range_m("waymmo")
    with pytest.raises(ConfigError, match="nearest"):
        range_m([5, 1])
