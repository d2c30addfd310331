"""The command `depthlm` answers at once, does what it says, and fails in one line."""

import argparse
import json
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from recordings import drive, picture, small_model, write_depthlm_labels, write_depthvlm_labels

from depthlm_ros import config
from depthlm_ros.bags import bag_info, read_frames, write_bag
from depthlm_ros.cli import build_parser, main
from depthlm_ros.cli_inputs import camera_of, focal_px
from depthlm_ros.errors import CameraError
from depthlm_ros.ply import read_ply


@pytest.fixture(scope="module")
def model(qwen3_vl_checkpoint, tmp_path_factory):
    return str(small_model(qwen3_vl_checkpoint, tmp_path_factory.mktemp("model") / "small"))


@pytest.fixture
def photograph(tmp_path):
    Image.fromarray(picture()).save(tmp_path / "photo.png")
    return str(tmp_path / "photo.png")


def test_help_needs_neither_torch_nor_ros_nor_numpy():
    code = (
        "import sys, depthlm_ros.cli as cli; cli.build_parser(); "
        "print([m for m in ('torch', 'transformers', 'rclpy', 'rosbags', 'numpy', 'cv2') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("command", ["estimate", "replay", "evaluate"])
def test_defaults_are_those_of_the_node(command):
    operands = {"estimate": ["a.png", "--out", "c.ply"], "replay": ["bag"], "evaluate": ["bag"]}[command]
    arguments = vars(build_parser().parse_args([command, *operands]))
    shared = {s.name: s.default for s in config.specs() if s.name in arguments}
    assert {"model", "dialect", "points"} <= shared.keys()
    assert {name: arguments[name] for name in shared} == shared


@pytest.mark.slow
def test_estimate_writes_cloud_and_depth(tmp_path, photograph, model, capsys):
    out, depth = tmp_path / "cloud.ply", tmp_path / "depth.png"
    options = ["--fx", "60", "--model", model, "--device", "cpu", "--stride", "2"]
    assert main(["estimate", photograph, *options, "--out", str(out), "--depth", str(depth)]) == 0
    printed = capsys.readouterr().out
    assert f"wrote {out} (768 points)" in printed
    assert f"wrote {depth} (64x48, 3072 pixels with depth)" in printed
    cloud = read_ply(out)
    columns, rows = np.rint([60 * cloud["x"] / cloud["z"] + 31.5, 60 * cloud["y"] / cloud["z"] + 23.5]).astype(int)
    millimetres = np.asarray(Image.open(depth))
    assert cloud["z"] == pytest.approx(millimetres[rows, columns] / 1000, abs=6e-4)
    assert np.array_equal(cloud["red"], picture()[rows, columns, 0])


@pytest.mark.slow
def test_estimate_fills_in_the_depth_image_and_not_the_cloud(tmp_path, photograph, model, capsys):
    out, depth = tmp_path / "cloud.ply", tmp_path / "depth.npy"
    command = ["estimate", photograph, "--fx", "60", "--model", model, "--device", "cpu", "--out", str(out)]
    command += ["--points", "60", "--sampling", "uncertainty", "--densify", "--depth", str(depth)]
    assert main(command) == 0
    assert f"wrote {out} (60 points)" in capsys.readouterr().out
    assert np.isfinite(np.load(depth)).mean() > 0.5


def test_densify_without_a_depth_image_is_refused_before_the_model_is_loaded(photograph, capsys):
    assert main(["estimate", photograph, "--fx", "60", "--model", "nothing", "--out", "c.ply", "--densify"]) == 1
    assert "name one with --depth" in capsys.readouterr().err


def test_evaluate_refuses_a_sampling_that_would_place_nothing(capsys):
    assert main(["evaluate", "labels.jsonl", "--model", "nothing", "--sampling", "edges"]) == 1
    assert "places the points of --densify" in capsys.readouterr().err


def test_estimate_says_which_points_the_marker_cannot_reach(tmp_path, photograph, llava_checkpoint, capsys):
    command = ["estimate", photograph, "--fx", "750", "--model", str(llava_checkpoint), "--device", "cpu"]
    command += ["--points", "12", "--out", str(tmp_path / "cloud.ply")]
    main(command)
    # At the model's own focal length a grid of 4 x 3 stays 8 px from the border.
    reported = capsys.readouterr().out
    assert "asked 12 pixels (marker)" in reported and "not askable" not in reported
    main([*command[:-4], "--points", "300", *command[-2:]])
    reported = capsys.readouterr().out
    asked = int(re.search(r"asked (\d+) pixels", reported)[1])
    assert 0 < asked < 300 and f"not askable: {300 - asked} pixels, too near the border" in reported
    main([*command[:-4], "--points", "300", "--undrawable", "shift", *command[-2:]])
    shifted = capsys.readouterr().out
    assert "asked 300 pixels" in shifted and f"asked beside the pixel: {300 - asked}" in shifted


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "neither --fx nor --fov-deg"),
        ({"fx": 60.0, "fov_deg": 50.0}, "both --fx and --fov-deg"),
        ({"fov_deg": 180.0}, "field of view is 180.0"),
        ({"fx": -3.0}, "fx is -3.0"),
    ],
)
def test_a_camera_that_cannot_be_is_refused(given, expected):
    arguments = argparse.Namespace(**{"fx": None, "fy": None, "cx": None, "cy": None, "fov_deg": None, **given})
    with pytest.raises(CameraError, match=expected):
        camera_of(arguments, 64, 48)


