"""Pairs of views: answers that the package's own parsers read back to the truth."""

from __future__ import annotations

import numpy as np
import pytest

from depthlm_ros.camera import Camera
from depthlm_ros.correspondence import parse_correspondence
from depthlm_ros.errors import ConfigError
from depthlm_ros.motion import METRES_MOVED, parse_metres
from depthlm_ros.pose import QUESTIONS, RelativePose
from depthlm_training.raycast import Pose
from depthlm_training.scene_pairs import ScenePairSource, pose_dialogue, relative_pose

CAMERA = Camera(90, 90, 47.5, 35.5, 96, 72)


def _source(task: str, count: int = 4) -> ScenePairSource:
    return ScenePairSource(count, task, 1, "train", [CAMERA], points=20)


def test_the_published_sample_answers():
    """VLM3's pose sample: yaw 89.6, pitch 2.6, roll 6.1 degrees and the words that go with it."""
    pose = RelativePose(89.7, 89.6, 2.6, 6.1, np.array([-0.69, 0.02, 0.72]), 1.98)
    assert [answer for _, answer in pose_dialogue(pose)] == [
        "Rotation angle: 89.7 degrees",
        "Yaw=+89.6°, Pitch=+2.6°, Roll=+6.1°",
        "The camera moves left, forward, unit vector (-0.69, +0.02, +0.72).",
        "Translation distance: 1.98 meters",
    ]


def test_a_turn_to_the_right_is_a_positive_yaw():
    pose = relative_pose(Pose((0, 0, 1), 0.0), Pose((2, 0, 1), np.radians(-30)))
    assert (pose.yaw_deg, pose.pitch_deg, pose.roll_deg) == pytest.approx((30, 0, 0), abs=1e-9)
    np.testing.assert_allclose(pose.direction, [1, 0, 0], atol=1e-12)
    assert pose.distance_m == pytest.approx(2)


def test_a_camera_that_stayed_is_not_asked_where_it_went():
    pose = Pose((0, 0, 1), 0.0)
    assert QUESTIONS["translation_direction"] not in dict(pose_dialogue(relative_pose(pose, pose)))


def test_pose_answers_read_back():
    example = _source("pose")[0]
    texts = dict(example.dialogue)
    said = RelativePose.from_texts({name: texts[question] for name, question in QUESTIONS.items()})
    # What was said in several sentences fits together.
    matrix = said.rotation_matrix()
    assert np.linalg.norm(said.direction) == pytest.approx(1, abs=0.02) and said.distance_m > 0
    assert said.rotation_deg == pytest.approx(np.degrees(np.arccos((np.trace(matrix) - 1) / 2)), abs=0.2)


def test_correspondences_show_the_same_surface():
    source = _source("correspondence")
    distances = []
    for index in range(len(source)):
        example = source[index]
        assert 0 < len(example.dialogue) <= 20
        for question, answer in example.dialogue:
            a, b = parse_correspondence(question), parse_correspondence(answer)
            places = [np.array(unit) / 1000 * (96, 72) for unit in (a, b)]
            colours = [
                image[int(min(round(v), 71)), int(min(round(u), 95))].astype(float)
                for image, (u, v) in zip(example.images, places, strict=True)
            ]
            distances.append(np.abs(colours[0] - colours[1]).mean())
    # Colours of one surface under the same light; edges of patterns differ.
    assert np.median(distances) < 8


def test_metres_moved_are_those_of_the_pose():
    moved, pose = _source("moved")[2], _source("pose")[2]
    (question, answer), texts = moved.dialogue[0], dict(pose.dialogue)
    assert question == METRES_MOVED
    assert f"{parse_metres(answer):.2f} meters" in texts[QUESTIONS["translation_distance"]]
    assert np.array_equal(moved.images[1], pose.images[1])


def test_the_same_pair_wherever_it_is_rendered():
    one, other = _source("correspondence")[1], _source("correspondence")[1]
    assert one.dialogue == other.dialogue and np.array_equal(one.images[1], other.images[1])
    held_out = ScenePairSource(4, "correspondence", 1, "held_out", [CAMERA])[1]
    assert not np.array_equal(one.images[0], held_out.images[0])


def test_an_unknown_task_is_refused():
    with pytest.raises(ConfigError, match="did you mean 'correspondence'"):
        _source("correspondences")
