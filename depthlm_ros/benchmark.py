"""Runs a published evaluation protocol over an estimator and counts as its authors do, beside our own figures.

    run = run_protocol(Path("ibims1_val.jsonl"), estimator, "dataset_eval")
    run.figures["delta1_published_metric"], run.figures["delta1_strict_parser"]
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np

from depthlm_ros.compat import read_number, require_math_verify, verdicts, vlm3_delta1
from depthlm_ros.datasets import LabelledImage, LabelledImages
from depthlm_ros.depth import DepthResult
from depthlm_ros.depthvlm_bench import bench_delta1, in_range
from depthlm_ros.errors import ConfigError, DatasetError, unknown_choice
from depthlm_ros.evaluate import AnsweredFrame, Run, Tally, finished, progress, up_to_failure
from depthlm_ros.metrics import DELTA
from depthlm_ros.prompts import parse_compact, parse_depth
from depthlm_ros.protocols import (
    DEPTHLM_PROTOCOLS,
    ORDERS,
    PROTOCOLS,
    PUBLISHED_SAMPLES,
    Question,
    evaluated_records,
)
from depthlm_ros.published import canonical_size


def run_protocol(
    source: str | Path,
    estimator,
    protocol: str,
    *,
    samples: int | None = None,
    dialect: str | None = None,
    **reader_options,
) -> Run:
    """Asks an estimator what a published evaluation asks, and counts as it does.

    Figures of `dataset_eval` and `dataset_inference`: `delta1_published_metric` is the authors' verdict (math-verify on
    the whole text) and `delta1_strict_parser` that of our grammar, over the same answers and against the labels as
    they stand in the file; a model of VLM3 gets `delta1_vlm3_notebook` too, which leaves out what it
    can't read. The run's own scores count each point once and are z-depth against z-depth.

    Args:
        source: a labels file of DepthLM's schema (`dataset_*`) or DepthVLM's (`depthvlm_bench`).
        estimator: a `depthlm_ros.estimator.Estimator`.
        protocol: one of `protocols.PROTOCOLS`.
        samples: how many of the first questions (`depthvlm_bench`: images), 0 for all; None takes 128 questions or
            all images, as published.
        dialect: how to ask; by default the model card's choice.
        **reader_options: `images`, `depths`, `depth_kind` of `LabelledImages`.

    Raises:
        ConfigError: an unknown protocol, or one that the dialect has no answers for.
        DatasetError: the source can't be read or is of the wrong schema.
        MissingDependencyError: math-verify isn't there.
    """
    check_protocol(protocol)
    rows = LabelledImages(source, **reader_options)
    dialect = estimator.card.require_dialect(dialect or estimator.default_dialect)
    schema = "depthlm" if protocol in DEPTHLM_PROTOCOLS else "depthvlm"
    if rows.schema != schema:
        raise DatasetError(f"{source} is of the {rows.schema} schema; protocol {protocol} needs the {schema} one")
    if (dialect == "dense") == (protocol in DEPTHLM_PROTOCOLS):
        wanted = "an answer in words, which the dense dialect has not" if dialect == "dense" else "the dense dialect"
        raise ConfigError(f"protocol {protocol} needs {wanted}; model {estimator.card.name!r} was asked in {dialect!r}")
    if protocol in DEPTHLM_PROTOCOLS:
        samples = PUBLISHED_SAMPLES if samples is None else samples
        return _depthlm_run(rows, str(source), estimator, protocol, samples, dialect)
    return _bench_run(rows, str(source), estimator, samples or len(rows))


def check_protocol(protocol: str) -> None:
    """Checks a protocol's name and that what it counts with is installed, before a model is loaded.

    Raises:
        ConfigError: an unknown name.
        MissingDependencyError: math-verify isn't there.
    """
    if protocol not in PROTOCOLS:
        raise ConfigError(unknown_choice("protocol", protocol, PROTOCOLS))
    if protocol in DEPTHLM_PROTOCOLS:
        require_math_verify()


def summary(run: Run) -> str:
    """The protocol's own figures for a terminal; empty for a run without a protocol."""
    figures = run.figures
    if figures.get("protocol") == "depthvlm_bench":
        return (
            f"  protocol      depthvlm_bench: {figures['frames']} images\n"
            f"  δ1, authors'  {figures['delta1_mean_over_images']:.3f} (mean over images)\n"
            f"  left out      {figures['points_off_map']} of {figures['points_asked']} points, beyond the map's edge"
        )
    if "protocol" not in figures:
        return ""
    lines = (
        f"  protocol      {figures['protocol']}: {figures['questions']} questions, {figures['moved_on']} of them moved "
        f"on from a point too near the border, {figures['not_askable']} not askable\n"
        f"  δ1, authors'  {figures['delta1_published_metric']:.3f} (math-verify on the whole text; "
        f"{figures['unread_published_metric']} unread)\n"
        f"  δ1, strict    {figures['delta1_strict_parser']:.3f} (our grammar on the same answers; "
        f"{figures['unread_strict_parser']} unread)"
    )
    if figures.get("delta1_vlm3_notebook") is None:
        return lines
    return lines + (
        f"\n  δ1, VLM3's    {figures['delta1_vlm3_notebook']:.3f} (its notebook's, which leaves out "
        f"{figures['left_out_vlm3_notebook']} it can't read)"
    )


