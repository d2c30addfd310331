"""Numbers that answers will probably hold: those of the frame before, where the scene stands still."""

from __future__ import annotations

import re
from collections.abc import Sequence

from depthlm_ros.engines.base import Answer

# A guess that fails costs the tokens that were fed with it, one that holds saves passes.
WORTHWHILE = 0.5

_NUMBER = re.compile(r"[0-9]+(?:\.[0-9]+)?")


class LastAnswers:
    """What was answered to the last frame's questions."""

    def __init__(self) -> None:
        self._texts: dict[str, str] = {}
        self._held = 0.0

    def guesses(self, questions: Sequence[str]) -> list[str] | None:
        """A number for each question, "" where there is none.

        Returns:
            None where guessing isn't worthwhile: the last two frames' answers to the same questions differed too often.
        """
        if self._held < WORTHWHILE:
            return None
        found = [_NUMBER.search(self._texts.get(question, "")) for question in questions]
        return [number.group() if number else "" for number in found] if any(found) else None

    def remember(self, questions: Sequence[str], answers: Sequence[Answer]) -> None:
        """Takes note of a frame's answers."""
        texts = dict(zip(questions, (answer.text for answer in answers), strict=True))
        both = texts.keys() & self._texts.keys()
        self._held = sum(texts[q] == self._texts[q] for q in both) / len(texts) if texts else 0.0
        self._texts = texts
