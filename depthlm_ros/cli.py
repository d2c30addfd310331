"""The command `depthlm`. Every subcommand imports what it needs when it runs, so that `--help` answers at once."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from depthlm_ros import cli_bag, cli_build, cli_doctor, cli_parity, cli_tasks, cli_train, config
from depthlm_ros.bench import command as bench
from depthlm_ros.cli_inputs import (
    add_answer_kind_argument,
    add_camera_arguments,
    add_reader_arguments,
    camera_of,
)
from depthlm_ros.config import ENGINE_SETTINGS
from depthlm_ros.errors import ConfigError, DatasetError, DepthLMError, ImageError
from depthlm_ros.protocols import PROTOCOLS, PUBLISHED_SAMPLES

MODEL_SETTINGS = ("model", "commercial_use", "dialect", "policy", "device", "dtype", "batch_size", *ENGINE_SETTINGS)
PIXEL_SETTINGS = ("points", "points_per_question", "stride", "sampling", "region", "densify", "undrawable")
ANSWER_SETTINGS = ("distribution", "depth_value", "calibration")
FILTERS = ("max_depth_m", "min_confidence")
RESULTS = Path("results/latest")


def main(argv: list[str] | None = None) -> int:
    """Runs one command.

    Returns:
        The exit code: 0; 1 after an error of ours or a file that can't be written, printed on standard error.
    """
    arguments = build_parser().parse_args(argv)
    try:
        code = arguments.run(arguments)
        sys.stdout.flush()  # here, where a reader that has gone is understood
        return code
    except DepthLMError as error:
        print(f"depthlm: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        # Whoever reads us (`| head`) has seen enough; the interpreter's last flush must not complain either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if error.filename is None:
            raise
        print(f"depthlm: can't use {error.filename}: {error.strerror}; name another place", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("depthlm: interrupted", file=sys.stderr)
        return 130


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = argparse.ArgumentParser(
        prog="depthlm", description="Metric depth from one camera image, by asking a vision-language model."
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_estimate(commands)
    _add_replay(commands)
    _add_evaluate(commands)
    cli_tasks.add_commands(commands)
    bench.add_command(commands)
    cli_bag.add_commands(commands)
    cli_train.add_commands(commands)
    cli_build.add_command(commands)
    cli_parity.add_command(commands)
    cli_doctor.add_command(commands)
    return parser


# ---------------------------------------------------------------- estimate


def _add_estimate(commands) -> None:
    parser = commands.add_parser(
        "estimate",
        help="depth of one image, without ROS",
        description="Asks the model about one image and writes a point cloud in metres (x right, y down, z forward).",
    )
    parser.add_argument("image", type=Path, metavar="IMAGE", help="a png or jpeg")
    parser.add_argument("--out", type=Path, required=True, metavar="CLOUD.ply", help="the point cloud to write")
    parser.add_argument(
        "--depth",
        type=Path,
        metavar="DEPTH",
        help="also write the depth image: .npy (float32 metres, NaN unknown) or .png (16 bits, millimetres, 0 unknown)",
    )
    add_camera_arguments(parser, "give --fx or --fov-deg; depth in metres depends on it")
    _add_model(parser, MODEL_SETTINGS)
    config.add_arguments(parser.add_argument_group("pixels"), (*PIXEL_SETTINGS, *ANSWER_SETTINGS, *FILTERS))
    parser.set_defaults(run=_estimate)


def _add_model(parser: argparse.ArgumentParser, settings: tuple[str, ...]) -> None:
    """The options of commands that load the model in this process."""
    group = parser.add_argument_group("model")
    config.add_arguments(group, settings)
    add_answer_kind_argument(group)


def _load(arguments: argparse.Namespace, parameters: config.Parameters):
    from depthlm_ros.estimator import Estimator

    return Estimator.load(**parameters.load_arguments(), depth_kind=arguments.answer_kind)


def _estimate(arguments: argparse.Namespace) -> int:
    import numpy as np
    from tqdm import tqdm

    from depthlm_ros.inference import check_answers
    from depthlm_ros.photographs import read_photograph
    from depthlm_ros.ply import write_ply
    from depthlm_ros.queries import ask_frame, densified_image, depth_image, keep_good, points_asked

    parameters = config.from_arguments(arguments)
    if arguments.depth is not None and arguments.depth.suffix not in (".npy", ".png"):
        raise ImageError(f"depth file {arguments.depth} has suffix {arguments.depth.suffix!r}; use .npy or .png")
    if parameters.densify and arguments.depth is None:
        raise ConfigError("--densify fills the depth image; name one with --depth")
    image = read_photograph(arguments.image, upright=True)
    camera = camera_of(arguments, image.shape[1], image.shape[0])
    estimator = _load(arguments, parameters)
    for line in estimator.describe():
        print(line)
    dialect = parameters.dialect or estimator.card.default_dialect
    check_answers(estimator, parameters, dialect)
    count = points_asked(parameters, dialect)
    with tqdm(total=count or None, desc="estimate", unit="point", disable=None) as bar:
        query, answer = ask_frame(
            estimator,
            image,
            camera,
            parameters,
            dialect,
            whole=arguments.depth is not None,
            progress=bar.update,
            undrawable=parameters.undrawable,
            **parameters.answer_arguments(),
        )
    result = keep_good(answer, parameters)
    cloud = slice(None) if query.cloud_rows is None else query.cloud_rows
    pixels, depth_m = result.pixels[cloud], result.depth_m[cloud]
    columns, rows = pixels.astype(int).T
    xyz_m = camera.unproject(pixels, depth_m)
    comment = f"depthlm estimate {arguments.image}"
    written = write_ply(arguments.out, xyz_m, image[rows, columns], result.confidence[cloud], comment)
    seconds = sum(result.timing_s.values())
    asked = int(result.asked.sum())
    print(f"asked {asked} pixels ({dialect}), {int(result.valid.sum())} answers in {seconds:.2f} s")
    if asked < len(result):
        why = "too near the border (--undrawable shift asks beside them) or " if dialect == "marker" else ""
        print(f"not askable: {len(result) - asked} pixels, {why}out of the model's view")
    if result.shifted.any():
        print(f"asked beside the pixel: {int(result.shifted.sum())}, too near the border for the marker")
    if result.valid.any():
        low, middle, high = np.nanpercentile(result.depth_m, (5, 50, 95))
        print(f"depth: median {middle:.2f} m, 5 % to 95 %: {low:.2f} m to {high:.2f} m")
    print(f"wrote {arguments.out} ({written} points)")
    if arguments.depth is not None:
        if parameters.densify and count:
            depth_m = densified_image(answer, image, parameters)
            print(f"the depth image is filled in between the {int(answer.valid.sum())} points")
        else:
            depth_m = depth_image(result, camera.width, camera.height)
        _write_depth(arguments.depth, depth_m)
    return 0 if written else 1


def _write_depth(path: Path, depth_m) -> None:
    import numpy as np

    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, depth_m)
    else:
        from PIL import Image

        millimetres = np.clip(np.rint(np.nan_to_num(depth_m) * 1000), 0, 65535).astype(np.uint16)
        Image.fromarray(millimetres).save(path)
    print(f"wrote {path} ({depth_m.shape[1]}x{depth_m.shape[0]}, {int(np.isfinite(depth_m).sum())} pixels with depth)")


# ---------------------------------------------------------------- replay and evaluate


def _add_replay(commands) -> None:
    parser = commands.add_parser(
        "replay",
        help="play a recording to the node in another process and score its clouds",
        description="Starts depth_node in another process, publishes the recording's images to it, collects its "
        "clouds and scores them where the recording has ground truth. Exit code 1 if no cloud came.",
    )
    parser.add_argument(
        "bag",
        type=Path,
        nargs="?",
        metavar="BAG",
        help="a rosbag2 folder, or an .mcap or .db3 file; default: the drive that ships with the package",
    )
    parser.add_argument("--topic", metavar="TOPIC", help="image topic to play; default: the first with a camera_info")
    parser.add_argument(
        "--rate",
        type=float,
        help="play in real time, this many times the recorded speed, and count the frames that the node drops; "
        "default: in lockstep, the next image goes out when the cloud of the last one came in",
    )
    parser.add_argument(
        "--timeout", type=float, default=60.0, metavar="SECONDS", help="wait for one cloud (default 60)"
    )
    parser.add_argument(
        "--startup-timeout", type=float, default=180.0, metavar="SECONDS", help="wait for the node (default 180)"
    )
    parser.add_argument("--frames", type=int, default=0, help="play only this many images; default: all")
    parser.add_argument(
        "--match-px",
        type=float,
        default=2.0,
        help="sparse ground truth is compared with the nearest answer within this many pixels (default 2)",
    )
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FOLDER", help=f"results (default {RESULTS})")
    config.add_arguments(parser.add_argument_group("model"), MODEL_SETTINGS)
    config.add_arguments(parser.add_argument_group("pixels"), (*PIXEL_SETTINGS, *ANSWER_SETTINGS))
    parser.set_defaults(run=_replay)


def _replay(arguments: argparse.Namespace) -> int:
    from depthlm_ros.cards import models_dir
    from depthlm_ros.replay import ReplayOptions, replay
    from depthlm_ros.report import summary, write_report

    given = {name: getattr(arguments, name) for name in MODEL_SETTINGS + PIXEL_SETTINGS + ANSWER_SETTINGS}
    changed = {name: value for name, value in given.items() if value != config.spec(name).default}
    options = ReplayOptions(
        topic=arguments.topic,
        rate=arguments.rate,
        timeout_s=arguments.timeout,
        startup_timeout_s=arguments.startup_timeout,
        frames=arguments.frames,
        match_px=arguments.match_px,
    )
    bag = arguments.bag or models_dir() / "sample_drive"
    with _mentioning_earlier_report(arguments.out):
        run = replay(bag, changed, options, log_folder=arguments.out / "log")
    print(summary(run))
    for path in write_report(arguments.out, run):
        print(f"wrote {path}")
    return 0 if run.tally.frames and not run.broke_off else 1


@contextlib.contextmanager
def _mentioning_earlier_report(folder: Path) -> Iterator[None]:
    """Where a command fails, says that the report in its results folder isn't its own; deleting it would be a loss."""
    try:
        yield
    except DepthLMError:
        if (folder / "report.html").exists():
            print(f"depthlm: the report in {folder} is that of an earlier run", file=sys.stderr)
        raise


