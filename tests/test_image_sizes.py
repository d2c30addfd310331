"""Images go out in the size in which the model sees them, from machines without torch, too."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from fault_server import FaultServer

from depthlm_ros.camera import Camera
from depthlm_ros.engines.checkpoint import open_checkpoint, open_processor
from depthlm_ros.engines.image_sizes import ImageSizes, Qwen2VLImageProcessorPil
from depthlm_ros.engines.options import EngineOptions
from depthlm_ros.engines.processor import PromptProcessor
from depthlm_ros.errors import ImageError
from depthlm_ros.estimator import Estimator

ARCHITECTURES = ["qwen3_vl", "qwen2_5_vl", "llava"]
SIZES = [(96, 160), (84, 140), (90, 141), (40, 40), (30, 300), (1100, 1300)]


@pytest.fixture
def folder(request):
    """The checkpoint of the architecture that the test is parametrised with."""
    return request.getfixturevalue(f"{request.param}_checkpoint")


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("folder", ARCHITECTURES, indirect=True)
def test_what_is_shown_is_what_the_checkpoints_processor_sees(folder):
    sizes, processor = ImageSizes(open_processor(folder)), PromptProcessor(open_checkpoint(folder))
    kept = 0
    for size in SIZES:
        image = noise(*size)
        shown = sizes.shown(image)
        kept += shown is image
        # Shown again it is kept, and gives the tensors of the original.
        assert sizes.shown(shown) is shown
        ours, theirs = processor._stock([shown]), processor._stock([image])
        assert ours.grid_hw == theirs.grid_hw
        for name, values in theirs.tensors.items():
            assert torch.equal(ours.tensors[name], values), (size, name)
    assert 0 < kept < len(SIZES)


@pytest.mark.parametrize("folder", ["qwen3_vl"], indirect=True)
def test_sizes_are_asked_of_the_processor_once_and_not_for_ever(folder, monkeypatch):
    sizes = ImageSizes(open_processor(folder))
    asked, prepared = [], sizes._prepared

    def counted(images, kind):
        asked.append(images[0].shape)
        return prepared(images, kind)

    monkeypatch.setattr(sizes, "_prepared", counted)
    for _ in range(3):
        sizes.shown(noise(90, 141))
    assert asked == [(90, 141, 3)]
    for width in range(200, 240):
        sizes.shown(noise(90, width))
    assert len(asked) == 41 and len(sizes._shown_hw) <= 16


@pytest.mark.parametrize("folder", ["qwen3_vl"], indirect=True)
def test_what_is_no_image_is_refused(folder):
    sizes = ImageSizes(open_processor(folder))
    with pytest.raises(ImageError, match=r"float32 of shape \(8, 8, 3\)"):
        sizes.shown(np.zeros((8, 8, 3), np.float32))
    with pytest.raises(ImageError, match="22624x112"):
        sizes.shown(noise(112, 22624))


def test_a_server_is_asked_by_a_machine_without_torch():
    camera = Camera(fx=200.0, fy=200.0, cx=80.0, cy=60.0, width=160, height=120)
    pixels = np.array([[10.0, 10], [80, 60], [150, 110]], np.float32)
    with FaultServer() as server:
        options = EngineOptions(server_urls=(server.url,))
        with Estimator.load("demo", engine="openai", options=options, check_parity=False) as estimator:
            result = estimator.estimate(noise(120, 160), camera, pixels, dialect="coordinates")
        code = [sys.executable, "-c", WITHOUT_TORCH, server.url]
        done = subprocess.run(code, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["answers"] == list(result.answers) and all(result.answers)
    assert said["depth_m"] == result.depth_m.tolist()


# None is what Python finds for a module that isn't there.
WITHOUT_TORCH = """
import json, sys
sys.modules["torch"] = None
import numpy as np
from depthlm_ros.camera import Camera
from depthlm_ros.engines.options import EngineOptions
from depthlm_ros.estimator import Estimator
import depthlm_ros.engines.edge_llm_engine, depthlm_ros.assistant, depthlm_ros.proof, depthlm_ros.parity

camera = Camera(fx=200.0, fy=200.0, cx=80.0, cy=60.0, width=160, height=120)
image = np.random.default_rng(120).integers(0, 256, (120, 160, 3), dtype=np.uint8)
options = EngineOptions(server_urls=(sys.argv[1],))
pixels = np.array([[10.0, 10], [80, 60], [150, 110]], np.float32)
with Estimator.load("demo", engine="openai", options=options, check_parity=False) as estimator:
    result = estimator.estimate(image, camera, pixels, dialect="coordinates")
print(json.dumps({"answers": result.answers, "depth_m": result.depth_m.tolist()}))
"""


@pytest.mark.parametrize("folder", ["qwen3_vl"], indirect=True)
@pytest.mark.parametrize("also", [False, True], ids=["alone", "beside an older file"])
def test_limits_in_the_file_of_the_whole_processor_are_those_that_transformers_takes(folder, also, tmp_path):
    folder = shutil.copytree(folder, tmp_path / "model")
    path = folder / "preprocessor_config.json"
    own = json.loads(path.read_text())
    own["size"] = {"shortest_edge": 65536, "longest_edge": 262144}
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": own}))
    if not also:
        path.unlink()
    sizes = ImageSizes(open_processor(folder))
    stock = Qwen2VLImageProcessorPil.from_pretrained(folder, local_files_only=True)
    assert (sizes.grid.min_pixels, sizes.grid.max_pixels) == (65536, 262144)
    assert (stock.size["shortest_edge"], stock.size["longest_edge"]) == (65536, 262144)


# Newer ones don't want what 4.57 has.
@pytest.mark.filterwarnings("ignore:Passing `min_pixels`:FutureWarning")
@pytest.mark.parametrize("folder", ["qwen3_vl"], indirect=True)
def test_limits_are_those_of_the_file_where_transformers_forgets_them(folder, monkeypatch):
    from depthlm_ros.engines import image_sizes

    class Forgetful(image_sizes.Qwen2VLImageProcessorPil):
        """As in transformers 4.57."""

        @classmethod
        def from_pretrained(cls, *arguments, **options):
            made = super().from_pretrained(*arguments, **options)
            made.min_pixels, made.max_pixels = 56 * 56, 28 * 28 * 1280
            made.size = {"shortest_edge": made.min_pixels, "longest_edge": made.max_pixels}
            return made

    right = ImageSizes(open_processor(folder))
    monkeypatch.setattr(image_sizes, "Qwen2VLImageProcessorPil", Forgetful)
    sizes = ImageSizes(open_processor(folder))
    assert sizes.grid == right.grid and sizes.grid.max_pixels != 28 * 28 * 1280
    for size in SIZES:
        np.testing.assert_array_equal(sizes.shown(noise(*size)), right.shown(noise(*size)))
