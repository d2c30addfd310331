"""What goes on being wrong is said once, and again after a while."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from depthlm_ros import complaints
from depthlm_ros.errors import ImageError
from depthlm_ros.proof import Proof


class Log:
    def __init__(self) -> None:
        self.lines: list[tuple[str, str]] = []

    def warning(self, message: str) -> None:
        self.lines.append(("warning", message))

    def error(self, message: str) -> None:
        self.lines.append(("error", message))


@pytest.fixture
def clock(monkeypatch):
    now = SimpleNamespace(s=1000.0)
    monkeypatch.setattr(complaints.time, "monotonic", lambda: now.s)
    return now


@pytest.fixture
def log():
    return Log()


def model(*sentences: str, proof: Proof | None = None) -> SimpleNamespace:
    return SimpleNamespace(complaints=sentences, proof=proof or Proof())


def test_the_same_is_said_again_after_five_seconds_and_something_else_at_once(clock, log):
    told = complaints.Complaints(log)
    for second in range(12):
        clock.s = 1000.0 + second
        told.say("pose", f"late {second}")
        told.say("depth", f"wrong {second}")
    assert log.lines == [("warning", f"{what} {second}") for second in (0, 5, 10) for what in ("late", "wrong")]


def test_a_frame_that_failed_unexpectedly_is_told_with_its_traceback(clock, log):
    told = complaints.Complaints(log)
    told.frame_failed(ImageError("encoding 'x' is not known"))
    told.frame_failed(ImageError("another one"))
    try:
        raise KeyError("fx")
    except KeyError as error:
        told.frame_failed(error)
    assert log.lines[0] == ("warning", "frame skipped: encoding 'x' is not known")
    kind, text = log.lines[1]
    assert kind == "error" and "Traceback" in text and "KeyError: 'fx'" in text and len(log.lines) == 2


def test_reminders_come_each_minute_whatever_seconds_they_count_and_at_once_where_asked(clock, log):
    told = complaints.Complaints(log)
    told.remind(None)
    for second in range(0, 130, 10):
        clock.s = 1000.0 + second
        told.remind(model(f"server has not answered for {second} s"))
    assert [text for _, text in log.lines] == [f"server has not answered for {n} s" for n in (0, 60, 120)]
    told.remind(model("server has not answered for 5 s"), at_once=True)
    assert len(log.lines) == 4


def test_what_was_accepted_although_it_failed_is_an_error(clock, log):
    failed = "engine x does not answer as demo"
    complaints.Complaints(log).remind(model(failed, "something else", proof=Proof("", failed, accepted=True)))
    assert log.lines == [
        ("error", f"ACCEPTED because accept_unproven is true: {failed}"),
        ("warning", "something else"),
    ]
