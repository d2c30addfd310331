"""All that is done with the one loaded model: depth of a frame, questions about it, the pose since the frame before.

It runs in the worker's thread, one call at a time, but for what is said to run in any. Knows messages as data, nothing
of nodes and topics.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from depthlm_ros.assistant import Assistant
from depthlm_ros.calibration import Kind
from depthlm_ros.camera import UnifiedView, camera_from_info
from depthlm_ros.config import Parameters
from depthlm_ros.depth import DepthResult, Frame
from depthlm_ros.errors import DialectError
from depthlm_ros.expectation import check_distribution
from depthlm_ros.messages import decode_compressed, decode_image, header_stamp_ns
from depthlm_ros.pose import RelativePose
from depthlm_ros.queries import Query, ask_frame, densified_image, depth_image, keep_good, points_asked

if TYPE_CHECKING:
    from depthlm_ros.estimator import Estimator


@dataclass(frozen=True)
class Prepared:
    """A frame that is ready for the model.

    Attributes:
        frame: the image.
        view: what the model will see of it; None where no depth was wanted when it was prepared.
        timing_s: seconds by stage.
    """

    frame: Frame
    view: UnifiedView | None
    timing_s: dict[str, float]


@dataclass(frozen=True)
class Measurement:
    """What was measured in one frame.

    Attributes:
        query: what was asked.
        answer: what was answered.
        result: the answer without what the parameters leave out.
        parameters: as they were when it was asked.
    """

    query: Query
    answer: DepthResult
    result: DepthResult
    parameters: Parameters

    def depth_image(self, image: np.ndarray) -> np.ndarray:
        """(H, W) float32 z-depth in metres of the (H, W, 3) uint8 image: NaN where not asked, or filled along edges."""
        if self.parameters.densify and points_asked(self.parameters, self.answer.dialect):
            return densified_image(self.answer, image, self.parameters)
        return depth_image(self.result, image.shape[1], image.shape[0])


@dataclass(frozen=True)
class PointAnswer:
    """The answer to one point question.

    Attributes:
        xyz_m: (3,) float64 in the optical frame; NaN where there is no answer.
        problem: why there is none; empty where there is one.
    """

    xyz_m: np.ndarray
    problem: str = ""


def spoken_dialect(estimator: Estimator, parameters: Parameters) -> str | None:
    """The dialect that depth is asked in; None for a model that isn't for depth.

    Raises:
        DialectError: the model doesn't speak the one that the parameters name.
    """
    dialect = parameters.dialect or estimator.card.default_dialect
    if dialect is None or dialect in estimator.dialects:
        return dialect
    if not estimator.dialects:
        raise DialectError(
            f"model {parameters.model} answers no depth questions, it is for {', '.join(estimator.card.tasks)}; leave "
            "dialect empty"
        )
    raise DialectError(
        f"model {parameters.model} doesn't speak {dialect!r}; choose one of {', '.join(estimator.dialects)}, "
        "or leave dialect empty for its default"
    )


def check_model(estimator: Estimator, parameters: Parameters) -> None:
    """Checks that the model can do what the parameters want of it.

    Raises:
        DialectError: it doesn't speak the dialect, or isn't for poses.
        ConfigError: it can't be asked about so many points at once, `distribution` where there is none, or a
            calibration of other confidences.
    """
    dialect = spoken_dialect(estimator, parameters)
    if dialect == "compact":
        estimator.card.answer_template(dialect, parameters.points_per_question)
    if dialect is not None:
        check_answers(estimator, parameters, dialect)
    if parameters.relative_pose and "pose" not in estimator.card.tasks:
        raise DialectError(
            f"relative_pose is true, but model {parameters.model} was not trained for pose, it is for "
            f"{', '.join(estimator.card.tasks)}; set relative_pose to false, or take a model whose card has the task "
            "pose, such as vlm3-pose"
        )


def check_answers(estimator: Estimator, parameters: Parameters, dialect: str) -> None:
    """Checks that the distribution can be had, and that the calibration is one of these confidences.

    Raises:
        ConfigError: it can't, or isn't.
    """
    distribution, value = parameters.distribution, parameters.depth_value
    check_distribution(distribution, value, dialect, parameters.points_per_question)
    if parameters.calibration:
        estimator.calibration.require(Kind(estimator.card.name, dialect, value, distribution))


class Inference:
    """One loaded model and what it remembers between frames. Not re-entrant.

    Args:
        estimator: the loaded model.
    """

    def __init__(self, estimator: Estimator) -> None:
        self._estimator = estimator
        self._assistant = Assistant(estimator)
        self._decoded: tuple[Any, Frame] | None = None
        self._previous: tuple[object, Frame] | None = None

    @property
    def deadline(self) -> float | None:
        """When the engine's answer is of no use any more, in seconds of `time.monotonic`; None for never."""
        return self._estimator.engine.deadline

    @deadline.setter
    def deadline(self, value: float | None) -> None:
        self._estimator.engine.deadline = value

    def frame(self, message: Any, info: Any, *, compressed: bool, rectified: bool) -> Frame:
        """Decodes an image message, or returns what it was decoded to before; in any thread.

        Args:
            message: sensor_msgs/Image or CompressedImage.
            info: sensor_msgs/CameraInfo.
            compressed: which of the two.
            rectified: whether P or K and D of the info describe the image.

        Raises:
            ImageError: it can't be decoded.
            CameraError: an info that doesn't fit.
        """
        decoded = self._decoded
        if decoded is None or decoded[0] is not message:
            image = decode_compressed(message) if compressed else decode_image(message)
            height, width = image.shape[:2]
            camera = camera_from_info(info, (width, height), rectified)
            frame = Frame(image, camera, header_stamp_ns(message.header), message.header.frame_id)
            self._decoded = decoded = message, frame
        return decoded[1]

    def prepare(self, message: Any, info: Any, *, compressed: bool, rectified: bool, depth: bool) -> Prepared:
        """Does what a frame needs before the model; in any thread, while the model is busy with the frame before.

        Args:
            message: sensor_msgs/Image or CompressedImage.
            info: sensor_msgs/CameraInfo.
            compressed: which of the two.
            rectified: whether P or K and D of the info describe the image.
            depth: whether depth will be measured.

        Raises:
            DepthLMError: as `frame` and `Estimator.prepare`.
        """
        started = time.perf_counter()
        frame = self.frame(message, info, compressed=compressed, rectified=rectified)
        decoded = time.perf_counter()
        if not depth:
            return Prepared(frame, None, {"decode": decoded - started})
        view = self._estimator.prepare(frame.image, frame.camera)
        self._estimator.encode_ahead(view)
        return Prepared(frame, view, {"decode": decoded - started, "unify": time.perf_counter() - decoded})

    def measure(self, prepared: Prepared, parameters: Parameters, whole: bool) -> Measurement:
        """Measures depth.

        Args:
            prepared: where; what isn't prepared is made now.
            parameters: how.
            whole: somebody wants the depth image, see `plan_query`.

        Raises:
            DepthLMError: as `Estimator.estimate`.
        """
        frame, dialect = prepared.frame, spoken_dialect(self._estimator, parameters)
        options = _options(parameters, prepared.view)
        query, answer = ask_frame(self._estimator, frame.image, frame.camera, parameters, dialect, whole, **options)
        return Measurement(query, answer, keep_good(answer, parameters), parameters)

    def ask(self, frame: Frame, texts: Sequence[str], parameters: Parameters) -> list[str]:
        """Answers free questions about one frame, which is encoded once for all of them.

        Raises:
            DepthLMError: as `Assistant.ask_about`.
        """
        self.deadline = None
        answers = self._assistant.ask_about(
            [frame.image], texts, [frame.camera], max_new_tokens=parameters.answer_tokens
        )
        return [answer.text for answer in answers]

    def points(self, frame: Frame, pixels: Sequence[tuple[float, float]], parameters: Parameters) -> list[PointAnswer]:
        """Answers where the points are that pixels show, all in one go.

        Args:
            frame: of which image.
            pixels: `(u, v)`, also such that can't be asked.
            parameters: `dialect`, `points_per_question`, `undrawable`, `max_depth_m` and `min_confidence` count.

        Raises:
            DepthLMError: as `Estimator.estimate`, for all of them; what is wrong with one is in its answer.
        """
        dialect = spoken_dialect(self._estimator, parameters) or self._estimator.card.require_dialect()
        asked = np.asarray(pixels, np.float32).reshape(-1, 2)
        inside = frame.camera.contains(asked)
        answers = [self._outside(frame, pixel) for pixel in asked]
        if not inside.any():
            return answers
        self.deadline = None
        said = self._estimate(frame, asked[inside], dialect, parameters)
        kept = keep_good(said, parameters)
        points = frame.camera.unproject(kept.pixels, kept.depth_m)
        for row, at in enumerate(np.flatnonzero(inside)):
            answers[at] = _point_answer(points[row], said, kept, row, parameters)
        return answers

    def pose(self, frame: Frame, run: object) -> tuple[Frame, RelativePose] | None:
        """The pose of this frame's camera in the camera of the frame before, and that frame.

        Args:
            frame: becomes the frame before for the next one, also where this fails.
            run: poses are only told between frames of one run.

        Returns:
            None for the first frame of a run.

        Raises:
            DepthLMError: as `Assistant.relative_pose`.
        """
        previous, self._previous = self._previous, (run, frame)
        if previous is None or previous[0] != run:
            return None
        first = previous[1]
        return first, self._assistant.relative_pose(first.image, first.camera, frame.image, frame.camera)

    def forget(self) -> None:
        """Drops the frame that the next pose would be told from."""
        self._previous = None

    def _estimate(self, frame: Frame, pixels: np.ndarray, dialect: str, parameters: Parameters) -> DepthResult:
        options = _options(parameters, None)
        return self._estimator.estimate(frame.image, frame.camera, pixels, dialect=dialect, **options)

    @staticmethod
    def _outside(frame: Frame, pixel: np.ndarray) -> PointAnswer:
        u, v = pixel
        size = f"{frame.camera.width}x{frame.camera.height}"
        return PointAnswer(np.full(3, np.nan), f"pixel ({u:g}, {v:g}) is outside of the {size} image")


