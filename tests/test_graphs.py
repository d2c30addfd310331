"""What is recorded is replayed with new inputs and gives what calling gives."""

from __future__ import annotations

import pytest
import torch

from depthlm_ros.engines.graphs import Graphed


class Recordings:
    """Stands in for a GPU: a recording is the function, run again into the same outputs."""

    def __init__(self, fails: Exception | None = None):
        self.made = 0
        self.replayed = 0
        self.fails = fails

    def __call__(self, function):
        if self.fails is not None:
            raise self.fails
        self.made += 1
        outputs = tuple(x.clone() for x in function())

        def replay():
            self.replayed += 1
            for place, value in zip(outputs, function(), strict=True):
                place.copy_(value)

        return replay, outputs


def scaled(factor, x, y):
    return x * factor + y, x.sum()


def rows(count, seed=0):
    return torch.randn(count, 3, generator=torch.Generator().manual_seed(seed))


def same(got, expected):
    return all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_on_a_cpu_the_function_is_called():
    graphed = Graphed(scaled)
    assert same(graphed(2, rows(4), rows(4, 1)), scaled(2, rows(4), rows(4, 1)))
    assert graphed.recorded == 0 and graphed.reason is None


def test_a_shape_is_recorded_once_and_replayed_with_new_inputs():
    record = Recordings()
    graphed = Graphed(scaled, record=record)
    for seed in range(3):
        x, y = rows(4, seed), rows(4, seed + 9)
        assert same(graphed(2, x, y), scaled(2, x, y))
    assert (record.made, record.replayed) == (1, 3)


def test_another_shape_another_dtype_and_another_key_are_recorded_apart():
    record = Recordings()
    graphed = Graphed(scaled, record=record)
    for key, x in ((2, rows(4)), (2, rows(5)), (3, rows(4)), (2, rows(4).double())):
        assert same(graphed(key, x, x), scaled(key, x, x))
    assert record.made == graphed.recorded == 4


def test_what_was_returned_stays_as_it_was():
    graphed = Graphed(scaled, record=Recordings())
    first = graphed(2, rows(4), rows(4))
    kept = [x.clone() for x in first]
    graphed(2, rows(4, 7), rows(4, 8))
    assert same(first, kept)


def test_the_shape_that_was_used_longest_ago_makes_room():
    record = Recordings()
    graphed = Graphed(scaled, capacity=2, record=record)
    for count in (1, 2, 1, 3, 1):
        graphed(0, rows(count), rows(count))
    assert (record.made, graphed.recorded) == (3, 2)
    graphed(0, rows(2), rows(2))
    assert record.made == 4


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (RuntimeError("operation not permitted when stream is capturing\nmore"), "failed: operation not permitted"),
        (torch.OutOfMemoryError("none left"), "doesn't fit"),
    ],
)
def test_where_recording_fails_the_function_is_called_and_the_reason_kept(error, words):
    graphed = Graphed(scaled, record=Recordings(error))
    for _ in range(2):
        assert same(graphed(2, rows(4), rows(4)), scaled(2, rows(4), rows(4)))
    assert words in graphed.reason and "\n" not in graphed.reason


def test_an_error_of_another_kind_is_nobodys_to_hide():
    with pytest.raises(ValueError, match="wrong"):
        Graphed(scaled, record=Recordings(ValueError("wrong")))(2, rows(4), rows(4))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_gpu_records_and_replays():
    graphed = Graphed(scaled)
    for seed in range(3):
        x, y = rows(4, seed).cuda(), rows(4, seed + 5).cuda()
        for got, expected in zip(graphed(2, x, y), scaled(2, x, y), strict=True):
            torch.testing.assert_close(got, expected)
    assert graphed.recorded == 1 and graphed.reason is None
