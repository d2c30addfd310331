"""Where cv_bridge and sensor_msgs_py are installed (apt), our plain numpy agrees with them."""

from __future__ import annotations

import numpy as np
import pytest

from depthlm_ros.encodings import IMAGE_ENCODINGS, cv_bridge_fault, decode_image
from depthlm_ros.messages import cloud_message, read_cloud

BYTES_PER_PIXEL = {"rgb": 3, "bgr": 3, "rgba": 4, "bgra": 4, "mono": 1, "bayer_": 1, "yuv": 2, "uyvy": 2}
# cv_bridge rounds value / 257 where we take value >> 8.
GREY_LEVELS_APART = {8: 0, 16: 1}


@pytest.fixture
def bridge():
    """cv_bridge itself; asked in a child first, since a build for another NumPy would take pytest with it."""
    pytest.importorskip("sensor_msgs.msg")
    if cv_bridge_fault() is not None:
        pytest.skip(cv_bridge_fault())
    from cv_bridge import CvBridge

    return CvBridge()


@pytest.fixture
def point_cloud2():
    return pytest.importorskip("sensor_msgs_py.point_cloud2")


@pytest.mark.parametrize("padding", [0, 8])
@pytest.mark.parametrize("encoding", [name for name in IMAGE_ENCODINGS if not name.startswith("nv")])
def test_images_decode_as_with_cv_bridge(bridge, encoding, padding):
    from sensor_msgs.msg import Image

    kind = max((k for k in BYTES_PER_PIXEL if encoding.startswith(k)), key=len, default="yuv")
    bits = 16 if encoding.endswith("16") else 8
    step = 16 * BYTES_PER_PIXEL[kind] * bits // 8 + padding * BYTES_PER_PIXEL[kind] * bits // 8
    msg = Image(height=12, width=16, encoding=encoding, step=step)
    msg.data.frombytes(np.random.default_rng(0).integers(0, 256, step * 12, dtype=np.uint8))
    try:
        theirs = bridge.imgmsg_to_cv2(msg, "rgb8")
    except TypeError as error:
        pytest.skip(f"this cv_bridge doesn't know {encoding}: {error}")
    np.testing.assert_allclose(decode_image(msg).astype(int), theirs, atol=GREY_LEVELS_APART[bits])


def test_clouds_of_ours_read_the_same_with_sensor_msgs_py(point_cloud2):
    rng = np.random.default_rng(0)
    points = rng.normal(size=(6, 3)).astype(np.float32)
    points[2] = np.nan
    rgb, confidence = rng.integers(0, 256, (6, 3), dtype=np.uint8), rng.random(6).astype(np.float32)
    msg = cloud_message(1, "camera", points, rgb, confidence, (2, 3))
    theirs = point_cloud2.read_points(msg)
    for column, name in enumerate("xyz"):
        np.testing.assert_array_equal(theirs[name], points[:, column])
    np.testing.assert_array_equal(theirs["confidence"], confidence)
    packed = theirs["rgb"].copy().view(np.uint32)
    np.testing.assert_array_equal(np.stack([packed >> 16, packed >> 8 & 255, packed & 255], axis=-1), rgb)
    assert len(point_cloud2.read_points(msg, skip_nans=True)) == 5


def test_clouds_of_sensor_msgs_py_read_the_same_with_ours(point_cloud2):
    from sensor_msgs.msg import PointField
    from std_msgs.msg import Header

    kinds = {"intensity": ("u2", PointField.UINT16), "x": ("f4", PointField.FLOAT32), "t": ("f8", PointField.FLOAT64)}
    fields, formats, offset = [], {}, 0
    for name, (kind, datatype) in kinds.items():
        fields.append(PointField(name=name, offset=offset, datatype=datatype, count=1))
        formats[name] = (kind, offset)
        offset += np.dtype(kind).itemsize
    values = np.zeros(5, np.dtype(formats))
    for column, name in enumerate(kinds):
        values[name] = np.arange(5) * 10 + column
    msg = point_cloud2.create_cloud(Header(), fields, values)
    arrays = read_cloud(msg)
    assert list(arrays) == list(kinds)
    for name in kinds:
        np.testing.assert_array_equal(arrays[name], values[name])
