"""Questions that wait for the worker: a bounded queue of each kind, in which the oldest gives way. No ROS in here.

A question is about the newest frame. One that comes before any frame waits for it, up to a stated time; one that came
after a frame is about that frame unless a newer one has come, however long the worker was busy in between.
"""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass

from depthlm_ros.errors import ConfigError

TEXT, POINT = "text", "point"
# More would make answers that nobody waits for any more.
LIMIT = 16
# A question goes into the prompt behind the image; a longer text is somebody's file, not a question.
MAX_CHARACTERS = 4000


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        kind: `TEXT` or `POINT`.
        asked_s: when it came, seconds of a clock that never jumps.
        text: of a text question.
        pixel: `(u, v)` of a point question.
        origin: what it came in, for whoever answers; None where that doesn't matter.
    """

    kind: str
    asked_s: float
    text: str = ""
    pixel: tuple[float, float] = (0.0, 0.0)
    origin: object = None

    def __str__(self) -> str:
        if self.kind == POINT:
            return f"pixel ({self.pixel[0]:g}, {self.pixel[1]:g})"
        return repr(self.text if len(self.text) <= 60 else self.text[:57] + "...")


def check_text(text: str) -> None:
    """Checks that a text can be asked at all.

    Raises:
        ConfigError: it is empty or too long.
    """
    if not text.strip():
        raise ConfigError("the question is empty; say what you want to know about the image")
    if len(text) > MAX_CHARACTERS:
        raise ConfigError(f"the question has {len(text)} characters; ask with at most {MAX_CHARACTERS}")


class Questions:
    """The questions that wait, for any number of threads. Kinds don't push each other out.

    Args:
        limit: how many of each kind wait at most.
    """

    def __init__(self, limit: int = LIMIT) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._waiting: dict[str, deque[Question]] = {TEXT: deque(), POINT: deque()}
        self._in_work: list[Question] = []

    def __len__(self) -> int:
        with self._lock:
            return sum(map(len, self._waiting.values()))

    def put(self, question: Question) -> Question | None:
        """Lets a question wait; returns the oldest of its kind where that has to give way."""
        with self._lock:
            waiting = self._waiting[question.kind]
            waiting.append(question)
            return waiting.popleft() if len(waiting) > self._limit else None

    def take(self, frame_s: float, patience_s: float) -> list[Question]:
        """Takes the questions to be answered next: all of one kind, since they share the frame's encoding.

        Args:
            frame_s: when the newest frame came.
            patience_s: a frame older than this when a question came is no frame to answer it about.

        Returns:
            In the order they came, beginning with the one that has waited longest; empty where none can be answered.
        """
        with self._lock:
            heads = [waiting[0] for waiting in self._waiting.values() if waiting]
            if not heads:
                return []
            waiting = self._waiting[min(heads, key=lambda question: question.asked_s).kind]
            taken = [question for question in waiting if frame_s >= question.asked_s - patience_s]
            for _ in taken:
                waiting.popleft()
            self._in_work = taken
            return taken

    def finish(self, taken: list[Question]) -> bool:
        """Says that the questions that `take` gave have their answers.

        Returns:
            Whether somebody still waits for them; False once `clear` has given them away.
        """
        with self._lock:
            waited_for = self._in_work is taken
            self._in_work = []
            return waited_for

    def overdue(self, now_s: float, patience_s: float, frame_s: float | None) -> list[Question]:
        """Takes out the questions that have waited longer than `patience_s` without a frame.

        Args:
            now_s: the time.
            patience_s: see `take`.
            frame_s: when the newest frame came, None where there is none.
        """

        def is_late(question: Question) -> bool:
            no_frame = frame_s is None or frame_s < question.asked_s - patience_s
            return no_frame and now_s - question.asked_s > patience_s

        with self._lock:
            late = [question for waiting in self._waiting.values() for question in waiting if is_late(question)]
            for kind, waiting in self._waiting.items():
                self._waiting[kind] = deque(question for question in waiting if not is_late(question))
            return late

    def clear(self) -> list[Question]:
        """Takes out all, those in work included."""
        with self._lock:
            everything = [*self._in_work, *(question for waiting in self._waiting.values() for question in waiting)]
            self._in_work = []
            for waiting in self._waiting.values():
                waiting.clear()
            return everything
