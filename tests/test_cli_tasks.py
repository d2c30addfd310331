"""`depthlm ask`, `match` and `pose`: what they print and write, whom they refuse, what they say about bad input."""

from __future__ import annotations

import json

import numpy as np
import pytest
import yaml
from PIL import Image
from recordings import picture, small_model

from depthlm_ros import correspondence, tasks
from depthlm_ros.camera import Camera
from depthlm_ros.cards import load_card
from depthlm_ros.cli import build_parser, main
from depthlm_ros.cli_tasks import cameras_of_pair
from depthlm_ros.correspondence import long_edge_view, read_matches
from depthlm_ros.engines.base import Answer
from depthlm_ros.errors import CameraError
from depthlm_ros.pose import QUESTIONS, RelativePose

POSE_TEXTS = ("1.5 degrees", "Yaw=+1.0°, Pitch=-2.0°, Roll=+3.0°", "(+0.00, +0.00, +1.00)", "2.50 meters")


@pytest.fixture(scope="module")
def model(qwen3_vl_checkpoint, tmp_path_factory):
    """A small model with random weights whose card names every task of VLM3."""
    folder = small_model(qwen3_vl_checkpoint, tmp_path_factory.mktemp("model") / "small")
    card = yaml.safe_load((folder / "depthlm_card.yaml").read_text())
    card["tasks"] = ["depth", "object", "correspondence", "pose"]
    (folder / "depthlm_card.yaml").write_text(yaml.safe_dump(card))
    return str(folder)


@pytest.fixture
def photographs(tmp_path, monkeypatch):
    """Two photographs of different size in the working directory."""
    monkeypatch.chdir(tmp_path)
    Image.fromarray(picture()).save("a.png")
    Image.fromarray(picture(1, 40, 30)).save("b.png")


@pytest.fixture
def short(monkeypatch):
    """Small images and short answers, since random weights never come to an end."""
    monkeypatch.setattr(correspondence, "LONG_EDGE_PX", 128)
    monkeypatch.setattr(tasks, "CORRESPONDENCE_MAX_NEW_TOKENS", 6)
    monkeypatch.setattr(tasks, "OBJECT_MAX_NEW_TOKENS", 6)
    monkeypatch.setattr(tasks, "POSE_MAX_NEW_TOKENS", 6)


class Said:
    """An assistant without a model that says what it is told to, and remembers what it was asked."""

    def __init__(self, *texts):
        self.texts, self.asked = texts, {}

    def ask_about(self, images, questions, cameras, max_new_tokens):
        self.asked = {"images": images, "questions": questions, "cameras": cameras, "budget": max_new_tokens}
        return [Answer(self.texts[0], (), 0.0)]

    def match(self, image_a, image_b, pixels, think):
        self.asked = {"pixels": np.asarray(pixels), "think": think}
        texts = [self.texts[i % len(self.texts)] for i in range(len(pixels))]
        return read_matches(long_edge_view(image_a), long_edge_view(image_b), pixels, texts)

    def relative_pose(self, image_a, camera_a, image_b, camera_b):
        self.asked = {"cameras": (camera_a, camera_b)}
        return RelativePose.from_texts(dict(zip(QUESTIONS, self.texts, strict=True)))


@pytest.fixture
def says(monkeypatch):
    def install(*texts):
        said = Said(*texts)
        monkeypatch.setattr("depthlm_ros.cli_tasks._assistant", lambda arguments, task: said)
        return said

    return install


# ---------------------------------------------------------------- ask


def test_ask_prints_the_answer(photographs, says, capsys):
    said = says(" A mug on a table.\n")
    assert main(["ask", "a.png", "What is it?"]) == 0
    assert capsys.readouterr().out == "A mug on a table.\n"
    assert said.asked["questions"] == ["What is it?"] and said.asked["cameras"] == [None]
    assert said.asked["budget"] == 512
    np.testing.assert_array_equal(said.asked["images"][0], picture())


def test_ask_takes_a_camera_and_a_second_image(photographs, says):
    said = says("yes")
    options = ["--second", "b.png", "--fov-deg", "90", "--max-new-tokens", "7"]
    assert main(["ask", "a.png", "Same room?", *options]) == 0
    assert [camera.fx for camera in said.asked["cameras"]] == pytest.approx([32, 20])
    assert [image.shape for image in said.asked["images"]] == [(48, 64, 3), (30, 40, 3)]
    assert said.asked["budget"] == 7