def _add_evaluate(commands) -> None:
    parser = commands.add_parser(
        "evaluate",
        help="score the model at labelled pixels, without ROS",
        description="Asks the model in this process exactly at pixels whose depth is known, and scores it.",
    )
    parser.add_argument("source", type=Path, metavar="LABELS|BAG", help="a labels file (.jsonl) or a recording")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FOLDER", help=f"results (default {RESULTS})")
    parser.add_argument("--seed", type=int, default=0, help="of the choice among many labels (default 0)")
    protocol = parser.add_argument_group("published protocols")
    protocol.add_argument(
        "--protocol",
        choices=PROTOCOLS,
        help="ask and count as a published evaluation does: DepthLM's dataset_eval or dataset_inference, whose "
        "metric's verdict is printed beside our stricter parser's, or DepthVLM-Bench's mean over images",
    )
    protocol.add_argument(
        "--samples",
        type=int,
        help="only the first questions of the protocol (depthvlm_bench: images), 0 for all; default: as published, "
        f"{PUBLISHED_SAMPLES} questions or all images",
    )
    add_reader_arguments(parser)
    _add_model(parser, (*MODEL_SETTINGS, "points", "points_per_question", *ANSWER_SETTINGS))
    between = parser.add_argument_group(
        "depth between points", "scored beside the asked points, not with them; points are then placed by --sampling"
    )
    config.add_arguments(between, ("sampling", "densify"))
    parser.set_defaults(run=_evaluate)


