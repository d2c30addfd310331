"""A pair that is packed sees what it sees alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import make_checkpoint
from transformers import AutoModelForImageTextToText, PreTrainedModel

from depthlm_ros.engines.checkpoint import open_checkpoint
from depthlm_ros.prompts import answer_text, coordinates_question
from depthlm_training.asking import Asked
from depthlm_training.dialogues import DialogueProcessor
from depthlm_training.packing import IGNORED, Batch, collate, pack

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
    return model, DialogueProcessor(open_checkpoint(folder))


def _image(processor: DialogueProcessor, rows: int, columns: int, seed: int = 0) -> np.ndarray:
    size = rows * processor.patch_px, columns * processor.patch_px, 3
    return np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)


def _logits(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        return model(
            input_ids=batch.ids,
            attention_mask=batch.mask(),
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
    tensors = {name: torch.cat([i.tensors[name] for i in inputs]) for name in inputs[0].tensors}
    types = {} if processor.mrope is False else {"mm_token_type_ids": (ids == processor.image_token_id).int()}
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False, **tensors, **types).logits[0]
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


def test_images_of_two_sizes_in_one_sequence(loaded):
    model, processor = loaded
    images = (_image(processor, 3, 4, 1), _image(processor, 2, 5, 2))
    batch = collate([pack(processor, Asked(images, PAIRS))], 4096)
    logits = _logits(model, batch)[0][torch.nonzero(batch.labels[0] != IGNORED)[:, 0] - 1]
    if processor.mrope:
        alone = torch.cat([_alone(model, processor, images, *pair) for pair in PAIRS])
        torch.testing.assert_close(logits, alone, atol=2e-4, rtol=2e-4)
    assert torch.isfinite(logits).all()


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