@pytest.mark.slow
def test_ask_runs_on_any_model(photographs, model, qwen3_vl_checkpoint, short, capsys):
    for name in (model, str(qwen3_vl_checkpoint)):
        arguments = ["ask", "a.png", "How far?", "--model", name, "--device", "cpu", "--max-new-tokens", "6"]
        assert main(arguments) == 0
    options = ["--model", model, "--device", "cpu", "--fx", "60", "--box", "1,2,30,40"]
    assert main(["ask", "a.png", "Is <mask> big?", *options]) == 0
    assert capsys.readouterr().out.count("\n") >= 3


# ---------------------------------------------------------------- match


def test_match_prints_and_writes_what_was_found(photographs, says, capsys):
    said = says("(500, 500)", "nowhere")
    out = ["--out", "found/m.json", "--out", "found/m.png"]
    assert main(["match", "a.png", "b.png", "--pixels", "10,20", "63,47", *out]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed == [
        "(10, 20) -> (20.0, 15.0)",
        "(63, 47) -> not understood: 'nowhere'",
        "1 of 2 pixels of a.png found in b.png",
        "wrote found/m.json",
        "wrote found/m.png",
    ]
    assert said.asked["pixels"].tolist() == [[10, 20], [63, 47]] and not said.asked["think"]
    saved = json.loads(open("found/m.json").read())
    assert saved["images"]["b"] == {"path": "b.png", "width": 40, "height": 30}
    assert saved["matches"] == [
        {"pixel_a": [10, 20], "pixel_b": [20, 15], "units_b": [500, 500], "text": "(500, 500)"},
        {"pixel_a": [63, 47], "pixel_b": None, "units_b": None, "text": "nowhere"},
    ]
    drawn = np.asarray(Image.open("found/m.png"))
    assert drawn.shape == (48, 104, 3)
    changed = (drawn[:, :64] != picture()).any(axis=-1)
    assert changed[18:23, 8:13].any() and not changed[:10].any()
    assert (drawn[:30, 64:] != picture(1, 40, 30)).any()


def test_match_places_points_on_a_grid(photographs, says):
    said = says("(1, 1)")
    assert main(["match", "a.png", "b.png", "--points", "12", "--think"]) == 0
    assert len(np.unique(said.asked["pixels"], axis=0)) == 12 and said.asked["think"]


def test_match_without_any_match_fails(photographs, says):
    says("no idea")
    assert main(["match", "a.png", "b.png", "--pixels", "1,1"]) == 1


@pytest.mark.slow
def test_match_and_pose_run_on_a_model(photographs, model, short, capsys):
    run = ["--model", model, "--device", "cpu", "--out", "out.json"]
    assert main(["match", "a.png", "b.png", "--points", "3", *run]) in (0, 1)
    assert len(json.loads(open("out.json").read())["matches"]) == 3
    assert main(["pose", "a.png", "b.png", "--fov-deg", "60", *run]) in (0, 1)
    assert list(json.loads(open("out.json").read())["texts"]) == list(QUESTIONS)
    assert "depthlm:" not in capsys.readouterr().err


# ---------------------------------------------------------------- pose


def test_pose_prints_and_writes_the_pose(photographs, says, capsys):
    said = says(*POSE_TEXTS)
    assert main(["pose", "a.png", "a.png", "--fx", "60", "--out", "pose.json"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "rotation angle: 1.5 degrees",
        "yaw +1.0, pitch -2.0, roll +3.0 degrees",
        "direction: +0.00 right, +0.00 down, +1.00 forward",
        "distance: 2.50 m",
        "wrote pose.json",
    ]
    assert said.asked["cameras"] == (Camera(60, 60, 31.5, 23.5, 64, 48),) * 2
    saved = json.loads(open("pose.json").read())
    assert saved["translation_m"] == [0, 0, 2.5] and saved["yaw_deg"] == 1
    assert np.shape(saved["rotation_matrix"]) == (3, 3) and len(saved["quaternion_xyzw"]) == 4


def test_pose_says_what_it_did_not_understand(photographs, says, capsys):
    says("?", POSE_TEXTS[1], "left", POSE_TEXTS[3])
    assert main(["pose", "a.png", "a.png", "--fx", "60", "--out", "pose.json"]) == 0
    printed = capsys.readouterr().out
    assert "rotation_angle not understood: '?'" in printed
    assert "translation_direction not understood: 'left'" in printed
    saved = json.loads(open("pose.json").read())
    assert saved["translation_m"] is None and saved["rotation_deg"] is None and saved["distance_m"] == 2.5
    says("?", "?", "?", "?")
    assert main(["pose", "a.png", "a.png", "--fx", "60"]) == 1


def cameras(*options):
    arguments = build_parser().parse_args(["pose", "a.png", "b.png", *options])
    return cameras_of_pair(arguments, (48, 64), (30, 40))


def test_the_second_camera_is_the_first_unless_it_is_described():
    assert [camera.fx for camera in cameras("--fov-deg", "90")] == pytest.approx([32, 20])
    first, second = cameras("--fx", "60", "--cx", "30", "--fx-b", "50", "--cy-b", "9")
    assert first == Camera(60, 60, 30, 23.5, 64, 48)
    assert second == Camera(50, 50, 19.5, 9, 40, 30)
    with pytest.raises(CameraError, match="64x48 and 40x30, so one --fx can't be of both; give --fx-b"):
        cameras("--fx", "60")
    with pytest.raises(CameraError, match="neither"):
        cameras()


# ---------------------------------------------------------------- who is refused, and how


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["match", "a.png", "b.png", "--pixels", "1,1"], "'demo' was not trained for correspondence, it is for depth"),
        (["pose", "a.png", "b.png", "--fov-deg", "60"], "'demo' was not trained for pose, it is for depth"),
        (["ask", "a.png", "Is <mask> big?", "--fx", "60", "--box", "1,1,5,5"], "'demo' was not trained for object"),
    ],
)
def test_a_model_that_is_not_for_the_task_is_refused_before_it_is_loaded(
    photographs, monkeypatch, capsys, arguments, expected
):
    demo = load_card("demo")
    monkeypatch.setattr("depthlm_ros.cards.load_card", lambda model, **_: demo)
    monkeypatch.setattr("depthlm_ros.estimator.Estimator.load", lambda **_: pytest.fail("the weights were loaded"))
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("depthlm: DialectError: model ") and expected in error and error.count("\n") == 1


