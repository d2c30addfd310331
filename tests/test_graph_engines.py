"""Engines that run an exported graph: onnxruntime itself, and TensorRT's calls against what is recorded of its API."""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import reduce
from pathlib import Path

import cv2
import numpy as np
import onnx
import onnxruntime
import pytest
import standin_tensorrt
import torch
from checkpoints import make_checkpoint

from depthlm_ros import plan_builder
from depthlm_ros.camera import Camera
from depthlm_ros.cards import CARD_FILE, load_card
from depthlm_ros.cli_build import add_command
from depthlm_ros.engines import load_engine, onnxruntime_engine, tensorrt_api, tensorrt_engine
from depthlm_ros.engines.base import EngineInfo
from depthlm_ros.engines.graph_engine import GRAPH_FILE, GraphEngine
from depthlm_ros.engines.onnxruntime_engine import cache_folder, load_onnxruntime
from depthlm_ros.engines.options import EngineOptions
from depthlm_ros.engines.tensorrt_engine import PLAN_FILE, load_tensorrt
from depthlm_ros.errors import (
    ConfigError,
    DialectError,
    EngineError,
    ImageError,
    MissingDependencyError,
    ModelError,
)
from depthlm_ros.estimator import Estimator
from depthlm_ros.machine import Machine
from depthlm_ros.manifest import read_manifest, require_manifest, sha256_of, write_manifest
from depthlm_ros.onnx_precision import lower_precision
from depthlm_ros.plan_builder import build_plan
from depthlm_ros.prompts import dense_question
from depthlm_ros.sampling import sample_pixels
from depthlm_training.config import as_yaml
from depthlm_training.export_targets import export_target
from depthlm_training.onnx_export import export_onnx

