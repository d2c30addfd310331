"""Fine-tuning in words: what is asked, what is supervised, which weights move, what is saved."""

from __future__ import annotations

import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import make_checkpoint

from depthlm_ros import motion
from depthlm_ros.camera import Camera
from depthlm_ros.errors import ConfigError
from depthlm_ros.markers import ARROW_COLOUR
from depthlm_ros.modelcard import ModelCard
from depthlm_ros.prompts import parse_compact_points, parse_depth
from depthlm_training import sft
from depthlm_training.asking import MOTION, SINGLE, Asking, ask, cropped, shown, speed_answer, stretched, time_answer
from depthlm_training.config import as_yaml, build
from depthlm_training.parts import PARTS, merged_weights, part_of, train_only
from depthlm_training.rows import BadRow
from depthlm_training.sources import Example
from depthlm_training.trainer import train

CAMERA = Camera(180.0, 190.0, 100.0, 70.0, 200, 150)
CPU = torch.device("cpu")


def _card(**changes) -> ModelCard:
    values = {
        "name": "small", "source": "small", "licence": "Apache-2.0", "commercial_use": True,
        "architecture": "qwen3_vl", "dialects": ("coordinates", "marker", "compact"), "default_dialect": "coordinates",
        "focal_px": 180.0, "policy": "exact", "depth_kind": "z", "max_new_tokens": 64, "description": "Random weights.",
    }  # fmt: skip
    return ModelCard(**(values | changes))


def _example(count: int = 40, seed: int = 0, **changes) -> Example:
    rng = np.random.default_rng(seed)
    pixels = np.stack([rng.integers(20, 180, count), rng.integers(20, 130, count)], axis=1).astype(np.float32)
    values = {
        "name": "row", "images": (rng.integers(0, 256, (150, 200, 3), dtype=np.uint8),), "cameras": (CAMERA,),
        "pixels": pixels, "depth_m": rng.uniform(1, 9, count).astype(np.float32),
    }  # fmt: skip
    return Example(**(values | changes))


