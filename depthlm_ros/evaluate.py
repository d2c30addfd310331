"""Scores answers against true depth: of a replayed node, or of the estimator in this very process.

`depthlm evaluate` asks the model exactly at labelled pixels, so every label counts and a missing answer is wrong.
`depthlm replay` can only compare where the node chose to ask; both fill the same `Tally` and write the same report.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import itertools
import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
from tqdm import tqdm

from depthlm_ros.calibration import Calibration, Kind, calibrated_elsewhere, reliability
from depthlm_ros.camera import Camera
from depthlm_ros.config import POINTS_IN_WORDS, Parameters
from depthlm_ros.densified import Between, Densified, compare_between, densified_scores
from depthlm_ros.errors import BagError, DatasetError, DepthLMError
from depthlm_ros.metrics import best_constant, delta1_interval, depth_metrics, row_prior, within_delta1
from depthlm_ros.queries import ask_frame, densified_image

Item = TypeVar("Item")

# Truth that covers less than this share of an image is a list of labels, each looked for in the answers;
# denser truth is a map in which each answer is looked up.
DENSE_SHARE = 0.25
POINTS_OF_DENSE_TRUTH = 2000
PICTURES = 6
# Fewer say nothing about a share; two groups of a calibration.
FEWEST_VERDICTS = 60


@dataclass(frozen=True)
class AnsweredFrame:
    """One image with what was answered about it and what is true.

    Attributes:
        name: file name, or time in the recording.
        image: (H, W, 3) uint8 RGB.
        camera: its intrinsics.
        pixels: (N, 2) `(u, v)` that were answered or asked.
        depth_m: (N,) z-depth in metres, NaN where the model gave no answer.
        confidence: (N,) in [0, 1].
        truth_m: (H, W) z-depth in metres, NaN where unknown; None without ground truth.
        latency_s: from handing the image over to having the answer.
        depth_map_m: (H, W) depth image that came along, NaN where unknown; None where there is none.
        densified: a depth image that was filled in between points, which is scored by itself; None where none was.
    """

    name: str
    image: np.ndarray
    camera: Camera
    pixels: np.ndarray
    depth_m: np.ndarray
    confidence: np.ndarray
    truth_m: np.ndarray | None
    latency_s: float
    depth_map_m: np.ndarray | None = None
    densified: Densified | None = None


@dataclass(frozen=True)
class Compared:
    """Pairs of predicted and true depth of one image.

    Attributes:
        pixels: (M, 2) where.
        predicted: (M,) metres, NaN without an answer.
        true: (M,) metres.
        labels: how many true depths the image has.
        confidence: (M,) of the predictions.
    """

    pixels: np.ndarray
    predicted: np.ndarray
    true: np.ndarray
    labels: int
    confidence: np.ndarray


def compare(frame: AnsweredFrame, match_px: float = 2.0) -> Compared:
    """Pairs answers with true depths.

    Where truth is a map, each answer is compared with the truth at its own pixel. Where it is a list of labels, each
    label is compared with the nearest answer within `match_px` pixels; labels with none are left out, not wrong.
    """
    empty = Compared(np.empty((0, 2)), np.empty(0), np.empty(0), 0, np.empty(0))
    if frame.truth_m is None:
        return empty
    height, width = frame.truth_m.shape
    known = np.isfinite(frame.truth_m)
    labels = int(known.sum())
    at = np.rint(frame.pixels).astype(int)
    inside = ((at >= 0) & (at < (width, height))).all(axis=1)
    at, depth, confidence = at[inside], frame.depth_m[inside], frame.confidence[inside]
    if labels >= DENSE_SHARE * known.size:
        true = frame.truth_m[at[:, 1], at[:, 0]]
        kept = np.isfinite(true)
        return Compared(at[kept], depth[kept], true[kept], labels, confidence[kept])
    answer = np.full((height, width), -1)
    answer[at[:, 1], at[:, 0]] = np.arange(len(at))
    rows, columns = np.nonzero(known)
    found = np.full(labels, -1)
    for dv, du in _offsets(match_px):
        v, u = rows + dv, columns + du
        valid = (found < 0) & (v >= 0) & (v < height) & (u >= 0) & (u < width)
        found[valid] = answer[v[valid], u[valid]]
    kept = found >= 0
    pixels = np.stack([columns, rows], axis=1)[kept]
    found = found[kept]
    return Compared(pixels, depth[found], frame.truth_m[rows[kept], columns[kept]], labels, confidence[found])


def _offsets(radius_px: float) -> list[tuple[int, int]]:
    """(dv, du) within a radius, nearest first."""
    reach = range(-int(radius_px), int(radius_px) + 1)
    near = [(dv, du) for dv in reach for du in reach if dv * dv + du * du <= radius_px**2]
    return sorted(near, key=lambda offset: offset[0] ** 2 + offset[1] ** 2)


@dataclass
class Tally:
    """Collects answered frames and keeps the few that a report shows.

    Attributes:
        expected: how many frames will come; the kept ones are spread evenly over them, not chosen by their score.
        match_px: for `compare`.
    """

    expected: int
    match_px: float = 2.0
    frames: list[dict] = field(default_factory=list)
    pictures: list[AnsweredFrame] = field(default_factory=list)
    _compared: list[Compared] = field(default_factory=list)
    _heights: list[int] = field(default_factory=list)
    _between: list[Between] = field(default_factory=list)

    def add(self, frame: AnsweredFrame) -> None:
        """Scores one frame."""
        compared = compare(frame, self.match_px)
        scores = depth_metrics(compared.predicted, compared.true)
        index = len(self.frames)
        self.frames.append(
            {
                "name": frame.name,
                "points": int(np.isfinite(frame.depth_m).sum()),
                "compared": len(compared.true),
                "labels": compared.labels,
                "delta1": scores.to_json()["delta1"],
                "abs_rel": scores.to_json()["abs_rel"],
                "latency_s": round(frame.latency_s, 6),
            }
        )
        self._compared.append(compared)
        self._heights.append(frame.image.shape[0])
        if frame.densified is not None and frame.truth_m is not None:
            self._between.append(compare_between(frame.densified, frame.truth_m, seed=index))
        if index in self._shown():
            self.pictures.append(frame)

    def _shown(self) -> set[int]:
        last = max(self.expected - 1, 0)
        return {round(position) for position in np.linspace(0, last, min(PICTURES, self.expected or 1))}

    def pairs(self) -> tuple[np.ndarray, np.ndarray]:
        """(M,) predicted and (M,) true metres of all frames so far."""
        return tuple(
            np.concatenate([getattr(c, name) for c in self._compared] or [[]]) for name in ("predicted", "true")
        )

    def scores(self) -> dict:
        """Depth scores beside the baselines, as metrics.json holds them; empty when nothing could be compared."""
        predicted, true = self.pairs()
        if not len(true):
            return {}
        groups = np.repeat(np.arange(len(self._compared)), [len(c.true) for c in self._compared])
        heights = np.repeat(self._heights, [len(c.true) for c in self._compared])
        rows = np.concatenate([c.pixels[:, 1] for c in self._compared])
        constant, constant_delta1 = best_constant(true)
        prior = row_prior(rows, heights, true, bins=32).predict(rows, heights)
        low, high = delta1_interval(predicted, true, groups)
        return {
            "depth": depth_metrics(predicted, true).to_json(),
            "delta1_interval_95": None if np.isnan(low) else [low, high],
            "baselines": {
                "best_constant": {"metres": constant, "delta1": constant_delta1},
                "row_prior": {"delta1": depth_metrics(prior, true).delta1},
                "note": "both are oracles, fitted to the very points they are scored on",
            },
            "labels": sum(c.labels for c in self._compared),
            "compared": len(true),
            "match_px": self.match_px,
            **({"densified": between} if (between := densified_scores(self._between)) else {}),
        }

    def verdicts(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of each answered and compared point: (M,) confidence, (M,) bool right in δ1, (M,) number of its frame."""
        predicted, true = self.pairs()
        frame = np.repeat(np.arange(len(self._compared)), [len(c.true) for c in self._compared])
        confidence = np.concatenate([c.confidence for c in self._compared] or [[]])
        answered = np.isfinite(predicted)
        return confidence[answered], within_delta1(predicted[answered], true[answered]), frame[answered]

    def calibration(self) -> dict:
        """How much confidences are worth, as metrics.json holds it; empty where there are too few to say."""
        confidence, right, frame = self.verdicts()
        if len(right) < FEWEST_VERDICTS:
            return {}
        stated = reliability(confidence, right)
        other = calibrated_elsewhere(confidence, right, frame)
        calibrated = None if other is None else reliability(other, right)
        return {
            "points": len(right),
            "frames": len(np.unique(frame)),
            "right": float(right.mean()),
            "error_stated": stated.error,
            "error_calibrated": None if calibrated is None else calibrated.error,
            "stated": asdict(stated),
            "calibrated": None if calibrated is None else asdict(calibrated),
            "note": "expected calibration error of δ1 over groups of equal size; each image is calibrated on others",
        }

    def latency(self) -> dict[str, float]:
        """Seconds a frame: percentiles over all answered frames."""
        seconds = [frame["latency_s"] for frame in self.frames]
        if not seconds:
            return {}
        return {name: float(np.percentile(seconds, q)) for name, q in (("p50_s", 50), ("p95_s", 95), ("max_s", 100))}

    def points_per_second(self) -> float:
        """Answered points over the seconds they took; 0 when there were none."""
        seconds = sum(frame["latency_s"] for frame in self.frames)
        return sum(frame["points"] for frame in self.frames) / seconds if seconds else 0.0