CAMERA = Camera(fx=1000.0, fy=990.0, cx=79.5, cy=59.5, width=160, height=120)
WIDE = Camera(fx=500.0, fy=495.0, cx=159.5, cy=119.5, width=320, height=240)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "small")
    card, _ = load_card(str(folder))
    (folder / CARD_FILE).write_text(as_yaml(replace(card, policy="exact")), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def shared(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "small-onnx"
    export_target(str(checkpoint), folder, "onnx", CAMERA)
    return folder


@pytest.fixture
def export(shared, tmp_path):
    """A copy to change."""
    return Path(shutil.copytree(shared, tmp_path / "export"))


def picture(height=120, width=160, seed=0):
    rng = np.random.default_rng(seed)
    coarse = rng.uniform(0, 255, (9, 12, 3))
    return np.clip(cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC), 0, 255).astype(np.uint8)


def rewritten(folder, **changes):
    """The export with another manifest."""
    manifest = replace(read_manifest(folder), **changes)
    write_manifest(folder, manifest)
    return manifest


# ---------------------------------------------------------------- onnxruntime


def test_depth_at_pixels_is_the_checkpoint_s(checkpoint, shared):
    pixels = sample_pixels(160, 120, 200)
    with (
        Estimator.load(str(checkpoint), device="cpu", dtype="float32") as reference,
        Estimator.load(str(shared), engine="onnxruntime", device="cpu") as estimator,
    ):
        for seed in range(3):
            wanted = reference.estimate(picture(seed=seed), CAMERA, pixels, dialect="dense")
            got = estimator.estimate(picture(seed=seed), CAMERA, pixels)
            np.testing.assert_allclose(got.depth_m, wanted.depth_m, rtol=1e-4)
            np.testing.assert_allclose(got.confidence, wanted.confidence, atol=1e-3)
        assert estimator.dialects == ("dense",)
        info = estimator.engine.info
        assert (info.engine, info.device, info.dtype) == ("onnxruntime", "cpu", "float32")
        assert info.architecture == "qwen3_vl"
        assert (info.dense, info.words, info.distributions) == (True, False, False)
        assert info.version == f"onnxruntime {onnxruntime.__version__} CPUExecutionProvider"
        assert info.parameters == reference.engine.info.parameters
        assert estimator.proof.sentence.startswith("parity with the reference")


def test_it_runs_without_torch_and_transformers(shared, tmp_path):
    cv2.imwrite(str(tmp_path / "view.png"), picture())
    program = f"""
import sys, cv2
sys.modules["torch"] = sys.modules["transformers"] = None
from depthlm_ros.camera import Camera
from depthlm_ros.estimator import Estimator
camera = Camera({CAMERA.fx}, {CAMERA.fy}, {CAMERA.cx}, {CAMERA.cy}, {CAMERA.width}, {CAMERA.height})
estimator = Estimator.load({str(shared)!r}, engine="onnxruntime", device="cpu")
result = estimator.estimate(cv2.imread({str(tmp_path / "view.png")!r}), camera)
assert len(result.depth_m) == 160 * 120
print(result.depth_m.mean())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    with Estimator.load(str(shared), engine="onnxruntime", device="cpu") as estimator:
        wanted = estimator.estimate(cv2.imread(str(tmp_path / "view.png")), CAMERA).depth_m.mean()
    assert float(done.stdout) == pytest.approx(wanted, rel=1e-2)


def test_a_published_view_is_resampled_as_the_processor_does_it(checkpoint, tmp_path):
    """DepthVLM's multiples of 28 are none of 32, so that its processor resamples once more."""
    with Estimator.load(str(checkpoint), device="cpu", dtype="float32", policy="published") as reference:
        manifest = export_onnx(reference, checkpoint, tmp_path, CAMERA)
        engine = load_onnxruntime(tmp_path, manifest, EngineOptions(device="cpu"))
        view = reference.prepare(picture(), CAMERA)
        assert view.image.shape != engine.depth_map(view.image, dense_question()).shape + (3,)
        wanted = reference.engine.depth_map(view.image, dense_question())
        np.testing.assert_allclose(engine.depth_map(view.image, dense_question()), wanted, rtol=1e-4)


def test_another_camera_is_refused_with_both_sizes(shared):
    with Estimator.load(str(shared), engine="onnxruntime", device="cpu") as estimator:
        # The same size in another focal length is another view; twice the size in twice the focal length is the same.
        for camera in (replace(CAMERA, fx=500.0, fy=495.0), replace(WIDE, width=480, cx=239.5)):
            with pytest.raises(ImageError, match=r"the view is \d+x\d+ pixels, .* for 160x128; .* depthlm export"):
                estimator.estimate(picture(camera.height, camera.width), camera)
        twice = replace(WIDE, fx=2000.0, fy=1980.0)
        assert estimator.estimate(picture(240, 320), twice, np.array([[3.0, 4.0]])).depth_m[0] > 0


def test_it_makes_maps_and_answers_nothing_in_words(shared):
    with Estimator.load(str(shared), engine="onnxruntime", device="cpu") as estimator:
        engine, image = estimator.engine, picture(128, 160)
        for ask in (
            lambda: engine.answer_shared(image, ["How far?"], 8, expects="{number}"),
            lambda: engine.answer_about([image], ["How far?"], 8, guesses=["1"]),
            lambda: engine.answer_each([image], ["How far?"], 8, distribution=True),
            lambda: engine.answer_marked(image, [(0, 0, image[:2, :2])], ["How far?"], 8),
        ):
            with pytest.raises(DialectError, match="dense maps and answers nothing in words"):
                ask()
        with pytest.raises(DialectError, match="can't be asked 'How far\\?'"):
            engine.depth_map(image, "How far?")
        with pytest.raises(ImageError, match="float64 of shape"):
            engine.depth_map(image.astype(float), dense_question())
        assert engine.encode_ahead(image) is False
        assert engine.complaints == ()
        with pytest.raises(DialectError):
            estimator.estimate(picture(), CAMERA, dialect="coordinates")
    with pytest.raises(EngineError, match="was closed"):
        engine.depth_map(image, dense_question())


class Fixed:
    """A runner that gives one map."""

    def __init__(self, depth):
        self.depth = depth

    def run(self, image):
        return self.depth

    def close(self):
        pass


@pytest.mark.parametrize(("value", "count"), [(np.nan, 3), (np.inf, 1), (0.0, 5), (-2.0, 20480)])
def test_depths_that_are_none_are_counted(shared, value, count):
    depth = np.ones((128, 160), np.float32)
    depth.flat[:count] = value
    info = EngineInfo("onnxruntime", "m", "qwen3_vl", "cpu", "float32", (), 1, True)
    engine = GraphEngine(Fixed(depth), info, read_manifest(shared))
    with pytest.raises(EngineError, match=f"^{count} of 20480 depths are not finite and positive"):
        engine.depth_map(picture(128, 160), dense_question())


@pytest.mark.parametrize("depth", [np.ones((160, 128), np.float32), np.ones((128, 160), np.float16)])
def test_maps_of_another_shape_or_type_are_refused(shared, depth):
    info = EngineInfo("onnxruntime", "m", "qwen3_vl", "cpu", "float32", (), 1, True)
    with pytest.raises(EngineError, match="instead of float32 of"):
        GraphEngine(Fixed(depth), info, read_manifest(shared)).depth_map(picture(128, 160), dense_question())


@pytest.mark.parametrize("size", [{"map_width": 0}, {"multiple": None}, {"width": "160"}])
def test_a_manifest_without_its_sizes_is_refused(shared, size):
    manifest = read_manifest(shared)
    manifest = replace(manifest, image={**manifest.image, **size})
    with pytest.raises(ModelError, match=f"image.{next(iter(size))} .* export again"):
        load_onnxruntime(shared, manifest, EngineOptions(device="cpu"))


@pytest.mark.parametrize("device", ["gpu", "cpu:0", "cuda:x", "auto:1", "cuda:-1"])
def test_unknown_devices_are_refused(shared, device):
    with pytest.raises(ConfigError, match="knows 'auto', 'cpu', 'cuda', 'cuda:N', 'tensorrt'"):
        load_onnxruntime(shared, read_manifest(shared), EngineOptions(device=device))


@pytest.mark.parametrize(("device", "provider"), [("cuda:1", "CUDA"), ("tensorrt", "Tensorrt")])
def test_a_provider_that_is_not_there_is_named_with_those_that_are(shared, monkeypatch, device, provider):
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    message = f"no {provider}ExecutionProvider, only CPUExecutionProvider; run: pip install onnxruntime-gpu"
    with pytest.raises(MissingDependencyError, match=message):
        load_onnxruntime(shared, read_manifest(shared), EngineOptions(device=device))


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_a_provider_that_does_not_load_is_no_silent_fallback(shared, monkeypatch):
    """A wheel with CUDA on a machine without: here the CPU's wheel, which is told that it has the provider."""
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has CUDA")
    monkeypatch.setattr(
        onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
    )
    with pytest.raises(EngineError, match="CUDAExecutionProvider .*doesn't load"):
        load_onnxruntime(shared, read_manifest(shared), EngineOptions(device="cuda"))
    engine = load_onnxruntime(shared, read_manifest(shared), EngineOptions(device="auto"))
    assert engine.info.device == "cpu"
    assert engine.info.version.endswith("CPUExecutionProvider")


def test_a_dtype_that_the_graph_does_not_have_is_refused(shared):
    with pytest.raises(ConfigError, match="dtype is 'bfloat16', the graph was exported in float32"):
        load_onnxruntime(shared, read_manifest(shared), EngineOptions(device="cpu", dtype="bfloat16"))


def test_a_graph_of_another_export_is_refused(export):
    model = onnx.load(str(export / GRAPH_FILE))
    model.graph.output[0].type.tensor_type.shape.dim[0].dim_value = 64
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 320
    node = next(node for node in model.graph.node if "depth" in node.output)
    node.output[0] = "flat"
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([64, 320]), "size"))
    model.graph.node.append(onnx.helper.make_node("Reshape", ["flat", "size"], ["depth"]))
    onnx.save_model(model, str(export / GRAPH_FILE))
    with pytest.raises(ModelError, match=r"output depth float32 \[64, 320\], engine.json .* \[128, 160\]"):
        load_onnxruntime(export, read_manifest(export), EngineOptions(device="cpu"))