def _folder(path: Path, architecture: str = "qwen3_vl", tied: bool = False, **card) -> Path:
    folder = make_checkpoint(path / architecture, architecture, dense_head=False, tie_word_embeddings=tied)
    (folder / "depthlm_card.yaml").write_text(as_yaml(_card(architecture=architecture, **card)), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return _folder(tmp_path_factory.mktemp("sft"))


SCENES = {"scenes": 12, "seed": 3, "split": "train", "cameras": [[90, 90, 47.5, 35.5, 96, 72]]}


def _recipe(folder: Path, **changes) -> sft.TextRecipe:
    return build(sft.TextRecipe, {"model": str(folder), "data": [SCENES], "points": 3, "images": 2} | changes)


# ------------------------------------------------------------ asking


@pytest.mark.parametrize("kind", ["z", "euclidean"])
@pytest.mark.parametrize("dialect", ["marker", "coordinates", "compact"])
def test_answers_state_the_depth_of_the_pixel_that_is_asked(dialect, kind):
    card = _card(depth_kind=kind)
    example = _example()
    asked = ask(example, Asking(dialect, card, points=1), np.random.default_rng(1))
    (question, answer), view = asked.pairs[0], shown(example.images[0], CAMERA, Asking(dialect, card))
    said = parse_compact_points(answer, 1)[0] if dialect == "compact" else parse_depth(answer)
    at = view.from_source(example.pixels)
    if dialect == "marker":
        row = _under_the_arrow(asked.images[0], np.rint(at).astype(int))
    else:
        steps = 1000 if dialect == "compact" else 2000
        told = np.array([int(n) for n in re.findall(r"\d+", question.rpartition(": ")[2] or question)[:2]])
        if dialect == "coordinates":
            told = np.array([int(n) for n in re.search(r"\((\d+), (\d+)\)", question).groups()])
        row = np.abs(at / (view.camera.width, view.camera.height) * steps - told).sum(axis=1).argmin()
    z = example.depth_m[row]
    true = z if kind == "z" else z * np.linalg.norm(CAMERA.rays(example.pixels[row]))
    assert said == pytest.approx(true, abs=0.0051)


def _under_the_arrow(image: np.ndarray, places: np.ndarray) -> int:
    """The row of the place that the arrow in an image points at: nine red pixels to its left, itself untouched."""
    red = (image == ARROW_COLOUR).all(axis=2)
    tips = [row for row, (u, v) in enumerate(places) if red[v, u - 5 : u].all() and red[v + 1, u - 2] and not red[v, u]]
    assert len(tips) == 1
    return tips[0]


def test_coordinates_ask_about_as_many_different_points_as_told():
    asked = ask(_example(), Asking("coordinates", _card(), points=7), np.random.default_rng(0))
    assert len(asked.pairs) == len(set(asked.pairs)) == 7
    few = ask(_example(count=4), Asking("coordinates", _card(), points=7), np.random.default_rng(0))
    assert len(few.pairs) == 4


def test_a_compact_question_about_several_points():
    asked = ask(_example(), Asking("compact", _card(), points=3, each=4), np.random.default_rng(0))
    assert [len(answer.split()) for _, answer in asked.pairs] == [4, 4, 4]
    assert all(parse_compact_points(answer, 4) for _, answer in asked.pairs)


def test_the_cards_own_sentence_is_said():
    asked = ask(
        _example(), Asking("coordinates", _card(answer="<answer> {number} </answer>")), np.random.default_rng(0)
    )
    assert re.fullmatch(r"<answer> \d+\.\d\d </answer>", asked.pairs[0][1])


def test_speed_and_time_are_answered_as_in_the_published_figure():
    assert speed_answer(7.23, 4.0) == (
        "The point is around 7.23 meters away. Hence, the speed should be around 7.23 / 4.0 = 1.81m/s"
    )
    assert time_answer(48.28, 6.0) == (
        "The point is around 48.28 meters away. Hence, we need around 48.28 / 6.0 = 8.05s"
    )


@pytest.mark.parametrize("task", MOTION)
def test_the_packages_parsers_read_the_answers(task):
    example = _example(count=2)
    asked = ask(example, Asking(task, _card(), points=1 if task in SINGLE else 3), np.random.default_rng(0))
    points = CAMERA.unproject(example.pixels, example.depth_m)
    ranges = np.linalg.norm(points, axis=1)
    for question, answer in asked.pairs:
        if task == "axis_distance":
            assert np.isclose(points[:, 2], motion.parse_metres(answer), atol=0.0051).any()
        elif task == "two_points":
            apart = np.linalg.norm(points[0] - points[1])
            assert motion.parse_metres(answer) == pytest.approx(apart, abs=0.0051)
        elif task == "speed":
            seconds = float(re.search(r"exactly ([\d.]+) seconds", question).group(1))
            assert np.isclose(ranges / seconds, motion.parse_speed_mps(answer), atol=0.02).any()
        else:
            speed = float(re.search(r"speed of ([\d.]+)m/s", question).group(1))
            assert np.isclose(ranges / speed, motion.parse_seconds(answer), atol=0.02).any()
    assert len(asked.pairs) == (1 if task in SINGLE else 3)


def test_crops_are_centred_of_the_published_sizes_and_keep_points_in_place():
    card = _card(policy="published", focal_px=1800.0)
    how = Asking("coordinates", card, policy="published", crops="centred")
    view = shown(_example().images[0], CAMERA, how)
    assert (view.camera.width, view.camera.height) == (2000, 1500)
    sizes = set()
    for seed in range(5):
        crop = cropped(view, np.random.default_rng(seed))
        height, width = crop.image.shape[:2]
        assert 700 <= height <= 1200 and 1000 <= width <= 1400
        left, top = (2000 - width) // 2, (1500 - height) // 2
        assert np.array_equal(crop.image, view.image[top : top + height, left : left + width])
        at, inside = crop.from_source(np.array([[100.0, 70.0]])), view.from_source(np.array([[100.0, 70.0]]))
        assert np.array_equal(at, inside - (left, top))
        sizes.add((height, width))
    assert len(sizes) == 5


def test_stretched_images_have_the_published_heights_and_keep_points_in_place():
    card = _card(policy="published", focal_px=1800.0)
    view = shown(_example().images[0], CAMERA, Asking("coordinates", card, policy="published"))
    point, heights = np.array([[100.0, 70.0]]), set()
    for seed in range(5):
        other = stretched(view, np.random.default_rng(seed))
        height, width = other.image.shape[:2]
        assert width == 2000 and 2000 / 1.3 - 1 <= height <= 2000
        assert (other.camera.fx, other.camera.cx) == (view.camera.fx, view.camera.cx)
        np.testing.assert_allclose(other.to_source(other.from_source(point)), point, atol=0.1)
        # A row of the image is where its points are.
        row = float(other.from_source(point)[0, 1])
        assert row == pytest.approx((view.from_source(point)[0, 1]) * height / 1500, abs=2)
        heights.add(height)
    assert len(heights) == 5


def test_a_stretched_image_of_the_exact_policy_keeps_pixel_areas():
    view = shown(_example().images[0], CAMERA, Asking("coordinates", _card(focal_px=1800.0)))
    other = stretched(view, np.random.default_rng(0), 32)
    height = other.image.shape[0]
    assert height % 32 == 0 and height != view.image.shape[0]
    corners = np.array([[-0.5, -0.5], [CAMERA.width - 0.5, CAMERA.height - 0.5]])
    before, after = view.from_source(corners), other.from_source(corners)
    np.testing.assert_allclose((after[:, 1] + 0.5) / height, (before[:, 1] + 0.5) / view.image.shape[0], atol=1e-9)


def test_crops_of_the_exact_policy_are_sizes_that_the_processor_keeps():
    view = shown(_example().images[0], CAMERA, Asking("coordinates", _card(focal_px=1800.0)))
    crop = cropped(view, np.random.default_rng(0), 32)
    assert crop.image.shape[0] % 32 == crop.image.shape[1] % 32 == 0


def test_points_outside_a_crop_are_not_asked():
    example = _example(pixels=np.array([[2.0, 2.0], [100.0, 75.0]], np.float32), depth_m=np.float32([1, 2]))
    how = Asking("coordinates", _card(focal_px=1800.0), points=2, crops="centred")
    asked = ask(example, how, np.random.default_rng(0))
    assert [parse_depth(answer) for _, answer in asked.pairs] == [2.0]


@pytest.mark.parametrize(
    ("dialect", "changes"),
    [
        ("coordinates", {"cameras": (None,)}),
        ("coordinates", {"pixels": np.zeros((0, 2), np.float32), "depth_m": np.zeros(0, np.float32)}),
        ("coordinates", {"depth_m": np.full(40, 1e-3, np.float32)}),
        ("marker", {"pixels": np.float32([[0, 0]]), "depth_m": np.float32([1])}),
        ("two_points", {"pixels": np.float32([[90, 70]]), "depth_m": np.float32([1])}),
        ("dialogue", {}),
    ],
)
def test_what_cannot_be_asked_is_a_bad_row(dialect, changes):
    with pytest.raises(BadRow):
        ask(_example(**changes), Asking(dialect, _card()), np.random.default_rng(0))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"dialect": "arrow"}, "marker"),
        ({"dialect": "marker", "points": 4}, "set it to 1"),
        ({"dialect": "coordinates", "each": 2}, "only compact"),
        ({"dialect": "compact", "points": 0}, "at least 1"),
        ({"dialect": "compact", "policy": "other"}, "exact"),
    ],
)
def test_what_no_example_can_be_asked_is_refused_at_once(changes, said):
    with pytest.raises(ConfigError, match=said):
        Asking(**({"card": _card()} | changes))


