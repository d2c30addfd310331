"""From the pipeline's arrays to ROS messages, and clouds back again.

Reading images lives in `encodings` and is offered here too. The functions that build messages need
sensor_msgs (a ROS installation or its wheels) and import it when called; those that read need none of ROS.
Data goes into messages by `array.frombytes`: assigning a numpy array is a thousand times slower.
"""

from __future__ import annotations

import types
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

from depthlm_ros.encodings import DEPTH_ENCODINGS, IMAGE_ENCODINGS, decode_compressed, decode_depth, decode_image
from depthlm_ros.errors import CloudError, ImageError, MissingDependencyError

if TYPE_CHECKING:
    from depthlm_ros.camera import Camera

__all__ = [
    "CLOUD_FIELDS",
    "DEPTH_ENCODINGS",
    "IMAGE_ENCODINGS",
    "camera_info_message",
    "cloud_message",
    "decode_compressed",
    "decode_depth",
    "decode_image",
    "depth_message",
    "header_stamp_ns",
    "read_cloud",
    "rgb_message",
]

CLOUD_FIELDS = ("x", "y", "z", "rgb", "confidence")
"""The fields of a published cloud, FLOAT32 each, one after the other from offset 0; `std` follows where it is known."""

# sensor_msgs/PointField: INT8 = 1 ... FLOAT64 = 8, and BOOLEAN = 9 in newer distributions.
_FIELD_TYPES = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 8: "f8", 9: "?"}
_FLOAT32 = 7


def header_stamp_ns(header: Any) -> int:
    """Nanoseconds of a std_msgs/Header's stamp."""
    return header.stamp.sec * 1_000_000_000 + header.stamp.nanosec


def cloud_message(
    stamp_ns: int,
    frame_id: str,
    points: np.ndarray,
    rgb: np.ndarray,
    confidence: np.ndarray,
    organised_shape: tuple[int, int] | None = None,
    std_m: np.ndarray | None = None,
) -> Any:
    """Builds a sensor_msgs/PointCloud2 with x, y, z, rgb and confidence, and std where it is given.

    Colour is packed as 0x00RRGGBB into the bits of a FLOAT32, the convention of PCL and RViz.

    Args:
        stamp_ns: stamp of the image that the points were seen in.
        frame_id: the camera's optical frame (REP 103).
        points: (N, 3) float32 metres, NaN where unknown.
        rgb: (N, 3) uint8.
        confidence: (N,) in [0, 1].
        organised_shape: (height, width) where the rows are an image's pixels row by row; None for a list.
        std_m: (N,) standard deviation of z in metres; None leaves the field out.

    Returns:
        The message; `is_dense` is False where a coordinate isn't finite.

    Raises:
        CloudError: arrays of different lengths, or an organised shape that doesn't hold N points.
    """
    msgs = _ros_messages()
    n = len(points)
    if points.shape != (n, 3) or rgb.shape != (n, 3) or confidence.shape != (n,):
        raise CloudError(
            f"points {points.shape}, rgb {rgb.shape} and confidence {confidence.shape} don't belong together; "
            "pass (N, 3), (N, 3) and (N,)"
        )
    if std_m is not None and std_m.shape != (n,):
        raise CloudError(f"std_m {std_m.shape} doesn't belong to {n} points; pass ({n},)")
    if rgb.dtype != np.uint8:
        raise CloudError(f"rgb is {rgb.dtype}; pass uint8 in [0, 255]")
    height, width = organised_shape or (1, n)
    if height * width != n:
        raise CloudError(f"an organised cloud of {height} x {width} can't hold {n} points; pass (height, width)")

    names = CLOUD_FIELDS if std_m is None else (*CLOUD_FIELDS, "std")
    rows = np.empty((n, len(names)), "<f4")
    # Column by column: numpy is four times slower on an inner axis of 3.
    for i in range(3):
        rows[:, i] = points[:, i]
    rows.view("<u4")[:, 3] = _packed_rgb(rgb)
    rows[:, 4] = confidence
    if std_m is not None:
        rows[:, 5] = std_m

    message = msgs.PointCloud2(header=_header(msgs, stamp_ns, frame_id), height=height, width=width)
    message.fields = [
        msgs.PointField(name=name, offset=4 * i, datatype=_FLOAT32, count=1) for i, name in enumerate(names)
    ]
    message.is_bigendian = False
    message.point_step = rows.itemsize * len(names)
    message.row_step = message.point_step * width
    message.is_dense = bool(np.isfinite(points).all())
    message.data.frombytes(rows.reshape(-1).view("u1"))
    return message


