"""The shipped model is what its card says: it loads where Qwen3-VL loads, speaks its dialects, scores as stated."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from depthlm_ros.cards import load_card
from depthlm_ros.estimator import Estimator
from depthlm_ros.metrics import depth_metrics
from depthlm_ros.prompts import coordinates_question, normalise_pixel, parse_depth
from depthlm_training.demo.score import held_out

FOLDER = Path(__file__).parents[1] / "models" / "demo"
SCORES = json.loads((FOLDER / "scores.json").read_text())
WATCHED = 40  # of the 200 held-out scenes


@pytest.fixture(scope="module")
def demo():
    with Estimator.load("demo", device="cpu") as estimator:
        yield estimator


@pytest.fixture(scope="module")
def scenes():
    return [held_out(i, seed=0) for i in range(WATCHED)]


def test_it_stays_within_twenty_megabytes():
    assert sum(path.stat().st_size for path in FOLDER.iterdir() if path.name != "demo.png") <= 20_000_000


def test_its_scores_clear_the_bars_it_is_shipped_under():
    best = max(SCORES["baselines"]["best_constant"], SCORES["baselines"]["row_mean"])
    assert SCORES["scenes"] == 200
    delta1 = {dialect: figures["delta1"] for dialect, figures in SCORES["dialects"].items()}
    assert delta1["dense"] >= 0.85 and delta1["marker"] >= 0.60
    assert delta1["coordinates"] >= max(0.70, best + 0.25)


def test_the_cards_for_people_and_for_the_program_state_the_same_scores():
    card, _ = load_card("demo")
    people = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert set(card.dialects) == set(SCORES["dialects"])
    for dialect, figures in SCORES["dialects"].items():
        assert f"| {dialect} | {figures['delta1']:.3f} " in people
        assert card.scores[dialect] == pytest.approx(figures["delta1"], abs=5e-4)
    assert "not for robots" in people and "not for robots" in card.description


@pytest.mark.slow
@pytest.mark.parametrize("dialect", SCORES["dialects"])
def test_a_part_of_the_held_out_scenes_scores_as_the_card_says(demo, scenes, dialect):
    """Scenes differ, so a part of them has a wider interval; 0.1 is about three standard errors of 40 scenes."""
    points = 4 if dialect == "marker" else 50
    answers = [demo.estimate(s.image, s.camera, s.pixels[:points], dialect=dialect) for s in scenes]
    guess = np.concatenate([a.depth_m[a.asked] for a in answers])
    truth = np.concatenate([s.truth_m[:points][a.asked] for s, a in zip(scenes, answers, strict=True)])
    assert depth_metrics(guess, truth).delta1 == pytest.approx(SCORES["dialects"][dialect]["delta1"], abs=0.1)


def test_stock_transformers_loads_it_and_says_the_same(demo, scenes):
    import torch
    from transformers import AutoModelForImageTextToText, AutoTokenizer

    model, report = AutoModelForImageTextToText.from_pretrained(FOLDER, dtype="float32", output_loading_info=True)
    assert not report["missing_keys"]
    assert all(key.startswith("depth_head.") for key in report["unexpected_keys"])
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    scene = scenes[0]
    view = demo_view(demo, scene)
    at = normalise_pixel(view.from_source(scene.pixels[:6]), view.camera.width, view.camera.height)
    ours = demo.estimate(scene.image, scene.camera, scene.pixels[:6], dialect="coordinates")
    inputs = demo.engine.processor.images([view.image])
    for (x, y), answer in zip(at.tolist(), ours.answers, strict=True):
        content = [{"type": "image"}, {"type": "text", "text": coordinates_question(x, y)}]
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        tokens = (view.camera.width // 32) * (view.camera.height // 32)
        ids = tokenizer(text.replace("<|image_pad|>", "<|image_pad|>" * tokens), return_tensors="pt").input_ids
        said = model.generate(
            input_ids=ids,
            pixel_values=inputs.tensors["pixel_values"],
            image_grid_thw=inputs.tensors["image_grid_thw"],
            mm_token_type_ids=(ids == model.config.image_token_id).int(),
            attention_mask=torch.ones_like(ids),
            max_new_tokens=demo.card.max_new_tokens,
        )
        assert tokenizer.decode(said[0, ids.shape[1] :], skip_special_tokens=True) == answer


def test_stock_processor_loads_where_torchvision_is(scenes, demo):
    pytest.importorskip("torchvision")
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(FOLDER)
    view = demo_view(demo, scenes[0])
    text = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": coordinates_question(7, 9)}]}],
        add_generation_prompt=True,
    )
    from PIL import Image

    stock = processor(text=[text], images=[Image.fromarray(view.image)], return_tensors="pt")
    inputs = demo.engine.processor.images([view.image])
    ours = demo.engine.processor.prompts([coordinates_question(7, 9)], inputs.grid_hw)
    assert stock["input_ids"].tolist() == ours


def test_it_answers_in_text_in_both_text_dialects(demo, scenes):
    for dialect in ("coordinates", "marker"):
        result = demo.estimate(scenes[1].image, scenes[1].camera, scenes[1].pixels[:8], dialect=dialect)
        said = [text for text, asked in zip(result.answers, result.asked, strict=True) if asked]
        assert all(text.startswith("<think> The point is around ") for text in said)
        assert all(parse_depth(text) is not None for text in said)


def demo_view(demo, scene):
    from depthlm_ros.camera import unify

    return unify(scene.image, scene.camera, demo.card.focal_px, demo.policy, demo.engine.grid)
