"""How a model is asked about pixels of a view in each dialect, and how its answers are read.

    dense         one map of the whole view, read at the pixels
    coordinates   a question for each pixel, which names it in numbers
    marker        a question for each pixel, about the image with an arrow drawn at it
    compact       a question for one pixel or several, in the fewest words
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from depthlm_ros.camera import UnifiedView
from depthlm_ros.cards import ModelCard
from depthlm_ros.engines.base import Answer, Engine
from depthlm_ros.expectation import Expected
from depthlm_ros.guesses import LastAnswers
from depthlm_ros.map_reading import MapReader, map_reader
from depthlm_ros.markers import MARGIN_PX, arrow_patch, drawable
from depthlm_ros.prompts import (
    LONGEST_NUMBER,
    compact_questions,
    coordinates_question,
    dense_question,
    marker_question,
    normalise_pixel,
    parse_compact_points,
    parse_depths,
)
from depthlm_ros.remember import remember

# Questions handed to the engine at once, so that progress shows and marked images don't fill the memory.
_CHUNK = 256

Progress = Callable[[int], None]


class Said(NamedTuple):
    """Answers about pixels: (N,) metres of the model's kind, (N,) confidence, (N,) asked, texts, distributions."""

    metres: np.ndarray
    confidence: np.ndarray
    asked: np.ndarray
    texts: tuple[str, ...]
    expected: Expected | None = None


