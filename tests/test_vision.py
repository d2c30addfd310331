"""The lean vision tower gives what transformers' own gives, marked images what drawn ones give."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from depthlm_ros.engines import marked as marked_module
from depthlm_ros.engines import vision
from depthlm_ros.engines.checkpoint import open_checkpoint
from depthlm_ros.engines.devices import choose_placement
from depthlm_ros.engines.loading import load_model
from depthlm_ros.engines.marked import MarkedImages, MarkedInputs
from depthlm_ros.engines.processor import ImageInputs, PromptProcessor
from depthlm_ros.engines.vision import VisionTower
from depthlm_ros.errors import ImageError
from depthlm_ros.markers import arrow_patch, draw_arrow, paste

ARCHITECTURES = ["qwen3_vl", "qwen2_5_vl", "llava"]
# On the processor's grid; Qwen2.5's has windows of 4 x 4 image tokens, so these have whole ones and three kinds of cut.
SIZES = {"qwen3_vl": (128, 192), "qwen2_5_vl": (252, 280), "llava": (96, 144)}


@pytest.fixture(scope="module", params=ARCHITECTURES)
def parts(request):
    """Architecture, model and processor of a small random checkpoint."""
    folder = request.getfixturevalue(f"{request.param}_checkpoint")
    checkpoint = open_checkpoint(folder)
    model = load_model(checkpoint, choose_placement("cpu", "float32", checkpoint.parameters))
    return request.param, model, PromptProcessor(checkpoint)


def scene(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def difference(ours, theirs):
    """The largest one, as a share of the largest value."""
    pairs = zip([ours[0], *ours[1]], [theirs[0], *theirs[1]], strict=True)
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)


def module_alone(parts):
    return VisionTower(parts[1], parts[0], lean=False)


@pytest.mark.parametrize("count", [1, 3])
def test_the_lean_tower_gives_what_transformers_gives(parts, count):
    architecture, model, processor = parts
    inputs = processor.images([scene(*SIZES[architecture], seed) for seed in range(count)])
    ours, theirs = (tower(inputs.tensors, count) for tower in (VisionTower(model, architecture), module_alone(parts)))
    assert [x.shape for x in [ours[0], *ours[1]]] == [x.shape for x in [theirs[0], *theirs[1]]]
    assert difference(ours, theirs) < 1e-5


@pytest.mark.parametrize("size", [(1, 2), (2, 5), (7, 3), (4, 4)])
def test_it_does_so_for_any_size(parts, size):
    architecture, model, processor = parts
    height, width = (processor.patch_px * max(side, 2) for side in size)
    tower = VisionTower(model, architecture)
    assert tower.agrees(processor.images([scene(height, width)]).tensors) < 1e-5


def test_sizes_that_come_again_are_not_worked_out_again(parts, monkeypatch):
    architecture, model, processor = parts
    monkeypatch.setattr(vision, "GRIDS", 2)
    tower = VisionTower(model, architecture)
    made = []
    grid = tower._tower.grid
    object.__setattr__(tower._tower, "grid", lambda hw: made.append(hw) or grid(hw))
    for side in (2, 3, 3, 2, 4, 3):
        tower(processor.images([scene(processor.patch_px * side, processor.patch_px * 4)]).tensors, 1)
    assert len(made) == 4  # 2, 3, 4 and 3 again: it made room for 4, as 2 had just been used


def test_one_image_on_a_gpu_is_one_recording_and_gives_the_same(parts):
    """The recording stands in for a GPU's; what is recorded must not look at the host's tensors."""
    architecture, model, processor = parts
    tower = VisionTower(model, architecture)
    made = []

    def record(function):
        made.append(function)
        outputs = function()
        return lambda: [place.copy_(value) for place, value in zip(outputs, function(), strict=True)], outputs

    tower.record = record
    for seed in (1, 2):
        inputs = processor.images([scene(*SIZES[architecture], seed)])
        assert difference(tower(inputs.tensors, 1), VisionTower(model, architecture)(inputs.tensors, 1)) < 1e-6
    assert len(made) == 1


def test_a_tower_that_proves_itself_stays_lean(parts):
    architecture, model, processor = parts
    tower = VisionTower(model, architecture)
    assert tower.prove(processor.images([scene(*SIZES[architecture])]).tensors)
    assert "within" in tower.reason


def test_a_tower_that_computes_something_else_is_replaced_by_the_module(parts):
    architecture, model, processor = parts
    inputs = processor.images([scene(*SIZES[architecture])])
    tower = VisionTower(model, architecture)
    merge = tower._tower.merge
    object.__setattr__(tower._tower, "merge", lambda x: 1.01 * merge(x))
    assert not tower.prove(inputs.tensors)
    assert "transformers' own because the lean one differs" in tower.reason
    assert difference(tower(inputs.tensors, 1), module_alone(parts)(inputs.tensors, 1)) == 0


def test_a_model_that_is_built_otherwise_is_left_to_transformers(parts, monkeypatch):
    architecture, model, processor = parts

    def unknown(*_):
        raise AttributeError("no blocks")

    monkeypatch.setattr(vision, "read_tower", unknown)
    tower = VisionTower(model, architecture)
    assert not tower.lean and "no blocks" in tower.reason
    tower(processor.images([scene(*SIZES[architecture])]).tensors, 1)


def test_weights_stay_the_modules_own(parts):
    architecture, model, processor = parts
    before = {name: value.clone() for name, value in model.state_dict().items()}
    VisionTower(model, architecture)(processor.images([scene(*SIZES[architecture])]).tensors, 1)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_bfloat16_is_within_its_rounding(parts):
    architecture, model, processor = parts
    small = load_model(open_checkpoint(model.name_or_path), choose_placement("cpu", "bfloat16", 1))
    inputs = processor.images([scene(*SIZES[architecture])])
    tower = VisionTower(small, architecture)
    assert tower(inputs.tensors, 1)[0].dtype == torch.bfloat16
    exact = module_alone(parts)(inputs.tensors, 1)
    theirs = VisionTower(small, architecture, lean=False)(inputs.tensors, 1)
    ours = difference(_floats(tower(inputs.tensors, 1)), exact)
    assert ours < 1.5 * difference(_floats(theirs), exact) + 0.005


def _floats(encoded):
    return encoded[0].float(), [x.float() for x in encoded[1]]


# On corners of patches, image tokens and windows, in the middle, at the border, and one place twice.
def places(height, width):
    corners = [(side, side) for side in (16, 28, 32, 64)] + [(112, 112)] * (height > 117 and width > 117)
    return [*corners, (5, 5), (width - 6, height - 6), (width - 6, 5), (40, 9), (40, 9), (width // 2, height // 2)]


def marked(parts):
    architecture, _, processor = parts
    image = scene(*SIZES[architecture])
    at = places(*image.shape[:2])
    drawn = [draw_arrow(image, place) for place in at]
    return MarkedImages(processor, image, [arrow_patch(image, place) for place in at]), drawn


def test_marked_images_are_the_drawn_ones_bit_for_bit(parts):
    images, drawn = marked(parts)
    prepared = images.part(0, len(images)).written_out()
    stock = parts[2]._stock(drawn)
    assert images.shared and prepared.grid_hw == stock.grid_hw and prepared.count == len(drawn)
    assert all(torch.equal(prepared.tensors[name], value) for name, value in stock.tensors.items())


@pytest.mark.parametrize("chunk", [1, 4, 16])
def test_marked_images_are_encoded_as_the_drawn_ones(parts, chunk):
    images, drawn = marked(parts)
    tower = VisionTower(parts[1], parts[0])
    theirs = module_alone(parts)(parts[2]._stock(drawn).tensors, len(drawn))
    encoded = [tower.encode_marked(images.part(at, at + chunk)) for at in range(0, len(images), chunk)]
    maps = [torch.cat(parts_of_map) for parts_of_map in zip(*(maps for _, maps in encoded), strict=True)]
    assert difference((torch.cat([tokens for tokens, _ in encoded]), maps), theirs) < 1e-5


def test_marks_are_encoded_by_the_module_where_the_tower_is_not_lean(parts):
    images, drawn = marked(parts)
    tower = module_alone(parts)
    theirs = tower(parts[2]._stock(drawn).tensors, len(drawn))
    assert difference(tower.encode_marked(images.part(0, len(images))), theirs) == 0


def test_a_mark_may_be_of_any_size(parts):
    architecture, model, processor = parts
    image = scene(*SIZES[architecture])
    height, width = image.shape[:2]
    blocks = [(0, 0, scene(height, width, 1)), (3, 7, scene(40, 33, 2)), (height - 1, width - 1, scene(1, 1, 3))]
    images = MarkedImages(processor, image, blocks)
    theirs = processor._stock([paste(image, block) for block in blocks])
    tower = VisionTower(model, architecture)
    assert difference(tower.encode_marked(images.part(0, 3)), module_alone(parts)(theirs.tensors, 3)) < 1e-5
    alone = tower(processor._stock([paste(image, blocks[2])]).tensors, 1)
    assert difference(tower.encode_marked(images.part(2, 3)), alone) < 1e-5


def test_a_change_that_the_whole_image_looks_at_is_as_exact(qwen3_vl_checkpoint, monkeypatch):
    """Where nearly all attention was on a patch that changes, correcting what is left would cancel."""
    checkpoint = open_checkpoint(qwen3_vl_checkpoint)
    model = load_model(checkpoint, choose_placement("cpu", "float32", checkpoint.parameters))
    with torch.no_grad():
        model.model.visual.blocks[0].attn.qkv.weight.mul_(4.5)  # sharp attention
    processor, anew = PromptProcessor(checkpoint), []
    attend = marked_module.attention
    monkeypatch.setattr(marked_module, "attention", lambda q, *kv: anew.append(q.shape[1]) or attend(q, *kv))
    image = np.full((128, 192, 3), 90, np.uint8)
    image[:16, :16] = (255, 0, 255)
    tower, plain = VisionTower(model, "qwen3_vl"), VisionTower(model, "qwen3_vl", lean=False)
    for block in ((0, 0, np.full((16, 16, 3), 90, np.uint8)), (32, 32, np.full((16, 16, 3), 255, np.uint8))):
        images = MarkedImages(processor, image, [block])
        theirs = plain(processor._stock([paste(image, block)]).tensors, 1)
        assert difference(tower.encode_marked(images.part(0, 1)), theirs) < 2e-5
    assert min(anew) > 10  # rows that were computed anew, beside the patch itself


def test_images_that_the_processor_resamples_are_drawn_and_prepared_whole(parts):
    architecture, model, processor = parts
    image = scene(*(side + 5 for side in SIZES[architecture]))
    at = places(*image.shape[:2])
    images = MarkedImages(processor, image, [arrow_patch(image, place) for place in at])
    part = images.part(2, 6)
    assert not images.shared and isinstance(part, ImageInputs)
    stock = processor._stock([draw_arrow(image, place) for place in at[2:6]])
    assert all(torch.equal(part.tensors[name], value) for name, value in stock.tensors.items())
    tower = VisionTower(model, architecture)
    assert difference(tower.encode_marked(part), module_alone(parts)(stock.tensors, 4)) < 1e-5


def test_another_base_image_is_not_taken_for_the_last_one(parts):
    architecture, model, processor = parts
    tower = VisionTower(model, architecture)
    for seed in (1, 2):
        image = scene(*SIZES[architecture], seed)
        part = MarkedImages(processor, image, [arrow_patch(image, (30, 30))]).part(0, 1)
        assert isinstance(part, MarkedInputs)
        theirs = tower(processor._stock([draw_arrow(image, (30, 30))]).tensors, 1)
        assert difference(tower.encode_marked(part), theirs) < 1e-5


BEYOND = [(-1, 0, (5, 5, 3)), (0, 140, (5, 5, 3)), (0, 0, (5, 5)), (0, 0, (0, 5, 3))]


@pytest.mark.parametrize(("top", "left", "shape"), BEYOND)
def test_a_block_beyond_the_image_is_refused(parts, top, left, shape):
    with pytest.raises(ImageError, match="isn't inside"):
        MarkedImages(parts[2], scene(96, 144), [(top, left, np.zeros(shape, np.uint8))])
