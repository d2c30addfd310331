"""How sure a model is of the number it says: the distribution of its digits, expanded by value.

A number is written digit by digit, so its distribution is a tree: "3" splits into "3." and "31", "3." into "3.0" to
"3.9". The tree is expanded from the top, and where it isn't, a branch stands for the interval of values below it:
"3.4" covers 3.40 to 3.49. Nothing is gained from asking for the last digits, which are close to uniform; a search for
the likeliest *strings* would follow just those.

A node costs one forward pass of the model, and a pass over many nodes hardly more than one over few. So the nodes of
all points go together, in three passes; a digit and the point after it are asked for in the same pass where that is
likely to pay. Which nodes: those that could change the standard deviation of the log depth the most.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from depthlm_ros.errors import ModelError
from depthlm_ros.metrics import DELTA
from depthlm_ros.prompts import MIN_DEPTH_M

Forward = Callable[[Sequence[int], Sequence[tuple[int, ...]]], torch.Tensor]

# "The meter number, rounded to two decimal places": prompts.answer_text.
DECIMALS = 2
POINT = 10
# The farthest published label lies at 120 m (prompts.MAX_DEPTH_M). A model that has slipped into a fourth digit before
# the point goes on to any number, and a thousandth of probability at 10 km would drown the mean.
WHOLE_DIGITS = 3
_LONGEST = WHOLE_DIGITS + 1 + DECIMALS
_HALF_STEP = 0.5 * 10.0**-DECIMALS
# What the cheap tree may ask for after each pass, as shares of the budget.
_PASSES = (0.4, 0.7, 1.0)
# Nodes are asked for until what the others could do to sigma_log is below this.
_TOLERANCE = 0.01
# Probability left unexpanded in an exact tree.
_EXACT_REST = 1e-4
# Probability that a whole number goes on with another digit, where the answer hasn't shown it: of one digit, of two
# that begin with 1 (to 100 m and more), of other two. It counts for little as soon as anything is shown.
_MORE_DIGITS = (0.1, 0.03, 0.001)
_PRIOR_WEIGHT = 0.02
# Nearby numbers go on alike: "78" as "75" does, and not as "11", where "110" is near. In units of ln value.
_ALIKE = 0.15


@dataclass(frozen=True)
class NumberDistribution:
    """What a model could have said in place of one number, in its unit (metres).

    Attributes:
        mean: expected value.
        std: standard deviation.
        median: half of the probability lies on each side.
        geometric_mean: exp of the expected logarithm; the estimate with the smallest squared error in log depth.
        sigma_log: standard deviation of the natural logarithm; 0.1 is about 10 %.
        mass: probability that a depth below 1000 m is said, and no other text; the rest is in none of the figures
            above, which are NaN where it is 0.
        greedy_probability: probability of the likeliest digit, digit after digit; of the number that greedy decoding
            writes.
        near_greedy: probability of what lies within a factor 1.25 of the greedy number; what the model itself holds
            for its chance to be right in δ1. It counts other text as wrong.
        near_median: the same of the median.
        near_mean: the same of the mean.
        forwards: nodes that were expanded for it.
    """

    mean: float
    std: float
    median: float
    geometric_mean: float
    sigma_log: float
    mass: float
    greedy_probability: float
    near_greedy: float
    near_median: float
    near_mean: float
    forwards: int


class DigitGrammar:
    """Which tokens are digits and the decimal point; whatever else follows a number ends it.

    Attributes:
        ids: token ids of "0" to "9" and of ".".

    Raises:
        ModelError: the tokenizer has tokens of several digits.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        # The first character may come with a word boundary of its own, so it is left out.
        ids = tokenizer.encode("00123456789.0", add_special_tokens=False)[-12:]
        if len(set(ids)) != 11 or ids[0] != ids[-1] or tokenizer.decode(ids[:11]).strip() != "0123456789.":
            raise ModelError(
                f"{type(tokenizer).__name__} doesn't write a number with a token for each digit (it makes {ids} of "
                "'0123456789.0'); ask without `distribution`"
            )
        self.ids = tuple(ids[:11])

    def narrow(self, log_probs: torch.Tensor) -> torch.Tensor:
        """(n, V) log-probabilities of all tokens to (n, 11) of digits and point; what is narrow already stays so."""
        return log_probs if log_probs.shape[-1] == len(self.ids) else log_probs[:, list(self.ids)]

    def path(self, symbols: Sequence[int]) -> tuple[int, ...]:
        """Symbols (0 to 9, `POINT`) as token ids."""
        return tuple(self.ids[symbol] for symbol in symbols)


