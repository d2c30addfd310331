"""Scores pair answers with truth fairly, and a report is one honest file."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from recordings import CAMERA, floor_depth, picture

from depthlm_ros.charts import UNKNOWN, paint_depth, view_cloud
from depthlm_ros.errors import BagError, DatasetError
from depthlm_ros.evaluate import AnsweredFrame, Run, Tally, compare, up_to_failure
from depthlm_ros.ply import read_ply, write_ply
from depthlm_ros.report import contact_sheet, metrics, page, summary, write_report


def answered(pixels, depth_m, truth_m, name="frame 0", latency_s=0.1):
    pixels = np.asarray(pixels, float).reshape(-1, 2)
    depth_m = np.asarray(depth_m, np.float32)
    return AnsweredFrame(name, picture(), CAMERA, pixels, depth_m, np.ones(len(depth_m)), truth_m, latency_s)


def labels(*points):
    truth = np.full((48, 64), np.nan, np.float32)
    for u, v, depth in points:
        truth[v, u] = depth
    return truth


def run_of(*frames, **figures):
    tally = Tally(len(frames))
    for frame in frames:
        tally.add(frame)
    return Run("Test <run>", tally, {"points_per_second": 12.0, **figures}, {"model": "m", "device": "cpu"}, ("a & b",))


def good_frame(factor=1.1, name="frame 0"):
    v, u = (a.reshape(-1) for a in np.mgrid[20:48:2, 0:64:2])
    return answered(np.stack([u, v], 1), floor_depth()[v, u] * factor, floor_depth(), name)


# Pairing answers with truth


def test_in_a_map_each_answer_meets_the_truth_at_its_own_pixel():
    compared = compare(answered([[3.2, 30.4], [10, 40]], [1, 2], floor_depth()))
    assert compared.true.tolist() == [floor_depth()[30, 3], floor_depth()[40, 10]]
    assert compared.predicted.tolist() == [1, 2]


def test_answers_about_unknown_truth_are_left_out():
    assert len(compare(answered([[3, 2]], [5], floor_depth())).true) == 0


def test_a_label_meets_its_nearest_answer():
    truth = labels((10, 10, 2.0))
    compared = compare(answered([[12, 10], [11, 10], [10, 12]], [5, 6, 7], truth), match_px=2)
    assert (compared.predicted.tolist(), compared.true.tolist(), compared.labels) == ([6], [2], 1)


def test_a_label_beyond_the_radius_is_left_out_but_counted():
    compared = compare(answered([[12, 12]], [5], labels((10, 10, 2.0))), match_px=2)
    assert (len(compared.true), compared.labels) == (0, 1)


def test_without_an_answer_a_label_is_wrong():
    run = run_of(answered([[10, 10], [20, 20]], [2.0, np.nan], labels((10, 10, 2.0), (20, 20, 3.0))))
    assert run.tally.scores()["depth"]["delta1"] == 0.5
    assert "2 of 2 true depths, 1 with an answer" in summary(run)
    assert "2 of 2 true depths, those at asked pixels; 1 have an answer" in page(run)


@given(st.lists(st.tuples(st.integers(0, 63), st.integers(0, 47)), min_size=1, max_size=40, unique=True), st.data())
def test_asking_at_the_labels_compares_every_one(points, data):
    order = data.draw(st.permutations(points))
    truth = labels(*((u, v, 1 + u + 100 * v) for u, v in points))
    compared = compare(answered(order, [1 + u + 100 * v for u, v in order], truth), match_px=0)
    assert len(compared.true) == len(points)
    assert np.array_equal(compared.predicted, compared.true)


def test_scores_stand_beside_baselines():
    scores = run_of(good_frame(1.1), good_frame(1.5, "frame 1")).tally.scores()
    assert scores["depth"]["delta1"] == 0.5
    assert scores["depth"]["abs_rel"] == pytest.approx(0.3, abs=1e-6)
    # The floor's depth is a function of the row, so the row prior is nearly right and a constant is not.
    assert scores["baselines"]["row_prior"]["delta1"] > 0.9 > scores["baselines"]["best_constant"]["delta1"]
    assert scores["delta1_interval_95"] == [0.0, 1.0]


def test_pictures_are_spread_over_the_frames_not_chosen_by_score():
    tally = Tally(11)
    for index in range(11):
        tally.add(good_frame(1 + index, f"frame {index}"))
    assert [frame.name for frame in tally.pictures] == [f"frame {i}" for i in (0, 2, 4, 6, 8, 10)]


# Files


def test_ply_comes_back_without_the_points_that_have_no_place(tmp_path):
    xyz = np.array([[1, 2, 3], [np.nan, 0, 1], [-1, 0.5, 9]])
    rgb = np.array([[255, 0, 1], [0, 0, 0], [9, 8, 7]], np.uint8)
    assert write_ply(tmp_path / "sub" / "c.ply", xyz, rgb, np.array([0.5, 1, 0.25]), "made\nhere") == 2
    cloud = read_ply(tmp_path / "sub" / "c.ply")
    assert cloud["z"].tolist() == [3, 9]
    assert cloud["red"].tolist() == [255, 9]
    assert cloud["confidence"].tolist() == [0.5, 0.25]
    header = (tmp_path / "sub" / "c.ply").read_bytes().split(b"end_header\n")[0].decode().splitlines()
    assert header[:3] == ["ply", "format binary_little_endian 1.0", "comment made here"]


def test_a_truncated_ply_is_named(tmp_path):
    path = tmp_path / "c.ply"
    write_ply(path, np.ones((3, 3)), np.zeros((3, 3), np.uint8), np.ones(3))
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(DatasetError, match="for 3 points; it is truncated"):
        read_ply(path)


def test_report_is_one_file_that_loads_nothing(tmp_path):
    paths = write_report(
        tmp_path, run_of(good_frame(), good_frame(1.3, "frame 1"), latency_p50_s=0.1, latency_p95_s=0.2)
    )
    assert [path.name for path in paths] == ["report.html", "metrics.json", "cloud.ply", "picture.png"]
    text = (tmp_path / "report.html").read_text()
    assert text.count("data:image/jpeg;base64,") == 2 * 4
    assert not re.findall(r"(?:src|href)=\"(?!data:)|url\(|@import|<script", text)
    assert "Test &lt;run&gt;" in text
    assert "a &amp; b" in text


def test_metrics_are_valid_json_where_nothing_was_answered(tmp_path):
    frame = answered(np.empty((0, 2)), [], floor_depth())
    write_report(tmp_path, run_of(frame))
    saved = json.loads((tmp_path / "metrics.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert "depth" not in saved
    assert saved["frames"][0]["delta1"] is None
    assert len(read_ply(tmp_path / "cloud.ply")) == 0


def test_a_run_without_answers_leaves_no_cloud_of_an_earlier_one(tmp_path):
    write_report(tmp_path, run_of(good_frame()))
    write_report(tmp_path, run_of())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.json", "report.html"]


def test_cloud_holds_the_answered_points_of_the_middle_frame(tmp_path):
    frame = good_frame()
    write_report(tmp_path, run_of(frame))
    cloud = read_ply(tmp_path / "cloud.ply")
    expected = CAMERA.unproject(frame.pixels, frame.depth_m)
    assert np.stack([cloud[axis] for axis in "xyz"], 1) == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_summary_has_score_baselines_and_frames():
    run = run_of(good_frame(), frames_sent=3, frames_answered=1, frames_dropped=2)
    text = summary(run)
    assert "δ1            1" in text
    assert "best constant" in text and "row prior" in text
    assert "3 sent, 1 answered, 2 dropped" in text


def test_what_the_model_is_stands_in_summary_page_and_json():
    run = replace(run_of(good_frame()), about_model="toy: not for robots")
    assert all("toy: not for robots" in text for text in (summary(run), page(run), json.dumps(metrics(run))))


def test_what_came_before_a_failure_is_kept_with_the_reason():
    def frames():
        yield from "ab"
        raise BagError("damaged at byte 7")

    failures = []
    assert list(up_to_failure(frames(), failures)) == ["a", "b"]
    assert failures == ["broke off after 2 images: damaged at byte 7"]
    run = replace(run_of(good_frame()), broke_off=failures[0])
    assert all("damaged at byte 7" in text for text in (summary(run), page(run), json.dumps(metrics(run))))


def test_a_source_that_gives_nothing_fails_as_it_is():
    def frames():
        raise BagError("damaged at byte 7")
        yield

    with pytest.raises(BagError, match="byte 7"):
        list(up_to_failure(frames(), []))


def test_scores_in_the_page_are_those_of_the_json():
    run = run_of(good_frame(1.1), good_frame(1.5, "frame 1"))
    assert metrics(run)["depth"]["delta1"] == run.tally.scores()["depth"]["delta1"] == 0.5


def test_unknown_depth_is_painted_as_such():
    painted = paint_depth(floor_depth(), picture(), 1, 40)
    assert (painted[0] == UNKNOWN).all()
    assert not (painted[40] == UNKNOWN).all(axis=-1).any()


def test_sparse_depth_is_dots_on_the_darkened_picture():
    painted = paint_depth(labels((30, 20, 2.0)), picture(), 1, 4)
    assert painted[40, 5].max() < 110
    assert np.ptp(painted[20, 30].astype(int)) > 60


def test_contact_sheet_has_a_row_for_each_frame_up_to_three():
    heights = [contact_sheet(run_of(*(good_frame(name=f"frame {i}") for i in range(n)))).shape[0] for n in (1, 3, 5)]
    assert heights[0] < heights[1] == heights[2]


def test_a_cloud_without_points_is_an_empty_picture():
    assert (view_cloud(np.full((4, 3), np.nan), np.zeros((4, 3), np.uint8), (40, 30)) == UNKNOWN).all()
