"""The commands `depthlm bag ...`: make and inspect recordings, and make training sets of them."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from depthlm_ros.cli_inputs import add_reader_arguments, focal_px
from depthlm_ros.errors import MissingDependencyError


def add_commands(commands) -> None:
    """Adds `bag` with its commands to the parser's commands."""
    bag = commands.add_parser("bag", help="make and inspect recordings (rosbag2), make training sets of them")
    bag_commands = bag.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_render(bag_commands)
    _add_from_images(bag_commands)
    _add_to_sft(bag_commands)
    _add_info(bag_commands)


# ---------------------------------------------------------------- making recordings


def _add_writer_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--compressed", metavar="FORMAT", help="images as png, jpeg or jpeg:QUALITY; default: raw rgb8")
    parser.add_argument(
        "--depth-bits",
        type=int,
        default=23,
        help="mantissa bits kept of the ground truth (default 23, exact; 12 takes a third, error below 1.3e-4)",
    )


def _add_render(commands) -> None:
    parser = commands.add_parser(
        "render",
        help="render a synthetic drive with exact depth",
        description="Renders a drive through synthetic scenes and records image, camera_info and true depth.",
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="the rosbag2 folder to make")
    parser.add_argument("--seconds", type=float, default=5.0, help="length of the drive (default 5)")
    parser.add_argument("--fps", type=float, default=5.0, help="images a second (default 5)")
    parser.add_argument("--seed", type=int, default=0, help="of the scenes and the path (default 0)")
    parser.add_argument("--width", type=int, default=320, help="pixels (default 320)")
    parser.add_argument("--height", type=int, default=240, help="pixels (default 240)")
    parser.add_argument("--fov-deg", type=float, default=70.0, help="horizontal field of view (default 70)")
    _add_writer_options(parser)
    parser.set_defaults(run=_render)


def _render(arguments: argparse.Namespace) -> int:
    from depthlm_ros.bags import START_NS, RecordedFrame, write_bag
    from depthlm_ros.depth import Frame
    from depthlm_ros.evaluate import progress

    try:
        from depthlm_training.scenes import render_drive
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            "rendering needs the package's training part (depthlm_training), which this installation lacks; "
            "run 'pip install -e .' in a clone of the repository"
        ) from error
    count = round(arguments.seconds * arguments.fps)
    views = render_drive(
        count,
        width=arguments.width,
        height=arguments.height,
        focal_px=focal_px(arguments.fov_deg, arguments.width),
        seed=arguments.seed,
        fps=arguments.fps,
    )

    def frames() -> Iterator[RecordedFrame]:
        for index, (image, depth_m, camera) in enumerate(progress(views, count, "render")):
            yield RecordedFrame(Frame(image, camera, START_NS + round(index / arguments.fps * 1e9)), depth_m)

    command = (
        f"depthlm bag render OUT --seconds {arguments.seconds:g} --fps {arguments.fps:g} --seed {arguments.seed} "
        f"--width {arguments.width} --height {arguments.height} --fov-deg {arguments.fov_deg:g} "
        f"--depth-bits {arguments.depth_bits}"
    )
    if arguments.compressed:
        command += f" --compressed {arguments.compressed}"
    info = write_bag(
        arguments.out,
        frames(),
        compression=arguments.compressed,
        depth_bits=arguments.depth_bits,
        notes={"source": "rendered, not a photograph", "made by": command},
    )
    print(_described(info))
    return 0


def _add_from_images(commands) -> None:
    parser = commands.add_parser(
        "from-images",
        help="record labelled photographs",
        description="Makes a recording of a labels file: DepthLM's jsonl (points with depth, intrinsics) or "
        "DepthVLM's (depth maps). Which of the two it is, is seen from its keys.",
    )
    parser.add_argument("labels", type=Path, metavar="LABELS.jsonl")
    parser.add_argument("out", type=Path, metavar="OUT", help="the rosbag2 folder to make")
    parser.add_argument("--fps", type=float, default=2.0, help="images a second (default 2)")
    add_reader_arguments(parser)
    _add_writer_options(parser)
    parser.set_defaults(run=_from_images)


def _from_images(arguments: argparse.Namespace) -> int:
    from depthlm_ros.bags import START_NS, RecordedFrame, write_bag
    from depthlm_ros.datasets import LabelledImages
    from depthlm_ros.depth import Frame
    from depthlm_ros.evaluate import progress

    rows = LabelledImages(
        arguments.labels, images=arguments.images, depths=arguments.depths, depth_kind=arguments.depth_kind
    )
    notes: dict[str, None] = {}
    assumed = {"assumed": "; ".join(rows[0].notes)} if rows[0].notes else {}

    def frames() -> Iterator[RecordedFrame]:
        for index, row in enumerate(progress(rows, len(rows), "record")):
            notes.update(dict.fromkeys(row.notes))
            stamp_ns = START_NS + round(index / arguments.fps * 1e9)
            yield RecordedFrame(Frame(row.image, row.camera, stamp_ns), row.depth_map())

    info = write_bag(
        arguments.out,
        frames(),
        compression=arguments.compressed,
        depth_bits=arguments.depth_bits,
        notes={"source": f"{arguments.labels.name}, {rows.schema} schema", **assumed},
    )
    for note in notes:
        print(f"note: {note}")
    print(_described(info))
    return 0


