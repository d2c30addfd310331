"""Do two engines answer alike? Reference answers on a disk, and the comparison with a candidate's.

Both are asked through the estimator, about whole images of a real camera, so that everything counts which a frame of
the node goes through: resampling, normalisation, the order of channels, the place of a pixel in a map, units. Images
are rendered or recorded ones: random numbers would hide an engine whose scale varies from frame to frame.

A dense map agrees in a frame when half of its depths are within 1 % and 95 of 100 within 5 %, the median of the ratios
is within 1 % of 1 and the order of the depths is the same (Spearman's rank correlation of 0.999; not judged where the
depths themselves hardly differ, as before a wall); in every frame, since engines are known whose scale changes from one
to the next (ros2-depth-anything-v3-trt, issue 16). Answers in words agree when 99 of 100 are the same text, or differ
by at most one unit of the last digit of each number.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from depthlm_ros.engines.answers import NUMBER
from depthlm_ros.errors import ConfigError, DialectError
from depthlm_ros.references import Asked, Reference, ReferenceFrame, write_reference
from depthlm_ros.sampling import sample_pixels, stride_pixels

if TYPE_CHECKING:
    from depthlm_ros.estimator import Estimator

MOST_MEDIAN_ERROR = 0.01
MOST_TAIL_ERROR = 0.05
TAIL = 0.95
MOST_SCALE_ERROR = 0.01
LEAST_RANK_CORRELATION = 0.999
# Below this standard deviation of the logarithm of depth the order is one of noise.
LEAST_RELIEF = 0.03
LEAST_SAME_ANSWERS = 0.99
# A map may lose so many of the reference's depths: where one of two is just not finite or positive.
MOST_LOST = 0.001
WORD_FRAMES = 4
WORD_POINTS = 32
_MAP_POINTS = 4800


@dataclass(frozen=True)
class Verdict:
    """How a candidate compares.

    Attributes:
        passed: whether it agrees.
        failures: what doesn't, a phrase each.
        figures: the worst of each figure over the frames, by name.
        dialects: that were compared.
        reasons: what couldn't be compared.
    """

    passed: bool
    failures: tuple[str, ...]
    figures: dict[str, float]
    dialects: tuple[str, ...] = ()
    reasons: tuple[str, ...] = ()

    def __str__(self) -> str:
        """One line."""
        told = "; ".join(self.failures) if self.failures else ", ".join(f"{k} {v:.4g}" for k, v in self.figures.items())
        return told + "".join(f"; {reason}" for reason in self.reasons)


def record_reference(
    estimator: Estimator, frames: Sequence[ReferenceFrame], folder: Path, dialects: Sequence[str] | None = None
) -> Reference:
    """Asks a model and keeps its answers; as `ask_reference`.

    Args:
        estimator: the reference.
        frames: to ask about.
        folder: to write into; must be absent or empty.
        dialects: to ask in; None for all that it speaks.

    Raises:
        ConfigError: `folder` holds something.
        DialectError: it doesn't speak one of them, or none.
    """
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder} holds something already; name another folder")
    reference = ask_reference(estimator, frames, dialects)
    write_reference(reference, folder)
    return reference


def ask_reference(
    estimator: Estimator,
    frames: Sequence[ReferenceFrame],
    dialects: Sequence[str] | None = None,
    points: int = WORD_POINTS,
) -> Reference:
    """Asks a model.

    Args:
        estimator: the reference.
        frames: to ask about; words are asked about the first few only, since each point is a question.
        dialects: to ask in; None for all that it speaks.
        points: questions in words about a frame.

    Raises:
        DialectError: it doesn't speak one of them, or none.
    """
    dialects = tuple(dialects or estimator.dialects)
    if not dialects:
        raise DialectError(f"model {estimator.card.name!r} answers no depth questions, so there is nothing to compare")
    asked = []
    for dialect in map(estimator.card.require_dialect, dialects):
        for i, frame in enumerate(frames if dialect == "dense" else frames[:WORD_FRAMES]):
            asked.append(_ask(estimator, i, frame, dialect, _pixels(estimator, frame, dialect, points)))
    info = estimator.engine.info
    engine = f"{info.engine} on {info.device} in {info.dtype}"
    return Reference(estimator.card.name, engine, tuple(frames), tuple(asked))


def steady(reference: Reference, others: Sequence[Reference], points: int = WORD_POINTS) -> Reference:
    """The reference with only such questions in words whose answers are the same in other number formats.

    Where a model is undecided between two answers, rounding decides, and an engine that rounds elsewhere is not wrong.

    Args:
        reference: to thin out.
        others: answers of the same model to the same questions, computed in other formats.
        points: most questions that are kept about a frame.
    """
    kept = []
    for i, asked in enumerate(reference.asked):
        if not asked.texts:
            kept.append(asked)
            continue
        rows = [
            row
            for row, text in enumerate(asked.texts)
            if all(same_answer(text, other.asked[i].texts[row]) for other in others)
        ][:points]
        # One where no answer is steady has nothing to compare.
        if rows:
            texts = tuple(asked.texts[row] for row in rows)
            kept.append(replace(asked, pixels=asked.pixels[rows], depth_m=asked.depth_m[rows], texts=texts))
    return replace(reference, asked=tuple(kept))


def check(estimator: Estimator, reference: Reference) -> Verdict:
    """Compares a candidate's answers with a reference's, in all dialects that it can be asked in.

    Args:
        estimator: the candidate; its errors pass through.
        reference: to compare with.

    Raises:
        DialectError: they have no dialect in common.
    """
    spoken = [asked for asked in reference.asked if asked.dialect in estimator.dialects]
    if not spoken:
        raise DialectError(
            f"the reference of {reference.model} has answers in {', '.join(_dialects(reference))}, and the engine can "
            f"be asked in {', '.join(estimator.dialects) or 'no dialect'}; record a reference in one of these"
        )
    tally = _Tally()
    for asked in spoken:
        got = _ask(estimator, asked.frame, reference.frames[asked.frame], asked.dialect, asked.pixels)
        if asked.dialect == "dense":
            tally.add_map(asked, got)
        else:
            tally.add_words(asked, got)
    compared = tuple(dialect for dialect in _dialects(reference) if dialect in estimator.dialects)
    reasons = []
    for whose, left in (
        ("the engine isn't asked in", [d for d in _dialects(reference) if d not in compared]),
        ("the reference has no answers in", [d for d in estimator.dialects if d not in compared]),
    ):
        reasons += [f"not compared, since {whose} them: {', '.join(left)}"] if left else []
    return replace(tally.verdict(), dialects=compared, reasons=tuple(reasons))


@dataclass(frozen=True)
class MapAgreement:
    """How two sets of depths compare.

    Attributes:
        median_error: median of |candidate - reference| / reference.
        scale: median of candidate / reference.
        tail_error: what 95 of 100 of these don't exceed.
        rank_correlation: Spearman's; None where the reference's depths hardly differ.
        lost: share of the reference's depths that the candidate doesn't have.
    """

    median_error: float
    scale: float
    tail_error: float
    rank_correlation: float | None
    lost: float

    @property
    def failures(self) -> list[str]:
        """What is out of bounds, a phrase each."""
        told = []
        # Written so that NaN fails.
        if not self.lost <= MOST_LOST:
            told.append(f"{self.lost:.2%} of the depths are missing, at most {MOST_LOST:.1%} may be")
        if not self.median_error <= MOST_MEDIAN_ERROR:
            told.append(f"median depth error {self.median_error:.2%}, at most {MOST_MEDIAN_ERROR:.0%}")
        if not self.tail_error <= MOST_TAIL_ERROR:
            told.append(f"1 of 20 depths is {self.tail_error:.1%} off or more, at most {MOST_TAIL_ERROR:.0%}")
        if not abs(self.scale - 1) <= MOST_SCALE_ERROR:
            told.append(f"scale {self.scale:.4f}, within 1 ± {MOST_SCALE_ERROR:g}")
        if self.rank_correlation is not None and not self.rank_correlation >= LEAST_RANK_CORRELATION:
            told.append(f"rank correlation {self.rank_correlation:.4f}, at least {LEAST_RANK_CORRELATION}")
        return told


def compare_maps(reference_m: np.ndarray, candidate_m: np.ndarray) -> MapAgreement:
    """Compares (N,) depths in metres, NaN where there is none."""
    known = np.isfinite(reference_m) & (reference_m > 0)
    both = known & np.isfinite(candidate_m) & (candidate_m > 0)
    if not both.any():
        return MapAgreement(math.inf, math.nan, math.inf, math.nan, 1.0)
    r, c = (values[both].astype(np.float64) for values in (reference_m, candidate_m))
    lost = 1 - both.sum() / known.sum()
    errors = np.abs(c - r) / r
    order = rank_correlation(r, c) if float(np.std(np.log(r))) >= LEAST_RELIEF else None
    middle, tail = (float(value) for value in np.quantile(errors, (0.5, TAIL)))
    return MapAgreement(middle, float(np.median(c / r)), tail, order, lost)


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's rank correlation of (N,) values, ties sharing their mean rank; NaN where one is constant."""
    ranks = []
    for values in (a, b):
        _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
        ranks.append((np.cumsum(counts) - (counts - 1) / 2)[which])
    if min(float(np.ptp(r)) for r in ranks) == 0:
        return math.nan
    return float(np.corrcoef(*ranks)[0, 1])


