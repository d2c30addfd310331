"""Drafts save passes and change no answer: whatever a model says, whatever it was expected to say."""

from __future__ import annotations

import random
import re

import numpy as np
import pytest
import torch
from speakers import AGAIN, HEAD, SENTENCE, TAIL, TWICE, make_speaker

from depthlm_ros.engines.answering import Work
from depthlm_ros.engines.batches import shared_length
from depthlm_ros.engines.speculation import Sentence
from depthlm_ros.engines.transformers_engine import TransformersEngine

ARCHITECTURES = ["qwen3_vl", "qwen2_5_vl", "llava"]
NEW_TOKENS = 24
TEMPLATES = {
    "what most of them say": SENTENCE,
    "what others say": TWICE,
    "two numbers": "".join(HEAD) + "{number}" + AGAIN + "{number}" + TAIL,
    "bare numbers": "{number} {number}",
    "another beginning": "Well, it is {number}" + TAIL,
    "another word in the beginning": "".join(HEAD[:2]) + " is near {number}" + TAIL,
    "another ending": "".join(HEAD) + "{number} feet from here, or {same} feet.",
    "no ending": "".join(HEAD) + "{number}",
}


def noise(seed=0, size=(112, 168)):
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def questions(count=24):
    drawn = np.random.default_rng(1).integers(0, 2000, (count, 2))
    forms = ["Given this image, how far is ({}, {})?", "Given this image, {} and {}: which is nearer?"]
    return [forms[i % 5 == 4].format(*point) for i, point in enumerate(drawn)]


class Speaker:
    """An engine, and what its model says by the plain path."""

    def __init__(self, engine, new_tokens=NEW_TOKENS):
        self.engine = engine
        self.plain = TransformersEngine(engine.model, engine.processor, engine.info, plain=True)
        self.answers = self.plain.answer_shared(noise(), questions(), new_tokens)
        inputs = engine.processor.images([noise()])
        texts = engine.processor.prompts(questions(), inputs.grid_hw)
        shared = shared_length(texts)
        self.suffixes = [ids[shared:] for ids in texts]
        with torch.inference_mode():
            self.prefix = engine.prefill(texts[0][:shared], inputs)

    @property
    def said(self):
        return [list(answer.token_ids) for answer in self.answers]

    def rows(self, sentence=None, rows=None, **options):
        """The engine's answers to some of the questions, token by token, with drafts of a `Sentence`."""
        self.engine._answering.work = Work()
        suffixes = [self.suffixes[row] for row in (range(len(self.suffixes)) if rows is None else rows)]
        with torch.inference_mode():
            made = self.engine._answering.answer(
                self.prefix, suffixes, options.pop("new_tokens", NEW_TOKENS), sentence, **options
            )
        return [row.said for row in made]

    @property
    def work(self):
        return self.engine.work


@pytest.fixture(scope="module", params=ARCHITECTURES)
def speaker(request, tmp_path_factory):
    """Says a sentence with numbers in it."""
    folder = make_speaker(tmp_path_factory.mktemp("speaker"), request.param)
    return Speaker(TransformersEngine.load(folder, device="cpu", dtype="float32"))


@pytest.fixture(scope="module", params=ARCHITECTURES)
def babbler(request):
    """Says anything, mostly digits."""
    folder = request.getfixturevalue(f"{request.param}_checkpoint")
    return Speaker(TransformersEngine.load(folder, device="cpu", dtype="float32"))


def template(speaker, text):
    return Sentence(speaker.engine.processor.tokenizer, text)


def number_of(speaker, tokens):
    """The first run of digits and points in an answer."""
    sentence = template(speaker, "{number}")
    start = next((at for at, token in enumerate(tokens) if sentence.is_number(token)), len(tokens))
    end = next((at for at in range(start, len(tokens)) if not sentence.is_number(tokens[at])), len(tokens))
    return tokens[start:end]


def test_the_speakers_say_the_sentence_with_different_numbers(speaker):
    texts = [answer.text for answer in speaker.answers]
    assert sum(text.startswith("".join(HEAD)) for text in texts) > len(texts) // 2
    assert sum(text.endswith(TAIL) for text in texts) > len(texts) // 2
    assert len(set(texts)) > 3 and len({len(tokens) for tokens in speaker.said}) > 1


@pytest.mark.parametrize("name", TEMPLATES)
def test_whatever_is_expected_the_answers_are_the_plain_ones(speaker, name):
    answers = speaker.engine.answer_shared(noise(), questions(), NEW_TOKENS, expects=TEMPLATES[name])
    assert [list(answer.token_ids) for answer in answers] == speaker.said
    for answer, plain in zip(answers, speaker.answers, strict=True):
        assert answer.confidences == pytest.approx(plain.confidences, rel=1e-3)


@pytest.mark.parametrize("name", ["what most of them say", "bare numbers", "no ending"])
def test_a_model_that_says_anything_is_decoded_as_ever(babbler, name):
    answers = babbler.engine.answer_shared(noise(), questions(), NEW_TOKENS, expects=TEMPLATES[name])
    assert [list(answer.token_ids) for answer in answers] == babbler.said


