"""Engine edge_llm on a program with the arguments and files of Edge-LLM's llm_inference."""

from __future__ import annotations

import gc
import json
import math
import os
import shutil
import sys
import tempfile
import time
import weakref
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import yaml
from checkpoints import make_checkpoint
from edge_llm_bindings import Runtime, bindings
from edge_llm_programs import Patient, llm_inference, write_program

from depthlm_ros.cards import CARD_FILE, load_card
from depthlm_ros.engines import edge_llm_command, load_engine
from depthlm_ros.engines.options import EngineOptions
from depthlm_ros.errors import DialectError, EngineError, MissingDependencyError, ModelError
from depthlm_ros.manifest import Manifest, sha256_of, write_manifest

SIZES = {
    "max_input_len": 384,
    "max_kv_cache_capacity": 512,
    "max_batch_size": 4,
    "min_image_tokens": 4,
    "max_image_tokens": 48,
    "max_image_tokens_per_image": 12,
}
CARD = {
    "name": "small",
    "source": "small",
    "licence": "Apache-2.0",
    "commercial_use": True,
    "architecture": "qwen3_vl",
    "dialects": ["coordinates"],
    "default_dialect": "coordinates",
    "focal_px": 100,
    "policy": "exact",
    "depth_kind": "z",
    "system_text": "You are a helpful assistant.",
    "max_new_tokens": 16,
    "description": "",
}


@pytest.fixture
def export(tmp_path, monkeypatch) -> Path:
    """An export whose engines were built."""
    monkeypatch.delenv("LLM_INFERENCE", raising=False)
    monkeypatch.delenv("EDGELLM_PLUGIN_PATH", raising=False)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    folder = make_checkpoint(tmp_path / "export", dense_head=False)
    (folder / "model.safetensors").unlink()
    (folder / CARD_FILE).write_text(yaml.safe_dump(CARD))
    files = {path.name: sha256_of(path) for path in folder.iterdir()}
    engines = folder / "engines"
    builder = {"model": "qwen3_vl_text", "edgellm_version": "0.11.0", "builder_config": dict(list(SIZES.items())[:3])}
    for path, text in (
        (engines / "llm.engine", "plan"),
        (engines / "config.json", json.dumps(builder)),
        (engines / "visual" / "visual.engine", "plan"),
        (engines / "visual" / "config.json", json.dumps({"builder_config": dict(list(SIZES.items())[3:])})),
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    manifest = Manifest(
        target="edge-llm", model="small", source="small", source_sha256={}, made="2026-11-01T00:00:00+00:00",
        versions={}, precision="float16", dialects=("coordinates",), focal_px=100.0, policy="exact",
        image={"max_width": 128, "max_height": 96}, files=files,
        extra={"edgellm_version": "0.11.0", "sizes": SIZES, "parameters": 7},
    )  # fmt: skip
    write_manifest(folder, manifest)
    return folder


def load(folder: Path, **options):
    card, source = load_card(str(folder))
    return load_engine(source, card, engine="edge_llm", options=EngineOptions(**options))


def image(red: int, width: int = 128, height: int = 96) -> np.ndarray:
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0] = red
    return pixels


def runs(program: Path) -> list[dict]:
    return [json.loads(line) for line in program.with_suffix(".log").read_text().splitlines()]


def use(monkeypatch, program: Path) -> Path:
    monkeypatch.setenv("LLM_INFERENCE", str(program))
    return program


