"""A pair that is packed sees what it sees alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import make_checkpoint
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForImageTextToText, PreTrainedModel

from depthlm_ros.engines.checkpoint import open_checkpoint
from depthlm_ros.errors import ConfigError
from depthlm_ros.prompts import answer_text, compact_questions, coordinates_question
from depthlm_training.asking import Asked
from depthlm_training.dialogues import DialogueProcessor
from depthlm_training.packed_attention import attend_packed, layout, packed_attention, seen_by, wholes
from depthlm_training.packing import (
    IGNORED,
    PADDING,
    Batch,
    collate,
    filled_rows,
    pack,
    rotary_positions,
    split,
    visible,
)
from depthlm_training.sft import answer_loss

ARCHITECTURES = ("qwen3_vl", "qwen2_5_vl", "llava")
PAIRS = (
    (coordinates_question(10, 300), answer_text(3.42)),
    (coordinates_question(1999, 7), answer_text(11.08)),
    ("What is this?", "A corridor."),
)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def loaded(request, tmp_path_factory) -> tuple[PreTrainedModel, DialogueProcessor]:
    """A small model of each architecture in float32, and its processor."""
    folder = make_checkpoint(tmp_path_factory.mktemp(request.param), request.param, dense_head=False)
    return _load(folder)


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory) -> DialogueProcessor:
    return _load(make_checkpoint(tmp_path_factory.mktemp("qwen3"), "qwen3_vl", dense_head=False))[1]


def _load(folder: Path) -> tuple[PreTrainedModel, DialogueProcessor]:
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()
    attend_packed(model)
    return model, DialogueProcessor(open_checkpoint(folder))


def _image(processor: DialogueProcessor, rows: int, columns: int, seed: int = 0) -> np.ndarray:
    size = rows * processor.patch_px, columns * processor.patch_px, 3
    return np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)


def _logits(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        return model(
            input_ids=batch.ids,
            attention_mask=seen_by(model, batch),
            position_ids=batch.positions,
            use_cache=False,
            **batch.images,
        ).logits


def _alone(model: PreTrainedModel, processor: DialogueProcessor, images, question: str, answer: str) -> torch.Tensor:
    """(A, V) what transformers' own forward says at the A tokens of the answer, everything but ids left to it."""
    inputs = [processor.images([image]) for image in images]
    prompt = processor.prompts([question], *(i.grid_hw for i in inputs))[0]
    said = processor.tokenizer(answer, add_special_tokens=False)["input_ids"] + [processor.stop_id]
    ids = torch.tensor([prompt + said])
    tensors = {name: [i.tensors[name] for i in inputs] for name in inputs[0].tensors}
    if not processor.mrope:
        # As transformers' own processor does with images of several sizes.
        sides = [max(p.shape[axis] for p in tensors["pixel_values"]) for axis in (2, 3)]
        tensors["pixel_values"] = [
            torch.nn.functional.pad(p, (0, sides[1] - p.shape[3], 0, sides[0] - p.shape[2]))
            for p in tensors["pixel_values"]
        ]
    types = {"mm_token_type_ids": (ids == processor.image_token_id).int()} if processor.mrope else {}
    with torch.no_grad():
        logits = model(
            input_ids=ids, use_cache=False, **{name: torch.cat(parts) for name, parts in tensors.items()}, **types
        ).logits[0]
    return logits[len(prompt) - 1 : -1]


def test_logits_of_a_packed_pair_equal_those_of_the_pair_alone(loaded):
    model, processor = loaded
    images = [_image(processor, 3, 4, seed) for seed in (1, 2)]
    packed = [pack(processor, Asked((image,), PAIRS)) for image in images]
    batch = collate(packed, 4096)
    assert batch.ids.shape[0] == 1 and batch.waste == 0
    logits = _logits(model, batch)[0]
    before = (torch.nonzero(batch.labels[0] != IGNORED)[:, 0] - 1).tolist()
    for image in images:
        for question, answer in PAIRS:
            alone = _alone(model, processor, [image], question, answer)
            ours = logits[before[: len(alone)]]
            del before[: len(alone)]
            torch.testing.assert_close(ours, alone, atol=2e-4, rtol=2e-4)
    assert not before


