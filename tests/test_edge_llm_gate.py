"""From a checkpoint to an estimator by way of Edge-LLM's files: the gate lets right answers through, and no others.

In the place of llm_inference stands a program with its arguments and files; the checkpoint itself, in this process,
gives it the answers.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Client, Listener
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml
from checkpoints import make_checkpoint
from edge_llm_exports import write_export
from edge_llm_programs import write_program

from depthlm_ros.camera import Camera
from depthlm_ros.cards import CARD_FILE
from depthlm_ros.engines.transformers_engine import TransformersEngine
from depthlm_ros.errors import EngineError
from depthlm_ros.estimator import Estimator
from depthlm_ros.manifest import read_manifest
from depthlm_training.edge_llm_tool import PROGRAM
from depthlm_training.export_targets import TargetOptions, export_target

CAMERA = Camera(250.0, 250.0, 159.5, 119.5, 320, 240)
CARD = {
    "name": "small",
    "source": "small",
    "licence": "Apache-2.0",
    "commercial_use": True,
    "architecture": "qwen3_vl",
    "dialects": ["coordinates"],
    "default_dialect": "coordinates",
    "focal_px": 125,
    "policy": "exact",
    "depth_kind": "z",
    "system_text": "You are a helpful assistant.",
    "answer": "{number}",
    "max_new_tokens": 12,
    "description": "",
}

_ASKS = """import sys
if "--help" in sys.argv:
    print("--engineDir --multimodalEngineDir --inputFile --outputFile")
    sys.exit(0)
from multiprocessing.connection import Client
with Client({address!r}) as line:
    line.send_bytes(open(sys.argv[sys.argv.index("--inputFile") + 1], "rb").read())
    answers = line.recv_bytes()
open(sys.argv[sys.argv.index("--outputFile") + 1], "wb").write(answers)
"""


SIZES = {"batch": 3, "question_tokens": 100, "answer_tokens": 40}


@pytest.fixture(scope="module")
def export(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("gate")
    made = make_checkpoint(folder / "small", dense_head=False)
    (made / CARD_FILE).write_text(yaml.safe_dump(CARD))
    graphs = write_export(folder / "graphs", made)
    copies = f"import shutil, sys\nshutil.copytree({str(graphs)!r}, sys.argv[2])"
    program = write_program(folder / PROGRAM, copies)
    options = TargetOptions(exporter=str(program), **SIZES)
    manifest = export_target(str(made), folder / "export", "edge-llm", CAMERA, options)
    built = {"edgellm_version": "0.11.0", "builder_config": manifest.extra["sizes"]}
    for name in ("llm.engine", "visual/visual.engine"):
        path = folder / "export" / "engines" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("plan")
        (path.parent / "config.json").write_text(json.dumps(built))
    return folder / "export"


def test_the_engine_is_sized_as_told(export):
    sizes = read_manifest(export).extra["sizes"]
    assert sizes["max_batch_size"] == 3
    script = (export / "build_on_device.sh").read_text()
    assert "--maxBatchSize 3" in script, script


def answered(told: dict, checkpoint: Path, exchanged: bool) -> dict:
    """What the checkpoint says to a file of requests: to images as they lie there, and texts as they stand there."""
    images, questions, systems = [], [], set()
    for request in told["requests"]:
        system, user = request["messages"]
        picture, text = user["content"]
        pixels = cv2.imread(picture["image"])
        images.append(pixels.copy() if exchanged else pixels[..., ::-1].copy())
        questions.append(text["text"])
        systems.add(system["content"])
    engine = TransformersEngine.load(str(checkpoint), system_text=systems.pop(), device="cpu", dtype="float32")
    answers = engine.answer_each(images, questions, told["max_generate_length"])
    ended = {"finish_reason": "end-of-sequence"}
    return {"responses": [{"output_text": a.text, "request_idx": i, **ended} for i, a in enumerate(answers)]}


@contextmanager
def program(folder: Path, checkpoint: Path, exchanged: bool = False) -> Iterator[str]:
    """A program that answers as the checkpoint does, or as it does to images whose red and blue are exchanged."""
    with Listener(family="AF_UNIX") as listener:

        def serve() -> None:
            while True:
                with listener.accept() as line:
                    told = line.recv_bytes()
                    if not told:
                        return
                    line.send_bytes(json.dumps(answered(json.loads(told), checkpoint, exchanged)).encode())

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield str(write_program(folder / "llm_inference", _ASKS.format(address=listener.address)))
        with Client(listener.address) as line:
            line.send_bytes(b"")
        thread.join(30)


def test_right_answers_pass_the_gate_and_the_check_is_kept(export, tmp_path, monkeypatch):
    checkpoint = export.with_name("small")
    image = np.random.default_rng(0).integers(0, 256, (240, 320, 3), dtype=np.uint8)
    pixels = np.array([[100.0, 80.0], [200.0, 150.0], [30.0, 200.0]])
    with program(tmp_path, checkpoint) as path:
        monkeypatch.setenv("LLM_INFERENCE", path)
        with Estimator.load(str(export), engine="edge_llm") as estimator:
            assert not estimator.complaints and "parity" in estimator.proof.sentence
            result = estimator.estimate(image, CAMERA, pixels)
    with Estimator.load(str(checkpoint), device="cpu", dtype="float32") as reference:
        np.testing.assert_array_equal(result.depth_m, reference.estimate(image, CAMERA, pixels).depth_m)
    record = read_manifest(export).parity[-1]
    assert record.passed and record.engine == "edge_llm" and "plans" in record.version


def test_an_engine_that_sees_colours_exchanged_is_refused(export, tmp_path, monkeypatch):
    with program(tmp_path, export.with_name("small"), exchanged=True) as path:
        monkeypatch.setenv("LLM_INFERENCE", path)
        with pytest.raises(EngineError, match="does not answer as small"):
            Estimator.load(str(export), engine="edge_llm")
