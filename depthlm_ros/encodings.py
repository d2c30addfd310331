"""Decodes the image messages of ROS into plain arrays: RGB for colour, metres for depth.

Messages are duck-typed: rclpy's own classes (`data` is an `array.array`) and those of rosbags (`data` is a
numpy array) decode alike, and nothing of ROS is imported. Encoding names are those of
sensor_msgs/image_encodings.hpp.
"""

from __future__ import annotations

import difflib
import functools
import importlib.util
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

from depthlm_ros.errors import ImageError


@dataclass(frozen=True)
class _Layout:
    """How one encoding lies in memory.

    Attributes:
        samples: samples of one pixel that follow each other in a row.
        to_rgb: OpenCV's conversion code to RGB; None where the samples are RGB.
        sample_bytes: 1 or 2; of 2-byte samples the high byte is kept.
        plane_rows: rows of `step` bytes for two image rows (2, or more where chroma planes follow).
        even: whether width (and height, where chroma planes follow) must be even.
        smallest: smallest width and height that can be converted.
    """

    samples: int
    to_rgb: int | None
    sample_bytes: int = 1
    plane_rows: int = 2
    even: bool = False
    smallest: int = 1


# OpenCV names a Bayer pattern by its second row, ROS by its first: bayer_rggb8 is OpenCV's "BayerBG".
_BAYER = {
    "bayer_rggb": cv2.COLOR_BayerBG2RGB,
    "bayer_bggr": cv2.COLOR_BayerRG2RGB,
    "bayer_gbrg": cv2.COLOR_BayerGR2RGB,
    "bayer_grbg": cv2.COLOR_BayerGB2RGB,
}
_PLAIN = {
    "rgb": (3, None),
    "bgr": (3, cv2.COLOR_BGR2RGB),
    "rgba": (4, cv2.COLOR_RGBA2RGB),
    "bgra": (4, cv2.COLOR_BGRA2RGB),
    "mono": (1, cv2.COLOR_GRAY2RGB),
}
_UYVY = _Layout(2, cv2.COLOR_YUV2RGB_UYVY, even=True)
_YUYV = _Layout(2, cv2.COLOR_YUV2RGB_YUY2, even=True)
_LAYOUTS = {
    **{f"{name}8": _Layout(samples, code) for name, (samples, code) in _PLAIN.items()},
    **{f"{name}16": _Layout(samples, code, sample_bytes=2) for name, (samples, code) in _PLAIN.items()},
    # Below 3 x 3 pixels OpenCV's demosaicing returns black without a word.
    **{f"{name}8": _Layout(1, code, smallest=3) for name, code in _BAYER.items()},
    **{f"{name}16": _Layout(1, code, sample_bytes=2, smallest=3) for name, code in _BAYER.items()},
    "yuv422": _UYVY,
    "uyvy": _UYVY,
    "yuv422_yuy2": _YUYV,
    "yuyv": _YUYV,
    "nv12": _Layout(1, cv2.COLOR_YUV2RGB_NV12, plane_rows=3, even=True),
    "nv21": _Layout(1, cv2.COLOR_YUV2RGB_NV21, plane_rows=3, even=True),
    "nv24": _Layout(1, None, plane_rows=6),
}

IMAGE_ENCODINGS = tuple(_LAYOUTS)
DEPTH_ENCODINGS = ("32FC1", "16UC1")

# ITU-R BT.601, limited range, rows R, G, B over columns Y, U, V, 1; the constants of OpenCV's other YUV codes.
_YUV_TO_RGB = np.array(
    [
        [1.164, 0.0, 1.596, -1.164 * 16 - 1.596 * 128],
        [1.164, -0.391, -0.813, -1.164 * 16 + (0.391 + 0.813) * 128],
        [1.164, 2.018, 0.0, -1.164 * 16 - 2.018 * 128],
    ],
    dtype=np.float32,
)


