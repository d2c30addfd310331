"""Ablations: arms of a seed differ in what is tried alone, finished arms are kept, intervals are what they say."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from depthlm_ros.errors import ConfigError, EngineError
from depthlm_training.ablations import budget, edges, focal, questions, reference, sparse
from depthlm_training.ablations.base import NAMELESS, Base, begin, question
from depthlm_training.ablations.learner import Learner, Rates, fit, map_loss, mirrored, say
from depthlm_training.ablations.scenery import render_scenes
from depthlm_training.ablations.study import (
    Contrast,
    Outcome,
    Study,
    conduct,
    over_scenes,
    over_seeds,
    table,
    verdict,
)
from depthlm_training.demo.bank import View


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ablations")


@pytest.fixture(scope="module")
def learner():
    return Learner(seed=0).eval()


@dataclass(frozen=True)
class Toy:
    """Settings of a study that trains nothing."""

    gain: float = 0.2


def toy(settings: Toy = Toy(), runs: list | None = None) -> Study:  # noqa: B008
    """A study whose second arm is better by `gain` in every scene, give or take a seed's luck."""

    def run(task, seed, folder):
        if runs is not None:
            runs.append((task, seed))
        base = np.random.default_rng(seed).random(40)
        better = base + settings.gain + 0.01 * seed if task == "new" else base
        return {task: Outcome({"δ1": better.tolist()}, {"steps": 3})}

    contrasts = (Contrast("new is better", "δ1", "new", "old"),)
    return Study("toy", "Does the new arm help?", ("old", "new"), contrasts, run, settings)


def test_the_interval_over_seeds_is_student_s():
    interval = over_seeds([0.1, 0.2, 0.3])
    assert interval.mean == pytest.approx(0.2)
    assert interval.high - interval.mean == pytest.approx(4.303 * 0.1 / math.sqrt(3), rel=1e-3)


def test_the_interval_over_scenes_leaves_out_scenes_without_a_value():
    known = np.array([0.0, 1.0] * 50)
    with_gaps = np.concatenate([known, np.full(7, np.nan)])
    assert over_scenes([with_gaps]) == over_scenes([known])
    assert over_scenes([known]).high == pytest.approx(0.5 + 1.96 * known.std(ddof=1) / 10)


def test_a_paired_difference_shows_though_scenes_differ_more_than_arms(tmp_path):
    (row,) = conduct(toy(), 3, tmp_path)["contrasts"]
    assert row["difference"] == pytest.approx(0.21)
    assert row["over_seeds_95"][0] > 0.15 and row["verdict"] == "shows"


@pytest.mark.parametrize(
    ("low", "high", "said"), [(0.1, 0.2, "shows"), (-0.1, 0.2, "does not show"), (-2, -1, "the opposite shows")]
)
def test_a_verdict_says_what_the_interval_says(low, high, said):
    interval = replace(over_seeds([0.0, 0.0]), low=low, high=high)
    assert verdict(interval) == said


def test_finished_arms_are_not_run_again(tmp_path):
    runs: list = []
    first = conduct(toy(runs=runs), 2, tmp_path)
    assert len(runs) == 4
    again = conduct(toy(runs=runs), 3, tmp_path)
    assert runs[4:] == [("old", 2), ("new", 2)]
    assert again["arms"]["new"]["scores"]["δ1"]["by_seed"][:2] == first["arms"]["new"]["scores"]["δ1"]["by_seed"]


def test_arms_of_other_settings_are_not_mixed_in(tmp_path):
    conduct(toy(), 2, tmp_path)
    with pytest.raises(ConfigError, match="delete it or name another --run"):
        conduct(toy(Toy(gain=0.3)), 2, tmp_path)


@pytest.mark.parametrize("seeds", [0, 1, 11])
def test_a_number_of_seeds_without_an_interval_is_refused(tmp_path, seeds):
    with pytest.raises(ConfigError, match="choose 2 to 10"):
        conduct(toy(), seeds, tmp_path)


def test_a_table_has_every_arm_and_every_claim(tmp_path):
    text = table(conduct(toy(), 2, tmp_path))
    assert "| old |" in text and "| new |" in text and "new is better" in text


def test_scenes_are_rendered_once_and_differ_between_seeds_and_splits(folder):
    first = render_scenes(folder, 0, "train", 2)
    (path,) = (folder / "scenes").glob("0-train-2-*")
    before = path.stat().st_mtime_ns
    again = render_scenes(folder, 0, "train", 2)
    assert path.stat().st_mtime_ns == before
    assert np.array_equal(first.images, again.images)
    for seed, split in ((1, "train"), (0, "held_out")):
        assert not np.array_equal(first.images, render_scenes(folder, seed, split, 2).images)


def test_a_mirrored_image_keeps_its_labels_at_its_pixels():
    images = np.arange(4 * 2 * 3 * 3, dtype=np.uint8).reshape(4, 2, 3, 3)
    seen, depths = mirrored(images, images[..., 0].astype(np.float32), np.random.default_rng(0))
    assert np.array_equal(seen[..., 0], depths)
    assert not np.array_equal(seen, images)


def test_labels_are_the_same_pixels_each_time_and_as_many_as_asked(folder):
    depths = render_scenes(folder, 0, "train", 2).depths
    kept = sparse.labelled(depths, 16, seed=5)
    assert np.isfinite(kept).sum((1, 2)).tolist() == [16, 16]
    assert np.array_equal(kept, sparse.labelled(depths, 16, seed=5), equal_nan=True)
    chosen = np.isfinite(kept)
    assert np.array_equal(kept[chosen], depths[chosen])


