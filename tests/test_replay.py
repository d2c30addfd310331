"""Recordings go through the real node in another process, and come back as scored clouds."""

import json
import os
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from recordings import drive, floor_depth, small_model, write_depthlm_labels

from depthlm_ros.bags import write_bag
from depthlm_ros.cli import main
from depthlm_ros.errors import BagError, ConfigError, EngineError, ModelError

pytest.importorskip("rclpy")
from depthlm_ros.replay import ReplayOptions, replay  # noqa: E402

pytestmark = [pytest.mark.ros, pytest.mark.slow]


@pytest.fixture(scope="module")
def model(qwen3_vl_checkpoint, tmp_path_factory):
    return str(small_model(qwen3_vl_checkpoint, tmp_path_factory.mktemp("model") / "small"))


@pytest.fixture
def bag(tmp_path):
    write_bag(tmp_path / "bag", drive(3))
    return tmp_path / "bag"


def test_lockstep_answers_every_frame_with_the_estimators_depth(tmp_path, bag, model):
    from depthlm_ros.bags import read_frames
    from depthlm_ros.estimator import Estimator
    from depthlm_ros.sampling import stride_pixels

    before = dict(os.environ)
    run = replay(bag, {"model": model, "device": "cpu"}, log_folder=tmp_path / "log")
    assert dict(os.environ) == before
    counts = {name: run.figures[name] for name in ("frames_sent", "frames_answered", "frames_dropped", "frames_failed")}
    assert counts == {"frames_sent": 3, "frames_answered": 3, "frames_dropped": 0, "frames_failed": 0}
    assert run.environment["device"] == "cpu"
    assert run.environment["dialect"] == "dense"
    assert run.about_model == "small: random weights"

    estimator = Estimator.load(model, device="cpu")
    for recorded, frame in zip(read_frames(bag), run.tally.pictures, strict=True):
        pixels = stride_pixels(64, 48, 4)
        own = estimator.estimate(recorded.frame.image, recorded.frame.camera, pixels)
        assert frame.pixels == pytest.approx(pixels, abs=1e-3)
        # Threads may split a sum differently in the two processes.
        assert frame.depth_m == pytest.approx(own.depth_m, rel=1e-4)
        assert frame.depth_map_m[pixels[:, 1].astype(int), pixels[:, 0].astype(int)] == pytest.approx(frame.depth_m)
        assert np.array_equal(frame.truth_m, recorded.truth_m, equal_nan=True)


def test_sparse_labels_are_all_compared_and_score_as_in_evaluate(tmp_path, model):
    labels = write_depthlm_labels(tmp_path, points=40)
    assert main(["bag", "from-images", str(labels), str(tmp_path / "bag"), "--compressed", "png"]) == 0
    options = ["--model", model, "--device", "cpu", "--out"]
    assert main(["replay", str(tmp_path / "bag"), *options, str(tmp_path / "replayed")]) == 0
    assert main(["evaluate", str(labels), *options, str(tmp_path / "evaluated")]) == 0
    replayed, evaluated = (
        json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("replayed", "evaluated")
    )
    assert replayed["compared"] == replayed["labels"] == 80
    assert replayed["depth"] == pytest.approx(evaluated["depth"], rel=1e-3)


def test_real_time_sends_on_schedule_and_accounts_for_every_frame(tmp_path, model):
    write_bag(tmp_path / "bag", drive(8))
    settings = {"model": model, "device": "cpu", "dialect": "coordinates", "points": 40}
    run = replay(tmp_path / "bag", settings, ReplayOptions(rate=20, timeout_s=300), log_folder=tmp_path / "log")
    figures = run.figures
    assert figures["frames_sent"] == 8
    # Eight images in 70 ms: a model that answers in words can't keep up, and the newest frame wins.
    # Best effort may lose some before it sees them, when the queue of five overflows.
    lost = figures["frames_lost_before_node"]
    assert 1 <= figures["frames_answered"] == 8 - figures["frames_dropped"]
    assert figures["frames_dropped"] == figures["frames_dropped_by_node"] + lost > 0
    # Pixels without an answer are wrong, not forgotten.
    asked_below_horizon = sum(frame["compared"] for frame in run.tally.frames)
    assert asked_below_horizon == run.tally.scores()["depth"]["total"] > 0


