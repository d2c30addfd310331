"""Room on disk for what is fetched, built and logged."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from depthlm_ros.doctor.model import hub_folder
from depthlm_ros.doctor.page import Finding, fail, ok, warn
from depthlm_ros.doctor.ros import ros_log_folder
from depthlm_ros.doctor.world import World

# A 4B checkpoint in float16 and an engine made of it.
MODEL_BYTES = 20e9
LOG_BYTES = 0.2e9


def check_disk(world: World, with_ros: bool = True) -> Iterable[Finding]:
    """Caches and the folder of logs: writable, and with room.

    Args:
        world: the machine.
        with_ros: whether logs of ROS count.
    """
    cache = Path(world.environment.get("XDG_CACHE_HOME") or os.path.join(world.environment.get("HOME", "~"), ".cache"))
    places = [
        ("models from the hub", hub_folder(world), MODEL_BYTES),
        ("parity records and engines", cache.expanduser() / "depthlm_ros", LOG_BYTES),
    ]
    logs = ros_log_folder(world) if with_ros else None
    if logs is not None:
        places.append(("logs of ROS", logs, LOG_BYTES))
    for what, path, wanted in places:
        folder = path
        while not folder.exists():
            folder = folder.parent
        if not os.access(folder, os.W_OK):
            # rclpy ends without its logs; what is cached can lie there already.
            yield (fail if path == logs else warn)(
                f"{path}, for {what}, can't be written",
                "give this user the folder, or set HF_HOME, XDG_CACHE_HOME or ROS_LOG_DIR to another",
            )
            continue
        total, free = world.disk(path)
        if free < wanted:
            yield warn(
                f"{path}, for {what}: {free / 1e9:.1f} GB free of {total / 1e9:.0f} GB",
                "make room, or set HF_HOME, XDG_CACHE_HOME or ROS_LOG_DIR to a larger disk",
            )
        else:
            yield ok(f"{path}, for {what}: {free / 1e9:.0f} GB free")
