"""The command line of a training: settings, a dry run, the loader alone, or the run itself."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from depthlm_ros.errors import DepthLMError
from depthlm_training.config import load
from depthlm_training.data import Loader
from depthlm_training.objective import Objective, TrainSettings
from depthlm_training.parallel import joined
from depthlm_training.progress import rows
from depthlm_training.recipes import keep_recipe
from depthlm_training.throughput import Stopwatch
from depthlm_training.trainer import train

T = TypeVar("T")

# Steps whose micro-batches a null step makes.
NULL_STEPS = 5


def run_command(
    kind: type[T],
    open_objective: Callable[[T], Objective],
    dry_run: Callable[[T], str],
    *,
    prog: str,
    description: str,
    teach: Callable[[T, bool], None] | None = None,
    arguments: Sequence[str] | None = None,
) -> int:
    """Runs a recipe; 0 when it has ended well, 1 with one message on standard error when it couldn't.

    Args:
        kind: the recipe's dataclass, with `train: TrainSettings` and `run: Path`.
        open_objective: loads the model and opens the data.
        dry_run: what `--dry-run` prints.
        prog: the command as it is typed.
        description: for `--help`.
        teach: runs the recipe, resuming or not; None opens the objective and trains it.
        arguments: instead of the process's.
    """
    parser = argparse.ArgumentParser(prog=prog, description=description)
    parser.add_argument("settings", nargs="+", help="YAML files and key=value, later ones win")
    parser.add_argument("--resume", action="store_true", help="go on from the run's last checkpoint, if there is one")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--dry-run", action="store_true", help="print the settings and one sample, train nothing")
    what.add_argument("--null-step", action="store_true", help="measure how fast the loader is when nobody trains")
    options = parser.parse_args(arguments)
    try:
        recipe: Any = load(kind, options.settings)
        if options.dry_run:
            print(dry_run(recipe))
        elif options.null_step:
            print(null_step(open_objective(recipe), recipe.train, rows(recipe.run)), end="")
        elif teach:
            keep_recipe(recipe, options.resume)
            teach(recipe, options.resume)
        else:
            keep_recipe(recipe, options.resume)
            train(open_objective(recipe), recipe.train, recipe.run, options.resume)
    except DepthLMError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; --resume goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


def null_step(objective: Objective, settings: TrainSettings, course: Sequence[dict[str, Any]]) -> str:
    """Measures the loaders of all processes, and compares them with a run that was trained before.

    Args:
        objective: whose `make` is measured.
        settings: of the run.
        course: rows of an earlier run; empty for none.

    Returns:
        What was found, from the first process; nothing from the others.
    """
    with joined(settings.parallel, settings.device) as processes:
        made = processes.sum([loader_rate(objective, settings, processes.size, NULL_STEPS)])[0]
    if not processes.first:
        return ""
    told = f"the loader makes {made:.3g} micro-batches a second ({processes.size} x {settings.workers} workers)\n"
    if course:
        since = course[-2]["step"] if len(course) > 1 else 0
        needed = (course[-1]["step"] - since) * settings.micro_batches / course[-1]["seconds"]
        told += f"the run has taken {needed:.3g} a second, {course[-1]['waiting']:.1%} of the time waiting for them\n"
    return told


def loader_rate(objective: Objective, settings: TrainSettings, size: int, steps: int) -> float:
    """Micro-batches a second that the loader of one of `size` processes makes.

    The first one, for which workers start, is not timed.
    """
    number = max(1, steps * settings.micro_batches // size)
    made = iter(Loader(objective.make, settings.workers, 0, number + 1, bad_rows=objective.bad_rows))
    next(made)
    watch = Stopwatch()
    for _ in made:
        pass
    return number / watch.lap()
