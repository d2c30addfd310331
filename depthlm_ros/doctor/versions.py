"""Versions of what engines run on, and the combinations that are known to go wrong.

No list of good versions can take the place of a parity check: faults have come and gone in both directions. The list
here says where to look first.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from depthlm_ros.doctor.page import Finding, fail, note, ok, warn
from depthlm_ros.doctor.world import Child, World
from depthlm_ros.engines import REQUIRED, REQUIRED_FOR_SIZES
from depthlm_ros.machine import THOR, Machine

# What each engine imports of the two, at the least; those of CHECKED check their versions too.
NEEDS = {
    "transformers": ("torch", "transformers"), "openai": ("transformers",), "tensorrt": ("torch",),
    "tensorrt_llm": ("torch", "transformers"), "edge_llm": ("transformers",), "onnxruntime": (),
}  # fmt: skip
CHECKED = {"transformers": REQUIRED, "openai": REQUIRED_FOR_SIZES, "edge_llm": REQUIRED_FOR_SIZES}

PACKAGES = ("torch", "transformers", "numpy", "opencv-python-headless", "pillow", "safetensors", "rosbags")
OPENCV = ("opencv-python-headless", "opencv-python", "opencv-contrib-python")
ONNXRUNTIMES = ("onnxruntime", "onnxruntime-gpu")

ORT_PROBE = """
import json, onnxruntime
print(json.dumps({"version": onnxruntime.__version__, "providers": onnxruntime.get_available_providers()}))
"""
# `tensorrt_edgellm.runtime.load` checks its libraries and loads them (Edge-LLM 0.11).
EDGE_PROBE = """
import json, tensorrt
from tensorrt_edgellm import runtime
runtime.load()
print(json.dumps({"tensorrt": tensorrt.__version__}))
"""


@dataclass(frozen=True)
class Fault:
    """A version of TensorRT that somebody got wrong depth, or wrong words, from.

    Attributes:
        version: its first parts.
        capability: of the GPU, empty for any.
        seen: what came out wrong.
        sources: public reports.
        remedy: what helped.
    """

    version: str
    capability: str
    seen: str
    sources: str
    remedy: str


_NEWER = "use TensorRT 10.16 (JetPack 7.2, or the container in config/containers/)"
FAULTS = (
    Fault("10.3", "", "depth engines were wrong: scale drifting from frame to frame (Depth Anything 3), wrong or NaN "
          "(Depth Anything v2, DINOv3, FoundationStereo)",
          "ika-rwth-aachen/ros2-depth-anything-v3-trt #16, spacewalk01/depth-anything-tensorrt #49, NVIDIA/TensorRT "
          "#4723, NVlabs/FoundationStereo #78", _NEWER),
    Fault("10.4", "", "float32 engines of DINOv3 had a cosine of 0.018 with the original",
          "NVIDIA/TensorRT #4742", _NEWER),
    Fault("10.7", "", "UniDepth v2 gave nonsense", "lpiccinelli-eth/UniDepth #135", _NEWER),
    Fault("10.13.3.9", THOR, "Qwen-VL engines that were built for a batch of 1 answered garbage",
          "NVIDIA/TensorRT-Edge-LLM #105, #151", "build with --maxBatchSize 2, or flash JetPack 7.2"),
    Fault("10.13", "", "float16 engines of YOLOv10 were wrong where 10.3 was right", "NVIDIA/TensorRT #4820", _NEWER),
)  # fmt: skip

# NVIDIA's TensorRT 11.4.1 documentation, moving from 10.x to 11.x on Jetson.
TENSORRT_11_ON_JETSON = (11, 4, 1)

# What the wheel of Edge-LLM 0.11.0 holds libraries for (its variants.json); it takes exact matches only.
EDGE_JETSON = {("8.7", "39.2"), ("11.0", "38.2"), ("11.0", "38.4"), ("11.0", "39.2")}
EDGE_DESKTOP = {("Ubuntu 22.04", "8.0"), *(("Ubuntu 24.04", each) for each in ("8.0", "8.6", "10.0", "12.0"))}
EDGE_PYTHONS = ((3, 10), (3, 11), (3, 12))


def check_packages(world: World, engine: str) -> Iterable[Finding]:
    """Whether the Python packages are there and new enough."""
    seen = {name: world.version(name) for name in PACKAGES}
    seen["opencv-python-headless"] = next(filter(None, map(world.version, OPENCV)), "")
    python = f"Python {'.'.join(str(part) for part in world.python)}"
    yield ok(", ".join([python, *(f"{name} {version}" for name, version in seen.items() if version)]))
    several = [name for name in OPENCV if world.version(name)]
    if len(several) > 1:
        yield note(f"{' and '.join(several)} are both installed, each over the other's files",
                   f"keep one: pip uninstall {' '.join(several[1:])}")  # fmt: skip
    for name in ("numpy", "pillow", "safetensors"):
        if not seen[name]:
            yield fail(f"{name} is not installed", f"pip install {name}")
    if not seen["opencv-python-headless"] and not world.importable("cv2"):
        yield fail("OpenCV is not installed", "pip install opencv-python-headless")
    if seen["numpy"] and _release(seen["numpy"]) < (2,):
        remedy = 'pip install "numpy>=2", in an environment of its own'
        yield note(f"numpy {seen['numpy']}: this package asks for 2", remedy)
    for name, oldest in (REQUIRED | CHECKED.get(engine, {})).items():
        # PyTorch's absence is told where it is tried.
        if (seen[name] and _release(seen[name]) >= _release(oldest)) or (name == "torch" and not seen[name]):
            continue
        state = f"{seen[name]} is too old" if seen[name] else "is not installed"
        serious = fail if name in NEEDS[engine] and (engine in CHECKED or not seen[name]) else note
        users = ", ".join(user for user, needs in NEEDS.items() if name in needs)
        yield serious(f"{name} {state} (engines {users} use it)", f'pip install "{name}>={oldest}"')


def check_tensorrt(world: World, engine: str) -> Iterable[Finding]:
    """TensorRT's version, and whether wrong engines of it have been reported."""
    version = world.machine.tensorrt
    if not version:
        if engine == "tensorrt":
            yield fail(
                "TensorRT is not installed, engine tensorrt needs it",
                "on a Jetson: sudo apt install tensorrt python3-libnvinfer; elsewhere: pip install tensorrt",
            )
        else:
            yield ok("TensorRT is not installed; only engines tensorrt and edge_llm need it")
        return
    if engine == "tensorrt" and not world.importable("tensorrt"):
        yield fail(
            f"TensorRT {version} is installed, and this Python doesn't find its package tensorrt",
            "sudo apt install python3-libnvinfer, and make the environment with --system-site-packages; or pip install "
            f"tensorrt=={version}",
        )
    known = faults_of(world.machine)
    for fault in known:
        yield warn(
            f"TensorRT {version}: {fault.seen} ({fault.sources})",
            f"{fault.remedy}; whatever the version, trust an engine only after depthlm's parity check on this machine",
        )
    if world.machine.is_jetson and (11,) <= _release(version, 3) < TENSORRT_11_ON_JETSON:
        yield warn(f"TensorRT {version} does not support JetPack; 11.4.1 is the first of its line that does (7.2.2)",
                   "use the TensorRT 10 that came with JetPack")  # fmt: skip
    elif not known:
        yield ok(f"TensorRT {version}; no wrong depth engines of it are known to this version of depthlm_ros")


