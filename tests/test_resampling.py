"""The bicubic resample of the `exact` policy, beside Pillow's."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from PIL import Image

pytest.importorskip("torch")

from depthlm_ros.engines import resampling  # noqa: E402
from depthlm_ros.engines.resampling import resize_bicubic  # noqa: E402


def picture(width: int = 320, height: int = 240) -> np.ndarray:
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    return cv2.GaussianBlur(noise, (0, 0), 1)


@pytest.mark.parametrize("size", [(118, 88), (250, 233), (320, 240), (40, 30), (700, 500)])
def test_it_is_pillows_bicubic_but_for_single_levels(size):
    image = picture()
    made = resize_bicubic(image, (size[0] / 320, size[1] / 240), size)
    expected = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))
    difference = np.abs(made.astype(int) - expected)
    assert made.shape == expected.shape
    assert difference.max() <= 2 and (difference > 0).mean() < 0.02


def test_the_factors_are_kept_where_the_size_is_not_their_multiple():
    image, scale = picture(), 0.3676
    size = (118, 89)  # of 117.6 x 88.2
    made = resize_bicubic(image, (scale, scale), size)
    padded = cv2.copyMakeBorder(image, 0, 3, 0, 3, cv2.BORDER_REPLICATE)
    box = (0, 0, size[0] / scale, size[1] / scale)
    expected = np.asarray(Image.fromarray(padded).resize(size, Image.Resampling.BICUBIC, box=box))
    assert np.abs(made.astype(int) - expected).max() <= 2


@pytest.mark.parametrize("value", [0, 1, 127, 255])
@pytest.mark.parametrize("scale", [0.09, 0.5, 0.77, 1.6])
def test_one_colour_stays_that_colour(value, scale):
    image = np.full((90, 130, 3), value, np.uint8)
    size = (int(np.ceil(130 * scale)), int(np.ceil(90 * scale)))
    made = resize_bicubic(image, (scale, scale), size)
    assert made.shape == (size[1], size[0], 3) and (made == value).all()


@pytest.mark.parametrize(("have", "scale", "size"), [(63, 1 / 0.9, 70), (49, 1 / 49 * 7, 7), (1470, 0.1, 147)])
def test_a_whole_number_of_pixels_is_made_whichever_way_the_product_is_rounded(have, scale, size):
    assert resize_bicubic(picture(have, have), (scale, scale), (size, size)).shape == (size, size, 3)


def test_the_image_may_be_read_only_or_strided_and_is_left_alone():
    wide = picture(330, 240)
    window = wide[:, 5:325]
    expected = resize_bicubic(window.copy(), (0.4, 0.4), (128, 96))
    before = wide.copy()
    window.flags.writeable = False
    assert (resize_bicubic(window, (0.4, 0.4), (128, 96)) == expected).all()
    assert (wide == before).all()


@pytest.mark.parametrize(
    ("scale", "size"), [(0.3676, (118, 89)), (0.4, (128, 96)), (1.6, (512, 384)), (1 / 0.9, (356, 267))]
)
def test_without_torch_pillow_makes_the_same(monkeypatch, scale, size):
    image = picture()
    expected = resize_bicubic(image, (scale, scale), size)
    monkeypatch.setattr(resampling, "torch", None)
    made = resize_bicubic(image, (scale, scale), size)
    difference = np.abs(made.astype(int) - expected)
    assert made.shape == expected.shape
    assert difference.max() <= 2 and (difference > 0).mean() < 0.02
