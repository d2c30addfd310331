"""What the node tells about itself: counts, latency by stage, the last error. No ROS in here."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

# Long enough for a steady figure, short enough to follow a change of dialect.
_WINDOW_S = 10.0
_WINDOW_FRAMES = 30


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
        self._last_error = ""

    def frame_done(self, timing_s: dict[str, float], asked: int, answered: int) -> None:
        """Notes a frame that went well: seconds by stage, points asked and answered."""
        with self._lock:
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

    def note(self, error: str) -> None:
        """Notes an error that isn't about one frame."""
        with self._lock:
            self._last_error = error

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
            values = {
                "frames received": str(received),
                "frames processed": str(self._processed),
                "frames dropped": str(dropped),
                "frames failed": str(self._failed),
                "fps": f"{recent / min(_WINDOW_S, max(1.0, now - self._started)):.2f}",
                "points asked": str(self._asked),
                "points unanswered": str(self._unanswered),
            }
            for stage in dict.fromkeys(stage for timing in self._timings for stage in timing):
                seconds = [timing[stage] for timing in self._timings if stage in timing]
                values[f"latency {stage} ms"] = f"{1000 * sum(seconds) / len(seconds):.1f}"
            values["last error"] = self._last_error
            last_error = self._last_error
        if failed_now:
            level = "warn" if processed_now else "error"
            return Status(level, f"{failed_now} frames failed since the last report: {last_error}", values)
        if warnings:
            return Status("warn", "; ".join(warnings), values)
        return Status("ok", state, values)
