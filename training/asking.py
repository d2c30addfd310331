"""Examples to questions and answers, and to the images they are about, as the model will be asked later.

    marker, coordinates, compact               how far a labelled point is (`prompts`)
    axis_distance, two_points, speed, time     DepthLM's other tasks about points (`motion`), marked with arrows
    object, correspondence, pose, dialogue     questions that come with their answers; a task shows images its own way

What is written here is read by the package's own parsers, and images are shown as its estimator shows them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from depthlm_ros import motion
from depthlm_ros.camera import Camera, UnifiedView, unify
from depthlm_ros.cards import ModelCard
from depthlm_ros.correspondence import long_edge_view
from depthlm_ros.engines.base import ImageGrid
from depthlm_ros.errors import ConfigError, unknown_choice
from depthlm_ros.markers import draw_arrow, drawable
from depthlm_ros.prompts import (
    MAX_DEPTH_M,
    NUMBER,
    SAME,
    compact_answer,
    compact_questions,
    coordinates_question,
    marker_question,
    normalise_pixel,
)
from depthlm_ros.published import published_pose_image
from depthlm_ros.tasks import VLM3_FOCAL_PX
from depthlm_ros.unify import POLICIES
from depthlm_training.rows import NO_LABELS, UNUSABLE_CAMERA, BadRow
from depthlm_training.sources import Example

DEPTH = ("marker", "coordinates", "compact")
MOTION = ("axis_distance", "two_points", "speed", "time")
DIALOGUES = ("dialogue", "object", "correspondence", "pose")
# An arrow is drawn into the image, so that each question has an image of its own.
SINGLE = ("marker", "axis_distance", "two_points")
ASKED_OF = (*DEPTH, *MOTION, *DIALOGUES)

# DepthLM's loader (utils/datasets.py): random sizes of centred crops, in pixels of the unified image.
CROP_HEIGHTS, CROP_WIDTHS = (700, 1200), (1000, 1400)
# And what it does to Taskonomy's square images instead: the height becomes the width over a random ratio.
STRETCHED_RATIOS = (1.0, 1.3)
CROPS = ("none", "centred", "stretched")
# Two decimals say nothing nearer.
LEAST_M = 0.005
# Where DepthLM's figure asks with 4.0 s and 6.0 m/s.
SECONDS, SPEEDS_MPS = (1.0, 10.0), (0.5, 10.0)


@dataclass(frozen=True)
class Asking:
    """How examples become questions.

    Attributes:
        dialect: one of `ASKED_OF`.
        card: focal length, ranges of coordinates, what answers measure and how they are worded.
        policy: how images are brought to the focal length, "published" or "exact".
        points: questions about an image; an arrow marks one point, about which "speed" and "time" ask so often.
        crops: "centred", DepthLM's crops of random size; "stretched", what it does to Taskonomy's images; or "none".
        each: points a question, in the compact dialect.
        grid: sizes that the model's processor leaves alone, which "exact" gives it.

    Raises:
        ConfigError: an unknown dialect or policy, or a number of points that the dialect can't ask about.
    """

    dialect: str
    card: ModelCard
    policy: str = "exact"
    points: int = 1
    crops: str = "none"
    each: int = 1
    grid: ImageGrid | None = None

    def __post_init__(self) -> None:
        if self.dialect not in ASKED_OF:
            raise ConfigError(unknown_choice("dialect", self.dialect, ASKED_OF))
        if self.policy not in POLICIES:
            raise ConfigError(unknown_choice("policy", self.policy, POLICIES))
        if self.crops not in CROPS:
            raise ConfigError(unknown_choice("crops", self.crops, CROPS))
        if self.points < 1 or self.each < 1:
            raise ConfigError(f"points is {self.points} and each {self.each}; ask about at least 1")
        if self.points > 1 and self.dialect in SINGLE:
            raise ConfigError(
                f"points is {self.points} in the dialect {self.dialect!r}, which marks the image anew for each "
                "question; set it to 1"
            )
        if self.each > 1 and self.dialect != "compact":
            raise ConfigError(f"each is {self.each} in the dialect {self.dialect!r}; only compact asks about several")


@dataclass(frozen=True)
class Asked:
    """Questions about the same images.

    Attributes:
        images: (H, W, 3) uint8 RGB each, as the model's processor takes them: unified, cropped, marked.
        pairs: questions with their answers.
    """

    images: tuple[np.ndarray, ...]
    pairs: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Points:
    """Labelled points of a view.

    Attributes:
        view: what the model sees.
        at: (N, 2) `(u, v)` in it.
        points_m: (N, 3) in the camera's optical frame.
    """

    view: UnifiedView
    at: np.ndarray
    points_m: np.ndarray

    def depth(self, kind: str) -> np.ndarray:
        """(N,) metres of this kind, "z" or "euclidean"."""
        return self.points_m[:, 2] if kind == "z" else np.linalg.norm(self.points_m, axis=1)

    def some(self, rows: np.ndarray) -> Points:
        """Those of these rows (indices or bool)."""
        return Points(self.view, self.at[rows], self.points_m[rows])


def ask(example: Example, how: Asking, rng: np.random.Generator) -> Asked:
    """Asks about an example.

    Args:
        example: with labelled points, or with a dialogue for those dialects that need one.
        how: what to ask.
        rng: chooses points, crops, times and speeds.

    Raises:
        BadRow: nothing of the example can be asked about in this way.
        ImageError, CameraError: its image or camera can't be used.
    """
    if how.dialect in DIALOGUES:
        return _dialogue(example, how, rng)
    points = labelled_points(example, how, rng)
    if how.dialect in ("coordinates", "compact"):
        return _named(points, how, rng)
    whole = Points(points.view, np.rint(points.at), points.points_m)
    marked = whole.some(drawable(whole.at, points.view.camera.width, points.view.camera.height))
    count = 2 if how.dialect == "two_points" else 1
    marked = _chosen(marked, count, rng, example)
    image = points.view.image
    for u, v in marked.at.astype(int).tolist():
        image = draw_arrow(image, (u, v))
    return Asked((image,), tuple(_about_marked(marked, how, rng)))


def labelled_points(example: Example, how: Asking, rng: np.random.Generator) -> Points:
    """What the model is shown of an example's first image, and its labels that lie on it and can be written.

    Raises:
        BadRow: no camera, or no such label.
        ImageError, CameraError: as `unify`.
    """
    camera = example.cameras[0]
    if camera is None:
        raise BadRow(example.name, UNUSABLE_CAMERA, "no intrinsics, which questions about depth need")
    view = shown(example.images[0], camera, how)
    multiple = how.grid.multiple if how.grid is not None and how.policy == "exact" else 1
    if how.crops == "centred":
        view = cropped(view, rng, multiple)
    elif how.crops == "stretched":
        view = stretched(view, rng, multiple)
    at = view.from_source(example.pixels)
    points = Points(view, at, camera.unproject(example.pixels, example.depth_m))
    distance = points.depth("euclidean")
    # Both kinds can be written then: z is the smaller.
    usable = view.inside(at) & (points.depth("z") > LEAST_M) & (distance < MAX_DEPTH_M)
    if not usable.any():
        raise BadRow(example.name, NO_LABELS, f"none of its {len(at)} labels lies on what is shown of the image")
    return points.some(usable)


def shown(image: np.ndarray, camera: Camera, how: Asking, focal_px: float | None = None) -> UnifiedView:
    """The image at the focal length of the card, or at another."""
    return unify(image, camera, focal_px or how.card.focal_px, how.policy, how.grid, how.card.system)


def cropped(view: UnifiedView, rng: np.random.Generator, multiple: int = 1) -> UnifiedView:
    """DepthLM's crop: centred, of a random size.

    Args:
        view: of any size; sides below the drawn ones are left as they are.
        rng: draws the height, then the width.
        multiple: sides are rounded down to multiples of this, so that the processor needn't resample.
    """
    sides = []
    for side, bounds in ((view.camera.height, CROP_HEIGHTS), (view.camera.width, CROP_WIDTHS)):
        drawn = int(min(side, rng.uniform(*bounds)))
        sides.append(max(drawn // multiple, 1) * multiple if side >= multiple else side)
    height, width = sides
    left, top = (view.camera.width - width) // 2, (view.camera.height - height) // 2
    window = view.image[top : top + height, left : left + width]
    return replace(view, image=np.ascontiguousarray(window), camera=view.camera.cropped(left, top, width, height))


def stretched(view: UnifiedView, rng: np.random.Generator, multiple: int = 1) -> UnifiedView:
    """DepthLM's way with Taskonomy: the image resampled to a random height, so that fy is no longer fx.

    Args:
        view: whose height changes and whose width stays.
        rng: draws the ratio of width to height.
        multiple: the height is rounded down to a multiple of this.
    """
    camera = view.camera
    drawn = int(camera.width / rng.uniform(*STRETCHED_RATIOS))
    height = max(drawn // multiple, 1) * multiple
    picture = Image.fromarray(np.ascontiguousarray(view.image))
    image = np.asarray(picture.resize((camera.width, height), Image.Resampling.BICUBIC))
    share = height / camera.height
    scaled = camera.scaled(1, share)
    if view.policy == "published" and view.system != "depthvlm":
        # The authors scale the centre as a length.
        scaled = replace(scaled, cy=camera.cy * share)
    return replace(view, image=image, camera=scaled)


def depth_answer(depth_m: float, card: ModelCard, dialect: str) -> str:
    """The sentence that states a depth in the coordinates or marker dialect, in the card's words."""
    number = compact_answer([depth_m])
    return card.answer_template(dialect).replace(NUMBER, number).replace(SAME, number)


