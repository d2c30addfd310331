"""The loop that all trainings share: one step is so many micro-batches, whoever computes them.

A training is a list of micro-batches numbered k = 0, 1, 2, ...; micro-batch k is a pure function of k and of the
recipe. A step takes the next `micro_batches` of them, and n processes take every n-th each, so one process and eight
do the same steps on the same data, and the position in the data is a number.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from depthlm_ros.errors import ConfigError, DepthLMError, TrainingError
from depthlm_training.config import plain
from depthlm_training.data import Loader
from depthlm_training.objective import Loss, Objective, TrainSettings
from depthlm_training.optimizer import adamw, apply, gradient_norm, rate, step_seed
from depthlm_training.parallel import DTYPES, Network, Processes, joined, passing, spread
from depthlm_training.progress import Course, Tally
from depthlm_training.states import Checkpoints, found, tidy
from depthlm_training.throughput import Meter, Stopwatch, peak_flop


def train(objective: Objective, settings: TrainSettings, run: Path, resume: bool = False) -> None:
    """Trains to the last step, writing checkpoints and the course into a folder.

    Args:
        objective: what is taught.
        settings: how.
        run: the folder; on several hosts one that all of them see.
        resume: go on after the last checkpoint in `run`; where there is none, begin.

    Raises:
        ConfigError: settings that don't fit the processes, or a run that is there already without `resume`.
        TrainingError: the loss became NaN, a checkpoint could not be written, a data worker was killed, bad rows
            without end; the message names the last good checkpoint.
    """
    with joined(settings.parallel, settings.device) as processes:
        if settings.micro_batches % processes.size:
            raise ConfigError(
                f"micro_batches is {settings.micro_batches}, which {processes.size} processes can't share; "
                f"give a multiple of {processes.size}"
            )
        if not resume and found(run):
            raise ConfigError(f"{run} holds {found(run)[-1].name} already; pass --resume, or name another folder")
        _Training(objective, settings, run, processes).run()


class _Training:
    """A run in one of its processes."""

    def __init__(self, objective: Objective, settings: TrainSettings, run: Path, processes: Processes) -> None:
        self._objective, self._settings, self._run, self._processes = objective, settings, run, processes
        self._model = objective.model.train()
        if not any(weight.requires_grad for weight in self._model.parameters()):
            raise ConfigError("no part of the model is trained; name at least one")
        dtype = DTYPES[settings.dtype]
        network = Network(self._model, objective.loss, dtype)
        self._network = spread(network, settings.parallel, dtype, processes)
        self._weights = [weight for weight in self._model.parameters() if weight.requires_grad]
        self._optimizer = adamw(self._weights, settings)
        self._checkpoints = Checkpoints(run, settings.keep, processes)
        self._meter, self._tally = Meter(), Tally()
        self._peak = 0.0
        self._done = self._position = 0

    def run(self) -> None:
        """Does the steps that are left."""
        try:
            if self._processes.first:
                tidy(self._run)
            self._restore()
            with Course(self._run, self._settings.steps, self._done, self._processes.first) as course:
                with closing(iter(self._loader())) as batches:
                    while self._done < self._settings.steps:
                        measured = self._step(batches)
                        course.step()
                        self._note(course, measured)
                if self._objective.bad_rows:
                    course.say(f"rows that could not be trained on:\n{self._objective.bad_rows.report()}")
        except (DepthLMError, OSError, torch.OutOfMemoryError) as error:
            raise TrainingError(f"step {self._done + 1}: {error}\n{last_good(self._run)}") from error

    def _loader(self) -> Loader:
        settings, processes = self._settings, self._processes
        left = (settings.steps - self._done) * settings.micro_batches
        start, stop = self._position + processes.rank, self._position + left
        make, bad_rows = self._objective.make, self._objective.bad_rows
        return Loader(make, settings.workers, start, stop, processes.size, bad_rows=bad_rows)

    def _step(self, batches: Iterator[tuple[int, Any]]) -> dict[str, float]:
        settings, size = self._settings, self._processes.size
        torch.manual_seed(step_seed(settings.seed, self._done, self._processes.rank))
        watch = Stopwatch()
        losses = [self._pass(batches, i) for i in range(size, settings.micro_batches + 1, size)]
        tally = Tally.of(losses, self._processes)
        mean = tally.means()["loss"]
        norm = gradient_norm(self._weights) * size / tally.units
        if not math.isfinite(mean) or not math.isfinite(norm):
            raise TrainingError(
                f"the loss is {mean} and the norm of the gradient {norm}; lower train.lr, clip harder, or look at "
                f"micro-batches {self._position} to {self._position + settings.micro_batches - 1}"
            )
        clipped = min(1.0, settings.clip / (norm + 1e-6)) if settings.clip else 1.0
        lr = rate(settings, self._done)
        apply(self._optimizer, lr, clipped * size / tally.units)
        self._tally = self._tally + tally
        self._done, self._position = self._done + 1, self._position + settings.micro_batches
        self._meter.seconds += watch.lap()
        return {"lr": lr, "gradient": norm}

    def _pass(self, batches: Iterator[tuple[int, Any]], through: int) -> Loss:
        """A micro-batch forward and backward; after it, `through` of the step's are done."""
        watch = Stopwatch()
        _, batch = next(batches)
        self._meter.waiting += watch.lap()
        with passing(self._network, last=through == self._settings.micro_batches):
            total, loss = self._network(batch, self._processes.device)
            total.backward()
        self._meter.add(loss.tokens, loss.images, loss.waste, loss.flop)
        return replace(loss, total=total.detach())

    def _note(self, course: Course, measured: dict[str, float]) -> None:
        """Writes a row of the course, and a checkpoint, where they are due."""
        settings, last = self._settings, self._done == self._settings.steps
        if self._done % settings.log_every == 0 or last:
            counts = self._processes.sum(self._meter.counts())
            if self._meter.flop and not self._peak:
                self._peak = peak_flop(self._processes.device, DTYPES[settings.dtype])
            course.row(
                self._done,
                {**self._tally.means(), **measured, **Meter.rates(counts, self._processes.size, self._peak)},
            )
            self._meter, self._tally = Meter(), Tally()
        if self._done % settings.checkpoint_every == 0 or last:
            position = {
                "step": self._done,
                "position": self._position,
                "tally": self._tally.sums,
                "settings": plain(settings),
            }
            self._checkpoints.save(self._model, self._optimizer, self._done, position)

    def _restore(self) -> None:
        checkpoints = found(self._run)
        if not checkpoints:
            return
        stored = self._checkpoints.load(checkpoints[-1], self._model, self._optimizer)
        self._done, self._position = stored["step"], stored["position"]
        self._tally = Tally(stored["tally"])
        changed = [
            f"{name} {stored['settings'].get(name)} -> {value}"
            for name, value in plain(self._settings).items()
            if stored["settings"].get(name) != value
        ]
        if self._processes.first:
            note = f"; changed since: {', '.join(changed)}" if changed else ""
            print(f"resuming after {checkpoints[-1]}{note}", file=sys.stderr)


def last_good(run: Path) -> str:
    """Says which checkpoint a run can go on from."""
    checkpoints = found(run)
    if not checkpoints:
        return f"no checkpoint had been written to {run} yet"
    return f"the last good checkpoint is {checkpoints[-1]}; --resume goes on from there"
