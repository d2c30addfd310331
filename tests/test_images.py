"""An image is encoded once, whoever asks about it, and never taken for another."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from plain_scores import plain_scores

from depthlm_ros.engines.images import KNOWN_IMAGES, ImageReader
from depthlm_ros.engines.transformers_engine import TransformersEngine
from depthlm_ros.errors import ImageError

ARCHITECTURES = ["qwen3_vl", "qwen2_5_vl", "llava"]
QUESTIONS = ["How far is (17, 1948)?", "How far is (3, 5)?"]


def noise(seed=0, size=(96, 128)):
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def any_engine(request):
    folder = request.getfixturevalue(f"{request.param}_checkpoint")
    return TransformersEngine.load(folder, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def shared_engine(qwen3_vl_checkpoint):
    return TransformersEngine.load(qwen3_vl_checkpoint, device="cpu", dtype="float32")


class Counting:
    """Counts what the tower is given."""

    def __init__(self, reader):
        self.count, self.tower = 0, reader.tower
        self.lock = threading.Lock()
        reader.tower = self

    def __call__(self, tensors, count):
        with self.lock:
            self.count += 1
        return self.tower(tensors, count)


@pytest.fixture
def reader(shared_engine):
    """With nothing remembered."""
    engine = shared_engine
    return ImageReader(engine.model, engine.processor, engine.info.architecture, lean=True)


def encoded(reader, image):
    with torch.inference_mode():
        return reader.encode(reader.prepare(image))


def same(one, other):
    return torch.equal(one[0], other[0]) and all(map(torch.equal, one[1], other[1]))


# ---------------------------------------------------------------- what is remembered


def test_the_same_pixels_are_prepared_and_encoded_once(reader):
    counting, image = Counting(reader), noise()
    inputs = reader.prepare(image)
    assert reader.prepare(image.copy()) is inputs
    assert reader.prepare(np.asfortranarray(image)) is inputs
    assert reader.prepare(np.concatenate([image, image])[:96]) is inputs
    first = encoded(reader, image)
    assert encoded(reader, image.copy())[0] is first[0]
    assert counting.count == 1


def test_an_image_that_was_written_into_is_another_one(reader):
    """A camera's driver reuses its memory."""
    image = noise()
    before = encoded(reader, image)
    image[50, 70, 1] ^= 1
    after = encoded(reader, image)
    assert not same(before, after)
    image[50, 70, 1] ^= 1
    assert encoded(reader, image)[0] is before[0]


def test_what_is_remembered_does_not_change_with_the_image(reader):
    image = noise()
    kept = {name: value.clone() for name, value in reader.prepare(image).tensors.items()}
    image[:] = 0
    assert all(torch.equal(kept[name], value) for name, value in reader.prepare(noise()).tensors.items())


def test_the_same_bytes_in_another_shape_are_another_image(reader):
    image = noise(size=(64, 128))
    other = image.reshape(128, 64, 3)
    assert reader.prepare(image).grid_hw == (2, 4)
    assert reader.prepare(other).grid_hw == (4, 2)
    assert not same(encoded(reader, image), encoded(reader, other))


def test_the_images_of_the_last_frames_are_remembered_and_the_oldest_is_forgotten(reader):
    counting = Counting(reader)
    for seed in range(KNOWN_IMAGES):
        encoded(reader, noise(seed))
    encoded(reader, noise(0))  # now the second one is the oldest
    assert counting.count == KNOWN_IMAGES
    encoded(reader, noise(99))
    encoded(reader, noise(0))
    assert counting.count == KNOWN_IMAGES + 1
    encoded(reader, noise(1))
    assert counting.count == KNOWN_IMAGES + 2


def test_an_image_that_was_forgotten_meanwhile_is_still_encoded(reader):
    inputs = reader.prepare(noise(0))
    expected = encoded(reader, noise(0))
    for seed in range(1, 2 + KNOWN_IMAGES):
        reader.prepare(noise(seed))
    with torch.inference_mode():
        assert same(reader.encode(inputs), expected)


def test_forgetting_encodes_anew(reader):
    counting = Counting(reader)
    first = encoded(reader, noise())
    reader.forget()
    again = encoded(reader, noise())
    assert counting.count == 2 and again[0] is not first[0] and same(again, first)


def test_what_is_no_image_is_not_remembered(reader):
    for wrong in (np.zeros((96, 128), np.uint8), np.zeros((96, 128, 3), np.float32)):
        for _ in range(2):
            with pytest.raises(ImageError, match="uint8 RGB"):
                reader.prepare(wrong)