def test_a_file_that_is_no_graph_is_refused(export):
    (export / GRAPH_FILE).write_bytes(b"none")
    with pytest.raises(ModelError, match="onnxruntime can't load"):
        load_onnxruntime(export, read_manifest(export), EngineOptions(device="cpu"))
    (export / GRAPH_FILE).unlink()
    with pytest.raises(ModelError, match=f"has no {GRAPH_FILE}"):
        load_onnxruntime(export, read_manifest(export), EngineOptions(device="cpu"))


def test_a_missing_onnxruntime_is_named(shared, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingDependencyError, match="pip install onnxruntime"):
        load_onnxruntime(shared, read_manifest(shared), EngineOptions(device="cpu"))


def test_cached_engines_belong_to_files_versions_and_machines(shared, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    manifest, here = read_manifest(shared), {"gpu": "Orin", "tensorrt": "10.3.0"}
    other = replace(manifest, files={**manifest.files, GRAPH_FILE: "0" * 64})
    folders = {
        cache_folder(manifest, here),
        cache_folder(other, here),
        cache_folder(manifest, {**here, "tensorrt": "10.16.2"}),
        cache_folder(manifest, {**here, "gpu": "Orin Nano"}),
    }
    assert len(folders) == 4
    assert cache_folder(manifest, here) in folders
    assert all(folder.is_relative_to(tmp_path) for folder in folders)
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    assert cache_folder(manifest, here) not in folders
    options, told = onnxruntime_engine._provider_options("TensorrtExecutionProvider", 1, manifest)
    assert options["device_id"] == "1"
    assert Path(options["trt_engine_cache_path"]).is_dir()
    assert told == [f"TensorRT's engine is kept in {options['trt_engine_cache_path']}"]


@pytest.mark.parametrize("how", ["a file in the way", "no home"])
def test_without_a_cache_tensorrt_builds_again_and_says_so(shared, monkeypatch, tmp_path, how):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    if how == "no home":
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setattr(Path, "home", homeless)
    else:
        (tmp_path / "cache").write_text("")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    options, (told,) = onnxruntime_engine._provider_options("TensorrtExecutionProvider", 0, read_manifest(shared))
    assert options == {"device_id": "0"}
    assert "every start builds TensorRT's engine again" in told and "set XDG_CACHE_HOME" in told


def test_number_formats_are_only_claimed_where_they_are_kept(monkeypatch):
    cpu, cuda, rt = (f"{name}ExecutionProvider" for name in ("CPU", "CUDA", "Tensorrt"))
    monkeypatch.delenv("NVIDIA_TF32_OVERRIDE", raising=False)
    assert onnxruntime_engine.products(cpu, "float32") == "products in float32"
    assert onnxruntime_engine.products(cuda, "float16") == "products in float16"
    assert onnxruntime_engine.products(cpu, "float16").startswith("weights in float16, but products in float32 where")
    assert "TF32" in onnxruntime_engine.products(rt, "float32")
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    assert onnxruntime_engine.products(rt, "float32") == "products in float32"


@pytest.mark.filterwarnings("ignore:Specified provider")
@pytest.mark.parametrize("provider", ["CUDAExecutionProvider", "TensorrtExecutionProvider"])
def test_no_provider_of_a_gpu_is_left_to_round_to_tf32(shared, monkeypatch, tmp_path, provider):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    asked = []
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *_, providers: asked.extend(providers) or 1 / 0)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [provider, "CPUExecutionProvider"])
    device = "cuda:2" if provider.startswith("CUDA") else "tensorrt:2"
    with pytest.raises(EngineError, match=f"{provider} doesn't load: division by zero"):
        load_onnxruntime(shared, read_manifest(shared), EngineOptions(device=device))
    assert ("CUDAExecutionProvider", {"device_id": "2", "use_tf32": "0"}) in asked


