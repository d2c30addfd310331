"""Names of topics that go together. No ROS in here."""

from __future__ import annotations


def sibling_topic(image_topic: str, name: str, compressed: bool = False) -> str:
    """The topic `name` beside an image topic, as image_transport has it.

    Args:
        image_topic: full name, such as /camera/image_raw.
        name: such as camera_info.
        compressed: the image topic's last part is that of a transport, as in /camera/image_raw/compressed.
    """
    base = image_topic.rsplit("/", 1)[0] if compressed else image_topic
    return f"{base.rsplit('/', 1)[0]}/{name}"


def compressed_topic(image_topic: str, remapped: str, expanded: str) -> str:
    """The compressed topic of an image topic.

    Remapping `image` moves `image/compressed` along, as users expect; ROS itself matches whole names only.

    Args:
        image_topic: full name of `image`, remapping applied.
        remapped: full name of `image/compressed`, remapping applied.
        expanded: the same, remapping not applied.
    """
    return remapped if remapped != expanded else f"{image_topic}/compressed"
