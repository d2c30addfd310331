"""What the node tells about itself: counts, latency by stage, the last error. No ROS in here."""

from __future__ import annotations

import math
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

# Long enough for a steady figure, short enough to follow a change of dialect.
_WINDOW_S = 10.0
_WINDOW_FRAMES = 100


@dataclass(frozen=True)
class Latency:
    """Seconds that a stage took: the median, and what 95 % of the frames don't exceed."""

    median_s: float
    most_s: float

    @classmethod
    def of(cls, seconds: list[float]) -> Latency:
        """Of at least one frame."""
        ordered = sorted(seconds)
        return cls(statistics.median(ordered), ordered[math.ceil(0.95 * len(ordered)) - 1])

    def __str__(self) -> str:
        """In milliseconds."""
        return f"{1000 * self.median_s:.1f} (95 %: {1000 * self.most_s:.1f})"


@dataclass(frozen=True)
class Status:
    """One diagnostics entry.

    Attributes:
        level: "ok", "warn" or "error".
        message: one sentence for a person.
        values: name to value, in order of display.
    """

    level: str
    message: str
    values: dict[str, str]


class Monitor:
    """Collects from the worker's thread, reports to the executor's.

    Args:
        clock: seconds of a clock that never jumps.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._started = clock()
        self._finished: deque[float] = deque(maxlen=1000)
        self._timings: deque[dict[str, float]] = deque(maxlen=_WINDOW_FRAMES)
        self._processed = 0
        self._asked = 0
        self._unanswered = 0
        self._failed = 0
        self._failed_before = self._processed_before = 0
        self._unaskable = self._shifted = 0
        self._questions = self._poses = self._poses_unread = self._poses_late = 0
        self._unanswered_questions = self._unanswered_questions_before = 0
        self._last_error = ""

    def frame_done(
        self, timing_s: dict[str, float], asked: int, answered: int, unaskable: int = 0, shifted: int = 0
    ) -> None:
        """Notes a frame that went well.

        Args:
            timing_s: seconds by stage.
            asked: points that a question was put about.
            answered: those of them that got a depth.
            unaskable: points that the dialect can't refer to.
            shifted: those of the asked that were asked at another pixel.
        """
        with self._lock:
            self._unaskable += unaskable
            self._shifted += shifted
            self._finished.append(self._clock())
            self._timings.append(timing_s)
            self._processed += 1
            self._asked += asked
            self._unanswered += asked - answered

    def frame_failed(self, error: Exception) -> None:
        """Notes a frame that gave no result."""
        with self._lock:
            self._failed += 1
            self._last_error = f"{type(error).__name__}: {error}"

    def questions_answered(self, seconds: float, count: int) -> None:
        """Notes questions that were answered together, and how long that took."""
        with self._lock:
            self._questions += count
            self._timings.append({"question": seconds})

    def question_unanswered(self, reason: str) -> None:
        """Notes a question that got an error instead of an answer."""
        with self._lock:
            self._unanswered_questions += 1
            self._last_error = reason

    def pose_done(self, read: bool) -> None:
        """Notes a relative pose, and whether the answers could be read."""
        with self._lock:
            self._poses += read
            self._poses_unread += not read

    def pose_late(self, reason: str) -> None:
        """Notes a relative pose that came too late, after the depth of its frame."""
        with self._lock:
            self._poses_late += 1
            self._last_error = reason

    def note(self, error: str) -> None:
        """Notes an error that isn't about one frame."""
        with self._lock:
            self._last_error = error

    def latencies(self) -> dict[str, Latency]:
        """What each stage of the last frames and questions took, in the order in which they went through them."""
        with self._lock:
            return self._latencies()

    def _latencies(self) -> dict[str, Latency]:
        stages = dict.fromkeys(stage for timing in self._timings for stage in timing)
        return {stage: Latency.of([t[stage] for t in self._timings if stage in t]) for stage in stages}

    def report(self, state: str, received: int, dropped: int, warnings: list[str]) -> Status:
        """The state of things now.

        Args:
            state: what the node is doing, in words.
            received: frames that arrived.
            dropped: frames replaced by newer ones before work on them began.
            warnings: standing complaints, such as a QoS mismatch.
        """
        with self._lock:
            now = self._clock()
            recent = sum(now - finished <= _WINDOW_S for finished in self._finished)
            failed_now = self._failed - self._failed_before
            processed_now = self._processed - self._processed_before
            self._failed_before, self._processed_before = self._failed, self._processed
            refused_now = self._unanswered_questions - self._unanswered_questions_before
            self._unanswered_questions_before = self._unanswered_questions
            values = {
                "frames received": str(received),
                "frames processed": str(self._processed),
                "frames dropped": str(dropped),
                "frames failed": str(self._failed),
                "fps": f"{recent / min(_WINDOW_S, max(1.0, now - self._started)):.2f}",
                "points asked": str(self._asked),
                "points unanswered": str(self._unanswered),
                "points not askable": str(self._unaskable),
                "points shifted": str(self._shifted),
                "questions answered": str(self._questions),
                "questions unanswered": str(self._unanswered_questions),
            }
            if self._poses or self._poses_unread or self._poses_late:
                values |= {"poses told": str(self._poses), "poses not readable": str(self._poses_unread)}
                values |= {"poses too late": str(self._poses_late)}
            values |= {f"latency {stage} ms": str(latency) for stage, latency in self._latencies().items()}
            values["last error"] = self._last_error
            last_error = self._last_error
        if failed_now:
            level = "warn" if processed_now else "error"
            return Status(level, f"{failed_now} frames failed since the last report: {last_error}", values)
        if refused_now:
            return Status("warn", f"{refused_now} questions unanswered since the last report: {last_error}", values)
        if warnings:
            return Status("warn", "; ".join(warnings), values)
        return Status("ok", state, values)
