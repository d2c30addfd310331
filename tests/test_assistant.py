"""What the model is shown and asked for each task, how its answers come back, and what geometry says beside them."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from depthlm_ros import correspondence, motion, pose, tasks
from depthlm_ros.assistant import Assistant
from depthlm_ros.camera import Camera, Distortion, unify
from depthlm_ros.cards import load_card
from depthlm_ros.engines.base import Answer, EngineInfo, ImageGrid
from depthlm_ros.errors import CameraError, ConfigError, DialectError, ImageError, PixelError
from depthlm_ros.estimator import Estimator
from depthlm_ros.markers import ARROW_COLOUR, ARROW_OFFSETS
from depthlm_ros.objects import region_text
from depthlm_ros.prompts import answer_text

CAMERA = Camera(fx=150, fy=148, cx=62, cy=49, width=128, height=96)
LENS = replace(CAMERA, distortion=Distortion("plumb_bob", (-0.1, 0.01, 0.0, 0.0, 0.0)))


def picture(seed=0, height=96, width=128):
    return np.random.default_rng(seed).integers(0, 200, (height, width, 3), dtype=np.uint8)


class Parrot:
    """An engine that answers with given texts in turn and remembers what it was shown."""

    info = EngineInfo("parrot", "none", "qwen3_vl", "cpu", "float32", ("a test",), 0, False)
    grid = ImageGrid(multiple=32, min_pixels=1, max_pixels=1 << 24)

    def __init__(self, *texts):
        self.texts, self.calls = texts, []

    def answer_about(self, images, questions, max_new_tokens, *, expects=None):
        self.calls.append((list(images), list(questions), max_new_tokens))
        return [Answer(self.texts[i % len(self.texts)], (), 0.5) for i in range(len(questions))]

    def answer_shared(self, image, questions, max_new_tokens, *, expects=None):
        return self.answer_about([image], questions, max_new_tokens, expects=expects)

    def answer_each(self, images, questions, max_new_tokens, *, expects=None):
        return self.answer_about(images, questions, max_new_tokens, expects=expects)


def assistant(*texts, force=False, **changes):
    """A parrot with the card of a VLM3 that knows every task."""
    everything = {"tasks": ("depth", "object", "correspondence", "pose", "motion")}
    card = replace(load_card("vlm3-depth")[0], **(everything | changes))
    return Assistant(Estimator(card, Parrot(*texts)), force=force)


def last_call(asked):
    return asked.estimator.engine.calls[-1]


# ---------------------------------------------------------------- free questions


def test_a_free_question_goes_to_the_model_as_it_is():
    asked = assistant("A mug.")
    image = picture()
    assert asked.ask(image, "What  is it?").text == "A mug."
    images, questions, budget = last_call(asked)
    assert questions == ["What  is it?"] and budget == 512
    np.testing.assert_array_equal(images[0], image)


def test_with_a_camera_the_image_is_shown_at_the_models_focal_length():
    asked = assistant("yes", focal_px=300.0)
    asked.ask(picture(), "Is it near?", CAMERA)
    expected = unify(picture(), CAMERA, 300.0, "published", Parrot.grid).image
    np.testing.assert_array_equal(last_call(asked)[0][0], expected)


def test_several_images_are_shown_in_their_order():
    asked = assistant("a", "b")
    answers = asked.ask_about([picture(0), picture(1, 50, 70)], ["Same?", "Which?"])
    assert [answer.text for answer in answers] == ["a", "b"]
    assert [image.shape for image in last_call(asked)[0]] == [(96, 128, 3), (50, 70, 3)]


def test_an_empty_question_is_refused():
    with pytest.raises(ConfigError, match="the question is empty"):
        assistant("?").ask(picture(), "  ")


@pytest.mark.parametrize("architecture", ["qwen3_vl", "qwen2_5_vl", "llava"])
def test_any_model_can_be_asked_in_words(request, monkeypatch, architecture):
    monkeypatch.setattr(tasks, "CORRESPONDENCE_MAX_NEW_TOKENS", 3)
    monkeypatch.setattr(correspondence, "LONG_EDGE_PX", 256)
    folder = str(request.getfixturevalue(f"{architecture}_checkpoint"))
    with Estimator.load(folder, device="cpu") as estimator:
        asked = Assistant(estimator, force=True)
        first, second = (asked.ask(picture(), question, max_new_tokens=6) for question in ("How far?", "7 or 8?"))
        assert first.token_ids != second.token_ids
        matches = asked.match(picture(0), picture(1, 80, 100), [[3, 4], [100, 90]])
        assert len(matches) == len(matches.texts) == 2


# ---------------------------------------------------------------- which tasks


TASKS = {
    "object": lambda a: a.ask_objects(picture(), CAMERA, "Is <mask> big?", [[1, 2, 30, 40]]),
    "correspondence": lambda a: a.match(picture(), picture(), [[1, 2]]),
    "pose": lambda a: a.relative_pose(picture(), CAMERA, picture(), CAMERA),
    "motion": lambda a: a.axis_distance(picture(), CAMERA, [[50, 50]]),
}


@pytest.mark.parametrize("task", TASKS)
def test_a_model_that_was_not_trained_for_a_task_is_refused_by_name(task):
    with pytest.raises(DialectError, match=f"was not trained for {task}, it is for depth"):
        TASKS[task](assistant("1 m", tasks=("depth",)))


@pytest.mark.parametrize("task", TASKS)
def test_force_asks_anyway(task):
    asked = assistant("1 m", tasks=("depth",), force=True)
    TASKS[task](asked)
    assert asked.estimator.engine.calls


def test_motion_between_images_and_depth_need_their_tasks_too():
    with pytest.raises(DialectError, match="motion"):
        assistant("1 m", tasks=("depth",)).metres_moved(picture(), CAMERA, picture(), CAMERA)
    only_match = assistant("1 m", tasks=("correspondence",), dialects=(), default_dialect=None, depth_kind=None)
    with pytest.raises(DialectError, match="depth"):
        only_match.measure(picture(), CAMERA, [[3, 3]])


def test_a_card_without_a_focal_length_is_refused_where_one_is_needed():
    bare = {"dialects": (), "default_dialect": None, "depth_kind": None, "focal_px": None, "system": "own"}
    asked = assistant("1 m", tasks=("correspondence",), force=True, **bare)
    with pytest.raises(ConfigError, match="has no focal_px, which pose needs"):
        asked.relative_pose(picture(), CAMERA, picture(), CAMERA)
    assert asked.ask(picture(), "What?", CAMERA).text == "1 m"


# ---------------------------------------------------------------- objects


def test_boxes_are_written_into_the_question_and_the_image_is_at_1000_pixels():
    asked = assistant("Yes, 1.5 meters.", focal_px=750.0)
    answer = asked.ask_objects(picture(), CAMERA, "Is <mask> left of <mask>?", [[0, 0, 64, 48], [10, 20, 128, 96]])
    images, questions, budget = last_call(asked)
    assert questions == [answer.question] == [
        "Is bounding box region (0, 0, 500, 500) left of bounding box region (78, 208, 999, 999)?"
    ]
    assert images[0].shape == (int(96 * 1000 / 150), int(128 * 1000 / 150), 3)
    assert budget == 512
    assert (answer.text, answer.yes, answer.length_m) == ("Yes, 1.5 meters.", True, 1.5)


@pytest.mark.parametrize(("camera", "policy"), [(CAMERA, "exact"), (LENS, "exact"), (LENS, "published")])
def test_boxes_name_what_they_cover_in_the_image_that_is_shown(camera, policy):
    """A white box on black, seen through whatever the policy does to the image, lies where the text says."""
    image = np.zeros((96, 128, 3), np.uint8)
    image[30:60, 40:90] = 255
    asked = assistant("no", policy=policy)
    answer = asked.ask_objects(image, camera, "<mask>", [[40, 30, 89, 59]])
    shown = last_call(asked)[0][0]
    rows, columns = np.nonzero(shown[..., 0] > 127)
    size = np.array([shown.shape[1], shown.shape[0]] * 2)
    covered = np.array([columns.min(), rows.min(), columns.max(), rows.max()]) / size * 1000
    said = np.array([int(n) for n in answer.question.split("(")[1].rstrip(")").split(", ")])
    assert region_text(said) == answer.question
    # Corners are pixel centres; a source pixel is 8 units wide and 10.4 high.
    np.testing.assert_allclose(said, covered, atol=10.5)


# ---------------------------------------------------------------- correspondence


def test_matches_come_back_in_the_second_images_own_pixels():
    asked = assistant("The corresponding pixel is (500, 250)", "<think> (1, 1) </think>\n\n(0, 1000)", "no idea")
    result = asked.match(picture(), picture(1, 200, 400), [[64, 48], [0, 0], [127, 95]])
    images, questions, budget = last_call(asked)
    assert [image.shape for image in images] == [(768, 1024, 3), (512, 1024, 3)]
    assert budget == 256
    assert "pixel (500, 500) in the first image" in questions[0] and "pixel (0, 0)" in questions[1]
    np.testing.assert_allclose(result.pixels_b[:2], [[200, 50], [0, 199]])
    assert result.valid.tolist() == [True, True, False] and np.isnan(result.pixels_b[2]).all()
    assert result.texts[2] == "no idea"


def test_thinking_asks_for_it_and_leaves_room():
    asked = assistant("(1, 1)")
    asked.match(picture(), picture(), [[1, 1]], think=True)
    _, questions, budget = last_call(asked)
    assert questions[0].endswith('</think>\n\n[answer]".') and budget == 2048


def test_nothing_to_match_asks_nothing():
    asked = assistant("(1, 1)")
    assert len(asked.match(picture(), picture(), np.empty((0, 2)))) == 0
    assert not asked.estimator.engine.calls


def test_a_pixel_off_the_first_image_is_refused():
    with pytest.raises(PixelError, match=r"pixel \(128, 3\) is outside of the 128x96 image"):
        assistant("(1, 1)").match(picture(), picture(), [[128, 3]])


# ---------------------------------------------------------------- pose

POSE_TEXTS = (
    "Rotation angle: 90.0 degrees",
    "Yaw=+90.0°, Pitch=+0.0°, Roll=+0.0°",
    "The camera moves right, unit vector (+1.00, +0.00, +0.00).",
    "Translation distance: 2.00 meters",
)


def test_four_questions_are_asked_about_both_images_at_750_pixels():
    asked = assistant(*POSE_TEXTS)
    other = Camera(fx=100, fy=100, cx=49.5, cy=39.5, width=100, height=80)
    said = asked.relative_pose(picture(), CAMERA, picture(1, 80, 100), other)
    images, questions, budget = last_call(asked)
    assert questions == list(pose.QUESTIONS.values()) and budget == 512
    assert [image.shape for image in images] == [(int(96 * 750 / 148), 640, 3), (600, 750, 3)]
    bicubic = Image.fromarray(picture(1, 80, 100)).resize((750, 600), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(images[1], bicubic)
    np.testing.assert_allclose(said.rotation_matrix() @ [0, 0, 1], [1, 0, 0], atol=1e-12)
    np.testing.assert_allclose(said.translation_m(), [2, 0, 0])
    assert tuple(said.texts.values()) == POSE_TEXTS


@pytest.mark.parametrize("camera", [CAMERA, LENS])
def test_exact_poses_see_images_that_the_processor_leaves_alone(camera):
    asked = assistant(*POSE_TEXTS, policy="exact")
    asked.relative_pose(picture(), camera, picture(1), camera)
    for image, seed in zip(last_call(asked)[0], (0, 1), strict=True):
        np.testing.assert_array_equal(image, unify(picture(seed), camera, 750.0, "exact", Parrot.grid).image)


def test_a_model_of_ones_own_keeps_its_focal_length():
    asked = assistant(*POSE_TEXTS, system="own", focal_px=200.0)
    asked.relative_pose(picture(), CAMERA, picture(), CAMERA)
    assert last_call(asked)[0][0].shape[1] == int(128 * 200 / 150)


@pytest.mark.parametrize("policy", ["published", "exact"])
def test_a_camera_of_another_image_is_refused(policy):
    with pytest.raises(CameraError, match="100x80 but its camera is 128x96"):
        assistant(*POSE_TEXTS, policy=policy).relative_pose(picture(0, 80, 100), CAMERA, picture(), CAMERA)


def test_something_that_is_no_image_is_refused():
    with pytest.raises(ImageError, match="float64"):
        assistant("(1, 1)").match(picture(), np.zeros((4, 4, 3)), [[1, 1]])


# ---------------------------------------------------------------- motion


def arrows(image, plain):
    """Where arrows were drawn, as the pixels they point at."""
    red = (image == ARROW_COLOUR).all(axis=-1) & (image != plain).any(axis=-1)
    drawn = set(zip(*np.nonzero(red.T), strict=True))
    return [(u, v) for v, u in np.ndindex(red.shape) if all((u + du, v + dv) in drawn for du, dv in ARROW_OFFSETS)]


def depthlm(*texts):
    return assistant(*texts, system="depthlm", focal_px=300.0, max_new_tokens=77)


def test_each_pixel_is_marked_and_asked_about():
    asked = depthlm("The point is around 7.23 meters away.", "?")
    said = asked.axis_distance(picture(), CAMERA, [[50, 40], [60, 70], [0, 0]])
    images, questions, budget = last_call(asked)
    view = unify(picture(), CAMERA, 300.0, "published", Parrot.grid, "depthlm")
    places = view.from_source([[50, 40], [60, 70]]).astype(int)
    for image, place in zip(images, places.tolist(), strict=True):
        assert arrows(image, view.image) == [tuple(place)]
    assert questions == [motion.AXIS_DISTANCE] * 2 and budget == 77
    assert said.asked.tolist() == [True, True, False]
    assert said.values[0] == 7.23 and np.isnan(said.values[1:]).all()
    assert said.texts == ("The point is around 7.23 meters away.", "?", "")


def test_two_points_are_marked_in_one_image():
    asked = depthlm("They are 1.20 meters apart.")
    said = asked.distance_between(picture(), CAMERA, [[30, 40]], [[90, 60]])
    images, questions, _ = last_call(asked)
    view = unify(picture(), CAMERA, 300.0, "published", Parrot.grid, "depthlm")
    places = view.from_source([[30, 40], [90, 60]]).astype(int)
    assert arrows(images[0], view.image) == [tuple(place) for place in places.tolist()]
    assert questions == [motion.TWO_POINTS]
    assert said.values.tolist() == [1.2]


def test_speed_and_time_are_asked_with_their_numbers():
    asked = depthlm("around 7.23 / 4.0 = 1.81m/s")
    assert asked.speed_to_reach(picture(), CAMERA, [[50, 40]], 4).values.tolist() == [1.81]
    assert last_call(asked)[1] == [motion.speed_question(4.0)]
    asked = depthlm("around 48.28 / 6.0 = 8.05s")
    assert asked.time_to_reach(picture(), CAMERA, [[50, 40]], 6).values.tolist() == [8.05]
    assert last_call(asked)[1] == [motion.time_question(6.0)]


def test_metres_moved_shows_both_images():
    asked = depthlm("The camera has moved around 0.85 meters.")
    said = asked.metres_moved(picture(), CAMERA, picture(1), CAMERA)
    images, questions, _ = last_call(asked)
    assert [image.shape for image in images] == [(192, 256, 3)] * 2
    assert questions == [motion.METRES_MOVED]
    assert said.values.tolist() == [0.85]


def test_pairs_of_pixels_must_be_as_many_and_on_the_image():
    with pytest.raises(PixelError, match="1 first and 2 second pixels"):
        depthlm("1 m").distance_between(picture(), CAMERA, [[30, 40]], [[90, 60], [1, 1]])
    with pytest.raises(PixelError, match="outside of the 128x96 image"):
        depthlm("1 m").axis_distance(picture(), CAMERA, [[30, 400]])


# ---------------------------------------------------------------- geometry


@pytest.mark.parametrize("camera", [CAMERA, LENS])
def test_measured_answers_are_geometry_of_asked_depth(camera):
    """The model says a Euclidean distance; the points lie on the pixels' rays at just that distance."""
    asked = assistant(answer_text(5.0), answer_text(10.0), "?", depth_kind="euclidean", policy="exact", focal_px=300.0)
    pixels = np.array([[20, 30], [100, 70], [60, 50]], float)
    measured = asked.measure(picture(), camera, pixels)
    np.testing.assert_allclose(measured.range_m[:2], [5, 10], rtol=1e-6)
    np.testing.assert_allclose(camera.project(measured.points_m[:2]), pixels[:2], atol=1e-4)
    rays = camera.rays(pixels[:2])
    first, second = rays / np.linalg.norm(rays, axis=1, keepdims=True) * [[5], [10]]
    assert measured.distance_m(0, 1) == pytest.approx(np.linalg.norm(first - second), rel=1e-6)
    assert measured.axis_distance_m[1] == pytest.approx(second[2], rel=1e-6)
    assert measured.speed_to_reach_mps(4)[0] == pytest.approx(1.25)
    assert measured.time_to_reach_s(2)[1] == pytest.approx(5)
    assert math.isnan(measured.distance_m(0, 2))
