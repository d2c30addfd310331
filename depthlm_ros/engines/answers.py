"""Generated tokens to an `Answer`: its text, and how sure the model was of the number in it."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from depthlm_ros.engines.base import Answer

NUMBER = re.compile(r"\d+(?:\.\d+)?|\.\d+")


class AnswerReader:
    """Decodes answers and remembers the text of each token it has seen."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._special = frozenset(tokenizer.all_special_ids)
        self._pieces: dict[int, str] = {}

    def answer(self, ids: Sequence[int], chances: Sequence[float]) -> Answer:
        """Builds one answer.

        Args:
            ids: generated token ids.
            chances: probability that the model gave each of them.
        """
        text = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return Answer(text, tuple(ids), self._confidence(ids, chances))

    def _confidence(self, ids: Sequence[int], chances: Sequence[float]) -> float:
        pieces = [self._piece(token) for token in ids]
        numbers = list(NUMBER.finditer("".join(pieces)))
        if not numbers:
            return 0.0
        start, end = numbers[-1].span()
        used, at = [], 0
        for piece, chance in zip(pieces, chances, strict=True):
            if at < end and at + len(piece) > start:
                used.append(chance)
            at += len(piece)
        return math.prod(used)

    def _piece(self, token: int) -> str:
        if token not in self._pieces:
            shown = (
                "" if token in self._special else self._tokenizer.decode([token], clean_up_tokenization_spaces=False)
            )
            self._pieces[token] = shown
        return self._pieces[token]
