"""The compact dialect end to end: what is asked, what it costs, how answers about several points are shared out."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from checkpoints import make_checkpoint
from PIL import Image
from recordings import picture, write_depthlm_labels

from depthlm_ros import benchmark
from depthlm_ros.benchmark import run_protocol
from depthlm_ros.camera import Camera, Distortion, unify
from depthlm_ros.cards import CARD_FILE, load_card
from depthlm_ros.cli import main
from depthlm_ros.engines import load_engine
from depthlm_ros.engines.base import Answer, EngineInfo, ImageGrid
from depthlm_ros.engines.batches import shared_length
from depthlm_ros.engines.options import EngineOptions
from depthlm_ros.errors import ConfigError
from depthlm_ros.estimator import Estimator
from depthlm_ros.ply import read_ply
from depthlm_ros.prompts import (
    answer_template,
    compact_answer,
    compact_question,
    compact_questions,
    normalise_pixel,
    parse_compact,
)

CAMERA = Camera(fx=150.0, fy=148.0, cx=63.2, cy=47.1, width=128, height=96)
PIXELS = np.array([[64, 48], [20, 30], [110, 80], [5, 90], [40, 12]], np.float32)
SPEAKS = {"dialects": ["dense", "compact"], "default_dialect": "compact", "points_per_question": 4}


@pytest.fixture(scope="module")
def image():
    return np.random.default_rng(0).integers(0, 255, (96, 128, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def speaker(qwen3_vl_checkpoint):
    """A small random Qwen3-VL whose answers vary with image and question."""
    card, source = load_card(str(qwen3_vl_checkpoint))
    changes = {"dialects": ("compact",), "default_dialect": "compact", "points_per_question": 4}
    card = replace(card, focal_px=160.0, policy="exact", max_new_tokens=6, **changes)
    return Estimator(card, load_engine(source, card, options=EngineOptions("cpu", "float32")))


class Reader:
    """An engine that reads the pixels named in its questions and answers with a depth for each of them."""

    info = EngineInfo("reader", "none", "qwen3_vl", "cpu", "float32", ("a test",), 0, False)
    grid = ImageGrid(multiple=32, min_pixels=1, max_pixels=1 << 20)

    def __init__(self) -> None:
        self.questions: list[str] = []
        self.budgets: list[int] = []
        self.image: np.ndarray | None = None
        self.expects = ""
        self.spoil = lambda text: text

    def answer_shared(self, image, questions, max_new_tokens, *, expects):
        self.image, self.expects = image, expects
        self.questions += questions
        self.budgets.append(max_new_tokens)
        return [self._answer(question) for question in questions]

    answer_each = answer_about = depth_map = None

    def _answer(self, question: str) -> Answer:
        pixels = [tuple(map(int, point.split(","))) for point in question.partition("): ")[2].split()]
        confidences = tuple(nx / 1000 for nx, _ in pixels)
        text = self.spoil(compact_answer(depth_of(*pixel) for pixel in pixels))
        return Answer(text, (), confidences[-1], confidences)

    def close(self) -> None:
        pass


def depth_of(nx: int, ny: int) -> float:
    return 1 + nx / 100 + ny


def reader(**changes) -> Estimator:
    changes = {"points_per_question": 4, "focal_px": 160.0} | changes
    card = replace(load_card("demo")[0], dialects=("compact",), default_dialect="compact", scores={}, **changes)
    return Estimator(card, Reader())


def said(image: np.ndarray, pixels: np.ndarray = PIXELS, steps: int = 1000) -> list[list[int]]:
    view = unify(image, CAMERA, 160.0, "exact", Reader.grid)
    return normalise_pixel(view.from_source(pixels), view.camera.width, view.camera.height, steps).tolist()


def test_a_point_costs_a_dozen_tokens_and_everything_before_it_is_shared():
    """By the shipped model's tokenizer, which like Qwen's has a token for each digit."""
    card, source = load_card("demo")
    processor = load_engine(source, card, options=EngineOptions("cpu")).processor
    questions = [compact_question(*pixel) for pixel in ((5, 17), (999, 0), (500, 500), (42, 812))]
    prompts = processor.prompts(questions, (6, 8))
    shared = shared_length(prompts)
    tail = processor.tokenizer.convert_ids_to_tokens(prompts[2][-11:])
    assert tail == [*"500,500", "<|im_end|>", "Ċ", "<|im_start|>", "assistantĊ"]
    assert {len(prompt) for prompt in prompts} == {shared + 11}
    assert len(processor.tokenizer(compact_answer([3.42])).input_ids) == 4


def test_the_pixels_named_are_those_of_the_image_that_the_model_sees(image):
    estimator = reader()
    result = estimator.estimate(image, CAMERA, PIXELS)
    np.testing.assert_array_equal(estimator.engine.image, unify(image, CAMERA, 160.0, "exact", Reader.grid).image)
    assert estimator.engine.questions == [compact_question(*pixel) for pixel in said(image)]
    assert result.depth_m.tolist() == pytest.approx([depth_of(*pixel) for pixel in said(image)], abs=0.006)
    assert result.confidence.tolist() == pytest.approx([nx / 1000 for nx, _ in said(image)])


@pytest.mark.parametrize("each", [2, 3, 4])
def test_several_points_a_question_give_each_point_its_own_number_and_confidence(image, each):
    estimator, alone = reader(), reader().estimate(image, CAMERA, PIXELS)
    together = estimator.estimate(image, CAMERA, PIXELS, points_per_question=each)
    assert estimator.engine.questions == compact_questions(said(image), each)
    assert len(estimator.engine.questions) == -(-len(PIXELS) // each)
    assert estimator.engine.expects == answer_template("compact", each)
    np.testing.assert_array_equal(together.depth_m, alone.depth_m)
    np.testing.assert_array_equal(together.confidence, alone.confidence)


def test_an_answer_that_cannot_be_read_loses_its_points_and_no_others(image):
    estimator = reader()
    estimator.engine.spoil = lambda text: text.replace(" ", "; ")
    result = estimator.estimate(image, CAMERA, PIXELS, points_per_question=4)
    assert result.asked.all()
    assert result.valid.tolist() == [False] * 4 + [True]
    assert (result.confidence[:4] == 0).all()
    assert len(set(result.answers[:4])) == 1 and "; " in result.answers[0]
    assert parse_compact(result.answers[4]) == pytest.approx(result.depth_m[4])


def test_points_that_the_lens_hides_are_left_out_before_questions_are_made_up(image):
    wide = replace(CAMERA, fx=40.0, fy=40.0, distortion=Distortion("equidistant", (0.0, 0.0, 0.0, 0.0)))
    estimator = reader()
    pixels = np.array([[64, 48], [0, 0], [66, 48], [127, 95], [60, 50]], np.float32)
    result = estimator.estimate(image, wide, pixels, points_per_question=2)
    assert result.asked.tolist() == result.valid.tolist() == [True, False, True, False, True]
    assert [len(question.partition("): ")[2].split()) for question in estimator.engine.questions] == [2, 1]


def test_the_card_says_how_finely_pixels_are_named_and_how_many_points_a_question_may_have(image):
    estimator = reader(compact_range=100, points_per_question=2)
    estimator.estimate(image, CAMERA, PIXELS, points_per_question=2)
    assert estimator.engine.questions == compact_questions(said(image, steps=100), 2, 100)
    with pytest.raises(ConfigError, match="points_per_question is 3; model 'demo' answers at most 2"):
        estimator.estimate(image, CAMERA, PIXELS, points_per_question=3)


def test_more_points_get_a_longer_answer(image):
    estimator = reader(max_new_tokens=8)
    estimator.estimate(image, CAMERA, PIXELS)
    estimator.estimate(image, CAMERA, PIXELS, points_per_question=4)
    assert estimator.engine.budgets == [9, 36]


@pytest.mark.parametrize("each", [1, 2, 3])
def test_a_model_answers_as_it_would_each_question_alone(speaker, image, each):
    result = speaker.estimate(image, CAMERA, PIXELS, points_per_question=each)
    view = unify(image, CAMERA, 160.0, "exact", speaker.engine.grid)
    pixels = normalise_pixel(view.from_source(PIXELS), view.camera.width, view.camera.height, 1000)
    questions = compact_questions(pixels.tolist(), each)
    alone = [speaker.engine.answer_shared(view.image, [question], max(6, 9 * each))[0] for question in questions]
    assert result.answers == tuple(alone[row // each].text for row in range(len(PIXELS)))
    if each == 1:
        depths = [parse_compact(answer.text) or np.nan for answer in alone]
        np.testing.assert_array_equal(result.depth_m, np.array(depths, np.float32))
    assert len(set(result.answers)) > 1


@pytest.fixture(scope="module")
def sure(tmp_path_factory) -> Path:
    """A checkpoint that says 3.42 to whatever it is asked, with a card for the compact dialect."""
    folder = make_checkpoint(tmp_path_factory.mktemp("sure") / "model", says="3.42")
    card = {
        "name": "sure",
        "source": ".",
        "licence": "Apache-2.0",
        "commercial_use": True,
        "architecture": "qwen3_vl",
        "focal_px": 100,
        "policy": "exact",
        "depth_kind": "z",
        "max_new_tokens": 8,
        "description": "always the same",
    }
    (folder / CARD_FILE).write_text(yaml.safe_dump(card | SPEAKS), encoding="utf-8")
    return folder


def test_estimate_on_the_command_line(sure, tmp_path, capsys):
    Image.fromarray(picture()).save(tmp_path / "photo.png")
    cloud = tmp_path / "cloud.ply"
    command = ["estimate", str(tmp_path / "photo.png"), "--fx", "60", "--model", str(sure), "--device", "cpu"]
    assert main([*command, "--points", "12", "--out", str(cloud)]) == 0
    assert "asked 12 pixels (compact), 12 answers" in capsys.readouterr().out
    assert read_ply(cloud)["z"] == pytest.approx([3.42] * 12, rel=1e-6)
    # One number for two points is no answer.
    assert main([*command, "--points", "12", "--points-per-question", "2", "--out", str(cloud)]) == 1
    assert "asked 12 pixels (compact), 0 answers" in capsys.readouterr().out
    assert main([*command, "--points-per-question", "5", "--out", str(cloud)]) == 1
    assert "ConfigError: points_per_question is 5; model 'sure' answers at most 4" in capsys.readouterr().err


def test_evaluate_on_the_command_line(sure, tmp_path):
    labels = write_depthlm_labels(tmp_path, pixel_coords=[[20, 20], [30, 10]], depth=[3.0, 1.0])
    command = ["evaluate", str(labels), "--model", str(sure), "--device", "cpu", "--out", str(tmp_path / "out")]
    assert main(command) == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert "1 points a question" in metrics["notes"]
    assert metrics["depth"]["answered"] == metrics["depth"]["total"] == 4
    assert main([*command, "--points-per-question", "2"]) == 0
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["depth"]["answered"] == 0


def test_our_own_reader_reads_bare_numbers_in_a_published_protocol(sure, tmp_path, monkeypatch):
    # The authors' reader is a library of its own, which isn't needed here.
    monkeypatch.setattr(benchmark, "require_math_verify", lambda: None)
    monkeypatch.setattr(benchmark, "verdicts", lambda said, true: np.zeros(len(said), bool))
    monkeypatch.setattr(benchmark, "read_number", lambda text: None)
    labels = write_depthlm_labels(tmp_path, pixel_coords=[[20, 20], [30, 10]], depth=[3.0, 1.0])
    with Estimator.load(str(sure), device="cpu") as estimator:
        figures = run_protocol(labels, estimator, "dataset_inference", samples=0).figures
    assert (figures["questions"], figures["unread_strict_parser"], figures["delta1_strict_parser"]) == (4, 0, 0.5)


@pytest.fixture
def world(sure, ros_domain) -> Iterator:
    pytest.importorskip("rclpy")
    from test_node_questions import AskingWorld

    from depthlm_ros.node import load_estimator

    settings = {"model": str(sure), "device": "cpu", "dtype": "float32", "cpu_threads": 1, "dialect": "dense"}
    world = AskingWorld(load=load_estimator, points=6, **settings)
    world.start()
    yield world
    world.close()


def test_the_node_speaks_it_once_its_parameter_says_so(world):
    from sensor_msgs.msg import PointCloud2
    from test_node import until

    from depthlm_ros.messages import read_cloud

    refused, _ = world.set("points_per_question", 5)
    assert refused.successful, "it counts in the compact dialect only"
    refused, _ = world.set("dialect", "compact")
    assert not refused.successful and "answers at most 4" in refused.reason
    assert world.set("points_per_question", 1)[0].successful and world.set("dialect", "compact")[0].successful
    world.listen(PointCloud2, "points")
    world.camera()
    world.keep_sending(lambda: world.heard["points"], "a cloud")
    cloud = read_cloud(world.heard["points"][0])
    assert cloud["z"] == pytest.approx([3.42] * 6, rel=1e-6)
    world.query(3.0, 4.0)
    until(lambda: world.points, "the point of a query")
    assert world.points[0].point.z == pytest.approx(3.42)
