"""Packed training beside trl's: the same work, question for question."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import make_checkpoint

from depthlm_ros.errors import MissingDependencyError
from depthlm_ros.modelcard import ModelCard
from depthlm_training import beside_trl, sft
from depthlm_training.asking import Asked
from depthlm_training.config import as_yaml, build

SCENES = {"scenes": 2, "seed": 3, "split": "train", "cameras": [[90, 90, 47.5, 35.5, 96, 72]]}
QUICK = {"steps": 2, "lr": 1e-3, "schedule": "constant", "warmup": 0, "log_every": 1, "device": "cpu"}


def _folder(path: Path, architecture: str) -> Path:
    folder = make_checkpoint(path / architecture, architecture, dense_head=False)
    card = ModelCard(
        name="small", source="small", licence="Apache-2.0", commercial_use=True, architecture=architecture,
        dialects=("coordinates",), default_dialect="coordinates", focal_px=90.0, policy="exact", depth_kind="z",
        max_new_tokens=64, description="Random weights.",
    )  # fmt: skip
    (folder / "depthlm_card.yaml").write_text(as_yaml(card), encoding="utf-8")
    return folder


def _recipe(folder: Path) -> sft.TextRecipe:
    return build(sft.TextRecipe, {"model": str(folder), "data": [SCENES], "points": 4, "train": QUICK})


@pytest.mark.parametrize("architecture", ["qwen3_vl", "qwen2_5_vl", "llava"])
def test_both_learn_the_same_from_the_same_questions(tmp_path, architecture):
    pytest.importorskip("trl")
    compared = beside_trl.compare(_recipe(_folder(tmp_path, architecture)), rounds=1, batches=(2, 3))
    assert (compared.batch, compared.questions) == (2, 8)
    before, after = compared.losses_packed
    assert after < before
    assert compared.losses_trl[0] == pytest.approx(before, rel=beside_trl.SAME_LOSS)
    # AdamW's first steps are the signs of gradients, those of rounding too.
    assert compared.losses_trl[1] == pytest.approx(after, rel=2e-3)
    assert compared.ratio["median"] == pytest.approx(compared.packed["median"] / compared.trl["median"])


@pytest.mark.parametrize("architecture", ["qwen3_vl", "llava"])
def test_gradients_are_those_of_one_question_a_sequence(tmp_path, architecture):
    recipe = _recipe(_folder(tmp_path, architecture))
    ours, theirs = sft.open_objective(recipe), sft.open_objective(recipe)
    asked = ours.make.asked(0)
    first = beside_trl.InMemory(((asked,),), ours.make)(0)
    (ours.loss(first, torch.device("cpu")).total / first.units).backward()
    alone = tuple(Asked(asked.images, (pair,)) for pair in asked.pairs)
    rows = [{"question": i} for i in range(len(alone))]
    theirs.model(**beside_trl.OneByOne(alone, theirs.make)(rows)).loss.backward()
    for (name, mine), other in zip(ours.model.named_parameters(), theirs.model.parameters(), strict=True):
        if other.grad is not None:
            torch.testing.assert_close(mine.grad, other.grad, rtol=1e-3, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_work_that_differs_is_not_compared(tmp_path, monkeypatch, capsys):
    pytest.importorskip("trl")
    other = beside_trl.Run(1.0, (2.0, 1.0))
    monkeypatch.setattr(beside_trl, "run_packed", lambda *_, **__: other)
    folder = _folder(tmp_path, "qwen3_vl")
    told = ["--model", str(folder), "--points", "2", "--steps", "1", "--batches", "2", "--rounds", "1"]
    assert beside_trl.main(told) == 1
    assert "it isn't the same work" in capsys.readouterr().err


def test_the_table_and_the_file_hold_every_number_of_points(monkeypatch, tmp_path, capsys):
    rate = {"median": 2.0, "min": 1.0, "max": 3.0}

    def compare(recipe, rounds, batches):
        return beside_trl.Compared(recipe.points, 20, 4, rate, rate, rate, (2.0, 1.5), (2.0, 1.5))

    monkeypatch.setattr(beside_trl, "compare", compare)
    assert beside_trl.main(["--model", "any", "--out", str(tmp_path / "out.json")]) == 0
    table = capsys.readouterr().out.splitlines()
    assert len({line.count("|") for line in table}) == 1
    assert [line.split("|")[1].strip() for line in table[2:]] == ["10", "32"]
    assert [row["points"] for row in json.loads((tmp_path / "out.json").read_text())] == [10, 32]


def test_without_trl_the_line_that_installs_it_is_said(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(MissingDependencyError, match="pip install trl"):
        beside_trl.run_trl(_recipe(_folder(tmp_path, "qwen3_vl")), (), 1)
