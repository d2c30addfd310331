"""The machine: GPU, driver, memory, JetPack, power mode, and whether PyTorch has code for this GPU."""

from __future__ import annotations

import platform
import re
from collections.abc import Iterable
from typing import Any

from depthlm_ros.doctor.page import Finding, fail, note, ok, warn
from depthlm_ros.doctor.world import CHILD_S, Child, World
from depthlm_ros.engines import REQUIRED, WITHOUT_TORCH
from depthlm_ros.machine import ORIN, THOR, Memory, gpu_memory_of, memory_of, power_mode_of

GB = 1e9
# TensorRT Edge-LLM's guide asks for as much beside the model.
BESIDE_MODEL = 2 * GB
# Weights of a Qwen3-VL and the precision they fit in: parameters times bytes each, plus what int4 leaves in float16.
SIZES = (
    (16.5, "8B in float16"), (9.0, "4B in float16"), (5.5, "8B in int4"), (4.5, "2B in float16"), (3.2, "4B in int4"),
    (1.8, "2B in int4"),
)  # fmt: skip

ON_GPU = ("tensorrt", "tensorrt_llm", "edge_llm")

# get_arch_list is empty where no GPU can be used; the build's own flags are not.
TORCH_PROBE = """
import json, torch
facts = {"version": torch.__version__, "cuda": torch.version.cuda, "usable": torch.cuda.is_available()}
try:
    facts["architectures"] = (torch._C._cuda_getArchFlags() or "").split()
except AttributeError:
    facts["architectures"] = []
if facts["usable"]:
    facts["capability"] = "%d.%d" % torch.cuda.get_device_capability()
    try:
        ones = torch.ones(64, 64, device="cuda")
        facts["product"] = (ones @ ones).sum().item()
        facts["free"], facts["total"] = torch.cuda.mem_get_info()
    except Exception as error:
        facts["error"] = f"{type(error).__name__}: {error}"[:300]
print(json.dumps(facts))
"""
_PRODUCT = 64.0**3


def check_system(world: World) -> Iterable[Finding]:
    """Computer and operating system."""
    machine = world.machine
    where = ", in a container" if world.in_container else ""
    arch = machine.arch or platform.machine()
    yield ok(f"{machine.board + ', ' if machine.board else ''}{arch}, {world.system}{where}")
    if world.python < (3, 10):
        yield fail(
            f"Python {_dotted(world.python)} is too old for this package",
            "use Python 3.10 or newer: Ubuntu 22.04 (JetPack 6) has 3.10, Ubuntu 24.04 (JetPack 7) has 3.12",
        )


def check_gpu(world: World, engine: str) -> Iterable[Finding]:
    """The GPU and its driver.

    Args:
        world: the machine.
        engine: that shall run.
    """
    machine = world.machine
    if not machine.gpu and not machine.compute_capability:
        if machine.is_jetson:
            yield warn(
                "this is a Jetson whose chip can't be told from the device tree or nvidia-smi",
                "in a container, start it with --runtime nvidia --gpus all; on the board, see whether JetPack is there",
            )
            return
        if engine in ON_GPU:
            yield fail(
                f"no NVIDIA GPU (nvidia-smi names none), engine {engine} needs one",
                "install NVIDIA's driver; in a container, start it with --gpus all; or use onnxruntime or openai",
            )
        else:
            yield note("no NVIDIA GPU (nvidia-smi names none): models run on the CPU, which suits the demo model only")
        return
    driver = f", driver {machine.driver}" if machine.driver else ""
    yield ok(f"GPU {machine.gpu}, compute capability {machine.compute_capability or 'unknown'}{driver}")


