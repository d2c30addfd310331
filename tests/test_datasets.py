"""Labelled photographs of both published schemas become images with depth at their own pixels."""

import json

import numpy as np
import pytest
from PIL import Image
from recordings import picture, write_depthlm_labels, write_depthvlm_labels

from depthlm_ros.datasets import LabelledImages
from depthlm_ros.errors import DatasetError


def test_depthlm_rows_give_their_points_and_intrinsics(tmp_path):
    rows = LabelledImages(write_depthlm_labels(tmp_path))
    assert (rows.schema, len(rows)) == ("depthlm", 2)
    row = rows[1]
    written = json.loads((tmp_path / "labels.jsonl").read_text().splitlines()[1])
    assert np.array_equal(row.image, picture(1))
    assert (row.camera.fx, row.camera.fy, row.camera.cx, row.camera.cy) == (60, 62, 31, 24.5)
    assert row.pixels.tolist() == written["pixel_coords"]
    assert row.depth_m.tolist() == pytest.approx(written["depth"])


def test_depth_map_holds_labels_and_nothing_else(tmp_path):
    row = LabelledImages(write_depthlm_labels(tmp_path))[0]
    depth_map = row.depth_map()
    columns, rows = row.pixels.astype(int).T
    assert np.isfinite(depth_map).sum() == len(row.depth_m)
    assert depth_map[rows, columns].tolist() == row.depth_m.tolist()


def test_nearer_surface_wins_where_two_labels_share_a_pixel(tmp_path):
    path = write_depthlm_labels(tmp_path, pixel_coords=[[5, 6], [5, 6], [5, 6]], depth=[3.0, 2.0, 4.0])
    assert LabelledImages(path)[0].depth_map()[6, 5] == 2.0


def test_depthvlm_map_lands_on_the_centres_of_its_pixels(tmp_path):
    row = LabelledImages(write_depthvlm_labels(tmp_path))[0]
    # One depth pixel covers 4x4 image pixels: its centre is 1.5 pixels from the block's first.
    first = np.flatnonzero((row.depth_m * 1000).round() == 1000 + 2 * 16 + 3)[0]
    assert row.pixels[first].tolist() == [3 * 4 + 1.5, 2 * 4 + 1.5]
    assert len(row.depth_m) == 16 * 12 - 1


def test_depthvlm_says_what_it_assumed_about_the_camera(tmp_path):
    row = LabelledImages(write_depthvlm_labels(tmp_path))[0]
    assert (row.camera.fx, row.camera.fy, row.camera.cx, row.camera.cy) == (60, 60, 31.5, 23.5)
    assert any("fy, cx and cy are absent" in note for note in row.notes)


def test_depthvlm_focal_length_follows_the_size_of_the_stored_image(tmp_path):
    path = write_depthvlm_labels(tmp_path, original_rgb_size=[128, 96], original_fx=120.0)
    assert LabelledImages(path)[0].camera.fx == 60


def test_depthvlm_mask_removes_labels(tmp_path):
    path = write_depthvlm_labels(tmp_path, mask_valid_path="mask.png")
    mask = np.full((12, 16), 255, np.uint8)
    mask[:6] = 0
    Image.fromarray(mask).save(tmp_path / "depth" / "mask.png")
    assert len(LabelledImages(path)[0].depth_m) == 16 * 6


def test_raw_float_depth_is_metres(tmp_path):
    path = write_depthvlm_labels(tmp_path, depth_format="binary_float32", depth_path="a.bin", depth_scale=1.0)
    values = np.full((12, 16), 2.5, np.float32)
    values[0, 0] = np.inf
    values.tofile(tmp_path / "depth" / "a.bin")
    row = LabelledImages(path)[0]
    assert set(row.depth_m.tolist()) == {2.5}
    assert len(row.depth_m) == 16 * 12 - 1


def test_euclidean_labels_become_z_depth(tmp_path):
    path = write_depthlm_labels(tmp_path)
    as_z, as_distance = LabelledImages(path)[0], LabelledImages(path, depth_kind="euclidean")[0]
    rays = as_z.camera.rays(as_z.pixels)
    assert as_distance.depth_m * np.linalg.norm(rays, axis=1) == pytest.approx(as_z.depth_m, rel=1e-6)


def test_labels_that_cannot_be_used_are_counted_in_a_note(tmp_path):
    path = write_depthlm_labels(tmp_path, pixel_coords=[[70, 3], [1, 1], [2, 2]], depth=[1.0, 0.0, 3.0])
    row = LabelledImages(path)[0]
    assert row.depth_m.tolist() == [3.0]
    assert "1 of 3 labels lie outside the image" in row.notes[0]
    assert "1 of 3 labels are not positive" in row.notes[1]


def test_image_key_of_the_matterport_script_is_understood(tmp_path):
    path = write_depthlm_labels(tmp_path, images=1)
    row = json.loads(path.read_text())
    row["image_path"] = row.pop("image")
    path.write_text(json.dumps(row))
    assert LabelledImages(path)[0].name == "rgb/0.png"