def decode_image(msg: Any) -> np.ndarray:
    """Decodes a sensor_msgs/Image to RGB.

    Row padding (`step`) is dropped. Samples of 16 bits (mono16, rgb16, ...) keep their high byte
    (`value >> 8`), whatever range the camera really uses: a 12-bit picture in the low bits comes out dark, it
    is never stretched, since a stretch would change from frame to frame. `is_bigendian` says where the high byte
    lies. YUV is read as ITU-R BT.601 limited range, as OpenCV and cv_bridge do. Alpha is dropped.

    Encodings beyond `IMAGE_ENCODINGS` are handed to cv_bridge where that is installed and works.

    Args:
        msg: anything with the fields of sensor_msgs/Image.

    Returns:
        (H, W, 3) uint8 RGB, C-contiguous; a copy that shares nothing with the message.

    Raises:
        ImageError: unknown encoding, zero size, a `step` smaller than a row, data of another size than the
            message promises.
    """
    layout = _LAYOUTS.get(msg.encoding)
    if layout is None:
        return _decode_with_cv_bridge(msg)
    _check_size(msg, layout)
    rows = _rows(msg, msg.width * layout.samples * layout.sample_bytes, msg.height * layout.plane_rows // 2)
    if msg.encoding == "nv24":
        return _nv24(msg, rows)
    pixels = rows.reshape(len(rows), msg.width, layout.samples, layout.sample_bytes)
    high_byte = 0 if msg.is_bigendian else layout.sample_bytes - 1
    pixels = pixels[..., high_byte]
    if layout.to_rgb is None:
        return np.array(pixels, order="C")
    return cv2.cvtColor(pixels[..., 0] if layout.samples == 1 else pixels, layout.to_rgb)


def decode_depth(msg: Any) -> np.ndarray:
    """Decodes a depth image to metres along the optical axis (REP 117, REP 118).

    `32FC1` holds metres; NaN, infinities ("too near", "too far") and values <= 0 are no measurement.
    `16UC1` holds millimetres; 0 is no measurement.

    Args:
        msg: anything with the fields of sensor_msgs/Image.

    Returns:
        (H, W) float32 metres, NaN where there is no measurement; a copy.

    Raises:
        ImageError: another encoding, zero size, wrong step or size of the data.
    """
    if msg.encoding not in DEPTH_ENCODINGS:
        raise ImageError(
            f"encoding {msg.encoding!r} isn't depth; allowed are {', '.join(DEPTH_ENCODINGS)}. "
            "Point the depth topic at a depth image (REP 118)."
        )
    kind = "f4" if msg.encoding == "32FC1" else "u2"
    dtype = np.dtype(("<", ">")[bool(msg.is_bigendian)] + kind)
    _check_size(msg, _Layout(1, None))
    rows = _rows(msg, msg.width * dtype.itemsize, msg.height)
    depth_m = np.ascontiguousarray(rows).view(dtype).astype(np.float32)
    if kind == "u2":
        depth_m /= np.float32(1000)
    depth_m[~(np.isfinite(depth_m) & (depth_m > 0))] = np.nan
    return depth_m


def decode_compressed(msg: Any) -> np.ndarray:
    """Decodes a sensor_msgs/CompressedImage (jpeg, png and what else OpenCV reads) to RGB.

    `format` is read as CompressedImage.msg describes it (`ORIG_PIXFMT; CODEC compressed [COMPRESSED_PIXFMT]`); the
    codec itself is found from the data. A stored `rgb8` or `rgb16` means that the channels went into
    the file in swapped order, as compressed_image_transport does it. One channel of a Bayer original that wasn't
    converted to mono8 is demosaiced. 16-bit samples keep their high byte. An EXIF rotation is ignored: the
    intrinsics belong to the sensor's rows and columns.

    Args:
        msg: anything with the fields of sensor_msgs/CompressedImage.

    Returns:
        (H, W, 3) uint8 RGB, C-contiguous.

    Raises:
        ImageError: empty, truncated or corrupt data, or a compressedDepth stream.
    """
    data = _bytes(msg.data)
    original, _, stored = msg.format.partition(";")
    if "compressedDepth" in stored:
        raise ImageError(
            f"format {msg.format!r} is a compressed depth image; subscribe to the colour camera's compressed topic"
        )
    raw = data.tobytes()
    # OpenCV 4 fills what a cut file lacks with grey and only warns; a file that is whole ends with its end mark.
    cut = (raw[:2] == b"\xff\xd8" and b"\xff\xd9" not in raw) or (raw[:4] == b"\x89PNG" and b"IEND" not in raw)
    try:
        image = None if cut or not raw else cv2.imdecode(data, cv2.IMREAD_UNCHANGED)
    except cv2.error as error:
        raise ImageError(f"{len(raw)} bytes of format {msg.format!r} can't be decoded: {error}") from error
    if image is None:
        raise ImageError(
            f"{len(raw)} bytes of format {msg.format!r} starting with {raw[:8].hex(' ') or 'nothing'} are "
            f"{'truncated' if cut else 'no jpeg or png image that can be decoded'}; check the publisher and the "
            "link, or use the raw image topic"
        )
    if image.dtype == np.uint16:
        image = (image >> 8).astype(np.uint8)
    if image.dtype != np.uint8:
        raise ImageError(f"format {msg.format!r} holds {image.dtype} samples; publish 8 or 16 bits a channel")
    if image.ndim == 2:
        bayer = None if "mono" in stored else _BAYER.get(original.strip().rstrip("0123456789"))
        return cv2.cvtColor(image, cv2.COLOR_GRAY2RGB if bayer is None else bayer)
    swapped = "compressed rgb" in stored
    if image.shape[2] == 4:
        return cv2.cvtColor(image, cv2.COLOR_RGBA2RGB if swapped else cv2.COLOR_BGRA2RGB)
    return image if swapped else cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def _bytes(data: Any) -> np.ndarray:
    """A flat uint8 view of a message's data."""
    if isinstance(data, np.ndarray):
        return np.ascontiguousarray(data).reshape(-1).view(np.uint8)
    return np.frombuffer(data, np.uint8) if len(data) else np.empty(0, np.uint8)


def _check_size(msg: Any, layout: _Layout) -> None:
    size = f"{msg.width} x {msg.height}"
    if msg.width < 1 or msg.height < 1:
        raise ImageError(f"the image is {size} pixels; check the camera driver, it publishes empty images")
    if min(msg.width, msg.height) < layout.smallest:
        raise ImageError(f"{msg.encoding} needs at least {layout.smallest} x {layout.smallest} pixels, got {size}")
    if layout.even and (msg.width % 2 or (layout.plane_rows > 2 and msg.height % 2)):
        raise ImageError(
            f"{msg.encoding} shares colour between neighbouring pixels and can't be {size}; "
            "set an even size in the camera driver or publish rgb8"
        )


def _rows(msg: Any, row_bytes: int, count: int) -> np.ndarray:
    """(count, row_bytes) uint8 view of the data without the padding at the end of each row."""
    if msg.step < row_bytes:
        raise ImageError(
            f"step is {msg.step}, but a row of {msg.width} {msg.encoding} pixels takes {row_bytes} bytes; "
            "mend `step` (or width and encoding) in the publisher"
        )
    data = _bytes(msg.data)
    if len(data) != msg.step * count:
        fault = "truncated" if len(data) < msg.step * count else "longer than it should be"
        raise ImageError(
            f"data is {fault}: {len(data)} bytes for {msg.width} x {msg.height} {msg.encoding} with step "
            f"{msg.step}, which takes {msg.step * count}; mend `step` and `data` in the publisher"
        )
    return data.reshape(count, msg.step)[:, :row_bytes]


def _nv24(msg: Any, rows: np.ndarray) -> np.ndarray:
    """NV24: a plane of Y, then a plane of U, V pairs, one for each pixel, in rows of two steps."""
    yuv = np.empty((msg.height, msg.width, 3), np.uint8)
    yuv[..., 0] = rows[: msg.height]
    chroma = _bytes(msg.data)[msg.height * msg.step :].reshape(msg.height, 2 * msg.step)
    yuv[..., 1:] = chroma[:, : 2 * msg.width].reshape(msg.height, msg.width, 2)
    return cv2.transform(yuv, _YUV_TO_RGB)


# cv_bridge built against NumPy 1 takes the whole process down under NumPy 2 (vision_opencv #535): its module ignores
# that the array API failed to import and dereferences it later. No `except` catches that, so a child tries first.
_CV_BRIDGE_TRIAL = (
    "import numpy; from cv_bridge.boost.cv_bridge_boost import cvtColor2; "
    "cvtColor2(numpy.zeros((2, 2, 3), numpy.uint8), 'bgr8', 'rgb8')"
)


@functools.lru_cache(maxsize=1)
def cv_bridge_fault() -> str | None:
    """Why cv_bridge can't be used in this environment, or None where it works. Tried once, in a child process."""
    if importlib.util.find_spec("cv_bridge") is None:
        return "cv_bridge, which knows more encodings, isn't installed (apt install ros-$ROS_DISTRO-cv-bridge)"
    try:
        trial = subprocess.run([sys.executable, "-c", _CV_BRIDGE_TRIAL], capture_output=True, timeout=30, check=False)
    except subprocess.TimeoutExpired:
        return "cv_bridge is installed, but doesn't answer within 30 s"
    if trial.returncode == 0:
        return None
    return (
        f"cv_bridge is installed, but fails with NumPy {np.__version__} (exit status {trial.returncode}; "
        "vision_opencv #535): build it from source against this NumPy"
    )


def _decode_with_cv_bridge(msg: Any) -> np.ndarray:
    allowed = ", ".join(IMAGE_ENCODINGS)
    if msg.encoding in DEPTH_ENCODINGS:
        raise ImageError(f"encoding {msg.encoding!r} is depth, not colour; point the image topic at one of {allowed}")
    near = difflib.get_close_matches(msg.encoding.lower(), IMAGE_ENCODINGS, n=1)
    unknown = f"unknown encoding {msg.encoding!r}" + (f" (did you mean {near[0]!r}?)" if near else "")
    remedy = f"set the camera driver to one of {allowed}"
    fault = cv_bridge_fault()
    if fault is not None:
        raise ImageError(f"{unknown}; {remedy}. {fault}")
    from cv_bridge import CvBridge, CvBridgeError

    try:
        image = CvBridge().imgmsg_to_cv2(msg, "rgb8")
    except (CvBridgeError, TypeError, ValueError) as error:
        raise ImageError(f"{unknown}; {remedy}. cv_bridge can't convert it either: {error}") from error
    return np.ascontiguousarray(image)
