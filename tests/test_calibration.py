"""A calibrated confidence is the share of right depths, on frames that didn't calibrate it."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recordings import CAMERA, picture

from depthlm_ros.calibration import Calibration, Kind, calibrated_elsewhere, reliability
from depthlm_ros.errors import ConfigError, DatasetError
from depthlm_ros.evaluate import AnsweredFrame, Run, Tally
from depthlm_ros.report import metrics, page, summary, write_report

KIND = Kind("demo", "coordinates", "median", True)


def boaster(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Confidences that claim c where c² is right; verdicts; frames of 20."""
    rng = np.random.default_rng(seed)
    confidence = rng.uniform(0.2, 1, count)
    return confidence, rng.random(count) < confidence**2, np.arange(count) // 20


# The curve


def test_a_boaster_is_taken_at_its_true_worth():
    confidence, right, frames = boaster(20_000)
    fitted = Calibration.fit(confidence, right, frames, KIND)
    np.testing.assert_allclose(fitted.apply(np.array([0.4, 0.6, 0.8])), [0.16, 0.36, 0.64], atol=0.04)
    assert (fitted.points, fitted.frames) == (20_000, 1000)


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=300))
def test_the_curve_rises_within_0_and_1_and_is_never_certain(pairs):
    confidence, right = (np.array(values) for values in zip(*pairs, strict=True))
    fitted = Calibration.fit(confidence, right)
    values = fitted.apply(np.linspace(0.001, 1, 200))
    assert (np.diff(values) >= -1e-6).all() and values.min() > 0 and values.max() < 1


@settings(deadline=None)
@given(st.lists(st.booleans(), min_size=30, max_size=200))
def test_confidence_that_says_nothing_becomes_the_share_that_is_right(right):
    fitted = Calibration.fit(np.full(len(right), 0.5), np.array(right))
    share = (sum(right) + 1) / (len(right) + 2)
    assert fitted.apply(np.array([0.5]))[0] == pytest.approx(share, abs=0.05)


def test_no_answer_stays_no_answer():
    fitted = Calibration((0.2, 0.8), (0.5, 0.9), 100, 5)
    assert fitted.apply(np.array([0.0, 0.1, 0.9])).tolist() == pytest.approx([0, 0.5, 0.9])


def test_a_curve_that_falls_is_refused():
    with pytest.raises(ConfigError, match="doesn't rise"):
        Calibration((0.2, 0.8), (0.9, 0.5), 100, 5)


def test_nothing_to_fit_to_is_said():
    with pytest.raises(DatasetError, match="0 confidences"):
        Calibration.fit(np.empty(0), np.empty(0))
    with pytest.raises(DatasetError, match="3 confidences and 2 verdicts"):
        reliability(np.ones(3), np.ones(2))


# Its file


