"""Generated tokens to an `Answer`: its text, and how sure the model was of the number in it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from depthlm_ros.engines.base import Answer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NUMBER = re.compile(r"\d+(?:\.\d+)?|\.\d+")


def number_confidences(pieces: Sequence[str], chances: Sequence[float]) -> tuple[float, ...]:
    """The probability of each number in an answer: the product of those of the tokens that it has a part in.

    Args:
        pieces: text of each token.
        chances: probability of each token, in [0, 1].
    """
    spans = [number.span() for number in NUMBER.finditer("".join(pieces))]
    products, at, first = [1.0] * len(spans), 0, 0
    for piece, chance in zip(pieces, chances, strict=True):
        while first < len(spans) and spans[first][1] <= at:
            first += 1
        for i in range(first, len(spans)):
            if at + len(piece) <= spans[i][0]:
                break
            products[i] *= chance
        at += len(piece)
    return tuple(products)


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
        confidences = number_confidences([self._piece(token) for token in ids], chances)
        return Answer(text, tuple(ids), min(confidences, default=0.0), confidences)

    def _piece(self, token: int) -> str:
        if token not in self._pieces:
            shown = (
                "" if token in self._special else self._tokenizer.decode([token], clean_up_tokenization_spaces=False)
            )
            self._pieces[token] = shown
        return self._pieces[token]
