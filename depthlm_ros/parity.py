"""Do two engines answer alike? Reference answers on a disk, and the comparison with a candidate's.

Both are asked through the estimator, about whole images of a real camera, so that everything counts which a frame of
the node goes through: resampling, normalisation, the order of channels, the place of a pixel in a map, units. Images
are rendered or recorded ones: random numbers would hide an engine whose scale varies from frame to frame.

A dense map agrees in a frame when half of its depths are within 1 %, the median of the ratios is within 1 % of 1 and
the order of the depths is the same (Spearman's rank correlation of 0.999); in every frame, since engines are known
whose scale changes from one to the next (ros2-depth-anything-v3-trt, issue 16). Answers in words agree when 99 of 100
are the same text, or differ by at most one unit of the last digit of each number.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

from depthlm_ros.camera import Camera, Distortion
from depthlm_ros.cards import models_dir
from depthlm_ros.engines.answers import NUMBER
from depthlm_ros.errors import ConfigError, DialectError, ModelError
from depthlm_ros.sampling import sample_pixels, stride_pixels

if TYPE_CHECKING:
    from depthlm_ros.estimator import Estimator

REFERENCE_FILE = "reference.json"
MOST_MEDIAN_ERROR = 0.01
MOST_SCALE_ERROR = 0.01
LEAST_RANK_CORRELATION = 0.999
LEAST_SAME_ANSWERS = 0.99
# A map may lose so many of the reference's depths: where one of two is just not finite or positive.
MOST_LOST = 0.001
FRAMES = 6
WORD_FRAMES = 4
WORD_POINTS = 32
_MAP_POINTS = 4800
_FORMAT = 1
_SHIPPED = "sample_drive"


@dataclass(frozen=True)
class ReferenceFrame:
    """An image to ask about: (H, W, 3) uint8 RGB, and its camera."""

    image: np.ndarray
    camera: Camera


@dataclass(frozen=True)
class Asked:
    """What a dialect answered about a frame.

    Attributes:
        frame: index of it.
        dialect: that was spoken.
        pixels: (N, 2) float32 `(u, v)`.
        depth_m: (N,) float32 z-depth in metres, NaN without an answer.
        texts: (N) answers; empty in the dense dialect.
    """

    frame: int
    dialect: str
    pixels: np.ndarray
    depth_m: np.ndarray
    texts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reference:
    """Answers to compare others with.

    Attributes:
        model: name of the model's card.
        engine: whose answers they are, with device and number format.
        frames: that were asked about.
        asked: the answers.
    """

    model: str
    engine: str
    frames: tuple[ReferenceFrame, ...]
    asked: tuple[Asked, ...]


@dataclass(frozen=True)
class Verdict:
    """How a candidate compares.

    Attributes:
        passed: whether it agrees.
        failures: what doesn't, a phrase each.
        figures: the worst of each figure over the frames, by name.
        reasons: what couldn't be compared.
    """

    passed: bool
    failures: tuple[str, ...]
    figures: dict[str, float]
    reasons: tuple[str, ...] = ()

    def __str__(self) -> str:
        """One line."""
        told = "; ".join(self.failures) if self.failures else ", ".join(f"{k} {v:.4g}" for k, v in self.figures.items())
        return told + "".join(f"; {reason}" for reason in self.reasons)


def default_frames(camera: Camera | None = None, count: int = FRAMES) -> list[ReferenceFrame]:
    """Rendered frames: those of a camera, or frames of the shipped drive.

    Raises:
        BagError, ModelError: the shipped drive isn't there.
    """
    if camera is not None:
        return [ReferenceFrame(image, camera) for image in _rendered(camera, count)]
    return recorded_frames(models_dir() / _SHIPPED, count)


def recorded_frames(bag: Path, count: int = FRAMES) -> list[ReferenceFrame]:
    """Frames of a recording, evenly over its length.

    Raises:
        BagError: it can't be read, or has no images.
    """
    from depthlm_ros.bags import read_frames

    frames = [recorded.frame for recorded in read_frames(bag)]
    if not frames:
        raise ConfigError(f"{bag} holds no images with a CameraInfo; record both topics")
    picked = np.unique(np.linspace(0, len(frames) - 1, count).round().astype(int))
    return [ReferenceFrame(frames[i].image, frames[i].camera) for i in picked]


def record_reference(
    estimator: Estimator, frames: Sequence[ReferenceFrame], folder: Path, dialects: Sequence[str] | None = None
) -> Reference:
    """Asks a model and keeps its answers.

    Args:
        estimator: the reference.
        frames: to ask about; words are asked about the first few only, since each point is a question.
        folder: to write into; must be absent or empty.
        dialects: to ask in; None for all that it speaks.

    Raises:
        ConfigError: `folder` holds something, or no dialects.
        DialectError: it doesn't speak one of them.
    """
    dialects = tuple(dialects or estimator.dialects)
    if not dialects:
        raise DialectError(f"model {estimator.card.name!r} answers no depth questions, so there is nothing to compare")
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder} holds something already; name another folder")
    asked = []
    for dialect in map(estimator.card.require_dialect, dialects):
        for i, frame in enumerate(frames if dialect == "dense" else frames[:WORD_FRAMES]):
            asked.append(_ask(estimator, i, frame, dialect, _pixels(estimator, frame, dialect)))
    info = estimator.engine.info
    engine = f"{info.engine} on {info.device} in {info.dtype}"
    reference = Reference(estimator.card.name, engine, tuple(frames), tuple(asked))
    _write(reference, folder)
    return reference


def check(estimator: Estimator, reference: Reference) -> Verdict:
    """Compares a candidate's answers with a reference's, in all dialects that it can be asked in.

    Args:
        estimator: the candidate; its errors pass through.
        reference: to compare with.

    Raises:
        DialectError: they have no dialect in common.
    """
    spoken = [asked for asked in reference.asked if asked.dialect in estimator.dialects]
    if not spoken:
        raise DialectError(
            f"the reference of {reference.model} has answers in {', '.join(_dialects(reference))}, and the engine can "
            f"be asked in {', '.join(estimator.dialects) or 'no dialect'}; record a reference in one of these"
        )
    tally = _Tally()
    for asked in spoken:
        got = _ask(estimator, asked.frame, reference.frames[asked.frame], asked.dialect, asked.pixels)
        if asked.dialect == "dense":
            tally.add_map(asked, got)
        else:
            tally.add_words(asked, got)
    left = [dialect for dialect in _dialects(reference) if dialect not in estimator.dialects]
    reasons = (f"not compared in {', '.join(left)}",) if left else ()
    return tally.verdict(reasons)


@dataclass(frozen=True)
class MapAgreement:
    """How two sets of depths compare.

    Attributes:
        median_error: median of |candidate - reference| / reference.
        scale: median of candidate / reference.
        rank_correlation: Spearman's.
        lost: share of the reference's depths that the candidate doesn't have.
    """

    median_error: float
    scale: float
    rank_correlation: float
    lost: float

    @property
    def failures(self) -> list[str]:
        """What is out of bounds, a phrase each."""
        told = []
        # Written so that NaN fails.
        if not self.lost <= MOST_LOST:
            told.append(f"{self.lost:.2%} of the depths are missing, at most {MOST_LOST:.1%} may be")
        if not self.median_error <= MOST_MEDIAN_ERROR:
            told.append(f"median depth error {self.median_error:.2%}, at most {MOST_MEDIAN_ERROR:.0%}")
        if not abs(self.scale - 1) <= MOST_SCALE_ERROR:
            told.append(f"scale {self.scale:.4f}, within 1 ± {MOST_SCALE_ERROR:g}")
        if not self.rank_correlation >= LEAST_RANK_CORRELATION:
            told.append(f"rank correlation {self.rank_correlation:.4f}, at least {LEAST_RANK_CORRELATION}")
        return told


def compare_maps(reference_m: np.ndarray, candidate_m: np.ndarray) -> MapAgreement:
    """Compares (N,) depths in metres, NaN where there is none."""
    known = np.isfinite(reference_m) & (reference_m > 0)
    both = known & np.isfinite(candidate_m) & (candidate_m > 0)
    if not both.any():
        return MapAgreement(math.inf, math.nan, math.nan, 1.0)
    r, c = (values[both].astype(np.float64) for values in (reference_m, candidate_m))
    lost = 1 - both.sum() / known.sum()
    return MapAgreement(float(np.median(np.abs(c - r) / r)), float(np.median(c / r)), rank_correlation(r, c), lost)


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's rank correlation of (N,) values, ties sharing their mean rank; NaN where one is constant."""
    ranks = []
    for values in (a, b):
        _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
        ranks.append((np.cumsum(counts) - (counts - 1) / 2)[which])
    if min(float(np.ptp(r)) for r in ranks) == 0:
        return math.nan
    return float(np.corrcoef(*ranks)[0, 1])


