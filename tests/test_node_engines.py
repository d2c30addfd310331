"""The node with engines that may be late, complain, or answer otherwise than they should."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("rclpy")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from lifecycle_msgs.msg import Transition  # noqa: E402
from rcl_interfaces.msg import Log  # noqa: E402
from rclpy.logging import LoggingSeverity  # noqa: E402
from sensor_msgs.msg import PointCloud2  # noqa: E402
from test_node import CAMERA, PATIENCE_S, World, until, value, worlds  # noqa: E402, F401

from depthlm_ros import complaints  # noqa: E402
from depthlm_ros.node import load_estimator  # noqa: E402
from depthlm_ros.references import REFERENCE_FILE  # noqa: E402


def test_an_answer_that_comes_too_late_is_not_published_and_the_next_one_is(worlds):  # noqa: F811
    world = worlds(max_age_s=100.0)
    world.listen(PointCloud2, "points")
    world.camera()
    world.estimator.gate.clear()
    world.send(stamp=1)
    assert world.estimator.entered.wait(PATIENCE_S)
    # Not before it is asked: on a slow machine the image could be too old then, and nobody would be asked.
    assert world.set("max_age_s", 0.05)[0].successful
    time.sleep(0.1)
    world.estimator.gate.set()
    status = world.status_where(lambda s: "max_age_s is 0.05" in value(s, "last error"), "the late frame to be told")
    assert "not published" in value(status, "last error")
    assert not world.heard["points"]
    assert world.set("max_age_s", 100.0)[0].successful
    world.send(stamp=2)
    until(lambda: world.heard["points"], "a cloud")
    assert [message.header.stamp.nanosec for message in world.heard["points"]] == [2]


def test_the_engine_knows_how_long_an_answer_is_of_use(worlds):  # noqa: F811
    world = worlds(max_age_s=100.0)
    world.listen(PointCloud2, "points")
    world.camera()
    before = time.monotonic()
    world.send(stamp=1)
    until(lambda: world.heard["points"], "a cloud")
    assert before + 90 < world.estimator.engine.deadline < time.monotonic() + 100
    world.set("max_age_s", 0.0)
    world.send(stamp=2)
    until(lambda: len(world.heard["points"]) == 2, "a cloud")
    assert world.estimator.engine.deadline is None


def test_what_an_engine_complains_of_is_in_the_diagnostics_for_as_long(worlds):  # noqa: F811
    world = worlds()
    world.estimator.complaints = ("http://server:8000 has not answered for 3 s",)
    status = world.status_where(lambda s: "has not answered for 3 s" in s.message, "the complaint")
    assert status.level == status.WARN
    world.estimator.complaints = ()
    world.status_where(lambda s: s.level == s.OK, "the complaint to be over")


@pytest.fixture(scope="module")
def export(tmp_path_factory) -> Path:
    """The demo's dense pass as a graph for the test's camera."""
    from depthlm_training.export_targets import export_target

    folder = tmp_path_factory.mktemp("export") / "engine"
    export_target("demo", folder, "onnx", CAMERA)
    return folder


@pytest.fixture
def wrong(export, tmp_path) -> Path:
    """The same with reference answers that it doesn't give."""
    import numpy as np

    from depthlm_ros.manifest import read_manifest, sha256_of, write_manifest

    folder = tmp_path / "wrong"
    shutil.copytree(export, folder)
    arrays = dict(np.load(folder / "reference" / "depths.npz"))
    told = {name: values * 1.2 if name.startswith("depth") else values for name, values in arrays.items()}
    np.savez(folder / "reference" / "depths.npz", **told)
    manifest = read_manifest(folder)
    name = "reference/depths.npz"
    files = {**manifest.files, name: sha256_of(folder / name)}
    write_manifest(folder, type(manifest)(**{**vars(manifest), "files": files}))
    return folder


def engine_world(folder: Path, **parameters) -> World:
    return World(load=load_estimator, model=str(folder), engine="onnxruntime", device="cpu", **parameters)


def test_an_engine_that_answers_as_its_reference_is_activated_and_measures(ros_domain, export):
    world = engine_world(export)
    try:
        assert world.transition(Transition.TRANSITION_CONFIGURE)[0]
        assert world.transition(Transition.TRANSITION_ACTIVATE)[0]
        world.listen(PointCloud2, "points")
        world.camera()
        world.send(stamp=1)
        until(lambda: world.heard["points"], "a cloud")
        status = world.status_where(lambda s: value(s, "engine") == "onnxruntime", "diagnostics")
        assert status.level == status.OK
        assert world.heard["points"][0].width == 48
    finally:
        world.close()