def test_field_of_view_reaches_the_image_borders():
    camera = camera_of(argparse.Namespace(fx=None, fy=None, cx=None, cy=None, fov_deg=90.0), 64, 48)
    left, right = camera.rays(np.array([[-0.5, 23.5], [63.5, 23.5]]))[:, 0]
    assert (left, right) == pytest.approx((-1, 1))
    assert focal_px(90, 64) == pytest.approx(32)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["estimate", "none.png", "--fx", "60", "--out", "c.ply"], "ImageError: image none.png does not exist"),
        (["bag", "info", "none"], "BagError: recording none does not exist"),
        (["bag", "from-images", "none.jsonl", "out"], "DatasetError: labels file none.jsonl does not exist"),
        (["replay", "none"], "BagError: recording none does not exist"),
        (["evaluate", "none.jsonl"], "DatasetError: labels file none.jsonl does not exist"),
    ],
)
def test_errors_are_one_line_and_exit_code_1(tmp_path, monkeypatch, capsys, arguments, expected):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"depthlm: {expected}")
    assert error.count("\n") == 1


def test_a_damaged_index_is_an_error_of_one_line(tmp_path, capsys):
    write_bag(tmp_path / "bag", drive(1))
    (tmp_path / "bag" / "metadata.yaml").write_text("rubbish: [\n")
    assert main(["bag", "info", str(tmp_path / "bag")]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"depthlm: BagError: recording {tmp_path / 'bag'}") and error.count("\n") == 1


@pytest.mark.slow
def test_a_place_that_cannot_be_written_is_named(tmp_path, photograph, model, capsys):
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "cloud.ply"
    assert main(["estimate", photograph, "--fx", "60", "--model", model, "--device", "cpu", "--out", str(out)]) == 1
    assert f"depthlm: can't use {tmp_path / 'file'}" in capsys.readouterr().err