def expand_numbers(
    start: torch.Tensor, forward: Forward, grammar: DigitGrammar, *, budget: int = 25, exact: bool = False
) -> list[NumberDistribution]:
    """Expands the digits of many answers together.

    Args:
        start: (N, V) float32 log-probabilities of the number's first token, or `grammar.narrow` of them.
        forward: of the answers with indices `rows`, each continued by the digits `paths[i]`, the (n, V) float32
            log-probabilities of the token that follows, or `grammar.narrow` of them.
        grammar: of the model's tokenizer.
        budget: most nodes of one answer, each a row of `forward`; it is called at most three times.
        exact: expand until less than 1e-4 of the probability is left, some 420 nodes an answer.
    """
    tree = _Tree(_probabilities(grammar, start))
    passes = range(_LONGEST) if exact else (round(share * budget) for share in _PASSES)
    for limit in passes:
        chosen = tree.unexpanded(_EXACT_REST) if exact else tree.worthwhile(limit)
        if not len(chosen):
            break
        paths = [grammar.path(symbols) for symbols in chosen.paths()]
        tree.take(chosen, _probabilities(grammar, forward(chosen.row.tolist(), paths)))
    return tree.distributions()


def _probabilities(grammar: DigitGrammar, log_probs: torch.Tensor) -> np.ndarray:
    return grammar.narrow(log_probs).double().exp().cpu().numpy()


@dataclass(frozen=True)
class _Nodes:
    """Beginnings of numbers, a row each.

    Attributes:
        row: (M,) which answer.
        mass: (M,) probability of the beginning.
        greedy: (M,) bool, every symbol was the likeliest.
        value: (M,) of the digits so far.
        decimals: (M,) digits after the point, -1 without a point.
        length: (M,) symbols so far.
        symbols: (M, _LONGEST) int8, padded with -1.
    """

    row: np.ndarray
    mass: np.ndarray
    greedy: np.ndarray
    value: np.ndarray
    decimals: np.ndarray
    length: np.ndarray
    symbols: np.ndarray

    def __len__(self) -> int:
        return len(self.row)

    def __getitem__(self, which: np.ndarray) -> _Nodes:
        return _Nodes(*(getattr(self, f.name)[which] for f in fields(self)))

    @classmethod
    def joined(cls, parts: Sequence[_Nodes]) -> _Nodes:
        return cls(*(np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(cls)))

    @property
    def whole(self) -> np.ndarray:
        """(M,) bool: there is no point yet."""
        return self.decimals < 0

    @property
    def finished(self) -> np.ndarray:
        """(M,) bool: nothing of interest follows."""
        return self.decimals == DECIMALS

    def paths(self) -> list[list[int]]:
        return [symbols[:length] for symbols, length in zip(self.symbols.tolist(), self.length.tolist(), strict=True)]

    def keys(self) -> np.ndarray:
        """(M,) int64, different for different beginnings of one answer."""
        powers = 12 ** np.arange(_LONGEST, dtype=np.int64)
        return self.row.astype(np.int64) * 12**_LONGEST + (self.symbols.astype(np.int64) + 1) @ powers

    def followed_by(self, symbol: np.ndarray | int, mass: np.ndarray, greedy: np.ndarray) -> _Nodes:
        digit = np.broadcast_to(symbol, self.row.shape)
        step = np.where(self.whole, 1.0, 10.0 ** -(self.decimals + 1.0))
        grown = np.where(self.whole, 10 * self.value, self.value) + digit * step
        symbols = self.symbols.copy()
        symbols[np.arange(len(self)), self.length] = digit
        is_point = digit == POINT
        return _Nodes(
            self.row,
            mass,
            self.greedy & greedy,
            np.where(is_point, self.value, grown),
            np.where(is_point, 0, np.where(self.whole, -1, self.decimals + 1)),
            self.length + 1,
            symbols,
        )