def same_answer(reference: str, candidate: str) -> bool:
    """Whether two answers are the same but for one unit of the last digit of each number."""
    if reference == candidate:
        return True
    numbers = [[match.group() for match in NUMBER.finditer(text)] for text in (reference, candidate)]
    frames = [re.sub(NUMBER, "#", text).strip() for text in (reference, candidate)]
    if frames[0] != frames[1] or len(numbers[0]) != len(numbers[1]):
        return False
    for a, b in zip(*numbers, strict=True):
        unit = 10.0 ** -max(len(number.partition(".")[2]) for number in (a, b))
        if abs(float(a) - float(b)) > unit * (1 + 1e-6):
            return False
    return True


@dataclass
class _Tally:
    maps: list[tuple[int, MapAgreement]] = field(default_factory=list)
    words: dict[str, list[bool]] = field(default_factory=dict)
    examples: dict[str, tuple[str, str]] = field(default_factory=dict)

    def add_map(self, reference: Asked, candidate: Asked) -> None:
        self.maps.append((reference.frame, compare_maps(reference.depth_m, candidate.depth_m)))

    def add_words(self, reference: Asked, candidate: Asked) -> None:
        same = [same_answer(a, b) for a, b in zip(reference.texts, candidate.texts, strict=True)]
        self.words.setdefault(reference.dialect, []).extend(same)
        if not all(same):
            at = same.index(False)
            self.examples.setdefault(reference.dialect, (reference.texts[at], candidate.texts[at]))

    def verdict(self) -> Verdict:
        failures, figures = [], {}
        if self.maps:
            agreements = [agreement for _, agreement in self.maps]
            figures = {
                "median depth error": max(a.median_error for a in agreements),
                "scale": max((a.scale for a in agreements), key=lambda scale: _distance(scale)),
                "depth error of 95 %": max(a.tail_error for a in agreements),
                "depths missing": max(a.lost for a in agreements),
            }
            orders = [a.rank_correlation for a in agreements if a.rank_correlation is not None]
            if orders:
                figures["rank correlation"] = min(orders, key=_nan_first)
            for frame, agreement in self.maps:
                failures += [f"dense, frame {frame}: {failure}" for failure in agreement.failures]
        for dialect, same in self.words.items():
            share = sum(same) / len(same)
            figures[f"same answers, {dialect}"] = share
            if share < LEAST_SAME_ANSWERS:
                wanted, got = self.examples[dialect]
                failures.append(
                    f"{dialect}: {share:.1%} of {len(same)} answers are the same, at least {LEAST_SAME_ANSWERS:.0%}; "
                    f"such as {got[:60]!r} instead of {wanted[:60]!r}"
                )
        more = [f"and {len(failures) - 4} more"] if len(failures) > 4 else []
        return Verdict(not failures, (*failures[:4], *more), figures)


