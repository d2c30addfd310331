"""Dense training from recipe to checkpoint: DepthVLM's loss to the digit, the engine's map, what moves, what stays."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import make_checkpoint
from golden_depthvlm import drawn_inputs, golden_case, write_golden
from PIL import Image

from depthlm_ros.cards import load_card
from depthlm_ros.engines.checkpoint import open_checkpoint
from depthlm_ros.engines.transformers_engine import TransformersEngine
from depthlm_ros.errors import ConfigError, ModelError
from depthlm_training import dense, sft
from depthlm_training.batches import dialogue_processor
from depthlm_training.config import build
from depthlm_training.dense_batches import PUBLISHED_REPLY, published_reply, stack_images
from depthlm_training.dense_model import HeadSettings, HeadWork, Images, load_dense, new_head
from depthlm_training.dense_recipe import DenseRecipe, LossSettings
from depthlm_training.labels import Labels
from depthlm_training.packing import IGNORED, Packed, collate, rotary_positions

CPU = torch.device("cpu")
ARCHITECTURES = ["qwen3_vl", "qwen2_5_vl", "llava"]

# Loss of depth, loss of text, norms of the gradients of head and language model: DepthVLM's own model class (commit
# 940a9ba, transformers 5.23, torch 2.13 on a CPU, float32) with the weights of tests/golden, for `published_inputs`.
PUBLISHED_STEPS = {
    "dpt": (1.2379603, 6.2291059, 11.37355, 8.573682),
    "mlp": (1.1979649, 6.2291059, 0.1380186, 8.505501),
}


def published_inputs(kind):
    """Two images with a question and a reply in words, and maps of depth of other sizes than theirs."""
    case, arrays = golden_case(kind)
    config, header = case["config"], arrays["input_ids"][0].tolist()
    header = header[: header.index(config["vision_start_token_id"]) + 1]
    random = np.random.RandomState(7)
    question, reply = random.randint(1, 500, 8).tolist(), random.randint(1, 500, 5).tolist()
    prefix = header + [config["image_token_id"]] * 6
    ids = torch.tensor([*prefix, config["vision_end_token_id"], *question, *reply])
    labels = ids.clone()
    labels[ids == config["image_token_id"]] = IGNORED
    labels[: len(header) + 2 + len(question)] = IGNORED
    inputs = [drawn_inputs(row, [1, 4, 6]) for row in range(2)]
    truths = []
    for hw, share in (((64, 96), 1.0), ((70, 101), 0.2)):
        truth = np.exp(random.standard_normal(hw) * 0.6 + 1).astype(np.float32)
        truth[random.uniform(size=hw) >= share] = 0
        truths.append(truth)
    return config, inputs, prefix, ids, labels, truths


@pytest.mark.parametrize("kind", PUBLISHED_STEPS)
def test_a_batch_through_the_same_weights_gives_the_published_losses_and_gradients(tmp_path, kind):
    config, inputs, prefix, ids, labels, truths = published_inputs(kind)
    model = load_dense(open_checkpoint(write_golden(tmp_path, kind)), 32, HeadSettings())
    token, grid = config["image_token_id"], [(2, 3)]
    positions = rotary_positions(prefix, token, grid, True)[0]
    images = Images(
        ids=torch.tensor([prefix] * 2),
        positions=positions[:, None].expand(-1, 2, -1),
        is_image=torch.tensor([prefix] * 2) == token,
        pixels={name: torch.cat([each.tensors[name] for each in inputs]) for name in inputs[0].tensors},
        grids_hw=tuple(grid * 2),
    )
    whole = rotary_positions(ids.tolist(), token, grid, True)[0]
    talk = collate([Packed(ids, labels, whole, (ids != token).long().cumsum(0) * 0, (each,)) for each in inputs], 99)
    maps, said = model(images, talk)
    depth = []
    for depth_map, truth in zip(maps, truths, strict=True):
        rows, columns = np.nonzero(truth)
        gain = (np.array(depth_map.shape) - 1) / (np.array(truth.shape) - 1)
        places = (np.stack([columns, rows], 1) * gain[::-1]).astype(np.float32)
        known = Labels(places, truth[rows, columns], np.zeros((1, 1), np.int32))
        depth.append(dense.depth_errors(depth_map, known, LossSettings())["silog"])
    loss, text = torch.stack(depth).mean(), said / talk.units
    (loss + text).backward()

    def norm(part):
        gradients = [w.grad.norm() for name, w in model.named_parameters() if part in name and w.grad is not None]
        return torch.stack(gradients).norm().item()

    seen = (loss.item(), text.item(), norm("depth_head."), norm("language_model."))
    assert seen == pytest.approx(PUBLISHED_STEPS[kind], rel=1e-4)


FOCAL_PX = 80.0
CAMERAS = [[90.0, 90.0, 63.5, 47.5, 128, 96], [75.0, 70.0, 50.0, 60.0, 100, 120]]
WORDS = ("near", "far", "left", "right", "red", "blue")


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Small models without a head, with cards, by architecture."""
    made = {}
    for name in ARCHITECTURES:
        folder = make_checkpoint(tmp_path_factory.mktemp(name), name, dense_head=False)
        card = {
            "name": folder.name, "source": folder.name, "licence": "Apache-2.0", "commercial_use": True,
            "architecture": name, "dialects": ["coordinates"], "default_dialect": "coordinates", "focal_px": FOCAL_PX,
            "policy": "exact", "depth_kind": "z", "max_new_tokens": 32, "description": "Random weights.",
        }  # fmt: skip
        (folder / "depthlm_card.yaml").write_text(json.dumps(card))
        made[name] = folder
    return made