class Prophet(Sentence):
    """Drafts what one of the answers goes on with, wrong at a random place more often than not."""

    head = ()

    def __init__(self, answers, seed):
        self.answers, self.random = answers, random.Random(seed)

    def learn(self, said):
        pass

    def propose(self, said):
        begun = [answer for answer in self.answers if answer[: len(said)] == list(said)]
        rest = list(self.random.choice(begun)[len(said) :]) if begun else []
        draft = rest[: self.random.randint(0, len(rest))]
        if draft and self.random.random() < 0.6:
            draft[self.random.randrange(len(draft))] = self.random.randint(20, 300)
        return draft


@pytest.mark.parametrize("seed", range(4))
def test_drafts_that_are_wrong_anywhere_change_nothing(babbler, seed):
    assert babbler.rows(Prophet(babbler.said, seed)) == babbler.said
    assert 0 < babbler.work.accepted < babbler.work.proposed


@pytest.mark.parametrize("seed", range(2))
def test_drafts_that_are_wrong_anywhere_change_nothing_under_a_repetition_penalty(babbler, seed):
    settings = babbler.engine.model.generation_config
    settings.repetition_penalty = 1.3
    try:
        engine = babbler.engine
        other = Speaker(TransformersEngine(engine.model, engine.processor, engine.info))
    finally:
        settings.repetition_penalty = 1.0
    assert other.said != babbler.said
    assert other.rows(Prophet(other.said, seed)) == other.said
    assert 0 < other.work.accepted < other.work.proposed


def test_confidences_under_a_repetition_penalty_are_the_plain_ones(speaker):
    settings = speaker.engine.model.generation_config
    settings.repetition_penalty = 1.1
    try:
        engine = speaker.engine
        other = Speaker(TransformersEngine(engine.model, engine.processor, engine.info))
    finally:
        settings.repetition_penalty = 1.0
    answers = other.engine.answer_shared(noise(), questions(), NEW_TOKENS, expects=TWICE)
    assert [list(answer.token_ids) for answer in answers] == other.said
    for answer, plain in zip(answers, other.answers, strict=True):
        assert answer.confidences == pytest.approx(plain.confidences, rel=1e-3)


# ---------------------------------------------------------------- lengths


def test_answers_end_where_they_must_wherever_that_is(speaker):
    """In the beginning of the sentence, within its number, after it."""
    for most in range(13):
        expected = [tokens[:most] for tokens in speaker.said]
        assert speaker.rows(template(speaker, TWICE), new_tokens=most) == expected
        assert speaker.rows(new_tokens=most) == expected


def test_answers_that_never_stop_are_cut(babbler):
    stop = babbler.engine._stop_ids
    endless = [tokens for tokens in babbler.said if tokens[-1] not in stop]
    assert endless and all(len(tokens) == NEW_TOKENS for tokens in endless)
    assert babbler.rows(Prophet(babbler.said, 0)) == babbler.said


def test_a_stop_within_a_draft_ends_the_answer(babbler):
    """What was drafted beyond it isn't said, though the model would have gone on with it."""
    (stop,) = babbler.engine._stop_ids
    ended = next(tokens for tokens in babbler.said if tokens[-1] == stop)
    beyond = Prophet([[*ended, 30, 31, 32]], 0)
    beyond.propose = lambda said: [*ended, 30, 31, 32][len(said) :]
    row = babbler.said.index(ended)
    assert babbler.rows(beyond, [row]) == [ended]


# ---------------------------------------------------------------- guesses


def test_guesses_that_are_right_leave_one_pass(speaker):
    """The number of the frame before: question, sentence and number are verified in one pass."""
    sentence = template(speaker, SENTENCE)
    written = re.compile("".join(HEAD) + r"\d+\.\d\d" + TAIL)
    whole = [row for row, answer in enumerate(speaker.answers) if written.fullmatch(answer.text)]
    assert whole
    guesses = [number_of(speaker, speaker.said[i]) for i in whole]
    assert speaker.rows(sentence, whole, guesses=guesses) == [speaker.said[i] for i in whole]
    assert speaker.work.passes == 1
    assert speaker.work.accepted == speaker.work.proposed


@pytest.mark.parametrize("kind", ["another's", "one digit off", "none", "too long", "nonsense"])
def test_guesses_that_are_wrong_change_nothing(speaker, kind):
    numbers = [number_of(speaker, tokens) for tokens in speaker.said]
    digit = number_of(speaker, speaker.engine.processor.tokenizer.encode("3", add_special_tokens=False))
    guesses = {
        "another's": numbers[3:] + numbers[:3],
        "one digit off": [[*number[:-1], *digit] for number in numbers],
        "none": [[] for _ in numbers],
        "too long": [number + digit * 20 for number in numbers],
        "nonsense": [[40, 50, 60]] * len(numbers),
    }[kind]
    assert speaker.rows(template(speaker, TWICE), guesses=guesses) == speaker.said


