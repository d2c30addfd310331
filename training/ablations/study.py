"""What all ablations share: arms run seed by seed, kept as they finish, compared in pairs, written down.

A seed decides everything: the scenes that are learnt from, the scenes that are scored, the initial weights, the order
of the steps. So seeds are independent repetitions, and the interval over them counts every one of these chances. Arms
of one seed share all of it but what is tried, so their difference is paired.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

import depthlm_ros
from depthlm_ros.errors import ConfigError

# Student's t, 97.5 %, for 1 to 9 degrees of freedom.
_T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
_Z_975 = 1.96
MOST_SEEDS = len(_T_975) + 1


@dataclass(frozen=True)
class Outcome:
    """What an arm came to with one seed.

    Attributes:
        scores: by metric, the value of each held-out scene in their order, NaN for a scene that has none.
        effort: by name, what it took: `cpu_seconds`, `steps`, `images`, `labels`.
    """

    scores: Mapping[str, Sequence[float]]
    effort: Mapping[str, float]


@dataclass(frozen=True)
class Contrast:
    """A difference that a claim is about: `metric` of `arm` minus that of `other`, said to be positive.

    Attributes:
        claim: in words, and who made it.
    """

    claim: str
    metric: str
    arm: str
    other: str


@dataclass(frozen=True)
class Study:
    """An ablation.

    Attributes:
        name: of its module and of its results file.
        question: what it tries, one sentence.
        tasks: what is trained for each seed; a task yields one arm of its own name, or several.
        run: trains and scores a task with a seed, given the run folder; the arms' outcomes by name.
        settings: a frozen dataclass with all that decides the result but the seed.
    """

    name: str
    question: str
    tasks: tuple[str, ...]
    contrasts: tuple[Contrast, ...]
    run: Callable[[str, int, Path], dict[str, Outcome]]
    settings: Any


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % interval."""

    mean: float
    low: float
    high: float


def over_seeds(values: Sequence[float]) -> Interval:
    """Student's t interval of 2 to `MOST_SEEDS` independent repetitions."""
    values = np.asarray(values, float)
    reach = _T_975[len(values) - 2] * values.std(ddof=1) / math.sqrt(len(values))
    return Interval(float(values.mean()), float(values.mean() - reach), float(values.mean() + reach))


def over_scenes(values: Sequence[np.ndarray]) -> Interval:
    """Normal interval of the mean over seeds of the mean over scenes, with these very trained networks.

    Args:
        values: for each seed, one value a scene; NaN scenes are left out.
    """
    known = [v[np.isfinite(v)] for v in values]
    mean = float(np.mean([v.mean() for v in known]))
    reach = _Z_975 * math.sqrt(sum(v.var(ddof=1) / len(v) for v in known)) / len(known)
    return Interval(mean, mean - reach, mean + reach)


def verdict(interval: Interval) -> str:
    """What an interval over seeds says about a claimed positive difference."""
    if interval.low > 0:
        return "shows"
    return "the opposite shows" if interval.high < 0 else "does not show"


def conduct(study: Study, seeds: int, folder: Path) -> dict:
    """Runs what is left to run of a study and compares its arms.

    Args:
        seeds: how many, 2 to `MOST_SEEDS`; 0, 1, ... are used.
        folder: the run folder: rendered scenes and the outcomes of finished tasks.

    Raises:
        ConfigError: a number of seeds out of range, or finished tasks in the folder that other settings made.
    """
    if not 2 <= seeds <= MOST_SEEDS:
        raise ConfigError(f"{seeds} seeds; choose 2 to {MOST_SEEDS}: one has no interval, three have a useful one")
    by_arm: dict[str, list[Outcome]] = {}
    for seed in range(seeds):
        for task in study.tasks:
            for arm, outcome in _finished(study, task, seed, folder).items():
                by_arm.setdefault(arm, []).append(outcome)
    return {
        "arms": {arm: _summary(outcomes) for arm, outcomes in by_arm.items()},
        "contrasts": [_compared(contrast, by_arm) for contrast in study.contrasts],
    }