def test_a_frame_is_one_run_and_answers_keep_their_order(export, tmp_path, monkeypatch):
    program = use(monkeypatch, llm_inference(tmp_path / "llm_inference"))
    engine = load(export)
    answers = engine.answer_shared(image(41), ["a" * n for n in (1, 2, 3, 4, 5)], 16, expects="{number}")
    assert [answer.text for answer in answers] == ["1.41", "2.41", "3.41", "4.41", "5.41"]
    # Four tokens of probability exp(-0.5), which weren't the likeliest.
    assert answers[0].confidence == pytest.approx(math.exp(-0.5) ** 4)
    (run,) = runs(program)
    assert run["told"]["batch_size"] == 4 and "--enableContextReuse" in run["args"]
    assert run["mode"].endswith("700")
    requests = run["told"]["requests"]
    assert len({r["messages"][1]["content"][0]["image"] for r in requests}) == 1
    assert requests[0]["messages"][0] == {"role": "system", "content": "You are a helpful assistant."}
    assert requests[0]["guided_decoding"]["regex"].startswith("[0-9]")
    assert not Path(run["args"][run["args"].index("--inputFile") + 1]).exists()
    assert (engine.info.engine, engine.info.words, engine.info.dense) == ("edge_llm", True, False)
    assert engine.info.parameters == 7 and "every call" in engine.info.reasons[0]


def test_each_image_is_its_own_file_and_pixels_arrive_as_they_are(export, tmp_path, monkeypatch):
    program = use(monkeypatch, llm_inference(tmp_path / "llm_inference"))
    engine = load(export, batch_size=2, guided=False, prefix_reuse=False)
    assert [a.text for a in engine.answer_each([image(7), image(9)], ["aa", "aa"], 16, expects="{number}")] == [
        "2.07",
        "2.09",
    ]
    marked = engine.answer_marked(image(7), [(0, 0, np.full((2, 2, 3), 55, np.uint8))], ["aa"], 16)
    assert marked[0].text == "2.55"
    first, _ = runs(program)
    assert first["told"]["batch_size"] == 2
    assert "--enableContextReuse" not in first["args"]
    assert first["told"]["context_cache_lookup_policy"] == "bypass"
    assert "guided_decoding" not in first["told"]["requests"][0]


def test_an_older_program_is_told_nothing_of_caches(export, tmp_path, monkeypatch):
    program = use(monkeypatch, llm_inference(tmp_path / "llm_inference", reuse=False))
    load(export).answer_shared(image(1), ["a"], 16)
    assert not [name for name in runs(program)[0]["told"] if "cache" in name]


def test_the_plugin_beside_the_program_is_named_to_the_program_only(export, tmp_path, monkeypatch):
    build = tmp_path / "build"
    program = use(monkeypatch, llm_inference(build / "examples" / "llm" / "llm_inference"))
    (build / "libNvInfer_edgellm_plugin.so").write_text("")
    load(export).answer_shared(image(1), ["a"], 16)
    assert runs(program)[0]["plugin"] == str(build / "libNvInfer_edgellm_plugin.so")
    assert "EDGELLM_PLUGIN_PATH" not in os.environ


@pytest.mark.parametrize(
    ("mode", "told"),
    [
        ("fail", "exit status 1.*no CUDA device"),
        ("error", "request 1: finish_reason 'error'.*\\*\\*\\* FAILED"),
        ("short", "answered 1 of 2"),
        ("garbage", "wrote no output"),
        ("silent", "wrote no output"),
    ],
)
def test_whatever_the_program_does_wrong_is_an_error_with_its_last_lines(export, tmp_path, monkeypatch, mode, told):
    use(monkeypatch, llm_inference(tmp_path / "llm_inference", mode))
    engine = load(export)
    with pytest.raises(EngineError, match=f"(?s){told}"):
        engine.answer_shared(image(1), ["a", "b"], 16)


def test_a_program_that_takes_too_long_is_stopped_with_its_children(export, tmp_path, monkeypatch):
    program = use(monkeypatch, llm_inference(tmp_path / "llm_inference", "hang"))
    engine = load(export)
    monkeypatch.setattr(Patient, "began", program.with_suffix(".log"), raising=False)
    monkeypatch.setattr(edge_llm_command.subprocess, "Popen", Patient)
    engine.deadline = time.monotonic() + 2.0
    with pytest.raises(EngineError, match="(?s)loads the model in every run.*Loading engine"):
        engine.answer_shared(image(1), ["a"], 16)
    # A child that went on would keep the pipe open, and the call with it, for ten minutes.
    assert time.monotonic() - engine.deadline < 100
    with pytest.raises(EngineError, match="too late"):
        engine.answer_shared(image(1), ["a"], 16)