@pytest.fixture(scope="module")
def dialogues(tmp_path_factory):
    """Rows of words about noise: whatever is shown, the answer repeats the question's word."""
    folder = tmp_path_factory.mktemp("dialogues")
    random = np.random.default_rng(5)
    for name, count in (("train", 16), ("held_out", 6)):
        lines = []
        for i in range(count):
            image = Image.fromarray(random.integers(0, 256, (64, 64, 3), dtype=np.uint8))
            image.save(folder / f"{name}{i}.png")
            pairs = [[f"say {word}", f"it is {word} {word}"] for word in random.permutation(WORDS)[:3]]
            lines.append(json.dumps({"image": f"{name}{i}.png", "dialogue": pairs}))
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return folder


def recipe_of(folder, **changes):
    values = {
        "model": str(folder),
        "data": [{"scenes": 16, "seed": 3, "split": "train", "cameras": CAMERAS}],
        "images": 3,
        "labels": 400,
        "head": {"kind": "mlp", "hidden": 64, "output": "exp"},
        "train": {"steps": 4, "lr": 3e-3, "warmup": 0.0, "schedule": "constant", "device": "cpu"},
    }
    return build(DenseRecipe, values | changes)


def talking(folder, dialogues, **changes):
    talk = {
        "data": [{"dialogue": str(dialogues / "train.jsonl")}], "images": 4, "points": 3,
        "held_out": [{"dialogue": str(dialogues / "held_out.jsonl")}], "held_out_images": 6,
    }  # fmt: skip
    return recipe_of(folder, stage="language", talk=talk, **changes)


def steps(objective, count, lr=3e-3, other=True):
    """The losses of so many steps of AdamW, each on another micro-batch or all on the first."""
    weights = [weight for weight in objective.model.parameters() if weight.requires_grad]
    optimizer, losses = torch.optim.AdamW(weights, lr), []
    for k in range(count):
        loss = objective.loss(objective.make(k if other else 0), CPU)
        optimizer.zero_grad()
        (loss.total / loss.units).backward()
        optimizer.step()
        losses.append(loss.total.item() / loss.units)
    return losses


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_engine_gives_the_map_that_was_trained(bases, tmp_path, architecture):
    objective = dense.open_objective(recipe_of(bases[architecture]))
    steps(objective, 2)
    objective.save(tmp_path / "made")
    engine = TransformersEngine.load(tmp_path / "made", device="cpu", dtype="float32")
    mixture, showing = objective.make.mixture, objective.make.showing
    views = [showing.view(mixture.example(k)) for k in range(6)]
    assert len({view.image.shape for view in views}) > 1  # shorter rows are padded
    processor = dialogue_processor(bases[architecture], None)
    with torch.no_grad():
        maps, _ = objective.model(stack_images(processor, [processor.images([view.image]) for view in views]))
    for view, trained in zip(views, maps, strict=True):
        shown = engine.depth_map(view.image)
        np.testing.assert_allclose(shown, trained, rtol=2e-4, atol=1e-4)
        assert shown.std() > 0.01


