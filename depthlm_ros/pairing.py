"""Which CameraInfo belongs to which image: the one of the same stamp, and the newest one where stamps differ.

The two topics are delivered independently, in either order, and some drivers send camera_info at a rate
or with stamps of its own. No ROS in here: stamps are nanoseconds.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Generic, TypeVar

Image = TypeVar("Image")
Info = TypeVar("Info")


class Pairing(Generic[Image, Info]):
    """Pairs images with camera infos; every image that goes in comes out once.

    An image whose info isn't there yet is held until it comes or `grace_ns` has passed; then the newest info
    serves. Once that has happened the topics count as unsynchronised and images are not held any more,
    until two equal stamps are seen.

    Args:
        grace_ns: how long an image waits for the info of its own stamp.
        memory: how many infos are kept.
        held: how many images wait at most.
    """

    def __init__(self, grace_ns: int = 500_000_000, memory: int = 30, held: int = 8) -> None:
        self._grace_ns = grace_ns
        self._memory = memory
        self._max_held = held
        self._infos: OrderedDict[int, Info] = OrderedDict()
        self._held: OrderedDict[int, tuple[Image, int]] = OrderedDict()
        self._last_image_ns: int | None = None
        self._synchronised = True

    def add_info(self, stamp_ns: int, info: Info) -> tuple[Image, Info] | None:
        """Takes an info; returns the pair it completes, if any."""
        self._infos.pop(stamp_ns, None)
        self._infos[stamp_ns] = info
        while len(self._infos) > self._memory:
            self._infos.popitem(last=False)
        if stamp_ns == self._last_image_ns:
            self._synchronised = True
        if stamp_ns in self._held:
            return self._held.pop(stamp_ns)[0], info
        return None

    def add_image(self, stamp_ns: int, image: Image, now_ns: int) -> list[tuple[Image, Info | None]]:
        """Takes an image; returns the pairs that are ready, oldest first.

        An info of None means that none was ever seen.
        """
        ready = self.overdue(now_ns)
        self._last_image_ns = stamp_ns
        if stamp_ns in self._infos:
            self._synchronised = True
            return [*ready, (image, self._infos[stamp_ns])]
        if stamp_ns in self._held or len(self._held) == self._max_held:
            ready += self._give_up()
        self._held[stamp_ns] = (image, now_ns)
        if not self._synchronised and self._infos:
            ready += self._give_up()
        return ready

    def overdue(self, now_ns: int) -> list[tuple[Image, Info | None]]:
        """The held images with the newest info, once the grace of the oldest is over."""
        if any(now_ns - arrived_ns >= self._grace_ns for _, arrived_ns in self._held.values()):
            return self._give_up()
        return []

    def clear(self) -> None:
        """Forgets held images and infos."""
        self._infos.clear()
        self._held.clear()

    def _give_up(self) -> list[tuple[Image, Info | None]]:
        newest = self._infos[next(reversed(self._infos))] if self._infos else None
        pairs = [(image, newest) for image, _ in self._held.values()]
        self._held.clear()
        self._synchronised = False
        return pairs