def test_a_reader_that_has_seen_enough_is_no_error(tmp_path):
    write_bag(tmp_path / "bag", drive(1))
    command = [sys.executable, "-m", "depthlm_ros.cli", "bag", "info", str(tmp_path / "bag")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.communicate()[1] == b""


def test_depth_suffix_is_checked_before_the_model_is_loaded(photograph, capsys):
    assert main(["estimate", photograph, "--fx", "60", "--out", "c.ply", "--depth", "d.tif"]) == 1
    assert "suffix '.tif'; use .npy or .png" in capsys.readouterr().err


def test_a_recording_without_truth_is_not_evaluated(tmp_path, capsys):
    write_bag(tmp_path / "bag", drive(1, truth=False))
    assert main(["evaluate", str(tmp_path / "bag"), "--model", "none"]) == 1
    assert "no ground truth" in capsys.readouterr().err


@pytest.mark.parametrize("write", [write_depthlm_labels, write_depthvlm_labels])
def test_from_images_records_either_schema(tmp_path, capsys, write):
    labels, out = write(tmp_path), tmp_path / "out"
    assert main(["bag", "from-images", str(labels), str(out), "--compressed", "png"]) == 0
    frames = list(read_frames(out))
    assert np.array_equal(frames[0].frame.image, picture(0))
    assert np.isfinite(frames[0].truth_m).sum() in (5, 16 * 12 - 1)
    printed = capsys.readouterr().out
    assert "/camera/image_raw/compressed" in printed
    assert ("assumed fy = fx" in printed) == (write is write_depthvlm_labels)


@pytest.mark.parametrize("folder", ["ibims1", "scannetpp"])
def test_from_images_records_the_photographs(tmp_path, data_folder, folder):
    assert main(["bag", "from-images", str(data_folder / folder / "labels.jsonl"), str(tmp_path / "bag")]) == 0
    info = bag_info(tmp_path / "bag")
    assert info.count(info.image_topic) == info.count(info.truth_topic) == {"ibims1": 12, "scannetpp": 6}[folder]


@pytest.mark.parametrize("form", [[], ["--depth-bits", "9", "--compressed", "jpeg:80"]])
def test_render_records_a_drive_and_how_to_make_it_again(tmp_path, form):
    size = ["--width", "64", "--height", "48", "--seconds", "1", "--fps", "3", "--seed", "4"]
    assert main(["bag", "render", str(tmp_path / "a"), *size, *form]) == 0
    program, *again = bag_info(tmp_path / "a").notes["made by"].replace("OUT", str(tmp_path / "b")).split()
    assert program == "depthlm" and main(again) == 0
    first, second = (list(read_frames(tmp_path / name)) for name in ("a", "b"))
    assert len(first) == 3
    assert [x.image_raw for x in first] == [x.image_raw for x in second]
    assert all(np.array_equal(x.truth_m, y.truth_m, equal_nan=True) for x, y in zip(first, second, strict=True))
    assert first[0].frame.camera.fx == pytest.approx(32 / np.tan(np.radians(35)))


def test_info_names_topics_and_camera(tmp_path, capsys):
    write_bag(tmp_path / "bag", drive(2))
    assert main(["bag", "info", str(tmp_path / "bag")]) == 0
    printed = capsys.readouterr().out
    assert "/camera/depth/ground_truth  sensor_msgs/msg/Image  2 messages" in printed
    assert "fx=60.0" in printed and "'front_optical_frame'" in printed


@pytest.mark.slow
@pytest.mark.parametrize("source", ["labels", "bag"])
def test_evaluate_asks_at_every_label(tmp_path, model, capsys, source):
    labels = write_depthlm_labels(tmp_path)
    if source == "bag":
        assert main(["bag", "from-images", str(labels), str(tmp_path / "bag")]) == 0
    path = labels if source == "labels" else tmp_path / "bag"
    out = tmp_path / "out"
    assert main(["evaluate", str(path), "--model", model, "--device", "cpu", "--out", str(out)]) == 0
    saved = json.loads((out / "metrics.json").read_text())
    assert (saved["compared"], saved["labels"], saved["depth"]["total"]) == (10, 10, 10)
    assert f"wrote {out / 'report.html'}" in capsys.readouterr().out


@pytest.mark.slow
def test_what_was_scored_before_a_faulty_row_is_kept(tmp_path, model, capsys):
    labels, out = write_depthlm_labels(tmp_path, images=3), tmp_path / "out"
    (tmp_path / "rgb" / "1.png").write_bytes(b"rubbish")
    assert main(["evaluate", str(labels), "--model", model, "--device", "cpu", "--out", str(out)]) == 1
    assert re.search(r"broke off after 1 images: .*1\.png can't be read", capsys.readouterr().out)
    saved = json.loads((out / "metrics.json").read_text())
    assert saved["compared"] == 5 and "1.png" in saved["broke_off"]


@pytest.mark.parametrize("command", ["replay", "evaluate"])
def test_a_command_that_fails_leaves_an_earlier_report_and_says_that_it_is_one(tmp_path, capsys, command):
    report = tmp_path / "out" / "report.html"
    report.parent.mkdir()
    report.write_text("earlier")
    assert main([command, str(tmp_path / "none"), "--out", str(report.parent)]) == 1
    assert "is that of an earlier run" in capsys.readouterr().err
    assert report.read_text() == "earlier"


def test_unknown_settings_are_refused_by_argparse(capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(["replay", "bag", "--stride", "0"])
    assert exit_info.value.code == 2
    assert "stride is 0" in capsys.readouterr().err
