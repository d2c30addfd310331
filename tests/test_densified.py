"""Depth between asked points is scored by itself, where nobody asked."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
from recordings import CAMERA, drive, floor_depth, picture, write_depthlm_labels

from depthlm_ros.bags import write_bag
from depthlm_ros.densified import Between, Densified, compare_between, densified_scores, near_edges
from depthlm_ros.depth import DepthResult
from depthlm_ros.engines.base import EngineInfo
from depthlm_ros.evaluate import AnsweredFrame, Run, Tally, evaluate
from depthlm_ros.report import metrics, page, summary

PIXELS = np.array([[3, 30], [40, 40]], np.float32)


class Oracle:
    """Says the floor's depth of every pixel, 20 % too far."""

    def __init__(self) -> None:
        self.calls: list[np.ndarray] = []
        self.calibration = None
        self.card = SimpleNamespace(
            default_dialect="coordinates", name="oracle", about="", require_dialect=lambda dialect: dialect
        )
        self.engine = SimpleNamespace(
            info=EngineInfo("none", "oracle", "none", "cpu", "float32", ("it is a test",), 0, True)
        )

    def describe(self) -> list[str]:
        return ["an oracle"]

    def estimate(self, image, camera, pixels, *, dialect, **options) -> DepthResult:
        self.calls.append(pixels)
        u, v = pixels.astype(int).T
        n = len(pixels)
        depth_m = np.nan_to_num(floor_depth()[v, u], nan=50) * 1.2
        return DepthResult(pixels, depth_m.astype(np.float32), np.full(n, 0.5, np.float32), np.ones(n, bool), dialect)


def between(predicted, true, near=False) -> Between:
    true = np.asarray(true, float)
    return Between(np.asarray(predicted, float), true, np.broadcast_to(near, true.shape))


def test_asked_pixels_are_not_scored_as_filled_in():
    truth = floor_depth()
    pairs = compare_between(Densified(truth * 2, PIXELS), truth)
    assert len(pairs.true) == np.isfinite(truth).sum() - 2
    np.testing.assert_allclose(pairs.predicted, pairs.true * 2)


def test_what_was_not_filled_in_counts_as_wrong():
    scores = densified_scores([between([1, np.nan], [1, 2]), between([3], [3])])
    assert scores["depth"]["delta1"] == pytest.approx(2 / 3)
    assert (scores["depth"]["answered"], scores["pixels"]) == (2, 3)


def test_images_are_drawn_for_the_interval():
    assert densified_scores([between([1, 1], [1, 2]), between([3], [3])])["delta1_interval_95"] == [0.5, 1.0]
    assert densified_scores([between([1, 1], [1, 2])])["delta1_interval_95"] is None


def test_pixels_near_edges_are_scored_once_more_by_themselves():
    scores = densified_scores([between([1, 1, 1], [1, 1, 9], [False, False, True])])
    assert (scores["near_edges"]["pixels"], scores["near_edges"]["depth"]["delta1"]) == (1, 0)
    assert densified_scores([between([1], [1])])["near_edges"] is None


def test_an_edge_is_a_jump_and_neither_a_slope_nor_the_end_of_what_is_known():
    truth = np.full((64, 640), 2, np.float32)
    truth[:, 320:] = 3
    truth[:, 600:] = np.nan
    near = np.flatnonzero(near_edges(truth)[32])
    assert (near.min(), near.max()) == (311, 328)
    assert not near_edges(np.tile(np.linspace(2, 9, 640, dtype=np.float32), (64, 1))).any()


def test_nothing_to_compare_gives_no_scores():
    assert densified_scores([]) == {} == densified_scores([between([], [])])


def test_report_and_json_tell_asked_points_from_filled_in_ones():
    truth = floor_depth()
    tally = Tally(2)
    for factor in (1.0, 1.5):
        u, v = PIXELS.astype(int).T
        tally.add(
            AnsweredFrame(
                "f", picture(), CAMERA, PIXELS, truth[v, u], np.ones(2), truth, 0.1,
                densified=Densified(truth * factor, PIXELS),
            )
        )  # fmt: skip
    run = Run("Test", tally, {"points_per_second": 1.0}, {})
    assert metrics(run)["depth"]["delta1"] == 1
    assert metrics(run)["densified"]["depth"]["delta1"] == 0.5
    assert "δ1, between   0.5 (0.000 to 1.000)" in summary(run)
    assert "Depth at asked points" in page(run) and "Depth between asked points, filled in" in page(run)


@pytest.mark.parametrize("sampling", ["blue_noise", "edges", "uncertainty"])
def test_where_truth_is_a_map_points_are_placed_and_all_others_filled_in(tmp_path, sampling):
    write_bag(tmp_path / "bag", drive(2))
    oracle = Oracle()
    run = evaluate(tmp_path / "bag", oracle, points=40, densify=True, sampling=sampling)
    scores = json.loads(json.dumps(metrics(run)))
    known = np.isfinite(floor_depth()).sum()
    assert sum(map(len, oracle.calls)) == 2 * 40
    assert scores["compared"] + scores["densified"]["pixels"] == 2 * known
    assert scores["depth"]["delta1"] == 1
    assert scores["densified"]["depth"]["delta1"] > 0.7
    assert f"40 points an image, sampling {sampling}" in " ".join(run.notes)


def test_where_truth_is_a_list_the_labels_are_asked_and_filled_in_without_them(tmp_path):
    oracle = Oracle()
    run = evaluate(write_depthlm_labels(tmp_path), oracle, points=50, densify=True)
    scores = metrics(run)
    assert [len(pixels) for pixels in oracle.calls] == [50, 5, 50, 5]
    assert (scores["compared"], scores["labels"]) == (10, 10)
    assert scores["densified"]["pixels"] >= 9


def test_nothing_is_filled_in_unless_wanted(tmp_path):
    oracle = Oracle()
    assert "densified" not in metrics(evaluate(write_depthlm_labels(tmp_path), oracle))
    assert [len(pixels) for pixels in oracle.calls] == [5, 5]
