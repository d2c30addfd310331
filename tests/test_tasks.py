"""The published questions letter by letter, parsers that survive anything, metrics and geometry of the other tasks."""

from __future__ import annotations

import hashlib
import itertools
import math
import re
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from depthlm_ros import correspondence, motion, objects, pose, tasks
from depthlm_ros.engines.base import ImageGrid
from depthlm_ros.errors import ConfigError, ImageError, PixelError
from depthlm_ros.pose import RelativePose, euler_angles, euler_matrix, rotation_angle_deg

# SHA-256 of the questions as the authors published them (VLM3's sample data, DepthLM's multi-task figure), UTF-8.
PUBLISHED = {
    motion.AXIS_DISTANCE: "1af68fce7dcf3bc9010e07d410c01690974981df66013754c23fc944b9ce40af",
    motion.speed_question(4): "49fe79a122bc1427865465fa31b1b2fe1ed8c1eeb23e8c920477aeb20acc14f3",
    motion.time_question(6): "73256da09d74d197e7b758f8219c69ff78ab1cbb333a0c171591d6f9ade24f7f",
    motion.TWO_POINTS: "0a73419b9303b4ee3be5408477156df4a057b4cf2b4297d0db1e961931aaa0c0",
    motion.METRES_MOVED: "68d9d6bba8b86dd1aedf82d1f2eff9ebe327c3fa2bf9925fe160ccfcb44376be",
    correspondence.QUESTION: "676de1466542dd1e7e61d5d5c8f4783a3dce126e63522c58957e9e80dea0647e",
    correspondence.THINKING.replace("\n", "\\n"): "f98a6cb62404857975a53948f57627d1483869e49488801929fe4d50d9cae8b1",
    pose.QUESTIONS["rotation_angle"]: "39dda4364e2958f4f14f68a2d00de32e90ec9d517551723e92e18222e32faa22",
    pose.QUESTIONS["euler_natural"]: "c1af0fed49fb89a8ae23852c3b41ca2a7075611d205563d128deeeb4a9f47d7c",
    pose.QUESTIONS["translation_direction"]: "3cf269075fe38205a714d053fdfd2a33f792dcedf03d9ea53e97b9ba6d5ef437",
    pose.QUESTIONS["translation_distance"]: "68aa21d4209507c1ee7460897452a8a1e75eb66a949e0394517f9b376002c0ee",
}
PARSERS = [
    objects.parse_yes_no, objects.parse_length_m, objects.parse_direction_deg, correspondence.parse_correspondence,
    pose.parse_angle_deg, pose.parse_euler_deg, pose.parse_direction, pose.parse_distance_m, motion.parse_metres,
    motion.parse_speed_mps, motion.parse_seconds,
]  # fmt: skip
# VLM3's sample pair of images, from its pose_labels.json.
SAMPLE_ANGLES = (89.60077227075526, 2.598684372865458, 6.072327841623985)
SAMPLE_ROTATION_DEG = 89.6547345694857
SAMPLE_TEXTS = {
    "rotation_angle": "Rotation angle: 89.7 degrees",
    "euler_natural": "Yaw=+89.6°, Pitch=+2.6°, Roll=+6.1°",
    "translation_direction": "The camera moves left, forward, unit vector (-0.69, +0.02, +0.72).",
    "translation_distance": "Translation distance: 1.98 meters",
}


@pytest.mark.parametrize("question", PUBLISHED, ids=lambda question: question[:30])
def test_questions_are_the_published_ones_letter_by_letter(question):
    assert hashlib.sha256(question.encode()).hexdigest() == PUBLISHED[question]


def test_the_pose_questions_come_in_the_published_order():
    order = ["rotation_angle", "euler_natural", "translation_direction", "translation_distance"]
    assert list(pose.QUESTIONS) == order


def test_correspondence_question_with_and_without_thinking():
    asked = correspondence.correspondence_question(440, 60)
    assert asked == (
        "Given these two images, what pixel in the second image corresponds to pixel (440, 60) in the first image? "
        "Report the answer as (x, y)."
    )
    assert correspondence.correspondence_question(440, 60, think=True) == asked + (
        ' Please think step by step and follow the format: "<think> [think process] </think>\n\n[answer]".'
    )


def test_answer_budgets_are_the_published_ones():
    assert tasks.OBJECT_MAX_NEW_TOKENS == tasks.POSE_MAX_NEW_TOKENS == 512
    assert tasks.CORRESPONDENCE_MAX_NEW_TOKENS == 256
    assert tasks.CORRESPONDENCE_THINKING_MAX_NEW_TOKENS == 2048


