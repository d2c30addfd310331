"""What a number could have been: the model's own probabilities, as if each alternative were asked for alone."""

from __future__ import annotations

import re
from dataclasses import asdict

import numpy as np
import pytest
import torch
from plain_scores import plain_scores
from speakers import HEAD, TAIL, TWICE, make_speaker
from transformers import RepetitionPenaltyLogitsProcessor

from depthlm_ros.engines.batches import shared_length
from depthlm_ros.engines.decoder import Decoder
from depthlm_ros.engines.digits import DigitGrammar, expand_numbers
from depthlm_ros.engines.transformers_engine import TransformersEngine
from depthlm_ros.engines.trees import NumberTrees, number_starts
from depthlm_ros.errors import EngineError

ARCHITECTURES = ["qwen3_vl", "qwen2_5_vl", "llava"]
NEW_TOKENS = 20
# Of log-probabilities; rounding in another order, of weights drawn wide.
ROUNDING = 2e-3


def noise(seed=0, size=(112, 168)):
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def questions(count=6):
    forms = ["How far is ({}, {})?", "Given this image, {} and {}: which is nearer?"]
    return [forms[at % 3 == 2].format(13 * at, 101 * at) for at in range(count)]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def speaker(request, tmp_path_factory):
    folder = make_speaker(tmp_path_factory.mktemp("speaker"), request.param)
    return TransformersEngine.load(folder, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def babbler(qwen3_vl_checkpoint):
    return TransformersEngine.load(qwen3_vl_checkpoint, device="cpu", dtype="float32")


class PlainTrees:
    """What follows in place of a number, each alternative as a text of its own."""

    def __init__(self, engine, images, asked, answers, which=0, penalty=1.0):
        self.engine, self.images, self.penalty = engine, images, penalty
        self.ids = DigitGrammar(engine.processor.tokenizer).ids
        self.texts = []
        for image, question, answer in zip(images, asked, answers, strict=True):
            prompt = engine.processor.prompts([question], engine.processor.images([image]).grid_hw)[0]
            start = starts_of(engine, answer.token_ids)[which]
            self.texts.append([*prompt, *answer.token_ids[:start]])

    def forward(self, rows, paths):
        found = []
        for row, path in zip(rows, paths, strict=True):
            text = [*self.texts[row], *path]
            scores = plain_scores(self.engine, [self.images[row]], text)[-1:]
            found.append(RepetitionPenaltyLogitsProcessor(self.penalty)(torch.tensor([text]), scores))
        return torch.cat(found).log_softmax(-1)[:, list(self.ids)]

    def start(self):
        return self.forward(range(len(self.texts)), [()] * len(self.texts))


def starts_of(engine, tokens):
    *digits, point = DigitGrammar(engine.processor.tokenizer).ids
    return number_starts(tokens, digits, point)


def assert_same(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.forwards == theirs.forwards
        for name, value in asdict(theirs).items():
            assert getattr(ours, name) == pytest.approx(value, rel=5e-3, abs=1e-6, nan_ok=True), name


# ---------------------------------------------------------------- where numbers begin

POINT = 10


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([], []),
        ([50, 51, 52], []),
        ([4, POINT, 5, 8], [0]),
        ([50, 4, POINT, 5, 8, 51], [1]),
        ([50, 4, POINT, 5, 8, 51, 4, POINT, 5, 8, 52], [1]),
        ([50, 4, POINT, 5, 8, 51, 4, POINT, 5, 9, 52], [1, 6]),
        ([4, 51, 7, 52, 4], [0, 2, 4]),
        ([50, POINT, 5, 51], [1]),
    ],
)
def test_numbers_begin_at_their_first_digit_and_repetitions_are_left_out(tokens, expected):
    assert number_starts(tokens, range(10), POINT) == expected


def test_the_point_that_ends_a_sentence_is_no_number():
    """ "... around 4.58 meters away from the camera. ... 4.58": a tokenizer has one token for both points."""
    number = [4, POINT, 5, 8]
    assert number_starts([50, *number, 51, POINT, 52, *number, 53], range(10), POINT) == [1]
    assert number_starts([50, *number, POINT, 52, *number], range(10), POINT) == [1]
    assert number_starts([POINT, 50, POINT], range(10), POINT) == []


# ---------------------------------------------------------------- distributions


