"""ROS 2 without any topic: which distribution and middleware load, what the variables say, what the kernel allows."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import unquote, urlparse
from xml.etree import ElementTree

from depthlm_ros.doctor.page import Finding, fail, note, ok, warn
from depthlm_ros.doctor.world import CHILD_S, Child, World
from depthlm_ros.middleware import large_message_profile

ROS_PROBE = """
import json, rclpy
from rclpy.utilities import get_rmw_implementation_identifier
from sensor_msgs.msg import Image
print(json.dumps({"rmw": get_rmw_implementation_identifier()}))
"""
PROFILES = ("FASTDDS_DEFAULT_PROFILES_FILE", "FASTRTPS_DEFAULT_PROFILES_FILE")
SHOWN = (
    "RMW_IMPLEMENTATION", "ROS_DOMAIN_ID", "ROS_AUTOMATIC_DISCOVERY_RANGE", "ROS_STATIC_PEERS", "ROS_LOCALHOST_ONLY",
    *PROFILES, "RMW_FASTRTPS_USE_QOS_FROM_XML", "FASTDDS_BUILTIN_TRANSPORTS", "ROS_DISCOVERY_SERVER", "CYCLONEDDS_URI",
    "ZENOH_ROUTER_CONFIG_URI", "ZENOH_SESSION_CONFIG_URI",
)  # fmt: skip
RANGES = ("SUBNET", "LOCALHOST", "OFF", "SYSTEM_DEFAULT")

# Ports of domains up to 101 stay below those that Linux hands out itself; 232 is the last that has ports at all
# (ROS 2 documentation, The ROS_DOMAIN_ID).
SAFE_DOMAIN, LAST_DOMAIN = 101, 232
# ROS 2 documentation, DDS tuning; 4 MiB is its least figure for images over UDP (Connext).
RMEM_MAX_LEAST, RMEM_MAX = 4_194_304, 2_147_483_647
IPFRAG_HIGH, IPFRAG_TIME_S = 134_217_728, 3
# Docker gives 64 MB unless told; our Fast DDS profile takes a segment of 64 MiB for each process that writes.
SHM_LEAST = 256 << 20


def probe_ros(world: World) -> Child:
    """Imports rclpy, its middleware and a message in a child."""
    return world.child(["-c", ROS_PROBE], CHILD_S)


def check_rclpy(world: World, child: Child) -> Iterable[Finding]:
    """Whether ROS 2 can be used from this Python, and with which middleware.

    Args:
        world: the machine.
        child: of `probe_ros`.
    """
    distro = world.environment.get("ROS_DISTRO", "")
    told = f"ROS 2 {distro}" if distro else "ROS 2"
    facts = child.facts
    if child.code == 0 and facts is not None:
        version = world.version("rclpy")
        yield ok(f"{told}{f', rclpy {version}' if version else ''}, middleware {facts['rmw']}")
        asked = world.environment.get("RMW_IMPLEMENTATION", "")
        if asked and asked != facts["rmw"]:
            yield warn(
                f"RMW_IMPLEMENTATION asks for {asked}, loaded is {facts['rmw']}",
                f"sudo apt install ros-{distro or '$ROS_DISTRO'}-{asked.replace('_', '-')}",
            )
        return
    fault = child.fault or "said nothing"
    if "No module named 'rclpy'" in fault:
        remedy = "source /opt/ros/$ROS_DISTRO/setup.bash in this shell, or pip install 'depthlm_ros[ros]'; or --no-ros"
    elif "_rclpy_pybind11" in fault or "No module named" in fault:
        remedy = (
            f"use the Python that this ROS was built for (this is {world.python[0]}.{world.python[1]}), in a virtual "
            "environment made with --system-site-packages; and install the message packages"
        )
    elif "RMW" in fault or "rmw" in fault:
        remedy = "unset RMW_IMPLEMENTATION, or install the middleware that it names from apt"
    else:
        remedy = "see that the sourced ROS and this virtual environment belong together; a fresh shell often helps"
    yield fail(f"{told} can't be used from this Python: {fault}", remedy)


def check_variables(world: World) -> Iterable[Finding]:
    """Variables that decide who hears whom."""
    env = world.environment
    shown = [f"{name}={env[name]}" for name in SHOWN if env.get(name)]
    yield ok("variables: " + (", ".join(shown) or "none of ROS' or DDS' set, all at their defaults"))
    yield from _domain(env.get("ROS_DOMAIN_ID", ""))
    if env.get("ROS_LOCALHOST_ONLY", "") not in ("", "0"):
        yield note(
            "ROS_LOCALHOST_ONLY is set: nothing is heard from other machines, and newer settings are overruled",
            "unset it and use ROS_AUTOMATIC_DISCOVERY_RANGE=LOCALHOST, or SUBNET for other machines",
        )
    reach = env.get("ROS_AUTOMATIC_DISCOVERY_RANGE", "")
    if reach and reach not in RANGES:
        yield fail(f"ROS_AUTOMATIC_DISCOVERY_RANGE is {reach!r}", f"set one of {', '.join(RANGES)}")
    elif reach == "OFF":
        yield warn("ROS_AUTOMATIC_DISCOVERY_RANGE is OFF: no other process is found", "set it to LOCALHOST or SUBNET")
    elif reach == "LOCALHOST":
        yield note("only nodes on this machine are found (ROS_AUTOMATIC_DISCOVERY_RANGE=LOCALHOST)")
    if env.get("ROS_DISCOVERY_SERVER"):
        yield note("a discovery server is used: nodes and tools need the same ROS_DISCOVERY_SERVER; tools also "
                   "ROS_SUPER_CLIENT=true")  # fmt: skip
    if not env.get("HOME") and not env.get("ROS_LOG_DIR"):
        yield fail("neither HOME nor ROS_LOG_DIR is set, so rclpy does not start", "set ROS_LOG_DIR to a folder")


def _domain(text: str) -> Iterable[Finding]:
    if not text:
        return
    domain = int(text) if text.isdigit() else -1
    if not 0 <= domain <= LAST_DOMAIN:
        yield fail(f"ROS_DOMAIN_ID is {text!r}", f"set a whole number from 0 to {SAFE_DOMAIN}")
    elif domain > SAFE_DOMAIN:
        yield warn(
            f"ROS_DOMAIN_ID {domain}: its ports are those that Linux hands out itself, so nodes fail now and then",
            f"set one from 0 to {SAFE_DOMAIN}, everywhere",
        )


def check_profiles(world: World, rmw: str) -> Iterable[Finding]:
    """Settings files of the middleware, and whether large images get through.

    Args:
        world: the machine.
        rmw: the middleware that loads, empty where none does.
    """
    env = world.environment
    fast = not rmw or "fastrtps" in rmw
    for name in PROFILES:
        if env.get(name) and fast:
            yield from _xml_file(name, Path(env[name]))
    own = large_message_profile()
    if fast and not any(map(env.get, PROFILES)):
        if own is None:
            yield warn("config/fastdds.xml is not installed: Fast DDS loses most large images between processes",
                       "install the package with its data files")  # fmt: skip
        else:
            name = PROFILES[0] if _has_fast_dds_3(world.version("rclpy")) else PROFILES[1]
            yield note(
                "depth_node takes its own Fast DDS profile for large messages; the camera driver's process needs it "
                "too, since the writer's settings count",
                f"before starting the camera: export {name}={own}",
            )
    if "cyclonedds" in rmw or not rmw:
        yield from _cyclone(env.get("CYCLONEDDS_URI", ""), "cyclonedds" in rmw)
    if "zenoh" in rmw:
        yield from _zenoh(world)


def _xml_file(name: str, path: Path) -> Iterable[Finding]:
    if not path.is_file():
        yield fail(f"{name} names {path}, which doesn't exist, so the middleware's defaults hold",
                   f"correct the path or unset {name}")  # fmt: skip
        return
    try:
        tree = ElementTree.parse(path)
    except (ElementTree.ParseError, OSError) as error:
        yield fail(f"{name} names {path}, which is no readable XML ({error})", "correct the file or unset the variable")
        return
    texts = [node.text or "" for node in tree.iter() if node.tag.endswith("segment_size")]
    sizes = [int(text) for text in texts if text.strip().isdigit()]
    if not sizes:
        yield note(
            f"{path} sets no segment_size: shared memory holds 0.5 MB and larger best-effort images are lost",
            f"take over the transports of {large_message_profile() or 'config/fastdds.xml'}",
        )
    else:
        yield ok(f"{name}: {path}, shared memory of {max(sizes) >> 20} MiB")


def _cyclone(uri: str, loaded: bool) -> Iterable[Finding]:
    told = "Cyclone DDS over UDP needs large socket buffers for images; allow them in CYCLONEDDS_URI: <Internal>" \
           "<SocketReceiveBufferSize min=\"10MB\"/></Internal>"  # fmt: skip
    if not uri:
        if loaded:
            yield note("CYCLONEDDS_URI is not set", told)
        return
    for part in filter(None, (each.strip() for each in uri.split(",") if not uri.lstrip().startswith("<"))):
        path = Path(unquote(urlparse(part).path)) if part.startswith("file:") else Path(part)
        if not path.is_file():
            yield fail(f"CYCLONEDDS_URI names {path}, which doesn't exist; nodes end at start",
                       "correct the path or unset CYCLONEDDS_URI")  # fmt: skip
            return
        try:
            ElementTree.parse(path)
        except (ElementTree.ParseError, OSError) as error:
            yield fail(f"CYCLONEDDS_URI names {path}, which is no readable XML ({error})", "correct the file")
            return
    yield ok("CYCLONEDDS_URI can be read")


def _zenoh(world: World) -> Iterable[Finding]:
    for name in ("ZENOH_ROUTER_CONFIG_URI", "ZENOH_SESSION_CONFIG_URI"):
        path = world.environment.get(name, "")
        if path and not Path(path).is_file():
            yield fail(f"{name} names {path}, which doesn't exist", "correct the path or unset it")
    processes = (world.root / "proc").glob("[0-9]*/comm")
    if any(world.text(str(path.relative_to(world.root))).startswith("rmw_zenohd") for path in processes):
        yield ok("a Zenoh router (rmw_zenohd) runs here")
    else:
        yield warn(
            "no Zenoh router runs here; without one, nodes don't find each other",
            "ros2 run rmw_zenoh_cpp rmw_zenohd, unless one runs on another machine that is configured",
        )


def check_kernel(world: World, rmw: str) -> Iterable[Finding]:
    """Kernel settings for image-sized messages between machines, and shared memory within one."""
    where = "on the host: " if world.in_container else ""
    shared = _shared_memory(world)
    received = world.number("proc/sys/net/core/rmem_max")
    if received is None:
        yield note("net.core.rmem_max can't be read here", "look on the host: sysctl net.core.rmem_max")
    elif received < RMEM_MAX_LEAST:
        level = warn if "cyclonedds" in rmw or "connext" in rmw else note
        yield level(
            f"net.core.rmem_max is {received}: images from other machines over UDP get lost",
            f"{where}in /etc/sysctl.d/10-dds.conf, net.core.rmem_max={RMEM_MAX}, then sudo sysctl --system",
        )
    else:
        yield ok(f"net.core.rmem_max is {received}")
    high = world.number("proc/sys/net/ipv4/ipfrag_high_thresh")
    hold = world.number("proc/sys/net/ipv4/ipfrag_time")
    if high is not None and (high < IPFRAG_HIGH or (hold or 0) > IPFRAG_TIME_S):
        yield note(
            f"net.ipv4.ipfrag_high_thresh is {high}, ipfrag_time {hold} s: on a lossy link, leftovers of broken images "
            "block new ones",
            f"{where}in /etc/sysctl.d/10-dds.conf, net.ipv4.ipfrag_high_thresh={IPFRAG_HIGH} and "
            f"net.ipv4.ipfrag_time={IPFRAG_TIME_S}, then sudo sysctl --system",
        )
    elif high is not None:
        yield ok(f"net.ipv4.ipfrag_high_thresh is {high}, ipfrag_time {hold} s")
    yield from shared


def _shared_memory(world: World) -> list[Finding]:
    folder = world.root / "dev/shm"
    if not folder.is_dir():
        return [warn("there is no /dev/shm: nodes on this machine send images over UDP",
                     "mount it: a tmpfs of at least 256 MB; in a container, --ipc host")]  # fmt: skip
    total, free = world.disk(folder)
    told = f"/dev/shm has {total / 1e6:.0f} MB, {free / 1e6:.0f} MB free"
    if total < SHM_LEAST:
        remedy = "in a container, --ipc host (or --shm-size 512m); else: sudo mount -o remount,size=1G /dev/shm"
        return [warn(f"{told}: too little for images between several nodes", remedy)]
    left = len(list(folder.glob("fastdds_*")))
    if free < SHM_LEAST:
        remedy = "with all nodes stopped, remove what killed ones left: rm /dev/shm/fastdds_* /dev/shm/sem.fastdds_*"
        return [warn(f"{told}, {left} files of Fast DDS in it", remedy)]
    return [ok(told)]


def _has_fast_dds_3(rclpy: str) -> bool:
    # As in middleware.py: rclpy 9 came with Kilted; apt's Jazzy has 7. Without metadata the newer name is taken.
    major = rclpy.split(".")[0]
    return not major.isdigit() or int(major) >= 9


def ros_log_folder(world: World) -> Path | None:
    """Where rclpy writes logs; None where nothing says."""
    env = world.environment
    if env.get("ROS_LOG_DIR"):
        return Path(os.path.expanduser(env["ROS_LOG_DIR"]))
    home = env.get("ROS_HOME") or (os.path.join(env["HOME"], ".ros") if env.get("HOME") else "")
    return Path(home) / "log" if home else None
