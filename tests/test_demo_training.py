"""Training: scenes are exact, questions are those of inference, an interrupted run goes on as if it hadn't been."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from depthlm_ros.camera import Camera
from depthlm_ros.markers import draw_arrow
from depthlm_ros.prompts import (
    answer_text,
    compact_answer,
    compact_question,
    compact_questions,
    coordinates_question,
    marker_question,
    normalise_pixel,
    parse_compact_points,
)
from depthlm_training import raycast
from depthlm_training.demo import bank as data
from depthlm_training.demo import dense, loop
from depthlm_training.demo import text as sft
from depthlm_training.demo.__main__ import declare_compact
from depthlm_training.demo.dense import train_dense
from depthlm_training.demo.dialogue import IGNORED, Dialogue, ask
from depthlm_training.demo.model import DemoNet, Size
from depthlm_training.demo.optim import save_state
from depthlm_training.demo.stages import DENSE, TEXT
from depthlm_training.demo.text import Helpers, answer_states, text_delta1, train_text
from depthlm_training.demo.tower import look, patches
from depthlm_training.demo.vocabulary import build_tokenizer, save_processor
from depthlm_training.raycast import BOX, CYLINDER, SPHERE, Pose, Scene, render
from depthlm_training.scenes import random_pose, random_scene, render_drive

CAMERA = Camera(fx=100, fy=100, cx=63.5, cy=47.5, width=128, height=96)
TINY = Size(
    vision_hidden=48, vision_layers=3, vision_heads=3, hidden=64, layers=3, heads=2, kv_heads=1, mlp=96, head_hidden=32
)


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="module")
def net(tokenizer):
    return DemoNet(tokenizer, TINY, seed=3).eval()


class Bank:
    """A bank of a few scenes in memory."""

    def __init__(self, count: int) -> None:
        self.pairs = []
        for i in range(count):
            rng = data.scene_rng(0, "train", i)
            scene = random_scene(rng)
            self.pairs.append(render(scene, data.View().camera, random_pose(rng, scene)))

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, i: int):
        return self.pairs[i]


@pytest.fixture(scope="module")
def bank():
    return _repeated(Bank(6), data.MONITOR + 6)


def _repeated(bank: Bank, length: int) -> Bank:
    bank.pairs = [bank.pairs[i % len(bank.pairs)] for i in range(length)]
    return bank


def empty_room() -> Scene:
    scene = Scene(
        "room", np.array([-3, -4, 0, 3, 4, 2.5], np.float32), np.array([0, 0, 2.2], np.float32), 0.4, 0.0, np.zeros(3)
    )
    for _ in range(6):
        scene.paint(raycast.PLAIN, (0.7, 0.7, 0.7))
    return scene


def test_a_wall_straight_ahead_has_its_z_depth_at_every_pixel():
    _, depth = render(empty_room(), CAMERA, Pose((0, -1.0, 1.2), 0.0))
    u, v = np.meshgrid(np.arange(128), np.arange(96))
    x, y = (u - 63.5) / 100 * 5, (v - 47.5) / 100 * 5
    wall = (np.abs(x) < 2.99) & (y < 1.19) & (y > -1.29)
    assert wall.sum() > 1000
    np.testing.assert_allclose(depth[wall], 5.0, rtol=1e-5)


def test_the_floor_has_the_depth_that_similar_triangles_give():
    _, depth = render(empty_room(), CAMERA, Pose((0, -3.5, 1.2), 0.0))
    rows = np.arange(75, 96)
    np.testing.assert_allclose(depth[rows, 64], 1.2 * 100 / (rows - 47.5), rtol=1e-4)


@pytest.mark.parametrize(
    ("kind", "half", "front_m"),
    [(SPHERE, (0.5, 0.5, 0.5), 2.5), (BOX, (0.4, 0.3, 0.6), 2.7), (CYLINDER, (0.25, 0.25, 0.8), 2.75)],
)
def test_each_shape_is_nearest_where_it_faces_the_camera(kind, half, front_m):
    camera = replace(CAMERA, cx=64.0, cy=48.0)
    scene = empty_room()
    scene.add(kind, (0, 2.0, 1.2), half, c0=(0.5, 0.2, 0.2))
    _, depth = render(scene, camera, Pose((0, -1.0, 1.2), 0.0))
    assert depth[48, 64] == pytest.approx(front_m, rel=1e-4)


def test_yaw_turns_left_and_pitch_looks_up():
    room = empty_room()
    ahead = render(room, CAMERA, Pose((0, 0, 1.2), 0.0))[1][48, 64]
    left = render(room, CAMERA, Pose((0, 0, 1.2), np.pi / 2))[1][48, 64]
    up = render(room, CAMERA, Pose((0, 0, 1.2), 0.0, pitch=np.pi / 2 - 0.01))[1][48, 64]
    assert (ahead, left, up) == pytest.approx((4.0, 3.0, 1.3), rel=0.02)


def test_the_window_that_a_shape_is_traced_in_loses_no_pixel(monkeypatch):
    rng = np.random.default_rng(4)
    for _ in range(12):
        scene = random_scene(rng)
        pose = random_pose(rng, scene)
        fast = render(scene, CAMERA, pose)[1]
        with monkeypatch.context() as patch:
            patch.setattr(raycast, "_in_view", lambda *a: (slice(0, 96), slice(0, 128)))
            np.testing.assert_array_equal(fast, render(scene, CAMERA, pose)[1])


def test_a_drive_is_the_same_for_the_same_seed_and_moves():
    first = list(render_drive(4, width=64, height=48, focal_px=50, seed=2))
    again = list(render_drive(4, width=64, height=48, focal_px=50, seed=2))
    assert all(
        np.array_equal(a[0], b[0]) and np.array_equal(a[1], b[1], equal_nan=True)
        for a, b in zip(first, again, strict=True)
    )
    assert len({image.tobytes() for image, _, _ in first}) == 4


def test_digits_are_single_tokens_and_any_text_survives(tokenizer):
    text = "point (1307, 42) is 12.60 m away; ünïcödé 深度\n"
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    digits = [t for t in tokenizer.convert_ids_to_tokens(ids) if any(c.isdigit() for c in t)]
    assert digits == list("1307421260")


def test_training_asks_exactly_what_the_chat_template_asks(tokenizer):
    dialogue = Dialogue(tokenizer)
    for question in (coordinates_question(5, 1999), marker_question(), *compact_questions([(1, 2), (3, 4)], 2)):
        message = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
        whole = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
        assert whole.partition("<|image_pad|>")[2] == dialogue.prompt(question)


def test_only_the_answer_is_supervised(tokenizer):
    questions = [marker_question(), coordinates_question(1, 2)]
    rows = Dialogue(tokenizer).rows(questions, np.array([3.5, 12.25]), True, "coordinates")
    said = [tokenizer.decode(row[row != IGNORED]) for row in rows.labels]
    assert said == [answer_text(3.5) + "<|im_end|>", answer_text(12.25) + "<|im_end|>"]
    assert [tokenizer.decode(row[: at + 1])[-25:] for row, at in zip(rows.ids, rows.before, strict=True)] == [
        "<think> The point is around "[-25:]
    ] * 2
    assert rows.row.tolist() == [0, 1] and rows.shared == []


@pytest.mark.parametrize("each", [1, 2, 3])
def test_each_number_of_a_compact_answer_has_its_state_and_its_place(tokenizer, each):
    dialogue, depths = Dialogue(tokenizer), np.array([3.5, 12.25, 0.07, 101.0, 5.0, 6.0])
    pixels = [(1, 2), (999, 0), (500, 500), (7, 8), (9, 10), (123, 456)]
    questions = compact_questions(pixels, each)
    rows = dialogue.rows(questions, depths, False, "compact", each)
    whole = [tokenizer.decode(rows.shared + row.tolist()) for row in rows.ids]
    for i, question in enumerate(questions):
        answer = compact_answer(depths[i * each : (i + 1) * each])
        assert whole[i].startswith(dialogue.prompt(question) + answer + "<|im_end|>")
        assert tokenizer.decode(rows.labels[i][rows.labels[i] != IGNORED]) == answer + "<|im_end|>"
    for depth_m, row, before in zip(depths, rows.row, rows.before, strict=True):
        assert tokenizer.decode(rows.ids[row, before + 1 :]).startswith(f"{depth_m:.2f}")
    # What is the same in every question is run once for each image and not once for each row.
    assert tokenizer.decode(rows.shared).endswith("at coordinates in [0, 1000): ")
    assert tokenizer.decode(rows.ids[0]).startswith("001,002")


@pytest.mark.parametrize(("dialect", "each"), [("coordinates", 1), ("marker", 1), ("compact", 1), ("compact", 3)])
def test_a_drilled_place_is_read_where_its_last_digit_has_been_seen(tokenizer, dialect, each):
    ids, row, ends, shares = Dialogue(tokenizer).drill(12, dialect, each, np.random.default_rng(0))
    assert len(row) == len(ends) == len(shares) == 12 and len(ids) == 12 // each
    for at, end, share in zip(row, ends, shares, strict=True):
        text = tokenizer.decode(ids[at, :end])
        if dialect == "compact":
            assert text.endswith("{:03.0f},{:03.0f}".format(*(1000 * share)))
        else:
            assert text.endswith("({:.0f}, {:.0f}".format(*(2000 * share)))


def test_a_step_asks_about_its_arrows_and_in_turns_about_other_images(bank):
    stage = replace(TEXT, batch=8, images=2, questions=4, points=12)
    each = set()
    for step in range(16):
        batch = data.make_batch(bank, stage, 0, step)
        groups = ask(batch, stage, 0, step)
        assert [asked.dialect for asked in groups][-1] == stage.turns[step % 2]
        for asked in groups:
            assert len(asked.questions) * asked.each == len(asked.points)
            depths = torch.from_numpy(batch.depths[asked.images])
            assert (asked.read(depths) > 0).all()
            marks = batch.marks[asked.images, 0]
            if asked.dialect == "marker":
                np.testing.assert_array_equal(asked.points, marks)
                assert asked.questions == [marker_question()] * len(marks)
            else:
                assert (marks == -1).all()
            if asked.dialect == "compact":
                each.add(asked.each)
                height, width = batch.depths.shape[1:]
                first = asked.points[: len(asked.points) // len(asked.images)]
                pixels = normalise_pixel(first, width, height, 1000).tolist()
                assert asked.questions[: len(pixels) // asked.each] == compact_questions(pixels, asked.each)
        again = ask(data.make_batch(bank, stage, 0, step), stage, 0, step)
        assert [a.questions for a in again] == [a.questions for a in groups]
    assert each == {1, 2, 3, 4}


def test_an_arrow_is_drawn_as_at_inference_and_the_same_larger(bank):
    image = np.zeros((64, 96, 3), np.uint8)
    once = image.copy()
    data._draw_large(once, np.array([40, 30]), 1)
    np.testing.assert_array_equal(once, draw_arrow(image, (40, 30)))
    for size in (2, 3):
        large = image.copy()
        data._draw_large(large, np.array([40, 30]), size)
        assert (large != 0).any(-1).sum() == 9 * size**2
        assert not large[30, 40:].any() and large[30, 39].any()


def test_cameras_of_every_shape_get_a_canvas_that_the_bank_can_fill():
    rng, view = np.random.default_rng(0), data.View()
    frames = [data.frame(rng) for _ in range(2000)]
    assert all(w <= view.width and h <= view.height for w, h in frames)
    assert {data.canvas(f) for f in frames} >= {(256, 192), (288, 160), (288, 224), (224, 128)}


def test_rows_that_share_a_prefix_see_what_each_question_sees_alone(net, tokenizer):
    """The batched rows against the stock model's own forward of one whole sequence."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 255, (1, 64, 96, 3), dtype=np.uint8)
    questions = [coordinates_question(7, 1500), coordinates_question(1234, 3), coordinates_question(600, 600)]
    _rows_equal_stock(net, image, Dialogue(tokenizer).rows(questions, np.array([1.0, 2.0, 13.5]), True, "coordinates"))