def _depthlm_run(
    rows: LabelledImages, source: str, estimator, protocol: str, samples: int, dialect: str
) -> Run:  # fmt: skip
    points, depths = [], []
    for index in range(len(rows)):
        row = rows.row(index, "pixel_coords", "depth")
        points.append(np.asarray(row["pixel_coords"], np.float64).reshape(-1, 2))
        depths.append([float(depth) for depth in row["depth"]])
        if len(points[-1]) != len(depths[-1]):
            raise DatasetError(f"{source}:{index + 1}: {len(points[-1])} pixel_coords but {len(depths[-1])} depths")
    records = evaluated_records(len(rows), source)
    masks: dict[int, np.ndarray] = {}

    def askable(record: int, point: int) -> bool:
        if record not in masks:
            item = rows[record]
            masks[record] = estimator.askable(item.image, item.camera, points[record], dialect=dialect)
        return bool(masks[record][point])

    questions = list(ORDERS[protocol]([len(own) for own in points], records, askable, samples))
    wanted: dict[int, set[int]] = {}
    for question in questions:
        if question.askable:
            wanted.setdefault(question.record, set()).add(question.point)
    if not wanted:
        raise DatasetError(f"{source}: not one of the {len(questions)} questions can be asked")
    tally, texts, failures = Tally(len(wanted), match_px=0.0), {}, []
    frames = up_to_failure(_answered(rows, wanted, points, estimator, dialect, texts), failures)
    for frame in progress(frames, len(wanted), protocol):
        tally.add(frame)
    figures = _depthlm_figures(protocol, questions, texts, depths, dialect, estimator.card.system)
    notes = (
        f"answers end after {estimator.card.max_new_tokens} tokens, the published limit is 4096",
        f"focal length {estimator.card.focal_px:g} px, the model's own; the published program has 750 px for any model",
        *((f"evaluated are the last 2 % of its rows: {len(records)}",) if len(records) < len(rows) else ()),
    )
    title = f"{protocol} on {Path(source).name}"
    return finished(title, estimator, dialect, tally, notes, failures, figures)


def _answered(
    rows: LabelledImages, wanted: dict[int, set[int]], points: list, estimator, dialect: str, texts: dict
) -> Iterator[AnsweredFrame]:
    """Asks all questions about an image together, each point once, and keeps the texts by (record, point)."""
    for record, own in wanted.items():
        item, chosen = rows[record], sorted(own)
        started = time.perf_counter()
        result = estimator.estimate(item.image, item.camera, points[record][chosen], dialect=dialect)
        seconds = time.perf_counter() - started
        texts.update({(record, point): text for point, text in zip(chosen, result.answers, strict=True)})
        yield _frame(item, result, seconds)


def _frame(item: LabelledImage, result: DepthResult, seconds: float) -> AnsweredFrame:
    truth_m = item.depth_map()
    return AnsweredFrame(
        item.name, item.image, item.camera, result.pixels, result.depth_m, result.confidence, truth_m, seconds
    )


