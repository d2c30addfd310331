"""The command `depthlm parity`: does an engine answer as its reference does?"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from depthlm_ros import config
from depthlm_ros.cli_inputs import add_one_camera_arguments, one_camera
from depthlm_ros.errors import ConfigError

if TYPE_CHECKING:
    from depthlm_ros.references import Reference, ReferenceFrame

_OF_THE_GATE = ("reference", "accept_unproven")
SETTINGS = ("device", "dtype", "policy", *(name for name in config.ENGINE_SETTINGS if name not in _OF_THE_GATE))


def add_command(commands) -> None:
    """Adds the command to the parser's commands."""
    parser = commands.add_parser(
        "parity",
        help="does an engine answer as its reference does?",
        description="Asks REFERENCE and CANDIDATE about the same frames and compares: dense maps must agree within "
        "1 %% (median; 5 %% for 95 of 100), in scale (1 +- 0.01) and in order (rank correlation 0.999) in every frame, "
        "answers in words in 99 of 100. Exit status 0 when they agree, 2 when they don't.",
    )
    # `reference` is a setting of the node.
    parser.add_argument("first", metavar="REFERENCE", help="a model, or a folder of recorded answers or an export")
    parser.add_argument("candidate", nargs="?", metavar="CANDIDATE", help="a model, an export, or a server's model")
    asked = parser.add_argument_group("what a model as REFERENCE is asked")
    asked.add_argument("--record", type=Path, metavar="FOLDER", help="keep its answers for other machines")
    asked.add_argument("--bag", type=Path, help="about frames of a recording; default: the shipped drive")
    asked.add_argument("--dialects", default="", metavar="A,B", help="in these; default: all that it speaks")
    asked.add_argument(
        "--reference-dtype", choices=("float32", "bfloat16", "float16"), help="its number format (default float32)"
    )
    add_one_camera_arguments(parser, "of rendered frames, instead of the shipped drive's; an export has its own")
    config.add_arguments(parser.add_argument_group("candidate"), SETTINGS)
    parser.set_defaults(run=_parity)


def _parity(arguments: argparse.Namespace) -> int:
    from depthlm_ros.estimator import Estimator
    from depthlm_ros.parity import check

    if (arguments.candidate is None) == (arguments.record is None):
        raise ConfigError("name a CANDIDATE to compare with REFERENCE, or --record FOLDER to keep its answers")
    parameters = config.from_arguments(arguments)
    if arguments.record is not None:
        changed = [name for name in SETTINGS if getattr(parameters, name) != config.spec(name).default]
        if changed:
            raise ConfigError(
                f"--{changed[0].replace('_', '-')} is about a CANDIDATE, and --record has none; REFERENCE is run by "
                "transformers, in --reference-dtype"
            )
        reference = _recorded(arguments, arguments.record)
        print(f"wrote {arguments.record}: {len(reference.asked)} sets of answers of {reference.engine}")
        return 0
    reference = _reference(arguments)
    loading = {**parameters.load_arguments(), "model": arguments.candidate, "check_parity": False}
    with Estimator.load(**loading) as candidate:
        for line in candidate.describe():
            print(line)
        verdict = check(candidate, reference)
    print(f"reference: {reference.model}, {reference.engine}, {len(reference.frames)} frames")
    for name, value in verdict.figures.items():
        print(f"  {name}: {value:.6g}")
    for told in (*verdict.failures, *verdict.reasons):
        print(f"  {told}")
    print("PASSED" if verdict.passed else "REFUSED")
    return 0 if verdict.passed else 2


def _reference(arguments: argparse.Namespace) -> Reference:
    """The answers to compare with: those that were recorded, or what a model answers now."""
    from depthlm_ros.manifest import REFERENCE_FOLDER
    from depthlm_ros.references import REFERENCE_FILE, read_reference

    given = Path(arguments.first).expanduser()
    for folder in (given, given / REFERENCE_FOLDER):
        if (folder / REFERENCE_FILE).is_file():
            asked = ("bag", "dialects", "reference_dtype", "camera", "size")
            told = [name for name in asked if getattr(arguments, name)]
            if told:
                raise ConfigError(
                    f"--{told[0].replace('_', '-')} is about a model as REFERENCE, and {folder} holds recorded "
                    "answers; leave it out, or record others"
                )
            return read_reference(folder)
    with tempfile.TemporaryDirectory() as scratch:
        return _recorded(arguments, Path(scratch) / "reference")


def _recorded(arguments: argparse.Namespace, folder: Path) -> Reference:
    from depthlm_ros.estimator import Estimator
    from depthlm_ros.parity import record_reference

    frames = _frames(arguments)
    dialects = tuple(filter(None, arguments.dialects.split(",")))
    with Estimator.load(arguments.first, dtype=arguments.reference_dtype or "float32") as estimator:
        return record_reference(estimator, frames, folder, dialects or None)


def _frames(arguments: argparse.Namespace) -> list[ReferenceFrame]:
    from depthlm_ros.manifest import read_manifest
    from depthlm_ros.references import camera_of, default_frames, recorded_frames

    if arguments.bag is not None:
        return recorded_frames(arguments.bag)
    if arguments.camera is not None or arguments.size is not None:
        return default_frames(one_camera(arguments))
    if arguments.candidate is not None:
        # An export is for one camera.
        manifest = read_manifest(Path(arguments.candidate).expanduser())
        if manifest is not None and manifest.camera:
            return default_frames(camera_of(dict(manifest.camera)))
    return default_frames()
