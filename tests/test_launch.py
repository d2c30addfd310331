"""The launch file has an argument for every parameter, starts the node for real, and what it shows exists.

`launch` comes with ROS from apt, not from PyPI. Without it the file is read with stand-ins that only note what
they are given; with it the launch file is run.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml

from depthlm_ros import config

ROOT = Path(__file__).resolve().parents[1]
LAUNCH_FILE = ROOT / "launch" / "depthlm.launch.py"
HAS_LAUNCH = importlib.util.find_spec("launch") is not None and importlib.util.find_spec("launch_ros") is not None
PATIENCE_S = 300.0


class Noted:
    """Stands for any class of launch: keeps what it was made with."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self.arguments, self.options = arguments, options


class NotedConfiguration(Noted):
    def perform(self, context: dict[str, str]) -> str:
        return context[self.arguments[0]]


def stand_ins() -> dict[str, types.ModuleType]:
    names = {
        "launch": ("LaunchContext", "LaunchDescription"),
        "launch.actions": ("DeclareLaunchArgument", "ExecuteProcess", "OpaqueFunction", "SetEnvironmentVariable"),
        "launch_ros": (),
        "launch_ros.actions": ("Node",),
    }
    modules = {name: types.ModuleType(name) for name in (*names, "launch.substitutions")}
    for name, classes in names.items():
        for each in classes:
            setattr(modules[name], each, type(each, (Noted,), {}))
    modules["launch.substitutions"].LaunchConfiguration = NotedConfiguration
    return modules