# ---------------------------------------------------------------- training sets


def _add_to_sft(commands) -> None:
    parser = commands.add_parser(
        "to-sft",
        help="a training set from a recording",
        description="Labels a recording's images with depth and writes them in DepthLM's schema: OUT/train.jsonl, "
        "OUT/held_out.jsonl (the last part of the time), OUT/images and OUT/about.json with what was left out and why.",
    )
    parser.add_argument("bag", type=Path, metavar="BAG", help="a rosbag2 folder, or an .mcap or .db3 file")
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder to make")
    parser.add_argument("--topic", metavar="TOPIC", help="image topic; default: the first with a camera_info")
    parser.add_argument(
        "--depth", metavar="TOPIC", help="depth images registered to the colour image; default: the only ones there are"
    )
    lidar = parser.add_argument_group("LiDAR", "used where it is named or there are no depth images; needs /tf_static")
    lidar.add_argument("--cloud", metavar="TOPIC", help="its PointCloud2 topic; default: the only one there is")
    lidar.add_argument(
        "--beam-deg",
        type=float,
        default=2.0,
        metavar="DEG",
        help="angle between neighbouring beams: what lies behind points this close is hidden (default 2)",
    )
    lidar.add_argument(
        "--max-age", type=float, default=0.1, metavar="SECONDS", help="between an image and its cloud (default 0.1)"
    )
    lidar.add_argument(
        "--fixed-frame", metavar="FRAME", help="frame in which the world stands still; default: the root of /tf"
    )
    labels = parser.add_argument_group("labels")
    labels.add_argument("--points", type=int, default=100, help="labels an image, 0 for all (default 100)")
    labels.add_argument("--min-depth", type=float, default=0.1, metavar="M", help="nearest label (default 0.1)")
    labels.add_argument("--max-depth", type=float, default=100.0, metavar="M", help="farthest label (default 100)")
    labels.add_argument("--every", type=int, default=1, metavar="N", help="only each n-th image (default 1)")
    labels.add_argument("--seed", type=int, default=0, help="of the choice of points (default 0)")
    labels.add_argument("--format", default="png", help="of the images: png, jpeg or jpeg:QUALITY (default png)")
    split = parser.add_argument_group("held-out part")
    split.add_argument(
        "--held-out", type=float, default=0.2, metavar="SHARE", help="of the time, its end (default 0.2)"
    )
    split.add_argument(
        "--gap", type=float, default=0.5, metavar="SECONDS", help="before it, in neither part (default 0.5)"
    )
    parser.set_defaults(run=_to_sft)


def _to_sft(arguments: argparse.Namespace) -> int:
    from depthlm_ros.bag_labels import LabelSettings, make_set
    from depthlm_ros.evaluate import progress
    from depthlm_ros.lidar import LidarSettings

    settings = LabelSettings(
        points=arguments.points,
        min_depth_m=arguments.min_depth,
        max_depth_m=arguments.max_depth,
        every=arguments.every,
        held_out=arguments.held_out,
        gap_s=arguments.gap,
        seed=arguments.seed,
        images=arguments.format,
    )
    made = make_set(
        arguments.bag,
        arguments.out,
        settings,
        image_topic=arguments.topic,
        depth_topic=arguments.depth,
        cloud_topic=arguments.cloud,
        lidar=LidarSettings(arguments.beam_deg, arguments.max_age, arguments.fixed_frame),
        progress=progress,
    )
    print(f"{made.folder}: {made.labels} labels from {made.source}")
    print(f"  train.jsonl {made.train} images, held_out.jsonl {made.held_out}, {made.in_gap} between them left out")
    for what, causes in (("images", made.left_out), ("points", made.dropped)):
        if told := ", ".join(f"{cause} ({number})" for cause, number in causes.items() if number):
            print(f"  {what} left out: {told}")
    for note in made.notes:
        print(f"  note: {note}")
    return 0


# ---------------------------------------------------------------- inspecting


def _add_info(commands) -> None:
    parser = commands.add_parser("info", help="what a recording holds", description="Says what a recording holds.")
    parser.add_argument("bag", type=Path, metavar="BAG", help="a rosbag2 folder, or an .mcap or .db3 file")
    parser.set_defaults(run=_info)


def _info(arguments: argparse.Namespace) -> int:
    from depthlm_ros.bags import bag_info, read_frames

    info = bag_info(arguments.bag)
    print(_described(info))
    first = next(read_frames(arguments.bag))
    print(f"camera: {first.frame.camera}, frame {first.frame.frame_id!r}")
    return 0


def _described(info) -> str:
    lines = [f"{info.path}: {info.size_bytes / 1e6:.1f} MB, {info.duration_s:.1f} s"]
    lines += [f"  {name}  {kind}  {number} messages" for name, kind, number in info.topics]
    lines += [f"  {key}: {value}" for key, value in info.notes.items()]
    lines += [f"  ground truth: {info.truth_topic or 'none, so replay can time but not score it'}"]
    return "\n".join(lines)
