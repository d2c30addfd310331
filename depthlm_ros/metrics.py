"""How good depths are: the usual scores, the baselines they have to beat, and how sure the figures are.

Scores are those of Eigen et al. (2014) and the KITTI depth benchmark, over all points pooled. Two rules make
systems comparable: a point without an answer is wrong in every delta (VLM3's notebook leaves it out), and nothing is
rescaled to fit the truth.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import numpy as np

from depthlm_ros.errors import ConfigError, DatasetError, unknown_choice

DELTA = 1.25
ROW_STATISTICS = ("geometric", "arithmetic", "best_constant")


@dataclass(frozen=True)
class DepthMetrics:
    """Scores over the points that have a valid true depth.

    delta1..3 are shares of `total`; the other scores are over the `answered` points, NaN where there are none.

    Attributes:
        delta1: share of points with max(pred / true, true / pred) < 1.25.
        delta2: the same below 1.25^2.
        delta3: the same below 1.25^3.
        abs_rel: mean of |pred - true| / true.
        rmse: root mean square error in metres.
        rmse_log: root mean square of ln pred - ln true.
        log10: mean of |log10 pred - log10 true|.
        silog: 100 times the standard deviation of ln pred - ln true, as on the KITTI benchmark.
        median_scale: median of pred / true; 1 is metric, 1.1 is 10 % too far.
        answered: points with a finite positive prediction.
        total: points with a finite positive true depth.
    """

    delta1: float
    delta2: float
    delta3: float
    abs_rel: float
    rmse: float
    rmse_log: float
    log10: float
    silog: float
    median_scale: float
    answered: int
    total: int

    def to_json(self) -> dict[str, float | int | None]:
        """The scores by name, None instead of NaN, which JSON doesn't know."""
        return {name: None if math.isnan(value) else value for name, value in asdict(self).items()}


def depth_metrics(pred: np.ndarray, true: np.ndarray) -> DepthMetrics:
    """Scores predictions against true depths.

    Args:
        pred: (N,) metres; NaN, infinite, zero or negative where there is no answer.
        true: (N,) metres, of the same kind of depth; rows that aren't finite and positive are ignored.

    Raises:
        DatasetError: arrays of different shapes.
    """
    pred, true = _same_shape(pred, true)
    pred = pred[_usable(true)]
    true = true[_usable(true)]
    answered = _usable(pred)
    pred, truth = pred[answered], true[answered]
    if not len(true):
        return DepthMetrics(*[math.nan] * 9, answered=0, total=0)
    ratio = np.maximum(pred / truth, truth / pred)
    deltas = [float(np.count_nonzero(ratio < DELTA**power) / len(true)) for power in (1, 2, 3)]
    if not len(pred):
        return DepthMetrics(*deltas, *[math.nan] * 6, answered=0, total=len(true))
    log_error = np.log(pred) - np.log(truth)
    return DepthMetrics(
        *deltas,
        abs_rel=float(np.mean(np.abs(pred - truth) / truth)),
        rmse=float(np.sqrt(np.mean((pred - truth) ** 2))),
        rmse_log=float(np.sqrt(np.mean(log_error**2))),
        log10=float(np.mean(np.abs(log_error)) / math.log(10)),
        silog=float(100 * np.std(log_error)),
        median_scale=float(np.median(pred / truth)),
        answered=len(pred),
        total=len(true),
    )