@pytest.mark.parametrize(
    ("task", "size"),
    [("correspondence", (1024, 768)), ("pose", (833, 592)), ("object", (1111, 833)), ("dialogue", (1111, 833))],
)
def test_each_task_shows_images_its_own_way(task, size):
    """VLM3: correspondence at a longest edge of 1024, pose at a focal length of 750, the others at 1000."""
    card = _card(system="vlm3", focal_px=1000.0, policy="published")
    pairs = (("Why?", "So."), ("How?", "Thus."), ("Who?", "Me."))
    pair = _example(images=(_example().images[0],) * 2, cameras=(CAMERA,) * 2, dialogue=pairs)
    asked = ask(pair, Asking(task, card, policy="published", points=2), np.random.default_rng(0))
    assert [image.shape[1::-1] for image in asked.images] == [size] * 2
    assert len(asked.pairs) == 2 and set(asked.pairs) <= set(pairs)


# ------------------------------------------------------------ micro-batches


def test_a_micro_batch_is_a_pure_function_of_its_number(folder):
    recipe = _recipe(folder, ask={"coordinates": 1, "marker": 1, "compact": 1, "speed": 1})
    make = sft.text_batches(recipe, *sft.opened(recipe))
    elsewhere = pickle.loads(pickle.dumps(make))
    for k in (5, 0, 3):
        one, other = make(k), elsewhere(k)
        assert torch.equal(one.ids, other.ids) and torch.equal(one.labels, other.labels)
        assert torch.equal(one.images["pixel_values"], other.images["pixel_values"])
    assert not torch.equal(make(0).ids, make(1).ids)


