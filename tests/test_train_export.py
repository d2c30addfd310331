"""From labels of one's own to a model folder: recipes with defaults, runs that go on, exports that are proven."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import numpy as np
import pytest
import torch
from recordings import drive, small_model

from depthlm_ros.bag_labels import LabelSettings, make_set
from depthlm_ros.bags import read_frames, write_bag
from depthlm_ros.cards import CARD_FILE, load_card
from depthlm_ros.cli import main
from depthlm_ros.errors import ConfigError, DatasetError, DialectError, ModelError, TrainingError
from depthlm_ros.estimator import Estimator
from depthlm_ros.modelcard import read_card
from depthlm_training import adapt as adapting
from depthlm_training import export as exporting
from depthlm_training.adapt import Adaptation, adapt, gain, scenes_of
from depthlm_training.dense_recipe import DenseRecipe
from depthlm_training.export import compared, export, kept_recipe, open_recipe, read_scores
from depthlm_training.finetune import FinetuneOptions, finetune, finetune_recipe
from depthlm_training.sft import TextRecipe
from depthlm_training.states import found, load_weights


@pytest.fixture(scope="module")
def base(qwen3_vl_checkpoint, tmp_path_factory) -> str:
    return str(small_model(qwen3_vl_checkpoint, tmp_path_factory.mktemp("base") / "small"))


@pytest.fixture(scope="module")
def labels(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("labels")
    write_bag(folder / "bag", drive(6))
    make_set(folder / "bag", folder / "set", LabelSettings(points=40, held_out=0.4, gap_s=0))
    return folder / "set"


QUICK = FinetuneOptions(steps=2, images=1, points=2, lr=1e-3)


def trained(labels, base, run, options=QUICK, overrides=()):
    recipe = finetune_recipe(labels, base, run, options, overrides)
    finetune(recipe)
    return recipe


@pytest.fixture(scope="module")
def dense_run(labels, base, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "dense"
    trained(labels, base, run)
    return run


@pytest.fixture(scope="module")
def lora_run(labels, base, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "lora"
    options = FinetuneOptions(("coordinates", "compact"), steps=2, images=1, points=2, lr=1e-2, lora=4)
    trained(labels, base, run, options, ["lora.dropout=0.1", "train.checkpoint_every=1"])
    return run


# ------------------------------------------------------------ recipes


def test_a_model_is_taught_all_that_it_speaks(labels, base, tmp_path):
    recipe = finetune_recipe(labels, base, tmp_path / "run", QUICK)
    assert isinstance(recipe, DenseRecipe)
    assert recipe.stage == "language"
    assert set(recipe.talk.ask) == {"coordinates", "marker", "compact"} and recipe.talk.each == 8
    assert recipe.data == ({"labels": str(labels / "train.jsonl"), "depth_kind": "z"},)
    assert (recipe.train.steps, recipe.train.lr, recipe.lora.rank) == (2, 1e-3, 0)
    assert {"vision", "language", "depth_head"} <= set(recipe.parts)


def test_without_the_dense_dialect_words_alone_are_taught(labels, base, tmp_path):
    recipe = finetune_recipe(labels, base, tmp_path / "run", FinetuneOptions(("compact",), points=8))
    assert isinstance(recipe, TextRecipe)
    assert (recipe.ask, recipe.points, recipe.each) == ({"compact": 1.0}, 8, 8)


def test_large_models_are_taught_by_adapters(labels, base, tmp_path, monkeypatch):
    monkeypatch.setattr("depthlm_training.finetune.LARGE", 1000)
    recipe = finetune_recipe(labels, base, tmp_path / "run", FinetuneOptions())
    assert recipe.lora.rank == 16
    assert recipe.parts == ("depth_head",), "the head is no adapter"
    assert recipe.train.lr == 2e-4


def test_settings_win_over_what_follows_from_the_options(labels, base, tmp_path):
    overrides = ["stage=head", "trained=[depth_head]", "train.lr=0.5"]
    recipe = finetune_recipe(labels, base, tmp_path / "run", QUICK, overrides)
    assert (recipe.stage, recipe.parts, recipe.train.lr) == ("head", ("depth_head",), 0.5)


def test_what_cannot_be_taught_is_refused_before_anything_is_loaded(labels, base, tmp_path):
    with pytest.raises(DialectError, match="unknown dialect 'metres'"):
        finetune_recipe(labels, base, tmp_path / "run", FinetuneOptions(("metres",)))
    with pytest.raises(DatasetError, match=r"holds no train.jsonl; give a folder of depthlm bag to-sft"):
        finetune_recipe(tmp_path, base, tmp_path / "run", QUICK)
    with pytest.raises(ModelError, match="doesn't exist"):
        finetune_recipe(labels, "./nothing", tmp_path / "run", QUICK)
    with pytest.raises(ConfigError, match="unknown key 'steps'"):
        finetune_recipe(labels, base, tmp_path / "run", QUICK, ["steps=3"])


# ------------------------------------------------------------ runs


def test_a_finished_run_is_a_model(dense_run, labels):
    frame = next(read_frames(labels.parent / "bag")).frame
    with Estimator.load(str(dense_run), device="cpu", dtype="float32") as estimator:
        result = estimator.estimate(frame.image, frame.camera, np.array([[30.0, 30.0]]))
    assert result.valid.all()


def test_a_run_keeps_its_recipe(dense_run, lora_run):
    assert isinstance(kept_recipe(dense_run), DenseRecipe)
    recipe = kept_recipe(lora_run)
    assert isinstance(recipe, TextRecipe)
    assert (recipe.lora.rank, recipe.lora.dropout, recipe.run) == (4, 0.1, lora_run)


def test_another_run_in_the_same_folder_is_refused_and_changes_nothing(dense_run, labels, base):
    before = (dense_run / "DenseRecipe.yaml").read_bytes()
    with pytest.raises(ConfigError, match="holds step-00000002 already; pass --resume"):
        trained(labels, base, dense_run, FinetuneOptions(steps=9))
    assert (dense_run / "DenseRecipe.yaml").read_bytes() == before


# ------------------------------------------------------------ export


def test_a_dense_model_is_exported_as_it_was_trained(dense_run, base, tmp_path):
    made = export(dense_run, tmp_path / "mine")
    assert (made.step, made.difference) == (2, pytest.approx(0, abs=1e-6))
    assert made.card.name == made.card.source == "mine"
    assert "Trained further from small: 2 steps." in made.card.description
    card, source = load_card(str(tmp_path / "mine"))
    assert (card, source) == (made.card, tmp_path / "mine")
    assert "lr: 0.001" in (tmp_path / "mine" / "README.md").read_text()
    assert read_card(Path(base) / CARD_FILE).name == "small"


def test_adapters_are_merged(lora_run, tmp_path):
    made = export(lora_run, tmp_path / "mine")
    assert 0 < made.difference < 1e-4
    objective = open_recipe(kept_recipe(lora_run))
    untrained = compared(objective, tmp_path / "mine")
    assert untrained > 100 * made.difference, "training has changed what the model says"
    assert not [file for file in (tmp_path / "mine").iterdir() if "adapter" in file.name]


def test_an_earlier_checkpoint_can_be_exported(lora_run, tmp_path):
    made = export(lora_run, tmp_path / "first", step=1)
    assert made.step == 1
    objective = open_recipe(kept_recipe(lora_run))
    load_weights(found(lora_run)[0], objective.model)
    assert compared(objective, tmp_path / "first") < 1e-4


def test_weights_can_be_stored_in_half_the_space(dense_run, tmp_path):
    made = export(dense_run, tmp_path / "half", dtype="bfloat16")
    assert 0 < made.difference < 0.05
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (tmp_path / "half", dense_run)]
    assert sizes[0] < 0.6 * sizes[1]


def test_everybody_may_read_the_weights_who_may_read_the_settings(dense_run, tmp_path):
    umask = os.umask(0o022)
    try:
        export(dense_run, tmp_path / "mine")
    finally:
        os.umask(umask)
    assert stat.S_IMODE((tmp_path / "mine" / "model.safetensors").stat().st_mode) == 0o644


def test_a_folder_that_answers_otherwise_is_not_written(dense_run, tmp_path, monkeypatch):
    saved = exporting.dense.DenseObjective.save

    def spoilt(self, folder):
        weight = self.model.depth_head.mlp[2].weight
        with torch.no_grad():
            weight.mul_(2)
            saved(self, folder)
            weight.div_(2)

    monkeypatch.setattr(exporting.dense.DenseObjective, "save", spoilt)
    with pytest.raises(TrainingError, match="differently from the run, more than 0.1% of float32; nothing was written"):
        export(dense_run, tmp_path / "mine")
    assert not list(tmp_path.iterdir())


def test_scores_go_into_the_card(dense_run, labels, tmp_path):
    command = ["evaluate", str(labels / "held_out.jsonl"), "--model", str(dense_run), "--device", "cpu"]
    assert main([*command, "--out", str(tmp_path / "scores")]) == 0
    metrics = json.loads((tmp_path / "scores" / "metrics.json").read_text())
    made = export(dense_run, tmp_path / "mine", scores=[tmp_path / "scores" / "metrics.json"])
    assert made.card.scores["dense"] == pytest.approx(metrics["depth"]["delta1"], abs=1e-4)
    assert "held_out.jsonl, 80 points" in made.card.scores["source"]
    assert f"| dense | {made.card.scores['dense']:.3f} |" in (tmp_path / "mine" / "README.md").read_text()


def test_what_cannot_be_exported_is_refused(dense_run, tmp_path):
    with pytest.raises(ConfigError, match="so it is no run"):
        export(tmp_path, tmp_path / "mine")
    with pytest.raises(ConfigError, match="exists already"):
        export(dense_run, tmp_path)
    with pytest.raises(TrainingError, match="no checkpoint of step 7; there are 1, 2"):
        export(dense_run, tmp_path / "mine", step=7)
    with pytest.raises(ConfigError, match="dtype is 'int8'"):
        export(dense_run, tmp_path / "mine", dtype="int8")
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"other.json holds no scores \(KeyError"):
        read_scores([tmp_path / "other.json"])
    with pytest.raises(ConfigError, match="missing.json holds no scores"):
        read_scores([tmp_path / "missing.json"])


# ------------------------------------------------------------ commands


def test_a_dry_run_prints_settings_and_a_sample_and_leaves_nothing(labels, base, tmp_path, capsys):
    command = ["finetune", str(labels), "--model", base, "--out", str(tmp_path / "run"), "--dry-run"]
    assert main([*command, "--dialects", "coordinates", "--set", "train.steps=7"]) == 0
    printed = capsys.readouterr().out
    assert "steps: 7" in printed and "<answer>" in printed and "«" in printed
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_commands_train_resume_and_export(labels, base, tmp_path, capsys):
    command = ["finetune", str(labels), "--model", base, "--out", str(tmp_path / "run"), "--images", "1"]
    command += ["--points", "2", "--dialects", "marker"]
    assert main([*command, "--steps", "1"]) == 0
    assert main([*command, "--steps", "1"]) == 1
    assert "pass --resume" in capsys.readouterr().err
    assert main([*command, "--steps", "2", "--resume"]) == 0
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "mine")]) == 0
    assert "mine: step 2, dialects dense, coordinates, marker, compact" in capsys.readouterr().out
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "mine")]) == 1
    assert "ConfigError" in capsys.readouterr().err


@pytest.mark.ros
@pytest.mark.slow
def test_the_node_answers_with_an_export(dense_run, labels, tmp_path, ros_domain, capsys):
    pytest.importorskip("rclpy")
    export(dense_run, tmp_path / "mine")
    command = ["replay", str(labels.parent / "bag"), "--model", str(tmp_path / "mine"), "--device", "cpu"]
    assert main([*command, "--frames", "2", "--out", str(tmp_path / "replay")]) == 0
    assert "2 sent, 2 answered" in capsys.readouterr().out


# ------------------------------------------------------------ another camera


TINY = {"drives": 2, "frames": 3, "width": 96, "height": 64, "labels": 100, "images": 2}


@pytest.mark.slow
def test_half_of_a_recording_teaches_the_other_half(base, tmp_path):
    (made,) = adapt(Adaptation(model=base, steps=25, lr=3e-3, **TINY), tmp_path / "adapt")
    assert (made.dialect, made.scenes, made.points) == ("dense", 3, 300)
    # Random weights know nothing of depth, and half a minute is enough to learn what a street is like.
    assert made.after > made.before
    assert json.loads((tmp_path / "adapt" / "gain.json").read_text())["gains"][0]["gain"] == made.gain


def test_no_scene_is_in_both_halves(tmp_path):
    settings = Adaptation(**TINY)
    adapting.record(settings, tmp_path / "bag")
    make_set(tmp_path / "bag", tmp_path / "set", LabelSettings(points=5, held_out=0.5, gap_s=0))
    halves = [set(scenes_of(tmp_path / "set" / name, settings)) for name in ("train.jsonl", "held_out.jsonl")]
    assert halves == [{0, 1, 2}, {3, 4, 5}]


def test_the_gain_is_paired_over_scenes():
    rng = np.random.default_rng(0)
    scenes = np.repeat(np.arange(40), 2)
    level = np.repeat(rng.uniform(0, 0.8, 40), 2)
    before = [rng.random(2000) < share for share in level]
    after = [rng.random(2000) < share + 0.1 for share in level]
    found_gain = gain("dense", before, after, scenes)
    assert found_gain.gain == pytest.approx(0.1, abs=0.01)
    low, high = found_gain.interval_95
    assert 0.08 < low < found_gain.gain < high < 0.12, "scenes differ by 0.8, the gain hardly"