def test_a_dpt_head_is_saved_as_the_engine_reads_it(tmp_path):
    checkpoint = open_checkpoint(write_golden(tmp_path / "base", "dpt"))
    model = load_dense(checkpoint, 32, HeadSettings())
    with torch.no_grad():
        for weight in model.depth_head.parameters():
            weight.mul_(1.01)
    dense.save_dense(tmp_path / "made", model, checkpoint, torch.float32)
    kept = load_dense(open_checkpoint(tmp_path / "made"), 32, HeadSettings())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), kept.parameters(), strict=True))


def test_the_card_of_what_was_trained_says_that_it_speaks_dense(bases, tmp_path):
    objective = dense.open_objective(recipe_of(bases["qwen3_vl"]))
    objective.save(tmp_path / "made")
    card, source = load_card(str(tmp_path / "made"))
    assert Path(source) == tmp_path / "made"
    assert (card.default_dialect, card.dialects, card.policy, card.focal_px) == (
        "dense", ("coordinates", "dense"), "exact", FOCAL_PX)  # fmt: skip


def test_the_first_stage_moves_the_head_alone_and_learns(bases):
    objective = dense.open_objective(recipe_of(bases["qwen3_vl"]))
    before = {name: weight.clone() for name, weight in objective.model.state_dict().items()}
    losses = steps(objective, 15, other=False)
    moved = {name for name, weight in objective.model.state_dict().items() if not torch.equal(weight, before[name])}
    assert moved == {name for name in before if name.startswith("depth_head.")}
    assert losses[-1] < 0.8 * losses[0]


def test_the_second_stage_leaves_the_vision_tower_as_it_was(bases, dialogues):
    objective = dense.open_objective(talking(bases["qwen3_vl"], dialogues))
    before = {name: weight.clone() for name, weight in objective.model.state_dict().items()}
    steps(objective, 1)
    moved = {name for name, weight in objective.model.state_dict().items() if not torch.equal(weight, before[name])}
    assert moved == {name for name in before if ".visual." not in name}


@pytest.fixture(scope="module")
def talker(bases, dialogues, tmp_path_factory):
    """A small model that has learnt to answer the dialogues."""
    values = {
        "model": str(bases["qwen3_vl"]), "data": [{"dialogue": str(dialogues / "train.jsonl")}], "images": 4,
        "points": 3, "train": {"steps": 1},
    }  # fmt: skip
    objective = sft.open_objective(build(sft.TextRecipe, values))
    steps(objective, 40)
    objective.save(tmp_path_factory.mktemp("talker") / "talker")
    return tmp_path_factory.getbasetemp() / "talker0" / "talker"


def test_real_talk_keeps_language_alive_where_a_constant_reply_does_not(talker, dialogues):
    after, before = {}, 0.0
    for published in (False, True):
        recipe = talking(talker, dialogues, published=published, policy="published" if published else None)
        objective = dense.open_objective(recipe)
        held_out = dense.held_out_talk(recipe, *dense.opened(recipe))
        before = dense.language_loss(objective.model, held_out, 6, CPU)
        steps(objective, 16)
        after[published] = dense.language_loss(objective.model, held_out, 6, CPU)
    assert after[False] < before < 2 * before < after[True]


def test_depth_and_talk_are_weighed_as_published(bases, dialogues):
    objective = dense.open_objective(talking(bases["qwen3_vl"], dialogues, loss={"weight": 0.5, "gradient": 0.1}))
    loss = objective.loss(objective.make(0), CPU)
    mean = {name: (total / count).item() for name, (total, count) in loss.parts.items()}
    assert loss.units == 3 and loss.images == 7
    expected = mean["text"] + 0.5 * (mean["silog"] + 0.1 * mean["edges"])
    assert loss.total.item() / loss.units == pytest.approx(expected, rel=1e-5)


def test_the_published_reply_is_supervised_with_the_question_before_it(bases):
    processor = dialogue_processor(bases["qwen3_vl"], "You are a helpful assistant.")
    inputs = processor.images([np.zeros((512, 512, 3), np.uint8)])
    packed = published_reply(processor, inputs)
    said = processor.tokenizer.decode(packed.labels[packed.labels != IGNORED])
    assert said.startswith("<|vision_end|>Given this image, estimate the metric depth")
    assert said.endswith(f"<|im_start|>assistant\n{PUBLISHED_REPLY}<|im_end|>\n")


