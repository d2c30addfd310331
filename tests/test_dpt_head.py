"""The DPT head by its parts, and one engine that measures and speaks from the same weights."""

from __future__ import annotations

import gc
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from checkpoints import make_checkpoint
from golden_depthvlm import golden_case, golden_weight
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText

from depthlm_ros.camera import Camera
from depthlm_ros.config import Parameters
from depthlm_ros.engines.dpt_head import DPTDepthHead
from depthlm_ros.engines.transformers_engine import TransformersEngine
from depthlm_ros.errors import ModelError
from depthlm_ros.estimator import Estimator
from depthlm_ros.queries import depth_image, keep_good, plan_query

CAMERA = Camera(fx=950.0, fy=940.0, cx=63.0, cy=47.0, width=128, height=96)


def small_head(in_features=8, patch_px=32):
    torch.manual_seed(0)
    return DPTDepthHead(in_features, patch_px, (8, 12, 16, 16), 8, 4).eval()


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_names_shapes_and_number_of_weights_are_the_published_ones():
    with torch.device("meta"):
        head = DPTDepthHead(2560, 32)
    # DepthVLM-4B's head; the count closes the sum of its trainable weights in a training log.
    assert sum(weight.numel() for weight in head.parameters()) == 35_145_921
    case, _ = golden_case("dpt")
    with torch.device("meta"):
        golden = DPTDepthHead(64, 32).state_dict()
    expected = {name: tuple(shape) for name, shape in case["shapes"].items() if name.startswith("depth_head.")}
    assert {f"depth_head.{name}": tuple(weight.shape) for name, weight in golden.items()} == expected


@pytest.mark.parametrize(("grid", "patch"), [((1, 1), 32), ((1, 7), 32), ((5, 3), 32), ((3, 4), 28), ((2, 2), 16)])
@torch.no_grad()
def test_a_map_has_a_square_of_pixels_for_each_token_whatever_the_grid(grid, patch):
    depth = small_head(patch_px=patch)(torch.randn(4, grid[0] * grid[1], 8), grid)
    assert depth.shape == (patch * grid[0], patch * grid[1])
    assert (depth > 0).all() and depth.isfinite().all()


@torch.no_grad()
def test_what_is_added_back_is_rectified_too():
    unit = small_head().scratch.refinenet1.resConfUnit1
    for weight in unit.parameters():
        weight.zero_()
    x = torch.linspace(-1, 1, 8)[None, :, None, None].expand(1, 8, 2, 2)
    assert torch.equal(unit(x), x.clamp(min=0))


@torch.no_grad()
def test_features_are_not_changed_by_reading_them():
    maps = torch.randn(4, 6, 8)
    before = maps.clone()
    head = small_head()
    assert torch.equal(head(maps, (2, 3)), head(maps, (2, 3))) and torch.equal(maps, before)


@torch.no_grad()
def test_a_batch_is_its_images_one_by_one():
    head, maps = small_head(), torch.randn(3, 4, 6, 8)
    single = torch.stack([head(one, (2, 3)) for one in maps])
    torch.testing.assert_close(head.forward_batch(maps, (2, 3)), single)


@torch.no_grad()
def test_every_map_counts_and_their_order_matters():
    head, maps = small_head(), torch.randn(4, 6, 8)
    depth = head(maps, (2, 3))
    for i in range(4):
        changed = maps.clone()
        changed[i] += torch.randn(6, 8)
        assert not torch.allclose(head(changed, (2, 3)), depth)
    assert not torch.allclose(head(maps.flip(0), (2, 3)), depth)


