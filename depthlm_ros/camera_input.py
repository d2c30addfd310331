"""The image and camera_info subscriptions of a node, which are there only while they are needed."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sensor_msgs.msg import CameraInfo, CompressedImage, Image

from depthlm_ros import qos
from depthlm_ros.errors import CameraError
from depthlm_ros.messages import header_stamp_ns
from depthlm_ros.pairing import Pairing
from depthlm_ros.topics import compressed_topic, sibling_topic

if TYPE_CHECKING:
    from depthlm_ros.node import DepthNode

# An image message and its CameraInfo, None where there is none.
Pair = tuple[Any, "CameraInfo | None"]


class CameraInput:
    """Images paired with camera infos.

    Args:
        node: subscribes; its parameters say whether the image is compressed.
        take: gets each pair, in the executor's thread.
    """

    def __init__(self, node: DepthNode, take: Callable[[Pair], None]) -> None:
        self._node = node
        self._take = take
        self._pairing: Pairing[Any, CameraInfo] = Pairing()
        self.image_topic = self.info_topic = ""
        self.subscriptions: list[Any] = []

    @property
    def is_open(self) -> bool:
        """Whether image and camera_info are subscribed to."""
        return bool(self.subscriptions)

    @property
    def connected(self) -> bool:
        """Whether both are subscribed to and each has a publisher that matches."""
        return self.is_open and all(each.get_publisher_count() for each in self.subscriptions)

    @property
    def complaint(self) -> str:
        """A sentence where an open input has nobody who publishes the image, else empty."""
        # Counted in the graph: a publisher whose QoS doesn't match is there all the same.
        if self.is_open and self._node.count_publishers(self.image_topic) == 0:
            return f"nobody publishes {self.image_topic}; name the topic with -r image:=..."
        return ""

    def resolve(self) -> None:
        """Finds the full names of image topic and camera_info, remapping applied."""
        node, compressed = self._node, self._node.parameters.compressed
        image = node.resolve_topic_name("image")
        if compressed:
            image = compressed_topic(
                image,
                node.resolve_topic_name("image/compressed"),
                node.resolve_topic_name("image/compressed", only_expand=True),
            )
        info = node.resolve_topic_name("camera_info")
        remapped = info != node.resolve_topic_name("camera_info", only_expand=True)
        self.image_topic = image
        self.info_topic = info if remapped else sibling_topic(image, "camera_info", compressed)

    def open(self) -> None:
        """Subscribes."""
        kind = CompressedImage if self._node.parameters.compressed else Image
        # camera_info first: where it is latched it is there when the first image comes.
        self.subscriptions = [
            self._node.hear(CameraInfo, self.info_topic, self._on_info, qos.sensor_qos()),
            self._node.hear(kind, self.image_topic, self._on_image, qos.sensor_qos()),
        ]

    def close(self) -> None:
        """Unsubscribes and forgets what waits for its other half."""
        for subscription in self.subscriptions:
            self._node.destroy_subscription(subscription)
        self.subscriptions = []
        self._pairing.clear()

    def give_up_overdue(self) -> None:
        """Hands on the images that have waited for their own camera_info long enough."""
        for pair in self._pairing.overdue(time.monotonic_ns()):
            self._take(pair)

    def require_info(self, info: CameraInfo | None) -> CameraInfo:
        """The info of a pair.

        Raises:
            CameraError: there is none.
        """
        if info is None:
            raise CameraError(
                f"an image came on {self.image_topic} but no CameraInfo on {self.info_topic}; publish one there, or "
                "name the right topic with -r camera_info:=..."
            )
        return info

    def _on_info(self, message: CameraInfo) -> None:
        pair = self._pairing.add_info(header_stamp_ns(message.header), message)
        if pair is not None:
            self._take(pair)

    def _on_image(self, message: Image | CompressedImage) -> None:
        for pair in self._pairing.add_image(header_stamp_ns(message.header), message, time.monotonic_ns()):
            self._take(pair)