@pytest.fixture
def launch_file(monkeypatch) -> types.ModuleType:
    for name, module in stand_ins().items():
        monkeypatch.setitem(sys.modules, name, module)
    spec = importlib.util.spec_from_file_location("depthlm_launch", LAUNCH_FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def declared(launch_file: types.ModuleType) -> dict[str, dict[str, str]]:
    actions = launch_file.generate_launch_description().arguments[0]
    arguments = [a for a in actions if type(a).__name__ == "DeclareLaunchArgument"]
    names = [a.arguments[0] for a in arguments]
    assert len(names) == len(set(names)), "an argument is declared twice"
    return {a.arguments[0]: a.options for a in arguments}


def started(launch_file: types.ModuleType, **given: str) -> list[Noted]:
    context = {name: options["default_value"] for name, options in declared(launch_file).items()}
    assert set(given) <= set(context)
    return launch_file.start(context | given)


def node_of(actions: list[Noted]) -> dict[str, Any]:
    return next(a.options for a in actions if a.options.get("executable") == "depth_node")


def test_every_parameter_is_a_launch_argument_with_its_description(launch_file):
    arguments = declared(launch_file)
    own = {"image", "camera_info", "namespace", "params_file", "rviz", "frame", "bag", "use_sim_time"}
    assert set(arguments) - own == {s.name for s in config.specs()}
    for s in config.specs():
        assert arguments[s.name]["description"] == config.describe(s)


def test_the_launch_file_holds_no_default_of_a_parameter(launch_file):
    arguments = declared(launch_file)
    assert {arguments[s.name]["default_value"] for s in config.specs()} == {""}


def test_only_what_is_given_reaches_the_node_typed_and_after_the_parameter_file(launch_file):
    node = node_of(started(launch_file, points="400", max_depth_m="20", rectified="true", params_file="my.yaml"))
    given = {"points": 400, "max_depth_m": 20.0, "rectified": True, "use_sim_time": False}
    assert node["parameters"] == ["my.yaml", given]


def test_a_bad_argument_is_refused_before_anything_starts(launch_file):
    with pytest.raises(config.ConfigError, match="stride is 0; choose a value of 1 to 64"):
        started(launch_file, stride="0")


def test_topics_and_namespace_are_passed_on(launch_file):
    node = node_of(started(launch_file, image="/front/image", camera_info="/front/info", namespace="robot"))
    assert node["remappings"] == [("image", "/front/image"), ("camera_info", "/front/info")]
    assert node["namespace"] == "robot"


def test_a_bag_is_played_with_its_clock_and_the_node_follows_it(launch_file):
    actions = started(launch_file, bag="drive")
    assert node_of(actions)["parameters"] == [{"use_sim_time": True}]
    assert [a.options["cmd"] for a in actions if "cmd" in a.options] == [
        ["ros2", "bag", "play", "drive", "--clock", "--loop"]
    ]


def test_rviz_starts_only_on_request_and_with_the_shipped_configuration(launch_file):
    assert not [a for a in started(launch_file) if a.options.get("package") == "rviz2"]
    (rviz,) = [a.options for a in started(launch_file, rviz="true") if a.options.get("package") == "rviz2"]
    assert Path(rviz["arguments"][1]).is_file()


def test_large_messages_are_provided_for_unless_the_user_has_done_so(launch_file, monkeypatch):
    (action,) = [a for a in started(launch_file) if type(a).__name__ == "SetEnvironmentVariable"]
    assert Path(action.arguments[1]).name == "fastdds.xml"
    monkeypatch.setenv("FASTDDS_DEFAULT_PROFILES_FILE", "/mine.xml")
    assert not [a for a in started(launch_file) if type(a).__name__ == "SetEnvironmentVariable"]


def test_rviz_shows_image_overlay_and_cloud():
    content = yaml.safe_load((ROOT / "config" / "depthlm.rviz").read_text(encoding="utf-8"))
    shown = {
        display["Topic"]["Value"]: display["Class"].split("/")[1]
        for display in content["Visualization Manager"]["Displays"]
        if "Topic" in display
    }
    assert shown == {"/camera/image_raw": "Image", "/overlay": "Image", "/points": "PointCloud2"}


def test_foxglove_shows_image_overlay_and_cloud():
    layout = json.loads((ROOT / "config" / "foxglove_layout.json").read_text(encoding="utf-8"))

    def panels(tree: Any) -> set[str]:
        return {tree} if isinstance(tree, str) else panels(tree["first"]) | panels(tree["second"])

    assert panels(layout["layout"]) == set(layout["configById"])
    images = {p["imageMode"]["imageTopic"] for p in layout["configById"].values() if "imageMode" in p}
    assert images == {"/camera/image_raw", "/overlay"}
    assert set(layout["configById"]["3D!cloud"]["topics"]) == {"/points"}


def test_the_fast_dds_profile_holds_a_full_hd_image():
    text = (ROOT / "config" / "fastdds.xml").read_text(encoding="utf-8")
    space = {"dds": "http://www.eprosima.com"}
    root = ElementTree.fromstring(text.encode())
    assert int(root.find(".//dds:maxMessageSize", space).text) >= 1920 * 1080 * 3 + 1024
    assert int(root.find(".//dds:segment_size", space).text) >= 8 * 1920 * 1080 * 3


LAUNCHER = """
import sys
from launch import LaunchDescription, LaunchService
from launch.actions import IncludeLaunchDescription
from launch.launch_description_sources import PythonLaunchDescriptionSource
service = LaunchService(argv=sys.argv[2:])
arguments = [tuple(a.split(":=", 1)) for a in sys.argv[2:]]
source = PythonLaunchDescriptionSource(sys.argv[1])
service.include_launch_description(
    LaunchDescription([IncludeLaunchDescription(source, launch_arguments=arguments)])
)
sys.exit(service.run())
"""


@pytest.mark.skipif(not HAS_LAUNCH, reason="launch and launch_ros come with ROS from apt, not from PyPI")
def test_the_launch_file_starts_the_node_and_ends_it(ros_domain, qwen3_vl_checkpoint):
    index = pytest.importorskip("ament_index_python")
    try:
        index.get_package_prefix("depthlm_ros")
    except index.PackageNotFoundError:
        pytest.skip("depthlm_ros isn't installed in any prefix of AMENT_PREFIX_PATH; colcon build and source it")
    rclpy = pytest.importorskip("rclpy")
    arguments = [f"model:={qwen3_vl_checkpoint}", "device:=cpu", "namespace:=robot", "image:=/camera/image_raw"]
    process = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, str(LAUNCH_FILE), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    context = rclpy.Context()
    rclpy.init(context=context)
    peer = rclpy.create_node("peer", context=context)
    try:
        deadline = time.monotonic() + PATIENCE_S
        while peer.count_publishers("/robot/points") == 0 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        assert peer.count_publishers("/robot/points") == 1, process.communicate()[0]
    finally:
        peer.destroy_node()
        rclpy.try_shutdown(context=context)
        # The parent only: launch passes it on, and a group would get it twice.
        process.send_signal(signal.SIGINT)
        log = process.communicate(timeout=PATIENCE_S)[0]
    assert "ready: image /camera/image_raw, camera_info /camera/camera_info, points /robot/points" in log
    assert process.returncode == 0, log
