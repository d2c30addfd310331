"""The command `depthlm doctor`: one page about what this machine lacks."""

from __future__ import annotations

import argparse
import json
import os
import sys

from depthlm_ros.engines import ENGINES


def add_command(commands) -> None:
    """Adds the command to the parser's commands."""
    parser = commands.add_parser(
        "doctor",
        help="look at machine, versions, ROS, cameras and model, and say what to mend",
        description="One page: GPU and JetPack, versions and what is known to go wrong with them, ROS middleware and "
        "kernel settings, camera topics and their CameraInfo, the model and its export, room on disk. Exit code 1 if "
        "any line says FAIL.",
    )
    parser.add_argument("--model", default="demo", help="name, folder or hub id (default demo)")
    parser.add_argument("--engine", choices=ENGINES, default="transformers", help="what shall run it")
    parser.add_argument("--image", default="", metavar="TOPIC", help="look at this image topic only; default: all")
    parser.add_argument(
        "--camera-info", default="", metavar="TOPIC", help="its CameraInfo; default: camera_info beside the image"
    )
    parser.add_argument("--seconds", type=_seconds, default=5.0, help="how long to listen to topics (default 5)")
    parser.add_argument("--no-ros", action="store_true", help="leave out ROS and topics")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=_doctor)


def _seconds(text: str) -> float:
    value = float(text)
    if not 0.5 <= value <= 600:
        raise argparse.ArgumentTypeError(f"{text} is out of range; give 0.5 to 600")
    return value


def _doctor(arguments: argparse.Namespace) -> int:
    from depthlm_ros.doctor import Options, examine
    from depthlm_ros.doctor.page import render

    page = examine(
        Options(
            model=arguments.model,
            engine=arguments.engine,
            image=arguments.image,
            camera_info=arguments.camera_info,
            seconds=arguments.seconds,
            ros=not arguments.no_ros,
        )
    )
    if arguments.json:
        print(json.dumps(page.as_dict(), indent=2))
    else:
        print(render(page, colour=sys.stdout.isatty() and "NO_COLOR" not in os.environ), end="")
    return 1 if page.failed else 0