def test_numbers_in_motion_questions_keep_their_digits():
    assert "exactly 2.25 seconds" in motion.speed_question(2.25)
    assert "speed of 0.1m/s" in motion.time_question(0.1)
    for bad in (0, -1, math.nan, math.inf):
        with pytest.raises(ConfigError, match="pass a positive number"):
            motion.time_question(bad)


# ---------------------------------------------------------------- thoughts and hostile texts


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("<think> 1 </think>\n\n2", "\n\n2"),
        ("a<think>b</think>c<think>d</think>e", "ace"),
        ("a <think> 3, 4 and the budget ends", "a "),
        ("opened by the template </think> 5", " 5"),
        ("no thoughts", "no thoughts"),
        ("", ""),
    ],
)
def test_thoughts_are_no_answers(text, left):
    assert tasks.strip_thinking(text) == left


def flat(value):
    """All numbers in what a parser returned."""
    return [] if value is None else [v for v in np.ravel(np.array(value, dtype=object)).tolist() if v is not None]


PIECES = [
    "<think>", "</think>", "<answer>", "</answer>", "yaw", "pitch=", "(", ")", ",", "-", "+", ".", " ", "\n", "9" * 400,
    "1e999", "nan", "inf", "m", "m/s", "°", "deg", "o'clock", "yes", "no", "٣", "0", "5",
]  # fmt: skip


@pytest.mark.parametrize("parse", PARSERS, ids=lambda parse: parse.__name__)
@given(text=st.one_of(st.text(max_size=40), st.lists(st.sampled_from(PIECES), max_size=14).map("".join)))
def test_no_text_makes_a_parser_raise_or_return_what_is_not_finite(parse, text):
    for value in flat(parse(text)):
        assert isinstance(value, bool) or math.isfinite(value)


@pytest.mark.parametrize("parse", PARSERS, ids=lambda parse: parse.__name__)
@pytest.mark.parametrize(
    "piece", ["9", " ", "(", "1,", "1.", "<think>", "<think></think>", "yaw ", "-1 ", "m/", "no"], ids=repr
)
def test_long_texts_are_read_in_linear_time(parse, piece):
    def seconds(count):
        best = math.inf
        for _ in range(2):
            started = time.process_time()
            parse("yaw" + piece * count)
            best = min(best, time.process_time() - started)
        return best

    # A quadratic parser takes minutes here.
    assert seconds(200_000 // len(piece)) < 2


# ---------------------------------------------------------------- objects

BOXES = np.array([[0, 39, 652, 999], [6, 380, 228, 562]])


def test_masks_become_boxes_as_in_the_published_sample():
    question = objects.object_question("<image>\n Can you confirm if <mask> is smaller than <mask>?", BOXES)
    assert question == (
        "Can you confirm if bounding box region (0, 39, 652, 999) is smaller than bounding box region "
        "(6, 380, 228, 562)?"
    )
    answer = objects.object_answer("Incorrect, Region [0] is not smaller in size than Region [1].", BOXES)
    assert answer == (
        "Incorrect, bounding box region (0, 39, 652, 999) is not smaller in size than bounding box region "
        "(6, 380, 228, 562)."
    )


def test_boxes_are_scaled_to_a_thousand_and_capped_at_999():
    normalised = objects.normalise_boxes([[0, 30, 667, 767], [6.2, 292, 233.5, 431.7], [0, 0, 1024, 768]], 1024, 768)
    assert normalised.tolist() == [[0, 39, 651, 999], [6, 380, 228, 562], [0, 0, 999, 999]]


@pytest.mark.parametrize("box", [[5, 5, 2, 9], [0, 0, 2000, 5], [0, 0, math.nan, 5], [-9, 0, 5, 5]])
def test_a_box_off_the_image_is_refused(box):
    with pytest.raises(PixelError, match="64x48 image"):
        objects.normalise_boxes([box], 64, 48)


@pytest.mark.parametrize(("question", "count"), [("Is <mask> big?", 0), ("Is it?", 1), ("<mask> or <mask>?", 1)])
def test_each_mask_needs_its_box(question, count):
    with pytest.raises(PixelError, match=f"for {count} boxes"):
        objects.object_question(question, BOXES[:count])


def test_an_answer_that_names_a_region_without_a_box_is_refused():
    with pytest.raises(PixelError, match=r"Region \[2\] but 2 boxes"):
        objects.object_answer("Region [2] is.", BOXES)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Yes, it is.", True),
        ("Incorrect, bounding box region (0, 39, 652, 999) is not smaller.", False),
        ("That's right, not the other way around", True),
        ("It is not correct", False),
        ("INDEED", True),
        ("Actually nothing", None),
        ("incorrectly noted knots", None),
        ("<think> no, no </think> Affirmative.", True),
        ("<think> yes", None),
    ],
)
def test_the_first_word_of_the_lists_decides_yes_or_no(text, said):
    assert objects.parse_yes_no(text) is said


