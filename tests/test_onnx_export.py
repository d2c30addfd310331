"""The dense pass as one ONNX graph: it computes what the checkpoint computes, and refuses what it can't hold."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from checkpoints import make_checkpoint
from onnx import TensorProto, numpy_helper
from onnx.reference import ReferenceEvaluator
from test_dpt_head import dpt_checkpoint

from depthlm_ros import onnx_precision
from depthlm_ros.camera import Camera, Distortion
from depthlm_ros.cards import load_card
from depthlm_ros.engines.graph_engine import GRAPH_FILE, INPUT, OUTPUT
from depthlm_ros.errors import ConfigError, DialectError, EngineError, MissingDependencyError, ModelError
from depthlm_ros.estimator import Estimator
from depthlm_ros.manifest import sha256_of
from depthlm_ros.onnx_precision import lower_precision
from depthlm_ros.prompts import dense_question
from depthlm_training import onnx_export
from depthlm_training.onnx_constants import affine_of
from depthlm_training.onnx_export import check_graph, export_onnx

CAMERA = Camera(fx=228.5, fy=228.5, cx=159.5, cy=119.5, width=320, height=240)
# A checkpoint without a card is shown its images at 1000 px; this camera's view is small all the same.
FAR = Camera(fx=1000.0, fy=990.0, cx=79.5, cy=59.5, width=160, height=120)


def on_cpu(model, **options) -> Estimator:
    return Estimator.load(str(model), device="cpu", dtype="float32", **options)


def exported(model, folder, camera, precision="float32", **options):
    folder.mkdir(parents=True)
    with on_cpu(model, **options) as estimator:
        return export_onnx(estimator, Path(load_card(str(model))[1]), folder, camera, precision=precision)


def run(path, image):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run([OUTPUT], {INPUT: image})[0]


def smooth_noise(height, width, seed=0):
    """An image with structure at every scale."""
    rng = np.random.default_rng(seed)
    total = np.zeros((height, width, 3))
    for side in (4, 16, 64):
        total += cv2.resize(rng.uniform(0, 255, (side, side, 3)), (width, height), interpolation=cv2.INTER_CUBIC)
    return np.clip(total / 3, 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The demo model's graph and its manifest."""
    folder = tmp_path_factory.mktemp("demo") / "onnx"
    return folder, exported("demo", folder, CAMERA)


def test_the_demo_s_graph_gives_the_checkpoint_s_depth(demo):
    folder, manifest = demo
    assert manifest.extra["relative_difference"] < 1e-4
    with on_cpu("demo") as estimator:
        for seed in range(3):
            view = estimator.prepare(smooth_noise(240, 320, seed), CAMERA)
            ours = estimator.engine.depth_map(view.image, dense_question())
            theirs = run(folder / GRAPH_FILE, view.image)
            assert theirs.dtype == np.float32
            np.testing.assert_allclose(theirs, ours, rtol=1e-4)
            assert np.ptp(ours) > 0.1 * ours.mean()


def test_the_manifest_says_what_the_graph_is_for(demo):
    folder, manifest = demo
    assert manifest.target == "onnx"
    assert manifest.dialects == ("dense",)
    assert manifest.precision == "float32"
    assert (manifest.focal_px, manifest.policy) == (200.0, "exact")
    assert manifest.image == {
        "width": 288, "height": 224, "map_width": 288, "map_height": 224, "image_tokens": 63,
        "multiple": 32, "min_pixels": 4096, "max_pixels": 1048576,
    }  # fmt: skip
    weights = Path(load_card("demo")[1]) / "model.safetensors"
    assert manifest.source_sha256 == {"model.safetensors": sha256_of(weights)}
    assert manifest.versions["torch"] == onnx_export.metadata.version("torch")
    assert manifest.camera["fx"] == 228.5
    assert manifest.files == {}
    assert json.loads(json.dumps(manifest.extra))["architecture"] == "qwen3_vl"
    assert [path.name for path in folder.iterdir()] == [GRAPH_FILE]