@pytest.mark.slow
def test_force_asks_a_model_that_is_not_for_it(photographs, qwen3_vl_checkpoint, tmp_path, short):
    folder = small_model(qwen3_vl_checkpoint, tmp_path / "depth_only")
    arguments = ["match", "a.png", "b.png", "--pixels", "1,1", "--model", str(folder), "--device", "cpu"]
    assert main(arguments) == 1
    assert main([*arguments, "--force", "--out", "m.json"]) in (0, 1)
    assert len(json.loads(open("m.json").read())["matches"]) == 1


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["ask", "none.png", "What?"], "ImageError: image none.png does not exist"),
        (["ask", "a.png", "What?", "--fx", "-5"], "CameraError: fx is -5.0"),
        (["ask", "a.png", "What?", "--max-new-tokens", "0"], "ConfigError: --max-new-tokens is 0"),
        (["ask", "a.png", "<mask>?", "--box", "1,2,3,4"], "CameraError: --box needs the camera"),
        (["ask", "a.png", "<mask>?", "--box", "1,2,3,4", "--second", "b.png"], "ConfigError: --second b.png and --box"),
        (["match", "a.png", "none.png"], "ImageError: image none.png does not exist"),
        (["match", "a.png", "b.png", "--pixels", "64,2"], "PixelError: pixel (64, 2) is outside of the 64x48 image"),
        (["match", "a.png", "b.png", "--points", "0"], "PixelError: --points is 0"),
        (["match", "a.png", "b.png", "--out", "m.txt"], "ImageError: output file m.txt has suffix '.txt'; use .json"),
        (["pose", "a.png", "b.png"], "CameraError: neither --fx nor --fov-deg given"),
        (["pose", "a.png", "b.png", "--fx", "60"], "CameraError: the images are 64x48 and 40x30"),
        (["pose", "a.png", "a.png", "--fx", "60", "--out", "p.png"], "ImageError: output file p.png has suffix '.png'"),
        (["match", "a.png", "b.png", "--model", "vlm3-cor"], "ModelError: unknown model 'vlm3-cor'; did you mean"),
    ],
)
def test_bad_input_is_named_in_one_line(photographs, capsys, arguments, expected):
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"depthlm: {expected}")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["match", "a.png", "b.png", "--pixels", "12"], "'12' isn't U,V, 2 numbers with commas between them"),
        (["match", "a.png", "b.png", "--pixels", "1,nan"], "'1,nan' isn't U,V"),
        (["ask", "a.png", "<mask>", "--box", "1,2,3"], "'1,2,3' isn't X1,Y1,X2,Y2, 4 numbers"),
        (["match", "a.png", "b.png", "--pixels", "1,1", "--points", "4"], "not allowed with"),
    ],
)
def test_options_that_cannot_be_read_are_refused_by_argparse(capsys, arguments, expected):
    with pytest.raises(SystemExit) as exit_info:
        main(arguments)
    assert exit_info.value.code == 2
    assert expected in capsys.readouterr().err


def test_an_empty_question_is_refused(photographs, model, capsys):
    assert main(["ask", "a.png", " ", "--model", model, "--device", "cpu"]) == 1
    assert "ConfigError: the question is empty" in capsys.readouterr().err
