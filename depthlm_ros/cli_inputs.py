"""What several commands take from the command line: a camera, pixels, a labels file."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import yaml

from depthlm_ros.errors import CameraError, ConfigError


def add_camera_arguments(parser: argparse.ArgumentParser, description: str, of: str = "", suffix: str = "") -> None:
    """Adds `--fx --fy --cx --cy --fov-deg`, each with a suffix of the option's name for a second camera."""
    camera = parser.add_argument_group(f"camera{of}", description)
    camera.add_argument(f"--fx{suffix}", type=float, help="horizontal focal length in pixels")
    camera.add_argument(f"--fy{suffix}", type=float, help="vertical focal length in pixels; default: fx")
    camera.add_argument(
        f"--cx{suffix}", type=float, help="column of the principal point; default: the image centre"
    )
    camera.add_argument(f"--cy{suffix}", type=float, help="row of the principal point; default: the image centre")
    camera.add_argument(
        f"--fov-deg{suffix}", type=float, help=f"horizontal field of view in degrees, instead of --fx{suffix}"
    )


CAMERA_ARGUMENTS = ("camera", "size", "fx", "fy", "cx", "cy", "fov_deg")
"""Of `add_one_camera_arguments`; None where they weren't given."""


def add_one_camera_arguments(parser: argparse.ArgumentParser, description: str) -> None:
    """Adds the options of a camera without an image: a calibration file, or its size and those of its lens."""
    add_camera_arguments(parser, description)
    parser.add_argument("--camera", type=Path, metavar="FILE.yaml", help="a calibration file of ROS")
    parser.add_argument("--size", type=_size, metavar="WIDTHxHEIGHT", help="of the camera's image, such as 640x480")


def one_camera(arguments: argparse.Namespace):
    """The camera that `add_one_camera_arguments`' options describe.

    Raises:
        CameraError: a calibration file that is none, or values that can't be.
        ConfigError: neither a file nor a size.
    """
    if arguments.camera is not None:
        return read_calibration(arguments.camera)
    if arguments.size is None:
        raise ConfigError(
            "an engine is made for one camera; give its calibration file with --camera, or --size WIDTHxHEIGHT with "
            "--fx or --fov-deg"
        )
    return camera_of(arguments, *arguments.size)


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.partition("x")
    if not (width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise argparse.ArgumentTypeError(f"{text!r} isn't WIDTHxHEIGHT, such as 640x480")
    return int(width), int(height)


def read_calibration(path: Path):
    """The camera of a calibration file, as camera_calibration and camera drivers write it.

    Raises:
        CameraError: it can't be read, or lacks something.
    """
    from depthlm_ros.camera import Camera, Distortion

    try:
        told = yaml.safe_load(path.read_text(encoding="utf-8"))
        matrix = [float(value) for value in told["camera_matrix"]["data"]]
        coefficients = tuple(float(value) for value in told["distortion_coefficients"]["data"])
        model = told["distortion_model"]
        lens = Distortion(model, coefficients) if any(coefficients) else Distortion()
        return Camera(
            fx=matrix[0],
            fy=matrix[4],
            cx=matrix[2],
            cy=matrix[5],
            width=told["image_width"],
            height=told["image_height"],
            distortion=lens,
        )
    except (OSError, yaml.YAMLError, LookupError, TypeError, ValueError) as error:
        raise CameraError(
            f"{path} is no calibration ({type(error).__name__}: {error}); give a YAML file of camera_calibration, with "
            "image_width, image_height, camera_matrix, distortion_model and distortion_coefficients"
        ) from error


def camera_of(arguments: argparse.Namespace, width: int, height: int):
    """The camera that `--fx --fy --cx --cy` or `--fov-deg` describe.

    Raises:
        CameraError: neither or both of --fx and --fov-deg, or a value that can't be.
    """
    from depthlm_ros.camera import Camera

    if (arguments.fx is None) == (arguments.fov_deg is None):
        given = "neither --fx nor --fov-deg" if arguments.fx is None else "both --fx and --fov-deg"
        raise CameraError(
            f"{given} given; give one of them, for example --fx {0.9 * width:.0f} for this {width} px wide image "
            "if its horizontal field of view is 58 degrees"
        )
    fx = arguments.fx if arguments.fov_deg is None else focal_px(arguments.fov_deg, width)
    return Camera(
        fx=fx,
        fy=fx if arguments.fy is None else arguments.fy,
        cx=(width - 1) / 2 if arguments.cx is None else arguments.cx,
        cy=(height - 1) / 2 if arguments.cy is None else arguments.cy,
        width=width,
        height=height,
    )


def focal_px(fov_deg: float, width: int) -> float:
    """Focal length in pixels of a pinhole camera with this horizontal field of view.

    Raises:
        CameraError: an angle outside (0, 180).
    """
    if not 0 < fov_deg < 180:
        raise CameraError(f"field of view is {fov_deg} degrees; a pinhole camera's lies between 0 and 180")
    return width / 2 / math.tan(math.radians(fov_deg) / 2)


def numbers(count: int, form: str):
    """An argparse type for `count` numbers with commas between them, such as `12,34`."""

    def parse(text: str) -> tuple[float, ...]:
        try:
            values = tuple(float(part) for part in text.split(","))
        except ValueError:
            values = ()
        if len(values) != count or not all(map(math.isfinite, values)):
            raise argparse.ArgumentTypeError(f"{text!r} isn't {form}, {count} numbers with commas between them")
        return values

    return parse


def add_answer_kind_argument(group) -> None:
    """Adds `--answer-kind` to a group of options about the model."""
    group.add_argument(
        "--answer-kind",
        choices=("z", "euclidean"),
        help="what the model's answers are taken for: z-depth or Euclidean distance; default: what its card says",
    )


def add_reader_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds `--images --depths --depth-kind`, how a labels file is read."""
    group = parser.add_argument_group("labels file")
    group.add_argument("--images", type=Path, metavar="FOLDER", help="where its images lie; default: beside it")
    group.add_argument("--depths", type=Path, metavar="FOLDER", help="where its depth maps lie; default: beside it")
    group.add_argument(
        "--depth-kind", choices=("z", "euclidean"), default="z", help="what its depths measure (default z)"
    )