def _options(parameters: Parameters, view: UnifiedView | None) -> dict[str, Any]:
    return {"undrawable": parameters.undrawable, "view": view, **parameters.answer_arguments()}


def _point_answer(
    point: np.ndarray, said: DepthResult, kept: DepthResult, row: int, parameters: Parameters
) -> PointAnswer:
    where = f"pixel ({said.pixels[row, 0]:g}, {said.pixels[row, 1]:g})"
    if np.isfinite(point).all():
        return PointAnswer(point)
    if not said.asked[row]:
        problem = f"{where} can't be asked: it is too near the border for the {said.dialect} dialect, or out of view"
        hint = "; undrawable shift asks beside it" if said.dialect == "marker" else ""
    elif kept.valid[row]:
        problem, hint = f"{where} has no ray: the lens model doesn't reach there", ""
    elif said.valid[row]:
        problem = f"{where} is {said.depth_m[row]:.2f} m away with confidence {said.confidence[row]:.2f}"
        hint = f", left out by max_depth_m {parameters.max_depth_m:g} and min_confidence {parameters.min_confidence:g}"
    else:
        problem, hint = f"{where} got an answer without a depth", f": {said.answers[row]!r}" if said.answers else ""
    return PointAnswer(np.full(3, np.nan), problem + hint)
