"""Reads and writes recordings: rosbag2 folders (mcap or sqlite3), with `rosbags` and without ROS.

A recording made here holds `/camera/image_raw` (rgb8) or `/camera/image_raw/compressed` (jpeg or png),
`/camera/camera_info`, and `/camera/depth/ground_truth`: 32FC1 metres of the image's size, NaN where unknown.
These are standard types that RViz and Foxglove show; the storage is mcap with zstd chunks, which `ros2 bag` plays.
"""

from __future__ import annotations

import io
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image
from rosbags.highlevel import AnyReader, AnyReaderError
from rosbags.interfaces import Connection
from rosbags.rosbag2 import CompressionFormat, CompressionMode, ReaderError, StoragePlugin, Writer
from rosbags.serde import SerdeError
from rosbags.typesys import Stores, TypesysError, get_typestore

from depthlm_ros.camera import Camera, camera_from_info
from depthlm_ros.depth import Frame
from depthlm_ros.encodings import decode_compressed, decode_depth, decode_image
from depthlm_ros.errors import BagError, ImageError

IMAGE_TOPIC = "/camera/image_raw"
INFO_TOPIC = "/camera/camera_info"
TRUTH_TOPIC = "/camera/depth/ground_truth"
IMAGE_TYPE = "sensor_msgs/msg/Image"
COMPRESSED_TYPE = "sensor_msgs/msg/CompressedImage"
INFO_TYPE = "sensor_msgs/msg/CameraInfo"
CLOUD_TYPE = "sensor_msgs/msg/PointCloud2"
# 14 November 2023, a fixed start so that the same command writes the same bytes.
START_NS = 1_700_000_000 * 10**9
_MATCH_NS = 5_000_000


@dataclass(frozen=True)
class RecordedFrame:
    """One image of a recording with its ground truth.

    Attributes:
        frame: image, camera, stamp and optical frame.
        truth_m: (H, W) float32 z-depth in metres, NaN where unknown; None where the recording has none.
        image_raw: the image message's CDR bytes, as recorded; empty when the frame was not read from a recording.
        info_raw: the CameraInfo message's CDR bytes.
    """

    frame: Frame
    truth_m: np.ndarray | None = None
    image_raw: bytes = b""
    info_raw: bytes = b""


@dataclass(frozen=True)
class BagInfo:
    """What a recording holds.

    Attributes:
        path: the bag's folder or file.
        topics: (name, type, number of messages) each.
        duration_s: from the first to the last message.
        size_bytes: on disk.
        image_topic: the topic that `frames` reads images from, None if there is none.
        info_topic: its CameraInfo.
        truth_topic: its ground truth depth.
        compressed: whether the images are CompressedImage messages.
        notes: where the recording comes from, as its writer said.
    """

    path: Path
    topics: tuple[tuple[str, str, int], ...]
    duration_s: float
    size_bytes: int
    image_topic: str | None
    info_topic: str | None
    truth_topic: str | None
    compressed: bool
    notes: dict[str, str]

    def count(self, topic: str | None) -> int:
        """Number of messages on a topic; 0 if it isn't there."""
        return sum(number for name, _, number in self.topics if name == topic)


def write_bag(
    path: str | Path,
    frames: Iterable[RecordedFrame],
    *,
    compression: str | None = None,
    depth_bits: int = 23,
    notes: dict[str, str] | None = None,
) -> BagInfo:
    """Writes a recording. The folder appears only when it is complete.

    Args:
        path: the folder to make; must not exist.
        frames: images in the order of their stamps.
        compression: None for raw rgb8, "png" (lossless), "jpeg" or "jpeg:QUALITY" for CompressedImage.
        depth_bits: bits of the ground truth's float32 mantissa that are kept. 23 is exact; 12 makes it compress three
            times better at a relative error under 1.3e-4.
        notes: where the recording comes from; kept in its metadata.

    Raises:
        BagError: the folder exists, a setting is out of range, or there are no frames.
    """
    path = Path(path)
    if path.exists():
        raise BagError(f"{path} exists already; delete it or name another folder")
    if not 1 <= depth_bits <= 23:
        raise BagError(f"depth_bits is {depth_bits}; a float32 mantissa has 1 to 23 bits")
    encode = None if compression is None else image_encoder(compression)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as scratch:
        unfinished = Path(scratch) / path.name
        written = _write_frames(unfinished, frames, encode, depth_bits, notes or {})
        if not written:
            raise BagError(f"there are no frames to write to {path}; ask for at least one")
        shutil.move(unfinished, path)
    return bag_info(path)


