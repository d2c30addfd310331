"""Real servers: transformers serve, and vLLM where DEPTHLM_VLLM names its executable.

On a machine without a GPU vLLM wants its CPU build; DEPTHLM_VLLM may then be a script that sets its environment first.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import PIXTRAL_TEMPLATE, make_checkpoint
from conftest import foreign_environment
from safetensors.torch import load_file, save_file

from depthlm_ros.camera import Camera
from depthlm_ros.cards import load_card
from depthlm_ros.engines.checkpoint import HEAD_PREFIX
from depthlm_ros.engines.options import EngineOptions
from depthlm_ros.engines.served.engine import load_served
from depthlm_ros.errors import EngineError
from depthlm_ros.estimator import Estimator

START_S = 300.0
ANSWER_S = 60.0
BACK_S = 120.0
SERVING = ("fastapi", "uvicorn", "openai", "rich", "accelerate")
IMAGE = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
QUESTIONS = tuple(f"how far is ({n}, 3)?" for n in range(5))


class Peer:
    """A server in a process of its own.

    Args:
        command: starts it; the port is added.
        environment: of the process.
        log: file for what it says.
    """

    def __init__(self, command: Sequence[str], environment: dict[str, str], log: Path) -> None:
        # Kept, bound and not listening, so that nobody else gets the port before the server does, or while it is down.
        self._place = socket.socket()
        self._place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._place.bind(("127.0.0.1", 0))
        self.port = self._place.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._command = [*command, "--host", "127.0.0.1", "--port", str(self.port)]
        self._environment = environment
        self._log = log
        self._process: subprocess.Popen | None = None

    def start(self) -> None:
        """Returns once it says that it is healthy."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(self._command, env=self._environment, stdout=log, stderr=log)
        deadline = time.monotonic() + START_S
        while not self._healthy():
            assert self._process.poll() is None, f"the server ended:\n{self._log.read_text(errors='replace')[-4000:]}"
            assert time.monotonic() < deadline, f"no health:\n{self._log.read_text(errors='replace')[-4000:]}"
            time.sleep(0.2)

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(20.0)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait(20.0)
            self._process = None

    def signal(self, what: signal.Signals) -> None:
        if self._process is not None:
            self._process.send_signal(what)

    def _healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=2.0) as page:
                return page.status == 200
        except OSError:
            return False


def wait_until_well(engine) -> None:
    deadline = time.monotonic() + BACK_S
    while engine.complaints:
        assert time.monotonic() < deadline, engine.complaints
        time.sleep(0.1)


