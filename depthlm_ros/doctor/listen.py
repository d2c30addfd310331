"""Listens to the cameras of a ROS graph for some seconds and prints what it heard, as one JSON object.

A process of its own: a middleware that crashes or hangs takes neither the page nor its exit code with it. Messages are
taken as bytes and only the first of each topic is read, so that several cameras at full rate are no burden.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import struct
import sys
import time
from collections.abc import Iterable
from typing import Any

from depthlm_ros.config import NODE_NAME
from depthlm_ros.middleware import use_large_message_profile

IMAGE, COMPRESSED, INFO = "sensor_msgs/msg/Image", "sensor_msgs/msg/CompressedImage", "sensor_msgs/msg/CameraInfo"
MOST_IMAGES = 6
"""Topics that are listened to when none is named."""

_POLL_S = 0.1
# Longer than any queue holds at camera rates, to pair images with infos.
_STAMPS = 1000


class Heard:
    """What came on one topic."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.count = 0
        self.arrivals: list[float] = []
        self.size = 0
        self.first: bytes = b""
        self.delay_s: float | None = None
        self.stamps: set[int] = set()

    def take(self, data: bytes) -> None:
        """Counts a message."""
        if not self.count:
            self.first = bytes(data)
            stamp = stamp_ns(self.first)
            self.delay_s = time.time() - stamp / 1e9 if stamp else None
        self.count += 1
        self.size = max(self.size, len(data))
        self.arrivals = [*self.arrivals[:1], time.monotonic()]
        if len(self.stamps) < _STAMPS:
            self.stamps.add(stamp_ns(data))

    @property
    def rate_hz(self) -> float | None:
        """Messages a second between the first and the last; None of fewer than two."""
        if self.count < 2 or self.arrivals[-1] <= self.arrivals[0]:
            return None
        return (self.count - 1) / (self.arrivals[-1] - self.arrivals[0])


def stamp_ns(data: bytes) -> int:
    """The stamp of a serialised message that begins with a header (CDR: four bytes, then seconds, nanoseconds)."""
    if len(data) < 12:
        return 0
    seconds, nanoseconds = struct.unpack_from("<iI" if data[1] & 1 else ">iI", data, 4)
    return seconds * 1_000_000_000 + nanoseconds


def listen(seconds: float, image: str = "", camera_info: str = "") -> dict[str, Any]:
    """Listens.

    Args:
        seconds: how long.
        image: the only image topic to listen to; empty for all, up to `MOST_IMAGES`.
        camera_info: likewise.
    """
    use_large_message_profile(os.environ)
    import rclpy
    from rclpy.executors import SingleThreadedExecutor
    from rclpy.node import Node
    from rclpy.utilities import get_rmw_implementation_identifier

    context = rclpy.Context()
    rclpy.init(args=[], context=context)
    node = Node("depthlm_doctor", context=context, enable_rosout=False, start_parameter_services=False)
    executor = SingleThreadedExecutor(context=context)
    executor.add_node(node)
    heard: dict[str, Heard] = {}
    try:
        names = [node.resolve_topic_name(name) if name else "" for name in (image, camera_info)]
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            _subscribe(node, heard, *names)
            executor.spin_once(timeout_sec=_POLL_S)
            # One call handles one message; those that wait are taken before the graph is looked at again.
            pause = time.monotonic() + _POLL_S
            while time.monotonic() < min(pause, until):
                executor.spin_once(timeout_sec=0.01)
        return {
            "rmw": get_rmw_implementation_identifier(),
            "nodes": sorted(f"{space.rstrip('/')}/{name}" for name, space in node.get_node_names_and_namespaces()
                            if name != node.get_name()),
            "others": len(node.get_topic_names_and_types()),
            "image": names[0],
            "camera_info": names[1],
            "topics": _topics(node, heard),
        }  # fmt: skip
    finally:
        executor.shutdown(timeout_sec=1.0)
        node.destroy_node()
        rclpy.try_shutdown(context=context)