@pytest.mark.parametrize("each", [1, 3])
def test_compact_rows_see_what_each_question_sees_alone(net, tokenizer, each):
    image = np.random.default_rng(0).integers(0, 255, (1, 64, 96, 3), dtype=np.uint8)
    questions = compact_questions([(7, 500), (123, 3), (600, 600)] * each, each)
    depths = np.array([1.0, 2.0, 13.5] * each)
    _rows_equal_stock(net, image, Dialogue(tokenizer).rows(questions, depths, True, "compact", each))


def stock_patches(images: np.ndarray) -> torch.Tensor:
    """What Qwen's image processor hands to the model: each frame twice."""
    once = patches(torch.from_numpy(images)).reshape(-1, 3, 1, 16 * 16)
    return once.expand(-1, 3, 2, 16 * 16).reshape(len(once), -1)


def test_the_batched_tower_sees_what_the_stock_one_sees(net):
    images = np.random.default_rng(0).integers(0, 255, (3, 64, 96, 3), dtype=np.uint8)
    tower = net.vlm.model.visual
    with torch.no_grad():
        merged, stacked = look(tower, torch.from_numpy(images))
        stock = tower(stock_patches(images), grid_thw=torch.tensor([[1, 4, 6]] * 3))
    torch.testing.assert_close(merged.flatten(0, 1), stock.pooler_output, rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(stacked, stock.deepstack_features, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def _rows_equal_stock(net, image, rows):
    with torch.no_grad():
        encoded = net.encode(torch.from_numpy(image))
        shared = net.vlm.lm_head(answer_states(net, encoded, rows.ids, rows.shared)[0])
        for i in range(3):
            length = int((rows.labels[i] != IGNORED).nonzero().max()) + 1
            before = net.header + [net.vlm.config.image_token_id] * 6 + rows.shared
            whole = torch.tensor([before + rows.ids[i, :length].tolist()])
            stock = net.vlm(
                input_ids=whole,
                pixel_values=stock_patches(image),
                image_grid_thw=torch.tensor([[1, 4, 6]]),
                mm_token_type_ids=(whole == net.vlm.config.image_token_id).int(),
            ).logits[0, -length:]
            torch.testing.assert_close(shared[i, :length], stock, rtol=1e-4, atol=1e-4)


def test_the_saved_checkpoint_answers_through_the_engine_as_in_training(net, tokenizer, tmp_path):
    from depthlm_ros.engines.transformers_engine import TransformersEngine

    net.save(tmp_path, torch.float32)
    save_processor(tmp_path, tokenizer)
    image = np.random.default_rng(1).integers(0, 255, (64, 96, 3), dtype=np.uint8)
    with torch.no_grad():
        expected = net.log_depth(net.encode(torch.from_numpy(image)[None]))[0].exp().numpy()
    engine = TransformersEngine.load(tmp_path, dtype="float32", device="cpu")
    np.testing.assert_allclose(engine.depth_map(image), expected, rtol=2e-4)


def test_an_interrupted_stage_ends_with_the_same_weights(tokenizer, bank, tmp_path, monkeypatch):
    stage = replace(DENSE, steps=4, batch=2, save_every=2)
    monkeypatch.setattr(dense, "dense_delta1", lambda *_: 0.0)
    monkeypatch.setattr(dense, "finder_error_px", lambda *_: 0.0)
    state_at_2 = tmp_path / "cut" / "dense.safetensors"
    state_at_2.parent.mkdir()

    def train(folder):
        net = DemoNet(tokenizer, TINY, seed=3)
        train_dense(net, bank, stage, tmp_path / folder, seed=0)
        return net.state_dict()

    def save_and_keep(path, module, optimizer, step):
        save_state(path, module, optimizer, step)
        if step == 2:
            state_at_2.write_bytes(path.read_bytes())

    with monkeypatch.context() as patch:
        patch.setattr(loop, "save_state", save_and_keep)
        whole = train("whole")
    resumed = train("cut")  # finds what a run that was stopped after two of four steps leaves behind
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    rows = [json.loads(line) for line in (tmp_path / "cut" / "dense.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [4]


def test_augmentation_keeps_depth_beside_its_pixel(bank):
    """Noise, mirrors and crops move image and depth together: brightness follows depth where it did before."""
    image = np.repeat(np.linspace(10, 200, 288, dtype=np.float32)[None, :, None], 192, 0).repeat(3, 2).astype(np.uint8)
    depth = (np.linspace(10, 200, 288)[None].repeat(192, 0) / 20).astype(np.float16)
    rng = np.random.default_rng(0)
    for _ in range(20):
        out, deep = data._augmented(image, depth, (250, 180), (256, 192), rng)
        known = np.isfinite(deep)
        assert np.corrcoef(out[..., 1][known].astype(float), deep[known])[0, 1] > 0.97
        assert out.shape == (192, 256, 3) and deep.shape == (192, 256)


def test_a_stage_with_compact_runs_resumes_and_ends_with_the_same_weights(tokenizer, bank, tmp_path, monkeypatch):
    stage = replace(TEXT, steps=4, batch=3, images=1, questions=2, points=12, drill=12, save_every=2)
    monkeypatch.setattr(sft, "finder_error_px", lambda *_: 0.0)
    monkeypatch.setattr(sft, "text_delta1", lambda *_: 0.0)
    monkeypatch.setattr(sft, "dense_delta1", lambda *_: 0.0)
    (tmp_path / "cut").mkdir()

    def train(folder):
        net = DemoNet(tokenizer, TINY, seed=3)
        train_text(net, Helpers(net.size.hidden), tokenizer, bank, stage, tmp_path / folder, seed=0)
        return net.state_dict()

    def save_and_keep(path, module, optimizer, step):
        save_state(path, module, optimizer, step)
        if step == 2:
            (tmp_path / "cut" / path.name).write_bytes(path.read_bytes())

    with monkeypatch.context() as patch:
        patch.setattr(loop, "save_state", save_and_keep)
        whole = train("whole")
    resumed = train("cut")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    row = json.loads((tmp_path / "cut" / "text.jsonl").read_text())
    assert row["step"] == 4 and {"compact", "coordinates", "marker", "dense"} <= row.keys()


def test_a_network_that_is_taught_one_number_says_it(tokenizer, bank):
    """Greedy reading in training finds bare numbers: a net that has learnt nothing but 2.50 scores as 2.50 does."""
    net, dialogue = DemoNet(tokenizer, TINY, seed=3), Dialogue(tokenizer)
    rows = dialogue.rows([compact_question(5, 5)], np.array([2.5]), True, "compact")
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    image = torch.zeros(1, 64, 96, 3, dtype=torch.uint8)
    for _ in range(40):
        states, _ = answer_states(net, net.encode(image), rows.ids, rows.shared)
        supervised = rows.labels[:, 1:] != IGNORED
        logits = net.vlm.lm_head(states[:, :-1][supervised])
        torch.nn.functional.cross_entropy(logits, rows.labels[:, 1:][supervised]).backward()
        optimizer.step()
        optimizer.zero_grad()
    rng, truth = np.random.default_rng(5), []
    for i in range(8):
        depth = bank[i][1][16:208, 16:272].astype(np.float32)
        points = sft.pick_points(depth, 4, rng, margin=5)
        truth.append(depth[points[:, 1], points[:, 0]])
    ratio = 2.5 / np.concatenate(truth)
    expected = (np.maximum(ratio, 1 / ratio) < 1.25).mean()
    assert text_delta1(net, dialogue, bank, "compact", scenes=8) == pytest.approx(expected) and expected > 0


def test_a_compact_answer_as_trained_is_what_the_parser_reads(tokenizer):
    rows = Dialogue(tokenizer).rows(compact_questions([(1, 2), (3, 4)], 2), np.array([3.456, 12.0]), True, "compact", 2)
    text = tokenizer.decode(rows.labels[0][rows.labels[0] != IGNORED], skip_special_tokens=True)
    assert parse_compact_points(text, 2) == (3.46, 12.0)


def test_the_card_learns_of_the_dialect_once(tmp_path):
    shipped = "name: demo\ndialects: [dense, coordinates, marker]\ncoordinate_range: 2000\nmax_new_tokens: 48\n"
    card = tmp_path / "demo.yaml"
    card.write_text(shipped)
    for _ in range(2):
        declare_compact(card, 4)
        assert card.read_text() == (
            "name: demo\ndialects: [dense, coordinates, marker, compact]\ncoordinate_range: 2000\n"
            "points_per_question: 4\nmax_new_tokens: 48\n"
        )
