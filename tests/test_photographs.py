"""Picture files of every common kind come out as the same 8-bit RGB."""

import cv2
import numpy as np
import pytest
from PIL import Image
from recordings import picture

from depthlm_ros.errors import ImageError
from depthlm_ros.photographs import read_photograph

GREY = picture()[..., 1]


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_colour_comes_out_as_it_went_in(tmp_path, mode):
    # Few colours, so that a palette holds them all.
    few = picture() // 64 * 64
    Image.fromarray(few).convert(mode, palette=Image.Palette.ADAPTIVE).save(tmp_path / "größe.png")
    assert np.array_equal(read_photograph(tmp_path / "größe.png"), few)


@pytest.mark.parametrize("name", ["grey.png", "grey.tif"])
@pytest.mark.parametrize("bits", [8, 16])
def test_grey_is_as_bright_with_16_bits_as_with_8(tmp_path, name, bits):
    samples = GREY if bits == 8 else GREY.astype(np.uint16) * 257
    Image.fromarray(samples).save(tmp_path / name)
    assert np.array_equal(read_photograph(tmp_path / name), np.repeat(GREY[..., None], 3, axis=2))


def test_colour_of_16_bits_keeps_its_high_bytes(tmp_path):
    assert cv2.imwrite(str(tmp_path / "deep.png"), picture()[..., ::-1].astype(np.uint16) * 256 + 77)
    assert np.array_equal(read_photograph(tmp_path / "deep.png"), picture())


FLOAT, LONG = GREY / np.float32(255), GREY.astype("i4")


@pytest.mark.parametrize(("samples", "kind"), [(FLOAT, "floating point"), (LONG, "32-bit")])
def test_samples_without_a_known_range_are_refused(tmp_path, samples, kind):
    Image.fromarray(samples).save(tmp_path / "a.tif")
    with pytest.raises(ImageError, match=f"holds {kind} samples"):
        read_photograph(tmp_path / "a.tif")


def test_exif_turns_a_picture_only_where_asked(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(picture()).save(tmp_path / "a.png", exif=exif)
    assert read_photograph(tmp_path / "a.png").shape == (48, 64, 3)
    assert np.array_equal(read_photograph(tmp_path / "a.png", upright=True), np.rot90(picture(), -1))


@pytest.mark.parametrize("content", [b"", b"rubbish"])
def test_what_is_no_picture_is_named(tmp_path, content):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(ImageError, match="a.png can't be read"):
        read_photograph(tmp_path / "a.png")


def test_half_a_picture_is_refused(tmp_path):
    Image.fromarray(picture()).save(tmp_path / "a.png")
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ImageError, match="can't be read"):
        read_photograph(tmp_path / "a.png")