def _distance(scale: float) -> float:
    return math.inf if math.isnan(scale) else abs(scale - 1)


def _nan_first(value: float) -> float:
    return -math.inf if math.isnan(value) else value


def _ask(estimator: Estimator, index: int, frame: ReferenceFrame, dialect: str, pixels: np.ndarray) -> Asked:
    result = estimator.estimate(frame.image, frame.camera, pixels, dialect=dialect)
    return Asked(index, dialect, pixels, result.depth_m, () if dialect == "dense" else tuple(result.answers))


def _pixels(estimator: Estimator, frame: ReferenceFrame, dialect: str, points: int) -> np.ndarray:
    """Pixels that the dialect can be asked about."""
    camera = frame.camera
    if dialect == "dense":
        stride = max(1, math.isqrt(camera.width * camera.height // _MAP_POINTS))
        return stride_pixels(camera.width, camera.height, stride)
    # At random places: the first of them are spread over the image too.
    margin = min(camera.width, camera.height) // 10
    pixels = sample_pixels(camera.width, camera.height, points, method="random", margin_px=margin)
    return pixels[estimator.askable(frame.image, camera, pixels, dialect=dialect)]


def _dialects(reference: Reference) -> tuple[str, ...]:
    return tuple(dict.fromkeys(asked.dialect for asked in reference.asked))