@st.composite
def _rows(draw) -> list[list[tuple[int, ...]]]:
    """Rows of sequences, each its prefix's length and its pairs'."""
    lengths = st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple)
    return draw(st.lists(st.lists(lengths, min_size=1, max_size=3), min_size=1, max_size=2))


class _Layer(torch.nn.Module):
    num_key_value_groups, is_causal = 2, True


@given(_rows())
def test_attention_by_layout_is_attention_with_the_mask(rows):
    length = max(sum(map(sum, row)) for row in rows)
    sequence = torch.full((len(rows), length), PADDING)
    segment = torch.zeros_like(sequence)
    for r, row in enumerate(rows):
        at = 0
        for number, lengths in enumerate(row):
            for part, tokens in enumerate(lengths):
                sequence[r, at : at + tokens], segment[r, at : at + tokens] = number, part
                at += tokens
    torch.manual_seed(length)
    states = [torch.randn(len(rows), heads, length, 8, requires_grad=True) for heads in (4, 2, 2)]
    given_back = torch.randn(len(rows), length, 4, 8) * (sequence != PADDING)[..., None, None]
    by_layout, by_mask = (
        packed_attention(_Layer(), *states, seen)[0] for seen in (layout(sequence, segment), visible(sequence, segment))
    )
    real = sequence != PADDING
    torch.testing.assert_close(by_layout[real], by_mask[real], atol=1e-5, rtol=1e-5)
    gradients = [torch.autograd.grad(out, states, given_back) for out in (by_layout, by_mask)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    rows = [[lengths if len(lengths) != 2 else (sum(lengths),) for lengths in row] for row in rows]
    found = [(whole.row, whole.prefix, *whole.pairs) for whole in wholes(layout(sequence, segment))]
    padded = [(r, length - sum(map(sum, row))) for r, row in enumerate(rows)]
    expected = [(r, *lengths) for r, row in enumerate(rows) for lengths in [*row, padded[r][1:]] if any(lengths)]
    assert found == expected


def test_without_a_layout_the_stock_attention_runs(loaded):
    model, processor = loaded
    ids = torch.arange(1, 9)[None]
    language = model.model.language_model
    with torch.no_grad():
        ours = language(input_ids=ids, use_cache=False).last_hidden_state
        model.config.get_text_config()._attn_implementation = "sdpa"
        stock = language(input_ids=ids, use_cache=False).last_hidden_state
    attend_packed(model)
    assert torch.equal(ours, stock)


def test_images_of_two_sizes_in_one_sequence(loaded):
    model, processor = loaded
    images = (_image(processor, 3, 4, 1), _image(processor, 2, 5, 2))
    batch = collate([pack(processor, Asked(images, PAIRS))], 4096)
    logits = _logits(model, batch)[0][torch.nonzero(batch.labels[0] != IGNORED)[:, 0] - 1]
    alone = torch.cat([_alone(model, processor, images, *pair) for pair in PAIRS])
    torch.testing.assert_close(logits, alone, atol=2e-4, rtol=2e-4)


def test_rows_that_are_padded_say_the_same(loaded):
    model, processor = loaded
    packed = [pack(processor, Asked((_image(processor, 3, 4, seed),), PAIRS[: seed + 1])) for seed in range(3)]
    whole, rows = collate(packed, 4096), collate(packed, max(map(len, packed)))
    assert len(rows.ids) > 1 and rows.waste > 0
    said = {}
    for batch in (whole, rows):
        supervised = batch.labels != IGNORED
        logits = _logits(model, batch)
        scores = logits[:, :-1][supervised[:, 1:]].log_softmax(-1)
        said[id(batch)] = scores.gather(1, batch.labels[supervised][:, None]).sum()
    torch.testing.assert_close(said[id(whole)], said[id(rows)], atol=1e-3, rtol=1e-4)


def test_another_pair_changes_nothing(loaded):
    model, processor = loaded
    image = _image(processor, 3, 4)
    said = []
    for other in (PAIRS[1], ("Anything else at all?", "No.")):
        batch = collate([pack(processor, Asked((image,), (PAIRS[0], other)))], 4096)
        first = torch.nonzero((batch.labels[0] != IGNORED) & (batch.segment[0] == 1))[:, 0] - 1
        said.append(_logits(model, batch)[0][first])
    torch.testing.assert_close(said[0], said[1], atol=1e-5, rtol=1e-5)


def test_positions_are_those_that_the_model_gives(loaded):
    model, processor = loaded
    images = [processor.images([_image(processor, 3, 4)]), processor.images([_image(processor, 2, 5)])]
    ids = torch.tensor(processor.prompts(["Why?"], *(i.grid_hw for i in images)))
    grids = [i.grid_hw for i in images]
    ours, following = rotary_positions(ids[0].tolist(), processor.image_token_id, grids, processor.mrope)
    if not processor.mrope:
        assert ours.tolist() == list(range(ids.shape[1])) and following == ids.shape[1]
        return
    theirs, _ = model.model.get_rope_index(
        ids,
        mm_token_type_ids=(ids == processor.image_token_id).int(),
        image_grid_thw=torch.cat([i.tensors["image_grid_thw"] for i in images]),
    )
    assert torch.equal(ours, theirs[:, 0])
    assert following == theirs.max() + 1


def test_only_answers_and_their_ends_are_supervised(loaded):
    _, processor = loaded
    packed = pack(processor, Asked((_image(processor, 2, 3),), PAIRS))
    for number, (question, answer) in enumerate(PAIRS, 1):
        said = packed.ids[(packed.segment == number) & (packed.labels != IGNORED)].tolist()
        assert said[-1] == processor.stop_id
        assert processor.tokenizer.decode(said[:-1]) == answer
        whole = processor.tokenizer.decode(packed.some(number, number).ids)
        assert question in whole and whole.count(answer) == 1
    assert (packed.labels[packed.segment == 0] == IGNORED).all()


def test_a_pair_alone_is_the_prompt_of_the_engine_and_the_answer(loaded):
    _, processor = loaded
    packed = pack(processor, Asked((_image(processor, 2, 3),), PAIRS))
    for number, (question, answer) in enumerate(PAIRS, 1):
        prompt = processor.prompts([question], packed.images[0].grid_hw)[0]
        assert packed.some(number, number).ids.tolist() == prompt + processor.answers([answer])[0]


def test_what_compact_questions_share_is_read_once(qwen3):
    questions = compact_questions([(1, 2), (33, 44), (555, 666)])
    packed = pack(qwen3, Asked((_image(qwen3, 2, 3),), tuple((q, "3.42") for q in questions)))
    prefix = qwen3.tokenizer.decode(packed.ids[packed.segment == 0])
    assert questions[0].partition("001,002")[0].strip() in prefix


def test_the_same_question_twice(loaded):
    model, processor = loaded
    image = _image(processor, 2, 3)
    question = coordinates_question(5, 6)
    pairs = ((question, "One."), (question, "Two."))
    batch = collate([pack(processor, Asked((image,), pairs))], 4096)
    logits = _logits(model, batch)[0][torch.nonzero(batch.labels[0] != IGNORED)[:, 0] - 1]
    alone = torch.cat([_alone(model, processor, [image], *pair) for pair in pairs])
    torch.testing.assert_close(logits, alone, atol=2e-4, rtol=2e-4)


def test_the_mask_by_hand():
    # Two sequences, the first with a prefix of 2 and pairs of 1 and 2 tokens, and a token of padding.
    sequence = torch.tensor([[0, 0, 0, 0, 0, 1, 1, PADDING]])
    segment = torch.tensor([[0, 0, 1, 2, 2, 0, 1, 0]])
    seen = ["1.......", "11......", "111.....", "11.1....", "11.11...", ".....1..", ".....11.", ".......1"]
    assert visible(sequence, segment)[0, 0].tolist() == [[sign == "1" for sign in row] for row in seen]


def test_a_sequence_longer_than_a_row_is_split_between_pairs(qwen3):
    packed = pack(qwen3, Asked((_image(qwen3, 2, 3),), PAIRS * 4))
    limit = len(packed) // 3
    parts = split(packed, limit)
    assert len(parts) > 1 and max(map(len, parts)) <= limit
    prefix = packed.ids[packed.segment == 0]
    assert all(torch.equal(part.ids[part.segment == 0], prefix) for part in parts)
    assert torch.equal(torch.cat([part.ids[part.segment > 0] for part in parts]), packed.ids[packed.segment > 0])
    assert sum(part.pairs for part in parts) == packed.pairs == 12
    with pytest.raises(ConfigError, match="tokens_per_row is 20"):
        split(packed, 20)


@given(lengths=st.lists(st.integers(1, 100), min_size=1, max_size=30), most=st.integers(100, 400))
def test_rows_hold_everything_and_no_more_than_they_may(lengths, most):
    rows = filled_rows(lengths, most)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert max(sum(lengths[i] for i in row) for row in rows) <= most


def test_many_sequences_of_many_lengths_waste_little():
    rng = np.random.default_rng(0)
    shares = []
    for _ in range(50):
        lengths = rng.integers(300, 1600, 64).tolist()
        rows = filled_rows(lengths, 8192)
        longest = max(sum(lengths[i] for i in row) for row in rows)
        shares.append(1 - sum(lengths) / (longest * len(rows)))
    assert np.mean(shares) < 0.05


# ------------------------------------------------------------ as published


def _published_labels(processor: DialogueProcessor, ids: list[int]) -> list[int]:
    """DepthLM's masking in its own words: everything but padding and image tokens."""
    hidden = {processor.tokenizer.pad_token_id, processor.image_token_id}
    return [IGNORED if token in hidden else token for token in ids]


def test_published_supervision_is_everything_but_images(qwen3):
    packed = pack(qwen3, Asked((_image(qwen3, 2, 3),), PAIRS[:1]), "published")
    assert packed.labels[1:].tolist() == _published_labels(qwen3, packed.ids.tolist())[1:]
    text = qwen3.tokenizer.decode(packed.ids[packed.labels != IGNORED])
    question, answer = PAIRS[0]
    assert text.endswith(f"{question}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n<|im_start|>assistant\n")
    assert "<|vision_start|><|vision_end|>" in text and "<|image_pad|>" not in text


def test_published_system_text_is_supervised_too(tmp_path):
    folder = make_checkpoint(tmp_path, "qwen2_5_vl", dense_head=False)
    processor = DialogueProcessor(open_checkpoint(folder), "You are a helpful assistant.")
    packed = pack(processor, Asked((_image(processor, 2, 3),), PAIRS[:1]), "published")
    said = processor.tokenizer.decode(packed.ids[packed.labels != IGNORED])
    assert "You are a helpful assistant." in said


def test_published_supervision_is_of_one_pair_a_sequence(qwen3):
    with pytest.raises(ConfigError, match="3 points an image"):
        pack(qwen3, Asked((_image(qwen3, 2, 3),), PAIRS), "published")


def test_the_published_loss(loaded):
    """Their batch: dialogues padded on the right, images and padding masked, transformers' own mean over the rest."""
    model, processor = loaded
    images = [_image(processor, 3, 4, seed) for seed in (1, 2)]
    asked = [Asked((image,), (pair,)) for image, pair in zip(images, PAIRS, strict=False)]
    pad = processor.tokenizer.pad_token_id
    inputs = [processor.images([image]) for image in images]
    dialogues = [processor.published_dialogue(*each.pairs[0], i.grid_hw) for each, i in zip(asked, inputs, strict=True)]
    longest = max(map(len, dialogues))
    ids = torch.tensor([dialogue + [pad] * (longest - len(dialogue)) for dialogue in dialogues])
    labels = torch.tensor([_published_labels(processor, row) for row in ids.tolist()])
    lengths = torch.tensor([len(dialogue) for dialogue in dialogues])
    tensors = {name: torch.cat([i.tensors[name] for i in inputs]) for name in inputs[0].tensors}
    types = {"mm_token_type_ids": (ids == processor.image_token_id).int()} if processor.mrope else {}
    with torch.no_grad():
        theirs = model(
            input_ids=ids,
            attention_mask=(torch.arange(longest) < lengths[:, None]).long(),
            labels=labels,
            **tensors,
            **types,
        ).loss
        batch = collate([pack(processor, each, "published") for each in asked], 4096)
        ours = answer_loss(model, batch) / batch.units
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
