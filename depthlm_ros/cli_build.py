"""The command `depthlm build`: a TensorRT plan of an export, built and proved on the machine that runs it."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_command(commands) -> None:
    """Adds `build` to the parser's commands."""
    parser = commands.add_parser(
        "build",
        help="build the TensorRT plan of an export, on the machine that will run it",
        description="Builds model.plan beside the model.onnx of an export, then asks it what the checkpoint answered "
        "when it was exported. Takes minutes; a plan runs on this GPU, this board and this TensorRT only.",
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="what depthlm export --target onnx made")
    parser.add_argument(
        "--precision",
        choices=("fp32", "fp16", "bf16"),
        help="of the matrix products; all else and the depth head stay float32 (default: the export's)",
    )
    parser.add_argument(
        "--workspace-mb", type=int, default=0, metavar="MB", help="most memory for scratch (default: TensorRT's choice)"
    )
    parser.add_argument("--no-check", action="store_true", help="leave the check to the node's first start")
    parser.set_defaults(run=_build)


def _build(arguments: argparse.Namespace) -> int:
    from depthlm_ros.engines.tensorrt_engine import PLAN_FILE
    from depthlm_ros.errors import ConfigError
    from depthlm_ros.estimator import Estimator
    from depthlm_ros.plan_builder import build_plan

    if arguments.workspace_mb < 0:
        raise ConfigError(f"--workspace-mb is {arguments.workspace_mb}; give 0 or more")
    manifest = build_plan(arguments.folder, arguments.precision, workspace_mb=arguments.workspace_mb)
    built = manifest.built or {}
    where = ", ".join(built[name] for name in ("board", "gpu", "tensorrt") if built.get(name))
    print(f"{arguments.folder / PLAN_FILE}: {built['precision']}, for {where or 'this machine'}")
    if arguments.no_check:
        return 0
    with Estimator.load(str(arguments.folder), engine="tensorrt") as estimator:
        print(estimator.proof.sentence)
    return 0
