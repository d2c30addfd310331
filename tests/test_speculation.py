"""What a trained sentence says next, wherever an answer stands; and nothing where it says something else."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from depthlm_ros.bench.shapes import find_shape
from depthlm_ros.bench.vocabulary import build_tokenizer
from depthlm_ros.engines.speculation import Sentence
from depthlm_ros.engines.transformers_engine import TransformersEngine
from depthlm_ros.errors import EngineError
from depthlm_ros.prompts import answer_template, answer_text

PUBLISHED = answer_template("coordinates")
TEMPLATES = {
    "published": PUBLISHED,
    "compact": answer_template("compact"),
    "compact, two points": answer_template("compact", 2),
    "twice the same in a row": "{number} {same} {same} m",
    "two numbers, one of them again": "x {number} y {number} z {same}.",
}


@pytest.fixture(scope="module")
def tokenizer():
    """Splits text as Qwen's does."""
    return PreTrainedTokenizerFast(tokenizer_object=build_tokenizer(find_shape("qwen3-vl-4b")))


@pytest.fixture(scope="module")
def sentences(tokenizer):
    return {name: Sentence(tokenizer, template) for name, template in TEMPLATES.items()}


def encoded(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def written(template, *numbers):
    """The template with its numbers, each "{same}" that of the one before."""
    text, number = "", ""
    for part in re.split(r"(\{number\}|\{same\})", template):
        if part == "{number}":
            number, *numbers = numbers
        text += number if part in ("{number}", "{same}") else part
    return text


def cut(tokenizer, text, at):
    """Tokens of a text before and after the character `at`."""
    return encoded(tokenizer, text[:at]), encoded(tokenizer, text[at:])


def test_the_text_of_a_template_is_the_published_answer():
    assert written(PUBLISHED, "7.31") == answer_text(7.31)
    assert written("{number} {number}", "1.00", "2.00") == "1.00 2.00"


# ---------------------------------------------------------------- an answer that is the sentence


@pytest.mark.parametrize("number", ["7.31", "0.07", "12.05", "119.99"])
def test_the_published_sentence_is_proposed_at_every_cut(tokenizer, sentences, number):
    """All but the digits, which only the model knows; and those too where they are repeated."""
    text, sentence = written(PUBLISHED, number), sentences["published"]
    tokens = encoded(tokenizer, text)
    start = len(encoded(tokenizer, text[: text.index(number)]))
    point, end = start + number.index("."), start + len(number)
    assert tokens[start:end] == encoded(tokenizer, number) and len(tokens) > end + 15
    for at in range(len(tokens) + 1):
        rest = tokens[at:]
        if at < start:
            expected = rest[: start - at]
        elif at == start or point < at < end:
            expected = []
        elif at <= point:
            expected = [tokens[point]]  # the point may come after every digit
        else:
            expected = rest
        assert sentence.propose(tokens[:at]) == expected, f"after {at} tokens"
    assert sentence.head == tokens[:start]


def test_a_bare_number_has_nothing_to_propose_but_its_point(tokenizer, sentences):
    sentence, point = sentences["compact"], encoded(tokenizer, ".")
    tokens = encoded(tokenizer, "12.34")
    assert [sentence.propose(tokens[:at]) for at in range(6)] == [[], point, point, [], [], []]
    assert sentence.head == []


def test_between_two_numbers_what_stands_between_is_proposed(tokenizer, sentences):
    sentence, point, space = (sentences["compact, two points"], encoded(tokenizer, "."), encoded(tokenizer, " "))
    tokens = encoded(tokenizer, "7.31 11.08")
    expected = [[], point, [], [], space, [], point, point, [], [], []]
    assert [sentence.propose(tokens[:at]) for at in range(len(tokens) + 1)] == expected


def test_a_number_that_is_repeated_in_a_row_is_proposed_to_the_end(tokenizer, sentences):
    text = "7.31 7.31 7.31 m"
    for at in range(4, len(text) + 1):
        said, rest = cut(tokenizer, text, at)
        assert sentences["twice the same in a row"].propose(said) == rest


def test_after_a_repeated_number_another_one_is_left_to_the_model(tokenizer, sentences):
    sentence = sentences["two numbers, one of them again"]
    said, rest = cut(tokenizer, "x 7.31 y 2.50 z 2.50.", len("x 7.31"))
    assert sentence.propose(said) == encoded(tokenizer, " y ") == rest[:3]
    said, rest = cut(tokenizer, "x 7.31 y 2.50 z 2.50.", len("x 7.31 y 2.50"))
    assert sentence.propose(said) == rest


def test_the_point_is_proposed_where_most_numbers_had_it(tokenizer):
    """Which is after one digit until a model has shown otherwise, and again once it shows that."""
    sentence = Sentence(tokenizer, PUBLISHED)
    head, point = sentence.head, encoded(tokenizer, ".")

    def proposed(digits):
        return sentence.propose([*head, *encoded(tokenizer, digits)])

    assert [proposed("1"), proposed("12")] == [point, point]
    for _ in range(5):
        sentence.learn(encoded(tokenizer, answer_text(12.34)))
    assert [proposed("1"), proposed("12"), proposed("123")] == [[], point, point]
    for _ in range(9):
        sentence.learn(encoded(tokenizer, answer_text(7.31)))
    assert [proposed("1"), proposed("12")] == [point, point]


def test_nothing_is_learnt_from_answers_that_are_something_else_or_were_cut(tokenizer):
    sentence = Sentence(tokenizer, PUBLISHED)
    head, point = sentence.head, encoded(tokenizer, ".")
    cut_short = [*head, *encoded(tokenizer, "12")]
    other = [*head[1:], *encoded(tokenizer, "x12.34")]
    endless = [*head, *encoded(tokenizer, "123456789.00")]
    for _ in range(5):
        for said in ([], head, cut_short, other, endless):
            sentence.learn(said)
    assert sentence.propose([*head, *encoded(tokenizer, "1")]) == point


@pytest.mark.parametrize("digits", ["12345", "123456789012"])
def test_numbers_longer_than_any_distance_raise_nothing(tokenizer, digits):
    sentence = Sentence(tokenizer, PUBLISHED)
    for _ in range(3):
        sentence.learn([*sentence.head, *encoded(tokenizer, digits + ".00")])
    assert sentence.propose([*sentence.head, *encoded(tokenizer, digits)]) == encoded(tokenizer, ".")


# ---------------------------------------------------------------- an answer that is something else


def test_three_decimals_are_proposed_nothing_wrong_for_good(tokenizer, sentences):
    """The sentence goes on after two decimals; after a third one it does so again."""
    sentence, text = sentences["published"], written(PUBLISHED, "7.315")
    for decimals in (2, 3):
        said, _ = cut(tokenizer, text, text.index("7.") + 2 + decimals)
        tail = encoded(tokenizer, text[text.index("7.315") + 5 : text.index("<answer> ") + 9])
        assert sentence.propose(said)[: len(tail)] == tail
    said, rest = cut(tokenizer, text, text.index("<answer> ") + 9)
    assert sentence.propose(said) == rest


def test_a_number_without_a_point_is_one_too(tokenizer, sentences):
    text = written(PUBLISHED, "7")
    said, rest = cut(tokenizer, text, text.index("7"))
    assert sentences["published"].propose([*said, *rest[:1]]) == encoded(tokenizer, ".")
    for at in range(2, len(rest)):
        assert sentences["published"].propose([*said, *rest[:at]]) == rest[at:]


@pytest.mark.parametrize("wrong", [0, 1, 5, -2])
def test_another_beginning_is_left_to_the_model(tokenizer, sentences, wrong):
    sentence, tokens = sentences["published"], encoded(tokenizer, answer_text(7.31))
    head = len(sentence.head)
    place = wrong % head
    tokens[place] = encoded(tokenizer, "!")[0]
    assert sentence.propose(tokens[:place]) == sentence.head[place:]
    assert {tuple(sentence.propose(tokens[:at])) for at in range(place + 1, len(tokens) + 1)} == {()}


def test_text_in_place_of_the_number_is_left_to_the_model(tokenizer, sentences):
    sentence = sentences["published"]
    for text in ("far", "!", " meters and more"):
        assert sentence.propose([*sentence.head, *encoded(tokenizer, text)]) == []


@pytest.mark.parametrize("other", ["7.32", "9", "71"])
def test_a_repetition_that_differs_is_left_to_the_model_until_it_ends(tokenizer, sentences, other):
    sentence = sentences["published"]
    beginning = answer_text(7.31).rpartition("7.31")[0]
    start, number = encoded(tokenizer, beginning), encoded(tokenizer, "7.31")
    digits = encoded(tokenizer, other)
    same = next((i for i, (a, b) in enumerate(zip(digits, number, strict=False)) if a != b), len(digits))
    for at in range(len(digits) + 1):
        proposed = sentence.propose([*start, *digits[:at]])
        if at <= same:
            assert proposed[: len(number) - at] == number[at:]
        else:
            assert proposed == []
    ending = encoded(tokenizer, " </answer>")
    assert sentence.propose([*start, *digits, *ending[:1]]) == ending[1:]


def test_what_follows_the_sentence_is_left_to_the_model(tokenizer, sentences):
    whole = encoded(tokenizer, answer_text(7.31))
    assert sentences["published"].propose(whole) == sentences["published"].propose([*whole, 5, 6]) == []


pieces = st.sampled_from([*"0123456789.", " ", "x ", " y ", " z ", "!", "<think>", " </answer>", "meters"])


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(sorted(TEMPLATES)),
    st.lists(st.from_regex(r"[0-9]{1,7}(\.[0-9]{0,4})?", fullmatch=True), min_size=2, max_size=2),
    st.integers(0, 60),
    st.lists(pieces, max_size=4),
)
def test_a_draft_that_came_true_is_proposed_on(tokenizer, sentences, name, numbers, kept, more):
    """However far a model follows a draft, what is left of it is proposed again; and nothing ever raises."""
    whole = encoded(tokenizer, written(TEMPLATES[name], *numbers))
    said = [*whole[:kept], *encoded(tokenizer, "".join(more))]
    draft = sentences[name].propose(said)
    for taken in range(len(draft)):
        again = sentences[name].propose([*said, *draft[:taken]])
        assert again[: len(draft) - taken] == draft[taken:]