def bag_info(path: str | Path, image_topic: str | None = None, depth_topic: str | None = None) -> BagInfo:
    """Says what a recording holds and which of its topics `read_frames` would read.

    Raises:
        BagError: it is missing, can't be read, or lacks a topic that was named.
    """
    with opened(Path(path)) as reader:
        return _describe(Path(path), reader, image_topic, depth_topic)


def read_frames(
    path: str | Path, image_topic: str | None = None, depth_topic: str | None = None
) -> Iterator[RecordedFrame]:
    """Reads a recording's images with their camera and, where recorded, their ground truth.

    Args:
        path: a rosbag2 folder, or an .mcap or .db3 file.
        image_topic: which image topic; by default the first colour one that has a CameraInfo beside it.
        depth_topic: depth images to take for ground truth; by default those of `TRUTH_TOPIC`.

    Yields:
        One `RecordedFrame` for each image message, in recorded order.

    Raises:
        BagError: the recording is missing, corrupt, or lacks images or CameraInfo.
    """
    path = Path(path)
    with opened(path) as reader:
        info = _describe(path, reader, image_topic, depth_topic)
        _require_topics(info)
        yield from _assembled(path, reader, info)


def require_truth(info: BagInfo) -> None:
    """Raises BagError when a recording has no ground truth to score against."""
    if info.truth_topic is None:
        raise BagError(
            f"{info.path} has no ground truth: no {TRUTH_TOPIC} (32FC1 or 16UC1) among {_names(info)}; "
            "record depth there, or make a bag with 'depthlm bag render' or 'depthlm bag from-images'"
        )


def rounded_mantissa(values: np.ndarray, bits: int) -> np.ndarray:
    """Rounds float32 to so many mantissa bits, to the nearest; NaN stays NaN. Zero bits compress well."""
    dropped = 23 - bits
    if not dropped:
        return values
    raw = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = ((raw + np.uint32(1 << (dropped - 1))) >> np.uint32(dropped)) << np.uint32(dropped)
    return np.where(np.isnan(values), np.float32(np.nan), rounded.view(np.float32))


# ---------------------------------------------------------------- writing


def _write_frames(path: Path, frames: Iterable[RecordedFrame], encode, depth_bits: int, notes: dict[str, str]) -> int:
    store = _store()
    writer = Writer(path, version=9, storage_plugin=StoragePlugin.MCAP)
    writer.set_compression(CompressionMode.STORAGE, CompressionFormat.ZSTD)
    for key, value in notes.items():
        writer.set_custom_data(key, value)
    written = 0
    with writer:
        image_type, suffix = (COMPRESSED_TYPE, "/compressed") if encode else (IMAGE_TYPE, "")
        image_connection = writer.add_connection(IMAGE_TOPIC + suffix, image_type, typestore=store)
        info_connection = writer.add_connection(INFO_TOPIC, INFO_TYPE, typestore=store)
        truth_connection = None
        for recorded in frames:
            frame = recorded.frame
            header = _header(frame.stamp_ns, frame.frame_id)
            image = _compressed_message(header, frame.image, encode) if encode else _image_message(header, frame.image)
            messages = [(info_connection, _info_message(header, frame.camera)), (image_connection, image)]
            if recorded.truth_m is not None:
                if truth_connection is None:
                    truth_connection = writer.add_connection(TRUTH_TOPIC, IMAGE_TYPE, typestore=store)
                messages.append(
                    (truth_connection, _depth_message(header, rounded_mantissa(recorded.truth_m, depth_bits)))
                )
            for connection, message in messages:
                writer.write(connection, frame.stamp_ns, bytes(store.serialize_cdr(message, connection.msgtype)))
            written += 1
    return written