@dataclass(frozen=True)
class Run:
    """All that a report says.

    Attributes:
        title: what was done, in a line.
        tally: the answered frames.
        figures: name to value of everything counted, such as frames sent and dropped.
        environment: name to value: model, device, dtype, machine, date, versions.
        notes: what the reader has to know to judge the figures.
        about_model: what the model is and is not, from its card.
        broke_off: why not everything was read or played; empty when all was.
        kind: what the confidences are, for a calibration that is fitted to them; None where they can't be used for one.
    """

    title: str
    tally: Tally
    figures: dict[str, float | int | str]
    environment: dict[str, str]
    notes: tuple[str, ...] = ()
    about_model: str = ""
    broke_off: str = ""
    kind: Kind | None = None

    def fitted(self) -> Calibration | None:
        """A calibration of these confidences, fitted to all frames; None where there are too few, or of what kind
        they are isn't known.
        """
        confidence, right, frame = self.tally.verdicts()
        enough = self.kind is not None and len(right) >= FEWEST_VERDICTS
        return Calibration.fit(confidence, right, frame, self.kind) if enough else None


def dialect_notes(dialect: str) -> tuple[str, ...]:
    """What a reader of the figures has to know about a dialect."""
    if dialect != "dense":
        return ()
    return (
        "dense dialect: points are pixels of one map a frame, so points a second says more of the stride than of speed",
    )