def same_answer(reference: str, candidate: str) -> bool:
    """Whether two answers are the same but for one unit of the last digit of each number."""
    if reference == candidate:
        return True
    numbers = [[match.group() for match in NUMBER.finditer(text)] for text in (reference, candidate)]
    frames = [re.sub(NUMBER, "#", text).strip() for text in (reference, candidate)]
    if frames[0] != frames[1] or len(numbers[0]) != len(numbers[1]):
        return False
    for a, b in zip(*numbers, strict=True):
        unit = 10.0 ** -len(a.partition(".")[2])
        if abs(float(a) - float(b)) > unit * (1 + 1e-6):
            return False
    return True


@dataclass
class _Tally:
    maps: list[tuple[int, MapAgreement]] = field(default_factory=list)
    words: dict[str, list[bool]] = field(default_factory=dict)
    examples: dict[str, tuple[str, str]] = field(default_factory=dict)

    def add_map(self, reference: Asked, candidate: Asked) -> None:
        self.maps.append((reference.frame, compare_maps(reference.depth_m, candidate.depth_m)))

    def add_words(self, reference: Asked, candidate: Asked) -> None:
        same = [same_answer(a, b) for a, b in zip(reference.texts, candidate.texts, strict=True)]
        self.words.setdefault(reference.dialect, []).extend(same)
        if not all(same):
            at = same.index(False)
            self.examples.setdefault(reference.dialect, (reference.texts[at], candidate.texts[at]))

    def verdict(self, reasons: tuple[str, ...]) -> Verdict:
        failures, figures = [], {}
        if self.maps:
            agreements = [agreement for _, agreement in self.maps]
            figures = {
                "median depth error": max(a.median_error for a in agreements),
                "scale": max((a.scale for a in agreements), key=lambda scale: _distance(scale)),
                "rank correlation": min((a.rank_correlation for a in agreements), key=_nan_first),
                "depths missing": max(a.lost for a in agreements),
            }
            for frame, agreement in self.maps:
                failures += [f"dense, frame {frame}: {failure}" for failure in agreement.failures]
        for dialect, same in self.words.items():
            share = sum(same) / len(same)
            figures[f"same answers, {dialect}"] = share
            if share < LEAST_SAME_ANSWERS:
                wanted, got = self.examples[dialect]
                failures.append(
                    f"{dialect}: {share:.1%} of {len(same)} answers are the same, at least {LEAST_SAME_ANSWERS:.0%}; "
                    f"such as {got[:60]!r} instead of {wanted[:60]!r}"
                )
        more = [f"and {len(failures) - 4} more"] if len(failures) > 4 else []
        return Verdict(not failures, (*failures[:4], *more), figures, reasons)


