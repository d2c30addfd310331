"""Image messages of every common encoding become RGB (or metres), and broken ones become errors that help."""

from __future__ import annotations

import array
import importlib
import io
import sys
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as PilImage

from depthlm_ros import encodings
from depthlm_ros.encodings import IMAGE_ENCODINGS, decode_compressed, decode_depth, decode_image
from depthlm_ros.errors import ImageError

CHANNELS = {"rgb": [0, 1, 2], "bgr": [2, 1, 0], "rgba": [0, 1, 2, 3], "bgra": [2, 1, 0, 3]}
BAYER_SITES = {"rggb": "RGGB", "bggr": "BGGR", "gbrg": "GBRG", "grbg": "GRBG"}
RED, GREEN, BLUE = (200, 0, 0), (0, 200, 0), (0, 0, 200)

# Y, U, V of 100 % colour bars and their RGB: ITU-R BT.601, limited range.
COLOUR_BARS = {
    (235, 128, 128): (255, 255, 255),
    (16, 128, 128): (0, 0, 0),
    (81, 90, 240): (255, 0, 0),
    (145, 54, 34): (0, 255, 0),
    (41, 240, 110): (0, 0, 255),
}
YUV_ENCODINGS = ("yuv422", "uyvy", "yuv422_yuy2", "yuyv", "nv12", "nv21", "nv24")


def ros_image(encoding, width, height, rows, *, padding=0, big_endian=0, numpy_data=False):
    """An Image message from (rows, bytes) uint8, each row followed by `padding` bytes of rubbish."""
    rubbish = np.full((len(rows), padding), 0xA5, np.uint8)
    padded = np.ascontiguousarray(np.concatenate([rows, rubbish], axis=1))
    flat = padded.reshape(-1)
    data = flat if numpy_data else array.array("B", flat.tobytes())
    return SimpleNamespace(
        encoding=encoding, width=width, height=height, step=padded.shape[1], is_bigendian=big_endian, data=data
    )