def faults_of(machine: Machine) -> list[Fault]:
    """The faults that have been reported of a machine's TensorRT."""
    parts = machine.tensorrt.split(".")
    return [
        fault
        for fault in FAULTS
        if parts[: len(wanted := fault.version.split("."))] == wanted
        and fault.capability in ("", machine.compute_capability)
    ]


def check_onnxruntime(world: World, child: Child, engine: str) -> Iterable[Finding]:
    """ONNX Runtime and what it can compute on.

    Args:
        world: the machine.
        child: of `ORT_PROBE`.
        engine: that is asked for.
    """
    installed = [name for name in ONNXRUNTIMES if world.version(name)]
    serious = fail if engine == "onnxruntime" else note
    if not installed:
        if engine == "onnxruntime":
            yield fail("ONNX Runtime is not installed, engine onnxruntime needs it", "pip install onnxruntime")
        else:
            yield ok("ONNX Runtime is not installed; only engine onnxruntime needs it")
        return
    if len(installed) > 1:
        yield warn(f"{' and '.join(installed)} are both installed, each over the other's files",
                   "pip uninstall both, then install onnxruntime-gpu alone")  # fmt: skip
    facts = child.facts
    if child.code != 0 or facts is None:
        yield serious(f"ONNX Runtime does not import ({child.fault})", "pip install --force-reinstall onnxruntime")
        return
    providers = [name.removesuffix("ExecutionProvider") for name in facts.get("providers", ())]
    yield ok(f"ONNX Runtime {facts.get('version')}, built with {', '.join(providers)}")
    if world.machine.compute_capability and "CUDA" not in providers:
        remedy = "pip install onnxruntime-gpu in its place"
        if world.machine.is_jetson:
            remedy = "there is no official wheel for this board: use engine tensorrt, or build ONNX Runtime for it"
        yield (warn if engine == "onnxruntime" else note)("this build of ONNX Runtime leaves the GPU unused", remedy)