def _root(count: int) -> _Nodes:
    whole = np.full(count, -1)
    ones, zeros = np.ones(count), np.zeros(count, np.intp)
    return _Nodes(np.arange(count), ones, ones > 0, 0.0 * ones, whole, zeros, np.full((count, _LONGEST), -1, np.int8))


Function = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class _Pieces:
    """Shares of probability, each even over an interval of values, or at one value where `low == high`."""

    row: np.ndarray
    mass: np.ndarray
    low: np.ndarray
    high: np.ndarray

    @classmethod
    def joined(cls, parts: Sequence[_Pieces]) -> _Pieces:
        return cls(*(np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(cls)))

    @classmethod
    def below(cls, row: np.ndarray, mass: np.ndarray, value: np.ndarray, width: np.ndarray) -> _Pieces:
        """Of numbers from `value` to the last one before `value + width`; even over what rounds to them."""
        some = mass > 0
        low = np.maximum(value - _HALF_STEP, _HALF_STEP)
        return cls(row[some], mass[some], low[some], (value + width - _HALF_STEP)[some])

    def sums(self, function: Function, count: int) -> np.ndarray:
        """(count,) of each answer: mass times the mean of a function over the interval."""
        return np.bincount(self.row, self.mass * function(self.low, self.high), count)

    def near(self, centre: np.ndarray) -> np.ndarray:
        """(count,) mass within a factor `DELTA` of each answer's centre."""
        least, most = centre[self.row] / DELTA, centre[self.row] * DELTA
        width = self.high - self.low
        within = np.minimum(most, self.high) - np.maximum(least, self.low)
        share = np.where(width > 0, np.clip(within / np.where(width > 0, width, 1), 0, 1), within >= 0)
        return np.bincount(self.row, self.mass * share, len(centre))

    def medians(self, count: int) -> np.ndarray:
        """(count,) value with half of an answer's mass on each side; NaN without any mass."""
        order = np.lexsort((self.high, self.low, self.row))
        row, mass = self.row[order], self.mass[order]
        through = np.cumsum(mass)
        total = np.bincount(row, mass, count)
        before = np.concatenate([[0], np.cumsum(total)[:-1]])
        half = before + total / 2
        if not len(row):
            return np.full(count, np.nan)
        at = np.minimum(np.searchsorted(through, half), len(row) - 1)
        low, high = self.low[order][at], self.high[order][at]
        share = np.clip((half - through[at] + mass[at]) / mass[at], 0, 1)
        return np.where(total > 0, low + share * (high - low), np.nan)


