"""Clouds, depth, colour and intrinsics as real ROS messages, there and back."""

from __future__ import annotations

import struct
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from depthlm_ros.camera import Camera, Distortion, camera_from_info
from depthlm_ros.errors import CloudError, ImageError
from depthlm_ros.messages import (
    camera_info_message,
    cloud_message,
    decode_depth,
    decode_image,
    depth_message,
    header_stamp_ns,
    read_cloud,
    rgb_message,
)

STAMP_NS = 1_700_000_000_123_456_789


def cloud_arrays(n, seed=0):
    rng = np.random.default_rng(seed)
    points = rng.normal(size=(n, 3)).astype(np.float32)
    return points, rng.integers(0, 256, (n, 3), dtype=np.uint8), rng.random(n).astype(np.float32)


@pytest.fixture
def ros():
    return pytest.importorskip("sensor_msgs.msg")


def test_cloud_has_the_promised_fields_and_offsets(ros):
    msg = cloud_message(STAMP_NS, "camera", *cloud_arrays(4))
    assert isinstance(msg, ros.PointCloud2)
    float32 = ros.PointField.FLOAT32
    assert [(f.name, f.offset, f.datatype, f.count) for f in msg.fields] == [
        ("x", 0, float32, 1),
        ("y", 4, float32, 1),
        ("z", 8, float32, 1),
        ("rgb", 12, float32, 1),
        ("confidence", 16, float32, 1),
    ]
    assert (msg.point_step, msg.row_step, msg.height, msg.width) == (20, 80, 1, 4)
    assert len(msg.data) == 80 and not msg.is_bigendian


def test_cloud_bytes_are_little_endian_floats_with_rgb_packed_as_pcl_does(ros):
    msg = cloud_message(
        0, "", np.array([[1.5, -2.0, 3.0]], np.float32), np.array([[10, 20, 30]], np.uint8), np.array([0.25])
    )
    assert struct.unpack("<fffIf", bytes(msg.data)) == (1.5, -2.0, 3.0, 10 << 16 | 20 << 8 | 30, 0.25)


def test_header_carries_stamp_and_frame(ros):
    msg = cloud_message(STAMP_NS, "camera_optical_frame", *cloud_arrays(1))
    assert (msg.header.stamp.sec, msg.header.stamp.nanosec) == (1_700_000_000, 123_456_789)
    assert msg.header.frame_id == "camera_optical_frame"
    assert header_stamp_ns(msg.header) == STAMP_NS


@settings(max_examples=40, deadline=None)
@given(height=st.integers(0, 6), width=st.integers(0, 6), organised=st.booleans(), seed=st.integers(0, 999))
def test_cloud_comes_back_as_it_went(height, width, organised, seed):
    pytest.importorskip("sensor_msgs.msg")
    points, rgb, confidence = cloud_arrays(height * width, seed)
    shape = (height, width) if organised else None
    msg = cloud_message(0, "", points, rgb, confidence, shape)
    arrays = read_cloud(msg)
    lead = (height, width) if organised and height > 1 else (height * width,)
    if organised and height == 0:
        lead = (0,)
    assert arrays["points"].shape == (*lead, 3)
    np.testing.assert_array_equal(arrays["points"].reshape(-1, 3), points)
    np.testing.assert_array_equal(arrays["rgb"].reshape(-1, 3), rgb)
    np.testing.assert_array_equal(arrays["confidence"].reshape(-1), confidence)


def test_organised_cloud_is_height_by_width_row_by_row(ros):
    points, rgb, confidence = cloud_arrays(6)
    msg = cloud_message(0, "", points, rgb, confidence, (2, 3))
    assert (msg.height, msg.width, msg.row_step) == (2, 3, 60)
    np.testing.assert_array_equal(read_cloud(msg)["points"][1, 0], points[3])


@pytest.mark.parametrize(("value", "dense"), [(1.0, True), (np.nan, False), (np.inf, False)])
def test_cloud_is_dense_unless_a_coordinate_is_not_finite(ros, value, dense):
    points, rgb, confidence = cloud_arrays(3)
    points[1, 2] = value
    assert cloud_message(0, "", points, rgb, confidence).is_dense is dense