def check_jetson(world: World) -> Iterable[Finding]:
    """JetPack and power mode; nothing elsewhere."""
    machine = world.machine
    if not machine.is_jetson:
        return
    if not machine.l4t:
        yield warn(
            "the release of Jetson Linux can't be read, so engines can't tell whether they were built for it",
            "in a container, add -v /etc/nv_tegra_release:/etc/nv_tegra_release:ro; on the board, install "
            "nvidia-l4t-core",
        )
    else:
        known = f"JetPack {machine.jetpack}" if machine.jetpack else "a JetPack that this version doesn't know"
        yield ok(f"Jetson Linux {machine.l4t} ({known})")
        yield from _jetpack(world)
    mode = power_mode_of(world.run)
    if not mode:
        yield note("the power mode can't be read", "look yourself: sudo nvpmodel -q")
    elif mode.startswith("MAXN"):
        yield ok(f"power mode {mode}")
    else:
        yield note(
            f"power mode {mode}: slower than the board can be",
            "for full speed, with the cooling for it: sudo nvpmodel -m 0 && sudo jetson_clocks",
        )


def _jetpack(world: World) -> Iterable[Finding]:
    machine = world.machine
    line = int(machine.l4t.split(".")[0])
    if line < 36:
        yield fail(
            f"Jetson Linux {machine.l4t} is JetPack 5 or older: its Python and its TensorRT are too old",
            "flash JetPack 7.2 (Orin and Thor)",
        )
    elif line == 36 and machine.compute_capability == ORIN:
        yield warn(
            "JetPack 6: TensorRT Edge-LLM has no build for it, and its own TensorRT 10.3 is the version with the most "
            "reports of wrong depth",
            "flash JetPack 7.2; or keep to engine tensorrt inside a container with TensorRT 10.16 "
            "(config/containers/jetson_orin.Dockerfile), and rely on the parity check at start",
        )
    elif line == 38 and machine.compute_capability == THOR:
        yield note(
            "JetPack 7.0 and 7.1 come with TensorRT 10.13.3, whose engines for a batch of 1 can be wrong on Thor",
            "flash JetPack 7.2, or build with --maxBatchSize 2 (NVIDIA/TensorRT-Edge-LLM #105, #151)",
        )


def check_memory(world: World) -> Iterable[Finding]:
    """Memory, and which sizes of model it holds."""
    system, own = memory_of(world.root), gpu_memory_of(world.run)
    if system.total:
        shared = ", shared with the GPU" if world.machine.is_jetson and not own.total else ""
        yield ok(f"memory {_gb(system.total)}, free {_gb(system.free)}{shared}")
    else:
        yield note("the memory can't be read from /proc/meminfo")
    if own.total:
        yield ok(f"GPU memory {_gb(own.total)}, free {_gb(own.free)}")
    room = memory_for_models(world)
    if room is None or not world.machine.compute_capability:
        return
    fitting = next((told for size, told in SIZES if size * GB + BESIDE_MODEL <= room), "")
    if fitting:
        yield ok(f"the largest that fits now: about {fitting} (weights and 2 GB beside them)")
    else:
        yield warn(
            f"{_gb(room)} free for models is too little even for 2B in int4",
            "end other programs; on a Jetson, also turn off the desktop: sudo systemctl set-default multi-user.target",
        )


def memory_for_models(world: World) -> float | None:
    """Bytes that a model could get now: the GPU's where it has its own; None where they can't be found out."""
    own = gpu_memory_of(world.run)
    chosen: Memory = own if own.total else memory_of(world.root)
    return float(chosen.free) if chosen.total else None


def probe_torch(world: World) -> Child:
    """Imports PyTorch in a child and lets it multiply on the GPU, if there is one."""
    return world.child(["-c", TORCH_PROBE], CHILD_S)


def check_torch(world: World, child: Child, engine: str) -> Iterable[Finding]:
    """Whether PyTorch imports and its CUDA build has code for this GPU.

    Args:
        world: the machine.
        child: of `probe_torch`.
        engine: that shall run. Some do without PyTorch, transformers and tensorrt want it on the GPU.
    """
    serious = note if engine in WITHOUT_TORCH else fail
    if not world.version("torch"):
        told = f"PyTorch is not installed; only engines {', '.join(WITHOUT_TORCH)} do without"
        yield serious(told, f'pip install "torch>={REQUIRED["torch"]}"')
        return
    facts = child.facts
    if child.code != 0 or facts is None:
        yield serious(
            f"PyTorch {world.version('torch')} is installed but does not import ({child.fault or 'said nothing'})",
            "install it again, from the index for this machine: https://pytorch.org/get-started/locally",
        )
        return
    yield from _torch_on_gpu(world, facts, engine)


