"""Which points DepthLM's published evaluations ask, and in which order.

    dataset_eval        the published figures: a drawn point of each image in turn
    dataset_inference   the deterministic variant: every point of every image once
    depthvlm_bench      DepthVLM's, in `depthvlm_bench.py`; `benchmark.py` runs all three

They are followed where figures hang on them, peculiarities included. Where the published program stops with an error
there is no order to follow: such cases are errors here too, or are reported as not askable.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from depthlm_ros.errors import DatasetError

PROTOCOLS = ("dataset_eval", "dataset_inference", "depthvlm_bench")
DEPTHLM_PROTOCOLS = PROTOCOLS[:2]

# `--samples_to_eval` of DepthLM's eval.py where nobody says otherwise; the paper took 8192.
PUBLISHED_SAMPLES = 128
_SEED = 42
# A labels path with this text in it is split: the first 98 % of its records are training data.
_SPLIT_NAME, _TRAINING_SHARE = "scannet", 0.98

# (record, point) -> whether the question can be put at all.
Askable = Callable[[int, int], bool]


@dataclass(frozen=True)
class Question:
    """One sample of a protocol.

    Attributes:
        index: its number in the protocol.
        record: which row of the labels file.
        point: which of the row's points.
        moved: by how many samples the protocol went on because the point's arrow couldn't be drawn.
        askable: False where it can't be drawn and the protocol stays with it.
    """

    index: int
    record: int
    point: int
    moved: int = 0
    askable: bool = True


def evaluated_records(count: int, path: str) -> list[int]:
    """Rows of a labels file that DepthLM evaluates, in its order: all, or the last 2 % of a ScanNet++ file, shuffled.

    Args:
        count: rows in the file.
        path: of the file as it was named; the rule looks for "scannet" in it.

    Raises:
        DatasetError: the file has no rows.
    """
    if count < 1:
        raise DatasetError(f"{path} has no rows; there is nothing to evaluate")
    records = list(range(count))
    if _SPLIT_NAME in path:
        records = records[int(count * _TRAINING_SHARE) :]
        random.Random(_SEED).shuffle(records)
    return records


def dataset_eval(
    points: Sequence[int], records: Sequence[int], askable: Askable, samples: int = PUBLISHED_SAMPLES
) -> Iterator[Question]:
    """DepthLM's evaluation order.

    With N records and P points in the *first* of them there are N P samples. A point number is drawn for each of them
    beforehand, with replacement, so points repeat. Sample i is of image i mod N. Where its arrow can't be drawn,
    sample i + 1 (after the last one the first) is asked in its place, and again in its own.

    Args:
        points: number of points of each row of the file.
        records: `evaluated_records`.
        askable: tells whether a point's arrow can be drawn.
        samples: how many of the first samples; 0 takes all.

    Raises:
        DatasetError: a drawn point that its row doesn't have, or no point at all that can be asked.
    """
    per_record = points[records[0]]
    total = len(records) * per_record
    stream = random.Random(_SEED)
    drawn = [stream.sample(range(per_record), 1)[0] for _ in range(total)]
    for index in range(min(samples or total, total)):
        for moved in range(total):
            at = (index + moved) % total
            record, point = records[at % len(records)], drawn[at]
            if point >= points[record]:
                raise DatasetError(
                    f"row {record + 1} has {points[record]} points, the first evaluated row has {per_record}, and "
                    f"dataset_eval draws point {point + 1}; the published program stops here. Use dataset_inference, "
                    "or labels with the same number of points in every row"
                )
            if askable(record, point):
                yield Question(index, record, point, moved)
                break
        else:
            raise DatasetError("not one labelled point is far enough from the image border to draw an arrow at it")


def dataset_inference(
    points: Sequence[int], records: Sequence[int], askable: Askable, samples: int = PUBLISHED_SAMPLES
) -> Iterator[Question]:
    """DepthLM's deterministic order: all points of the first image, then of the second, each once.

    The published program stops at a point whose arrow can't be drawn, and pairs images with the wrong counts where a
    ScanNet++ file is split. Here the point is yielded as not askable, and counts are those of the records left.

    Args:
        points: number of points of each row of the file.
        records: `evaluated_records`.
        askable: tells whether a point's arrow can be drawn.
        samples: how many of the first samples; 0 takes all.
    """
    pairs = ((record, point) for record in records for point in range(points[record]))
    for index, (record, point) in enumerate(pairs):
        if samples and index >= samples:
            return
        yield Question(index, record, point, askable=askable(record, point))


ORDERS = {"dataset_eval": dataset_eval, "dataset_inference": dataset_inference}
