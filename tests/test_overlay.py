"""The overlay shows each asked pixel in the colour of its depth."""

from __future__ import annotations

import numpy as np
import pytest

from depthlm_ros.errors import PixelError
from depthlm_ros.overlay import NO_ANSWER, depth_colours, depth_range, overlay

GREY = np.full((40, 60, 3), 90, np.uint8)


def test_near_is_red_far_is_blue_and_unknown_is_magenta():
    near, far, *unknown = depth_colours(np.array([1.5, 45.0, np.nan, 0.0, -1.0, np.inf]), 1.0, 64.0).astype(int)
    assert near[0] > 2 * near[2] and far[2] > 2 * far[0]
    assert [tuple(colour) for colour in unknown] == [NO_ANSWER] * 4


def test_equal_ratios_of_depth_are_equally_far_apart_in_colour():
    levels = depth_colours(np.geomspace(1.0, 100.0, 256), 1.0, 100.0)
    steps = np.abs(np.diff(levels.astype(int), axis=0)).sum(axis=1)
    assert len(np.unique(levels, axis=0)) > 250 and steps.max() < 30


def test_depth_beyond_the_range_gets_the_colour_of_its_end():
    np.testing.assert_array_equal(depth_colours(np.array([0.5, 99.0]), 1, 10), depth_colours(np.array([1, 10]), 1, 10))


@pytest.mark.parametrize(("near_m", "far_m"), [(0, 1), (2, 2), (3, 2), (np.nan, 2), (1, np.inf)])
def test_a_range_that_cannot_be_coloured_is_refused(near_m, far_m):
    with pytest.raises(PixelError, match="depth range"):
        depth_colours(np.ones(1), near_m, far_m)


def test_dot_lies_on_its_pixel_and_nothing_else_changes():
    drawn = overlay(GREY, np.array([[20.0, 10.0]]), np.array([2.0]), radius_px=2, near_m=1, far_m=10)
    v, u = np.nonzero((drawn != GREY).any(axis=2))
    assert (u.min(), u.max(), v.min(), v.max()) == (18, 22, 8, 12)
    np.testing.assert_array_equal(drawn[10, 20], depth_colours(np.float32(2.0), 1, 10))
    assert (GREY == 90).all()


def test_the_nearest_of_overlapping_dots_is_on_top():
    pixels = np.array([[20.0, 10.0], [21.0, 10.0], [20.0, 11.0]])
    drawn = overlay(GREY, pixels, np.array([np.nan, 1.0, 5.0]), radius_px=4, near_m=1, far_m=10)
    np.testing.assert_array_equal(drawn[10, 20], depth_colours(np.float32(1.0), 1, 10))


def test_dots_at_the_border_are_cut_and_pixels_outside_left_out():
    pixels = np.array([[0.0, 0.0], [59.0, 39.0], [-1.0, 5.0], [60.0, 5.0]])
    drawn = overlay(GREY, pixels, np.full(4, 2.0), radius_px=3, near_m=1, far_m=10)
    changed = (drawn != GREY).any(axis=2)
    assert changed[0, 0] and changed[39, 59] and not changed[5].any()


def test_a_dense_map_colours_every_pixel_by_itself():
    v, u = np.mgrid[0:40, 0:60]
    depth_m = (1 + u / 10).astype(np.float32)
    drawn = overlay(GREY, np.stack([u.ravel(), v.ravel()], -1).astype(np.float32), depth_m.ravel())
    np.testing.assert_array_equal(drawn, depth_colours(depth_m, *depth_range(depth_m)))


@pytest.mark.parametrize("depth_m", [np.empty(0), np.array([np.nan]), np.array([3.0])])
def test_few_or_no_answers_are_drawn_too(depth_m):
    pixels = np.full((len(depth_m), 2), 5.0)
    assert (overlay(GREY, pixels, depth_m) != GREY).any() == bool(len(depth_m))


def test_legend_stays_in_its_corner():
    image = np.full((240, 320, 3), 90, np.uint8)
    changed = (overlay(image, np.empty((0, 2)), np.empty(0), legend=True, near_m=1, far_m=9) != image).any(axis=2)
    assert changed[210:].any() and not changed[:200].any() and not changed[:, 220:].any()


def test_arrays_of_different_lengths_are_refused():
    with pytest.raises(PixelError, match=r"\(3, 2\).*\(2,\)"):
        overlay(GREY, np.zeros((3, 2)), np.zeros(2))
