"""The fast path: what questions share is stored once, trained sentences are verified, digits are decoded.

It stands beside the plain path (`plain.py`) and gives the same tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

from transformers import PreTrainedTokenizerBase

from depthlm_ros.engines.answering import Answering, Group, Row
from depthlm_ros.engines.digits import DigitGrammar, NumberDistribution, expand_numbers
from depthlm_ros.engines.keys import Prefix
from depthlm_ros.engines.speculation import Sentence
from depthlm_ros.engines.trees import NumberTrees, number_starts
from depthlm_ros.errors import EngineError

Distributions = tuple[NumberDistribution, ...]


class FastPath:
    """Answers what continues a prefix.

    Args:
        answering: runs the decoder.
        tokenizer: of the checkpoint.
        tell: called with what costs speed and no answer.
    """

    def __init__(
        self, answering: Answering, tokenizer: PreTrainedTokenizerBase, tell: Callable[[str], None]
    ) -> None:
        self._answering = answering
        self._tokenizer = tokenizer
        self._tell = tell
        self._sentences: dict[str, Sentence | None] = {}

    def answer(
        self,
        prefix: Prefix,
        suffixes: Sequence[Sequence[int]],
        max_new_tokens: int,
        expects: str | None = None,
        distribution: bool = False,
        guesses: Sequence[str] | None = None,
    ) -> list[tuple[Row, Distributions]]:
        """Answers each suffix.

        Args:
            prefix: of one image for all, or with a row for each suffix.
            suffixes: the rest of each prompt, at least one token.
            max_new_tokens: longest answer.
            expects: the trained sentence, see `speculation.Sentence`.
            distribution: also give the distributions of the answers' numbers.
            guesses: the number that each answer probably holds, "" for none.

        Returns:
            Of each suffix its answer, and the distributions, none unless asked for.
        """
        numbers: dict[int, Distributions] = {}

        def expand(places: list[int], group: Group) -> None:
            numbers.update(zip(places, self._distributions(group), strict=True))

        sentence = self._sentence(expects)
        tokens = None
        if guesses is not None and sentence is not None:
            # What can't be written in the tokens of digits isn't guessed.
            known = {text: token for token, text in sentence.digits.items()} | {".": sentence.point}
            tokens = [[known[c] for c in guess] if known.keys() >= set(guess) else [] for guess in guesses]
        rows = self._answering.answer(
            prefix, suffixes, max_new_tokens, sentence, tokens, finished=expand if distribution else None
        )
        return [(row, numbers.get(at, ())) for at, row in enumerate(rows)]

    def _distributions(self, group: Group) -> list[Distributions]:
        """Of each row's numbers what else they could have been. The rows' keys are lost."""
        *digits, point = self._digits.ids
        starts = [number_starts(row.said, digits, point) for row in group.rows]
        found: list[list[NumberDistribution]] = [[] for _ in starts]
        # The last numbers first, since a number's alternatives overwrite what follows it.
        for which in reversed(range(max(map(len, starts), default=0))):
            rows = [row for row, places in enumerate(starts) if len(places) > which]
            trees = NumberTrees(self._answering, group, rows, [starts[row][which] for row in rows], self._digits.ids)
            for row, number in zip(rows, expand_numbers(trees.start(), trees.forward, self._digits), strict=True):
                found[row].insert(0, number)
        return [tuple(numbers) for numbers in found]

    @cached_property
    def _digits(self) -> DigitGrammar:
        return DigitGrammar(self._tokenizer)

    def _sentence(self, expects: str | None) -> Sentence | None:
        if expects is None:
            return None
        if expects not in self._sentences:
            try:
                self._sentences[expects] = Sentence(self._tokenizer, expects)
            except EngineError as error:
                self._sentences[expects] = None
                self._tell(f"answers are decoded token after token, which is slower: {error}")
        return self._sentences[expects]
