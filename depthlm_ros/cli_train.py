"""The commands `depthlm finetune` and `depthlm export`: from labels to a model that the node loads."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path

from depthlm_ros.cli_inputs import CAMERA_ARGUMENTS, add_one_camera_arguments, one_camera
from depthlm_ros.errors import ConfigError, MissingDependencyError
from depthlm_ros.manifest import TARGETS


def add_commands(commands) -> None:
    """Adds both commands to the parser's commands."""
    _add_finetune(commands)
    _add_export(commands)


def _add_finetune(commands) -> None:
    parser = commands.add_parser(
        "finetune",
        help="teach a model depth on labels of your own",
        description="Trains a model further on a folder of 'depthlm bag to-sft' or a labels file: all dialects that it "
        "speaks, small models as a whole, large ones by LoRA. Interrupted, --resume goes on from the last checkpoint. "
        "When it has ended, RUN is a model: depthlm evaluate --model RUN.",
    )
    parser.add_argument("labels", type=Path, metavar="SET", help="a folder of 'bag to-sft', or a .jsonl of labels")
    parser.add_argument("--out", type=Path, required=True, metavar="RUN", help="the folder of the run")
    parser.add_argument("--model", default="demo", help="what to start from: a name, folder or hub id (default demo)")
    parser.add_argument(
        "--dialects", default="", metavar="A,B", help="what to teach; default: all that the model's card names"
    )
    parser.add_argument(
        "--depth-kind", choices=("z", "euclidean"), default="z", help="what the labels measure (default z)"
    )
    parser.add_argument("--steps", type=int, default=300, help="optimiser steps (default 300)")
    parser.add_argument("--lr", type=float, help="largest learning rate; default: 1e-4, with LoRA 2e-4")
    parser.add_argument("--images", type=int, default=4, help="of a step (default 4)")
    parser.add_argument("--points", type=int, default=10, help="questions about an image (default 10)")
    parser.add_argument(
        "--lora",
        type=int,
        metavar="RANK",
        help="of adapters, 0 to train the whole model; default: 16 for more than 500 million weights, else 0",
    )
    parser.add_argument("--resume", action="store_true", help="go on from the run's last checkpoint, if there is one")
    parser.add_argument("--dry-run", action="store_true", help="print all settings and one sample, train nothing")
    parser.add_argument(
        "--set",
        dest="settings",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="any settings of the recipe (--dry-run prints them), or YAML files of them; they win",
    )
    parser.set_defaults(run=_finetune)


def _finetune(arguments: argparse.Namespace) -> int:
    try:
        from depthlm_training.finetune import FinetuneOptions, dry_run, finetune, finetune_recipe
    except ModuleNotFoundError as error:
        raise _without_training(error) from error
    options = FinetuneOptions(
        dialects=tuple(filter(None, arguments.dialects.split(","))),
        steps=arguments.steps,
        lr=arguments.lr,
        images=arguments.images,
        points=arguments.points,
        lora=arguments.lora,
        depth_kind=arguments.depth_kind,
    )
    recipe = finetune_recipe(arguments.labels, arguments.model, arguments.out, options, arguments.settings)
    if arguments.dry_run:
        print(dry_run(recipe))
        return 0
    finetune(recipe, arguments.resume)
    print(f"wrote {arguments.out}; score it with depthlm evaluate LABELS.jsonl --model {arguments.out}")
    return 0


