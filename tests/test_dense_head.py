"""Dense heads in the engine: one pass over header and image, the MLP head, and what a faulty head is told."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from checkpoints import make_checkpoint
from safetensors.torch import load_file, save_file

from depthlm_ros.engines.checkpoint import open_checkpoint
from depthlm_ros.engines.dense_head import MLPDepthHead, head_features, load_head
from depthlm_ros.engines.transformers_engine import TransformersEngine
from depthlm_ros.errors import DialectError, ModelError


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_each_token_fills_its_own_square_row_by_row():
    head = MLPDepthHead(8, 4, 2, "exp")
    with torch.no_grad():
        for parameter in head.mlp.parameters():
            parameter.zero_()
        head.mlp[2].bias.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]).log())
        depth = head(torch.randn(6, 8), (2, 3))
    np.testing.assert_allclose(depth, np.tile([[1.0, 2.0], [3.0, 4.0]], (2, 3)), rtol=1e-6)


def test_a_tokens_features_change_its_own_square_only():
    torch.manual_seed(0)
    head = MLPDepthHead(8, 16, 4)
    features = torch.randn(6, 8)
    changed = features.clone()
    changed[4] = torch.randn(8)
    with torch.no_grad():
        rows, columns = np.nonzero((head(features, (2, 3)) != head(changed, (2, 3))).numpy())
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (4, 7, 4, 7)


def test_a_batch_is_its_images_one_by_one():
    torch.manual_seed(0)
    head = MLPDepthHead(8, 16, 4)
    features = torch.randn(3, 6, 8)
    with torch.no_grad():
        batch = head.forward_batch(features, (2, 3))
        single = torch.stack([head(one, (2, 3)) for one in features])
    torch.testing.assert_close(batch, single)


def test_exp_reads_the_same_numbers_as_log_depth():
    head = MLPDepthHead(8, 16, 4, "exp")
    features = torch.randn(1, 6, 8)
    with torch.no_grad():
        torch.testing.assert_close(head.forward_batch(features, (2, 3)).log(), head.raw_batch(features, (2, 3)))


def test_maps_are_joined_in_the_published_order():
    deepstack, last = [torch.full((1, 2), 1.0), torch.full((1, 2), 2.0)], torch.full((1, 2), 5.0)
    assert head_features("concat", deepstack, last).tolist() == [[1, 1, 2, 2, 5, 5]]
    assert head_features("sum", deepstack, last).tolist() == [[8, 8]]
    assert head_features("llm_last", deepstack, last) is last


@pytest.mark.parametrize(
    ("architecture", "size"), [("qwen3_vl", (96, 128)), ("qwen2_5_vl", (84, 112)), ("llava", (96, 128))]
)
@torch.inference_mode()
def test_the_map_reads_the_stock_models_last_states_at_the_image(request, architecture, size):
    folder = request.getfixturevalue(f"{architecture}_checkpoint")
    engine = TransformersEngine.load(folder)
    image = noise(*size)
    inputs = engine.processor.images([image])
    ids = torch.tensor(engine.processor.prompts(["a question after the image"], inputs.grid_hw))
    is_image = ids == engine.processor.image_token_id
    options = {} if architecture == "llava" else {"mm_token_type_ids": is_image.int()}
    out = engine.model(input_ids=ids, output_hidden_states=True, **inputs.tensors, **options)
    head, _ = load_head(open_checkpoint(folder), 64, 0, engine.processor.patch_px)
    expected = head(out.hidden_states[-1][is_image], inputs.grid_hw)
    depth = engine.depth_map(image, "any other question")
    assert depth.shape == size and depth.dtype == np.float32
    np.testing.assert_allclose(depth, expected, rtol=3e-4, atol=1e-5)


def test_a_map_costs_one_pass_and_no_language_head(qwen3_vl_checkpoint):
    engine = TransformersEngine.load(qwen3_vl_checkpoint)
    lengths, heads = [], []
    prefill = engine._decoder.prefill
    engine._decoder.prefill = lambda x, *args, **kwargs: lengths.append(x.shape[1]) or prefill(x, *args, **kwargs)
    engine.model.lm_head.register_forward_pre_hook(lambda module, args: heads.append(1))
    image = noise(96, 128)
    engine.depth_map(image, "a long question that would cost a lot to read")
    header = engine.processor.prompts([""], (3, 4))[0].index(engine.processor.image_token_id)
    assert lengths == [header + 12]
    assert heads == []


@pytest.mark.parametrize("mode", ["concat", "sum"])
def test_deepstack_maps_reach_the_head(tmp_path, mode):
    engine = TransformersEngine.load(make_checkpoint(tmp_path / mode, feature_mode=mode, head_output="exp"))
    depth = engine.depth_map(noise(96, 128))
    assert depth.shape == (96, 128) and (depth > 0).all() and depth.std() > 0.01


def test_the_head_stays_float32_under_a_bfloat16_model(qwen3_vl_checkpoint):
    exact = TransformersEngine.load(qwen3_vl_checkpoint, device="cpu", dtype="float32").depth_map(noise(96, 128))
    short = TransformersEngine.load(qwen3_vl_checkpoint, device="cpu", dtype="bfloat16").depth_map(noise(96, 128))
    assert short.dtype == np.float32
    assert 0 < np.median(np.abs(short - exact)) < 0.2


def test_a_checkpoint_without_a_head_does_not_speak_dense(tmp_path):
    engine = TransformersEngine.load(make_checkpoint(tmp_path / "text", dense_head=False))
    assert not engine.info.dense
    with pytest.raises(DialectError, match="has no depth head"):
        engine.depth_map(noise(96, 128))


def edited(folder, weights=None, **config):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    if weights is not None:
        save_file(weights(load_file(folder / "model.safetensors")), folder / "model.safetensors")
    return folder


def test_an_unknown_head_is_named_and_leaves_the_text_dialects_usable(tmp_path):
    engine = TransformersEngine.load(edited(make_checkpoint(tmp_path / "other"), depth_head_type="linear"))
    with pytest.raises(ModelError, match="depth_head_type 'linear' is unknown; known are dpt, mlp"):
        engine.depth_map(noise(96, 128))
    assert len(engine.answer_shared(noise(96, 128), ["How far?"], 2)) == 1


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"depth_head_mlp_hidden": 40}, r"depth_head.mlp.0.bias has shape \(96,\), config.json asks for \(40,\)"),
        ({"depth_head_feature_mode": "max"}, "depth_head_feature_mode 'max' is unknown"),
        ({"depth_head_output": "relu"}, "depth_head_output 'relu' is unknown"),
    ],
)
def test_a_head_that_does_not_fit_its_config_is_refused(tmp_path, config, words):
    with pytest.raises(ModelError, match=words):
        TransformersEngine.load(edited(make_checkpoint(tmp_path / "model"), **config))
