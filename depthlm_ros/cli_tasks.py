"""The commands `depthlm ask`, `depthlm match` and `depthlm pose`: what a model can be asked besides depth."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from types import SimpleNamespace

from depthlm_ros import config
from depthlm_ros.cli_inputs import add_camera_arguments, camera_of, numbers
from depthlm_ros.errors import CameraError, ConfigError, ImageError, PixelError

SETTINGS = ("model", "commercial_use", "policy", "device", "dtype", "batch_size")
DEFAULT_POINTS = 64


def add_commands(commands) -> None:
    """Adds the three commands to the parser's commands."""
    _add_ask(commands)
    _add_match(commands)
    _add_pose(commands)


# ---------------------------------------------------------------- ask


def _add_ask(commands) -> None:
    parser = commands.add_parser(
        "ask",
        help="ask a free question about an image",
        description="Puts a question to the model in your own words and prints its answer. Any model can be asked; "
        "questions about boxes (--box) need one that was trained for objects.",
    )
    parser.add_argument("image", type=Path, metavar="IMAGE", help="a png or jpeg")
    parser.add_argument("question", metavar="QUESTION", help='in quotes, such as "What is on the table?"')
    parser.add_argument("--second", type=Path, metavar="IMAGE", help="a second image, shown after the first")
    parser.add_argument(
        "--box",
        type=numbers(4, "X1,Y1,X2,Y2"),
        action="append",
        default=[],
        metavar="X1,Y1,X2,Y2",
        help="a box in pixels for the next <mask> in the question; once for each; needs the camera",
    )
    parser.add_argument("--max-new-tokens", type=int, default=512, help="longest answer in tokens (default 512)")
    add_camera_arguments(parser, "optional: shows the image at the focal length that the model was trained with")
    _add_model(parser)
    parser.set_defaults(run=_ask)


def _ask(arguments: argparse.Namespace) -> int:
    from depthlm_ros.photographs import read_photograph

    paths = [arguments.image] + ([arguments.second] if arguments.second else [])
    images = [read_photograph(path, upright=True) for path in paths]
    known = arguments.fx is not None or arguments.fov_deg is not None
    cameras = [camera_of(arguments, image.shape[1], image.shape[0]) if known else None for image in images]
    if arguments.max_new_tokens < 1:
        raise ConfigError(f"--max-new-tokens is {arguments.max_new_tokens}; it must be at least 1")
    if not arguments.box:
        assistant = _assistant(arguments, None)
        answer = assistant.ask_about(
            images, [arguments.question], cameras, max_new_tokens=arguments.max_new_tokens
        )[0]  # fmt: skip
        print(answer.text.strip())
        return 0
    if len(images) > 1:
        raise ConfigError(f"--second {arguments.second} and --box can't go together; ask about boxes in one image")
    if cameras[0] is None:
        raise CameraError("--box needs the camera; give --fx or --fov-deg")
    answer = _assistant(arguments, "object").ask_objects(images[0], cameras[0], arguments.question, arguments.box)
    print(answer.text.strip())
    return 0


# ---------------------------------------------------------------- match


def _add_match(commands) -> None:
    parser = commands.add_parser(
        "match",
        help="find pixels of one image in another",
        description="Asks the model which pixel of image B shows what a pixel of image A shows. Exit code 1 if no "
        "answer names a pixel.",
    )
    parser.add_argument("a", type=Path, metavar="A", help="a png or jpeg")
    parser.add_argument("b", type=Path, metavar="B", help="another one, of any size")
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--pixels", type=numbers(2, "U,V"), nargs="+", metavar="U,V", help="pixels of A: column,row, from 0"
    )
    # Not the setting of this name, which is about depth.
    which.add_argument(
        "--points",
        dest="match_points",
        type=int,
        metavar="N",
        help=f"this many pixels of A on an even grid (default {DEFAULT_POINTS})",
    )
    parser.add_argument("--think", action="store_true", help="let the model think before each answer; slower")
    _add_out(parser, "matches.json or matches.png (both images with lines between them)", (".json", ".png"))
    _add_model(parser)
    parser.set_defaults(run=_match)


