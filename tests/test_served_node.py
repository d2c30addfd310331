"""The node with a model behind a server: whatever the server does, the node stays, says so, and goes on afterwards."""

from __future__ import annotations

import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml

rclpy = pytest.importorskip("rclpy")

from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus  # noqa: E402
from fault_server import FAULTS, FaultServer  # noqa: E402
from rclpy.executors import SingleThreadedExecutor  # noqa: E402
from rclpy.node import Node  # noqa: E402
from sensor_msgs.msg import CameraInfo, Image, PointCloud2  # noqa: E402
from test_node_two_processes import (  # noqa: E402
    CAMERA,
    CARD,
    FRAME,
    PATIENCE_S,
    RELIABLE,
    NodeProcess,
    node_command,
    picture,
    wait,
)

from depthlm_ros.cards import CARD_FILE  # noqa: E402
from depthlm_ros.messages import camera_info_message, header_stamp_ns, read_cloud, rgb_message  # noqa: E402

POINTS = 6
RATE_HZ = 8.0
MAX_AGE_S = 1.5
# What is promised of a fault: told within 4 s, published again within 10 s of its end.
TOLD_S, BACK_S = 4.0, 10.0
# From the node's clock to this process, on a machine that does much else.
ON_THE_WAY_S = 1.0


class Robot:
    """A camera that never stops, and somebody who listens to clouds and diagnostics."""

    def __init__(self) -> None:
        self.context = rclpy.Context()
        rclpy.init(context=self.context)
        self.node = Node("robot", context=self.context)
        self.images = self.node.create_publisher(Image, "image", RELIABLE)
        self.infos = self.node.create_publisher(CameraInfo, "camera_info", RELIABLE)
        self.sent: dict[int, float] = {}
        self.clouds: list[tuple[int, float, PointCloud2]] = []
        self.told: list[tuple[float, DiagnosticStatus]] = []
        self.node.create_subscription(
            PointCloud2,
            "points",
            lambda m: self.clouds.append((header_stamp_ns(m.header), time.monotonic(), m)),
            RELIABLE,
        )
        self.node.create_subscription(
            DiagnosticArray, "/diagnostics", lambda m: self.told.append((time.monotonic(), m.status[0])), RELIABLE
        )
        self.executor = SingleThreadedExecutor(context=self.context)
        self.executor.add_node(self.node)
        self.ended = threading.Event()
        for run in (self.executor.spin, self.film):
            threading.Thread(target=run, daemon=True).start()

    def film(self) -> None:
        pixels = [picture(seed) for seed in range(3)]
        number = 0
        while not self.ended.wait(1.0 / RATE_HZ):
            number += 1
            stamp = number * 1_000_000_007
            self.sent[stamp] = time.monotonic()
            self.infos.publish(camera_info_message(CAMERA, stamp, FRAME))
            self.images.publish(rgb_message(pixels[number % 3], stamp, FRAME))

    def cloud_since(self, moment: float) -> bool:
        """Whether a cloud came of an image that was taken after that."""
        return any(self.sent[stamp] >= moment for stamp, _, _ in list(self.clouds))

    def told_since(self, moment: float, text: str) -> bool:
        return any(text in s.message and s.level != DiagnosticStatus.OK for at, s in list(self.told) if at >= moment)

    def close(self) -> None:
        self.ended.set()
        self.executor.shutdown(timeout_sec=PATIENCE_S)
        self.node.destroy_node()
        rclpy.try_shutdown(context=self.context)


