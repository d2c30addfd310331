"""Both heads give the original program's maps and its language the original's scores, through our engine alone."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from golden_depthvlm import (
    EMBEDDING,
    GOLDEN_CASES,
    drawn_inputs,
    golden_case,
    golden_inputs,
    golden_weight,
    more_cases,
    words,
    write_golden,
)

from depthlm_ros.engines.transformers_engine import TransformersEngine
from depthlm_ros.engines.vision import VisionTower

DEPTH_TOLERANCE, LOGIT_TOLERANCE = 1e-4, 1e-3


def with_two_frames(engine):
    """The stored pixels are random in both frames of a patch; the lean tower knows that an image's frames are equal."""
    engine._images.tower = VisionTower(engine.model, "qwen3_vl", lean=False)
    return engine


@pytest.fixture(scope="module", params=GOLDEN_CASES)
def golden(request):
    case, arrays = golden_case(request.param)
    config, ids = case["config"], arrays["input_ids"][0].tolist()
    inputs = golden_inputs(arrays, config["vision_config"]["spatial_merge_size"])
    with tempfile.TemporaryDirectory() as name:  # pytest would keep 120 MB of weights
        folder = write_golden(Path(name), request.param)
        engine = with_two_frames(TransformersEngine.load(folder, device="cpu", dtype="float32"))
        yield SimpleNamespace(
            case=case, arrays=arrays, engine=engine, folder=folder, ids=ids, inputs=inputs,
            start=ids.index(config["vision_start_token_id"]), end=ids.index(config["vision_end_token_id"]),
        )  # fmt: skip


def test_every_stored_weight_is_used_and_none_is_made_up(golden, caplog):
    with caplog.at_level(logging.WARNING):
        engine = TransformersEngine.load(golden.folder, device="cpu")
    used = set(engine.model.state_dict()) | {f"depth_head.{name}" for name in engine._head.state_dict()}
    assert used == set(golden.case["shapes"])
    assert not [record for record in caplog.records if "not used" in record.message or "tie" in record.message]


def test_a_frames_map_is_the_original_programs(golden, monkeypatch):
    monkeypatch.setattr(golden.engine.processor, "images", lambda images: golden.inputs)
    depth = golden.engine.depth_map(np.zeros((96, 128, 3), np.uint8), words(golden.ids[golden.end + 1 :]))
    assert depth.dtype == np.float32 and depth.shape == golden.arrays["depth"].shape
    np.testing.assert_allclose(depth, golden.arrays["depth"], rtol=DEPTH_TOLERANCE, atol=0)


def test_the_prompt_is_the_golden_one(golden):
    question = words(golden.ids[golden.end + 1 :])
    assert golden.engine.processor.prompts([question], golden.inputs.grid_hw) == [golden.ids]


def both_paths(engine):
    return engine, with_two_frames(TransformersEngine(engine.model, engine.processor, engine.info, plain=True))


@pytest.mark.parametrize("asked", [1, 3, 6])
@torch.inference_mode()
def test_prefill_and_decode_give_the_original_programs_scores(golden, asked):
    split = max(len(golden.ids) - asked, golden.end)
    for engine in both_paths(golden.engine):
        logits = engine.next_logits(golden.ids, split, golden.inputs)
        np.testing.assert_allclose(logits[0], golden.arrays["logits"], rtol=0, atol=LOGIT_TOLERANCE)


@torch.inference_mode()
def test_every_position_after_the_image_gets_the_original_programs_scores(golden):
    for last in range(golden.end, len(golden.ids)):
        logits = golden.engine.next_logits(golden.ids[: last + 1], golden.end, golden.inputs)
        # The file holds all positions in float16.
        np.testing.assert_allclose(logits[0], golden.arrays["last_hidden_logits"][last], rtol=2e-3, atol=2e-3)


@torch.inference_mode()
def test_questions_after_the_image_cannot_change_what_the_head_reads(golden):
    alone = golden.engine.image_features(golden.ids[: golden.end], golden.inputs)
    for question in (golden.ids[golden.end :], [golden.ids[golden.end], *range(100, 160)]):
        with_question = golden.engine.image_features(golden.ids[: golden.end] + question, golden.inputs)
        torch.testing.assert_close(with_question, alone, rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_text_before_the_image_does_change_what_the_head_reads(golden):
    depth = golden.engine.depth_of(golden.ids, golden.inputs)
    other = golden.engine.depth_of([77, 78, 79, *golden.ids[golden.start :]], golden.inputs)
    assert np.abs(other / depth - 1).max() > 1e-3


def test_a_tied_head_may_be_left_out_of_the_file(tmp_path):
    case, arrays = golden_case("mlp")
    weights = {name: golden_weight(name, shape) for name, shape in case["shapes"].items()}
    weights[EMBEDDING] = weights.pop("lm_head.weight")
    engine = with_two_frames(TransformersEngine.load(write_golden(tmp_path, "mlp", weights=weights), device="cpu"))
    assert engine.model.lm_head.weight is engine.model.get_input_embeddings().weight
    depth = engine.depth_of(arrays["input_ids"][0].tolist(), golden_inputs(arrays))
    np.testing.assert_allclose(depth, arrays["depth"], rtol=DEPTH_TOLERANCE, atol=0)


@pytest.mark.parametrize("said", [True, False])
@torch.inference_mode()
def test_a_language_head_of_its_own_is_kept_whatever_the_config_says(tmp_path, said):
    # DepthVLM-4B: stage 2 trained the head apart from the embedding, under a config that still ties them.
    case, arrays = golden_case("mlp")
    weights = {name: golden_weight(name, shape) for name, shape in case["shapes"].items()}
    config = {"tie_word_embeddings": said, "text_config": case["config"]["text_config"] | {"tie_word_embeddings": said}}
    engine = TransformersEngine.load(write_golden(tmp_path, "mlp", weights=weights, config=config), device="cpu")
    assert torch.equal(engine.model.lm_head.weight, weights["lm_head.weight"])
    assert torch.equal(engine.model.get_input_embeddings().weight, weights[EMBEDDING])


@pytest.mark.parametrize("name", ["dpt_odd", "dpt_untied", "mlp_concat", "mlp_sum"])
def test_other_models_and_batches_give_the_original_programs_numbers(name):
    cases, arrays = more_cases()
    case = cases[name]
    weights = {key: golden_weight(key, shape) for key, shape in case["shapes"].items()}
    if case["config"]["tie_word_embeddings"]:
        weights[EMBEDDING] = weights["lm_head.weight"].clone()
    with tempfile.TemporaryDirectory() as folder:
        write_golden(Path(folder), "mlp", weights=weights, config=case["config"] | case["head"])
        engine = with_two_frames(TransformersEngine.load(folder, device="cpu", dtype="float32"))
    for row, (ids, thw) in enumerate(zip(case["ids"], case["thw"], strict=True)):
        inputs = drawn_inputs(row, thw)
        depth = engine.depth_of(ids, inputs)
        np.testing.assert_allclose(depth, arrays[f"{name}.depth{row}"], rtol=DEPTH_TOLERANCE, atol=0)
        logits = engine.next_logits(ids, len(ids) - 2, inputs)
        np.testing.assert_allclose(logits[0], arrays[f"{name}.logits"][row], rtol=0, atol=LOGIT_TOLERANCE)


def test_a_frame_of_odd_size_goes_through_the_published_widths(golden):
    depth = golden.engine.depth_map(np.random.default_rng(0).integers(0, 256, (160, 96, 3), dtype=np.uint8))
    assert depth.shape == (160, 96) and (depth > 0).all()