def test_nan_confidence_leaves_the_cloud_dense(ros):
    points, rgb, _ = cloud_arrays(2)
    assert cloud_message(0, "", points, rgb, np.array([np.nan, 1])).is_dense is True


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"points": np.zeros((4, 2), np.float32)}, "(4, 2)"),
        ({"rgb": np.zeros((3, 3), np.uint8)}, "(3, 3)"),
        ({"confidence": np.zeros((4, 1))}, "(4, 1)"),
        ({"rgb": np.zeros((4, 3), np.float32)}, "float32"),
        ({"organised_shape": (3, 2)}, "3 x 2"),
    ],
)
def test_arrays_that_do_not_belong_together_are_refused(ros, changes, words):
    points, rgb, confidence = cloud_arrays(4)
    with pytest.raises(CloudError) as error:
        cloud_message(0, "", **{"points": points, "rgb": rgb, "confidence": confidence, **changes})
    assert words in str(error.value)


def test_cloud_passes_through_ros_serialisation_to_another_reader(ros):
    serialization = pytest.importorskip("rclpy.serialization")
    typesys = pytest.importorskip("rosbags.typesys")
    points, rgb, confidence = cloud_arrays(6)
    msg = cloud_message(STAMP_NS, "camera", points, rgb, confidence, (2, 3))
    store = typesys.get_typestore(typesys.Stores.ROS2_KILTED)
    theirs = store.deserialize_cdr(serialization.serialize_message(msg), "sensor_msgs/msg/PointCloud2")
    arrays = read_cloud(theirs)
    np.testing.assert_array_equal(arrays["points"], points.reshape(2, 3, 3))
    np.testing.assert_array_equal(arrays["rgb"], rgb.reshape(2, 3, 3))


FIELD_CODES = {1: "b", 2: "B", 3: "h", 4: "H", 5: "i", 6: "I", 7: "f", 8: "d"}


@st.composite
def foreign_clouds(draw):
    """A cloud as another driver may write it, packed value by value, with what must be read from it."""
    order = draw(st.sampled_from("<>"))
    height, width = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    fields, cursor = [], 0
    for index in range(draw(st.integers(1, 5))):
        kind, count = draw(st.sampled_from(sorted(FIELD_CODES))), draw(st.sampled_from([1, 1, 1, 3]))
        cursor += draw(st.integers(0, 3))
        fields.append(SimpleNamespace(name=f"field{index}", offset=cursor, datatype=kind, count=count))
        cursor += count * struct.calcsize(FIELD_CODES[kind])
    point_step = cursor + draw(st.integers(0, 5))
    row_step = point_step * width + draw(st.integers(0, 7))
    data = bytearray(b"\xa5" * (row_step * height))
    values = {f.name: np.empty((height, width, f.count)) for f in fields}
    for row in range(height):
        for column in range(width):
            for f in fields:
                numbers = draw(st.lists(st.integers(0, 127), min_size=f.count, max_size=f.count))
                start = row * row_step + column * point_step + f.offset
                struct.pack_into(f"{order}{f.count}{FIELD_CODES[f.datatype]}", data, start, *numbers)
                values[f.name][row, column] = numbers
    msg = SimpleNamespace(
        height=height,
        width=width,
        fields=draw(st.permutations(fields)),
        is_bigendian=order == ">",
        point_step=point_step,
        row_step=row_step,
        data=bytes(data),
    )
    return msg, values


@settings(max_examples=80, deadline=None)
@given(foreign_clouds())
def test_foreign_clouds_are_read_whatever_their_layout(case):
    msg, values = case
    arrays = read_cloud(msg)
    assert arrays.keys() == values.keys()
    for name, expected in values.items():
        expected = expected if msg.height > 1 else expected[0]
        expected = expected if expected.shape[-1] > 1 else expected[..., 0]
        assert arrays[name].dtype.isnative
        np.testing.assert_array_equal(arrays[name], expected)


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize(("name", "kind", "code"), [("rgb", 7, "f"), ("rgb", 6, "I"), ("rgba", 6, "I")])
def test_packed_colour_of_foreign_clouds_is_unpacked(order, name, kind, code):
    packed = struct.pack(f"{order}I", 0xFF << 24 | 1 << 16 | 2 << 8 | 3)
    assert len(packed) == struct.calcsize(code)
    field = SimpleNamespace(name=name, offset=0, datatype=kind, count=1)
    msg = SimpleNamespace(
        height=1, width=1, fields=[field], is_bigendian=order == ">", point_step=4, row_step=4, data=packed
    )
    np.testing.assert_array_equal(read_cloud(msg)[name], [[1, 2, 3]])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data": b"\0" * 79}, ["79 bytes"]),
        ({"row_step": 79}, ["row_step 79"]),
        ({"point_step": 16, "row_step": 64}, ["point_step 16"]),
        ({"point_step": 0, "row_step": 0}, ["point_step 0"]),
        ({"fields": [SimpleNamespace(name="x", offset=0, datatype=42, count=1)]}, ["x (42)"]),
        ({"fields": [SimpleNamespace(name="x", offset=0, datatype=7, count=1)] * 2}, ["['x', 'x']"]),
    ],
)
def test_broken_clouds_name_the_value(ros, changes, words):
    good = cloud_message(0, "", *cloud_arrays(4))
    names = ("height", "width", "fields", "is_bigendian", "point_step", "row_step", "data")
    msg = SimpleNamespace(**{**{name: getattr(good, name) for name in names}, **changes})
    with pytest.raises(CloudError) as error:
        read_cloud(msg)
    for word in words:
        assert word in str(error.value)


