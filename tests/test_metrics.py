"""Scores by hand, baselines against brute force, intervals against what they promise."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from depthlm_ros.errors import ConfigError, DatasetError
from depthlm_ros.metrics import best_constant, delta1_interval, depth_metrics, row_prior

depth_lists = st.lists(st.floats(0.01, 200), min_size=1, max_size=40)


def test_scores_equal_those_worked_out_by_hand():
    m = depth_metrics([1.0, 2.0, 4.0, 8.0], [1.0, 2.4, 4.0, 4.0])
    logs = np.array([0, math.log(2 / 2.4), 0, math.log(2)])
    assert (m.delta1, m.delta2, m.delta3) == (0.75, 0.75, 0.75)
    assert m.abs_rel == pytest.approx((0.4 / 2.4 + 1) / 4)
    assert m.rmse == pytest.approx(math.sqrt((0.4**2 + 4**2) / 4))
    assert m.rmse_log == pytest.approx(math.sqrt((logs**2).mean()))
    assert m.log10 == pytest.approx((math.log10(1.2) + math.log10(2)) / 4)
    assert m.silog == pytest.approx(100 * math.sqrt((logs**2).mean() - logs.mean() ** 2))
    assert m.median_scale == 1.0
    assert (m.answered, m.total) == (4, 4)


def test_each_delta_has_its_own_limit():
    m = depth_metrics([1.2, 1.5, 1.9, 2.0], np.ones(4))
    assert (m.delta1, m.delta2, m.delta3) == (0.25, 0.5, 0.75)


def test_a_ratio_of_exactly_125_percent_is_wrong():
    assert depth_metrics([1.25, 1.0], [1.0, 1.25]).delta1 == 0


@pytest.mark.parametrize("missing", [math.nan, math.inf, 0.0, -2.0])
def test_a_missing_answer_is_wrong_and_counted(missing):
    m = depth_metrics([2.0, missing], [2.0, 2.0])
    assert (m.delta1, m.answered, m.total) == (0.5, 1, 2)
    assert m.abs_rel == 0


@pytest.mark.parametrize("unknown", [math.nan, math.inf, 0.0, -2.0])
def test_a_point_without_truth_is_ignored(unknown):
    m = depth_metrics([2.0, 7.0], [2.0, unknown])
    assert (m.delta1, m.answered, m.total) == (1.0, 1, 1)


def test_no_answer_at_all_scores_zero():
    m = depth_metrics([math.nan, math.nan], [1.0, 2.0])
    assert (m.delta1, m.answered, m.total) == (0.0, 0, 2)
    assert math.isnan(m.abs_rel)


def test_no_truth_at_all_is_no_score_and_still_json():
    m = depth_metrics([1.0], [math.nan])
    assert math.isnan(m.delta1) and m.total == 0
    assert json.loads(json.dumps(m.to_json(), allow_nan=False))["delta1"] is None


def test_maps_are_scored_like_lists():
    pred, true = np.array([[1.0, 2.0], [3.0, 4.0]]), np.array([[1.0, 1.0], [3.0, math.nan]])
    assert depth_metrics(pred, true) == depth_metrics(pred.ravel(), true.ravel())


def test_arrays_of_different_shapes_are_refused():
    with pytest.raises(DatasetError, match=r"\(2,\) and \(3,\)"):
        depth_metrics(np.ones(2), np.ones(3))


@settings(deadline=None)
@given(depth_lists, st.floats(0.2, 5))
def test_scale_invariant_log_ignores_scale_and_median_scale_finds_it(true, scale):
    m = depth_metrics(np.array(true) * scale, true)
    assert m.silog == pytest.approx(0, abs=1e-5)
    assert m.median_scale == pytest.approx(scale)


@settings(deadline=None)
@given(depth_lists)
def test_no_constant_beats_the_best_constant(true):
    constant, delta1 = best_constant(true)
    assert depth_metrics(np.full(len(true), constant), true).delta1 == delta1
    # An optimal window can be pushed up until its lower edge nearly meets a depth.
    rivals = np.concatenate([np.array(true) * f for f in (1 / 1.2499999, 0.9, 1.0, 1.1, 1.2499999)])
    assert max(depth_metrics(np.full(len(true), c), true).delta1 for c in rivals) <= delta1


def test_best_constant_lies_in_the_densest_part():
    constant, delta1 = best_constant([2.0, 2.1, 2.2, 9.0, 40.0, math.nan, 0.0])
    assert 2.0 < constant < 2.2
    assert delta1 == 0.6


def test_best_constant_of_many_depths_is_quick_and_exact():
    true = np.exp(np.random.default_rng(0).normal(1, 1, 200_000))
    constant, delta1 = best_constant(true)
    assert constant == pytest.approx(math.e, rel=0.1)
    # P(|N(0, 1)| < ln 1.25)
    assert delta1 == pytest.approx(math.erf(math.log(1.25) / math.sqrt(2)), abs=0.005)


def test_best_constant_of_nothing_is_refused():
    with pytest.raises(DatasetError, match="none of 2 depths"):
        best_constant([math.nan, -1.0])


def test_row_prior_learns_the_geometric_mean_of_each_band():
    prior = row_prior([0, 0, 9, 9], 10, [2.0, 8.0, 1.0, 1.0], bins=2)
    np.testing.assert_allclose(prior.predict(np.array([0, 4, 5, 9]), 10), [4, 4, 1, 1], rtol=1e-6)


def test_row_prior_can_learn_the_plain_mean_or_the_best_constant():
    rows, depths = [0, 0, 0], [2.0, 2.0, 8.0]
    assert row_prior(rows, 1, depths, bins=1, statistic="arithmetic").depth_m == pytest.approx(4)
    assert row_prior(rows, 1, depths, bins=1, statistic="best_constant").depth_m == pytest.approx(2)


def test_row_prior_goes_by_relative_rows_so_that_image_sizes_mix():
    prior = row_prior(np.array([0, 479, 0, 191]), np.array([480, 480, 192, 192]), [8.0, 1.0, 8.0, 1.0], bins=4)
    np.testing.assert_allclose(prior.predict(np.array([0, 1079]), 1080), [8, 1], rtol=1e-6)


def test_row_prior_bridges_bands_without_a_point():
    prior = row_prior([0, 2], 3, [1.0, 4.0], bins=3)
    np.testing.assert_allclose(prior.depth_m, [1, 2, 4])


def test_row_prior_ignores_unknown_depth():
    assert row_prior([0, 0], 1, [3.0, math.nan], bins=1).depth_m == pytest.approx(3)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.floats(0.1, 100)), min_size=1, max_size=60))
def test_best_constant_prior_is_at_least_as_good_as_the_others_on_its_own_points(points):
    rows, true = (np.array(column) for column in zip(*points, strict=True))
    scores = {
        statistic: depth_metrics(row_prior(rows, 10, true, bins=5, statistic=statistic).depth_m[rows // 2], true).delta1
        for statistic in ("geometric", "arithmetic", "best_constant")
    }
    assert scores["best_constant"] >= max(scores.values()) - 1e-12


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: row_prior([5], 5, [1.0]), DatasetError, "row 5 is outside"),
        (lambda: row_prior([0], 5, [math.nan]), DatasetError, "none of 1 depths"),
        (lambda: row_prior([0], 5, [1.0], statistic="mean"), ConfigError, "unknown row prior statistic 'mean'"),
        (lambda: row_prior([0], 5, [1.0], bins=0), ConfigError, "bins is 0"),
        (lambda: delta1_interval([1.0], [1.0], [1, 2]), DatasetError, "2 groups for 1 points"),
    ],
)
def test_faulty_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_interval_covers_the_true_delta1_about_as_often_as_it_says():
    rng = np.random.default_rng(1)
    covered = 0
    for trial in range(100):
        # Images whose share of right answers scatters around 0.6: points of one image err together.
        share = rng.beta(6, 4, size=40)
        right = rng.random((40, 20)) < share[:, None]
        pred = np.where(right, 1.0, 3.0).ravel()
        low, high = delta1_interval(pred, np.ones(800), np.repeat(np.arange(40), 20), samples=400, seed=trial)
        covered += low <= 0.6 <= high
    assert 88 <= covered <= 100


def test_interval_over_groups_is_wider_than_over_points_when_images_err_together():
    pred = np.repeat(np.where(np.arange(30) % 2 == 0, 1.0, 3.0), 50)
    by_image = delta1_interval(pred, np.ones(1500), np.repeat(np.arange(30), 50))
    by_point = delta1_interval(pred, np.ones(1500), np.arange(1500))
    assert by_image[1] - by_image[0] > 4 * (by_point[1] - by_point[0])


def test_interval_holds_the_score_and_repeats():
    pred, groups = np.tile([1.0, 1.0, 3.0, math.nan], 25), np.repeat(np.arange(20), 5)
    low, high = delta1_interval(pred, np.ones(100), groups)
    assert low <= depth_metrics(pred, np.ones(100)).delta1 <= high
    assert (low, high) == delta1_interval(pred, np.ones(100), groups)


def test_one_image_gives_no_interval():
    assert all(map(math.isnan, delta1_interval([1.0, 2.0], [1.0, 1.0], ["a", "a"])))
