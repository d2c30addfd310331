"""Starts depth_node on a camera, and if wanted RViz and a recording.

    ros2 launch depthlm_ros depthlm.launch.py image:=/camera/image_raw
    ros2 launch depthlm_ros depthlm.launch.py params_file:=my.yaml points:=400 rviz:=true
    ros2 launch depthlm_ros depthlm.launch.py bag:=drive image:=/camera/image_raw rviz:=true

Every parameter of the node is an argument too. What is given as an argument beats the parameter file, and what is
given in neither has its default (depthlm_ros/config.py). `--show-args` lists them all.
"""

from __future__ import annotations

import os
from pathlib import Path

from launch import LaunchContext, LaunchDescription
from launch.actions import DeclareLaunchArgument, ExecuteProcess, OpaqueFunction, SetEnvironmentVariable
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import Node

from depthlm_ros import config, middleware

CONFIG_FOLDER = Path(__file__).resolve().parents[1] / "config"

ARGUMENTS = {
    "image": ("/camera/image_raw", "Image topic; camera_info is looked for beside it."),
    "camera_info": ("", "CameraInfo topic. Empty: camera_info beside the image."),
    "namespace": ("", "Namespace of the node and of the topics it publishes."),
    "params_file": ("", "ROS parameter file, of the form of config/depthlm.yaml."),
    "rviz": ("false", "true starts RViz with image, overlay and cloud."),
    "frame": ("camera_optical_frame", "Fixed frame of RViz: frame_id of the images, or any frame that TF connects."),
    "bag": ("", "Recording that is played in a loop with its clock (ros2 bag play)."),
    "use_sim_time": ("", "true follows /clock. Empty: true where a bag is played."),
}


def generate_launch_description() -> LaunchDescription:
    """What `ros2 launch` asks for."""
    own = [DeclareLaunchArgument(name, default_value=default, description=text)
           for name, (default, text) in ARGUMENTS.items()]  # fmt: skip
    # Empty means not given, so that a default here can't beat a value in the parameter file.
    parameters = [DeclareLaunchArgument(s.name, default_value="", description=config.describe(s))
                  for s in config.specs()]  # fmt: skip
    return LaunchDescription([*own, *parameters, OpaqueFunction(function=start)])


def start(context: LaunchContext) -> list:
    """The processes, once the arguments are known.

    Raises:
        ConfigError: an argument of the wrong type, out of range or not among the choices.
    """
    given = {name: LaunchConfiguration(name).perform(context) for name in ARGUMENTS}
    texts = {s: LaunchConfiguration(s.name).perform(context) for s in config.specs()}
    parameters = {s.name: s.parse(text) for s, text in texts.items() if text}
    parameters["use_sim_time"] = is_true("use_sim_time", given["use_sim_time"] or str(bool(given["bag"])))

    remappings = [("image", given["image"])]
    if given["camera_info"]:
        remappings.append(("camera_info", given["camera_info"]))
    actions = large_message_environment()
    actions.append(
        Node(
            package="depthlm_ros",
            executable="depth_node",
            name=config.NODE_NAME,
            namespace=given["namespace"],
            parameters=[*filter(None, [given["params_file"]]), parameters],
            remappings=remappings,
            output="screen",
        )
    )
    if is_true("rviz", given["rviz"]):
        actions.append(rviz(given))
    if given["bag"]:
        play = ["ros2", "bag", "play", given["bag"], "--clock", "--loop"]
        actions.append(ExecuteProcess(cmd=play, output="screen"))
    return actions


def large_message_environment() -> list[SetEnvironmentVariable]:
    """Fast DDS' profile for everything that is started here, unless the user has chosen one."""
    chosen = dict(os.environ)
    middleware.use_large_message_profile(chosen)
    return [SetEnvironmentVariable(name, value) for name, value in chosen.items() if os.environ.get(name) != value]


def rviz(given: dict[str, str]) -> Node:
    """RViz with the topics of its configuration moved to where they are now."""
    prefix = f"/{given['namespace'].strip('/')}".rstrip("/")
    outputs = [(f"/{name}", f"{prefix}/{name}") for name in ("points", "overlay", "depth")] if prefix else []
    return Node(
        package="rviz2",
        executable="rviz2",
        arguments=["-d", str(CONFIG_FOLDER / "depthlm.rviz"), "-f", given["frame"]],
        remappings=[("/camera/image_raw", given["image"]), *outputs],
    )


def is_true(name: str, text: str) -> bool:
    """Reads a yes or no argument.

    Raises:
        ConfigError: it is neither.
    """
    return config.Spec(name, bool, False, "").parse(text)
