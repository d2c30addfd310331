"""`depth_node`: images in, metric point clouds out.

    ros2 run depthlm_ros depth_node --ros-args -r image:=/camera/image_raw
    python -m depthlm_ros.node --ros-args -r image:=/camera/image_raw -p points:=400

The executor's thread only moves messages; decoding, inference and publishing happen in the worker's thread, so that
parameters, lifecycle and shutdown answer while a frame is in work. The image is subscribed to only while
somebody listens to `points`, `depth` or `overlay`.
"""

from __future__ import annotations

import functools
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
from rclpy.executors import ExternalShutdownException
from rclpy.lifecycle import LifecycleNode, LifecycleState, TransitionCallbackReturn
from rclpy.parameter import Parameter
from sensor_msgs.msg import CameraInfo, CompressedImage, Image

from depthlm_ros import qos
from depthlm_ros.camera import camera_from_info
from depthlm_ros.config import NODE_NAME, Parameters
from depthlm_ros.errors import CameraError, ConfigError, DepthLMError, DialectError
from depthlm_ros.messages import decode_compressed, decode_image, header_stamp_ns
from depthlm_ros.middleware import use_large_message_profile
from depthlm_ros.monitor import Monitor
from depthlm_ros.outputs import OUTPUTS, build_outputs, diagnostics_message
from depthlm_ros.pairing import Pairing
from depthlm_ros.queries import keep_good, plan_query
from depthlm_ros.ros_parameters import changed, declare
from depthlm_ros.topics import compressed_topic, sibling_topic
from depthlm_ros.worker import Counts, Worker

if TYPE_CHECKING:
    from depthlm_ros.estimator import Estimator

# Fast enough that nobody waits for the first cloud, slow enough to cost nothing.
_HOUSEKEEPING_S = 0.1
_DIAGNOSTICS_S = 1.0
# A camera can fail thirty times a second; a person reads one line of it.
_LOG_INTERVAL_S = 5.0

EstimatorFactory = Callable[[Parameters], "Estimator"]


def load_estimator(parameters: Parameters) -> Estimator:
    """Loads the model that the parameters name.

    Raises:
        DepthLMError: it can't be loaded, or doesn't speak the dialect.
    """
    from depthlm_ros.engines.devices import limit_cpu_threads
    from depthlm_ros.estimator import Estimator

    if parameters.cpu_threads:
        limit_cpu_threads(parameters.cpu_threads)
    return Estimator.load(**parameters.load_arguments())


