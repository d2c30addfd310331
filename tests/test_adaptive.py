"""The second pass asks where the first was unsure, and both together are one result."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from depthlm_ros.adaptive import estimate_in_two_passes, joined, second_pass
from depthlm_ros.camera import Camera
from depthlm_ros.depth import DepthResult
from depthlm_ros.errors import ConfigError, PixelError
from depthlm_ros.sampling import sample_pixels

SIZE = 320, 240
CAMERA = Camera(300.0, 300.0, 159.5, 119.5, *SIZE)
FIRST = sample_pixels(*SIZE, 100, "blue_noise")
IMAGE = np.zeros((240, 320, 3), np.uint8)


class Oracle:
    """Stands in for an estimator: 2 m on the left, 6 m on the right, and keeps what it was asked."""

    def __init__(self, dialects: tuple[str, ...] = ("coordinates",)) -> None:
        self.asked: list[np.ndarray] = []
        self.card = SimpleNamespace(default_dialect=dialects[0])

    def estimate(self, image, camera, pixels, *, dialect, progress=None) -> DepthResult:
        self.asked.append(pixels)
        n = len(pixels)
        depth = np.where(pixels[:, 0] < 160, 2, 6).astype(np.float32)
        if progress is not None:
            progress(n)
        texts = () if dialect == "dense" else tuple(f"{value:g}" for value in depth)
        return DepthResult(pixels, depth, np.full(n, 0.5, np.float32), np.ones(n, bool), dialect, texts, {"model": 1.0})


def flat(n: int = len(FIRST)) -> np.ndarray:
    return np.full(n, 3, np.float32)


@settings(deadline=None, max_examples=40)
@given(
    width=st.integers(2, 60), height=st.integers(2, 60), first=st.integers(1, 200), count=st.integers(0, 300),
    seed=st.integers(0, 5), data=st.data(),
)  # fmt: skip
def test_pixels_are_as_many_as_wanted_and_none_is_asked_twice(width, height, first, count, seed, data):
    u, v = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
    region = data.draw(st.sampled_from([None, (u, v, width - u, height - v)]))
    pixels = sample_pixels(width, height, first, "blue_noise", seed)
    rng = np.random.default_rng(seed)
    depth = rng.choice([np.nan, 1, 2, 5], len(pixels)).astype(np.float32)
    asked = rng.random(len(pixels)) < 0.8
    again = second_pass(
        pixels, depth, rng.random(len(pixels)), count, (width, height), seed, asked=asked, region=region
    )
    left, top, columns, rows = region or (0, 0, width, height)
    inside = ((pixels >= (left, top)) & (pixels < (left + columns, top + rows))).all(axis=1)
    assert len(again) == min(count, columns * rows - inside.sum())
    assert len(np.unique(np.concatenate([pixels, again]), axis=0)) == len(pixels) + len(again)
    assert ((again >= (left, top)) & (again < (left + columns, top + rows))).all()
    assert again.dtype == np.float32 and (again == np.rint(again)).all()


def test_the_second_pass_looks_where_depth_jumps():
    depth = np.where(FIRST[:, 0] < 160, 2, 6)
    again = second_pass(FIRST, depth, np.full(100, 0.5), 100, SIZE)
    # A quarter of the image lies this near to the jump.
    assert (np.abs(again[:, 0] - 160) < 40).mean() > 0.55


def test_the_second_pass_looks_where_the_first_was_less_sure_than_usual():
    confidence = np.where(FIRST[:, 1] < 60, 0.1, 0.4)
    again = second_pass(FIRST, flat(), confidence, 100, SIZE)
    assert (again[:, 1] < 70).mean() > 0.6


def test_how_high_confidences_are_in_all_changes_nothing():
    confidence = np.random.default_rng(0).uniform(0.5, 1, 100)
    high, low = (second_pass(FIRST, flat(), confidence * scale, 100, SIZE) for scale in (1, 0.1))
    np.testing.assert_allclose(high, low, atol=1)


def test_the_second_pass_asks_again_where_there_was_no_answer():
    depth = np.where(FIRST[:, 0] > 240, np.nan, 3)
    again = second_pass(FIRST, depth, np.where(np.isnan(depth), 0, 0.5), 100, SIZE)
    assert (again[:, 0] > 230).mean() > 0.6


def test_points_that_could_not_be_asked_draw_no_others():
    edge = FIRST[:, 0] > 240
    depth = np.where(edge, np.nan, 3)
    again = second_pass(FIRST, depth, np.where(edge, 0, 0.5), 100, SIZE, asked=~edge)
    assert (again[:, 0] > 240).mean() < 0.4


def test_where_nothing_is_in_doubt_the_points_fill_the_gaps():
    again = second_pass(FIRST, flat(), np.full(100, 0.5), 100, SIZE)
    between = np.linalg.norm(again[:, None] - FIRST[None], axis=-1).min(axis=1)
    spacing = np.sqrt(320 * 240 / 100)
    assert np.median(between) > 0.4 * spacing
    assert np.histogram2d(*again.T, bins=2, range=((0, 320), (0, 240)))[0].min() > 15


def test_a_first_pass_outside_of_the_image_is_refused():
    with pytest.raises(PixelError, match="320x240 image; pass that image's size"):
        second_pass(FIRST + (100, 0), flat(), flat(), 10, SIZE)


def test_two_passes_are_one_result_of_as_many_points_as_asked():
    oracle = Oracle()
    seen = []
    result = estimate_in_two_passes(oracle, IMAGE, CAMERA, 101, progress=seen.append)
    assert [len(pixels) for pixels in oracle.asked] == [50, 51] == seen
    np.testing.assert_array_equal(result.pixels, np.concatenate(oracle.asked))
    assert len(np.unique(result.pixels, axis=0)) == 101 == len(result.answers)
    assert all(text == f"{depth:g}" for text, depth in zip(result.answers, result.depth_m, strict=True))
    assert result.timing_s == {"model": 2.0}


def test_the_second_half_gathers_at_the_jump_that_the_first_half_found():
    result = estimate_in_two_passes(Oracle(), IMAGE, CAMERA, 200)
    near = np.abs(result.pixels[:, 0] - 160) < 40
    assert near[100:].mean() > 0.5 > near[:100].mean()


def test_the_dense_map_is_computed_once_for_both_passes():
    oracle = Oracle(("dense",))
    seen = []
    result = estimate_in_two_passes(oracle, IMAGE, CAMERA, 200, progress=seen.append)
    assert [len(pixels) for pixels in oracle.asked] == [320 * 240]
    assert (len(result), seen, result.timing_s) == (200, [200], {"model": 1.0})
    np.testing.assert_array_equal(result.depth_m, np.where(result.pixels[:, 0] < 160, 2, 6))


def test_both_passes_stay_in_the_region():
    region = 100, 50, 60, 40
    pixels = estimate_in_two_passes(Oracle(), IMAGE, CAMERA, 80, region=region).pixels
    assert len(pixels) == 80
    assert ((pixels >= (100, 50)) & (pixels < (160, 90))).all()


def test_one_point_is_one_point():
    assert len(estimate_in_two_passes(Oracle(), IMAGE, CAMERA, 1)) == 1


def test_answers_in_two_dialects_are_not_joined():
    dense, said = (Oracle((d,)).estimate(IMAGE, CAMERA, FIRST, dialect=d) for d in ("dense", "coordinates"))
    with pytest.raises(ConfigError, match="'dense' and 'coordinates'"):
        joined(dense, said)
