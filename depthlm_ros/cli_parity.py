"""The command `depthlm parity`: does an engine answer as its reference does?"""

from __future__ import annotations

import argparse
from pathlib import Path

from depthlm_ros import config
from depthlm_ros.errors import ConfigError

_OF_THE_GATE = ("reference", "accept_unproven")
SETTINGS = ("device", "dtype", "policy", *(name for name in config.ENGINE_SETTINGS if name not in _OF_THE_GATE))


def add_command(commands) -> None:
    """Adds the command to the parser's commands."""
    parser = commands.add_parser(
        "parity",
        help="does an engine answer as its reference does?",
        description="Asks REFERENCE and CANDIDATE about the same frames and compares: dense maps must agree within "
        "1 %% (median), in scale (1 +- 0.01) and in order (rank correlation 0.999) in every frame, answers in words in "
        "99 of 100. Exit status 0 when they agree, 2 when they don't.",
    )
    # `reference` is a setting of the node.
    parser.add_argument("first", metavar="REFERENCE", help="a model, or a folder of recorded answers or an export")
    parser.add_argument("candidate", nargs="?", metavar="CANDIDATE", help="a model, an export, or a server's model")
    parser.add_argument("--record", type=Path, metavar="FOLDER", help="keep REFERENCE's answers for other machines")
    parser.add_argument("--bag", type=Path, help="ask about frames of a recording instead of the shipped drive")
    parser.add_argument("--dialects", default="", metavar="A,B", help="to ask in; default: all that are spoken")
    parser.add_argument(
        "--reference-dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="number format of REFERENCE where it is a model (default float32)",
    )
    config.add_arguments(parser.add_argument_group("candidate"), SETTINGS)
    parser.set_defaults(run=_parity)


def _parity(arguments: argparse.Namespace) -> int:
    from depthlm_ros.estimator import Estimator
    from depthlm_ros.parity import check

    if (arguments.candidate is None) == (arguments.record is None):
        raise ConfigError("name a CANDIDATE to compare with REFERENCE, or --record FOLDER to keep its answers")
    if arguments.record is not None:
        reference = _recorded(arguments, arguments.record)
        print(f"wrote {arguments.record}: {len(reference.asked)} sets of answers of {reference.engine}")
        return 0
    parameters = config.from_arguments(arguments)
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


def _reference(arguments: argparse.Namespace):
    """The answers to compare with: those that were recorded, or what a model answers now."""
    import tempfile

    from depthlm_ros.manifest import REFERENCE_FOLDER
    from depthlm_ros.parity import REFERENCE_FILE, read_reference

    given = Path(arguments.first)
    for folder in (given, given / REFERENCE_FOLDER):
        if (folder / REFERENCE_FILE).is_file():
            return read_reference(folder)
    with tempfile.TemporaryDirectory() as scratch:
        return _recorded(arguments, Path(scratch) / "reference")


def _recorded(arguments: argparse.Namespace, folder: Path):
    from depthlm_ros.estimator import Estimator
    from depthlm_ros.manifest import read_manifest
    from depthlm_ros.parity import camera_of, default_frames, record_reference, recorded_frames

    if arguments.bag is not None:
        frames = recorded_frames(arguments.bag)
    else:
        # An export is for one camera.
        manifest = read_manifest(Path(arguments.candidate or ""))
        camera = camera_of(dict(manifest.camera)) if manifest is not None and manifest.camera else None
        frames = default_frames(camera)
    dialects = tuple(filter(None, arguments.dialects.split(",")))
    with Estimator.load(arguments.first, dtype=arguments.reference_dtype) as estimator:
        return record_reference(estimator, frames, folder, dialects or None)