def up_to_failure(items: Iterable[Item], failures: list[str]) -> Iterator[Item]:
    """Passes items on until the source fails, so that what was measured by then isn't lost with the rest.

    Args:
        items: read or answered one after the other.
        failures: gets the reason, where it broke off.

    Raises:
        DepthLMError: of the source, if it gave not one item.
    """
    source = iter(items)
    for count in itertools.count():
        try:
            item = next(source)
        except StopIteration:
            return
        except DepthLMError as error:
            if count == 0:
                raise
            failures.append(f"broke off after {count} images: {error}")
            return
        yield item


def progress(items: Iterable[Item], total: int, what: str) -> Iterator[Item]:
    """A progress bar on standard error; silent where that is not a terminal."""
    return iter(tqdm(items, total=total, desc=what, unit="frame", disable=None, dynamic_ncols=True))


def machine() -> dict[str, str]:
    """Where and when, for a report."""
    cores = len(os.sched_getaffinity(0))
    versions = [
        f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers", "numpy") if _there(name)
    ]
    return {
        "machine": f"{platform.system()} {platform.machine()}, {_processor()}, {cores} cores",
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "versions": ", ".join([f"Python {platform.python_version()}", *versions]),
    }


def _there(distribution: str) -> bool:
    return any(True for _ in importlib.metadata.distributions(name=distribution))


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown processor"


def labelled(
    source: Path, **reader_options
) -> tuple[int, Iterator[tuple[str, np.ndarray, Camera, np.ndarray]], tuple[str, ...]]:
    """Opens a labels file or a recording for scoring.

    Returns:
        (number of images, iterator of (name, image, camera, (H, W) true metres), notes).

    Raises:
        DatasetError, BagError: it can't be read or has no ground truth.
    """
    if source.suffix == ".jsonl":
        from depthlm_ros.datasets import LabelledImages

        rows = LabelledImages(source, **reader_options)
        notes = rows[0].notes
        return len(rows), ((row.name, row.image, row.camera, row.depth_map()) for row in rows), notes
    from depthlm_ros.bags import bag_info, read_frames, require_truth

    info = bag_info(source)
    require_truth(info)

    def frames() -> Iterator[tuple[str, np.ndarray, Camera, np.ndarray]]:
        for index, recorded in enumerate(read_frames(source)):
            if recorded.truth_m is not None:
                yield f"frame {index}", recorded.frame.image, recorded.frame.camera, recorded.truth_m

    return info.count(info.truth_topic), frames(), tuple(f"{key}: {value}" for key, value in info.notes.items())


def asked_pixels(truth_m: np.ndarray, most: int, seed: int) -> np.ndarray:
    """(N, 2) float32 labelled pixels `(u, v)`, all of them or `most` drawn at random."""
    rows, columns = np.nonzero(np.isfinite(truth_m))
    if len(rows) > most:
        drawn = np.sort(np.random.default_rng(seed).choice(len(rows), most, replace=False))
        rows, columns = rows[drawn], columns[drawn]
    return np.stack([columns, rows], axis=1).astype(np.float32)