def test_a_float16_export_on_a_cpu_is_said_to_multiply_in_float32(export):
    lowered = export / "lowered.onnx"
    lower_precision(export / GRAPH_FILE, lowered, "float16")
    lowered.replace(export / GRAPH_FILE)
    files = {**read_manifest(export).files, GRAPH_FILE: sha256_of(export / GRAPH_FILE)}
    manifest = rewritten(export, precision="float16", files=files)
    engine = load_onnxruntime(export, manifest, EngineOptions(device="cpu"))
    assert np.isfinite(engine.depth_map(picture(128, 160), dense_question())).all()
    assert any("products in float32 where CPUExecutionProvider" in reason for reason in engine.info.reasons)
    assert "products in float16" not in engine.info.reasons


@pytest.mark.parametrize(("asked", "others", "threads"), [(3, "2", 3), (0, "2", 2), (1, "", 1), (0, "", 0)])
def test_the_session_takes_the_threads_that_it_is_told(shared, monkeypatch, asked, others, threads):
    monkeypatch.setenv("OMP_NUM_THREADS", others)
    make, seen = onnxruntime.InferenceSession, []

    def session(path, settings, **how):
        seen.append(settings.intra_op_num_threads)
        return make(path, settings, **how)

    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    load_onnxruntime(shared, read_manifest(shared), EngineOptions(device="cpu", cpu_threads=asked)).close()
    assert seen == [threads]


