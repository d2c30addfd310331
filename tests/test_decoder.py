"""The lean decoder scores what transformers' own forward scores, and keeps no key twice."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from checkpoints import make_checkpoint
from plain_scores import plain_scores

from depthlm_ros.engines.batches import shared_length
from depthlm_ros.engines.cascade import backends
from depthlm_ros.engines.keys import Continuations, Places
from depthlm_ros.engines.transformers_engine import TransformersEngine
from depthlm_ros.errors import EngineError

ARCHITECTURES = ["qwen3_vl", "qwen2_5_vl", "llava"]
CPU = torch.device("cpu")
# Of the largest score; what rounding in another order explains.
ROUNDING = 1e-5
IMAGES = {"one wide": [(112, 224)], "two sizes": [(224, 112), (96, 128)]}
QUESTIONS = [
    "How far is (17, 1948)?",
    "How far is (3, 5) from the camera, and what is there?",
    "How far is it?",
    "How far",
]
# As Mistral and Qwen2.5-VL name them; the prompts are longer.
WINDOWS = {
    "llava, all layers": ("llava", {"sliding_window": 20}),
    "llava, shorter than an answer": ("llava", {"sliding_window": 5}),
    "qwen2_5_vl, the last layer": (
        "qwen2_5_vl",
        {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1},
    ),
    "qwen2_5_vl, shorter than an answer": (
        "qwen2_5_vl",
        {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 0},
    ),
}


def noise(seed, size):
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def images_of(name):
    return [noise(seed, size) for seed, size in enumerate(IMAGES[name])]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def engine(request):
    return tamed(request.getfixturevalue(f"{request.param}_checkpoint"))


def tamed(folder):
    """An engine of milder weights: the attention of those drawn is so sharp that rounding grows 100 times."""
    plain = TransformersEngine.load(folder, device="cpu", dtype="float32", plain=True)
    for layer in plain.model.model.language_model.layers:
        for linear in (layer.self_attn.q_proj, layer.self_attn.o_proj, layer.mlp.down_proj):
            linear.weight.data *= 0.3
    engine = TransformersEngine(plain.model, plain.processor, plain.info)
    engine.prove()
    assert not engine.plain
    return engine


@pytest.fixture(scope="module", params=WINDOWS)
def windowed(request, tmp_path_factory):
    architecture, settings = WINDOWS[request.param]
    return with_windows(tmp_path_factory.mktemp("windows"), architecture, settings)


def with_windows(folder, architecture, settings):
    make_checkpoint(folder, architecture)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= settings
    (folder / "config.json").write_text(json.dumps(config))
    return tamed(folder)


class Case:
    """Questions about images: whole texts, their common beginning run once, and what is left of each."""

    def __init__(self, engine, images, questions=QUESTIONS):
        self.engine, self.images = engine, images
        inputs = [engine.processor.images([image]) for image in images]
        self.texts = engine.processor.prompts(questions, *(some.grid_hw for some in inputs))
        self.shared = shared_length(self.texts)
        with torch.inference_mode():
            self.prefix = engine.prefill(self.texts[0][: self.shared], *inputs)
        self.rests = [ids[self.shared :] for ids in self.texts]
        self.own = Continuations(engine._decoder, len(self.texts), max(map(len, self.rests)))

    def extend(self, tokens, rows=None, places=None, keep=None):
        """Scores of the tokens that follow some of the new ones, each row padded on the right."""
        width = max(map(len, tokens))
        ids = torch.tensor([[*some, *[0] * (width - len(some))] for some in tokens])
        rows = slice(0, len(tokens)) if rows is None else rows
        with torch.inference_mode():
            hidden = self.engine._decoder.extend(ids, self.prefix.select(rows), self.own, rows, places, keep)
            return self.engine.model.lm_head(hidden).float()

    def expected(self, row, more=()):
        """Scores after each token of a text from the end of its prefix on."""
        ids = [*self.texts[row], *more]
        return plain_scores(self.engine, self.images, ids)[self.shared :]


def assert_scores(found, expected, most=ROUNDING):
    assert found.shape == expected.shape
    difference = (found - expected).abs().max() / expected.abs().max()
    assert difference <= most, f"{difference:.1e} of the largest score"


@pytest.mark.parametrize("name", IMAGES)
def test_continuations_of_several_lengths_score_as_the_whole_texts(engine, name):
    case = Case(engine, images_of(name))
    assert len(set(map(len, case.rests))) > 2
    scores = case.extend(case.rests)
    for row, rest in enumerate(case.rests):
        assert_scores(scores[row, : len(rest)], case.expected(row))


def test_only_the_tokens_that_are_kept_are_read(engine):
    case = Case(engine, images_of("one wide"))
    ends = [len(rest) - 1 for rest in case.rests]
    keep = torch.tensor([[end, 0] for end in ends])
    scores = case.extend(case.rests, keep=keep)
    assert scores.shape[1] == 2
    for row, end in enumerate(ends):
        assert_scores(scores[row], case.expected(row)[[end, 0]])


@pytest.mark.parametrize("kept", ["all", "the last"])
@pytest.mark.parametrize("name", IMAGES)
def test_answers_may_go_on_raggedly(engine, name, kept):
    """Rows take different steps, some wait, and they are no neighbours; what a step fed too much is overwritten."""
    case = Case(engine, images_of(name))
    more = [[25, 29, 41, 33], [27], [100, 32, 55], [28, 28, 28, 28, 28]]
    case.extend(case.rests)
    held = [len(rest) for rest in case.rests]
    fed = [0] * len(more)
    for rows, steps in (([0, 2], [1, 3]), ([3, 0, 1], [2, 2, 1]), ([0, 3], [1, 3])):
        tokens = [more[row][fed[row] : fed[row] + step] for row, step in zip(rows, steps, strict=True)]
        places = Places.following([held[row] for row in rows], max(steps), CPU)
        keep = None if kept == "all" else torch.tensor([[step - 1] for step in steps])
        scores = case.extend(tokens, torch.tensor(rows), places, keep)
        for at, (row, step) in enumerate(zip(rows, steps, strict=True)):
            fed[row] += step
            held[row] += step
            expected = case.expected(row, more[row][: fed[row]])[-step:]
            assert_scores(
                scores[at, :step] if kept == "all" else scores[at], expected[-1:] if keep is not None else expected
            )
    assert fed == list(map(len, more))


def test_alternatives_are_a_tree_behind_one_question(engine):
    """Two branches of two tokens each, and what they share, go into one pass; neither sees the other."""
    case = Case(engine, images_of("two sizes"), QUESTIONS[:2])
    case.extend(case.rests)
    paths = [(40,), (41,), (40, 50), (41, 50), (41, 51)]
    ids, slots, turned, seen = [], [], [], []
    for rest in case.rests:
        start, slot_of = len(rest), {}
        ids.append([path[-1] for path in paths])
        slots.append([start + 2 + at for at in range(len(paths))])  # anywhere that is free
        turned.append([start + len(path) - 1 for path in paths])
        slot_of = dict(zip(paths, slots[-1], strict=True))
        visible = [[*range(start), *(slot_of[path[:n]] for n in range(1, len(path) + 1))] for path in paths]
        seen.append([[slot in some for slot in range(max(map(len, case.rests)) + 8)] for some in visible])
    scores = case.extend(ids, places=Places(torch.tensor(slots), torch.tensor(turned), torch.tensor(seen)))
    for row in range(2):
        for at, path in enumerate(paths):
            assert_scores(scores[row, at], case.expected(row, path)[-1])


def test_rows_with_images_of_their_own_score_as_the_whole_texts(engine):
    rows = [images_of("one wide"), [noise(9, IMAGES["one wide"][0])], [noise(5, IMAGES["one wide"][0])]]
    inputs = engine.processor.images([images[0] for images in rows])
    texts = engine.processor.prompts(QUESTIONS[:3], inputs.grid_hw)
    shared = shared_length(texts)
    with torch.inference_mode():
        prefix = engine.prefill(texts[0][:shared], inputs)
    assert prefix.rows == 3 and prefix.select(slice(0, 2)).rows == 2
    case = Case(engine, rows[0], QUESTIONS[:3])
    case.prefix = prefix
    scores = case.extend(case.rests)
    again = case.extend([case.rests[2], case.rests[0]], torch.tensor([2, 0]))
    for row, images in enumerate(rows):
        case.images = images
        assert_scores(scores[row, : len(case.rests[row])], case.expected(row))
    for at, row in enumerate((2, 0)):
        assert_scores(again[at, : len(case.rests[row])], scores[row, : len(case.rests[row])])


@pytest.mark.parametrize("own", backends(CPU))
@pytest.mark.parametrize("prefix", backends(CPU))
def test_the_choice_of_attention_changes_nothing(engine, prefix, own):
    decoder = engine._decoder
    before = decoder.prefix_attention, decoder.own_attention
    case = Case(engine, images_of("one wide"))
    try:
        decoder.prefix_attention, decoder.own_attention = backends(CPU)[prefix], backends(CPU)[own]
        scores = case.extend(case.rests)
        step = case.extend([[25]] * 4, places=Places.following([len(rest) for rest in case.rests], 1, CPU))
    finally:
        decoder.prefix_attention, decoder.own_attention = before
    for row, rest in enumerate(case.rests):
        expected = case.expected(row, [25])
        assert_scores(scores[row, : len(rest)], expected[:-1])
        assert_scores(step[row], expected[-1:])


def test_a_prefix_gives_its_last_states_where_they_are_asked_for(engine):
    """The dense head reads them; DeepStack reaches the last layers here."""
    case = Case(engine, images_of("one wide"))
    frame = engine._images.compose(case.texts[0], [engine.processor.images(case.images)])
    with torch.inference_mode():
        prefix, hidden = engine._prefill(frame, hidden=True)
        scores = engine.model.lm_head(hidden)[0].float()
    assert_scores(scores, plain_scores(engine, case.images, case.texts[0]))
    assert len(prefix.token_ids) == len(case.texts[0])


def test_bfloat16_differs_by_rounding_only(qwen3_vl_checkpoint):
    engine = TransformersEngine.load(qwen3_vl_checkpoint, device="cpu", dtype="bfloat16")
    case = Case(engine, images_of("one wide"))
    scores = case.extend(case.rests)
    for row, rest in enumerate(case.rests):
        assert_scores(scores[row, : len(rest)], case.expected(row), 0.06)


# ---------------------------------------------------------------- sliding windows


@pytest.mark.parametrize("name", IMAGES)
def test_sliding_windows_are_the_models_own(windowed, name):
    """Windows shorter than prefix, question or answer: as the model itself scores the whole text."""
    case = Case(windowed, images_of(name))
    assert any(layer.window is not None and layer.window < case.shared for layer in windowed._decoder.layers)
    scores = case.extend(case.rests)
    held = [len(rest) for rest in case.rests]
    keep = torch.tensor([[1], [0], [1], [1]])
    step = case.extend([[25, 26], [29], [27, 27], [24, 28]], places=Places.following(held, 2, CPU), keep=keep)
    for row, more in enumerate([[25, 26], [29], [27, 27], [24, 28]]):
        expected = case.expected(row, more)
        assert_scores(scores[row, : held[row]], expected[: held[row]])
        assert_scores(step[row], expected[-1:])


def test_answers_within_windows_are_those_of_plain_generation(windowed):
    image = images_of("one wide")[0]
    answers = windowed.answer_shared(image, QUESTIONS, 10)
    for question, answer in zip(QUESTIONS, answers, strict=True):
        ids = windowed.processor.prompts([question], windowed.processor.images([image]).grid_hw)[0]
        scores = plain_scores(windowed, [image], [*ids, *answer.token_ids])[len(ids) - 1 : -1]
        assert tuple(scores.argmax(-1).tolist()) == answer.token_ids


def test_the_plain_path_refuses_what_is_longer_than_its_window(windowed):
    """Its padding stands between prefix and question, where a window would count it."""
    plain = TransformersEngine(windowed.model, windowed.processor, windowed.info, plain=True)
    with pytest.raises(EngineError, match="don't fit the model's sliding window of"):
        plain.answer_shared(images_of("one wide")[0], QUESTIONS, 4)


def test_windows_that_are_switched_off_hide_nothing(tmp_path):
    engine = with_windows(tmp_path, "qwen2_5_vl", {"use_sliding_window": False, "sliding_window": 6})
    assert {layer.window for layer in engine._decoder.layers} == {None}


# ---------------------------------------------------------------- memory


def test_the_keys_of_a_prefix_are_stored_once_for_all_questions(engine):
    case = Case(engine, images_of("one wide"))
    assert case.prefix.rows == 1 and case.prefix.select(torch.tensor([3, 1])) is case.prefix
    decoder = engine._decoder
    each = 2 * len(decoder.layers) * decoder.groups * decoder.head_size * 4
    assert case.prefix.bytes == each * case.shared
    seen = []
    before = decoder.prefix_attention

    def watched(query, key, value, mask, causal):
        seen.append((key.data_ptr(), value.data_ptr(), len(query)))
        return before(query, key, value, mask, causal)

    decoder.prefix_attention = watched
    try:
        case.extend(case.rests)
    finally:
        decoder.prefix_attention = before
    stored = [
        (key.data_ptr(), value.data_ptr(), 1) for key, value in zip(case.prefix.keys, case.prefix.values, strict=True)
    ]
    assert seen == stored


def test_continuations_take_the_memory_of_their_own_tokens(engine):
    decoder = engine._decoder
    own = Continuations(decoder, 7, 11)
    each = 2 * len(decoder.layers) * decoder.groups * decoder.head_size * 4
    assert own.bytes == 7 * 11 * each
    own.reserve(11)
    assert own.capacity == 11
    own.keys[-1][3, 10], own.values[0][6, 0] = 1.5, -2.5
    own.reserve(12)
    assert own.capacity == 16 and own.bytes == 7 * 16 * each
    assert (own.keys[-1][3, 10] == 1.5).all() and (own.values[0][6, 0] == -2.5).all()
    assert all((x[:, 11:] == 0).all() for x in (*own.keys, *own.values))


def test_the_memory_of_answers_hangs_on_questions_and_not_on_the_image(engine):
    kept = []
    for size in ((112, 112), (224, 224)):
        fresh = TransformersEngine(engine.model, engine.processor, engine.info)
        fresh.answer_shared(noise(0, size), QUESTIONS, 6)
        kept.append(fresh.work.kept_bytes)
    assert kept[0] == kept[1]
    fresh.answer_shared(noise(0, size), QUESTIONS * 3, 6)
    assert fresh.work.kept_bytes == 3 * kept[0]


def test_room_that_ran_short_of_memory_is_grown_on_the_next_try(engine, monkeypatch):
    own = Continuations(engine._decoder, 2, 4)
    calls = []

    def pad(x, more):
        calls.append(1)
        if len(calls) == len(own.keys) + 1:
            raise torch.OutOfMemoryError("out of memory")
        return torch.cat([x, x.new_zeros(len(x), more[-1], *x.shape[2:])], dim=1)

    monkeypatch.setattr("torch.nn.functional.pad", pad)
    with pytest.raises(torch.OutOfMemoryError):
        own.reserve(8)
    own.reserve(8)
    assert {x.shape[1] for x in (*own.keys, *own.values)} == {8}


def test_groups_of_questions_share_their_room(engine):
    fresh = TransformersEngine(engine.model, engine.processor, engine.info)
    answering = fresh._answering
    room = answering.room(5, 20)
    assert answering.room(3, 10) is room and answering.room(5, 20) is room
    assert answering.room(6, 10) is not room
    fresh.answer_shared(noise(0, (112, 112)), QUESTIONS, 4)
    room = answering.room(1, 1)
    fresh.answer_shared(noise(1, (112, 112)), QUESTIONS, 4)
    assert answering.room(1, 1) is room


def test_weights_are_not_stored_twice(engine):
    """What is multiplied at once lies side by side, and the model's own parameters are views of it."""
    for layer in engine.model.model.language_model.layers:
        attention = layer.self_attn
        places = {linear.weight.untyped_storage().data_ptr() for linear in (attention.q_proj, attention.v_proj)}
        assert places == {attention.k_proj.weight.untyped_storage().data_ptr()}


def test_a_model_with_an_unknown_activation_answers_by_transformers_own_forward(qwen3_vl_checkpoint, caplog):
    engine = TransformersEngine.load(qwen3_vl_checkpoint, plain=True)
    config = engine.model.config.get_text_config()
    config.hidden_act = "quick_gelu"
    try:
        other = TransformersEngine(engine.model, engine.processor, engine.info)
    finally:
        config.hidden_act = "silu"
    assert other.plain and other.info.reasons[-1].startswith("answers by transformers' own forward")
    assert "'quick_gelu'; the lean decoder knows" in caplog.text
    image = noise(0, (112, 112))
    answers = other.answer_shared(image, QUESTIONS, 4)
    assert [a.token_ids for a in answers] == [a.token_ids for a in engine.answer_shared(image, QUESTIONS, 4)]
