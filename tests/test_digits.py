"""The tree of a number's digits says what brute force over all numbers says, for a fraction of the work."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from plain_numbers import PlainNumbers

from depthlm_ros.engines.digits import DigitGrammar, NumberDistribution, expand_numbers
from depthlm_ros.errors import ModelError
from depthlm_ros.estimator import Estimator
from depthlm_ros.prompts import coordinates_question

HUNDREDTHS = np.arange(100_000)
VALUES = HUNDREDTHS / 100
WORDS = [*"0123456789.", " meters"]


class Words:
    """A tokenizer with one token for each digit, and one for a word."""

    def encode(self, text, add_special_tokens=False):
        return [100 + WORDS.index(character) for character in text]

    def decode(self, ids):
        return "".join(WORDS[token - 100] for token in ids)


class Pairs(Words):
    """A tokenizer that writes two digits at once where it can."""

    def encode(self, text, add_special_tokens=False):
        return super().encode(text.replace("12", "1"))


class Writer:
    """Writes numbers "d.dd" up to 999.99 with given probabilities, or else a word, as a model would: token by token.

    Args:
        chances: (N, 100000) probability of each number of hundredths; what is missing to 1 goes to the word.
    """

    def __init__(self, chances: np.ndarray) -> None:
        self.chances = np.asarray(chances, float)
        self.sums = np.concatenate([np.zeros((len(chances), 1)), np.cumsum(chances, axis=1)], axis=1)
        self.calls: list[int] = []
        self.asked: list[tuple[int, tuple[int, ...]]] = []

    @property
    def start(self) -> torch.Tensor:
        return torch.tensor(np.stack([self._next(row, "") for row in range(len(self.chances))])).log()

    def __call__(self, rows, paths) -> torch.Tensor:
        self.calls.append(len(rows))
        self.asked += zip(rows, paths, strict=True)
        return torch.tensor(
            np.stack([self._next(row, Words().decode(path)) for row, path in zip(rows, paths, strict=True)])
        ).log()

    def _next(self, row: int, text: str) -> np.ndarray:
        said = np.array([self._mass(row, text + word) for word in WORDS[:11]])
        scores = np.zeros(120)
        total = said.sum() if text else 1.0
        scores[100:111] = said / total if total > 0 else 0
        scores[111] = 1 - scores[100:111].sum()
        return scores

    def _mass(self, row: int, text: str) -> float:
        whole, point, decimals = text.partition(".")
        if not whole or "." in decimals or len(decimals) > 2 or (len(whole) > 1 and whole[0] == "0"):
            return 0.0
        if point:
            width = 10 ** (2 - len(decimals))
            low = 100 * int(whole) + int(decimals or 0) * width
            return self._between(row, low, low + width)
        powers = [10**k for k in range(4 - len(whole))] if int(whole) else [1]
        return sum(self._between(row, 100 * int(whole) * k, 100 * (int(whole) + 1) * k) for k in powers)

    def _between(self, row: int, low: int, high: int) -> float:
        return max(self.sums[row, min(high, 100_000)] - self.sums[row, min(low, 100_000)], 0.0)


def bells(*humps: tuple[float, float, float]) -> np.ndarray:
    """(100000,) chances: humps of (share, median in metres, sigma of the logarithm)."""
    with np.errstate(divide="ignore"):
        logs = np.log(VALUES)
    chances = np.zeros(len(VALUES))
    for share, median, sigma in humps:
        hump = np.where(VALUES > 0, np.exp(-0.5 * ((logs - math.log(median)) / sigma) ** 2), 0)
        chances += share * hump / hump.sum()
    return chances


def expand(chances, **options) -> tuple[list[NumberDistribution], Writer]:
    writer = Writer(np.atleast_2d(chances))
    return expand_numbers(writer.start, writer, DigitGrammar(Words()), **options), writer


def brute_force(chances: np.ndarray) -> dict[str, float]:
    weights = chances[1:] / chances[1:].sum()
    values = VALUES[1:]
    mean, log_mean = weights @ values, weights @ np.log(values)
    return {
        "mean": mean,
        "std": math.sqrt(weights @ values**2 - mean**2),
        "median": values[np.searchsorted(np.cumsum(weights), 0.5)],
        "geometric_mean": math.exp(log_mean),
        "sigma_log": math.sqrt(weights @ np.log(values) ** 2 - log_mean**2),
        "mass": chances[1:].sum(),
    }


FIGURES = ("mean", "std", "median", "geometric_mean", "sigma_log", "mass")

chances = st.lists(st.tuples(st.floats(0.05, 1), st.floats(0.2, 90), st.floats(0.02, 0.5)), min_size=1, max_size=3).map(
    lambda humps: bells(*[(share / sum(h[0] for h in humps), *rest) for share, *rest in humps])
)


# The exact tree


@given(chances)
@settings(max_examples=15, deadline=None)
def test_the_exact_tree_is_brute_force_over_all_numbers(number):
    said, _ = expand(number, exact=True)
    true = brute_force(number)
    assert said[0].mass == pytest.approx(1, abs=1e-9)
    assert said[0].sigma_log == pytest.approx(true["sigma_log"], abs=1e-3)
    for figure in ("mean", "geometric_mean"):
        assert getattr(said[0], figure) == pytest.approx(true[figure], rel=1e-3)
    # Between two humps of equal weight, any value is as good a median.
    assert number[VALUES < said[0].median - 0.006].sum() <= 0.5 + 1e-3
    assert number[VALUES <= said[0].median + 0.006].sum() >= 0.5 - 1e-3


@given(
    arrays.arrays(float, (20,), elements=st.floats(0, 1)), st.lists(st.integers(1, 99_999), min_size=20, max_size=20)
)
@settings(max_examples=25, deadline=None)
def test_a_few_numbers_are_found_one_and_all(weights, hundredths):
    number = np.zeros(len(VALUES))
    np.add.at(number, hundredths, weights + 0.01)
    number /= number.sum()
    said, _ = expand(number, exact=True)
    true = brute_force(number)
    for figure in ("mean", "geometric_mean", "mass"):
        assert getattr(said[0], figure) == pytest.approx(true[figure], rel=1e-3)
    assert said[0].sigma_log == pytest.approx(true["sigma_log"], abs=2e-3)


def test_one_certain_number_has_no_spread():
    number = np.zeros(len(VALUES))
    number[342] = 1
    for exact in (True, False):
        (said,), _ = expand(number, exact=exact)
        assert (said.mean, said.median, said.geometric_mean) == pytest.approx((3.42, 3.42, 3.42))
        assert said.std == pytest.approx(0, abs=1e-6) and said.sigma_log == pytest.approx(0, abs=1e-6)
        assert said.greedy_probability == pytest.approx(1)


# The cheap tree


def test_the_cheap_tree_is_within_two_hundredths_for_at_most_25_nodes():
    rng = np.random.default_rng(0)
    numbers = [bells((1, math.exp(rng.uniform(-1.6, 3.6)), math.exp(rng.uniform(-4, -1)))) for _ in range(60)]
    said, writer = expand(np.array(numbers))
    off = [abs(one.sigma_log - brute_force(number)["sigma_log"]) for one, number in zip(said, numbers, strict=True)]
    assert max(off) <= 0.02
    assert max(one.forwards for one in said) <= 25
    assert np.mean([one.forwards for one in said]) <= 18
    assert len(writer.calls) <= 3
    for figure in ("mean", "median", "geometric_mean"):
        ratios = [getattr(one, figure) / brute_force(number)[figure] for one, number in zip(said, numbers, strict=True)]
        assert np.abs(np.log(ratios)).max() < 0.03


@given(chances, st.integers(1, 40))
@settings(max_examples=25, deadline=None)
def test_no_answer_gets_more_nodes_than_the_budget_and_none_twice(number, budget):
    said, writer = expand(np.stack([number, bells((1, 2.0, 0.1))]), budget=budget)
    assert len(set(writer.asked)) == len(writer.asked)
    for row, one in enumerate(said):
        assert one.forwards == sum(asked == row for asked, _ in writer.asked) <= budget
        assert one.mass == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize(("median", "sigma"), [(1.8565, 0.23263), (1.7505, 0.22115)])
def test_the_point_after_a_digit_is_asked_with_its_digit_only(median, sigma):
    """Here the point after 1 matters more than the 1, which lies in the middle."""
    for budget in (14, 17, 20, 26):
        (said,), writer = expand(bells((1, median, sigma)), budget=budget)
        assert len(set(writer.asked)) == len(writer.asked) == said.forwards


@given(st.lists(chances, min_size=2, max_size=4))
@settings(max_examples=10, deadline=None)
def test_an_answer_does_not_depend_on_those_beside_it(numbers):
    together, _ = expand(np.array(numbers))
    for number, beside in zip(numbers, together, strict=True):
        (alone,), _ = expand(number)
        assert [getattr(alone, f) for f in FIGURES] == pytest.approx([getattr(beside, f) for f in FIGURES])


def test_a_sure_answer_costs_few_nodes_and_an_unsure_one_more():
    said, _ = expand(np.stack([bells((1, 3.14, 0.01)), bells((0.6, 2.0, 0.4), (0.4, 20.0, 0.4))]))
    assert said[0].forwards <= 6 < 18 <= said[1].forwards


def test_two_lengths_of_number_are_told_apart():
    """1 m or 1x m: the first digit alone says neither."""
    number = bells((0.5, 1.5, 0.1), (0.5, 15, 0.1))
    (said,), _ = expand(number)
    assert said.sigma_log == pytest.approx(brute_force(number)["sigma_log"], abs=0.005)
    assert 2 < said.median < 12


def near(number: np.ndarray, centre: float, factor: float = 1.25) -> float:
    return number[(VALUES > centre / factor) & (VALUES < centre * factor)].sum()


@given(chances)
@settings(max_examples=15, deadline=None)
def test_the_chance_to_be_right_is_the_mass_within_a_quarter(number):
    (said,), _ = expand(number, exact=True)
    for share, centre in ((said.near_median, said.median), (said.near_mean, said.mean)):
        # A hump may be as narrow as the step between two numbers and lie at the very edge.
        step = 1 + 0.012 / centre
        assert near(number, centre, 1.25 / step) - 1e-3 <= share <= near(number, centre, 1.25 * step) + 1e-3
    assert 0 <= said.near_greedy <= said.mass + 1e-9


@pytest.mark.parametrize(("median", "sigma"), [(0.7, 0.3), (2.0, 0.1), (4.0, 0.25), (9.0, 0.4), (30.0, 0.3)])
def test_the_cheap_tree_knows_that_chance_too(median, sigma):
    number = bells((1, median, sigma))
    (said,), _ = expand(number)
    assert said.near_median == pytest.approx(near(number, said.median), abs=0.03)
    assert said.near_mean == pytest.approx(near(number, said.mean), abs=0.03)


def test_the_greedy_number_is_where_greedy_decoding_ends():
    """1 is the likeliest first digit, so 10 to 19; the likeliest number of all is elsewhere."""
    number = bells((0.55, 14.0, 0.05), (0.45, 5.5, 0.01))
    (said,), _ = expand(number)
    assert said.near_greedy == pytest.approx(0.55, abs=0.02)


# What a model may say beside "d.dd"


def scores(**chances: float) -> np.ndarray:
    """(1, 12) chances by word, "dot" for the point."""
    row = np.zeros((1, len(WORDS)))
    for word, chance in chances.items():
        row[0, 10 if word == "dot" else 11 if word == "end" else int(word[1:])] = chance
    return row


def speak(start: np.ndarray, after: dict[str, np.ndarray], exact=True) -> NumberDistribution:
    def forward(rows, paths):
        rest = scores(end=1.0)
        return torch.tensor(np.concatenate([pad(after.get(Words().decode(path), rest)) for path in paths])).log()

    def pad(row):
        return np.concatenate([np.zeros((1, 100)), row], axis=1)

    return expand_numbers(torch.tensor(pad(start)).log(), forward, DigitGrammar(Words()), exact=exact)[0]


@pytest.mark.parametrize("exact", [True, False])
def test_whole_numbers_and_single_decimals_end_where_the_model_ends_them(exact):
    after = {"4": scores(end=0.5, dot=0.5), "4.": scores(d2=1.0), "4.2": scores(end=1.0)}
    said = speak(scores(d4=1.0), after, exact)
    assert said.mean == pytest.approx(4.1)
    assert said.std == pytest.approx(0.1)
    assert said.mass == pytest.approx(1)
    assert said.greedy_probability == pytest.approx(0.5)


def test_what_is_no_depth_has_no_mass():
    after = {"0": scores(dot=1.0), "0.": scores(d0=1.0), "0.0": scores(d0=0.5, d5=0.5), "2": scores(dot=1.0)}
    said = speak(scores(d0=0.4, d2=0.4, end=0.2), after)
    assert said.mass == pytest.approx(0.2), "0.00 is no depth, '2.' and a word aren't either"
    assert said.mean == pytest.approx(0.05)


def test_a_fourth_digit_before_the_point_is_a_slip_of_the_pen():
    after = {"1": scores(d5=1.0), "15": scores(d0=0.5, end=0.5), "150": scores(d4=1.0)}
    said = speak(scores(d1=1.0), after)
    assert (said.mean, said.mass) == (pytest.approx(15), pytest.approx(0.5))


def test_no_number_at_all_is_nan():
    said = speak(scores(end=1.0), {})
    assert said.mass == 0 and math.isnan(said.mean) and math.isnan(said.sigma_log) and math.isnan(said.median)
    assert said.forwards == 0


def test_no_answers_are_no_distributions():
    assert expand_numbers(torch.zeros(0, 120), Writer(np.zeros((0, 100_000))), DigitGrammar(Words())) == []


# Tokens


def test_the_grammar_finds_the_digits_and_refuses_a_tokenizer_that_joins_them():
    assert DigitGrammar(Words()).ids == tuple(range(100, 111))
    with pytest.raises(ModelError, match="a token for each digit"):
        DigitGrammar(Pairs())


def test_scores_of_digits_alone_are_enough():
    grammar, number = DigitGrammar(Words()), bells((1, 3.0, 0.2))
    wide, writer = expand(number)
    narrow = expand_numbers(
        grammar.narrow(writer.start), lambda rows, paths: grammar.narrow(writer(rows, paths)), grammar
    )
    assert narrow == wide


# Of models


@pytest.mark.parametrize("architecture", ["qwen3_vl", "qwen2_5_vl", "llava"])
def test_the_tokenizers_of_all_architectures_have_digits(architecture, request):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(request.getfixturevalue(f"{architecture}_checkpoint"))
    grammar = DigitGrammar(tokenizer)
    assert tokenizer.decode(grammar.path([3, 10, 4, 2])).strip() == "3.42"


def test_the_demo_says_the_same_by_the_cheap_tree_as_by_the_exact_one():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 255, (192, 256, 3), dtype=np.uint8)
    with Estimator.load("demo", device="cpu", dtype="float32") as demo:
        questions = [coordinates_question(x, y) for x, y in ((100, 1900), (1000, 1000), (77, 505), (1500, 800))]
        grammar = DigitGrammar(demo.engine.processor.tokenizer)
        plain = PlainNumbers(demo.engine, image, questions, "<think> The point is around ")
        exact = expand_numbers(plain.start, plain, grammar, exact=True)
        cheap = expand_numbers(plain.start, plain, grammar)
        expects = demo.card.answer_template("coordinates")
        answers = demo.engine.answer_shared(image, questions, 48, expects=expects, distribution=True)
    for a, b, answer in zip(exact, cheap, answers, strict=True):
        for figure in FIGURES:
            assert getattr(answer.number, figure) == pytest.approx(getattr(b, figure), rel=1e-3)
        assert b.sigma_log == pytest.approx(a.sigma_log, abs=0.02)
        assert b.median == pytest.approx(a.median, rel=0.03)
        assert b.mass == pytest.approx(a.mass, abs=0.01) and b.mass > 0.98
        assert a.greedy_probability == pytest.approx(answer.confidences[0], rel=1e-2)
        assert b.forwards <= 25 < a.forwards
