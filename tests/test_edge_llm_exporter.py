"""The real exporter of TensorRT Edge-LLM on small checkpoints; and the real models of its server's requests.

Where its environment isn't (`make edge-llm`), these tests are left out.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from checkpoints import make_checkpoint
from conftest import foreign_environment
from edge_llm_exports import flatten, sides, write_export
from safetensors.torch import load_file

from depthlm_ros.camera import Camera
from depthlm_ros.cards import CARD_FILE, load_card
from depthlm_ros.engines.edge_llm_engine import load_edge_llm
from depthlm_ros.engines.options import EngineOptions
from depthlm_ros.errors import DepthLMError, EngineError, ModelError
from depthlm_ros.manifest import require_manifest
from depthlm_training.edge_llm_contract import check_export
from depthlm_training.edge_llm_tool import find_exporter, run_exporter
from depthlm_training.export_targets import export_target

try:
    EXPORTER = find_exporter()
except DepthLMError:
    EXPORTER = None

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(EXPORTER is None, reason="TensorRT Edge-LLM's exporter isn't installed; run `make edge-llm`"),
    # An export takes 20 s on one core.
    pytest.mark.timeout(600),
]
CAMERA = Camera(250.0, 250.0, 159.5, 119.5, 320, 240)
CARD = {
    "name": "small",
    "source": "small",
    "licence": "Apache-2.0",
    "commercial_use": True,
    "focal_px": 125,
    "policy": "exact",
    "depth_kind": "z",
    "system_text": "You are a helpful assistant.",
    "max_new_tokens": 16,
    "description": "",
}


@pytest.fixture(scope="module", params=["qwen3_vl", "qwen2_5_vl"])
def exported(request, tmp_path_factory):
    """A checkpoint in float32, which the exporter alone fails on, and its export."""
    folder = tmp_path_factory.mktemp(request.param)
    made = make_checkpoint(folder / "small", request.param, dense_head=False)
    if request.param == "qwen2_5_vl":
        flatten(made)
    dialect = {"qwen3_vl": "coordinates", "qwen2_5_vl": "marker"}[request.param]
    card = {**CARD, "architecture": request.param, "dialects": [dialect], "default_dialect": dialect}
    (made / CARD_FILE).write_text(yaml.safe_dump(card))
    return made, folder / "export", export_target(str(made), folder / "export", "edge-llm", CAMERA)


def test_a_checkpoint_becomes_a_folder_that_the_engine_takes(exported, tmp_path):
    made, folder, manifest = exported
    assert require_manifest(folder, "edge_llm") == manifest
    assert manifest.extra["edgellm_version"] == manifest.versions["tensorrt-edgellm"] == "0.11.0"
    for name in ("onnx/llm/model.onnx", "onnx/visual/model.onnx.data", "build_on_device.sh", "depthlm_card.yaml"):
        assert name in manifest.files
    card, source = load_card(str(folder))
    with pytest.raises(ModelError, match="no llm.engine; run build_on_device.sh"):
        load_edge_llm(source, card, manifest, EngineOptions())
    # Nothing tells where it was made.
    for path in folder.rglob("*"):
        if path.is_file() and path.suffix not in (".data", ".png", ".npz", ".safetensors"):
            assert str(made.parent).encode() not in path.read_bytes(), path
            assert b"depthlm-edge-llm-" not in path.read_bytes(), path
    script = (folder / "build_on_device.sh").read_text()
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0


def test_its_weights_are_those_of_the_checkpoint(exported):
    made, folder, _ = exported
    own = load_file(made / "model.safetensors")
    name = next(name for name in own if name.endswith("embed_tokens.weight"))
    (embedding,) = load_file(folder / "onnx" / "llm" / "embedding.safetensors").values()
    assert torch.equal(embedding, own[name].half())
    data = (folder / "onnx" / "llm" / "model.onnx.data").read_bytes()
    head = own["lm_head.weight"].half().numpy()
    # Matrices lie as they are or turned.
    assert head.tobytes() in data or np.ascontiguousarray(head.T).tobytes() in data


def test_the_small_graphs_of_other_tests_have_the_same_sides(exported, tmp_path):
    made, folder, _ = exported
    ours = write_export(tmp_path / "ours", made)
    for part in ("llm", "visual"):
        theirs = sides(folder / "onnx" / part / "model.onnx")
        for mine, real in zip(sides(ours / part / "model.onnx"), theirs, strict=True):
            assert set(mine) == set(real)
            fixed = {name: shape[-1] for name, shape in real.items() if isinstance(shape[-1], int) and len(shape) > 1}
            assert {name: mine[name][-1] for name in fixed if isinstance(mine[name][-1], int)}.items() <= fixed.items()


def test_an_exporter_that_leaves_out_the_tower_is_found_out(exported, tmp_path):
    made, folder, _ = exported
    shutil.copytree(folder / "onnx" / "llm", tmp_path / "llm")
    with pytest.raises(ModelError, match="wrote no visual/model.onnx"):
        check_export(tmp_path, json.loads((made / "config.json").read_text()))


def test_the_exporter_itself_says_what_it_cannot_read(tmp_path):
    made = make_checkpoint(tmp_path / "small", dense_head=False)
    os.truncate(made / "model.safetensors", 1000)
    with pytest.raises(EngineError, match="(?s)tensorrt-edgellm-export failed with exit status.*"):
        run_exporter(EXPORTER, made, tmp_path / "out")


CHECK = """
import json, sys
from experimental.server.api.protocol import ChatCompletionRequest
for line in sys.stdin:
    try:
        ChatCompletionRequest.model_validate(json.loads(line))
        print("well")
    except ValueError as error:
        print(str(error).splitlines()[1:2])
"""


def test_questions_to_its_server_are_what_its_models_of_requests_take():
    from depthlm_ros.engines.served.dialects import DIALECTS
    from depthlm_ros.engines.served.images import Picture

    picture = Picture(np.zeros((64, 64, 3), np.uint8), "png")
    bodies = {
        name: DIALECTS[name].body("small", "Be brief.", [picture], "how far?", 16, "[0-9]+").decode()
        for name in ("edge-llm", "vllm")
    }
    python = Path(EXPORTER).with_name("python")
    done = subprocess.run(
        [str(python), "-c", CHECK], input="\n".join(bodies.values()), capture_output=True, text=True, timeout=120,
        env=foreign_environment(), check=False,
    )  # fmt: skip
    ours, others = done.stdout.splitlines()
    assert ours == "well", done.stdout + done.stderr
    # It refuses what it doesn't know, so that this test can fail.
    assert "structured_outputs" in others
