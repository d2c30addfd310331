"""Makes Fast DDS carry camera images: its defaults lose nearly all large best-effort messages between processes."""

from __future__ import annotations

import os
import sys
from collections.abc import MutableMapping
from pathlib import Path

# The name of Fast DDS 3 (Kilted) and that of Fast DDS 2 (Jazzy, Humble).
_VARIABLES = ("FASTDDS_DEFAULT_PROFILES_FILE", "FASTRTPS_DEFAULT_PROFILES_FILE")


def large_message_profile() -> Path | None:
    """config/fastdds.xml of the checkout, or of the installation; None where neither has it."""
    package = Path(__file__).resolve().parent
    prefixes = [*package.parents, *filter(None, os.environ.get("AMENT_PREFIX_PATH", "").split(os.pathsep)), sys.prefix]
    places = [package.parent / "config", *(Path(p) / "share" / "depthlm_ros" / "config" for p in prefixes)]
    return next((place / "fastdds.xml" for place in places if (place / "fastdds.xml").is_file()), None)


def use_large_message_profile(environment: MutableMapping[str, str]) -> None:
    """Names the profile in an environment, unless somebody has named one there already.

    Must happen before `rclpy.init`, and in the process that publishes the images: the size of a shared
    memory segment is the writer's. Other middlewares ignore it.
    """
    profile = large_message_profile()
    if profile is not None and not any(environment.get(name) for name in _VARIABLES):
        environment.update(dict.fromkeys(_VARIABLES, str(profile)))