def _torch_on_gpu(world: World, facts: dict[str, Any], engine: str) -> Iterable[Finding]:
    unused = {"transformers": warn, "tensorrt": fail}.get(engine, note)
    broken = fail if engine in ("transformers", "tensorrt") else note
    capability = facts.get("capability") or world.machine.compute_capability
    told = f"PyTorch {facts.get('version')}"
    remedy = _torch_remedy(capability)
    if not capability:
        yield ok(told + (f", built for CUDA {facts['cuda']}" if facts.get("cuda") else ", built for the CPU"))
        return
    if not facts.get("cuda"):
        yield unused(f"{told} is built for the CPU, so it leaves the GPU unused", remedy)
        return
    architectures = facts.get("architectures") or []
    if not facts.get("usable"):
        yield unused(
            f"{told} (CUDA {facts['cuda']}) can't use the GPU",
            "look whether nvidia-smi works and whether its driver is new enough for that CUDA; in a container, start "
            "it with --runtime nvidia --gpus all",
        )
        return
    if facts.get("error") or facts.get("product") != _PRODUCT:
        yield broken(
            f"{told} can't compute on the GPU: {facts.get('error') or 'a product of matrices came out wrong'}", remedy
        )
        return
    covered = covers(architectures, capability, world.machine.is_jetson)
    if covered == "ptx":
        yield note(
            f"{told} has no code of its own for {_sm(capability)} and compiles it at the first start (minutes)", remedy
        )
    elif covered or not architectures:
        yield ok(f"{told}, CUDA {facts['cuda']}, computes on the GPU ({_sm(capability)})")
    else:
        yield note(
            f"{told} computes on the GPU, though it lists no code for {_sm(capability)} (it has "
            f"{' '.join(architectures)}) and nobody supports that",
            "go on, and rely on the parity check; should something fail with 'no kernel image': " + remedy,
        )


def covers(architectures: Iterable[str], capability: str, tegra: bool) -> str:
    """How a CUDA program's code covers a GPU.

    Code for a lower minor version of the same major one runs too, but not from desktop GPUs on Tegra or back (CUDA C
    Programming Guide, binary compatibility); PTX of any lower version is compiled.

    Args:
        architectures: such as "sm_87" and "compute_90".
        capability: of the GPU, such as "8.7".
        tegra: whether it is a Jetson.

    Returns:
        "code", "ptx", or "" where it doesn't.
    """
    major, minor = (int(part) for part in capability.split("."))
    ptx = False
    for name in architectures:
        match = re.fullmatch(r"(sm|compute)_(\d+)(\d)[af]?", name)
        if match is None:
            continue
        built = (int(match.group(2)), int(match.group(3)))
        if match.group(1) == "sm":
            same = built == (major, minor)
            if same or (not tegra and not name.endswith(("a", "f")) and built[0] == major and built[1] <= minor):
                return "code"
        ptx |= match.group(1) == "compute" and built <= (major, minor)
    return "ptx" if ptx else ""


def _torch_remedy(capability: str) -> str:
    if capability == THOR:
        return "pip install torch --index-url https://download.pytorch.org/whl/cu130 (wheels for aarch64 and Thor)"
    if capability == ORIN:
        # Read in public reports: LibreYOLO on Orin Nano, nvidia-holoscan/holohub #1687 on AGX Orin.
        return (
            "take PyTorch's own wheel for CUDA 13, whose code for 8.0 computes on Orin by reports (those for servers "
            "fail there): pip install torch --index-url https://download.pytorch.org/whl/cu130"
        )
    return "install a CUDA build for this GPU: https://pytorch.org/get-started/locally"


def _sm(capability: str) -> str:
    return "sm_" + capability.replace(".", "")


def _gb(size: float) -> str:
    return f"{size / GB:.1f} GB"


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(str(part) for part in version)
