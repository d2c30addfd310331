"""Training data: bad rows are told by cause, draws depend on the counter alone, workers give what one process gives."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from recordings import picture, write_depthlm_labels, write_depthvlm_labels

from depthlm_ros.camera import Camera
from depthlm_ros.errors import CameraError, ConfigError, DatasetError
from depthlm_ros.pose import QUESTIONS
from depthlm_training.data import Loader, Mixture, floor_sum, permuted
from depthlm_training.mixtures import open_mixture
from depthlm_training.rows import BadRow, BadRows, JsonLines
from depthlm_training.sources import CAUSES, DialogueSource, Example, LabelledSource, SceneSource

CAMERA = Camera(fx=60, fy=62, cx=31, cy=24.5, width=64, height=48)
SAME_FOLDER = settings(
    deadline=None,
    max_examples=40,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
SHORT = settings(deadline=None, max_examples=12)


@dataclass(frozen=True)
class Numbers:
    """A source whose examples are their own numbers; some are bad."""

    count: int
    bad: frozenset[int] = frozenset()
    name: str = "numbers"

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Example:
        if index in self.bad:
            raise BadRow(f"{self.name}:{index}", CAUSES[index % len(CAUSES)], "bad")
        image = np.full((2, 2, 3), index % 256, np.uint8)
        return Example(f"{self.name}:{index}", (image,), (None,), np.zeros((0, 2), np.float32), np.zeros(0, np.float32))


def name_of_draw(mixture: Mixture, k: int) -> str:
    return mixture.example(k).name


def equal(one: Example, other: Example) -> bool:
    fields = ("images", "pixels", "depth_m")
    arrays = all(np.array_equal(getattr(one, name), getattr(other, name)) for name in fields)
    return arrays and (one.name, one.cameras, one.dialogue) == (other.name, other.cameras, other.dialogue)


def the_bad_row(path: Path, depth_kind: str = "z") -> BadRow:
    with pytest.raises(BadRow) as caught:
        LabelledSource(path, depth_kind=depth_kind)[0]
    return caught.value


# Rows


def test_a_row_of_points_is_read_as_it_stands(tmp_path):
    example = LabelledSource(write_depthlm_labels(tmp_path), depth_kind="z")[1]
    row = json.loads((tmp_path / "labels.jsonl").read_text().splitlines()[1])
    assert example.name == f"{tmp_path / 'labels.jsonl'}:2"
    assert np.array_equal(example.images[0], picture(1))
    assert example.cameras == (CAMERA,)
    assert example.pixels.tolist() == row["pixel_coords"]
    assert example.depth_m.tolist() == pytest.approx(row["depth"])


def test_points_are_scattered_exactly(tmp_path):
    example = LabelledSource(write_depthlm_labels(tmp_path), depth_kind="z")[0]
    columns, rows = example.pixels.astype(int).T
    expected = np.full((48, 64), np.nan, np.float32)
    expected[rows, columns] = example.depth_m
    assert np.array_equal(example.depth_map(), expected, equal_nan=True)


def test_distances_along_the_ray_become_z_depth(tmp_path):
    path = write_depthlm_labels(tmp_path, pixel_coords=[[61, 24]], depth=[2.0])
    example = LabelledSource(path, depth_kind="euclidean")[0]
    assert example.depth_m[0] == pytest.approx(2 / math.sqrt(1 + (30 / 60) ** 2 + (0.5 / 62) ** 2))


def test_a_depth_map_gives_a_label_for_each_of_its_known_pixels(tmp_path):
    example = LabelledSource(write_depthvlm_labels(tmp_path), depth_kind="z")[0]
    assert len(example.depth_m) == 16 * 12 - 1
    assert [1.5 + 4, 1.5] in example.pixels.tolist()


def test_the_kind_of_depth_must_be_named(tmp_path):
    with pytest.raises(ConfigError, match="did you mean 'euclidean'"):
        LabelledSource(write_depthlm_labels(tmp_path), depth_kind="euclid")


@pytest.mark.parametrize(
    ("changes", "cause", "seen"),
    [
        ({"image": "rgb/absent.png"}, "missing image", "absent.png"),
        ({"image": "../rgb/0.png"}, "path escapes folder", "../rgb/0.png"),
        ({"image": "rgb/../../elsewhere.png"}, "path escapes folder", "may lead out"),
        ({"image": "rgb/../rgb/0.png"}, "path escapes folder", "may lead out"),
        ({"image": "x" * 5000}, "missing image", "xxx"),
        ({"image": "\0"}, "missing image", ""),
        ({"image": "/../elsewhere.png"}, "path escapes folder", "may lead out"),
        ({"image": __file__}, "path escapes folder", "lies outside"),
        ({"pixel_coords": [[1, 1], [64, 3]], "depth": [1, 2]}, "point outside", "[64.0, 3.0]"),
        ({"pixel_coords": [[1, -1]], "depth": [1]}, "point outside", "[1.0, -1.0]"),
        ({"pixel_coords": [[math.nan, 1]], "depth": [1]}, "point outside", "nan"),
        ({"pixel_coords": [[1, 1], [2, 2]], "depth": [1, math.nan]}, "non-finite depth", "nan"),
        ({"pixel_coords": [[1, 1]], "depth": [math.inf]}, "non-finite depth", "inf"),
        ({"pixel_coords": [[1, 1]], "depth": [-2.5]}, "non-positive depth", "-2.5 m"),
        ({"pixel_coords": [[1, 1]], "depth": [0]}, "non-positive depth", "0 m"),
        ({"pixel_coords": [[1, 1]], "depth": [1e-60]}, "no labels", "no pixel has a depth"),
        ({"intrinsics": [0, 62, 31, 24.5, 64, 48]}, "zero focal", "[0, 62]"),
        ({"intrinsics": [60, 0, 31, 24.5, 64, 48]}, "zero focal", "[60, 0]"),
        ({"intrinsics": [-60, 62, 31, 24.5, 64, 48]}, "unusable camera", "-60"),
        ({"intrinsics": [60, 62, math.nan, 24.5, 64, 48]}, "unusable camera", "nan"),
        ({"intrinsics": [60, 62, 31, 24.5, 65, 48]}, "malformed row", "65x48"),
        ({"intrinsics": [60, 62]}, "malformed row", ""),
        ({"pixel_coords": [[1, 1]], "depth": [1, 2]}, "malformed row", "1 pixel_coords but 2 depths"),
        ({"depth": "near"}, "malformed row", "near"),
        ({"image": 7}, "malformed row", ""),
        ({"image": None}, "malformed row", ""),
        ({"pixel_coords": [], "depth": []}, "no labels", ""),
    ],
)
def test_a_bad_row_of_points_is_told_by_its_cause(tmp_path, changes, cause, seen):
    (tmp_path / "set").mkdir()
    picture_file = tmp_path / "elsewhere.png"
    Image.fromarray(picture()).save(picture_file)
    bad = the_bad_row(write_depthlm_labels(tmp_path / "set", **changes))
    assert bad.cause == cause
    assert seen in bad.what
    assert str(bad).startswith(f"{tmp_path / 'set' / 'labels.jsonl'}:1: ")


def test_distances_that_vanish_along_their_ray_are_no_depths(tmp_path):
    assert the_bad_row(write_depthvlm_labels(tmp_path, original_fx=1e-50), "euclidean").cause == "non-positive depth"


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"depth_path": "absent.png"}, "missing depth map"),
        ({"depth_path": "../../a.png"}, "path escapes folder"),
        ({"mask_valid_path": "absent.png"}, "missing depth map"),
        ({"original_fx": 0}, "zero focal"),
        ({"original_fx": -3.0}, "unusable camera"),
        ({"original_fx": "wide"}, "malformed row"),
        ({"depth_scale": 0}, "malformed row"),
        ({"original_rgb_size": [64, 64]}, "malformed row"),
        ({"original_rgb_size": [0, 0]}, "malformed row"),
    ],
)
def test_a_bad_row_with_a_depth_map_is_told_by_its_cause(tmp_path, changes, cause):
    assert the_bad_row(write_depthvlm_labels(tmp_path, **changes)).cause == cause


def test_truncated_files_are_told_from_missing_ones(tmp_path):
    path = write_depthvlm_labels(tmp_path)
    for file, cause in (("depth/a.png", "truncated depth map"), ("rgb/a.png", "truncated image")):
        whole = (tmp_path / file).read_bytes()
        (tmp_path / file).write_bytes(whole[: len(whole) // 2])
        assert the_bad_row(path).cause == cause


def test_a_broken_chunk_is_told_as_a_truncated_file_too(tmp_path):
    path = write_depthvlm_labels(tmp_path)
    for file, cause in (("depth/a.png", "truncated depth map"), ("rgb/a.png", "truncated image")):
        content = bytearray((tmp_path / file).read_bytes())
        # The length of the chunk of pixels: what follows too early is no chunk.
        content[content.index(b"IDAT") - 1] = 8
        content[content.index(b"IDAT") - 2] = 0
        (tmp_path / file).write_bytes(content)
        assert the_bad_row(path).cause == cause


def test_a_map_without_a_known_pixel_has_no_labels(tmp_path):
    path = write_depthvlm_labels(tmp_path)
    Image.fromarray(np.zeros((12, 16), np.uint16)).save(tmp_path / "depth" / "a.png")
    assert the_bad_row(path).cause == "no labels"


@pytest.mark.parametrize("line", [b"{broken", b"[1, 2]", b"\xff\xfe\xfa", b"[" * 100_000])
def test_a_line_that_is_no_json_object_is_one_bad_row_among_good_ones(tmp_path, line):
    path = write_depthlm_labels(tmp_path)
    path.write_bytes(line + b"\n" + path.read_bytes())
    source = LabelledSource(path, depth_kind="z")
    assert len(source) == 3
    assert the_bad_row(path).cause == "not json"
    assert source[1].images[0].shape == (48, 64, 3)


def test_empty_lines_are_no_rows_and_the_last_needs_no_end(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\n{"a": 1}\r\n  \n{"a": 2}')
    assert [row["a"] for row in JsonLines(path)] == [1, 2]


@pytest.mark.parametrize(("text", "expected"), [("", "is empty"), ('{"picture": 1}', "neither"), ("[]", "no JSON obj")])
def test_a_file_of_another_kind_is_refused_at_once(tmp_path, text, expected):
    path = tmp_path / "labels.jsonl"
    path.write_text(text)
    with pytest.raises(DatasetError, match=expected):
        LabelledSource(path, depth_kind="z")


def test_links_inside_the_folder_are_followed(tmp_path):
    path = write_depthlm_labels(tmp_path / "real")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "labels.jsonl").write_bytes(path.read_bytes())
    (tmp_path / "set" / "rgb").symlink_to(tmp_path / "real" / "rgb")
    assert len(LabelledSource(tmp_path / "set" / "labels.jsonl", depth_kind="z")[0].pixels) == 5


def test_a_part_of_the_rows_keeps_their_line_numbers(tmp_path):
    path = write_depthlm_labels(tmp_path, images=10)
    train, rest = (LabelledSource(path, depth_kind="z", part=part) for part in ((0, 0.75), (0.75, 1)))
    assert (len(train), len(rest)) == (7, 3)
    assert rest[0].name.endswith("labels.jsonl:8")
    with pytest.raises(ConfigError, match="holds none"):
        LabelledSource(path, depth_kind="z", part=(0.5, 0.5))


def test_labels_out_of_range_are_left_out(tmp_path):
    path = write_depthlm_labels(tmp_path)
    source = LabelledSource(path, depth_kind="z", range_m=(1.3, 2.0))
    assert source[0].depth_m.tolist() == pytest.approx([1.37, 1.74])
    with pytest.raises(BadRow, match="none of 5 labels"):
        LabelledSource(path, depth_kind="z", range_m=(50, 60))[0]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=8,
)


@SAME_FOLDER
@given(data=st.data(), schema=st.sampled_from([(write_depthlm_labels, "depthlm"), (write_depthvlm_labels, "depthvlm")]))
def test_whatever_stands_in_a_row_it_is_an_example_or_a_bad_row(tmp_path, data, schema):
    write, name = schema
    folder = tmp_path / name
    rows = json.loads(write(folder).read_text().splitlines()[0])
    key = data.draw(st.sampled_from(sorted(rows)))
    path = folder / "labels.jsonl"
    path.write_text(json.dumps(rows) + "\n" + json.dumps({**rows, key: data.draw(json_values)}) + "\n")
    try:
        example = LabelledSource(path, depth_kind="euclidean")[1]
    except BadRow as bad:
        assert bad.cause in CAUSES
    else:
        assert len(example.depth_m) > 0
        assert np.isfinite(example.depth_m).all()
        assert (example.depth_m > 0).all()
        assert example.cameras[0].contains(example.pixels).all()


@SAME_FOLDER
@given(data=st.data(), file=st.sampled_from(["rgb/a.png", "depth/a.png"]))
def test_a_damaged_file_is_an_example_or_a_bad_row(tmp_path, data, file):
    path = write_depthvlm_labels(tmp_path)
    content = bytearray((tmp_path / file).read_bytes())
    for _ in range(data.draw(st.integers(0, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / file).write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        LabelledSource(path, depth_kind="z")[0]
    except BadRow as bad:
        assert bad.cause in ("truncated image", "truncated depth map", "malformed row", "no labels")


# Words


def write_rows(folder: Path, *rows: dict) -> Path:
    for index in range(2):
        Image.fromarray(picture(index)).save(folder / f"{index}.png")
    path = folder / "words.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_dialogue_about_an_image_and_about_a_pair(tmp_path):
    intrinsics = [60, 62, 31, 24.5, 64, 48]
    one = {"image": "0.png", "intrinsics": intrinsics, "dialogue": [["How many chairs?", "Four."], ["Why?", "So."]]}
    two = {"images": ["0.png", "1.png"], "dialogue": [["Same room?", "Yes."]]}
    first, second = DialogueSource(write_rows(tmp_path, one, two))
    assert first.dialogue == (("How many chairs?", "Four."), ("Why?", "So."))
    assert first.cameras == (CAMERA,)
    assert len(first.pixels) == len(first.depth_m) == 0
    assert second.cameras == (None, None)
    assert all(np.array_equal(image, picture(i)) for i, image in enumerate(second.images))


def test_vlm3s_rows_of_objects_correspondences_and_poses_are_understood(tmp_path):
    pair = {"image_1": "0.png", "image_2": "1.png"}
    matches = [{"img1_norm_1000": [10, 20], "img2_norm_1000": [30, 40]}]
    said = [
        {
            "question_id": "rotation_angle",
            "question": QUESTIONS["rotation_angle"],
            "answer": "Rotation angle: 9.0 degrees",
        }
    ]
    rows = (
        {"image": "0.png", "prompt": "Is it red?", "answer": "Correct."},
        {**pair, "correspondences": matches},
        {**pair, "qa_pairs": said},
    )
    objects, corresponding, pose = DialogueSource(write_rows(tmp_path, *rows))
    assert objects.dialogue == (("Is it red?", "Correct."),)
    ((question, answer),) = corresponding.dialogue
    assert "corresponds to pixel (10, 20) in the first image" in question
    assert answer == "The corresponding pixel is (30, 40)"
    assert pose.dialogue == ((QUESTIONS["rotation_angle"], "Rotation angle: 9.0 degrees"),)
    assert len(pose.images) == 2


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"image": "2.png"}, "missing image"),
        ({"image": "../0.png"}, "path escapes folder"),
        ({"dialogue": []}, "no labels"),
        ({"dialogue": [["only a question"]]}, "malformed row"),
        ({"dialogue": None}, "malformed row"),
        ({"intrinsics": [60, 0, 31, 24.5, 64, 48]}, "zero focal"),
        ({"intrinsics": [60, 62, 31, 24.5, 65, 48]}, "unusable camera"),
        ({"intrinsics": []}, "malformed row"),
        ({"images": []}, "malformed row"),
        ({"images": ["x" * 5000]}, "missing image"),
        ({"correspondences": [{"img1_norm_1000": [10, 2000], "img2_norm_1000": [1, 1]}]}, "malformed row"),
    ],
)
def test_a_bad_row_of_words_is_told_by_its_cause(tmp_path, changes, cause):
    path = write_rows(tmp_path, {"image": "0.png", "dialogue": [["a", "b"]], **changes})
    with pytest.raises(BadRow) as caught:
        DialogueSource(path)[0]
    assert caught.value.cause == cause


@SAME_FOLDER
@given(data=st.data())
def test_whatever_stands_in_a_row_of_words_it_is_an_example_or_a_bad_row(tmp_path, data):
    row = {"image": "0.png", "intrinsics": [60, 62, 31, 24.5, 64, 48], "dialogue": [["a", "b"]]}
    key = data.draw(st.sampled_from([*row, "images", "image_1", "correspondences", "qa_pairs", "prompt"]))
    source = DialogueSource(write_rows(tmp_path, {**row, key: data.draw(json_values)}))
    try:
        assert source[0].dialogue
    except BadRow as bad:
        assert bad.cause in CAUSES


# Scenes


def test_a_scene_is_the_same_whenever_it_is_rendered_and_another_in_another_split():
    cameras = [Camera(50, 50, 31.5, 23.5, 64, 48), Camera(80, 75, 30, 20, 60, 40)]
    make = partial(SceneSource, 3, count=6, cameras=cameras)
    once, again, held_out = make(split="train"), make(split="train"), make(split="held_out")
    assert all(equal(once[index], again[index]) for index in (5, 0, 3))
    assert not np.array_equal(once[0].images[0], held_out[0].images[0])
    assert {example.cameras[0] for example in once} == set(cameras)
    for example in once:
        camera = example.cameras[0]
        assert example.images[0].shape == (camera.height, camera.width, 3)


def test_chosen_points_of_a_scene_have_the_depth_that_all_its_pixels_have():
    whole = SceneSource(1, "train", 2, [CAMERA])[1]
    some = SceneSource(1, "train", 2, [CAMERA], points=20)[1]
    assert some.pixels.shape == (20, 2)
    assert len({tuple(pixel) for pixel in some.pixels.tolist()}) == 20
    columns, rows = some.pixels.astype(int).T
    assert np.array_equal(whole.depth_map()[rows, columns], some.depth_m)


# Bad rows


def test_a_row_is_bad_once_however_often_it_is_drawn():
    rows = BadRows(2, 100)
    for _ in range(5):
        rows.add("a:1", "not json")
        rows.add("a:2", "missing image")
    assert rows.counts() == {"not json": 1, "missing image": 1}


def test_beyond_the_limit_the_list_of_rows_ends_the_run():
    rows = BadRows(0.03, 100)
    found = [("a:1", "not json"), ("a:2", "missing image"), ("b:7", "missing image")]
    rows.merge(found)
    with pytest.raises(DatasetError) as caught:
        rows.add("b:9", "zero focal")
    message = str(caught.value)
    assert "4 of 100 rows can't be trained on, more than the 3 allowed" in message
    assert "missing image: 2 (a:2, b:7)" in message
    assert "not json: 1 (a:1)" in message
    assert "zero focal: 1 (b:9)" in message


def test_a_limit_of_none_ends_the_run_at_the_first_bad_row():
    with pytest.raises(DatasetError, match="1 of 10 rows"):
        BadRows(0, 10).add("a:1", "not json")
    with pytest.raises(ConfigError, match="-1"):
        BadRows(-1, 10)


def test_a_long_list_names_the_first_rows_and_counts_the_others():
    rows = BadRows(100, 1000)
    rows.merge((f"a:{i}", "not json") for i in range(50))
    assert "not json: 50 (a:0, " in rows.report()
    assert "a:9, ...)" in rows.report()


# Mixtures

mixtures = st.lists(st.tuples(st.integers(1, 60), st.floats(0.05, 5)), min_size=1, max_size=5)


def mixture_of(sizes_and_weights, seed: int) -> Mixture:
    sources = [Numbers(size, name=f"source {i}") for i, (size, _) in enumerate(sizes_and_weights)]
    return Mixture(sources, [weight for _, weight in sizes_and_weights], seed)


@given(st.integers(0, 60), st.integers(1, 40), st.integers(0, 90), st.integers(0, 90))
def test_floor_sum_is_the_sum_term_by_term(count, divisor, factor, offset):
    assert floor_sum(count, divisor, factor, offset) == sum((factor * i + offset) // divisor for i in range(count))


@given(st.integers(1, 400), st.integers(0, 5))
def test_a_shuffle_holds_each_number_once(length, key):
    assert sorted(permuted(i, length, (key,)) for i in range(length)) == list(range(length))


def test_shuffles_put_each_number_everywhere():
    length, shuffles = 7, 3000
    places = np.zeros((length, length), int)
    for key in range(shuffles):
        for i in range(length):
            places[i, permuted(i, length, (key,))] += 1
    # Each count is binomial with a standard deviation of 19; five of them leave a true shuffle in peace.
    assert np.abs(places - shuffles / length).max() < 5 * math.sqrt(shuffles / length * (1 - 1 / length))


@SHORT
@given(mixtures, st.integers(0, 1000))
def test_frequencies_follow_the_weights_without_drift(sizes_and_weights, seed):
    mixture = mixture_of(sizes_and_weights, seed)
    total = sum(weight for _, weight in sizes_and_weights)
    counted = Counter()
    for blocks in range(1, 6):
        counted.update(mixture.draw(k)[0] for k in range(256 * (blocks - 1), 256 * blocks))
        for source, (_, weight) in enumerate(sizes_and_weights):
            assert abs(counted[source] - 256 * blocks * weight / total) < 5


def test_far_into_a_run_the_weights_still_hold():
    mixture = mixture_of([(1000, 0.006), (50, 1.0), (9, 0.21)], 4)
    start = 256 * 10**8
    counted = Counter(mixture.draw(k)[0] for k in range(start, start + 256 * 20))
    for source, weight in enumerate((0.006, 1.0, 0.21)):
        assert abs(counted[source] - 256 * 20 * weight / 1.216) < 6


@SHORT
@given(mixtures, st.integers(0, 1000))
def test_each_row_of_a_source_comes_once_in_each_of_its_epochs(sizes_and_weights, seed):
    mixture = mixture_of(sizes_and_weights, seed)
    # Whole blocks, within which draws are shuffled: an epoch may begin in one and end in the next.
    draws = Counter(mixture.draw(k) for k in range(1024))
    for source, (size, _) in enumerate(sizes_and_weights):
        rows = [draws[source, row] for row in range(size)]
        assert max(rows) - min(rows) <= 1


def test_without_weights_an_epoch_of_the_mixture_is_one_of_each_source():
    mixture = Mixture([Numbers(3 * 256), Numbers(256)], seed=2)
    assert len(mixture) == 1024
    counted = Counter(mixture.draw(k)[0] for k in range(1024))
    assert abs(counted[0] - 768) < 3


def test_another_epoch_is_another_order_and_another_seed_too():
    mixture, other = Mixture([Numbers(256)], seed=0), Mixture([Numbers(256)], seed=1)
    first, second = ([mixture.draw(k)[1] for k in range(start, start + 256)] for start in (0, 256))
    assert sorted(first) == sorted(second) == list(range(256))
    assert first != second
    assert first != [other.draw(k)[1] for k in range(256)]


def test_a_source_of_no_weight_is_never_drawn():
    mixture = Mixture([Numbers(5), Numbers(5), Numbers(5)], [0, 1, 0])
    assert {mixture.draw(k)[0] for k in range(500)} == {1}


@SHORT
@given(mixtures, st.integers(0, 99), st.integers(0, 300), st.integers(1, 300), st.integers(1, 5))
def test_the_draws_of_all_ranks_are_those_of_one_process(sizes_and_weights, seed, position, count, ranks):
    alone = mixture_of(sizes_and_weights, seed)
    stop = position + count
    shards = [
        dict(Loader(mixture_of(sizes_and_weights, seed).draw, 0, position + rank, stop, ranks)) for rank in range(ranks)
    ]
    together = {k: drawn for shard in shards for k, drawn in shard.items()}
    assert sum(map(len, shards)) == len(together) == count
    assert together == {k: alone.draw(k) for k in range(position, stop)}


@SHORT
@given(mixtures, st.integers(0, 99), st.integers(0, 200))
def test_a_run_that_resumes_goes_on_with_the_same_draws(sizes_and_weights, seed, k):
    whole = list(Loader(mixture_of(sizes_and_weights, seed).draw, 0, 0, 200))
    assert list(Loader(mixture_of(sizes_and_weights, seed).draw, 0, k, 200)) == whole[k:]


def test_a_bad_row_is_replaced_by_another_of_its_source_that_the_counter_decides():
    bad = frozenset(range(0, 40, 4))
    make = partial(Mixture, [Numbers(40, bad, "a"), Numbers(40, frozenset(), "b")], [3, 1], seed=5, bad_rows=0.2)
    mixture, again = make(), make()
    names = [name_of_draw(mixture, k) for k in range(300)]
    assert [name_of_draw(again, k) for k in reversed(range(300))] == names[::-1]
    drawn = [mixture.draw(k) for k in range(300)]
    assert [name[0] for name in names] == ["ab"[source] for source, _ in drawn]
    assert not {f"a:{i}" for i in bad} & set(names)
    assert [name for name, (source, row) in zip(names, drawn, strict=True) if (source, row % 4) != (0, 0)] == [
        f"{'ab'[source]}:{row}" for source, row in drawn if (source, row % 4) != (0, 0)
    ]
    assert len(mixture.bad_rows) == 10


def test_a_row_that_nothing_can_be_made_of_is_bad_too():
    def make(source: int, example: Example) -> str:
        row = int(example.name.rpartition(":")[2])
        if row % 5 == 0:
            raise BadRow(example.name, "no labels", "all of them are out of sight")
        if row % 5 == 1:
            raise CameraError("too wide")
        return f"{source}:{row}"

    mixture = Mixture([Numbers(20)], seed=2, bad_rows=0.5)
    assert {mixture.made(k, make) for k in range(200)} == {f"0:{row}" for row in range(20) if row % 5 > 1}
    assert mixture.bad_rows.counts() == {"no labels": 4, "unusable camera": 4}


def test_a_source_of_bad_rows_only_ends_the_run_with_their_list():
    mixture = Mixture([Numbers(3, frozenset(range(3)), "a")], bad_rows=100)
    with pytest.raises(DatasetError, match=r"100 rows in turn of a can't be trained on(.|\n)*missing image: 1 \(a:0\)"):
        mixture.example(0)


@pytest.mark.parametrize(
    ("sources", "weights", "expected"),
    [
        ([], None, "at least one source"),
        ([Numbers(0)], None, "none of them empty"),
        ([Numbers(2)], [1, 2], "2 weights for 1 sources"),
        ([Numbers(2), Numbers(2)], [0, 0], "one above zero"),
        ([Numbers(2), Numbers(2)], [1, -1], "none negative"),
        ([Numbers(2)], [math.nan], "finite"),
    ],
)
def test_weights_that_say_nothing_are_refused(sources, weights, expected):
    with pytest.raises(ConfigError, match=expected):
        Mixture(sources, weights)


def test_a_configuration_opens_its_sources(tmp_path):
    labels = write_depthlm_labels(tmp_path, images=4)
    entries = [
        {"labels": str(labels), "depth_kind": "z", "part": [0, 0.5], "range_m": "ibims", "weight": 3},
        {"dialogue": str(write_rows(tmp_path, {"image": "0.png", "dialogue": [["a", "b"]]})), "weight": 0.5},
        {"scenes": 7, "seed": 0, "split": "train", "cameras": [[60, 62, 31, 24.5, 64, 48]], "weight": 0.25},
        {
            "pairs": 5,
            "task": "pose",
            "seed": 0,
            "split": "train",
            "cameras": [[60, 62, 31, 24.5, 64, 48]],
            "weight": 0.25,
        },
    ]
    mixture = open_mixture(entries, seed=3)
    assert [len(source) for source in mixture.sources] == [2, 1, 7, 5]
    assert len(mixture.sources[3][0].dialogue) >= 3
    assert Counter(mixture.draw(k)[0] for k in range(512))[0] == pytest.approx(384, abs=3)
    assert mixture.sources[2][0].cameras == (CAMERA,)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"depth_knd": "z"}, "did you mean 'depth_kind'"),
        ({"dialogue": "b.jsonl"}, "exactly one of labels, dialogue, scenes, pairs"),
        ({}, "lacks 'depth_kind'"),
        ({"depth_kind": "z", "weight": 1}, "1 of 2 data entries have a weight"),
    ],
)
def test_a_configuration_that_says_something_else_is_refused(tmp_path, change, expected):
    entry = {"labels": str(write_depthlm_labels(tmp_path))}
    with pytest.raises(ConfigError, match=expected):
        open_mixture([{**entry, "depth_kind": "z"}, {**entry, **change}])


# Loading


def kill_at(k: int, fatal: int) -> int:
    if k == fatal:
        os.kill(os.getpid(), signal.SIGKILL)
    return k


def refuse(k: int) -> int:
    raise DatasetError(f"item {k} is refused")


class Unreadable:
    """Can be sent to a worker and not be read there."""

    def __reduce__(self):
        return refuse, (0,)

    def __call__(self, k: int) -> int:
        return k


def process_of(k: int) -> int:
    return os.getpid()


def test_workers_give_what_one_process_gives_and_tell_of_bad_rows(tmp_path):
    path = write_depthlm_labels(tmp_path, images=6)
    path.write_text(path.read_text() + "{broken\n" + json.dumps({"image": "rgb/absent.png"}) + "\n")

    def mixture() -> Mixture:
        scenes = SceneSource(0, "train", 5, [CAMERA], points=9)
        return Mixture([LabelledSource(path, depth_kind="z"), scenes], [1, 1], seed=1, bad_rows=2)

    alone, drawn = mixture(), mixture()
    here = [alone.example(k) for k in range(2, 80, 2)]
    there = list(Loader(drawn.example, 2, 2, 80, 2, bad_rows=drawn.bad_rows))
    assert [k for k, _ in there] == list(range(2, 80, 2))
    assert all(equal(one, other) for one, (_, other) in zip(here, there, strict=True))
    assert alone.bad_rows.counts() == drawn.bad_rows.counts() == {"not json": 1, "missing image": 1}


def test_bad_rows_of_workers_end_the_run_together(tmp_path):
    mixture = Mixture([Numbers(50, frozenset(range(25)))], seed=1, bad_rows=6)
    with pytest.raises(DatasetError, match="7 of 50 rows can't be trained on"):
        list(Loader(mixture.example, 2, 0, 200, bad_rows=mixture.bad_rows))


def test_a_killed_worker_is_told_as_such():
    loader = Loader(partial(kill_at, fatal=3), 1, 0, 10, prefetch=1)
    seen = []
    with pytest.raises(DatasetError, match=r"a data worker ended while item \d was awaited, killed"):
        for k, _ in loader:
            seen.append(k)
    assert seen == [0, 1, 2]


def test_errors_in_a_worker_are_passed_on():
    with pytest.raises(DatasetError, match="item 0 is refused"):
        list(Loader(Unreadable(), 1, 0, 5))


def test_a_loader_left_early_ends_its_workers():
    items = iter(Loader(process_of, 1, 0, 100))
    _, worker = next(items)
    assert worker != os.getpid()
    items.close()
    assert _ends(worker)


def test_workers_end_when_the_process_that_trains_is_killed():
    script = (
        "from test_train_data import Loader, process_of\n"
        "if __name__ == '__main__':\n"
        "    items = iter(Loader(process_of, 1, 0, 10**6))\n"
        "    print(next(items)[1], flush=True)\n"
        "    input()\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    trainer = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    worker = int(trainer.stdout.readline())
    trainer.kill()
    trainer.communicate()
    assert _ends(worker)


def _ends(process: int) -> bool:
    for _ in range(2400):
        try:
            state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize(("workers", "prefetch"), [(-1, 2), (1, 0)])
def test_a_loader_without_room_is_refused(workers, prefetch):
    with pytest.raises(ConfigError, match="workers"):
        Loader(process_of, workers, 0, 5, prefetch=prefetch)


# Photographs that may lie beside the checkout


@pytest.mark.skipif("DEPTHLM_DATA" not in os.environ, reason="needs the photographs that DEPTHLM_DATA names")
def test_real_photographs_of_both_schemas_mix():
    folder = Path(os.environ["DEPTHLM_DATA"])
    sources = [LabelledSource(folder / name / "labels.jsonl", depth_kind="z") for name in ("ibims1", "scannetpp")]
    points, maps = (source[0] for source in sources)
    assert len(points.depth_m) == 100
    assert len(maps.depth_m) > 40_000
    assert np.isfinite(points.depth_map()).sum() == len(np.unique(points.pixels, axis=0))
    assert len(Mixture(sources)) == 18


def test_an_example_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Numbers(3)[0].name = "other"