def _named(points: Points, how: Asking, rng: np.random.Generator) -> Asked:
    """Points that are named in the text, all in one sequence."""
    rows = rng.permutation(len(points.at))[: how.points * how.each]
    chosen, card = points.some(rows), how.card
    depth_m = chosen.depth(card.depth_kind).tolist()
    size = points.view.camera.width, points.view.camera.height
    if how.dialect == "compact":
        questions = compact_questions(
            normalise_pixel(chosen.at, *size, card.compact_range).tolist(), how.each, card.compact_range
        )
        answers = [compact_answer(depth_m[i : i + how.each]) for i in range(0, len(depth_m), how.each)]
    else:
        said = normalise_pixel(chosen.at, *size, card.coordinate_range).tolist()
        questions = [coordinates_question(nx, ny, card.coordinate_range) for nx, ny in said]
        answers = [depth_answer(each, card, "coordinates") for each in depth_m]
    return Asked((points.view.image,), tuple(zip(questions, answers, strict=True)))


def _about_marked(marked: Points, how: Asking, rng: np.random.Generator) -> Sequence[tuple[str, str]]:
    """Pairs about the marked point, or about both of them.

    DepthLM's figure shows how speed and time are answered; distances are worded likewise.
    """
    range_m = float(marked.depth("euclidean")[0])
    if how.dialect == "marker":
        return [(marker_question(), depth_answer(float(marked.depth(how.card.depth_kind)[0]), how.card, "marker"))]
    if how.dialect == "axis_distance":
        axis_m = float(marked.depth("z")[0])
        return [(motion.AXIS_DISTANCE, f"The point is around {axis_m:.2f} meters away in this direction.")]
    if how.dialect == "two_points":
        apart_m = float(np.linalg.norm(marked.points_m[0] - marked.points_m[1]))
        return [(motion.TWO_POINTS, f"The points are around {apart_m:.2f} meters from each other.")]
    pairs = []
    for _ in range(how.points):
        if how.dialect == "speed":
            seconds = round(float(rng.uniform(*SECONDS)), 1)
            pairs.append((motion.speed_question(seconds), speed_answer(range_m, seconds)))
        else:
            speed_mps = round(float(rng.uniform(*SPEEDS_MPS)), 1)
            pairs.append((motion.time_question(speed_mps), time_answer(range_m, speed_mps)))
    return pairs


