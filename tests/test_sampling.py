"""Which pixels are asked: how many, where, how evenly, and how fast."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from depthlm_ros.errors import ConfigError, ImageError, PixelError
from depthlm_ros.sampling import METHODS, density_pixels, edge_density, sample_pixels, stride_pixels


def nearest_neighbours(pixels: np.ndarray) -> np.ndarray:
    distances = np.linalg.norm(pixels[:, None] - pixels[None], axis=-1)
    np.fill_diagonal(distances, np.inf)
    return distances.min(axis=1)


def step_image(width: int = 640, height: int = 480, column: int = 320) -> np.ndarray:
    """Dark on the left of a column, bright from there on, with the noise of a sensor."""
    image = np.full((height, width, 3), 60, np.int16)
    image[:, column:] = 180
    image += np.random.default_rng(0).normal(0, 3, image.shape).astype(np.int16)
    return image.clip(0, 255).astype(np.uint8)


@settings(deadline=None)
@given(
    width=st.integers(1, 90), height=st.integers(1, 90), count=st.integers(1, 600), method=st.sampled_from(METHODS),
    seed=st.integers(0, 5), margin=st.integers(0, 6), data=st.data(),
)  # fmt: skip
def test_pixels_are_unique_whole_inside_and_as_many_as_asked(width, height, count, method, seed, margin, data):
    u, v = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
    region = (u, v, data.draw(st.integers(1, width - u)), data.draw(st.integers(1, height - v)))
    region = data.draw(st.sampled_from([None, region]))
    left, top, columns, rows = region or (0, 0, width, height)
    left, right = max(left, margin), min(left + columns, width - margin)
    top, bottom = max(top, margin), min(top + rows, height - margin)
    image = step_image(width, height, width // 2)
    if left >= right or top >= bottom:
        with pytest.raises(PixelError, match="margin"):
            sample_pixels(width, height, count, method, seed, margin, region, image)
        return
    pixels = sample_pixels(width, height, count, method, seed, margin, region, image)
    assert pixels.dtype == np.float32
    assert len(pixels) == min(count, (right - left) * (bottom - top))
    assert len(np.unique(pixels, axis=0)) == len(pixels)
    assert (pixels == np.rint(pixels)).all()
    assert (pixels >= (left, top)).all() and (pixels < (right, bottom)).all()


@pytest.mark.parametrize("method", METHODS)
def test_the_same_seed_gives_the_same_pixels(method):
    first, second = (sample_pixels(640, 480, 99, method, 3, image=step_image()) for _ in range(2))
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("method", ["random", "blue_noise", "edges"])
def test_another_seed_gives_other_pixels(method):
    three, four = (sample_pixels(640, 480, 99, method, seed, image=step_image()) for seed in (3, 4))
    assert not np.array_equal(three, four)


def test_grid_has_equal_cells_where_the_count_splits_well():
    pixels = sample_pixels(640, 480, 256)
    u, v = np.unique(pixels[:, 0]), np.unique(pixels[:, 1])
    assert (len(u), len(v)) == (16, 16)
    assert set(np.diff(u)) == {40} and set(np.diff(v)) == {30}
    assert (u[0], v[0]) == (20, 15)


def test_grid_of_a_prime_count_still_covers_the_image_evenly():
    pixels = sample_pixels(640, 480, 257)
    spacing = np.sqrt(640 * 480 / 257)
    assert len(pixels) == 257
    assert nearest_neighbours(pixels).min() > 0.7 * spacing


def test_grid_follows_the_shape_of_the_area():
    assert len(np.unique(sample_pixels(1000, 10, 100)[:, 1])) == 1


def test_one_pixel_is_the_middle():
    assert sample_pixels(640, 480, 1).tolist() == [[320, 240]]


@pytest.mark.parametrize("count", [64, 256, 1024])
def test_blue_noise_keeps_neighbours_apart_where_random_does_not(count):
    spacing = np.sqrt(640 * 480 / count)
    for seed in range(5):
        apart = nearest_neighbours(sample_pixels(640, 480, count, "blue_noise", seed)).min()
        assert apart > 0.3 * spacing > nearest_neighbours(sample_pixels(640, 480, count, "random", seed)).min()


def test_blue_noise_has_little_power_at_low_frequencies():
    frequency = np.array([(a, b) for a in range(-5, 6) for b in range(-5, 6) if (a, b) != (0, 0)])

    def power(method: str) -> float:
        pixels = np.stack([sample_pixels(512, 512, 400, method, seed) for seed in range(8)]) / 512
        waves = np.exp(-2j * np.pi * np.einsum("sni,fi->snf", pixels, frequency))
        return float((np.abs(waves.sum(axis=1)) ** 2).mean() / 400)

    # Independent points have power 1 at every frequency.
    assert power("blue_noise") < 0.2 < 0.8 < power("random")


@pytest.mark.parametrize("size", [(640, 480), (2000, 50), (50, 2000)])
def test_each_part_of_blue_noise_that_comes_first_covers_the_whole_area(size):
    first = sample_pixels(*size, 400, "blue_noise")[:100] / size
    longer = int(np.argmax(size))
    assert np.histogram(first[:, longer], bins=4, range=(0, 1))[0].min() >= 20


def test_blue_noise_fills_an_area_to_the_last_pixel_but_one():
    assert len(np.unique(sample_pixels(64, 48, 64 * 48 - 1, "blue_noise"), axis=0)) == 64 * 48 - 1


def test_points_by_edges_lie_on_both_sides_of_an_edge_and_not_on_it():
    u = sample_pixels(640, 480, 256, "edges", image=step_image())[:, 0]
    beside = np.abs(u - 319.5)
    assert beside.min() >= 2
    left, right = (((u < 320) & (beside < 12)).sum(), ((u >= 320) & (beside < 12)).sum())
    # Even points would be 256 * 24 / 640 = 10 in this band.
    assert min(left, right) > 15
    assert max(left, right) < 2 * min(left, right)


def test_points_by_edges_still_cover_what_shows_no_edge():
    pixels = sample_pixels(640, 480, 256, "edges", image=step_image())
    far = pixels[np.abs(pixels[:, 0] - 320) > 40]
    counts = np.histogram2d(*far.T, bins=(4, 3), range=((0, 640), (0, 480)))[0]
    assert counts.min() >= 0.3 * 256 / 12


def test_points_by_edges_are_blue_noise_where_the_image_shows_nothing():
    plain = np.full((480, 640, 3), 128, np.uint8)
    even = sample_pixels(640, 480, 256, "blue_noise", 5)
    # Up to the jitter, which goes with the length of the sequence that is drawn.
    np.testing.assert_allclose(sample_pixels(640, 480, 256, "edges", 5, image=plain), even, atol=2)


def test_fine_texture_draws_fewer_points_than_an_outline():
    image = np.full((480, 640, 3), 120, np.uint8)
    image[:, :320] += (np.indices((480, 320)).sum(0) // 8 % 2 * 60).astype(np.uint8)[..., None]
    image[100:380, 400:560] = 220
    density = edge_density(image)
    assert density[100:380, 20:280].mean() < 0.7 * density[90:390, 390:570].mean()


@pytest.mark.parametrize("image", [None, np.zeros((48, 64, 3), np.uint8)])
def test_edges_need_the_image_whose_pixels_are_chosen(image):
    with pytest.raises(ImageError, match="pass the 640x480 image"):
        sample_pixels(640, 480, 256, "edges", image=image)


def test_the_share_of_points_follows_the_density():
    density = np.ones((400, 400))
    density[:, 200:] = 4
    u = density_pixels(density, 1000)[:, 0]
    assert (u >= 200).mean() == pytest.approx(0.8, abs=0.01)


@pytest.mark.parametrize("part", [slice(0, 200), slice(200, 400)])
def test_points_of_a_density_are_even_in_its_thin_and_its_thick_parts(part):
    density = np.ones((400, 400))
    density[:, 200:] = 4
    pixels = density_pixels(density, 1000)
    own = pixels[(pixels[:, 0] >= part.start + 10) & (pixels[:, 0] < part.stop - 10)]
    spacing = np.sqrt(180 * 400 / len(own))
    assert nearest_neighbours(own).min() > 0.3 * spacing


def test_the_first_points_of_a_density_follow_it_too():
    density = np.ones((400, 400))
    density[:, 200:] = 4
    assert (density_pixels(density, 1000)[:100, 0] >= 200).mean() == pytest.approx(0.8, abs=0.05)


def test_pixels_of_no_density_come_last():
    density = np.zeros((20, 20))
    density[5:10, 5:10] = 1
    pixels = density_pixels(density, 30).astype(int)
    assert density[pixels[:25, 1], pixels[:25, 0]].all()
    assert len(np.unique(pixels, axis=0)) == 30


def test_a_negative_density_is_refused():
    with pytest.raises(ConfigError, match="-1"):
        density_pixels(np.full((4, 4), -1.0), 2)


def test_stride_takes_the_middle_of_each_cell_row_by_row():
    assert stride_pixels(8, 6, 4).tolist() == [[2, 2], [6, 2]]
    assert stride_pixels(8, 8, 4).tolist() == [[2, 2], [6, 2], [2, 6], [6, 6]]


def test_stride_one_is_every_pixel():
    assert stride_pixels(3, 2, 1).tolist() == [[0, 0], [1, 0], [2, 0], [0, 1], [1, 1], [2, 1]]


def test_a_stride_beyond_the_image_leaves_one_pixel():
    assert stride_pixels(5, 3, 100).tolist() == [[2, 1]]


def test_an_unknown_method_names_the_nearest_one():
    with pytest.raises(ConfigError, match="'blue-noise'.*did you mean 'blue_noise'"):
        sample_pixels(640, 480, 10, "blue-noise")


@pytest.mark.parametrize("region", [(600, 0, 100, 10), (-1, 0, 10, 10), (0, 0, 0, 10)])
def test_a_region_outside_the_image_is_refused(region):
    with pytest.raises(PixelError, match="not inside the 640x480 image"):
        sample_pixels(640, 480, 10, region=region)


@pytest.mark.parametrize("bad", [{"count": 0}, {"count": 5, "margin_px": -1}, {"count": 5, "seed": -1}])
def test_values_out_of_range_are_refused(bad):
    with pytest.raises(ConfigError, match=r"-1|0"):
        sample_pixels(640, 480, **bad)


def test_a_stride_of_zero_is_refused():
    with pytest.raises(ConfigError, match="stride is 0"):
        stride_pixels(640, 480, 0)