def _depthlm_figures(
    protocol: str,
    questions: list[Question],
    texts: dict[tuple[int, int], str],
    depths: list[list[float]],
    dialect: str,
    system: str,
) -> dict:
    done = [question for question in questions if (question.record, question.point) in texts]
    said = [texts[question.record, question.point] for question in done]
    true = np.array([depths[question.record][question.point] for question in done])
    parse = parse_compact if dialect == "compact" else parse_depth
    strict = np.array([parse(text) or np.nan for text in said])
    right = np.maximum(strict / true, true / strict) < DELTA
    notebook = {}
    if system == "vlm3":
        delta1, counted = vlm3_delta1(said, true)
        notebook = {"delta1_vlm3_notebook": delta1 if counted else None, "left_out_vlm3_notebook": len(said) - counted}
    return {
        "protocol": protocol,
        "questions": len(questions),
        "answered_questions": len(done),
        "moved_on": sum(question.moved > 0 for question in questions),
        "not_askable": sum(not question.askable for question in questions),
        "delta1_published_metric": float(np.mean(verdicts(said, true))),
        "delta1_strict_parser": float(np.mean(right)),
        "unread_published_metric": sum(read_number(text) is None for text in said),
        "unread_strict_parser": int(np.isnan(strict).sum()),
        **notebook,
    }


def _bench_run(rows: LabelledImages, source: str, estimator, images: int) -> Run:
    card = estimator.card
    published = (card.system, estimator.policy) == ("depthvlm", "published")
    tally, failures, scores = Tally(images, match_px=0.0), [], []
    counts = {"points_asked": 0, "points_off_map": 0, "truth_from_list": 0}

    def answered() -> Iterator[AnsweredFrame]:
        for index in range(min(images, len(rows))):
            item = rows[index]
            row = rows.row(index, "pixel_coords", "depth", "original_rgb_size")
            width, height = item.image.shape[1], item.image.shape[0]
            listed = np.asarray(row["pixel_coords"], np.float64).reshape(-1, 2)
            pixels = listed * (np.array([width, height]) / row["original_rgb_size"])
            true, from_list = _bench_truth(rows, index, row, canonical_size(item.camera, card.focal_px), source)
            started = time.perf_counter()
            result = estimator.estimate(
                item.image, item.camera, pixels, dialect="dense", readout="published" if published else "exact"
            )
            seconds = time.perf_counter() - started
            scores.append(bench_delta1(result.depth_m, true))
            counts["points_asked"] += len(pixels)
            counts["points_off_map"] += int((~result.asked).sum())
            counts["truth_from_list"] += from_list
            yield _frame(item, result, seconds)

    for frame in progress(up_to_failure(answered(), failures), images, "depthvlm_bench"):
        tally.add(frame)
    figures = {
        "protocol": "depthvlm_bench",
        "delta1_mean_over_images": float(np.mean(scores)),
        **counts,
        "readout": "published" if published else "exact",
    }
    notes = (
        "listed points are taken as pixels of an image of original_rgb_size and true depth is read again from the "
        "shrunk or grown depth map, as published; in ScanNet++ files the points are those of the small depth map, so "
        "that all of them fall into the image's top left corner",
    )
    return finished(f"depthvlm_bench on {Path(source).name}", estimator, "dense", tally, notes, failures, figures)


def _bench_truth(
    rows: LabelledImages, index: int, row: dict, canonical: tuple[int, int], source: str
) -> tuple[np.ndarray, int]:
    """(N,) float32 true metres as the published program reads them, and how many come from the list of points."""
    depth_m = in_range(rows.raw_depth(index), source)
    resized = cv2.resize(depth_m, canonical, interpolation=cv2.INTER_NEAREST)
    gain = np.array(canonical) / row["original_rgb_size"]
    at = np.round(np.asarray(row["pixel_coords"], np.float64).reshape(-1, 2) * gain).astype(np.int64)
    inside = ((at >= 0) & (at < canonical)).all(axis=1)
    true = np.zeros(len(at), np.float32)
    true[inside] = resized[at[inside, 1], at[inside, 0]]
    from_list = inside & (true <= 0)
    true[from_list] = np.asarray(row["depth"], np.float32)[from_list]
    return true, int(from_list.sum())
