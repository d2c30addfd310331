"""The comparison of answers, the reference on a disk, and what the gate makes of both."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from depthlm_ros.camera import Camera, Distortion
from depthlm_ros.cli import main
from depthlm_ros.depth import DepthResult
from depthlm_ros.errors import ConfigError, DialectError, EngineError, ImageError, ModelError, ParityError
from depthlm_ros.estimator import Estimator
from depthlm_ros.machine import Machine
from depthlm_ros.manifest import (
    ENGINE_FILE,
    Manifest,
    check_built,
    check_card,
    read_manifest,
    require_manifest,
    sha256_of,
    write_manifest,
)
from depthlm_ros.parity import check, compare_maps, rank_correlation, record_reference, same_answer
from depthlm_ros.parity_records import ParityRecord, add_record, known_record
from depthlm_ros.proof import prove, prove_each
from depthlm_ros.references import REFERENCE_FILE, ReferenceFrame, default_frames, read_reference, recorded_frames

CAMERA = Camera(fx=200.0, fy=200.0, cx=127.5, cy=95.5, width=256, height=192)
LENS = Distortion("plumb_bob", (-0.1, 0.02, 0.0, 0.0, 0.0))


@pytest.fixture(scope="module")
def demo():
    with Estimator.load("demo", device="cpu", dtype="float32") as estimator:
        yield estimator


@pytest.fixture(scope="module")
def reference_folder(demo, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("parity") / "reference"
    record_reference(demo, default_frames(CAMERA, 2), folder, ["dense", "compact"])
    return folder


@dataclasses.dataclass
class Changed:
    """The demo with its answers changed on the way out."""

    estimator: Estimator
    change: object
    dialects: tuple[str, ...] = ("dense", "coordinates", "marker", "compact")

    def __getattr__(self, name: str):
        return getattr(self.estimator, name)

    def estimate(self, image, camera, pixels, **options) -> DepthResult:
        return self.change(self.estimator.estimate(image, camera, pixels, **options))


# ---------------------------------------------------------------- figures


@given(
    scale=st.floats(0.2, 5),
    noise=st.floats(0, 0.2),
    seed=st.integers(0, 100),
)
def test_figures_are_those_of_their_definition(scale, noise, seed):
    rng = np.random.default_rng(seed)
    reference = rng.uniform(0.5, 20, 500)
    candidate = reference * scale * np.exp(rng.normal(0, noise, 500))
    found = compare_maps(reference, candidate)
    assert found.median_error == pytest.approx(np.median(np.abs(candidate / reference - 1)))
    assert found.scale == pytest.approx(np.median(candidate / reference))
    order = np.argsort(np.argsort(reference)), np.argsort(np.argsort(candidate))
    assert found.rank_correlation == pytest.approx(np.corrcoef(*order)[0, 1])
    assert found.lost == 0


def test_ties_share_their_mean_rank_and_a_constant_has_no_order():
    # By hand: ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4.
    assert rank_correlation(np.array([1.0, 2, 2, 3]), np.array([1.0, 2, 3, 4])) == pytest.approx(0.9486833)
    assert math.isnan(rank_correlation(np.ones(4), np.arange(4.0)))


@pytest.mark.parametrize(
    ("change", "failure"),
    [
        (lambda d: d * 1.02, "scale 1.02"),
        (lambda d: d * 0.98, "scale 0.98"),
        (lambda d: d[::-1], "rank correlation"),
        (lambda d: np.where(np.arange(len(d)) % 5 == 0, np.nan, d), "20.00% of the depths are missing"),
        (lambda d: np.full_like(d, np.nan), "100.00% of the depths are missing"),
        (lambda d: np.full_like(d, 3), "rank correlation nan"),
        (lambda d: np.where(np.arange(len(d)) < 100, d[::-1], d), "rank correlation"),
        # The farthest of them, in the same order: neither the median nor the ranks see it.
        (lambda d: np.where(np.arange(len(d)) > 550, d * 1.5, d), "1 of 20 depths is 50.0% off"),
    ],
)
def test_each_bound_is_one(change, failure):
    reference = np.geomspace(1, 30, 1000)
    assert not compare_maps(reference, reference * 1.004).failures
    assert any(failure in told for told in compare_maps(reference, change(reference)).failures)


def test_before_a_wall_the_order_is_not_judged():
    rng = np.random.default_rng(0)
    wall = 2 + rng.normal(0, 0.01, 1000)
    found = compare_maps(wall, wall * (1 + rng.normal(0, 0.002, 1000)))
    assert found.rank_correlation is None and not found.failures
    assert not compare_maps(np.full(100, 2.0), np.full(100, 2.001)).failures


def test_a_reference_s_own_gaps_are_not_the_candidate_s():
    reference = np.where(np.arange(100) < 30, np.nan, np.geomspace(1, 9, 100))
    assert not compare_maps(reference, np.where(np.isnan(reference), 5.0, reference)).failures


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        ("1.37", "1.37", True),
        ("1.37", "1.38", True),
        ("1.37", "1.36", True),
        ("1.37", "1.39", False),
        ("1.37", "1.4", False),
        ("9.99", "10.00", True),
        ("12", "13", True),
        ("12", "14", False),
        ("1", "1.99", False),
        ("1.99", "1", False),
        ("0.9", "1", True),
        ("about 2.48 m, so 2.48", "about 2.49 m, so 2.49", True),
        ("about 2.48 m", "around 2.48 m", False),
        ("about 2.48 m, so 2.48", "about 2.48 m", False),
        ("", "1.0", False),
        ("I can't tell", "I can't tell", True),
    ],
)
def test_words_are_the_same_within_a_unit_of_the_last_digit(a, b, same):
    assert same_answer(a, b) is same


# ---------------------------------------------------------------- references


def test_a_model_agrees_with_its_own_reference_from_the_disk(demo, reference_folder):
    verdict = check(demo, read_reference(reference_folder))
    assert verdict.passed and not verdict.failures
    assert verdict.figures["median depth error"] < 1e-4
    assert verdict.figures["same answers, compact"] == 1


def test_a_reference_keeps_frames_and_camera(demo, tmp_path):
    camera = dataclasses.replace(CAMERA, distortion=LENS)
    frames = default_frames(camera, 1)
    record_reference(demo, frames, tmp_path / "r", ["dense"])
    kept = read_reference(tmp_path / "r")
    np.testing.assert_array_equal(kept.frames[0].image, frames[0].image)
    assert kept.frames[0].camera == camera
    assert kept.model == "demo" and "float32" in kept.engine


def test_rendered_frames_are_the_same_every_time_and_differ_from_each_other():
    first, second = default_frames(CAMERA, 3), default_frames(CAMERA, 3)
    assert all(np.array_equal(a.image, b.image) for a, b in zip(first, second, strict=True))
    assert not np.array_equal(first[0].image, first[1].image)


def test_a_lens_bends_the_rendered_frames_and_leaves_no_holes():
    straight, bent = (default_frames(c, 1)[0].image for c in (CAMERA, dataclasses.replace(CAMERA, distortion=LENS)))
    middle = np.s_[90:100, 120:136]
    assert np.abs(straight[middle].astype(int) - bent[middle]).mean() < 4
    assert not np.array_equal(straight, bent)
    assert (bent.max(axis=2) > 0).all()


@pytest.mark.parametrize(
    ("change", "failure"),
    [
        (lambda r: dataclasses.replace(r, depth_m=r.depth_m * 1.03), "dense, frame 0: "),
        (lambda r: dataclasses.replace(r, depth_m=r.depth_m[::-1].copy()), "rank correlation"),
        (lambda r: dataclasses.replace(r, answers=tuple("9.99" for _ in r.answers)), "compact: "),
        (lambda r: dataclasses.replace(r, answers=(*r.answers[1:], *r.answers[:1])), "compact: "),
    ],
)
def test_answers_that_were_changed_are_refused(demo, reference_folder, change, failure):
    verdict = check(Changed(demo, change), read_reference(reference_folder))
    assert not verdict.passed
    assert failure in str(verdict)


def test_one_frame_out_of_scale_is_enough(demo, reference_folder):
    calls = []

    def second_only(result):
        calls.append(result.dialect)
        return dataclasses.replace(result, depth_m=result.depth_m * (1.05 if calls == ["dense"] * 2 else 1))

    verdict = check(Changed(demo, second_only), read_reference(reference_folder))
    assert not verdict.passed and "frame 1" in str(verdict) and "frame 0" not in str(verdict)


def test_an_engine_with_fewer_dialects_is_compared_in_those(demo, reference_folder):
    verdict = check(Changed(demo, lambda r: r, ("dense",)), read_reference(reference_folder))
    assert verdict.passed and verdict.dialects == ("dense",)
    assert "not compared, since the engine isn't asked in them: compact" in str(verdict)
    with pytest.raises(DialectError, match="record a reference"):
        check(Changed(demo, lambda r: r, ("marker",)), read_reference(reference_folder))


def damaged_reference(folder: Path, damage: str) -> None:
    told = folder / REFERENCE_FILE
    data = json.loads(told.read_text())
    first, frame = data["asked"][0], data["frames"][0]
    arrays = dict(np.load(folder / "depths.npz"))
    raw = (folder / "depths.npz").read_bytes()
    if damage == "cut arrays":
        (folder / "depths.npz").write_bytes(raw[:-100])
    elif damage == "changed arrays":
        (folder / "depths.npz").write_bytes(raw[:2000] + bytes(64) + raw[2064:])
    elif damage == "no such frame":
        first["frame"] = 99
    elif damage == "frame from behind":
        first["frame"] = -1
    elif damage == "another dialect":
        first["dialect"] = ["dense"]
    elif damage == "no camera":
        frame["camera"] = None
    elif damage == "another camera":
        frame["camera"]["width"] += 1
    elif damage == "a file elsewhere":
        (folder.parent / "secret.png").write_bytes((folder / frame["image"]).read_bytes())
        frame["image"] = "../secret.png"
    elif damage == "a link":
        (folder / frame["image"]).rename(folder.parent / "linked.png")
        (folder / frame["image"]).symlink_to(folder.parent / "linked.png")
    elif damage == "too few texts":
        data["asked"][-1]["texts"] = data["asked"][-1]["texts"][1:]
    elif damage == "no points":
        arrays |= {"pixels_0": np.zeros((0, 2), np.float32), "depth_m_0": np.zeros(0, np.float32)}
    elif damage == "complex depths":
        arrays["depth_m_0"] = arrays["depth_m_0"].astype(np.complex64)
    elif damage == "other lengths":
        arrays["depth_m_0"] = arrays["depth_m_0"][:-1]
    elif damage == "pixels outside":
        arrays["pixels_0"] = arrays["pixels_0"] + 10_000
    told.write_text(json.dumps(data))
    if "arrays" not in damage:
        np.savez(folder / "depths.npz", **arrays)


@pytest.mark.parametrize(
    "damage",
    [
        "cut arrays", "changed arrays", "no such frame", "frame from behind", "another dialect", "no camera",
        "another camera", "a file elsewhere", "a link", "too few texts", "no points", "complex depths",
        "other lengths", "pixels outside",
    ],
)  # fmt: skip
def test_nothing_of_a_reference_is_believed_before_it_was_looked_at(reference_folder, tmp_path, damage):
    import shutil

    folder = tmp_path / "copy"
    shutil.copytree(reference_folder, folder)
    damaged_reference(folder, damage)
    with pytest.raises(ModelError, match="is damaged"):
        read_reference(folder)


@pytest.mark.parametrize("damage", ["absent", "cut", "no image", "no arrays", "format"])
def test_a_damaged_reference_is_told(reference_folder, tmp_path, damage):
    import shutil

    folder = tmp_path / "copy"
    shutil.copytree(reference_folder, folder)
    told = folder / REFERENCE_FILE
    if damage == "absent":
        told.unlink()
    elif damage == "cut":
        told.write_text(told.read_text()[:200])
    elif damage == "no image":
        (folder / "frame_0.png").unlink()
    elif damage == "no arrays":
        (folder / "depths.npz").write_bytes(b"PK")
    else:
        told.write_text(json.dumps({**json.loads(told.read_text()), "format": 99}))
    with pytest.raises(ModelError, match="record"):
        read_reference(folder)


def test_a_folder_that_holds_something_is_left_alone(demo, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match="another folder"):
        record_reference(demo, default_frames(CAMERA, 1), tmp_path)


# ---------------------------------------------------------------- the manifest


def manifest_of(folder: Path, **values) -> Manifest:
    files = {path.name: sha256_of(path) for path in folder.iterdir() if path.name != ENGINE_FILE and path.is_file()}
    told = dict(
        target="onnx", model="demo", source="demo", source_sha256={}, made="2026-01-01", versions={"torch": "2.13"},
        precision="float32", dialects=("dense",), focal_px=200.0, policy="exact", image={"width": 256, "height": 192},
        files=files,
    )  # fmt: skip
    return Manifest(**{**told, **values})


def record_of(manifest: Manifest, machine: Machine, **values) -> ParityRecord:
    told = dict(
        engine="onnxruntime", version="1", machine=machine.as_dict(), files=manifest.digest, passed=True, figures={},
        date="2026-01-01",
    )  # fmt: skip
    return ParityRecord(**{**told, **values})


ORIN = Machine("aarch64", "Jetson AGX Orin", "Orin", "8.7", "540", "36.4.3", "6.2", "10.3.0")


def test_a_manifest_is_read_as_it_was_written(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"graph")
    manifest = manifest_of(tmp_path, built=ORIN.as_dict())
    write_manifest(tmp_path, manifest)
    assert read_manifest(tmp_path) == manifest
    assert require_manifest(tmp_path, "onnxruntime") == manifest
    assert read_manifest(tmp_path.parent) is None


def test_a_record_counts_for_its_engine_version_files_and_machine_only(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"graph")
    manifest = manifest_of(tmp_path)
    write_manifest(tmp_path, manifest)
    add_record(tmp_path, record_of(manifest, ORIN))
    kept = read_manifest(tmp_path)
    assert known_record(kept, "onnxruntime", "1", machine=ORIN).passed
    assert known_record(kept, "onnxruntime", "2", machine=ORIN) is None
    assert known_record(kept, "tensorrt", "1", machine=ORIN) is None
    assert known_record(kept, "onnxruntime", "1", "cuda:1 float16", ORIN) is None
    for name in ("tensorrt", "gpu", "board", "l4t", "driver", "cpu", "more_gpus"):
        assert known_record(kept, "onnxruntime", "1", machine=dataclasses.replace(ORIN, **{name: "other"})) is None
    other = dataclasses.replace(kept, files={"model.onnx": "0" * 64})
    assert known_record(other, "onnxruntime", "1", machine=ORIN) is None
    # A newer check takes the older one's place.
    add_record(tmp_path, record_of(manifest, ORIN, passed=False))
    assert [record.passed for record in read_manifest(tmp_path).parity] == [False]


def test_where_the_export_cant_be_written_the_record_goes_to_the_cache(tmp_path, monkeypatch):
    folder = tmp_path / "export"
    folder.mkdir()
    (folder / "model.onnx").write_bytes(b"graph")
    manifest = manifest_of(folder)
    write_manifest(folder, manifest)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def refuse(*_):
        raise PermissionError("read-only")

    from depthlm_ros.machine import this_machine

    with monkeypatch.context() as patch:
        patch.setattr("depthlm_ros.manifest.write_manifest", refuse)
        path = add_record(folder, record_of(manifest, this_machine()))
    assert path.is_relative_to(tmp_path / "cache")
    assert not read_manifest(folder).parity
    assert known_record(read_manifest(folder), "onnxruntime", "1").passed
    # The newest counts, wherever it is.
    add_record(folder, record_of(manifest, this_machine(), passed=False, date="2026-02-01"))
    assert not known_record(read_manifest(folder), "onnxruntime", "1").passed
    write_manifest(folder, dataclasses.replace(manifest, parity=(record_of(manifest, this_machine(), date="2025"),)))
    assert known_record(read_manifest(folder), "onnxruntime", "1").date == "2026-01-01"


@pytest.mark.parametrize(
    ("name", "there"),
    [("tensorrt", "10.13.3"), ("l4t", "39.2.0"), ("board", "Orin Nano"), ("compute_capability", "11.0")],
)
def test_a_plan_of_another_machine_is_refused_with_both_values(tmp_path, name, there):
    built = {**ORIN.as_dict(), "precision": "fp16"}
    check_built(manifest_of(tmp_path, built=built), ORIN)
    with pytest.raises(ModelError) as told:
        check_built(manifest_of(tmp_path, built={**built, name: there}), ORIN)
    assert there in str(told.value) and getattr(ORIN, name) in str(told.value)


def test_what_cant_be_found_out_is_no_difference(tmp_path):
    built = {**ORIN.as_dict(), "precision": "fp16"}
    for name in ("board", "l4t"):
        check_built(manifest_of(tmp_path, built=built), dataclasses.replace(ORIN, **{name: ""}))
    # nvidia-smi on a Jetson has another name for its GPU than the device tree.
    check_built(manifest_of(tmp_path, built=built), dataclasses.replace(ORIN, gpu="Orin (nvgpu)"))
    desktop = Machine("x86_64", gpu="RTX 4090", compute_capability="8.9", tensorrt="10.13")
    with pytest.raises(ModelError, match="RTX 4090.*RTX 4080"):
        check_built(manifest_of(tmp_path, built=desktop.as_dict()), dataclasses.replace(desktop, gpu="RTX 4080"))
    with pytest.raises(ModelError, match="tensorrt 10.13.*none"):
        check_built(manifest_of(tmp_path, built=desktop.as_dict()), dataclasses.replace(desktop, tensorrt=""))


def test_another_focal_length_or_policy_is_refused_with_both_values(tmp_path):
    manifest = manifest_of(tmp_path)
    check_card(manifest, 200.0, "exact")
    with pytest.raises(ConfigError, match=r"1000.0.*200.0"):
        check_card(manifest, 1000.0, "exact")
    with pytest.raises(ConfigError, match="published.*exact"):
        check_card(manifest, 200.0, "published")


def test_a_file_that_is_not_the_exported_one_is_refused_with_both_digests(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"graph")
    write_manifest(tmp_path, manifest_of(tmp_path))
    was = sha256_of(path)
    (tmp_path / "model.onnx.data").write_bytes(b"of another export")
    with pytest.raises(ModelError, match="model.onnx.data is not named in engine.json"):
        require_manifest(tmp_path, "onnxruntime")
    (tmp_path / "model.onnx.data").unlink()
    path.write_bytes(b"grapf")
    with pytest.raises(ModelError, match=rf"{sha256_of(path)}.*{was}"):
        require_manifest(tmp_path, "onnxruntime")
    path.unlink()
    with pytest.raises(ModelError, match="lacks model.onnx"):
        require_manifest(tmp_path, "onnxruntime")


def test_an_engine_of_another_target_is_refused(tmp_path):
    with pytest.raises(ModelError, match="--target onnx"):
        require_manifest(tmp_path, "onnxruntime")
    write_manifest(tmp_path, manifest_of(tmp_path, target="edge-llm"))
    with pytest.raises(ModelError, match="choose engine edge_llm"):
        require_manifest(tmp_path, "tensorrt")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("files", []), ("files", {"/etc/passwd": "0" * 64}), ("files", {"../x": "0" * 64}), ("files", {"a": "short"}),
        ("image", None), ("image", {"width": "wide"}), ("extra", None), ("versions", []), ("target", ["onnx"]),
        ("built", "x"), ("focal_px", "200"), ("focal_px", True), ("dialects", [1]), ("made", 1), ("unknown", 1),
        ("parity", [{"engine": "onnxruntime"}]), ("parity", {}),
    ],
)  # fmt: skip
def test_a_manifest_with_values_of_other_kinds_is_told_and_nothing_outside_is_read(tmp_path, name, value):
    write_manifest(tmp_path, manifest_of(tmp_path))
    path = tmp_path / ENGINE_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))
    if (name, value) == ("parity", {}):
        assert read_manifest(tmp_path).parity == ()
        return
    with pytest.raises(ModelError, match="export the model again"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("name", "value"), [("passed", "false"), ("machine", "here"), ("figures", None), ("date", 1), ("machine", {"a": 1})]
)
def test_a_record_with_values_of_other_kinds_is_told(tmp_path, name, value):
    manifest = manifest_of(tmp_path)
    record = {**dataclasses.asdict(record_of(manifest, ORIN)), name: value}
    write_manifest(tmp_path, manifest)
    path = tmp_path / ENGINE_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), "parity": [record]}))
    with pytest.raises(ModelError, match="export the model again"):
        read_manifest(tmp_path)


def test_figures_that_json_has_no_number_for_are_kept_as_null(tmp_path):
    manifest = manifest_of(tmp_path)
    write_manifest(tmp_path, manifest)
    add_record(tmp_path, record_of(manifest, ORIN, passed=False, figures={"scale": math.nan}))
    assert json.loads((tmp_path / ENGINE_FILE).read_text())["parity"][0]["figures"] == {"scale": None}
    assert [path.name for path in tmp_path.iterdir()] == [ENGINE_FILE]


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"format": 1}', '{"format": 9}', "\x00", "[" * 200_000])
def test_a_damaged_manifest_is_told(tmp_path, text):
    (tmp_path / ENGINE_FILE).write_text(text)
    with pytest.raises(ModelError, match="export the model again"):
        read_manifest(tmp_path)


# ---------------------------------------------------------------- the gate


def gate(demo, change, engine: str = "onnxruntime", dialects=("dense",), default: str = "dense"):
    """The demo as if another engine ran it."""
    changed = Changed(demo, change, dialects)
    changed.default_dialect = default
    changed.engine = type("Engine", (), {"info": dataclasses.replace(demo.engine.info, engine=engine, version="1")})()
    return changed


def same(result):
    return result


def worse(result):
    return dataclasses.replace(result, depth_m=result.depth_m * 1.5)


def test_the_gate_passes_remembers_and_refuses(demo, reference_folder, tmp_path):
    import shutil

    export = tmp_path / "export"
    export.mkdir()
    (export / "model.onnx").write_bytes(b"graph")
    shutil.copytree(reference_folder, export / "reference")
    write_manifest(export, manifest_of(export, focal_px=demo.card.focal_px, policy=demo.policy))
    with pytest.raises(EngineError, match=r"does not answer as demo: .*scale 1.5.*accept_unproven"):
        prove(gate(demo, worse), export, None, False)
    assert "compact" not in str(read_manifest(export).dialects)
    # What failed isn't a reason to believe it; nor is it forgotten.
    assert [record.passed for record in read_manifest(export).parity] == [False]
    accepted = prove(gate(demo, worse), export, None, True)
    assert "scale 1.5" in accepted.complaint and "ACCEPTED" in accepted.sentence
    passed = prove(gate(demo, same), export, None, False)
    assert not passed.complaint and passed.sentence.startswith("parity with the reference")
    # The record is of these files: nothing is asked again.
    asked = []
    remembered = prove(gate(demo, lambda r: asked.append(r) or r), export, None, False)
    assert not asked and "was checked here" in remembered.sentence
    (export / "model.onnx").write_bytes(b"another")
    write_manifest(export, dataclasses.replace(read_manifest(export), files={"model.onnx": "1" * 64}))
    prove(gate(demo, lambda r: asked.append(r) or r), export, None, False)
    assert asked


def test_without_reference_answers_an_engine_is_unproven_and_says_so(demo, tmp_path):
    proof = prove(gate(demo, same, "openai"), tmp_path, None, False)
    assert "unproven" in proof.complaint and "depthlm parity MODEL --record" in proof.complaint


def test_a_dialect_that_was_not_compared_is_not_asked(demo, reference_folder, tmp_path):
    four = {"dialects": ("dense", "coordinates", "marker", "compact")}
    proof = prove(gate(demo, same, **four), tmp_path, reference_folder, False)
    assert set(proof.dialects) == {"dense", "compact"} and not proof.complaint
    assert "not been compared in coordinates, marker" in proof.sentence
    with pytest.raises(ParityError, match="to be asked in marker; record a reference in it"):
        prove(gate(demo, same, **four, default="marker"), tmp_path, reference_folder, False)
    accepted = prove(gate(demo, same, **four, default="marker"), tmp_path, reference_folder, True)
    assert "not been compared in coordinates, marker" in accepted.complaint
    with Estimator.load("demo", device="cpu", dtype="float32", reference=reference_folder) as estimator:
        assert set(estimator.dialects) == {"dense", "compact"}
        with pytest.raises(DialectError):
            estimator.card.require_dialect("marker")


def test_a_check_of_another_setup_doesnt_count(demo, reference_folder, tmp_path):
    import shutil

    export = tmp_path / "export"
    export.mkdir()
    shutil.copytree(reference_folder, export / "reference")
    write_manifest(export, manifest_of(export, focal_px=demo.card.focal_px, policy=demo.policy))
    asked = []
    for variant, times in (("guided", 2), ("guided", 2), ("unguided", 4)):
        prove(gate(demo, lambda r: asked.append(r) or r), export, None, False, variant)
        assert len(asked) == times


def test_a_server_that_was_absent_is_left_out_once_another_one_is_proved(demo, reference_folder, tmp_path):
    import contextlib

    def load(url):
        if url == "b":
            raise EngineError("connection refused")
        proved = type("Proved", (contextlib.nullcontext,), {})()
        proved.enter_result = type("E", (), {"proof": prove(gate(demo, same), tmp_path, reference_folder, False)})()
        return proved

    proof = prove_each(["a", "b"], load)
    assert proof.absent == ("b",) and proof.dialects == ("dense",)
    assert "b didn't answer at start" in proof.complaint and "connection refused" in proof.complaint
    with pytest.raises(EngineError, match="connection refused"):
        prove_each(["b"], load)


def test_an_answer_kind_of_one_s_own_is_not_what_is_compared(reference_folder):
    with Estimator.load("demo", device="cpu", dtype="float32", reference=reference_folder, depth_kind="euclidean") as e:
        assert e.card.depth_kind == "euclidean" and e.proof.dialects


def test_a_reference_of_a_camera_that_the_engine_cant_be_asked_about_is_told(demo, reference_folder, tmp_path):
    def refuse(_):
        raise ImageError("an image of 256x192 pixels")

    with pytest.raises(ConfigError, match="256x192 pixels and fx 200.*--camera"):
        prove(gate(demo, refuse), tmp_path, reference_folder, False)


def test_a_reference_of_one_s_own_is_taken_also_for_transformers(demo, reference_folder, tmp_path):
    assert prove(gate(demo, same, "transformers"), tmp_path, None, False).sentence == ""
    assert prove(gate(demo, same, "transformers"), tmp_path, reference_folder, False).dialects == ("dense",)
    with pytest.raises(EngineError):
        prove(gate(demo, worse, "transformers"), tmp_path, reference_folder, False)


# ---------------------------------------------------------------- the command


def test_the_command_records_and_compares(tmp_path, capsys):
    folder = tmp_path / "reference"
    assert main(["parity", "demo", "--record", str(folder), "--dialects", "dense"]) == 0
    assert read_reference(folder).frames[0].camera.width > 0
    capsys.readouterr()
    assert main(["parity", str(folder), "demo", "--dtype", "float32"]) == 0
    told = capsys.readouterr().out
    assert "PASSED" in told and "median depth error: " in told
    arrays = dict(np.load(folder / "depths.npz"))
    np.savez(folder / "depths.npz", **{n: v * 1.1 if n.startswith("depth") else v for n, v in arrays.items()})
    assert main(["parity", str(folder), "demo", "--dtype", "float32"]) == 2
    assert "REFUSED" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["{folder}", "demo", "--bag", "nowhere"], "--bag is about a model as REFERENCE"),
        (["{folder}", "demo", "--dialects", "compact"], "--dialects is about a model as REFERENCE"),
        (["{folder}", "demo", "--reference-dtype", "float16"], "--reference-dtype is about"),
        (["demo", "--record", "{out}", "--engine", "onnxruntime"], "--engine is about a CANDIDATE"),
        (["demo", "--record", "{out}", "--size", "640x480"], "neither --fx nor --fov-deg"),
    ],
)
def test_the_command_ignores_nothing(reference_folder, tmp_path, capsys, arguments, told):
    filled = [text.format(folder=reference_folder, out=tmp_path / "out") for text in arguments]
    assert main(["parity", *filled]) == 1
    assert told in capsys.readouterr().err


def test_the_command_records_for_a_camera(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main("parity demo --record mine --dialects dense --size 160x120 --fx 130".split()) == 0
    camera = read_reference(tmp_path / "mine").frames[0].camera
    assert (camera.width, camera.height, camera.fx) == (160, 120, 130.0)


def test_the_command_wants_one_of_candidate_and_record(capsys):
    assert main(["parity", "demo"]) == 1
    assert "name a CANDIDATE" in capsys.readouterr().err


def test_frames_of_a_recording_are_compared(demo, tmp_path):
    from depthlm_ros.cards import models_dir

    frames = recorded_frames(models_dir() / "sample_drive", 2)
    assert len(frames) == 2 and isinstance(frames[0], ReferenceFrame)
    record_reference(demo, frames, tmp_path / "r", ["dense"])
    assert check(demo, read_reference(tmp_path / "r")).passed


def test_questions_that_hang_on_rounding_are_left_out():
    from depthlm_ros.parity import steady
    from depthlm_ros.references import Asked, Reference

    def answers(*texts: str, dialect: str = "compact") -> Reference:
        n = len(texts)
        pixels = np.stack([np.arange(n), np.arange(n)], 1).astype(np.float32)
        depths = np.array([float(text) for text in texts], np.float32)
        return Reference("demo", "a test", (), (Asked(0, dialect, pixels, depths, texts),))

    whole, half = answers("1.00", "2.00", "3.00", "4.00"), answers("1.01", "2.90", "3.00", "4.00")
    kept = steady(whole, [half], points=2).asked[0]
    assert kept.texts == ("1.00", "3.00") and kept.depth_m.tolist() == [1.0, 3.0]
    assert kept.pixels.tolist() == [[0, 0], [2, 2]]
    assert steady(answers("1.00"), [answers("9.00")]).asked == ()
    dense = Asked(0, "dense", np.zeros((1, 2), np.float32), np.ones(1, np.float32))
    assert steady(Reference("demo", "", (), (dense,)), [Reference("demo", "", (), (dense,))]).asked == (dense,)