# ---------------------------------------------------------------- tokenizers that don't take part


def trained(*texts):
    """A tokenizer that merges whatever stands together often."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_a_number_in_one_token_with_its_neighbours_is_refused():
    with pytest.raises(EngineError, match="has a token that holds a part of the number"):
        Sentence(trained("about 7.31 m", "about 4.82 m"), "about {number} m")


class Moody:
    """A tokenizer whose tokens of one word hang on another."""

    def __call__(self, text, **options):
        return {
            "input_ids": [ord(c) + ("7" in text) for c in text],
            "offset_mapping": [(at, at + 1) for at in range(len(text))],
        }


def test_text_whose_tokens_hang_on_the_number_is_refused():
    with pytest.raises(EngineError, match="depend on its number; give none"):
        Sentence(Moody(), "{number} m")


class WithoutOffsets:
    """A tokenizer that is written in Python."""

    def __call__(self, text, **options):
        raise NotImplementedError("return_offset_mapping is not available when using Python tokenizers")


def test_a_tokenizer_that_does_not_say_where_its_tokens_stand_is_refused():
    with pytest.raises(EngineError, match="WithoutOffsets doesn't say where in a text its tokens stand"):
        Sentence(WithoutOffsets(), PUBLISHED)


@pytest.mark.parametrize("template", ["", "no number", "{same}", "{same} and {number}"])
def test_a_template_without_a_number_to_begin_with_is_refused(tokenizer, template):
    with pytest.raises(EngineError, match="has no {number}; put it where the number stands"):
        Sentence(tokenizer, template)


def test_what_cannot_be_drafted_costs_no_answer_and_is_told_once(qwen3_vl_checkpoint, caplog):
    engine = TransformersEngine.load(qwen3_vl_checkpoint, device="cpu", dtype="float32")
    image = np.random.default_rng(0).integers(0, 256, (96, 128, 3), dtype=np.uint8)
    reasons, asked = engine.info.reasons, ["How far is (1, 2)?", "How far is (30, 4)?"]
    expected = engine.answer_shared(image, asked, 6)
    for _ in range(2):
        assert engine.answer_shared(image, asked, 6, expects="without a number") == expected
    (told,) = engine.info.reasons[len(reasons) :]
    assert "decoded token after token" in told and "'without a number' has no {number}" in told
    assert caplog.text.count("without a number") == 1
