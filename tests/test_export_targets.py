"""`depthlm export --target`: what every target's folder holds, and what is refused before anything is made."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import yaml
from checkpoints import make_checkpoint

from depthlm_ros.camera import Camera, Distortion
from depthlm_ros.cards import CARD_FILE, load_card, models_dir
from depthlm_ros.cli import main
from depthlm_ros.cli_inputs import read_calibration
from depthlm_ros.errors import CameraError, ConfigError, DialectError, ModelError
from depthlm_ros.estimator import Estimator
from depthlm_ros.manifest import read_manifest, sha256_of
from depthlm_ros.references import camera_of, read_reference
from depthlm_training.export_targets import TargetOptions, export_target

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

CALIBRATION = {
    "image_width": 160,
    "image_height": 120,
    "camera_name": "front",
    "camera_matrix": {"rows": 3, "cols": 3, "data": [130.0, 0, 79.0, 0, 131.0, 60.0, 0, 0, 1]},
    "distortion_model": "plumb_bob",
    "distortion_coefficients": {"rows": 1, "cols": 5, "data": [-0.05, 0.01, 0.001, 0.0, 0.0]},
}
LENS = Distortion("plumb_bob", (-0.05, 0.01, 0.001, 0.0, 0.0))
CAMERA = Camera(fx=130.0, fy=131.0, cx=79.0, cy=60.0, width=160, height=120, distortion=LENS)


@pytest.fixture(scope="module")
def calibration(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("calibration") / "front.yaml"
    path.write_text(yaml.safe_dump(CALIBRATION))
    return path


@pytest.fixture(scope="module")
def exported(calibration, tmp_path_factory) -> Path:
    """The demo for a camera with a lens, by the README's line."""
    out = tmp_path_factory.mktemp("export") / "engine"
    assert main(["export", "demo", str(out), "--target", "onnx", "--camera", str(calibration)]) == 0
    return out


def test_a_calibration_file_is_a_camera(calibration, tmp_path):
    assert read_calibration(calibration) == CAMERA
    straight = {**CALIBRATION, "distortion_coefficients": {"data": [0.0] * 5}}
    (tmp_path / "straight.yaml").write_text(yaml.safe_dump(straight))
    assert read_calibration(tmp_path / "straight.yaml").distortion == Distortion()


@pytest.mark.parametrize("damage", ["absent", "no yaml", "no matrix", "a text", "zero"])
def test_what_is_no_calibration_is_told(tmp_path, damage):
    path = tmp_path / "camera.yaml"
    texts = {
        "no yaml": "a: [",
        "no matrix": yaml.safe_dump({k: v for k, v in CALIBRATION.items() if k != "camera_matrix"}),
        "a text": "hello",
        "zero": yaml.safe_dump({**CALIBRATION, "camera_matrix": {"data": [0.0] * 9}}),
    }
    if damage != "absent":
        path.write_text(texts[damage])
    with pytest.raises(CameraError):
        read_calibration(path)


def test_an_export_is_a_model_folder_of_its_own(exported):
    card, source = load_card(str(exported))
    assert source == exported
    assert (card.dialects, card.default_dialect) == (("dense",), "dense")
    assert card.name == "demo" and not card.sha256
    manifest = read_manifest(exported)
    assert camera_of(dict(manifest.camera)) == CAMERA
    assert "model.onnx" in manifest.files and f"reference/{'frame_0.png'}" in manifest.files
    assert all(sha256_of(exported / name) == digest for name, digest in manifest.files.items())
    demo, weights = load_card("demo")
    assert manifest.source_sha256["model.safetensors"] == sha256_of(Path(weights) / "model.safetensors")
    assert (manifest.focal_px, manifest.policy) == (demo.focal_px, demo.policy)


def test_it_measures_what_the_checkpoint_measures_through_the_lens(exported):
    rng = np.random.default_rng(3)
    image = rng.integers(0, 256, (120, 160, 3), dtype=np.uint8)
    with (
        Estimator.load("demo", device="cpu", dtype="float32") as reference,
        Estimator.load(str(exported), engine="onnxruntime", device="cpu") as candidate,
    ):
        wanted, got = (e.estimate(image, CAMERA, dialect="dense").depth_m for e in (reference, candidate))
        assert candidate.dialects == ("dense",)
        with pytest.raises(DialectError):
            candidate.estimate(image, CAMERA, dialect="coordinates")
    np.testing.assert_allclose(got, wanted, rtol=1e-4)


def test_the_reference_is_of_that_camera(exported):
    reference = read_reference(exported / "reference")
    assert {frame.camera for frame in reference.frames} == {CAMERA}
    assert {asked.dialect for asked in reference.asked} == {"dense"}


def test_the_checkpoint_itself_does_not_load_from_an_export(exported):
    with pytest.raises(ModelError, match="is an export for target .onnx.*; choose engine onnxruntime or tensorrt"):
        Estimator.load(str(exported), device="cpu")


@pytest.mark.parametrize(
    ("target", "option", "owner"),
    [("onnx", {"gpu": "H100"}, "tensorrt-llm"), ("tensorrt-llm", {"batch": 2}, "edge-llm"),
     ("edge-llm", {"quantised": Path("fp8")}, "tensorrt-llm")],
)  # fmt: skip
def test_an_option_of_another_target_is_refused(tmp_path, target, option, owner):
    (name,) = option
    with pytest.raises(ConfigError, match=f"{name} is .*only target {owner} has it; leave it out of {target}"):
        export_target("demo", tmp_path / "out", target, CAMERA, TargetOptions(**option))
    assert not (tmp_path / "out").exists()