def read_cloud(msg: Any) -> dict[str, np.ndarray]:
    """Reads any sensor_msgs/PointCloud2, whatever its offsets, padding and endianness.

    Args:
        msg: anything with the fields of sensor_msgs/PointCloud2.

    Returns:
        One array for each field, in this machine's byte order: (N,), or (height, width) for an organised cloud, with
        a last axis for fields with `count` > 1. `rgb` and `rgba` are unpacked to (..., 3) uint8. Where there are
        x, y and z, `points` holds them as (..., 3) float32 too.

    Raises:
        CloudError: unknown field type, fields that leave the point, steps or data of a wrong size.
    """
    unknown = [f"{f.name} ({f.datatype})" for f in msg.fields if f.datatype not in _FIELD_TYPES]
    if unknown:
        raise CloudError(f"unknown datatype of {', '.join(unknown)}; sensor_msgs/PointField knows 1 to 9")
    order = ">" if msg.is_bigendian else "<"
    names = [f.name for f in msg.fields]
    # A count of 0 is how older drivers say 1.
    formats = [(order + _FIELD_TYPES[f.datatype], f.count if f.count > 1 else ()) for f in msg.fields]
    data = np.frombuffer(msg.data, np.uint8) if len(msg.data) else np.empty(0, np.uint8)
    if msg.row_step < msg.width * msg.point_step or len(data) < msg.row_step * msg.height:
        raise CloudError(
            f"{msg.height} rows of {msg.width} points of {msg.point_step} bytes don't fit into row_step {msg.row_step} "
            f"and {len(data)} bytes of data; mend width, row_step or data in the publisher"
        )
    try:
        point = np.dtype(
            {"names": names, "formats": formats, "offsets": [f.offset for f in msg.fields], "itemsize": msg.point_step}
        )
    except ValueError as error:
        raise CloudError(f"fields {names} don't fit into point_step {msg.point_step}: {error}") from error
    cloud = np.ndarray((msg.height, msg.width), point, data, strides=(msg.row_step, msg.point_step))

    arrays = {}
    for name in names:
        values = cloud[name]
        values = values.astype(values.dtype.newbyteorder("="))
        if name in ("rgb", "rgba") and values.dtype.itemsize == 4:
            values = _unpack_rgb(values)
        arrays[name] = values if msg.height > 1 else values.reshape(-1, *values.shape[2:])
    if {"x", "y", "z"} <= arrays.keys():
        arrays["points"] = np.stack([arrays["x"], arrays["y"], arrays["z"]], axis=-1).astype(np.float32, copy=False)
    return arrays


def depth_message(depth_m: np.ndarray, stamp_ns: int = 0, frame_id: str = "") -> Any:
    """Builds a depth image: sensor_msgs/Image 32FC1, metres, NaN where unknown (REP 117, REP 118).

    Args:
        depth_m: (H, W) z-depth in metres.
        stamp_ns: stamp of the image that was measured in.
        frame_id: the camera's optical frame.

    Raises:
        ImageError: an array of another shape.
    """
    if depth_m.ndim != 2:
        raise ImageError(f"depth has shape {depth_m.shape}; pass (H, W)")
    return _image_message(np.ascontiguousarray(depth_m, "<f4"), "32FC1", stamp_ns, frame_id)