def test_a_draft_longer_than_the_room_for_answers_finds_room(speaker):
    long = SENTENCE + ", which is to say the same in feet and in inches and in any other unit that one may think of"
    sentence = template(speaker, long)
    guesses = [number_of(speaker, tokens) for tokens in speaker.said]
    fresh = TransformersEngine(speaker.engine.model, speaker.engine.processor, speaker.engine.info)
    with torch.inference_mode():
        rows = fresh._answering.answer(speaker.prefix, speaker.suffixes, 120, sentence, guesses)
    for row, tokens in zip(rows, speaker.said, strict=True):
        assert row.said[: len(tokens)] == tokens
    assert fresh.work.proposed > 60 * len(guesses)


# ---------------------------------------------------------------- numbers of questions


def test_one_question_is_answered_too(speaker):
    for row in (0, 4):
        assert speaker.rows(template(speaker, SENTENCE), [row]) == [speaker.said[row]]


@pytest.mark.parametrize("most", [1, 5])
def test_questions_in_several_groups_get_the_same_answers(speaker, most):
    planner = speaker.engine._answering.planner
    before, groups = planner.largest, []
    planner.largest = most
    try:
        said = speaker.rows(
            template(speaker, TWICE), finished=lambda numbers, group: groups.append((numbers, len(group.rows)))
        )
    finally:
        planner.largest = before
    assert said == speaker.said
    assert all(len(numbers) == count <= most for numbers, count in groups)
    assert sorted(number for numbers, _ in groups for number in numbers) == list(range(len(said)))


def test_passes_of_a_few_tokens_give_the_same_answers(speaker):
    planner = speaker.engine._answering.planner
    before = dict(planner._pass_tokens)
    try:
        planner._pass_tokens.update({1 << n: 70 for n in range(10)})
        assert speaker.rows(template(speaker, TWICE)) == speaker.said
        assert speaker.work.passes > len(speaker.said) // 2
    finally:
        planner._pass_tokens.clear()
        planner._pass_tokens.update(before)


def test_hundreds_of_questions_are_answered_as_a_few(speaker):
    some = questions(400)
    answers = speaker.engine.answer_shared(noise(), some, 10, expects=SENTENCE)
    expected = speaker.plain.answer_shared(noise(), some[300:330], 10)
    assert [a.token_ids for a in answers[300:330]] == [a.token_ids for a in expected]
    assert len({answer.token_ids for answer in answers}) > 3


def test_questions_with_an_image_each_may_be_expected_to_say_something(speaker):
    images = [noise(seed) for seed in range(6)]
    for some in ([questions(1)[0]] * 6, questions(6)):
        answers = speaker.engine.answer_each(images, some, NEW_TOKENS, expects=TWICE)
        expected = speaker.plain.answer_each(images, some, NEW_TOKENS)
        assert [a.token_ids for a in answers] == [a.token_ids for a in expected]


def test_groups_and_images_of_their_own_keep_their_order(babbler):
    """Rows of several lengths are sorted; the keys of each row's image go along."""
    images, some = [noise(seed) for seed in range(7)], questions(7)
    planner = babbler.engine._answering.planner
    before, planner.largest = planner.largest, 3
    try:
        answers = babbler.engine.answer_each(images, some, 10)
    finally:
        planner.largest = before
    expected = babbler.plain.answer_each(images, some, 10)
    assert [a.token_ids for a in answers] == [a.token_ids for a in expected]


# ---------------------------------------------------------------- what it took


def test_without_drafts_each_token_is_a_pass(speaker):
    (said,) = speaker.rows(None, [0])
    work = speaker.work
    assert (work.proposed, work.accepted) == (0, 0)
    assert work.passes == len(said)
    assert work.fed == len(speaker.suffixes[0]) + len(said) - 1


def test_with_drafts_each_pass_adds_one_token_to_those_accepted(speaker):
    sentence = template(speaker, SENTENCE)
    saved = 0
    for row in range(8):
        (said,) = speaker.rows(sentence, [row])
        work = speaker.work
        assert len(said) == work.accepted + work.passes
        assert work.fed == len(speaker.suffixes[row]) + work.proposed + work.passes - 1
        saved += work.accepted
    assert saved >= 8 * len(HEAD)


def test_the_sentence_is_verified_with_the_question(speaker):
    """Its beginning and the first digit come with the question's own pass."""
    begun = [row for row, answer in enumerate(speaker.answers) if answer.text.startswith("".join(HEAD))]
    said = speaker.rows(template(speaker, SENTENCE), begun, new_tokens=len(HEAD) + 1)
    assert said == [speaker.said[row][: len(HEAD) + 1] for row in begun]
    assert speaker.work.passes == 1
    assert speaker.work.accepted == speaker.work.proposed == len(HEAD) * len(begun)


def test_memory_is_that_of_questions_and_answers(speaker):
    decoder = speaker.engine._decoder
    fresh = TransformersEngine(speaker.engine.model, speaker.engine.processor, speaker.engine.info)
    with torch.inference_mode():
        fresh._answering.answer(speaker.prefix, speaker.suffixes, 8)
    each = 2 * len(decoder.layers) * decoder.groups * decoder.head_size * 4
    assert fresh.work.kept_bytes == each * len(speaker.suffixes) * (max(map(len, speaker.suffixes)) + 8)
