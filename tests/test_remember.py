"""What is remembered, and what must not be."""

from __future__ import annotations

import numpy as np
import pytest

from depthlm_ros.remember import fixed, remember


class Doubling:
    """Doubles arrays and counts how often it had to."""

    def __init__(self, results: int = 2) -> None:
        self.calls = 0
        self.double = remember(results)(self._double)

    def _double(self, values, times=2):
        self.calls += 1
        return np.asarray(values) * times


def test_a_fixed_array_is_computed_once():
    doubling, values = Doubling(), fixed(np.arange(3))
    assert doubling.double(values) is doubling.double(values)
    assert doubling.calls == 1


def test_an_array_that_can_be_written_is_computed_every_time():
    doubling, values = Doubling(), np.arange(3)
    doubling.double(values)
    values[0] = 7
    assert doubling.double(values).tolist() == [14, 2, 4]


def test_a_read_only_view_of_an_array_that_can_be_written_is_computed_every_time():
    doubling, values = Doubling(), np.arange(3)
    view = fixed(values[:])
    doubling.double(view)
    values[0] = 7
    assert doubling.double(view).tolist() == [14, 2, 4]


def test_arrays_are_told_apart_even_where_one_lies_in_the_place_of_another():
    doubling = Doubling(results=1)
    for number in range(50):
        assert doubling.double(fixed(np.full(100, number)))[0] == 2 * number


def test_other_arguments_count_too():
    doubling, values = Doubling(), fixed(np.arange(3))
    assert doubling.double(values, 3).tolist() == [0, 3, 6]
    assert doubling.double(values, 4).tolist() == [0, 4, 8]


def test_what_cannot_be_known_again_is_computed_every_time():
    doubling = Doubling()
    doubling.double([1, 2])
    doubling.double([1, 2])
    assert doubling.calls == 2


def test_what_is_shared_cannot_be_written():
    pair = remember(1)(lambda values: (values + 1, "text"))(fixed(np.arange(3)))
    with pytest.raises(ValueError, match="read-only"):
        pair[0][0] = 1
    with pytest.raises(ValueError, match="read-only"):
        Doubling().double(fixed(np.arange(3)))[0] = 1


def test_the_least_recently_used_gives_way():
    doubling = Doubling(results=2)
    first, second, third = (fixed(np.array([n])) for n in (1, 2, 3))
    for values in (first, second, first, third, first):
        doubling.double(values)
    assert doubling.calls == 3
    doubling.double(second)
    assert doubling.calls == 4


def test_an_error_is_not_remembered():
    attempts = []

    @remember(1)
    def fails_once(values):
        attempts.append(1)
        if len(attempts) == 1:
            raise ValueError("not yet")
        return values

    values = fixed(np.arange(2))
    with pytest.raises(ValueError, match="not yet"):
        fails_once(values)
    assert fails_once(values) is values