def image_encoder(compression: str) -> tuple[str, Callable[[np.ndarray], bytes]]:
    """A pair (name, function from (H, W, 3) uint8 RGB to bytes) for "png", "jpeg" or "jpeg:QUALITY".

    Raises:
        BagError: another format, or a quality out of range.
    """
    name, _, quality = compression.partition(":")
    if name == "png" and not quality:
        return name, lambda image: _pil_bytes(image, "PNG")
    if name == "jpeg" and (quality or "90").isdigit() and 1 <= int(quality or "90") <= 100:
        return name, lambda image: _pil_bytes(image, "JPEG", quality=int(quality or "90"), subsampling=0)
    raise BagError(f"image compression {compression!r} is unknown; use png, jpeg or jpeg:QUALITY with 1 to 100")


def _pil_bytes(image: np.ndarray, file_format: str, **options: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, file_format, **options)
    return buffer.getvalue()


@cache
def _store():
    return get_typestore(Stores.ROS2_KILTED)


def _header(stamp_ns: int, frame_id: str):
    types = _store().types
    stamp = types["builtin_interfaces/msg/Time"](sec=stamp_ns // 10**9, nanosec=stamp_ns % 10**9)
    return types["std_msgs/msg/Header"](stamp=stamp, frame_id=frame_id)


def _image_message(header, image: np.ndarray):
    height, width = image.shape[:2]
    data = np.ascontiguousarray(image, np.uint8).reshape(-1)
    return _store().types[IMAGE_TYPE](header, height, width, "rgb8", 0, 3 * width, data)


def _compressed_message(header, image: np.ndarray, encode):
    name, function = encode
    return _store().types[COMPRESSED_TYPE](header, name, np.frombuffer(function(image), np.uint8))


def _depth_message(header, depth_m: np.ndarray):
    height, width = depth_m.shape
    data = np.ascontiguousarray(depth_m, "<f4").view(np.uint8).reshape(-1)
    return _store().types[IMAGE_TYPE](header, height, width, "32FC1", 0, 4 * width, data)


def _info_message(header, camera: Camera):
    types = _store().types
    model = "plumb_bob" if camera.distortion.model == "none" else camera.distortion.model
    d = np.array(camera.distortion.coefficients or (0.0,) * 5, np.float64)
    k = np.asarray(camera.matrix, np.float64).reshape(-1)
    p = np.hstack([camera.matrix, np.zeros((3, 1))]).astype(np.float64).reshape(-1)
    region = types["sensor_msgs/msg/RegionOfInterest"](0, 0, 0, 0, False)
    return types[INFO_TYPE](header, camera.height, camera.width, model, d, k, np.eye(3).reshape(-1), p, 0, 0, region)


# ---------------------------------------------------------------- reading


def _reading_errors() -> tuple[type[Exception], ...]:
    """What `rosbags` lets through when the bytes of a file are not what its index says."""
    from rosbags.rosbag2.storage_mcap import zstd

    damaged = (EOFError, IndexError, KeyError, OverflowError, TypeError, UnicodeDecodeError, ValueError)
    return (ReaderError, AnyReaderError, SerdeError, TypesysError, zstd.ZstdError, OSError, *damaged)


@contextmanager
def opened(path: Path) -> Iterator[AnyReader]:
    """A recording's reader.

    Raises:
        BagError: it is missing, truncated or damaged.
    """
    if not path.exists():
        raise BagError(f"recording {path} does not exist; give a rosbag2 folder, or an .mcap or .db3 file")
    if path.is_dir() and not (path / "metadata.yaml").exists():
        raise BagError(
            f"{path} holds no metadata.yaml, so it is no rosbag2 folder; give the folder that 'ros2 bag' wrote"
        )
    try:
        reader = AnyReader([path], default_typestore=_store())
        reader.open()
    except _reading_errors() as error:
        raise BagError(_damage(path, error)) from error
    try:
        yield reader
    finally:
        reader.close()


def _damage(path: Path, error: Exception) -> str:
    size = sum(file.stat().st_size for file in (path.rglob("*") if path.is_dir() else [path]) if file.is_file())
    return (
        f"recording {path} ({size} bytes) can't be read: {type(error).__name__}: {' '.join(str(error).split())}; "
        "it is truncated or damaged, copy it again or repair it with 'ros2 bag reindex' or 'mcap recover'"
    )


def messages(path: Path, reader: AnyReader, connections: list[Connection]) -> Iterator[tuple[str, bytes, object]]:
    """(topic, CDR bytes, message) of each recorded message.

    Raises:
        BagError: the bytes aren't what the recording's index says.
    """
    stream = reader.messages(connections=connections)
    while True:
        try:
            connection, _, raw = next(stream)
            message = reader.deserialize(raw, connection.msgtype)
        except StopIteration:
            return
        except _reading_errors() as error:
            raise BagError(_damage(path, error)) from error
        yield connection.topic, bytes(raw), message


def _describe(path: Path, reader: AnyReader, image_topic: str | None, depth_topic: str | None = None) -> BagInfo:
    counts: Counter[tuple[str, str]] = Counter()
    for connection in reader.connections:
        counts[connection.topic, connection.msgtype] += connection.msgcount
    topics = tuple((name, kind, number) for (name, kind), number in sorted(counts.items()))
    kinds = {name: kind for name, kind, number in topics if number}
    if image_topic is not None and kinds.get(image_topic) not in (IMAGE_TYPE, COMPRESSED_TYPE):
        raise BagError(f"{path} has no images on {image_topic!r}; its topics are {', '.join(kinds) or 'none'}")
    if depth_topic is not None and kinds.get(depth_topic) != IMAGE_TYPE:
        raise BagError(f"{path} has no depth images on {depth_topic!r}; its topics are {', '.join(kinds) or 'none'}")
    truth_topic = depth_topic or (TRUTH_TOPIC if kinds.get(TRUTH_TOPIC) == IMAGE_TYPE else None)
    pairs = [(name, info) for name in _image_candidates(kinds) if (info := sibling_info(name)) in kinds]
    if image_topic is not None:
        chosen, info_topic = image_topic, sibling_info(image_topic)
    else:
        chosen, info_topic = pairs[0] if pairs else (next(iter(_image_candidates(kinds)), None), None)
    files = [file for file in (path.rglob("*") if path.is_dir() else [path]) if file.is_file()]
    custom = reader.readers[0].storage.metadata.custom if reader.is2 else None
    return BagInfo(
        path=path,
        topics=topics,
        duration_s=max(reader.duration - 1, 0) / 1e9 if reader.message_count else 0.0,
        size_bytes=sum(file.stat().st_size for file in files),
        image_topic=chosen,
        info_topic=info_topic if info_topic in kinds else None,
        truth_topic=truth_topic,
        compressed=kinds.get(chosen) == COMPRESSED_TYPE,
        notes=dict(custom or {}),
    )


def _image_candidates(kinds: dict[str, str]) -> list[str]:
    """Colour image topics, raw before compressed; depth images say so in their name."""
    images = [
        name for name, kind in kinds.items() if kind in (IMAGE_TYPE, COMPRESSED_TYPE) and "depth" not in name.lower()
    ]
    return sorted(images, key=lambda name: (kinds[name] == COMPRESSED_TYPE, name))


def sibling_info(image_topic: str) -> str:
    """The CameraInfo topic beside an image topic: `/camera/image_raw[/compressed]` -> `/camera/camera_info`."""
    base = image_topic.removesuffix("/compressed")
    return base.rsplit("/", 1)[0] + "/camera_info"


def _require_topics(info: BagInfo) -> None:
    if info.image_topic is None:
        raise BagError(
            f"{info.path} has no images: no {IMAGE_TYPE} or {COMPRESSED_TYPE} among {_names(info)}; record a camera"
        )
    if info.info_topic is None:
        raise BagError(
            f"{info.path} has no CameraInfo on {sibling_info(info.image_topic)} for {info.image_topic}; "
            f"its topics are {_names(info)}: record the camera's camera_info too, depth in metres needs it"
        )


def _names(info: BagInfo) -> str:
    return ", ".join(f"{name} ({number})" for name, _, number in info.topics) or "no topics"


def _assembled(path: Path, reader: AnyReader, info: BagInfo) -> Iterator[RecordedFrame]:
    """Puts each image together with the CameraInfo and the ground truth of its stamp.

    Messages of one stamp come in any order, so an image waits until the next one, or the end, closes its turn.
    """
    wanted = {info.image_topic, info.info_topic, info.truth_topic}
    connections = [connection for connection in reader.connections if connection.topic in wanted]
    infos: dict[int, tuple[bytes, object]] = {}
    truths: dict[int, object] = {}
    waiting: list[tuple[int, bytes, object]] = []
    for topic, raw, message in messages(path, reader, connections):
        stamp_ns = message.header.stamp.sec * 10**9 + message.header.stamp.nanosec
        if topic == info.info_topic:
            infos[stamp_ns] = raw, message
            _forget(infos)
        elif topic == info.truth_topic:
            truths[stamp_ns] = message
            _forget(truths)
        else:
            waiting.append((stamp_ns, raw, message))
            if len(waiting) > 2:
                yield _frame(path, info.compressed, waiting.pop(0), infos, truths)
    for image in waiting:
        yield _frame(path, info.compressed, image, infos, truths)


def _forget(kept: dict, most: int = 16) -> None:
    while len(kept) > most:
        del kept[next(iter(kept))]


def _nearest(kept: dict[int, object], stamp_ns: int) -> int | None:
    return min(kept, key=lambda other: abs(other - stamp_ns), default=None)


def _frame(path: Path, compressed: bool, image: tuple[int, bytes, object], infos: dict, truths: dict) -> RecordedFrame:
    stamp_ns, image_raw, message = image
    info_stamp = _nearest(infos, stamp_ns)
    if info_stamp is None:
        raise BagError(f"{path}: the image at {stamp_ns} ns has no CameraInfo near it; record both from the start")
    info_raw, info_message = infos[info_stamp]
    pixels = decode_compressed(message) if compressed else decode_image(message)
    height, width = pixels.shape[:2]
    camera = camera_from_info(info_message, (width, height), rectified=False)
    truth_stamp = _nearest(truths, stamp_ns)
    truth = None
    if truth_stamp is not None and abs(truth_stamp - stamp_ns) <= _MATCH_NS:
        truth = _read_truth(path, truths[truth_stamp], (height, width), message.header.frame_id)
    frame = Frame(pixels, camera, stamp_ns, message.header.frame_id)
    return RecordedFrame(frame, truth, image_raw, info_raw)


def _read_truth(path: Path, message, shape: tuple[int, int], frame_id: str) -> np.ndarray:
    """(H, W) float32 metres, NaN where unknown."""
    try:
        truth_m = decode_depth(message)
    except ImageError as error:
        raise BagError(f"{path}: ground truth can't be read: {error}") from error
    if truth_m.shape != shape:
        raise BagError(
            f"{path}: ground truth is {message.width}x{message.height} but the image is {shape[1]}x{shape[0]}; "
            "record depth registered to the colour image"
        )
    if message.header.frame_id != frame_id:
        raise BagError(
            f"{path}: ground truth is in frame {message.header.frame_id!r} but the image in {frame_id!r}; "
            "record depth registered to the colour image"
        )
    return truth_m
