"""The newest frame wins, the thread survives errors, and an image finds its CameraInfo."""

from __future__ import annotations

import threading

import pytest

from depthlm_ros.monitor import Monitor
from depthlm_ros.pairing import Pairing
from depthlm_ros.topics import compressed_topic, sibling_topic
from depthlm_ros.worker import Counts, Worker

PATIENCE_S = 120.0


class Gate:
    """Work that waits for permission, so that tests decide what happens while a frame is in work."""

    def __init__(self) -> None:
        self.done: list[object] = []
        self.errors: list[Exception] = []
        self.entered = threading.Semaphore(0)
        self.permission = threading.Semaphore(0)
        self.closed = threading.Event()
        self.worker = Worker(self.work, self.errors.append, self.closed.set)

    def work(self, item: object) -> None:
        self.entered.release()
        assert self.permission.acquire(timeout=PATIENCE_S)
        if isinstance(item, Exception):
            raise item
        self.done.append(item)

    def begin(self, item: object) -> None:
        """Submits and returns once the work on it has begun."""
        self.worker.submit(item)
        assert self.entered.acquire(timeout=PATIENCE_S)

    def finish(self) -> None:
        """Lets everything through and waits for the end."""
        self.permission.release(100)
        self.worker.stop()
        assert self.worker.join(PATIENCE_S)


def test_while_one_frame_is_in_work_only_the_newest_of_the_others_waits():
    gate = Gate()
    gate.begin("first")
    for item in ("old", "older than the newest", "newest"):
        gate.worker.submit(item)
    gate.permission.release()
    assert gate.entered.acquire(timeout=PATIENCE_S)
    gate.finish()
    assert gate.done == ["first", "newest"]
    assert gate.worker.counts == Counts(received=4, dropped=2, processed=2, failed=0)


def test_submitting_never_waits_for_the_work():
    gate = Gate()
    gate.begin("slow")
    for number in range(1000):
        gate.worker.submit(number)
    assert gate.worker.busy
    gate.finish()


def test_an_error_is_reported_and_the_next_frame_is_worked_on():
    gate = Gate()
    broken = ValueError("broken frame")
    gate.begin(broken)
    gate.permission.release()
    gate.begin("next")
    gate.finish()
    assert gate.errors == [broken]
    assert gate.done == ["next"]
    assert gate.worker.counts == Counts(received=2, dropped=0, processed=1, failed=1)


def test_stop_returns_at_once_and_closes_only_after_the_frame_in_work():
    gate = Gate()
    gate.begin("in work")
    gate.worker.submit("waiting")
    gate.worker.stop()
    assert not gate.worker.join(0.05)
    assert not gate.closed.is_set()
    gate.permission.release()
    assert gate.worker.join(PATIENCE_S)
    assert gate.closed.is_set()
    assert gate.done == ["in work"]
    assert gate.worker.counts.dropped == 1


def test_what_comes_after_stop_counts_as_dropped():
    gate = Gate()
    gate.finish()
    gate.worker.submit("late")
    assert gate.worker.counts == Counts(received=1, dropped=1)


def test_clear_drops_what_waits():
    gate = Gate()
    gate.begin("in work")
    gate.worker.submit("waiting")
    gate.worker.clear()
    gate.finish()
    assert gate.done == ["in work"]
    assert gate.worker.counts.dropped == 1


GRACE_NS = 100


@pytest.fixture
def pairing() -> Pairing[str, str]:
    return Pairing(grace_ns=GRACE_NS, memory=3, held=2)


def test_equal_stamps_pair_whichever_comes_first(pairing):
    assert pairing.add_info(1, "info 1") is None
    assert pairing.add_image(1, "image 1", now_ns=0) == [("image 1", "info 1")]
    assert pairing.add_image(2, "image 2", now_ns=0) == []
    assert pairing.add_info(2, "info 2") == ("image 2", "info 2")


def test_two_images_may_overtake_both_their_infos(pairing):
    pairing.add_info(1, "info 1")
    assert pairing.add_image(2, "image 2", now_ns=0) == []
    assert pairing.add_image(3, "image 3", now_ns=1) == []
    assert pairing.add_info(2, "info 2") == ("image 2", "info 2")
    assert pairing.add_info(3, "info 3") == ("image 3", "info 3")


