"""The published questions, the answer grammar, and a parser that meets arbitrary text."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from depthlm_ros.errors import DatasetError, DialectError, PixelError
from depthlm_ros.prompts import (
    LONGEST_NUMBER,
    MAX_DEPTH_M,
    MIN_DEPTH_M,
    NUMBER,
    SAME,
    SYSTEM_TEXT,
    answer_template,
    answer_text,
    compact_answer,
    compact_question,
    compact_questions,
    coordinates_question,
    dense_question,
    marker_question,
    normalise_pixel,
    parse_compact,
    parse_compact_points,
    parse_depth,
    parse_depths,
)

GOLDEN = Path(__file__).parent / "golden"

# The expression of VLM3's published notebook.
VLM3_ANSWER = re.compile(r"<answer>\s*([-+]?\d*\.?\d+(?:[eE][-+]?\d+)?)\s*</answer>")

# Text near the grammar, where a parser goes wrong, rather than anything at all.
PIECES = ["<answer>", "</answer>", "<think>", "</think>", "<answer", "answer>", " ", "\n", "\t", "\u00a0", ".", "-",
          "+", "0", "1", "42", "2.42", ".5", "5.", "1e1", "inf", "nan", "m", "meters", "1,234.5", "1_000", "٣", "²",
          "0" * 400, "9" * 400]  # fmt: skip
near_answers = st.lists(st.sampled_from(PIECES), max_size=12).map("".join)
bodies = st.text(st.sampled_from("0123456789.+-eE_, \n٣m"), max_size=12).map(lambda t: f"<answer>{t}</answer>")


def test_marker_question_is_the_one_depthlm_was_run_with():
    cases = json.loads((GOLDEN / "depthlm" / "dev.json").read_text(encoding="utf-8"))
    published = {point["prompt"] for case in cases for point in case["expected"] if point}
    assert published == {marker_question()}


def test_coordinates_question_is_vlm3s():
    assert coordinates_question(314, 259) == (
        "Given this image, how far is the point at coordinates (314, 259) from the camera? The coordinates are in "
        "normalised [0, 2000] format relative to image width and height. Output the thinking process in <think> "
        "</think> and final answer (the meter number only, without the unit) in <answer> </answer> tags."
    )


def test_dense_question_is_depthvlms():
    assert dense_question() == (
        "Given this image, estimate the metric depth (in meters, rounded to two decimal places) for every pixel of the "
        "image."
    )


def test_dense_question_is_the_one_in_depthvlms_labels(data_folder):
    rows = (data_folder / "scannetpp" / "labels.jsonl").read_text(encoding="utf-8").splitlines()
    assert {json.loads(row)["prompt"] for row in rows} == {dense_question()}


def test_the_system_text_is_the_one_of_depthlm_and_depthvlm():
    assert SYSTEM_TEXT == "You are a helpful assistant."


def test_coordinates_question_takes_numpy_integers_and_writes_plain_ones():
    assert "(7, 12)" in coordinates_question(np.int64(7), np.int32(12))


@pytest.mark.parametrize("pixel", [(-1, 0), (0, 2000), (2000, 0)])
def test_coordinates_question_refuses_coordinates_out_of_range(pixel):
    with pytest.raises(PixelError, match=r"outside \[0, 2000\)"):
        coordinates_question(*pixel)


@pytest.mark.parametrize(
    ("pixel", "normalised"),
    [((10, 488), (16, 1061)), ((191, 119), (314, 259)), ((710, 320), (1169, 696)), ((1182, 773), (1946, 1680))],
)
def test_pixels_are_normalised_as_in_vlm3s_sample_data(pixel, normalised):
    assert tuple(normalise_pixel(np.array([pixel]), 1215, 920)[0]) == normalised


@settings(deadline=None)
@given(width=st.integers(1, 10_000), height=st.integers(1, 10_000), data=st.data())
def test_normalised_pixels_stay_below_the_range(width, height, data):
    u, v = data.draw(st.integers(0, width)), data.draw(st.integers(0, height))
    n = normalise_pixel(np.array([[u, v]]), width, height)
    assert n.dtype == np.int64
    assert ((n >= 0) & (n < 2000)).all()
    assert tuple(n[0]) == tuple(min(round(x / size * 2000), 1999) for x, size in ((u, width), (v, height)))


@pytest.mark.parametrize("pixel", [(math.nan, 1), (641.5, 3), (5, -2), (math.inf, 0)])
def test_normalise_pixel_names_a_pixel_outside_the_image(pixel):
    with pytest.raises(PixelError, match="640x480"):
        normalise_pixel(np.array([(1, 1), pixel]), 640, 480)


def test_normalise_pixel_refuses_another_shape():
    with pytest.raises(PixelError, match=r"\(2,\)"):
        normalise_pixel(np.array([1, 2]), 640, 480)


def test_normalise_pixel_of_nothing_is_nothing():
    assert normalise_pixel(np.zeros((0, 2)), 640, 480).shape == (0, 2)


def test_answer_text_is_depthlms_training_target():
    assert answer_text(2.424) == (
        "<think> The point is around 2.42 meters away from the camera. </think>\n\n<answer> 2.42 </answer>"
    )


@settings(deadline=None)
@given(st.floats(0.01, MAX_DEPTH_M))
def test_a_written_depth_is_read_back_to_the_centimetre(depth_m):
    assert parse_depth(answer_text(depth_m)) == pytest.approx(depth_m, abs=0.005 + 1e-9)


@pytest.mark.parametrize("depth_m", [0.0, 0.004, -1.0, math.nan, math.inf, 2e4])
def test_a_depth_that_the_text_cannot_carry_is_refused(depth_m):
    with pytest.raises(DatasetError, match="can't be written"):
        answer_text(depth_m)


@pytest.mark.parametrize(
    ("text", "depth_m"),
    [
        ("<answer> 2.42 </answer>", 2.42),
        ("<answer>3</answer>", 3.0),
        ("<answer>\n\t.5\n</answer>", 0.5),
        ("<think> 7 </think>\n\n<answer> 10.00 </answer> and on it goes 3", 10.0),
        ("<answer> 007.50 </answer>", 7.5),
    ],
)
def test_one_plain_number_between_the_tags_is_read(text, depth_m):
    assert parse_depth(text) == depth_m


@pytest.mark.parametrize(
    "text",
    [
        "",
        "2.42",
        "<think> The point is around 7.00 meters away from the camera. </think>",
        "<answer> 2.42",
        "2.42 </answer>",
        "</answer> 2.42 <answer>",
        "<answer> </answer>",
        "<answer> 1 </answer><answer> 2 </answer>",
        "<answer> <answer> 2 </answer> </answer>",
        "<answer> -2.0 </answer>",
        "<answer> +2.0 </answer>",
        "<answer> 0 </answer>",
        "<answer> 0.00 </answer>",
        "<answer> inf </answer>",
        "<answer> nan </answer>",
        "<answer> 1e1 </answer>",
        "<answer> 5. </answer>",
        "<answer> . </answer>",
        "<answer> 1.2.3 </answer>",
        "<answer> 1,234.5 </answer>",
        "<answer> 1_000 </answer>",
        "<answer> 1 2 </answer>",
        "<answer> 1/2 </answer>",
        "<answer> 2.42 meters </answer>",
        "<answer> 2.5m </answer>",
        "<answer> ٣ </answer>",
        "<answer> 10000.01 </answer>",
        "<answer> 0.00001 </answer>",
        "<ANSWER> 2 </ANSWER>",
    ],
)
def test_everything_else_is_no_answer(text):
    assert parse_depth(text) is None


@settings(deadline=None)
@given(st.one_of(st.text(), near_answers, bodies))
@example("<answer>0." + "0" * 50 + "1</answer>")
@example("<answer>" + "9" * 5000 + "</answer>")
def test_no_text_breaks_the_parser_or_gives_an_impossible_depth(text):
    depth_m = parse_depth(text)
    assert depth_m is None or MIN_DEPTH_M <= depth_m <= MAX_DEPTH_M


@settings(deadline=None)
@given(st.one_of(near_answers, bodies))
def test_what_is_read_is_what_vlm3s_expression_reads(text):
    depth_m = parse_depth(text)
    if depth_m is not None:
        assert float(VLM3_ANSWER.search(text).group(1)) == depth_m


@settings(deadline=None)
@given(st.lists(st.one_of(near_answers, bodies), max_size=8))
def test_many_answers_are_float32_with_nan_where_there_is_none(texts):
    depths = parse_depths(texts)
    assert depths.dtype == np.float32 and depths.shape == (len(texts),)
    assert (np.isnan(depths) | ((depths > 0) & np.isfinite(depths))).all()
    assert [math.isnan(d) for d in depths] == [parse_depth(t) is None for t in texts]


def test_texts_that_depthlms_scorer_was_run_on_give_a_depth_or_none():
    texts = {row["text"] for row in json.loads((GOLDEN / "metric.json").read_text(encoding="utf-8"))}
    read = {text: parse_depth(text) for text in texts if parse_depth(text) is not None}
    assert sorted(read.values()) == [0.5, 2.42, 3.0, 3.5, 10.0]


def test_a_megabyte_of_digits_is_read_in_linear_time():
    assert parse_depth("<answer>" + "1" * 1_000_000 + "x</answer>") is None


def test_the_compact_question_ends_with_the_pixel_in_digits_that_keep_their_place():
    question = compact_question(7, 512)
    assert question == (
        "Given this image, estimate the metric depth (in meters, rounded to two decimal places) at coordinates in "
        "[0, 1000): 007,512"
    )
    assert compact_question(np.int64(999), 0, 1000).endswith(" 999,000")
    assert compact_question(7, 1, 50).endswith("[0, 50): 07,01")


@given(st.integers(0, 999), st.integers(0, 999), st.integers(0, 999), st.integers(0, 999))
def test_compact_questions_differ_in_their_last_seven_characters_only(a, b, c, d):
    first, second = compact_question(a, b), compact_question(c, d)
    assert len(first) == len(second) and first[:-7] == second[:-7]
    assert (first == second) == ((a, b) == (c, d))


def test_compact_questions_share_the_pixels_out_in_their_order_and_the_last_takes_what_is_left():
    pixels = [(1, 2), (3, 4), (5, 6), (7, 8), (9, 10)]
    assert compact_questions(pixels) == [compact_question(x, y) for x, y in pixels]
    ends = [question.partition("): ")[2] for question in compact_questions(pixels, 2)]
    assert ends == ["001,002 003,004", "005,006 007,008", "009,010"]
    assert compact_questions([], 4) == []


@pytest.mark.parametrize("pixel", [(1000, 0), (0, 1000), (-1, 0)])
def test_a_compact_question_refuses_what_is_out_of_range(pixel):
    with pytest.raises(PixelError, match=r"outside \[0, 1000\)"):
        compact_question(*pixel)
    with pytest.raises(PixelError, match="0 points a question"):
        compact_questions([(1, 1)], 0)


@pytest.mark.parametrize("dialect", ["coordinates", "marker"])
def test_the_template_of_a_sentence_is_the_training_target_with_its_number_left_open(dialect):
    assert answer_template(dialect).replace(NUMBER, "3.42").replace(SAME, "3.42") == answer_text(3.42)


@given(st.lists(st.floats(0.01, MAX_DEPTH_M), min_size=1, max_size=5))
def test_a_compact_answer_fills_its_template_and_is_read_back_to_the_centimetre(depths_m):
    text = compact_answer(depths_m)
    pattern = re.escape(answer_template("compact", len(depths_m))).replace(re.escape(NUMBER), r"\d+\.\d\d")
    assert re.fullmatch(pattern, text)
    assert parse_compact_points(text, len(depths_m)) == pytest.approx(depths_m, abs=0.00501)
    assert len(text) < len(depths_m) * LONGEST_NUMBER
    if len(depths_m) == 1:
        assert (parse_compact(text),) == parse_compact_points(text, 1)


@pytest.mark.parametrize(("dialect", "points"), [("dense", 1), ("marker", 2), ("coordinates", 0), ("compact", 0),
                                                 ("spoken", 1)])  # fmt: skip
def test_there_is_no_template_where_there_is_no_answer_in_words(dialect, points):
    with pytest.raises(DialectError, match=f"'{dialect}' has no answer in words about {points} points"):
        answer_template(dialect, points)


@pytest.mark.parametrize("depth_m", [math.nan, math.inf, -1.0, 0.001, 2 * MAX_DEPTH_M])
def test_a_compact_answer_refuses_what_it_cannot_carry(depth_m):
    with pytest.raises(DatasetError, match="leave the point out"):
        compact_answer([1.0, depth_m])


@given(st.text(st.sampled_from("0123456789.+-eE_, \n\t\u00a0٣m"), max_size=12))
@example(" 3.42\n")
@example("3.42 4.1")
@example("9" * 400)
def test_compact_takes_exactly_what_stands_between_the_tags_of_a_sentence(text):
    assert parse_compact(text) == parse_depth(f"<answer>{text}</answer>")


@pytest.mark.parametrize("text", ["", " ", "3.42 m", "3.42m", "<answer> 3.42 </answer>", "3.42 3.42", "-1", "0", "1e3",
                                  "nan", "inf", "3,42", "3.4.2", "20000", "٣"])  # fmt: skip
def test_anything_beside_one_bare_number_is_no_compact_answer(text):
    assert parse_compact(text) is None


@pytest.mark.parametrize(("text", "depths_m"), [
    ("3.42 11.08", (3.42, 11.08)),
    ("3.42,11.08", (3.42, 11.08)),
    (" 3.42 .5\n", (3.42, 0.5)),
    ("3.42", None),
    ("3.42 11.08 1", None),
    ("3.42  11.08", None),
    ("3.42, 11.08", None),
    ("3.42\n11.08", None),
    ("3.42\t 11.08", None),
    ("3.42 far", None),
    ("3.42 -1", None),
    ("3.42 0", None),
    ("3.42 20000", None),
    ("", None),
])  # fmt: skip
def test_two_points_get_two_numbers_or_none(text, depths_m):
    assert parse_compact_points(text, 2) == depths_m


@given(st.lists(st.sampled_from([*PIECES, "3.42", " ", ","]), max_size=12).map("".join), st.integers(0, 5))
def test_no_text_gives_another_number_of_depths_than_was_asked(text, points):
    depths = parse_compact_points(text, points)
    assert depths is None or (
        len(depths) == points and all(MIN_DEPTH_M <= depth_m <= MAX_DEPTH_M for depth_m in depths)
    )