def test_dialects_come_by_their_shares(folder):
    recipe = _recipe(folder, ask={"coordinates": 3, "compact": 1}, points=1, images=1)
    make = sft.text_batches(recipe, *sft.opened(recipe))
    compact = sum("in [0, 1000):" in make.asked(k).pairs[0][0] for k in range(100))
    assert 12 < compact < 40


def test_a_row_that_cannot_be_asked_is_counted_and_replaced(folder, tmp_path):
    from PIL import Image

    rows = []
    for i in range(20):
        Image.fromarray(_example(seed=i).images[0]).save(tmp_path / f"{i}.png")
        rows.append({"image": f"{i}.png", "intrinsics": [180, 180, 100, 75, 200, 150],
                     "pixel_coords": [[100, 75]], "depth": [0.001 if i == 7 else 2.0]})  # fmt: skip
    (tmp_path / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    entry = {"labels": str(tmp_path / "labels.jsonl"), "depth_kind": "z"}
    recipe = _recipe(folder, data=[entry], train={"bad_rows": 1.0})
    make = sft.text_batches(recipe, *sft.opened(recipe))
    answers = [make.asked(k).pairs[0][1] for k in range(100)]
    assert [parse_depth(answer) for answer in answers] == [2.0] * 100
    assert len(make.mixture.bad_rows) == 1 and "labels.jsonl:8" in make.mixture.bad_rows.report()


# ------------------------------------------------------------ parts


@pytest.mark.parametrize("architecture", ["qwen3_vl", "qwen2_5_vl", "llava"])
def test_every_weight_belongs_to_a_part(tmp_path, architecture):
    model = sft.open_objective(_recipe(_folder(tmp_path, architecture))).model
    parts = {name: part_of(name) for name, _ in model.named_parameters()}
    assert None not in parts.values()
    assert set(parts.values()) == set(PARTS) - {"depth_head"}
    train_only(model, ["merger", "*layers.1.mlp.*"])
    trained = [name for name, weight in model.named_parameters() if weight.requires_grad]
    assert {parts[name] for name in trained if "layers.1.mlp" not in name} == {"merger"}
    assert any("layers.1.mlp" in name for name in trained)


def test_an_unknown_part_is_refused(folder):
    with pytest.raises(ConfigError, match="did you mean 'language'"):
        sft.open_objective(_recipe(folder, trained=["langage"]))


def test_the_language_head_is_the_embedding_where_they_are_tied(tmp_path):
    model = sft.open_objective(_recipe(_folder(tmp_path, tied=True), trained=["lm_head"])).model
    assert model.get_input_embeddings().weight.requires_grad


def test_frozen_parts_get_no_gradient(folder):
    objective = sft.open_objective(_recipe(folder, trained=["language"]))
    objective.loss(objective.make(0), CPU).total.backward()
    for name, weight in objective.model.named_parameters():
        assert (weight.grad is not None) == (part_of(name) == "language"), name


def test_adapters_begin_as_nothing_and_can_be_merged(folder):
    whole = sft.open_objective(_recipe(folder))
    recipe = _recipe(folder, trained=[], lora={"rank": 4, "parts": ["language", "merger"]})
    adapted, again = sft.open_objective(recipe), sft.open_objective(recipe)
    batch = whole.make(0)
    with torch.no_grad():
        assert torch.equal(whole.loss(batch, CPU).total, adapted.loss(batch, CPU).total)
    names = [name for name, weight in adapted.model.named_parameters() if weight.requires_grad]
    assert names and all("lora_" in name for name in names)
    for (name, weight), (_, same) in zip(adapted.model.named_parameters(), again.model.named_parameters(), strict=True):
        assert torch.equal(weight, same), name
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in adapted.model.named_parameters():
            if "lora_B" in name:
                weight.copy_(torch.randn(weight.shape, generator=rng) * 0.1)
        changed = adapted.loss(batch, CPU).total
        merged = merged_weights(adapted.model)
        assert merged.keys() == whole.model.state_dict().keys()
        whole.model.load_state_dict(merged)
        torch.testing.assert_close(whole.loss(batch, CPU).total, changed, rtol=1e-5, atol=1e-4)
    assert not torch.equal(changed, again.loss(batch, CPU).total)


def test_adapters_beside_parts_that_are_trained_whole(folder):
    model = sft.open_objective(_recipe(folder, trained=["merger"], lora={"rank": 2})).model
    trained = {(part_of(name), "lora_" in name) for name, weight in model.named_parameters() if weight.requires_grad}
    assert trained == {("merger", False), ("language", True)}


# ------------------------------------------------------------ loss


def test_the_loss_is_that_of_one_question_after_another(folder):
    objective = sft.open_objective(_recipe(folder))
    batch = objective.make(0)
    whole = objective.loss(batch, CPU)
    recipe = _recipe(folder, tokens_per_row=batch.tokens // 4)
    apart = sft.open_objective(recipe)
    split = apart.loss(apart.make(0), CPU)
    assert split.units == whole.units and split.tokens > whole.tokens
    torch.testing.assert_close(split.total, whole.total, rtol=1e-5, atol=1e-4)


def test_activations_that_are_computed_again_give_the_same_gradients(folder):
    grads = []
    for again in (False, True):
        objective = sft.open_objective(_recipe(folder, checkpointing=again))
        objective.model.train()
        objective.loss(objective.make(0), CPU).total.backward()
        grads.append({name: weight.grad for name, weight in objective.model.named_parameters()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, msg=name)


def test_bfloat16_products_change_the_loss_little(folder):
    objective = sft.open_objective(_recipe(folder))
    batch = objective.make(0)
    with torch.no_grad():
        wide = objective.loss(batch, CPU).total
        with torch.autocast("cpu", torch.bfloat16):
            narrow = objective.loss(batch, CPU).total
    assert narrow.dtype == torch.float32 and narrow != wide
    torch.testing.assert_close(narrow, wide, rtol=0.02, atol=0)


def test_what_a_step_computes_is_counted_by_what_is_trained(folder):
    flops = [
        sft.open_objective(_recipe(folder, **changes)).loss
        for changes in ({}, {"trained": ["language"]}, {"trained": [], "lora": {"rank": 2}}, {"trained": ["lm_head"]})
    ]
    batch = flops[0].__self__.make(0)
    counted = [loss(batch, CPU).flop for loss in flops]
    assert counted == sorted(counted, reverse=True) and len(set(counted)) == 4


# ------------------------------------------------------------ a run


def test_a_model_learns_what_it_is_told_and_the_engine_says_it(folder, tmp_path):
    from depthlm_ros.estimator import Estimator

    source = {"scenes": 1, "seed": 3, "split": "train", "cameras": [[90, 90, 47.5, 35.5, 96, 72]], "points": 2}
    recipe = _recipe(
        folder, data=[source], run=str(tmp_path / "run"), ask={"compact": 1}, points=2, images=1,
        train={"steps": 60, "lr": 3e-3, "log_every": 20, "checkpoint_every": 60},
    )  # fmt: skip
    objective = sft.open_objective(recipe)
    before = objective.loss(objective.make(0), CPU).total.item()
    train(objective, recipe.train, recipe.run)
    after = objective.loss(objective.make(0), CPU).total.item()
    assert after < 0.05 * before
    saved = tmp_path / "saved"
    objective.save(saved)
    example = objective.make.mixture.example(0)
    with Estimator.load(str(saved), dialect="compact", device="cpu", dtype="float32") as estimator:
        assert estimator.card.name == "saved" and not estimator.card.scores
        result = estimator.estimate(example.images[0], example.cameras[0], example.pixels)
    np.testing.assert_allclose(result.depth_m, example.depth_m, atol=0.0051)


def test_pairs_of_scenes_and_crops_are_said_by_a_source(folder):
    camera = SCENES["cameras"]
    pairs = {"pairs": 2, "task": "correspondence", "seed": 0, "split": "train", "cameras": camera}
    data = [SCENES | {"crops": "centred"}, pairs]
    recipe = build(sft.TextRecipe, {"model": str(folder), "data": data, "points": 2, "crops": "stretched"})
    first, second = sft.open_objective(recipe).make.ways
    assert [way.asking.crops for way in (*first, *second)] == ["centred", "stretched"]
    assert [way.asking.dialect for way in second] == ["correspondence"]


def test_the_dry_run_shows_settings_and_what_is_to_be_said(folder, capsys):
    arguments = [f"model={folder}", f"data={json.dumps([SCENES])}", "points=2", "train.lr=2e-5", "--dry-run"]
    assert sft.main(arguments) == 0
    told = capsys.readouterr().out
    assert "lr: 2.0e-05" in told and "image tokens>" in told
    said = re.findall("«(.*?)»", told, re.DOTALL)
    assert len(said) == 2
    assert all(parse_depth(text.removesuffix("<|im_end|>")) for text in said)


def test_mistakes_are_told_in_a_line(folder, capsys):
    assert sft.main([f"model={folder}", f"data={json.dumps([SCENES])}", "pionts=2"]) == 1
    assert "did you mean 'points'" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_with_sharded_weights_do_what_one_does(folder, tmp_path):
    recipe = {"model": str(folder), "data": [SCENES], "points": 3, "images": 2, "run": str(tmp_path / "two")}
    settings = {"steps": 2, "micro_batches": 2, "log_every": 1, "lr": 1e-3, "device": "cpu", "warmup": 0}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe | {"train": settings | {"parallel": "fsdp2"}}))
    script = tmp_path / "run.py"
    script.write_text(
        "import sys\nimport conftest\nfrom depthlm_training import parallel, sft\n"
        "parallel.end_process(sft.main(sys.argv[1:]))\n"
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    paths = os.pathsep.join([str(Path(__file__).parent), os.environ["PYTHONPATH"]])
    done = subprocess.run(
        [*torchrun, str(script), str(tmp_path / "recipe.yaml")],
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    alone = build(sft.TextRecipe, recipe | {"train": settings, "run": str(tmp_path / "one")})
    train(sft.open_objective(alone), alone.train, alone.run)
    one, two = (
        [json.loads(line) for line in (tmp_path / name / "course.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    )
    for a, b in zip(one, two, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
        assert b["gradient"] == pytest.approx(a["gradient"], rel=1e-4)