def speed_answer(range_m: float, seconds: float) -> str:
    """As in DepthLM's figure: `The point is around 7.23 meters away. Hence, the speed should be around ...`."""
    return (
        f"The point is around {range_m:.2f} meters away. Hence, the speed should be around "
        f"{range_m:.2f} / {seconds} = {round(range_m, 2) / seconds:.2f}m/s"
    )


def time_answer(range_m: float, speed_mps: float) -> str:
    """As in DepthLM's figure: `The point is around 48.28 meters away. Hence, we need around ...`."""
    return (
        f"The point is around {range_m:.2f} meters away. Hence, we need around "
        f"{range_m:.2f} / {speed_mps} = {round(range_m, 2) / speed_mps:.2f}s"
    )


def _dialogue(example: Example, how: Asking, rng: np.random.Generator) -> Asked:
    if not example.dialogue:
        raise BadRow(example.name, NO_LABELS, f"no dialogue, which {how.dialect!r} needs")
    rows = sorted(rng.permutation(len(example.dialogue))[: how.points].tolist())
    images = tuple(_told(*seen, how) for seen in zip(example.images, example.cameras, strict=True))
    return Asked(images, tuple(example.dialogue[row] for row in rows))


def _told(image: np.ndarray, camera: Camera | None, how: Asking) -> np.ndarray:
    """An image of a dialogue as the assistant shows it for this task."""
    card = how.card
    if how.dialect == "correspondence":
        return long_edge_view(image, how.policy, how.grid).image
    focal_px = VLM3_FOCAL_PX.get(how.dialect, card.focal_px) if card.system == "vlm3" else card.focal_px
    if camera is None or focal_px is None:
        return image
    if how.dialect == "pose" and how.policy == "published" and camera.distortion.is_identity:
        return published_pose_image(image, camera, focal_px)
    return shown(image, camera, how, focal_px).image


def _chosen(points: Points, count: int, rng: np.random.Generator, example: Example) -> Points:
    if len(points.at) < count:
        raise BadRow(example.name, NO_LABELS, f"{len(points.at)} labels can carry an arrow, {count} are needed")
    return points.some(rng.permutation(len(points.at))[:count])
