"""The dense dialect's pass is one recording a size, gives what the plain path gives, and keeps its head in float32."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from depthlm_ros.engines.decoder import Decoder
from depthlm_ros.engines.dense import DensePass
from depthlm_ros.engines.transformers_engine import TransformersEngine

ARCHITECTURES = ["qwen3_vl", "qwen2_5_vl", "llava"]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def engines(request):
    """The fast and the plain engine of a small random checkpoint."""
    folder = request.getfixturevalue(f"{request.param}_checkpoint")
    return [TransformersEngine.load(folder, device="cpu", dtype="float32", plain=plain) for plain in (False, True)]


def scene(engine, seed=0, across=4):
    side = engine.processor.patch_px
    return np.random.default_rng(seed).integers(0, 256, (3 * side, across * side, 3), dtype=np.uint8)


def test_the_map_is_that_of_the_plain_path(engines):
    fast, plain = engines
    image = scene(fast)
    expected = plain.depth_map(image)
    np.testing.assert_allclose(fast.depth_map(image), expected, atol=1e-4 * expected.max())


def test_the_map_has_a_value_for_each_pixel_that_the_processor_sees(engines):
    image = scene(engines[0], across=5)
    assert engines[0].depth_map(image).shape == image.shape[:2]


def test_frames_of_one_size_are_one_recording(engines):
    fast, made = engines[0], []

    def record(function):
        made.append(function)
        outputs = tuple(x.clone() for x in function())
        return lambda: [place.copy_(value) for place, value in zip(outputs, function(), strict=True)], outputs

    dense = DensePass(fast._decoder, fast._head, fast._head_mode, record)
    with torch.inference_mode():
        for seed, across in ((1, 4), (2, 4), (3, 5), (4, 4)):
            image = scene(fast, seed, across)
            inputs = fast.processor.images([image])
            ids = fast.processor.prompts([""], inputs.grid_hw)[0]
            last = len(ids) - ids[::-1].index(fast.processor.image_token_id)
            depth = dense(fast._images.compose(ids[:last], (inputs,)), inputs.grid_hw)
            np.testing.assert_allclose(depth.numpy(), fast.depth_map(image), rtol=1e-5)
    assert len(made) == 2 and dense.reason is None


def test_the_head_reads_and_computes_float32_whatever_the_models_format(qwen3_vl_checkpoint):
    engine = TransformersEngine.load(qwen3_vl_checkpoint, device="cpu", dtype="bfloat16")
    seen = []
    engine._head.register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    for module in engine._head.modules():
        module.register_forward_hook(lambda _, args, out: seen.append(out.dtype))
    engine._dense = DensePass(engine._decoder, engine._head, engine._head_mode)
    assert engine.depth_map(scene(engine)).dtype == np.float32
    assert set(seen) == {torch.float32}


def test_the_language_head_has_no_part_in_it(engines, monkeypatch):
    fast = engines[0]

    def never(*_):
        raise AssertionError("the language head was called")

    monkeypatch.setattr(fast.model.lm_head, "forward", never)
    assert isinstance(fast._decoder, Decoder)
    fast.depth_map(scene(fast, 7))