@pytest.fixture(scope="module")
def llava(tmp_path_factory) -> Path:
    """A small Llava whose processor loads without torchvision, as Pixtral's own doesn't."""
    folder = make_checkpoint(tmp_path_factory.mktemp("llava") / "small", "llava", dense_head=False)
    said = {"processor_class": "LlavaProcessor", "patch_size": 16, "image_token": "[IMG]",
            "vision_feature_select_strategy": "full"}  # fmt: skip
    (folder / "processor_config.json").write_text(json.dumps(said), encoding="utf-8")
    template = {"chat_template": PIXTRAL_TEMPLATE.replace("item['content']", "item['text']")}
    (folder / "chat_template.json").write_text(json.dumps(template), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def transformers_serve(llava, tmp_path_factory) -> Iterator[Peer]:
    absent = [name for name in SERVING if importlib.util.find_spec(name) is None]
    if absent:
        pytest.skip(f'transformers serve lacks {", ".join(absent)}; run: pip install "transformers[serving]"')
    program = "import sys; from transformers.cli.transformers import main; sys.exit(main())"
    command = [sys.executable, "-c", program, "serve", str(llava), "--device", "cpu"]
    environment = os.environ | {"HF_HOME": str(tmp_path_factory.mktemp("hub"))}
    peer = Peer(command, environment, tmp_path_factory.mktemp("log") / "serve.log")
    try:
        peer.start()
        yield peer
    finally:
        peer.stop()


def generated(folder: Path, longest: int) -> list[str]:
    """What transformers itself answers, one question after the other."""
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    texts = []
    for question in QUESTIONS:
        content = [{"type": "image"}, {"type": "text", "text": question}]
        prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = processor(text=prompt, images=[Image.fromarray(IMAGE)], return_tensors="pt")
        out = model.generate(**inputs, do_sample=False, max_new_tokens=longest)
        texts.append(processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    return texts


@pytest.mark.timeout(600)
def test_transformers_serve_answers_as_transformers_does(transformers_serve, llava):
    card, _ = load_card("demo")
    options = EngineOptions(
        server_urls=(transformers_serve.url,), server_model=str(llava), server_timeout_s=ANSWER_S, device="cpu"
    )
    engine = load_served(llava, card, options)
    try:
        assert engine.info.version == "transformers"
        answers = engine.answer_shared(IMAGE, QUESTIONS, 8, expects="about {number} metres")
        assert [answer.text.strip() for answer in answers] == [text.strip() for text in generated(llava, 8)]
        assert len({answer.text for answer in answers}) > 1
        assert engine.complaints == ()
    finally:
        engine.close()


@pytest.mark.timeout(600)
def test_a_process_that_stands_still_is_given_up_and_asked_again_when_it_moves(transformers_serve, llava):
    card, _ = load_card("demo")
    options = EngineOptions(server_urls=(transformers_serve.url,), server_model=str(llava), server_timeout_s=ANSWER_S)
    engine = load_served(llava, card, options)
    try:
        before = engine.answer_shared(IMAGE, QUESTIONS, 8)
        transformers_serve.signal(signal.SIGSTOP)
        # A frame that has waited for a moment only says nothing about the server; the second in a row does.
        for _ in range(2):
            engine.deadline = time.monotonic() + 3.0
            with pytest.raises(EngineError, match=transformers_serve.url):
                engine.answer_shared(IMAGE, QUESTIONS, 8)
        assert any(transformers_serve.url in text for text in engine.complaints)
        transformers_serve.signal(signal.SIGCONT)
        engine.deadline = None
        wait_until_well(engine)
        again = engine.answer_shared(IMAGE, QUESTIONS, 8)
        assert [answer.text for answer in again] == [answer.text for answer in before]
    finally:
        transformers_serve.signal(signal.SIGCONT)
        engine.close()


@pytest.mark.timeout(600)
def test_transformers_serve_may_go_and_come_back(transformers_serve, llava):
    card, _ = load_card("demo")
    options = EngineOptions(server_urls=(transformers_serve.url,), server_model=str(llava), server_timeout_s=ANSWER_S)
    engine = load_served(llava, card, options)
    try:
        before = engine.answer_shared(IMAGE, QUESTIONS, 8)
        transformers_serve.stop()
        with pytest.raises(EngineError, match=transformers_serve.url):
            engine.answer_shared(IMAGE, QUESTIONS, 8)
        assert engine.complaints
        transformers_serve.start()
        wait_until_well(engine)
        again = engine.answer_shared(IMAGE, QUESTIONS, 8)
        assert [answer.text for answer in again] == [answer.text for answer in before]
    finally:
        engine.close()


def without_head(source: Path, folder: Path) -> Path:
    """A copy without the depth head: vLLM refuses weights that it has no place for."""
    shutil.copytree(source, folder, dirs_exist_ok=True)
    weights = load_file(source / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if not name.startswith(HEAD_PREFIX)}
    assert len(kept) < len(weights)
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def vllm(tmp_path_factory) -> Iterator[Peer]:
    executable = os.environ.get("DEPTHLM_VLLM", "")
    if not executable:
        pytest.skip("DEPTHLM_VLLM is not set: set it to vLLM's executable")
    folder = without_head(Path(load_card("demo")[1]), tmp_path_factory.mktemp("demo"))
    command = [executable, "serve", str(folder), "--served-model-name", "demo", "--dtype", "float32",
               "--max-model-len", "1024", "--generation-config", "vllm", "--block-size", "32",
               "--limit-mm-per-prompt", '{"image": 1, "video": 0}']  # fmt: skip
    peer = Peer(command, foreign_environment(), tmp_path_factory.mktemp("log") / "vllm.log")
    try:
        peer.start()
        yield peer
    finally:
        peer.stop()


@pytest.mark.timeout(900)
@pytest.mark.parametrize("dialect", ["coordinates", "compact"])
def test_vllm_answers_as_our_own_engine_does(vllm, dialect):
    camera = Camera(fx=300.0, fy=300.0, cx=159.5, cy=119.5, width=320, height=240)
    image = np.random.default_rng(3).integers(0, 256, (8, 10, 3), dtype=np.uint8).repeat(32, 0).repeat(32, 1)
    image = np.ascontiguousarray(image[: camera.height, : camera.width])
    image = np.pad(image, ((0, camera.height - image.shape[0]), (0, camera.width - image.shape[1]), (0, 0)), "edge")
    pixels = np.stack(np.meshgrid(np.arange(10, 310, 40), np.arange(10, 230, 40)), -1).reshape(-1, 2).astype(np.float32)
    options = EngineOptions(server_urls=(vllm.url,), server_timeout_s=ANSWER_S)
    with Estimator.load("demo", engine="openai", options=options, dialect=dialect) as served:
        assert served.engine.info.version.startswith("vllm ")
        said = served.estimate(image, camera, pixels, dialect=dialect)
        assert not [text for text in served.engine.complaints], "a guide or a field that it doesn't take"
    with Estimator.load("demo", device="cpu", dtype="float32", dialect=dialect) as ours:
        truth = ours.estimate(image, camera, pixels, dialect=dialect)
    same = said.depth_m == truth.depth_m
    assert same.mean() > 0.9, f"{said.depth_m} is not {truth.depth_m}"
    np.testing.assert_allclose(said.confidence[same], truth.confidence[same], atol=0.01)