def test_nothing_asked_is_no_run(export, tmp_path, monkeypatch):
    program = use(monkeypatch, llm_inference(tmp_path / "llm_inference"))
    assert load(export).answer_shared(image(1), [], 16) == []
    assert not program.with_suffix(".log").exists()


def test_a_full_disk_is_an_error_of_the_engine(export, tmp_path, monkeypatch):
    use(monkeypatch, llm_inference(tmp_path / "llm_inference"))
    engine = load(export)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(EngineError, match="nowhere.*TMPDIR"):
        engine.answer_shared(image(1), ["a"], 16)


def test_images_of_another_size_never_reach_the_program(export, tmp_path, monkeypatch):
    program = use(monkeypatch, llm_inference(tmp_path / "llm_inference"))
    engine = load(export)
    with pytest.raises(EngineError, match="320x320.*Export the model for this camera"):
        engine.answer_shared(image(1, 320, 320), ["a"], 16)
    assert not program.with_suffix(".log").exists()
    with pytest.raises(DialectError):
        engine.depth_map(image(1), "")


def test_without_program_and_runtime_the_error_says_how_to_get_them(export, tmp_path, monkeypatch):
    with pytest.raises(MissingDependencyError, match="tensorrt-edgellm is not installed.*LLM_INFERENCE.*engine openai"):
        load(export)
    monkeypatch.setenv("LLM_INFERENCE", str(tmp_path / "nothing"))
    with pytest.raises(MissingDependencyError, match="which is no program"):
        load(export)


def test_another_program_or_one_that_does_not_start_is_refused(export, tmp_path, monkeypatch):
    use(monkeypatch, write_program(tmp_path / "other", "print('usage: other [-h]')"))
    with pytest.raises(EngineError, match="(?s)knows no --engineDir.*usage: other"):
        load(export)
    use(monkeypatch, llm_inference(tmp_path / "llm_inference", "broken"))
    with pytest.raises(EngineError, match="libnvinfer.so.10"):
        load(export)


def config(folder: Path, part: str, change) -> None:
    path = folder / "engines" / part / "config.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda f: (f / "engines" / "llm.engine").unlink(), "no llm.engine; run build_on_device"),
        (lambda f: shutil.rmtree(f / "engines" / "visual"), "no visual/visual.engine"),
        (lambda f: config(f, "", lambda d: d.update(edgellm_version="0.9.1")), "0.9.1, the export is of 0.11"),
        (lambda f: config(f, "", lambda d: d.pop("builder_config")), "no builder_config"),
        (lambda f: config(f, "", lambda d: d["builder_config"].pop("max_input_len")), "no max_input_len"),
        (
            lambda f: config(f, "visual", lambda d: d["builder_config"].update(max_image_tokens_per_image=9)),
            "max_image_tokens_per_image 9, the export's camera needs 12",
        ),
        (
            lambda f: config(f, "visual", lambda d: d["builder_config"].update(min_image_tokens=8)),
            "min_image_tokens 8, the export's camera needs 4",
        ),
        (lambda f: (f / "engines" / "config.json").write_text("["), "can't be read"),
    ],
)
def test_engines_that_do_not_belong_to_the_export_are_refused(export, tmp_path, monkeypatch, change, told):
    use(monkeypatch, llm_inference(tmp_path / "llm_inference"))
    change(export)
    with pytest.raises(ModelError, match=told):
        load(export)


