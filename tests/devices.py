"""Machines that aren't there, for tests: their files in a folder and what their commands print."""

from __future__ import annotations

import json
from pathlib import Path

from depthlm_ros.doctor.world import Child, World
from depthlm_ros.machine import read_machine

NVIDIA_SMI = "name,compute_cap,driver_version"
AGX_ORIN = "NVIDIA Jetson AGX Orin Developer Kit"
ORIN_NANO = "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit"
THOR = "NVIDIA Jetson AGX Thor Developer Kit"


class Device:
    """A machine made of files and of what commands print.

    Args:
        root: an empty folder that takes the place of /.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.printed: dict[str, str] = {}
        self.children: dict[str, Child] = {}
        self.versions = {
            "torch": "2.13.0", "transformers": "5.23.0", "numpy": "2.4.6", "opencv-python-headless": "4.13.0",
            "pillow": "12.0", "safetensors": "0.8", "rosbags": "0.11.9",
        }  # fmt: skip
        self.environment: dict[str, str] = {"HOME": str(root / "home")}
        self.commands: set[str] = set()
        self.modules = {"cv2", "tensorrt"}
        self.space: tuple[int, int] = (500_000_000_000, 300_000_000_000)
        self.shm: tuple[int, int] = (8_000_000_000, 8_000_000_000)
        (root / "home").mkdir(parents=True)
        (root / "dev/shm").mkdir(parents=True)
        self.file("etc/os-release", 'NAME="Ubuntu"\nVERSION_ID="24.04"\n')
        self.memory(32e9, 28e9)
        self.file("proc/sys/net/core/rmem_max", "2147483647\n")
        self.file("proc/sys/net/ipv4/ipfrag_high_thresh", "134217728\n")
        self.file("proc/sys/net/ipv4/ipfrag_time", "3\n")

    def file(self, path: str, text: str) -> Path:
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
        return target

    def memory(self, total: float, free: float) -> None:
        lines = f"MemTotal: {total / 1024:>14.0f} kB", "MemFree: 1 kB", f"MemAvailable: {free / 1024:.0f} kB"
        self.file("proc/meminfo", "\n".join(lines))

    def run(self, command: list[str]) -> str:
        told = " ".join(command)
        return next((text for part, text in self.printed.items() if part in told), "")

    def child(self, arguments: list[str], limit_s: float) -> Child:
        assert limit_s > 0
        told = " ".join(arguments)
        absent = Child(1, err="ImportError: not there")
        return next((child for part, child in self.children.items() if part in told), absent)

    def disk(self, path: Path) -> tuple[int, int]:
        return self.shm if path == self.root / "dev/shm" else self.space

    def world(self, python: tuple[int, int] = (3, 12), bridge: str | None = "cv_bridge isn't installed") -> World:
        return World(
            machine=read_machine(self.root, self.run),
            root=self.root,
            environment=self.environment,
            run=self.run,
            child=self.child,
            version=lambda name: self.versions.get(name, ""),
            disk=self.disk,
            python=python,
            importable=lambda name: name in self.modules,
            commands=lambda name: f"/usr/bin/{name}" if name in self.commands else None,
            bridge=lambda: bridge,
        )


def answer(**facts: object) -> Child:
    """A child that printed these facts."""
    return Child(0, json.dumps(facts) + "\n")


def jetson(root: Path, board: str, chip: str, l4t: str, tensorrt: str, memory_gb: float) -> Device:
    """A Jetson.

    Args:
        root: an empty folder.
        board: as the device tree names it.
        chip: "tegra234" or "tegra264".
        l4t: such as "36.4.3".
        tensorrt: version of its Debian package.
        memory_gb: of which a tenth is taken.
    """
    device = Device(root)
    major, rest = l4t.split(".", 1)
    device.file("etc/nv_tegra_release", f"# R{major} (release), REVISION: {rest}, GCID: 1, BOARD: generic\n")
    device.file("proc/device-tree/model", board + "\0")
    device.file("proc/device-tree/compatible", f"nvidia,p3737-0000+p3701-0005\0nvidia,{chip}\0")
    device.memory(memory_gb * 1e9, memory_gb * 0.9e9)
    device.printed = {
        "dpkg-query --showformat=${Version}\n --show libnvinfer1*": f"{tensorrt}-1+cuda12.6\n",
        "nvpmodel": "NV Power Mode: MAXN\n0\n",
    }
    return device


def desktop(root: Path, gpu: str, capability: str, gpu_gb: float = 24.0) -> Device:
    """A computer with a GPU of its own memory."""
    device = Device(root)
    device.printed = {
        NVIDIA_SMI: f"{gpu}, {capability}, 580.65.06\n",
        "memory.total,memory.free": f"{gpu_gb * 1024:.0f}, {gpu_gb * 1000:.0f}\n",
    }
    return device
