"""The topics on which a node takes questions about the newest frame, and those on which it answers.

    ~/ask    std_msgs/String               ->  ~/answer       std_msgs/String
    ~/query  geometry_msgs/PointStamped    ->  ~/query/point  geometry_msgs/PointStamped

Each question gets exactly one message, those of a kind in the order they were asked: an answer, or a text that
begins with "error: " and names the question, or a point of NaN whose reason stands in the log and in the diagnostics.
Questions that are refused at once (empty, too many) overtake those that wait.
"""

from __future__ import annotations

import functools
import math
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from geometry_msgs.msg import PointStamped
from std_msgs.msg import String

from depthlm_ros import qos
from depthlm_ros.depth import Frame
from depthlm_ros.errors import ConfigError, DepthLMError
from depthlm_ros.inference import Inference
from depthlm_ros.monitor import Monitor
from depthlm_ros.outputs import REPLIES, no_point_message, point_message
from depthlm_ros.questions import LIMIT, POINT, TEXT, Question, Questions, check_text
from depthlm_ros.worker import Job

if TYPE_CHECKING:
    from depthlm_ros.node import DepthNode


class QuestionTopics:
    """Takes questions on the executor's thread and has them answered on the worker's.

    Args:
        node: whose topics they are; for a life from configure to cleanup.
        inference: who answers.
        decode: makes a frame of what `new_frame` gets, in the worker's thread.
        monitor: is told what became of each question.
        wake: tells the worker that there may be something to do.
    """

    def __init__(
        self,
        node: DepthNode,
        inference: Inference,
        decode: Callable[[Any], Frame],
        monitor: Monitor,
        wake: Callable[[], None],
    ) -> None:
        self._node = node
        self._inference = inference
        self._decode = decode
        self._monitor = monitor
        self._wake = wake
        self._questions = Questions()
        self._newest: tuple[Any, float] | None = None
        self._asked_s = -math.inf
        # What a worker publishes must not outlive `close`.
        self._publishing = threading.Lock()
        self.publishers = {name: node.offer(kind, name, qos.question_qos()) for name, kind in REPLIES.items()}
        self.subscriptions: list[Any] = []

    # On the executor's thread

    def open(self) -> None:
        """Begins to take questions."""
        self.subscriptions = [
            self._node.hear(String, "~/ask", self._on_ask, qos.question_qos()),
            self._node.hear(PointStamped, "~/query", self._on_query, qos.question_qos()),
        ]

    def close(self) -> None:
        """Takes no more; those that wait or are in work get the reason."""
        for subscription in self.subscriptions:
            self._node.destroy_subscription(subscription)
        self.subscriptions = []
        self.new_frame(None)
        with self._publishing:
            left = self._questions.clear()
        self._refuse(left, "the node was deactivated")

    def destroy(self) -> None:
        """Takes the topics away."""
        for publisher in self.publishers.values():
            self._node.destroy_lifecycle_publisher(publisher)

    @property
    def want_frames(self) -> bool:
        """Whether somebody has asked lately; then the image is subscribed to for the questions alone."""
        recent = time.monotonic() - self._asked_s < self._node.parameters.question_timeout_s
        return bool(self.subscriptions) and (recent or len(self._questions) > 0)

    def new_frame(self, pair: Any) -> None:
        """Notes the newest frame; None that there is none any more."""
        self._newest = None if pair is None else (pair, time.monotonic())

    def refuse_overdue(self, why: Callable[[], str]) -> None:
        """Gives an error to those that have waited for a frame long enough.

        Args:
            why: says where frames should have come from.
        """
        newest = self._newest
        patience_s = self._node.parameters.question_timeout_s
        late = self._questions.overdue(time.monotonic(), patience_s, newest[1] if newest else None)
        if late:
            self._refuse(late, f"no frame within question_timeout_s {patience_s:g}: {why()}")

    def _on_ask(self, message: String) -> None:
        question = Question(TEXT, time.monotonic(), text=message.data)
        try:
            check_text(question.text)
        except ConfigError as error:
            self._refuse([question], str(error))
        else:
            self._take_in(question)

    def _on_query(self, message: PointStamped) -> None:
        pixel = message.point.x, message.point.y
        self._take_in(Question(POINT, time.monotonic(), pixel=pixel, origin=message))

    def _take_in(self, question: Question) -> None:
        self._asked_s = question.asked_s
        gives_way = self._questions.put(question)
        if gives_way is not None:
            self._refuse([gives_way], f"{LIMIT} newer ones wait already; ask more slowly")
        self._node.tend_inputs()
        self._wake()

    # On either

    def _refuse(self, questions: Sequence[Question], reason: str) -> None:
        for question in questions:
            text = f"{question} was not answered: {reason}"
            self._monitor.question_unanswered(text)
            self._node.complain(f"{question.kind} question", text)
            with self._publishing:
                # Ctrl-C takes the context away before the node is closed.
                if self._node.context.ok():
                    self._publish_refusal(question, text)

    def _publish_refusal(self, question: Question, text: str) -> None:
        if question.kind == TEXT:
            self.publishers["~/answer"].publish(String(data=f"error: {text}"))
        else:
            self.publishers["~/query/point"].publish(no_point_message(question.origin))

    # On the worker's thread

    def next_job(self) -> Job | None:
        """The questions to be answered next; None where none wait or there is no frame for them."""
        if self._newest is None:
            return None
        pair, arrived_s = self._newest
        taken = self._questions.take(arrived_s, self._node.parameters.question_timeout_s)
        if not taken:
            return None
        return Job(functools.partial(self._answer, pair, taken), functools.partial(self._answer_failed, taken))

    def _answer(self, pair: Any, taken: list[Question]) -> None:
        started = time.perf_counter()
        frame = self._decode(pair)
        replies = self._texts(frame, taken) if taken[0].kind == TEXT else self._points(frame, taken)
        with self._publishing:
            if not self._questions.finish(taken) or not self._node.context.ok():
                return
            for topic, message, _ in replies:
                self.publishers[topic].publish(message)
        self._monitor.questions_answered(
            time.perf_counter() - started, count=sum(not problem for _, _, problem in replies)
        )
        for _, _, problem in filter(lambda reply: reply[2], replies):
            self._monitor.question_unanswered(problem)
            self._node.complain(f"{taken[0].kind} question", problem)

    def _texts(self, frame: Frame, taken: list[Question]) -> list[tuple[str, Any, str]]:
        replies = []
        texts = self._inference.ask(frame, [question.text for question in taken], self._node.parameters)
        for question, text in zip(taken, texts, strict=True):
            problem = "" if text.strip() else f"{question} was not answered: the model wrote nothing"
            replies.append(("~/answer", String(data=f"error: {problem}" if problem else text), problem))
        return replies

    def _points(self, frame: Frame, taken: list[Question]) -> list[tuple[str, Any, str]]:
        answers = self._inference.points(frame, [question.pixel for question in taken], self._node.parameters)
        return [("~/query/point", point_message(frame, answer.xyz_m), answer.problem) for answer in answers]

    def _answer_failed(self, taken: list[Question], error: Exception) -> None:
        with self._publishing:
            waited_for = self._questions.finish(taken)
        if isinstance(error, DepthLMError):
            reason = str(error)
        else:
            reason = f"unexpectedly, {type(error).__name__}: {error}"
            text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
            self._node.get_logger().error(f"a question failed:\n{text}")
        if waited_for:
            self._refuse(taken, reason)