def test_an_engine_that_answers_otherwise_is_refused_at_configure_and_the_node_lives(ros_domain, wrong, export):
    world = engine_world(wrong)
    try:
        assert not world.transition(Transition.TRANSITION_CONFIGURE)[0]
        assert world.state() == "unconfigured"
        status = world.status_where(lambda s: "scale" in value(s, "last error"), "the refusal")
        assert "does not answer as demo" in value(status, "last error")
        assert "accept_unproven" in value(status, "last error")
        assert world.set("model", str(export))[0].successful
        assert world.transition(Transition.TRANSITION_CONFIGURE)[0]
    finally:
        world.close()


def test_an_unproven_engine_that_was_accepted_is_complained_of_while_it_runs(ros_domain, wrong, monkeypatch):
    world = engine_world(wrong, accept_unproven=True)
    try:
        logged: list[Log] = []
        world.peer.create_subscription(Log, "/rosout", logged.append, 100)

        def told() -> list[Log]:
            return [line for line in logged if line.msg.startswith("ACCEPTED because accept_unproven is true")]

        def wait_for(count: int, why: str) -> None:
            until(lambda: len(told()) >= count, why)
            # Reports come every second; a reminder with each of them would be none.
            world.status_where(lambda s: "does not answer as demo" in s.message, "the complaint")
            assert len(told()) == count

        until(lambda: world.peer.count_publishers("/rosout") >= 2, "the logs")
        assert world.transition(Transition.TRANSITION_CONFIGURE)[0]
        wait_for(1, "the line of the load")
        assert world.transition(Transition.TRANSITION_ACTIVATE)[0]
        wait_for(2, "the line of the activation")
        for _ in range(2):
            status = world.status_where(lambda s: "does not answer as demo" in s.message, "the complaint")
            assert status.level == status.WARN
        assert len(told()) == 2
        assert {line.level for line in told()} == {LoggingSeverity.ERROR.value}
        assert "does not answer as demo" in told()[0].msg
        # As when a minute has gone by.
        monkeypatch.setattr(complaints, "REMINDER_INTERVAL_S", 0.0)
        until(lambda: len(told()) >= 4, "the reminders")
    finally:
        world.close()


def test_what_an_engine_complains_of_is_logged_once_a_minute_whatever_seconds_it_tells(worlds, monkeypatch):  # noqa: F811
    world = worlds()
    lines: list[str] = []

    def note(text: str) -> None:
        # What else there is to say on a slow machine is no part of this.
        if "http://" in text:
            lines.append(text)

    logger = SimpleNamespace(warning=note, error=note)
    monkeypatch.setattr(world.node._complaints, "_logger", logger)
    for seconds in (3, 4):
        world.estimator.complaints = (f"http://server has not answered for {seconds} s",)
        world.status_where(lambda s: f"for {seconds} s" in s.message, "the complaint")  # noqa: B023
    assert lines == ["http://server has not answered for 3 s"]
    world.estimator.complaints = ("http://other has not answered for 1 s",)
    world.status_where(lambda s: "http://other" in s.message, "the other complaint")
    assert lines[1:] == ["http://other has not answered for 1 s"]


def test_the_reference_is_part_of_what_is_proved(wrong):
    assert (wrong / "reference" / REFERENCE_FILE).is_file()


def test_the_node_runs_a_graph_without_torch_in_as_many_threads_as_it_is_told(ros_domain, export):
    program = f"""
import sys
sys.modules["torch"] = sys.modules["transformers"] = None
from depthlm_ros import node
def load(parameters):
    estimator = node.load_estimator(parameters)
    settings = estimator.engine._runner._session.get_session_options()
    print("threads", settings.intra_op_num_threads, flush=True)
    return estimator
node.rclpy.spin = lambda node: None
values = ("model:={export}", "engine:=onnxruntime", "device:=cpu", "cpu_threads:=1")
status = node.main(["--ros-args", *(part for value in values for part in ("-p", value))], load=load)
sys.exit(status)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100.0)
    assert (done.returncode, done.stdout) == (0, "threads 1\n"), done.stderr
    assert "ready: image" in done.stderr
