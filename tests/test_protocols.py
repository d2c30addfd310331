"""The published evaluations: which points they ask in which order, and how they count."""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from recordings import write_depthlm_labels, write_depthvlm_labels

from depthlm_ros import benchmark
from depthlm_ros.benchmark import run_protocol
from depthlm_ros.cards import load_card
from depthlm_ros.cli import main
from depthlm_ros.depthvlm_bench import bench_delta1, bench_points, bench_points_per_image, in_range
from depthlm_ros.engines.base import Answer, EngineInfo, ImageGrid
from depthlm_ros.errors import ConfigError, DatasetError
from depthlm_ros.estimator import Estimator
from depthlm_ros.markers import paste
from depthlm_ros.prompts import answer_text
from depthlm_ros.protocols import dataset_eval, dataset_inference, evaluated_records

# random.seed(42) and random.sample(range(100), 1) ten times, in a Python shell.
FIRST_OF_100 = [81, 14, 3, 94, 35, 31, 28, 17, 94, 13]


def always(record: int, point: int) -> bool:
    return True


class TestDatasetEval:
    def test_image_by_image_with_drawn_points(self):
        asked = list(dataset_eval([100] * 4, range(4), always, 10))
        assert [question.record for question in asked] == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]
        assert [question.point for question in asked] == FIRST_OF_100

    def test_the_global_stream_is_neither_used_nor_changed(self):
        random.seed(7)
        state = random.getstate()
        list(dataset_eval([100] * 3, range(3), always))
        assert random.getstate() == state
        random.seed(42)
        drawn = [random.sample(range(5), 1)[0] for _ in range(15)]
        assert [question.point for question in dataset_eval([5] * 3, range(3), always, 0)] == drawn

    def test_all_is_records_times_points_of_the_first_and_points_repeat(self):
        asked = list(dataset_eval([5, 9, 9], range(3), always, 0))
        assert len(asked) == 15
        assert max(Counter((question.record, question.point) for question in asked).values()) > 1
        assert {question.point for question in asked} <= set(range(5))

    def test_by_default_128_questions_are_asked(self):
        assert len(list(dataset_eval([100] * 12, range(12), always))) == 128

    def test_a_point_too_near_the_border_is_replaced_by_the_next_sample_which_is_asked_again(self):
        asked = list(dataset_eval([100] * 4, range(4), lambda record, point: point != 14, 4))
        assert [(question.record, question.point, question.moved) for question in asked] == [
            (0, 81, 0),
            (2, 3, 1),
            (2, 3, 0),
            (3, 94, 0),
        ]

    def test_after_the_last_sample_comes_the_first(self):
        order = list(dataset_eval([3, 3], range(2), always, 0))
        last = order[-1]
        barred = (last.record, last.point)
        moved = list(dataset_eval([3, 3], range(2), lambda *at: at != barred, 0))[-1]
        first = next(question for question in order if (question.record, question.point) != barred)
        assert (moved.record, moved.point) == (first.record, first.point)

    def test_nothing_to_ask_is_an_error_and_no_endless_search(self):
        with pytest.raises(DatasetError, match="not one labelled point"):
            list(dataset_eval([3, 3], range(2), lambda record, point: False))

    def test_a_row_with_fewer_points_than_the_first_is_named_where_the_authors_crash(self):
        with pytest.raises(DatasetError, match="row 2 has 3 points, the first evaluated row has 100.*draws point 15"):
            list(dataset_eval([100, 3], range(2), always))

    @given(st.lists(st.integers(1, 6), min_size=1, max_size=5), st.integers(0, 40), st.randoms())
    def test_every_question_can_be_asked(self, points, samples, rng):
        points = [max(points)] * len(points)
        barred = {(r, p) for r in range(len(points)) for p in range(points[r]) if rng.random() < 0.3}
        try:
            asked = list(dataset_eval(points, range(len(points)), lambda *at: at not in barred, samples))
        except DatasetError:
            return
        assert len(asked) == min(samples or sum(points), sum(points))
        assert all((question.record, question.point) not in barred for question in asked)


class TestDatasetInference:
    def test_every_point_once_in_the_order_of_the_file(self):
        asked = list(dataset_inference([2, 1, 3], range(3), always, 0))
        assert [(q.record, q.point) for q in asked] == [(0, 0), (0, 1), (1, 0), (2, 0), (2, 1), (2, 2)]

    def test_points_too_near_the_border_are_reported_and_count_as_samples(self):
        asked = list(dataset_inference([2, 2], range(2), lambda record, point: point == 1, 3))
        assert [question.askable for question in asked] == [False, True, False]