def test_a_distribution_is_that_of_the_models_own_probabilities(speaker):
    asked = questions()
    answers = speaker.answer_shared(noise(), asked, NEW_TOKENS, expects=TWICE, distribution=True)
    written = [(q, a) for q, a in zip(asked, answers, strict=True) if a.numbers]
    assert len(written) > 3
    plain = PlainTrees(speaker, [noise()] * len(written), *zip(*written, strict=True))
    expected = expand_numbers(plain.start(), plain.forward, DigitGrammar(speaker.processor.tokenizer))
    assert_same([answer.number for _, answer in written], expected)
    assert any(number.sigma_log > 0.05 for number in expected) and all(number.forwards > 3 for number in expected)


def test_a_repetition_penalty_counts_in_distributions_as_in_answers(speaker):
    """Otherwise another number than the one that was said could be the likeliest."""
    settings = speaker.model.generation_config
    settings.repetition_penalty = 1.2
    try:
        engine = TransformersEngine(speaker.model, speaker.processor, speaker.info)
    finally:
        settings.repetition_penalty = 1.0
    asked = questions(12)
    answers = engine.answer_shared(noise(), asked, NEW_TOKENS, distribution=True)
    written = [(q, a) for q, a in zip(asked, answers, strict=True) if len(a.numbers) == 1][:4]
    assert written
    plain = PlainTrees(engine, [noise()] * len(written), *zip(*written, strict=True), penalty=1.2)
    expected = expand_numbers(plain.start(), plain.forward, DigitGrammar(engine.processor.tokenizer))
    assert_same([answer.number for _, answer in written], expected)
    without = [a.token_ids for a in speaker.answer_shared(noise(), asked, NEW_TOKENS)]
    assert without != [a.token_ids for a in answers]


def test_asking_for_distributions_changes_no_answer(speaker):
    for expects in (None, TWICE):
        alone = speaker.answer_shared(noise(), questions(), NEW_TOKENS, expects=expects)
        fed = speaker.work.fed
        answers = speaker.answer_shared(noise(), questions(), NEW_TOKENS, expects=expects, distribution=True)
        assert [a.token_ids for a in answers] == [a.token_ids for a in alone]
        assert [a.confidences for a in answers] == [a.confidences for a in alone]
        assert speaker.work.fed > fed + 3 * sum(bool(a.numbers) for a in answers)
        assert all(a.numbers == () for a in alone)


def test_each_number_of_an_answer_has_its_own_distribution(speaker):
    asked = questions(40)
    answers = speaker.answer_shared(noise(), asked, NEW_TOKENS, distribution=True)
    assert [len(a.numbers) for a in answers] == [len(starts_of(speaker, a.token_ids)) for a in answers]
    several = [(q, a) for q, a in zip(asked, answers, strict=True) if len(a.numbers) > 1][:3]
    assert several
    for which in range(2):
        plain = PlainTrees(speaker, [noise()] * len(several), *zip(*several, strict=True), which=which)
        expected = expand_numbers(plain.start(), plain.forward, DigitGrammar(speaker.processor.tokenizer))
        assert_same([answer.numbers[which] for _, answer in several], expected)


def test_an_answer_without_a_number_has_no_distribution(speaker):
    answers = speaker.answer_shared(noise(), questions(), len(HEAD), distribution=True)
    wordy = [answer for answer in answers if answer.text == "".join(HEAD)]
    assert wordy and {answer.numbers for answer in wordy} == {()} and {answer.number for answer in wordy} == {None}


def test_images_of_their_own_have_distributions_of_their_own(speaker):
    images, asked = [noise(seed) for seed in range(4)], questions(4)
    answers = speaker.answer_each(images, asked, NEW_TOKENS, distribution=True)
    rows = [row for row, answer in enumerate(answers) if answer.numbers]
    assert len(rows) > 1
    images, asked, answers = ([some[row] for row in rows] for some in (images, asked, answers))
    plain = PlainTrees(speaker, images, asked, answers)
    expected = expand_numbers(plain.start(), plain.forward, DigitGrammar(speaker.processor.tokenizer))
    assert_same([answer.number for answer in answers], expected)


def test_groups_have_the_distributions_of_one(babbler):
    planner = babbler._answering.planner
    together = babbler.answer_shared(noise(), questions(7), 8, distribution=True)
    before, planner.largest = planner.largest, 2
    try:
        apart = babbler.answer_shared(noise(), questions(7), 8, distribution=True)
    finally:
        planner.largest = before
    assert sum(len(answer.numbers) for answer in together) > 5
    for one, other in zip(apart, together, strict=True):
        assert one.token_ids == other.token_ids
        assert_same(one.numbers, other.numbers)


def test_the_plain_path_has_none_and_says_so(babbler):
    plain = TransformersEngine(babbler.model, babbler.processor, babbler.info, plain=True)
    with pytest.raises(EngineError, match="the plain path gives no distribution"):
        plain.answer_shared(noise(), questions(1), 4, distribution=True)