class Clock:
    """Adds up the seconds of each stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start


@dataclass(frozen=True)
class PixelQuestions:
    """Pixels of one view that a model is asked about; a method for each dialect.

    Attributes:
        engine: who answers.
        card: of the model.
        last_answers: to the same questions about the frame before, which an engine may take for guesses.
        view: what the model sees.
        at: (N, 2) `(u, v)` of the view.
        asked: (N,) bool: those that the dialect can refer to; about the others there is no question.
        clock: of the frame.
        progress: called with the number of pixels that were just answered.
    """

    engine: Engine
    card: ModelCard
    last_answers: LastAnswers
    view: UnifiedView
    at: np.ndarray
    asked: np.ndarray
    clock: Clock
    progress: Progress

    def dense(self, on_map: np.ndarray | None = None) -> Said:
        """Reads the map at the pixels.

        Args:
            on_map: (N, 2) whole places on the map, for readings other than the pixel's own place.
        """
        asked = self.asked
        with self.clock("model"):
            depth = self.engine.depth_map(self.view.image, dense_question())
        with self.clock("geometry"):
            map_size = depth.shape[1], depth.shape[0]
            if on_map is None:
                # A `published` view isn't of a size that the processor keeps; the map then has the processor's size.
                reader = map_reader(self.at, self._view_size, map_size)
            else:
                reader = MapReader(on_map, *map_size)
                asked = asked & ((on_map >= 0) & (on_map < map_size)).all(axis=1)
            metres, spread = reader.read_with_spread(depth)
            confidence = 1 - spread
        self.progress(len(self.at))
        return Said(metres, confidence, asked, ())

    def coordinates(self, distribution: bool = False) -> Said:
        """Asks about each pixel by its numbers; `distribution`: also how the belief is spread over numbers."""
        with self.clock("prompt"):
            rows, questions = _coordinates_questions(
                self.at, self.asked, self._view_size, self.card.coordinate_range
            )
        with self.clock("model"):
            # The whole frame in one call: the image is encoded and its prefix prefilled once.
            template = self.card.answer_template("coordinates")
            answers = self._ask(questions, self.card.max_new_tokens, template, distribution)
        self.progress(len(self.at))
        return self._read(answers, rows, distribution)

    def marker(self, distribution: bool = False) -> Said:
        """Asks about each pixel by an arrow; `distribution` as in `coordinates`."""
        rows = np.flatnonzero(self.asked)
        options = {"expects": self.card.answer_template("marker"), **_if_asked(distribution)}
        answers: list[Answer] = []
        for start in range(0, len(rows), _CHUNK):
            some = rows[start : start + _CHUNK]
            with self.clock("marker"):
                blocks = [arrow_patch(self.view.image, (u, v)) for u, v in self.at[some].astype(int).tolist()]
            with self.clock("model"):
                questions = [marker_question()] * len(blocks)
                answers += self.engine.answer_marked(
                    self.view.image, blocks, questions, self.card.max_new_tokens, **options
                )
            self.progress(len(some))
        return self._read(answers, rows, distribution)

    def compact(self, each: int = 1, distribution: bool = False) -> Said:
        """Asks about `each` pixels at once; `distribution`, with one of them, as in `coordinates`."""
        with self.clock("prompt"):
            rows, questions = _compact_questions(self.at, self.asked, self._view_size, self.card.compact_range, each)
        with self.clock("model"):
            budget = max(self.card.max_new_tokens, each * LONGEST_NUMBER)
            answers = self._ask(questions, budget, self.card.answer_template("compact", each), distribution)
        self.progress(len(self.at))
        metres, confidence, texts = self._nothing_said()
        for start, answer in zip(range(0, len(rows), each), answers, strict=True):
            some = rows[start : start + each]
            depths = parse_compact_points(answer.text, len(some))
            if depths is not None:
                metres[some], confidence[some] = depths, answer.confidences or answer.confidence
            for row in some:
                texts[row] = answer.text
        # With several points an answer there is no distribution: check_distribution.
        expected = Expected.of(answers, rows, len(self.asked)) if distribution else None
        return Said(metres, confidence, self.asked, tuple(texts), expected)

    @property
    def _view_size(self) -> tuple[int, int]:
        return self.view.camera.width, self.view.camera.height

    def _ask(self, questions: Sequence[str], budget: int, template: str, distribution: bool) -> list[Answer]:
        if not questions:
            return []
        options: dict = {"expects": template, **_if_asked(distribution)}
        guesses = self.last_answers.guesses(questions)
        if guesses is not None:
            options["guesses"] = guesses
        answers = self.engine.answer_shared(self.view.image, questions, budget, **options)
        self.last_answers.remember(questions, answers)
        return answers

    def _read(self, answers: list[Answer], rows: np.ndarray, distribution: bool) -> Said:
        metres, confidence, texts = self._nothing_said()
        metres[rows] = parse_depths(answer.text for answer in answers)
        confidence[rows] = [answer.confidence for answer in answers]
        for row, answer in zip(rows.tolist(), answers, strict=True):
            texts[row] = answer.text
        expected = Expected.of(answers, rows, len(self.asked)) if distribution else None
        return Said(metres, confidence, self.asked, tuple(texts), expected)

    def _nothing_said(self) -> tuple[np.ndarray, np.ndarray, list[str]]:
        count = len(self.asked)
        return np.full(count, np.nan, np.float32), np.zeros(count, np.float32), [""] * count


def marker_places(
    view: UnifiedView, at: np.ndarray, asked: np.ndarray, undrawable: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where arrows point.

    Args:
        view: what the model sees.
        at: (N, 2) `(u, v)` of the view.
        asked: (N,) bool: those on the view.
        undrawable: "report" or "shift", as in `Estimator.estimate`.

    Returns:
        (N, 2) whole pixels of the view, (N,) bool which of them can be marked, (N,) bool which aren't the asked ones.
    """
    width, height = view.camera.width, view.camera.height
    # The exact policy gives sub-pixel places; an arrow points at whole pixels.
    whole = np.rint(at)
    shifted = np.zeros(len(at), bool)
    if undrawable == "shift":
        within = np.clip(whole, MARGIN_PX, (width - MARGIN_PX - 1, height - MARGIN_PX - 1))
        # A pixel of the last column may land just off the view; what lands farther off isn't near its border.
        shifted = (within != whole).any(axis=1) & (np.abs(within - whole) <= MARGIN_PX + 1).all(axis=1)
        shifted &= drawable(within, width, height)
        whole = np.where(shifted[:, None], within, whole)
    return whole, (asked | shifted) & drawable(whole, width, height), shifted


@remember(4)
def _coordinates_questions(
    at: np.ndarray, asked: np.ndarray, view_size: tuple[int, int], steps: int
) -> tuple[np.ndarray, tuple[str, ...]]:
    """The rows that are asked, and a question about each."""
    rows = np.flatnonzero(asked)
    said = normalise_pixel(at[rows], *view_size, steps)
    return rows, tuple(coordinates_question(nx, ny, steps) for nx, ny in said.tolist())


@remember(4)
def _compact_questions(
    at: np.ndarray, asked: np.ndarray, view_size: tuple[int, int], steps: int, each: int
) -> tuple[np.ndarray, tuple[str, ...]]:
    """The rows that are asked, and the questions about `each` of them."""
    rows = np.flatnonzero(asked)
    said = normalise_pixel(at[rows], *view_size, steps)
    return rows, tuple(compact_questions(said.tolist(), each, steps))


def _if_asked(distribution: bool) -> dict[str, bool]:
    """Engines that don't know the word aren't told it."""
    return {"distribution": True} if distribution else {}