@pytest.mark.parametrize(
    ("text", "metres"),
    [
        ("bounding box region (0, 39, 652, 999) is 1.5 meters wide", 1.5),
        ("It is 32 cm.", 0.32),
        ("about 5 feet and 3 inches", 1.524),
        ("10 inches", 0.254),
        ("2.5m", 2.5),
        ("7 metres", 7),
        ("3 monkeys", None),
        ("5 meters per second is not 5 m", 5),
        ("1,234 m", None),
        ("nothing", None),
    ],
)
def test_lengths_need_a_unit(text, metres):
    assert objects.parse_length_m(text) == (None if metres is None else pytest.approx(metres))


@pytest.mark.parametrize(
    ("text", "degrees"),
    [("at 3 o'clock", 90), ("the 12 o'clock direction", 0), ("around 370 degrees", 10), ("left", None)],
)
def test_directions_are_clock_hours_or_degrees(text, degrees):
    assert objects.parse_direction_deg(text) == degrees
    assert objects.direction_error_deg([350], [10])[0] == 20


def test_object_scores_count_what_was_not_answered_as_wrong():
    assert objects.qualitative_accuracy([True, False, None, True], [True, True, True, True]) == 0.5
    score = objects.quantitative_score([1.25, 1.3, math.nan, 0.75], [1, 1, 1, 1])
    assert (score.within_25, score.answered, score.total) == (0.5, 3, 4)
    assert score.abs_rel == pytest.approx((0.25 + 0.3 + 0.25) / 3)
    assert math.isnan(objects.qualitative_accuracy([], []))


# ---------------------------------------------------------------- correspondence

PUBLISHED_PAIR = re.compile(r"\(?\s*(-?\d+(?:\.\d+)?)\s*,\s*(-?\d+(?:\.\d+)?)\s*\)?")


@pytest.mark.parametrize(
    ("text", "pair"),
    [
        ("The corresponding pixel is (338, 52)", (338, 52)),
        ("<think> (1, 2) perhaps </think>\n\n(3.5, -4)", (3.5, -4)),
        ("338,52", (338, 52)),
        ("x is 12 and y is 13", None),
        ("<think> (1, 2)", None),
        (f"({'9' * 400}, 1)", None),
    ],
)
def test_the_first_pair_after_the_thoughts_is_read(text, pair):
    assert correspondence.parse_correspondence(text) == pair


@given(st.text(alphabet="0123456789.,-() x\n", max_size=30))
def test_pairs_are_found_as_by_the_published_expression(text):
    found = PUBLISHED_PAIR.search(text)
    expected = tuple(map(float, found.groups())) if found else None
    assert correspondence.parse_correspondence(text) == expected


def test_both_sides_are_scaled_by_the_longer_as_in_the_published_sample():
    view = correspondence.long_edge_view(np.zeros((400, 600, 3), np.uint8))
    assert view.image.shape == (683, 1024, 3)
    # The first rows of VLM3's pixel_corr_labels.json: original pixels, and coordinates on [0, 1000] to three digits.
    pixels = np.array([[264, 24], [176, 32], [472, 40], [208, 88]])
    published = np.array([[440.0, 59.971], [293.333, 79.961], [786.667, 99.951], [346.667, 219.893]])
    np.testing.assert_array_equal(view.to_units(pixels), np.rint(published))
    np.testing.assert_allclose(view.to_source(published), pixels, atol=1e-3)


