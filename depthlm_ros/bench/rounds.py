"""Interleaved rounds: everybody once, then everybody again, so that a machine that slows down slows down all of them.

A ratio is made within a round, from neighbours in time, and its median and spread are over the rounds.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from depthlm_ros.bench.contenders import Contender, Frame, Stock

TIE = 1e-5  # logits closer than this are equal for any kernel
_CLEAR = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


@dataclass
class Measured:
    """One contender with one number of points.

    Attributes:
        contender: its name.
        dialect: how it was asked.
        points: points of the frame.
        asked: points that it answered in a round.
        seconds: of each round, for what was asked.
        peak_bytes: highest memory while it ran, weights included.
        extra_bytes: how much of it came on top of what was held before.
        notes: what else there is to say.
        work: what the contender counts of its own.
    """

    contender: str
    dialect: str
    points: int
    asked: int
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    extra_bytes: int = 0
    notes: str = ""
    work: dict[str, int] = field(default_factory=dict)

    @property
    def rates(self) -> np.ndarray:
        """(rounds,) points a second."""
        return self.asked / np.array(self.seconds)

    def summary(self) -> dict[str, Any]:
        """What goes into tables and JSON."""
        seconds = np.array(self.seconds)
        return {
            "contender": self.contender,
            "dialect": self.dialect,
            "points": self.points,
            "asked": self.asked,
            "points_per_s": spread(self.rates),
            "ms_per_point": spread(1e3 * seconds / self.asked),
            # A frame of all its points; measured where all were asked, a multiple of what was measured elsewhere.
            "ms_per_frame": spread(1e3 * seconds * self.points / self.asked),
            "seconds": [float(s) for s in seconds],
            "peak_bytes": self.peak_bytes,
            "extra_bytes": self.extra_bytes,
            "notes": self.notes,
            "work": self.work,
        }


def spread(values: Sequence[float] | np.ndarray) -> dict[str, float]:
    """Median, least and most."""
    values = np.asarray(values, np.float64)
    return {"median": float(np.median(values)), "min": float(values.min()), "max": float(values.max())}


@dataclass(frozen=True)
class Entry:
    """A contender and the frame it is asked about."""

    contender: Contender
    frame: Frame

    @property
    def asked(self) -> Frame:
        """What it answers in a round."""
        return self.frame.some(self.contender.limit)


def run_rounds(
    entries: Sequence[Entry], rounds: int, device: torch.device, said: Callable[[str], None] = lambda _: None
) -> tuple[list[Measured], list[list[tuple[int, ...]]]]:
    """Measures all entries in turn, `rounds` times after one round that isn't counted.

    Args:
        entries: who answers what.
        rounds: how often.
        device: to wait for before the clock is read.
        said: called with a line of progress.

    Returns:
        What was measured, and the answers of the last round, for each entry.
    """
    frames = [entry.asked for entry in entries]
    measured = [
        Measured(e.contender.name, e.frame.dialect, len(e.frame), len(asked))
        for e, asked in zip(entries, frames, strict=True)
    ]
    answers: list[list[tuple[int, ...]]] = [[] for _ in entries]
    for number in range(rounds + 1):
        for at, (entry, frame) in enumerate(zip(entries, frames, strict=True)):
            memory = _Memory(device)
            start = time.perf_counter()
            answers[at] = entry.contender.answer(frame)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds = time.perf_counter() - start
            peak, extra = memory.read()
            row = measured[at]
            if number:
                row.seconds.append(seconds)
                row.peak_bytes, row.extra_bytes = max(row.peak_bytes, peak), max(row.extra_bytes, extra)
                row.work = entry.contender.work
            name = f"{row.dialect}, {row.contender}, {row.points} points"
            said(f"{f'round {number}' if number else 'warm-up'}: {name}: {len(frame) / seconds:.4g} points/s")
    return measured, answers


def ratio(ours: Measured, theirs: Measured) -> dict[str, float]:
    """How many times more points a second, within each round."""
    return spread(ours.rates / theirs.rates)


class _Memory:
    """Highest memory since it was made."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._before = torch.cuda.memory_allocated(device)
            return
        # Linux forgets a process' highest memory when told to; elsewhere it is that of the whole run.
        try:
            _CLEAR.write_text("5")
        except OSError:
            self._before = 0
        else:
            self._before = _status("VmRSS")

    def read(self) -> tuple[int, int]:
        if self._device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self._device)
        elif self._before:
            peak = _status("VmHWM")
        else:
            peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            return peak, 0
        return peak, max(0, peak - self._before)


def _status(key: str) -> int:
    for line in _STATUS.read_text(encoding="ascii").splitlines():
        if line.startswith(f"{key}:"):
            return 1024 * int(line.split()[1])
    return 0


# ---------------------------------------------------------------- answers


@dataclass(frozen=True)
class Difference:
    """An answer that isn't the one of plain `generate`.

    Attributes:
        row: which point.
        at: place of the first token that differs.
        gap: by how much `generate` prefers its own token there, in logits.
    """

    row: int
    at: int
    gap: float


@dataclass(frozen=True)
class Comparison:
    """Answers beside those of plain `generate`, token for token.

    Attributes:
        contender: whose answers.
        dialect: how it was asked.
        points: points of its frame.
        compared: answers that both gave.
        identical: of these, the same tokens throughout.
        differences: the others.
    """

    contender: str
    dialect: str
    points: int
    compared: int
    identical: int
    differences: tuple[Difference, ...]

    def summary(self) -> dict[str, Any]:
        """What goes into tables and JSON."""
        ties = sum(difference.gap <= TIE for difference in self.differences)
        found = [vars(difference) for difference in self.differences]
        return vars(self) | {"differences": found, "ties": ties, "tie_is_within": TIE}


def reference_answers(stock: Stock, frame: Frame, rows: Sequence[int]) -> dict[int, tuple[int, ...]]:
    """What plain `generate`, one question at a time, says about some points of a frame."""
    return {row: stock.answers([frame.shown(row)], [frame.questions[row]], frame.longest)[0] for row in rows}


def compare(
    entry: Entry, answers: Sequence[tuple[int, ...]], reference: dict[int, tuple[int, ...]], stock: Stock
) -> Comparison:
    """Sets one contender's answers beside the reference, and finds out how close each difference was."""
    rows = entry.frame.rows(entry.contender.limit)
    both = [(row, ids, reference[row]) for row, ids in zip(rows, answers, strict=True) if row in reference]
    differences = []
    for row, ids, plain in both:
        if ids != plain:
            at = next(
                (i for i, (a, b) in enumerate(zip(ids, plain, strict=False)) if a != b), min(len(ids), len(plain))
            )
            differences.append(Difference(row, at, _gap(stock, entry.frame, row, at, ids, plain)))
    frame = entry.frame
    identical = len(both) - len(differences)
    return Comparison(entry.contender.name, frame.dialect, len(frame), len(both), identical, tuple(differences))


def _gap(stock: Stock, frame: Frame, row: int, at: int, ids: Sequence[int], plain: Sequence[int]) -> float:
    if at >= len(ids) or at >= len(plain):
        return float("inf")  # one goes on where the other ended without an end: nothing to weigh
    out, _ = stock.generate(
        [frame.shown(row)],
        [frame.questions[row]],
        at + 1,
        return_dict_in_generate=True,
        output_logits=True,
    )
    logits = out.logits[at][0].double()
    return float(logits[plain[at]] - logits[ids[at]])
