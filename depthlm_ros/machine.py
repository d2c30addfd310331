"""The machine that an engine runs on, as far as its answers depend on it: GPU, driver, JetPack, libraries.

Everything here is read from files, from installed packages' metadata or from `nvidia-smi`; nothing heavy is imported
and nothing fails: what can't be found out is empty.
"""

from __future__ import annotations

import hashlib
import platform
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib import metadata
from pathlib import Path

# L4T release to the JetPack that it comes with; the last listed at or below a release counts (sources: NVIDIA's
# release notes by way of OE4T/meta-tegra, and jetson_stats).
JETPACKS = {
    (36, 3, 0): "6.0",
    (36, 4, 0): "6.1",
    (36, 4, 3): "6.2",
    (36, 4, 4): "6.2.1",
    (36, 5, 0): "6.2.2",
    (38, 2, 0): "7.0",
    (38, 4, 0): "7.1",
    (39, 2, 0): "7.2",
    (39, 2, 1): "7.2.1",
    (39, 2, 2): "7.2.2",
}
# Compute capability of a Jetson's chip, by what the device tree calls it (L4T's device trees; one GPU each).
CHIPS = {"tegra234": "8.7", "tegra264": "11.0"}
ORIN, THOR = "8.7", "11.0"
_TEGRA_RELEASE = re.compile(r"R(\d+) \(release\), REVISION: (\d+)\.(\d+)")
_SMI_S = 10.0


@dataclass(frozen=True)
class Machine:
    """What an engine's answers may depend on.

    Attributes:
        arch: "x86_64" or "aarch64".
        board: name of a Jetson's module or of a developer kit; empty elsewhere.
        cpu: what it is called, and a digest of what it can do, since a library chooses its kernels by that.
        gpu: name of the first GPU; empty where there is none.
        more_gpus: names of the others, with commas between them.
        compute_capability: of it, such as "8.7"; empty where it can't be found out.
        driver: version of its driver.
        l4t: release of Jetson Linux, such as "36.4.3"; empty elsewhere.
        jetpack: that it belongs to, such as "6.2".
        tensorrt: version of the TensorRT of this Python, else of the libraries that are installed.
    """

    arch: str = ""
    board: str = ""
    gpu: str = ""
    compute_capability: str = ""
    driver: str = ""
    l4t: str = ""
    jetpack: str = ""
    tensorrt: str = ""
    cpu: str = ""
    more_gpus: str = ""

    def as_dict(self) -> dict[str, str]:
        """What is known, by name."""
        return {name: value for name, value in asdict(self).items() if value}

    @property
    def is_jetson(self) -> bool:
        """Whether it is a Jetson, as far as that shows in a container."""
        return bool(self.l4t) or "jetson" in self.board.lower()


@dataclass(frozen=True)
class Memory:
    """Bytes of memory, of the machine or of its first GPU.

    Attributes:
        total: all of it; 0 where that can't be found out.
        free: what a program could still get.
    """

    total: int = 0
    free: int = 0


@lru_cache(maxsize=1)
def this_machine() -> Machine:
    """The machine that runs this, found out once."""
    return read_machine()


def read_machine(root: Path = Path("/"), run: Callable[[list[str]], str] | None = None) -> Machine:
    """Finds out what a machine is.

    Args:
        root: where its files are.
        run: runs a command and returns what it prints, "" when it can't; None runs it here.
    """
    run = run or printed_by
    l4t = tegra_release(_text(root / "etc/nv_tegra_release")) or _packaged_release(run)
    capability = gpu = driver = ""
    row = run(["nvidia-smi", "--query-gpu=name,compute_cap,driver_version", "--format=csv,noheader"])
    rows = [line for line in row.splitlines() if line.strip()]
    fields = [field.strip() for field in rows[0].split(",")] if rows else []
    others = ", ".join(line.split(",")[0].strip() for line in rows[1:])
    if len(fields) == 3:
        gpu, capability, driver = (field if field not in ("[N/A]", "N/A") else "" for field in fields)
    board = _text(root / "proc/device-tree/model").replace("\0", "").strip()
    if not capability:
        # nvidia-smi is limited on Orin; its chip and Thor's have one capability each.
        compatible = _text(root / "proc/device-tree/compatible")
        capability = next((known for chip, known in CHIPS.items() if chip in compatible), "")
        gpu = gpu or (board if capability else "")
    jetpack = jetpack_of(l4t)
    version = tensorrt_version(run)
    cpu = cpu_of(_text(root / "proc/cpuinfo"))
    return Machine(platform.machine(), board, gpu, capability, driver, l4t, jetpack, version, cpu, others)


