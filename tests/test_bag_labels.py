"""A recording becomes a training set: labels where the camera saw a surface, split by time."""

import json

import numpy as np
import pytest
from PIL import Image
from recordings import CAMERA, STEP_NS, drive, floor_depth, picture

from depthlm_ros.bag_labels import LabelSettings, labels, make_set, rectified
from depthlm_ros.bags import START_NS, RecordedFrame, write_bag
from depthlm_ros.camera import Camera, Distortion
from depthlm_ros.cli import main
from depthlm_ros.datasets import LabelledImages
from depthlm_ros.depth import Frame
from depthlm_ros.errors import BagError, ConfigError


@pytest.fixture
def bag(tmp_path):
    write_bag(tmp_path / "bag", drive(10))
    return tmp_path / "bag"


def stamps(path):
    return [(json.loads(line)["stamp_ns"] - START_NS) // STEP_NS for line in path.read_text().splitlines()]


def test_labels_are_the_recorded_depth_at_its_pixels(bag, tmp_path):
    made = make_set(bag, tmp_path / "set", LabelSettings(points=50))
    assert (made.train, made.held_out, made.in_gap, made.labels) == (5, 2, 3, 350)
    rows = LabelledImages(tmp_path / "set" / "train.jsonl")
    assert rows.schema == "depthlm"
    for index, row in enumerate(rows):
        assert row.camera == CAMERA
        assert row.notes == ()
        assert np.array_equal(row.image, picture(index))
        columns, lines = row.pixels.astype(int).T
        assert len(set(zip(columns, lines, strict=True))) == 50
        assert row.depth_m == pytest.approx(floor_depth()[lines, columns], abs=1e-4)


def test_each_image_and_each_seed_draws_other_points(bag, tmp_path):
    drawn = []
    for seed in (0, 1):
        make_set(bag, tmp_path / str(seed), LabelSettings(points=20, seed=seed))
        drawn += [tuple(map(tuple, row.pixels)) for row in LabelledImages(tmp_path / str(seed) / "train.jsonl")]
    assert len(set(drawn)) == len(drawn)


def test_the_same_command_makes_the_same_set(bag, tmp_path):
    for name in ("a", "b"):
        make_set(bag, tmp_path / name, LabelSettings(points=20))
    assert (tmp_path / "a" / "train.jsonl").read_bytes() == (tmp_path / "b" / "train.jsonl").read_bytes()


def test_the_end_of_the_time_is_held_out_with_a_gap_before_it(bag, tmp_path):
    make_set(bag, tmp_path / "set", LabelSettings(held_out=0.34, gap_s=0.39))
    assert stamps(tmp_path / "set" / "train.jsonl") == [0, 1, 2, 3]
    assert stamps(tmp_path / "set" / "held_out.jsonl") == [6, 7, 8, 9]
    assert len(list((tmp_path / "set" / "images").iterdir())) == 8


def test_nothing_held_out_leaves_no_gap(bag, tmp_path):
    made = make_set(bag, tmp_path / "set", LabelSettings(held_out=0, every=3))
    assert (made.train, made.held_out, made.in_gap) == (4, 0, 0)
    assert stamps(tmp_path / "set" / "train.jsonl") == [0, 3, 6, 9]


def test_limits_leave_surfaces_out_and_say_how_many(bag, tmp_path):
    made = make_set(bag, tmp_path / "set", LabelSettings(points=0, min_depth_m=2, max_depth_m=10))
    depth = np.concatenate([row.depth_m for row in LabelledImages(tmp_path / "set" / "train.jsonl")])
    assert 2 <= depth.min() and depth.max() <= 10
    truth = floor_depth()
    assert made.dropped["beyond the depth limits"] == 10 * (np.isfinite(truth) & ~((truth >= 2) & (truth <= 10))).sum()


def test_of_points_in_one_pixel_the_nearest_stays():
    points = CAMERA.unproject(np.array([[10, 20], [10.3, 19.8], [11, 20], [-3, 5]]), np.array([5.0, 3.0, 4.0, 2.0]))
    pixels, depth_m = labels(points, CAMERA, LabelSettings())
    assert sorted(zip(map(tuple, pixels.tolist()), depth_m.round(6).tolist(), strict=True)) == [
        ((10, 20), 3.0),
        ((11, 20), 4.0),
    ]


def test_a_lens_is_taken_out_of_image_and_labels(tmp_path):
    lens = Camera(60, 60, 31.5, 23.5, 64, 48, Distortion("plumb_bob", (-0.35, 0.1, 0.001, -0.002, 0.0)))
    # A plane at 2 m with a bright spot, as the lens shows them: the label under the spot must be at the spot.
    pixel = np.array([54.0, 42.0])
    v, u = np.mgrid[0:48, 0:64]
    spot = np.exp(-((u - pixel[0]) ** 2 + (v - pixel[1]) ** 2) / 8)
    image = np.repeat((255 * spot).astype(np.uint8)[..., None], 3, axis=2)
    depth = np.where(spot > 0.99, 1.0, 2.0).astype(np.float32)
    write_bag(tmp_path / "bag", [RecordedFrame(Frame(image, lens, START_NS), depth)])
    make_set(tmp_path / "bag", tmp_path / "set", LabelSettings(points=0, held_out=0))
    row = LabelledImages(tmp_path / "set" / "train.jsonl")[0]
    assert row.camera.distortion.is_identity
    brightest = np.unravel_index(row.image[..., 0].argmax(), (48, 64))[::-1]
    (near,) = row.pixels[row.depth_m == 1.0]
    assert np.abs(near - brightest).max() <= 1
    assert np.abs(near - pixel).max() > 1, "the lens moves this pixel, so that the test means something"


def test_an_image_without_a_lens_is_passed_on_as_it_is():
    image = picture()
    assert rectified(image, CAMERA) is image


def test_images_can_be_jpeg(bag, tmp_path):
    make_set(bag, tmp_path / "set", LabelSettings(images="jpeg:95", held_out=0))
    files = sorted((tmp_path / "set" / "images").iterdir())
    assert [Image.open(file).format for file in files] == ["JPEG"] * 10
    assert len(LabelledImages(tmp_path / "set" / "train.jsonl")) == 10


def test_a_recording_without_depth_names_what_is_needed(tmp_path):
    write_bag(tmp_path / "bag", drive(2, truth=False))
    with pytest.raises(BagError, match="neither depth images nor .*PointCloud2 among .*--depth"):
        make_set(tmp_path / "bag", tmp_path / "set")


def test_images_without_depth_are_counted(tmp_path):
    frames = [RecordedFrame(f.frame, None if i % 2 else f.truth_m) for i, f in enumerate(drive(6))]
    write_bag(tmp_path / "bag", frames)
    made = make_set(tmp_path / "bag", tmp_path / "set", LabelSettings(held_out=0))
    assert (made.train, made.left_out) == (3, {"no depth image of its time": 3})
    assert json.loads((tmp_path / "set" / "about.json").read_text())["left_out"] == made.left_out


def test_a_set_without_any_label_is_refused_and_leaves_nothing(bag, tmp_path):
    with pytest.raises(BagError, match="no image .* could be labelled .*depth limits"):
        make_set(bag, tmp_path / "set", LabelSettings(min_depth_m=90))
    assert [path.name for path in tmp_path.iterdir()] == ["bag"]


def test_an_existing_folder_is_not_overwritten(bag, tmp_path):
    (tmp_path / "set").mkdir()
    with pytest.raises(BagError, match="exists already"):
        make_set(bag, tmp_path / "set")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"points": -1}, "points is -1"),
        ({"min_depth_m": 5, "max_depth_m": 2}, "5 to 2 m"),
        ({"every": 0}, "every is 0"),
        ({"held_out": 1.0}, "held_out is 1.0"),
        ({"gap_s": -1}, "gap_s is -1"),
    ],
)
def test_settings_out_of_range_are_refused(changes, told):
    with pytest.raises(ConfigError, match=told):
        LabelSettings(**changes)


def test_the_command_says_what_it_made(bag, tmp_path, capsys):
    assert main(["bag", "to-sft", str(bag), str(tmp_path / "set"), "--points", "20"]) == 0
    printed = capsys.readouterr().out
    assert "140 labels from /camera/depth/ground_truth" in printed
    assert "train.jsonl 5 images, held_out.jsonl 2, 3 between them left out" in printed
    assert main(["bag", "to-sft", str(bag), str(tmp_path / "set")]) == 1
    assert "BagError" in capsys.readouterr().err
