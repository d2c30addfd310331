"""The commands `depthlm finetune` and `depthlm export`: from labels to a model that the node loads."""

from __future__ import annotations

import argparse
from pathlib import Path

from depthlm_ros.errors import MissingDependencyError


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
        help="the model of a training run, ready for the node",
        description="Writes the model of a run into a folder of its own: adapters merged, processor, card, README. "
        "What was written is compared with the run and asked once in each dialect before the folder appears.",
    )
    # `run` is the command's function.
    parser.add_argument("run_folder", type=Path, metavar="RUN", help="the folder of a training")
    parser.add_argument("out", type=Path, metavar="FOLDER", help="the model's folder, to make")
    parser.add_argument("--step", type=int, help="of the checkpoint; default: the newest")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="of the weights (default float32)"
    )
    parser.add_argument(
        "--scores",
        type=Path,
        nargs="+",
        default=[],
        metavar="METRICS.json",
        help="of 'depthlm evaluate', one for each dialect; they go into the card",
    )
    parser.set_defaults(run=_export)


def _export(arguments: argparse.Namespace) -> int:
    try:
        from depthlm_training.export import export
    except ModuleNotFoundError as error:
        raise _without_training(error) from error
    made = export(
        arguments.run_folder, arguments.out, step=arguments.step, dtype=arguments.dtype, scores=arguments.scores
    )
    print(f"wrote {made.folder}: step {made.step}, dialects {', '.join(made.card.dialects) or 'none'}")
    print(f"its answers differ from the run's by {made.difference:.1e} of their spread")
    return 0


def _without_training(error: ModuleNotFoundError) -> MissingDependencyError:
    return MissingDependencyError(
        f"training needs {error.name}, which isn't installed; run 'pip install -e .[train]' in a clone of the "
        "repository"
    )