def test_an_image_goes_with_the_newest_info_once_its_grace_is_over(pairing):
    pairing.add_info(1, "info 1")
    pairing.add_image(5, "image 5", now_ns=0)
    assert pairing.overdue(GRACE_NS - 1) == []
    assert pairing.overdue(GRACE_NS) == [("image 5", "info 1")]
    assert pairing.overdue(GRACE_NS) == []


def test_topics_that_never_agree_on_stamps_cost_the_grace_only_once(pairing):
    pairing.add_info(1, "info")
    pairing.add_image(5, "image 5", now_ns=0)
    pairing.overdue(GRACE_NS)
    assert pairing.add_image(6, "image 6", now_ns=GRACE_NS) == [("image 6", "info")]


def test_equal_stamps_seen_late_bring_the_waiting_back(pairing):
    pairing.add_info(1, "info 1")
    pairing.add_image(5, "image 5", now_ns=0)
    pairing.overdue(GRACE_NS)
    assert pairing.add_info(5, "info 5") is None
    assert pairing.add_image(6, "image 6", now_ns=GRACE_NS) == []
    assert pairing.add_info(6, "info 6") == ("image 6", "info 6")


def test_an_image_without_any_info_comes_out_with_none(pairing):
    pairing.add_image(1, "image", now_ns=0)
    assert pairing.overdue(GRACE_NS) == [("image", None)]


def test_every_image_comes_out_even_where_more_come_than_are_held(pairing):
    released = []
    for stamp in range(1, 8):
        released += pairing.add_image(stamp, f"image {stamp}", now_ns=stamp)
    released += pairing.overdue(10 * GRACE_NS)
    assert [image for image, _ in released] == [f"image {stamp}" for stamp in range(1, 8)]


@pytest.mark.parametrize(
    ("image", "compressed", "info"),
    [
        ("/camera/image_raw", False, "/camera/camera_info"),
        ("/image", False, "/camera_info"),
        ("/robot/front/image_rect", False, "/robot/front/camera_info"),
        ("/camera/image_raw/compressed", True, "/camera/camera_info"),
    ],
)
def test_camera_info_is_the_sibling_of_the_image(image, compressed, info):
    assert sibling_topic(image, "camera_info", compressed) == info


def test_remapping_image_moves_its_compressed_topic_along():
    assert compressed_topic("/camera/image", "/image/compressed", "/image/compressed") == "/camera/image/compressed"


def test_a_remapped_compressed_topic_is_taken_as_it_is():
    assert compressed_topic("/image", "/jpeg", "/image/compressed") == "/jpeg"


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_the_report_counts_points_and_has_a_line_for_each_stage():
    clock = Clock()
    monitor = Monitor(clock)
    monitor.frame_done({"vision": 0.010, "total": 0.020}, asked=10, answered=8)
    clock.now_s = 2.0
    monitor.frame_done({"vision": 0.030, "total": 0.040}, asked=10, answered=10)
    status = monitor.report("active", received=5, dropped=3, warnings=[])
    assert status.level == "ok"
    assert status.values["frames processed"] == "2"
    assert status.values["frames dropped"] == "3"
    assert status.values["points unanswered"] == "2"
    assert status.values["latency vision ms"] == "20.0 (95 %: 30.0)"
    assert [key for key in status.values if key.startswith("latency")] == ["latency vision ms", "latency total ms"]
    assert status.values["fps"] == "1.00"


def test_fps_falls_to_zero_when_frames_stop():
    clock = Clock()
    monitor = Monitor(clock)
    monitor.frame_done({}, 1, 1)
    clock.now_s = 60.0
    assert monitor.report("active", 1, 0, []).values["fps"] == "0.00"


def test_failing_frames_are_an_error_until_they_stop():
    monitor = Monitor(Clock())
    monitor.frame_failed(ValueError("no good"))
    assert monitor.report("active", 1, 0, []).level == "error"
    monitor.frame_failed(ValueError("no good"))
    monitor.frame_done({}, 1, 1)
    assert monitor.report("active", 3, 0, []).level == "warn"
    healthy = monitor.report("active", 3, 0, [])
    assert healthy.level == "ok"
    assert healthy.values["last error"] == "ValueError: no good"


def test_a_standing_complaint_is_a_warning():
    status = Monitor(Clock()).report("active", 0, 0, ["nobody publishes /image"])
    assert (status.level, status.message) == ("warn", "nobody publishes /image")
