"""`depth_node`: images in, metric point clouds out; questions about the newest image in, answers out.

    ros2 run depthlm_ros depth_node --ros-args -r image:=/camera/image_raw
    python -m depthlm_ros.node --ros-args -r image:=/camera/image_raw -p points:=400

The executor's thread only moves messages; decoding, inference and publishing happen in the worker's threads, so that
parameters, lifecycle and shutdown answer while a frame is in work. One thread has the model: the newest frame first
(`frames.py`), questions (`question_topics.py`) between frames. Beside it the next frame is prepared and the last one
published. The image is subscribed to only while somebody listens to `points`, `depth`, `overlay` or `relative_pose`, or
asks.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import rclpy
from diagnostic_msgs.msg import DiagnosticArray
from rcl_interfaces.msg import SetParametersResult
from rclpy.clock import Clock, ClockType
from rclpy.event_handler import PublisherEventCallbacks, SubscriptionEventCallbacks
from rclpy.exceptions import NotInitializedException
from rclpy.executors import ExternalShutdownException
from rclpy.lifecycle import LifecycleNode, LifecycleState, TransitionCallbackReturn
from rclpy.parameter import Parameter
from rclpy.qos import QoSProfile
from sensor_msgs.msg import CameraInfo

from depthlm_ros import qos
from depthlm_ros.camera_input import CameraInput, Pair
from depthlm_ros.complaints import Complaints
from depthlm_ros.config import NODE_NAME, Parameters
from depthlm_ros.engines import WITHOUT_TORCH
from depthlm_ros.engines.edge_llm_command import end_all
from depthlm_ros.errors import ConfigError, DepthLMError
from depthlm_ros.frames import DEPTH_TOPICS, Arrival, FramePath
from depthlm_ros.inference import Inference, check_model, spoken_dialect
from depthlm_ros.interrupt import Interrupt
from depthlm_ros.middleware import release_shared_memory, use_large_message_profile
from depthlm_ros.monitor import Monitor
from depthlm_ros.outputs import DEPTH_OUTPUTS, POSE_OUTPUT, diagnostics_message
from depthlm_ros.question_topics import QuestionTopics
from depthlm_ros.ros_parameters import changed, declare
from depthlm_ros.worker import Counts, Worker

if TYPE_CHECKING:
    from depthlm_ros.estimator import Estimator

# Fast enough that nobody waits for the first cloud, slow enough to cost nothing.
_HOUSEKEEPING_S = 0.1
_DIAGNOSTICS_S = 1.0
# A signal ends rclpy's context first, and then whatever rclpy is about fails in a way of its own. RCLError and
# InvalidHandle are RuntimeErrors.
_OF_AN_ENDED_CONTEXT = (RuntimeError, ExternalShutdownException, NotInitializedException, ValueError)

EstimatorFactory = Callable[[Parameters], "Estimator"]


def load_estimator(parameters: Parameters) -> Estimator:
    """Loads the model that the parameters name.

    Raises:
        DepthLMError: it can't be loaded, or doesn't speak the dialect.
    """
    from depthlm_ros.estimator import Estimator

    if parameters.cpu_threads and parameters.engine not in WITHOUT_TORCH:
        # Where torch isn't there, the engine says which package it lacks.
        with contextlib.suppress(ImportError):
            from depthlm_ros.engines.devices import limit_cpu_threads

            limit_cpu_threads(parameters.cpu_threads)
    return Estimator.load(**parameters.load_arguments())


class DepthNode(LifecycleNode):
    """The lifecycle node; `main` runs it.

    Args:
        load: makes the estimator at configure.
        node_arguments: passed on to `rclpy.lifecycle.LifecycleNode`.

    Raises:
        ConfigError: an unknown parameter or a bad value on the command line.
    """

    def __init__(self, load: EstimatorFactory = load_estimator, **node_arguments: Any) -> None:
        super().__init__(NODE_NAME, automatically_declare_parameters_from_overrides=True, **node_arguments)
        self._load = load
        self.parameters = declare(self)
        self.add_on_set_parameters_callback(self._judge_parameters)
        self.add_post_set_parameters_callback(self._take_parameters)

        self._estimator: Estimator | None = None
        self._worker: Worker[Arrival] | None = None
        self._questions: QuestionTopics | None = None
        self._monitor = Monitor()
        self._outputs: dict[str, Any] = {}
        self._camera = CameraInput(self, self._take)
        self._listened: frozenset[str] = frozenset()
        self._active = False
        # What a worker publishes must not outlive deactivation: each activation has a number, and a frame
        # that was begun under another one is thrown away.
        self._activation = 0
        self._publishing = threading.Lock()
        self._complaints = Complaints(self.get_logger())
        self._mismatches = qos.Mismatches()

        steady = Clock(clock_type=ClockType.STEADY_TIME)
        self._diagnostics = self.create_publisher(DiagnosticArray, "/diagnostics", 10)
        self._timers_kept = (
            self.create_timer(_HOUSEKEEPING_S, self._keep_house, clock=steady),
            self.create_timer(_DIAGNOSTICS_S, self._report, clock=steady),
        )

    @property
    def counts(self) -> Counts:
        """What became of the frames since the node was configured."""
        return self._worker.counts if self._worker is not None else Counts()

    @property
    def connected(self) -> bool:
        """Whether image and camera_info are subscribed to and each has a publisher."""
        return self._camera.connected

    # Lifecycle

    def start(self) -> bool:
        """Configures and activates; returns whether both went well."""
        return (
            self.trigger_configure() == TransitionCallbackReturn.SUCCESS
            and self.trigger_activate() == TransitionCallbackReturn.SUCCESS
        )

    def close(self, patience_s: float = 0.1) -> bool:
        """Stops work and destroys the node; returns whether inference has really ended."""
        ended = True
        self._stop()
        if self._worker is not None:
            self._worker.stop()
            ended = self._worker.join(patience_s)
        self.destroy_node()
        return ended

    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Loads the model and offers the outputs; fails with the reason in the log and in the diagnostics."""
        self.get_logger().info(f"loading model {self.parameters.model}")
        try:
            self._estimator = self._load(self.parameters)
            check_model(self._estimator, self.parameters)
        except DepthLMError as error:
            self._drop_estimator()
            self._monitor.note(f"{type(error).__name__}: {error}")
            self.get_logger().error(f"can't configure: {error}")
            return TransitionCallbackReturn.FAILURE
        except Exception:
            # rclpy turns whatever a transition raises into a silent ERROR; a person needs to see why.
            self.get_logger().fatal(f"configure broke off:\n{traceback.format_exc()}")
            raise
        for line in self._estimator.describe():
            self.get_logger().info(line)
        self._complaints.remind(self._estimator, at_once=True)
        self._monitor = Monitor()
        inference = Inference(self._estimator)
        frames = FramePath(self, inference, self._monitor, self._wanted)
        self._questions = QuestionTopics(self, inference, frames.decode, self._monitor, lambda: self._worker.wake())
        self._worker = Worker(
            frames.measure,
            self._frame_failed,
            self._estimator.close,
            next_job=self._questions.next_job,
            prepare=frames.prepare,
            finish=frames.publish,
        )
        kinds = DEPTH_OUTPUTS | (POSE_OUTPUT if self.parameters.relative_pose else {})
        self._outputs = {name: self.offer(kind, name, qos.output_qos()) for name, kind in kinds.items()}
        return super().on_configure(state)

    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Begins to answer; the image is subscribed to once somebody listens."""
        with self._publishing:
            self._activation += 1
        self._active = True
        self._complaints.remind(self._estimator, at_once=True)
        self._camera.resolve()
        image, info = self._camera.image_topic, self._camera.info_topic
        if "rect" in image.rsplit("/", 1)[-1] and not self.parameters.rectified:
            self.get_logger().warning(
                f"{image} looks rectified, but K and D of {info} will be used; set -p rectified:=true if it is"
            )
        self._questions.open()
        asked = ", ".join(subscription.topic_name for subscription in self._questions.subscriptions)
        points = self._outputs["points"].topic_name
        self.get_logger().info(f"ready: image {image}, camera_info {info}, points {points}, questions {asked}")
        return super().on_activate(state)

    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Stops; the frame in work finishes unheard."""
        self._stop()
        return super().on_deactivate(state)

    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Gives the model back; parameters that are fixed while configured can change now."""
        result = super().on_cleanup(state)
        self._release()
        return result

    def on_shutdown(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Stops for good."""
        self._stop()
        result = super().on_shutdown(state)
        self._release()
        return result

    def on_error(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Goes back to unconfigured after a transition broke off."""
        self._stop()
        self._release()
        return super().on_error(state)

    def _stop(self) -> None:
        self._active = False
        self._listened = frozenset()
        with self._publishing:
            self._activation += 1
        self._camera.close()
        if self._questions is not None:
            self._questions.close()
        if self._worker is not None:
            self._worker.clear()

    def _release(self) -> None:
        for publisher in self._outputs.values():
            self.destroy_lifecycle_publisher(publisher)
        self._outputs = {}
        if self._questions is not None:
            self._questions.destroy()
        self._questions = None
        if self._worker is not None:
            # The worker closes the estimator after the frame in work.
            self._worker.stop()
            self._estimator = None
        self._worker = None
        self._drop_estimator()

    def _drop_estimator(self) -> None:
        if self._estimator is not None:
            self._estimator.close()
        self._estimator = None

    # Parameters

    def _judge_parameters(self, updates: Sequence[Parameter]) -> SetParametersResult:
        try:
            proposed = changed(self.parameters, updates, configured=self._estimator is not None)
            if self._estimator is not None:
                check_model(self._estimator, proposed)
        except DepthLMError as error:
            return SetParametersResult(successful=False, reason=str(error))
        return SetParametersResult(successful=True)

    def _take_parameters(self, updates: Sequence[Parameter]) -> None:
        self.parameters = changed(self.parameters, updates, configured=False)

    # Topics

    def offer(self, kind: type, name: str, profile: QoSProfile) -> Any:
        """Makes a lifecycle publisher whose subscribers are told why they hear nothing."""
        topic = self.resolve_topic_name(name)
        return self.create_lifecycle_publisher(
            kind,
            name,
            profile,
            event_callbacks=PublisherEventCallbacks(incompatible_qos=lambda _event: self._mismatches.note(topic)),
            qos_overriding_options=qos.overriding_options(),
        )

    def hear(self, kind: type, name: str, callback: Callable[[Any], None], profile: QoSProfile) -> Any:
        """Makes a subscription whose publishers are told why they aren't heard."""
        topic = self.resolve_topic_name(name)
        return self.create_subscription(
            kind,
            name,
            callback,
            profile,
            event_callbacks=SubscriptionEventCallbacks(incompatible_qos=lambda _event: self._mismatches.note(topic)),
            qos_overriding_options=qos.overriding_options(),
        )

    # On the executor's thread

    def _take(self, pair: Pair) -> None:
        self._questions.new_frame(pair)
        if self._wanted():
            self._worker.submit(Arrival(pair, time.perf_counter()))
        else:
            self._worker.wake()

    def _wanted(self) -> frozenset[str]:
        """Topics that somebody listens to and that this model has something for."""
        has_depth = self._estimator is not None and bool(self._estimator.dialects)
        return self._listened.intersection(("relative_pose", *DEPTH_TOPICS) if has_depth else ("relative_pose",))

    def tend_inputs(self) -> None:
        """Subscribes to the image while somebody listens or asks, and only then."""
        wanted = self._active and (bool(self._wanted()) or self._questions.want_frames)
        if wanted and not self._camera.is_open:
            self._camera.open()
        elif not wanted and self._camera.is_open:
            self._camera.close()
            self._questions.new_frame(None)

    def _keep_house(self) -> None:
        if not self._active:
            return
        self._listened = frozenset(n for n, output in self._outputs.items() if output.get_subscription_count())
        nothing = f"nothing new came on {self._camera.image_topic}"
        self._questions.refuse_overdue(lambda: self._camera.complaint or nothing)
        self.tend_inputs()
        self._camera.give_up_overdue()

    # On the worker's threads

    @property
    def activation(self) -> int:
        """Which activation this is; what was begun under another one isn't published."""
        return self._activation

    def require_info(self, info: CameraInfo | None) -> CameraInfo:
        """The info of a pair.

        Raises:
            CameraError: there is none.
        """
        return self._camera.require_info(info)

    def publish(self, activation: int, messages: dict[str, Any]) -> None:
        """Publishes messages by topic if this is still the activation they were begun under."""
        with self._publishing:
            if activation == self._activation and self.context.ok():
                for name, output in messages.items():
                    self._outputs[name].publish(output)

    def _frame_failed(self, error: Exception) -> None:
        self._monitor.frame_failed(error)
        self._complaints.frame_failed(error)

    def complain(self, about: str, text: str) -> None:
        """Warns in the log, not more often than a person can read."""
        self._complaints.say(about, text)

    # Diagnostics

    def _report(self) -> None:
        self._complaints.remind(self._estimator)
        asked = self._questions
        for sentence in self._mismatches.explain(
            self,
            [*self._camera.subscriptions, *(asked.subscriptions if asked else ())],
            [*self._outputs.values(), *(asked.publishers.values() if asked else ())],
        ):
            self.get_logger().warning(sentence)
        counts = self.counts
        status = self._monitor.report(self._describe_state(), counts.received, counts.dropped, self._warnings())
        stages = [f"{stage} {latency}" for stage, latency in self._monitor.latencies().items()]
        if stages:
            self.get_logger().debug(f"latency in ms, {counts.processed} frames: {', '.join(stages)}")
        values = {"state": self._state_machine.current_state[1], "model": self.parameters.model}
        if self._estimator is not None:
            info = self._estimator.engine.info
            values["dialect"] = spoken_dialect(self._estimator, self.parameters) or "none"
            values |= {"engine": info.engine, "device": info.device, "dtype": info.dtype}
            values["why"] = "; ".join(info.reasons)
        status = replace(status, values=values | status.values)
        name = f"{self.get_fully_qualified_name().lstrip('/')}: depth"
        stamp = self.get_clock().now().to_msg()
        self._diagnostics.publish(diagnostics_message(stamp, name, self.parameters.model, status))

    def _describe_state(self) -> str:
        state = self._state_machine.current_state[1]
        if state == "active" and not self._camera.is_open:
            return "active, at rest: nobody listens to points, depth or overlay, and nobody asks"
        return state

    def _warnings(self) -> list[str]:
        warnings = list(self._mismatches.sentences)
        silent = self._listened.intersection(DEPTH_TOPICS) - self._wanted()
        if silent:
            card = self._estimator.card
            warnings.append(
                f"nothing comes on {', '.join(sorted(silent))}: model {self.parameters.model} answers no depth "
                f"questions, it is for {', '.join(card.tasks)}"
            )
        if self._estimator is not None:
            warnings += self._estimator.complaints
        return [*warnings, *filter(None, [self._camera.complaint])]


def _init_ros(args: list[str] | None) -> bool:
    """Starts ROS; False where it doesn't, with the reason on standard error."""
    try:
        rclpy.init(args=args)
    except RuntimeError as error:
        # A wrong --ros-args, or no place for the log, which ROS names by the line of its own source only.
        no_log = not any(os.environ.get(name) for name in ("ROS_LOG_DIR", "ROS_HOME", "HOME"))
        remedy = "set HOME or ROS_LOG_DIR, ROS writes its log there" if no_log else "correct what follows --ros-args"
        print(f"depth_node: ROS does not start: {error}; {remedy}", file=sys.stderr)
        return False
    return True


def main(args: list[str] | None = None, load: EstimatorFactory = load_estimator) -> int:
    """Runs the node until it is told to stop.

    With `autostart` (the default) a node that can't configure ends with status 1 and the reason; a node that
    sits there dead helps nobody. Without it, it stays unconfigured and tries again when told to.

    Returns:
        Exit status.
    """
    use_large_message_profile(os.environ)
    interrupt = Interrupt()
    node = None
    status = 0
    try:
        if not _init_ros(args):
            status = 1
        else:
            try:
                node = DepthNode(load)
                if not node.parameters.autostart or node.start():
                    rclpy.spin(node)
                else:
                    # A signal while the node starts ends what it was starting: no fault of the node.
                    status = 1 if rclpy.ok() else 0
            except ConfigError as error:
                print(f"depth_node: {error}", file=sys.stderr)
                status = 1
            except Exception as error:
                if rclpy.ok():
                    traceback.print_exc()
                    status = 1
                elif not isinstance(error, _OF_AN_ENDED_CONTEXT):
                    print(f"depth_node: while it was told to end: {type(error).__name__}: {error}", file=sys.stderr)
        interrupt.ignore()
    except KeyboardInterrupt:
        interrupt.ignore()
    ended = node.close() if node is not None else True
    rclpy.try_shutdown()
    if not ended:
        # A forward pass can't be interrupted, and the interpreter's own end would wait for it or crash in it.
        sys.stdout.flush()
        sys.stderr.flush()
        release_shared_memory()
        end_all()
        os._exit(status)
    interrupt.restore()
    return status


if __name__ == "__main__":
    sys.exit(main())
