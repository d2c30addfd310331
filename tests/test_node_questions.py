"""Questions and poses as the node's neighbours see them; the model's pace and words are the test's."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

rclpy = pytest.importorskip("rclpy")

from diagnostic_msgs.msg import DiagnosticStatus  # noqa: E402
from geometry_msgs.msg import Point, PointStamped, PoseStamped  # noqa: E402
from lifecycle_msgs.msg import Transition  # noqa: E402
from rclpy.qos import QoSProfile  # noqa: E402
from sensor_msgs.msg import Image, PointCloud2  # noqa: E402
from std_msgs.msg import Header, String  # noqa: E402
from test_node import (  # noqa: E402
    CAMERA,
    HEIGHT,
    PATIENCE_S,
    WIDTH,
    PacedEstimator,
    World,
    broken,
    picture,
    until,
    value,
)

from depthlm_ros import pose  # noqa: E402
from depthlm_ros.camera import Camera  # noqa: E402
from depthlm_ros.cards import load_card  # noqa: E402
from depthlm_ros.depth import DepthResult  # noqa: E402
from depthlm_ros.engines.base import Answer, ImageGrid  # noqa: E402
from depthlm_ros.errors import EngineError  # noqa: E402
from depthlm_ros.messages import camera_info_message, rgb_message  # noqa: E402
from depthlm_ros.node import load_estimator  # noqa: E402
from depthlm_ros.questions import LIMIT  # noqa: E402

ASK, ANSWER = "/depth_node/ask", "/depth_node/answer"
QUERY, POINT = "/depth_node/query", "/depth_node/query/point"
POSE_TEXTS = {
    "rotation_angle": "It is 90.0 degrees.",
    "euler_natural": "yaw = 90.0 degrees, pitch = 0.0 degrees, roll = 0.0 degrees",
    "translation_direction": "To the right: (1.0, 0.0, 0.0)",
    "translation_distance": "2.50 meters",
}


class Speaker(PacedEstimator):
    """Measures as its parent does; answers with the question and the first red value of the image it was shown."""

    def __init__(self, *tasks: str) -> None:
        super().__init__()
        tasks = tasks or ("depth",)
        depth = {"dialects": ("dense", "coordinates"), "default_dialect": "dense", "depth_kind": "z"}
        none = {"dialects": (), "default_dialect": None, "depth_kind": None}
        card, _ = load_card("vlm3-pose")
        self.card = replace(card, tasks=tasks, focal_px=40.0, policy="exact", **(depth if "depth" in tasks else none))
        self.dialects = self.card.dialects
        self.policy = "exact"
        self.texts = dict(POSE_TEXTS)
        self.asked: list[tuple[int, list[str]]] = []
        self.engine = SimpleNamespace(
            info=self.engine.info, grid=ImageGrid(1, 1, 1 << 20), answer_about=self.answer_about
        )

    def answer_about(self, images: list[np.ndarray], questions: list[str], max_new_tokens: int) -> list[Answer]:
        self.asked.append((len(images), list(questions)))
        self.entered.set()
        while not self.gate.is_set():
            sum(range(10_000))
        if any("explode" in question for question in questions):
            raise EngineError("the engine ran out of memory; ask for less")
        names = {text: name for name, text in pose.QUESTIONS.items()}
        return [
            Answer(
                self.texts[names[q]] if q in names else "" if "silent" in q else f"{q} {images[0][0, 0, 0]}", (), 1.0
            )
            for q in questions
        ]

    def estimate(self, image: np.ndarray, camera: Camera, pixels: np.ndarray, **options: Any) -> DepthResult:
        """Plays that the first column is too near the border for the marker."""
        result = super().estimate(image, camera, pixels, **options)
        border = result.pixels[:, 0] < 1
        if options["undrawable"] == "shift":
            return replace(result, shifted=border)
        return replace(result, asked=~border, depth_m=np.where(border, np.float32(np.nan), result.depth_m))


class AskingWorld(World):
    """A world whose peer asks."""

    def __init__(self, *tasks: str, load: Callable[[Any], Any] | None = None, **parameters: Any) -> None:
        self.speaker = Speaker(*tasks)
        # How long a question waits is not left to how fast this machine is, except where a test is about it.
        parameters = {"question_timeout_s": 600.0} | parameters
        super().__init__(load=load or (lambda _parameters: self.speaker), **parameters)
        for kind, topic in ((String, ANSWER), (PointStamped, POINT)):
            self.listen(kind, topic, QoSProfile(depth=100))

    def close(self) -> None:
        self.speaker.gate.set()
        super().close()

    def start(self) -> None:
        assert self.transition(Transition.TRANSITION_CONFIGURE)[0]
        assert self.transition(Transition.TRANSITION_ACTIVATE)[0]
        kinds = ((String, ASK), (PointStamped, QUERY))
        self.askers = [self.peer.create_publisher(kind, topic, 100) for kind, topic in kinds]
        until(lambda: all(asker.get_subscription_count() for asker in self.askers), "the node to take questions")
        replies = self.node._questions.publishers.values()
        until(lambda: all(reply.get_subscription_count() for reply in replies), "the node to find its listener")

    def prepare_camera(self) -> None:
        """A camera that nobody may ever listen to."""
        for name, kind in (("image", Image), ("info", type(camera_info()))):
            self.publishers[name] = self.peer.create_publisher(kind, "image" if name == "image" else "camera_info", 10)

    def send(self, stamp: int, image: Any = None, info: Any = None) -> None:
        """An image of one colour, which stays the same whatever size it is shown in."""
        flat = np.full((HEIGHT, WIDTH, 3), red(stamp), np.uint8)
        super().send(stamp, rgb_message(flat, stamp, "optical") if image is None else image, info)

    def ask(self, text: str) -> None:
        self.askers[0].publish(String(data=text))

    def query(self, u: float, v: float) -> None:
        self.askers[1].publish(PointStamped(header=Header(frame_id="asked"), point=Point(x=u, y=v, z=7.0)))

    @property
    def answers(self) -> list[str]:
        return [message.data for message in self.heard[ANSWER]]

    @property
    def points(self) -> list[PointStamped]:
        return self.heard[POINT]

    def keep_sending(self, until_true: Callable[[], bool], what: str, first: int = 1) -> int:
        """Sends frames with growing stamps until something has happened; returns the last stamp."""
        stamp, deadline = first, time.monotonic() + PATIENCE_S
        while not until_true():
            assert time.monotonic() < deadline, f"waited {PATIENCE_S} s for {what}"
            self.send(stamp)
            stamp += 1
            time.sleep(0.02)
        return stamp


def camera_info() -> Any:
    return camera_info_message(CAMERA, 1, "optical")


@pytest.fixture
def worlds(ros_domain) -> Iterator[Callable[..., AskingWorld]]:
    made = []

    def make(*tasks: str, start: bool = True, **options: Any) -> AskingWorld:
        world = AskingWorld(*tasks, **options)
        made.append(world)
        if start:
            world.start()
        return world

    yield make
    for world in made:
        world.close()


def red(stamp: int) -> int:
    return 7 * stamp % 251


def test_a_question_is_answered_about_the_newest_frame_while_clouds_flow(worlds):
    world = worlds()
    world.listen(PointCloud2, "points")
    world.camera()
    world.send(stamp=1)
    world.send(stamp=2)
    until(lambda: world.heard["points"] and world.heard["points"][-1].header.stamp.nanosec == 2, "both frames")
    world.ask("What is it?")
    until(lambda: world.answers, "an answer")
    assert world.answers == [f"What is it? {red(2)}"]
    status = world.status_where(lambda s: value(s, "questions answered") == "1", "the answer in the diagnostics")
    assert float(value(status, "latency question ms").split()[0]) > 0


def test_the_image_is_subscribed_to_for_a_question_alone_and_no_depth_is_measured(worlds):
    world = worlds()
    world.prepare_camera()
    time.sleep(0.3)
    assert world.publishers["image"].get_subscription_count() == 0
    world.ask("Anybody there?")
    last = world.keep_sending(lambda: bool(world.answers), "an answer")
    assert world.answers[0] in {f"Anybody there? {red(stamp)}" for stamp in range(1, last)}
    assert world.publishers["image"].get_subscription_count() == 1
    assert world.set("question_timeout_s", 0.1)[0].successful
    until(lambda: world.publishers["image"].get_subscription_count() == 0, "the node to unsubscribe")
    assert world.speaker.calls == []


def test_questions_that_wait_for_the_first_frame_are_answered_together(worlds):
    world = worlds()
    world.prepare_camera()
    for number in range(3):
        world.ask(f"Question {number}?")
    until(lambda: len(world.node._questions._questions) == 3, "the questions to wait")
    world.keep_sending(lambda: len(world.answers) == 3, "three answers")
    assert [answer[:11] for answer in world.answers] == ["Question 0?", "Question 1?", "Question 2?"]
    assert world.speaker.asked == [(1, ["Question 0?", "Question 1?", "Question 2?"])]


def test_a_question_without_a_frame_gets_an_error_after_the_stated_time(worlds):
    world = worlds(question_timeout_s=0.3)
    world.ask("Is it dark?")
    world.query(3.0, 4.0)
    until(lambda: world.answers and world.points, "both errors")
    assert world.answers == [
        "error: 'Is it dark?' was not answered: no frame within question_timeout_s 0.3: nobody publishes /image; "
        "name the topic with -r image:=..."
    ]
    (point,) = world.points
    assert all(map(math.isnan, (point.point.x, point.point.y, point.point.z)))
    assert point.header.frame_id == "asked"
    status = world.status_where(lambda s: value(s, "questions unanswered") == "2", "the errors in the diagnostics")
    assert "no frame within" in value(status, "last error")


def test_a_frame_from_long_before_the_question_is_not_asked_about(worlds):
    world = worlds(question_timeout_s=0.5)
    world.listen(PointCloud2, "points")
    world.camera()
    world.send(stamp=1)
    until(lambda: world.heard["points"], "the frame to be measured")
    time.sleep(0.8)
    world.ask("What is it now?")
    until(lambda: world.answers, "an error")
    assert world.answers[0].startswith("error: 'What is it now?'") and "nothing new came on /image" in world.answers[0]


def test_a_flood_of_questions_gets_a_message_each_and_the_oldest_give_way(worlds):
    world = worlds()
    world.listen(PointCloud2, "points")
    world.camera()
    world.speaker.gate.clear()
    world.send(stamp=1)
    assert world.speaker.entered.wait(PATIENCE_S)
    for number in range(40):
        world.ask(f"Number {number}?")
    until(lambda: len(world.answers) == 40 - LIMIT, "the oldest to be refused")
    # Nobody is kept waiting by the frame in work, nor by the questions.
    assert world.set("stride", 8)[0].successful
    world.speaker.gate.set()
    until(lambda: len(world.answers) == 40, "an answer or an error for each")
    assert world.answers[0] == "error: 'Number 0?' was not answered: 16 newer ones wait already; ask more slowly"
    assert world.answers[-LIMIT:] == [f"Number {n}? {red(1)}" for n in range(40 - LIMIT, 40)]
    time.sleep(0.2)
    assert len(world.answers) == 40


def test_frames_keep_flowing_while_questions_pour_in(worlds):
    world = worlds()
    world.listen(PointCloud2, "points")
    world.camera()
    asked = 0

    def enough() -> bool:
        nonlocal asked
        world.ask(f"Question {asked}?")
        asked += 1
        return len(world.heard["points"]) >= 20 and len(world.answers) >= 20

    world.keep_sending(enough, "clouds and answers")
    until(lambda: len(world.answers) == asked, "a message for every question")
    jobs = len(world.speaker.asked)
    assert len(world.speaker.calls) >= 20 and jobs <= asked


def test_a_query_is_the_point_in_metres_with_the_images_stamp_and_frame(worlds):
    world = worlds()
    world.listen(PointCloud2, "points")
    world.camera()
    world.send(1_500_000_002, rgb_message(picture(0), 1_500_000_002, "optical"))
    until(lambda: world.heard["points"], "the frame")
    for u, v in ((4.0, 20.0), (31.0, 0.0)):
        world.query(u, v)
    until(lambda: len(world.points) == 2, "both points")
    for message, (u, v) in zip(world.points, ((4, 20), (31, 0)), strict=True):
        z = 1 + picture(0)[v, u, 0] / 10
        expected = [(u - CAMERA.cx) / CAMERA.fx * z, (v - CAMERA.cy) / CAMERA.fy * z, z]
        np.testing.assert_allclose([message.point.x, message.point.y, message.point.z], expected, rtol=1e-5)
        assert (message.header.stamp.sec, message.header.stamp.nanosec) == (1, 500_000_002)
        assert message.header.frame_id == "optical"


def test_a_query_that_has_no_answer_is_nan_with_the_reason_in_the_diagnostics(worlds):
    world = worlds(max_depth_m=1.05)
    world.listen(PointCloud2, "points")
    world.camera()
    world.send(stamp=1)
    until(lambda: world.heard["points"], "the frame")
    for number, (pixel, reason) in enumerate((
        ((float(WIDTH), 3.0), f"pixel ({WIDTH}, 3) is outside of the {WIDTH}x{HEIGHT} image"),
        ((math.nan, 3.0), "pixel (nan, 3) is outside"),
        ((3.0, 3.0), "pixel (3, 3) is 1.70 m away with confidence 0.50, left out by max_depth_m 1.05"),
    )):  # fmt: skip
        world.query(*pixel)
        until(lambda: len(world.points) == number + 1, "a point")  # noqa: B023
        assert all(map(math.isnan, (world.points[-1].point.x, world.points[-1].point.y, world.points[-1].point.z)))
        status = world.status_where(lambda s: value(s, "questions unanswered") == str(number + 1), "the reason")  # noqa: B023
        assert reason in value(status, "last error")


@pytest.mark.parametrize(
    ("question", "words"),
    [
        ("", "the question is empty"),
        ("y" * 5000, "has 5000 characters"),
        ("explode", "ran out of memory"),
        ("be silent", "the model wrote nothing"),
    ],
)
def test_a_question_that_cannot_be_answered_is_an_error_and_the_next_one_is_answered(worlds, question, words):
    world = worlds()
    world.listen(PointCloud2, "points")
    world.camera()
    world.send(stamp=1)
    until(lambda: world.heard["points"], "the frame")
    world.ask(question)
    until(lambda: world.answers, "an error")
    assert world.answers[0].startswith("error: '") and words in world.answers[0]
    world.ask("And now?")
    until(lambda: len(world.answers) == 2, "an answer")
    assert world.answers[1] == f"And now? {red(1)}"


def test_a_bad_frame_is_the_reason_why_a_question_has_no_answer(worlds):
    world = worlds()
    world.prepare_camera()
    world.ask("What is it?")
    until(lambda: world.node.connected, "the node to find its camera")

    def answered() -> bool:
        world.publishers["info"].publish(camera_info())
        world.publishers["image"].publish(broken(encoding="rgb24"))
        time.sleep(0.05)
        return bool(world.answers)

    until(answered, "an error")
    assert world.answers[0].startswith("error: 'What is it?'") and "rgb24" in world.answers[0]


def test_deactivation_gives_the_reason_to_questions_that_wait_and_to_those_in_work(worlds):
    world = worlds()
    world.listen(PointCloud2, "points")
    world.camera()
    world.send(stamp=1)
    until(lambda: world.heard["points"], "the frame")
    world.speaker.entered.clear()
    world.speaker.gate.clear()
    world.ask("In work?")
    assert world.speaker.entered.wait(PATIENCE_S)
    world.ask("Waiting?")
    until(lambda: len(world.node._questions._questions) == 1, "the second question to wait")
    assert world.transition(Transition.TRANSITION_DEACTIVATE)[0]
    until(lambda: len(world.answers) == 2, "both errors")
    world.speaker.gate.set()
    time.sleep(0.3)
    reason = "was not answered: the node was deactivated"
    assert world.answers == [f"error: 'In work?' {reason}", f"error: 'Waiting?' {reason}"]


def test_a_model_without_depth_answers_questions_and_says_why_no_cloud_comes(worlds):
    world = worlds("object")
    world.listen(PointCloud2, "points")
    status = world.status_where(lambda s: "nothing comes on points" in s.message, "the reason")
    assert status.level == DiagnosticStatus.WARN and "it is for object" in status.message
    world.prepare_camera()
    world.ask("What is it?")
    world.query(3.0, 3.0)
    world.keep_sending(lambda: bool(world.answers and world.points), "an answer and a point")
    assert world.answers[0].startswith("What is it? ")
    assert math.isnan(world.points[0].point.z)
    status = world.status_where(lambda s: value(s, "questions unanswered") == "1", "the reason")
    assert "was not trained for depth" in value(status, "last error")
    assert value(status, "dialect") == "none"
    assert world.speaker.calls == [] and world.heard["points"] == []


def test_a_dialect_named_for_a_model_without_depth_fails_the_transition(worlds):
    world = worlds("object", start=False, dialect="dense")
    assert not world.transition(Transition.TRANSITION_CONFIGURE)[0]
    status = world.status_where(lambda s: value(s, "last error") != "", "the reason")
    assert "answers no depth questions, it is for object; leave dialect empty" in value(status, "last error")


@pytest.mark.parametrize(
    ("undrawable", "counts", "known"),
    [("report", {"points not askable": HEIGHT, "points shifted": 0}, WIDTH * HEIGHT - HEIGHT),
     ("shift", {"points not askable": 0, "points shifted": HEIGHT}, WIDTH * HEIGHT)],
)  # fmt: skip
def test_points_too_near_the_border_are_counted_whatever_becomes_of_them(worlds, undrawable, counts, known):
    world = worlds(stride=1, undrawable=undrawable)
    world.listen(PointCloud2, "points")
    world.camera()
    world.send(stamp=1)
    until(lambda: world.heard["points"], "a cloud")
    assert world.heard["points"][0].width == known
    world.query(0.0, 5.0)
    until(lambda: world.points, "a point")
    assert math.isnan(world.points[0].point.z) == (undrawable == "report")
    status = world.status_where(lambda s: value(s, "frames processed") == "1", "the counts")
    assert {name: int(value(status, name)) for name in counts} == counts
    assert value(status, "points unanswered") == "0"


def stamps(messages: list[Any]) -> list[int]:
    return [message.header.stamp.nanosec for message in messages]


def test_poses_are_told_between_consecutive_frames_in_the_first_ones_frame(worlds):
    world = worlds("depth", "pose", relative_pose=True)
    world.listen(PoseStamped, "relative_pose")
    world.camera()
    for stamp in (1, 2, 3):
        world.send(stamp)
        until(lambda: world.node.counts.processed == stamp, f"frame {stamp}")  # noqa: B023
    until(lambda: len(world.heard["relative_pose"]) == 2, "two poses")
    assert stamps(world.heard["relative_pose"]) == [1, 2]
    message = world.heard["relative_pose"][0]
    where, turned = message.pose.position, message.pose.orientation
    half = math.sqrt(0.5)
    assert (where.x, where.y, where.z) == (2.5, 0.0, 0.0)
    np.testing.assert_allclose([turned.x, turned.y, turned.z, turned.w], [0, half, 0, half], atol=1e-9)
    assert message.header.frame_id == "optical"
    assert world.speaker.asked == [(2, list(pose.QUESTIONS.values()))] * 2
    assert world.speaker.calls == [], "nobody listens to depth"


def test_a_pose_that_cannot_be_read_is_not_published_but_counted(worlds):
    world = worlds("pose", relative_pose=True)
    world.speaker.texts["translation_distance"] = "quite far"
    world.listen(PoseStamped, "relative_pose")
    world.camera()
    for stamp in (1, 2):
        world.send(stamp)
        until(lambda: world.node.counts.processed == stamp, f"frame {stamp}")  # noqa: B023
    status = world.status_where(lambda s: "poses not readable" in {e.key for e in s.values}, "the count")
    assert (value(status, "poses told"), value(status, "poses not readable")) == ("0", "1")
    assert world.heard["relative_pose"] == []


def test_a_pose_that_comes_too_late_does_not_undo_the_depth_before_it(worlds):
    world = worlds("depth", "pose", relative_pose=True)
    world.listen(PoseStamped, "relative_pose")
    world.listen(PointCloud2, "points")
    world.camera()
    world.send(stamp=1)
    until(lambda: world.node.counts.processed == 1, "the first frame")
    answer = world.speaker.answer_about

    def slowly(*arguments: Any) -> list[Answer]:
        # Set when the depth is out, which may take a while here.
        assert world.set("max_age_s", 0.1)[0].successful
        time.sleep(0.15)
        return answer(*arguments)

    world.speaker.engine.answer_about = slowly
    world.send(stamp=2)
    until(lambda: world.node.counts.processed == 2, "the second frame")
    until(lambda: stamps(world.heard["points"]) == [1, 2], "both clouds")
    assert world.heard["relative_pose"] == []
    status = world.status_where(lambda s: value(s, "frames processed") == "2", "the counts")
    assert (value(status, "frames failed"), value(status, "poses too late")) == ("0", "1")
    assert "s after the image, max_age_s is 0.1: not published" in value(status, "last error")
    assert float(value(status, "latency pose ms").split("95 %: ")[1].rstrip(")")) >= 150


def test_no_pose_spans_a_deactivation(worlds):
    world = worlds("pose", relative_pose=True)
    world.listen(PoseStamped, "relative_pose")
    world.camera()
    world.send(stamp=1)
    until(lambda: world.node.counts.processed == 1, "the first frame")
    world.restart()
    for number, stamp in ((2, 5), (3, 6)):
        world.send(stamp)
        until(lambda: world.node.counts.processed == number, f"frame {stamp}")  # noqa: B023
    until(lambda: world.heard["relative_pose"], "a pose")
    assert stamps(world.heard["relative_pose"]) == [5]


def test_poses_of_a_model_that_is_not_for_them_fail_the_transition(worlds):
    world = worlds("depth", start=False, relative_pose=True)
    assert not world.transition(Transition.TRANSITION_CONFIGURE)[0]
    status = world.status_where(lambda s: value(s, "last error") != "", "the reason")
    assert "was not trained for pose, it is for depth; set relative_pose to false" in value(status, "last error")
    assert world.speaker.closed.is_set()


def test_a_licence_that_forbids_commercial_use_fails_the_transition_with_the_reason(worlds):
    world = worlds(start=False, load=load_estimator, model="vlm3-depth", commercial_use=True)
    assert not world.transition(Transition.TRANSITION_CONFIGURE)[0]
    status = world.status_where(lambda s: value(s, "last error") != "", "the reason")
    assert value(status, "last error").startswith("LicenceError: model 'vlm3-depth' may not be used commercially")
    assert "FAIR Noncommercial" in value(status, "last error")