def solid(encoding, colour, width=8, height=6):
    """A mosaic in which only the sensor elements of one colour see light."""
    sites = BAYER_SITES[encoding.removeprefix("bayer_")[:4]]
    tile = np.array([max(colour) if colour["RGB".index(site)] else 0 for site in sites]).reshape(2, 2)
    return np.tile(tile, (height // 2, width // 2))


def yuv_rows(encoding, yuv):
    """(rows, bytes) of (H, W, 3) YUV whose chroma is constant over 2 x 2 blocks."""
    y, u, v = (yuv[..., i] for i in range(3))
    height, width = y.shape
    if encoding in ("yuv422", "uyvy"):
        return np.stack([u[:, ::2], y[:, ::2], v[:, ::2], y[:, 1::2]], axis=-1).reshape(height, -1)
    if encoding in ("yuv422_yuy2", "yuyv"):
        return np.stack([y[:, ::2], u[:, ::2], y[:, 1::2], v[:, ::2]], axis=-1).reshape(height, -1)
    if encoding == "nv24":
        return np.concatenate([y, np.stack([u, v], axis=-1).reshape(2 * height, width)])
    pair = (u, v) if encoding == "nv12" else (v, u)
    return np.concatenate([y, np.stack([plane[::2, ::2] for plane in pair], axis=-1).reshape(height // 2, width)])


@settings(max_examples=150, deadline=None)
@given(
    name=st.sampled_from(sorted(CHANNELS)),
    bits=st.sampled_from([8, 16]),
    width=st.integers(1, 9),
    height=st.integers(1, 7),
    padding=st.integers(0, 9),
    big_endian=st.integers(0, 1),
    numpy_data=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_colour_survives_any_size_padding_and_byte_order(
    name, bits, width, height, padding, big_endian, numpy_data, seed
):
    samples = np.random.default_rng(seed).integers(0, 2**bits, (height, width, 4))
    dtype = f"{'<>'[big_endian]}u{bits // 8}"
    stored = np.ascontiguousarray(samples[..., CHANNELS[name]].astype(dtype))
    msg = ros_image(
        f"{name}{bits}",
        width,
        height,
        stored.view(np.uint8).reshape(height, -1),
        padding=padding,
        big_endian=big_endian,
        numpy_data=numpy_data,
    )
    image = decode_image(msg)
    assert image.dtype == np.uint8 and image.flags.c_contiguous
    np.testing.assert_array_equal(image, samples[..., :3] >> (bits - 8))


@settings(max_examples=50, deadline=None)
@given(
    width=st.integers(1, 9), height=st.integers(1, 7), padding=st.integers(0, 5), big_endian=st.integers(0, 1)
)
def test_mono16_keeps_the_high_byte(width, height, padding, big_endian):
    grey = np.random.default_rng(width * height).integers(0, 2**16, (height, width))
    rows = np.ascontiguousarray(grey.astype(("<u2", ">u2")[big_endian])).view(np.uint8)
    image = decode_image(ros_image("mono16", width, height, rows, padding=padding, big_endian=big_endian))
    np.testing.assert_array_equal(image, np.repeat((grey >> 8)[..., None], 3, axis=-1))


def test_mono8_is_grey_and_ignores_the_byte_order():
    grey = np.arange(35, dtype=np.uint8).reshape(5, 7)
    image = decode_image(ros_image("mono8", 7, 5, grey, padding=1, big_endian=1))
    np.testing.assert_array_equal(image, np.repeat(grey[..., None], 3, axis=-1))


@pytest.mark.parametrize("colour", [RED, GREEN, BLUE])
@pytest.mark.parametrize("pattern", sorted(BAYER_SITES))
def test_bayer_colours_come_out_as_the_sensor_saw_them(pattern, colour):
    mosaic = solid(f"bayer_{pattern}8", colour).astype(np.uint8)
    image = decode_image(ros_image(f"bayer_{pattern}8", 8, 6, mosaic, padding=3))
    np.testing.assert_array_equal(image, np.broadcast_to(np.uint8(colour), image.shape))


@pytest.mark.parametrize("big_endian", [0, 1])
@pytest.mark.parametrize("pattern", sorted(BAYER_SITES))
def test_bayer16_comes_out_as_the_sensor_saw_it(pattern, big_endian):
    mosaic = (solid(f"bayer_{pattern}16", RED) * 256 + 77).astype(("<u2", ">u2")[big_endian])
    image = decode_image(ros_image(f"bayer_{pattern}16", 8, 6, mosaic.view(np.uint8), big_endian=big_endian))
    np.testing.assert_array_equal(image, np.broadcast_to(np.uint8(RED), image.shape))


@pytest.mark.parametrize("encoding", YUV_ENCODINGS)
def test_yuv_colour_bars(encoding):
    yuv = np.repeat(np.array(list(COLOUR_BARS), np.uint8), 2, axis=0)[None].repeat(4, axis=0)
    image = decode_image(ros_image(encoding, yuv.shape[1], 4, yuv_rows(encoding, yuv)))
    expected = np.repeat(np.array(list(COLOUR_BARS.values())), 2, axis=0)[None].repeat(4, axis=0)
    np.testing.assert_allclose(image, expected, atol=2)


@settings(max_examples=60, deadline=None)
@given(
    encoding=st.sampled_from(YUV_ENCODINGS),
    width=st.integers(1, 5),
    height=st.integers(1, 4),
    padding=st.integers(1, 9),
    numpy_data=st.booleans(),
)
def test_yuv_padding_changes_nothing(encoding, width, height, padding, numpy_data):
    blocks = np.random.default_rng(width + 10 * height).integers(16, 236, (height, width, 3), dtype=np.uint8)
    yuv = blocks.repeat(2, axis=0).repeat(2, axis=1)
    rows = yuv_rows(encoding, yuv)
    # Rows of NV24's chroma are two steps long, so that the padding of a pair of rows lies at its end.
    if encoding == "nv24":
        chroma = rows[2 * height :].reshape(2 * height, -1)
        chroma = np.pad(chroma, ((0, 0), (0, 2 * padding))).reshape(4 * height, -1)
        rows = np.concatenate([np.pad(rows[: 2 * height], ((0, 0), (0, padding))), chroma])
        padded = ros_image(encoding, 2 * width, 2 * height, rows, numpy_data=numpy_data)
    else:
        padded = ros_image(encoding, 2 * width, 2 * height, rows, padding=padding, numpy_data=numpy_data)
    plain = ros_image(encoding, 2 * width, 2 * height, yuv_rows(encoding, yuv))
    np.testing.assert_array_equal(decode_image(padded), decode_image(plain))


def test_decoded_image_shares_nothing_with_the_message():
    data = np.zeros(12, np.uint8)
    msg = SimpleNamespace(encoding="rgb8", width=2, height=2, step=6, is_bigendian=0, data=data)
    image = decode_image(msg)
    data[:] = 9
    image[0, 0] = 1
    assert image.sum() == 3


def test_rclpy_and_rosbags_messages_decode_alike():
    sensor_msgs = pytest.importorskip("sensor_msgs.msg")
    typesys = pytest.importorskip("rosbags.typesys")
    store = typesys.get_typestore(typesys.Stores.ROS2_KILTED)
    pixels = np.arange(2 * 9, dtype=np.uint8)
    ours = sensor_msgs.Image(height=2, width=2, encoding="bgr8", step=9)
    ours.data.frombytes(pixels)
    time_type, header_type = store.types["builtin_interfaces/msg/Time"], store.types["std_msgs/msg/Header"]
    image_type = store.types["sensor_msgs/msg/Image"]
    theirs = image_type(header_type(time_type(0, 0), ""), 2, 2, "bgr8", 0, 9, pixels)
    raw = store.serialize_cdr(theirs, image_type.__msgtype__)
    read_back = store.deserialize_cdr(raw, image_type.__msgtype__)
    np.testing.assert_array_equal(decode_image(ours), [[[2, 1, 0], [5, 4, 3]], [[11, 10, 9], [14, 13, 12]]])
    np.testing.assert_array_equal(decode_image(read_back), decode_image(ours))


def broken(**changes):
    msg = ros_image("rgb8", 4, 2, np.zeros((2, 12), np.uint8))
    return SimpleNamespace(**{**vars(msg), **changes})


@pytest.mark.parametrize(
    ("msg", "words"),
    [
        (broken(encoding="rgb9"), ["'rgb9'", "did you mean 'rgb8'", "bayer_rggb8", "set the camera driver"]),
        (broken(encoding="RGB8"), ["'RGB8'", "did you mean 'rgb8'"]),
        (broken(encoding=""), ["''", "rgb8, "]),
        (broken(encoding="32FC1"), ["'32FC1' is depth", "rgb8"]),
        (broken(step=11), ["step is 11", "takes 12 bytes", "publisher"]),
        (broken(step=0), ["step is 0", "takes 12 bytes"]),
        (broken(data=bytes(23)), ["truncated", "23 bytes", "takes 24"]),
        (broken(data=array.array("B")), ["truncated", "0 bytes"]),
        (broken(data=bytes(32)), ["longer", "32 bytes", "takes 24"]),
        (broken(width=0), ["0 x 2 pixels"]),
        (broken(height=0, data=b""), ["4 x 0 pixels"]),
        (broken(encoding="bayer_rggb8", width=2, step=12), ["at least 3 x 3", "2 x 2"]),
        (broken(encoding="yuv422", width=5, step=12), ["even size", "5 x 2"]),
        (broken(encoding="nv21", height=3, data=bytes(48)), ["even size", "4 x 3"]),
        (broken(encoding="nv12", width=4, step=12), ["truncated", "24 bytes", "takes 36"]),
        (broken(encoding="mono16", width=7), ["step is 12", "takes 14"]),
    ],
)
def test_broken_image_names_the_value_and_the_remedy(msg, words, monkeypatch):
    monkeypatch.setattr(encodings, "cv_bridge_fault", lambda: "cv_bridge isn't installed")
    with pytest.raises(ImageError) as error:
        decode_image(msg)
    for word in words:
        assert word in str(error.value)


def test_the_encodings_named_in_the_documentation_are_known():
    asked = {"rgb8", "bgr8", "rgba8", "bgra8", "mono8", "mono16", "yuv422", "yuv422_yuy2", "uyvy", "yuyv"}
    assert asked | {f"bayer_{pattern}8" for pattern in BAYER_SITES} <= set(IMAGE_ENCODINGS)


# ---------------------------------------------------------------- cv_bridge

STAND_IN = {
    "works": "def cvtColor2(image, source, target):\n    return image\n",
    # What a build against NumPy 1 does under NumPy 2.
    "crashes": "import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n",
    "doesn't import": "raise ImportError('numpy.core.multiarray failed to import')\n",
}


@pytest.fixture
def cv_bridge(tmp_path, monkeypatch, request):
    """A stand-in for cv_bridge, whose compiled half does what the parameter says."""
    package = tmp_path / "cv_bridge"
    (package / "boost").mkdir(parents=True)
    (package / "boost" / "__init__.py").touch()
    (package / "boost" / "cv_bridge_boost.py").write_text(STAND_IN[request.param])
    (package / "__init__.py").write_text(
        "import numpy\n"
        "class CvBridgeError(TypeError):\n    pass\n"
        "class CvBridge:\n"
        "    def imgmsg_to_cv2(self, msg, desired):\n"
        "        if msg.encoding != 'weird8':\n"
        "            raise CvBridgeError('[' + msg.encoding + '] is not a color')\n"
        "        return numpy.full((msg.height, msg.width, 3), 7, numpy.uint8)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    importlib.invalidate_caches()
    encodings.cv_bridge_fault.cache_clear()
    yield
    encodings.cv_bridge_fault.cache_clear()
    for name in [name for name in sys.modules if name.split(".")[0] == "cv_bridge"]:
        del sys.modules[name]


@pytest.mark.parametrize("cv_bridge", ["works"], indirect=True)
def test_cv_bridge_serves_encodings_beyond_the_list(cv_bridge):
    image = decode_image(broken(encoding="weird8"))
    np.testing.assert_array_equal(image, np.full((2, 4, 3), 7))


@pytest.mark.parametrize("cv_bridge", ["works"], indirect=True)
def test_what_cv_bridge_refuses_is_an_image_error_with_its_reason(cv_bridge):
    with pytest.raises(ImageError, match=r"'8UC3'.*\[8UC3\] is not a color"):
        decode_image(broken(encoding="8UC3"))


@pytest.mark.parametrize("cv_bridge", ["crashes", "doesn't import"], indirect=True)
def test_a_cv_bridge_that_crashes_takes_only_a_child_with_it(cv_bridge):
    with pytest.raises(ImageError, match=r"'weird8'.*cv_bridge is installed, but fails with NumPy .*#535"):
        decode_image(broken(encoding="weird8"))


# ---------------------------------------------------------------- compressed


def compressed(data, format_="jpeg"):
    return SimpleNamespace(format=format_, data=array.array("B", bytes(data)))


def pil_bytes(pixels, file_format, **options):
    buffer = io.BytesIO()
    PilImage.fromarray(pixels).save(buffer, file_format, **options)
    return buffer.getvalue()


def picture(height=24, width=32):
    v, u = np.mgrid[0:height, 0:width]
    return np.stack([u * 7, v * 9, 255 - u * 5], axis=-1).astype(np.uint8)


@pytest.mark.parametrize("format_", ["jpeg", "", "rgb8; jpeg compressed bgr8", "bgr8; jpeg compressed bgr8"])
def test_jpeg_is_rgb_whatever_its_source_was(format_):
    image = decode_compressed(compressed(pil_bytes(picture(), "JPEG", quality=95, subsampling=0), format_))
    assert image.shape == (24, 32, 3) and image.dtype == np.uint8
    np.testing.assert_allclose(image.astype(int), picture(), atol=12)


@pytest.mark.parametrize("format_", ["png", "rgb8; png compressed bgr8", "rgba8; png compressed "])
def test_png_is_lossless_and_drops_alpha(format_):
    np.testing.assert_array_equal(decode_compressed(compressed(pil_bytes(picture(), "PNG"), format_)), picture())
    with_alpha = np.dstack([picture(), np.full((24, 32), 100, np.uint8)])
    np.testing.assert_array_equal(decode_compressed(compressed(pil_bytes(with_alpha, "PNG"), format_)), picture())


def test_channels_stored_in_rgb_order_are_put_right():
    file = pil_bytes(np.ascontiguousarray(picture()[..., ::-1]), "PNG")
    np.testing.assert_array_equal(decode_compressed(compressed(file, "rgb8; png compressed rgb8")), picture())


def test_grey_files_become_three_equal_channels():
    grey = picture()[..., 0]
    image = decode_compressed(compressed(pil_bytes(np.ascontiguousarray(grey), "PNG"), "mono8; png compressed "))
    np.testing.assert_array_equal(image, np.repeat(grey[..., None], 3, axis=-1))


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_16_bit_png_keeps_the_high_byte(channels):
    values = np.random.default_rng(channels).integers(0, 2**16, (6, 5, channels), dtype=np.uint16)
    bgr = values if channels == 1 else values[..., [2, 1, 0, 3][:channels]]
    file = cv2.imencode(".png", np.ascontiguousarray(bgr))[1]
    image = decode_compressed(compressed(file.tobytes(), "rgb16; png compressed bgr16"))
    np.testing.assert_array_equal(image, np.broadcast_to(values[..., :3] >> 8, (6, 5, 3)))


@pytest.mark.parametrize("bits", [8, 16])
def test_bayer_png_is_demosaiced(bits):
    mosaic = (solid("bayer_grbg8", RED) << (bits - 8)).astype(f"u{bits // 8}")
    file = cv2.imencode(".png", mosaic)[1].tobytes()
    image = decode_compressed(compressed(file, f"bayer_grbg{bits}; png compressed "))
    np.testing.assert_array_equal(image, np.broadcast_to(np.uint8(RED), image.shape))


def test_bayer_jpeg_that_was_turned_to_grey_stays_grey():
    file = pil_bytes(np.full((8, 8), 90, np.uint8), "JPEG")
    assert np.unique(decode_compressed(compressed(file, "bayer_grbg8; jpeg compressed mono8"))).tolist() == [90]


def test_exif_rotation_is_ignored_since_the_intrinsics_know_nothing_of_it():
    exif = PilImage.Exif()
    exif[0x0112] = 6
    assert decode_compressed(compressed(pil_bytes(picture(), "JPEG", exif=exif))).shape == (24, 32, 3)


@pytest.mark.parametrize("file_format", ["JPEG", "PNG"])
def test_a_file_cut_anywhere_is_truncated(file_format):
    file = pil_bytes(picture(), file_format)
    for length in range(4, len(file) - 8, 40):
        with pytest.raises(ImageError, match=rf"{length} bytes of format 'jpeg'.*truncated"):
            decode_compressed(compressed(file[:length]))


@pytest.mark.parametrize(
    ("msg", "words"),
    [
        (compressed(b""), ["0 bytes", "starting with nothing"]),
        (compressed(b"\0\0\0\1\x67h264", "h264"), ["'h264'", "00 00 00 01 67", "raw image topic"]),
        (compressed(bytes(40), "16UC1; compressedDepth png"), ["compressed depth", "colour camera"]),
        (compressed(b"\xff\xd8" + bytes(50) + b"\xff\xd9"), ["ff d8 00", "no jpeg or png image"]),
    ],
)
def test_undecodable_data_names_the_format_and_the_first_bytes(msg, words):
    with pytest.raises(ImageError) as error:
        decode_compressed(msg)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(("pattern", "levels_apart"), [("ibims1/**/*.png", 0), ("scannetpp/rgb/*.jpg", 4)])
def test_photographs_decode_as_with_another_library(data_folder, pattern, levels_apart):
    file = sorted(data_folder.glob(pattern))[0]
    image = decode_compressed(compressed(file.read_bytes(), file.suffix[1:]))
    np.testing.assert_allclose(image.astype(int), np.asarray(PilImage.open(file).convert("RGB")), atol=levels_apart)


# ---------------------------------------------------------------- depth


@settings(max_examples=60, deadline=None)
@given(
    encoding=st.sampled_from(["32FC1", "16UC1"]),
    width=st.integers(1, 7),
    height=st.integers(1, 5),
    padding=st.integers(0, 7),
    big_endian=st.integers(0, 1),
)
def test_depth_is_metres_whatever_size_padding_and_byte_order(encoding, width, height, padding, big_endian):
    millimetres = np.random.default_rng(width * height).integers(0, 2**16, (height, width))
    order = "<>"[big_endian]
    stored = millimetres.astype(order + "u2") if encoding == "16UC1" else (millimetres / 1000).astype(order + "f4")
    rows = np.ascontiguousarray(stored).view(np.uint8)
    depth_m = decode_depth(ros_image(encoding, width, height, rows, padding=padding, big_endian=big_endian))
    assert depth_m.dtype == np.float32
    np.testing.assert_array_equal(depth_m, np.where(millimetres > 0, millimetres / 1000, np.nan).astype(np.float32))


def test_what_is_no_measurement_is_nan():
    values = np.array([[np.nan, np.inf, -np.inf, 0.0, -1.0, 2.5]], "<f4")
    np.testing.assert_array_equal(
        decode_depth(ros_image("32FC1", 6, 1, values.view(np.uint8))), [[np.nan] * 5 + [2.5]]
    )


@pytest.mark.parametrize(
    ("msg", "words"),
    [
        (broken(), ["'rgb8' isn't depth", "32FC1, 16UC1"]),
        (broken(encoding="32FC1"), ["step is 12", "takes 16"]),
        (broken(encoding="16UC1", data=bytes(20)), ["truncated", "20 bytes", "takes 24"]),
        (broken(encoding="16UC1", width=0), ["0 x 2"]),
    ],
)
def test_broken_depth_names_the_value_and_the_remedy(msg, words):
    with pytest.raises(ImageError) as error:
        decode_depth(msg)
    for word in words:
        assert word in str(error.value)
