"""`depthlm doctor`: looks at a machine, its libraries, its ROS graph and a model, and says what to mend."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from depthlm_ros.doctor import hardware, model, ros, storage, topics, versions
from depthlm_ros.doctor.page import Finding, Page, Section, section
from depthlm_ros.doctor.world import CHILD_S, Child, World, this_world

__all__ = ["Options", "examine"]

LISTEN = ["-m", "depthlm_ros.doctor.listen"]
_AT_ONCE = 4


@dataclass(frozen=True)
class Options:
    """What the doctor is asked.

    Attributes:
        model: name, folder or hub id.
        engine: that shall run it.
        image: the only image topic to look at; empty for all.
        camera_info: its CameraInfo, where it isn't beside the image.
        seconds: to listen.
        ros: whether ROS is looked at.
    """

    model: str = "demo"
    engine: str = "transformers"
    image: str = ""
    camera_info: str = ""
    seconds: float = 5.0
    ros: bool = True


def examine(options: Options, world: World | None = None) -> Page:
    """Makes every check; takes about as long as it listens and as the slowest import.

    Args:
        options: what to look at.
        world: the machine; None for this one.
    """
    world = world or this_world()
    with ThreadPoolExecutor(_AT_ONCE) as pool:

        def start(code: Callable[[], Child]) -> Future[Child]:
            return pool.submit(code)

        torch = start(lambda: hardware.probe_torch(world))
        runtime = start(lambda: world.child(["-c", versions.ORT_PROBE], CHILD_S))
        edge = None
        if world.version("tensorrt-edgellm"):
            edge = start(lambda: world.child(["-c", versions.EDGE_PROBE], CHILD_S))
        probe = start(lambda: ros.probe_ros(world)) if options.ros else None
        bridge = pool.submit(world.bridge)
        # The last: what it hears shouldn't wait for imports that take all cores.
        heard = _listen(world, options, probe)
        sections = [
            section(
                "Machine",
                [
                    ("the system", lambda: hardware.check_system(world)),
                    ("the GPU", lambda: hardware.check_gpu(world, options.engine)),
                    ("the Jetson", lambda: hardware.check_jetson(world)),
                    ("the memory", lambda: hardware.check_memory(world)),
                    ("PyTorch", lambda: hardware.check_torch(world, torch.result(), options.engine)),
                ],
            ),
            section(
                "Versions",
                [
                    ("packages", lambda: versions.check_packages(world, options.engine)),
                    ("TensorRT", lambda: versions.check_tensorrt(world, options.engine)),
                    ("ONNX Runtime", lambda: versions.check_onnxruntime(world, runtime.result(), options.engine)),
                    ("TensorRT-LLM", lambda: versions.check_tensorrt_llm(world, options.engine)),
                    ("Edge-LLM", lambda: versions.check_edge_llm(world, edge and edge.result(), options.engine)),
                    ("cv_bridge", lambda: versions.check_cv_bridge(bridge.result(), world.version("numpy"))),
                ],
            ),
        ]
        if options.ros:
            sections += _ros_sections(world, options, probe.result(), heard)
        camera = topics.camera_heard(heard.facts) if heard is not None and heard.facts else None
        checks = [("the model", lambda: model.check_model(world, options.model, options.engine, camera))]
        disk = [("the disk", lambda: storage.check_disk(world, options.ros))]
        sections += [section("Model", checks), section("Disk", disk)]
    return Page(tuple(sections), world.machine.as_dict())


def _listen(world: World, options: Options, probe: Future[Child] | None) -> Child | None:
    """Listens, once it is known that ROS loads; None where it doesn't or isn't wanted."""
    if probe is None or probe.result().code != 0:
        return None
    named = [*(["--image", options.image] if options.image else []),
             *(["--camera-info", options.camera_info] if options.camera_info else [])]  # fmt: skip
    return world.child([*LISTEN, "--seconds", f"{options.seconds:g}", *named], options.seconds + CHILD_S)


def _ros_sections(world: World, options: Options, probe: Child, heard: Child | None) -> list[Section]:
    rmw = (probe.facts or {}).get("rmw", "") or world.environment.get("RMW_IMPLEMENTATION", "")
    own = section(
        "ROS 2",
        [
            ("ROS 2", lambda: ros.check_rclpy(world, probe)),
            ("the variables", lambda: ros.check_variables(world)),
            ("the middleware's settings", lambda: ros.check_profiles(world, rmw)),
            ("the kernel's settings", lambda: ros.check_kernel(world, rmw)),
        ],
    )
    if heard is None:
        return [own]
    checks: list[tuple[str, Callable[[], Iterable[Finding]]]] = [("listening", lambda: topics.check_listening(heard))]
    facts: dict[str, Any] | None = heard.facts
    if facts is not None:
        checks.append(("the topics", lambda: topics.check_topics(facts, options.seconds)))
    return [own, section(f"Cameras (heard for {options.seconds:g} s)", checks)]