def _add_export(commands) -> None:
    parser = commands.add_parser(
        "export",
        help="the model of a training run, ready for the node; or a checkpoint for an accelerator",
        description="Without --target: writes the model of a run into a folder of its own: adapters merged, processor, "
        "card, README. What was written is compared with the run and asked once in each dialect before the folder "
        "appears. With --target: makes an engine of a checkpoint for one camera, with the reference answers that it "
        "has to match; see the README for what runs where.",
    )
    # `run` is the command's function.
    parser.add_argument("source", metavar="RUN|CHECKPOINT", help="the folder of a training; with --target any model")
    parser.add_argument("out", type=Path, metavar="FOLDER", help="the folder to make")
    run = parser.add_argument_group("a training's model")
    run.add_argument("--step", type=int, help="of the checkpoint; default: the newest")
    run.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="of the weights (default float32)"
    )
    run.add_argument(
        "--scores",
        type=Path,
        nargs="+",
        default=[],
        metavar="METRICS.json",
        help="of 'depthlm evaluate', one for each dialect; they go into the card",
    )
    engine = parser.add_argument_group("an engine")
    engine.add_argument("--target", choices=tuple(TARGETS), help="what to make")
    engine.add_argument("--precision", default="", help="of the engine; default: onnx float32, edge-llm float16, "
                        "tensorrt-llm bfloat16")  # fmt: skip
    engine.add_argument(
        "--reference-dtype",
        choices=("float32", "bfloat16", "float16"),
        default="",
        help="number format in which the checkpoint gives its reference answers; default: float32 for dense maps, the "
        "engine's precision for words",
    )
    engine.add_argument("--bag", type=Path, help="a recording of the same camera; its frames are compared as well")
    engine.add_argument("--gpu", default="", help="that a tensorrt-llm engine is for, such as H100 or sm90")
    engine.add_argument(
        "--quantised", type=Path, metavar="FOLDER", help="what Model Optimizer made of a tensorrt-llm export"
    )
    engine.add_argument(
        "--exporter", default="", help="of edge-llm: tensorrt-edgellm-export, or the Python of its environment"
    )
    engine.add_argument("--batch", type=int, help="of edge-llm: questions answered together (default 4)")
    engine.add_argument(
        "--question-tokens", type=int, help="of edge-llm: room for a free question (default 256)"
    )
    engine.add_argument(
        "--answer-tokens", type=int, help="of edge-llm: longest answer; default: what the dialects need"
    )
    add_one_camera_arguments(parser, "give --camera, or --size with --fx or --fov-deg; an engine is for one camera")
    parser.set_defaults(run=_export)


def _export(arguments: argparse.Namespace) -> int:
    try:
        from depthlm_training.export import export
        from depthlm_training.export_targets import TargetOptions, export_target
    except ModuleNotFoundError as error:
        raise _without_training(error) from error
    options = TargetOptions(**{field.name: getattr(arguments, field.name) for field in fields(TargetOptions)})
    engine = (*(field.name for field in fields(options)), *CAMERA_ARGUMENTS)
    given = [f"--{name.replace('_', '-')}" for name in engine if getattr(arguments, name) not in ("", None)]
    if arguments.target is None:
        if given:
            raise ConfigError(f"no --target, but {', '.join(given)} of an engine; say which target to make")
        made = export(
            Path(arguments.source),
            arguments.out,
            step=arguments.step,
            dtype=arguments.dtype or "float32",
            scores=arguments.scores,
        )
        print(f"wrote {made.folder}: step {made.step}, dialects {', '.join(made.card.dialects) or 'none'}")
        print(f"its answers differ from the run's by {made.difference:.1e} of their spread")
        return 0
    if arguments.step is not None or arguments.dtype is not None or arguments.scores:
        raise ConfigError(
            "--step, --dtype and --scores are of a training's model; leave them out with --target, "
            "which has --precision"
        )
    manifest = export_target(arguments.source, arguments.out, arguments.target, one_camera(arguments), options)
    print(f"wrote {arguments.out}: {manifest.target} in {manifest.precision}, dialects {', '.join(manifest.dialects)}")
    for name, value in (*manifest.image.items(), *manifest.extra.items()):
        print(f"  {name}: {value}")
    print(f"run it with model:={arguments.out} engine:={' or '.join(TARGETS[manifest.target])}")
    return 0


def _without_training(error: ModuleNotFoundError) -> MissingDependencyError:
    return MissingDependencyError(
        f"training needs {error.name}, which isn't installed; run 'pip install -e .[train]' in a clone of the "
        "repository"
    )