@pytest.fixture(scope="module")
def model(qwen3_vl_checkpoint, tmp_path_factory) -> Path:
    """The model whose processor says how images are shown; who answers is the server."""
    folder = tmp_path_factory.mktemp("served") / "served"
    shutil.copytree(qwen3_vl_checkpoint, folder)
    card = CARD | {"name": "served", "dialects": ["coordinates"], "default_dialect": "coordinates"}
    (folder / CARD_FILE).write_text(yaml.safe_dump(card), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def servers() -> Iterator[tuple[FaultServer, FaultServer]]:
    with FaultServer("vllm") as preferred, FaultServer("vllm") as other:
        other.stop()
        yield preferred, other


@pytest.fixture(scope="module")
def running(ros_domain_module, model, servers) -> Iterator[tuple[NodeProcess, Robot]]:
    """One node for all faults: what the last one left behind counts, too."""
    urls = ",".join(server.url for server in servers)
    process = NodeProcess(
        node_command(
            f"model:={model}", "engine:=openai", f"server_urls:={urls}", f"points:={POINTS}", "cpu_threads:=1",
            f"max_age_s:={MAX_AGE_S}",
        )
    )  # fmt: skip
    robot = Robot()
    try:
        wait(process, lambda: bool(robot.clouds), "the first cloud")
        yield process, robot
    finally:
        robot.close()
        status = process.stop()
    assert status == 0, process.log
    assert "Traceback" not in process.log


def within(process: NodeProcess, seconds: float, condition: Callable[[], bool], what: str) -> None:
    began = time.monotonic()
    while not condition():
        assert process.process.poll() is None, f"the node ended:\n{process.log}"
        assert time.monotonic() - began < seconds, f"{what} took more than {seconds} s; the node said:\n{process.log}"
        time.sleep(0.02)


@pytest.mark.parametrize("fault", [*FAULTS, "gone"])
def test_the_node_outlives_every_fault_tells_it_and_publishes_again(fault, running, servers):
    process, robot = running
    server, other = servers
    url = server.url
    begun = time.monotonic()
    within(process, PATIENCE_S, lambda: robot.cloud_since(begun), "a cloud before the fault")
    failed = time.monotonic()
    if fault == "gone":
        server.stop()
    else:
        server.fault = fault
    within(process, TOLD_S, lambda: robot.told_since(failed, url), "the word about the fault")
    server.fault = ""
    if not server.running:
        server.start()
    mended = time.monotonic()
    within(process, BACK_S, lambda: robot.cloud_since(mended), "the next cloud")
    still = f"{url} "
    within(
        process, BACK_S, lambda: bool(robot.told) and still not in robot.told[-1][1].message, "the end of the complaint"
    )
    assert f"{other.url} has been out of use" in robot.told[-1][1].message, "it is down all the time, and that is told"


def test_no_cloud_was_older_than_allowed(running):
    _, robot = running
    clouds = list(robot.clouds)
    ages = [at - robot.sent[stamp] for stamp, at, _ in clouds]
    assert len(ages) > len(FAULTS)
    assert max(ages) < MAX_AGE_S + ON_THE_WAY_S
    stamps = [stamp for stamp, _, _ in clouds]
    assert stamps == sorted(set(stamps))


def test_the_cloud_holds_what_the_server_said(running, servers):
    process, robot = running
    begun = time.monotonic()
    within(process, PATIENCE_S, lambda: robot.cloud_since(begun), "a cloud")
    depths = read_cloud(robot.clouds[-1][2])["points"][:, 2]
    said = {float(number) for text in servers[0].said[-4 * POINTS :] for number in re.findall(r"\d+\.\d+", text)}
    assert len(depths) == POINTS
    assert all(min(abs(depth - value) for value in said) < 1e-4 for depth in depths.tolist())


def test_another_server_takes_over_and_the_preferred_one_comes_back(running, servers):
    process, robot = running
    server, other = servers
    other.start()
    out = f"{other.url} has been out of use"
    within(process, BACK_S, lambda: bool(robot.told) and out not in robot.told[-1][1].message, "the other server")
    server.stop()
    gone = time.monotonic()
    within(process, TOLD_S, lambda: robot.cloud_since(gone), "the cloud of the other server")
    within(process, TOLD_S, lambda: robot.told_since(gone, f"{other.url} is asked instead"), "the word about it")
    asked = len(server.requests)
    server.start()
    within(process, BACK_S, lambda: len(server.requests) > asked + 2 * POINTS, "the preferred server's return")
    back = time.monotonic()
    within(process, TOLD_S, lambda: robot.cloud_since(back), "its cloud")


def test_a_question_that_waits_is_told_while_it_waits_and_does_not_hold_up_the_end(ros_domain, model):
    with FaultServer("trtllm-serve") as server:
        process = NodeProcess(
            node_command(
                f"model:={model}", "engine:=openai", f"server_urls:={server.url}", f"points:={POINTS}",
                "cpu_threads:=1", "server_timeout_s:=600.0",
            )
        )  # fmt: skip
        robot = Robot()
        try:
            within(process, PATIENCE_S, lambda: bool(robot.clouds), "the first cloud")
            server.fault = "hang"
            failed = time.monotonic()
            silent = f"{server.url} has not answered for"
            within(process, TOLD_S, lambda: robot.told_since(failed, silent), "the word about the silence")
        finally:
            robot.close()
            began = time.monotonic()
            status = process.stop()
        assert status == 0, process.log
        assert time.monotonic() - began < BACK_S
    assert "Traceback" not in process.log


def test_without_a_server_the_node_ends_with_the_reason(ros_domain, model):
    done = subprocess.run(
        node_command(f"model:={model}", "engine:=openai", "server_urls:=http://127.0.0.1:9"),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=PATIENCE_S,
    )  # fmt: skip
    assert done.returncode == 1
    assert "http://127.0.0.1:9" in done.stdout and "Start the server" in done.stdout
    assert "Traceback" not in done.stdout


def test_pictures_differ():
    # Else the server's answers would say nothing about which image was shown.
    assert not np.array_equal(picture(0), picture(1))