def dpt_checkpoint(folder, *, widths=(8, 12, 16, 16), features=8, last=4, deepstack=(0, 1, 2), **config):
    """A Qwen3-VL of the other tests with four vision blocks and a DPT head of any size."""
    make_checkpoint(folder, dense_head=False)
    path = folder / "config.json"
    stored = json.loads(path.read_text()) | {"depth_head_type": "dpt"} | config
    stored["vision_config"] |= {"depth": 4, "deepstack_visual_indexes": list(deepstack)}
    path.write_text(json.dumps(stored))
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder))
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    if stored["tie_word_embeddings"]:
        state.pop("lm_head.weight")
    head = DPTDepthHead(64, 32, widths, features, last).state_dict()
    state |= {f"depth_head.{name}": golden_weight(name, value.shape) for name, value in head.items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def dpt(tmp_path_factory):
    return dpt_checkpoint(tmp_path_factory.mktemp("dpt"), tie_word_embeddings=True)


def test_channels_are_those_of_the_stored_weights(tmp_path):
    folder = dpt_checkpoint(tmp_path, widths=(4, 8, 8, 12), features=12, last=6)
    engine = TransformersEngine.load(folder, device="cpu")
    assert engine.info.dense and engine.depth_map(noise(96, 160)).shape == (96, 160)


def test_the_head_is_recognised_by_its_weights(tmp_path):
    engine = TransformersEngine.load(dpt_checkpoint(tmp_path, depth_head_type=None), device="cpu")
    assert engine.info.dense and isinstance(engine._head, DPTDepthHead)


def test_other_blocks_of_the_vision_tower_may_be_read(tmp_path):
    first = TransformersEngine.load(dpt_checkpoint(tmp_path / "a"), device="cpu").depth_map(noise(96, 128))
    last = TransformersEngine.load(dpt_checkpoint(tmp_path / "b", deepstack=(1, 2, 3)), device="cpu")
    assert np.abs(last.depth_map(noise(96, 128)) / first - 1).max() > 1e-3


def test_a_wrong_number_of_maps_is_refused(tmp_path):
    folder = dpt_checkpoint(tmp_path, deepstack=(0, 1))
    with pytest.raises(ModelError, match="reads 3 DeepStack maps .* deepstack_visual_indexes of config.json name 2"):
        TransformersEngine.load(folder, device="cpu")


def test_a_damaged_head_is_named(tmp_path):
    folder = dpt_checkpoint(tmp_path)
    state = load_file(folder / "model.safetensors")
    del state["depth_head.scratch.refinenet2.out_conv.weight"]
    save_file(state, folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"depth_head.scratch.refinenet2.out_conv.weight has shape None"):
        TransformersEngine.load(folder, device="cpu")


def test_the_head_computes_in_float32_under_a_bfloat16_model(dpt):
    engine = TransformersEngine.load(dpt, device="cpu", dtype="bfloat16")
    assert {weight.dtype for weight in engine._head.parameters()} == {torch.float32}
    exact = TransformersEngine.load(dpt, device="cpu", dtype="float32").depth_map(noise(96, 128))
    short = engine.depth_map(noise(96, 128))
    assert short.dtype == np.float32
    assert np.median(np.abs(short / exact - 1)) < 0.05


def test_depth_and_words_come_from_one_set_of_weights(dpt):
    before = tensor_bytes()
    # Without the copies of small models that are packed for a CPU.
    engine = TransformersEngine.load(dpt, device="cpu", dtype="float32", plain=True)
    loaded = tensor_bytes() - before
    stored = sum(value.nbytes for value in load_file(dpt / "model.safetensors").values())
    assert stored <= loaded < 1.02 * stored, "tables of rotary angles are all that is added"
    assert engine.model.lm_head.weight is engine.model.get_input_embeddings().weight
    image = noise(96, 128)
    pointers = {weight.data_ptr() for weight in engine.model.parameters()}
    depth = engine.depth_map(image)
    answers = engine.answer_shared(image, ["How far?", "What is this?"], 4)
    assert len(answers) == 2 and all(answer.token_ids for answer in answers)
    np.testing.assert_array_equal(engine.depth_map(image), depth)
    assert {weight.data_ptr() for weight in engine.model.parameters()} == pointers
    assert tensor_bytes() - before <= loaded + depth.nbytes + remembered_bytes(engine)


def remembered_bytes(engine):
    """Bytes of the last images, prepared and encoded."""
    known = [one for one in engine._images._known.values() if one.encoded is not None]
    return sum(x.nbytes for one in known for x in (*one.inputs.tensors.values(), one.encoded[0], *one.encoded[1]))


def tensor_bytes():
    """Bytes of all tensors of this process, shared storage counted once.

    What a CPU has packed of a small model's weights isn't among them: it has no storage that could be looked at.
    """
    gc.collect()
    storages = [
        thing.untyped_storage()
        for thing in gc.get_objects()
        if type(thing) in (torch.Tensor, torch.nn.Parameter) and not thing.is_mkldnn
    ]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages if storage.device.type == "cpu"}.values())


def test_a_depth_pass_runs_each_part_once_and_no_language_head(dpt):
    engine = TransformersEngine.load(dpt, device="cpu", plain=True)
    calls = dict.fromkeys(("visual", "language_model", "lm_head", "head"), 0)
    modules = (engine.model.model.visual, engine.model.model.language_model, engine.model.lm_head, engine._head)
    for name, module in zip(calls, modules, strict=True):
        module.register_forward_pre_hook(lambda module, args, name=name: calls.update({name: calls[name] + 1}))
    engine.depth_map(noise(96, 128), "a question that would be read and answered")
    assert calls == {"visual": 1, "language_model": 1, "lm_head": 0, "head": 1}


def test_questions_cannot_change_the_map(dpt):
    engine, image = TransformersEngine.load(dpt, device="cpu"), noise(96, 128)
    depth = engine.depth_map(image)
    for question in ("", "Everything is 3 m away.", "x" * 300):
        np.testing.assert_array_equal(engine.depth_map(image, question), depth)


@pytest.mark.parametrize("policy", ["published", "exact"])
def test_a_folder_with_a_dpt_head_measures_at_source_resolution(dpt, policy):
    estimator = Estimator.load(str(dpt), device="cpu", policy=policy)
    assert estimator.card.system == "depthvlm"
    result = estimator.estimate(noise(96, 128), CAMERA)
    assert result.dialect == "dense" and len(result) == 96 * 128
    assert result.valid.all() and (result.depth_m > 0).all()
    assert depth_image(result, 128, 96).shape == (96, 128)


def test_beyond_the_cut_off_there_is_no_depth_in_image_or_organised_cloud(dpt):
    estimator, image = Estimator.load(str(dpt), device="cpu"), noise(96, 128)
    parameters = Parameters(stride=4, organised=True)
    query = plan_query(parameters, "dense", 128, 96, True)
    assert query.organised_shape == (24, 32)
    result = estimator.estimate(image, CAMERA, query.pixels)
    far = float(np.median(result.depth_m))
    near = keep_good(result, replace(parameters, max_depth_m=far))
    assert (near.valid == (result.depth_m <= np.float32(far))).all() and 0 < near.valid.sum() < len(near)
    shown = depth_image(near, 128, 96)
    assert np.isnan(shown).sum() == (~near.valid).sum() and np.nanmax(shown) <= far
    u, v = query.pixels[query.cloud_rows].astype(int).reshape(24, 32, 2).transpose(2, 0, 1)
    np.testing.assert_array_equal(near.depth_m[query.cloud_rows].reshape(query.organised_shape), shown[v, u])
    assert (np.diff(u, axis=1) == 4).all() and (np.diff(v, axis=0) == 4).all()