def _finished(study: Study, task: str, seed: int, folder: Path) -> dict[str, Outcome]:
    path = folder / study.name / f"{seed}-{task}.json"
    settings = json.loads(json.dumps(asdict(study.settings)))
    if path.exists():
        kept = json.loads(path.read_text())
        if kept["settings"] != settings:
            raise ConfigError(
                f"{path} was made with {kept['settings']}, now {settings}; delete it or name another --run"
            )
    else:
        outcomes = study.run(task, seed, folder)
        kept = {"settings": settings, "outcomes": {arm: asdict(outcome) for arm, outcome in outcomes.items()}}
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.write_text(json.dumps(kept))
        part.replace(path)
    return {arm: Outcome(**outcome) for arm, outcome in kept["outcomes"].items()}


def _summary(outcomes: list[Outcome]) -> dict:
    scores = {}
    for metric in outcomes[0].scores:
        means = [float(np.nanmean(outcome.scores[metric])) for outcome in outcomes]
        scores[metric] = {"mean": float(np.mean(means)), "by_seed": means}
    effort = {key: float(np.mean([outcome.effort[key] for outcome in outcomes])) for key in outcomes[0].effort}
    return {"scores": scores, "effort": effort}


def _compared(contrast: Contrast, by_arm: dict[str, list[Outcome]]) -> dict:
    differences = [
        np.asarray(one.scores[contrast.metric], float) - np.asarray(other.scores[contrast.metric], float)
        for one, other in zip(by_arm[contrast.arm], by_arm[contrast.other], strict=True)
    ]
    seeds = over_seeds([float(np.nanmean(d)) for d in differences])
    return {
        **asdict(contrast),
        "difference": seeds.mean,
        "over_seeds_95": [seeds.low, seeds.high],
        "over_scenes_95": list(asdict(over_scenes(differences)).values())[1:],
        "verdict": verdict(seeds),
    }


def table(result: dict) -> str:
    """The result in Markdown: arms with their scores, then differences with their intervals."""
    arms = result["arms"]
    first = next(iter(arms.values()))
    heads = ["arm", *first["scores"], *first["effort"]]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for arm, row in arms.items():
        scores = [f"{score['mean']:.3f}" for score in row["scores"].values()]
        lines.append(f"| {' | '.join([arm, *scores, *(f'{value:.0f}' for value in row['effort'].values())])} |")
    lines += ["", "| claim | metric | difference | over seeds | over scenes | at this scale it |", "|---" * 6 + "|"]
    for row in result["contrasts"]:
        seeds, scenes = ("{:+.3f} to {:+.3f}".format(*row[key]) for key in ("over_seeds_95", "over_scenes_95"))
        pair = f"{row['metric']}, {row['arm']} − {row['other']}"
        cells = [row["claim"], pair, f"{row['difference']:+.3f}", seeds, scenes, row["verdict"]]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _conditions(study: Study, seeds: int) -> dict:
    return {
        "date": date.today().isoformat(),
        "command": f"python -m depthlm_training.ablations.{study.name} --seeds {seeds}",
        "machine": f"{platform.machine()}, 1 thread, no GPU",
        "versions": {
            "depthlm_ros": depthlm_ros.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "numpy": np.__version__,
        },
        "seeds": seeds,
        "settings": asdict(study.settings),
    }


def main(study: Study) -> None:
    """The command line of a study."""
    parser = argparse.ArgumentParser(description=study.question)
    parser.add_argument("--seeds", type=int, default=3, help="independent repetitions")
    parser.add_argument("--run", type=Path, default=Path("runs/ablations"), help="scenes and finished arms; kept")
    parser.add_argument(
        "--out", type=Path, default=Path("training/ablations/results"), help="the result is appended to NAME.json here"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)  # networks this small lose by more, and the seconds stay comparable
    try:
        result = conduct(study, args.seeds, args.run)
    except ConfigError as error:
        sys.exit(f"error: {error}")
    path = args.out / f"{study.name}.json"
    earlier = json.loads(path.read_text()) if path.exists() else []
    args.out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([*earlier, _conditions(study, args.seeds) | result], indent=1) + "\n")
    print(f"{table(result)}\n\nappended to {path}")
