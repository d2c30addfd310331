"""What a machine is, from its files and commands."""

from __future__ import annotations

from pathlib import Path

import pytest
from devices import AGX_ORIN, NVIDIA_SMI, THOR, Device, desktop, jetson

from depthlm_ros.machine import (
    Machine,
    gpu_memory_of,
    jetpack_of,
    memory_of,
    power_mode_of,
    printed_by,
    read_machine,
    tegra_release,
    this_machine,
)


def test_orin_is_told_by_its_device_tree(tmp_path: Path) -> None:
    device = jetson(tmp_path, AGX_ORIN, "tegra234", "36.4.3", "10.3.0.30", 64)
    machine = read_machine(device.root, device.run)
    assert machine.board == machine.gpu == AGX_ORIN  # nvidia-smi says nothing there
    assert (machine.compute_capability, machine.l4t, machine.jetpack) == ("8.7", "36.4.3", "6.2")
    assert machine.tensorrt == "10.3.0.30"
    assert machine.is_jetson


def test_thor_has_nvidia_smi(tmp_path: Path) -> None:
    device = jetson(tmp_path, THOR, "tegra264", "38.4.0", "10.13.3.9", 128)
    device.printed[NVIDIA_SMI] = "NVIDIA Thor, 11.0, 580.00\n"
    machine = read_machine(device.root, device.run)
    assert (machine.gpu, machine.board, machine.driver) == ("NVIDIA Thor", THOR, "580.00")
    assert (machine.compute_capability, machine.jetpack) == ("11.0", "7.1")


def test_not_available_is_empty_and_the_chip_helps_out(tmp_path: Path) -> None:
    device = jetson(tmp_path, AGX_ORIN, "tegra234", "39.2.0", "10.16.2.10", 64)
    device.printed[NVIDIA_SMI] = "Orin (nvgpu), [N/A], 595.10\n"
    machine = read_machine(device.root, device.run)
    assert (machine.gpu, machine.compute_capability, machine.jetpack) == ("Orin (nvgpu)", "8.7", "7.2")


def test_release_comes_from_the_package_where_the_file_is_missing(tmp_path: Path) -> None:
    device = jetson(tmp_path, AGX_ORIN, "tegra234", "36.4.3", "10.3.0.30", 64)
    (tmp_path / "etc/nv_tegra_release").unlink()
    assert read_machine(device.root, device.run).l4t == ""
    device.printed["nvidia-l4t-core"] = "36.4.7-20250918154033"
    machine = read_machine(device.root, device.run)
    assert (machine.l4t, machine.jetpack) == ("36.4.7", "6.2.1")


def test_desktop(tmp_path: Path) -> None:
    device = desktop(tmp_path, "NVIDIA RTX A6000", "8.6")
    device.printed[NVIDIA_SMI] += "NVIDIA T400, 7.5, 580.65.06\n"  # the first one counts
    machine = read_machine(device.root, device.run)
    assert machine.as_dict()["gpu"] == "NVIDIA RTX A6000"
    assert "board" not in machine.as_dict() and not machine.is_jetson


def test_other_boards_are_no_gpus(tmp_path: Path) -> None:
    device = Device(tmp_path)
    device.file("proc/device-tree/model", "Raspberry Pi 5 Model B Rev 1.0\0")
    device.file("proc/device-tree/compatible", "raspberrypi,5-model-b\0brcm,bcm2712\0")
    machine = read_machine(device.root, device.run)
    assert (machine.gpu, machine.compute_capability) == ("", "")
    assert machine.board == "Raspberry Pi 5 Model B Rev 1.0"


def test_nothing_at_all(tmp_path: Path) -> None:
    machine = read_machine(tmp_path / "absent", lambda command: "")
    assert (machine.gpu, machine.l4t, machine.jetpack) == ("", "", "")
    assert memory_of(tmp_path / "absent").total == 0


@pytest.mark.parametrize(
    ("text", "release"),
    [
        ("# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64", "36.4.3"),
        ("# R38 (release), REVISION: 2.0, GCID: 41844464", "38.2.0"),
        ("R36", ""),
        ("", ""),
    ],
)
def test_tegra_release(text: str, release: str) -> None:
    assert tegra_release(text) == release


@pytest.mark.parametrize(
    ("l4t", "jetpack"),
    [
        ("36.3.0", "6.0"), ("36.4.3", "6.2"), ("36.4.7", "6.2.1"), ("36.5.0", "6.2.2"), ("38.2.1", "7.0"),
        ("38.4.0", "7.1"), ("39.2.0", "7.2"), ("39.2.1", "7.2.1"), ("35.6.0", ""), ("40.0.0", ""), ("", ""),
        ("36.4", ""),
    ],
)  # fmt: skip
def test_jetpack(l4t: str, jetpack: str) -> None:
    assert jetpack_of(l4t) == jetpack


def test_memory(tmp_path: Path) -> None:
    device = desktop(tmp_path, "NVIDIA RTX A6000", "8.6", gpu_gb=48)
    device.memory(64e9, 50e9)
    assert memory_of(device.root).free == pytest.approx(50e9, rel=1e-6)
    assert gpu_memory_of(device.run).total == 48 << 30
    device.printed["memory.total,memory.free"] = "[N/A], [N/A]\n"  # memory that is shared with the processor
    assert gpu_memory_of(device.run).total == 0


def test_power_mode() -> None:
    told = "NVPM VERB: Current mode: NV Power Mode: MODE_15W_6CORE\n2\n"
    assert power_mode_of(lambda command: told) == "MODE_15W_6CORE"
    assert power_mode_of(lambda command: "NV Power Mode: MAXN_SUPER\n2\n") == "MAXN_SUPER"
    assert power_mode_of(lambda command: "") == ""


def test_commands_that_fail_print_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing = tmp_path / "nvidia-smi"
    failing.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed'\nexit 9\n")
    failing.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert printed_by(["nvidia-smi", "-L"]) == ""
    assert printed_by(["no-such-command-here"]) == ""
    assert printed_by(["echo", "two words"]) == "two words\n"


def test_this_machine_is_found_out_once() -> None:
    assert this_machine() is this_machine()
    assert isinstance(this_machine(), Machine) and this_machine().arch
