"""What a model expects reaches the result, the cloud and the parameters, and is only asked for where it exists."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from depthlm_ros.calibration import Calibration, Kind
from depthlm_ros.camera import Camera
from depthlm_ros.cards import load_card
from depthlm_ros.config import Parameters
from depthlm_ros.engines.base import Answer, EngineInfo, ImageGrid
from depthlm_ros.engines.digits import NumberDistribution
from depthlm_ros.errors import ConfigError, PixelError
from depthlm_ros.estimator import Estimator
from depthlm_ros.inference import check_answers
from depthlm_ros.markers import paste
from depthlm_ros.prompts import answer_text
from depthlm_ros.queries import Query, keep_good

CAMERA = Camera(fx=150.0, fy=150.0, cx=63.5, cy=47.5, width=128, height=96)
PIXELS = np.array([[64, 48], [20, 30], [110, 80], [5, 90]], np.float32)
IMAGE = np.zeros((96, 128, 3), np.uint8)
FIGURES = {
    "mean": 2.5,
    "std": 0.5,
    "median": 2.4,
    "geometric_mean": 2.45,
    "sigma_log": 0.2,
    "mass": 0.99,
    "greedy_probability": 0.03,
    "near_greedy": 0.6,
    "near_median": 0.8,
    "near_mean": 0.7,
    "forwards": 14,
}


class Doubter:
    """An engine that says 2 m, and for the last point nothing of use; it thinks of more where it is asked to."""

    info = EngineInfo("doubter", "none", "qwen3_vl", "cpu", "float32", ("a test",), 0, False)
    grid = ImageGrid(multiple=32, min_pixels=1, max_pixels=1 << 20)

    def __init__(self) -> None:
        self.asked: list[bool] = []

    def answer_shared(self, image, questions, max_new_tokens, *, expects=None, distribution=False):
        self.asked.append(distribution)
        numbers = (NumberDistribution(**FIGURES),) if distribution else ()
        known = Answer(answer_text(2.0), (), 0.03, (0.03, 0.99), numbers)
        return [*[known] * (len(questions) - 1), Answer("far away", (), 0.0)]

    def answer_marked(self, image, blocks, questions, max_new_tokens, **options):
        return self.answer_each([paste(image, block) for block in blocks], questions, max_new_tokens, **options)

    def answer_each(self, images, questions, max_new_tokens, **options):
        return self.answer_shared(images[0], questions, max_new_tokens, **options)

    def close(self):
        pass


def doubter(card: str = "vlm3-depth", calibration: Calibration | None = None, **changes) -> Estimator:
    changes = {"depth_kind": "z", "focal_px": 160.0, "policy": "exact"} | changes
    return Estimator(replace(load_card(card)[0], **changes), Doubter(), calibration=calibration)


def test_nothing_is_expected_unless_it_is_asked_for():
    estimator = doubter()
    result = estimator.estimate(IMAGE, CAMERA, PIXELS)
    assert estimator.engine.asked == [False]
    assert result.std_m is result.median_m is result.mean_m is result.sigma_log is result.greedy_m is None
    assert result.confidence[0] == pytest.approx(0.03)


@pytest.mark.parametrize(("value", "metres", "near"), [("greedy", 2.0, 0.6), ("median", 2.4, 0.8), ("mean", 2.5, 0.7)])
def test_the_published_depth_and_its_confidence_are_those_of_the_value_chosen(value, metres, near):
    result = doubter().estimate(IMAGE, CAMERA, PIXELS, distribution=True, depth_value=value)
    assert result.depth_m[:3] == pytest.approx(metres)
    assert result.confidence[:3] == pytest.approx(near)
    assert (result.greedy_m[0], result.median_m[0], result.mean_m[0]) == pytest.approx((2.0, 2.4, 2.5))
    assert (result.std_m[0], result.sigma_log[0]) == pytest.approx((0.5, 0.2))


def test_without_a_number_nothing_is_known():
    result = doubter().estimate(IMAGE, CAMERA, PIXELS, distribution=True, depth_value="median")
    assert np.isnan([result.depth_m[3], result.std_m[3], result.median_m[3]]).all() and result.confidence[3] == 0


def test_the_marker_dialect_has_expectations_too():
    pixels = np.array([[64, 48], [30, 30]], np.float32)
    result = doubter(card="depthlm-12b").estimate(IMAGE, CAMERA, pixels, distribution=True)
    assert result.std_m[0] == pytest.approx(0.5)


def test_distances_along_the_ray_become_z_depth_with_their_spread():
    estimator = doubter(depth_kind="euclidean")
    result = estimator.estimate(IMAGE, CAMERA, PIXELS, distribution=True, depth_value="median")
    lengths = np.linalg.norm(CAMERA.rays(PIXELS), axis=1)[:3]
    np.testing.assert_allclose(result.depth_m[:3], 2.4 / lengths, rtol=1e-5)
    np.testing.assert_allclose(result.std_m[:3], 0.5 / lengths, rtol=1e-5)
    np.testing.assert_allclose(result.sigma_log[:3], 0.2, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth_value": "median"}, "set distribution to true"),
        ({"depth_value": "medium", "distribution": True}, "median"),
        ({"distribution": True, "dialect": "dense"}, "writes no digits"),
        ({"distribution": True, "points_per_question": 4, "dialect": "compact"}, "points_per_question to 1"),
    ],
)
def test_what_cannot_be_expected_is_refused_with_the_remedy(options, message):
    card = {"dialects": ("dense", "coordinates", "compact"), "points_per_question": 8}
    with pytest.raises(ConfigError, match=message):
        doubter(**card).estimate(IMAGE, CAMERA, PIXELS, **options)


def test_a_result_refuses_a_spread_of_another_length():
    result = doubter().estimate(IMAGE, CAMERA, PIXELS)
    with pytest.raises(PixelError, match="std_m"):
        replace(result, std_m=np.ones(3, np.float32))


# Calibrated confidence


def curve(**kind) -> Calibration:
    kind = {"model": "vlm3-depth", "dialect": "coordinates", "depth_value": "greedy", "distribution": True} | kind
    return Calibration((0.0, 1.0), (0.0, 0.5), 100, 4, Kind(**kind))


def test_confidences_are_calibrated_where_the_calibration_is_theirs():
    estimator = doubter(calibration=curve())
    assert estimator.estimate(IMAGE, CAMERA, PIXELS, distribution=True).confidence.tolist() == pytest.approx(
        [0.3, 0.3, 0.3, 0]
    )
    assert estimator.estimate(IMAGE, CAMERA, PIXELS).confidence[0] == pytest.approx(0.03), "another confidence"
    assert any("calibrated on 100 depths in 4 images" in line for line in estimator.describe())


def test_parameters_that_do_not_fit_the_calibration_are_refused():
    estimator = doubter(calibration=curve())
    fitting = Parameters(distribution=True, calibration="file.json")
    check_answers(estimator, fitting, "coordinates")
    for other in (fitting.replaced(distribution=False), fitting.replaced(depth_value="median")):
        with pytest.raises(ConfigError, match="the calibration is for model vlm3-depth"):
            check_answers(estimator, other, "coordinates")


# Outwards


def test_parameters_ask_for_it_only_where_it_is_wanted():
    assert Parameters().answer_arguments() == {"points_per_question": 1}
    wanted = Parameters(distribution=True, depth_value="mean", calibration="c.json")
    assert wanted.answer_arguments() == {"points_per_question": 1, "distribution": True, "depth_value": "mean"}
    assert wanted.load_arguments()["calibration"] == "c.json" and Parameters().load_arguments()["calibration"] is None


def test_what_is_left_out_has_no_spread_either():
    result = doubter().estimate(IMAGE, CAMERA, PIXELS, distribution=True)
    kept = keep_good(result, Parameters(max_depth_m=1.0))
    assert np.isnan(kept.std_m).all() and np.isnan(kept.median_m).all()
    assert keep_good(doubter().estimate(IMAGE, CAMERA, PIXELS), Parameters(max_depth_m=1.0)).std_m is None


def test_the_cloud_has_a_field_std_where_it_is_known():
    pytest.importorskip("sensor_msgs.msg")
    from depthlm_ros.messages import camera_info_message, read_cloud
    from depthlm_ros.outputs import build_outputs

    def cloud(rows=None, **options):
        result = doubter().estimate(IMAGE, CAMERA, PIXELS, **options)
        info = camera_info_message(CAMERA)
        return build_outputs({"points"}, IMAGE, CAMERA, info, info.header, Query(PIXELS, rows), result)["points"]

    assert [field.name for field in cloud().fields] == ["x", "y", "z", "rgb", "confidence"]
    message = cloud(distribution=True)
    assert [field.name for field in message.fields][-1] == "std" and message.point_step == 24
    arrays = read_cloud(message)
    assert arrays["std"].tolist() == [0.5] * 3 and len(arrays["points"]) == 3
    assert read_cloud(cloud(np.array([0, 3]), distribution=True))["std"].tolist() == [0.5]


def test_a_spread_of_another_length_makes_no_cloud():
    pytest.importorskip("sensor_msgs.msg")
    from depthlm_ros.errors import CloudError
    from depthlm_ros.messages import cloud_message

    points = np.zeros((2, 3), np.float32)
    with pytest.raises(CloudError, match="std_m"):
        cloud_message(0, "", points, np.zeros((2, 3), np.uint8), np.ones(2), std_m=np.ones(3))


# Of a model


def test_the_demos_median_and_spread_come_from_its_engine():
    with Estimator.load("demo", device="cpu", dtype="float32") as demo:
        said = demo.estimate(IMAGE, CAMERA, PIXELS, dialect="coordinates")
        result = demo.estimate(IMAGE, CAMERA, PIXELS, dialect="coordinates", distribution=True, depth_value="median")
    assert result.answers == said.answers
    np.testing.assert_array_equal(result.greedy_m, said.depth_m)
    np.testing.assert_array_equal(result.depth_m, result.median_m)
    assert ((result.sigma_log > 0) & (result.std_m > 0)).all()
    assert np.abs(np.log(result.median_m / result.mean_m)).max() < 0.3
    assert (result.confidence > said.confidence).all() and not math.isnan(result.mean_m.sum())
