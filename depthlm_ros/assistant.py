"""Images + cameras + questions -> answers in words, read into numbers. Everything but depth maps, without ROS.

assistant = Assistant(Estimator.load("vlm3-corr"))
matches = assistant.match(image_a, image_b, pixels_a)

One loaded model serves this and the estimator. What a model *says* about distances (`Said`) and what is *measured* with
its depth and the camera's geometry (`Measured`) are different types, so that one is never taken for the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from depthlm_ros import motion, pose, tasks
from depthlm_ros.camera import Camera, UnifiedView, unify
from depthlm_ros.correspondence import MatchResult, correspondence_question, long_edge_view, read_matches
from depthlm_ros.engines.base import Answer
from depthlm_ros.errors import ConfigError, PixelError
from depthlm_ros.estimator import Estimator
from depthlm_ros.markers import draw_arrow, drawable
from depthlm_ros.motion import Measured, Said
from depthlm_ros.objects import object_question, parse_length_m, parse_yes_no, shown_boxes
from depthlm_ros.pose import RelativePose
from depthlm_ros.published import published_pose_image

# Marked images handed to the engine at once, so that they don't fill the memory.
_CHUNK = 256


@dataclass(frozen=True)
class ObjectAnswer:
    """What was said about boxes.

    Attributes:
        question: as it was put to the model, with the boxes written out.
        text: the answer.
        yes: whether it agrees; None where it says neither.
        length_m: the first length in it, None where there is none.
    """

    question: str
    text: str
    yes: bool | None
    length_m: float | None


class Assistant:
    """Asks a loaded model the questions that aren't depth. Not re-entrant, like the estimator it shares the model with.

    A model that wasn't trained for a task is refused with DialectError, which names what it is for; free questions
    (`ask`) can be put to any model, and depth (`measure`) to any that speaks a dialect.

    Attributes:
        estimator: whose model is asked.
        force: ask whatever the card says; for experiments.
    """

    def __init__(self, estimator: Estimator, *, force: bool = False) -> None:
        self.estimator = estimator
        self.force = force

    def ask(
        self,
        image: np.ndarray,
        question: str,
        camera: Camera | None = None,
        *,
        max_new_tokens: int = tasks.OBJECT_MAX_NEW_TOKENS,
    ) -> Answer:
        """Asks one free question about an image.

        Args:
            image: (H, W, 3) uint8 RGB.
            question: put to the model as it is.
            camera: intrinsics of `image`, to show it at the model's focal length; None shows it as it is.
            max_new_tokens: longest answer in tokens.

        Raises:
            ImageError, CameraError: bad input.
            ConfigError: an empty question.
            EngineError: the engine failed.
        """
        return self.ask_about([image], [question], [camera], max_new_tokens=max_new_tokens)[0]

    def ask_about(
        self,
        images: Sequence[np.ndarray],
        questions: Sequence[str],
        cameras: Sequence[Camera | None] | None = None,
        *,
        max_new_tokens: int = tasks.OBJECT_MAX_NEW_TOKENS,
    ) -> list[Answer]:
        """Asks free questions about one or more images, which are encoded once; arguments and errors as in `ask`.

        Returns:
            The answers in the order of the questions.
        """
        for question in questions:
            if not question.strip():
                raise ConfigError("the question is empty; say what you want to know about the image")
        focal_px = self.estimator.card.focal_px
        shown = [
            image if camera is None or focal_px is None else self._view(image, camera, focal_px).image
            for image, camera in zip(images, cameras or [None] * len(images), strict=True)
        ]
        return self.estimator.engine.answer_about(shown, questions, max_new_tokens)

    # ------------------------------------------------------------ VLM3

    def ask_objects(self, image: np.ndarray, camera: Camera, question: str, boxes: np.ndarray) -> ObjectAnswer:
        """Asks a question about boxes in an image (VLM3's object-level task).

        Args:
            image: (H, W, 3) uint8 RGB.
            camera: intrinsics of `image`.
            question: with `<mask>` where a box is meant.
            boxes: (N, 4) `(x1, y1, x2, y2)` in pixels of `image`, in the order of the masks.

        Raises:
            ImageError, CameraError, PixelError: bad input.
            DialectError: the model isn't for objects.
            EngineError: the engine failed.
        """
        self._require("object")
        view = self._view(image, camera, self._focal_px("object"))
        asked = object_question(question, shown_boxes(view, boxes))
        text = self.estimator.engine.answer_about([view.image], [asked], tasks.OBJECT_MAX_NEW_TOKENS)[0].text
        return ObjectAnswer(asked, text, parse_yes_no(text), parse_length_m(text))

    def match(
        self, image_a: np.ndarray, image_b: np.ndarray, pixels_a: np.ndarray, *, think: bool = False
    ) -> MatchResult:
        """Finds pixels of image A in image B (VLM3's correspondence task); both are encoded once for all pixels.

        Args:
            image_a: (H, W, 3) uint8 RGB.
            image_b: (H, W, 3) uint8 RGB, of any size.
            pixels_a: (N, 2) `(u, v)` of `image_a`.
            think: let the model think first; slower.

        Raises:
            ImageError, PixelError: bad input.
            DialectError: the model isn't for correspondence.
            EngineError: the engine failed.
        """
        self._require("correspondence")
        engine = self.estimator.engine
        views = [long_edge_view(image, self.estimator.policy, engine.grid) for image in (image_a, image_b)]
        questions = [correspondence_question(x, y, think) for x, y in views[0].to_units(pixels_a).tolist()]
        budget = tasks.CORRESPONDENCE_THINKING_MAX_NEW_TOKENS if think else tasks.CORRESPONDENCE_MAX_NEW_TOKENS
        answers = engine.answer_about([view.image for view in views], questions, budget) if questions else []
        return read_matches(*views, pixels_a, [answer.text for answer in answers])

    def relative_pose(
        self, image_a: np.ndarray, camera_a: Camera, image_b: np.ndarray, camera_b: Camera
    ) -> RelativePose:
        """Tells where camera B is, seen from camera A, and how it is turned (VLM3's pose task, four questions).

        Args:
            image_a: (H, W, 3) uint8 RGB.
            camera_a: intrinsics of `image_a`.
            image_b: (H, W, 3) uint8 RGB.
            camera_b: intrinsics of `image_b`.

        Raises:
            ImageError, CameraError: bad input.
            DialectError: the model isn't for poses.
            EngineError: the engine failed.
        """
        self._require("pose")
        focal_px = self._focal_px("pose")
        images = [self._pose_image(image_a, camera_a, focal_px), self._pose_image(image_b, camera_b, focal_px)]
        questions = list(pose.QUESTIONS.values())
        answers = self.estimator.engine.answer_about(images, questions, tasks.POSE_MAX_NEW_TOKENS)
        return RelativePose.from_texts(dict(zip(pose.QUESTIONS, (a.text for a in answers), strict=True)))

    # ------------------------------------------------------------ DepthLM's multi-task model

    def axis_distance(self, image: np.ndarray, camera: Camera, pixels: np.ndarray) -> Said:
        """What the model says about the metres to each pixel (N, 2) along the optical axis.

        Raises:
            ImageError, CameraError, PixelError: bad input.
            DialectError: the model isn't for motion; the same holds for the other questions of its kind.
            EngineError: the engine failed.
        """
        return self._said(image, camera, [pixels], motion.AXIS_DISTANCE, motion.parse_metres)

    def speed_to_reach(self, image: np.ndarray, camera: Camera, pixels: np.ndarray, seconds: float) -> Said:
        """What it says about the metres a second that reach each pixel (N, 2) in this time; errors as above."""
        return self._said(image, camera, [pixels], motion.speed_question(seconds), motion.parse_speed_mps)

    def time_to_reach(self, image: np.ndarray, camera: Camera, pixels: np.ndarray, speed_mps: float) -> Said:
        """What it says about the seconds to each pixel (N, 2) at this speed; errors as above."""
        return self._said(image, camera, [pixels], motion.time_question(speed_mps), motion.parse_seconds)

    def distance_between(
        self, image: np.ndarray, camera: Camera, pixels_a: np.ndarray, pixels_b: np.ndarray
    ) -> Said:
        """What it says about the metres between pixels a and b, both (N, 2), row by row; errors as above."""
        return self._said(image, camera, [pixels_a, pixels_b], motion.TWO_POINTS, motion.parse_metres)

    def metres_moved(self, image_a: np.ndarray, camera_a: Camera, image_b: np.ndarray, camera_b: Camera) -> Said:
        """What it says about the metres that the camera moved between two images, one row; errors as above."""
        self._require("motion")
        focal_px = self._focal_px("motion")
        images = [self._view(image_a, camera_a, focal_px).image, self._view(image_b, camera_b, focal_px).image]
        budget = self.estimator.card.max_new_tokens
        text = self.estimator.engine.answer_about(images, [motion.METRES_MOVED], budget)[0].text
        return Said(np.array([tasks.or_nan(motion.parse_metres(text))]), np.ones(1, bool), (text,))

    # ------------------------------------------------------------ geometry

    def measure(self, image: np.ndarray, camera: Camera, pixels: np.ndarray, *, dialect: str | None = None) -> Measured:
        """Points in space at pixels (N, 2) from asked depth and the camera: distances, speed and time by geometry.

        Raises:
            ImageError, CameraError, PixelError: bad input.
            DialectError: the model isn't for depth, or doesn't speak the dialect.
            EngineError: the engine failed.
        """
        depth = self.estimator.estimate(image, camera, pixels, dialect=dialect)
        return Measured(depth.pixels, camera.unproject(depth.pixels, depth.depth_m))

    # ------------------------------------------------------------ what the questions share

    def _require(self, task: str) -> None:
        if not self.force:
            self.estimator.card.require_task(task)

    def _focal_px(self, task: str) -> float:
        card = self.estimator.card
        focal_px = tasks.VLM3_FOCAL_PX.get(task, card.focal_px) if card.system == "vlm3" else card.focal_px
        if focal_px is None:
            raise ConfigError(f"card {card.name!r} has no focal_px, which {task} needs; add it in a card of your own")
        return focal_px

    def _view(self, image: np.ndarray, camera: Camera, focal_px: float) -> UnifiedView:
        estimator = self.estimator
        return unify(image, camera, focal_px, estimator.policy, estimator.engine.grid, estimator.card.system)

    def _pose_image(self, image: np.ndarray, camera: Camera, focal_px: float) -> np.ndarray:
        if self.estimator.policy == "exact" or not camera.distortion.is_identity:
            grid = self.estimator.engine.grid if self.estimator.policy == "exact" else None
            return unify(image, camera, focal_px, "exact", grid).image
        return published_pose_image(image, camera, focal_px)

    def _said(
        self,
        image: np.ndarray,
        camera: Camera,
        marked: Sequence[np.ndarray],
        question: str,
        parse: Callable[[str], float | None],
    ) -> Said:
        """Asks one question about each row of pixels, marked with an arrow each."""
        self._require("motion")
        view = self._view(image, camera, self._focal_px("motion"))
        marked = [tasks.checked_pixels(pixels, camera.width, camera.height) for pixels in marked]
        if len({len(pixels) for pixels in marked}) > 1:
            raise PixelError(f"{len(marked[0])} first and {len(marked[1])} second pixels; pass as many of both")
        # The exact policy gives sub-pixel places; an arrow points at whole pixels.
        places = [np.rint(view.from_source(pixels)) for pixels in marked]
        size = view.camera.width, view.camera.height
        asked = np.logical_and.reduce([view.inside(at) & drawable(at, *size) for at in places])
        rows = np.flatnonzero(asked)
        values, texts = np.full(len(asked), np.nan), [""] * len(asked)
        for start in range(0, len(rows), _CHUNK):
            some = rows[start : start + _CHUNK]
            images = [_marked(view.image, [at[row] for at in places]) for row in some]
            budget = self.estimator.card.max_new_tokens
            answers = self.estimator.engine.answer_each(images, [question] * len(images), budget)
            for row, answer in zip(some, answers, strict=True):
                values[row], texts[row] = tasks.or_nan(parse(answer.text)), answer.text
        return Said(values, asked, tuple(texts))


def _marked(image: np.ndarray, places: Sequence[np.ndarray]) -> np.ndarray:
    for u, v in places:
        image = draw_arrow(image, (int(u), int(v)))
    return image
