"""Three threads, one frame each: order, freshness, errors and the end."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from depthlm_ros.worker import Counts, Worker

PATIENCE_S = 120.0


class Broken(Exception):
    """What a step raises."""


class Step:
    """A step that waits for permission and may fail."""

    def __init__(self, mark: str) -> None:
        self.mark = mark
        self.seen: list[str] = []
        self.passed: list[str] = []
        self.gate = threading.Event()
        self.gate.set()
        self.fails: set[str] = set()

    def __call__(self, item: str) -> str:
        self.seen.append(item)
        assert self.gate.wait(PATIENCE_S)
        self.passed.append(item)
        if item in self.fails:
            raise Broken(item)
        return item + self.mark


class Pipeline:
    def __init__(self) -> None:
        self.prepare, self.process, self.finish = Step("p"), Step("w"), Step("f")
        self.steps = (self.prepare, self.process, self.finish)
        self.errors: list[str] = []
        self.closed = threading.Event()
        self.now_s = 0.0
        self.worker = Worker(
            self.process,
            lambda error: self.errors.append(str(error)),
            self.closed.set,
            clock=lambda: self.now_s,
            prepare=self.prepare,
            finish=self.finish,
        )

    def submit(self, *items: str) -> None:
        for item in items:
            self.worker.submit(item)

    def end(self) -> None:
        for step in self.steps:
            step.gate.set()
        self.worker.stop()
        assert self.worker.join(PATIENCE_S)


@pytest.fixture
def pipeline():
    made = Pipeline()
    yield made
    made.end()


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def settle() -> None:
    """Gives threads that should do nothing the time to do it."""
    time.sleep(0.05)


def test_an_item_goes_through_all_three_steps(pipeline):
    pipeline.submit("a")
    until(lambda: pipeline.worker.counts.processed == 1)
    assert [step.seen for step in pipeline.steps] == [["a"], ["ap"], ["apw"]]


def test_while_one_is_in_work_the_next_is_prepared_and_the_last_one_finished(pipeline):
    pipeline.finish.gate.clear()
    pipeline.submit("a")
    until(lambda: pipeline.finish.seen == ["apw"])
    pipeline.process.gate.clear()
    pipeline.submit("b")
    until(lambda: pipeline.process.seen == ["ap", "bp"])
    pipeline.submit("c")
    until(lambda: pipeline.prepare.seen == ["a", "b", "c"])
    assert pipeline.worker.counts.processed == 0


def test_order_is_kept(pipeline):
    for number in range(30):
        pipeline.submit(str(number))
        until(lambda: len(pipeline.process.seen) == number + 1)  # noqa: B023
    until(lambda: pipeline.worker.counts.processed == 30)
    assert pipeline.finish.seen == [f"{number}pw" for number in range(30)]


def test_the_newest_wins_over_one_that_is_prepared(pipeline):
    pipeline.process.gate.clear()
    pipeline.submit("a")
    until(lambda: pipeline.process.seen == ["ap"])
    pipeline.submit("b")
    until(lambda: pipeline.prepare.passed == ["a", "b"])
    pipeline.prepare.gate.clear()
    pipeline.submit("c", "d", "e")
    until(lambda: pipeline.prepare.seen[-1] in ("c", "e"))
    pipeline.process.gate.set()
    settle()
    assert pipeline.process.seen == ["ap"], "the newest is still being prepared"
    pipeline.prepare.gate.set()
    until(lambda: pipeline.worker.counts.processed == 2)
    assert pipeline.process.seen == ["ap", "ep"]
    assert pipeline.worker.counts == Counts(received=5, dropped=3, processed=2)


def test_a_camera_that_is_faster_than_the_preparation_is_heard_all_the_same(pipeline):
    pipeline.prepare.gate.clear()
    stop = threading.Event()

    def camera() -> None:
        number = 0
        while not stop.wait(0.001):
            pipeline.submit(str(number := number + 1))
            # Preparing ends only once a newer one has come.
            if number % 3 == 0:
                pipeline.prepare.gate.set()
                pipeline.prepare.gate.clear()

    thread = threading.Thread(target=camera)
    thread.start()
    try:
        until(lambda: pipeline.worker.counts.processed >= 3)
    finally:
        stop.set()
        thread.join()


def test_an_error_in_preparing_loses_that_frame_alone(pipeline):
    pipeline.prepare.fails = {"b"}
    pipeline.process.gate.clear()
    pipeline.submit("a")
    until(lambda: pipeline.process.seen == ["ap"])
    pipeline.submit("b")
    until(lambda: pipeline.errors == ["b"])
    pipeline.submit("c")
    pipeline.process.gate.set()
    until(lambda: pipeline.worker.counts.processed == 2)
    assert pipeline.process.seen == ["ap", "cp"]
    assert pipeline.worker.counts == Counts(received=3, processed=2, failed=1)


def test_where_the_newest_cannot_be_prepared_the_one_before_it_is_used(pipeline):
    pipeline.prepare.fails = {"c"}
    pipeline.process.gate.clear()
    pipeline.submit("a")
    until(lambda: pipeline.process.seen == ["ap"])
    pipeline.submit("b")
    until(lambda: pipeline.prepare.seen == ["a", "b"])
    pipeline.submit("c")
    until(lambda: pipeline.errors == ["c"])
    pipeline.process.gate.set()
    until(lambda: pipeline.worker.counts.processed == 2)
    assert pipeline.process.seen == ["ap", "bp"]


@pytest.mark.parametrize("step", ["process", "finish"])
def test_an_error_in_a_later_step_loses_that_frame_alone(pipeline, step):
    getattr(pipeline, step).fails = {"ap", "apw"}
    pipeline.submit("a")
    until(lambda: pipeline.worker.counts.failed == 1)
    pipeline.submit("b")
    until(lambda: pipeline.worker.counts.processed == 1)
    assert pipeline.finish.seen[-1] == "bpw" and len(pipeline.errors) == 1


def test_clear_drops_what_is_prepared_and_what_is_being_prepared(pipeline):
    pipeline.process.gate.clear()
    pipeline.submit("a")
    until(lambda: pipeline.process.seen == ["ap"])
    pipeline.submit("prepared")
    until(lambda: len(pipeline.prepare.passed) == 2)
    pipeline.prepare.gate.clear()
    pipeline.submit("being prepared")
    until(lambda: len(pipeline.prepare.seen) == 3)
    pipeline.submit("waiting")
    pipeline.worker.clear()
    pipeline.submit("after")
    pipeline.prepare.gate.set()
    pipeline.process.gate.set()
    until(lambda: pipeline.worker.counts.processed == 2)
    assert pipeline.process.seen == ["ap", "afterp"]
    assert pipeline.worker.counts == Counts(received=5, dropped=3, processed=2)


def test_what_cannot_be_prepared_is_no_error_once_it_is_cleared(pipeline):
    pipeline.prepare.fails = {"a"}
    pipeline.prepare.gate.clear()
    pipeline.submit("a")
    until(lambda: pipeline.prepare.seen == ["a"])
    pipeline.worker.clear()
    pipeline.prepare.gate.set()
    until(lambda: pipeline.worker.counts.dropped == 1)
    assert pipeline.errors == []


def test_it_is_closed_after_the_last_step_of_the_last_frame(pipeline):
    pipeline.finish.gate.clear()
    pipeline.submit("a")
    until(lambda: pipeline.finish.seen == ["apw"])
    pipeline.worker.stop()
    assert not pipeline.worker.join(0.05) and not pipeline.closed.is_set()
    pipeline.finish.gate.set()
    assert pipeline.worker.join(PATIENCE_S) and pipeline.closed.is_set()
    assert pipeline.worker.counts == Counts(received=1, processed=1)


def test_a_frame_that_is_being_prepared_at_the_end_is_dropped(pipeline):
    pipeline.prepare.gate.clear()
    pipeline.submit("a")
    until(lambda: pipeline.prepare.seen == ["a"])
    pipeline.worker.stop()
    assert not pipeline.worker.join(0.05)
    pipeline.prepare.gate.set()
    assert pipeline.worker.join(PATIENCE_S)
    assert pipeline.process.seen == [] and pipeline.worker.counts == Counts(received=1, dropped=1)


def test_results_wait_for_a_slow_last_step_instead_of_piling_up(pipeline):
    pipeline.finish.gate.clear()
    for number, item in enumerate("abc"):
        pipeline.submit(item)
        until(lambda: len(pipeline.process.seen) == number + 1)  # noqa: B023
    pipeline.submit("d")
    settle()
    assert pipeline.process.seen == ["ap", "bp", "cp"]
    pipeline.finish.gate.set()
    until(lambda: pipeline.worker.counts.processed == 4)
    assert pipeline.finish.seen == ["apw", "bpw", "cpw", "dpw"]


def test_the_next_frame_is_prepared_shortly_before_the_work_usually_ends(pipeline):
    pipeline.process.gate.clear()
    pipeline.submit("a")
    until(lambda: pipeline.process.seen == ["ap"])
    pipeline.now_s = 10.0
    pipeline.process.gate.set()
    until(lambda: pipeline.worker.counts.processed == 1)
    pipeline.process.gate.clear()
    pipeline.submit("b")
    until(lambda: pipeline.process.seen == ["ap", "bp"])
    pipeline.submit("c", "d")
    settle()
    assert pipeline.prepare.seen == ["a", "b"]
    pipeline.now_s = 19.995
    pipeline.worker.wake()
    until(lambda: pipeline.prepare.seen == ["a", "b", "d"])
    assert pipeline.process.seen == ["ap", "bp"]


def test_a_frame_is_prepared_at_once_when_the_work_ends_early(pipeline):
    pipeline.process.gate.clear()
    pipeline.submit("a")
    until(lambda: pipeline.process.seen == ["ap"])
    pipeline.now_s = 10.0
    pipeline.process.gate.set()
    until(lambda: pipeline.worker.counts.processed == 1)
    pipeline.process.gate.clear()
    pipeline.submit("b")
    until(lambda: pipeline.process.seen == ["ap", "bp"])
    pipeline.submit("c")
    pipeline.process.gate.set()
    until(lambda: pipeline.worker.counts.processed == 3)
