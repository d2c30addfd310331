"""What the node's log says of things that go on being wrong: once, and again after a while. No ROS in here."""

from __future__ import annotations

import math
import re
import threading
import time
import traceback
from typing import TYPE_CHECKING, Protocol

from depthlm_ros.errors import DepthLMError

if TYPE_CHECKING:
    from depthlm_ros.estimator import Estimator

# A camera can fail thirty times a second; a person reads one line of it.
INTERVAL_S = 5.0
# ... and a complaint about the model, which may last for days.
REMINDER_INTERVAL_S = 60.0
_NUMBER = re.compile(r"\d+(\.\d+)?")


class Logger(Protocol):
    """rclpy's."""

    def warning(self, message: str) -> object:
        """Logs a warning."""

    def error(self, message: str) -> object:
        """Logs an error."""


class Complaints:
    """Logs complaints, none more often than a person can read. From any thread.

    Args:
        logger: of the node.
    """

    def __init__(self, logger: Logger) -> None:
        self._logger = logger
        self._lock = threading.Lock()
        self._said_s: dict[str, float] = {}

    def say(self, about: str, text: str) -> None:
        """Warns.

        Args:
            about: what is wrong; the same is said again after `INTERVAL_S`.
            text: the sentence, which may be another one each time.
        """
        if self._due(about, INTERVAL_S):
            self._logger.warning(text)

    def frame_failed(self, error: Exception) -> None:
        """Tells why a frame has no answer; with a traceback where nobody thought of it."""
        if not self._due(type(error).__name__, INTERVAL_S):
            return
        if isinstance(error, DepthLMError):
            self._logger.warning(f"frame skipped: {error}")
        else:
            text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
            self._logger.error(f"frame skipped, unexpectedly:\n{text}")

    def remind(self, estimator: Estimator | None, at_once: bool = False) -> None:
        """Says what is wrong with the model: whoever accepted it is told for as long as it runs.

        Args:
            estimator: with the model; None says nothing.
            at_once: also what was said less than `REMINDER_INTERVAL_S` ago.
        """
        if estimator is None:
            return
        for sentence in estimator.complaints:
            # Sentences count seconds, and are the same all the same.
            about = f"model: {_NUMBER.sub('#', sentence)}"
            if not self._due(about, 0.0 if at_once else REMINDER_INTERVAL_S):
                continue
            proof = estimator.proof
            if proof.accepted and sentence == proof.complaint:
                self._logger.error(f"ACCEPTED because accept_unproven is true: {sentence}")
            else:
                self._logger.warning(sentence)

    def _due(self, about: str, interval_s: float) -> bool:
        now = time.monotonic()
        with self._lock:
            if now - self._said_s.get(about, -math.inf) < interval_s:
                return False
            self._said_s[about] = now
            return True