# ---------------------------------------------------------------- trees


def with_trees(engine, asked, use, new_tokens=NEW_TOKENS):
    """What `use` makes of the trees of the answers' first numbers, and the plain trees beside it."""
    inputs = engine.processor.images([noise()])
    texts = engine.processor.prompts(asked, inputs.grid_hw)
    shared, found = shared_length(texts), []
    ids = DigitGrammar(engine.processor.tokenizer).ids

    def finished(numbers, group):
        starts = {row: starts_of(engine, row_of.said)[:1] for row, row_of in enumerate(group.rows)}
        rows = [row for row, start in starts.items() if start]
        found.append(([numbers[row] for row in rows], use(NumberTrees(
            engine._answering, group, rows, [starts[row][0] for row in rows], ids
        ))))  # fmt: skip

    with torch.inference_mode():
        prefix = engine.prefill(texts[0][:shared], inputs)
        engine._answering.answer(prefix, [t[shared:] for t in texts], new_tokens, finished=finished)
    ((numbers, made),) = found
    answers = engine.answer_shared(noise(), asked, new_tokens)
    some = [asked[at] for at in numbers]
    return made, PlainTrees(engine, [noise()] * len(some), some, [answers[at] for at in numbers])


# Tree and symbols of each pass: siblings, nodes whose parents haven't been asked for, nodes asked for again and twice.
PASSES = [
    [(0, "4"), (0, "5"), (1, "12"), (0, "4."), (1, "1")],
    [(0, "4.5"), (0, "4.6"), (1, "12.3"), (0, "5"), (0, "5"), (2, "7.25")],
    [(2, "7.2"), (2, "7.31"), (0, "4.57"), (1, "12.34"), (1, ""), (2, "9")],
]


def asked_of(tokenizer, some):
    ids = dict(zip("0123456789.", DigitGrammar(tokenizer).ids, strict=True))
    return [tree for tree, _ in some], [tuple(ids[symbol] for symbol in symbols) for _, symbols in some]


@pytest.mark.parametrize("short_of_memory", [False, True], ids=["", "short of memory"])
def test_alternatives_have_the_probabilities_of_texts_of_their_own(speaker, monkeypatch, short_of_memory):
    """Also where a pass ran out of memory halfway: what it would have stored is fed again."""

    def grow(trees):
        found = [trees.start()]
        for some in PASSES:
            if short_of_memory:
                with monkeypatch.context() as patch:
                    fail_above_one_row(patch)
                    found.append(trees.forward(*asked_of(speaker.processor.tokenizer, some)))
                speaker._answering.planner._pass_tokens.clear()
            else:
                found.append(trees.forward(*asked_of(speaker.processor.tokenizer, some)))
        return found

    found, plain = with_trees(speaker, questions(8), grow)
    expected = [plain.start(), *(plain.forward(*asked_of(speaker.processor.tokenizer, some)) for some in PASSES)]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == torch.float32 and ours.shape == theirs.shape
        torch.testing.assert_close(ours, theirs, rtol=0, atol=ROUNDING)


def fail_above_one_row(patch):
    extend = Decoder.extend

    def fails(decoder, ids, *args):
        if len(ids) > 1:
            raise torch.OutOfMemoryError("out of memory")
        return extend(decoder, ids, *args)

    patch.setattr(Decoder, "extend", fails)


def test_an_exact_tree_is_that_of_the_models_own_probabilities(speaker):
    grammar = DigitGrammar(speaker.processor.tokenizer)
    found, plain = with_trees(
        speaker, questions(2), lambda trees: expand_numbers(trees.start(), trees.forward, grammar, exact=True)
    )
    expected = expand_numbers(plain.start(), plain.forward, grammar, exact=True)
    assert expected and max(number.forwards for number in expected) > 25
    for ours, theirs in zip(found, expected, strict=True):
        for name in ("mean", "std", "median", "sigma_log", "mass", "greedy_probability"):
            assert getattr(ours, name) == pytest.approx(getattr(theirs, name), rel=5e-3), name


def test_the_likeliest_number_is_the_one_that_was_said(speaker):
    """Its probability is the product of its digits' own, which is what the answer's confidence is."""
    answers = speaker.answer_shared(noise(), questions(20), NEW_TOKENS, distribution=True)
    sentence = re.compile("".join(HEAD) + r"\d+\.\d\d" + TAIL)
    alone = [answer for answer in answers if sentence.fullmatch(answer.text)]
    assert alone
    for answer in alone:
        assert answer.number.greedy_probability == pytest.approx(answer.confidence, rel=0.02)
