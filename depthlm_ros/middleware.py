"""Makes Fast DDS carry camera images, of which its defaults lose nearly all, and tidies up after it."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import MutableMapping
from importlib import metadata
from pathlib import Path

# Fast DDS 3 (Kilted and later) has renamed the variable and scolds whoever sets the old one.
_NEW, _OLD = "FASTDDS_DEFAULT_PROFILES_FILE", "FASTRTPS_DEFAULT_PROFILES_FILE"
# rclpy 9 came with Kilted.
_RCLPY_WITH_FAST_DDS_3 = 9


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
    if profile is not None and not environment.get(_NEW) and not environment.get(_OLD):
        environment[_NEW if _has_fast_dds_3() else _OLD] = str(profile)


def release_shared_memory(open_files: Path = Path("/proc/self/fd")) -> None:
    """Frees the segments that Fast DDS made in this process; for an end that its own clean-up doesn't see.

    Each is 64 MB of memory with our profile, until the machine restarts. Who has one open goes on reading it.

    Args:
        open_files: of the process.
    """
    # Whatever happens here, the process is to end.
    with contextlib.suppress(OSError):
        for entry in open_files.iterdir():
            with contextlib.suppress(OSError):
                lock = entry.readlink()
                # Fast DDS holds a lock on a file beside each segment of its own; those of others it opens for a look.
                if re.fullmatch(r"fastdds_[0-9a-f]+_el", lock.name) and _is_locked(entry):
                    lock.with_name(lock.name.removesuffix("_el")).unlink(missing_ok=True)
                    lock.unlink()


def _is_locked(entry: Path) -> bool:
    """Whether the process has a lock on the open file that an entry of /proc/.../fd stands for."""
    told = (entry.parent.parent / "fdinfo" / entry.name).read_text(encoding="ascii", errors="replace")
    return any(line.startswith("lock:") for line in told.splitlines())


def _has_fast_dds_3() -> bool:
    try:
        major = int(metadata.version("rclpy").split(".")[0])
    except metadata.PackageNotFoundError:
        return True
    return major >= _RCLPY_WITH_FAST_DDS_3