def test_a_micro_batch_is_the_same_in_every_process(bases, dialogues):
    make = dense.open_objective(talking(bases["qwen3_vl"], dialogues)).make
    again = pickle.loads(pickle.dumps(make))
    ours, theirs = make(7), again(7)
    assert all(torch.equal(ours.images.pixels[name], theirs.images.pixels[name]) for name in ours.images.pixels)
    assert torch.equal(ours.talk.ids, theirs.talk.ids)
    for one, other in zip(ours.labels, theirs.labels, strict=True):
        assert len(one) == 400 and np.array_equal(one.places, other.places)
    assert not np.array_equal(ours.labels[0].depth_m, make(8).labels[0].depth_m)


def test_the_largest_side_is_cut_around_the_centre(bases):
    make = dense.open_objective(recipe_of(bases["qwen3_vl"], max_edge_px=70, labels=0)).make
    batch = make(0)
    assert {side for grid in batch.images.grids_hw for side in grid} == {2}
    for labels in batch.labels:
        assert labels.places.min() >= -0.5 and labels.places.max() < 63.5


def test_a_new_head_starts_where_it_is_told(bases):
    for output in ("exp", "softplus"):
        head, _ = new_head(HeadSettings(kind="mlp", output=output, hidden=8, start_m=4.0), 16, 3, 32)
        last = head.mlp[2]
        torch.nn.init.zeros_(last.weight)
        assert head(torch.ones(4, 16), (2, 2)).unique().item() == pytest.approx(4.0, rel=1e-5)
    with pytest.raises(ModelError, match="kind: mlp"):
        new_head(HeadSettings(), 16, 2, 32)


def test_a_language_stage_without_talk_is_refused_unless_asked_for(bases):
    with pytest.raises(ConfigError, match="talk.images to 0"):
        recipe_of(bases["qwen3_vl"], stage="language")
    silent = recipe_of(bases["qwen3_vl"], stage="language", talk={"images": 0})
    assert silent.parts == ("embeddings", "language", "depth_head")


def test_one_command_trains_resumes_and_says_what_became_of_language(bases, dialogues, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    entries = {
        "model": str(bases["qwen3_vl"]), "run": str(tmp_path / "run"), "stage": "language", "images": 1, "labels": 50,
        "data": [{"scenes": 4, "seed": 3, "split": "train", "cameras": CAMERAS[:1]}],
        "head": {"kind": "mlp", "hidden": 16}, "train": {"steps": 2, "lr": 1e-3, "device": "cpu", "dtype": "bfloat16"},
        "talk": {
            "data": [{"dialogue": str(dialogues / "train.jsonl")}], "held_out_images": 2,
            "held_out": [{"dialogue": str(dialogues / "held_out.jsonl")}],
        },
    }  # fmt: skip
    recipe.write_text(json.dumps(entries))
    assert dense.main([str(recipe), "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert "map of 128x96 pixels" in told and "«it is" in told and "trained: embeddings, language" in told
    assert dense.main([str(recipe)]) == 0
    assert dense.main([str(recipe), "train.steps=3", "--resume"]) == 0
    kept = json.loads((tmp_path / "run" / "language.json").read_text())
    assert 0 < kept["after"] != kept["before"] > 0
    assert dense.main([str(recipe), "labels=-1"]) == 1
    assert capsys.readouterr().err.endswith("error: images must be at least 1, labels and max_edge_px at least 0\n")


@pytest.mark.parametrize("kind", ["mlp", "dpt"])
def test_the_work_of_a_head_is_that_of_its_products(kind):
    output = "exp" if kind == "mlp" else "softplus"
    head, _ = new_head(HeadSettings(kind=kind, output=output, hidden=48), 64, 3, 32)
    work = HeadWork(head)
    if kind == "mlp":
        assert work((3, 4)) == 2 * 12 * (64 * 48 + 48 * 32 * 32)
    else:
        seen = []
        for module in head.modules():
            if isinstance(module, torch.nn.Conv2d | torch.nn.ConvTranspose2d):
                module.register_forward_hook(lambda m, given, out: seen.append((m, given[0], out)))
        head(torch.zeros(4, 12, 64), (3, 4))
        # A convolution has its kernel's products at every place it writes, a transposed one at every place it reads.
        products = [
            m.weight.numel() * (given if isinstance(m, torch.nn.ConvTranspose2d) else out)[0, 0].numel()
            for m, given, out in seen
        ]
        assert work((3, 4)) == 2 * sum(products) and len(products) > 20
    assert all(not weight.is_meta for weight in head.parameters())