# ---------------------------------------------------------------- TensorRT


@pytest.fixture
def tensorrt(monkeypatch):
    """Installs a stand-in; buffers are in the host's memory."""

    def install(**how):
        package = standin_tensorrt.make(**how)
        monkeypatch.setitem(sys.modules, "tensorrt", package)
        monkeypatch.setattr(tensorrt_engine, "_device", lambda device: "cpu")
        return package

    return install


def signatures(thing):
    """What a binding's docstring says of its parameters and result, as the contract writes it; of each overload."""
    if isinstance(thing, property):
        return {"property"}
    found = set()
    for line in (thing.__doc__ or "").splitlines():
        match = re.match(r"(?:\d+\. )?\w+\((self: .*)\) -> (.+)$", line.strip())
        if match:
            depth, names, start = 0, [], True
            for part in re.split(r"([\[\](),<>])", match.group(1)):
                depth += {"[": 1, "(": 1, "<": 1, "]": -1, ")": -1, ">": -1}.get(part, 0)
                if start and part.strip():
                    names.append(part.strip().split(":")[0])
                    start = False
                start = start or (part == "," and depth == 0)
            found.add(f"({', '.join(names)}) -> {re.split(r'[.:]', match.group(2).strip())[-1]}")
    return found


def test_the_recorded_api_is_the_installed_one():
    package = pytest.importorskip("tensorrt")
    for name, members in tensorrt_api.CONTRACT.items():
        for member, signature in members.items():
            assert signature in signatures(getattr(getattr(package, name), member)), (name, member)
    for name, members in tensorrt_api.CONTRACT_MEMBERS.items():
        kind = reduce(getattr, name.split("."), package)
        assert set(members) <= set(kind.__members__), name
    logger = tensorrt_api.new_logger(package)
    logger.log(package.ILogger.Severity.ERROR, "a\n reason")
    assert tensorrt_api.told(logger) == "a reason"


def test_the_stand_in_has_what_is_recorded_and_nothing_else():
    package = standin_tensorrt.make()
    for name, members in tensorrt_api.CONTRACT.items():
        kind = getattr(package, name)
        public = {member for member in vars(kind) if not member.startswith("_")} - {"Severity"}
        assert public <= set(members), name
    for name, members in tensorrt_api.CONTRACT_MEMBERS.items():
        assert set(members) <= set(reduce(getattr, name.split("."), package).__members__)


@pytest.mark.parametrize(("precision", "stored"), [(None, "float32"), ("fp32", "float32"), ("bf16", "bfloat16")])
def test_a_plan_is_built_strongly_typed_and_written_into_the_manifest(export, tensorrt, precision, stored):
    package = tensorrt()
    before = read_manifest(export)
    manifest = build_plan(export, precision, workspace_mb=512, machine=Machine(arch="x86_64", gpu="H200"))
    calls = dict((name, rest) for name, *rest in package.seen)
    assert calls["create_network"] == [1 << 1]
    assert calls["clear_flag"] == [package.BuilderFlag.TF32]
    assert calls["set_memory_pool_limit"] == [package.MemoryPoolType.WORKSPACE, 512 << 20]
    assert manifest == read_manifest(export)
    assert manifest.built == {"arch": "x86_64", "gpu": "H200", "precision": stored}
    assert manifest.files == {**before.files, PLAN_FILE: sha256_of(export / PLAN_FILE)}
    assert manifest.digest != before.digest
    built = onnx.load_from_string((export / PLAN_FILE).read_bytes()[4:])
    kinds = {tensor.data_type for tensor in built.graph.initializer if tensor.name.startswith("language.layers.0.q_p")}
    assert kinds == {onnx.TensorProto.BFLOAT16 if stored == "bfloat16" else onnx.TensorProto.FLOAT}
    assert sha256_of(export / GRAPH_FILE) == before.files[GRAPH_FILE]
    assert sorted(path.name for path in export.iterdir() if path.name.startswith(".")) == []