def test_the_graph_is_static_plain_and_tells_nothing_of_this_machine(demo):
    folder, manifest = demo
    model = onnx.load(str(folder / GRAPH_FILE))
    assert {(entry.domain, entry.version) for entry in model.opset_import} == {("", 18)}
    assert model.functions == []
    shapes = {}
    for value in (*model.graph.input, *model.graph.output):
        kind = value.type.tensor_type
        shapes[value.name] = kind.elem_type, [dim.dim_value for dim in kind.shape.dim]
    assert shapes == {INPUT: (TensorProto.UINT8, [224, 288, 3]), OUTPUT: (TensorProto.FLOAT, [224, 288])}
    used = {node.op_type for node in model.graph.node}
    # What TensorRT has no layer for, or what would make a shape depend on a value.
    assert used.isdisjoint({"ScatterND", "ScatterElements", "NonZero", "Where", "If", "Loop", "Shape", "Range"})
    told = {entry.key: entry.value for entry in model.metadata_props}
    assert told["depthlm.focal_px"] == "200.0"
    assert json.loads(told["depthlm.image"]) == manifest.image
    assert json.loads(told["depthlm.source_sha256"]) == manifest.source_sha256
    stored = (folder / GRAPH_FILE).read_bytes()
    for path in (str(Path(torch.__file__).parent), str(Path(onnx_export.__file__).parent)):
        assert path.encode() not in stored


@pytest.mark.parametrize(
    ("mode", "output", "policy"),
    [("llm_last", "softplus", "exact"), ("concat", "exp", "exact"), ("sum", "softplus", "published")],
)
def test_small_checkpoints_export(tmp_path, mode, output, policy):
    folder = make_checkpoint(tmp_path / "checkpoint", feature_mode=mode, head_output=output)
    manifest = exported(folder, tmp_path / "onnx", FAR, policy=policy)
    # DepthVLM's own way to 1000 px ends at multiples of 28, which the processor resamples to multiples of 32.
    assert (manifest.image["width"], manifest.image["height"]) == ((168, 112) if policy == "published" else (160, 128))
    assert (manifest.image["map_width"], manifest.image["map_height"]) == (160, 128)
    with on_cpu(folder, policy=policy) as estimator:
        view = estimator.prepare(smooth_noise(120, 160), FAR)
        ours = estimator.engine.depth_map(view.image, dense_question())
        theirs = run(tmp_path / "onnx" / GRAPH_FILE, estimator.engine.processor.shown(view.image))
    np.testing.assert_allclose(theirs, ours, rtol=1e-4)


def test_a_dpt_head_exports(tmp_path):
    folder = dpt_checkpoint(tmp_path / "checkpoint")
    manifest = exported(folder, tmp_path / "onnx", FAR, policy="exact")
    assert manifest.extra["relative_difference"] < 1e-4
    with on_cpu(folder, policy="exact") as estimator:
        image = smooth_noise(128, 160)
        ours = estimator.engine.depth_map(image, dense_question())
    np.testing.assert_allclose(run(tmp_path / "onnx" / GRAPH_FILE, image), ours, rtol=1e-4)


def test_a_lens_with_distortion_has_its_own_view(tmp_path):
    folder = make_checkpoint(tmp_path / "checkpoint")
    lens = replace(FAR, distortion=Distortion("plumb_bob", (-0.3, 0.1, 0.0, 0.0, 0.0)))
    manifest = exported(folder, tmp_path / "onnx", lens, policy="exact")
    assert manifest.camera["distortion"] == {"model": "plumb_bob", "coefficients": [-0.3, 0.1, 0.0, 0.0, 0.0]}