def _subscribe(node: Any, heard: dict[str, Heard], image: str, camera_info: str) -> None:
    """Subscribes to camera topics that have appeared, quietest request first so that any publisher matches."""
    from sensor_msgs.msg import CameraInfo, CompressedImage, Image

    from depthlm_ros import qos

    messages = {IMAGE: Image, COMPRESSED: CompressedImage, INFO: CameraInfo}
    images = sum(entry.kind != INFO for entry in heard.values())
    for topic, kinds in node.get_topic_names_and_types():
        kind = next((kind for kind in kinds if kind in messages), None)
        wanted = camera_info if kind == INFO else image
        if kind is None or topic in heard or (wanted and topic != wanted):
            continue
        publishers = {publisher.node_name for publisher in node.get_publishers_info_by_topic(topic)}
        # Our own outputs are no cameras; a topic without publishers is somebody else's question.
        if not publishers - {NODE_NAME}:
            continue
        if kind != INFO and (images := images + 1) > MOST_IMAGES:
            continue
        entry = heard[topic] = Heard(kind)
        node.create_subscription(messages[kind], topic, entry.take, qos.sensor_qos(), raw=True)


def _topics(node: Any, heard: dict[str, Heard]) -> list[dict[str, Any]]:
    from depthlm_ros import qos

    rows = []
    known = {topic: kinds for topic, kinds in node.get_topic_names_and_types()}
    camera = [topic for topic, kinds in known.items() if {IMAGE, COMPRESSED, INFO} & set(kinds)]
    for topic in sorted({*heard, *camera}):
        publishers = node.get_publishers_info_by_topic(topic)
        peers = [(publisher.node_name, publisher.qos_profile) for publisher in publishers]
        entry = heard.get(topic)
        rows.append(
            {
                "name": topic,
                "type": entry.kind if entry else next((k for k in known[topic] if k in (IMAGE, COMPRESSED, INFO)), ""),
                "publishers": [
                    {
                        "node": name,
                        "reliability": profile.reliability.name.lower(),
                        "durability": profile.durability.name.lower(),
                    }
                    for name, profile in peers
                ],
                "mismatches": qos.explain_subscription(topic, qos.sensor_qos(), peers),
                "listened": entry is not None,
                **(_contents(entry) if entry else {}),
            }
        )
    for row in rows:
        if row["listened"] and row["type"] != INFO:
            row["stamps"] = len(heard[row["name"]].stamps)
            row["paired"] = {
                other["name"]: len(heard[row["name"]].stamps & heard[other["name"]].stamps)
                for other in rows
                if other["listened"] and other["type"] == INFO
            }
    return rows


def _contents(entry: Heard) -> dict[str, Any]:
    contents: dict[str, Any] = {
        "count": entry.count, "rate_hz": entry.rate_hz, "bytes": entry.size, "delay_s": entry.delay_s,
    }  # fmt: skip
    if not entry.count:
        return contents
    try:
        contents |= _first(entry)
    except Exception as error:  # noqa: BLE001 - a broken message is a finding, not the end of the page
        contents["fault"] = f"{type(error).__name__}: {error}"
    return contents


def _first(entry: Heard) -> dict[str, Any]:
    from rclpy.serialization import deserialize_message
    from sensor_msgs.msg import CameraInfo, CompressedImage, Image

    if entry.kind == IMAGE:
        message = deserialize_message(entry.first, Image)
        size = {"width": message.width, "height": message.height, "encoding": message.encoding}
    elif entry.kind == COMPRESSED:
        from PIL import Image as Picture

        message = deserialize_message(entry.first, CompressedImage)
        width, height = Picture.open(io.BytesIO(bytes(message.data))).size
        size = {"width": width, "height": height, "encoding": message.format}
    else:
        message = deserialize_message(entry.first, CameraInfo)
        size = {"info": info_fields(message)}
    return {"frame_id": message.header.frame_id, **size}


def info_fields(message: Any) -> dict[str, Any]:
    """The fields of a CameraInfo as plain values."""
    roi = message.roi
    return {
        "width": int(message.width),
        "height": int(message.height),
        "distortion_model": message.distortion_model,
        "d": [float(value) for value in message.d],
        "k": [float(value) for value in message.k],
        "r": [float(value) for value in message.r],
        "p": [float(value) for value in message.p],
        "binning_x": int(message.binning_x),
        "binning_y": int(message.binning_y),
        "roi": {name: int(getattr(roi, name)) for name in ("x_offset", "y_offset", "width", "height")},
    }


def main(argv: Iterable[str] | None = None) -> int:
    """Listens and prints."""
    parser = argparse.ArgumentParser(description="What camera topics carry, as JSON.")
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--image", default="")
    parser.add_argument("--camera-info", default="")
    arguments = parser.parse_args(None if argv is None else list(argv))
    print(json.dumps(listen(arguments.seconds, arguments.image, arguments.camera_info)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