def test_engines_of_another_board_are_refused(export, tmp_path, monkeypatch):
    from depthlm_ros.engines import edge_llm_engine
    from depthlm_ros.machine import Machine

    use(monkeypatch, llm_inference(tmp_path / "llm_inference"))
    here = Machine(board="NVIDIA Jetson AGX Orin", l4t="39.2.0", tensorrt="10.16.2.10")
    monkeypatch.setattr(edge_llm_engine, "this_machine", lambda: here)
    built = export / "engines" / "built_on.json"
    same = {"board": here.board, "l4t": "39.2.0", "tensorrt": "10.16.2.10-1+cuda13.2"}
    built.write_text(json.dumps(same))
    load(export)
    built.write_text(json.dumps({**same, "tensorrt": "10.16.2"}))
    load(export)
    others = (
        ("board", "NVIDIA Jetson Orin Nano"),
        ("board", "NVIDIA Jetson AGX"),
        ("l4t", "38.4.0"),
        ("l4t", "39.2"),
        ("tensorrt", "10.13.3.9-1"),
        ("tensorrt", "10.16.2.1"),
    )
    for name, value in others:
        built.write_text(json.dumps({**same, name: value}))
        with pytest.raises(ModelError, match=f"built with {name} {value}"):
            load(export)


def test_a_plan_that_was_built_again_is_another_version(export, tmp_path, monkeypatch):
    use(monkeypatch, llm_inference(tmp_path / "llm_inference"))
    before = load(export).info.version
    assert load(export).info.version == before
    (export / "engines" / "llm.engine").write_text("plan of another day")
    assert load(export).info.version != before


def _install(monkeypatch, load, version="0.11.0"):
    """Puts a wheel of this version where Python finds it."""
    package, runtime = ModuleType("tensorrt_edgellm"), ModuleType("tensorrt_edgellm.runtime")
    package.runtime, runtime.load = runtime, load
    monkeypatch.setitem(sys.modules, "tensorrt_edgellm", package)
    monkeypatch.setitem(sys.modules, "tensorrt_edgellm.runtime", runtime)
    from depthlm_ros.engines import edge_llm_native

    seen = edge_llm_native.metadata.version
    monkeypatch.setattr(
        edge_llm_native.metadata, "version", lambda name: version if name == edge_llm_native.PACKAGE else seen(name)
    )


def test_the_runtime_in_process_is_preferred(export, tmp_path, monkeypatch):
    use(monkeypatch, llm_inference(tmp_path / "llm_inference"))
    module = bindings()
    module.LLMRuntime = lambda *arguments: Runtime(module, *arguments)
    _install(monkeypatch, lambda: module)
    engine = load(export)
    assert "in process" in engine.info.version
    assert engine.answer_shared(image(3), ["aaaa"], 16)[0].text == "4.03"


def test_a_runtime_that_does_not_fit_leaves_it_to_the_program_and_says_why(export, tmp_path, monkeypatch):
    use(monkeypatch, llm_inference(tmp_path / "llm_inference"))

    def no_payload():
        raise RuntimeError("Cannot identify a supported platform from system release markers.")

    _install(monkeypatch, no_payload)
    engine = load(export)
    assert "Cannot identify a supported platform" in engine.info.reasons[1]
    _install(monkeypatch, bindings, version="0.12.0")
    assert "0.12.0, the engines are of 0.11.0" in load(export).info.reasons[1]
    lacking = bindings()
    del lacking.GuideType
    _install(monkeypatch, lambda: lacking)
    assert "lacks GuideType" in load(export).info.reasons[1]


def test_a_runtime_that_failed_is_let_go(export, tmp_path, monkeypatch):
    program = use(monkeypatch, llm_inference(tmp_path / "llm_inference"))
    module, made = bindings(), []

    class OutOfMemory(Runtime):
        def __init__(self, *arguments):
            super().__init__(module, *arguments)
            made.append(weakref.ref(self))

        def capture_decoding_cuda_graph(self):
            raise RuntimeError("CUDA out of memory")

    module.LLMRuntime = OutOfMemory
    _install(monkeypatch, lambda: module)
    from depthlm_ros.engines import edge_llm_engine

    alive = []
    find = edge_llm_engine.find_program
    monkeypatch.setattr(edge_llm_engine, "find_program", lambda: (gc.collect(), alive.append(made[0]()), find())[2])
    assert "out of memory" in load(export).info.reasons[1]
    # The program needs the memory that it held.
    assert alive == [None] and program.is_file()