def test_many_questions_in_turn_encode_an_image_once(any_engine):
    """Frame after frame, dense map and points, one image and two."""
    engine = any_engine
    images = engine._images
    images.forget()
    before, counting = images.tower, Counting(images)
    try:
        first = engine.answer_shared(noise(0), QUESTIONS, 4)
        engine.answer_shared(noise(0), QUESTIONS[:1], 4)
        assert counting.count == 1
        engine.answer_about([noise(0), noise(1)], QUESTIONS, 4)
        assert counting.count == 2
        engine.depth_map(noise(1))
        assert counting.count == 2
        engine.forget()
        assert engine.answer_shared(noise(0), QUESTIONS, 4) == first
        assert counting.count == 3
    finally:
        images.tower = before


def test_answers_about_remembered_images_are_not_mixed_up(any_engine):
    engine = any_engine
    said = {}
    for seed in (0, 1, 0, 2, 1, 3, 0, 3):
        answers = [answer.token_ids for answer in engine.answer_shared(noise(seed), QUESTIONS, 6)]
        assert said.setdefault(seed, answers) == answers
    assert len({tuple(answers) for answers in said.values()}) > 1


def test_more_images_than_are_remembered_may_be_asked_about_at_once(shared_engine):
    images = [noise(seed, (64, 64 + 32 * seed)) for seed in range(KNOWN_IMAGES + 2)]
    inputs = [shared_engine.processor.images([image]).grid_hw for image in images]
    (ids,) = shared_engine.processor.prompts(QUESTIONS[:1], *inputs)
    (answer,) = shared_engine.answer_about(images, QUESTIONS[:1], 4)
    scores = plain_scores(shared_engine, images, [*ids, *answer.token_ids])[len(ids) - 1 : -1]
    assert tuple(scores.argmax(-1).tolist()) == answer.token_ids


# ---------------------------------------------------------------- ahead, and from several threads


def test_on_a_cpu_nothing_is_encoded_ahead(shared_engine):
    assert shared_engine.encode_ahead(noise()) is False
    counting = Counting(shared_engine._images)
    try:
        shared_engine.encode_ahead(noise(50))
        assert counting.count == 0
    finally:
        shared_engine._images.tower = counting.tower


def test_two_threads_that_prepare_one_image_share_it(reader, monkeypatch):
    """The second one finishes while the first one is at it; whoever encodes it then does so for both."""
    processor, both = reader._processor, threading.Barrier(2, timeout=120)
    prepare = processor.images

    def together(images):
        both.wait()
        return prepare(images)

    monkeypatch.setattr(processor, "images", together)
    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(reader.prepare, [noise(), noise()])
    assert one is other


def test_threads_that_ask_about_images_at_once_get_those_they_asked_about(reader):
    expected = {seed: encoded(reader, noise(seed)) for seed in range(5)}
    reader.forget()

    def ask(seed):
        return all(same(encoded(reader, noise(at % 5)), expected[at % 5]) for at in range(seed, seed + 15))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(ask, range(4)))
    assert len(reader._known) <= KNOWN_IMAGES


# ---------------------------------------------------------------- among the text


@pytest.mark.parametrize("rows", [1, 3])
def test_text_and_image_tokens_stand_in_their_places(any_engine, rows):
    engine = any_engine
    inputs = [engine.processor.images([noise(seed, size) for seed in range(rows)]) for size in ((96, 128), (112, 56))]
    (ids,) = engine.processor.prompts(QUESTIONS[:1], *(some.grid_hw for some in inputs))
    with torch.inference_mode():
        frame = engine._images.compose(ids, inputs)
        encodings = [engine._images.encode(some) for some in inputs]
        text = engine.model.get_input_embeddings()(torch.tensor(ids))
    image = torch.tensor([token == engine.processor.image_token_id for token in ids])
    assert frame.token_ids == tuple(ids) and frame.embeds.shape[:2] == (rows, len(ids))
    assert torch.equal(frame.image_places, image.nonzero()[:, 0])
    assert torch.equal(frame.is_image, image.expand(rows, -1))
    for row in range(rows):
        assert torch.equal(frame.embeds[row, ~image], text[~image])
        tokens = torch.cat([some.view(rows, -1, some.shape[-1])[row] for some, _ in encodings])
        assert torch.equal(frame.embeds[row, image], tokens)
        for number, deep in enumerate(frame.deepstack):
            maps = [some[number].view(rows, -1, deep.shape[-1])[row] for _, some in encodings]
            assert torch.equal(deep[row], torch.cat(maps))
    assert bool(frame.deepstack) == (engine.info.architecture == "qwen3_vl")
    if engine.info.architecture == "llava":
        assert frame.position_ids is None and frame.next_position == len(ids)
    else:
        assert frame.position_ids.shape == (3, rows, len(ids))
        assert frame.next_position == int(frame.position_ids.max()) + 1 < len(ids)
    assert frame.positions.shape[-2:] == (rows, len(ids))