def test_one_labelled_pixel_has_a_gradient_and_unlabelled_ones_have_none(learner, folder):
    scenes = render_scenes(folder, 0, "train", 2)
    depths = torch.full((2, 96, 128), torch.nan)
    depths[0, 40, 70] = 2.0
    encoded = learner.net.encode(torch.from_numpy(scenes.images))
    said = learner.net.log_depth(encoded)
    said.retain_grad()
    net = learner.net
    loss = map_loss(
        type("Said", (), {"log_depth": lambda _, __: said, "probe_log_depth": net.probe_log_depth})(), encoded, depths
    )
    loss.backward()
    assert np.argwhere(said.grad.numpy() != 0).tolist() == [[0, 40, 70]]
    net.zero_grad()


def test_a_loss_that_is_not_finite_ends_the_arm():
    module = torch.nn.ModuleDict({"hidden": torch.nn.Linear(2, 2)})
    with pytest.raises(EngineError, match="step 0 is nan"):
        fit(module, 2, lambda step: module["hidden"].weight.sum() * math.nan, Rates(), "toy")


def test_unified_views_show_a_source_pixel_where_its_camera_says(folder):
    scenes = render_scenes(folder, 0, "train", 2, View(128, 96, 180.0))
    shown = focal.show(scenes, 90.0)
    places, depths = shown.points(0, 50, np.random.default_rng(1))
    height, width = shown.images.shape[1:3]
    view = (places + 1) / 2 * (width, height) - 0.5
    source = np.rint((view + 0.5) / 0.5 - 0.5).astype(int)
    assert np.array_equal(depths, scenes.depths[0][source[:, 1], source[:, 0]].astype(np.float32))
    assert (height, width) == (64, 64)


def test_both_arms_have_about_as_many_image_tokens(folder):
    settings = replace(focal.Settings(), train_scenes=2)
    areas = {
        arm: np.mean([v.images[0, ..., 0].size for v in focal._views(settings, arm, 0, "train", folder).values()])
        for arm in (focal.UNIFIED, focal.AS_TAKEN)
    }
    assert 0.85 < areas[focal.UNIFIED] / areas[focal.AS_TAKEN] < 1.2


def test_a_budget_s_arms_have_the_same_number_of_labels():
    settings = budget.Settings()
    for images in settings.images:
        assert images * (settings.labels // images) == settings.labels


def test_every_dialect_asks_about_the_same_points_with_the_same_answers(folder):
    scenes = render_scenes(folder, 0, "train", 2)
    asked = {
        dialect: question(scenes.images, scenes.depths, dialect, 1, np.random.default_rng(3))
        for dialect in (reference.MARKER, reference.COORDINATES, NAMELESS)
    }
    for other in asked.values():
        assert np.array_equal(asked[NAMELESS].points, other.points)
        assert np.array_equal(asked[NAMELESS].depth_m, other.depth_m)
    assert len(set(asked[NAMELESS].texts)) == 1 and "arrow" not in asked[NAMELESS].texts[0]
    assert np.array_equal(asked[reference.COORDINATES].images, scenes.images)
    u, v = asked[reference.MARKER].points[0]
    assert asked[reference.MARKER].images[0, v, u - 1].tolist() == [255, 0, 0]


def test_arms_begin_with_the_same_weights(folder):
    first, again = (begin(_FEW, 0, folder).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_only_a_depth_between_two_surfaces_and_far_from_both_flies():
    near, far = np.full(5, 2.0), np.full(5, 8.0)
    assert edges.flying(np.array([1.0, 2.4, 4.0, 6.5, 9.0]), near, far).tolist() == [False, False, True, False, False]


def test_surfaces_are_those_within_two_pixels_and_never_the_sky():
    depth = np.full((9, 9), 2.0, np.float32)
    depth[:, 6:] = 8.0
    depth[0, 0] = np.nan
    near, far = edges.surfaces(depth)
    assert far[4].tolist() == [2.0] * 4 + [8.0] * 5
    assert near[4].tolist() == [2.0] * 8 + [8.0]
    assert np.isfinite(near).all() and np.isfinite(far).all()


def test_every_question_gets_a_reading(learner, folder):
    images = render_scenes(folder, 0, "train", 2).images
    depth = say(learner, images, ["a", "b", "c", "d"])
    assert depth.shape == (4,) and depth.dtype == np.float64


_FEW = Base(steps=1, batch=2, train_scenes=2, held_out_scenes=2)
_QUICK = {
    "focal": lambda: focal.study(
        replace(focal.Settings(), steps=1, train_scenes=2, held_out_scenes=2, images_each=1, points=8, scored_points=8)
    ),
    "sparse": lambda: sparse.study(
        replace(sparse.Settings(), steps=1, batch=2, train_scenes=2, held_out_scenes=2, points=(1,))
    ),
    "budget": lambda: budget.study(
        replace(budget.Settings(), steps=1, batch=2, labels=4, images=(2, 1), held_out_scenes=2)
    ),
    "edges": lambda: edges.study(replace(edges.Settings(), base=_FEW, steps=1, images=2, questions=2, scored_points=4)),
    "questions": lambda: questions.study(replace(questions.Settings(), base=_FEW, steps=1, images=2, questions=2)),
    "reference": lambda: reference.study(replace(reference.Settings(), base=_FEW, steps=1, images=2)),
}


@pytest.mark.parametrize("name", _QUICK)
def test_an_ablation_runs_from_scenes_to_its_table(name, folder):
    study = _QUICK[name]()
    assert study.name == name
    result = conduct(study, 2, folder)
    assert set(result["arms"]) >= {c.arm for c in study.contrasts} | {c.other for c in study.contrasts}
    json.dumps(result)
    assert table(result).count("\n") > 4