def delta1_interval(
    pred: np.ndarray,
    true: np.ndarray,
    groups: np.ndarray,
    *,
    level: float = 0.95,
    samples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Bootstrap confidence interval of delta1, drawing whole groups.

    Points of one image err together, so images are drawn and not points: an interval over points would be far too
    narrow. Percentile method, deterministic in `seed`.

    Args:
        pred: (N,) metres, as for `depth_metrics`.
        true: (N,) metres.
        groups: (N,) label of the image (or drive) each point comes from.
        level: share of the bootstrap's delta1 inside the interval.
        samples: bootstrap draws.
        seed: of the draws.

    Returns:
        (low, high); NaN, NaN where fewer than two groups have a valid true depth, since one image says nothing
        about the next.

    Raises:
        DatasetError: arrays of different shapes.
    """
    pred, true = _same_shape(pred, true)
    groups = np.asarray(groups).reshape(-1)
    if len(groups) != len(true):
        raise DatasetError(f"{len(groups)} groups for {len(true)} points; give one group label for each point")
    valid = _usable(true)
    _, label = np.unique(groups[valid], return_inverse=True)
    n_groups = int(label.max()) + 1 if len(label) else 0
    if n_groups < 2:
        return math.nan, math.nan
    totals = np.bincount(label, minlength=n_groups)
    correct = np.bincount(label, weights=_correct(pred[valid], true[valid]), minlength=n_groups)
    draws = np.random.default_rng(seed).multinomial(n_groups, np.full(n_groups, 1 / n_groups), size=samples)
    delta1 = (draws @ correct) / (draws @ totals)
    low, high = np.quantile(delta1, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def best_constant(true: np.ndarray) -> tuple[float, float]:
    """The one answer to every question that has the highest delta1 on these very points.

    An oracle: no real constant does better. On a log axis a constant is right for the points in an open window of
    width 2 ln 1.25 around it, so the fullest window over the sorted logs is the exact answer. O(n log n).

    Args:
        true: metres, any shape; values that aren't finite and positive are ignored.

    Returns:
        (constant in metres, its delta1).

    Raises:
        DatasetError: no valid depth.
    """
    depths = _valid_depths(true)
    logs = np.sort(np.log(depths))
    # A hair narrower than the window, so that rounding can't count a point on its open edge.
    ends = np.searchsorted(logs, logs + 2 * math.log(DELTA) - 1e-12)
    first = int(np.argmax(ends - np.arange(len(logs))))
    constant = math.exp((logs[first] + logs[ends[first] - 1]) / 2)
    return constant, float(np.mean(_correct(np.full(len(depths), constant), depths)))


@dataclass(frozen=True)
class RowPrior:
    """Depth known from nothing but the row in the image: floor below, far things at the horizon.

    Attributes:
        depth_m: (bins,) metres from the top of the image to its bottom.
        statistic: what stands for a bin, one of `ROW_STATISTICS`.
    """

    depth_m: np.ndarray
    statistic: str

    def predict(self, rows: np.ndarray, height: int | np.ndarray) -> np.ndarray:
        """Depth at pixel rows.

        Args:
            rows: (N,) row `v` of each point.
            height: image height in pixels, one number or (N,).

        Returns:
            (N,) float32 metres.
        """
        return self.depth_m[_row_bins(rows, height, len(self.depth_m))].astype(np.float32)


def row_prior(
    rows: np.ndarray, height: int | np.ndarray, depth_m: np.ndarray, *, bins: int = 64, statistic: str = "geometric"
) -> RowPrior:
    """Learns the depth of each relative image row.

    Statistics:
        geometric: exp(mean(ln depth)); the mean that fits errors counted as ratios, hence the default.
        arithmetic: the plain mean; far points pull it up.
        best_constant: the value with the highest delta1 in the bin, the strongest prior by that score.

    Learn it on the training set; learnt on the points it is scored on it is an oracle and has to be called one.

    Args:
        rows: (N,) row `v` of each point, 0 at the top.
        height: image height in pixels, one number or (N,).
        depth_m: (N,) true depth in metres; values that aren't finite and positive are ignored.
        bins: number of equal bands from top to bottom. Bands without a point get the log depth between their
            neighbours.
        statistic: one of `ROW_STATISTICS`.

    Raises:
        DatasetError: no valid depth, different shapes, or a row outside its image.
        ConfigError: an unknown statistic or fewer than 1 bin.
    """
    if statistic not in ROW_STATISTICS:
        raise ConfigError(unknown_choice("row prior statistic", statistic, ROW_STATISTICS))
    if bins < 1:
        raise ConfigError(f"bins is {bins}; a row prior needs at least 1")
    rows, depths = _same_shape(rows, depth_m)
    index = _row_bins(rows, height, bins)
    valid = _usable(depths)
    if not valid.any():
        raise DatasetError(f"none of {len(depths)} depths is finite and positive; nothing to learn a row prior from")
    index, depths = index[valid], depths[valid]
    counts = np.bincount(index, minlength=bins)
    filled = np.flatnonzero(counts)
    if statistic == "best_constant":
        order = np.argsort(index, kind="stable")
        values = [best_constant(part)[0] for part in np.split(depths[order], np.cumsum(counts[filled])[:-1])]
        logs = np.log(values)
    elif statistic == "arithmetic":
        logs = np.log(np.bincount(index, weights=depths, minlength=bins)[filled] / counts[filled])
    else:
        logs = np.bincount(index, weights=np.log(depths), minlength=bins)[filled] / counts[filled]
    return RowPrior(np.exp(np.interp(np.arange(bins), filled, logs)), statistic)


def _row_bins(rows: np.ndarray, height: int | np.ndarray, bins: int) -> np.ndarray:
    # Pixel centres are integers, so row v covers v - 0.5 to v + 0.5.
    relative = (np.asarray(rows, dtype=np.float64).reshape(-1) + 0.5) / height
    if not ((relative >= 0) & (relative <= 1)).all():
        seen = np.asarray(rows).reshape(-1)[~((relative >= 0) & (relative <= 1))][0]
        raise DatasetError(f"row {seen:g} is outside its image (height {np.max(height)}); give pixel rows")
    return np.minimum((relative * bins).astype(np.int64), bins - 1)


def within_delta1(pred: np.ndarray, true: np.ndarray) -> np.ndarray:
    """(N,) bool: within a factor 1.25 of the true depth; False without a finite positive prediction or truth."""
    pred, true = _same_shape(pred, true)
    known = _usable(true)
    right = np.zeros(len(true), bool)
    right[known] = _correct(pred[known], true[known])
    return right


def _usable(depths: np.ndarray) -> np.ndarray:
    return np.isfinite(depths) & (depths > 0)


def _correct(pred: np.ndarray, true: np.ndarray) -> np.ndarray:
    """(N,) bool: within a factor 1.25 of a valid truth."""
    right = np.zeros(len(true), dtype=bool)
    answered = _usable(pred)
    ratio = pred[answered] / true[answered]
    right[answered] = np.maximum(ratio, 1 / ratio) < DELTA
    return right


def _valid_depths(true: np.ndarray) -> np.ndarray:
    depths = np.asarray(true, dtype=np.float64).reshape(-1)
    valid = depths[_usable(depths)]
    if not len(valid):
        raise DatasetError(f"none of {len(depths)} depths is finite and positive; there is nothing to measure")
    return valid


def _same_shape(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    first, second = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if first.shape != second.shape:
        raise DatasetError(f"arrays of shapes {first.shape} and {second.shape}; give one value for each point")
    return first.reshape(-1), second.reshape(-1)