def test_scannet_files_keep_their_last_two_percent_shuffled():
    assert evaluated_records(3, "data/ibims1.jsonl") == [0, 1, 2]
    kept = list(range(196, 200))
    random.seed(42)
    random.shuffle(kept)
    assert evaluated_records(200, "data/scannetpp_val.jsonl") == kept
    # int(6 * 0.98) is 5.
    assert evaluated_records(6, "scannet.jsonl") == [5]


class TestDepthVLMBench:
    def test_points_of_the_real_benchmark_are_drawn_again(self, data_folder):
        """The six frames are rows of the benchmark's ScanNet++ file; their listed points name the row."""
        rows = [json.loads(line) for line in (data_folder / "scannetpp" / "labels.jsonl").read_text().splitlines()]
        for index, row in zip((69, 282, 434, 660, 718, 918), sorted(rows, key=_bench_row), strict=True):
            depth_m = np.asarray(Image.open(data_folder / "scannetpp" / "depth" / row["depth_path"])) / np.float32(1000)
            pixels, depths = bench_points(in_range(depth_m, "scannetpp"), 10, index)
            assert pixels.tolist() == row["pixel_coords"]
            assert depths.tolist() == row["depth"]

    def test_few_known_depths_are_all_taken_and_none_give_none(self):
        assert len(bench_points(np.eye(3, dtype=np.float32), 10, 0)[0]) == 3
        assert bench_points(np.zeros((4, 4)), 10, 0)[0].shape == (0, 2)

    def test_points_are_spread_with_the_remainder_first(self):
        assert bench_points_per_image(10_000, 654)[:191] == [16] * 190 + [15]
        assert sum(bench_points_per_image(10_000, 654)) == 10_000

    def test_depths_out_of_the_sets_range_are_unknown(self):
        depth_m = np.array([[0.0001, 0.5, 10.0, 10.1]])
        assert in_range(depth_m, "x/ScanNetPP_val.jsonl").tolist() == [[0, 0.5, 10.0, 0]]
        assert in_range(depth_m, "mine.jsonl").tolist() == depth_m.tolist()

    def test_an_image_counts_its_answered_points_and_an_image_without_any_is_zero(self):
        assert bench_delta1(np.array([1.0, 1.3, np.nan, 2.0]), np.array([1.0, 1.0, 1.0, 0.0])) == 0.5
        assert bench_delta1(np.array([np.nan, 1.0]), np.array([1.0, 0.0])) == 0


def _bench_row(row: dict) -> int:
    return ["02455b3d20", "4ef75031e3", "bde1e479ad", "be2e10f16a", "3e6ceea56c", "3db0a1c8f3"].index(row["scene_id"])