def test_it_comes_back_from_its_file(tmp_path):
    confidence, right, frames = boaster(500)
    fitted = Calibration.fit(confidence, right, frames, KIND)
    fitted.save(tmp_path / "c.json")
    assert Calibration.load(tmp_path / "c.json") == fitted


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "can't read"),
        ("{", "can't read"),
        ("[1]", "no calibration of the format"),
        ('{"format": "other"}', "no calibration of the format"),
        ('{"format": "depthlm calibration 1", "said": [0]}', "lacks or misnames"),
        (
            '{"format": "depthlm calibration 1", "said": [0], "right": [0.5], "points": 1, "frames": 1, "kind": null,'
            ' "more": 1}',
            "lacks or misnames",
        ),
        ('{"format": "depthlm calibration 1", "said": [0], "right": [2], "points": 1, "frames": 1, "kind": null}',
         "doesn't rise from 0 to 1"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_calibration_is_refused_with_the_remedy(tmp_path, content, message):
    path = tmp_path / "c.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=message) as refused:
        Calibration.load(path)
    assert "depthlm evaluate" in str(refused.value)


def test_it_says_what_it_is_for():
    fitted = Calibration((0.1,), (0.5,), 9, 1, KIND)
    with pytest.raises(ConfigError, match="dialect coordinates, depth_value median.*dialect marker"):
        fitted.require(Kind("demo", "marker", "median", True))
    fitted.require(KIND)
    Calibration((0.1,), (0.5,), 9, 1).require(KIND)


# What it is judged by


def test_the_error_of_one_who_is_always_sure_and_half_right_is_a_half():
    assert reliability(np.ones(100), np.arange(100) % 2 == 0).error == pytest.approx(0.5)


def test_groups_are_of_equal_size_and_rise():
    confidence, right, _ = boaster(151)
    table = reliability(confidence, right)
    assert sum(table.count) == 151 and max(table.count) - min(table.count) <= 1 and len(table.count) == 15
    assert (np.diff(table.confidence) > 0).all()


def test_calibration_on_other_frames_makes_the_error_small():
    confidence, right, frames = boaster(3000)
    other = calibrated_elsewhere(confidence, right, frames)
    assert reliability(confidence, right).error > 0.12
    assert reliability(other, right).error < 0.05


def test_a_frame_never_calibrates_itself():
    confidence, right, frames = boaster(200)
    other = calibrated_elsewhere(confidence, right, frames)
    flipped = np.where(frames == 3, ~right, right)
    again = calibrated_elsewhere(confidence, flipped, frames)
    np.testing.assert_array_equal(other[frames == 3], again[frames == 3])
    assert (other[frames != 3] != again[frames != 3]).any()


def test_one_frame_can_not_be_calibrated_elsewhere():
    confidence, right, _ = boaster(40)
    assert calibrated_elsewhere(confidence, right, np.zeros(40)) is None


# In the evaluation


def boasting_run(frames: int = 6, kind: Kind | None = KIND) -> Run:
    rng = np.random.default_rng(0)
    tally = Tally(frames)
    v, u = (a.reshape(-1) for a in np.mgrid[0:48:4, 0:64:4])
    for index in range(frames):
        confidence = rng.uniform(0.3, 1, len(u))
        truth = np.full((48, 64), 2.0, np.float32)
        depth = np.where(rng.random(len(u)) < confidence**2, 2.1, 4.0)
        depth[:3] = np.nan
        pixels = np.stack([u, v], 1).astype(float)
        tally.add(AnsweredFrame(f"frame {index}", picture(), CAMERA, pixels, depth, confidence, truth, 0.1))
    return Run("Boasting", tally, {"points_per_second": 1.0}, {"model": "m", "device": "cpu"}, kind=kind)


def test_the_evaluation_says_the_error_before_and_after():
    run = boasting_run()
    said = metrics(run)["calibration"]
    assert said["error_stated"] > 0.12 > 0.08 > said["error_calibrated"]
    assert said["points"] == 6 * (192 - 3) == sum(said["stated"]["count"])
    assert f"{said['error_stated']:.3f} as stated" in summary(run)
    shown = page(run)
    assert "What a confidence is worth" in shown and shown.count("<circle") == 2 * 15 + 2


def test_one_frame_has_an_error_and_no_calibration_on_others():
    run = boasting_run(frames=1)
    said = metrics(run)["calibration"]
    assert said["error_calibrated"] is None and said["calibrated"] is None
    assert "needs a second image" in summary(run) and "calibrated, expected" not in page(run)


def test_the_report_comes_with_a_calibration_to_use(tmp_path):
    run = boasting_run(frames=2)
    assert tmp_path / "calibration.json" in write_report(tmp_path, run)
    fitted = Calibration.load(tmp_path / "calibration.json")
    assert fitted.kind == KIND and fitted.frames == 2
    json.loads((tmp_path / "metrics.json").read_text())


def test_confidences_of_an_unknown_kind_give_no_calibration(tmp_path):
    (tmp_path / "calibration.json").write_text("of an earlier run")
    written = write_report(tmp_path, boasting_run(frames=1, kind=None))
    assert tmp_path / "calibration.json" not in written and not (tmp_path / "calibration.json").exists()
    assert "calibration" in json.loads((tmp_path / "metrics.json").read_text())


def test_a_handful_of_points_is_worth_no_curve():
    tally = Tally(1)
    truth = np.full((48, 64), 2.0, np.float32)
    pixels = np.zeros((5, 2)) + np.arange(5)[:, None]
    tally.add(AnsweredFrame("few", picture(), CAMERA, pixels, np.full(5, 2.0), np.ones(5), truth, 0.1))
    run = Run("Few", tally, {"points_per_second": 1.0}, {}, kind=KIND)
    assert "calibration" not in metrics(run) and run.fitted() is None and "calibration" not in summary(run)
