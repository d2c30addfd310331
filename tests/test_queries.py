"""Which pixels a frame's parameters ask for, and the depth image that comes of it."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from depthlm_ros.camera import Camera
from depthlm_ros.config import Parameters, read_region
from depthlm_ros.depth import DepthResult
from depthlm_ros.errors import ConfigError, PixelError
from depthlm_ros.inference import Measurement
from depthlm_ros.queries import Query, ask_frame, densified_image, keep_good, plan_query
from depthlm_ros.sampling import sample_pixels

CAMERA = Camera(60.0, 60.0, 31.5, 23.5, 64, 48)
IMAGE = np.zeros((48, 64, 3), np.uint8)
IMAGE[:, 32:] = 200


class Oracle:
    """2 m on the left half, 6 m on the right one."""

    def __init__(self) -> None:
        self.card = SimpleNamespace(default_dialect="dense")
        self.calls: list[int] = []

    def estimate(self, image, camera, pixels, *, dialect, **options) -> DepthResult:
        n = len(pixels)
        self.calls.append(n)
        depth_m = np.where(pixels[:, 0] < 32, 2, 6).astype(np.float32)
        return DepthResult(pixels, depth_m, np.full(n, 0.5, np.float32), np.ones(n, bool), dialect)


@pytest.mark.parametrize("sampling", ["grid", "random", "blue_noise", "edges", "uncertainty"])
@pytest.mark.parametrize("region", ["", "10, 8, 40, 30"])
def test_every_sampling_asks_as_many_points_as_wanted_within_the_region(sampling, region):
    parameters = Parameters(points=60, sampling=sampling, region=region)
    query, answer = ask_frame(Oracle(), IMAGE, CAMERA, parameters, "coordinates", whole=False)
    np.testing.assert_array_equal(query.pixels, answer.pixels)
    assert len(np.unique(query.pixels, axis=0)) == 60
    left, top, columns, rows = read_region(region) or (0, 0, 64, 48)
    assert ((query.pixels >= (left, top)) & (query.pixels < (left + columns, top + rows))).all()


def test_points_by_answers_cannot_be_told_beforehand():
    with pytest.raises(ConfigError, match="can't be told"):
        plan_query(Parameters(points=60, sampling="uncertainty"), "coordinates", 64, 48, False)


def test_sampling_changes_nothing_where_every_stride_th_pixel_is_asked():
    oracle = Oracle()
    ask_frame(oracle, IMAGE, CAMERA, Parameters(sampling="uncertainty"), "dense", whole=False)
    assert oracle.calls == [16 * 12]


def test_a_stride_grid_of_a_region_stays_a_grid_and_finds_its_rows_again():
    parameters = Parameters(region="10, 8, 41, 30", organised=True)
    query = plan_query(parameters, "dense", 64, 48, whole=True)
    assert len(query.pixels) == 41 * 30
    cloud = query.pixels[query.cloud_rows].reshape(*query.organised_shape, 2)
    assert query.organised_shape == (7, 10)
    assert set(np.diff(cloud[..., 0], axis=1).ravel()) == {4} == set(np.diff(cloud[..., 1], axis=0).ravel())
    assert cloud[0, 0].tolist() == [12, 10]


def test_a_region_outside_of_the_image_is_named():
    with pytest.raises(PixelError, match=r"\(60, 0, 10, 10\) is not inside the 64x48 image"):
        plan_query(Parameters(region="60, 0, 10, 10"), "dense", 64, 48, False)


@pytest.mark.parametrize("text", ["1, 2, 3", "a, b, c, d", "-1, 0, 5, 5", "0, 0, 0, 5", "1.5, 0, 5, 5"])
def test_a_region_that_cannot_be_read_is_refused_with_the_form(text):
    with pytest.raises(ConfigError, match="such as 100, 80, 200, 150"):
        Parameters(region=text)


def measured(parameters: Parameters, dialect: str = "coordinates") -> Measurement:
    pixels = sample_pixels(64, 48, 48)
    answer = Oracle().estimate(IMAGE, CAMERA, pixels, dialect=dialect)
    return Measurement(Query(pixels), answer, keep_good(answer, parameters), parameters)


def test_the_depth_image_holds_asked_pixels_alone_unless_it_is_densified():
    assert np.isfinite(measured(Parameters()).depth_image(IMAGE)).sum() == 48
    dense = measured(Parameters(densify=True)).depth_image(IMAGE)
    assert np.isfinite(dense).mean() > 0.9
    assert (dense[:, 10:32] == 2).mean() > 0.95 and (dense[:, 32:54] == 6).mean() > 0.95


def test_an_image_of_every_pixel_is_not_densified():
    assert np.isfinite(measured(Parameters(densify=True), "dense").depth_image(IMAGE)).sum() == 48


def test_rows_of_asked_points_stay_as_they_were():
    plain, dense = (measured(Parameters(densify=flag)).result for flag in (False, True))
    np.testing.assert_array_equal(plain.depth_m, dense.depth_m)


def test_what_is_too_far_is_a_hole_and_not_filled_in_from_what_is_near():
    dense = measured(Parameters(densify=True, max_depth_m=5.0)).depth_image(IMAGE)
    assert np.isnan(dense[:, 32:]).mean() > 0.95
    assert (dense[:, 10:31] == 2).mean() > 0.95


def test_a_densified_image_ends_with_the_region():
    parameters = Parameters(points=30, densify=True, region="10, 8, 40, 30")
    _, answer = ask_frame(Oracle(), IMAGE, CAMERA, parameters, "coordinates", whole=True)
    known = np.isfinite(densified_image(answer, IMAGE, parameters))
    assert known[8:38, 10:50].mean() > 0.9
    assert known.sum() == known[8:38, 10:50].sum()
