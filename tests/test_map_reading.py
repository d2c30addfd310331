"""Maps are read between their pixels, and how much they differ there."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from depthlm_ros.errors import PixelError
from depthlm_ros.map_reading import MapReader, map_reader

STEP = np.array([[1.0, 2.0, 4.0], [5.0, 6.0, 8.0]], np.float32)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 40), st.integers(1, 30), st.integers(0, 2**32 - 1))
def test_a_plane_is_read_exactly_and_held_within_the_border_pixels(width, height, seed):
    rng = np.random.default_rng(seed)
    a, b, c = rng.uniform(-1, 1, 3)
    v, u = np.mgrid[0:height, 0:width]
    places = rng.uniform((-0.5, -0.5), (width - 0.5, height - 0.5), (50, 2))
    within = np.clip(places, 0, (width - 1, height - 1))
    read = MapReader(places, width, height).read((a * u + b * v + c).astype(np.float32))
    np.testing.assert_allclose(read, a * within[:, 0] + b * within[:, 1] + c, rtol=1e-4, atol=1e-4)


def test_the_spread_is_that_of_the_four_values_around():
    _, spread = MapReader(np.array([[0.5, 0.5], [1.2, 0.0], [2.0, 1.0]]), 3, 2).read_with_spread(STEP)
    np.testing.assert_allclose(spread, [(6 - 1) / 6, (8 - 2) / 8, 0])


def test_off_the_map_and_nowhere_there_is_nothing():
    places = np.array([[-0.6, 0], [2.5, 0], [0, 1.6], [np.nan, 0], [1, np.inf], [1, 0]])
    values, _ = MapReader(places, 3, 2).read_with_spread(STEP)
    assert np.isnan(values).tolist() == [True] * 5 + [False]


def test_an_unknown_value_counts_only_where_it_has_weight():
    holed = STEP.copy()
    holed[1, 1] = np.nan
    values = MapReader(np.array([[0.5, 0.5], [1, 0.5], [1, 0], [0, 0.5]]), 3, 2).read(holed)
    np.testing.assert_allclose(values, [np.nan, np.nan, 2, 3])


def test_a_map_of_another_size_than_the_view_shows_the_same_area():
    views_middle = np.array([[4.5, 2.5]])
    assert map_reader(views_middle, (10, 6), (3, 2)).read(STEP) == pytest.approx([np.mean(STEP[:, 1])])


def test_another_size_than_promised_is_refused():
    with pytest.raises(PixelError, match=r"shape \(2, 2\).*shape \(2, 3\)"):
        MapReader(np.zeros((1, 2)), 3, 2).read(STEP[:, :2])


def test_places_of_another_shape_are_refused():
    with pytest.raises(PixelError, match=r"\(3,\)"):
        MapReader(np.zeros(3), 3, 2)