def _distance(scale: float) -> float:
    return math.inf if math.isnan(scale) else abs(scale - 1)


def _nan_first(value: float) -> float:
    return -math.inf if math.isnan(value) else value


def _ask(estimator: Estimator, index: int, frame: ReferenceFrame, dialect: str, pixels: np.ndarray) -> Asked:
    result = estimator.estimate(frame.image, frame.camera, pixels, dialect=dialect)
    return Asked(index, dialect, pixels, result.depth_m, () if dialect == "dense" else tuple(result.answers))


def _pixels(estimator: Estimator, frame: ReferenceFrame, dialect: str) -> np.ndarray:
    """Pixels that the dialect can be asked about."""
    camera = frame.camera
    if dialect == "dense":
        stride = max(1, math.isqrt(camera.width * camera.height // _MAP_POINTS))
        return stride_pixels(camera.width, camera.height, stride)
    pixels = sample_pixels(camera.width, camera.height, WORD_POINTS, margin_px=min(camera.width, camera.height) // 10)
    return pixels[estimator.askable(frame.image, camera, pixels, dialect=dialect)]


def _dialects(reference: Reference) -> tuple[str, ...]:
    return tuple(dict.fromkeys(asked.dialect for asked in reference.asked))


def _rendered(camera: Camera, count: int) -> list[np.ndarray]:
    """(H, W, 3) uint8 RGB views of rooms, corridors and streets, the same ones everywhere."""
    from depthlm_training.scenes import KINDS, random_pose, random_scene, render

    pinhole, maps = camera, None
    if camera.distortion != Distortion():
        # The renderer knows no lenses: a wider view, and each pixel of it where the lens shows it.
        pinhole = Camera(
            fx=camera.fx, fy=camera.fy, cx=camera.cx + camera.width / 4, cy=camera.cy + camera.height / 4,
            width=camera.width * 3 // 2, height=camera.height * 3 // 2,
        )  # fmt: skip
        u, v = np.meshgrid(np.arange(camera.width), np.arange(camera.height))
        rays = camera.rays(np.stack([u.ravel(), v.ravel()], 1).astype(np.float32))
        at = rays[:, :2] / rays[:, 2:] * (pinhole.fx, pinhole.fy) + (pinhole.cx, pinhole.cy)
        maps = at.reshape(camera.height, camera.width, 2).astype(np.float32)
    images = []
    for seed in range(count):
        rng = np.random.default_rng([6, seed])
        scene = random_scene(rng, KINDS[seed % len(KINDS)])
        image, _ = render(scene, pinhole, random_pose(rng, scene))
        images.append(image if maps is None else cv2.remap(image, maps, None, cv2.INTER_LINEAR))
    return images


# ---------------------------------------------------------------- on a disk


def read_reference(folder: Path) -> Reference:
    """Reads what `record_reference` wrote.

    Raises:
        ModelError: there is none, or it is damaged.
    """
    path = folder / REFERENCE_FILE
    if not path.is_file():
        raise ModelError(f"{folder} has no {REFERENCE_FILE}; record one: depthlm parity MODEL --record {folder}")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["format"] != _FORMAT:
            raise ModelError(f"{path} has format {data['format']}, this version reads {_FORMAT}; record it again")
        frames = tuple(_read_frame(folder, told) for told in data["frames"])
        with np.load(folder / "depths.npz", allow_pickle=False) as stored:
            asked = tuple(
                Asked(a["frame"], a["dialect"], stored[f"pixels_{i}"], stored[f"depth_m_{i}"], tuple(a["texts"]))
                for i, a in enumerate(data["asked"])
            )
        return Reference(data["model"], data["engine"], frames, asked)
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ModelError(f"{folder} is damaged ({type(error).__name__}: {error}); record it again") from error


def _read_frame(folder: Path, told: dict[str, Any]) -> ReferenceFrame:
    image = cv2.imread(str(folder / told["image"]), cv2.IMREAD_COLOR)
    if image is None:
        raise ModelError(f"{folder / told['image']} can't be read; record the reference again")
    return ReferenceFrame(cv2.cvtColor(image, cv2.COLOR_BGR2RGB), camera_of(told["camera"]))


def camera_of(told: dict[str, Any]) -> Camera:
    """A camera from `camera_values`."""
    lens = told.get("distortion") or {}
    distortion = Distortion(lens["model"], tuple(lens["coefficients"])) if lens else Distortion()
    return Camera(**{**told, "distortion": distortion})


def camera_values(camera: Camera) -> dict[str, Any]:
    """A camera as JSON holds it."""
    values = asdict(camera)
    lens = camera.distortion
    bare = lens == Distortion()
    values["distortion"] = None if bare else {"model": lens.model, "coefficients": list(lens.coefficients)}
    return values


def _write(reference: Reference, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    frames = []
    for i, frame in enumerate(reference.frames):
        name = f"frame_{i}.png"
        if not cv2.imwrite(str(folder / name), cv2.cvtColor(frame.image, cv2.COLOR_RGB2BGR)):
            raise OSError(f"{folder / name} can't be written")
        frames.append({"image": name, "camera": camera_values(frame.camera)})
    arrays = {f"pixels_{i}": asked.pixels for i, asked in enumerate(reference.asked)}
    arrays |= {f"depth_m_{i}": asked.depth_m for i, asked in enumerate(reference.asked)}
    np.savez_compressed(folder / "depths.npz", **arrays)
    data = {
        "format": _FORMAT,
        "model": reference.model,
        "engine": reference.engine,
        "frames": frames,
        "asked": [{"frame": a.frame, "dialect": a.dialect, "texts": list(a.texts)} for a in reference.asked],
    }
    (folder / REFERENCE_FILE).write_text(json.dumps(data, indent=1), encoding="utf-8")