def rgb_message(image: np.ndarray, stamp_ns: int = 0, frame_id: str = "") -> Any:
    """Builds a sensor_msgs/Image rgb8 from (H, W, 3) uint8 RGB.

    Raises:
        ImageError: an array of another shape or type.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ImageError(f"the image is {image.dtype} {image.shape}; pass uint8 (H, W, 3)")
    return _image_message(np.ascontiguousarray(image), "rgb8", stamp_ns, frame_id)


def camera_info_message(camera: Camera, stamp_ns: int = 0, frame_id: str = "") -> Any:
    """Builds the sensor_msgs/CameraInfo of a monocular camera.

    R is the identity and P repeats K, as CameraInfo.msg has it for monocular cameras. A camera without
    distortion says plumb_bob with five zeros, which every consumer understands.

    Args:
        camera: intrinsics of the image that the message goes with.
        stamp_ns: stamp of that image.
        frame_id: the camera's optical frame.
    """
    msgs = _ros_messages()
    message = msgs.CameraInfo(header=_header(msgs, stamp_ns, frame_id), height=camera.height, width=camera.width)
    undistorted = camera.distortion.model == "none"
    message.distortion_model = "plumb_bob" if undistorted else camera.distortion.model
    message.d = [0.0] * 5 if undistorted else [float(c) for c in camera.distortion.coefficients]
    fx, fy, cx, cy = (float(v) for v in (camera.fx, camera.fy, camera.cx, camera.cy))
    message.k = [fx, 0.0, cx, 0.0, fy, cy, 0.0, 0.0, 1.0]
    message.r = [1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0]
    message.p = [fx, 0.0, cx, 0.0, 0.0, fy, cy, 0.0, 0.0, 0.0, 1.0, 0.0]
    return message


def _ros_messages() -> types.SimpleNamespace:
    try:
        from builtin_interfaces.msg import Time
        from sensor_msgs.msg import CameraInfo, Image, PointCloud2, PointField
        from std_msgs.msg import Header
    except ImportError as error:
        raise MissingDependencyError(
            "building ROS messages needs sensor_msgs: source a ROS 2 installation or `pip install ros-sensor-msgs`"
        ) from error
    return types.SimpleNamespace(
        CameraInfo=CameraInfo, Header=Header, Image=Image, PointCloud2=PointCloud2, PointField=PointField, Time=Time
    )


def _header(msgs: types.SimpleNamespace, stamp_ns: int, frame_id: str) -> Any:
    sec, nanosec = divmod(int(stamp_ns), 1_000_000_000)
    return msgs.Header(stamp=msgs.Time(sec=sec, nanosec=nanosec), frame_id=frame_id)


def _image_message(rows: np.ndarray, encoding: str, stamp_ns: int, frame_id: str) -> Any:
    """`rows` is C-contiguous and little-endian."""
    msgs = _ros_messages()
    height, width = rows.shape[:2]
    message = msgs.Image(header=_header(msgs, stamp_ns, frame_id), height=height, width=width, encoding=encoding)
    message.is_bigendian = 0
    message.step = rows.nbytes // height if height else 0
    message.data.frombytes(rows.reshape(-1).view("u1"))
    return message


def _packed_rgb(rgb: np.ndarray) -> np.ndarray:
    """(N,) uint32 0x00RRGGBB of (N, 3) uint8."""
    if not len(rgb):
        return np.empty(0, "<u4")
    bgra = cv2.cvtColor(np.ascontiguousarray(rgb)[None], cv2.COLOR_RGB2BGRA)
    return bgra.view("<u4").reshape(-1) & np.uint32(0x00FFFFFF)


def _unpack_rgb(packed: np.ndarray) -> np.ndarray:
    bits = packed.view(np.uint32)
    return np.stack([bits >> 16 & 255, bits >> 8 & 255, bits & 255], axis=-1).astype(np.uint8)