def test_a_plan_proves_itself_and_measures(export, tensorrt, checkpoint):
    tensorrt()
    build_plan(export, "fp16")
    pixels = sample_pixels(160, 120, 50)
    with Estimator.load(str(export), engine="tensorrt") as estimator:
        assert estimator.proof.sentence.startswith("parity with the reference")
        info = estimator.engine.info
        assert (info.engine, info.dtype, info.version) == ("tensorrt", "float16", "TensorRT 10.13.3.9")
        got = [estimator.estimate(picture(seed=seed), CAMERA, pixels).depth_m for seed in range(2)]
    with Estimator.load(str(checkpoint), device="cpu", dtype="float32") as reference:
        for seed in range(2):
            wanted = reference.estimate(picture(seed=seed), CAMERA, pixels, dialect="dense").depth_m
            assert np.median(np.abs(got[seed] - wanted) / wanted) < 0.01
    record = read_manifest(export).parity[-1]
    assert record.version == "TensorRT 10.13.3.9"
    proved = record.files
    assert proved == read_manifest(export).digest
    # Built again it is another plan, which nothing has proved yet.
    build_plan(export, "fp32")
    manifest = read_manifest(export)
    assert {record.files for record in manifest.parity if record.engine == "tensorrt"} == {proved}
    assert manifest.digest != proved


def test_a_frame_that_is_not_computed_is_not_the_one_before(export, tensorrt):
    tensorrt(fails="silent")
    build_plan(export)
    engine = load_tensorrt(export, read_manifest(export), EngineOptions())
    with pytest.raises(EngineError, match="20480 of 20480 depths are not finite"):
        engine.depth_map(picture(128, 160), dense_question())


@pytest.mark.parametrize(
    ("fails", "message"),
    [
        ("driver", "can't start: CUDA initialization failure with error: 35; it needs an NVIDIA GPU"),
        ("parse", r"can't read model.onnx: In node 0 \(importLayer\): UNSUPPORTED_NODE"),
        ("build", r"can't build model.onnx: \[optimizer.cpp\] Could not find any implementation for node X"),
    ],
)
def test_tensorrt_s_reasons_are_in_the_errors_of_a_build(export, tensorrt, fails, message):
    tensorrt(fails=fails)
    before = read_manifest(export)
    with pytest.raises(EngineError, match=message):
        build_plan(export)
    assert read_manifest(export) == before
    assert not (export / PLAN_FILE).exists()


@pytest.mark.parametrize(
    ("fails", "message"),
    [
        ("load", "refuses .*Version tag does not match.*depthlm build"),
        ("memory", "has no memory"),
        ("address", "refuses the buffer of 'image'"),
        ("execute", "TensorRT failed: an illegal memory access"),
    ],
)
def test_tensorrt_s_reasons_are_in_the_errors_of_an_engine(export, tensorrt, fails, message):
    tensorrt()
    build_plan(export)
    tensorrt(fails=fails)
    with pytest.raises(EngineError, match=message):
        load_tensorrt(export, read_manifest(export), EngineOptions()).depth_map(picture(128, 160), dense_question())