def test_an_engine_for_words_is_not_what_a_graph_is(exported):
    with pytest.raises(ModelError, match="choose engine onnxruntime or tensorrt"):
        Estimator.load(str(exported), engine="edge_llm")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--gpu", "H100", "--question-tokens", "2"], "no --target, but --gpu, --question-tokens of an engine"),
        (["--camera", "front.yaml"], "no --target, but --camera of an engine"),
        (["--size", "640x480", "--fx", "500"], "no --target, but --size, --fx of an engine"),
        (["--target", "onnx", "--step", "3"], "--step, --dtype and --scores are of a training's model"),
        (["--target", "onnx", "--dtype", "bfloat16"], "which has --precision"),
        (["--target", "onnx"], "give its calibration file with --camera, or --size"),
        (["--target", "onnx", "--size", "640x480"], "neither --fx nor --fov-deg"),
        (["--target", "onnx", "--camera", "nowhere.yaml"], "nowhere.yaml is no calibration"),
    ],
)
def test_an_engine_wants_a_camera(tmp_path, capsys, arguments, told):
    assert main(["export", "demo", str(tmp_path / "out"), *arguments]) == 1
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_exists_is_left_alone(tmp_path):
    with pytest.raises(ConfigError, match="exists already"):
        export_target("demo", tmp_path, "onnx", CAMERA)
    with pytest.raises(ConfigError, match="choose one of onnx"):
        export_target("demo", tmp_path / "out", "tflite", CAMERA)


def test_a_recording_s_frames_are_compared_as_well_if_they_are_of_that_camera(tmp_path):
    from depthlm_ros.references import recorded_frames

    drive = models_dir() / "sample_drive"
    camera = recorded_frames(drive, 1)[0].camera
    out = tmp_path / "engine"
    export_target("demo", out, "onnx", camera, TargetOptions(bag=drive))
    assert len(read_reference(out / "reference").frames) == 12
    other = dataclasses.replace(camera, fx=camera.fx + 10)
    with pytest.raises(ConfigError, match="was recorded with"):
        export_target("demo", tmp_path / "other", "onnx", other, TargetOptions(bag=drive))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["engine"]


def test_a_model_without_a_head_has_no_dense_graph(tmp_path):
    checkpoint = make_checkpoint(tmp_path / "words", "qwen3_vl", dense_head=False)
    with pytest.raises((ModelError, DialectError, ConfigError), match="head"):
        export_target(str(checkpoint), tmp_path / "out", "onnx", CAMERA)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / CARD_FILE).exists()


def reference_of(depth_m, texts=(), dialect: str = "compact"):
    from depthlm_ros.references import Asked, Reference

    asked = Asked(0, dialect, np.zeros((len(depth_m), 2), np.float32), np.asarray(depth_m, np.float32), tuple(texts))
    return Reference("demo", "a test", (), (asked,))


def test_fewer_bits_may_change_last_digits_and_not_what_is_measured():
    from depthlm_ros.errors import EngineError
    from depthlm_training.export_targets import agreement

    depths = np.geomspace(1, 9, 100)
    texts = [f"{d:.2f}" for d in depths]
    few = [*texts[:90], *(f"{d + 0.05:.2f}" for d in depths[90:])]
    told = agreement(reference_of(depths, texts), reference_of([float(t) for t in few], few), "float16")
    assert told["compact"]["same_answers"] == 0.9 and told["compact"]["median_error"] < 0.01
    with pytest.raises(EngineError, match="in float16 the checkpoint itself answers otherwise.*scale 1.02"):
        agreement(reference_of(depths, texts), reference_of(depths * 1.02, texts), "float16")
    with pytest.raises(EngineError, match="missing"):
        broken = np.where(np.arange(100) < 5, np.nan, depths)
        agreement(reference_of(depths, texts), reference_of(broken, texts), "float16")


def test_a_checkpoint_that_gives_no_depth_in_float32_loses_none_in_fewer_bits():
    from depthlm_ros.errors import EngineError
    from depthlm_training.export_targets import agreement

    texts, nothing = ["461.5.92", "", "4"], np.full(3, np.nan)
    told = agreement(reference_of(nothing, texts), reference_of(nothing, ["461.4.3", "", "4"]), "float16")
    assert told == {"compact": {"same_answers": pytest.approx(2 / 3), "depths": 0}}
    with pytest.raises(EngineError, match="100.0% missing"):
        agreement(reference_of([1.0, 2.0, 3.0], texts), reference_of(nothing, texts), "float16")


@pytest.mark.parametrize(
    ("dialects", "precision", "dtype"),
    [
        (("dense",), "float16", "float32"),
        (("coordinates",), "float16", "float16"),
        (("coordinates",), "float32", "float32"),
        (("marker",), "fp8", "bfloat16"),
    ],
)
def test_words_are_compared_in_the_engine_s_own_number_format(dialects, precision, dtype):
    from depthlm_ros.manifest import Manifest
    from depthlm_training.export_targets import reference_dtype

    manifest = Manifest(
        target="onnx", model="demo", source="demo", source_sha256={}, made="2026-01-01", versions={},
        precision=precision, dialects=dialects, focal_px=200.0, policy="exact", image={},
    )  # fmt: skip
    assert reference_dtype(manifest) == dtype