def _evaluate(arguments: argparse.Namespace) -> int:
    from depthlm_ros import benchmark
    from depthlm_ros.evaluate import evaluate, labelled
    from depthlm_ros.report import summary, write_report

    parameters = config.from_arguments(arguments)
    reader = {"images": arguments.images, "depths": arguments.depths, "depth_kind": arguments.depth_kind}
    dialect = parameters.dialect or None
    with _mentioning_earlier_report(arguments.out):
        _check_protocol(arguments)
        labelled(arguments.source, **reader)
        with _load(arguments, parameters) as estimator:
            for assumption in estimator.card.assumptions:
                print(f"assumed: {assumption}")
            if arguments.protocol:
                run = benchmark.run_protocol(
                    arguments.source,
                    estimator,
                    arguments.protocol,
                    samples=arguments.samples,
                    dialect=dialect,
                    **reader,
                )
            else:
                run = evaluate(
                    arguments.source,
                    estimator,
                    dialect=dialect,
                    points=parameters.points,
                    **parameters.answer_arguments(),
                    densify=parameters.densify,
                    sampling=parameters.sampling,
                    seed=arguments.seed,
                    **reader,
                )
    print(summary(run))
    if arguments.protocol:
        print(benchmark.summary(run))
    for path in write_report(arguments.out, run):
        print(f"wrote {path}")
    return 1 if run.broke_off else 0


def _check_protocol(arguments: argparse.Namespace) -> None:
    from depthlm_ros.benchmark import check_protocol

    if arguments.sampling != config.spec("sampling").default and not arguments.densify:
        raise ConfigError(
            f"--sampling {arguments.sampling} places the points of --densify; without it, labels are asked"
        )
    if arguments.protocol is None:
        if arguments.samples is not None:
            raise ConfigError(f"--samples {arguments.samples} counts a protocol's questions; name one with --protocol")
        return
    if arguments.samples is not None and arguments.samples < 0:
        raise ConfigError(f"--samples is {arguments.samples}; give 0 for all, or how many")
    for name in ("points", "seed", "distribution", "densify"):
        if getattr(arguments, name):
            raise ConfigError(f"--{name} {getattr(arguments, name)} has no meaning with --protocol; leave it out")
    if arguments.source.suffix != ".jsonl":
        raise DatasetError(f"--protocol needs a labels file (.jsonl), not {arguments.source}")
    check_protocol(arguments.protocol)


if __name__ == "__main__":
    sys.exit(main())
