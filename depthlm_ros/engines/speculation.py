"""What a trained model will probably say next; fed along and verified, never believed.

A model that was trained on a fixed sentence with a number in it says that sentence. Its tokens are
therefore fed together with the question, and the same pass shows after how many of them the model
would have said something else (speculative decoding: Leviathan et al. 2023, arXiv 2211.17192; here
the draft is the trained sentence and costs nothing). Greedy answers stay what they are, token for
token; only the number's digits have to be decoded one after another.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from depthlm_ros.errors import EngineError

NUMBER, SAME = "{number}", "{same}"

# Published answers have two decimals at every distance (DepthLM's training targets).
DECIMALS = 2

# Digits before the point that are counted, and what a count is worth after each further answer: some hundred answers
# are remembered, a frame's worth.
_WHOLE_DIGITS = 4
_FORGET = 0.995

# Any number will do: it only shows where a number stands between the tokens of the sentence.
_SAMPLES = ("7.31", "4.82")


class Sentence:
    """The sentence of an answer as tokens.

    Args:
        tokenizer: of the model.
        template: the answer's text with "{number}" at each number's place, and "{same}" where the number before
            is repeated.

    Raises:
        EngineError: no "{number}" in the template, or one that can't be told from what stands beside it in tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str) -> None:
        parts = re.split(r"(\{number\}|\{same\})", template)
        self._same = [place == SAME for place in parts[1::2]]
        if not self._same or self._same[0]:
            raise EngineError(f"the expected answer {template!r} has no {NUMBER}; put it where the number stands")
        # How often numbers had 1, 2, ... digits before the point; most distances are below ten metres.
        self._lengths = [0.0, 1.0, *[0.0] * (_WHOLE_DIGITS - 1)]
        self._segments = self._split(tokenizer, parts[::2], template)
        self.digits = {tokenizer.convert_tokens_to_ids(digit): digit for digit in "0123456789"}
        self.point: int = tokenizer.convert_tokens_to_ids(".")

    @property
    def head(self) -> list[int]:
        """What comes before the first number."""
        return list(self._segments[0])

    def propose(self, said: Sequence[int]) -> list[int]:
        """What probably follows.

        Args:
            said: the tokens of the answer so far.

        Returns:
            Tokens to verify; empty where the answer isn't the sentence, or only the model knows.
        """
        at, number = 0, []
        for segment, same in zip(self._segments, [*self._same, None], strict=True):
            rest = said[at : at + len(segment)]
            if list(rest) != segment[: len(rest)]:
                return []
            if len(rest) < len(segment):
                ahead = segment[len(rest) :]
                return ahead + self._ahead(same, number, segment)
            at += len(segment)
            if same is None:
                return []
            before, number = number, []
            while at < len(said) and self._in_number(said[at]):
                number.append(said[at])
                at += 1
            if at == len(said):
                return self._within(number, before if same else None, segment)
        return []

    def learn(self, said: Sequence[int]) -> None:
        """Remembers how long the number of an answer was, so that the point is proposed where it mostly stands."""
        head = self._segments[0]
        rest = said[len(head) :]
        # None where the answer was cut within its number.
        whole = next((at for at, token in enumerate(rest) if token not in self.digits), None)
        if list(said[: len(head)]) == head and whole is not None and 0 < whole <= _WHOLE_DIGITS:
            self._lengths = [_FORGET * count for count in self._lengths]
            self._lengths[whole] += 1.0

    def is_number(self, token: int) -> bool:
        """Whether the token is a digit or the point."""
        return self._in_number(token)

    def _in_number(self, token: int) -> bool:
        return token in self.digits or token == self.point

    def _ahead(self, same: bool | None, number: list[int], segment: list[int]) -> list[int]:
        """What follows a segment: the number before where it is repeated, and the segment after that."""
        return self._within([], number, segment) if same else []

    def _within(self, number: list[int], repeated: list[int] | None, segment: list[int]) -> list[int]:
        """What follows the beginning of the number after `segment`."""
        after = next(at for at, other in enumerate(self._segments) if other is segment) + 1
        if repeated is not None:
            if number == repeated[: len(number)]:
                return repeated[len(number) :] + self._rest(after, repeated)
            return []
        if not number:
            return []
        if self.point not in number:
            whole = len(number)
            ends = whole > _WHOLE_DIGITS or self._lengths[whole] >= sum(self._lengths[whole + 1 :])
            return [self.point] if ends else []
        if len(number) - 1 - number.index(self.point) < DECIMALS:
            return []
        return self._rest(after, number)

    def _rest(self, at: int, number: list[int]) -> list[int]:
        """The segment, and all after it as long as nothing but the same number is to come."""
        said = list(self._segments[at])
        while at < len(self._same) and self._same[at]:
            at += 1
            said += number + self._segments[at]
        return said

    @staticmethod
    def _split(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], template: str) -> list[list[int]]:
        """Ids of the texts between the numbers, as they are within the whole."""
        found = []
        for sample in _SAMPLES:
            whole = sample.join(texts)
            try:
                encoded = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
            except (NotImplementedError, ValueError) as error:
                # Tokenizers without a `tokenizers` backend.
                raise EngineError(f"{type(tokenizer).__name__} doesn't say where in a text its tokens stand") from error
            segments: list[list[int]] = [[]]
            spans, at = [], 0
            for text in texts[:-1]:
                at += len(text)
                spans.append((at, at + len(sample)))
                at += len(sample)
            for token, (start, stop) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
                inside = next((i for i, (a, b) in enumerate(spans) if start < b and stop > a), None)
                if inside is None:
                    segments[-1].append(token)
                elif start < spans[inside][0] or stop > spans[inside][1]:
                    raise EngineError(
                        f"the expected answer {template!r} has a token that holds a part of the number; give none"
                    )
                elif len(segments) == inside + 1:
                    segments.append([])
            found.append(segments)
        if found[0] != found[1] or len(found[0]) != len(texts):
            raise EngineError(f"the tokens of the expected answer {template!r} depend on its number; give none")
        return found[0]