def cpu_of(text: str) -> str:
    """A CPU's name and a digest of its features, from the text of /proc/cpuinfo; "" from any other text."""
    told = dict(re.findall(r"^([^\t:]+)\s*:\s*(.*)$", text, re.M))
    # x86 has a name; ARM has numbers of maker and part.
    name = told.get("model name") or " ".join(
        told[key] for key in ("CPU implementer", "CPU part", "CPU variant") if told.get(key)
    )
    features = " ".join(sorted((told.get("flags") or told.get("Features") or "").split()))
    return f"{name} {hashlib.sha256(features.encode()).hexdigest()[:8]}" if name or features else ""


def tegra_release(text: str) -> str:
    """Release of Jetson Linux from the text of /etc/nv_tegra_release, such as "36.4.3"; "" from any other text."""
    match = _TEGRA_RELEASE.search(text)
    return ".".join(match.groups()) if match else ""


def jetpack_of(l4t: str) -> str:
    """JetPack of a release of Jetson Linux; "" of an older or unknown one."""
    if not re.fullmatch(r"\d+\.\d+\.\d+", l4t):
        return ""
    release = tuple(int(part) for part in l4t.split("."))
    known = [jetpack for first, jetpack in JETPACKS.items() if first[:2] <= release[:2] and first <= release]
    same_line = [first for first in JETPACKS if first[0] == release[0]]
    return known[-1] if known and same_line else ""


def memory_of(root: Path = Path("/")) -> Memory:
    """The machine's memory, from /proc/meminfo; on a Jetson the GPU's too."""
    seen = dict(re.findall(r"^(MemTotal|MemAvailable):\s+(\d+) kB", _text(root / "proc/meminfo"), re.M))
    return Memory(*(int(seen.get(name, 0)) * 1024 for name in ("MemTotal", "MemAvailable")))


def gpu_memory_of(run: Callable[[list[str]], str] | None = None) -> Memory:
    """The first GPU's own memory; zeros without one, and on a Jetson, whose GPU has none."""
    row = (run or printed_by)(["nvidia-smi", "--query-gpu=memory.total,memory.free", "--format=csv,noheader,nounits"])
    match = re.match(r"\s*(\d+),\s*(\d+)\s*$", row.splitlines()[0]) if row.strip() else None
    return Memory(*(int(mebibytes) << 20 for mebibytes in match.groups())) if match else Memory()


def power_mode_of(run: Callable[[list[str]], str] | None = None) -> str:
    """A Jetson's power mode, such as "MAXN" or "15W"; "" where there is no nvpmodel or it wants more rights."""
    match = re.search(r"NV Power Mode:\s*(\S.*)", (run or printed_by)(["nvpmodel", "-q"]))
    return match.group(1).strip() if match else ""


def tensorrt_version(run: Callable[[list[str]], str] | None = None) -> str:
    """Version of TensorRT: the Python package's, else of the Debian packages, else ""."""
    for package in ("tensorrt", "tensorrt-cu13", "tensorrt-cu12"):
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    installed = (run or printed_by)(["dpkg-query", "--showformat=${Version}\n", "--show", "libnvinfer1*"])
    match = re.search(r"^\d+(?:\.\d+)+", installed, re.M)
    return match.group() if match else ""


def printed_by(command: list[str]) -> str:
    """What a command prints; "" where there is no such command, or it fails or takes too long."""
    if shutil.which(command[0]) is None:
        return ""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SMI_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def _packaged_release(run: Callable[[list[str]], str]) -> str:
    """Release of Jetson Linux by its core package, for images that lack /etc/nv_tegra_release."""
    installed = run(["dpkg-query", "--showformat=${Version}", "--show", "nvidia-l4t-core"])
    match = re.match(r"\d+\.\d+\.\d+", installed)
    return match.group() if match else ""


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
