"""Cameras that were heard: does our subscription match, does anything arrive, do image and CameraInfo go together?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from depthlm_ros.camera import Camera, camera_from_info
from depthlm_ros.config import NODE_NAME
from depthlm_ros.doctor.intrinsics import as_info, check_intrinsics, is_rectified_topic
from depthlm_ros.doctor.listen import COMPRESSED, INFO
from depthlm_ros.doctor.page import Finding, fail, note, ok, warn
from depthlm_ros.doctor.world import Child
from depthlm_ros.errors import DepthLMError
from depthlm_ros.topics import sibling_topic

# A stamp that is older or newer than this isn't the time of this machine's clock (seconds).
CLOCK_S = 1.0
# CameraInfo is small and gets through; drivers publish it once an image.
LOSS = 1.2
# Raw images that fill a gigabit link.
_BUSY_BYTES_S = 100e6

Topic = Mapping[str, Any]


def check_listening(child: Child) -> Iterable[Finding]:
    """Whether listening worked, and who else is there."""
    facts = child.facts
    if child.code != 0 or facts is None:
        yield fail(
            f"listening ended without a result: {child.fault or 'nothing was printed'}",
            "try ros2 topic list; if that fails too, the ROS installation or its variables are at fault",
        )
        return
    nodes = facts["nodes"]
    ours = [name for name in nodes if name.rsplit("/", 1)[-1] == NODE_NAME]
    told = f"{len(nodes)} other node{'s' * (len(nodes) != 1)}, {facts['others']} topics"
    yield ok(told + (f"; {', '.join(ours)} runs" if ours else ""))


def check_topics(facts: Mapping[str, Any], seconds: float) -> Iterable[Finding]:
    """Every camera topic.

    Args:
        facts: of `listen`.
        seconds: how long it listened.
    """
    topics = facts["topics"]
    wanted = facts.get("image", "")
    names = {topic["name"] for topic in topics}
    if wanted and wanted not in names:
        near = ", ".join(sorted(t["name"] for t in topics if t["type"] != INFO)) or "none"
        yield fail(
            f"nobody publishes {wanted} (seen within {seconds:g} s; image topics there: {near})",
            "name the topic of the camera driver, start the driver, and compare ROS_DOMAIN_ID and the discovery range",
        )
        return
    images = [topic for topic in topics if topic["type"] != INFO]
    if not images:
        yield warn(
            f"no image topic was seen within {seconds:g} s",
            "start the camera; if ros2 topic list shows it elsewhere, compare ROS_DOMAIN_ID, ROS_LOCALHOST_ONLY, "
            "ROS_AUTOMATIC_DISCOVERY_RANGE and RMW_IMPLEMENTATION in both shells",
        )
    for topic in images:
        yield from _image(topic, seconds)
        if topic["listened"] and topic.get("count"):
            yield from _info_of(topic, topics, facts.get("camera_info", ""))
    beside = {_info_name(topic, facts.get("camera_info", "")) for topic in images}
    for topic in topics:
        if topic["type"] == INFO and topic["listened"] and topic["name"] not in beside:
            yield note(f"{topic['name']}: a CameraInfo with no image beside it ({_traffic(topic)})")


def _image(topic: Topic, seconds: float) -> Iterable[Finding]:
    name = topic["name"]
    publishers = topic["publishers"]
    offers = ", ".join(f"{p['node']} ({p['reliability']}, {p['durability']})" for p in publishers)
    if not topic["listened"]:
        if {p["node"] for p in publishers} == {NODE_NAME}:
            return
        if publishers:
            yield note(f"{name}: published by {offers}; not listened to", f"depthlm doctor --image {name}")
        else:
            yield note(f"{name}: subscribed to, and nobody publishes it")
        return
    for sentence in topic["mismatches"]:
        told, _, remedy = sentence.partition(". ")
        yield fail(told, remedy)
    if len(publishers) > 1:
        yield warn(f"{name} has {len(publishers)} publishers: {offers}", "leave one, or frames get mixed")
    if topic.get("fault"):
        yield fail(f"{name}: its messages can't be read ({topic['fault']})", "see the camera driver's log and encoding")
        return
    if not topic["count"]:
        if not topic["mismatches"]:
            yield fail(
                f"{name}: published by {offers}, but nothing arrived within {seconds:g} s",
                "see whether the driver really sends (its log, its trigger); if ros2 topic hz sees it there, large "
                "messages are lost on the way: give the driver's process the Fast DDS profile named above",
            )
        return
    yield ok(f"{name}: {topic['width']}x{topic['height']} {topic['encoding']}, {_traffic(topic)}, frame "
             f"{topic['frame_id'] or '(empty)'}, from {offers}")  # fmt: skip
    if not topic["frame_id"]:
        yield warn(f"{name}: frame_id is empty, so nobody can transform the points", "set the driver's frame_id")
    yield from _clock(topic)
    rate = topic["rate_hz"] or 0
    if topic["type"] != COMPRESSED and rate * topic["bytes"] > _BUSY_BYTES_S:
        yield note(f"{name} carries {rate * topic['bytes'] / 1e6:.0f} MB/s, too much for most networks",
                   "from another machine, take the compressed topic: compressed:=true")  # fmt: skip


def _clock(topic: Topic) -> Iterable[Finding]:
    delay = topic["delay_s"]
    if delay is None:
        yield warn(f"{topic['name']}: stamps are zero, so images and CameraInfo can't be paired",
                   "let the driver stamp them")  # fmt: skip
    elif abs(delay) > CLOCK_S:
        yield note(
            f"{topic['name']}: stamps are {abs(delay):.1f} s {'behind' if delay > 0 else 'ahead of'} this clock",
            "a recording or a simulator: use_sim_time:=true; a camera on another machine: synchronise the clocks",
        )


def _info_name(topic: Topic, named: str) -> str:
    return named or sibling_topic(topic["name"], "camera_info", topic["type"] == COMPRESSED)


def _info_of(topic: Topic, topics: Iterable[Topic], named: str) -> Iterable[Finding]:
    name = _info_name(topic, named)
    info = next((other for other in topics if other["name"] == name), None)
    if info is None or not info["listened"] or not info.get("count"):
        mismatch = info["mismatches"] if info else ()
        for sentence in mismatch:
            told, _, remedy = sentence.partition(". ")
            yield fail(told, remedy)
        if not mismatch:
            yield fail(
                f"no CameraInfo on {name}, so depth in metres is impossible for {topic['name']}",
                "publish one there, or name its topic: --camera-info here, -r camera_info:=TOPIC for depth_node",
            )
        return
    if info.get("fault"):
        yield fail(f"{name}: its messages can't be read ({info['fault']})", "correct the publisher")
        return
    if topic["rate_hz"] and info["rate_hz"] and info["rate_hz"] > LOSS * topic["rate_hz"]:
        yield warn(
            f"{topic['name']} arrives at {topic['rate_hz']:.1f} Hz, its CameraInfo at {info['rate_hz']:.1f} Hz: images "
            "are lost on the way",
            "large messages need more shared memory where they are written: give the driver's process the Fast DDS "
            "profile named above; between machines, take the compressed topic",
        )
    paired = topic.get("paired", {}).get(name, 0)
    if topic["stamps"] > 1 and paired == 0:
        yield warn(
            f"no image of {topic['name']} has a CameraInfo with the same stamp on {name}",
            "let the driver publish both with one stamp; depth_node falls back on the last CameraInfo, late",
        )
    if info["frame_id"] != topic["frame_id"]:
        yield warn(f"{name} is of frame {info['frame_id']!r}, the image of {topic['frame_id']!r}",
                   "both must name the optical frame of the same camera")  # fmt: skip
    yield from check_intrinsics(info["info"], (topic["width"], topic["height"]), topic["name"])


def camera_heard(facts: Mapping[str, Any] | None) -> Camera | None:
    """The first camera whose image and CameraInfo came and fit; None without one."""
    for topic in (facts or {}).get("topics", ()):
        if topic["type"] == INFO or not topic.get("count") or "width" not in topic:
            continue
        name = _info_name(topic, (facts or {}).get("camera_info", ""))
        for other in (facts or {})["topics"]:
            if other["name"] == name and other.get("info"):
                try:
                    size = (topic["width"], topic["height"])
                    return camera_from_info(as_info(other["info"]), size, is_rectified_topic(topic["name"]))
                except DepthLMError:
                    continue
    return None


def _traffic(topic: Topic) -> str:
    count = topic["count"]
    rate = f"{topic['rate_hz']:.1f} Hz" if topic["rate_hz"] else f"{count} message{'s' * (count != 1)}"
    return f"{rate}, {topic['bytes'] / 1e6:.2f} MB each" if topic["bytes"] > 1e4 else rate
