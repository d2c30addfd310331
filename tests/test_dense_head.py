"""The dense head gives DepthVLM's published map, from one pass over header and image."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from checkpoints import make_checkpoint
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from depthlm_ros.engines.base import EngineInfo
from depthlm_ros.engines.checkpoint import open_checkpoint
from depthlm_ros.engines.dense_head import MLPDepthHead, head_features, load_head
from depthlm_ros.engines.devices import choose_placement
from depthlm_ros.engines.loading import load_model
from depthlm_ros.engines.processor import ImageInputs
from depthlm_ros.engines.transformers_engine import TransformersEngine
from depthlm_ros.errors import DialectError, ModelError

GOLDEN = Path(__file__).parent / "golden" / "depthvlm"


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def golden(tmp_path_factory, qwen3_vl_checkpoint):
    """DepthVLM's own small model, rebuilt from the rule its weights were made by, with its inputs and outputs."""
    case = json.loads((GOLDEN / "mlp.json").read_text())
    folder = tmp_path_factory.mktemp("depthvlm")
    keys = ("depth_head_type", "depth_head_mlp_hidden", "depth_head_feature_mode")
    config = case["config"] | {"model_type": "qwen3_vl"} | {key: case[key] for key in keys}
    (folder / "config.json").write_text(json.dumps(config))
    weights = {name: golden_weight(name, shape) for name, shape in case["shapes"].items()}
    # The two are tied there, and the language head was filled last.
    weights["model.language_model.embed_tokens.weight"] = weights.pop("lm_head.weight")
    save_file(weights, folder / "model.safetensors")
    checkpoint = open_checkpoint(folder)
    head, mode = load_head(checkpoint, 64, 3, 32)
    processor = SimpleNamespace(
        grid=None, image_token_id=500, tokenizer=AutoTokenizer.from_pretrained(qwen3_vl_checkpoint)
    )
    info = EngineInfo("transformers", "golden", "qwen3_vl", "cpu", "float32", (), 0, True)
    model = load_model(checkpoint, choose_placement("cpu", "float32"))
    model.generation_config.eos_token_id = 0
    engine = TransformersEngine(model, processor, info, head=head, head_mode=mode)
    arrays = dict(np.load(GOLDEN / "mlp.npz"))
    tensors = {name: torch.from_numpy(arrays[name]) for name in ("pixel_values", "image_grid_thw")}
    return SimpleNamespace(
        engine=engine,
        head=head,
        inputs=ImageInputs(tensors, (3, 4), 1),
        ids=arrays["input_ids"][0].tolist(),
        out=arrays,
    )


def golden_weight(name, shape):
    generator = np.random.RandomState(zlib.crc32(name.encode()) & 0xFFFFFFFF)
    drawn = torch.from_numpy(generator.standard_normal(int(np.prod(shape))).astype(np.float32)).reshape(shape)
    if name.endswith("bias"):
        return 0.02 * drawn
    return 1 + 0.1 * drawn if len(shape) == 1 else drawn / float(np.sqrt(np.prod(shape[1:])))


@torch.inference_mode()
def test_the_map_is_that_of_the_original_program(golden):
    last_image_token = len(golden.ids) - golden.ids[::-1].index(500)
    features = golden.engine.image_features(golden.ids[:last_image_token], golden.inputs)
    depth = golden.head(features[0], (3, 4)).numpy()
    np.testing.assert_allclose(depth, golden.out["depth"], rtol=2e-5, atol=2e-6)


@torch.inference_mode()
def test_a_prefill_and_one_decoded_token_follow_the_original_logits(golden):
    split = len(golden.ids) - 3
    prefix = golden.engine.prefill(golden.ids[:split], golden.inputs)
    answer = golden.engine.decode(prefix, [golden.ids[split:]], 1)[0]
    logits = torch.from_numpy(golden.out["logits"])
    assert answer.token_ids == (int(logits.argmax()),)


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
    np.testing.assert_allclose(depth, expected, rtol=1e-4, atol=1e-5)


def test_a_map_costs_one_pass_and_no_language_head(qwen3_vl_checkpoint):
    engine = TransformersEngine.load(qwen3_vl_checkpoint)
    lengths, heads = [], []
    engine.model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
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


def test_the_dpt_variant_is_named_and_leaves_the_text_dialects_usable(tmp_path):
    folder = edited(make_checkpoint(tmp_path / "dpt"), depth_head_type="dpt")
    engine = TransformersEngine.load(folder)
    with pytest.raises(ModelError, match="'dpt' can't be run yet"):
        engine.depth_map(noise(96, 128))
    assert len(engine.answer_shared(noise(96, 128), ["How far?"], 2)) == 1


def test_a_dpt_head_is_recognised_by_its_weights(tmp_path):
    def as_dpt(state):
        rest = {name: value for name, value in state.items() if not name.startswith("depth_head.")}
        return rest | {"depth_head.scratch.layer1_rn.weight": torch.zeros(1)}

    folder = make_checkpoint(tmp_path / "dpt")
    config = json.loads((folder / "config.json").read_text())
    del config["depth_head_type"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="'dpt' can't be run yet"):
        TransformersEngine.load(edited(folder, as_dpt)).depth_map(noise(96, 128))


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