class Parrot:
    """An engine that gives one answer, or one flat depth map."""

    info = EngineInfo("parrot", "none", "llava", "cpu", "float32", ("a test",), 0, False)
    grid = ImageGrid(multiple=16, min_pixels=1, max_pixels=1 << 20)

    def __init__(self, text: str = "") -> None:
        self.text, self.asked, self.metres = text, 0, 1.5

    def answer_marked(self, image, blocks, questions, max_new_tokens, **options):
        return self.answer_each([paste(image, block) for block in blocks], questions, max_new_tokens, **options)

    def answer_each(self, images, questions, max_new_tokens, *, expects=None):
        self.asked += len(images)
        return [Answer(self.text, (), 0.5)] * len(images)

    def depth_map(self, image, question=""):
        return np.full((image.shape[0] // 32 * 32, image.shape[1] // 32 * 32), self.metres, np.float32)

    def close(self):
        pass


def parrot(text: str = "", card: str = "depthlm-12b", **changes) -> Estimator:
    return Estimator(replace(load_card(card)[0], **{"focal_px": 60.0, **changes}), Parrot(text))


@pytest.fixture
def labels(tmp_path) -> Path:
    """Two images of 64x48 with five points; depths 1, 1.37, 1.74, 2.11, 2.48 m."""
    return write_depthlm_labels(tmp_path, pixel_coords=[[20, 20], [30, 10], [2, 20], [40, 30], [50, 40]])


class TestRuns:
    def test_verdicts_of_both_readers_stand_side_by_side(self, labels):
        pytest.importorskip("math_verify")
        run = run_protocol(labels, parrot("about 1.70 meters"), "dataset_eval")
        figures = run.figures
        true = [1.0, 1.37, 1.74, 2.11, 2.48]
        asked = [q.point for q in dataset_eval([5, 5], range(2), lambda record, point: point != 2, 0)]
        right = [max(1.7 / true[point], true[point] / 1.7) < 1.25 for point in asked]
        assert figures["delta1_published_metric"] == pytest.approx(np.mean(right))
        assert (figures["delta1_strict_parser"], figures["unread_strict_parser"]) == (0, 10)
        assert (figures["questions"], figures["not_askable"], figures["unread_published_metric"]) == (10, 0, 0)
        assert figures["moved_on"] == 1
        assert "math-verify on the whole text" in benchmark.summary(run)

    def test_well_formed_answers_are_read_alike(self, labels):
        pytest.importorskip("math_verify")
        figures = run_protocol(labels, parrot(answer_text(1.7)), "dataset_inference", samples=0).figures
        # 1.37 m and 2.11 m are right, 1 m and 2.48 m are not; the point at column 2 can't be asked.
        assert figures["delta1_published_metric"] == figures["delta1_strict_parser"] == 0.5
        assert (figures["questions"], figures["answered_questions"], figures["not_askable"]) == (10, 8, 2)

    def test_a_model_of_vlm3_is_counted_as_its_notebook_does_too(self, labels):
        pytest.importorskip("math_verify")
        estimator = parrot(card="vlm3-depth")
        said = iter(["<answer> 2e0 </answer>", "far"] * 5)
        estimator.engine.answer_shared = lambda image, questions, tokens, expects: [
            Answer(next(said), (), 0.5) for _ in questions
        ]
        run = run_protocol(labels, estimator, "dataset_inference", samples=0)
        # Of 1, 1.74 and 2.48 m in the first image and 1.37 and 2.11 m in the second, 2 m is right for three.
        assert (run.figures["delta1_vlm3_notebook"], run.figures["left_out_vlm3_notebook"]) == (0.6, 5)
        assert run.figures["delta1_strict_parser"] == 0
        assert "VLM3's    0.600" in benchmark.summary(run)

    def test_a_point_that_repeats_is_asked_once_and_counted_each_time(self, labels):
        pytest.importorskip("math_verify")
        estimator = parrot(answer_text(1.7))
        figures = run_protocol(labels, estimator, "dataset_eval", samples=0).figures
        assert estimator.engine.asked < figures["questions"] == 10

    def test_depthvlm_bench_is_the_mean_over_images(self, tmp_path):
        labels = write_depthvlm_labels(tmp_path, pixel_coords=[[30, 20], [40, 30]], depth=[1.0, 1.0])
        estimator = parrot(card="depthvlm-4b")
        figures = run_protocol(labels, estimator, "depthvlm_bench").figures
        # The map of 16x12 is 1.000 m to 1.191 m in row-major order; 1.5 m is wrong for all of it by a factor of 1.25.
        assert (figures["delta1_mean_over_images"], figures["readout"]) == (0.0, "published")
        assert (figures["points_asked"], figures["frames"]) == (2, 1)
        estimator.engine.metres = 1.2
        again = run_protocol(labels, estimator, "depthvlm_bench")
        assert again.figures["delta1_mean_over_images"] == 1.0
        assert "depthvlm_bench: 1 images" in benchmark.summary(again)

    def test_a_protocol_of_another_schema_or_dialect_is_refused(self, labels, tmp_path):
        pytest.importorskip("math_verify")
        with pytest.raises(DatasetError, match="depthlm schema; protocol depthvlm_bench needs the depthvlm one"):
            run_protocol(labels, parrot(), "depthvlm_bench")
        with pytest.raises(ConfigError, match="needs an answer in words"):
            run_protocol(labels, parrot(card="depthvlm-4b"), "dataset_eval")

    def test_an_unknown_protocol_is_named(self, labels):
        with pytest.raises(ConfigError, match="did you mean 'dataset_eval'"):
            run_protocol(labels, parrot(), "dataset_evals")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--samples", "3"], "name one with --protocol"),
        (["--protocol", "depthvlm_bench", "--samples", "-1"], "--samples is -1"),
        (["--protocol", "depthvlm_bench", "--points", "9"], "--points 9 has no meaning"),
        (["--model", "depthlm-12b", "--commercial-use"], "may not be used commercially"),
    ],
)
def test_command_line_options_that_cannot_be(labels, tmp_path, capsys, arguments, message):
    assert main(["evaluate", str(labels), "--out", str(tmp_path / "out"), *arguments]) == 1
    assert message in capsys.readouterr().err


def test_on_real_photographs_with_real_architectures(data_folder, qwen2_5_vl_checkpoint, tmp_path, capsys):
    pytest.importorskip("math_verify")
    labels = data_folder / "ibims1" / "labels.jsonl"
    command = ["evaluate", str(labels), "--model", str(qwen2_5_vl_checkpoint), "--out", str(tmp_path / "out")]
    assert main([*command, "--device", "cpu", "--protocol", "dataset_eval", "--samples", "1"]) == 0
    said = capsys.readouterr().out
    assert "dataset_eval: 1 questions" in said and "δ1, authors'" in said and "δ1, strict" in said
    assert "assumed: the licence isn't known" in said