def test_weights_that_a_protobuf_can_not_hold_lie_beside_the_graph(tmp_path, monkeypatch):
    folder = make_checkpoint(tmp_path / "checkpoint")
    monkeypatch.setattr(onnx_export, "_EMBEDDED_BYTES", 100_000)
    exported(folder, tmp_path / "onnx", FAR, policy="exact")
    graph, data = (tmp_path / "onnx" / name for name in (GRAPH_FILE, f"{GRAPH_FILE}.data"))
    assert graph.stat().st_size < data.stat().st_size
    image = smooth_noise(128, 160)
    exact = run(graph, image)
    monkeypatch.setattr(onnx_precision, "_EMBEDDED_BYTES", 100_000)
    before = data.stat().st_size
    lower_precision(graph, graph, "float16")
    assert 0.4 * before < data.stat().st_size < 0.7 * before
    np.testing.assert_allclose(np.median(run(graph, image) / exact), 1, atol=0.01)


# ---------------------------------------------------------------- fewer bits


@pytest.mark.parametrize(("precision", "most"), [("float16", 2e-3), ("bfloat16", 0.02)])
def test_products_in_fewer_bits_are_written_into_the_graph(demo, tmp_path, precision, most):
    folder, _ = demo
    lowered = tmp_path / "lowered.onnx"
    lower_precision(folder / GRAPH_FILE, lowered, precision)
    onnx.checker.check_model(str(lowered), full_check=True)
    assert lowered.stat().st_size < 0.6 * (folder / GRAPH_FILE).stat().st_size
    model = onnx.load(str(lowered))
    kinds = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    low = {"float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}[precision]
    assert kinds[f"language.layers.0.q_proj.weight.{precision}"] == low
    assert kinds["head.up.weight"] == kinds["head.down.weight"] == kinds["vision.position"] == TensorProto.FLOAT
    # onnx's own evaluator multiplies in the format that the graph names, which onnxruntime's CPU provider does not.
    image = smooth_noise(224, 288)
    exact, rounded = run(folder / GRAPH_FILE, image), ReferenceEvaluator(str(lowered)).run(None, {INPUT: image})[0]
    difference = np.abs(rounded - exact) / exact
    assert 1e-5 < np.median(difference) < most


def test_bfloat16_is_rounded_to_the_nearest():
    values = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    from depthlm_ros.onnx_precision import _tensor

    stored = _tensor(values, "w", TensorProto.BFLOAT16, onnx.helper)
    expected = torch.from_numpy(values).to(torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(numpy_helper.to_array(stored).astype(np.float32), expected)


def test_an_export_in_float16_is_checked_and_half_as_large(demo, tmp_path):
    folder, _ = demo
    manifest = exported("demo", tmp_path / "half", CAMERA, precision="float16")
    assert manifest.precision == "float16"
    assert (tmp_path / "half" / GRAPH_FILE).stat().st_size < 0.6 * (folder / GRAPH_FILE).stat().st_size
    image = smooth_noise(224, 288)
    exact, rounded = (run(path / GRAPH_FILE, image) for path in (folder, tmp_path / "half"))
    np.testing.assert_allclose(rounded, exact, rtol=0.02)


def test_weights_beyond_float16_are_refused(demo, tmp_path):
    folder, _ = demo
    model = onnx.load(str(folder / GRAPH_FILE))
    tensor = next(t for t in model.graph.initializer if t.name == "vision.patch.weight")
    tensor.CopyFrom(numpy_helper.from_array(1e7 * numpy_helper.to_array(tensor), tensor.name))
    onnx.save_model(model, str(tmp_path / "large.onnx"))
    with pytest.raises(ConfigError, match="vision.patch.weight reaches .* range of float16"):
        lower_precision(tmp_path / "large.onnx", tmp_path / "out.onnx", "float16")


@pytest.mark.parametrize("precision", ["bfloat16", "int8", "fp16"])
def test_precisions_that_can_not_be_checked_are_refused(tmp_path, precision):
    with pytest.raises(ConfigError, match=f"precision is '{precision}'.*depthlm build OUT --precision bf16"):
        exported("demo", tmp_path / "onnx", CAMERA, precision=precision)


# ---------------------------------------------------------------- what can't be exported


def test_a_model_without_a_dense_head_is_refused(tmp_path):
    folder = make_checkpoint(tmp_path / "checkpoint", dense_head=False)
    with pytest.raises(DialectError, match="no dense head.*edge-llm or tensorrt-llm"):
        exported(folder, tmp_path / "onnx", FAR)


def test_another_architecture_is_refused(tmp_path):
    folder = make_checkpoint(tmp_path / "checkpoint", "qwen2_5_vl")
    with pytest.raises(ModelError, match="qwen2_5_vl; target onnx knows qwen3_vl"):
        exported(folder, tmp_path / "onnx", FAR)


def test_a_checkpoint_in_another_format_is_refused(tmp_path):
    folder = make_checkpoint(tmp_path / "checkpoint")
    with (
        Estimator.load(str(folder), device="cpu", dtype="bfloat16") as estimator,
        pytest.raises(ConfigError, match="on cpu in bfloat16; export it from .* float32"),
    ):
        export_onnx(estimator, folder, tmp_path, FAR)


def test_a_processor_that_does_more_is_refused(tmp_path):
    folder = make_checkpoint(tmp_path / "checkpoint")
    with on_cpu(folder) as estimator:
        estimator.engine.processor.shortcut = False
        with pytest.raises(ModelError, match="does more than to resample and normalise"):
            export_onnx(estimator, folder, tmp_path, FAR)


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    version = onnx_export.metadata.version

    def absent(name):
        if name == "onnxscript":
            raise onnx_export.metadata.PackageNotFoundError(name)
        return version(name)

    with on_cpu("demo") as estimator:
        monkeypatch.setattr(onnx_export.metadata, "version", absent)
        with pytest.raises(MissingDependencyError, match=r'onnxscript.*pip install "depthlm_ros\[export\]"'):
            export_onnx(estimator, tmp_path, tmp_path, CAMERA)


def test_an_onnxscript_that_is_too_old_is_named(tmp_path, monkeypatch):
    def export(*args, **kwargs):
        raise ModuleNotFoundError("No module named 'onnxscript._framework_apis.torch_2_11'")

    monkeypatch.setattr(torch.onnx, "export", export)
    with pytest.raises(MissingDependencyError, match="too old for torch .*pip install --upgrade onnxscript"):
        exported("demo", tmp_path / "onnx", CAMERA)


def test_a_graph_that_answers_otherwise_is_refused_with_the_figure(demo, tmp_path):
    folder, _ = demo
    model = onnx.load(str(folder / GRAPH_FILE))
    tensor = next(t for t in model.graph.initializer if t.name == "head.down.bias")
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) + np.float32(2e-3), tensor.name))
    onnx.save_model(model, str(tmp_path / "wrong.onnx"))
    with on_cpu("demo") as estimator:
        images = [smooth_noise(224, 288)]
        assert check_graph(folder / GRAPH_FILE, estimator.engine, images, "float32") < 1e-4
        with pytest.raises(EngineError, match="by 2.0e-03 of a depth, at most 0.0001"):
            check_graph(tmp_path / "wrong.onnx", estimator.engine, images, "float32")


def test_values_of_bytes_are_taken_for_affine_only_where_they_are():
    bytes_ = np.arange(256.0)[:, None]
    scale, offset = affine_of((bytes_ / 255 - [0.5, 0.4, 0.3]) / [0.2, 0.3, 0.4])
    np.testing.assert_allclose(scale, 1 / (255 * np.array([0.2, 0.3, 0.4])))
    np.testing.assert_allclose(offset, -np.array([0.5, 0.4, 0.3]) / [0.2, 0.3, 0.4])
    assert affine_of((bytes_ / 255) ** 2.2 * np.ones(3)) is None