def test_what_came_while_this_process_stood_still_is_not_given_up(monkeypatch):
    from depthlm_ros import replay as module

    stamp, clock = 7, [0.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(module, "header_stamp_ns", lambda header: stamp)
    monkeypatch.setattr(module, "read_cloud", lambda message: {"points": np.ones((1, 3)), "confidence": np.ones(1)})
    monkeypatch.setattr(module, "decode_depth", lambda message: np.ones((2, 2)))
    player = object.__new__(module._Player)
    player.clouds, player.depths, player._handled, player.quiet_s = {}, {}, 0, 0.0
    queue = [player._on_cloud, player._on_depth]

    def spin_once(timeout_sec):
        # An hour in which only the sender ran.
        clock[0] += 3600
        if queue:
            queue.pop(0)(SimpleNamespace(header=None))

    player._executor = SimpleNamespace(spin_once=spin_once)
    player._process = SimpleNamespace(poll=lambda: None)
    player.spin()
    assert not player.answered(stamp) and not player.quiet
    player.spin()
    assert player.answered(stamp) and stamp in player.depths
    del player.depths[stamp]
    assert not player.answered(stamp)
    for _ in range(round(module._GRACE_S / module._POLL_S) + 1):
        player.spin()
    assert player.answered(stamp) and player.quiet


def test_no_cloud_makes_exit_code_1_and_says_why(tmp_path, bag, model, capsys):
    # At this focal length the picture would have to become far too large.
    shutil.copytree(model, tmp_path / "far")
    card = tmp_path / "far" / "depthlm_card.yaml"
    card.write_text(card.read_text().replace("focal_px: 100", "focal_px: 100000"))
    out = tmp_path / "out"
    model = str(tmp_path / "far")
    assert main(["replay", str(bag), "--model", model, "--device", "cpu", "--frames", "2", "--out", str(out)]) == 1
    printed = capsys.readouterr().out
    assert "2 sent, 0 answered, 2 dropped" in printed
    assert "the node's last error: CameraError" in printed


def test_a_node_that_dies_is_reported_with_the_end_of_its_log(tmp_path, bag, model):
    settings = {"model": model, "device": "cuda:9"}
    with pytest.raises(EngineError, match=r"the node ended with status 1; its log .*node.log ends:(.|\n)*cuda"):
        replay(bag, settings, log_folder=tmp_path / "log")


def test_what_was_answered_before_a_faulty_message_is_kept(tmp_path, model, capsys):
    frames = list(drive(4))
    write_bag(tmp_path / "bag", [*frames[:2], replace(frames[2], truth_m=floor_depth(32, 24)), frames[3]])
    out = tmp_path / "out"
    assert main(["replay", str(tmp_path / "bag"), "--model", model, "--device", "cpu", "--out", str(out)]) == 1
    assert "broke off after 2 images" in capsys.readouterr().out
    saved = json.loads((out / "metrics.json").read_text())
    assert "ground truth is 32x24 but the image is 64x48" in saved["broke_off"]
    assert len(saved["frames"]) == saved["run"]["frames_sent"] == 2


def test_what_can_be_refused_is_refused_before_the_node_starts(tmp_path, bag, model):
    with pytest.raises(ModelError, match="doesn't exist"):
        replay(bag, {"model": str(tmp_path / "none")}, log_folder=tmp_path / "log")
    with pytest.raises(ConfigError, match="sparse"):
        replay(bag, {"model": model, "dialect": "sparse"}, log_folder=tmp_path / "log")
    with pytest.raises(BagError, match="/rear/image"):
        replay(bag, {"model": model}, ReplayOptions(topic="/rear/image"), log_folder=tmp_path / "log")
    assert not (tmp_path / "log").exists()
