"""The published metric's verdicts: the golden ones, its quirks one by one, and its rule on texts of any kind."""

from __future__ import annotations

import json
import re
import threading
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from depthlm_ros import compat
from depthlm_ros.compat import is_correct, read_number, read_vlm3_number, verdicts, vlm3_delta1
from depthlm_ros.errors import DatasetError, MissingDependencyError
from depthlm_ros.prompts import answer_text, parse_depth

GOLDEN = json.loads((Path(__file__).parent / "golden" / "metric.json").read_text(encoding="utf-8"))


@pytest.fixture
def math_verify():
    """The parser that the verdicts are made with; it comes with the `test` and `compat` extras."""
    return pytest.importorskip("math_verify", reason=f"run: {compat.INSTALL}")


@pytest.mark.usefixtures("math_verify")
class TestVerdicts:
    @pytest.mark.parametrize("row", GOLDEN, ids=lambda row: f"{row['text'][-32:]!r} at {row['gt']}")
    def test_golden(self, row):
        assert float(is_correct(row["text"], row["gt"])) == row["correct"]

    def test_many_at_once_are_the_golden_ones(self):
        right = verdicts([row["text"] for row in GOLDEN], [row["gt"] for row in GOLDEN])
        assert right.astype(float).tolist() == [row["correct"] for row in GOLDEN]

    @pytest.mark.parametrize(
        ("text", "number"),
        [
            ("1e-2", 1.0),
            ("<answer> about 3 to 4 </answer>", 3.0),
            ("3/4", 0.75),
            ("1,234.5", 1234.5),
            ("3,5", 3.5),
            ("<answer>-3.2</answer>", None),
            ("<answer> -3.2 </answer>", -3.2),
            ("<answer> 5% </answer>", None),
            ("<think> The point is around 7.00 meters away. </think>", 7.0),
            ("<think> around 7.00 meters </think> <answer> far </answer>", 7.0),
            ("<answer> 0 </answer>", 0.0),
            ("<answer> 1/0 </answer>", None),
            ("$x$", None),
            ("$\\frac{5}{2}$", 2.5),
            ("", None),
        ],
    )
    def test_what_is_read(self, text, number):
        assert read_number(text) == number

    def test_the_bound_itself_is_wrong(self):
        assert not is_correct("<answer> 2.5 </answer>", 2.0)
        assert is_correct("<answer> 2.5 </answer>", np.nextafter(2.0, 3.0))

    def test_a_negative_answer_is_always_right(self):
        assert all(is_correct("<answer> -2.0 </answer>", true) for true in (0.1, 2.0, 500.0))

    def test_a_tower_of_powers_is_wrong_and_ends(self, monkeypatch):
        monkeypatch.setattr(compat, "_SECONDS", 1)
        assert read_number("<answer> 9^9^9^9 </answer>") is None

    def test_other_threads_get_the_same_verdicts(self):
        texts = list(dict.fromkeys(row["text"] for row in GOLDEN))
        here, there = [read_number(text) for text in texts], []
        worker = threading.Thread(target=lambda: there.extend(read_number(text) for text in texts))
        worker.start()
        worker.join()
        assert there == here

    @given(st.floats(0.01, 999), st.floats(0.01, 999))
    @settings(max_examples=60, deadline=None)
    def test_well_formed_answers_get_the_strict_parsers_verdict(self, said, true):
        text = answer_text(said)
        depth = parse_depth(text)
        assert is_correct(text, true) == (max(depth / true, true / depth) < 1.25)

    @given(
        st.text("0123456789.,-+*/()% eE<>answerthink$\\{}^=\n", max_size=40).filter(
            lambda text: "^" not in text and "**" not in text
        ),
        st.floats(0.05, 200),
    )
    @settings(max_examples=150, deadline=None)
    @example("<answer> 3,5 </answer>", 3.5)
    @example("(1)", 1.0)
    def test_any_text_gets_the_verdict_of_the_rule_as_it_is_written(self, text, true):
        from math_verify import parse

        try:
            number = float(parse(text)[0])
            right = max(number / true, true / number) < 1.25
        except Exception:
            right = False
        assert is_correct(text, true) == right


def test_numbers_of_answers_and_depths_must_agree():
    for count in (verdicts, vlm3_delta1):
        with pytest.raises(DatasetError, match="1 answers for 2 depths"):
            count(["2"], [1.0, 2.0])


# The published expression as it stands.
VLM3_ANSWER = r"<answer>\s*([-+]?\d*\.?\d+(?:[eE][-+]?\d+)?)\s*</answer>"


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("<think> 7.00 meters </think>\n\n<answer> 2.42 </answer>", 2.42),
        ("<answer>2.42</answer>", 2.42),
        ("<answer> 1e1 </answer>", 10.0),
        ("<answer> -2.0 </answer>", -2.0),
        ("<answer> .5 </answer>", 0.5),
        ("<answer> 5. </answer>", None),
        ("<answer> 2.42 meters </answer>", None),
        ("<answer> far </answer><answer> 3 </answer>", 3.0),
        ("7.00 meters", None),
    ],
)
def test_what_vlm3_reads(text, number):
    assert read_vlm3_number(text) == number


@given(st.lists(st.sampled_from(["<answer>", "</answer>", " ", "-", "+", ".", "e", "E", "0", "17", "x", "\n"])))
@example(["<answer>", "17", ".", "0", "e", "-", "0", " ", "</answer>"])
def test_vlm3s_expression_is_kept(parts):
    text = "".join(parts)
    found = re.search(VLM3_ANSWER, text)
    assert read_vlm3_number(text) == (float(found.group(1)) if found else None)


def test_a_megabyte_of_digits_is_read_at_once():
    assert read_vlm3_number("<answer>" + "1" * 1_000_000) is None


def test_vlm3_counts_only_what_it_reads():
    said = ["<answer> 2 </answer>", "<answer> 9 </answer>", "far", "<answer> -2 </answer>", "<answer> 0 </answer>"]
    assert vlm3_delta1(said, [2.0] * 5) == (0.5, 2)
    assert vlm3_delta1(["<answer> 2.5 </answer>"], [2.0]) == (0.0, 1)
    share, counted = vlm3_delta1(["far"], [2.0])
    assert np.isnan(share) and counted == 0


@pytest.mark.parametrize(("seen", "message"), [(None, "needs math-verify"), ("0.8.0", "0.8.0 is installed")])
def test_without_the_right_math_verify_the_install_line_is_named(monkeypatch, seen, message):
    def version(name):
        if seen is None:
            raise metadata.PackageNotFoundError(name)
        return seen

    compat.require_math_verify.cache_clear()
    monkeypatch.setattr(compat.metadata, "version", version)
    with pytest.raises(MissingDependencyError, match=rf'{message}.*pip install "math-verify\[antlr4_13_2\]==0.9.0"'):
        read_number("2")