def test_a_slash_before_a_name_does_not_lead_out_of_the_folder(tmp_path):
    assert LabelledImages(write_depthlm_labels(tmp_path, image="/rgb/0.png"))[0].name == "/rgb/0.png"
    whole = LabelledImages(write_depthlm_labels(tmp_path, image=str(tmp_path / "rgb" / "1.png")))
    assert np.array_equal(whole[0].image, picture(1))


@pytest.mark.parametrize("focal_px", [[0, 62], [62, 0]])
def test_a_focal_length_of_zero_is_the_other_one_as_the_authors_repair_it(tmp_path, focal_px):
    row = LabelledImages(write_depthlm_labels(tmp_path, intrinsics=[*focal_px, 31, 24.5, 64, 48]))[0]
    assert (row.camera.fx, row.camera.fy) == (62, 62)
    assert row.notes == ("a focal length of 0 was taken to be the other one",)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "is empty"),
        ("{broken", "labels.jsonl:1 is not JSON"),
        ("[1, 2]", "holds a list"),
        ('{"picture": "a.png"}', r"has rows with the keys \['picture'\]"),
    ],
)
def test_a_file_of_another_kind_is_refused(tmp_path, text, expected):
    path = tmp_path / "labels.jsonl"
    path.write_text(text)
    with pytest.raises(DatasetError, match=expected):
        LabelledImages(path)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"image": "rgb/none.png"}, "'rgb/none.png' was not found .* --images"),
        ({"intrinsics": [60, 60, 32, 24, 640, 480]}, "64x48 but its intrinsics are for 640x480"),
        ({"intrinsics": [60, 60, 32]}, r"intrinsics are \[60, 60, 32\]"),
        ({"depth": [1.0]}, "5 pixel_coords but 1 depths"),
        ({"depth": ["far", 1, 1, 1, 1]}, "wrong type"),
    ],
)
def test_a_faulty_row_is_named_with_its_line(tmp_path, changes, expected):
    rows = LabelledImages(write_depthlm_labels(tmp_path, **changes))
    with pytest.raises(DatasetError, match=rf"labels.jsonl:2.*{expected}"):
        rows[1]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"depth_path": "none.png"}, "--depths"),
        ({"depth_scale": 0}, "depth_scale is 0"),
        ({"depth_path": "n" * 5000}, "is no file name|was not found"),
        ({"original_rgb_size": [64, 64]}, "another shape than original_rgb_size 64x64"),
        ({"original_rgb_size": [0, 0]}, r"original_rgb_size is \[0, 0\]"),
        ({"depth_format": "binary_float32"}, "floats, not 16x12|multiple"),
    ],
)
def test_a_faulty_depth_map_is_named(tmp_path, changes, expected):
    rows = LabelledImages(write_depthvlm_labels(tmp_path, **changes))
    with pytest.raises(DatasetError, match=expected):
        rows[0]


@pytest.mark.parametrize("name", ["depth.png", "mask.png"])
def test_a_damaged_map_or_mask_is_named(tmp_path, name):
    path = write_depthvlm_labels(tmp_path, depth_path="depth.png", mask_valid_path="mask.png")
    for file in ("depth.png", "mask.png"):
        Image.fromarray(np.full((12, 16), 255, np.uint8)).save(tmp_path / "depth" / file)
    damaged = bytearray((tmp_path / "depth" / name).read_bytes())
    damaged[37:41] = b"\0\0\0\0"  # the type of the chunk with the pixels
    (tmp_path / "depth" / name).write_bytes(damaged)
    with pytest.raises(DatasetError, match=f"{name} can't be read"):
        LabelledImages(path)[0]


def test_a_missing_key_is_named(tmp_path):
    path = write_depthvlm_labels(tmp_path)
    row = json.loads(path.read_text())
    del row["depth_scale"]
    path.write_text(json.dumps(row))
    with pytest.raises(DatasetError, match="'depth_scale' is missing"):
        LabelledImages(path)[0]


def test_ibims_photographs(data_folder):
    rows = LabelledImages(data_folder / "ibims1" / "labels.jsonl")
    assert (rows.schema, len(rows)) == ("depthlm", 12)
    assert all(len(row.depth_m) == 100 and not row.notes for row in rows)


def test_scannetpp_listed_points_agree_with_the_map_at_their_place_in_the_image(data_folder):
    path = data_folder / "scannetpp" / "labels.jsonl"
    rows = LabelledImages(path)
    assert rows.schema == "depthvlm"
    for row, line in zip(rows, path.read_text().splitlines(), strict=True):
        listed = json.loads(line)
        assert row.image.shape == (1440, 1920, 3)
        # The list is in pixels of the 256x192 map, 7.5 image pixels each.
        u, v = np.rint((np.array(listed["pixel_coords"]) + 0.5) * 7.5 - 0.5).astype(int).T
        assert row.depth_map()[v, u] == pytest.approx(np.array(listed["depth"]), abs=0.006)