def evaluate(
    source: str | Path,
    estimator,
    *,
    dialect: str | None = None,
    points: int = 0,
    seed: int = 0,
    on_frame: Callable[[AnsweredFrame], None] | None = None,
    points_per_question: int = 1,
    distribution: bool = False,
    depth_value: str = "greedy",
    densify: bool = False,
    sampling: str = "grid",
    **reader_options,
) -> Run:
    """Asks an estimator at labelled pixels and scores it. No ROS.

    With `densify` the depth between asked points is scored too, by itself. Where truth is a map, the points asked are
    then those that `sampling` places, and what is filled in between them is scored at all other pixels; where it is a
    list of labels, these are asked as ever, and what is filled in between as many points placed by `sampling` is
    scored at the labels.

    Args:
        source: a labels file (.jsonl) or a recording with ground truth.
        estimator: a `depthlm_ros.estimator.Estimator`.
        dialect: how to ask; by default the model card's choice.
        points: labelled pixels asked in each image; 0 takes 256 in words and 2000 from the dense head.
        seed: of the choice among more labels than that.
        on_frame: called with each scored frame.
        points_per_question, distribution, depth_value: as in `Estimator.estimate`.
        densify: score depth between points as well.
        sampling: where the points lie that it is filled in between, as in `Parameters`.
        **reader_options: `images`, `depths`, `depth_kind` of `LabelledImages`.

    Raises:
        DatasetError, BagError: the source can't be read, or holds not one usable label.
        ConfigError: a distribution where there is none, or a calibration of other confidences.
    """
    source = Path(source)
    total, frames, notes = labelled(source, **reader_options)
    dialect = dialect or estimator.card.default_dialect
    most = points or (POINTS_OF_DENSE_TRUTH if dialect == "dense" else POINTS_IN_WORDS)
    kind = Kind(estimator.card.name, dialect, depth_value, distribution)
    if estimator.calibration is not None:
        estimator.calibration.require(kind)
        notes, kind = (*notes, f"confidences calibrated {estimator.calibration.about}"), None
    tally = Tally(total, match_px=0.0)
    failures: list[str] = []
    answered = {"points_per_question": points_per_question, "distribution": distribution, "depth_value": depth_value}
    frames = up_to_failure(frames, failures)
    for index, (name, image, camera, truth_m) in enumerate(progress(frames, total, "evaluate")):
        pixels = asked_pixels(truth_m, most, seed + index)
        if not len(pixels):
            continue
        filled = None
        started = time.perf_counter()
        if densify:
            placed = Parameters(points=most, sampling=sampling)
            _, result = ask_frame(estimator, image, camera, placed, dialect, whole=True, **answered)
            seconds = time.perf_counter() - started
            filled = Densified(densified_image(result, image, placed), result.pixels)
        if not densify or np.isfinite(truth_m).mean() < DENSE_SHARE:
            started = time.perf_counter()
            result = estimator.estimate(image, camera, pixels, dialect=dialect, **answered)
            seconds = time.perf_counter() - started
        rows = result.pixels, result.depth_m, result.confidence
        frame = AnsweredFrame(name, image, camera, *rows, truth_m, seconds, filled and filled.depth_m, filled)
        tally.add(frame)
        if on_frame is not None:
            on_frame(frame)
    if not tally.frames:
        error = DatasetError if source.suffix == ".jsonl" else BagError
        raise error(f"{source} has {total} images but not one with a true depth; there is nothing to score against")
    if densify:
        notes = (*notes, f"depth between points is filled in from {most} points an image, sampling {sampling}")
    if dialect == "compact":
        notes = (*notes, f"{points_per_question} points a question")
    if distribution:
        notes = (*notes, f"depth: {depth_value} of the digits' distribution, confidence: its probability near that")
    return replace(finished(f"Evaluation on {source.name}", estimator, dialect, tally, notes, failures), kind=kind)


def finished(
    title: str,
    estimator,
    dialect: str,
    tally: Tally,
    notes: Iterable[str] = (),
    failures: Iterable[str] = (),
    figures: dict[str, float | int | str] | None = None,
) -> Run:
    """The run of an estimator in this process, once its frames are tallied; `figures` come before the usual ones."""
    counted = {
        "frames": len(tally.frames),
        "points": sum(frame["points"] for frame in tally.frames),
        "points_per_second": tally.points_per_second(),
        **{f"latency_{name}": value for name, value in tally.latency().items()},
    }
    info = estimator.engine.info
    environment = {
        "model": f"{estimator.card.name} ({info.model})",
        "dialect": dialect,
        "engine": f"{info.engine}, {info.architecture}, {info.parameters / 1e6:.1f} M parameters",
        "device": info.device,
        "dtype": info.dtype,
        **machine(),
    }
    return Run(
        title,
        tally,
        {**(figures or {}), **counted},
        environment,
        (*notes, *dialect_notes(dialect), *(line for line in estimator.describe() if line != estimator.card.about)),
        about_model=estimator.card.about,
        broke_off="; ".join(failures),
    )
