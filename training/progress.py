"""What a run shows while it goes on: a bar, a row of `course.jsonl` every few steps, and the same in TensorBoard."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from depthlm_ros.errors import TrainingError
from depthlm_training.objective import Loss
from depthlm_training.parallel import Processes

COURSE = "course.jsonl"
_SHOWN = ("loss", "tokens/s", "images/s", "mfu")


@dataclass(frozen=True)
class Tally:
    """Sums of losses over micro-batches, processes and steps: name -> (sum, number that it is a mean over)."""

    sums: Mapping[str, Sequence[float]] = field(default_factory=dict)

    @classmethod
    def of(cls, losses: Sequence[Loss], processes: Processes) -> Tally:
        """What a step came to on all processes; waits for the device once."""
        terms = [{"loss": (loss.total, loss.units), **loss.parts} for loss in losses]
        names = list(terms[0])
        sums = torch.stack([torch.stack([term[name][0] for term in terms]).double().sum() for name in names]).tolist()
        numbers = [sum(term[name][1] for term in terms) for name in names]
        whole = processes.sum([*sums, *numbers])
        if whole[len(names)] == 0:
            raise TrainingError("nothing is supervised in this step; look at the labels, or take more micro-batches")
        return cls(dict(zip(names, zip(whole[: len(names)], whole[len(names) :], strict=True), strict=True)))

    @property
    def units(self) -> float:
        """What the loss is a mean over."""
        return self.sums["loss"][1]

    def means(self) -> dict[str, float]:
        """Each sum divided by its number; names that were not counted are left out."""
        return {name: total / number for name, (total, number) in self.sums.items() if number}

    def __add__(self, other: Tally) -> Tally:
        ours = {name: self.sums.get(name, (0.0, 0.0)) for name in other.sums}
        return Tally({name: (ours[name][0] + a, ours[name][1] + b) for name, (a, b) in other.sums.items()})


class Course:
    """The course of a run, written by the first process; the others have a silent one.

    Args:
        run: where the rows go.
        steps: of the whole run.
        done: steps done before; later rows, of steps that are done again, are dropped.
        writes: whether this is the first process.
    """

    def __init__(self, run: Path, steps: int, done: int, writes: bool) -> None:
        self._file = self._board = None
        if writes:
            self._file = _continued(run / COURSE, done).open("a", encoding="utf-8")
            self._board = _board(run, done)
        self._bar = tqdm(total=steps, initial=done, desc=run.name, unit="step", disable=not writes, mininterval=1)

    def __enter__(self) -> Course:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
        if self._file:
            self._file.close()
        if self._board:
            self._board.close()

    def step(self) -> None:
        """A step is done."""
        self._bar.update()

    def row(self, step: int, values: Mapping[str, float]) -> None:
        """Writes what was measured up to a step."""
        if not self._file:
            return
        print(json.dumps({"step": step, **values}), file=self._file, flush=True)
        if self._board:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
        self._bar.set_postfix({name: f"{values[name]:.4g}" for name in _SHOWN if name in values}, refresh=False)

    def say(self, line: str) -> None:
        """Prints a line above the bar."""
        if self._file:
            self._bar.write(line, file=sys.stderr)


def rows(run: Path) -> list[dict[str, Any]]:
    """The rows of a run's course; none where there is no run."""
    return [json.loads(line) for line in _lines(run / COURSE)]


def _lines(path: Path) -> list[str]:
    """The whole lines of a course; a killed run may have stopped in the middle of one."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    return [line for line in lines if line.endswith("}\n")]


def _continued(path: Path, done: int) -> Path:
    """Leaves out rows after step `done`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = [line for line in _lines(path) if json.loads(line)["step"] <= done]
    unfinished = path.with_suffix(".part")
    unfinished.write_text("".join(kept), encoding="utf-8")
    os.replace(unfinished, path)
    return path


def _board(run: Path, done: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        print(
            f"tensorboard is not installed, so the course is in {run / COURSE} alone; pip install 'depthlm_ros[train]'",
            file=sys.stderr,
        )
        return None
    return SummaryWriter(run / "tensorboard", purge_step=done + 1 if done else None)