def _spoken_dialect(estimator: Estimator, parameters: Parameters) -> str:
    dialect = parameters.dialect or estimator.card.default_dialect
    if dialect not in estimator.dialects:
        raise DialectError(
            f"model {parameters.model} doesn't speak {dialect!r}; choose one of {', '.join(estimator.dialects)}, "
            "or leave dialect empty for its default"
        )
    return dialect


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
        self._worker: Worker[tuple[Any, CameraInfo | None]] | None = None
        self._pairing: Pairing[Any, CameraInfo] = Pairing()
        self._monitor = Monitor()
        self._outputs: dict[str, Any] = {}
        self._inputs: list[Any] = []
        self._topics = ("", "")
        self._listened: frozenset[str] = frozenset()
        self._active = False
        # What a worker publishes must not outlive deactivation: each activation has a number, and a frame
        # that was begun under another one is thrown away.
        self._activation = 0
        self._publishing = threading.Lock()
        self._complaints: dict[str, float] = {}
        self._mismatched: set[str] = set()
        self._qos_sentences: list[str] = []

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
        return bool(self._inputs) and all(each.get_publisher_count() for each in self._inputs)

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
            _spoken_dialect(self._estimator, self.parameters)
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
        self._monitor = Monitor()
        self._worker = Worker(functools.partial(self._work, self._estimator), self._frame_failed, self._estimator.close)
        self._outputs = {name: self._create_output(kind, name) for name, kind in OUTPUTS.items()}
        return super().on_configure(state)

    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Begins to answer; the image is subscribed to once somebody listens."""
        with self._publishing:
            self._activation += 1
        self._active = True
        self._topics = image, info = self._input_topics()
        if "rect" in image.rsplit("/", 1)[-1] and not self.parameters.rectified:
            self.get_logger().warning(
                f"{image} looks rectified, but K and D of {info} will be used; set -p rectified:=true if it is"
            )
        self.get_logger().info(f"ready: image {image}, camera_info {info}, points {self._outputs['points'].topic_name}")
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
        self._unsubscribe()
        if self._worker is not None:
            self._worker.clear()

    def _release(self) -> None:
        for publisher in self._outputs.values():
            self.destroy_lifecycle_publisher(publisher)
        self._outputs = {}
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
                _spoken_dialect(self._estimator, proposed)
        except DepthLMError as error:
            return SetParametersResult(successful=False, reason=str(error))
        return SetParametersResult(successful=True)

    def _take_parameters(self, updates: Sequence[Parameter]) -> None:
        self.parameters = changed(self.parameters, updates, configured=False)

    # Topics

    def _input_topics(self) -> tuple[str, str]:
        """Full names of the image topic and of its camera_info, remapping applied."""
        image = self.resolve_topic_name("image")
        if self.parameters.compressed:
            image = compressed_topic(
                image,
                self.resolve_topic_name("image/compressed"),
                self.resolve_topic_name("image/compressed", only_expand=True),
            )
        info = self.resolve_topic_name("camera_info")
        remapped = info != self.resolve_topic_name("camera_info", only_expand=True)
        return image, info if remapped else sibling_topic(image, "camera_info", self.parameters.compressed)

    def _create_output(self, kind: type, name: str) -> Any:
        return self.create_lifecycle_publisher(
            kind,
            name,
            qos.output_qos(),
            event_callbacks=PublisherEventCallbacks(
                incompatible_qos=lambda _event: self._mismatched.add(self.resolve_topic_name(name))
            ),
            qos_overriding_options=qos.overriding_options(),
        )

    def _create_input(self, kind: type, topic: str, callback: Callable[[Any], None]) -> Any:
        return self.create_subscription(
            kind,
            topic,
            callback,
            qos.sensor_qos(),
            event_callbacks=SubscriptionEventCallbacks(incompatible_qos=lambda _event: self._mismatched.add(topic)),
            qos_overriding_options=qos.overriding_options(),
        )

    def _subscribe(self) -> None:
        image, info = self._topics
        kind = CompressedImage if self.parameters.compressed else Image
        # camera_info first: where it is latched it is there when the first image comes.
        self._inputs = [
            self._create_input(CameraInfo, info, self._on_info),
            self._create_input(kind, image, self._on_image),
        ]

    def _unsubscribe(self) -> None:
        for subscription in self._inputs:
            self.destroy_subscription(subscription)
        self._inputs = []
        self._pairing.clear()

    # On the executor's thread

    def _on_info(self, message: CameraInfo) -> None:
        pair = self._pairing.add_info(header_stamp_ns(message.header), message)
        if pair is not None:
            self._worker.submit(pair)

    def _on_image(self, message: Image | CompressedImage) -> None:
        for pair in self._pairing.add_image(header_stamp_ns(message.header), message, time.monotonic_ns()):
            self._worker.submit(pair)

    def _keep_house(self) -> None:
        if self._active:
            self._listened = frozenset(n for n, output in self._outputs.items() if output.get_subscription_count())
        wanted = not self._listened.isdisjoint(("points", "depth", "overlay"))
        if wanted and not self._inputs:
            self._subscribe()
        elif not wanted and self._inputs:
            self._unsubscribe()
        for pair in self._pairing.overdue(time.monotonic_ns()):
            self._worker.submit(pair)

    # On the worker's thread

    def _work(self, estimator: Estimator, pair: tuple[Any, CameraInfo | None]) -> None:
        message, info = pair
        activation, parameters, wanted = self._activation, self.parameters, self._listened
        started = time.perf_counter()
        image = decode_compressed(message) if isinstance(message, CompressedImage) else decode_image(message)
        if info is None:
            raise CameraError(
                f"an image came on {self._topics[0]} but no CameraInfo on {self._topics[1]}; publish one there, or "
                "name the right topic with -r camera_info:=..."
            )
        height, width = image.shape[:2]
        camera = camera_from_info(info, (width, height), parameters.rectified)
        decoded = time.perf_counter()

        dialect = _spoken_dialect(estimator, parameters)
        query = plan_query(parameters, dialect, width, height, whole="depth" in wanted)
        answer = estimator.estimate(image, camera, query.pixels, dialect=dialect)
        result = keep_good(answer, parameters)
        answered = time.perf_counter()

        messages = build_outputs(wanted, image, camera, info, message.header, query, result)
        with self._publishing:
            if activation == self._activation:
                for name, output in messages.items():
                    self._outputs[name].publish(output)
        done = time.perf_counter()
        stages = {"decode": decoded - started, **answer.timing_s, "publish": done - answered, "total": done - started}
        self._monitor.frame_done(stages, asked=len(answer), answered=int(answer.valid.sum()))

    def _frame_failed(self, error: Exception) -> None:
        self._monitor.frame_failed(error)
        if not self._may_complain(type(error).__name__):
            return
        if isinstance(error, DepthLMError):
            self.get_logger().warning(f"frame skipped: {error}")
        else:
            text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
            self.get_logger().error(f"frame skipped, unexpectedly:\n{text}")

    def _may_complain(self, about: str) -> bool:
        now = time.monotonic()
        if now - self._complaints.get(about, -_LOG_INTERVAL_S) < _LOG_INTERVAL_S:
            return False
        self._complaints[about] = now
        return True

    # Diagnostics

    def _report(self) -> None:
        self._explain_mismatches()
        counts = self.counts
        status = self._monitor.report(self._describe_state(), counts.received, counts.dropped, self._warnings())
        values = {"state": self._state_machine.current_state[1], "model": self.parameters.model}
        if self._estimator is not None:
            info = self._estimator.engine.info
            values["dialect"] = _spoken_dialect(self._estimator, self.parameters)
            values |= {"device": info.device, "dtype": info.dtype, "why": "; ".join(info.reasons)}
        status = replace(status, values=values | status.values)
        name = f"{self.get_fully_qualified_name().lstrip('/')}: depth"
        stamp = self.get_clock().now().to_msg()
        self._diagnostics.publish(diagnostics_message(stamp, name, self.parameters.model, status))

    def _describe_state(self) -> str:
        state = self._state_machine.current_state[1]
        if state == "active" and not self._inputs:
            return "active, at rest: nobody listens to points, depth or overlay"
        return state

    def _warnings(self) -> list[str]:
        warnings = list(self._qos_sentences)
        # Counted in the graph: a publisher whose QoS doesn't match is there all the same.
        if self._inputs and self.count_publishers(self._inputs[1].topic_name) == 0:
            warnings.append(f"nobody publishes {self._inputs[1].topic_name}; name the topic with -r image:=...")
        return warnings

    def _explain_mismatches(self) -> None:
        """Turns middleware events into sentences; done here since the graph may know a peer only after the event."""
        sentences = []
        inputs = {subscription.topic_name: subscription for subscription in self._inputs}
        outputs = {publisher.topic_name: publisher for publisher in self._outputs.values()}
        for topic in self._mismatched & inputs.keys():
            peers = [(p.node_name, p.qos_profile) for p in self.get_publishers_info_by_topic(topic)]
            sentences += qos.explain_subscription(topic, inputs[topic].qos_profile, peers)
        for topic in self._mismatched & outputs.keys():
            peers = [(s.node_name, s.qos_profile) for s in self.get_subscriptions_info_by_topic(topic)]
            sentences += qos.explain_publisher(topic, outputs[topic].qos_profile, peers)
        for sentence in sentences:
            if sentence not in self._qos_sentences:
                self.get_logger().warning(sentence)
        self._qos_sentences = sentences


def main(args: list[str] | None = None, load: EstimatorFactory = load_estimator) -> int:
    """Runs the node until it is told to stop.

    With `autostart` (the default) a node that can't configure ends with status 1 and the reason; a node that
    sits there dead helps nobody. Without it, it stays unconfigured and tries again when told to.

    Returns:
        Exit status.
    """
    use_large_message_profile(os.environ)
    try:
        rclpy.init(args=args)
    except RuntimeError as error:
        # A wrong --ros-args, or no place for the log, which ROS names by the line of its own source only.
        no_log = not any(os.environ.get(name) for name in ("ROS_LOG_DIR", "ROS_HOME", "HOME"))
        remedy = "set HOME or ROS_LOG_DIR, ROS writes its log there" if no_log else "correct what follows --ros-args"
        print(f"depth_node: ROS does not start: {error}; {remedy}", file=sys.stderr)
        return 1
    node = None
    status = 0
    try:
        node = DepthNode(load)
        if node.parameters.autostart and not node.start():
            status = 1
        else:
            rclpy.spin(node)
    except ConfigError as error:
        print(f"depth_node: {error}", file=sys.stderr)
        status = 1
    except (KeyboardInterrupt, ExternalShutdownException):
        pass
    ended = node.close() if node is not None else True
    rclpy.try_shutdown()
    if not ended:
        # A forward pass can't be interrupted, and the interpreter's own end would wait for it or crash in it.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


if __name__ == "__main__":
    sys.exit(main())