def _one(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    return np.ones_like(low)


def _value(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    return (low + high) / 2


def _square(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    return (low * low + low * high + high * high) / 3


def _log(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Mean of ln x over an interval: its integral is x ln x - x."""
    point = low == high
    width = np.where(point, 1, high - low)
    return np.where(point, np.log(low), (high * np.log(high) - low * np.log(low)) / width - 1)


def _square_of_log(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Mean of ln² x over an interval: its integral is x (ln² x - 2 ln x + 2)."""
    point = low == high
    width = np.where(point, 1, high - low)

    def integral(x: np.ndarray) -> np.ndarray:
        return x * (np.log(x) ** 2 - 2 * np.log(x) + 2)

    return np.where(point, np.log(low) ** 2, (integral(high) - integral(low)) / width)


class _Tree:
    """The trees of all answers, grown together."""

    def __init__(self, start: np.ndarray) -> None:
        self.count = count = len(start)
        self.forwards = np.zeros(count, np.intp)
        self._ended: list[_Pieces] = []
        self._greedy_mass, self._greedy_value = np.ones(count), np.full(count, np.nan)
        # By digits before the point and value: how surely "7" or "12" went on with another digit, NaN where not asked.
        self._went_on = [np.full((count, 10), np.nan), np.full((count, 100), np.nan)]
        self._open = self._expanded(_root(count), start)

    def _expanded(self, nodes: _Nodes, probabilities: np.ndarray) -> _Nodes:
        """Counts what follows `nodes`, (M, 11) probabilities of the next symbol each; returns what stays open of it."""
        second_point = ~nodes.whole[:, None] & (np.arange(11) == POINT)
        probabilities = np.where(second_point, 0, probabilities)
        ends = np.clip(1 - probabilities.sum(1), 0, 1)
        last = (nodes.length > 0) & (nodes.decimals != 0)
        self._end(nodes[last], ends[last])
        likeliest = np.concatenate([probabilities, ends[:, None]], 1).argmax(1)
        stopped = nodes.greedy & last & (likeliest == 11)
        self._note_greedy(nodes.row[stopped], (nodes.mass * ends)[stopped], nodes.value[stopped])
        for length, went_on in enumerate(self._went_on, 1):
            those = nodes.whole & (nodes.length == length)
            went_on[nodes.row[those], nodes.value[those].astype(int)] = probabilities[those, :POINT].sum(1)
        masses = nodes.mass[:, None] * probabilities
        too_long = (nodes.whole & (nodes.length == WHOLE_DIGITS))[:, None] & (np.arange(11) != POINT)
        at, symbol = np.nonzero((masses > 0) & ~too_long)
        children = nodes[at].followed_by(symbol, masses[at, symbol], likeliest[at] == symbol)
        greedy = children[children.greedy]
        unsaid = 10.0 ** -np.maximum(greedy.decimals, 0) - 2 * _HALF_STEP
        self._note_greedy(greedy.row, greedy.mass, greedy.value + unsaid / 2)
        self._end(children[children.finished], 1.0)
        return children[~children.finished]

    def take(self, asked: _Nodes, probabilities: np.ndarray) -> None:
        """Counts what the model said follows the nodes that `unexpanded` or `worthwhile` chose."""
        self.forwards += np.bincount(asked.row, minlength=self.count)
        known = np.isin(asked.keys(), self._open.keys())
        still_open = self._open[~np.isin(self._open.keys(), asked.keys())]
        opened = self._expanded(asked[known], probabilities[known])
        # What was asked for on the chance that its parent leads there.
        order = np.argsort(keys := asked.keys())
        guessed = np.isin(opened.keys(), keys[~known])
        of_guessed = probabilities[order[np.searchsorted(keys, opened[guessed].keys(), sorter=order)]]
        self._open = _Nodes.joined([still_open, opened[~guessed], self._expanded(opened[guessed], of_guessed)])

    def unexpanded(self, rest: float) -> _Nodes:
        """The open nodes but for the unlikeliest, which together have less than `rest` of an answer's probability."""
        return self._open[_beyond(self._open.row, self._open.mass, np.full(self.count, rest))]

    def worthwhile(self, limit: int) -> _Nodes:
        """The open nodes that matter most for sigma_log, and points after them, until each answer has had `limit`."""
        nodes = self._open
        mean, sigma = self._log_moments()
        more = self._more(nodes)
        whole = nodes.whole
        after = nodes[whole].followed_by(POINT, (nodes.mass * (1 - more))[whole], more[whole] < 0.5)
        matters = np.concatenate([_matters(nodes, more, mean), _matters(after, np.zeros(len(after)), mean)])
        nodes = _Nodes.joined([nodes, after])
        wanted = _beyond(nodes.row, matters, 2 * np.maximum(sigma, _TOLERANCE) * _TOLERANCE) | nodes.greedy
        matters = np.where(nodes.greedy, np.inf, matters)
        order = np.lexsort((-matters, nodes.row))
        order = order[wanted[order]]
        starts = np.searchsorted(nodes.row[order], np.arange(self.count))
        rank = np.arange(len(order)) - starts[nodes.row[order]]
        chosen = order[rank < (limit - self.forwards)[nodes.row[order]]]
        # What follows a node that isn't asked itself could not be hung up, and would be asked again.
        parents = np.concatenate([np.full(len(whole), -1), np.flatnonzero(whole)])
        return nodes[chosen[(parents[chosen] < 0) | np.isin(parents[chosen], chosen)]]

    def distributions(self) -> list[NumberDistribution]:
        pieces = self._pieces()
        mass = pieces.sums(_one, self.count)
        safe = np.where(mass > 0, mass, np.nan)
        mean = pieces.sums(_value, self.count) / safe
        var = np.maximum(pieces.sums(_square, self.count) / safe - mean**2, 0)
        log_mean, sigma = self._log_moments()
        median = pieces.medians(self.count)
        near = [pieces.near(centre) for centre in (self._greedy_value, median, mean)]
        columns = mean, np.sqrt(var), median, np.exp(log_mean), sigma, mass, self._greedy_mass, *near, self.forwards
        return [NumberDistribution(*row) for row in zip(*(column.tolist() for column in columns), strict=True)]

    def _end(self, nodes: _Nodes, probability: np.ndarray | float) -> None:
        good = nodes.value >= MIN_DEPTH_M
        mass = nodes.mass * probability
        self._ended.append(_Pieces(nodes.row[good], mass[good], nodes.value[good], nodes.value[good]))

    def _note_greedy(self, row: np.ndarray, mass: np.ndarray, value: np.ndarray) -> None:
        self._greedy_mass[row], self._greedy_value[row] = mass, value

    def _more(self, nodes: _Nodes) -> np.ndarray:
        """(M,) probability that a whole number goes on with another digit, as near ones of the answer have shown it."""
        more = np.zeros(len(nodes))
        one_digit, ten_to_nineteen, others = _MORE_DIGITS
        for length, went_on in enumerate(self._went_on, 1):
            those = nodes.whole & (nodes.length == length) & (nodes.value > 0)
            values = np.arange(went_on.shape[1])
            prior = one_digit if length == 1 else np.where(values < 20, ten_to_nineteen, others)
            with np.errstate(divide="ignore", invalid="ignore"):
                apart = (np.log(values[:, None]) - np.log(values)) / _ALIKE
            alike = np.where(values[:, None] * values > 0, np.exp(-0.5 * apart**2), 0)
            shown = np.isfinite(went_on)
            sums = np.where(shown, went_on, 0) @ alike + _PRIOR_WEIGHT * prior
            more[those] = (sums / (shown @ alike + _PRIOR_WEIGHT))[nodes.row[those], nodes.value[those].astype(int)]
        return more

    def _pieces(self) -> _Pieces:
        nodes = self._open
        more = self._more(nodes)
        width = 10.0 ** -np.maximum(nodes.decimals, 0)
        return _Pieces.joined(
            [
                *self._ended,
                _Pieces.below(nodes.row, nodes.mass * (1 - more), nodes.value, width),
                _Pieces.below(nodes.row, nodes.mass * more, 10 * nodes.value, 10 * width),
            ]
        )

    def _log_moments(self) -> tuple[np.ndarray, np.ndarray]:
        pieces = self._pieces()
        mass = pieces.sums(_one, self.count)
        mass = np.where(mass > 0, mass, np.nan)
        mean = pieces.sums(_log, self.count) / mass
        return mean, np.sqrt(np.maximum(pieces.sums(_square_of_log, self.count) / mass - mean**2, 0))


def _matters(nodes: _Nodes, more: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """(M,) what knowing more of a node could change in the variance of the logarithm.

    A share of probability m whose logarithm lies w off, at a distance d from the mean, is wrong by m w (w + 2 d) there.
    """
    low = np.maximum(nodes.value - _HALF_STEP, _HALF_STEP)
    high = nodes.value + 10.0 ** -np.maximum(nodes.decimals, 0) - _HALF_STEP
    centre = _log(low, high)
    spread = np.maximum(_square_of_log(low, high) - centre**2, 0) + more * (1 - more) * math.log(10) ** 2
    off = np.sqrt(spread)
    return nodes.mass * off * (off + 2 * np.abs(centre + more * math.log(10) - mean[nodes.row]))


def _beyond(row: np.ndarray, weight: np.ndarray, rest: np.ndarray) -> np.ndarray:
    """(M,) bool: all but the smallest, which sum up to less than `rest` of their row."""
    order = np.lexsort((weight, row))
    sums = np.cumsum(weight[order])
    first = np.searchsorted(row[order], np.arange(len(rest)))
    before = np.concatenate([[0], sums])[first]
    kept = np.empty(len(row), bool)
    kept[order] = sums - before[row[order]] >= rest[row[order]]
    return kept
