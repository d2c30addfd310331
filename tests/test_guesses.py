"""Numbers guessed from the frame before: used where they mostly hold, and never believed."""

from __future__ import annotations

import re
from types import SimpleNamespace

import numpy as np
import pytest
from speakers import SENTENCE, make_speaker

from depthlm_ros.engines.transformers_engine import TransformersEngine
from depthlm_ros.guesses import LastAnswers


def said(*texts):
    return [SimpleNamespace(text=text) for text in texts]


def test_nothing_is_guessed_before_two_frames_agreed():
    last = LastAnswers()
    assert last.guesses(["a", "b"]) is None
    last.remember(["a", "b"], said("is 1.25 m", "2.50"))
    assert last.guesses(["a", "b"]) is None
    last.remember(["a", "b"], said("is 1.25 m", "2.75"))
    assert last.guesses(["a", "b", "c"]) == ["1.25", "2.75", ""]


def test_guessing_ends_when_the_scene_moves():
    last = LastAnswers()
    for texts in (("1.00", "2.00", "3.00"), ("1.00", "2.00", "3.00"), ("1.10", "2.10", "3.00")):
        last.remember(["a", "b", "c"], said(*texts))
    assert last.guesses(["a", "b", "c"]) is None


def test_other_questions_have_no_guess():
    last = LastAnswers()
    last.remember(["a"], said("1.00"))
    last.remember(["a"], said("1.00"))
    assert last.guesses(["b"]) is None


@pytest.mark.parametrize("architecture", ["qwen3_vl", "qwen2_5_vl", "llava"])
def test_guesses_change_no_answer_and_are_accepted_where_they_hold(tmp_path, architecture):
    engine = TransformersEngine.load(make_speaker(tmp_path, architecture), device="cpu", dtype="float32")
    image = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    questions = [f"How far is the point at ({x}, 7)?" for x in range(100, 140)]

    def answers(guesses=None):
        said = engine.answer_shared(image, questions, 24, expects=SENTENCE, guesses=guesses)
        return [answer.token_ids for answer in said], [answer.text for answer in said]

    expected, texts = answers()
    accepted = engine.work.accepted
    numbers = [re.search(r"[0-9.]+", text).group() for text in texts]
    assert answers(numbers)[0] == expected
    assert engine.work.accepted > accepted
    assert answers([number[::-1] for number in numbers[1:]] + ["no number"])[0] == expected
