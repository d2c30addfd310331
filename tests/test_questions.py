"""Questions wait in bounded queues, for a frame that isn't too old; the worker does them between frames."""

from __future__ import annotations

import threading

import pytest

from depthlm_ros.errors import ConfigError
from depthlm_ros.questions import MAX_CHARACTERS, POINT, TEXT, Question, Questions, check_text
from depthlm_ros.worker import Job, Worker

PATIENCE_S = 120.0


def text(asked_s: float, words: str = "why?") -> Question:
    return Question(TEXT, asked_s, text=words)


def point(asked_s: float) -> Question:
    return Question(POINT, asked_s, pixel=(1.0, 2.0))


@pytest.fixture
def questions() -> Questions:
    return Questions(limit=3)


def test_the_oldest_of_its_kind_gives_way(questions):
    assert [questions.put(text(second)) for second in (1, 2, 3)] == [None] * 3
    assert questions.put(point(4)) is None
    assert questions.put(text(5)) == text(1)
    assert len(questions) == 4


def test_all_of_one_kind_are_taken_together_the_kind_that_waits_longest_first(questions):
    for question in (point(1), text(2), point(3)):
        questions.put(question)
    assert questions.take(frame_s=4, patience_s=5) == [point(1), point(3)]
    assert questions.take(frame_s=4, patience_s=5) == [text(2)]
    assert questions.take(frame_s=4, patience_s=5) == []


def test_a_frame_that_was_too_old_when_the_question_came_is_no_frame(questions):
    questions.put(text(10))
    questions.put(text(20))
    assert questions.take(frame_s=4, patience_s=5) == []
    assert questions.take(frame_s=6, patience_s=5) == [text(10)]
    assert questions.take(frame_s=16, patience_s=5) == [text(20)]


def test_a_question_with_a_frame_is_never_overdue_however_long_the_worker_is_busy(questions):
    questions.put(text(10))
    assert questions.overdue(now_s=1000, patience_s=5, frame_s=6) == []
    assert questions.overdue(now_s=14, patience_s=5, frame_s=None) == []
    assert questions.overdue(now_s=16, patience_s=5, frame_s=4) == [text(10)]
    assert len(questions) == 0


def test_what_was_given_away_in_work_is_not_waited_for_any_more(questions):
    questions.put(text(1))
    taken = questions.take(frame_s=1, patience_s=5)
    questions.put(text(2))
    assert questions.clear() == [text(1), text(2)]
    assert not questions.finish(taken)
    questions.put(text(3))
    again = questions.take(frame_s=3, patience_s=5)
    assert questions.finish(again) and questions.clear() == []


@pytest.mark.parametrize(("words", "reason"), [("", "empty"), (" \n", "empty"), ("x" * (MAX_CHARACTERS + 1), "4001")])
def test_what_is_no_question_is_refused(words, reason):
    with pytest.raises(ConfigError, match=reason):
        check_text(words)


def test_a_question_is_named_shortly():
    assert str(text(0, "How far is the door?")) == "'How far is the door?'"
    assert len(str(text(0, "x" * 500))) < 70
    assert str(point(0)) == "pixel (1, 2)"


class Diary:
    """A worker whose work takes as long as it says, on a clock that only work moves."""

    def __init__(self, jobs: list[float]) -> None:
        self.jobs, self.done, self.now_s = jobs, [], 0.0
        self.frames_left = 0
        self.ended = threading.Event()
        self.worker = Worker(self.frame, self.note, next_job=self.next_job, clock=lambda: self.now_s)

    def note(self, error: Exception) -> None:
        self.done.append(error)

    def frame(self, seconds: float) -> None:
        self.now_s += seconds
        self.done.append("frame")
        self.frames_left -= 1
        if self.frames_left > 0:
            self.worker.submit(seconds)
        else:
            self.ended.set()

    def next_job(self) -> Job | None:
        if not self.jobs or not self.frames_left:
            return None
        seconds = self.jobs.pop(0)

        def run() -> None:
            self.now_s += seconds
            self.done.append("job")
            if seconds < 0:
                raise ValueError("broken job")

        return Job(run, self.note)

    def run(self, frames: int, seconds: float) -> list[object]:
        # At once: between the two a worker that is late would find questions and no frame.
        with self.worker._condition:
            self.frames_left = frames
            self.worker.submit(seconds)
        assert self.ended.wait(PATIENCE_S)
        self.worker.stop()
        assert self.worker.join(PATIENCE_S)
        return self.done


def test_questions_get_at_most_half_of_the_time_while_frames_wait():
    done = Diary(jobs=[3.0] * 100).run(frames=12, seconds=1.0)
    assert done == ["job", "frame", "frame", "frame"] * 4


def test_quick_questions_alternate_with_slow_frames():
    assert Diary(jobs=[0.1] * 3).run(frames=4, seconds=1.0) == ["job", "frame"] * 3 + ["frame"]


def test_a_broken_job_is_told_and_the_work_goes_on():
    done = Diary(jobs=[-1.0]).run(frames=1, seconds=1.0)
    assert [str(each) for each in done] == ["job", "broken job", "frame"]


def test_a_worker_without_items_does_jobs_as_soon_as_it_is_told_of_them():
    jobs: list[Job] = []
    done = threading.Event()
    worker = Worker(lambda item: None, lambda error: None, next_job=lambda: jobs.pop() if jobs else None)
    jobs.append(Job(done.set, lambda error: None))
    worker.wake()
    assert done.wait(PATIENCE_S)
    worker.stop()
    assert worker.join(PATIENCE_S)