def check_tensorrt_llm(world: World, engine: str) -> Iterable[Finding]:
    """TensorRT-LLM, where it is there or wanted."""
    version = world.version("tensorrt-llm")
    if version:
        yield ok(f"TensorRT-LLM {version}")
    if engine != "tensorrt_llm":
        return
    if world.machine.is_jetson:
        yield fail("TensorRT-LLM does not run on Jetson",
                   "use engine edge_llm, or openai with tensorrt-edgellm-serve")  # fmt: skip
    elif not version:
        yield fail(
            "TensorRT-LLM is not installed, engine tensorrt_llm needs it",
            "it wants an environment or a container of its own (it pins torch and transformers); from another "
            "environment, reach it with trtllm-serve and engine openai",
        )


def check_edge_llm(world: World, child: Child | None, engine: str) -> Iterable[Finding]:
    """TensorRT Edge-LLM: whether its wheel has libraries for this machine and whether its tools are there.

    Args:
        world: the machine.
        child: of `EDGE_PROBE`; None where the package isn't installed.
        engine: that is asked for.
    """
    version = world.version("tensorrt-edgellm")
    wanted = engine == "edge_llm"
    program = world.commands("llm_inference") or world.environment.get("LLM_INFERENCE", "")
    if not version and not wanted and not program and not world.machine.is_jetson:
        return
    if not world.machine.compute_capability:
        return  # told already
    mismatch = edge_llm_mismatch(world.machine, world.system, world.python)
    loads = bool(version) and child is not None and child.code == 0
    if loads:
        yield ok(f"TensorRT Edge-LLM {version} loads its runtime")
    elif version and not mismatch:
        yield (fail if wanted and not program else warn)(
            f"TensorRT Edge-LLM {version} does not load: {child.fault if child else 'not tried'}",
            "unset EDGELLM_PLUGIN_PATH, which the wheel sets itself, and install the TensorRT that it wants, 10.16",
        )
    if mismatch:
        yield (fail if wanted and not program else note)(
            f"TensorRT Edge-LLM 0.11's wheel has no runtime for this machine: {mismatch}",
            "build Edge-LLM's programs from source here, flash JetPack 7.2, or ask another machine's server with "
            "engine openai",
        )
    elif not version:
        yield (fail if wanted and not program else note)(
            "the wheel of TensorRT Edge-LLM is not installed; it answers in this process and serves models",
            'pip install "tensorrt-edgellm==0.11.0" beside TensorRT 10.16 (its server: "tensorrt-edgellm[server]")',
        )
    if program and wanted and not loads:
        yield note(f"engine edge_llm will run {program}, which loads the model for every frame",
                   "for a live camera, install the wheel or use engine openai with tensorrt-edgellm-serve")  # fmt: skip
    missing = [name for name in ("llm_build", "visual_build") if not world.commands(name)]
    if wanted and missing:
        yield note(
            f"{' and '.join(missing)} can't be found on PATH; building an export's engines needs them, once",
            "they are in no wheel: build NVIDIA/TensorRT-Edge-LLM here, or set LLM_BUILD and VISUAL_BUILD",
        )


def edge_llm_mismatch(machine: Machine, system: str, python: tuple[int, int]) -> str:
    """Why the wheel of Edge-LLM 0.11.0 has nothing for a machine; empty where it has."""
    if python not in EDGE_PYTHONS:
        return f"it is made for Python 3.10 to 3.12, this is {python[0]}.{python[1]}"
    capability = machine.compute_capability
    if not capability:
        return "there is no NVIDIA GPU"
    if machine.is_jetson:
        release = ".".join(machine.l4t.split(".")[:2])
        if (capability, release) in EDGE_JETSON:
            return ""
        on = "JetPack 7.2 (R39.2)" if capability != THOR else "JetPack 7.0, 7.1 and 7.2 (R38.2, R38.4, R39.2)"
        return f"compute capability {capability} is supported on {on}, this is R{release or ' unknown'}"
    if machine.arch == "x86_64":
        if (system, capability) in EDGE_DESKTOP:
            return ""
        known = sorted(each for place, each in EDGE_DESKTOP if place == system)
        return f"compute capability {capability} on {system}; there it knows {', '.join(known) or 'none'}"
    return "" if capability in ("11.0", "12.0", "12.1") else f"compute capability {capability} on {machine.arch}"


def check_cv_bridge(fault: str | None, numpy: str) -> Iterable[Finding]:
    """Whether cv_bridge works beside this NumPy; the node does without it.

    Args:
        fault: of `encodings.cv_bridge_fault`, None where it works.
        numpy: installed version.
    """
    if fault is None:
        yield ok(f"cv_bridge works beside NumPy {numpy}")
    elif "isn't installed" in fault:
        yield ok("cv_bridge is not installed; depth_node does without it")
    elif numpy.startswith("1."):
        yield note(f"cv_bridge does not work here: {fault}", "depth_node does without it; other nodes may not")
    else:
        yield warn(
            f"cv_bridge breaks beside NumPy {numpy}, as builds for NumPy 1 do: {fault}",
            "depth_node does without it; run nodes that need it outside of this environment, with the system's Python",
        )


def _release(version: str, parts: int = 2) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.split("+")[0])[:parts])