def _match(arguments: argparse.Namespace) -> int:
    import numpy as np

    from depthlm_ros.photographs import read_photograph
    from depthlm_ros.sampling import sample_pixels
    from depthlm_ros.tasks import checked_pixels

    _check_out(arguments)
    image_a, image_b = (read_photograph(path, upright=True) for path in (arguments.a, arguments.b))
    height, width = image_a.shape[:2]
    if arguments.pixels is None:
        count = DEFAULT_POINTS if arguments.match_points is None else arguments.match_points
        if count < 1:
            raise PixelError(f"--points is {count}; it must be at least 1")
        pixels = sample_pixels(width, height, count)
    else:
        pixels = checked_pixels(np.array(arguments.pixels), width, height)
    result = _assistant(arguments, "correspondence").match(image_a, image_b, pixels, think=arguments.think)
    for (u, v), at, text in zip(result.pixels_a, result.pixels_b, result.texts, strict=True):
        there = f"({at[0]:.1f}, {at[1]:.1f})" if np.isfinite(at).all() else f"not understood: {text!r}"
        print(f"({u:g}, {v:g}) -> {there}")
    print(f"{int(result.valid.sum())} of {len(result)} pixels of {arguments.a} found in {arguments.b}")
    for path in arguments.out:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".png":
            _draw_matches(image_a, image_b, result).save(path)
        else:
            rows = [
                {"pixel_a": a.tolist(), "pixel_b": _plain(b), "units_b": _plain(units), "text": text}
                for a, b, units, text in zip(
                    result.pixels_a, result.pixels_b, result.units_b, result.texts, strict=True
                )
            ]
            images = {
                name: {"path": str(path_of), "width": image.shape[1], "height": image.shape[0]}
                for name, path_of, image in (("a", arguments.a, image_a), ("b", arguments.b, image_b))
            }
            _write_json(path, {"model": arguments.model, "images": images, "matches": rows})
        print(f"wrote {path}")
    return 0 if result.valid.any() else 1