@pytest.mark.parametrize("size", [(400, 600), (480, 640), (1500, 1000), (37, 61), (1, 5000)])
@pytest.mark.parametrize("policy", ["published", "exact"])
def test_places_come_back_to_the_source_pixel(size, policy):
    height, width = size
    view = correspondence.long_edge_view(np.zeros((*size, 3), np.uint8), policy, ImageGrid(32, 1, 1 << 20))
    if policy == "exact":
        assert view.image.shape[0] % 32 == view.image.shape[1] % 32 == 0
    assert max(view.image.shape) == 1024
    corners = np.array(list(itertools.product([0, width // 2, width - 1], [0, height // 2, height - 1])), float)
    back = view.to_source(view.to_units(corners))
    # Half a unit of [0, 1000], and what the published size is rounded by.
    assert (np.abs(back - corners) <= np.array([width, height]) / 2000 * (1 + 1e-9) + 0.51 * max(size) / 1024).all()
    assert ((back >= 0) & (back <= (width - 1, height - 1))).all()


def test_answers_off_the_scale_are_no_pixels_but_count_in_the_error():
    view = correspondence.long_edge_view(np.zeros((400, 600, 3), np.uint8))
    result = correspondence.read_matches(view, view, [[10, 20], [30, 40], [5, 5]], ["(1200, 5)", "(1000, 1000)", "?"])
    assert result.valid.tolist() == [False, True, False]
    assert result.pixels_b[1].tolist() == [599, 399]
    assert result.units_b[0].tolist() == [1200, 5]
    error = correspondence.endpoint_error(result.units_b, [[1200, 8], [1000, 996], [1, 1]])
    assert (error.mean, error.median, error.answered, error.total) == (3.5, 3.5, 2, 3)


def test_an_empty_comparison_has_no_error():
    error = correspondence.endpoint_error([[math.nan, 1]], [[1, 1]])
    assert math.isnan(error.mean) and math.isnan(error.median) and error.answered == 0
    with pytest.raises(PixelError, match="1 places were said and 2 are true"):
        correspondence.endpoint_error([[1, 1]], [[1, 1], [2, 2]])


def test_what_cannot_be_matched_is_named():
    view = correspondence.long_edge_view(np.zeros((4, 6, 3), np.uint8))
    with pytest.raises(PixelError, match=r"pixel \(6, 1\) is outside of the 6x4 image"):
        view.to_units([[6, 1]])
    with pytest.raises(PixelError, match="outside"):
        view.to_units([[math.nan, 1]])
    with pytest.raises(ImageError, match="float32"):
        correspondence.long_edge_view(np.zeros((4, 6, 3), np.float32))
    with pytest.raises(PixelError, match=r"\(1001, 0\)"):
        correspondence.correspondence_question(1001, 0)


# ---------------------------------------------------------------- pose

RIGHT, DOWN, FORWARD = np.eye(3)


@pytest.mark.parametrize(
    ("angles", "axis", "goes_to"),
    [
        ((90, 0, 0), FORWARD, RIGHT),
        ((90, 0, 0), RIGHT, -FORWARD),
        ((0, 90, 0), FORWARD, -DOWN),
        ((0, 90, 0), DOWN, FORWARD),
        ((0, 0, 90), RIGHT, DOWN),
        ((0, 0, 90), DOWN, -RIGHT),
        # After turning right, looking up is about the new right axis, and banking about the new forward axis.
        ((90, 90, 0), FORWARD, -DOWN),
        ((90, 0, 90), RIGHT, DOWN),
        ((90, 0, 90), FORWARD, RIGHT),
    ],
)
def test_turns_move_the_axes_where_the_words_say(angles, axis, goes_to):
    np.testing.assert_allclose(euler_matrix(*angles) @ axis, goes_to, atol=1e-12)


def about(axis, degrees):
    """Rotation about a unit axis by Rodrigues' formula."""
    x, y, z = axis
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    angle = math.radians(degrees)
    return np.eye(3) + math.sin(angle) * cross + (1 - math.cos(angle)) * cross @ cross


@given(st.tuples(*[st.floats(-179, 179)] * 3))
def test_intrinsic_turns_equal_turns_about_the_axes_as_they_stand(angles):
    """Built without the product of the three matrices: each turn is about an axis of the camera as it is by then."""
    camera = np.eye(3)
    for axis, angle in ((1, angles[0]), (0, angles[1]), (2, angles[2])):
        camera = about(camera[:, axis], angle) @ camera
    np.testing.assert_allclose(euler_matrix(*angles), camera, atol=1e-9)


@given(st.floats(-179, 179), st.floats(-90, 90), st.floats(-179, 179))
def test_angles_and_matrix_are_the_same_rotation(yaw, pitch, roll):
    rotation = euler_matrix(yaw, pitch, roll)
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(3), atol=1e-12)
    assert np.linalg.det(rotation) == pytest.approx(1)
    np.testing.assert_allclose(euler_matrix(*euler_angles(rotation)), rotation, atol=1e-7)
    if abs(pitch) < 89:
        assert euler_angles(rotation) == pytest.approx((yaw, pitch, roll), abs=1e-6)


@pytest.mark.parametrize("pitch", [90, -90])
def test_straight_up_and_down_roll_is_taken_as_zero(pitch):
    rotation = euler_matrix(25, pitch, 10)
    assert euler_angles(rotation)[1:] == pytest.approx((pitch, 0))
    np.testing.assert_allclose(euler_matrix(*euler_angles(rotation)), rotation, atol=1e-9)


def test_the_published_samples_rotation_angle_comes_out():
    assert rotation_angle_deg(euler_matrix(*SAMPLE_ANGLES)) == pytest.approx(SAMPLE_ROTATION_DEG, abs=1e-6)
    # It doesn't if one of them turns the other way, or in the opposite order (the transposed of negative turns).
    yaw, pitch, roll = SAMPLE_ANGLES
    opposite = euler_matrix(-yaw, -pitch, -roll).T
    for other in (euler_matrix(yaw, pitch, -roll), euler_matrix(yaw, -pitch, roll), opposite):
        assert abs(rotation_angle_deg(other) - SAMPLE_ROTATION_DEG) > 0.2


@given(st.floats(0, 180), st.tuples(*[st.floats(-1, 1)] * 3).filter(lambda v: np.linalg.norm(v) > 0.1))
def test_the_rotation_angle_is_the_angle_turned(degrees, axis):
    rotation = about(np.array(axis) / np.linalg.norm(axis), degrees)
    assert rotation_angle_deg(rotation) == pytest.approx(degrees, abs=1e-5)


@given(st.tuples(*[st.floats(-179, 179)] * 3))
def test_the_quaternion_is_the_same_rotation(angles):
    x, y, z, w = RelativePose(0, *angles, np.zeros(3), 0).quaternion_xyzw()
    assert x * x + y * y + z * z + w * w == pytest.approx(1)
    matrix = np.array([
        [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
        [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
        [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
    ])  # fmt: skip
    np.testing.assert_allclose(matrix, euler_matrix(*angles), atol=1e-9)


def test_the_published_samples_answers_are_read():
    said = RelativePose.from_texts(SAMPLE_TEXTS)
    assert (said.rotation_deg, said.yaw_deg, said.pitch_deg, said.roll_deg) == (89.7, 89.6, 2.6, 6.1)
    assert said.distance_m == 1.98
    unit = np.array([-0.69, 0.02, 0.72]) / math.sqrt(0.69**2 + 0.02**2 + 0.72**2)
    np.testing.assert_allclose(said.direction, unit)
    np.testing.assert_allclose(said.translation_m(), 1.98 * unit)
    assert said.texts == SAMPLE_TEXTS
    true = RelativePose.from_matrix(euler_matrix(*SAMPLE_ANGLES), 1.98066 * unit)
    errors = pose.pose_errors(said, true)
    assert errors.rotation_deg < 0.06 and errors.angle_deg < 0.05 and errors.direction_deg < 1e-5
    assert errors.distance_m == pytest.approx(0.00066) and errors.distance_rel == pytest.approx(0.00066 / 1.98066)


def test_what_was_not_said_is_nan():
    said = RelativePose.from_texts(dict.fromkeys(SAMPLE_TEXTS, "I can't tell."))
    assert math.isnan(said.rotation_deg) and math.isnan(said.distance_m)
    for values in (said.direction, said.rotation_matrix(), said.translation_m(), said.quaternion_xyzw()):
        assert np.isnan(values).any()
    errors = pose.pose_errors(said, RelativePose.from_matrix(np.eye(3), [0, 0, 1]))
    assert all(math.isnan(value) for value in vars(errors).values())


@pytest.mark.parametrize(
    ("parse", "text", "value"),
    [
        (pose.parse_angle_deg, "rotated by 12.5°", 12.5),
        (pose.parse_angle_deg, "-3 deg", -3),
        (pose.parse_angle_deg, "3 radians", None),
        (pose.parse_distance_m, "moved 0.5 m.", 0.5),
        (pose.parse_distance_m, "moved 5 miles", None),
        (pose.parse_distance_m, "-2 meters", None),
        (pose.parse_euler_deg, "YAW 3 pitch: -4 Roll=+5", (3, -4, 5)),
        (pose.parse_euler_deg, "pitch=1", (None, 1, None)),
    ],
)
def test_pose_answers(parse, text, value):
    assert parse(text) == value


def test_directions_are_made_unit_vectors():
    np.testing.assert_allclose(pose.parse_direction("(x, y, z) = (0, 3, 4)"), [0, 0.6, 0.8])
    np.testing.assert_allclose(pose.parse_direction(f"(1{'0' * 200}, 0, 0)"), [1, 0, 0])
    assert pose.parse_direction("(0, 0, 0.0)") is None
    assert pose.parse_direction("(1, 2)") is None


def test_angles_are_compared_the_short_way_around_and_opposite_directions_are_180_degrees_apart():
    a = RelativePose(10, 179, 0, 0, FORWARD, 1)
    b = RelativePose(12, -179, 0, 0, -FORWARD, 2)
    errors = pose.pose_errors(a, b)
    assert (errors.yaw_deg, errors.angle_deg, errors.direction_deg) == (2, 2, 180)
    assert errors.rotation_deg == pytest.approx(2)
    assert (errors.distance_m, errors.distance_rel) == (1, 0.5)


def test_area_under_the_accuracy_curve():
    assert pose.auc([0, 0], [0, 0]) == pose.auc([0], [0], bins=False) == 1
    assert pose.auc([31, 0], [0, math.nan]) == pose.auc([31, 0], [0, math.nan], bins=False) == 0
    # An error of 4.5 degrees is below the thresholds 5 to 30: 26 of 30; the exact area is 25.5 of 30.
    assert pose.auc([1], [4.5]) == pytest.approx(26 / 30)
    assert pose.auc([1], [4.5], bins=False) == pytest.approx(25.5 / 30)
    # The mean of a cumulated histogram with bins of one degree, as the pose benchmarks compute it.
    rotation, direction = np.random.default_rng(0).uniform(0, 40, (2, 500))
    histogram = np.histogram(np.maximum(rotation, direction), bins=np.arange(31))[0]
    assert pose.auc(rotation, direction) == pytest.approx(np.mean(np.cumsum(histogram / 500)))
    assert math.isnan(pose.auc([], []))
    with pytest.raises(PixelError, match="2 rotation and 1 direction"):
        pose.auc([1, 2], [1])


def test_a_camera_that_stayed_has_no_direction():
    still = RelativePose.from_matrix(np.eye(3), [0, 0, 0])
    assert still.rotation_deg == still.distance_m == 0 and np.isnan(still.direction).all()


# ---------------------------------------------------------------- motion


@pytest.mark.parametrize(
    ("parse", "text", "value"),
    [
        (motion.parse_speed_mps,
         "The point is around 7.23 meters away. Hence, the speed should be around 7.23 / 4.0 = 1.81m/s", 1.81),
        (motion.parse_seconds,
         "The point is around 48.28 meters away. Hence, we need around 48.28 / 6.0 = 8.05s", 8.05),
        (motion.parse_metres, "The point is around 7.23 meters away.", 7.23),
        (motion.parse_metres, "at 3 m/s it is 4.5 m away", 4.5),
        (motion.parse_metres, "4 meters per second", None),
        (motion.parse_metres, "<think> The point is around 9 meters away. </think>\n\n<answer> 8.5 </answer>", 8.5),
        (motion.parse_seconds, "8.05 seconds", 8.05),
        (motion.parse_speed_mps, "2 meters per second", 2),
        (motion.parse_seconds, "soon", None),
        (motion.parse_metres, "<think> 5 m", None),
    ],
)  # fmt: skip
def test_motion_answers_end_with_their_number(parse, text, value):
    assert parse(text) == value


def test_measured_points_obey_geometry():
    measured = motion.Measured(np.zeros((3, 2)), np.array([[3.0, 0, 4], [3, 0, 16], [np.nan] * 3]))
    assert measured.axis_distance_m[:2].tolist() == [4, 16]
    assert measured.range_m[0] == 5
    assert measured.distance_m(0, 1) == 12
    assert measured.speed_to_reach_mps(2)[0] == 2.5
    assert measured.time_to_reach_s(0.5)[0] == 10
    assert math.isnan(measured.distance_m(0, 2))
    with pytest.raises(PixelError, match="points 0 and 3 of 3"):
        measured.distance_m(0, 3)
    with pytest.raises(ConfigError, match="time in seconds is 0"):
        measured.speed_to_reach_mps(0)
