import numpy as np
import pytest

from depthlm_ros.errors import ImageError, PixelError
from depthlm_ros.markers import arrow_patch, draw_arrow, drawable

GREY = np.full((16, 20, 3), 128, np.uint8)


def test_arrow_is_the_published_one():
    marked = draw_arrow(GREY, (10, 8))
    picture = ["".join("#" if red == 255 else "." for red in row) for row in marked[6:11, 4:12, 0]]
    assert picture == [
        "...#....",
        "....#...",
        ".#####..",
        "....#...",
        "...#....",
    ]
    assert set(map(tuple, marked.reshape(-1, 3))) == {(128, 128, 128), (255, 0, 0)}


def test_the_point_itself_stays_visible():
    assert draw_arrow(GREY, (10, 8))[8, 10].tolist() == [128, 128, 128]


def test_the_given_image_is_left_alone():
    draw_arrow(GREY, (10, 8))
    assert (GREY == 128).all()


def test_arrow_needs_five_pixels_to_every_border():
    pixels = [(5, 5), (14, 10), (4, 8), (15, 8), (8, 4), (8, 11), (np.nan, 8)]
    assert drawable(np.array(pixels), 20, 16).tolist() == [True, True, False, False, False, False, False]


def test_no_pixels_are_no_problem():
    assert drawable(np.empty((0, 2)), 20, 16).shape == (0,)


@pytest.mark.parametrize("pixel", [(4, 8), (15, 8), (8, 11), (8.5, 8), (float("nan"), 8)])
def test_a_pixel_that_cannot_carry_an_arrow_is_named(pixel):
    with pytest.raises(PixelError, match=r"no arrow.*20x16"):
        draw_arrow(GREY, pixel)


@pytest.mark.parametrize("image", [GREY[..., 0], GREY.astype(np.float32), np.zeros((16, 20, 4), np.uint8)])
def test_an_image_that_is_not_rgb_is_refused(image):
    with pytest.raises(ImageError, match="uint8 RGB"):
        draw_arrow(image, (10, 8))


@pytest.mark.parametrize("pixel", [(5, 5), (14, 10), (10, 8), (5, 10)])
def test_a_patch_with_the_arrow_is_what_drawing_it_changes(pixel):
    image = np.random.default_rng(0).integers(0, 256, (16, 20, 3), dtype=np.uint8)
    top, left, block = arrow_patch(image, pixel)
    pasted = image.copy()
    pasted[top : top + len(block), left : left + block.shape[1]] = block
    np.testing.assert_array_equal(pasted, draw_arrow(image, pixel))


def test_a_patch_that_would_reach_beyond_the_image_is_refused():
    with pytest.raises(PixelError, match="no arrow"):
        arrow_patch(GREY, (4, 8))