def test_depth_goes_out_and_comes_back(ros):
    depth_m = np.array([[1.25, np.nan, 3.5], [0.1, 80.0, np.nan]], np.float32)
    msg = depth_message(depth_m, STAMP_NS, "camera")
    assert (msg.encoding, msg.height, msg.width, msg.step, msg.is_bigendian) == ("32FC1", 2, 3, 12, 0)
    assert header_stamp_ns(msg.header) == STAMP_NS and msg.header.frame_id == "camera"
    assert np.isnan(struct.unpack("<6f", bytes(msg.data))[1])
    np.testing.assert_array_equal(decode_depth(msg), depth_m)


def test_depth_of_another_layout_in_memory_goes_out_row_by_row(ros):
    depth_m = np.asfortranarray(np.arange(1.0, 7.0).reshape(2, 3))
    assert struct.unpack("<6f", bytes(depth_message(depth_m).data)) == (1, 2, 3, 4, 5, 6)


def test_colour_goes_out_and_comes_back(ros):
    image = np.arange(2 * 4 * 3, dtype=np.uint8).reshape(2, 4, 3)
    msg = rgb_message(image[:, ::-1], STAMP_NS, "camera")
    assert (msg.encoding, msg.step, len(msg.data)) == ("rgb8", 12, 24)
    np.testing.assert_array_equal(decode_image(msg), image[:, ::-1])


@pytest.mark.parametrize("image", [np.zeros((2, 2), np.uint8), np.zeros((2, 2, 3)), np.zeros((2, 2, 4), np.uint8)])
def test_images_of_another_kind_are_refused(ros, image):
    with pytest.raises(ImageError, match=r"pass uint8 \(H, W, 3\)"):
        rgb_message(image)


def test_depth_of_another_shape_is_refused(ros):
    with pytest.raises(ImageError, match=r"\(4,\)"):
        depth_message(np.zeros(4, np.float32))


@pytest.mark.parametrize(
    "distortion",
    [
        Distortion(),
        Distortion("plumb_bob", (0.1, -0.2, 0.001, 0.002, 0.03)),
        Distortion("equidistant", (0.01, 0.02, -0.01, 0.001)),
    ],
)
def test_camera_goes_out_and_comes_back(ros, distortion):
    camera = Camera(500.0, 510.0, 319.5, 239.25, 640, 480, distortion)
    msg = camera_info_message(camera, STAMP_NS, "camera")
    assert list(msg.k) == [500.0, 0, 319.5, 0, 510.0, 239.25, 0, 0, 1]
    assert list(msg.p) == [500.0, 0, 319.5, 0, 0, 510.0, 239.25, 0, 0, 0, 1, 0]
    assert list(msg.r) == [1, 0, 0, 0, 1, 0, 0, 0, 1]
    assert header_stamp_ns(msg.header) == STAMP_NS
    again = camera_from_info(msg, (640, 480), rectified=False)
    pixels = np.array([[0.0, 0.0], [320.0, 240.0], [639.0, 479.0]])
    np.testing.assert_allclose(again.rays(pixels), camera.rays(pixels), atol=1e-12)


def test_an_undistorted_camera_says_plumb_bob_with_zeros(ros):
    msg = camera_info_message(Camera(1.0, 1.0, 0.0, 0.0, 2, 2))
    assert msg.distortion_model == "plumb_bob" and list(msg.d) == [0.0] * 5