@pytest.mark.parametrize("call", ["empty", "fill_", "copy_", "Stream"])
def test_torch_s_faults_are_errors_of_the_engine(export, tensorrt, monkeypatch, call):
    """Memory that is short while buffers are made, and CUDA faults of a frame, which any later call may show."""
    tensorrt()
    build_plan(export)
    manifest = read_manifest(export)

    def fault(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")

    if call == "empty":
        monkeypatch.setattr(torch, "empty", fault)
        with pytest.raises(EngineError, match="no memory on cpu for the buffers of .*: CUDA out of memory.; end other"):
            load_tensorrt(export, manifest, EngineOptions())
        return
    engine = load_tensorrt(export, manifest, EngineOptions())
    if call == "Stream":
        monkeypatch.setattr(torch.cuda, "stream", fault)
    else:
        monkeypatch.setattr(torch.Tensor, call, fault)
    with pytest.raises(EngineError, match="TensorRT failed: CUDA out of memory.; restart the node"):
        engine.depth_map(picture(128, 160), dense_question())


def test_a_plan_from_elsewhere_is_refused(export, tensorrt):
    tensorrt()
    build_plan(export, machine=Machine(gpu="Orin", compute_capability="8.7", board="Jetson AGX Orin", tensorrt="10.3"))
    with pytest.raises(ModelError, match="built with compute capability 8.7, this machine has .*depthlm build"):
        Estimator.load(str(export), engine="tensorrt")


def test_a_plan_of_another_export_is_refused(export, tensorrt):
    tensorrt()
    manifest = build_plan(export)
    image = {**manifest.image, "map_height": 64, "height": 64}
    with pytest.raises(ModelError, match=r"depth DataType.FLOAT \[128, 160\], engine.json describes .*\[64, 160, 3\]"):
        load_tensorrt(export, replace(manifest, image=image), EngineOptions())


def test_without_a_plan_the_command_that_builds_it_is_named(shared):
    with pytest.raises(ModelError, match=f"no plan for this machine; build it here: depthlm build {shared}"):
        Estimator.load(str(shared), engine="tensorrt")


def test_a_plan_of_another_day_is_refused(export, tensorrt):
    tensorrt()
    build_plan(export)
    (export / PLAN_FILE).write_bytes((export / PLAN_FILE).read_bytes() + b"x")
    with pytest.raises(ModelError, match=f"{PLAN_FILE} has sha256"):
        Estimator.load(str(export), engine="tensorrt")
    # Building again mends it: an older plan is none of the export's own files.
    build_plan(export)
    require_manifest(export, "tensorrt")


def test_what_was_proved_during_a_build_is_kept(export, tensorrt, monkeypatch):
    tensorrt()
    build = plan_builder._built
    rewritten(export, parity=())

    def meanwhile(*arguments):
        Estimator.load(str(export), engine="onnxruntime", device="cpu").close()
        return build(*arguments)

    monkeypatch.setattr(plan_builder, "_built", meanwhile)
    manifest = build_plan(export)
    assert [record.engine for record in manifest.parity] == ["onnxruntime"]
    assert manifest.parity == read_manifest(export).parity


def test_an_export_that_is_replaced_during_a_build_gets_no_plan(export, tensorrt, monkeypatch):
    tensorrt()
    build = plan_builder._built

    def meanwhile(*arguments):
        rewritten(export, files={**read_manifest(export).files, GRAPH_FILE: "0" * 64})
        return build(*arguments)

    monkeypatch.setattr(plan_builder, "_built", meanwhile)
    with pytest.raises(ModelError, match="became another export while its plan was built"):
        build_plan(export)
    assert not (export / PLAN_FILE).exists()


@pytest.mark.parametrize("older", [False, True], ids=["first plan", "another plan"])
@pytest.mark.parametrize("step", ["plan", "manifest"])
def test_a_build_that_breaks_off_is_mended_by_what_the_refusal_says(export, tensorrt, monkeypatch, older, step):
    """As when the power fails: just before the plan is put into its place, or just before the manifest knows it."""
    tensorrt()
    if older:
        build_plan(export, "bf16")
    writes = []

    def breaks(folder, manifest):
        writes.append(manifest)
        if step == "plan":
            write_manifest(folder, manifest)
            raise KeyboardInterrupt
        if len(writes) == 2:
            raise KeyboardInterrupt
        write_manifest(folder, manifest)

    with monkeypatch.context() as patch:
        patch.setattr(plan_builder, "write_manifest", breaks)
        with pytest.raises(KeyboardInterrupt):
            build_plan(export)
    if (export / PLAN_FILE).exists():
        for engine in ("onnxruntime", "tensorrt"):
            with pytest.raises(ModelError, match=f"{PLAN_FILE} is not named in engine.json.*remove it"):
                require_manifest(export, engine)
        shutil.copytree(export, export.with_name("other"))
        (export / PLAN_FILE).unlink()
    require_manifest(export, "onnxruntime")
    with pytest.raises(ModelError, match="build it here: depthlm build"):
        load_tensorrt(export, require_manifest(export, "tensorrt"), EngineOptions())
    # Building again mends it without removing, too.
    again = export.with_name("other") if (export.with_name("other")).exists() else export
    build_plan(again)
    assert PLAN_FILE in require_manifest(again, "tensorrt").files


def test_a_missing_or_old_tensorrt_is_named(export, monkeypatch, tensorrt):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(MissingDependencyError, match="tensorrt is not installed.*pip install tensorrt"):
        build_plan(export)
    tensorrt(version="8.6.2")
    with pytest.raises(MissingDependencyError, match="tensorrt 8.6.2 is too old"):
        build_plan(export)


def test_builds_that_make_no_sense_are_refused(export, tensorrt, tmp_path):
    tensorrt()
    with pytest.raises(ConfigError, match="precision is 'int8'; choose one of fp32, fp16, bf16"):
        build_plan(export, "int8")
    with pytest.raises(ModelError, match="has no engine.json; make an export: depthlm export MODEL"):
        build_plan(tmp_path)
    rewritten(export, precision="float16")
    with pytest.raises(ConfigError, match="exported in float16; export it in float32"):
        build_plan(export, "bf16")
    rewritten(export, target="edge-llm")
    with pytest.raises(ModelError, match="run .*build_on_device.sh here"):
        build_plan(export)


def test_only_cuda_devices_run_plans(export, tensorrt, monkeypatch):
    device = tensorrt_engine._device
    tensorrt()
    manifest = build_plan(export)
    for asked, message in (("cpu", "knows 'auto', 'cuda'"), ("auto:1", "knows"), ("cuda:99", "torch sees .* devices")):
        with pytest.raises(ConfigError, match=message):
            device(asked)
    with pytest.raises(ConfigError, match="dtype is 'float16', the plan was built in float32"):
        load_tensorrt(export, manifest, EngineOptions(dtype="float16"))


def test_the_command_builds_and_checks(export, tensorrt, capsys):
    tensorrt()
    parser = argparse.ArgumentParser()
    add_command(parser.add_subparsers())
    arguments = parser.parse_args(["build", str(export), "--precision", "fp16"])
    assert arguments.run(arguments) == 0
    printed = capsys.readouterr().out
    assert f"{PLAN_FILE}: float16" in printed
    assert "parity with the reference: median depth error" in printed
    arguments = parser.parse_args(["build", str(export), "--workspace-mb", "-1"])
    with pytest.raises(ConfigError, match="--workspace-mb is -1"):
        arguments.run(arguments)


def test_an_export_is_no_checkpoint_and_the_refusal_names_its_engines(shared, tmp_path):
    message = f"{shared} is an export for target 'onnx' and .* choose engine onnxruntime or tensorrt, .* made of, small"
    with pytest.raises(ModelError, match=message):
        Estimator.load(str(shared), device="cpu")
    with pytest.raises(ModelError, match=message):
        export_target(str(shared), tmp_path / "again", "onnx", CAMERA)
    assert list(tmp_path.iterdir()) == []


def test_engines_are_found_by_name(shared, checkpoint):
    card, source = load_card(str(shared))
    engine = load_engine(source, card, engine="onnxruntime", options=EngineOptions(device="cpu"))
    assert isinstance(engine, GraphEngine)
    with pytest.raises(ModelError, match="no engine.json, so it is no export"):
        load_engine(checkpoint, card, engine="onnxruntime")
    assert plan_builder.PRECISIONS.keys() == {"fp32", "fp16", "bf16"}