def _draw_matches(image_a, image_b, result):
    """Both images side by side with a line of its own colour for each match."""
    import colorsys

    from PIL import Image, ImageDraw

    (height_a, width_a), (height_b, width_b) = image_a.shape[:2], image_b.shape[:2]
    picture = Image.new("RGB", (width_a + width_b, max(height_a, height_b)))
    picture.paste(Image.fromarray(image_a), (0, 0))
    picture.paste(Image.fromarray(image_b), (width_a, 0))
    draw = ImageDraw.Draw(picture)
    radius = max(2, max(picture.size) // 300)
    for row in result.valid.nonzero()[0]:
        hue = row / len(result)
        colour = tuple(round(255 * part) for part in colorsys.hsv_to_rgb(hue, 0.9, 1.0))
        start, end = result.pixels_a[row], result.pixels_b[row] + (width_a, 0)
        draw.line([*start, *end], fill=colour, width=max(1, radius // 2))
        for u, v in (start, end):
            draw.ellipse([u - radius, v - radius, u + radius, v + radius], outline=colour)
    return picture


# ---------------------------------------------------------------- pose


def _add_pose(commands) -> None:
    parser = commands.add_parser(
        "pose",
        help="how the camera moved and turned between two images",
        description="Asks the model where camera B is, seen from camera A (x right, y down, z forward), and how it is "
        "turned: yaw (positive right), pitch (positive up), roll (positive right side down), in this order. Exit code "
        "1 if no answer was understood.",
    )
    parser.add_argument("a", type=Path, metavar="A", help="a png or jpeg")
    parser.add_argument("b", type=Path, metavar="B", help="another one")
    add_camera_arguments(parser, "give --fx or --fov-deg; metres depend on it")
    add_camera_arguments(parser, "only if B is of another camera than A", " of B", "-b")
    _add_out(parser, "pose.json", (".json",))
    _add_model(parser)
    parser.set_defaults(run=_pose)


def _pose(arguments: argparse.Namespace) -> int:
    from depthlm_ros.photographs import read_photograph

    _check_out(arguments)
    image_a, image_b = (read_photograph(path, upright=True) for path in (arguments.a, arguments.b))
    camera_a, camera_b = cameras_of_pair(arguments, image_a.shape[:2], image_b.shape[:2])
    said = _assistant(arguments, "pose").relative_pose(image_a, camera_a, image_b, camera_b)
    angles = (said.yaw_deg, said.pitch_deg, said.roll_deg)
    lines = {
        "rotation_angle": ((said.rotation_deg,), "rotation angle: {:.1f} degrees"),
        "euler_natural": (angles, "yaw {:+.1f}, pitch {:+.1f}, roll {:+.1f} degrees"),
        "translation_direction": (said.direction, "direction: {:+.2f} right, {:+.2f} down, {:+.2f} forward"),
        "translation_distance": ((said.distance_m,), "distance: {:.2f} m"),
    }
    understood = 0
    for question, (values, form) in lines.items():
        good = all(map(math.isfinite, values))
        understood += good
        print(form.format(*values) if good else f"{question} not understood: {said.texts[question]!r}")
    for path in arguments.out:
        path.parent.mkdir(parents=True, exist_ok=True)
        pose = {
            "rotation_deg": _plain(said.rotation_deg),
            **{f"{name}_deg": _plain(angle) for name, angle in zip(("yaw", "pitch", "roll"), angles, strict=True)},
            "rotation_matrix": _plain(said.rotation_matrix()),
            "quaternion_xyzw": _plain(said.quaternion_xyzw()),
            "direction": _plain(said.direction),
            "distance_m": _plain(said.distance_m),
            "translation_m": _plain(said.translation_m()),
        }
        _write_json(path, {"model": arguments.model, "a": str(arguments.a), "b": str(arguments.b)} | pose
                    | {"texts": dict(said.texts)})  # fmt: skip
        print(f"wrote {path}")
    return 0 if understood else 1


def cameras_of_pair(arguments: argparse.Namespace, size_a: tuple[int, int], size_b: tuple[int, int]):
    """The cameras of two images of these (height, width); the second is the first unless it was described.

    Raises:
        CameraError: a camera that can't be, or images of different sizes and one camera given in pixels.
    """
    names = ("fx", "fy", "cx", "cy", "fov_deg")
    second = {name: getattr(arguments, f"{name}_b") for name in names}
    first = {name: getattr(arguments, name) for name in names}
    own = any(value is not None for value in second.values())
    if not own and size_a != size_b and arguments.fx is not None:
        raise CameraError(
            f"the images are {size_a[1]}x{size_a[0]} and {size_b[1]}x{size_b[0]}, so one --fx can't be of both; "
            "give --fx-b or --fov-deg-b too"
        )
    camera_a = camera_of(SimpleNamespace(**first), size_a[1], size_a[0])
    return camera_a, camera_of(SimpleNamespace(**(second if own else first)), size_b[1], size_b[0])


# ---------------------------------------------------------------- what they share


def _add_model(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    config.add_arguments(group, SETTINGS)
    group.add_argument(
        "--force", action="store_true", help="ask even if the model's card doesn't name the task; for experiments"
    )


def _add_out(parser: argparse.ArgumentParser, help_text: str, suffixes: tuple[str, ...]) -> None:
    parser.add_argument(
        "--out", type=Path, action="append", default=[], metavar="FILE", help=f"also write {help_text}; may be repeated"
    )
    parser.set_defaults(out_suffixes=suffixes)


def _check_out(arguments: argparse.Namespace) -> None:
    for path in arguments.out:
        if path.suffix not in arguments.out_suffixes:
            known = " or ".join(arguments.out_suffixes)
            raise ImageError(f"output file {path} has suffix {path.suffix!r}; use {known}")


def _assistant(arguments: argparse.Namespace, task: str | None):
    """The loaded model; one that isn't for the task is refused before its weights are read."""
    from depthlm_ros.assistant import Assistant
    from depthlm_ros.cards import load_card
    from depthlm_ros.estimator import Estimator

    parameters = config.from_arguments(arguments)
    if task is not None and not arguments.force:
        load_card(parameters.model, commercial_use=parameters.commercial_use)[0].require_task(task)
    return Assistant(Estimator.load(**parameters.load_arguments()), force=arguments.force)


def _plain(values):
    """Numbers for JSON: lists, to a millionth, and None where something is NaN."""
    import numpy as np

    array = np.asarray(values, np.float64)
    return array.round(6).tolist() if np.isfinite(array).all() else None


def _write_json(path: Path, data: dict) -> None:
    path.write_text(json.dumps(data, indent=2, allow_nan=False) + "\n", encoding="utf-8")
